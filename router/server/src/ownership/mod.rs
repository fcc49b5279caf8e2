//! Which router owns which shard, where several share one log in Kafka and one store in Redis: each takes the shards that rank it
//! first among those that live, follows those that rank it second, and hands over what belongs to one that joins.

#[cfg(feature = "kafka")]
mod asking;
#[cfg(feature = "kafka")]
mod following;
#[cfg(feature = "kafka")]
mod handle;
#[cfg(not(feature = "kafka"))]
mod nobody;
#[cfg(feature = "kafka")]
mod plan;
mod routes;
#[cfg(feature = "kafka")]
mod showing;
#[cfg(feature = "kafka")]
mod taking;
#[cfg(feature = "kafka")]
mod task;

#[cfg(feature = "kafka")]
pub(crate) use handle::Handle;
#[cfg(not(feature = "kafka"))]
pub(crate) use nobody::Handle;
pub(crate) use routes::{fleet, routes};
#[cfg(feature = "kafka")]
pub(crate) use task::{Begin, Ownership};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A shard as this router knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRow {
    pub shard: u32,
    /// `None`: nobody is known to own it.
    pub owner: Option<String>,
    /// Who follows its log.
    pub standby: Option<String>,
    pub epoch: u64,
    /// The last position that is known to be durable.
    pub position: u64,
    /// Entries that the standby has not read yet.
    pub lag: Option<u64>,
    /// RFC 3339: when this owner began.
    pub since: Option<String>,
}

/// A router that lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterRow {
    pub id: String,
    pub incarnation: String,
    pub atp: String,
    pub http: String,
    /// How many shards it owns.
    pub shards: u32,
    /// It is to own none.
    pub drained: bool,
}

/// The fleet as this router saw it last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Fleet {
    pub(crate) shards: Vec<ShardRow>,
    pub(crate) routers: Vec<RouterRow>,
    /// Every shard has had an owner once since this router began: it can serve whoever comes.
    #[serde(skip)]
    pub(crate) complete: bool,
}

impl Fleet {
    pub(crate) fn nowhere(&self) -> Vec<u32> {
        self.shards.iter().filter(|row| row.owner.is_none()).map(|row| row.shard).collect()
    }

    /// Of these shards no owner is known.
    fn disown(&mut self, of: impl Fn(&ShardRow) -> bool) {
        for row in self.shards.iter_mut().filter(|row| of(row)) {
            (row.owner, row.since) = (None, None);
        }
        self.count();
    }

    /// Of each router how many shards it owns.
    fn count(&mut self) {
        let mut owned = BTreeMap::<&str, u32>::new();
        for owner in self.shards.iter().filter_map(|row| row.owner.as_deref()) {
            *owned.entry(owner).or_default() += 1;
        }
        for router in &mut self.routers {
            router.shards = owned.get(&*router.id).copied().unwrap_or(0);
        }
    }
}

//! Which router owns which shard, where several share one log in Kafka and one store in Redis: each takes the shards that rank it
//! first among those that live, follows those that rank it second, and hands over what belongs to one that joins.

#[cfg(feature = "kafka")]
mod asking;
#[cfg(feature = "kafka")]
mod following;
#[cfg(feature = "kafka")]
mod plan;
mod routes;
#[cfg(feature = "kafka")]
mod showing;
#[cfg(feature = "kafka")]
mod taking;
#[cfg(feature = "kafka")]
mod task;

pub(crate) use routes::{fleet, routes};
#[cfg(feature = "kafka")]
pub(crate) use task::{Begin, Ownership};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

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

/// Why a router can't be drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotDrained {
    /// No such router lives.
    Unknown,
    /// The store, which tells it, is away.
    Away(String),
}

/// What is asked of the owner's task.
enum Order {
    Drain {
        router: String,
        drained: bool,
        reply: oneshot::Sender<Result<(), NotDrained>>,
    },
    /// Hand everything over; the reply comes when nothing is owned here any more.
    HandOver {
        over: oneshot::Sender<()>,
    },
}

/// The way to the task of [`Ownership`].
#[derive(Clone)]
pub(crate) struct Handle {
    orders: mpsc::Sender<Order>,
    fleet: watch::Receiver<Arc<Fleet>>,
}

impl Handle {
    pub(crate) fn fleet(&self) -> Arc<Fleet> {
        self.fleet.borrow().clone()
    }

    /// Returns when this router owns nothing any more, or its task has ended.
    pub(crate) async fn hand_over(&self) {
        let (over, is_over) = oneshot::channel();
        if self.orders.send(Order::HandOver { over }).await.is_ok() {
            let _ = is_over.await;
        }
    }

    /// Tells a router to own nothing, or that it may again. It begins with that within a third of a lease.
    pub(crate) async fn drain(&self, router: String, drained: bool) -> Result<(), NotDrained> {
        let (reply, answer) = oneshot::channel();
        let stopping = || NotDrained::Away("this router is stopping".into());
        self.orders.send(Order::Drain { router, drained, reply }).await.map_err(|_| stopping())?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }
}

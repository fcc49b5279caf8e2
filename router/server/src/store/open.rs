//! Opens the store that the configuration names, before the router serves, and starts the task that writes to it.

use super::{Identity, MemoryStore, Projector, RedisStore, StoreConfig, StoreHealth, same_log};
use crate::agent_task::Agents;
use crate::shards::Shards;
use crate::time::Clocks;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long others see a stream after its end.
const ENDED_TTL: Duration = Duration::from_secs(60);

pub(crate) enum Opened {
    Memory(MemoryStore),
    Redis(Box<RedisStore>),
}

impl Opened {
    /// Opens the store for a log: its id in hex, and of each shard the position of its last entry.
    ///
    /// # Errors
    /// The store remembers another log, or more of this one: acknowledged records are gone.
    pub(crate) async fn open(config: &StoreConfig, log: &str, ends: &[(u32, u64)]) -> Result<Self, String> {
        let config = match config {
            StoreConfig::Memory => return Ok(Self::Memory(MemoryStore::new())),
            StoreConfig::Redis(config) => config,
        };
        let mut store = RedisStore::new(config).map_err(|e| format!("store.redis.url: {e}"))?;
        same_log::check(&mut store, log, ends).await.map_err(|(shard, what)| {
            let prefix = &config.prefix;
            format!(
                "ELOG: acknowledged records are gone: shard {shard}: {what}; restore the newest copy of data_dir/log. To give up what \
                 is gone and begin with this log, delete what the store remembers, redis-cli --scan --pattern \
                 '{{{prefix}:*}}:shard' | xargs redis-cli DEL, or set another store.redis.prefix; then start the agents again too, which have known a later owner"
            )
        })?;
        Ok(Self::Redis(Box::new(store)))
    }

    /// Shows the shards that run here until it is stopped.
    pub(crate) fn project(
        self,
        of: (Shards, Agents),
        identity: Identity,
        clocks: Clocks,
        stop: CancellationToken,
        tasks: &TaskTracker,
    ) -> watch::Receiver<StoreHealth> {
        let (health, shown) = watch::channel(StoreHealth::default());
        match self {
            // Nobody looks into this process for what has ended.
            Self::Memory(store) => {
                let projector = Projector::new(store, of, identity, clocks, Duration::ZERO, health);
                tasks.spawn(projector.run(stop));
            }
            Self::Redis(store) => {
                let projector = Projector::new(*store, of, identity, clocks, ENDED_TTL, health);
                tasks.spawn(projector.run(stop));
            }
        }
        shown
    }
}

//! Takes one shard in the log, off the async threads.

use super::following::Slot;
use crate::config::Config;
use crate::log::{Log, LogError, Opened};
use crate::opening::{OpenedShard, SharedLog, settings_of};
use crate::shards::Shards;
use crate::store::{Watermark, differs};
use crate::time::Clocks;
use atp_core::shard::Shard;
use std::sync::Arc;

/// A shard that was taken.
pub(super) struct Taken {
    pub(super) opened: OpenedShard,
    /// Whose settings it has read.
    pub(super) config: Arc<Config>,
    /// What was found, one fact per line.
    pub(super) report: Vec<String>,
}

/// What it needs.
pub(super) struct Taker {
    pub(super) log: SharedLog,
    pub(super) shards: Shards,
    pub(super) config: Arc<Config>,
    pub(super) clocks: Clocks,
    pub(super) incarnation: String,
    /// How far the shard had been shown before.
    pub(super) shown: Option<Watermark>,
}

impl Taker {
    /// Blocks.
    ///
    /// # Errors
    /// As of [`crate::log::KafkaShards::take`]; `NotThisLog` where the log ends before what was shown.
    pub(super) fn take(self, shard: u32, slot: Option<&Slot>) -> Result<Taken, LogError> {
        let settings = settings_of(&self.config.settings, shard, self.shards.placement());
        let follower = slot.and_then(Slot::take);
        let now_ms = self.clocks.now().wall_ms;
        let opened = self.log.kafka.take(shard, &settings.router_id, &self.incarnation, now_ms, follower)?;
        let Opened { log, source, state, report, .. } = opened;
        if let Some(what) = differs(self.shown, &self.log.id, state.position()) {
            let address = source.to_string();
            let what =
                format!("acknowledged records are gone: {what}; restore them, or set another store.redis.prefix");
            return Err(LogError::NotThisLog { address, what });
        }
        let state = Shard::recover_behind_epoch(settings, state, self.clocks.now());
        let position = state.state().position();
        let log: Box<dyn Log> = Box::new(log);
        let opened = OpenedShard { number: shard, log, source, shard: state, position, serving: true };
        Ok(Taken { opened, config: self.config, report })
    }
}

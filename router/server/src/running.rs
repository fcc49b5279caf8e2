//! The shards' owner tasks of this process: each is started alone and may be stopped alone; the log's end is the end of all.

use crate::agent_task::Agents;
use crate::config::Config;
use crate::connection::Shared;
use crate::inbox::inbox;
use crate::lessons::Lessons;
use crate::log::Guarantee;
use crate::opening::OpenedShard;
use crate::shard_task::{Begin, Health, ShardTask};
use crate::shards::{Here, Place, Shards};
use crate::time::Clocks;
use crate::tool::Tools;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes that may wait for one shard at least: some reads of connections.
const INBOX_BYTES_LEAST: u32 = 1 << 20;

/// What starts them, and sees how they end.
pub(crate) struct Running {
    shards: Shards,
    agents: Agents,
    clocks: Clocks,
    guarantee: Guarantee,
    alone: bool,
    inbox_bytes: u32,
    tools: Tools,
    lessons: Lessons,
    tasks: TaskTracker,
    open: Arc<AtomicUsize>,
    stop: CancellationToken,
    running: JoinSet<(u32, Result<(), String>)>,
    /// By shard: what ends it alone.
    stops: BTreeMap<u32, CancellationToken>,
}

impl Running {
    /// Nothing runs yet. `stop` ends all of them; `alone`: no other router can own one.
    pub(crate) fn new(
        config: &Config,
        shared: &Shared,
        (guarantee, alone): (Guarantee, bool),
        clocks: Clocks,
        stop: CancellationToken,
    ) -> Self {
        let (shards, tasks) = (shared.shards.clone(), shared.tasks.clone());
        let inbox_bytes = (config.limits.inbox_bytes / shards.placement().shards()).max(INBOX_BYTES_LEAST);
        let tools = Tools::new(config.tools.clone(), tasks.clone());
        let agents = shared.agents.clone();
        let lessons = Lessons::start(shards.clone(), &tasks, stop.clone());
        let (running, stops) = (JoinSet::new(), BTreeMap::new());
        Self {
            shards,
            agents,
            clocks,
            guarantee,
            alone,
            inbox_bytes,
            tools,
            lessons,
            tasks,
            open: Arc::default(),
            stop,
            running,
            stops,
        }
    }

    /// Starts one shard, which is found from now on. It ends with its log, or when it is stopped with all others.
    pub(crate) fn start(&mut self, opened: OpenedShard) {
        let OpenedShard { number, log, source, shard, position, serving } = opened;
        let (inbox, taking) = inbox(self.inbox_bytes);
        let durable = if serving { shard.state().position() } else { position };
        let (epoch, since_ms) = (shard.epoch(), self.clocks.now().wall_ms);
        // Until the log has been asked once it is as if that had been long ago.
        let alone_at = log.look().then(|| self.clocks.origin());
        let (guarantee, default) = (self.guarantee, Health::default());
        let health = Health { guarantee, serving, durable, epoch, since_ms, alone_at, ..default };
        let (sender, health) = watch::channel(health);
        self.shards.set(number, Place::Here(Here { inbox: inbox.clone(), source: source.clone(), health }));
        let stop = self.stop.child_token();
        self.stops.insert(number, stop.clone());
        self.lessons.begins(number, shard.state().statistics());
        let task = ShardTask::new(Begin {
            number,
            shard,
            taking,
            inbox,
            log,
            agents: self.agents.clone(),
            shards: self.shards.clone(),
            clocks: self.clocks,
            source,
            health: sender,
            stop,
            alone: self.alone,
            tasks: self.tasks.clone(),
            tools: self.tools.clone(),
            lessons: self.lessons.clone(),
            open: self.open.clone(),
        });
        self.running.spawn(async move { (number, task.run().await) });
    }

    /// Ends one shard: what is decided is written first.
    #[cfg(feature = "kafka")]
    pub(crate) fn stop(&mut self, shard: u32) {
        self.stops.remove(&shard).inspect(CancellationToken::cancel);
    }

    /// The next one that has ended, and why if it failed; `None`: none runs.
    pub(crate) async fn ended(&mut self) -> Option<(u32, Result<(), String>)> {
        // A panic of one may have left what they share in any state.
        let (shard, ended) = self.running.join_next().await?.expect("a shard's task doesn't panic");
        self.stops.remove(&shard);
        Some((shard, ended))
    }

    /// Waits until all have ended. One that fails takes the others with it: nothing may be served by a router that can't write.
    /// `over` is cancelled when the first has ended.
    ///
    /// # Errors
    /// Why the first of them failed.
    pub(crate) async fn end(mut self, over: CancellationToken) -> Result<(), String> {
        let mut outcome = Ok(());
        while let Some((_, ended)) = self.ended().await {
            over.cancel();
            self.stop.cancel();
            outcome = outcome.and(ended);
        }
        outcome
    }
}

//! The shards' owner tasks of this process: each is started alone and may be stopped alone; the log's end is the end of all.

use crate::agent_task::Agents;
use crate::config::Config;
use crate::connection::Shared;
use crate::inbox::inbox;
use crate::lessons::Lessons;
use crate::log::Guarantee;
use crate::opening::OpenedShard;
use crate::shard_task::{Begin, Health, ShardTask};
use crate::shards::{Here, Shards};
use crate::time::Clocks;
use crate::tool::Tools;
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
    inbox_bytes: u32,
    tools: Tools,
    lessons: Lessons,
    tasks: TaskTracker,
    stop: CancellationToken,
    running: JoinSet<Result<(), String>>,
}

impl Running {
    /// Nothing runs yet. `stop` ends all of them.
    pub(crate) fn new(
        config: &Config,
        shared: &Shared,
        guarantee: Guarantee,
        clocks: Clocks,
        stop: CancellationToken,
    ) -> Self {
        let (shards, tasks) = (shared.shards.clone(), shared.tasks.clone());
        let inbox_bytes = (config.limits.inbox_bytes / shards.placement().shards()).max(INBOX_BYTES_LEAST);
        let tools = Tools::new(config.tools.clone(), tasks.clone());
        let agents = shared.agents.clone();
        let lessons = Lessons::start(shards.clone(), &tasks, stop.clone());
        Self { shards, agents, clocks, guarantee, inbox_bytes, tools, lessons, tasks, stop, running: JoinSet::new() }
    }

    /// Starts one shard, which is found from now on. It ends with its log, or when it is stopped with all others.
    pub(crate) fn start(&mut self, opened: OpenedShard) {
        let OpenedShard { number, log, source, shard, position, serving } = opened;
        let (inbox, taking) = inbox(self.inbox_bytes);
        let durable = if serving { shard.state().position() } else { position };
        let health = Health { guarantee: self.guarantee, serving, durable, ..Health::default() };
        let (sender, health) = watch::channel(health);
        self.shards.open(number, Here { inbox: inbox.clone(), source: source.clone(), health });
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
            stop: self.stop.clone(),
            tasks: self.tasks.clone(),
            tools: self.tools.clone(),
            lessons: self.lessons.clone(),
        });
        let shards = self.shards.clone();
        self.running.spawn(async move {
            task.run().await?;
            // Of one that failed its health still says why.
            shards.close(number);
            Ok(())
        });
    }

    /// Waits until all have ended. One that fails takes the others with it: nothing may be served by a router that can't write.
    /// `over` is cancelled when the first has ended.
    ///
    /// # Errors
    /// Why the first of them failed.
    pub(crate) async fn end(mut self, over: CancellationToken) -> Result<(), String> {
        let mut outcome = Ok(());
        while let Some(ended) = self.running.join_next().await {
            let ended = ended.unwrap_or_else(|e| Err(format!("a shard's task broke: {e}")));
            over.cancel();
            self.stop.cancel();
            outcome = outcome.and(ended);
        }
        outcome
    }
}

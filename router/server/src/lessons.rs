//! What the shards of this router teach each other of agents: an estimate in one of them rests on the runs of all. Every log has
//! its own shard's part; this is the sum, in memory, a moment late. A lesson that finds no room is lost to the others.

use crate::inbox::ToShard;
use crate::shards::Shards;
use atp_core::message::Input;
use atp_core::statistics::{Lesson, Statistics};
use atp_proto::AgentName;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Lessons that may wait.
const WAITING_MAX: usize = 4096;
/// How often the shards are told, at most.
const EVERY: Duration = Duration::from_millis(250);

enum Taught {
    Lesson(Box<Lesson>),
    /// What a shard that begins here knows from its log.
    Shard(u32, Box<Statistics>),
}

/// The way to the task that adds them up. Clones share it.
#[derive(Clone)]
pub(crate) struct Lessons(Option<mpsc::Sender<Taught>>);

impl Lessons {
    /// Starts the task, unless one shard is all there is.
    pub(crate) fn start(shards: Shards, tasks: &TaskTracker, stop: CancellationToken) -> Self {
        if shards.placement().shards() == 1 {
            return Self(None);
        }
        let (sender, queue) = mpsc::channel(WAITING_MAX);
        tasks.spawn(add_up(shards, queue, stop));
        Self(Some(sender))
    }

    pub(crate) fn teach(&self, lesson: Box<Lesson>) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(Taught::Lesson(lesson));
        }
    }

    /// A shard begins here with what its log says.
    pub(crate) fn begins(&self, shard: u32, statistics: &Statistics) {
        if let Some(sender) = &self.0
            && statistics.agents().next().is_some()
        {
            let _ = sender.try_send(Taught::Shard(shard, Box::new(statistics.clone())));
        }
    }
}

async fn add_up(shards: Shards, mut queue: mpsc::Receiver<Taught>, stop: CancellationToken) {
    let mut all = Arc::new(Statistics::default());
    let mut batch = Vec::with_capacity(256);
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            n = queue.recv_many(&mut batch, 256) => if n == 0 { return },
            () = stop.cancelled() => return,
        }
        // What comes meanwhile is told with it.
        tick.tick().await;
        while let Ok(more) = queue.try_recv() {
            batch.push(more);
        }
        let sum = Arc::make_mut(&mut all);
        for taught in batch.drain(..) {
            match taught {
                Taught::Lesson(lesson) => sum.learn(&lesson),
                Taught::Shard(shard, known) => {
                    let judges = |agent: &str| shards.home_of_agent(&AgentName::new(agent)) == shard;
                    sum.merge(&known, judges);
                }
            }
        }
        let all = all.clone();
        shards.tell_all(|_| ToShard::Input(Box::new(Input::Learned(all.clone())))).await;
    }
}

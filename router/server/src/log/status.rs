//! What the log tells the shell. Events are the differences of one small status, so the writer never waits for a reader
//! of events, and a slow reader misses intermediate positions but no fact.

use super::LogError;
use atp_core::message::LogRoom;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;

/// News from the log, in the order in which [`Events::next`] gives them when several are due.
#[derive(Clone, Debug)]
pub enum Event {
    /// At that time nobody else had begun to own the shard: the log was asked then or later.
    Alone {
        at: Instant,
    },
    /// Every entry up to `position` is durable (with `async`: written). Once per block at most.
    Durable {
        position: u64,
    },
    Room(LogRoom),
    /// A segment has begun, and a checkpoint is due: 64 MiB (a segment), or four times the last checkpoint, lie behind it.
    NewSegment,
    /// Fail-stop: nothing more is written, every later append is refused. The last event.
    Failed(Arc<LogError>),
}

#[derive(Clone, Debug, Default)]
pub(super) struct Status {
    /// When the log was asked last of what it has answered; `None`: nobody else can own the shard, or it hasn't answered yet.
    pub(super) alone: Option<Instant>,
    pub(super) durable: u64,
    pub(super) room: LogRoom,
    pub(super) checkpoints_due: u64,
    pub(super) failed: Option<Arc<LogError>>,
}

/// The receiving end. The room of a fresh log counts as `Enough` until an event says otherwise.
#[derive(Debug)]
pub struct Events {
    now: watch::Receiver<Status>,
    seen: Status,
}

impl Events {
    /// `durable`: what was durable when the log was opened, which is no news.
    pub(super) fn new(now: watch::Receiver<Status>, durable: u64) -> Self {
        Self { now, seen: Status { durable, ..Status::default() } }
    }

    /// The next event; `None` once the log is closed and all was told. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.try_next() {
                return Some(event);
            }
            if self.now.changed().await.is_err() {
                return self.try_next();
            }
        }
    }

    /// An event that is due already.
    pub fn try_next(&mut self) -> Option<Event> {
        let now = self.now.borrow_and_update();
        // Before what became durable later: what waits for this was decided before it.
        if let Some(at) = now.alone.filter(|_| now.alone != self.seen.alone) {
            self.seen.alone = now.alone;
            return Some(Event::Alone { at });
        }
        if now.durable != self.seen.durable {
            self.seen.durable = now.durable;
            return Some(Event::Durable { position: now.durable });
        }
        if now.room != self.seen.room {
            self.seen.room = now.room;
            return Some(Event::Room(now.room));
        }
        if now.checkpoints_due != self.seen.checkpoints_due {
            self.seen.checkpoints_due = now.checkpoints_due;
            return Some(Event::NewSegment);
        }
        if now.failed.is_some() && self.seen.failed.is_none() {
            self.seen.failed.clone_from(&now.failed);
            return now.failed.clone().map(Event::Failed);
        }
        None
    }
}

//! The way into a shard: one bounded queue, in bytes and in count. Senders wait while it is full; the shard never waits.

use crate::clients::Bounds;
use crate::outbox::Outbox;
use atp_core::escrow::Escrow;
use atp_core::message::{Answer, FromAgent, Input, Query};
use atp_core::settings::Settings;
use atp_proto::codec::Received;
use atp_proto::{AgentName, Amount, ConnId, StreamId, TenantId};
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc, oneshot};

/// Messages that may wait; each is a batch of one read.
const MESSAGES_MAX: usize = 4096;

/// One message to the owner task of a shard.
pub(crate) enum ToShard {
    /// A client's connection has something for this shard; its frames follow.
    Opened {
        conn: ConnId,
        tenant: TenantId,
        outbox: Outbox,
        bounds: Arc<Bounds>,
    },
    /// What one read of a client's connection yielded.
    Frames {
        conn: ConnId,
        frames: Vec<Received>,
    },
    /// These streams of a client go on here, each behind the msg_seq that it has: its router followed them elsewhere.
    Resume {
        conn: ConnId,
        tenant: TenantId,
        outbox: Outbox,
        bounds: Arc<Bounds>,
        streams: Vec<(StreamId, u64)>,
    },
    /// The client's connection is gone.
    Gone {
        conn: ConnId,
    },
    /// What one read of an agent's connection yielded for its calls.
    AgentFrames {
        agent: AgentName,
        incarnation: Arc<str>,
        frames: Vec<Received>,
    },
    /// What an `Agent` decided.
    Agent(Vec<FromAgent>),
    /// Replays of these streams were sent, each up to its msg_seq.
    Replayed {
        conn: ConnId,
        tenant: TenantId,
        done: Vec<(StreamId, u64)>,
    },
    /// A fact from the shell itself.
    Input(Box<Input>),
    /// What another shard says about an account's money.
    Escrow {
        from: u32,
        message: Escrow,
    },
    /// These agents are connected to another router: they hear who owns the shard.
    Introduce(Vec<AgentName>),
    /// A full outbox has room again.
    Room {
        conn: ConnId,
    },
    Ask {
        query: Query,
        reply: oneshot::Sender<Answer>,
    },
    /// An operator's word on an agent.
    DrainAgent {
        agent: AgentName,
        drained: bool,
        reply: oneshot::Sender<Answer>,
    },
    /// An operator's word on an account's pace.
    Faster {
        account: TenantId,
        more: Amount,
        for_ms: u64,
        by: String,
        reply: oneshot::Sender<Answer>,
    },
    Settings(Arc<Settings>),
    /// Nothing new; `over` once no stream is open.
    Drain {
        over: oneshot::Sender<()>,
    },
}

/// The sending half.
#[derive(Clone)]
pub(crate) struct Inbox {
    queue: mpsc::Sender<(u32, ToShard)>,
    room: Arc<Semaphore>,
    bytes_max: u32,
}

/// The shard's half.
pub(crate) struct Taking {
    queue: mpsc::Receiver<(u32, ToShard)>,
    room: Arc<Semaphore>,
    bytes_max: u32,
}

/// The owner task has ended; nothing is accepted any more.
#[derive(Debug)]
pub(crate) struct ShardGone;

/// An inbox of at most `bytes_max` waiting bytes.
pub(crate) fn inbox(bytes_max: u32) -> (Inbox, Taking) {
    let (sender, queue) = mpsc::channel(MESSAGES_MAX);
    let room = Arc::new(Semaphore::new(bytes_max as usize));
    (Inbox { queue: sender, room: room.clone(), bytes_max }, Taking { queue, room, bytes_max })
}

/// What a received frame weighs while it waits.
pub(crate) fn weight(received: &Received) -> usize {
    256 + received.body.len()
}

impl Inbox {
    /// The owner task has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// The way into the same run of the same task.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.queue.same_channel(&other.queue)
    }

    /// Waits for room, then queues the message. A message larger than the whole inbox takes all of it.
    pub(crate) async fn send(&self, weight: usize, message: ToShard) -> Result<(), ShardGone> {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).clamp(1, self.bytes_max);
        self.room.acquire_many(weight).await.map_err(|_| ShardGone)?.forget();
        self.queue.send((weight, message)).await.map_err(|_| ShardGone)
    }

    /// Queues the message if there is room for it now; false: it is dropped.
    pub(crate) fn offer(&self, weight: usize, message: ToShard) -> bool {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX).clamp(1, self.bytes_max);
        let Ok(room) = self.room.try_acquire_many(weight) else { return false };
        let queued = self.queue.try_send((weight, message)).is_ok();
        if queued {
            // The shard gives it back.
            room.forget();
        }
        queued
    }

    /// Asks the shard; `None` when it has ended.
    pub(crate) async fn ask(&self, query: Query) -> Option<Answer> {
        let (reply, answer) = oneshot::channel();
        self.send(256, ToShard::Ask { query, reply }).await.ok()?;
        answer.await.ok()
    }

    /// Tells the shard an operator's word on an agent; `None` when the shard has ended.
    pub(crate) async fn drain_agent(&self, agent: AgentName, drained: bool) -> Option<Answer> {
        let (reply, answer) = oneshot::channel();
        self.send(256, ToShard::DrainAgent { agent, drained, reply }).await.ok()?;
        answer.await.ok()
    }

    /// Tells the shard an operator's word on an account's pace; `None` when the shard has ended.
    pub(crate) async fn faster(&self, account: TenantId, more: Amount, for_ms: u64, by: String) -> Option<Answer> {
        let (reply, answer) = oneshot::channel();
        self.send(256, ToShard::Faster { account, more, for_ms, by, reply }).await.ok()?;
        answer.await.ok()
    }
}

impl Taking {
    /// Takes up to `max` messages; 0 when every sender is gone.
    pub(crate) async fn take(&mut self, into: &mut Vec<(u32, ToShard)>, max: usize) -> usize {
        self.queue.recv_many(into, max).await
    }

    /// Gives back the room of what was taken.
    pub(crate) fn release(&self, weight: usize) {
        self.room.add_permits(weight);
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.bytes_max as usize).saturating_sub(self.room.available_permits())
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.room.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn n_bytes_fit_and_one_more_waits() {
        let (inbox, mut taking) = inbox(1000);
        inbox.send(999, ToShard::Settings(Arc::default())).await.expect("open");
        inbox.send(1, ToShard::Settings(Arc::default())).await.expect("open");
        assert_eq!(taking.bytes(), 1000);
        let more =
            tokio::time::timeout(std::time::Duration::from_secs(1), inbox.send(1, ToShard::Settings(Arc::default())))
                .await;
        assert!(more.is_err(), "byte 1001 waits");
        let mut taken = Vec::new();
        assert_eq!(taking.take(&mut taken, 10).await, 2);
        taking.release(taken.iter().map(|(w, _)| *w as usize).sum());
        inbox.send(1001, ToShard::Settings(Arc::default())).await.expect("a larger message takes the whole inbox");
        drop(taking);
        assert!(inbox.send(1, ToShard::Settings(Arc::default())).await.is_err());
    }
}

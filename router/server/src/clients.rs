//! The clients' connections as their shard sees them: what is sent to each, which of its streams it has open,
//! and which streams lag because neither the outbox nor this memory took more. A lagging stream is read again from the
//! log, never lost, and nothing overtakes that: a client sees each stream in order.

use crate::catch_up::{Replay, replay};
use crate::inbox::{Inbox, ToShard};
use crate::log::Source;
use crate::metric;
use crate::outbox::{Outbox, weight};
use atp_core::clock::Now;
use atp_core::message::{Input, Machine};
use atp_core::shard::Shard;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::{Accepted, Resume};
use atp_proto::frame::kind;
use atp_proto::{Code, ConnId, Flags, Frame, StreamId, TenantId, WireError};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use tokio_util::task::TaskTracker;

/// Unnumbered frames that may wait beside a full outbox; a client that never reads gets no more of them.
const UNNUMBERED_WAITING_MAX: usize = 1024;
/// Bytes that wait here for one connection whose outbox is full; reading the log again costs far more.
const WAITING_BYTES_MAX: usize = 24 << 20;
/// The same for all connections together.
const ALL_WAITING_BYTES_MAX: usize = 128 << 20;

pub(crate) struct Clients {
    list: HashMap<ConnId, Client>,
    /// Connections with frames of this drain.
    touched: Vec<ConnId>,
    /// Weight of all frames that wait here.
    bytes: usize,
    streams_max: usize,
    inbox: Inbox,
    source: Source,
    tasks: TaskTracker,
}

struct Client {
    tenant: TenantId,
    outbox: Outbox,
    /// Frames of this drain, behind those that the outbox had no room for.
    frames: VecDeque<Frame>,
    /// What `frames` weigh.
    bytes: usize,
    /// Streams that this connection opened or watches.
    streams: BTreeSet<StreamId>,
    /// Streams whose later frames are read from the log when there is room.
    lagging: BTreeMap<StreamId, Lag>,
    /// Replays that wait for what is queued before them, or for the reader.
    replays: Vec<Replay>,
    /// A reader of the log is on its way for this connection.
    reading: bool,
    /// A task waits for room.
    waiting: bool,
}

/// Where a lagging stream goes on.
struct Lag {
    /// The last msg_seq that the connection was sent.
    after: u64,
    /// The shard was asked to go on; its `accepted` ends the lag. Frames before that were decided before it was asked.
    asked: bool,
}

impl Clients {
    pub(crate) fn new(streams_max: usize, inbox: Inbox, source: Source, tasks: TaskTracker) -> Self {
        Self { list: HashMap::new(), touched: Vec::new(), bytes: 0, streams_max, inbox, source, tasks }
    }

    pub(crate) fn open(&mut self, conn: ConnId, tenant: TenantId, outbox: Outbox) {
        let client = Client {
            tenant,
            outbox,
            frames: VecDeque::new(),
            bytes: 0,
            streams: BTreeSet::new(),
            lagging: BTreeMap::new(),
            replays: Vec::new(),
            reading: false,
            waiting: false,
        };
        self.list.insert(conn, client);
    }

    pub(crate) fn gone(&mut self, conn: ConnId) {
        if let Some(client) = self.list.remove(&conn) {
            self.bytes -= client.bytes;
        }
    }

    /// Gives what a client sent to the shard, unless it opens more streams than a connection may have.
    pub(crate) fn frames(&mut self, shard: &mut Shard, now: Now, conn: ConnId, frames: Vec<Received>) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        let tenant = client.tenant.clone();
        for received in frames {
            if received.frame.flags.has(Flags::SYN) && !client.streams.contains(&*received.frame.stream_id) {
                if client.streams.len() >= self.streams_max {
                    let error = WireError::new(
                        Code::Limit,
                        "streams: this connection has as many as it may; end some, or open another connection",
                    )
                    .scope(format!("stream:{}", &*received.frame.stream_id))
                    .used(client.streams.len() as u64, self.streams_max as u64);
                    let frame = Frame::json(&*received.frame.stream_id, 0, Flags::RST, kind::ERROR, &error);
                    self.touched.push(conn);
                    client.bytes += weight(&frame);
                    self.bytes += weight(&frame);
                    client.frames.push_back(frame);
                    continue;
                }
                client.streams.insert(StreamId::new(&received.frame.stream_id));
            }
            if let Some(lag) = client.lagging.get_mut(&*received.frame.stream_id)
                && !lag.asked
                && &*received.frame.kind == kind::RESUME
                && let Ok(resume) = received.frame.read::<Resume>()
            {
                // Its own wish is answered at once; the frames follow when the lag ends, from where it wishes.
                lag.after = resume.after;
            }
            shard.handle(now, Input::Client { conn, tenant: tenant.clone(), received });
        }
    }

    /// Groups a frame with the others of this drain.
    pub(crate) fn send(&mut self, conn: ConnId, frame: Frame) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        if frame.flags.has(Flags::FIN) || frame.flags.has(Flags::RST) {
            client.streams.remove(&*frame.stream_id);
        }
        if &*frame.kind == kind::ACCEPTED && frame.msg_seq == 0 {
            client.attached(&frame);
        }
        if !client.lagging.is_empty()
            && let Some(lag) = client.lagging.get(&*frame.stream_id)
        {
            if frame.msg_seq > 0 {
                // The log has it; here it would overtake what the connection still lacks.
                return;
            }
            if lag.asked && (&*frame.kind == kind::ACCEPTED || frame.flags.has(Flags::RST)) {
                client.lagging.remove(&*frame.stream_id);
                if &*frame.kind == kind::ACCEPTED {
                    return;
                }
            }
        }
        if client.frames.is_empty() {
            self.touched.push(conn);
        }
        let weight = weight(&frame);
        client.bytes += weight;
        self.bytes += weight;
        client.frames.push_back(frame);
    }

    /// Reads a stream's frames from the log for a connection, once all that is queued for it is on its way.
    pub(crate) fn replay(&mut self, conn: ConnId, replay: Replay) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        client.replays.push(replay);
        self.touched.push(conn);
    }

    /// The reader of the connection has ended; the next one may begin.
    pub(crate) fn replayed(&mut self, conn: ConnId) {
        if let Some(client) = self.list.get_mut(&conn) {
            client.reading = false;
            self.touched.push(conn);
        }
    }

    /// Hands what was grouped to the outboxes. What one refuses waits here, or is noted and read from the log later.
    pub(crate) fn flush(&mut self) {
        for conn in std::mem::take(&mut self.touched) {
            self.flush_one(conn);
        }
    }

    fn flush_one(&mut self, conn: ConnId) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        let taken = client.outbox.send(&mut client.frames);
        client.bytes -= taken;
        self.bytes -= taken;
        if client.bytes > WAITING_BYTES_MAX || self.bytes > ALL_WAITING_BYTES_MAX {
            self.bytes -= client.bytes;
            client.lag();
            self.bytes += client.bytes;
        }
        if client.frames.is_empty() && !client.replays.is_empty() && !client.reading {
            client.reading = true;
            let replays = std::mem::take(&mut client.replays);
            let (outbox, inbox, source) = (client.outbox.clone(), self.inbox.clone(), self.source.clone());
            self.tasks.spawn(replay(conn, client.tenant.clone(), replays, outbox, inbox, source));
        }
        let resumes = !client.reading && client.lagging.values().any(|lag| !lag.asked);
        if !client.waiting && (resumes || !client.frames.is_empty()) {
            client.waiting = true;
            let (outbox, inbox) = (client.outbox.clone(), self.inbox.clone());
            self.tasks.spawn(async move {
                outbox.room().await;
                let _ = inbox.send(64, ToShard::Room { conn }).await;
            });
        }
    }

    /// There is room again: what waits goes out; behind that, lagging streams are resumed on the client's behalf.
    pub(crate) fn room(&mut self, conn: ConnId) -> Vec<Input> {
        let Some(client) = self.list.get_mut(&conn) else { return Vec::new() };
        client.waiting = false;
        let taken = client.outbox.send(&mut client.frames);
        client.bytes -= taken;
        self.bytes -= taken;
        self.touched.push(conn);
        if !client.frames.is_empty() || client.reading {
            return Vec::new();
        }
        let mut inputs = Vec::new();
        for (stream, lag) in client.lagging.iter_mut().filter(|(_, lag)| !lag.asked) {
            lag.asked = true;
            let resume = Resume { token: None, after: lag.after };
            let frame = Frame::json(stream.as_str(), 0, Flags::SYN, kind::RESUME, &resume);
            let body = encode_body(&frame);
            inputs.push(Input::Client { conn, tenant: client.tenant.clone(), received: Received { frame, body } });
        }
        inputs
    }

    pub(crate) fn close(&mut self, conn: ConnId, error: WireError) {
        self.flush_one(conn);
        if let Some(client) = self.list.get(&conn) {
            client.outbox.close(Some(error));
        }
    }
}

impl Client {
    /// A stream id that was answered with another stream is done; what follows comes on that one.
    fn attached(&mut self, frame: &Frame) {
        if let Ok(accepted) = frame.read::<Accepted>()
            && accepted.stream_id != *frame.stream_id
            && self.streams.remove(&*frame.stream_id)
        {
            self.streams.insert(StreamId::new(&accepted.stream_id));
        }
    }

    /// Gives up the memory of the numbered frames that wait: their streams go on from the log.
    fn lag(&mut self) {
        for frame in self.frames.iter().filter(|f| f.msg_seq > 0) {
            if !self.lagging.contains_key(&*frame.stream_id) {
                let lag = Lag { after: frame.msg_seq - 1, asked: false };
                self.lagging.insert(StreamId::new(&frame.stream_id), lag);
            }
            metric::dropped("outbox_full");
        }
        self.frames.retain(|f| f.msg_seq == 0);
        self.frames.truncate(UNNUMBERED_WAITING_MAX);
        self.frames.shrink_to(UNNUMBERED_WAITING_MAX);
        self.bytes = self.frames.iter().map(weight).sum();
    }
}

#[cfg(test)]
mod tests;

//! The clients' connections as their shard sees them: what is sent to each, which of its streams it has open,
//! and which streams lag because neither the outbox nor this memory took more. A lagging stream is read again from the
//! log, never lost, and nothing overtakes that: a client sees each stream in order.

use crate::catch_up::{Replay, replay};
use crate::inbox::{Inbox, ToShard};
use crate::log::Source;
use crate::metric;
use crate::outbox::{Outbox, weight};
use crate::peer::relay::Far;
use atp_core::clock::Now;
use atp_core::message::{Input, Machine};
use atp_core::shard::Shard;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::{Accepted, Resume};
use atp_proto::frame::kind;
use atp_proto::{Code, ConnId, Flags, Frame, StreamId, TenantId, WireError};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::task::TaskTracker;

/// Unnumbered frames that may wait beside a full outbox, over all shards; a client that never reads gets no more of them.
const UNNUMBERED_WAITING_MAX: usize = 1024;
/// Of those at least, in each shard.
const UNNUMBERED_WAITING_LEAST: usize = 16;
/// Bytes that wait for one connection whose outbox is full; reading the log again costs far more.
const WAITING_BYTES_MAX: usize = 24 << 20;
/// The same for all connections together.
const ALL_WAITING_BYTES_MAX: usize = 128 << 20;

/// What one connection may have, over all the shards that serve it.
pub(crate) struct Bounds {
    streams_max: usize,
    streams: AtomicUsize,
    /// Weight of the frames that wait for it, and of those for all connections.
    bytes: AtomicUsize,
    all_bytes: Arc<AtomicUsize>,
    /// One reader of the log at a time, whichever shard asked for it.
    pub(crate) reader: Semaphore,
    /// Who follows its streams to other routers.
    relay: Option<mpsc::Sender<Far>>,
}

impl Bounds {
    /// `all_bytes` counts what waits for all connections of the process.
    pub(crate) fn new(streams_max: usize, all_bytes: Arc<AtomicUsize>, relay: Option<mpsc::Sender<Far>>) -> Self {
        let (streams, bytes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self { streams_max, streams, bytes, all_bytes, reader: Semaphore::new(1), relay }
    }

    /// Takes the place of one more stream.
    ///
    /// # Errors
    /// ELIMIT: there is none.
    pub(crate) fn open(&self, stream: &str) -> Result<(), WireError> {
        if self.take() {
            return Ok(());
        }
        let what = "streams: this connection has as many as it may; end some, or open another connection";
        let most = self.streams_max as u64;
        Err(WireError::new(Code::Limit, what).scope(format!("stream:{stream}")).used(most, most))
    }

    fn take(&self) -> bool {
        let one_more = |n: usize| (n < self.streams_max).then_some(n + 1);
        self.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// The place of a stream that had one elsewhere.
    pub(crate) fn take_over(&self) {
        self.streams.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn close(&self, streams: usize) {
        self.streams.fetch_sub(streams, Ordering::Relaxed);
    }

    fn wait(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.all_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn leave(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.all_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// More waits than may.
    fn is_over(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) > WAITING_BYTES_MAX
            || self.all_bytes.load(Ordering::Relaxed) > ALL_WAITING_BYTES_MAX
    }
}

pub(crate) struct Clients {
    list: HashMap<ConnId, Client>,
    /// Connections with frames of this drain.
    touched: Vec<ConnId>,
    unnumbered_max: usize,
    inbox: Inbox,
    source: Source,
    tasks: TaskTracker,
}

struct Client {
    tenant: TenantId,
    outbox: Outbox,
    bounds: Arc<Bounds>,
    /// Frames of this drain, behind those that the outbox had no room for.
    frames: VecDeque<Frame>,
    /// What `frames` weigh.
    bytes: usize,
    /// Of that, what the bounds count.
    counted: usize,
    /// Streams that this connection opened or watches, and the last msg_seq of each that it was sent.
    streams: BTreeMap<StreamId, u64>,
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
    /// Those of one of so many shards.
    pub(crate) fn new(shards: u32, inbox: Inbox, source: Source, tasks: TaskTracker) -> Self {
        let unnumbered_max = (UNNUMBERED_WAITING_MAX / shards as usize).max(UNNUMBERED_WAITING_LEAST);
        Self { list: HashMap::new(), touched: Vec::new(), unnumbered_max, inbox, source, tasks }
    }

    /// The connection is known from now on; one that is known stays as it is.
    pub(crate) fn open(&mut self, conn: ConnId, tenant: TenantId, outbox: Outbox, bounds: Arc<Bounds>) {
        if self.list.contains_key(&conn) {
            return;
        }
        let client = Client {
            tenant,
            outbox,
            bounds,
            frames: VecDeque::new(),
            bytes: 0,
            counted: 0,
            streams: BTreeMap::new(),
            lagging: BTreeMap::new(),
            replays: Vec::new(),
            reading: false,
            waiting: false,
        };
        self.list.insert(conn, client);
    }

    pub(crate) fn gone(&mut self, conn: ConnId) {
        self.list.remove(&conn);
    }

    /// The shard has ended: its streams go on elsewhere. Those of connections that nobody follows them for lose the connection,
    /// and their clients find them.
    pub(crate) fn end(&mut self, shard: u32, error: &WireError) {
        for client in self.list.values().filter(|c| !c.streams.is_empty()) {
            let followed = client.bounds.relay.as_ref().is_some_and(|relay| {
                // Where a reader of the log has got to isn't known here.
                let still = !client.reading && client.replays.is_empty();
                still && relay.try_send(Far::Moved { shard, streams: client.sent() }).is_ok()
            });
            if !followed {
                client.outbox.close(Some(error.clone()));
            }
        }
    }

    /// Streams that another router had until now go on here, behind what their client has.
    pub(crate) fn resume(&mut self, conn: ConnId, streams: Vec<(StreamId, u64)>) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        for (stream, after) in streams {
            // Its place was taken where it came from: it is one more for a moment.
            if client.streams.insert(stream.clone(), after).is_none() {
                client.bounds.take_over();
            }
            client.lagging.insert(stream, Lag { after, asked: false });
        }
        self.touched.push(conn);
    }

    /// Gives what a client sent to the shard, unless it opens more streams than a connection may have.
    pub(crate) fn frames(&mut self, shard: &mut Shard, now: Now, conn: ConnId, frames: Vec<Received>) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        let tenant = client.tenant.clone();
        for received in frames {
            if received.frame.flags.has(Flags::SYN) && !client.streams.contains_key(&*received.frame.stream_id) {
                if let Err(error) = client.bounds.open(&received.frame.stream_id) {
                    let frame = Frame::json(&*received.frame.stream_id, 0, Flags::RST, kind::ERROR, &error);
                    self.touched.push(conn);
                    client.push(frame);
                    continue;
                }
                let after = resumed_after(&received.frame).unwrap_or_default();
                client.streams.insert(StreamId::new(&received.frame.stream_id), after);
            }
            if let Some(lag) = client.lagging.get_mut(&*received.frame.stream_id)
                && !lag.asked
                && let Some(after) = resumed_after(&received.frame)
            {
                // Its own wish is answered at once; the frames follow when the lag ends, from where it wishes.
                lag.after = after;
            }
            shard.handle(now, Input::Client { conn, tenant: tenant.clone(), received });
        }
    }

    /// Groups a frame with the others of this drain.
    pub(crate) fn send(&mut self, conn: ConnId, frame: Frame) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        if frame.flags.has(Flags::FIN) || frame.flags.has(Flags::RST) {
            client.forget(&frame.stream_id);
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
        if frame.msg_seq > 0
            && let Some(sent) = client.streams.get_mut(&*frame.stream_id)
        {
            *sent = frame.msg_seq;
        }
        if client.frames.is_empty() {
            self.touched.push(conn);
        }
        client.push(frame);
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
        client.hand_over();
        if client.bytes > 0 && client.bounds.is_over() {
            client.lag(self.unnumbered_max);
        }
        if client.frames.is_empty() && !client.replays.is_empty() && !client.reading {
            client.reading = true;
            let replays = std::mem::take(&mut client.replays);
            let (outbox, bounds) = (client.outbox.clone(), client.bounds.clone());
            let (inbox, source) = (self.inbox.clone(), self.source.clone());
            self.tasks.spawn(replay(conn, client.tenant.clone(), replays, outbox, bounds, inbox, source));
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
        client.hand_over();
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
            && self.streams.remove(&*frame.stream_id).is_some()
            && self.streams.insert(StreamId::new(&accepted.stream_id), 0).is_some()
        {
            self.bounds.close(1);
        }
    }

    fn forget(&mut self, stream: &str) {
        if self.streams.remove(stream).is_some() {
            self.bounds.close(1);
        }
    }

    /// Each stream, and the last msg_seq of it that the outbox has.
    fn sent(&self) -> Vec<(StreamId, u64)> {
        let waits = |stream: &StreamId| {
            let first = self.frames.iter().find(|f| f.msg_seq > 0 && *f.stream_id == *stream.as_str());
            first.map(|f| f.msg_seq - 1)
        };
        let lags = |stream: &StreamId| self.lagging.get(stream).map(|lag| lag.after);
        let sent = |(stream, sent): (&StreamId, &u64)| {
            (stream.clone(), lags(stream).or_else(|| waits(stream)).unwrap_or(*sent))
        };
        self.streams.iter().map(sent).collect()
    }

    fn push(&mut self, frame: Frame) {
        self.bytes += weight(&frame);
        self.frames.push_back(frame);
    }

    fn hand_over(&mut self) {
        self.bytes -= self.outbox.send(&mut self.frames);
        self.count();
    }

    /// Counts what waits now that the outbox has had its turn.
    fn count(&mut self) {
        if self.bytes > self.counted {
            self.bounds.wait(self.bytes - self.counted);
        } else if self.bytes < self.counted {
            self.bounds.leave(self.counted - self.bytes);
        }
        self.counted = self.bytes;
    }

    /// Gives up the memory of the numbered frames that wait: their streams go on from the log.
    fn lag(&mut self, unnumbered_max: usize) {
        for frame in self.frames.iter().filter(|f| f.msg_seq > 0) {
            if !self.lagging.contains_key(&*frame.stream_id) {
                let lag = Lag { after: frame.msg_seq - 1, asked: false };
                self.lagging.insert(StreamId::new(&frame.stream_id), lag);
            }
            metric::dropped("outbox_full");
        }
        self.frames.retain(|f| f.msg_seq == 0);
        self.frames.truncate(unnumbered_max);
        self.frames.shrink_to(unnumbered_max);
        self.bytes = self.frames.iter().map(weight).sum();
        self.count();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.bounds.leave(self.counted);
        self.bounds.close(self.streams.len());
    }
}

/// What a `control.resume` asks for.
pub(crate) fn resumed_after(frame: &Frame) -> Option<u64> {
    let resume = (&*frame.kind == kind::RESUME).then(|| frame.read::<Resume>().ok())?;
    resume.map(|resume| resume.after)
}

#[cfg(test)]
mod tests;

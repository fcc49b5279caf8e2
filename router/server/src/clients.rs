//! The clients' connections as their shard sees them: what is sent to each, which of its streams it has open,
//! and which streams lag because a full outbox took no more. A lagging stream is read again from the log, never lost.

use crate::inbox::{Inbox, ToShard};
use crate::log::Reader;
use crate::metric;
use crate::outbox::Outbox;
use atp_core::clock::Now;
use atp_core::message::{Input, Machine};
use atp_core::record::Entry;
use atp_core::replay::StreamReplay;
use atp_core::shard::Shard;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::Resume;
use atp_proto::frame::kind;
use atp_proto::{Code, ConnId, Flags, Frame, StreamId, TenantId, WireError};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

/// Unnumbered frames that may wait beside a full outbox; a client that never reads gets no more of them.
const UNNUMBERED_WAITING_MAX: usize = 1024;

pub(crate) struct Clients {
    list: HashMap<ConnId, Client>,
    /// Connections with frames of this drain.
    touched: Vec<ConnId>,
    streams_max: usize,
    inbox: Inbox,
    log_dir: PathBuf,
    tasks: TaskTracker,
}

struct Client {
    tenant: TenantId,
    outbox: Outbox,
    /// Frames of this drain; unnumbered ones may wait here for room.
    frames: VecDeque<Frame>,
    /// Streams that this connection opened or watches.
    streams: BTreeSet<StreamId>,
    /// By stream: the last msg_seq that the outbox took. What came later is read from the log when there is room.
    lagging: BTreeMap<StreamId, u64>,
    /// Streams whose next `control.accepted` answers our own question, not the client's.
    own_resumes: BTreeSet<StreamId>,
    /// A task waits for room.
    waiting: bool,
}

impl Clients {
    pub(crate) fn new(streams_max: usize, inbox: Inbox, log_dir: PathBuf, tasks: TaskTracker) -> Self {
        Self { list: HashMap::new(), touched: Vec::new(), streams_max, inbox, log_dir, tasks }
    }

    pub(crate) fn open(&mut self, conn: ConnId, tenant: TenantId, outbox: Outbox) {
        let client = Client {
            tenant,
            outbox,
            frames: VecDeque::new(),
            streams: BTreeSet::new(),
            lagging: BTreeMap::new(),
            own_resumes: BTreeSet::new(),
            waiting: false,
        };
        self.list.insert(conn, client);
    }

    pub(crate) fn gone(&mut self, conn: ConnId) {
        self.list.remove(&conn);
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
                    client.frames.push_back(frame);
                    continue;
                }
                client.streams.insert(StreamId::new(&received.frame.stream_id));
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
        if !client.own_resumes.is_empty()
            && frame.msg_seq == 0
            && &*frame.kind == kind::ACCEPTED
            && client.own_resumes.remove(&*frame.stream_id)
        {
            return;
        }
        if client.frames.is_empty() {
            self.touched.push(conn);
        }
        client.frames.push_back(frame);
    }

    /// Hands what was grouped to the outboxes. What one refuses is noted, and read from the log later.
    pub(crate) fn flush(&mut self) {
        for conn in std::mem::take(&mut self.touched) {
            self.flush_one(conn);
        }
    }

    pub(crate) fn flush_one(&mut self, conn: ConnId) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        if !client.lagging.is_empty() {
            // A stream that lags goes on from the log; a later frame must not overtake that.
            let lagging = &client.lagging;
            client.frames.retain(|f| f.msg_seq == 0 || !lagging.contains_key(&*f.stream_id));
        }
        client.outbox.send(&mut client.frames);
        if client.frames.is_empty() {
            return;
        }
        for frame in client.frames.iter().filter(|f| f.msg_seq > 0) {
            client.lagging.entry(StreamId::new(&frame.stream_id)).or_insert(frame.msg_seq - 1);
            metric::dropped("outbox_full");
        }
        client.frames.retain(|f| f.msg_seq == 0);
        client.frames.truncate(UNNUMBERED_WAITING_MAX);
        if !client.waiting {
            client.waiting = true;
            let (outbox, inbox) = (client.outbox.clone(), self.inbox.clone());
            self.tasks.spawn(async move {
                outbox.room().await;
                let _ = inbox.send(64, ToShard::Room { conn }).await;
            });
        }
    }

    /// There is room again: lagging streams are resumed on the client's behalf, from the log.
    pub(crate) fn catch_up(&mut self, shard: &mut Shard, now: Now, conn: ConnId) {
        let Some(client) = self.list.get_mut(&conn) else { return };
        client.waiting = false;
        self.touched.push(conn);
        let tenant = client.tenant.clone();
        for (stream, after) in std::mem::take(&mut client.lagging) {
            let frame = Frame::json(stream.as_str(), 0, Flags::SYN, kind::RESUME, &Resume { token: None, after });
            let body = encode_body(&frame);
            client.own_resumes.insert(stream);
            shard.handle(now, Input::Client { conn, tenant: tenant.clone(), received: Received { frame, body } });
        }
    }

    pub(crate) fn close(&mut self, conn: ConnId, error: WireError) {
        self.flush_one(conn);
        if let Some(client) = self.list.get(&conn) {
            client.outbox.close(Some(error));
        }
    }

    /// Reads the log behind `from` in a thread of its own and sends the stream's frames as fast as the client takes them.
    pub(crate) fn replay(
        &mut self,
        conn: ConnId,
        tenant: TenantId,
        stream: StreamId,
        from: u64,
        after: u64,
        upto: u64,
    ) {
        let Some(client) = self.list.get(&conn) else { return };
        let (outbox, inbox, dir) = (client.outbox.clone(), self.inbox.clone(), self.log_dir.clone());
        let (frames, mut read) = mpsc::channel::<Vec<Frame>>(4);
        let (t, s) = (tenant.clone(), stream.clone());
        let reader = tokio::task::spawn_blocking(move || read_stream(&dir, &t, &s, from, after, upto, &frames));
        self.tasks.spawn(async move {
            while let Some(frames) = read.recv().await {
                let mut frames = VecDeque::from(frames);
                loop {
                    outbox.send(&mut frames);
                    if frames.is_empty() {
                        break;
                    }
                    outbox.room().await;
                }
                if outbox.is_closed() {
                    break;
                }
            }
            drop(read);
            match reader.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => outbox.close(Some(WireError::new(Code::Log, format!("replay: {error}")))),
                Err(_) => outbox.close(Some(WireError::new(Code::Log, "replay: reading the log ended early"))),
            }
            let _ = inbox.send(256, ToShard::Replayed { conn, tenant, stream, upto }).await;
        });
    }
}

fn read_stream(
    dir: &std::path::Path,
    tenant: &TenantId,
    stream: &StreamId,
    from: u64,
    after: u64,
    upto: u64,
    to: &mpsc::Sender<Vec<Frame>>,
) -> Result<(), String> {
    let mut replay = StreamReplay::new(tenant, stream, after, upto);
    let reader = Reader::open(dir).map_err(|e| e.to_string())?;
    for item in reader.entries(from + 1) {
        let (position, bytes) = item.map_err(|e| e.to_string())?;
        let entry = Entry::decode(bytes).map_err(|e| format!("entry {position}: {e}"))?;
        let frames = replay.feed(position, &entry);
        let last = frames.last().is_some_and(|f| f.msg_seq >= upto);
        if !frames.is_empty() && to.blocking_send(frames).is_err() || last {
            break;
        }
    }
    Ok(())
}

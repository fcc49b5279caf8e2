//! A client's streams at other routers. Each owner is reached on a connection of its own for this client, so that a slow client
//! stops nobody else. When an owner goes, or a shard moves, the streams go on at the new owner behind what the client has: it sees
//! neither a gap nor a duplicate. Frames that aren't answered yet are sent again: the same SYN is answered the same way.

use super::connect;
use crate::clients::{Bounds, resumed_after};
use crate::connection::{Connection, Shared, not_here};
use crate::inbox::{self, Inbox, ToShard};
use crate::metric;
use crate::outbox::{Outbox, outbox};
use crate::shards::{Here, Place, Site};
use atp_proto::codec::Received;
use atp_proto::content::{Accepted, Resume};
use atp_proto::frame::kind;
use atp_proto::limits::{FRAME_BYTES_MAX, GAP_BYTES_MAX};
use atp_proto::{Code, ConnId, Flags, Frame, StreamId, TenantId, WireError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Batches of the client that may wait here, each of one read.
const BATCHES_MAX: usize = 32;
/// Bytes of frames that are kept until their stream is answered, for one client.
const KEPT_BYTES_MAX: usize = GAP_BYTES_MAX + (8 << 20);
/// A new stream waits so long for an owner of its shard.
const WAIT: Duration = Duration::from_secs(10);
/// How often streams without an owner look for one.
const LOOK: Duration = Duration::from_millis(100);
/// A router that failed isn't dialled again before this.
const PAUSE: Duration = Duration::from_millis(300);
/// Routers that a frame may pass: what an absent `ttl` means.
const TTL: u32 = 8;

/// What a relay is told.
pub(crate) enum Far {
    /// Frames of the client for a shard that isn't here.
    Frames { shard: u32, frames: Vec<Received> },
    /// A shard has left here with these streams, and what the client was sent of each.
    Moved { shard: u32, streams: Vec<(StreamId, u64)> },
}

/// What a connection to an owner has to say.
enum Heard {
    Up(Outbox),
    Frames(Vec<Received>),
    Ended(Option<WireError>),
}

struct Stream {
    shard: u32,
    /// The last msg_seq that the client was sent whole.
    after: u64,
    /// `accepted` has come: the owner can resume it.
    answered: bool,
    /// Frames to send again, or to send at all, once there is an owner.
    kept: VecDeque<Received>,
    /// Some of them were too many to keep: the client sends them again itself.
    forgotten: bool,
    /// The next unnumbered `accepted` answers this router, not the client.
    silent: bool,
    /// The connection that it is on.
    on: Option<u64>,
    since: Instant,
}

/// A connection to an owner.
struct Way {
    no: u64,
    site: Arc<Site>,
    outbox: Option<Outbox>,
    /// Frames that the outbox had no room for.
    waiting: VecDeque<Received>,
    ended: Option<Instant>,
    _over: tokio_util::sync::DropGuard,
}

pub(crate) struct Relay {
    shared: Arc<Shared>,
    conn: ConnId,
    tenant: TenantId,
    outbox: Outbox,
    bounds: Arc<Bounds>,
    queue: mpsc::Receiver<Far>,
    streams: BTreeMap<StreamId, Stream>,
    kept_bytes: usize,
    /// By router.
    ways: BTreeMap<String, Way>,
    next_way: u64,
    hear: mpsc::Sender<(u64, Heard)>,
    heard: mpsc::Receiver<(u64, Heard)>,
    /// Frames that the client's outbox had no room for.
    out: VecDeque<Frame>,
    /// Shards of this router that were told of the connection here.
    opened: BTreeMap<u32, Inbox>,
    ttl_told: Option<Instant>,
}

impl Relay {
    pub(crate) fn queue() -> (mpsc::Sender<Far>, mpsc::Receiver<Far>) {
        mpsc::channel(BATCHES_MAX)
    }

    /// Of one client's connection.
    pub(crate) fn new(
        shared: Arc<Shared>,
        conn: ConnId,
        tenant: TenantId,
        outbox: Outbox,
        bounds: Arc<Bounds>,
        queue: mpsc::Receiver<Far>,
    ) -> Self {
        // One batch on its way from each owner: the rest waits in their connections.
        let (hear, heard) = mpsc::channel(1);
        Self {
            shared,
            conn,
            tenant,
            outbox,
            bounds,
            queue,
            streams: BTreeMap::new(),
            kept_bytes: 0,
            ways: BTreeMap::new(),
            next_way: 1,
            hear,
            heard,
            out: VecDeque::new(),
            opened: BTreeMap::new(),
            ttl_told: None,
        }
    }

    /// Runs until the client's connection is `over`.
    pub(crate) async fn run(mut self, over: CancellationToken) {
        let mut places = self.shared.shards.moves();
        loop {
            self.hand_over();
            let full = self.ways.values().find(|w| !w.waiting.is_empty()).and_then(|w| w.outbox.clone());
            let looking = self.streams.values().any(|s| s.on.is_none());
            tokio::select! {
                biased;
                () = over.cancelled() => break,
                () = self.outbox.room(), if !self.out.is_empty() => {}
                heard = self.heard.recv(), if self.out.is_empty() => if let Some((no, heard)) = heard {
                    self.hear(no, heard).await;
                },
                () = room(full.as_ref()), if full.is_some() => {}
                far = self.queue.recv(), if full.is_none() => match far {
                    Some(Far::Frames { shard, frames }) => self.frames(shard, frames).await,
                    Some(Far::Moved { shard, streams }) => self.moved(shard, streams).await,
                    None => break,
                },
                moved = places.changed() => {
                    if moved.is_err() {
                        break;
                    }
                    places.mark_unchanged();
                    self.look().await;
                }
                () = tokio::time::sleep(LOOK), if looking => self.look().await,
            }
        }
        for way in self.ways.values() {
            way.outbox.iter().for_each(|outbox| outbox.close(None));
        }
        for inbox in self.opened.values() {
            let _ = inbox.send(256, ToShard::Gone { conn: self.conn }).await;
        }
        self.bounds.close(self.streams.len());
    }

    fn hand_over(&mut self) {
        self.outbox.send(&mut self.out);
        for way in self.ways.values_mut().filter(|w| !w.waiting.is_empty()) {
            if let Some(outbox) = &way.outbox {
                outbox.forward(&mut way.waiting);
            }
        }
    }

    // ---- what the client sends ------------------------------------------------------------------------------------------

    async fn frames(&mut self, shard: u32, frames: Vec<Received>) {
        for mut received in frames {
            let id = StreamId::new(&received.frame.stream_id);
            if !self.passes(&mut received) {
                continue;
            }
            let syn = received.frame.flags.has(Flags::SYN);
            if syn {
                if let Err(error) = self.begin(&id, shard, &received.frame) {
                    self.reset(&id, &error);
                    continue;
                }
            } else if !self.streams.contains_key(&id) {
                // Nothing was opened here: its owner says so itself, if it can be reached.
                match self.way_of(shard) {
                    Some(way) => way.waiting.push_back(received),
                    None => metric::dropped("shard_not_here"),
                }
                continue;
            }
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let up = stream.on.and_then(|no| self.ways.values_mut().find(|w| w.no == no && w.outbox.is_some()));
            if !stream.answered || up.is_none() {
                let weight = inbox::weight(&received);
                if self.kept_bytes + weight > KEPT_BYTES_MAX {
                    stream.forgotten = true;
                } else if !stream.forgotten {
                    self.kept_bytes += weight;
                    stream.kept.push_back(received.clone());
                }
            }
            match up {
                Some(way) => way.waiting.push_back(received),
                None if stream.on.is_none() => self.place(&id).await,
                None => {}
            }
        }
    }

    /// Takes one router off its `ttl`. At 0 the frame goes no further, and its sender hears of it once a second.
    fn passes(&mut self, received: &mut Received) -> bool {
        let hop = received.frame.hop.get_or_insert_default();
        match hop.ttl.unwrap_or(TTL) {
            0 => {
                metric::dropped("ttl");
                if self.ttl_told.is_none_or(|told| told.elapsed() >= Duration::from_secs(1)) {
                    self.ttl_told = Some(Instant::now());
                    let id = StreamId::new(&received.frame.stream_id);
                    let error =
                        WireError::proto("ttl: is 0, and the stream's shard is at another router; send 1 or more");
                    let error = error.fatal(atp_proto::code::Fatal::None);
                    self.out.push_back(Frame::json(id.as_str(), 0, Flags::NONE, kind::ERROR, &error));
                }
                false
            }
            ttl => {
                hop.ttl = Some(ttl - 1);
                if received.body.len() + HOP_BYTES_MAX > FRAME_BYTES_MAX {
                    // No room for a hop beside it; a router's frames aren't forwarded again anyway.
                    received.frame.hop = None;
                }
                true
            }
        }
    }

    /// A SYN: the stream begins, or is asked for again.
    fn begin(&mut self, id: &StreamId, shard: u32, frame: &Frame) -> Result<(), WireError> {
        let after = resumed_after(frame).unwrap_or_default();
        if let Some(stream) = self.streams.get_mut(id) {
            (stream.after, stream.answered, stream.silent, stream.forgotten) = (after, false, false, false);
            return Ok(());
        }
        self.bounds.open(id.as_str())?;
        self.streams.insert(id.clone(), Stream::new(shard, after));
        Ok(())
    }

    async fn moved(&mut self, shard: u32, streams: Vec<(StreamId, u64)>) {
        for (id, after) in streams {
            // The shard that has ended gives its place back when it forgets the connection.
            self.bounds.take_over();
            let stream = Stream { answered: true, ..Stream::new(shard, after) };
            if self.streams.insert(id.clone(), stream).is_some() {
                self.bounds.close(1);
            }
            self.place(&id).await;
        }
    }

    // ---- where streams are ----------------------------------------------------------------------------------------------

    /// Streams whose shard has moved follow it; those without an owner look again.
    async fn look(&mut self) {
        let shards = &self.shared.shards;
        let on = |no: u64| self.ways.values().find(|w| w.no == no);
        let astray = |stream: &Stream| match (stream.on.and_then(on), shards.place(stream.shard)) {
            (Some(way), Place::At(site)) => way.site != site,
            // Nobody owns it just now: what is connected stays.
            (Some(_), Place::Unknown) => false,
            (Some(_), Place::Here(_)) | (None, _) => true,
        };
        let ids: Vec<StreamId> = self.streams.iter().filter(|(_, s)| astray(s)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.place(&id).await;
        }
    }

    /// Sends a stream to where its shard is now.
    async fn place(&mut self, id: &StreamId) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        stream.on = None;
        if stream.forgotten {
            return self.give_up(id);
        }
        let (shard, waits) = (stream.shard, stream.since.elapsed() > WAIT && !stream.answered);
        match self.shared.shards.place(shard) {
            Place::Here(here) => self.bring_home(id, shard, &here).await,
            Place::At(_) | Place::Unknown => match self.way_of(shard).map(|way| (way.no, way.outbox.is_some())) {
                Some((no, up)) => {
                    let stream = self.streams.get_mut(id).expect("looked at just now");
                    stream.on = Some(no);
                    if up {
                        self.send_again(id);
                    }
                }
                None if waits => self.give_up(id),
                None => {}
            },
        }
    }

    /// The client sends it again when it likes.
    fn give_up(&mut self, id: &StreamId) {
        self.reset(id, &not_here());
        self.forget(id);
    }

    fn forget(&mut self, id: &StreamId) {
        if let Some(stream) = self.streams.remove(id) {
            self.kept_bytes -= stream.kept.iter().map(inbox::weight).sum::<usize>();
            self.bounds.close(1);
        }
    }

    /// What its owner needs to go on: the frames that it may not have, or the place where the client is.
    fn send_again(&mut self, id: &StreamId) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        let Some(way) = self.ways.values_mut().find(|w| Some(w.no) == stream.on) else { return };
        stream.since = Instant::now();
        if stream.answered {
            stream.silent = true;
            let resume = Resume { token: None, after: stream.after };
            let frame = Frame::json(id.as_str(), 0, Flags::SYN, kind::RESUME, &resume);
            way.waiting.push_back(Received::from_frame(frame));
            self.kept_bytes -= stream.kept.iter().map(inbox::weight).sum::<usize>();
            way.waiting.extend(stream.kept.drain(..));
        } else {
            way.waiting.extend(stream.kept.iter().cloned());
        }
    }

    /// The shard has come to this router: the stream goes on there, on the client's own connection.
    async fn bring_home(&mut self, id: &StreamId, shard: u32, here: &Here) {
        let Some(stream) = self.streams.remove(id) else { return };
        self.kept_bytes -= stream.kept.iter().map(inbox::weight).sum::<usize>();
        let (conn, tenant, outbox, bounds) = (self.conn, self.tenant.clone(), self.outbox.clone(), self.bounds.clone());
        self.opened.insert(shard, here.inbox.clone());
        let message = match stream.answered {
            true => ToShard::Resume { conn, tenant, outbox, bounds, streams: vec![(id.clone(), stream.after)] },
            false => ToShard::Opened { conn, tenant, outbox, bounds },
        };
        let frames: Vec<Received> = stream.kept.into();
        let weight = frames.iter().map(inbox::weight).sum();
        let told = here.inbox.send(256, message).await.is_ok()
            && here.inbox.send(weight, ToShard::Frames { conn, frames }).await.is_ok();
        if !told {
            self.reset(id, &not_here());
        }
        self.bounds.close(1);
    }

    /// The connection to the owner of a shard, made if it is missing; `None`: there is no owner, or it can't be dialled yet.
    fn way_of(&mut self, shard: u32) -> Option<&mut Way> {
        let Place::At(site) = self.shared.shards.place(shard) else { return None };
        if let Some(way) = self.ways.get(&site.router) {
            let paused = way.ended.is_some_and(|ended| ended.elapsed() < PAUSE);
            if way.site == site && paused {
                return None;
            }
            if way.site != site || way.ended.is_some() {
                self.close_way(&site.router.clone());
            }
        }
        let no = self.next_way;
        let (shared, tenant, conn, hear) = (&self.shared, &self.tenant, self.conn, &self.hear);
        let next = &mut self.next_way;
        Some(self.ways.entry(site.router.clone()).or_insert_with(|| {
            *next += 1;
            let over = shared.stopping.child_token();
            let ends = over.clone().drop_guard();
            let begin = (shared.clone(), site.clone(), tenant.clone(), conn);
            shared.tasks.spawn(way(begin, no, hear.clone(), over));
            Way { no, site, outbox: None, waiting: VecDeque::new(), ended: None, _over: ends }
        }))
    }

    fn close_way(&mut self, router: &str) {
        if let Some(way) = self.ways.remove(router) {
            way.outbox.iter().for_each(|outbox| outbox.close(None));
            self.streams.values_mut().filter(|s| s.on == Some(way.no)).for_each(|s| s.on = None);
        }
    }

    // ---- what owners say ------------------------------------------------------------------------------------------------

    async fn hear(&mut self, no: u64, heard: Heard) {
        let Some(way) = self.ways.values_mut().find(|w| w.no == no) else { return };
        match heard {
            Heard::Up(outbox) => {
                way.outbox = Some(outbox);
                for id in self.on(no) {
                    self.send_again(&id);
                }
            }
            Heard::Frames(frames) => frames.into_iter().for_each(|received| self.pass(no, received.frame)),
            Heard::Ended(error) => {
                tracing::debug!(
                    router = way.site.router,
                    ?error,
                    "a client's way to the owner of its streams has ended"
                );
                (way.ended, way.outbox) = (Some(Instant::now()), None);
                way.waiting.clear();
                for id in self.on(no) {
                    self.place(&id).await;
                }
            }
        }
    }

    fn on(&self, no: u64) -> Vec<StreamId> {
        self.streams.iter().filter(|(_, s)| s.on == Some(no)).map(|(id, _)| id.clone()).collect()
    }

    /// One frame of an owner, on its way to the client.
    fn pass(&mut self, no: u64, mut frame: Frame) {
        frame.hop = None;
        let id = StreamId::new(&frame.stream_id);
        let Some(stream) = self.streams.get_mut(&id) else {
            // The answer to a frame of a stream that isn't open.
            return self.out.push_back(frame);
        };
        if stream.on != Some(no) {
            return;
        }
        if &*frame.kind == kind::ACCEPTED {
            if std::mem::take(&mut stream.silent) && frame.msg_seq == 0 {
                return;
            }
            self.kept_bytes -= stream.kept.iter().map(inbox::weight).sum::<usize>();
            stream.kept.clear();
            stream.answered = true;
            let shard = stream.shard;
            if let Ok(accepted) = frame.read::<Accepted>()
                && accepted.stream_id != id.as_str()
            {
                // It is another stream that goes on, under the same key.
                self.forget(&id);
                let other = StreamId::new(&accepted.stream_id);
                if !self.streams.contains_key(&other) {
                    self.bounds.take_over();
                    let stream = Stream { answered: true, on: Some(no), ..Stream::new(shard, 0) };
                    self.streams.insert(other, stream);
                }
                return self.out.push_back(frame);
            }
        }
        if frame.flags.has(Flags::RST) {
            let moved = frame.msg_seq == 0
                && frame.read::<WireError>().is_ok_and(|error| error.code == Code::Draining && !error.judged);
            if moved && (stream.answered || stream.since.elapsed() < WAIT) {
                // It looks for its shard again.
                stream.on = None;
                return;
            }
            self.forget(&id);
            return self.out.push_back(frame);
        }
        if frame.msg_seq > 0 {
            if frame.msg_seq <= stream.after {
                return;
            }
            if !frame.flags.has(Flags::MORE) {
                stream.after = frame.msg_seq;
            }
        }
        if frame.flags.has(Flags::FIN) {
            self.forget(&id);
        }
        self.out.push_back(frame);
    }

    fn reset(&mut self, id: &StreamId, error: &WireError) {
        self.out.push_back(Frame::json(id.as_str(), 0, Flags::RST, kind::ERROR, error));
    }
}

/// What a hop beside a body takes at most, with its head and the body's.
const HOP_BYTES_MAX: usize = 128;

impl Stream {
    fn new(shard: u32, after: u64) -> Self {
        Self {
            shard,
            after,
            answered: false,
            kept: VecDeque::new(),
            forgotten: false,
            silent: false,
            on: None,
            since: Instant::now(),
        }
    }
}

async fn room(outbox: Option<&Outbox>) {
    if let Some(outbox) = outbox {
        outbox.room().await;
    }
}

/// One connection to an owner, for one client.
async fn way(
    begin: (Arc<Shared>, Arc<Site>, TenantId, ConnId),
    no: u64,
    hear: mpsc::Sender<(u64, Heard)>,
    over: CancellationToken,
) {
    let (shared, site, tenant, conn) = begin;
    let dialled = tokio::select! {
        dialled = connect(&shared, &site, Some(tenant)) => dialled,
        () = over.cancelled() => return,
    };
    let (reader, writer, read) = match dialled {
        Ok(dialled) => dialled,
        Err(error) => {
            let _ = hear.send((no, Heard::Ended(Some(error)))).await;
            return;
        }
    };
    let (outbox, write) = outbox(over.child_token());
    let writing = shared.tasks.spawn(write.run(writer, shared.heartbeat));
    let mut connection = Connection::new(shared.clone(), conn, (reader, read), outbox.clone(), over.child_token());
    let mut said = hear.send((no, Heard::Up(outbox.clone()))).await;
    let error = loop {
        if said.is_err() {
            break None;
        }
        said = match connection.next().await {
            Ok(frames) => hear.send((no, Heard::Frames(frames))).await,
            Err(ended) => break ended.refused(),
        };
    };
    outbox.close(None);
    let _ = hear.send((no, Heard::Ended(error))).await;
    drop((connection, outbox));
    let _ = writing.await;
}

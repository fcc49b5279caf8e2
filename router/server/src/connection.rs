//! One native connection: hello, frames in, heartbeats, and how it ends. Decodes here, decides nothing:
//! frames go to the shard in batches, one per read, and an agent's own frames to its task.

mod admissible;

use crate::agent_task::{AgentHandle, AgentMessage, Agents};
use crate::clients::Bounds;
use crate::identity::{Anonymous, identify};
use crate::inbox::{self, Inbox, ToShard};
use crate::metric::{self, FrameCounts};
use crate::outbox::{Outbox, connection_error, outbox};
use crate::shards::{Shards, split};
use admissible::{check_capabilities, is_known};
use atp_proto::codec::{self, Received};
use atp_proto::content::{AgentStatus, Capabilities, Hello, HelloAck, HelloLimits, Role};
use atp_proto::frame::kind;
use atp_proto::limits::{FIRST_FRAME_MS, FRAGMENT_BYTES, FRAME_BYTES_MAX, FRAME_MS, MESSAGE_BYTES_MAX};
use atp_proto::{AgentName, Code, ConnId, Flags, Frame, StreamId, TenantId, WireError};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes that one read takes at most: one batch for the shard.
const READ_BYTES: usize = 128 * 1024;
const READ_BYTES_MIN: usize = 2048;
/// The highest minor version spoken here.
const MINOR: u32 = 1;
/// A connection's own frames (status, capabilities) per second; more is a fault of the peer.
const OWN_FRAMES_PER_SECOND: u32 = 1000;

/// What every connection of a router shares.
pub(crate) struct Shared {
    pub(crate) shards: Shards,
    pub(crate) agents: Agents,
    pub(crate) anonymous: Anonymous,
    /// Random per start of the process: session ids are never used again.
    pub(crate) incarnation: String,
    pub(crate) heartbeat: Duration,
    pub(crate) streams_max: usize,
    /// Weight of the frames that wait for clients' connections.
    pub(crate) waiting_bytes: Arc<AtomicUsize>,
    /// Cancelled when every connection is to close.
    pub(crate) stopping: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The peer closed it, or this side did after saying why.
    Closed,
    Lost,
    Refused(WireError),
    Io(io::ErrorKind),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Refused(error)
    }
}

/// Serves one connection until it ends.
pub(crate) async fn serve<R, W>(shared: Arc<Shared>, conn: ConnId, loopback: bool, reader: R, writer: W) -> Ended
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let closed = shared.stopping.child_token();
    let (outbox, write) = outbox(closed.clone());
    let writing = shared.tasks.spawn(write.run(writer, shared.heartbeat));
    let now = Instant::now();
    let mut connection = Connection {
        shared,
        conn,
        reader,
        bytes: BytesMut::new(),
        chunk: READ_BYTES_MIN,
        heard: now,
        begun: None,
        counts: FrameCounts::new("in"),
        outbox: outbox.clone(),
        closed,
    };
    let ended = connection.run(loopback).await;
    if let Ended::Refused(error) = &ended {
        tracing::debug!(conn = conn.0, code = %error.code, message = %error.message, "connection refused");
        outbox.close(Some(error.clone()));
        // What the peer still sends is read, or closing the socket would take the error away from it.
        let _ = tokio::time::timeout(Duration::from_secs(1), connection.discard()).await;
    } else {
        if let Ended::Io(kind) = &ended {
            tracing::debug!(conn = conn.0, %kind, "connection broken");
        }
        outbox.close(None);
    }
    drop((connection, outbox));
    let _ = writing.await;
    ended
}

struct Connection<R> {
    shared: Arc<Shared>,
    conn: ConnId,
    reader: R,
    bytes: BytesMut,
    /// How much is read at once.
    chunk: usize,
    /// When something last arrived.
    heard: Instant,
    /// When the frame began that isn't whole yet.
    begun: Option<Instant>,
    counts: FrameCounts,
    outbox: Outbox,
    closed: CancellationToken,
}

/// The agent of a connection, once its capabilities were taken.
struct Introduced {
    name: AgentName,
    incarnation: Arc<str>,
    handle: AgentHandle,
}

/// A client's connection and the shards that know of it: those of the streams it has spoken of.
struct Client {
    tenant: TenantId,
    bounds: Arc<Bounds>,
    shards: BTreeMap<u32, Inbox>,
}

/// What a read yielded.
enum Read {
    Some,
    End(Ended),
}

impl<R: AsyncRead + Unpin> Connection<R> {
    async fn run(&mut self, loopback: bool) -> Ended {
        let hello = match tokio::time::timeout(Duration::from_millis(FIRST_FRAME_MS), self.first()).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(ended)) => return ended,
            Err(_) => {
                return WireError::proto(format!(
                    "hello: the first frame wasn't here within {FIRST_FRAME_MS} ms; open with SYN control.hello"
                ))
                .into();
            }
        };
        let tenant = match identify(self.shared.anonymous, loopback, hello.token.as_deref()) {
            Ok(tenant) => tenant,
            Err(error) => return error.into(),
        };
        if hello.role == Role::Router {
            return WireError::proto("hello: role `router` isn't served by this version; use `client` or `agent`")
                .into();
        }
        self.answer(&hello);
        let ended = match hello.role {
            Role::Client => self.client(tenant).await,
            Role::Agent | Role::Router => self.agent().await,
        };
        self.counts.flush();
        ended
    }

    async fn first(&mut self) -> Result<Hello, Ended> {
        let received = loop {
            if let Some(received) = codec::decode(&mut self.bytes)? {
                break received;
            }
            self.bytes.reserve(1024);
            match self.reader.read_buf(&mut self.bytes).await {
                Ok(0) => return Err(Ended::Closed),
                Ok(_) => {}
                Err(e) => return Err(Ended::Io(e.kind())),
            }
        };
        self.heard = Instant::now();
        let frame = received.frame;
        self.counts.count(&frame.kind);
        if &*frame.kind != kind::HELLO || !frame.stream_id.is_empty() || !frame.flags.has(Flags::SYN) {
            return Err(WireError::proto("hello: the first frame must be SYN control.hello on stream \"\"").into());
        }
        Ok(frame.read()?)
    }

    fn answer(&self, hello: &Hello) {
        let ack = HelloAck {
            minor: hello.minor_max.min(MINOR),
            session_id: format!("s-{}-{}", self.shared.incarnation, self.conn.0),
            limits: HelloLimits {
                frame_bytes: FRAME_BYTES_MAX as u64,
                fragment_bytes: FRAGMENT_BYTES as u64,
                message_bytes: MESSAGE_BYTES_MAX as u64,
                streams: self.shared.streams_max as u64,
            },
            heartbeat_ms: u64::try_from(self.shared.heartbeat.as_millis()).unwrap_or(u64::MAX),
        };
        self.outbox.send_one(Frame::json("", 0, Flags::SYN.with(Flags::ACK), kind::HELLO, &ack));
    }

    /// Waits for bytes; ends the connection that is lost, stalls in a frame, or is to close.
    async fn read(&mut self) -> Read {
        if self.closed.is_cancelled() {
            return Read::End(Ended::Closed);
        }
        self.begun = if self.bytes.is_empty() { None } else { Some(self.begun.unwrap_or_else(Instant::now)) };
        if self.bytes.capacity() - self.bytes.len() < self.chunk / 2 {
            self.bytes.reserve(self.chunk);
        }
        let silence = 3 * self.shared.heartbeat;
        loop {
            let stalled = self.begun.map(|b| b + Duration::from_millis(FRAME_MS));
            let lost = self.heard + silence;
            let mut some = (&mut self.reader).take(READ_BYTES as u64);
            let read = tokio::select! {
                biased;
                read = some.read_buf(&mut self.bytes) => read,
                () = self.closed.cancelled() => return Read::End(Ended::Closed),
                () = tokio::time::sleep_until(stalled.map_or(lost, |s| s.min(lost))) => {
                    let now = Instant::now();
                    if stalled.is_some_and(|s| now >= s) {
                        let message = format!("frame: begun and not whole after {FRAME_MS} ms");
                        return Read::End(WireError::proto(message).into());
                    }
                    if now >= lost {
                        return Read::End(Ended::Lost);
                    }
                    continue;
                }
            };
            return match read {
                Ok(0) => Read::End(Ended::Closed),
                Ok(n) => {
                    self.heard = Instant::now();
                    // Busy connections read in large pieces, idle ones hold little memory.
                    self.chunk = if n >= self.chunk / 2 {
                        READ_BYTES.min(2 * self.chunk)
                    } else if n < self.chunk / 8 {
                        READ_BYTES_MIN.max(self.chunk / 2)
                    } else {
                        self.chunk
                    };
                    Read::Some
                }
                Err(e) => Read::End(Ended::Io(e.kind())),
            };
        }
    }

    /// Splits what was read into frames of streams; frames on stream "" are answered or given to `own`.
    fn frames(&mut self, frames: &mut Vec<Received>, own: &mut Vec<Frame>) -> Result<(), WireError> {
        let mut whole = false;
        while let Some(received) = codec::decode(&mut self.bytes)? {
            whole = true;
            let frame = &received.frame;
            self.counts.count(&frame.kind);
            if !frame.stream_id.is_empty() {
                frames.push(received);
            } else if frame.flags.has(Flags::HB) {
                if frame.flags.has(Flags::ACK) {
                    own.push(received.frame);
                } else {
                    self.outbox.send_one(Frame::heartbeat(true));
                }
            } else {
                own.push(received.frame);
            }
        }
        if whole {
            self.begun = None;
        }
        self.counts.flush();
        Ok(())
    }

    async fn client(&mut self, tenant: TenantId) -> Ended {
        let bounds = Bounds::new(self.shared.streams_max, self.shared.waiting_bytes.clone());
        let mut client = Client { tenant, bounds: Arc::new(bounds), shards: BTreeMap::new() };
        let ended = self.client_frames(&mut client).await;
        for inbox in client.shards.into_values() {
            let _ = inbox.send(256, ToShard::Gone { conn: self.conn }).await;
        }
        ended
    }

    /// Hands frames to the shard of their streams, which is told first who speaks.
    async fn to_shard(&self, client: &mut Client, shard: u32, frames: Vec<Received>) -> Result<(), WireError> {
        if !client.shards.contains_key(&shard) {
            let inbox = self.shared.shards.at(shard).ok_or_else(not_here)?;
            let (tenant, outbox) = (client.tenant.clone(), self.outbox.clone());
            let opened = ToShard::Opened { conn: self.conn, tenant, outbox, bounds: client.bounds.clone() };
            inbox.send(256, opened).await.map_err(|_| not_here())?;
            client.shards.insert(shard, inbox);
        }
        let weight = frames.iter().map(inbox::weight).sum();
        client.shards[&shard].send(weight, ToShard::Frames { conn: self.conn, frames }).await.map_err(|_| not_here())
    }

    async fn client_frames(&mut self, client: &mut Client) -> Ended {
        let mut own = Vec::new();
        loop {
            let mut frames = Vec::new();
            let decoded = self.frames(&mut frames, &mut own);
            frames.retain(|r| self.is_for_clients(&r.frame));
            let shards = &self.shared.shards;
            let shard_of = |r: &Received| Some(shards.of_stream(&client.tenant, &StreamId::new(&r.frame.stream_id)));
            for (shard, frames) in split(frames, shard_of) {
                if let Err(error) = self.to_shard(client, shard, frames).await {
                    return error.into();
                }
            }
            if let Err(error) = decoded {
                return error.into();
            }
            for frame in own.drain(..) {
                match &*frame.kind {
                    "" => {}
                    kind::HELLO => {
                        return WireError::proto("control.hello: this connection has said hello already").into();
                    }
                    kind::CAPABILITIES | kind::STATUS => {
                        let message = format!("{}: only a connection with role `agent` sends this", &*frame.kind);
                        return WireError::proto(message).into();
                    }
                    kind::ERROR if frame.flags.has(Flags::RST) => return Ended::Closed,
                    known if is_known(known) => {
                        return WireError::proto(format!(
                            "stream_id: {known} needs a stream; stream \"\" is the connection's own"
                        ))
                        .into();
                    }
                    _ => metric::dropped("unknown_type"),
                }
            }
            if let Read::End(ended) = self.read().await {
                return ended;
            }
        }
    }

    /// True for what a client may send; what only agents or routers send is answered with RST EPROTO here.
    fn is_for_clients(&self, frame: &Frame) -> bool {
        match &*frame.kind {
            kind::TASK_SUBMIT | kind::TASK_CANCEL | kind::RESUME | kind::TASK_ANSWER | kind::ERROR | "" => true,
            _ => self.may_be_skipped(frame, "a client"),
        }
    }

    /// Of a type that `who` doesn't send: a known one is refused; an unknown one takes its place in the order if it has a
    /// number (true), the shard counts and skips it.
    fn may_be_skipped(&self, frame: &Frame, who: &str) -> bool {
        if is_known(&frame.kind) {
            let message = format!("payload.type: {} isn't sent by {who} (this connection's role)", &*frame.kind);
            self.reset(&frame.stream_id, message);
            return false;
        }
        if frame.msg_seq == 0 {
            metric::dropped("unknown_type");
        }
        frame.msg_seq > 0
    }

    fn reset(&self, stream_id: &str, message: String) {
        let error = WireError::proto(message).scope(format!("stream:{stream_id}"));
        self.outbox.send_one(Frame::json(stream_id, 0, Flags::RST, kind::ERROR, &error));
    }

    async fn agent(&mut self) -> Ended {
        let mut connected: Option<Introduced> = None;
        let ended = self.agent_frames(&mut connected).await;
        if let Some(Introduced { handle, .. }) = connected {
            let _ = handle.queue.send(AgentMessage::Disconnected { conn: self.conn }).await;
        }
        ended
    }

    async fn agent_frames(&mut self, connected: &mut Option<Introduced>) -> Ended {
        let mut own = Vec::new();
        let mut second = Instant::now();
        let mut own_count = 0;
        loop {
            let mut frames = Vec::new();
            let decoded = self.frames(&mut frames, &mut own);
            if second.elapsed() >= Duration::from_secs(1) {
                (second, own_count) = (Instant::now(), 0);
            }
            for frame in own.drain(..) {
                own_count += 1;
                if own_count > OWN_FRAMES_PER_SECOND {
                    let message = format!("stream \"\": more than {OWN_FRAMES_PER_SECOND} frames in a second");
                    return WireError::new(Code::Limit, message)
                        .used(own_count.into(), OWN_FRAMES_PER_SECOND.into())
                        .into();
                }
                if let Err(ended) = self.own_of_agent(&frame, connected).await {
                    return ended;
                }
            }
            frames.retain(|r| self.is_for_agents(&r.frame));
            if !frames.is_empty() {
                let Some(agent) = connected else {
                    return WireError::proto(
                        "control.capabilities: an agent's first frame after hello, before any call's",
                    )
                    .into();
                };
                self.agent_to_shards(agent, frames).await;
            }
            if let Err(error) = decoded {
                return error.into();
            }
            if let Read::End(ended) = self.read().await {
                return ended;
            }
        }
    }

    /// Hands an agent's frames to the shards of their calls. What nobody here knows, or a shard that isn't here, doesn't get
    /// is asked for again by its shard, which learns from the agent's list what there is.
    async fn agent_to_shards(&self, agent: &Introduced, frames: Vec<Received>) {
        let groups = {
            let routes = agent.handle.routes();
            split(frames, |r| {
                let shard = routes.shard_of(&r.frame.stream_id);
                if shard.is_none() {
                    metric::dropped("unknown_call");
                }
                shard
            })
        };
        for (shard, frames) in groups {
            let weight = frames.iter().map(inbox::weight).sum();
            let (agent, incarnation) = (agent.name.clone(), agent.incarnation.clone());
            let message = ToShard::AgentFrames { agent, incarnation, frames };
            let taken = match self.shared.shards.at(shard) {
                Some(inbox) => inbox.send(weight, message).await.is_ok(),
                None => false,
            };
            if !taken {
                metric::dropped("shard_not_here");
            }
        }
    }

    async fn own_of_agent(&self, frame: &Frame, connected: &mut Option<Introduced>) -> Result<(), Ended> {
        match &*frame.kind {
            "" => {
                if let Some(Introduced { handle, .. }) = connected {
                    let _ = handle.queue.send(AgentMessage::Alive { conn: self.conn }).await;
                }
                Ok(())
            }
            kind::CAPABILITIES => self.capabilities(frame, connected).await,
            kind::STATUS => {
                let status: AgentStatus = frame.read()?;
                let Some(Introduced { handle, .. }) = connected else {
                    return Err(WireError::proto("control.status: send control.capabilities first").into());
                };
                let _ = handle.queue.send(AgentMessage::Status { conn: self.conn, status }).await;
                Ok(())
            }
            kind::HELLO => Err(WireError::proto("control.hello: this connection has said hello already").into()),
            kind::ERROR if frame.flags.has(Flags::RST) => Err(Ended::Closed),
            known if is_known(known) => {
                Err(WireError::proto(format!("stream_id: {known} needs a stream; stream \"\" is the connection's own"))
                    .into())
            }
            _ => {
                metric::dropped("unknown_type");
                Ok(())
            }
        }
    }

    async fn capabilities(&self, frame: &Frame, connected: &mut Option<Introduced>) -> Result<(), Ended> {
        let capabilities: Box<Capabilities> = Box::new(frame.read()?);
        check_capabilities(&capabilities)?;
        let handle = match connected {
            Some(known) if known.name != capabilities.agent => {
                let message = format!(
                    "agent: this connection is `{}`; open another one for `{}`",
                    known.name, capabilities.agent
                );
                return Err(WireError::proto(message).into());
            }
            Some(known) if *known.incarnation != capabilities.incarnation => {
                return Err(WireError::proto("incarnation: it is new per start of the process, not per message").into());
            }
            Some(known) => known.handle.clone(),
            None => self.shared.agents.of(&capabilities.agent)?,
        };
        *connected = Some(Introduced {
            name: capabilities.agent.clone(),
            incarnation: capabilities.incarnation.as_str().into(),
            handle: handle.clone(),
        });
        let (up, told) = oneshot::channel();
        let outbox = self.outbox.clone();
        let message = AgentMessage::Connected { conn: self.conn, capabilities, outbox, up };
        if handle.queue.send(message).await.is_err() || told.await.is_err() {
            return Err(WireError::new(Code::Draining, "this router is stopping").into());
        }
        Ok(())
    }

    fn is_for_agents(&self, frame: &Frame) -> bool {
        match &*frame.kind {
            kind::RESULT_PARTIAL
            | kind::RESULT_FINAL
            | kind::TOOL_REQUEST
            | kind::ESTIMATE_RESULT
            | kind::AGENT_LOG
            | kind::ERROR
            | "" => true,
            _ => self.may_be_skipped(frame, "an agent"),
        }
    }

    /// Reads and forgets until the peer closes.
    async fn discard(&mut self) {
        let mut bytes = [0; 4096];
        while self.reader.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
    }
}

/// What a client is told whose stream's shard isn't served here now: another connection may find it.
pub(crate) fn not_here() -> WireError {
    WireError::new(Code::Draining, "this router is stopping, or the stream's shard is moving; connect again")
        .retry_after_ms(1_000)
}

/// Says why a connection isn't taken, to a peer that has said nothing yet.
pub(crate) async fn refuse(io: impl AsyncRead + AsyncWrite + Unpin, error: WireError) {
    say_last(io, connection_error(error)).await;
}

/// Says one frame and closes, once the peer has had a moment to read it: what it still sends would reset the connection.
pub(crate) async fn say_last(mut io: impl AsyncRead + AsyncWrite + Unpin, frame: Frame) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut bytes = BytesMut::new();
    codec::encode(&frame, &mut bytes);
    let _ = tokio::time::timeout(Duration::from_secs(1), async {
        let _ = io.write_all(&bytes).await;
        let _ = io.shutdown().await;
        let mut some = [0; 512];
        while io.read(&mut some).await.is_ok_and(|n| n > 0) {}
    })
    .await;
}

#[cfg(test)]
mod tests;

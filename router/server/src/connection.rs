//! One native connection: hello, frames in, heartbeats, and how it ends. Decodes here, decides nothing:
//! frames go to the shard in batches, one per read, and an agent's own frames to its task.

mod admissible;
mod agent;
mod client;

use crate::agent_task::{AgentHandle, Agents};
use crate::identity::{Anonymous, identify};
use crate::metric::{self, FrameCounts};
use crate::outbox::{Outbox, connection_error, outbox};
use crate::peer::{Peers, link};
use crate::shards::{Place, Shards, Sites};
use atp_proto::codec::{self, Received};
use atp_proto::content::{Hello, HelloAck, HelloLimits, PeerHello, Redirect, Role};
use atp_proto::frame::kind;
use atp_proto::limits::{FIRST_FRAME_MS, FRAGMENT_BYTES, FRAME_BYTES_MAX, FRAME_MS, MESSAGE_BYTES_MAX};
use atp_proto::{AgentName, Code, ConnId, Flags, Frame, WireError};
use bytes::BytesMut;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes that one read takes at most: one batch for the shard.
const READ_BYTES: usize = 128 * 1024;
const READ_BYTES_MIN: usize = 2048;
/// The highest minor version spoken here.
const MINOR: u32 = 1;

/// What every connection of a router shares.
pub(crate) struct Shared {
    pub(crate) shards: Shards,
    pub(crate) agents: Agents,
    /// The other routers of the fleet that are alive.
    pub(crate) sites: watch::Receiver<Sites>,
    pub(crate) peers: Peers,
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
    /// The peer was told where it is served.
    Redirected,
    Refused(WireError),
    Io(io::ErrorKind),
}

impl Ended {
    /// Why, if somebody said so.
    pub(crate) fn refused(self) -> Option<WireError> {
        match self {
            Self::Refused(error) => Some(error),
            Self::Closed | Self::Lost | Self::Redirected | Self::Io(_) => None,
        }
    }
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
    let mut connection = Connection::new(shared, conn, (reader, BytesMut::new()), outbox.clone(), closed);
    let ended = connection.run(loopback).await;
    match &ended {
        Ended::Refused(error) => {
            tracing::debug!(conn = conn.0, code = %error.code, message = %error.message, "connection refused");
            outbox.close(Some(error.clone()));
        }
        Ended::Io(kind) => {
            tracing::debug!(conn = conn.0, %kind, "connection broken");
            outbox.close(None);
        }
        Ended::Closed | Ended::Lost | Ended::Redirected => outbox.close(None),
    }
    if matches!(ended, Ended::Refused(_) | Ended::Redirected) {
        // What the peer still sends is read, or closing the socket would take the last word away from it.
        let _ = tokio::time::timeout(Duration::from_secs(1), connection.discard()).await;
    }
    drop((connection, outbox));
    let _ = writing.await;
    ended
}

pub(crate) struct Connection<R> {
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

/// What a read yielded.
enum Read {
    Some,
    End(Ended),
}

impl<R: AsyncRead + Unpin> Connection<R> {
    /// `read` is what is read from, and what was read already.
    pub(crate) fn new(
        shared: Arc<Shared>,
        conn: ConnId,
        read: (R, BytesMut),
        outbox: Outbox,
        closed: CancellationToken,
    ) -> Self {
        let (reader, bytes) = read;
        let (heard, counts) = (Instant::now(), FrameCounts::new("in"));
        Self { shared, conn, reader, bytes, chunk: READ_BYTES_MIN, heard, begun: None, counts, outbox, closed }
    }

    async fn run(&mut self, loopback: bool) -> Ended {
        let (hello, first) = match tokio::time::timeout(Duration::from_millis(FIRST_FRAME_MS), self.first()).await {
            Ok(Ok(first)) => first,
            Ok(Err(ended)) => return ended,
            Err(_) => {
                return WireError::proto(format!(
                    "hello: the first frame wasn't here within {FIRST_FRAME_MS} ms; open with SYN control.hello"
                ))
                .into();
            }
        };
        let ended = match hello.role {
            Role::Router => self.router(&first).await,
            Role::Client | Role::Agent => match identify(self.shared.anonymous, loopback, hello.token.as_deref()) {
                Ok(tenant) => {
                    if let (true, Role::Client, Some(elsewhere)) = (hello.redirect, hello.role, self.better_served()) {
                        self.outbox.send_one(Frame::json("", 0, Flags::FIN, kind::REDIRECT, &elsewhere));
                        return Ended::Redirected;
                    }
                    self.answer(hello.minor_max);
                    match hello.role {
                        Role::Client => self.client(tenant, true).await,
                        Role::Agent | Role::Router => self.agent().await,
                    }
                }
                Err(error) => return error.into(),
            },
        };
        self.counts.flush();
        ended
    }

    /// Where a client is better served, as no shard runs here (ATP-4-16); connections in a row are spread over those who have one.
    fn better_served(&self) -> Option<Redirect> {
        let shards = &self.shared.shards;
        if shards.any_here() {
            return None;
        }
        let count = shards.placement().shards();
        let first = (self.conn.0 % u64::from(count)) as u32;
        (0..count).map(|n| (first + n) % count).find_map(|shard| match shards.place(shard) {
            Place::At(site) => Some(Redirect { url: format!("atp://{}", site.atp), shard }),
            Place::Here(_) | Place::Unknown => None,
        })
    }

    /// Another router, once it has proved that it is one of this fleet: its link, or the frames of a client that it speaks for.
    async fn router(&mut self, first: &Frame) -> Ended {
        let proved = tokio::time::timeout(Duration::from_millis(FIRST_FRAME_MS), self.proved(first)).await;
        let late = || Err(WireError::new(Code::Auth, "peer.proof: isn't here in time").into());
        let peer = match proved.unwrap_or_else(|_| late()) {
            Ok(peer) => peer,
            Err(ended) => {
                metric::peer_refused();
                return ended;
            }
        };
        self.answer(peer.minor_max);
        match peer.tenant {
            Some(tenant) => self.client(tenant, false).await,
            None => link::serve(self, &peer.router).await,
        }
    }

    async fn proved(&mut self, first: &Frame) -> Result<PeerHello, Ended> {
        let (answering, challenge) = self.shared.peers.challenge(first)?;
        self.outbox.send_one(Frame::json("", 0, Flags::NONE, kind::PEER_CHALLENGE, &challenge));
        let frame = self.one().await?;
        if &*frame.kind != kind::PEER_PROOF {
            return Err(WireError::new(Code::Auth, "peer.proof: is due behind peer.challenge").into());
        }
        Ok(answering.accept(&frame.read()?)?)
    }

    async fn first(&mut self) -> Result<(Hello, Frame), Ended> {
        let frame = self.one().await?;
        if &*frame.kind != kind::HELLO || !frame.stream_id.is_empty() || !frame.flags.has(Flags::SYN) {
            return Err(WireError::proto("hello: the first frame must be SYN control.hello on stream \"\"").into());
        }
        Ok((frame.read()?, frame))
    }

    /// The next frame, however long it takes: for those before the connection is anybody's.
    async fn one(&mut self) -> Result<Frame, Ended> {
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
        self.counts.count(&received.frame.kind);
        Ok(received.frame)
    }

    /// What the other router says next, on the link or for a client; heartbeats are answered here.
    pub(crate) async fn next(&mut self) -> Result<Vec<Received>, Ended> {
        loop {
            let (mut frames, mut own) = (Vec::new(), Vec::new());
            self.frames(&mut frames, &mut own)?;
            if let Some(frame) = own.iter().find(|f| &*f.kind == kind::ERROR && f.flags.has(Flags::RST)) {
                return Err(Ended::Refused(frame.read()?));
            }
            if !frames.is_empty() {
                return Ok(frames);
            }
            if let Read::End(ended) = self.read().await {
                return Err(ended);
            }
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn conn(&self) -> ConnId {
        self.conn
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    fn answer(&self, minor_max: u32) {
        let ack = HelloAck {
            minor: minor_max.min(MINOR),
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

    /// Reads and forgets until the peer closes.
    async fn discard(&mut self) {
        let mut bytes = [0; 4096];
        while self.reader.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
    }
}

/// What a client is told whose stream's shard isn't served here now: another connection may find it.
pub(crate) fn not_here() -> WireError {
    let message = "this router is stopping, or the stream's shard is moving; connect again";
    WireError { judged: false, ..WireError::new(Code::Draining, message).retry_after_ms(1_000) }
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

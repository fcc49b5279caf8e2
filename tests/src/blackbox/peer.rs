//! A peer that is nothing but frames on a TCP connection: says what a test tells it, bytes too, and answers heartbeats.
//! Shares the codec with the product and nothing else.

use super::PATIENCE;
use atp_core::placement::{Placement, SHARDS};
use atp_proto::codec;
use atp_proto::content::{
    Capabilities, Dispatch, EstimateDeclaration, EstimateFigures, Hello, HelloAck, ModelInfo, Role, Submit,
};
use atp_proto::frame::{Meta, kind};
use atp_proto::id::stream_of_key;
use atp_proto::{AgentName, Amount, Flags, Frame, StreamId, TenantId, Tokens, WireError};
use bytes::BytesMut;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A peer that is silent for three heartbeats is lost; this one never is.
const BEAT: Duration = Duration::from_secs(2);

/// How long an impatient one waits for the answer to its hello, as the SDK does.
const HELLO: Duration = Duration::from_secs(2);

/// The model of a test's agent.
pub const MODEL: &str = "test-model";

pub struct Peer {
    io: TcpStream,
    bytes: BytesMut,
    said: Instant,
    heard: Instant,
    /// After so long a silence the router counts as lost; `None`: it never does.
    lost_after: Option<Duration>,
    /// False: heartbeats are neither sent nor answered nor hidden from the test.
    pub beats: bool,
}

impl Peer {
    /// A bare connection.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn dial(router: SocketAddr) -> io::Result<Self> {
        let io = TcpStream::connect(router)?;
        io.set_nodelay(true)?;
        let now = Instant::now();
        Ok(Self { io, bytes: BytesMut::new(), said: now, heard: now, lost_after: None, beats: true })
    }

    /// A connection that has said hello.
    ///
    /// # Errors
    /// The router is away.
    pub fn hello(router: SocketAddr, role: Role) -> io::Result<(Self, HelloAck)> {
        Self::hello_within(router, role, PATIENCE)
    }

    fn hello_within(router: SocketAddr, role: Role, patience: Duration) -> io::Result<(Self, HelloAck)> {
        let mut peer = Self::dial(router)?;
        peer.try_send(&hello(role, 1))?;
        let answer = peer.try_next(patience)?.ok_or(ErrorKind::UnexpectedEof)?;
        let ack = answer.read().map_err(|e| io::Error::other(format!("{answer:?}: {e}")))?;
        Ok((peer, ack))
    }

    /// A client that goes to another router when this one is silent, as any client of several routers has to: each reading ends
    /// with `TimedOut` behind three heartbeats in which nothing came (ATP-4-9).
    ///
    /// # Errors
    /// The router is away, or doesn't answer.
    pub fn impatient(router: SocketAddr) -> io::Result<Self> {
        let (mut peer, ack) = Self::hello_within(router, Role::Client, HELLO)?;
        peer.lost_after = Some(3 * Duration::from_millis(ack.heartbeat_ms));
        Ok(peer)
    }

    /// # Panics
    /// When the router doesn't answer.
    #[must_use]
    pub fn client(router: SocketAddr) -> Self {
        Self::hello(router, Role::Client).expect("the router answers").0
    }

    /// An agent that has sent its capabilities.
    ///
    /// # Panics
    /// When the router doesn't answer.
    #[must_use]
    pub fn agent(router: SocketAddr, capabilities: &Capabilities) -> Self {
        let (mut peer, _) = Self::hello(router, Role::Agent).expect("the router answers");
        peer.send(&Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, capabilities));
        peer
    }

    /// # Errors
    /// The connection is gone.
    pub fn try_send(&mut self, frame: &Frame) -> io::Result<()> {
        self.said = Instant::now();
        self.io.write_all(&encoded(frame))
    }

    /// # Panics
    /// When the connection is gone.
    pub fn send(&mut self, frame: &Frame) {
        self.try_send(frame).expect("the router reads");
    }

    /// # Panics
    /// When the connection is gone.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).expect("the router reads");
    }

    /// The next frame; `None`: the router closed.
    ///
    /// # Errors
    /// The connection broke, or nothing came within `patience` (`TimedOut`).
    pub fn try_next(&mut self, patience: Duration) -> io::Result<Option<Frame>> {
        let end = Instant::now() + patience;
        loop {
            if let Some(received) = codec::decode(&mut self.bytes).map_err(io::Error::other)? {
                let frame = received.frame;
                if !self.beats || !frame.flags.has(Flags::HB) {
                    return Ok(Some(frame));
                }
                if !frame.flags.has(Flags::ACK) {
                    self.try_send(&Frame::heartbeat(true))?;
                }
                continue;
            }
            let now = Instant::now();
            let lost = self.lost_after.map(|silence| self.heard + silence);
            let end = lost.map_or(end, |lost| lost.min(end));
            if now >= end {
                return Err(ErrorKind::TimedOut.into());
            }
            if self.beats && now >= self.said + BEAT {
                self.try_send(&Frame::heartbeat(false))?;
            }
            let wait = (end - now).min(BEAT).max(Duration::from_millis(1));
            self.io.set_read_timeout(Some(wait))?;
            let mut some = [0; 64 * 1024];
            match self.io.read(&mut some) {
                Ok(0) => return Ok(None),
                Ok(n) => {
                    self.heard = Instant::now();
                    self.bytes.extend_from_slice(&some[..n]);
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The next dispatch; `None`: the router closed, or for `patience` nothing came.
    ///
    /// # Panics
    /// When it can't be read.
    pub fn try_dispatched(&mut self, patience: Duration) -> Option<Dispatch> {
        loop {
            let frame = self.try_next(patience).ok()??;
            if &*frame.kind == kind::DISPATCH {
                return Some(frame.read().expect("a dispatch"));
            }
        }
    }

    /// The next frame.
    ///
    /// # Panics
    /// When the router closed, or nothing came.
    pub fn frame(&mut self) -> Frame {
        self.try_next(PATIENCE).expect("a frame").expect("the router doesn't close")
    }

    /// The next frame of a type; others are passed over.
    ///
    /// # Panics
    /// When the stream is refused instead, or nothing came.
    pub fn expect(&mut self, kind: &str) -> Frame {
        loop {
            let frame = self.frame();
            if &*frame.kind == kind {
                return frame;
            }
            assert_ne!(&*frame.kind, kind::ERROR, "waited for {kind}: {}", said(&frame));
        }
    }

    /// The numbered frames of a stream up to its bill.
    ///
    /// # Panics
    /// When it is refused instead, or nothing came.
    pub fn to_the_bill(&mut self, stream: &str) -> Vec<Frame> {
        let mut frames: Vec<Frame> = Vec::new();
        loop {
            let frame = self.frame();
            if &*frame.stream_id != stream || frame.msg_seq == 0 {
                assert!(!frame.flags.has(Flags::RST), "{}", said(&frame));
                continue;
            }
            let is_last = &*frame.kind == kind::BILL;
            frames.push(frame);
            if is_last {
                return frames;
            }
        }
    }

    /// The error that resets a stream.
    ///
    /// # Panics
    /// When something else is said on it.
    pub fn refused(&mut self, stream: &str) -> WireError {
        loop {
            let frame = self.frame();
            if &*frame.stream_id != stream || &*frame.kind == kind::ACK {
                continue;
            }
            assert!(frame.flags.has(Flags::RST), "no refusal: {}", said(&frame));
            return frame.read().expect("an error");
        }
    }

    /// The error with which the router closes this connection, and that it does close.
    ///
    /// # Panics
    /// When it doesn't.
    pub fn closed(&mut self) -> WireError {
        let error = loop {
            let frame = self.frame();
            if frame.stream_id.is_empty() && &*frame.kind == kind::ERROR {
                break frame.read::<WireError>().expect("an error");
            }
        };
        assert_eq!(error.fatal, atp_proto::code::Fatal::Connection, "{error:?}");
        self.ended();
        error
    }

    /// Waits for the router's end of the connection.
    ///
    /// # Panics
    /// When it goes on to talk, or doesn't close.
    pub fn ended(&mut self) {
        match self.try_next(PATIENCE) {
            Ok(None) => {}
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {}
            other => panic!("the router doesn't close: {other:?}"),
        }
    }

    /// The next dispatch that isn't a question about a running call.
    ///
    /// # Panics
    /// When nothing came.
    pub fn dispatched(&mut self) -> Dispatch {
        self.expect(kind::DISPATCH).read().expect("a dispatch")
    }
}

/// How the ids of streams begin that belong to the home shard of their account, in a log with the usual number of shards; a `.`
/// and any text may follow.
#[must_use]
pub fn at_home(account: &str) -> String {
    let (placement, tenant) = (Placement::new(SHARDS, 0), TenantId::new("default"));
    let here = |id: &String| placement.shard_of(&tenant, &StreamId::new(id)) == placement.home_of(account);
    (0_u32..).map(|n| format!("h{n}")).find(here).expect("one of them")
}

/// A frame's bytes on the wire.
#[must_use]
pub fn encoded(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    codec::encode(frame, &mut bytes);
    bytes
}

fn said(frame: &Frame) -> String {
    format!("{} #{} on `{}`: {}", frame.kind, frame.msg_seq, frame.stream_id, String::from_utf8_lossy(&frame.content))
}

/// `SYN control.hello`.
#[must_use]
pub fn hello(role: Role, minor_max: u32) -> Frame {
    Frame::json("", 0, Flags::SYN, kind::HELLO, &Hello { minor_max, role, token: None, redirect: false })
}

/// `SYN task.submit`.
#[must_use]
pub fn submit(stream: &str, content: &Submit) -> Frame {
    Frame::json(stream, 1, Flags::SYN, kind::TASK_SUBMIT, content)
}

/// `SYN task.submit` under an idempotency key: the stream's id is the key's, of this try.
#[must_use]
pub fn submit_by_key(key: &str, number: u32, content: &Submit) -> Frame {
    let meta = Meta { idempotency_key: key.into(), ..Meta::default() };
    Frame { meta: Some(Box::new(meta)), ..submit(stream_of_key(key, number).as_str(), content) }
}

/// What a test's agent says of itself: one model at 1 and 4 USD per million tokens, 100 tokens in and 100 out a call.
#[must_use]
pub fn capabilities(name: &str) -> Capabilities {
    let figures = EstimateFigures { in_tokens: Tokens(100), out_tokens: Tokens(100), ..EstimateFigures::default() };
    Capabilities {
        agent: AgentName::new(name),
        adapter: "test".into(),
        incarnation: "first".into(),
        max_parallel: 4,
        models: vec![ModelInfo {
            id: MODEL.into(),
            in_usd_micros_per_mtok: Some(1_000_000),
            out_usd_micros_per_mtok: Some(4_000_000),
            context_tokens: None,
        }],
        estimate: Some(EstimateDeclaration { figures, ..EstimateDeclaration::default() }),
        reach: Amount::new(10, 40),
        ..Capabilities::default()
    }
}

/// A task for one agent by name.
#[must_use]
pub fn task(agent: &str) -> Submit {
    Submit { task: "review".into(), agents: vec![AgentName::new(agent)], ..Submit::default() }
}

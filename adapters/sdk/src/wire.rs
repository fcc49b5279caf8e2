//! One connection: frames over a byte stream, reads and coalesced writes driven by one task, and the hello.
//! Knows nothing of streams, tasks or calls.

use crate::dial::{BoxedIo, Dialer, EACH, Endpoint, parse_url};
use crate::error::Error;
use atp_proto::code::WireError;
use atp_proto::codec;
use atp_proto::content::{Hello, HelloAck, Redirect, Role};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame};
use bytes::{Buf, BytesMut};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;
use tokio::io::AsyncWrite;
use tokio::time::{Instant, timeout};
use tokio_util::io::poll_read_buf;

/// No more is put into the write buffer while it holds this much.
pub(crate) const WRITE_BYTES: usize = 256 * 1024;
const READ_BYTES: usize = 128 * 1024;
/// Routers in a row that send a connection to another one, before it asks to be forwarded.
const REDIRECTS_MAX: u32 = 2;

pub(crate) struct Wire {
    io: BoxedIo,
    read: BytesMut,
    write: BytesMut,
    flush: bool,
}

/// What a turn of the connection brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    Read,
    Wrote,
    Closed,
}

impl Wire {
    pub(crate) fn new(io: BoxedIo) -> Self {
        Self { io, read: BytesMut::new(), write: BytesMut::new(), flush: false }
    }

    pub(crate) fn push(&mut self, frame: &Frame) {
        codec::encode(frame, &mut self.write);
    }

    /// Appends frames that are encoded already.
    pub(crate) fn push_encoded(&mut self, bytes: &[u8]) {
        self.write.extend_from_slice(bytes);
    }

    pub(crate) fn has_room(&self) -> bool {
        self.write.len() < WRITE_BYTES
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.write.is_empty() && !self.flush
    }

    /// The next whole frame of what was read.
    pub(crate) fn take(&mut self) -> Result<Option<Frame>, WireError> {
        Ok(codec::decode(&mut self.read)?.map(|received| received.frame))
    }

    /// Writes what waits and reads what came; resolves when either moved. Safe to drop and call again. With `read` false
    /// nothing is read: the peer feels it.
    pub(crate) async fn turn(&mut self, read: bool) -> io::Result<Turn> {
        poll_fn(|cx| {
            let mut wrote = false;
            while !self.write.is_empty() {
                match Pin::new(&mut self.io).poll_write(cx, &self.write) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(n)) => {
                        self.write.advance(n);
                        (wrote, self.flush) = (true, true);
                    }
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => break,
                }
            }
            if self.flush
                && self.write.is_empty()
                && let Poll::Ready(done) = Pin::new(&mut self.io).poll_flush(cx)
            {
                done?;
                self.flush = false;
            }
            if read {
                self.read.reserve(READ_BYTES);
                if let Poll::Ready(n) = poll_read_buf(Pin::new(&mut self.io), cx, &mut self.read) {
                    return Poll::Ready(n.map(|n| if n == 0 { Turn::Closed } else { Turn::Read }));
                }
            }
            if wrote { Poll::Ready(Ok(Turn::Wrote)) } else { Poll::Pending }
        })
        .await
    }

    /// Writes everything and closes the sending side; errors no longer matter.
    pub(crate) async fn close(mut self) {
        let all = async {
            while !self.is_flushed() {
                if self.turn(false).await.is_err() {
                    return;
                }
            }
            let _ = poll_fn(|cx| Pin::new(&mut self.io).poll_shutdown(cx)).await;
        };
        let _ = timeout(Duration::from_secs(1), all).await;
    }
}

/// Dials and says hello; a client goes on to where a router sends it, and where that leads nowhere asks to be served by
/// forwarding.
///
/// # Errors
/// `Unreachable` for the transport and the time-out, `Auth` or `Refused` for the router's no, `Protocol` for an answer that is
/// none.
pub(crate) async fn open(
    dialer: &Dialer,
    role: Role,
    token: Option<&str>,
    within: Duration,
) -> Result<(Wire, HelloAck), Error> {
    // One that hangs must not use up the time in which others wait for this peer.
    let answer = if dialer.routers() > 1 { within.min(EACH) } else { within };
    let attempt = async {
        let hello = |redirect| Hello { minor_max: 1, role, token: token.map(str::to_owned), redirect };
        if role == Role::Client {
            let mut sent = greet(dialer, &hello(true), answer).await?;
            for _ in 0..REDIRECTS_MAX {
                let url = match sent {
                    Greeted::Here(wire, answer) => return Ok((*wire, answer)),
                    Greeted::Elsewhere(url) => url,
                };
                // An address may lead nowhere from here, or its router be gone by now.
                let Ok(Endpoint::Atp(address)) = parse_url(&url) else { break };
                let to = Dialer::tcp(address);
                match timeout(EACH, greet(&to, &hello(true), EACH)).await {
                    Ok(Ok(greeted)) => sent = greeted,
                    Ok(Err(Error::Unreachable(_))) | Err(_) => break,
                    Ok(Err(error)) => return Err(error),
                }
            }
        }
        match greet(dialer, &hello(false), answer).await? {
            Greeted::Here(wire, answer) => Ok((*wire, answer)),
            Greeted::Elsewhere(url) => {
                Err(Error::Protocol(format!("control.redirect to `{url}`, which wasn't asked for")))
            }
        }
    };
    timeout(within, attempt).await.unwrap_or_else(|_| Err(no_answer(dialer, within)))
}

enum Greeted {
    Here(Box<Wire>, HelloAck),
    Elsewhere(String),
}

/// `within`: how long the answer may take once the router is reached.
async fn greet(dialer: &Dialer, hello: &Hello, within: Duration) -> Result<Greeted, Error> {
    // Of several routers the error names each.
    let unreachable = |e| match dialer.routers() {
        1 => Error::Unreachable(format!("{dialer}: {e}")),
        _ => Error::Unreachable(format!("{e}")),
    };
    let io = dialer.dial().await.map_err(unreachable)?;
    let mut wire = Wire::new(io);
    wire.push(&Frame::json("", 0, Flags::SYN, kind::HELLO, hello));
    timeout(within, answer_to_hello(wire, dialer)).await.unwrap_or_else(|_| Err(no_answer(dialer, within)))
}

fn no_answer(dialer: &Dialer, within: Duration) -> Error {
    Error::Unreachable(format!("{dialer}: no answer within {} ms", within.as_millis()))
}

async fn answer_to_hello(mut wire: Wire, dialer: &Dialer) -> Result<Greeted, Error> {
    loop {
        while let Some(frame) = wire.take().map_err(|e| Error::Protocol(e.to_string()))? {
            match hello_answer(&frame)? {
                Some(Answer::Hello(answer)) => return Ok(Greeted::Here(Box::new(wire), answer)),
                Some(Answer::Redirect(redirect)) => return Ok(Greeted::Elsewhere(redirect.url)),
                None => {}
            }
        }
        let lost = |e: &dyn std::fmt::Display| Error::Unreachable(format!("{dialer}: {e}"));
        match wire.turn(true).await {
            Ok(Turn::Closed) => return Err(lost(&"closed before it answered the hello")),
            Ok(Turn::Read | Turn::Wrote) => {}
            Err(e) => return Err(lost(&e)),
        }
    }
}

enum Answer {
    Hello(HelloAck),
    Redirect(Redirect),
}

fn hello_answer(frame: &Frame) -> Result<Option<Answer>, Error> {
    let unreadable = |e: WireError| Error::Protocol(e.message);
    match &*frame.kind {
        kind::HELLO => frame.read().map(|answer| Some(Answer::Hello(answer))).map_err(unreadable),
        kind::REDIRECT => frame.read().map(|redirect| Some(Answer::Redirect(redirect))).map_err(unreadable),
        kind::ERROR => Err(frame.read::<WireError>().map_or_else(|e| Error::Protocol(e.message), Error::of_connection)),
        _ => Ok(None),
    }
}

/// When to send a heartbeat, and when silence means that the connection is lost (ATP-4).
pub(crate) struct Pulse {
    every: Duration,
    next: Instant,
    heard: Instant,
}

impl Pulse {
    pub(crate) fn new(heartbeat_ms: u64) -> Self {
        let every = Duration::from_millis(heartbeat_ms.clamp(10, 3_600_000));
        let now = Instant::now();
        Self { every, next: now + every, heard: now }
    }

    pub(crate) fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// The next moment at which `beat` has something to do.
    pub(crate) fn due(&self) -> Instant {
        self.next
    }

    /// True while the peer isn't lost; sends a heartbeat when one is due.
    pub(crate) fn beat(&mut self, wire: &mut Wire) -> bool {
        let now = Instant::now();
        if now >= self.next {
            self.next = now + self.every;
            wire.push(&Frame::heartbeat(false));
        }
        now < self.heard + self.every * 3
    }
}

//! One connection of an end: bytes in and out over TCP, the hello and heartbeats. Knows nothing of tasks or calls.

use crate::peek::{self, Peek};
use anyhow::Context;
use atp_proto::content::{Hello, Role};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame, WireError, codec};
use bytes::{Buf, BytesMut};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// No more is put into the write buffer while it holds this much.
const WRITE_BYTES: usize = 256 * 1024;
const READ_BYTES: usize = 256 * 1024;
const HEARTBEAT: Duration = Duration::from_secs(4);

pub(crate) struct Link {
    stream: TcpStream,
    input: BytesMut,
    pub(crate) out: BytesMut,
    beat: Instant,
}

impl Link {
    /// Connects and says hello.
    pub(crate) async fn open(address: SocketAddr, role: Role) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        let mut link = Self { stream, input: BytesMut::new(), out: BytesMut::new(), beat: Instant::now() + HEARTBEAT };
        link.push(&Frame::json(
            "",
            0,
            Flags::SYN,
            kind::HELLO,
            &Hello { minor_max: 1, role, token: None, redirect: false },
        ));
        let mut greeted = false;
        let answer = async {
            while !greeted {
                link.turn(None).await?;
                link.take(|_, frame| {
                    greeted |= frame.kind == kind::HELLO.as_bytes();
                    Ok(())
                })?;
            }
            anyhow::Ok(())
        };
        timeout(Duration::from_secs(10), answer).await.context("no answer to the hello")??;
        Ok(link)
    }

    pub(crate) fn push(&mut self, frame: &Frame) {
        codec::encode(frame, &mut self.out);
    }

    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < WRITE_BYTES
    }

    /// Waits until bytes moved, a heartbeat was due, or `until`.
    pub(crate) async fn turn(&mut self, until: Option<Instant>) -> anyhow::Result<()> {
        let interest = if self.out.is_empty() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        let wake = until.map_or(self.beat, |until| until.min(self.beat));
        let ready = tokio::select! {
            ready = self.stream.ready(interest) => ready?,
            () = tokio::time::sleep_until(wake) => {
                if Instant::now() >= self.beat {
                    self.beat = Instant::now() + HEARTBEAT;
                    self.push(&Frame::heartbeat(false));
                }
                return Ok(());
            }
        };
        if ready.is_readable() {
            self.input.reserve(READ_BYTES);
            match self.stream.try_read_buf(&mut self.input) {
                Ok(0) => anyhow::bail!("the router closed the connection"),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        if ready.is_writable() {
            match self.stream.try_write(&self.out) {
                Ok(n) => self.out.advance(n),
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Hands over every whole frame that has come, encoded and peeked at. Heartbeats and errors of the connection are
    /// dealt with here.
    pub(crate) fn take(&mut self, mut each: impl FnMut(&[u8], Peek<'_>) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut at = 0;
        while let Some((envelope, length)) = peek::first(&self.input[at..])? {
            let frame = peek::peek(envelope).context("the router sent what isn't a frame")?;
            let flags = Flags(frame.flags);
            if flags.has(Flags::HB) {
                if !flags.has(Flags::ACK) {
                    codec::encode(&Frame::heartbeat(true), &mut self.out);
                }
            } else if frame.stream_id.is_empty() && frame.kind == kind::ERROR.as_bytes() {
                let error: WireError = serde_json::from_slice(frame.content)?;
                anyhow::bail!("the router refused the connection: {error}");
            } else {
                each(envelope, frame)?;
            }
            at += length;
        }
        self.input.advance(at);
        Ok(())
    }
}

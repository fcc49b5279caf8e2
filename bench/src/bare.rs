//! The yardstick: a tokio relay that does nothing but pass length-delimited frames from one connection to another, as a
//! process of its own like the router. The same bytes, written and counted by the same code as at the router's ends.

use crate::chunk::Chunks;
use crate::peek;
use crate::process;
use anyhow::Context;
use bytes::{Buf, BytesMut};
use futures_util::StreamExt;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::codec::{FramedRead, FramedWrite, LengthDelimitedCodec};

const BUFFER: usize = 256 * 1024;

/// The relay's process: says its two addresses on stdout, relays until stdin ends.
pub(crate) async fn child() -> anyhow::Result<()> {
    let (from, to) = (TcpListener::bind("127.0.0.1:0").await?, TcpListener::bind("127.0.0.1:0").await?);
    println!("{} {}", from.local_addr()?, to.local_addr()?);
    let relaying = async {
        loop {
            let ((from, _), (to, _)) = (from.accept().await?, to.accept().await?);
            to.set_nodelay(true)?;
            let read = FramedRead::with_capacity(from, LengthDelimitedCodec::new(), BUFFER);
            let mut write = FramedWrite::new(to, LengthDelimitedCodec::new());
            write.set_backpressure_boundary(BUFFER);
            tokio::spawn(read.map(|frame| frame.map(BytesMut::freeze)).forward(write));
        }
    };
    let mut stdin = tokio::io::stdin();
    let mut bytes = [0; 64];
    let parent = async { while stdin.read(&mut bytes).await.is_ok_and(|n| n > 0) {} };
    tokio::select! {
        ended = relaying => ended,
        () = parent => Ok(()),
    }
}

/// What the bare relay moved.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BareFigures {
    pub(crate) frames_per_second: f64,
    pub(crate) bytes_per_second: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) peak_rss_bytes: u64,
    pub(crate) ends_cpu_seconds: f64,
}

/// Measures it for `time` after `warm_up`.
pub(crate) async fn measure(
    connections: u64,
    streams: u64,
    chunk_bytes: usize,
    warm_up: Duration,
    time: Duration,
) -> anyhow::Result<BareFigures> {
    let mut relay = Command::new(std::env::current_exe()?)
        .args(["bench", "bare-relay"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting the bare relay")?;
    let pid = relay.id().context("the bare relay has ended")?;
    let mut line = String::new();
    let stdout = relay.stdout.take().context("stdout is piped")?;
    BufReader::new(stdout).read_line(&mut line).await?;
    let (from, to) = line.trim().split_once(' ').context("the bare relay said no addresses")?;
    let (from, to): (SocketAddr, SocketAddr) = (from.parse()?, to.parse()?);
    let counted = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let mut ends = JoinSet::new();
    for n in 0..connections {
        let share = streams / connections + u64::from(n < streams % connections);
        // One pair after the other, so that the relay pairs them alike.
        let (from, to) = (TcpStream::connect(from).await?, TcpStream::connect(to).await?);
        from.set_nodelay(true)?;
        ends.spawn(source(from, n, share, chunk_bytes));
        ends.spawn(sink(to, Arc::clone(&counted)));
    }
    let watched = async {
        sleep(warm_up).await;
        let read = || (counted[0].load(Relaxed), counted[1].load(Relaxed));
        let ((frames, bytes), started) = (read(), Instant::now());
        let (relay_used, own_used) = (process::usage(pid)?, process::usage(std::process::id())?);
        sleep(time).await;
        let (after, seconds) = (read(), started.elapsed().as_secs_f64());
        let (relay_after, own_after) = (process::usage(pid)?, process::usage(std::process::id())?);
        Ok(BareFigures {
            frames_per_second: (after.0 - frames) as f64 / seconds,
            bytes_per_second: (after.1 - bytes) as f64 / seconds,
            cpu_seconds: relay_after.cpu_seconds - relay_used.cpu_seconds,
            peak_rss_bytes: relay_after.peak_rss_bytes,
            ends_cpu_seconds: own_after.cpu_seconds - own_used.cpu_seconds,
        })
    };
    let figures = tokio::select! {
        figures = watched => figures,
        Some(ended) = ends.join_next() => Err(ended?.err().unwrap_or_else(|| anyhow::anyhow!("an end stopped"))),
    };
    ends.shutdown().await;
    relay.kill().await?;
    figures
}

async fn source(mut stream: TcpStream, connection: u64, streams: u64, chunk_bytes: usize) -> anyhow::Result<()> {
    let id = |n: u64| format!("c-{:020x}", connection << 32 | n);
    let mut chunks: Vec<Chunks> = (0..streams).map(|n| Chunks::new(&id(n), chunk_bytes)).collect();
    let mut out = BytesMut::new();
    let (mut seq, mut turn) = (1, 0);
    loop {
        while out.len() < BUFFER {
            if turn == chunks.len() {
                (seq, turn) = (seq + 1, 0);
            }
            chunks[turn].write(&mut out, seq, 200, seq * 256);
            turn += 1;
        }
        let written = stream.write(&out).await?;
        out.advance(written);
    }
}

async fn sink(mut stream: TcpStream, counted: Arc<[AtomicU64; 2]>) -> anyhow::Result<()> {
    let mut input = BytesMut::new();
    loop {
        input.reserve(BUFFER);
        anyhow::ensure!(stream.read_buf(&mut input).await? > 0, "the bare relay closed the connection");
        let (mut at, mut frames, mut bytes) = (0, 0, 0);
        while let Some((envelope, length)) = peek::first(&input[at..])? {
            let frame = peek::peek(envelope).context("the bare relay sent what isn't a frame")?;
            (at, frames, bytes) = (at + length, frames + 1, bytes + frame.content.len() as u64);
        }
        input.advance(at);
        counted[0].fetch_add(frames, Relaxed);
        counted[1].fetch_add(bytes, Relaxed);
    }
}

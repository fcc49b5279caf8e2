//! Scenario `recover`: how long a killed router takes to serve again, and in how much memory, on a log with many frames of
//! streams that still run. Once with the checkpoints that the router makes, once on a log without any.

use crate::agent::{self, Conduct, Sent};
use crate::args::{BenchArgs, Line};
use crate::client::{self, Received, STREAMS_PER_CONNECTION};
use crate::idle::STREAMS_PER_AGENT;
use crate::report::{cells, median, mib, names, print, table};
use crate::router::Target;
use anyhow::Context;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Bytes of a chunk's JSON document: a few words, as models send them.
const CHUNK_BYTES: usize = 256;
/// More log than a chunk and what is recorded around it ever take; a checkpoint is due at three quarters of a segment.
const SEGMENT_BYTES_PER_FRAME: u64 = 1_000;
/// Bounds of `limits.segment_bytes`.
const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 64 << 20..=1 << 30;
const STARTS: usize = 3;
/// Nothing was received for so long: something is stuck.
const STILL: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
struct Report {
    scenario: &'static str,
    version: &'static str,
    cores: usize,
    frames: u64,
    streams: u64,
    chunk_bytes: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    checkpoints: bool,
    log_bytes: u64,
    /// Of the router that was killed.
    running_rss_bytes: u64,
    /// From the start of the process to its readiness: the median and each start.
    seconds: f64,
    starts: Vec<f64>,
    cpu_seconds: f64,
    peak_rss_bytes: u64,
}

pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let mut report = Report {
        scenario: "recover",
        version: env!("CARGO_PKG_VERSION"),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        frames: args.frames / args.streams() * args.streams(),
        streams: args.streams(),
        chunk_bytes: CHUNK_BYTES,
        rows: Vec::new(),
    };
    let large = (args.frames * SEGMENT_BYTES_PER_FRAME).clamp(*SEGMENT_BYTES.start(), *SEGMENT_BYTES.end());
    for (checkpoints, segment_bytes) in [(true, *SEGMENT_BYTES.start()), (false, large / 4096 * 4096)] {
        report.rows.push(measure(args, checkpoints, segment_bytes).await?);
    }
    print(&report, args.json, text)
}

async fn measure(args: &BenchArgs, checkpoints: bool, segment_bytes: u64) -> anyhow::Result<Row> {
    let mut target = Target::start_with(args, Line::On, segment_bytes).await?;
    fill(args, &target, checkpoints).await?;
    let running = target.usage()?.context("the router is gone")?;
    let log_bytes = target.log_bytes()?;
    let (mut starts, mut cpu, mut peak) = (Vec::new(), Vec::new(), 0);
    for _ in 0..STARTS {
        starts.push(target.restart().await?.as_secs_f64());
        let usage = target.usage()?.context("the router is gone")?;
        cpu.push(usage.cpu_seconds);
        peak = usage.peak_rss_bytes.max(peak);
        eprintln!("ready after {:.2} s", starts[starts.len() - 1]);
    }
    target.stop().await?;
    Ok(Row {
        checkpoints,
        log_bytes,
        running_rss_bytes: running.rss_bytes,
        seconds: median(starts.iter().copied()),
        starts,
        cpu_seconds: median(cpu.into_iter()),
        peak_rss_bytes: peak,
    })
}

/// Lets agents send the frames, and the clients receive them all; the calls run on.
async fn fill(args: &BenchArgs, target: &Target, checkpoints: bool) -> anyhow::Result<()> {
    let streams = usize::try_from(args.streams())?;
    let chunks = args.frames / args.streams();
    let frames = chunks * args.streams();
    let (sent, received) = (Arc::new(Sent::default()), Arc::new(Received::default()));
    let mut ends = JoinSet::new();
    for n in 0..streams.div_ceil(STREAMS_PER_AGENT) {
        let conduct = Conduct::Stream { chunk_bytes: CHUNK_BYTES, chunks };
        ends.spawn(agent::run(target.address, n as u64, conduct, Arc::clone(&sent)));
    }
    let mut opened = 0;
    while opened < streams {
        let agent = opened / STREAMS_PER_AGENT;
        let share = (streams - opened).min(STREAMS_PER_CONNECTION).min((agent + 1) * STREAMS_PER_AGENT - opened);
        let prefix = format!("{}-{opened}", client::run_id());
        ends.spawn(client::run(target.address, prefix, share, agent as u64, Arc::clone(&received)));
        opened += share;
    }
    let (mut before, mut moved) = (0, Instant::now());
    loop {
        tokio::select! {
            () = sleep(Duration::from_secs(1)) => {}
            Some(ended) = ends.join_next() => {
                return Err(ended?.err().unwrap_or_else(|| anyhow::anyhow!("an end stopped")));
            }
        }
        let now = received.partials.load(Relaxed);
        eprintln!("{} checkpoints: {now} of {frames} frames", if checkpoints { "with" } else { "without" });
        if now >= frames {
            break;
        }
        if now > before {
            (before, moved) = (now, Instant::now());
        }
        anyhow::ensure!(
            moved.elapsed() < STILL && received.ended.load(Relaxed) == 0,
            "{now} of {frames} frames came, {} streams ended; first end: {}",
            received.ended.load(Relaxed),
            received.why().unwrap_or_else(|| "none".into())
        );
    }
    ends.shutdown().await;
    Ok(())
}

fn text(report: &Report) -> String {
    let head = names(&["log", "log MiB", "ready after s", "CPU s", "frames/s", "peak MiB", "before the kill MiB"]);
    let rows: Vec<Vec<String>> = std::iter::once(head)
        .chain(report.rows.iter().map(|r| {
            cells([
                if r.checkpoints { "with checkpoints" } else { "without" }.to_owned(),
                mib(r.log_bytes),
                format!("{:.2}", r.seconds),
                format!("{:.2}", r.cpu_seconds),
                format!("{:.0}", report.frames as f64 / r.seconds),
                mib(r.peak_rss_bytes),
                mib(r.running_rss_bytes),
            ])
        }))
        .collect();
    format!(
        "recover: {} frames of {} running streams, chunks of {} bytes, {} cores; median of {STARTS} starts\n\n{}",
        report.frames,
        report.streams,
        report.chunk_bytes,
        report.cores,
        table(&rows)
    )
}

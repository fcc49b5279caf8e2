//! Scenario `relay`: long calls that answer in chunks flat out, counted where the client receives them. Every round
//! measures the bare relay and then each line, so that a ratio compares neighbours in time.

use crate::agent::{self, Conduct, Sent};
use crate::args::{BenchArgs, Line};
use crate::bare;
use crate::client::{self, Received};
use crate::process;
use crate::report::{RelayRow, Report, Rows, median};
use crate::router::Target;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

pub(crate) const WARM_UP: Duration = Duration::from_millis(1000);

/// What one line did in one round.
#[derive(Clone, Debug, Default)]
struct Sample {
    frames_per_second: f64,
    bytes_per_second: f64,
    ratio: f64,
    frames: f64,
    cpu_seconds: Option<f64>,
    peak_rss_bytes: Option<u64>,
    ends_cpu_seconds: f64,
    grant_waits: u64,
    ended: u64,
    disordered: u64,
    why: Option<String>,
}

pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<Report> {
    let time = Duration::from_secs(args.seconds) / u32::try_from(args.rounds)?;
    let chunk_bytes = usize::try_from(args.chunk_bytes)?;
    let mut bare_samples = Vec::new();
    let mut samples = vec![Vec::new(); args.lines().len()];
    for round in 1..=args.rounds {
        let bare = bare::measure(args.connections, args.streams(), chunk_bytes, WARM_UP, time).await?;
        eprintln!("round {round}: bare relay {:.0}/s", bare.frames_per_second);
        bare_samples.push(Sample {
            frames_per_second: bare.frames_per_second,
            bytes_per_second: bare.bytes_per_second,
            ratio: 1.0,
            frames: bare.frames_per_second * time.as_secs_f64(),
            cpu_seconds: Some(bare.cpu_seconds),
            peak_rss_bytes: Some(bare.peak_rss_bytes),
            ends_cpu_seconds: bare.ends_cpu_seconds,
            ..Sample::default()
        });
        for (line, samples) in args.lines().iter().zip(&mut samples) {
            let sample = measure(args, *line, time).await?;
            eprintln!("round {round}: {} {:.0}/s", line.name(), sample.frames_per_second);
            samples.push(Sample { ratio: sample.frames_per_second / bare.frames_per_second, ..sample });
        }
    }
    let mut rows = vec![row("bare relay", &bare_samples)];
    rows.extend(args.lines().iter().zip(&samples).map(|(line, samples)| row(line.name(), samples)));
    Ok(Report::new(args, Rows::Relay(rows)))
}

async fn measure(args: &BenchArgs, line: Line, time: Duration) -> anyhow::Result<Sample> {
    let target = Target::start(args, line).await?;
    let (sent, received) = (Arc::new(Sent::default()), Arc::new(Received::default()));
    let mut ends = JoinSet::new();
    let conduct = Conduct::Stream { chunk_bytes: usize::try_from(args.chunk_bytes)?, chunks: u64::MAX };
    for n in 0..args.connections {
        ends.spawn(agent::run(target.address, n, conduct, Arc::clone(&sent)));
    }
    let run = client::run_id();
    for n in 0..args.connections {
        let share = args.streams() / args.connections + u64::from(n < args.streams() % args.connections);
        let (prefix, share) = (format!("{run}-{n}"), usize::try_from(share)?);
        ends.spawn(client::run(target.address, prefix, share, n, Arc::clone(&received)));
    }
    let sample = tokio::select! {
        sample = watch(args, &target, time, &sent, &received) => sample?,
        Some(ended) = ends.join_next() => {
            return Err(ended?.err().unwrap_or_else(|| anyhow::anyhow!("an end stopped")).context(line.name()));
        }
    };
    ends.shutdown().await;
    target.stop().await?;
    Ok(sample)
}

async fn watch(
    args: &BenchArgs,
    target: &Target,
    time: Duration,
    sent: &Sent,
    received: &Received,
) -> anyhow::Result<Sample> {
    received.flows(args.streams()).await?;
    sleep(WARM_UP).await;
    let read = || (received.partials.load(Relaxed), received.bytes.load(Relaxed));
    let (used, own) = (target.usage()?, process::usage(std::process::id())?);
    let (before, started) = (read(), Instant::now());
    sleep(time).await;
    let (after, seconds) = (read(), started.elapsed().as_secs_f64());
    let (used_after, own_after) = (target.usage()?, process::usage(std::process::id())?);
    let frames = (after.0 - before.0) as f64;
    Ok(Sample {
        frames_per_second: frames / seconds,
        bytes_per_second: (after.1 - before.1) as f64 / seconds,
        ratio: 0.0,
        frames,
        cpu_seconds: used.zip(used_after).map(|(used, after)| after.cpu_seconds - used.cpu_seconds),
        peak_rss_bytes: used_after.map(|after| after.peak_rss_bytes),
        ends_cpu_seconds: own_after.cpu_seconds - own.cpu_seconds,
        grant_waits: sent.grant_waits.load(Relaxed),
        ended: received.ended.load(Relaxed),
        disordered: received.disordered.load(Relaxed),
        why: received.why(),
    })
}

/// The median of the rounds; times and counts are sums.
fn row(line: &'static str, samples: &[Sample]) -> RelayRow {
    let frames: f64 = samples.iter().map(|s| s.frames).sum();
    let cpu_seconds: Option<f64> = samples.iter().map(|s| s.cpu_seconds).sum();
    RelayRow {
        line,
        frames_per_second: median(samples.iter().map(|s| s.frames_per_second)),
        megabytes_per_second: median(samples.iter().map(|s| s.bytes_per_second)) / 1e6,
        ratio_to_bare: median(samples.iter().map(|s| s.ratio)),
        rounds: samples.iter().map(|s| s.frames_per_second).collect(),
        cpu_seconds,
        cpu_us_per_frame: cpu_seconds.map(|cpu| cpu * 1e6 / frames.max(1.0)),
        peak_rss_bytes: samples.iter().filter_map(|s| s.peak_rss_bytes).max(),
        ends_cpu_seconds: samples.iter().map(|s| s.ends_cpu_seconds).sum(),
        grant_waits: samples.iter().map(|s| s.grant_waits).sum(),
        streams_ended: samples.iter().map(|s| s.ended).sum(),
        disordered: samples.iter().map(|s| s.disordered).sum(),
        first_end: samples.iter().find_map(|s| s.why.clone()),
    }
}

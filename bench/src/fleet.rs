//! Scenario `fleet`: what several routers that share one log in Kafka do, beside one on a local log. Long calls answer in chunks
//! flat out, as in `relay`; clients and agents are spread over the routers. Every round measures each line, so that a ratio
//! compares neighbours in time. On one machine the point is the cost of a frame, not the sum of them.

use crate::agent::{self, Conduct, Sent};
use crate::args::{BenchArgs, Line};
use crate::client::{self, Received};
use crate::process;
use crate::relay::WARM_UP;
use crate::report::{FleetRow, Report, Rows, median};
use crate::router::{Shared, Target};
use anyhow::Context;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Until each router has its part of the shards: one that joins waits for two leases, and is given a few at a time.
const SHARE_TIMEOUT: Duration = Duration::from_secs(90);
/// No shard has moved for so long: they are where they stay. Longer than two leases.
const SHARE_STILL: Duration = Duration::from_secs(5);

/// What one line did in one round.
#[derive(Clone, Debug, Default)]
struct Sample {
    frames_per_second: f64,
    frames: f64,
    cpu_seconds: f64,
    ends_cpu_seconds: f64,
    rss_bytes: u64,
    ended: u64,
    disordered: u64,
    why: Option<String>,
}

pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<Report> {
    let time = Duration::from_secs(args.seconds) / u32::try_from(args.rounds)?;
    // No routers: one with a local log.
    let lines: Vec<u64> = std::iter::once(0).chain(1..=args.routers).collect();
    let mut samples = vec![Vec::new(); lines.len()];
    for round in 1..=args.rounds {
        for (routers, samples) in lines.iter().zip(&mut samples) {
            let sample = measure(args, *routers, time).await.with_context(|| name(*routers))?;
            let (rate, us) = (sample.frames_per_second, us_per_frame(&sample));
            eprintln!("round {round}: {}: {rate:.0}/s, {us:.1} us of CPU a frame", name(*routers));
            samples.push(sample);
        }
    }
    let local = samples[0].clone();
    let rows = lines.iter().zip(&samples).map(|(routers, samples)| row(*routers, samples, &local)).collect();
    Ok(Report::new(args, Rows::Fleet(rows)))
}

fn name(routers: u64) -> String {
    match routers {
        0 => "1 router, local log".into(),
        1 => "1 router, Kafka".into(),
        n => format!("{n} routers, Kafka"),
    }
}

fn us_per_frame(sample: &Sample) -> f64 {
    sample.cpu_seconds * 1e6 / sample.frames.max(1.0)
}

async fn measure(args: &BenchArgs, routers: u64, time: Duration) -> anyhow::Result<Sample> {
    let targets = start(args, routers).await?;
    let (sent, received) = (Arc::new(Sent::default()), Arc::new(Received::default()));
    let mut ends = JoinSet::new();
    let conduct = Conduct::Stream { chunk_bytes: usize::try_from(args.chunk_bytes)?, chunks: u64::MAX };
    let at = |n: u64| targets[usize::try_from(n).unwrap_or(0) % targets.len()].address;
    for n in 0..args.connections {
        ends.spawn(agent::run(at(n), n, conduct, Arc::clone(&sent)));
    }
    let run = client::run_id();
    for n in 0..args.connections {
        let share = args.streams() / args.connections + u64::from(n < args.streams() % args.connections);
        let (prefix, share) = (format!("{run}-{n}"), usize::try_from(share)?);
        ends.spawn(client::run(at(n), prefix, share, n, Arc::clone(&received)));
    }
    let sample = tokio::select! {
        sample = watch(args, &targets, time, &received) => sample?,
        Some(ended) = ends.join_next() => {
            return Err(ended?.err().unwrap_or_else(|| anyhow::anyhow!("an end stopped")));
        }
    };
    ends.shutdown().await;
    for target in targets {
        target.stop().await?;
    }
    Ok(sample)
}

/// The routers of a line, each with its part of the shards.
async fn start(args: &BenchArgs, routers: u64) -> anyhow::Result<Vec<Target>> {
    if routers == 0 {
        return Ok(vec![Target::start(args, Line::Durable).await?]);
    }
    let (Some(kafka), Some(redis)) = (&args.kafka, &args.redis) else {
        anyhow::bail!("--kafka and --redis say where the log and the store of a fleet are");
    };
    let run = client::run_id();
    let shared = |id| Shared { id, run: &run, kafka, redis, single_broker: args.single_broker };
    let mut targets = vec![Target::start_shared(args, &shared(1)).await?];
    for id in 2..=routers {
        targets.push(Target::start_shared(args, &shared(id)).await?);
    }
    let begun = Instant::now();
    let (mut shares, mut moved) = (targets[0].shares().await?, Instant::now());
    while shares.len() as u64 != routers || shares.contains_key("") || moved.elapsed() < SHARE_STILL {
        anyhow::ensure!(begun.elapsed() < SHARE_TIMEOUT, "{routers} routers don't share the log's shards: {shares:?}");
        sleep(Duration::from_millis(200)).await;
        let now = targets[0].shares().await?;
        if now != shares {
            (shares, moved) = (now, Instant::now());
        }
    }
    Ok(targets)
}

async fn watch(args: &BenchArgs, targets: &[Target], time: Duration, received: &Received) -> anyhow::Result<Sample> {
    received.flows(args.streams()).await?;
    sleep(WARM_UP).await;
    let (used, own) = (usage(targets)?, process::usage(std::process::id())?);
    let (before, started) = (received.partials.load(Relaxed), Instant::now());
    sleep(time).await;
    let (after, seconds) = (received.partials.load(Relaxed), started.elapsed().as_secs_f64());
    let (used_after, own_after) = (usage(targets)?, process::usage(std::process::id())?);
    let frames = (after - before) as f64;
    Ok(Sample {
        frames_per_second: frames / seconds,
        frames,
        cpu_seconds: used_after.0 - used.0,
        ends_cpu_seconds: own_after.cpu_seconds - own.cpu_seconds,
        rss_bytes: used_after.1,
        ended: received.ended.load(Relaxed),
        disordered: received.disordered.load(Relaxed),
        why: received.why(),
    })
}

/// Of all routers: CPU seconds and resident bytes.
fn usage(targets: &[Target]) -> anyhow::Result<(f64, u64)> {
    let mut all = (0.0, 0);
    for target in targets {
        let used = target.usage()?.context("a router is gone")?;
        all = (all.0 + used.cpu_seconds, all.1 + used.rss_bytes);
    }
    Ok(all)
}

/// The median of the rounds, each beside the local log of the same round; counts are sums.
fn row(routers: u64, samples: &[Sample], local: &[Sample]) -> FleetRow {
    let beside =
        |of: fn(&Sample) -> f64| median(samples.iter().zip(local).map(|(sample, local)| of(sample) / of(local)));
    FleetRow {
        line: name(routers),
        log: if routers == 0 { "local" } else { "kafka" },
        routers: routers.max(1),
        frames_per_second: median(samples.iter().map(|s| s.frames_per_second)),
        ratio_to_local: beside(|s| s.frames_per_second),
        rounds: samples.iter().map(|s| s.frames_per_second).collect(),
        cpu_us_per_frame: median(samples.iter().map(us_per_frame)),
        cpu_ratio_to_local: beside(us_per_frame),
        rss_bytes: samples.iter().map(|s| s.rss_bytes).max().unwrap_or(0),
        ends_cpu_seconds: samples.iter().map(|s| s.ends_cpu_seconds).sum(),
        streams_ended: samples.iter().map(|s| s.ended).sum(),
        disordered: samples.iter().map(|s| s.disordered).sum(),
        first_end: samples.iter().find_map(|s| s.why.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_compared_round_by_round() {
        let sample =
            |rate: f64, cpu_seconds| Sample { frames_per_second: rate, frames: rate, cpu_seconds, ..Sample::default() };
        let local = [sample(1000.0, 0.01), sample(100.0, 0.01), sample(10.0, 0.01)];
        let fleet = [sample(500.0, 0.01), sample(50.0, 0.01), sample(5.0, 0.01)];
        let row = row(2, &fleet, &local);
        assert!((row.frames_per_second - 50.0).abs() < 1e-9 && (row.ratio_to_local - 0.5).abs() < 1e-9);
        assert!((row.cpu_ratio_to_local - 2.0).abs() < 1e-9 && (row.cpu_us_per_frame - 200.0).abs() < 1e-9);
        assert_eq!((row.line.as_str(), row.log, row.routers), ("2 routers, Kafka", "kafka", 2));
    }
}

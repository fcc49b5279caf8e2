//! Scenario `idle`: what a stream costs that only waits, in bytes of the router's memory. Once for tasks that wait for an
//! agent which isn't there, once for calls that run and say nothing.

use crate::agent::{self, Conduct, Sent};
use crate::args::BenchArgs;
use crate::client::{self, Received, STREAMS_PER_CONNECTION};
use crate::report::{IdleRow, Report, Rows};
use crate::router::{CALLS_PER_AGENT, Target};
use anyhow::Context;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

/// Streams that are opened first, so that buffers and tables of the process itself don't count.
const WARM_UP: usize = 500;
pub(crate) const STREAMS_PER_AGENT: usize = 4 * STREAMS_PER_CONNECTION;
const _: () = assert!(STREAMS_PER_AGENT <= CALLS_PER_AGENT);
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// The router's memory is read when it has been quiet for so long.
const QUIET: Duration = Duration::from_secs(2);

pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<Report> {
    let mut rows = Vec::new();
    for line in args.lines() {
        for (state, agent_is_there) in [("waiting", false), ("running", true)] {
            eprintln!("{}: {} streams {state}", line.name(), args.streams());
            let target = Target::start(args, *line).await?;
            let streams = usize::try_from(args.streams())?;
            let mut ends = JoinSet::new();
            let (sent, received) = (Arc::new(Sent::default()), Arc::new(Received::default()));
            if agent_is_there {
                for n in 0..(WARM_UP + streams).div_ceil(STREAMS_PER_AGENT) {
                    ends.spawn(agent::run(target.address, n as u64, Conduct::Hold, Arc::clone(&sent)));
                }
            }
            let mut opened = 0;
            let mut resident = [0; 2];
            for (upto, resident) in [WARM_UP, WARM_UP + streams].into_iter().zip(&mut resident) {
                while opened < upto {
                    let agent = opened / STREAMS_PER_AGENT;
                    let room = (agent + 1) * STREAMS_PER_AGENT - opened;
                    let share = (upto - opened).min(STREAMS_PER_CONNECTION).min(room);
                    let prefix = format!("{}-{opened}", client::run_id());
                    ends.spawn(client::run(target.address, prefix, share, agent as u64, Arc::clone(&received)));
                    opened += share;
                }
                tokio::select! {
                    ready = settled(opened as u64, agent_is_there, &sent, &received) => ready?,
                    Some(ended) = ends.join_next() => {
                        return Err(ended?.err().unwrap_or_else(|| anyhow::anyhow!("an end stopped")));
                    }
                }
                *resident = target.usage()?.context("--pid is needed to measure a router that runs already")?.rss_bytes;
            }
            let connections = streams.div_ceil(STREAMS_PER_CONNECTION) as u64;
            rows.push(IdleRow {
                line: line.name(),
                state,
                streams: streams as u64,
                connections,
                resident_bytes: resident[1],
                bytes_per_stream: resident[1].saturating_sub(resident[0]) as f64 / streams as f64,
            });
            ends.shutdown().await;
            target.stop().await?;
        }
    }
    Ok(Report::new(args, Rows::Idle(rows)))
}

/// Waits until all streams are open, and their calls dispatched where an agent is there.
async fn settled(opened: u64, agent_is_there: bool, sent: &Sent, received: &Received) -> anyhow::Result<()> {
    let started = Instant::now();
    let calls = || if agent_is_there { sent.calls.load(Relaxed) } else { opened };
    while received.accepted.load(Relaxed) < opened || calls() < opened {
        anyhow::ensure!(
            started.elapsed() < OPEN_TIMEOUT && received.ended.load(Relaxed) == 0,
            "{} of {opened} streams are open, {} calls run; first end: {}",
            received.accepted.load(Relaxed),
            sent.calls.load(Relaxed),
            received.why().unwrap_or_else(|| "none".into())
        );
        sleep(Duration::from_millis(10)).await;
    }
    sleep(QUIET).await;
    Ok(())
}

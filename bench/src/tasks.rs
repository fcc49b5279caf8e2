//! Scenario `tasks`: whole small tasks of one call each at fixed rates. The load is open: a task is due when the clock says
//! so, and its latency counts from then to its bill, also when the bench or the router were late to begin it.

use crate::agent::{self, Conduct, Sent};
use crate::args::{BenchArgs, Line};
use crate::client::{self, STREAMS_PER_CONNECTION};
use crate::link::Link;
use crate::report::{Report, Rows, TaskRow};
use crate::router::Target;
use atp_proto::Flags;
use atp_proto::content::Role;
use atp_proto::frame::kind;
use hdrhistogram::Histogram;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long tasks may go on after the last one was due.
const DRAIN: Duration = Duration::from_secs(10);
/// Before the first rate: connections, agents and caches are warm.
const WARM_UP_RATE: u64 = 200;
/// Latencies are kept up to a minute, in microseconds with three digits.
const LATENCY_MAX_US: u64 = 60_000_000;

pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<Report> {
    let mut rows = Vec::new();
    for line in args.lines() {
        let target = Target::start(args, *line).await?;
        let sent = Arc::new(Sent::default());
        let mut agents = JoinSet::new();
        for n in 0..args.connections {
            agents.spawn(agent::run(target.address, n, Conduct::Answer, Arc::clone(&sent)));
        }
        let measured = async {
            load(args, &target, *line, WARM_UP_RATE, Duration::from_secs(1)).await?;
            for rate in &args.rates {
                eprintln!("{}: {rate} tasks a second", line.name());
                rows.push(load(args, &target, *line, *rate, Duration::from_secs(args.seconds)).await?);
            }
            anyhow::Ok(())
        };
        tokio::select! {
            measured = measured => measured?,
            Some(ended) = agents.join_next() => ended??,
        }
        agents.shutdown().await;
        target.stop().await?;
    }
    Ok(Report::new(args, Rows::Tasks(rows)))
}

/// What one connection saw.
struct Tally {
    latencies: Histogram<u64>,
    done: u64,
    other: u64,
    first_other: Option<String>,
    submitted: u64,
    finished: Instant,
}

async fn load(args: &BenchArgs, target: &Target, line: Line, rate: u64, time: Duration) -> anyhow::Result<TaskRow> {
    let mut connections = JoinSet::new();
    let used = target.usage()?;
    let (run, start) = (client::run_id(), Instant::now() + Duration::from_millis(200));
    for n in 0..args.connections {
        let plan = Plan { start, rate, total: rate * time.as_secs(), first: n, step: args.connections };
        connections.spawn(submit(target.address, run.clone(), plan));
    }
    let mut latencies = histogram()?;
    let (mut done, mut other, mut submitted, mut first_other, mut finished) = (0, 0, 0, None, start);
    while let Some(tally) = connections.join_next().await {
        let tally = tally??;
        latencies.add(&tally.latencies)?;
        done += tally.done;
        other += tally.other;
        submitted += tally.submitted;
        first_other = first_other.or(tally.first_other);
        finished = finished.max(tally.finished);
    }
    let used_after = target.usage()?;
    let ms = |quantile: f64| latencies.value_at_quantile(quantile) as f64 / 1000.0;
    Ok(TaskRow {
        line: line.name(),
        offered_per_second: rate,
        done_per_second: done as f64 / (finished - start).as_secs_f64().max(0.001),
        tasks: rate * time.as_secs(),
        done,
        not_done: other,
        unanswered: rate * time.as_secs() - done - other,
        never_submitted: rate * time.as_secs() - submitted,
        first_not_done: first_other,
        p50_ms: ms(0.5),
        p90_ms: ms(0.9),
        p99_ms: ms(0.99),
        max_ms: latencies.max() as f64 / 1000.0,
        cpu_seconds: used.zip(used_after).map(|(used, after)| after.cpu_seconds - used.cpu_seconds),
        peak_rss_bytes: used_after.map(|after| after.peak_rss_bytes),
    })
}

fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LATENCY_MAX_US, 3)?)
}

/// When this connection's tasks are due: number `first`, `first + step`, ... of all.
#[derive(Clone, Copy)]
struct Plan {
    start: Instant,
    rate: u64,
    total: u64,
    first: u64,
    step: u64,
}

impl Plan {
    /// The moment at which task `number` of this connection is due; `None` behind the last.
    fn due(&self, number: u64) -> Option<Instant> {
        let number = self.first + number * self.step;
        (number < self.total).then(|| self.start + Duration::from_nanos(number * 1_000_000_000 / self.rate))
    }
}

async fn submit(address: SocketAddr, prefix: String, plan: Plan) -> anyhow::Result<Tally> {
    let mut link = Link::open(address, Role::Client).await?;
    let prefix = format!("{prefix}-{}", plan.first);
    let mut tally =
        Tally { latencies: histogram()?, done: 0, other: 0, first_other: None, submitted: 0, finished: plan.start };
    let mut open = 0_usize;
    // Per task: did its final say `done`?
    let mut finals: Vec<bool> = Vec::new();
    let mut give_up = plan.start + DRAIN;
    loop {
        let now = Instant::now();
        let mut wake = give_up;
        while let Some(due) = plan.due(tally.submitted) {
            give_up = due + DRAIN;
            if due > now || open >= STREAMS_PER_CONNECTION {
                wake = due.max(now + Duration::from_millis(1));
                break;
            }
            link.push(&client::submit(&client::stream_id(&prefix, tally.submitted), plan.first, Some(60_000)));
            finals.push(false);
            tally.submitted += 1;
            open += 1;
        }
        let all_submitted = plan.due(tally.submitted).is_none();
        if (open == 0 && all_submitted) || now >= give_up {
            return Ok(tally);
        }
        link.turn(Some(wake)).await?;
        let now = Instant::now();
        link.take(|_, frame| {
            let Some(n) = client::number(frame.stream_id) else { return Ok(()) };
            if frame.kind == kind::RESULT_FINAL.as_bytes() {
                let is_done = frame.content.starts_with(br#"{"state":"done""#);
                if let Some(done) = finals.get_mut(n) {
                    *done = is_done;
                }
                if !is_done && tally.first_other.is_none() {
                    tally.first_other = Some(String::from_utf8_lossy(frame.content).chars().take(400).collect());
                }
            }
            let flags = Flags(frame.flags);
            if flags.has(Flags::FIN) || flags.has(Flags::RST) {
                open = open.saturating_sub(1);
                tally.finished = now;
                if flags.has(Flags::RST) && tally.first_other.is_none() {
                    tally.first_other = Some(String::from_utf8_lossy(frame.content).chars().take(400).collect());
                }
                if finals.get(n).copied().unwrap_or(false) {
                    let due = plan.due(n as u64).unwrap_or(now);
                    let us = u64::try_from((now - due).as_micros()).unwrap_or(LATENCY_MAX_US);
                    tally.latencies.saturating_record(us.clamp(1, LATENCY_MAX_US));
                    tally.done += 1;
                } else {
                    tally.other += 1;
                }
            }
            Ok(())
        })?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    #[tokio::test]
    async fn every_task_ends_once_and_is_measured() {
        let address = fake::router().await;
        let sent = Arc::new(Sent::default());
        let _agent = tokio::spawn(agent::run(address, 0, Conduct::Answer, Arc::clone(&sent)));
        fake::agent_is_there(address).await;
        let plan = Plan { start: Instant::now(), rate: 100_000, total: 2500, first: 0, step: 1 };
        let tally = submit(address, client::run_id(), plan).await.expect("answers");
        assert_eq!((tally.submitted, tally.done, tally.other, tally.latencies.len()), (2500, 2500, 0, 2500));
        assert_eq!(sent.calls.load(std::sync::atomic::Ordering::Relaxed), 2500);
        // An agent that isn't there: the fake refuses.
        let plan = Plan { total: 3, first: 1, step: 1, ..plan };
        let tally = submit(address, client::run_id(), plan).await.expect("answers");
        assert_eq!((tally.done, tally.other), (0, 2));
        assert!(tally.first_other.is_some_and(|why| why.contains("EAGENTDOWN")));
    }

    #[test]
    fn tasks_are_due_by_the_clock_and_shared_out() {
        let start = Instant::now();
        let plan = |first| Plan { start, rate: 1000, total: 5, first, step: 2 };
        let due = |first, n| plan(first).due(n).map(|due| (due - start).as_millis());
        assert_eq!([due(0, 0), due(1, 0), due(0, 1), due(1, 1), due(0, 2)], [0, 1, 2, 3, 4].map(Some));
        assert_eq!([due(1, 2), due(0, 3)], [None, None]);
    }
}

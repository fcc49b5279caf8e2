//! What a run found, as a table for people or one JSON document. Formats only.

use crate::args::{BenchArgs, Scenario};
use serde::Serialize;
use std::io::Write;

/// A run: what was measured, how, and its rows.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) scenario: &'static str,
    pub(crate) version: &'static str,
    pub(crate) cores: usize,
    pub(crate) streams: u64,
    pub(crate) connections: u64,
    pub(crate) chunk_bytes: u64,
    pub(crate) seconds: u64,
    pub(crate) rows: Rows,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Rows {
    Relay(Vec<RelayRow>),
    Tasks(Vec<TaskRow>),
    Idle(Vec<IdleRow>),
    Fleet(Vec<FleetRow>),
}

/// Medians of the rounds; CPU, waits and ends are sums over them.
#[derive(Debug, Serialize)]
pub(crate) struct RelayRow {
    pub(crate) line: &'static str,
    pub(crate) frames_per_second: f64,
    pub(crate) megabytes_per_second: f64,
    /// Each round against its own bare relay.
    pub(crate) ratio_to_bare: f64,
    /// Frames per second, round by round.
    pub(crate) rounds: Vec<f64>,
    /// Of the router (or bare relay) while it was measured.
    pub(crate) cpu_seconds: Option<f64>,
    pub(crate) cpu_us_per_frame: Option<f64>,
    pub(crate) peak_rss_bytes: Option<u64>,
    /// Of the bench's own two ends.
    pub(crate) ends_cpu_seconds: f64,
    /// Times that a call stood still because its grant was used up.
    pub(crate) grant_waits: u64,
    pub(crate) streams_ended: u64,
    pub(crate) disordered: u64,
    pub(crate) first_end: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct TaskRow {
    pub(crate) line: &'static str,
    pub(crate) offered_per_second: u64,
    /// From the first task's due time to the last one's end.
    pub(crate) done_per_second: f64,
    pub(crate) tasks: u64,
    pub(crate) done: u64,
    /// Ended otherwise than `done`.
    pub(crate) not_done: u64,
    /// Not ended ten seconds after the last was due.
    pub(crate) unanswered: u64,
    pub(crate) never_submitted: u64,
    pub(crate) first_not_done: Option<String>,
    pub(crate) p50_ms: f64,
    pub(crate) p90_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
    pub(crate) cpu_seconds: Option<f64>,
    pub(crate) peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct IdleRow {
    pub(crate) line: &'static str,
    /// `waiting` for an agent, or `running` without a word.
    pub(crate) state: &'static str,
    pub(crate) streams: u64,
    pub(crate) connections: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) bytes_per_stream: f64,
}

/// Medians of the rounds, ratios of each round; ends are sums over them.
#[derive(Debug, Serialize)]
pub(crate) struct FleetRow {
    pub(crate) line: String,
    /// `local` or `kafka`.
    pub(crate) log: &'static str,
    pub(crate) routers: u64,
    /// Of all routers together.
    pub(crate) frames_per_second: f64,
    pub(crate) ratio_to_local: f64,
    pub(crate) rounds: Vec<f64>,
    pub(crate) cpu_us_per_frame: f64,
    pub(crate) cpu_ratio_to_local: f64,
    pub(crate) rss_bytes: u64,
    pub(crate) ends_cpu_seconds: f64,
    pub(crate) streams_ended: u64,
    pub(crate) disordered: u64,
    pub(crate) first_end: Option<String>,
}

/// One JSON document, or what `text` makes of it.
///
/// # Errors
/// When stdout is closed.
pub(crate) fn print<R: Serialize>(report: &R, json: bool, text: impl Fn(&R) -> String) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, report)?;
        writeln!(out)?;
    } else {
        out.write_all(text(report).as_bytes())?;
    }
    Ok(())
}

impl Report {
    pub(crate) fn new(args: &BenchArgs, rows: Rows) -> Self {
        Self {
            scenario: match args.scenario {
                Scenario::Relay | Scenario::BareRelay => "relay",
                Scenario::Budget => "budget",
                Scenario::Recover => "recover",
                Scenario::Tasks => "tasks",
                Scenario::Idle => "idle",
                Scenario::Fleet => "fleet",
            },
            version: env!("CARGO_PKG_VERSION"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            streams: args.streams(),
            connections: args.connections,
            chunk_bytes: args.chunk_bytes,
            seconds: args.seconds,
            rows,
        }
    }

    /// # Errors
    /// When stdout is closed.
    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        print(self, json, Self::text)
    }

    fn text(&self) -> String {
        let (head, rows, notes) = match &self.rows {
            Rows::Relay(rows) => (
                format!(
                    "relay: {} streams over {} connections, chunks of {} bytes, {} cores; medians of {} rounds, {} s a line",
                    self.streams,
                    self.connections,
                    self.chunk_bytes,
                    self.cores,
                    rows.first().map_or(0, |r| r.rounds.len()),
                    self.seconds
                ),
                relay_table(rows),
                rows.iter().filter_map(|r| ended(r.line, r.streams_ended, r.first_end.as_ref())).collect::<Vec<_>>(),
            ),
            Rows::Tasks(rows) => (
                format!(
                    "tasks: one call each, open loop over {} connections, {} cores, {} s a rate; latency from the due time to the bill",
                    self.connections, self.cores, self.seconds
                ),
                task_table(rows),
                rows.iter()
                    .filter_map(|r| {
                        Some(format!(
                            "{} at {}/s: first not done: {}",
                            r.line,
                            r.offered_per_second,
                            r.first_not_done.as_ref()?
                        ))
                    })
                    .collect(),
            ),
            Rows::Fleet(rows) => (
                format!(
                    "fleet: {} streams over {} connections, chunks of {} bytes, {} cores for routers, brokers and ends; medians of {} \
                     rounds, {} s a line",
                    self.streams,
                    self.connections,
                    self.chunk_bytes,
                    self.cores,
                    rows.first().map_or(0, |r| r.rounds.len()),
                    self.seconds
                ),
                fleet_table(rows),
                rows.iter().filter_map(|r| ended(&r.line, r.streams_ended, r.first_end.as_ref())).collect(),
            ),
            Rows::Idle(rows) => {
                (format!("idle: {} streams, {} cores", self.streams, self.cores), idle_table(rows), Vec::new())
            }
        };
        let mut text = format!("{head}\n\n{}", table(&rows));
        for note in notes {
            text.push_str(&format!("\n{note}\n"));
        }
        text
    }
}

pub(crate) fn cells<const N: usize>(cells: [String; N]) -> Vec<String> {
    cells.into()
}

pub(crate) fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| (*n).to_owned()).collect()
}

/// What is said of a line whose streams ended before they should.
fn ended(line: &str, streams: u64, first: Option<&String>) -> Option<String> {
    Some(format!("{line}: {streams} streams ended, first: {}", first?))
}

fn relay_table(rows: &[RelayRow]) -> Vec<Vec<String>> {
    let head = names(&[
        "line",
        "frames/s",
        "MB/s",
        "of bare",
        "CPU s",
        "us/frame",
        "peak MiB",
        "ends CPU s",
        "grant waits",
        "disordered",
    ]);
    std::iter::once(head)
        .chain(rows.iter().map(|r| {
            cells([
                r.line.to_owned(),
                format!("{:.0}", r.frames_per_second),
                format!("{:.1}", r.megabytes_per_second),
                format!("{:.3}", r.ratio_to_bare),
                optional(r.cpu_seconds, |cpu| format!("{cpu:.2}")),
                optional(r.cpu_us_per_frame, |us| format!("{us:.2}")),
                optional(r.peak_rss_bytes, mib),
                format!("{:.2}", r.ends_cpu_seconds),
                r.grant_waits.to_string(),
                r.disordered.to_string(),
            ])
        }))
        .collect()
}

fn fleet_table(rows: &[FleetRow]) -> Vec<Vec<String>> {
    let head =
        names(&["line", "frames/s", "of local", "us/frame", "of local", "routers MiB", "ends CPU s", "disordered"]);
    std::iter::once(head)
        .chain(rows.iter().map(|r| {
            cells([
                r.line.clone(),
                format!("{:.0}", r.frames_per_second),
                format!("{:.3}", r.ratio_to_local),
                format!("{:.2}", r.cpu_us_per_frame),
                format!("{:.3}", r.cpu_ratio_to_local),
                mib(r.rss_bytes),
                format!("{:.2}", r.ends_cpu_seconds),
                r.disordered.to_string(),
            ])
        }))
        .collect()
}

fn task_table(rows: &[TaskRow]) -> Vec<Vec<String>> {
    let head = names(&[
        "line",
        "offered/s",
        "done/s",
        "done",
        "not done",
        "no answer",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "max ms",
        "CPU s",
        "peak MiB",
    ]);
    std::iter::once(head)
        .chain(rows.iter().map(|r| {
            cells([
                r.line.to_owned(),
                r.offered_per_second.to_string(),
                format!("{:.0}", r.done_per_second),
                r.done.to_string(),
                r.not_done.to_string(),
                r.unanswered.to_string(),
                format!("{:.2}", r.p50_ms),
                format!("{:.2}", r.p90_ms),
                format!("{:.2}", r.p99_ms),
                format!("{:.2}", r.max_ms),
                optional(r.cpu_seconds, |cpu| format!("{cpu:.2}")),
                optional(r.peak_rss_bytes, mib),
            ])
        }))
        .collect()
}

fn idle_table(rows: &[IdleRow]) -> Vec<Vec<String>> {
    let head = names(&["line", "state", "streams", "connections", "resident MiB", "bytes/stream"]);
    std::iter::once(head)
        .chain(rows.iter().map(|r| {
            cells([
                r.line.to_owned(),
                r.state.to_owned(),
                r.streams.to_string(),
                r.connections.to_string(),
                mib(r.resident_bytes),
                format!("{:.0}", r.bytes_per_stream),
            ])
        }))
        .collect()
}

fn optional<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), show)
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1_048_576.0)
}

/// Columns as wide as their widest cell; the first ones' texts to the left, figures to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|c| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(c, (cell, width))| if c == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") })
            .collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The middle value; of an even number the mean of the two in the middle.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median([3.0, 1.0, 2.0].into_iter()) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0].into_iter()) - 2.5).abs() < 1e-9);
        assert!(median(std::iter::empty()).abs() < 1e-9);
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [names(&["line", "n"]), names(&["durable", "12"])];
        assert_eq!(table(&rows), "line      n\ndurable  12\n");
    }
}

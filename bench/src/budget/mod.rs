//! Scenario `budget`: an arrival trace against one budget under four policies side by side, in virtual time. It starts no
//! router and opens no socket; the same trace gives the same figures on every machine.

mod optimum;
mod ours;
mod replay;
mod report;
mod rules;
mod sample;
mod trace;

use crate::args::BenchArgs;
use anyhow::{Context, ensure};
use atp_proto::Qos;
use ours::{Learned, Ours};
use replay::{Outcome, REACH_USD_MICROS, replay};
use report::{Report, Row};
use rules::{Hold, Rule};
use std::io::BufReader;
use trace::{Task, Trace};

/// Rows that are history: a tenth of the trace, and at least so many.
const HISTORY_MIN: usize = 20;
/// The least `max_tokens` that the worst case is reckoned with; more where the trace has a longer answer.
const MAX_TOKENS: u64 = 4_096;

/// Replays the trace and prints the report; writes the plot where the flags say so.
///
/// # Errors
/// When the trace can't be read or the core's ledger doesn't agree with what providers billed.
pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let (name, trace) = load(args)?;
    let report = compare(&name, trace.faster(args.speed), args)?;
    report.print(args.json)?;
    if let Some(path) = &args.plot {
        std::fs::write(path, report.svg()).with_context(|| format!("--plot {}", path.display()))?;
    }
    Ok(())
}

fn load(args: &BenchArgs) -> anyhow::Result<(String, Trace)> {
    let rows = usize::try_from(args.rows).unwrap_or(usize::MAX);
    let Some(path) = &args.trace else {
        let seed = args.seed.unwrap_or(sample::SEED);
        let text = if seed == sample::SEED { sample::SHIPPED.to_owned() } else { sample::generate(seed) };
        return Ok((format!("generated sample, seed {seed}"), Trace::read(text.as_bytes(), rows)?));
    };
    let file = std::fs::File::open(path).with_context(|| format!("--trace {}", path.display()))?;
    let trace = Trace::read(BufReader::new(file), rows).with_context(|| format!("--trace {}", path.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, trace))
}

/// Splits the history off: tasks that are replayed begin anew at 0.
fn split(trace: &Trace) -> anyhow::Result<(Vec<Task>, Vec<Task>)> {
    let history = (trace.tasks.len() / 10).max(HISTORY_MIN);
    ensure!(
        trace.tasks.len() >= 2 * HISTORY_MIN,
        "the trace has {} answered rows; at least {} are needed ({HISTORY_MIN} of them as history)",
        trace.tasks.len(),
        2 * HISTORY_MIN
    );
    let (before, after) = trace.tasks.split_at(history);
    let begin = after[0].at_ms;
    let after = after.iter().map(|task| Task { at_ms: task.at_ms - begin, ..*task }).collect();
    Ok((before.to_vec(), after))
}

/// Mean and variance of the answers of one model; of all, where the history has fewer than two of it.
fn learn(history: &[Task], model: usize) -> Learned {
    let of_model: Vec<u64> = history.iter().filter(|t| t.model == model).map(|t| t.out_tokens).collect();
    let answers = if of_model.len() < 2 { history.iter().map(|t| t.out_tokens).collect() } else { of_model };
    let n = answers.len() as u64;
    let mean = answers.iter().sum::<u64>().div_ceil(n);
    let squares: u64 = answers.iter().map(|tokens| tokens.abs_diff(mean).pow(2)).sum();
    Learned { out_tokens: mean, variance: squares / (n - 1) }
}

fn compare(name: &str, trace: Trace, args: &BenchArgs) -> anyhow::Result<Report> {
    let (history, tasks) = split(&trace)?;
    let learned: Vec<Learned> = (0..trace.models.len()).map(|model| learn(&history, model)).collect();
    let costs: Vec<u64> = tasks.iter().map(Task::cost).collect();
    let total: u64 = costs.iter().sum();
    let longest = tasks.iter().map(|t| t.out_tokens).max().unwrap_or(0);
    let max_tokens = MAX_TOKENS.max(longest.next_power_of_two());
    let flat = history.iter().map(Task::cost).sum::<u64>().div_ceil(history.len() as u64);
    let parallel = usize::try_from(args.parallel).unwrap_or(usize::MAX);
    let mut rows = Vec::new();
    for percent in &args.budgets {
        let budget = total * percent / 100;
        let best = (optimum::cheapest(&costs, budget), optimum::in_order(&costs, budget));
        let mut row = |policy, outcome| rows.push(Row::new(policy, *percent, budget, best, outcome));
        let plain = [
            ("check-then-charge", Hold::Nothing),
            ("worst case", Hold::WorstCase { max_tokens }),
            ("flat", Hold::Flat { usd_micros: flat }),
        ];
        for (policy, hold) in plain {
            row(policy, replay(&tasks, &mut Rule::new(hold, &tasks, budget, parallel))?);
        }
        for (policy, qos) in [("ours, k = 1", Qos::Silver), ("ours, k = 2", Qos::Gold)] {
            row(policy, by_core(&tasks, &learned, qos, budget, args.parallel)?);
        }
    }
    Ok(Report {
        scenario: "budget",
        version: env!("CARGO_PKG_VERSION"),
        trace: name.to_owned(),
        tasks: tasks.len(),
        history: history.len(),
        unanswered: trace.unanswered,
        models: trace.models.len(),
        parallel: args.parallel,
        speed: args.speed,
        total_usd_micros: total,
        max_tokens,
        flat_usd_micros: flat,
        reach_usd_micros: REACH_USD_MICROS,
        rows,
    })
}

fn by_core(tasks: &[Task], learned: &[Learned], qos: Qos, budget: u64, parallel: u64) -> anyhow::Result<Outcome> {
    let mut ours = Ours::new(tasks, learned, qos, budget, u32::try_from(parallel).unwrap_or(u32::MAX));
    let outcome = replay(tasks, &mut ours)?;
    ours.verify(outcome.billed).with_context(|| format!("budget {budget}, {}", qos.as_str()))?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn args(words: &[&str]) -> BenchArgs {
        BenchArgs::try_parse_from(["bench", "budget"].iter().chain(words)).expect("parses")
    }

    fn report(words: &[&str]) -> Report {
        let args = args(words);
        let (name, trace) = load(&args).expect("reads");
        compare(&name, trace.faster(args.speed), &args).expect("the ledger agrees with the providers")
    }

    #[test]
    fn ours_finishes_what_the_optimum_in_order_does_within_its_bound() {
        let report = report(&["--budgets", "10,50"]);
        assert_eq!((report.tasks, report.history, report.rows.len()), (396, 44, 10));
        for row in report.rows.iter().filter(|row| row.policy.starts_with("ours")) {
            assert!(row.of_in_order >= 0.95, "{row:?}");
            assert!(row.overshoot_usd_micros <= row.bound_usd_micros, "{row:?}");
            assert_eq!(row.finished + row.cut + row.refused, report.tasks);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_figures() {
        let run = |seed| serde_json::to_string(&report(&["--budgets", "25", "--seed", seed])).expect("serializes");
        let (first, again, other) = (run("7"), run("7"), run("8"));
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn pictures_and_tables_have_all_policies() {
        let report = report(&["--budgets", "5,10", "--rows", "60"]);
        let (text, svg) = (report.text(), report.svg());
        assert_eq!(svg.matches("<polyline").count(), 10);
        for policy in ["check-then-charge", "worst case", "flat", "ours, k = 1", "ours, k = 2"] {
            assert_eq!(text.matches(&format!("{policy}  ")).count(), 2, "{policy}\n{text}");
            assert!(svg.contains(policy));
        }
    }

    #[test]
    fn estimates_come_from_the_history_alone() {
        let task = |at_ms, out_tokens, model| Task { at_ms, in_tokens: 10, out_tokens, model };
        let history = [task(0, 10, 0), task(1, 20, 0), task(2, 60, 0), task(3, 30, 1)];
        assert_eq!(learn(&history, 0), Learned { out_tokens: 30, variance: 700 });
        // One answer of a model says nothing of its deviation: all count.
        assert_eq!(learn(&history, 1), Learned { out_tokens: 30, variance: 466 });
        let trace = |rows| Trace { tasks: vec![task(5, 1, 0); rows], models: vec!["m".into()], unanswered: 0 };
        assert!(split(&trace(39)).is_err());
        let (before, after) = split(&trace(40)).expect("enough");
        assert_eq!((before.len(), after.len(), after[0].at_ms), (20, 20, 0));
        assert_eq!(split(&trace(400)).expect("enough").0.len(), 40);
    }

    #[test]
    fn bounds_of_the_flags() {
        let parsed = |words: &[&str]| BenchArgs::try_parse_from(["bench", "budget"].iter().chain(words)).is_ok();
        assert!(parsed(&["--rows", "40"]) && !parsed(&["--rows", "39"]));
        assert!(parsed(&["--rows", "100000"]) && !parsed(&["--rows", "100001"]));
        assert!(parsed(&["--budgets", "1,100"]) && !parsed(&["--budgets", "0"]) && !parsed(&["--budgets", "101"]));
        assert!(!parsed(&["--seed", "1", "--trace", "x.csv"]), "a file has no seed");
    }
}

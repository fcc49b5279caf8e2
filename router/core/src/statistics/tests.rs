//! Exact figures of few runs, what is kept, and what is forgotten.

use super::*;
use proptest::prelude::*;

const KEY: (&str, &str, &str) = ("a", "m", "review");

fn run(tokens: u64, usd_micros: u64, estimate: (u64, u64)) -> Run {
    let out =
        Cost { out_tokens: atp_proto::Tokens(tokens), usd_micros: atp_proto::UsdMicros(usd_micros), ..Cost::default() };
    Run::new(out, Amount::new(estimate.0, estimate.1))
}

fn after(runs: &[Run]) -> Statistics {
    let mut s = Statistics::default();
    runs.iter().for_each(|r| s.record(KEY, 5 * DAY_MS, Some(true), Some(*r)));
    s
}

fn row(s: &Statistics) -> &Row {
    s.row(KEY.0, KEY.1, KEY.2).unwrap()
}

#[test]
fn three_runs_have_exact_figures() {
    let s = after(&[run(900, 90, (1_000, 100)), run(1_000, 100, (1_000, 100)), run(1_400, 140, (1_000, 100))]);
    let f = row(&s).figures().unwrap();
    assert_eq!((f.samples, f.mean), (3, Amount::new(1_100, 110)));
    // ((-200)^2 + (-100)^2 + 300^2) / 2
    assert_eq!((f.variance_tokens, f.variance_usd_micros), (70_000, 700));
    let view = row(&s).view().unwrap();
    assert_eq!((view.runs, view.p50, view.p90), (3, Amount::new(1_000, 100), Amount::new(1_400, 140)));
    // The square roots of 70,000 and 700, rounded up.
    assert_eq!((view.mean, view.sd), (f.mean, Amount::new(265, 27)));
    // 10/90, 0, 40/140 in ppm: (111,111 + 0 + 285,714) / 3; one of three is more than 20 % above.
    assert_eq!(row(&s).errors(5), Errors { runs: 3, mape_ppm: 132_275, under_ppm: 333_333 });
    assert_eq!(s.agent("a").unwrap().errors(5), row(&s).errors(5));
    // p95 of 0.9, 1.0, 1.4.
    assert_eq!(row(&s).overage_ppm(0, 5), 1_400_000);
    assert_eq!(s.agent("a").unwrap().overage_ppm(5), Some(1_400_000));
}

#[test]
fn two_runs_are_no_statistic() {
    let s = after(&[run(900, 90, (300, 30)); 2]);
    assert_eq!(row(&s).figures(), None);
    assert_eq!((row(&s).overage_ppm(0, 5), s.agent("a").unwrap().overage_ppm(5)), (1_000_000, None));
    let s = after(&[run(900, 90, (300, 30)); 3]);
    assert_eq!(row(&s).figures().map(|f| f.samples), Some(3));
    assert_eq!(row(&s).overage_ppm(0, 5), 3_000_000);
    assert_eq!(row(&s).overage_ppm(1, 5), 1_000_000, "runs under another kind of estimate say nothing");
}

#[test]
fn errors_compare_money_and_tokens_where_nothing_costs() {
    assert_eq!(run(500, 120, (1, 100)).error_ppm(), 166_666);
    assert!(!run(500, 120, (1, 100)).is_under());
    assert!(run(500, 121, (1, 100)).is_under());
    assert_eq!(run(125, 0, (100, 0)).overage_ppm(), 1_250_000);
    assert_eq!(run(0, 0, (0, 0)).error_ppm(), 0);
    assert_eq!((run(5, 0, (0, 0)).error_ppm(), run(5, 0, (0, 0)).overage_ppm()), (1_000_000, OVERAGE_PPM_MAX));
    assert_eq!(run(0, 0, (5, 0)).error_ppm(), ERROR_PPM_MAX);
}

#[test]
fn days_count_seven_and_thirty() {
    let mut s = Statistics::default();
    s.record(KEY, 10 * DAY_MS, Some(true), Some(run(100, 0, (100, 0))));
    s.record(KEY, 16 * DAY_MS, Some(false), None);
    assert_eq!(row(&s).errors(16).runs, 1);
    assert_eq!(row(&s).errors(17).runs, 0);
    assert_eq!(row(&s).results(39), (1, 2));
    assert_eq!(row(&s).results(40), (0, 1));
    // What no window reaches is forgotten with the next record.
    s.record(KEY, 40 * DAY_MS, Some(true), None);
    assert_eq!(row(&s).days.len(), 2);
}

#[test]
fn rows_and_task_types_are_bounded() {
    let mut s = Statistics::default();
    for i in 0..=ROWS_MAX as u64 {
        s.record(("a", "m", &format!("t{i}")), i, Some(true), None);
    }
    let agent = s.agent("a").unwrap();
    assert_eq!(agent.rows().count(), ROWS_MAX);
    assert!(agent.row("m", "t0").is_none() && agent.row("m", "t1").is_some());
    s.record(("b", "m", &"x".repeat(TASK_TYPE_BYTES_MAX + 1)), 1, Some(true), None);
    assert!(s.agent("b").is_none());
    s.record(("b", "m", &"x".repeat(TASK_TYPE_BYTES_MAX)), 1, Some(true), None);
    assert!(s.agent("b").is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Sums that grow and shrink are those of the runs that are kept; a checkpoint gives the same statistics.
    #[test]
    fn only_the_last_runs_count(amounts in proptest::collection::vec((0u64..2_000_000_000_000, 0u64..1_000_000_000_000), 3..300)) {
        let runs: Vec<Run> = amounts.iter().map(|(t, u)| run(*t, *u, (500, 500))).collect();
        let s = after(&runs);
        let last = &runs[runs.len().saturating_sub(RUNS_KEPT)..];
        prop_assert_eq!(row(&s).figures(), row(&after(last)).figures());
        prop_assert_eq!(row(&s).count, runs.len() as u64);
        let n = last.len() as u128;
        let sum: u128 = last.iter().map(|r| u128::from(r.usd_micros)).sum();
        prop_assert_eq!(u128::from(row(&s).figures().unwrap().mean.usd_micros.0), (sum + n / 2) / n);
        prop_assert_eq!(Statistics::from_image(s.to_image()), s);
    }
}

//! What calls really cost: figures per (agent, model, task type), folded from the log's Settle and Adjust records, so that a
//! replay has the same ones. Only measured runs count. Integers throughout; it decides nothing and knows no clock.
//!
//! Of each row the last `RUNS_KEPT` runs are kept as they were: mean, variance and quantiles are those of these runs, exact
//! and not approximated. Shares over days are kept as sums per calendar day (UTC) of logged time.

mod lesson;

use crate::estimate::guard;
use crate::tier::Standing;
use crate::view::StatisticsView;
use atp_proto::{Amount, Cost};
use prost::Message;
use std::collections::{BTreeMap, VecDeque};

pub use lesson::Lesson;
pub(crate) use lesson::merge_days;

/// Runs of a row whose figures are kept one by one.
pub const RUNS_KEPT: usize = 128;
/// Fewer runs are no statistic: estimates, scores and rates leave them out.
pub const RUNS_MIN: u64 = 3;
/// Rows of one agent; beyond it the one that was longest without a call leaves.
pub const ROWS_MAX: usize = 64;
/// A longer task type is not counted: clients choose it.
pub const TASK_TYPE_BYTES_MAX: usize = 128;
/// Days that errors of estimates are judged by, today included.
pub const ERROR_DAYS: u64 = 7;
/// Days that results are judged by, today included.
pub const RESULT_DAYS: u64 = 30;
/// The most that one run counts as error: 1,000 %.
pub const ERROR_PPM_MAX: u64 = 10_000_000;
/// The most that one run counts as overage: ten times its estimate.
pub const OVERAGE_PPM_MAX: u64 = 10_000_000;

const DAY_MS: u64 = 86_400_000;

/// One measured run beside its estimate.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Run {
    #[prost(uint64, tag = "1")]
    pub in_tokens: u64,
    #[prost(uint64, tag = "2")]
    pub out_tokens: u64,
    #[prost(uint64, tag = "3")]
    pub usd_micros: u64,
    /// The mean that the Reserve stated, in tokens.
    #[prost(uint64, tag = "4")]
    pub estimated_tokens: u64,
    /// The same in micro-USD.
    #[prost(uint64, tag = "5")]
    pub estimated_usd_micros: u64,
    /// The prompt as it was counted beforehand.
    #[prost(uint64, tag = "6")]
    pub prompt_tokens: u64,
    /// From Intent to the call's end, in logged time.
    #[prost(uint64, tag = "7")]
    pub duration_ms: u64,
    /// Where the estimate came from: `estimate::Source`.
    #[prost(uint32, tag = "8")]
    pub source: u32,
    /// Unix day.
    #[prost(uint64, tag = "9")]
    pub day: u64,
}

impl Run {
    #[must_use]
    pub fn new(actual: Cost, estimated: Amount) -> Self {
        // Within what a call can cost, so that sums of them stay in range.
        let most = |n: u64| n.min(crate::estimate::CALL_AMOUNT_MAX);
        Self {
            in_tokens: most(actual.in_tokens.0),
            out_tokens: most(actual.out_tokens.0),
            usd_micros: most(actual.usd_micros.0),
            estimated_tokens: estimated.tokens.0,
            estimated_usd_micros: estimated.usd_micros.0,
            ..Self::default()
        }
    }

    fn tokens(&self) -> u64 {
        self.in_tokens.saturating_add(self.out_tokens)
    }

    /// Actual and estimate in the dimension that they are compared in: micro-USD, or tokens where nothing costs.
    fn compared(&self) -> (u64, u64) {
        match (self.usd_micros, self.estimated_usd_micros) {
            (0, 0) => (self.tokens(), self.estimated_tokens),
            pair => pair,
        }
    }

    /// `floor(|actual - estimate| / actual)` in ppm, at most `ERROR_PPM_MAX`.
    #[must_use]
    pub fn error_ppm(&self) -> u64 {
        match self.compared() {
            (0, 0) => 0,
            (actual, estimate) => ratio_ppm(actual.abs_diff(estimate), actual).min(ERROR_PPM_MAX),
        }
    }

    /// True where the actual is more than 20 % above the estimate.
    #[must_use]
    pub fn is_under(&self) -> bool {
        let (actual, estimate) = self.compared();
        u128::from(actual) * 5 > u128::from(estimate) * 6
    }

    /// `ceil(actual / estimate)` in ppm, from 0 to `OVERAGE_PPM_MAX`.
    #[must_use]
    pub fn overage_ppm(&self) -> u64 {
        let (actual, estimate) = self.compared();
        if estimate == 0 {
            return if actual == 0 { 0 } else { OVERAGE_PPM_MAX };
        }
        let ppm = (u128::from(actual) * 1_000_000).div_ceil(estimate.into());
        u64::try_from(ppm).unwrap_or(u64::MAX).min(OVERAGE_PPM_MAX)
    }
}

/// `floor(a / b)` in ppm; the largest number where b is 0.
fn ratio_ppm(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * 1_000_000;
    product.checked_div(b.into()).and_then(|ppm| u64::try_from(ppm).ok()).unwrap_or(u64::MAX)
}

/// Sums of one calendar day.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Day {
    /// Unix day.
    #[prost(uint64, tag = "1")]
    pub day: u64,
    /// Measured runs of that day.
    #[prost(uint64, tag = "2")]
    pub runs: u64,
    /// Sum of the runs' errors in ppm.
    #[prost(uint64, tag = "3")]
    pub error_ppm: u64,
    /// Runs more than 20 % above their estimate.
    #[prost(uint64, tag = "4")]
    pub under: u64,
    /// Calls that ended with a result or a failure of the agent.
    #[prost(uint64, tag = "5")]
    pub decided: u64,
    /// Those that ended with a result.
    #[prost(uint64, tag = "6")]
    pub accepted: u64,
}

impl Day {
    fn add(&mut self, other: &Self) {
        for (sum, n) in [
            (&mut self.runs, other.runs),
            (&mut self.error_ppm, other.error_ppm),
            (&mut self.under, other.under),
            (&mut self.decided, other.decided),
            (&mut self.accepted, other.accepted),
        ] {
            *sum = sum.saturating_add(n);
        }
    }
}

/// The day that `at_ms` is in.
#[must_use]
pub fn day_of(at_ms: u64) -> u64 {
    at_ms / DAY_MS
}

/// Adds to today's sums and forgets days that no window reaches.
pub(crate) fn add_to_day(days: &mut Vec<Day>, today: u64, what: &Day) {
    days.retain(|d| d.day + RESULT_DAYS > today);
    match days.last_mut().filter(|d| d.day == today) {
        Some(day) => day.add(what),
        None => days.push(Day { day: today, ..*what }),
    }
}

/// The sums of the last `window` days up to `today`.
pub(crate) fn sum_of_days(days: &[Day], today: u64, window: u64) -> Day {
    let mut sum = Day::default();
    days.iter().filter(|d| d.day + window > today).for_each(|d| sum.add(d));
    sum
}

/// What is known of one (model, task type) of an agent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Row {
    pub model: String,
    pub task_type: String,
    /// All measured runs, also those that are no longer kept one by one.
    pub count: u64,
    runs: VecDeque<Run>,
    days: Vec<Day>,
    /// Logged time of the newest change.
    last_ms: u64,
    sums: Sums,
}

/// Of the runs that are kept; exact: 128 values of at most 2 x 10^12.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Sums {
    tokens: u64,
    usd_micros: u64,
    tokens_squared: u128,
    usd_micros_squared: u128,
    prompt_tokens: u64,
    duration_ms: u64,
}

impl Sums {
    fn add(&mut self, run: &Run) {
        let square = |n: u64| u128::from(n) * u128::from(n);
        self.tokens += run.tokens();
        self.usd_micros += run.usd_micros;
        self.tokens_squared += square(run.tokens());
        self.usd_micros_squared += square(run.usd_micros);
        self.prompt_tokens = self.prompt_tokens.saturating_add(run.prompt_tokens);
        self.duration_ms = self.duration_ms.saturating_add(run.duration_ms);
    }

    fn take(&mut self, run: &Run) {
        let square = |n: u64| u128::from(n) * u128::from(n);
        self.tokens -= run.tokens();
        self.usd_micros -= run.usd_micros;
        self.tokens_squared -= square(run.tokens());
        self.usd_micros_squared -= square(run.usd_micros);
        self.prompt_tokens = self.prompt_tokens.saturating_sub(run.prompt_tokens);
        self.duration_ms = self.duration_ms.saturating_sub(run.duration_ms);
    }
}

/// Mean and spread of the runs that are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Figures {
    /// How many runs these figures are of.
    pub samples: u64,
    /// Rounded half up.
    pub mean: Amount,
    /// Of the sample (n - 1), rounded up: tokens squared, micro-USD squared.
    pub variance_tokens: u128,
    pub variance_usd_micros: u128,
    /// The prompt as it was counted, rounded half up.
    pub prompt_tokens: u64,
    pub latency_ms: u64,
}

fn mean(sum: u64, n: u64) -> u64 {
    (sum + n / 2) / n
}

/// `ceil((n * squares - sum^2) / (n * (n - 1)))`, exact.
fn variance(sum: u64, squares: u128, n: u64) -> u128 {
    if n < 2 {
        return 0;
    }
    let spread = u128::from(n) * squares - u128::from(sum) * u128::from(sum);
    spread.div_ceil(u128::from(n) * u128::from(n - 1))
}

/// The value at index `floor(n x ppm)` from 0 of the values in order, the last one beyond; `None` of nothing.
fn quantile(mut values: Vec<u64>, ppm: u64) -> Option<u64> {
    values.sort_unstable();
    let at = values.len() * ppm as usize / 1_000_000;
    values.get(at.min(values.len().checked_sub(1)?)).copied()
}

impl Row {
    /// Figures of the kept runs, from `RUNS_MIN` on.
    #[must_use]
    pub fn figures(&self) -> Option<Figures> {
        let n = self.runs.len() as u64;
        let s = &self.sums;
        (n >= RUNS_MIN).then(|| Figures {
            samples: n,
            mean: Amount::new(mean(s.tokens, n), mean(s.usd_micros, n)),
            variance_tokens: variance(s.tokens, s.tokens_squared, n),
            variance_usd_micros: variance(s.usd_micros, s.usd_micros_squared, n),
            prompt_tokens: mean(s.prompt_tokens, n),
            latency_ms: mean(s.duration_ms, n),
        })
    }

    /// A quantile of the kept runs' tokens, micro-USD and milliseconds, each by itself; 500,000 is p50.
    #[must_use]
    pub fn at(&self, ppm: u64) -> Option<(Amount, u64)> {
        let of = |figure: fn(&Run) -> u64| quantile(self.runs.iter().map(figure).collect(), ppm);
        Some((Amount::new(of(Run::tokens)?, of(|r| r.usd_micros)?), of(|r| r.duration_ms)?))
    }

    /// The row for people; `None` below `RUNS_MIN` runs.
    #[must_use]
    pub fn view(&self) -> Option<StatisticsView> {
        let f = self.figures()?;
        let (p50, p50_ms) = self.at(500_000)?;
        let (p90, p90_ms) = self.at(900_000)?;
        Some(StatisticsView {
            model: self.model.clone(),
            task_type: self.task_type.clone(),
            runs: f.samples,
            mean: f.mean,
            sd: Amount::new(guard(1_000_000, f.variance_tokens), guard(1_000_000, f.variance_usd_micros)),
            p50,
            p90,
            p50_ms,
            p90_ms,
        })
    }

    /// The p95 overage factor in ppm of kept runs of the last 7 days whose estimate came from `source`; at least 1, and 1
    /// below `RUNS_MIN` of them.
    #[must_use]
    pub fn overage_ppm(&self, source: u32, today: u64) -> u64 {
        let runs = self.runs.iter().filter(|r| r.source == source && r.day + ERROR_DAYS > today);
        let ratios: Vec<u64> = runs.map(Run::overage_ppm).collect();
        if (ratios.len() as u64) < RUNS_MIN {
            return 1_000_000;
        }
        quantile(ratios, 950_000).map_or(1_000_000, |ppm| ppm.max(1_000_000))
    }

    /// The errors of the last 7 days.
    #[must_use]
    pub fn errors(&self, today: u64) -> Errors {
        Errors::of(&sum_of_days(&self.days, today, ERROR_DAYS))
    }

    /// (accepted, decided) of the last 30 days.
    #[must_use]
    pub fn results(&self, today: u64) -> (u64, u64) {
        let sum = sum_of_days(&self.days, today, RESULT_DAYS);
        (sum.accepted, sum.decided)
    }

    fn run(&mut self, run: Run) {
        self.count = self.count.saturating_add(1);
        if self.runs.len() == RUNS_KEPT
            && let Some(oldest) = self.runs.pop_front()
        {
            self.sums.take(&oldest);
        }
        self.sums.add(&run);
        self.runs.push_back(run);
    }
}

/// How wrong the estimates of some runs were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Errors {
    pub runs: u64,
    /// Mean absolute percentage error, `floor` of the runs' mean.
    pub mape_ppm: u64,
    /// Share of runs more than 20 % above their estimate, `floor`.
    pub under_ppm: u64,
}

impl Errors {
    pub(crate) fn of(sum: &Day) -> Self {
        let share = |n: u64| if sum.runs == 0 { 0 } else { ratio_ppm(n, sum.runs) };
        Self { runs: sum.runs, mape_ppm: sum.error_ppm.checked_div(sum.runs).unwrap_or(0), under_ppm: share(sum.under) }
    }
}

/// One agent's rows and how far it is trusted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Learned {
    rows: Vec<Row>,
    pub(crate) standing: Standing,
    /// By lessons only: the largest one.
    overshoot: Amount,
}

impl Learned {
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    #[must_use]
    pub fn row(&self, model: &str, task_type: &str) -> Option<&Row> {
        self.rows.iter().find(|r| r.model == model && r.task_type == task_type)
    }

    /// The largest overshoot that lessons told of.
    #[must_use]
    pub fn overshoot(&self) -> Amount {
        self.overshoot
    }

    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter()
    }

    /// The errors of all its runs of the last 7 days.
    #[must_use]
    pub fn errors(&self, today: u64) -> Errors {
        let mut sum = Day::default();
        self.rows.iter().for_each(|r| sum.add(&sum_of_days(&r.days, today, ERROR_DAYS)));
        Errors::of(&sum)
    }

    /// The p95 overage factor of all its kept runs of the last 7 days, from `RUNS_MIN` of them on.
    #[must_use]
    pub fn overage_ppm(&self, today: u64) -> Option<u64> {
        let runs = self.rows.iter().flat_map(|r| &r.runs).filter(|r| r.day + ERROR_DAYS > today);
        let ratios: Vec<u64> = runs.map(Run::overage_ppm).collect();
        if (ratios.len() as u64) < RUNS_MIN {
            return None;
        }
        quantile(ratios, 950_000).map(|ppm| ppm.max(1_000_000))
    }

    fn row_mut(&mut self, model: &str, task_type: &str) -> &mut Row {
        let at = self.rows.iter().position(|r| r.model == model && r.task_type == task_type).unwrap_or_else(|| {
            if self.rows.len() >= ROWS_MAX {
                let oldest = self.rows.iter().enumerate().min_by_key(|(i, r)| (r.last_ms, *i)).map_or(0, |(i, _)| i);
                self.rows.remove(oldest);
            }
            self.rows.push(Row { model: model.into(), task_type: task_type.into(), ..Row::default() });
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }
}

/// The statistics of a shard, or of all that a router knows of.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    agents: BTreeMap<String, Learned>,
}

impl Statistics {
    #[must_use]
    pub fn agent(&self, agent: &str) -> Option<&Learned> {
        self.agents.get(agent)
    }

    pub(crate) fn agent_mut(&mut self, agent: &str) -> &mut Learned {
        if !self.agents.contains_key(agent) {
            self.agents.insert(agent.into(), Learned::default());
        }
        self.agents.get_mut(agent).expect("it was put there if it was missing")
    }

    #[must_use]
    pub fn row(&self, agent: &str, model: &str, task_type: &str) -> Option<&Row> {
        self.agents.get(agent)?.row(model, task_type)
    }

    /// A call ended: with a result (`accepted`), without one, or (`None`) as what was decided before. What was measured of it
    /// counts as a run.
    pub fn record(
        &mut self,
        (agent, model, task_type): (&str, &str, &str),
        at_ms: u64,
        accepted: Option<bool>,
        measured: Option<Run>,
    ) {
        if task_type.len() > TASK_TYPE_BYTES_MAX {
            return;
        }
        let today = day_of(at_ms);
        let decided = accepted.is_some().into();
        let mut sums = Day { decided, accepted: accepted.unwrap_or(false).into(), ..Day::default() };
        let learned = self.agent_mut(agent);
        let row = learned.row_mut(model, task_type);
        row.last_ms = at_ms;
        if let Some(run) = measured {
            sums = Day { runs: 1, error_ppm: run.error_ppm(), under: run.is_under().into(), ..sums };
            row.run(Run { day: today, ..run });
        }
        add_to_day(&mut row.days, today, &sums);
        if sums.runs > 0 {
            learned.standing.add(today, &sums);
        }
    }

    /// As a checkpoint stores it.
    #[must_use]
    pub(crate) fn to_image(&self) -> Vec<LearnedImage> {
        let row = |r: &Row| RowImage {
            model: r.model.clone(),
            task_type: r.task_type.clone(),
            count: r.count,
            runs: r.runs.iter().copied().collect(),
            days: r.days.clone(),
            last_ms: r.last_ms,
        };
        let agents = self.agents.iter().map(|(agent, learned)| LearnedImage {
            agent: agent.clone(),
            rows: learned.rows.iter().map(row).collect(),
            standing: learned.standing.clone(),
        });
        agents.collect()
    }

    pub(crate) fn from_image(image: Vec<LearnedImage>) -> Self {
        let row = |r: RowImage| {
            let mut sums = Sums::default();
            r.runs.iter().for_each(|run| sums.add(run));
            Row {
                model: r.model,
                task_type: r.task_type,
                count: r.count,
                runs: r.runs.into(),
                days: r.days,
                last_ms: r.last_ms,
                sums,
            }
        };
        let agents = image.into_iter().map(|l| {
            let rows = l.rows.into_iter().map(row).collect();
            (l.agent, Learned { rows, standing: l.standing, overshoot: Amount::ZERO })
        });
        Self { agents: agents.collect() }
    }

    /// The agents that something is known of.
    pub fn agents(&self) -> impl Iterator<Item = (&str, &Learned)> {
        self.agents.iter().map(|(name, learned)| (name.as_str(), learned))
    }
}

/// One agent in a checkpoint.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LearnedImage {
    #[prost(string, tag = "1")]
    agent: String,
    /// One for each model and task type.
    #[prost(message, repeated, tag = "2")]
    rows: Vec<RowImage>,
    /// How far its estimates are trusted.
    #[prost(message, required, tag = "3")]
    standing: Standing,
}

#[derive(Clone, PartialEq, Message)]
struct RowImage {
    #[prost(string, tag = "1")]
    model: String,
    /// The tasks' type.
    #[prost(string, tag = "2")]
    task_type: String,
    /// Runs so far, those that are forgotten included.
    #[prost(uint64, tag = "3")]
    count: u64,
    /// The newest runs, oldest first.
    #[prost(message, repeated, tag = "4")]
    runs: Vec<Run>,
    /// The newest days, oldest first.
    #[prost(message, repeated, tag = "5")]
    days: Vec<Day>,
    /// Logged time of the last run, Unix ms.
    #[prost(uint64, tag = "6")]
    last_ms: u64,
}

#[cfg(test)]
mod tests;

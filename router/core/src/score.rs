//! How well an agent suits a task, in parts per million: seven terms, weighted. Integers, divisions floored. It ranks who was
//! found fit to run a task; it filters nobody and asks nothing of the money.

use crate::policy::Weights;
use crate::statistics::RUNS_MIN;
use atp_proto::content::Capabilities;

/// What a term is at most, and what the weights add up to.
pub const WHOLE: u64 = 1_000_000;
/// What an agent without data gets, unless another one is worse.
const UNKNOWN: u64 = 500_000;

/// The terms' names, as a bill's rule shows them.
pub const NAMES: [&str; 7] = ["capability", "perf", "cost", "latency", "context", "predictability", "safety"];

/// What a task asks an agent to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Task<'a> {
    pub task_type: &'a str,
    pub languages: &'a [String],
    pub category: &'a str,
}

/// What was measured of an agent at such tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Results of 30 days, and those that were accepted.
    pub decided: u64,
    pub accepted: u64,
    /// Mean of the kept runs; `None` below `RUNS_MIN` of them.
    pub latency_ms: Option<u64>,
    /// Runs of 7 days and how wrong their estimates were.
    pub runs: u64,
    pub mape_ppm: u64,
    pub under_ppm: u64,
}

/// One agent that could run the task.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub capabilities: &'a Capabilities,
    /// The guarded estimate in micro-USD with its surcharge.
    pub cost_usd_micros: u64,
    /// Prompt and answer as they are estimated.
    pub need_tokens: u64,
    pub measured: Measured,
}

/// The terms of one candidate, each 0 to `WHOLE`, in the order of `NAMES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms(pub [u64; 7]);

impl Terms {
    /// `floor(sum(weight x term) / 1,000,000)`.
    #[must_use]
    pub fn score(&self, weights: &Weights) -> u64 {
        let sum: u128 = self.0.iter().zip(weights.parts()).map(|(t, w)| u128::from(*t) * u128::from(w)).sum();
        u64::try_from(sum / u128::from(WHOLE)).unwrap_or(u64::MAX)
    }
}

/// `floor(a / b)` in ppm, at most `WHOLE`; `WHOLE` where b is 0.
fn share(a: u64, b: u64) -> u64 {
    let ppm = (u128::from(a) * u128::from(WHOLE)).checked_div(b.into());
    ppm.map_or(WHOLE, |ppm| ppm.min(u128::from(WHOLE)) as u64)
}

/// Share of what the task names that the agent lists; `WHOLE` for a task that names nothing.
#[must_use]
pub fn capability(task: &Task<'_>, c: &Capabilities) -> u64 {
    let named = [task.task_type, task.category].into_iter().chain(task.languages.iter().map(String::as_str));
    let named: Vec<&str> = named.filter(|n| !n.is_empty()).collect();
    let listed = named.iter().filter(|n| c.skills.iter().any(|s| s == *n)).count();
    share(listed as u64, named.len() as u64)
}

/// `1 / (1 + MAPE)`.
#[must_use]
pub fn predictability(mape_ppm: u64) -> u64 {
    share(WHOLE, WHOLE.saturating_add(mape_ppm))
}

/// The penalty for estimates that were too low: `1 - min(rate, 0.5)`.
#[must_use]
pub fn safety(under_ppm: u64) -> u64 {
    WHOLE - under_ppm.min(WHOLE / 2)
}

/// Unknown values never win: `UNKNOWN`, or the lowest of the known ones where that is lower.
fn settle_unknown(values: &[Option<u64>]) -> impl Iterator<Item = u64> {
    let least = values.iter().flatten().copied().min().unwrap_or(WHOLE).min(UNKNOWN);
    values.iter().map(move |v| v.unwrap_or(least))
}

/// The terms of all candidates; some of them compare a candidate with the others.
#[must_use]
pub fn terms(task: &Task<'_>, candidates: &[Candidate<'_>]) -> Vec<Terms> {
    let cheapest = candidates.iter().map(|c| c.cost_usd_micros).min().unwrap_or(0);
    // Less than a millisecond is one.
    let latency = |c: &Candidate<'_>| c.measured.latency_ms.map(|ms| ms.max(1));
    let fastest = candidates.iter().filter_map(latency).min().unwrap_or(1);
    let perf = |c: &Candidate<'_>| {
        let m = &c.measured;
        (m.decided >= RUNS_MIN).then(|| share(m.accepted, m.decided))
    };
    let context = |c: &Candidate<'_>| {
        let size = c.capabilities.models.first()?.context_tokens?;
        Some(share(size.saturating_sub(c.need_tokens), size))
    };
    let errors = |c: &Candidate<'_>| (c.measured.runs >= RUNS_MIN).then_some(c.measured);
    let column = |value: &dyn Fn(&Candidate<'_>) -> Option<u64>| -> Vec<u64> {
        settle_unknown(&candidates.iter().map(value).collect::<Vec<_>>()).collect()
    };
    let columns: [Vec<u64>; 7] = [
        column(&|c| Some(capability(task, c.capabilities))),
        column(&perf),
        column(&|c| Some(share(cheapest, c.cost_usd_micros))),
        column(&|c| latency(c).map(|own| share(fastest, own))),
        column(&context),
        column(&|c| errors(c).map(|m| predictability(m.mape_ppm))),
        column(&|c| errors(c).map(|m| safety(m.under_ppm))),
    ];
    (0..candidates.len()).map(|i| Terms(std::array::from_fn(|term| columns[term][i]))).collect()
}

/// The terms that put `own` before `other`, the heaviest first, as weighted ppm: at most two.
#[must_use]
pub fn ahead(weights: &Weights, own: &Terms, other: &Terms) -> Vec<(&'static str, u64)> {
    let weighted = |t: &Terms, i: usize| u64::try_from(u128::from(t.0[i]) * u128::from(weights.parts()[i]) / 1_000_000);
    let mut lead: Vec<(&'static str, u64)> = (0..7)
        .map(|i| (NAMES[i], weighted(own, i).unwrap_or(0).saturating_sub(weighted(other, i).unwrap_or(0))))
        .filter(|(_, lead)| *lead > 0)
        .collect();
    lead.sort_by_key(|(_, lead)| std::cmp::Reverse(*lead));
    lead.truncate(2);
    lead
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::content::ModelInfo;
    use proptest::prelude::*;

    fn agent(skills: &[&str], context: Option<u64>) -> Capabilities {
        let model = ModelInfo { id: "m".into(), context_tokens: context, ..ModelInfo::default() };
        Capabilities {
            skills: skills.iter().map(|s| (*s).into()).collect(),
            models: vec![model],
            ..Capabilities::default()
        }
    }

    fn measured(decided: u64, accepted: u64, latency_ms: u64, mape_ppm: u64, under_ppm: u64) -> Measured {
        Measured { decided, accepted, latency_ms: Some(latency_ms), runs: decided, mape_ppm, under_ppm }
    }

    #[test]
    fn terms_and_scores_are_exact() {
        let task = Task { task_type: "code_review", languages: &["rust".to_owned()], category: "" };
        let (a, b) = (agent(&["code_review", "rust"], Some(8_000)), agent(&["code_review"], Some(2_000)));
        let candidates = [
            Candidate {
                capabilities: &a,
                cost_usd_micros: 300,
                need_tokens: 1_000,
                measured: measured(10, 9, 400, 250_000, 100_000),
            },
            Candidate {
                capabilities: &b,
                cost_usd_micros: 200,
                need_tokens: 1_000,
                measured: measured(4, 3, 1_200, 1_000_000, 750_000),
            },
        ];
        let [ta, tb] = terms(&task, &candidates)[..] else { panic!("two") };
        assert_eq!(ta.0, [1_000_000, 900_000, 666_666, 1_000_000, 875_000, 800_000, 900_000]);
        assert_eq!(tb.0, [500_000, 750_000, 1_000_000, 333_333, 500_000, 500_000, 500_000]);
        let w = Weights::default();
        // 300,000 + 180,000 + 99,999.9 + 100,000 + 87,500 + 80,000 + 45,000
        assert_eq!((ta.score(&w), tb.score(&w)), (892_499, 608_333));
        assert_eq!(ahead(&w, &ta, &tb), [("capability", 150_000), ("latency", 66_667)]);
        assert_eq!(ahead(&w, &tb, &ta), [("cost", 50_001)]);
    }

    #[test]
    fn missing_data_never_wins() {
        let c = agent(&[], None);
        let of = |m: Measured| Candidate { capabilities: &c, cost_usd_micros: 0, need_tokens: 0, measured: m };
        let new = Measured { decided: 2, accepted: 2, latency_ms: None, runs: 2, mape_ppm: 0, under_ppm: 0 };
        let alone = terms(&Task::default(), &[of(new)]);
        assert_eq!(alone[0].0, [WHOLE, UNKNOWN, WHOLE, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]);
        let good = measured(3, 3, 10, 0, 0);
        let beside_good = terms(&Task::default(), &[of(new), of(good)]);
        assert_eq!(beside_good[0].0[1..], alone[0].0[1..]);
        let bad = measured(10, 1, 10, 4_000_000, 900_000);
        let beside_bad = terms(&Task::default(), &[of(new), of(bad), of(good)]);
        assert_eq!(beside_bad[0].0[1], 100_000, "perf of the worst");
        assert_eq!(beside_bad[0].0[5..], [200_000, 500_000], "predictability and safety of the worst");
    }

    #[test]
    fn free_and_instant_are_the_best() {
        let c = agent(&[], None);
        let of = |cost, ms| Candidate {
            capabilities: &c,
            cost_usd_micros: cost,
            need_tokens: 0,
            measured: measured(3, 3, ms, 0, 0),
        };
        let t = terms(&Task::default(), &[of(0, 0), of(5, 2)]);
        assert_eq!((t[0].0[2], t[1].0[2]), (WHOLE, 0));
        assert_eq!((t[0].0[3], t[1].0[3]), (WHOLE, 500_000));
    }

    proptest! {
        /// Better in one term, the same in the others: never a lower score.
        #[test]
        fn the_score_is_monotone_in_each_term(
            start in proptest::array::uniform7(0u64..=WHOLE), term in 0usize..7, more in 0u64..=WHOLE,
            parts in proptest::array::uniform7(1u32..1_000),
        ) {
            let sum: u32 = parts.iter().sum();
            let weights = Weights::from_parts(parts.map(|p| (u64::from(p) * WHOLE / u64::from(sum)) as u32));
            let mut better = start;
            better[term] = (start[term] + more).min(WHOLE);
            prop_assert!(Terms(better).score(&weights) >= Terms(start).score(&weights));
            prop_assert!(Terms(better).score(&weights) <= WHOLE);
        }

        /// What makes an agent better makes none of its terms worse.
        #[test]
        fn a_better_agent_has_no_worse_term(
            a in (0u64..1_000, 0u64..10, 0u64..1_000, 0u64..2_000_000, 0u64..=WHOLE),
            b in (0u64..1_000, 0u64..10, 0u64..1_000, 0u64..2_000_000, 0u64..=WHOLE), field in 0usize..5, by in 1u64..500,
        ) {
            let c = agent(&[], Some(10_000));
            let of = |(cost, accepted, ms, mape, under): (u64, u64, u64, u64, u64)| Candidate {
                capabilities: &c,
                cost_usd_micros: cost,
                need_tokens: 500,
                measured: measured(10, accepted, ms, mape, under),
            };
            let mut better = a;
            match field {
                0 => better.0 = a.0.saturating_sub(by),
                1 => better.1 = (a.1 + by).min(10),
                2 => better.2 = a.2.saturating_sub(by),
                3 => better.3 = a.3.saturating_sub(by),
                _ => better.4 = a.4.saturating_sub(by),
            }
            let before = terms(&Task::default(), &[of(a), of(b)])[0];
            let after = terms(&Task::default(), &[of(better), of(b)])[0];
            prop_assert!(before.0.iter().zip(after.0).all(|(x, y)| *x <= y), "{:?} {:?}", before, after);
            let w = Weights::default();
            prop_assert!(after.score(&w) >= before.score(&w));
        }
    }
}

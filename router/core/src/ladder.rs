//! The ladder of an account whose budget binds: a cheaper model first, then waiting at the cheapest step, refusal last.
//! Pure arithmetic over amounts: knows no agent and reserves nothing. More money never gives a worse step.

use atp_proto::Amount;

/// What an account may do at its limit, as its `on_limit` lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnLimit {
    pub downgrade: bool,
    pub queue: bool,
}

impl Default for OnLimit {
    /// Without `on_limit`: no downgrade, and a task waits for money that is held, unless it says otherwise.
    fn default() -> Self {
        Self { downgrade: false, queue: true }
    }
}

/// One way to run a call, with what it needs. The price is that of the model that would really run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    pub mean: Amount,
    pub guarded: Amount,
    /// The first grant: the prompt and one slice. More than zero where `guarded` is, else an account that has nothing left would run
    /// what one that has a little, all of it held, lets wait.
    pub least: Amount,
    /// Only the whole of `guarded` will do.
    pub whole: bool,
    /// False: it would break a floor, a capability or `supported`, so it is skipped.
    pub allowed: bool,
}

/// What money says to one rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purse {
    /// Not in this window.
    Never,
    /// When held money comes back.
    Later,
    Now,
}

/// Where a task comes to stand. The order of `rungs` is the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This rung, now.
    Run(usize),
    /// It waits at this rung, the last one that is allowed.
    Queue(usize),
    Refuse,
}

impl Step {
    /// How good it is: a greater number is a better step. Of `n` rungs.
    #[must_use]
    pub const fn worth(self, n: usize) -> usize {
        match self {
            Self::Run(i) => n.saturating_sub(i) + 1,
            Self::Queue(_) => 1,
            Self::Refuse => 0,
        }
    }
}

impl Rung {
    /// Whether `left` (limit - settled) and `free` (left - held and claims) pay it.
    #[must_use]
    pub fn purse(&self, left: Amount, free: Amount) -> Purse {
        let need = self.guarded.min(left);
        if !self.mean.fits(left) || !self.least.fits(need) || (self.whole && need != self.guarded) {
            Purse::Never
        } else if need.fits(free) {
            Purse::Now
        } else {
            Purse::Later
        }
    }
}

/// Walks down: the first allowed rung that can be paid now; else it waits at the cheapest step; else it is refused.
#[must_use]
pub fn walk(rungs: &[Rung], on_limit: OnLimit, left: Amount, free: Amount) -> Step {
    let steps = if on_limit.downgrade { rungs.len() } else { rungs.len().min(1) };
    let is = |i: &usize, purse: Purse| rungs[*i].allowed && rungs[*i].purse(left, free) == purse;
    if let Some(i) = (0..steps).find(|i| is(i, Purse::Now)) {
        return Step::Run(i);
    }
    match (0..steps).rev().find(|i| is(i, Purse::Later)) {
        Some(i) if on_limit.queue => Step::Queue(i),
        Some(_) | None => Step::Refuse,
    }
}

/// The place of a model in a ladder, from its dearest: the same id, or an id that has the name as one of its parts
/// (`sonnet` is `claude-sonnet-4-5`, not `sonnets`).
#[must_use]
pub fn place(ladder: &[String], model: &str) -> Option<usize> {
    ladder.iter().position(|name| is_named(model, name))
}

fn is_named(model: &str, name: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_none_or(|b| !b.is_ascii_alphanumeric());
    model == name
        || model.match_indices(name).any(|(at, _)| {
            let bytes = model.as_bytes();
            edge(at.checked_sub(1).and_then(|i| bytes.get(i))) && edge(bytes.get(at + name.len()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rung(mean: u64, guarded: u64) -> Rung {
        let both = |n| Amount::new(n, n);
        Rung { mean: both(mean), guarded: both(guarded), least: both(mean / 2), whole: false, allowed: true }
    }

    #[test]
    fn the_steps_are_downgrade_queue_refuse() {
        let rungs = [rung(100, 150), rung(40, 60), rung(10, 15)];
        let all = OnLimit { downgrade: true, queue: true };
        let step = |on_limit, left, free| walk(&rungs, on_limit, Amount::new(left, left), Amount::new(free, free));
        assert_eq!(step(all, 1_000, 150), Step::Run(0));
        assert_eq!(step(all, 1_000, 149), Step::Run(1));
        assert_eq!(step(all, 1_000, 59), Step::Run(2));
        assert_eq!(step(all, 1_000, 14), Step::Queue(2));
        assert_eq!(step(all, 9, 9), Step::Refuse);
        assert_eq!(step(OnLimit { downgrade: true, queue: false }, 1_000, 14), Step::Refuse);
        assert_eq!(step(OnLimit { downgrade: false, queue: true }, 1_000, 149), Step::Queue(0));
        assert_eq!(step(OnLimit::default(), 50, 50), Step::Refuse);
    }

    #[test]
    fn a_forbidden_step_is_skipped() {
        let rungs = [rung(100, 150), Rung { allowed: false, ..rung(40, 60) }, rung(10, 15)];
        let all = OnLimit { downgrade: true, queue: true };
        let free = Amount::new(149, 149);
        assert_eq!(walk(&rungs, all, Amount::new(1_000, 1_000), free), Step::Run(2));
        let floor = [rungs[0], rungs[1], Rung { allowed: false, ..rungs[2] }];
        assert_eq!(walk(&floor, all, Amount::new(1_000, 1_000), free), Step::Queue(0), "it waits above its floor");
    }

    #[test]
    fn a_name_is_a_part_of_an_id() {
        let ladder: Vec<String> = ["opus", "sonnet", "gpt-4o"].map(String::from).into();
        assert_eq!(place(&ladder, "claude-sonnet-4-5"), Some(1));
        assert_eq!(place(&ladder, "openai/gpt-4o"), Some(2));
        assert_eq!(place(&ladder, "opus"), Some(0));
        assert_eq!(place(&ladder, "sonnets"), None);
        assert_eq!(place(&ladder, "gpt-4omni"), None);
    }

    proptest! {
        #[test]
        fn more_money_never_gives_a_worse_step(
            sizes in prop::collection::vec((0u64..2_000, 0u64..1_000, any::<bool>(), 0u8..4), 1..6),
            (downgrade, queue) in any::<(bool, bool)>(),
            settled in (0u64..3_000, 0u64..3_000),
            held in (0u64..3_000, 0u64..3_000),
            limit in (0u64..6_000, 0u64..6_000),
            more in (0u64..4_000, 0u64..4_000),
        ) {
            let rungs: Vec<Rung> = sizes
                .iter()
                .map(|(mean, band, whole, skip)| {
                    let guarded = Amount::new(mean + band, mean / 2 + band);
                    let a_bit = Amount::new(guarded.tokens.0.min(1), guarded.usd_micros.0.min(1));
                    Rung {
                        mean: Amount::new(*mean, mean / 2),
                        guarded,
                        least: Amount::new(mean / 3, mean / 4).max(a_bit),
                        whole: *whole,
                        allowed: *skip > 0,
                    }
                })
                .collect();
            let on_limit = OnLimit { downgrade, queue };
            let (settled, held) = (Amount::new(settled.0, settled.1), Amount::new(held.0, held.1));
            let at = |limit: Amount| {
                let left = limit.less(settled);
                walk(&rungs, on_limit, left, left.less(held)).worth(rungs.len())
            };
            let limit = Amount::new(limit.0, limit.1);
            let richer = limit.add(Amount::new(more.0, more.1)).expect("small");
            prop_assert!(at(richer) >= at(limit));
        }
    }
}

//! How far an agent's estimates are trusted: its QoS tier, which repeated underestimation lowers and good estimates raise
//! again. It judges from sums of the log and never changes a tier by itself: a `Tier` record does.

use crate::statistics::{Day, ERROR_DAYS, Errors, add_to_day, merge_days, sum_of_days};
use atp_proto::Qos;
use prost::Message;

/// Runs since the last change of tier, within 7 days, before a tier is changed again.
pub const TIER_RUNS_MIN: u64 = 10;
/// Above this share of runs more than 20 % over their estimate the tier falls by one.
pub const TIER_LOWER_PPM: u64 = 500_000;
/// Below this share it rises by one.
pub const TIER_RAISE_PPM: u64 = 200_000;

/// An agent's tier and the errors since it was given.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Standing {
    /// Steps below gold: 0, 1, 2.
    #[prost(uint32, tag = "1")]
    steps: u32,
    /// Its errors since it was given.
    #[prost(message, repeated, tag = "2")]
    since: Vec<Day>,
}

impl Standing {
    /// The highest QoS that the agent is offered to while others match.
    #[must_use]
    pub fn tier(&self) -> Qos {
        match self.steps {
            0 => Qos::Gold,
            1 => Qos::Silver,
            _ => Qos::Bronze,
        }
    }

    /// The errors since the last change, of at most 7 days.
    #[must_use]
    pub fn errors(&self, today: u64) -> Errors {
        Errors::of(&sum_of_days(&self.since, today, ERROR_DAYS))
    }

    /// The tier that its errors ask for, where that is another one.
    #[must_use]
    pub fn due(&self, today: u64) -> Option<Qos> {
        let errors = self.errors(today);
        if errors.runs < TIER_RUNS_MIN {
            return None;
        }
        let steps = if errors.under_ppm > TIER_LOWER_PPM {
            (self.steps + 1).min(2)
        } else if errors.under_ppm < TIER_RAISE_PPM {
            self.steps.saturating_sub(1)
        } else {
            self.steps
        };
        (steps != self.steps).then(|| Self { steps, since: Vec::new() }.tier())
    }

    pub(crate) fn add(&mut self, today: u64, sums: &Day) {
        add_to_day(&mut self.since, today, sums);
    }

    /// Adds the errors that another shard counted; its tier is the agent's where it is the one that judges.
    pub(crate) fn merge(&mut self, other: &Self, judges: bool) {
        if judges {
            self.steps = other.steps;
        }
        merge_days(&mut self.since, &other.since);
    }

    /// A `Tier` record: counting begins anew.
    pub(crate) fn set(&mut self, tier: Qos) {
        self.steps = tier as u32 - 1;
        self.since.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(steps: u32, runs: u64, under: u64) -> Standing {
        let mut standing = Standing { steps, since: Vec::new() };
        standing.add(9, &Day { runs, under, ..Day::default() });
        standing
    }

    #[test]
    fn a_tier_falls_above_half_and_rises_below_a_fifth() {
        assert_eq!(seen(0, 10, 5).due(9), None);
        assert_eq!(seen(0, 10, 6).due(9), Some(Qos::Silver));
        assert_eq!(seen(1, 10, 6).due(9), Some(Qos::Bronze));
        assert_eq!(seen(2, 10, 10).due(9), None);
        assert_eq!(seen(2, 10, 2).due(9), None);
        assert_eq!(seen(2, 10, 1).due(9), Some(Qos::Silver));
        assert_eq!(seen(1, 10, 0).due(9), Some(Qos::Gold));
        assert_eq!(seen(0, 10, 0).due(9), None);
    }

    #[test]
    fn it_takes_ten_runs_of_seven_days_since_the_last_change() {
        assert_eq!(seen(0, 9, 9).due(9), None);
        assert_eq!(seen(0, 10, 10).due(15), Some(Qos::Silver));
        assert_eq!(seen(0, 10, 10).due(16), None);
        let mut standing = seen(0, 10, 10);
        standing.set(Qos::Silver);
        assert_eq!((standing.tier(), standing.due(9)), (Qos::Silver, None));
    }
}

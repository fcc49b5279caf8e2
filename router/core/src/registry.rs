//! What an operator's registry says that agents' runs cost, by agent and model: an estimate for calls that this router has no
//! runs of yet. It never chooses anything.

use std::collections::BTreeMap;

/// Fewer runs than this, and their spread means little.
const SETTLED_RUNS: u64 = 3;

/// What a file of known agents says. Without entries unless one was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registry {
    agents: BTreeMap<String, BTreeMap<String, RunCost>>,
}

/// Tokens (in + out) of an agent's runs on one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunCost {
    pub mean: u64,
    /// The value at index floor(n x 0.9) of the runs in order.
    pub p90: u64,
    pub runs: u64,
    /// Too few runs, whatever their number says.
    pub preliminary: bool,
    /// The share of the tokens that are the prompt's; absent: all count at the dearer rate.
    pub in_ppm: Option<u32>,
}

impl RunCost {
    /// The deviation in tokens: from the distance of p90 to the mean as of a normal distribution, at least a tenth of the
    /// mean; half of the mean where the runs are too few.
    #[must_use]
    pub fn deviation(&self) -> u64 {
        if self.preliminary || self.runs < SETTLED_RUNS {
            return self.mean / 2;
        }
        let above = u128::from(self.p90.saturating_sub(self.mean));
        // 1.282 deviations lie between mean and p90.
        let sigma = (above * 1_000).div_ceil(1_282);
        u64::try_from(sigma).unwrap_or(u64::MAX).max(self.mean / 10)
    }
}

impl Registry {
    pub fn add(&mut self, agent: &str, model: &str, cost: RunCost) {
        self.agents.entry(agent.into()).or_default().insert(model.into(), cost);
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }

    /// Of this agent on this model. Names match when they are equal, else an entry's last `:` segment counts; a model's date
    /// (`-20260514`) may be missing in the file.
    #[must_use]
    pub fn cost(&self, agent: &str, model: &str) -> Option<&RunCost> {
        let last = |name: &str| name.rsplit(':').next() == Some(agent);
        let models =
            self.agents.get(agent).or_else(|| self.agents.iter().find(|(name, _)| last(name)).map(|(_, m)| m))?;
        models.get(model).or_else(|| models.get(undated(model)?))
    }
}

fn undated(model: &str) -> Option<&str> {
    let (name, date) = model.rsplit_once('-')?;
    (date.len() == 8 && date.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(mean: u64, p90: u64, runs: u64) -> RunCost {
        RunCost { mean, p90, runs, preliminary: false, in_ppm: None }
    }

    #[test]
    fn the_deviation_is_exact() {
        // ceil(300,000 / 1,282) = 235; ceil(1,282,000 / 1,282) = 1,000.
        assert_eq!(cost(1_100, 1_400, 3).deviation(), 235);
        assert_eq!(cost(1_100, 2_382, 3).deviation(), 1_000);
        // At least a tenth of the mean, also where p90 lies below it.
        assert_eq!(cost(1_100, 1_110, 3).deviation(), 110);
        assert_eq!(cost(1_100, 900, 3).deviation(), 110);
        // Two runs are too few, three are enough unless the file says otherwise.
        assert_eq!(cost(1_101, 1_400, 2).deviation(), 550);
        assert_eq!(RunCost { preliminary: true, ..cost(1_101, 1_400, 9) }.deviation(), 550);
        assert_eq!(cost(0, u64::MAX, 3).deviation(), 14_389_035_938_931_007_500);
    }

    #[test]
    fn names_match_whole_then_by_their_last_part_and_models_without_date() {
        let mut registry = Registry::default();
        registry.add("plug:review:fd-safety", "opus", cost(1, 1, 3));
        registry.add("fd-quality", "opus", cost(2, 2, 3));
        registry.add("plug:review:fd-quality", "opus", cost(3, 3, 3));
        let mean = |agent, model| registry.cost(agent, model).map(|c| c.mean);
        assert_eq!(mean("fd-safety", "opus"), Some(1));
        assert_eq!(mean("plug:review:fd-safety", "opus"), Some(1));
        assert_eq!(mean("fd-quality", "opus"), Some(2));
        assert_eq!(mean("fd-quality", "opus-20260514"), Some(2));
        assert_eq!(mean("fd-quality", "opus-2026051"), None);
        assert_eq!(mean("fd-quality", "sonnet"), None);
        assert_eq!(mean("safety", "opus"), None);
    }
}

//! The sample trace: made up from a seed in integers, so that every machine makes the same one. It has the shape of real
//! traces (bursts, long-tailed lengths) and the columns of Azure's; it is nobody's data.

use std::fmt::Write;

/// The shipped sample: `data/sample.csv` is what `generate` makes of this seed.
pub(crate) const SEED: u64 = 1;
pub(crate) const SHIPPED: &str = include_str!("../../data/sample.csv");
const ROWS: usize = 440;
/// A step of the random walk through the logarithms: e^(+1/4) and e^(-1/4) in ppm; 16 steps deviate by one.
const UP_PPM: u64 = 1_284_025;
const DOWN_PPM: u64 = 778_801;

/// Numbers from a seed: splitmix64.
struct Numbers(u64);

impl Numbers {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + ((u128::from(self.word()) * u128::from(high - low + 1)) >> 64) as u64
    }

    /// About lognormal around `median`: `steps` of 16 make a deviation of 1 in the logarithm.
    fn lognormal(&mut self, median: u64, steps: u32) -> u64 {
        let mut value = median * self.between(880_000, 1_130_000) / 1_000;
        for _ in 0..steps {
            value = value * if self.word() & 1 == 0 { UP_PPM } else { DOWN_PPM } / 1_000_000;
        }
        value / 1_000
    }
}

/// A trace as CSV: calm stretches of about a question a second, and bursts of some dozens within seconds.
pub(crate) fn generate(seed: u64) -> String {
    let mut numbers = Numbers(seed);
    let mut text = String::from("TIMESTAMP,ContextTokens,GeneratedTokens\n");
    let (mut at_ms, mut burst) = (0, 0);
    for _ in 0..ROWS {
        if burst == 0 && numbers.between(1, 40) == 1 {
            burst = numbers.between(20, 60);
        }
        at_ms += if burst > 0 { numbers.between(5, 150) } else { numbers.between(100, 2_400) };
        burst = u64::saturating_sub(burst, 1);
        let (input, output) = (numbers.lognormal(700, 16), numbers.lognormal(220, 14));
        let (input, output) = (input.clamp(20, 16_000), output.clamp(4, 4_096));
        let (minute, second) = (at_ms / 60_000, at_ms % 60_000);
        let _ = writeln!(
            text,
            "2024-01-01 {:02}:{:02}:{:02}.{:03},{input},{output}",
            minute / 60,
            minute % 60,
            second / 1000,
            second % 1000
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_sample_is_what_its_seed_makes() {
        assert!(generate(SEED) == SHIPPED, "data/sample.csv isn't that of seed {SEED}");
        assert_ne!(generate(SEED), generate(SEED + 1));
    }
}

//! Quantities of a script, which may vary around a mean, and the dice that they are drawn with: the same seed and call
//! number draw the same. The only fractions are in the draw; what comes out is a whole number.

use crate::config::Span;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

/// How many standard deviations a draw is from the mean at most: what a call can cost has a bound.
const DEVIATIONS_MAX: f64 = 3.0;

/// What can stand where a script has a number.
pub(crate) trait Quantity: Copy + Default {
    const EXPECTED: &'static str;
    fn of_number(n: u64) -> Result<Self, String>;
    fn of_text(text: &str) -> Result<Self, String>;
    fn units(self) -> u64;
    fn of_units(units: u64) -> Self;
}

impl Quantity for u64 {
    const EXPECTED: &'static str = "a whole number, 0 or more";
    fn of_number(n: u64) -> Result<Self, String> {
        Ok(n)
    }
    fn of_text(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| format!("`{text}` is not {}", Self::EXPECTED))
    }
    fn units(self) -> u64 {
        self
    }
    fn of_units(units: u64) -> Self {
        units
    }
}

impl Quantity for Span {
    const EXPECTED: &'static str = "a duration like 500ms, 30s or 5m";
    fn of_number(n: u64) -> Result<Self, String> {
        if n == 0 { Ok(Self::default()) } else { Err(format!("{n} has no unit; write {n}ms or {n}s")) }
    }
    fn of_text(text: &str) -> Result<Self, String> {
        text.parse()
    }
    fn units(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
    fn of_units(units: u64) -> Self {
        Self(Duration::from_nanos(units))
    }
}

/// A quantity, exact or as `{mean: .., sd: ..}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Jitter<T> {
    pub(crate) mean: T,
    pub(crate) sd: T,
}

impl<T: Quantity> Jitter<T> {
    /// The largest that can be drawn.
    pub(crate) fn most(self) -> T {
        T::of_units(self.mean.units().saturating_add(self.sd.units().saturating_mul(DEVIATIONS_MAX as u64)))
    }

    pub(crate) fn draw(self, dice: &mut Dice) -> T {
        if self.sd.units() == 0 {
            return self.mean;
        }
        let off = (dice.normal().clamp(-DEVIATIONS_MAX, DEVIATIONS_MAX) * self.sd.units() as f64).round();
        let size = off.abs() as u64;
        let mean = self.mean.units();
        T::of_units(if off < 0.0 { mean.saturating_sub(size) } else { mean.saturating_add(size) })
    }
}

impl<'de, T: Quantity> Deserialize<'de> for Jitter<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Either(PhantomData))
    }
}

struct Either<T>(PhantomData<T>);

impl<'de, T: Quantity> Visitor<'de> for Either<T> {
    type Value = Jitter<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, or {{mean: .., sd: ..}}", T::EXPECTED)
    }
    fn visit_u64<E: Error>(self, n: u64) -> Result<Self::Value, E> {
        let mean = T::of_number(n).map_err(E::custom)?;
        Ok(Jitter { mean, sd: T::default() })
    }
    fn visit_i64<E: Error>(self, n: i64) -> Result<Self::Value, E> {
        match u64::try_from(n) {
            Ok(n) => self.visit_u64(n),
            Err(_) => Err(E::custom(format!("{n} is negative; write {}", T::EXPECTED))),
        }
    }
    fn visit_f64<E: Error>(self, n: f64) -> Result<Self::Value, E> {
        Err(E::custom(format!("{n} can't stand here; write {}", T::EXPECTED)))
    }
    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        let mean = T::of_text(text).map_err(E::custom)?;
        Ok(Jitter { mean, sd: T::default() })
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut mean, mut sd) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            let slot = match key.as_str() {
                "mean" => &mut mean,
                "sd" => &mut sd,
                other => return Err(A::Error::custom(format!("unknown field `{other}`, expected `mean` and `sd`"))),
            };
            let Jitter { mean: value, sd: inner } = map.next_value::<Jitter<T>>()?;
            if inner.units() != 0 {
                return Err(A::Error::custom(format!("{key}: is {} itself", T::EXPECTED)));
            }
            *slot = Some(value);
        }
        let mean = mean.ok_or_else(|| A::Error::missing_field("mean"))?;
        Ok(Jitter { mean, sd: sd.unwrap_or_default() })
    }
}

/// SplitMix64: enough for a script, and the same everywhere.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    /// The dice of one call: what other calls draw doesn't matter.
    pub(crate) fn of_call(seed: u64, call: u64) -> Self {
        let mut dice = Self(seed ^ call.wrapping_mul(0xA076_1D64_78BD_642F));
        dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A draw from the standard normal distribution (Box and Muller).
    fn normal(&mut self) -> f64 {
        let unit = |n: u64| ((n >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
        let (u, v) = (unit(self.next()), unit(self.next()));
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct One {
        n: Jitter<u64>,
        #[serde(default)]
        after: Jitter<Span>,
    }

    #[test]
    fn plain_and_varying() {
        let one: One = serde_saphyr::from_str("n: 20\nafter: 10ms\n").unwrap();
        assert_eq!((one.n.mean, one.n.sd), (20, 0));
        assert_eq!(one.after.mean.0, Duration::from_millis(10));
        let one: One = serde_saphyr::from_str("n: {mean: 20, sd: 5}\nafter: {mean: 1s, sd: 100ms}\n").unwrap();
        assert_eq!((one.n.mean, one.n.sd, one.n.most()), (20, 5, 35));
        assert_eq!(one.after.most().0, Duration::from_millis(1300));
    }

    #[test]
    fn what_a_number_may_not_be() {
        for (yaml, word) in [
            ("n: -1", "negative"),
            ("n: 1.5", "whole number"),
            ("n: .nan", "non-finite"),
            ("n: {mean: 1, dev: 2}", "dev"),
            ("n: {sd: 2}", "mean"),
            ("n: 1\nafter: 10", "10ms"),
            ("n: 1\nafter: soon", "duration"),
        ] {
            let error = serde_saphyr::from_str::<One>(yaml).unwrap_err();
            assert!(error.to_string().contains(word), "{yaml}: {error}");
            assert!(error.location().is_some(), "{yaml}");
        }
    }

    #[test]
    fn draws_repeat_and_stay_bounded() {
        let jitter = Jitter { mean: 100u64, sd: 10 };
        let draws = |seed| (0..1000).map(|call| jitter.draw(&mut Dice::of_call(seed, call))).collect::<Vec<_>>();
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
        let all = draws(7);
        assert!(all.iter().all(|n| (70..=130).contains(n)));
        let mean = all.iter().sum::<u64>() / 1000;
        assert!((98..=102).contains(&mean), "{mean}");
    }
}

//! Money and tokens: integers, checked operations only. Overflow is an error, never a wrap.

#![expect(clippy::should_implement_trait, reason = "the operators can't answer with an error, and these must")]

use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;

/// An amount left the range of `u64`, or would have become negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("amount out of range")]
pub struct OutOfRange;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            pub const ZERO: Self = Self(0);
            pub const MAX: Self = Self(u64::MAX);

            /// # Errors
            /// When the sum leaves `u64`.
            pub fn add(self, other: Self) -> Result<Self, OutOfRange> {
                self.0.checked_add(other.0).map(Self).ok_or(OutOfRange)
            }

            /// # Errors
            /// When `other` is larger.
            pub fn sub(self, other: Self) -> Result<Self, OutOfRange> {
                self.0.checked_sub(other.0).map(Self).ok_or(OutOfRange)
            }

            /// What `other` leaves of this amount; zero where it is larger.
            #[must_use]
            pub fn less(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }

            /// # Errors
            /// When the product leaves `u64`.
            pub fn times(self, n: u64) -> Result<Self, OutOfRange> {
                self.0.checked_mul(n).map(Self).ok_or(OutOfRange)
            }

            /// `ceil(self * ppm / 1_000_000)`.
            ///
            /// # Errors
            /// When the result leaves `u64`.
            pub fn scale_ppm_up(self, ppm: u64) -> Result<Self, OutOfRange> {
                let product = u128::from(self.0) * u128::from(ppm);
                u64::try_from(product.div_ceil(1_000_000)).map(Self).map_err(|_| OutOfRange)
            }

            /// The largest amount that, scaled up by `1_000_000 + margin_ppm`, still fits in this one.
            #[must_use]
            pub fn within_margin(self, margin_ppm: u64) -> Self {
                let whole = u128::from(self.0) * 1_000_000 / (1_000_000 + u128::from(margin_ppm));
                Self(u64::try_from(whole).unwrap_or(self.0))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        /// A number, or (JSON view) the same number as a string.
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                d.deserialize_any(IntOrText).map(Self)
            }
        }
    };
}

unit!(
    /// Micro-USD: 1 USD = 1,000,000.
    UsdMicros
);
unit!(
    /// Tokens of a model, prompt and completion alike.
    Tokens
);

struct IntOrText;

impl serde::de::Visitor<'_> for IntOrText {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number from 0 to 2^64-1")
    }
    fn visit_u64<E: serde::de::Error>(self, v: u64) -> Result<u64, E> {
        Ok(v)
    }
    fn visit_i64<E: serde::de::Error>(self, v: i64) -> Result<u64, E> {
        u64::try_from(v).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(v), &self))
    }
    fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<u64, E> {
        v.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(v), &self))
    }
}

/// The two dimensions that every account, hold and grant has. Both must pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Amount {
    pub tokens: Tokens,
    pub usd_micros: UsdMicros,
}

impl Amount {
    pub const ZERO: Self = Self { tokens: Tokens::ZERO, usd_micros: UsdMicros::ZERO };

    #[must_use]
    pub const fn new(tokens: u64, usd_micros: u64) -> Self {
        Self { tokens: Tokens(tokens), usd_micros: UsdMicros(usd_micros) }
    }

    /// # Errors
    /// When a component leaves `u64`.
    pub fn add(self, o: Self) -> Result<Self, OutOfRange> {
        Ok(Self { tokens: self.tokens.add(o.tokens)?, usd_micros: self.usd_micros.add(o.usd_micros)? })
    }

    /// # Errors
    /// When a component of `o` is larger.
    pub fn sub(self, o: Self) -> Result<Self, OutOfRange> {
        Ok(Self { tokens: self.tokens.sub(o.tokens)?, usd_micros: self.usd_micros.sub(o.usd_micros)? })
    }

    /// Component-wise: what `o` leaves; zero where it is larger.
    #[must_use]
    pub fn less(self, o: Self) -> Self {
        Self { tokens: self.tokens.less(o.tokens), usd_micros: self.usd_micros.less(o.usd_micros) }
    }

    /// Component-wise minimum.
    #[must_use]
    pub fn min(self, o: Self) -> Self {
        Self { tokens: self.tokens.min(o.tokens), usd_micros: self.usd_micros.min(o.usd_micros) }
    }

    /// Component-wise maximum.
    #[must_use]
    pub fn max(self, o: Self) -> Self {
        Self { tokens: self.tokens.max(o.tokens), usd_micros: self.usd_micros.max(o.usd_micros) }
    }

    /// True when both components fit into `o`.
    #[must_use]
    pub fn fits(self, o: Self) -> bool {
        self.tokens <= o.tokens && self.usd_micros <= o.usd_micros
    }

    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }
}

/// A limit per dimension; an absent one doesn't bind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Limit {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_micros: Option<UsdMicros>,
}

impl Limit {
    pub const NONE: Self = Self { tokens: None, usd_micros: None };

    /// The amount that this limit allows; `u64::MAX` in a dimension without one.
    #[must_use]
    pub fn amount(self) -> Amount {
        Amount { tokens: self.tokens.unwrap_or(Tokens::MAX), usd_micros: self.usd_micros.unwrap_or(UsdMicros::MAX) }
    }

    /// Component-wise minimum, where absent means no limit.
    #[must_use]
    pub fn min(self, o: Self) -> Self {
        fn tighter<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
            match (a, b) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            }
        }
        Self { tokens: tighter(self.tokens, o.tokens), usd_micros: tighter(self.usd_micros, o.usd_micros) }
    }
}

/// The running total of a call. Totals never fall; a report that does is a fault of the adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cost {
    pub in_tokens: Tokens,
    pub out_tokens: Tokens,
    pub usd_micros: UsdMicros,
}

impl Cost {
    /// # Errors
    /// When the sum of the tokens leaves `u64`.
    pub fn amount(self) -> Result<Amount, OutOfRange> {
        Ok(Amount { tokens: self.in_tokens.add(self.out_tokens)?, usd_micros: self.usd_micros })
    }

    /// Component-wise maximum: a running total that fell is held at its highest.
    #[must_use]
    pub fn max(self, o: Self) -> Self {
        Self {
            in_tokens: self.in_tokens.max(o.in_tokens),
            out_tokens: self.out_tokens.max(o.out_tokens),
            usd_micros: self.usd_micros.max(o.usd_micros),
        }
    }
}

/// A decimal amount of USD as people write it (`0.50`) in micro-USD, rounded up.
///
/// # Errors
/// Names what is wrong: not a decimal, negative, or out of range.
pub fn parse_usd(text: &str) -> Result<UsdMicros, String> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err(format!("`{text}` is negative; an amount is 0 or more"));
    }
    let (whole, frac) = text.split_once('.').unwrap_or((text, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() && frac.is_empty() || !digits(whole) || !digits(frac) {
        return Err(format!("`{text}` is not a decimal amount of USD like 0.50"));
    }
    let range = |_| format!("`{text}` is larger than an amount can be");
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(range)? };
    let mut micros: u64 = 0;
    for i in 0..6 {
        let digit = frac.as_bytes().get(i).map_or(0, |b| u64::from(b - b'0'));
        micros = micros * 10 + digit;
    }
    let up = u64::from(frac.bytes().skip(6).any(|b| b != b'0'));
    let total = whole.checked_mul(1_000_000).and_then(|w| w.checked_add(micros + up));
    total.map(UsdMicros).ok_or_else(|| format!("`{text}` is larger than an amount can be"))
}

/// A decimal as programs write it (`0.5`, `5e-7`) times 10^`scale`, rounded up.
///
/// # Errors
/// Names what is wrong: not a decimal, negative, or out of range.
pub fn parse_scaled(text: &str, scale: u32) -> Result<u64, String> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err(format!("`{}` is negative; an amount is 0 or more", text.escape_debug()));
    }
    let bad = || format!("`{}` is not a decimal like 0.50", text.escape_debug());
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().map_err(|_| bad())?),
        None => (text, 0),
    };
    let (whole, frac) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = || whole.bytes().chain(frac.bytes());
    if whole.is_empty() && frac.is_empty() || !digits().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    // The digit at index i stands for 10^(point - 1 - i) of the result's units.
    let point = i64::try_from(whole.len()).map_err(|_| bad())? + i64::from(exponent) + i64::from(scale);
    let range = || format!("`{}` is larger than an amount can be", text.escape_debug());
    let (mut total, mut up) = (0u64, 0u64);
    for (i, digit) in (0i64..).zip(digits().map(|b| u64::from(b - b'0'))).filter(|(_, digit)| *digit > 0) {
        match u32::try_from(point - 1 - i) {
            Ok(place) => {
                let more = 10u64.checked_pow(place).and_then(|p| p.checked_mul(digit)).ok_or_else(range)?;
                total = total.checked_add(more).ok_or_else(range)?;
            }
            Err(_) if point - 1 - i < 0 => up = 1,
            Err(_) => return Err(range()),
        }
    }
    total.checked_add(up).ok_or_else(range)
}

/// `12345` micro-USD as `0.012345`; at least two decimals, trailing zeros cut.
#[must_use]
pub fn show_usd(v: UsdMicros) -> String {
    let text = format!("{}.{:06}", v.0 / 1_000_000, v.0 % 1_000_000);
    let cut = text.trim_end_matches('0');
    let decimals = cut.len() - cut.find('.').map_or(0, |p| p + 1);
    format!("{cut}{}", "0".repeat(2usize.saturating_sub(decimals)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usd_is_parsed_rounded_up_and_shown() {
        assert_eq!(parse_usd("0.50"), Ok(UsdMicros(500_000)));
        assert_eq!(parse_usd("0.0000001"), Ok(UsdMicros(1)));
        assert_eq!(parse_usd("3"), Ok(UsdMicros(3_000_000)));
        assert_eq!(parse_usd(".5"), Ok(UsdMicros(500_000)));
        assert_eq!(parse_usd("18446744073709.551615"), Ok(UsdMicros(u64::MAX)));
        for bad in ["", ".", "-1", "1e3", "NaN", "inf", "1.2.3", "18446744073709.551616"] {
            assert!(parse_usd(bad).is_err(), "{bad}");
        }
        assert_eq!(show_usd(UsdMicros(500_000)), "0.50");
        assert_eq!(show_usd(UsdMicros(12_345)), "0.012345");
        assert_eq!(show_usd(UsdMicros(0)), "0.00");
    }

    #[test]
    fn decimals_of_programs_are_scaled_and_rounded_up() {
        assert_eq!(parse_scaled("0.10", 6), Ok(100_000));
        assert_eq!(parse_scaled("1e-05", 6), Ok(10));
        assert_eq!(parse_scaled("1.5E-6", 6), Ok(2));
        assert_eq!(parse_scaled("4e-4", 12), Ok(400_000_000));
        assert_eq!(parse_scaled("1e-999999999", 6), Ok(1));
        assert_eq!(parse_scaled("0e99999", 6), Ok(0));
        assert_eq!(parse_scaled("18446744073709.551615", 6), Ok(u64::MAX));
        for bad in
            ["", ".", "e5", "-1", "-0.0", "NaN", "inf", "Infinity", "1.2.3", "1e", "18446744073709.551616", "1e99"]
        {
            assert!(parse_scaled(bad, 6).is_err(), "{bad}");
        }
    }

    #[test]
    fn amounts_never_wrap() {
        assert_eq!(Tokens::MAX.add(Tokens(1)), Err(OutOfRange));
        assert_eq!(Tokens(1).sub(Tokens(2)), Err(OutOfRange));
        assert_eq!(UsdMicros(3).scale_ppm_up(500_000), Ok(UsdMicros(2)));
        assert_eq!(UsdMicros::MAX.scale_ppm_up(1_000_001), Err(OutOfRange));
        assert_eq!(Tokens(110).within_margin(100_000), Tokens(100));
        assert_eq!(Tokens(109).within_margin(100_000), Tokens(99));
        assert_eq!(Tokens::MAX.within_margin(0), Tokens::MAX);
    }
}

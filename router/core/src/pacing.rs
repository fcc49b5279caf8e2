//! Even pacing of an account's window: how much of it may be used by now, and when the next call may begin.
//! Pure arithmetic over logged time: reads no clock and holds nothing back itself.

use atp_proto::{Amount, Limit, Tokens, UsdMicros};

/// What an account's pace is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Shown only.
    #[default]
    Observe,
    /// Shown, and named as a warning above the line.
    Warn,
    /// Above the line a new Reserve waits as it does for money.
    Enforce,
}

impl Mode {
    pub const ALL: [(&'static str, Self); 3] =
        [("observe", Self::Observe), ("warn", Self::Warn), ("enforce", Self::Enforce)];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Observe => "observe",
            Self::Warn => "warn",
            Self::Enforce => "enforce",
        }
    }
}

/// Window from `begins_ms` to `ends_ms` (logged time) with a limit, and what is used (settled + held) of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    pub begins_ms: u64,
    pub ends_ms: u64,
    pub limit: Limit,
    pub used: Amount,
    /// An authorisation in force: so much above the line.
    pub faster: Amount,
}

impl Pace {
    /// What an even use has reached at `at_ms`; `u64::MAX` in a dimension without a limit.
    #[must_use]
    pub fn line(&self, at_ms: u64) -> Amount {
        let whole = self.ends_ms.saturating_sub(self.begins_ms).max(1);
        let passed = at_ms.clamp(self.begins_ms, self.begins_ms + whole) - self.begins_ms;
        let part = |limit: u64| {
            let part = u128::from(limit) * u128::from(passed) / u128::from(whole);
            u64::try_from(part).expect("at most the limit")
        };
        Amount {
            tokens: self.limit.tokens.map_or(Tokens::MAX, |t| Tokens(part(t.0))),
            usd_micros: self.limit.usd_micros.map_or(UsdMicros::MAX, |u| UsdMicros(part(u.0))),
        }
    }

    /// True while more is used than an even use would have: no new call begins under `Enforce`.
    #[must_use]
    pub fn is_ahead(&self, at_ms: u64) -> bool {
        !self.used.less(self.faster).fits(self.line(at_ms))
    }

    /// The first time at which `is_ahead` ends, at most the window's end.
    #[must_use]
    pub fn resumes_ms(&self, at_ms: u64) -> u64 {
        let whole = self.ends_ms.saturating_sub(self.begins_ms);
        let when = |used: u64, limit: Option<u64>| match limit {
            None => 0,
            Some(0) if used > 0 => whole,
            Some(0) => 0,
            Some(limit) => {
                let ms = (u128::from(used) * u128::from(whole)).div_ceil(u128::from(limit));
                u64::try_from(ms).unwrap_or(u64::MAX).min(whole)
            }
        };
        let used = self.used.less(self.faster);
        let tokens = when(used.tokens.0, self.limit.tokens.map(|t| t.0));
        let usd = when(used.usd_micros.0, self.limit.usd_micros.map(|u| u.0));
        at_ms.max(self.begins_ms + tokens.max(usd))
    }

    /// Remaining usage / remaining time, per hour: the even rate from now on.
    #[must_use]
    pub fn rate_per_hour(&self, at_ms: u64) -> Limit {
        let time = u128::from(self.ends_ms.saturating_sub(at_ms).max(1));
        let left = self.limit.amount().less(self.used);
        let rate = |left: u64| u64::try_from(u128::from(left) * 3_600_000 / time).unwrap_or(u64::MAX);
        Limit {
            tokens: self.limit.tokens.map(|_| Tokens(rate(left.tokens.0))),
            usd_micros: self.limit.usd_micros.map(|_| UsdMicros(rate(left.usd_micros.0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000;

    fn pace(used: u64) -> Pace {
        let limit = Limit { tokens: None, usd_micros: Some(UsdMicros(24_000_000)) };
        Pace { begins_ms: 10 * HOUR, ends_ms: 34 * HOUR, limit, used: Amount::new(7, used), faster: Amount::ZERO }
    }

    #[test]
    fn the_line_is_straight() {
        let line = |at| pace(0).line(at).usd_micros.0;
        assert_eq!((line(0), line(10 * HOUR), line(11 * HOUR)), (0, 0, 1_000_000));
        assert_eq!((line(22 * HOUR), line(34 * HOUR), line(99 * HOUR)), (12_000_000, 24_000_000, 24_000_000));
    }

    #[test]
    fn who_is_ahead_waits_for_the_line() {
        assert!(pace(1).is_ahead(10 * HOUR) && !pace(0).is_ahead(10 * HOUR));
        assert!(!pace(1_000_000).is_ahead(11 * HOUR) && pace(1_000_001).is_ahead(11 * HOUR));
        assert_eq!(pace(1_500_000).resumes_ms(11 * HOUR), 11 * HOUR + HOUR / 2);
        assert_eq!(pace(500_000).resumes_ms(11 * HOUR), 11 * HOUR);
        assert_eq!(pace(99_000_000).resumes_ms(11 * HOUR), 34 * HOUR);
    }

    #[test]
    fn an_authorisation_lifts_the_line_by_its_amount() {
        let faster = |used, n| Pace { faster: Amount::new(0, n), ..pace(used) };
        assert!(!faster(1_500_000, 500_000).is_ahead(11 * HOUR) && faster(1_500_001, 500_000).is_ahead(11 * HOUR));
        assert_eq!(faster(2_000_000, 500_000).resumes_ms(11 * HOUR), 11 * HOUR + HOUR / 2);
    }

    #[test]
    fn the_rate_is_split_anew() {
        let rate = |used, at| pace(used).rate_per_hour(at).usd_micros.expect("it has a limit").0;
        assert_eq!(rate(0, 10 * HOUR), 1_000_000);
        assert_eq!(rate(0, 22 * HOUR), 2_000_000);
        assert_eq!(rate(18_000_000, 22 * HOUR), 500_000);
        assert_eq!(rate(30_000_000, 22 * HOUR), 0);
        assert_eq!(pace(0).rate_per_hour(22 * HOUR).tokens, None);
    }

    proptest! {
        /// Whoever always wants more stays within 1 % of the line when a call is at most that.
        #[test]
        fn a_greedy_account_keeps_within_one_percent_of_the_line(
            limit in 10_000u64..10_000_000, whole in 60_000u64..90_000_000, calls in prop::collection::vec(1u64..1_000, 300),
        ) {
            let mut pace = Pace {
                begins_ms: 5_000,
                ends_ms: 5_000 + whole,
                limit: Limit { tokens: Some(Tokens(limit)), usd_micros: None },
                used: Amount::ZERO,
                faster: Amount::ZERO,
            };
            let percent = limit / 100;
            let mut now = 5_000;
            for size in calls {
                now = pace.resumes_ms(now);
                if now >= pace.ends_ms {
                    break;
                }
                prop_assert!(!pace.is_ahead(now));
                let line = pace.line(now).tokens.0;
                // It never lags: the wait ends at the first millisecond of the line.
                prop_assert!(line - pace.used.tokens.0 <= limit / whole + 1);
                let call = (size * percent / 1_000).max(1);
                pace.used = pace.used.add(Amount::new(call, 0)).expect("small");
                prop_assert!(pace.used.tokens.0 <= line + percent);
            }
        }
    }
}

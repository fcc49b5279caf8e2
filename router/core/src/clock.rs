//! Logged time: it follows the monotonic clock and drifts toward the wall clock by at most 1 s per 10 s.
//! Never reads a clock: time comes in with the input.

use std::fmt::Write;

/// The time of an input, read once per batch by the shell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds of a monotonic clock, any origin.
    pub mono_ms: u64,
    /// Milliseconds since the Unix epoch.
    pub wall_ms: u64,
}

/// An owner's logged time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    mono_ms: u64,
    logged_ms: u64,
    /// Tenths of a millisecond of drift that are not spent.
    slew_tenths: u64,
    behind_ms: i64,
}

impl Clock {
    /// At a start the wall clock is believed unless it is behind the log.
    #[must_use]
    pub fn start(now: Now, log_ms: u64) -> Self {
        let logged_ms = now.wall_ms.max(log_ms);
        Self { mono_ms: now.mono_ms, logged_ms, slew_tenths: 0, behind_ms: difference(now.wall_ms, logged_ms) }
    }

    /// Moves to `now` and returns the logged time in Unix milliseconds. It never goes back.
    pub fn tick(&mut self, now: Now) -> u64 {
        let passed = now.mono_ms.saturating_sub(self.mono_ms);
        self.mono_ms = self.mono_ms.max(now.mono_ms);
        let tenths = self.slew_tenths + passed;
        let slew = tenths / 10;
        self.slew_tenths = tenths % 10;
        let target = self.logged_ms + passed;
        self.logged_ms = if now.wall_ms >= target {
            target + slew.min(now.wall_ms - target)
        } else {
            // Slower than the monotonic clock, never backwards.
            target - slew.min(target - now.wall_ms).min(passed)
        };
        self.behind_ms = difference(now.wall_ms, self.logged_ms);
        self.logged_ms
    }

    /// Logged time in Unix milliseconds.
    #[must_use]
    pub fn logged_ms(&self) -> u64 {
        self.logged_ms
    }

    /// Wall clock minus logged time in milliseconds, at the last tick.
    #[must_use]
    pub fn behind_ms(&self) -> i64 {
        self.behind_ms
    }
}

fn difference(a: u64, b: u64) -> i64 {
    i64::try_from(i128::from(a) - i128::from(b)).unwrap_or(i64::MAX)
}

/// Unix milliseconds as RFC 3339 in UTC with milliseconds.
#[must_use]
pub fn rfc3339(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days);
    let mut text = String::with_capacity(24);
    let _ = write!(
        text,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        ms / 3_600_000,
        ms / 60_000 % 60,
        ms / 1000 % 60,
        ms % 1000
    );
    text
}

/// Days since 1970-01-01 as a date of the Gregorian calendar.
#[must_use]
pub fn civil(days: u64) -> (u64, u64, u64) {
    // Years begin in March here, so that the leap day is the last of its year.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

/// Days from 1970-01-01 to the first of a month.
#[must_use]
pub fn days_to_month(year: u64, month: u64) -> u64 {
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logged_time_slews_one_in_ten() {
        let mut clock = Clock::start(Now { mono_ms: 0, wall_ms: 1_000_000 }, 0);
        // The wall clock jumps an hour ahead: 10 s later one extra second has passed.
        assert_eq!(clock.tick(Now { mono_ms: 10_000, wall_ms: 4_610_000 }), 1_011_000);
        // It jumps back: 10 s pass as 9.
        assert_eq!(clock.tick(Now { mono_ms: 20_000, wall_ms: 0 }), 1_020_000);
        assert!(clock.behind_ms() < 0);
    }

    #[test]
    fn the_log_wins_over_a_wall_clock_behind_it() {
        assert_eq!(Clock::start(Now { mono_ms: 5, wall_ms: 10 }, 99).logged_ms(), 99);
        assert_eq!(Clock::start(Now { mono_ms: 5, wall_ms: 100 }, 99).logged_ms(), 100);
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(1_709_210_096_789), "2024-02-29T12:34:56.789Z");
        assert_eq!(days_to_month(2024, 3) - days_to_month(2024, 2), 29);
        assert_eq!(days_to_month(1970, 1), 0);
    }
}

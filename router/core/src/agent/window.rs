//! How many calls an agent is given at once: additive increase and multiplicative decrease, a cap on new dispatches per
//! second, and the cool-off after calls that cost far more than their guarded estimate.
//! Pure: time comes in as monotonic milliseconds; it lends nothing itself.

use std::collections::VecDeque;

/// One second: the span of the burst cap.
const SECOND_MS: u64 = 1_000;
/// Each halving of a cool-off lasts this long.
pub const COOL_OFF_MS: u64 = 60_000;
/// Halvings that one agent can have at once.
const HALVINGS_MAX: u32 = 3;
/// What each halving adds to the agent's effective cost.
pub const SURCHARGE_PPM: u32 = 250_000;

/// The window that an agent's results earn: +1 for a result within the target latency, halved by a timeout, an error or
/// a congestion mark (ATP-9-3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aimd {
    limit: u32,
    cut_at: u64,
}

impl Aimd {
    #[must_use]
    pub fn new(base: u32) -> Self {
        Self { limit: base.max(1), cut_at: 0 }
    }

    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// A result within the target latency. `used` counts the slots in use with its own: a window that isn't filled says
    /// nothing of what a larger one would bring.
    pub fn met(&mut self, used: u32, cap: u32) {
        if used >= self.limit && self.limit < cap {
            self.limit += 1;
        }
    }

    /// A failure of a call that was dispatched at `began`. One before the last cut belongs to the window that was cut.
    pub fn cut(&mut self, began: u64, now: u64) {
        if began >= self.cut_at {
            self.limit = (self.limit / 2).max(1);
            self.cut_at = now;
        }
    }

    /// New settings may have a lower cap.
    pub fn cap(&mut self, cap: u32) {
        self.limit = self.limit.min(cap.max(1));
    }
}

/// When an agent's newest dispatches left: at most `burst` within any second (ATP-9-4).
#[derive(Clone, Debug, Default)]
pub struct Burst {
    at: VecDeque<u64>,
}

impl Burst {
    /// A dispatch leaves.
    pub fn note(&mut self, now: u64, burst: u32) {
        self.at.push_back(now);
        self.forget(now, burst);
    }

    fn forget(&mut self, now: u64, burst: u32) {
        while self.at.front().is_some_and(|at| at + SECOND_MS <= now) || self.at.len() > burst as usize {
            self.at.pop_front();
        }
    }

    /// How many may still leave now.
    pub fn left(&mut self, now: u64, burst: u32) -> u32 {
        self.forget(now, burst);
        burst.saturating_sub(u32::try_from(self.at.len()).unwrap_or(u32::MAX))
    }

    /// When the next one may leave, if the second is full.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.at.front().map(|at| at + SECOND_MS)
    }
}

/// After a call whose actual exceeds its guarded estimate by more than the limit: parallelism halved and a surcharge on
/// the effective cost, until it decays (ATP-9-5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoolOff {
    halvings: u32,
    since: u64,
}

impl CoolOff {
    /// A call dispatched at `began` ended `over_ppm` above its guarded estimate.
    pub fn over(&mut self, over_ppm: u64, limit_ppm: u64, began: u64, now: u64) {
        self.decay(now);
        if over_ppm > limit_ppm && (self.halvings == 0 || began >= self.since) {
            self.halvings = (self.halvings + 1).min(HALVINGS_MAX);
            self.since = now;
        }
    }

    /// Takes back a halving for each span that has passed.
    pub fn decay(&mut self, now: u64) {
        while self.halvings > 0 && now >= self.since + COOL_OFF_MS {
            self.halvings -= 1;
            self.since += COOL_OFF_MS;
        }
    }

    /// What remains of a window of calls; never none.
    #[must_use]
    pub fn of(&self, calls: u32) -> u32 {
        (calls >> self.halvings).max(calls.min(1))
    }

    /// What the agent's effective cost is raised by.
    #[must_use]
    pub fn surcharge_ppm(&self) -> u32 {
        self.halvings * SURCHARGE_PPM
    }

    /// When it next decays.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        (self.halvings > 0).then_some(self.since + COOL_OFF_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aimd_grows_by_one_while_it_is_used_and_halves_once_per_window() {
        let mut aimd = Aimd::new(4);
        let mut seen = Vec::new();
        for used in [4, 5, 5, 6, 7] {
            aimd.met(used, 64);
            seen.push(aimd.limit());
        }
        // The second 5 was below the window of 6: nothing is learned from it.
        assert_eq!(seen, [5, 6, 6, 7, 8]);
        aimd.cut(100, 200);
        assert_eq!(aimd.limit(), 4);
        // Dispatched before the cut: part of the same bad window.
        aimd.cut(199, 201);
        assert_eq!(aimd.limit(), 4);
        let cuts: Vec<u32> = (0..4)
            .map(|n| {
                aimd.cut(300 + n, 300 + n);
                aimd.limit()
            })
            .collect();
        assert_eq!(cuts, [2, 1, 1, 1]);
    }

    #[test]
    fn aimd_stops_at_its_cap() {
        let mut aimd = Aimd::new(4);
        (0..100).for_each(|_| aimd.met(u32::MAX, 64));
        assert_eq!(aimd.limit(), 64);
        aimd.cap(10);
        assert_eq!(aimd.limit(), 10);
        assert_eq!(Aimd::new(0).limit(), 1);
    }

    #[test]
    fn a_burst_is_what_leaves_within_a_second() {
        let mut burst = Burst::default();
        for at in [0, 10, 990] {
            assert!(burst.left(at, 3) > 0, "{at}");
            burst.note(at, 3);
        }
        assert_eq!((burst.left(999, 3), burst.next_at()), (0, Some(1_000)));
        assert_eq!(burst.left(1_000, 3), 1);
        burst.note(1_000, 3);
        assert_eq!((burst.left(1_009, 3), burst.left(1_010, 3)), (0, 1));
        assert_eq!(burst.left(1_990, 3), 2, "the one of 1000 still counts");
        assert_eq!(burst.left(2_000, 3), 3);
    }

    #[test]
    fn a_cool_off_halves_surcharges_and_decays() {
        let mut cool = CoolOff::default();
        cool.over(250_000, 250_000, 0, 10);
        assert_eq!((cool.of(8), cool.surcharge_ppm(), cool.next_at()), (8, 0, None), "25 % is allowed");
        cool.over(250_001, 250_000, 0, 1_000);
        assert_eq!((cool.of(8), cool.surcharge_ppm(), cool.next_at()), (4, 250_000, Some(61_000)));
        cool.over(900_000, 250_000, 999, 1_500);
        assert_eq!(cool.of(8), 4, "it ran beside the first one");
        for began in [2_000, 3_000, 4_000, 5_000] {
            cool.over(900_000, 250_000, began, began);
        }
        assert_eq!((cool.of(64), cool.of(4), cool.of(0), cool.surcharge_ppm()), (8, 1, 0, 750_000));
        let mut left = Vec::new();
        for at in [64_999, 65_000, 125_000, 185_000] {
            cool.decay(at);
            left.push(cool.surcharge_ppm());
        }
        assert_eq!(left, [750_000, 500_000, 250_000, 0]);
    }
}

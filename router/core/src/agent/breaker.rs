//! An agent's circuit breaker: closed, open after failures in a row, half open for one probe at a time.
//! Pure: time comes in as monotonic milliseconds; it never decides what a failure is.
//!
//! ```text
//!   Closed --5 failures in a row--> Open --30 s--> HalfOpen --2 successes--> Closed
//!                                    ^                |
//!                                    +----a failure---+
//! ```

use atp_proto::CallId;

/// Failures in a row that open it.
pub const FAILURES: u32 = 5;
/// How long it stays open.
pub const OPEN_MS: u64 = 30_000;
/// Successes of probes that close it.
pub const SUCCESSES: u32 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum BreakerState {
    #[default]
    Closed,
    Open,
    HalfOpen,
}

impl BreakerState {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// See the drawing above (ATP-9-6).
#[derive(Clone, Copy, Debug, Default)]
pub struct Breaker {
    state: BreakerState,
    /// Failures in a row while closed, successes while half open.
    count: u32,
    since: u64,
    probe: Option<CallId>,
}

impl Breaker {
    #[must_use]
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// Time passes: an open one becomes half open.
    pub fn tick(&mut self, now: u64) {
        if self.state == BreakerState::Open && now >= self.since + OPEN_MS {
            *self = Self { state: BreakerState::HalfOpen, count: 0, since: now, probe: None };
        }
    }

    /// True while a slot may be lent.
    #[must_use]
    pub fn lets_pass(&self) -> bool {
        match self.state {
            BreakerState::Closed => true,
            BreakerState::Open => false,
            BreakerState::HalfOpen => self.probe.is_none(),
        }
    }

    /// A slot is lent to this call.
    pub fn lent(&mut self, call: CallId) {
        if self.state == BreakerState::HalfOpen {
            self.probe = Some(call);
        }
    }

    /// The slot of this call is free again, whatever came of it.
    pub fn freed(&mut self, call: CallId) {
        if self.probe == Some(call) {
            self.probe = None;
        }
    }

    /// A call that began at `began` succeeded. Calls from before the breaker opened don't count once it has.
    pub fn succeeded(&mut self, began: u64) {
        match self.state {
            BreakerState::Closed => self.count = 0,
            BreakerState::HalfOpen if began >= self.since => {
                self.count += 1;
                if self.count >= SUCCESSES {
                    *self = Self::default();
                }
            }
            BreakerState::HalfOpen | BreakerState::Open => {}
        }
    }

    /// A call that began at `began` failed.
    pub fn failed(&mut self, began: u64, now: u64) {
        match self.state {
            BreakerState::Closed => {
                self.count += 1;
                if self.count >= FAILURES {
                    self.open(now);
                }
            }
            BreakerState::HalfOpen if began >= self.since => self.open(now),
            BreakerState::HalfOpen | BreakerState::Open => {}
        }
    }

    fn open(&mut self, now: u64) {
        *self = Self { state: BreakerState::Open, count: 0, since: now, probe: None };
    }

    /// When an open one becomes half open.
    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        (self.state == BreakerState::Open).then_some(self.since + OPEN_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: CallId = CallId([1; 10]);
    const TWO: CallId = CallId([2; 10]);

    #[test]
    fn five_failures_in_a_row_open_it_for_30_s() {
        let mut breaker = Breaker::default();
        for _ in 0..4 {
            breaker.failed(0, 10);
        }
        breaker.succeeded(0);
        for at in 20..24 {
            breaker.failed(0, at);
        }
        assert_eq!(breaker.state(), BreakerState::Closed, "a success lies between");
        breaker.failed(0, 24);
        assert_eq!(
            (breaker.state(), breaker.lets_pass(), breaker.next_at()),
            (BreakerState::Open, false, Some(30_024))
        );
        breaker.tick(30_023);
        assert_eq!(breaker.state(), BreakerState::Open);
        breaker.tick(30_024);
        assert_eq!((breaker.state(), breaker.lets_pass(), breaker.next_at()), (BreakerState::HalfOpen, true, None));
    }

    fn half_open() -> Breaker {
        let mut breaker = Breaker::default();
        (0..5).for_each(|_| breaker.failed(0, 0));
        breaker.tick(OPEN_MS);
        breaker
    }

    #[test]
    fn one_probe_at_a_time_and_two_successes_close_it() {
        let mut breaker = half_open();
        breaker.lent(ONE);
        assert!(!breaker.lets_pass());
        breaker.freed(TWO);
        assert!(!breaker.lets_pass(), "not its probe");
        breaker.freed(ONE);
        breaker.succeeded(OPEN_MS);
        assert_eq!((breaker.state(), breaker.lets_pass()), (BreakerState::HalfOpen, true));
        breaker.lent(TWO);
        breaker.freed(TWO);
        breaker.succeeded(OPEN_MS + 5);
        assert_eq!((breaker.state(), breaker.lets_pass()), (BreakerState::Closed, true));
    }

    #[test]
    fn a_failed_probe_opens_it_again_and_old_calls_say_nothing() {
        let mut breaker = half_open();
        breaker.failed(OPEN_MS - 1, OPEN_MS + 1);
        breaker.succeeded(OPEN_MS - 1);
        breaker.succeeded(OPEN_MS - 1);
        assert_eq!(breaker.state(), BreakerState::HalfOpen, "they began before");
        breaker.lent(ONE);
        breaker.failed(OPEN_MS, OPEN_MS + 7);
        assert_eq!((breaker.state(), breaker.next_at()), (BreakerState::Open, Some(2 * OPEN_MS + 7)));
        breaker.failed(OPEN_MS, OPEN_MS + 9);
        assert_eq!(breaker.next_at(), Some(2 * OPEN_MS + 7), "an open one isn't opened again");
    }
}

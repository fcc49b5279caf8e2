//! How long to wait before the next attempt to connect: exponential, with jitter, bounded.

use std::time::Duration;

/// Waits grow by two from `first` to `max`; each is drawn from the upper half of its step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
    /// Attempts end after this much time without a connection; `None`: never.
    pub give_up: Option<Duration>,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(50), max: Duration::from_secs(5), give_up: Some(Duration::from_secs(120)) }
    }
}

impl Backoff {
    /// The same waits, without end.
    #[must_use]
    pub fn forever() -> Self {
        Self { give_up: None, ..Self::default() }
    }

    /// The wait before attempt number `attempt` (from 0), between half of the step and the whole of it.
    #[must_use]
    pub fn wait(&self, attempt: u32) -> Duration {
        self.wait_at(attempt, (uuid::Uuid::new_v4().as_u128() >> 64) as u32)
    }

    fn wait_at(&self, attempt: u32, chance: u32) -> Duration {
        let step = self.first.saturating_mul(2u32.saturating_pow(attempt.min(31))).min(self.max);
        step / 2 + Duration::from_secs_f64(step.as_secs_f64() / 2.0 * f64::from(chance) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_stay_bounded() {
        let backoff = Backoff::default();
        assert_eq!(backoff.wait_at(0, 0), Duration::from_millis(25));
        assert_eq!(backoff.wait_at(0, u32::MAX), Duration::from_millis(50));
        assert_eq!(backoff.wait_at(3, u32::MAX), Duration::from_millis(400));
        for attempt in 0..100 {
            assert!(backoff.wait(attempt) <= backoff.max);
        }
        assert_eq!(backoff.wait_at(u32::MAX, u32::MAX), backoff.max);
    }
}

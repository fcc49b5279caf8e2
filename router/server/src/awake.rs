//! Whether this process stood still for so long that others may have taken what it owned before it had the time to find out.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Looks at the clock within the time that others wait for a router.
const TIMES: u32 = 4;

/// Clones share it.
#[derive(Clone)]
pub(crate) struct Awake(Arc<Inner>);

struct Inner {
    /// How long others wait.
    lease: Duration,
    seen: Mutex<Seen>,
}

struct Seen {
    last: Instant,
    since: Option<Instant>,
}

impl Awake {
    pub(crate) fn new(lease: Duration) -> Self {
        let seen = Mutex::new(Seen { last: Instant::now(), since: None });
        Self(Arc::new(Inner { lease, seen }))
    }

    /// Since when it has not stood still; `None`: it never has. Whoever asks may be the first to run again.
    pub(crate) fn since(&self) -> Option<Instant> {
        let mut seen = self.0.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now.saturating_duration_since(seen.last) >= self.0.lease {
            seen.since = Some(now);
        }
        seen.last = now;
        seen.since
    }

    /// Looks at the clock until `stop`: who asks less often would find that it had stood still.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let looks = async {
            loop {
                self.since();
                tokio::time::sleep(self.0.lease / TIMES).await;
            }
        };
        stop.run_until_cancelled(looks).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_stood_still_for_a_lease_knows_it_before_anybody_else_asks() {
        let lease = Duration::from_secs(1);
        let awake = Awake::new(lease);
        tokio::time::advance(lease - Duration::from_millis(1)).await;
        assert_eq!(awake.since(), None);
        tokio::time::advance(lease).await;
        let woke = awake.since();
        assert_eq!(woke, Some(Instant::now()));
        tokio::time::advance(lease / 2).await;
        assert_eq!(awake.since(), woke);
    }

    #[tokio::test(start_paused = true)]
    async fn who_runs_but_is_asked_nothing_has_not_stood_still() {
        let (awake, stop) = (Awake::new(Duration::from_secs(1)), CancellationToken::new());
        let looks = tokio::spawn(awake.clone().run(stop.clone()));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(awake.since(), None);
        stop.cancel();
        looks.await.unwrap();
    }
}

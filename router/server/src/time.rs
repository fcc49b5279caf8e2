//! The process's two clocks, read by the shell once per batch. Nothing else reads a clock for the core.

use atp_core::clock::Now;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

/// The origin of this process's monotonic milliseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clocks {
    origin: Instant,
}

impl Clocks {
    pub(crate) fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// When the process began.
    pub(crate) const fn origin(&self) -> Instant {
        self.origin
    }

    pub(crate) fn now(&self) -> Now {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // From 1, so that 0 can mean never.
        Now { mono_ms: 1 + millis(self.origin.elapsed()), wall_ms: millis(wall) }
    }

    /// The instant of a monotonic time; the next millisecond, so that it has passed when a sleep until it ends.
    pub(crate) fn instant(&self, mono_ms: u64) -> Instant {
        // A timeout of a day is as good as a later one, and can't overflow.
        let ahead = Duration::from_millis(mono_ms.saturating_sub(1));
        self.origin.checked_add(ahead).unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400))
    }
}

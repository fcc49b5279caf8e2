//! The language of the black-box tests: the real `atp` binary as child processes, peers that speak frames over TCP, a wire
//! that can be watched, and the histories that a checker reads. Blocking on purpose: a test reads from top to bottom.

pub mod atp;
pub mod crowd;
pub mod history;
pub mod kafka;
pub mod load;
pub mod peer;
pub mod process;
pub mod redis;
pub mod relay;
pub mod verdict;

use std::time::{Duration, Instant};

/// Whatever a test waits for is there within this, or the test fails. No verdict depends on how much earlier.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again until there is an answer; fails loudly after `PATIENCE`.
///
/// # Panics
/// When nothing came in time.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(Instant::now() < end, "waited {PATIENCE:?} in vain for {what}");
        pause(Duration::from_millis(20));
    }
}

/// Between two looks at a condition, so that the one who has to fulfil it gets the processor.
fn pause(time: Duration) {
    std::thread::park_timeout(time);
}

/// The seed of a randomised test: `ATP_TEST_SEED`, else `default`. Printed, so that a failure can be run again.
#[must_use]
pub fn seed(default: u64) -> u64 {
    let seed = std::env::var("ATP_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    println!("seed {seed} (ATP_TEST_SEED={seed} runs it again)");
    seed
}

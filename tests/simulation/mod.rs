//! The simulation: the real `Shard` and `Agent` among a fake network, log, clients, agent processes and a provider that
//! keeps the true bill, all from one seed. One checker per invariant; a seed that fails is replayed by its number.

pub mod check;
pub mod client;
pub mod crowd;
pub mod estimates;
pub mod keepers;
pub mod log;
pub mod net;
pub mod owner;
pub mod partition;
pub mod plan;
pub mod process;
pub mod provider;
pub mod rng;
pub mod sched;
pub mod show;
pub mod tools;
pub mod world;

pub use check::Violation;
pub use world::{Outcome, run};

/// Seeds that ever failed: run first, always.
#[must_use]
pub fn corpus() -> Vec<u64> {
    include_str!("corpus.txt")
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
        .map(|line| line.parse().expect("corpus.txt holds one seed a line"))
        .collect()
}

/// One schedule; a panic of the code under test is a violation too.
#[must_use]
pub fn run_caught(seed: u64, trace: bool) -> Outcome {
    std::panic::catch_unwind(|| run(seed, trace)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
            .unwrap_or_default();
        Outcome { violation: Some(Violation { invariant: "no panic", detail: text }), ..Outcome::default() }
    })
}

//! A few hundred schedules in `cargo test`, the corpus first; the gate of 20,000 runs through the binary `sim`.

use atp_tests::simulation::{corpus, run_caught};

const SCHEDULES: u64 = 300;

fn hold(seed: u64) {
    if let Some(violation) = run_caught(seed, false).violation {
        panic!("seed {seed}: {}: {} (replay: just sim --seed {seed})", violation.invariant, violation.detail);
    }
}

#[test]
fn every_seed_that_ever_failed_holds() {
    corpus().into_iter().for_each(hold);
}

#[test]
fn invariants_hold_in_random_schedules() {
    (1..=SCHEDULES).for_each(hold);
}

#[test]
fn one_seed_twice_is_one_trace() {
    for seed in 1..=20 {
        let (first, second) = (run_caught(seed, false), run_caught(seed, true));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.events, second.events, "seed {seed}");
    }
}

#[test]
fn schedules_are_not_idle() {
    let mut counts = atp_tests::simulation::world::Counts::default();
    (1..=SCHEDULES).for_each(|seed| counts.add(&run_caught(seed, false).counts));
    assert!(
        counts.settled > SCHEDULES && counts.owners > SCHEDULES && counts.void > 0 && counts.unknown > 0,
        "{counts:?}"
    );
    let brokers = counts.partition;
    assert!(
        brokers.epochs > SCHEDULES && brokers.zombies > 0 && brokers.gaps > 0 && brokers.unknown > 0,
        "{brokers:?}"
    );
}

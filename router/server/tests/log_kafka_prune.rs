//! A pruned Kafka log is the same ledger, for who owned it, who joins and who only reads; records that somebody else deleted
//! are missed.
#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests
#![cfg(feature = "kafka")]

mod kafka_support;
mod prune_support;

use atp_core::state::State;
use atp_router::log::prune::{Plan, Wish, plan, prune};
use atp_router::log::{KafkaAddress, KafkaOptions, KafkaShards, Log, LogError, Opened, Source, offline};
use atp_router::verify::offline_verify;
use kafka_support::*;
use prune_support::{Book, DAY, HOUR, WISH, story};
use std::path::Path;

const SHARDS: u32 = 3;

fn shards(address: &KafkaAddress, dir: &Path) -> Result<Vec<Opened>, LogError> {
    let log = KafkaShards::open(&KafkaOptions { shards: SHARDS, ..options(address, dir) }, 1_000)?;
    (0..SHARDS).map(|shard| log.take(shard, "r1", "i1", 1_000, None)).collect()
}

/// The story in a Kafka log, its owners as they stand.
fn told(address: &KafkaAddress, dir: &Path) -> Vec<Opened> {
    let mut opened = shards(address, dir).unwrap();
    let states = opened.iter().map(|one| one.state.clone()).collect();
    let mut write = |shard: u32, position, entry, begins| {
        let one = &mut opened[shard as usize];
        try_add(&one.log, &mut one.log.events(), vec![(position, entry, begins)]).unwrap();
    };
    let mut book = Book::go_on(states, &mut write);
    story(&mut book);
    let states = book.states;
    opened.iter_mut().zip(states).for_each(|(one, state)| one.state = state);
    opened
}

fn hashes(states: impl Iterator<Item = State>) -> Vec<(u64, String)> {
    states.map(|state| (state.position(), state.hash())).collect()
}

/// As it was, for a reader that knows nothing of it.
fn is_whole(address: &KafkaAddress, due: &[(u64, String)]) {
    let source = || Source::kafka(address.clone(), 0).unwrap();
    assert_eq!(hashes(offline::recover_all(&source()).unwrap().into_iter().map(|(state, _)| state)), due);
    let fold = |shard| offline::fold_from_start(&source().shard(shard), None).unwrap().0;
    assert_eq!(hashes((0..SHARDS).map(fold)), due);
    let report = offline_verify(&source()).unwrap();
    assert!(report.ok, "{report:?}");
}

#[test]
fn what_is_left_is_the_same_ledger_and_its_owners_go_on() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let opened = told(&address, dir.path());
    let due = hashes(opened.iter().map(|one| one.state.clone()));
    let source = Source::kafka(address.clone(), 0).unwrap();
    is_whole(&address, &due);

    let keep = plan(&source, Wish { keep_from_ms: Some(HOUR), ..WISH }).unwrap();
    let shown = plan(&source, WISH).unwrap();
    assert!(shown.entries > keep.entries && keep.entries > 0 && keep.shards.iter().all(|s| s.held_by == "age"));
    assert!(shown.shards.iter().all(|shard| shard.held_by == "stream" && shard.entries + 1 == shard.safe), "{shown:?}");
    let done = prune(&source, WISH).unwrap();
    assert_eq!(done, Plan { pruned: true, ..shown });
    is_whole(&address, &due);
    let report = offline_verify(&Source::kafka(address.clone(), 0).unwrap()).unwrap();
    assert_eq!(report.pruned.len(), SHARDS as usize);
    let again = prune(&source, WISH).unwrap();
    assert!(!again.pruned && again.entries == 0, "{again:?}");

    // Owners that were there before it find nothing wrong, also when they have nothing to do.
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    let mut states: Vec<State> = opened.iter().map(|one| one.state.clone()).collect();
    let mut write = |shard: u32, position, entry, begins| {
        let one: &Opened = &opened[shard as usize];
        try_add(&one.log, &mut one.log.events(), vec![(position, entry, begins)]).unwrap();
    };
    let mut book = Book::go_on(std::mem::take(&mut states), &mut write);
    (0..SHARDS).for_each(|shard| book.fill(shard, 2, 2 * DAY + HOUR));
    let due = hashes(book.states.into_iter());
    is_whole(&address, &due);
    opened.into_iter().for_each(|one| Box::new(one.log).close().unwrap());

    // The next owner here, and one that has never seen the log.
    let elsewhere = tempfile::tempdir().unwrap();
    for dir in [dir.path(), elsewhere.path()] {
        let next = shards(&address, dir).unwrap();
        assert!(next.iter().zip(&due).all(|(one, (position, _))| one.state.position() > *position));
        is_whole(&address, &hashes(next.iter().map(|one| one.state.clone())));
        next.into_iter().for_each(|one| Box::new(one.log).close().unwrap());
    }
}

#[test]
fn what_somebody_else_deletes_is_missed() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let opened = told(&address, dir.path());
    drop(opened);
    let source = Source::kafka(address.clone(), 0).unwrap();
    let done = prune(&source, WISH).unwrap();
    let safe = i64::try_from(done.shards[1].safe).unwrap();
    // One more than was noted: offsets run one behind positions here.
    delete_records(&address, 1, safe);
    let refused = |error: String| assert!(error.starts_with("ELOG: ") && error.contains("deleted"), "{error}");
    refused(shards(&address, dir.path()).map(|_| ()).unwrap_err().to_string());
    refused(shards(&address, tempfile::tempdir().unwrap().path()).map(|_| ()).unwrap_err().to_string());
    refused(offline_verify(&source).unwrap_err());
    refused(prune(&source, WISH).unwrap_err().to_string());
}

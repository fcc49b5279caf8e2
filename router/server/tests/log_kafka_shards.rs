//! A log in Kafka of several shards: each partition has an owner of its own, one router may be the owner of some, and what
//! happens to one shard is nothing to the others.
#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests
#![cfg(feature = "kafka")]

mod kafka_support;

use atp_core::record::{Entry, Record};
use atp_router::log::{KafkaAddress, KafkaOptions, KafkaShards, Log, LogError, Opened, Source, init, offline};
use bytes::Bytes;
use kafka_support::*;
use prost::Message;
use std::path::Path;

fn options(address: &KafkaAddress, data_dir: &Path) -> KafkaOptions {
    KafkaOptions { shards: 4, ..kafka_support::options(address, data_dir) }
}

fn router(address: &KafkaAddress, data_dir: &Path) -> Result<KafkaShards, LogError> {
    KafkaShards::open(&options(address, data_dir), 1_000)
}

fn take(shards: &KafkaShards, shard: u32, owner: &str) -> Opened {
    shards.take(shard, owner, "i1", 1_000, None).unwrap()
}

/// An entry that says whose it is.
fn of(shard: u32, n: u64) -> Bytes {
    entry(u64::from(shard) * 1_000_000 + n, 10)
}

/// Appends so many entries behind what is there.
fn add(opened: &mut Opened, shard: u32, count: u64) {
    let from = offline::recover_state(&opened.source).unwrap().0.position() + 1;
    let entries = (from..from + count).map(|position| (position, of(shard, position), false)).collect();
    try_add(&opened.log, &mut opened.log.events(), entries).unwrap();
}

/// Why a shard takes no more.
fn stopped(opened: &Opened, shard: u32, position: u64) -> String {
    match try_add(&opened.log, &mut opened.log.events(), vec![(position, of(shard, position), false)]) {
        Err(LogError::Stopped(why)) => why.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Checks that a shard holds only its own entries, and gives its last position.
fn intact(source: &Source, shard: u32) -> u64 {
    let mut last = 0;
    for item in source.shard(shard).entries(1).unwrap() {
        let (position, bytes) = item.unwrap();
        let records = Entry::decode(bytes.clone()).unwrap().records;
        if matches!(records[0].record, Some(Record::Faster(_))) {
            assert_eq!(bytes, of(shard, position));
        }
        last = position;
    }
    last
}

#[test]
fn routers_share_the_shards_of_a_log() {
    let (one, two, address) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), address());
    let (r1, r2) = (router(&address, one.path()).unwrap(), router(&address, two.path()).unwrap());
    assert_eq!((r1.made().shards, r1.made().log_id), (4, r2.made().log_id));
    let mut owners = [(0, &r1), (1, &r1), (2, &r2)].map(|(shard, router)| (shard, take(router, shard, "r")));
    std::thread::scope(|scope| {
        for (shard, opened) in &mut owners {
            scope.spawn(|| (0..20).for_each(|_| add(opened, *shard, 10)));
        }
    });
    let source = r1.source();
    assert_eq!(source.shards().unwrap(), 4);
    // Genesis, Epoch, the entries; nobody has ever owned shard 3.
    let due = [202, 202, 202, 1];
    assert_eq!([0, 1, 2, 3].map(|shard| intact(&source, shard)), due);
    let states = offline::recover_all(&source).unwrap();
    assert_eq!(states.iter().map(|(state, _)| state.position()).collect::<Vec<_>>(), due);
    let mut counted = [0; 4];
    for item in source.all(vec![1; 4]).unwrap() {
        let (shard, position, _) = item.unwrap();
        counted[shard as usize] += 1;
        assert_eq!(position, counted[shard as usize]);
    }
    assert_eq!(counted, due);
    let beyond = r1.take(4, "r", "i1", 1_000, None).map(|_| ());
    assert!(matches!(beyond, Err(LogError::NoShard { shard: 4, shards: 4 })), "{beyond:?}");
}

#[test]
fn who_loses_a_shard_keeps_the_others() {
    let (one, two, address) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), address());
    let (r1, r2) = (router(&address, one.path()).unwrap(), router(&address, two.path()).unwrap());
    let (mut zero, lost) = (take(&r1, 0, "r1"), take(&r1, 1, "r1"));
    let mut taken = take(&r2, 1, "r2");
    let why = failure(&mut lost.log.events()).to_string();
    assert!(why.contains("router r2 (incarnation i1) has taken over shard 1"), "{why}");
    add(&mut zero, 0, 5);
    add(&mut taken, 1, 5);

    // What it can't explain ends the ownership of that shard, which the same router may take again.
    stranger_at(&address, 0, Some(&[1, 9]), b"?");
    let why = stopped(&zero, 0, zero.state.position() + 6);
    assert!(why.contains("stepped down from shard 0"), "{why}");
    add(&mut taken, 1, 5);
    assert!(Box::new(zero.log).close().is_err());
    let mut again = take(&r1, 0, "r1");
    add(&mut again, 0, 5);
    // Genesis, two Epochs, 10 entries; of shard 0 perhaps the one that nobody was told of.
    assert!((13..=14).contains(&intact(&r1.source(), 0)));
    assert_eq!(intact(&r1.source(), 1), 13);
}

#[test]
fn the_data_dir_is_given_back_with_the_last_shard() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let shards = router(&address, dir.path()).unwrap();
    let (zero, one) = (take(&shards, 0, "r1"), take(&shards, 1, "r1"));
    drop(shards);
    Box::new(zero.log).close().unwrap();
    assert!(matches!(router(&address, dir.path()), Err(LogError::InUse { .. })));
    Box::new(one.log).close().unwrap();
    router(&address, dir.path()).unwrap();
}

#[test]
fn each_shard_recovers_behind_its_own_checkpoint() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let shards = router(&address, dir.path()).unwrap();
    let mut due = [None; 2];
    for shard in 0..2 {
        let mut opened = take(&shards, shard, "r1");
        add(&mut opened, shard, 3 + u64::from(shard));
        let state = offline::recover_state(&opened.source).unwrap().0;
        let first = state.position() + 1;
        let pieces = (first..).zip(state.to_checkpoint(shard)).map(|(position, piece)| {
            let entry = Entry { at_ms: 1_000, records: vec![Record::Checkpoint(piece).into()] };
            (position, entry.encode_to_vec().into(), position == first)
        });
        try_add(&opened.log, &mut opened.log.events(), pieces.collect()).unwrap();
        due[shard as usize] = Some(first);
        Box::new(opened.log).close().unwrap();
    }
    drop(shards);
    let shards = router(&address, dir.path()).unwrap();
    for shard in 0..2 {
        let opened = take(&shards, shard, "r1");
        let found = offline::recover_state(&opened.source).unwrap();
        assert_eq!(found.1.checkpoint, due[shard as usize]);
        let whole = offline::fold_from_start(&opened.source, None).unwrap().0;
        assert_eq!((opened.state.hash(), opened.state.position()), (whole.hash(), whole.position()));
    }
    assert_eq!(due, [Some(6), Some(7)]);
}

#[test]
fn records_that_are_gone_from_any_partition_are_missed() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let refused = || match router(&address, dir.path()) {
        Err(error @ LogError::NotThisLog { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let shards = router(&address, dir.path()).unwrap();
    let mut opened = take(&shards, 2, "r1");
    add(&mut opened, 2, 3);
    Box::new(opened.log).close().unwrap();
    delete_records(&address, 2, 2);
    // Also by a router that has looked at the log before.
    let late = shards.take(2, "r1", "i1", 1_000, None).map(|_| ()).unwrap_err().to_string();
    assert!(late.starts_with("ELOG") && late.contains("begins at offset 2"), "{late}");
    let mut three = take(&shards, 3, "r1");
    add(&mut three, 3, 1);
    Box::new(three.log).close().unwrap();
    drop(shards);
    assert!(refused().contains("begins at offset 2"), "{}", refused());

    delete_topic(&address);
    make_topic(&address, 3, &[("retention.ms", "-1"), ("max.message.bytes", "40000000")]);
    let elsewhere = tempfile::tempdir().unwrap();
    let fewer = router(&address, elsewhere.path()).unwrap_err().to_string();
    assert!(fewer.starts_with("ELOG") && fewer.contains("3 partitions, and the log has 4 shards"), "{fewer}");
    assert!(refused().contains("acknowledged records are gone"), "{}", refused());
}

#[test]
fn a_partition_that_ends_before_what_is_remembered_of_it_is_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let shards = router(&address, dir.path()).unwrap();
    let mut opened = take(&shards, 1, "r1");
    add(&mut opened, 1, 2);
    Box::new(opened.log).close().unwrap();
    drop(shards);
    let file = dir.path().join("kafka-log.json");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("\"end\": 4"), "{text}");
    std::fs::write(&file, text.replace("\"end\": 4", "\"end\": 5")).unwrap();
    let error = router(&address, dir.path()).unwrap_err().to_string();
    assert!(error.contains("partition 1 ends at offset 4") && error.contains("remembers 5"), "{error}");
}

#[test]
fn a_log_of_64_shards_is_made_and_found_again() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let options = KafkaOptions { shards: 64, ..options(&address, dir.path()) };
    let made = init(&options, 1_000).unwrap();
    assert!(made.topic_made && made.log_made && made.shards == 64, "{made:?}");
    let again = init(&options, 1_000).unwrap();
    assert!(!again.log_made && again.log_id == made.log_id, "{again:?}");
    let other = KafkaOptions { shards: 32, ..options };
    let error = init(&other, 1_000).unwrap_err().to_string();
    assert!(error.contains("the log has 64 shards, shards.count is 32"), "{error}");
    assert_eq!(init(&KafkaOptions { exact: false, ..other }, 1_000).unwrap().shards, 64, "nobody asked for a number");
}

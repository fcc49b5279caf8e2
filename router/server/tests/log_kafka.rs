//! The log in Kafka among strangers: topics that aren't the log's any more, zombies, holes, and what an owner can't explain.
//! Each ends in a refusal or a step down, never in fresh budgets.
#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests
#![cfg(feature = "kafka")]

mod kafka_support;

use atp_core::record::{Entry, Epoch, Record};
use atp_router::log::{Event, Guarantee, KafkaAddress, KafkaOptions, Log, LogError, Opened, init, offline};
use bytes::Bytes;
use kafka_support::*;
use prost::Message;
use std::path::Path;
use std::time::Instant;

const DAYS: &[(&str, &str)] = &[("retention.ms", "604800000")];

/// A log with one entry of an owner that has closed it. Offsets: 0 Genesis, 1 Epoch, 2 the entry.
fn begun(address: &KafkaAddress, data_dir: &Path) -> [u8; 16] {
    let mut opened = open(address, data_dir, "r1").unwrap();
    add(&mut opened, 3, &[entry(1, 10)]);
    let log_id = opened.state.log_id().to_vec().try_into().unwrap();
    Box::new(opened.log).close().unwrap();
    log_id
}

fn try_add_all(opened: &mut Opened, from: u64, entries: &[Bytes]) -> Result<bool, LogError> {
    let entries = (from..).zip(entries).map(|(position, entry)| (position, entry.clone(), false)).collect();
    try_add(&opened.log, &mut opened.log.events(), entries)
}

fn add(opened: &mut Opened, from: u64, entries: &[Bytes]) {
    try_add_all(opened, from, entries).unwrap();
}

fn stopped(opened: &mut Opened, from: u64) -> String {
    match try_add_all(opened, from, &[entry(9, 9)]) {
        Err(LogError::Stopped(why)) => why.to_string(),
        other => panic!("{other:?}"),
    }
}

// ---- the same log or none -----------------------------------------------------------------------------------------

#[test]
fn init_makes_topic_and_log_once() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let made = init(&options(&address, dir.path()), 1_000).unwrap();
    assert!(made.topic_made && made.log_made && !made.replicated && made.shards == 1, "{made:?}");
    let again = init(&options(&address, dir.path()), 2_000).unwrap();
    assert!(!again.topic_made && !again.log_made && again.log_id == made.log_id, "{again:?}");
    // Another machine joins.
    let other = tempfile::tempdir().unwrap();
    assert_eq!(init(&options(&address, other.path()), 3_000).unwrap().log_id, made.log_id);
    let opened = open(&address, other.path(), "r2").unwrap();
    assert_eq!(opened.state.log_id()[..], made.log_id);
    assert_eq!((opened.state.position(), opened.guarantee), (2, Guarantee::Single));
}

#[test]
fn each_partition_of_a_new_log_begins_with_its_genesis() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let options = KafkaOptions { shards: 3, ..options(&address, dir.path()) };
    let made = init(&options, 1_000).unwrap();
    assert_eq!(made.shards, 3);
    assert_eq!(init(&options, 2_000).unwrap().log_id, made.log_id);
    for shard in 0..3 {
        let source = atp_router::log::Source::kafka(address.clone(), shard).unwrap();
        let (state, _) = offline::fold_from_start(&source, None).unwrap();
        assert_eq!((&state.log_id()[..], state.genesis().shards, state.position()), (&made.log_id[..], 3, 1));
    }
    let error = refused(&address, dir.path());
    assert!(error.contains("3 shards") || error.contains("3 partitions"), "{error}");
}

#[test]
fn a_topic_that_was_deleted_is_missed() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    delete_topic(&address);
    let error = refused(&address, dir.path());
    assert!(error.contains("there is no such topic"), "{error}");
    assert!(init(&options(&address, dir.path()), 1_000).is_err(), "init makes no other one in its place");
}

#[test]
fn a_topic_that_was_made_anew_is_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    delete_topic(&address);
    let elsewhere = tempfile::tempdir().unwrap();
    begun(&address, elsewhere.path());
    let error = refused(&address, dir.path());
    assert!(error.contains("made anew"), "{error}");

    // Empty is no better.
    delete_topic(&address);
    make_topic(&address, 1, &[]);
    let error = refused(&address, dir.path());
    assert!(error.contains("it is empty"), "{error}");
}

#[test]
fn another_logs_topic_is_refused() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (address, other) = (address(), address());
    let mine = begun(&address, dir.path());
    let theirs = begun(&other, elsewhere.path());
    let error = refused(&other, dir.path());
    let hex = atp_core::record::hex;
    assert!(error.contains(&hex(&mine)) && error.contains(&hex(&theirs)), "{error}");
    assert!(!dir.path().join("log").exists());
    open(&address, dir.path(), "r1").unwrap();
}

#[test]
fn a_topic_of_somebody_else_is_refused_and_left_alone() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let good = init(&options(&address, tempfile::tempdir().unwrap().path()), 1_000);
    good.unwrap();
    delete_topic(&address);
    let settings = [
        ("retention.ms", "-1"),
        ("max.message.bytes", "34603008"),
        ("cleanup.policy", "delete"),
        ("unclean.leader.election.enable", "false"),
    ];
    make_topic(&address, 1, &settings);
    stranger(&address, None, b"a message of another program");
    let error = refused(&address, dir.path());
    assert!(error.contains("no log's beginning"), "{error}");
}

#[test]
fn records_that_were_deleted_are_missed() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    delete_records(&address, 0, 2);
    let error = refused(&address, dir.path());
    assert!(error.contains("begins at offset 2"), "{error}");
    // Also by a machine that remembers nothing, and by readers.
    refused(&address, tempfile::tempdir().unwrap().path());
    let source = atp_router::log::Source::kafka(address, 0).unwrap();
    let error = offline::fold_from_start(&source, None).map(|_| ()).unwrap_err();
    assert!(matches!(error, LogError::NotThisLog { .. }), "{error}");
}

#[test]
fn partitions_that_were_added_are_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    add_partitions(&address, 3);
    let error = refused(&address, dir.path());
    assert!(error.contains("3 partitions, and the log has 1 shards"), "{error}");
}

#[test]
fn a_log_that_ends_before_what_is_remembered_is_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    let file = dir.path().join("kafka-log.json");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("\"end\": 3"), "{text}");
    // As if the topic were an older copy.
    std::fs::write(&file, text.replace("\"end\": 3", "\"end\": 4")).unwrap();
    let error = refused(&address, dir.path());
    assert!(error.contains("ends at offset 3") && error.contains("remembers 4"), "{error}");
}

#[test]
fn a_topic_that_would_lose_entries_is_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    make_topic(&address, 1, DAYS);
    let error = refused(&address, dir.path());
    for setting in ["retention.ms is 604800000", "max.message.bytes is 1048588; set it to"] {
        assert!(error.contains(setting), "{error}");
    }
    // One broker has to be wanted in so many words.
    let two = KafkaOptions { single_broker: false, ..options(&address, dir.path()) };
    let error = init(&two, 1_000).unwrap_err().to_string();
    assert!(error.contains("log.kafka.single_broker: true"), "{error}");
    let unmade = KafkaOptions { single_broker: false, ..options(&kafka_support::address(), dir.path()) };
    let error = init(&unmade, 1_000).unwrap_err().to_string();
    assert!(error.contains("three brokers") && error.contains("log.kafka.single_broker: true"), "{error}");
}

#[test]
fn a_newer_versions_log_is_refused() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    stranger(&address, Some(&[2, 3, 0, 0]), b"");
    let error = refused(&address, dir.path());
    assert!(error.contains("newer version"), "{error}");
}

#[test]
fn brokers_that_are_away_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let address = KafkaAddress { brokers: vec![nobody.to_string()], topic: "t".into(), ..KafkaAddress::default() };
    let error = open(&address, dir.path(), "r1").err().unwrap().to_string();
    assert!(error.contains(&nobody.to_string()), "{error}");
}

// ---- what others write --------------------------------------------------------------------------------------------

#[test]
fn a_zombies_entries_dont_count_and_the_owner_goes_on() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    let mut owner = open(&address, dir.path(), "r1").unwrap();
    // The first owner's second entry was under way all the time.
    let late = entry(77, 10);
    stranger(&address, Some(&header(3, 1, 2, &[])), &late);
    let next = owner.state.position() + 1;
    add(&mut owner, next, &[entry(2, 10), entry(3, 10)]);
    stranger(&address, Some(&header(3, 1, 3, &[])), &late);
    add(&mut owner, next + 2, &[entry(4, 10)]);

    let read: Vec<_> = owner.source.entries(1).unwrap().map(Result::unwrap).collect();
    let tail: Vec<_> = read[read.len() - 3..].iter().map(|(_, entry)| entry.clone()).collect();
    assert_eq!(tail, [entry(2, 10), entry(3, 10), entry(4, 10)]);
    assert!(read.iter().all(|(_, found)| *found != late));
}

#[test]
fn behind_a_hole_nothing_counts_until_the_next_owner() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    // The owner died while its second entry got lost and its third did not.
    stranger(&address, Some(&header(3, 1, 3, &[])), &entry(3, 10));
    stranger(&address, Some(&header(3, 1, 2, &[])), &entry(2, 10));
    // Its first came twice before.
    stranger(&address, Some(&header(3, 1, 1, &[])), &entry(1, 10));
    let mut owner = open(&address, dir.path(), "r1").unwrap();
    assert_eq!(owner.state.position(), 4, "Genesis, Epoch, one entry, Epoch");
    add(&mut owner, 5, &[entry(5, 10)]);
    assert_eq!(offline::fold_from_start(&owner.source, None).unwrap().0.position(), 5);
}

#[test]
fn an_owner_steps_down_for_what_it_cant_explain() {
    for (what, message) in [("no older owner", None), ("own", Some(3))] {
        let (dir, address) = (tempfile::tempdir().unwrap(), address());
        begun(&address, dir.path());
        let mut owner = open(&address, dir.path(), "r1").unwrap();
        // Its own epoch is 3.
        let header = message.map(|kind| header(kind, 3, 9, &[]));
        stranger(&address, header.as_deref(), b"?");
        let error = stopped(&mut owner, 5);
        assert!(error.contains("stepped down") && error.contains(what), "{error}");
        assert!(Box::new(owner.log).close().is_err());
        // The next owner reads over it.
        let mut owner = open(&address, dir.path(), "r1").unwrap();
        let next = owner.state.position() + 1;
        add(&mut owner, next, &[entry(5, 10)]);
    }
}

#[test]
fn an_idle_owner_notices_its_successor_and_a_topic_that_is_gone() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let log_id = begun(&address, dir.path());
    let owner = open(&address, dir.path(), "r1").unwrap();
    let record =
        Epoch { log_id: Bytes::copy_from_slice(&log_id), shard: 0, owner: "r9".into(), incarnation: "z".into() };
    let epoch = Entry { at_ms: 1, records: vec![Record::Epoch(record).into()] };
    stranger(&address, Some(&header(2, 0, 0, &log_id)), &epoch.encode_to_vec());
    let error = failure(&mut owner.log.events()).to_string();
    assert!(error.contains("router r9 (incarnation z) has taken over shard 0 at offset 4"), "{error}");
    drop(owner);

    // Its time lies before what stands there: that is no corruption.
    let owner = open(&address, dir.path(), "r1").unwrap();
    assert_eq!((owner.state.position(), owner.state.logged_ms()), (6, 1_000));
    delete_topic(&address);
    let error = failure(&mut owner.log.events());
    assert!(matches!(*error, LogError::NotThisLog { .. }), "{error}");
}

#[test]
fn an_owner_that_is_asked_looks_for_a_successor() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let log_id = begun(&address, dir.path());
    let mut owner = open(&address, dir.path(), "r1").unwrap();
    let mut events = owner.log.events();
    let mut is_alone = |log: &dyn Log| {
        let asked = Instant::now();
        assert!(log.look());
        until("answer", || match events.try_next() {
            Some(Event::Alone { at }) if at >= asked => Some(true),
            Some(Event::Failed(_)) => Some(false),
            _ => None,
        })
    };
    assert!(is_alone(&owner.log));
    let next = owner.state.position() + 1;
    add(&mut owner, next, &[entry(1, 10)]);
    assert!(is_alone(&owner.log));
    stranger(&address, Some(&header(2, 0, 0, &log_id)), &[]);
    assert!(!is_alone(&owner.log));
}

#[test]
fn an_entry_that_no_broker_confirms_is_unknown() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    let mut owner = open(&address, dir.path(), "r1").unwrap();
    delete_topic(&address);
    let error = stopped(&mut owner, 3);
    // Unless the look that an idle owner takes came first.
    assert!(error.contains("no broker confirmed entry 3") || error.starts_with("ELOG"), "{error}");
    while let Some(event) = owner.log.events().try_next() {
        if matches!(event, Event::Failed(_)) {
            return;
        }
    }
    panic!("the owner isn't told");
}

#[test]
fn a_checkpoint_that_isnt_where_it_is_remembered_costs_time_only() {
    let (dir, address) = (tempfile::tempdir().unwrap(), address());
    begun(&address, dir.path());
    let file = dir.path().join("kafka-log.json");
    let text = std::fs::read_to_string(&file).unwrap();
    let wrong = [
        r#"{"offset": 2, "position": 3, "epoch": 1, "n": 1}"#,
        r#"{"offset": 2, "position": 7, "epoch": 1, "n": 1}"#,
        r#"{"offset": 900, "position": 3, "epoch": 1, "n": 1}"#,
        r#"{"offset": 1, "position": 2, "epoch": 1, "n": 5}"#,
    ];
    for (round, mark) in (0..).zip(wrong) {
        std::fs::write(&file, text.replace("null", mark)).unwrap();
        let opened = open(&address, dir.path(), "r1").unwrap();
        assert_eq!(opened.state.position(), 4 + round, "{mark}");
        assert!(opened.report.iter().any(|fact| fact.contains("reading from the beginning")), "{:?}", opened.report);
    }
}

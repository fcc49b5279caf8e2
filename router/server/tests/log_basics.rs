//! The local log as its users see it: append, read, close, open again, roll over, lock, fail.

#![allow(clippy::unwrap_used, reason = "what fails in here fails the test")]

mod log_support;

use atp_core::message::LogRoom;
use atp_router::log::{Durability, ENTRY_BYTES_MAX, Event, LocalLog, LogError, Options, Reader};
use log_support::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

#[test]
fn what_was_appended_is_read_back_after_close_and_open() {
    let dir = tempfile::tempdir().unwrap();
    let (log, recovered) = LocalLog::open(options(dir.path())).unwrap();
    assert!(recovered.new);
    assert_eq!(recovered.positions[0], 0);
    let id = log.log_id();
    for position in 1..=20 {
        add(&log, position, 300);
    }
    log.close().unwrap();
    let (log, recovered) = LocalLog::open(options(dir.path())).unwrap();
    assert_eq!((recovered.positions[0], recovered.torn_bytes, recovered.new), (20, 0, false));
    assert!(recovered.sealed);
    assert_eq!(log.log_id(), id);
    add(&log, 21, 10);
    assert_eq!(intact(&read(dir.path()).unwrap()), 21);
    assert_eq!(Reader::open(dir.path()).unwrap().log_id().unwrap(), Some(id));
}

#[test]
fn reading_begins_anywhere_and_ends_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let mut next = 1;
    for n in 1..=60 {
        let entries = (next..next + n % 5 + 1).map(|p| (p, entry(p, 2000), false)).collect();
        next += n % 5 + 1;
        add_all(&log, entries);
    }
    let last = next - 1;
    let reader = Reader::open(dir.path()).unwrap();
    for from in 1..=last {
        let (position, bytes) = reader.entries(from).next().unwrap().unwrap();
        assert_eq!((position, bytes), (from, entry(from, 2000)));
        let upto = (from + 3).min(last);
        assert_eq!(reader.entries_between(from, upto).count() as u64, upto - from + 1);
    }
    assert_eq!(reader.entries(last + 1).count(), 0);
    assert_eq!(reader.entries_between(5, 4).count(), 0);
    assert!(matches!(reader.entries_between(1, last + 1).last(), Some(Err(LogError::Missing { .. }))));
}

#[test]
fn a_block_that_fills_its_segment_stays_and_one_byte_more_begins_the_next() {
    for (more, number) in [(0, 2), (1, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let log = open(dir.path());
        until("spare", || log.spares_ready() == 1);
        add(&log, 1, 100); // rolls into segment 2, the first zero-filled one
        until("spare", || log.spares_ready() == 1);
        let stands =
            blocks(&std::fs::read(segment(dir.path(), 2)).unwrap()).iter().map(|(_, n)| *n as u64).sum::<u64>();
        // A page for the seal stays free.
        let fits = (64 << 10) - stands - PAGE - HEADER - 4;
        add(&log, 2, usize::try_from(fits).unwrap() + more);
        let bytes = std::fs::read(segment(dir.path(), number)).unwrap();
        let (at, _) = blocks(&bytes).into_iter().find(|(_, extent)| *extent > 4096).unwrap();
        assert_eq!(at == 0, number == 3, "{more} bytes more than fit");
        assert_eq!(intact(&read(dir.path()).unwrap()), 2);
    }
}

#[test]
fn an_entry_of_the_limit_is_taken_and_one_byte_more_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    add(&log, 1, ENTRY_BYTES_MAX);
    let too_big = log.try_append(&mut vec![(2, entry(2, ENTRY_BYTES_MAX + 1), false)]);
    assert!(matches!(too_big, Err(LogError::EntryTooBig { position: 2, .. })));
    add(&log, 2, 10);
    log.close().unwrap();
    let log = open(dir.path());
    add(&log, 3, 100_000);
    assert_eq!(intact(&read(dir.path()).unwrap()), 3);
}

#[test]
fn many_segments_are_read_as_one_log_and_a_missing_one_is_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    for position in 1..=100 {
        until("spare", || log.spares_ready() == 1);
        add(&log, position, 9000);
    }
    log.close().unwrap();
    assert!(segments(dir.path()).len() > 10);
    assert_eq!(intact(&read(dir.path()).unwrap()), 100);
    std::fs::remove_file(segment(dir.path(), 5)).unwrap();
    assert!(matches!(read(dir.path()), Err(LogError::Corrupt { .. })));
}

#[test]
fn a_second_router_is_refused_by_name_of_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let error = LocalLog::open(options(dir.path())).unwrap_err();
    assert!(matches!(error, LogError::InUse { .. }));
    let text = error.to_string();
    assert!(text.contains(&dir.path().display().to_string()) && text.contains("another router"), "{text}");
    log.close().unwrap();
    open(dir.path());
}

#[test]
fn options_and_directories_that_cannot_be_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (bytes, good) in [(16 << 10, true), ((16 << 10) - 4096, false), ((16 << 10) + 1, false)] {
        let opened = LocalLog::open(Options { segment_bytes: bytes, ..Options::new(dir.path()) });
        assert_eq!(opened.is_ok(), good, "{bytes}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Reader::open(empty.path()), Err(LogError::NoLog { .. })));
    assert!(matches!(Reader::open(empty.path().join("nowhere")), Err(LogError::NoLog { .. })));
}

#[test]
fn a_segment_of_another_log_is_refused() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&one, &other] {
        let log = open(dir.path());
        until("spare", || log.spares_ready() == 1);
        add(&log, 1, 10);
        log.close().unwrap();
    }
    std::fs::copy(segment(other.path(), 2), segment(one.path(), 2)).unwrap();
    assert!(matches!(read(one.path()), Err(LogError::OtherLog { .. })));
    assert!(matches!(LocalLog::open(options(one.path())), Err(LogError::OtherLog { .. })));
}

#[test]
fn a_failed_sync_stops_the_log_for_good() {
    for fault in ["sync", "write"] {
        let (dir, disk) = (tempfile::tempdir().unwrap(), Arc::new(Faulty::default()));
        let (log, _) = LocalLog::open_on(options(dir.path()), disk.clone()).unwrap();
        let mut events = log.events();
        until("spare", || log.spares_ready() == 1);
        add(&log, 1, 100); // takes the spare, so that the next one is under way ...
        until("spare", || log.spares_ready() == 1); // ... and now nothing is
        let flag = if fault == "sync" { &disk.sync_fails } else { &disk.write_fails };
        flag.store(true, Ordering::SeqCst);
        log.try_append(&mut vec![(2, entry(2, 100), false)]).unwrap();
        let mut told = Vec::new();
        until("failure", || {
            told.extend(events.try_next());
            matches!(told.last(), Some(Event::Failed(_)))
        });
        assert!(!told.iter().any(|e| matches!(e, Event::Durable { position: 2 })));
        flag.store(false, Ordering::SeqCst);
        let refused = log.try_append(&mut vec![(3, entry(3, 100), false)]);
        assert!(matches!(refused, Err(LogError::Stopped(_))), "{refused:?}");
        assert!(matches!(log.close(), Err(LogError::Stopped(_))));
        assert_eq!(disk.writes_after_failure.load(Ordering::SeqCst), 0, "nothing is written after a failed {fault}");
        assert_eq!(disk.syncs_after_failure.load(Ordering::SeqCst), 0, "a failed {fault} is not retried");
        // A new process reads what it finds, and makes it durable before it goes on.
        let (log, recovered) = LocalLog::open(options(dir.path())).unwrap();
        assert!(recovered.positions[0] >= 1);
        add(&log, recovered.positions[0] + 1, 10);
        assert_eq!(intact(&read(dir.path()).unwrap()), recovered.positions[0] + 1);
    }
}

#[test]
fn the_low_marks_come_and_go_with_the_free_disk() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Arc::new(Faulty::default()));
    let options = Options { segment_bytes: 8 << 20, ..Options::new(dir.path()) };
    let (log, _) = LocalLog::open_on(options, disk.clone()).unwrap();
    until("spare", || log.spares_ready() == 1);
    let mut events = log.events();
    let mut wait_for = |free: u64, room| {
        disk.free.store(free + 1, Ordering::SeqCst);
        until("low mark", || events.try_next().is_some_and(|e| matches!(e, Event::Room(now) if now == room)));
    };
    wait_for((16 << 20) - 1, LogRoom::Low);
    wait_for(16 << 20, LogRoom::Enough);
    wait_for(0, LogRoom::Low);
    add(&log, 1, 3 << 20);
    disk.free.store(1, Ordering::SeqCst);
    add(&log, 2, 3 << 20);
    until("the last mark", || events.try_next().is_some_and(|e| matches!(e, Event::Room(LogRoom::Last))));
    add(&log, 3, 1 << 20);
    disk.free.store(0, Ordering::SeqCst);
    until("room again", || events.try_next().is_some_and(|e| matches!(e, Event::Room(LogRoom::Enough))));
    assert_eq!(intact(&read(dir.path()).unwrap()), 3);
}

#[test]
fn a_reader_beside_the_writer_sees_a_whole_prefix_at_every_moment() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let path = dir.path().to_path_buf();
    let reader = std::thread::spawn(move || {
        let mut seen = 0;
        while seen < 300 {
            let entries = read(&path).unwrap();
            let now = intact(&entries);
            assert!(now >= seen, "entries that were there are gone");
            seen = now;
        }
    });
    for position in 1..=300 {
        add(&log, position, 5000);
    }
    reader.join().unwrap();
}

#[test]
fn async_logs_are_whole_after_close() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { durability: Durability::Async, ..options(dir.path()) };
    let (log, _) = LocalLog::open(options).unwrap();
    for position in 1..=50 {
        add(&log, position, 3000);
    }
    log.close().unwrap();
    assert_eq!(intact(&read(dir.path()).unwrap()), 50);
}

#[tokio::test]
async fn appends_wait_for_room_in_the_queue_and_events_come_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = LocalLog::open(Options::new(dir.path())).unwrap();
    let mut events = log.events();
    for position in 1..=40 {
        log.append(vec![(position, entry(position, 1 << 20), false)]).await.unwrap();
    }
    let mut durable = 0;
    while durable < 40 {
        if let Some(Event::Durable { position }) = events.next().await {
            assert!(position > durable);
            durable = position;
        }
    }
    tokio::task::spawn_blocking(|| log.close()).await.unwrap().unwrap();
    while let Some(event) = events.next().await {
        assert!(!matches!(event, Event::Failed(_)));
    }
}

#[test]
fn a_block_of_a_newer_format_is_refused_and_never_cut() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    (1..=3).for_each(|position| add(&log, position, 100));
    log.close().unwrap();
    let path = segment(dir.path(), 1);
    let bytes = std::fs::read(&path).unwrap();
    let blocks = blocks(&bytes);
    // The next format, in a block with others behind it and in the last one, which could be taken for a torn tail.
    for (at, _) in [blocks[1], blocks[blocks.len() - 1]] {
        let mut newer = bytes.clone();
        newer[at + 4] = 3;
        let checksum = crc32c::crc32c(&newer[at..at + 76]);
        newer[at + 76..at + 80].copy_from_slice(&checksum.to_le_bytes());
        std::fs::write(&path, &newer).unwrap();
        let error = LocalLog::open(options(dir.path())).map(|_| ()).unwrap_err();
        let read = Reader::open(dir.path()).unwrap().entries(1).find_map(Result::err).unwrap();
        for error in [error, read] {
            assert!(matches!(error, LogError::Newer { format: 3, offset, .. } if offset == at as u64), "{error}");
            let text = error.to_string();
            assert!(text.contains("newer version") && text.contains("formats 1 and 2"), "{text}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), newer, "nothing was cut");
    }
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(intact(&read(dir.path()).unwrap()), 3);
}

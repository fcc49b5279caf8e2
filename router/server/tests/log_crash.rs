//! What a crash, a flipped bit or a full disk may leave, and what recovery makes of it: an acknowledged prefix or a named
//! corruption, never a lost and never an invented entry.

#![allow(clippy::unwrap_used, reason = "what fails in here fails the test")]

mod log_support;

use atp_core::message::LogRoom;
use atp_core::record::{AnyRecord, Checkpoint, Entry, Epoch, Genesis, Record};
use atp_router::log::{Event, LocalLog, LogError, Options, Reader, Source, offline};
use bytes::Bytes;
use log_support::*;
use prost::Message;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// A closed log in segment 2 of its directory, and how many entries it has.
fn sealed(dir: &Path) -> u64 {
    let log = open(dir);
    until("spare", || log.spares_ready() == 1);
    for (position, bytes) in [(1, 40), (2, 5000), (3, 100), (4, 60)] {
        add(&log, position, bytes);
    }
    log.close().unwrap();
    4
}

/// Opens a damaged copy. `None`: recovery said that it is corrupt, and changed nothing.
fn recovered(dir: &Path) -> Option<u64> {
    let before: Vec<_> = segments(dir).iter().map(|path| std::fs::read(path).unwrap()).collect();
    match LocalLog::open(options(dir)) {
        Ok((log, recovered)) => {
            log.close().unwrap();
            let last = intact(&read(dir).unwrap());
            assert_eq!(last, recovered.positions[0]);
            Some(last)
        }
        Err(LogError::Corrupt { file, .. }) => {
            assert!(file.starts_with(dir));
            let after: Vec<_> = segments(dir).iter().map(|path| std::fs::read(path).unwrap()).collect();
            assert!(before == after, "corruption is reported, not repaired");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn every_flipped_bit_of_a_sealed_log_is_harmless_or_called_corruption() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let all = sealed(dir.path());
    let bytes = std::fs::read(segment(dir.path(), 2)).unwrap();
    let blocks = blocks(&bytes);
    let (seal, _) = *blocks.last().unwrap();
    // The bytes that say something: all headers and bodies, and the edges of what is between.
    let mut offsets = Vec::new();
    for (at, extent) in &blocks {
        let body = u32::from_le_bytes(bytes[at + 64..at + 68].try_into().unwrap()) as usize;
        offsets.extend((*at..at + 80 + body.min(120)).chain([at + 80 + body - usize::from(body > 0), at + extent - 1]));
    }
    copy(dir.path(), work.path());
    let victim = std::fs::OpenOptions::new().write(true).open(segment(work.path(), 2)).unwrap();
    let mut corrupt = 0;
    for offset in offsets {
        for bit in 0..8 {
            victim.write_all_at(&[bytes[offset] ^ (1 << bit)], offset as u64).unwrap();
            let read_back = read(work.path());
            victim.write_all_at(&[bytes[offset]], offset as u64).unwrap();
            let Ok(entries) = read_back else {
                corrupt += 1;
                assert!(offset < seal, "the seal itself guards nothing");
                continue;
            };
            assert_eq!(intact(&entries), all, "offset {offset} bit {bit}");
        }
    }
    assert!(corrupt > 1000);
    // Opening to write agrees with reading; one bit of each byte, as it does more.
    for offset in blocks.iter().flat_map(|(at, _)| [*at, at + 30, at + 44, at + 70, at + 79, at + 84]) {
        copy(dir.path(), work.path());
        let mut flipped = bytes.clone();
        flipped[offset] ^= 4;
        std::fs::write(segment(work.path(), 2), &flipped).unwrap();
        let found = recovered(work.path());
        assert!(found == Some(all) || found.is_none() && offset < seal, "offset {offset}: {found:?}");
    }
}

#[test]
fn every_prefix_of_a_sealed_log_is_a_log_of_whole_blocks() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let all = sealed(dir.path());
    let bytes = std::fs::read(segment(dir.path(), 2)).unwrap();
    let ends: Vec<usize> = blocks(&bytes)
        .iter()
        .map(|(at, _)| at + 80 + u32::from_le_bytes(bytes[at + 64..at + 68].try_into().unwrap()) as usize)
        .collect();
    copy(dir.path(), work.path());
    // Shortened from its end, byte by byte.
    let victim = std::fs::OpenOptions::new().write(true).open(segment(work.path(), 2)).unwrap();
    for length in (0..=ends.last().unwrap() + 100).rev() {
        victim.set_len(length as u64).unwrap();
        let whole = ends.iter().filter(|end| **end <= length).count() as u64;
        assert_eq!(intact(&read(work.path()).unwrap()), whole.min(all), "length {length}");
    }
    for length in ends.iter().flat_map(|end| [end - 1, *end, end + 1]).chain([0, 1, 79, 80, 4095, 4096, 4097]) {
        copy(dir.path(), work.path());
        std::fs::write(segment(work.path(), 2), &bytes[..length]).unwrap();
        let whole = ends.iter().filter(|end| **end <= length).count() as u64;
        assert_eq!(recovered(work.path()), Some(whole.min(all)), "length {length}");
    }
}

/// The log as it stands while entry 3 of many pages is the last, unsealed block: its bytes, that block, all of its pages.
fn with_large_last_block(dir: &Path) -> (Vec<u8>, usize, usize) {
    let log = open(dir);
    until("spare", || log.spares_ready() == 1);
    add(&log, 1, 100);
    add(&log, 2, 100);
    add(&log, 3, 7 * 4096);
    log.close().unwrap();
    let mut bytes = std::fs::read(segment(dir, 2)).unwrap();
    let blocks = blocks(&bytes);
    let (at, extent) = *blocks.iter().find(|(_, extent)| *extent > 7 * 4096).unwrap();
    // Whatever sealed it came later.
    bytes[at + extent..].fill(0);
    (bytes, at, extent / 4096)
}

#[test]
fn every_subset_of_the_last_blocks_pages_is_the_torn_tail_and_a_second_crash_changes_nothing() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (bytes, at, pages) = with_large_last_block(dir.path());
    assert_eq!(pages, 8);
    for subset in 0..1_u32 << pages {
        copy(dir.path(), work.path());
        let mut image = bytes.clone();
        for page in (0..pages).filter(|page| subset & (1 << page) == 0) {
            image[at + page * 4096..at + (page + 1) * 4096].fill(0);
        }
        std::fs::write(segment(work.path(), 2), &image).unwrap();
        let due = if subset + 1 == 1 << pages { 3 } else { 2 };
        let (log, first) = LocalLog::open(options(work.path())).unwrap();
        assert_eq!(first.positions[0], due, "subset {subset:b}");
        assert_eq!(first.torn_bytes > 0, subset != 0 && due == 2, "subset {subset:b}: {:?}", first.report);
        drop(log);
        // What was cut is zero: nothing of it comes back.
        let old = std::fs::read(segment(work.path(), 2)).unwrap();
        let end = if due == 3 { at + pages * 4096 } else { at };
        assert!(old.len() == end, "the old segment ends with its last whole block");
        assert_eq!(recovered(work.path()), Some(due), "subset {subset:b}");
    }
}

#[test]
fn two_crashes_in_a_row_the_second_while_the_last_block_is_written_again() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (bytes, at, pages) = with_large_last_block(dir.path());
    // First crash: the block is whole. Recovery writes it again into segment 3 and crashes with any prefix of it there.
    let again = bytes[at..at + pages * 4096].to_vec();
    for whole in 0..pages {
        for keep_first in [true, false] {
            copy(dir.path(), work.path());
            std::fs::write(segment(work.path(), 2), &bytes).unwrap();
            let mut torn = again.clone();
            torn[whole * 4096..].fill(0);
            if !keep_first {
                torn[..4096].fill(0);
            }
            torn.resize(64 << 10, 0);
            std::fs::write(segment(work.path(), 3), &torn).unwrap();
            assert_eq!(recovered(work.path()), Some(3), "{whole} pages");
            assert_eq!(recovered(work.path()), Some(3), "{whole} pages, opened again");
        }
    }
    // Second crash after it was written: both copies are whole, each entry counts once.
    copy(dir.path(), work.path());
    std::fs::write(segment(work.path(), 2), &bytes).unwrap();
    for _ in 0..3 {
        assert_eq!(recovered(work.path()), Some(3));
    }
}

#[test]
fn a_log_survives_many_restarts_without_growing_by_segments() {
    let dir = tempfile::tempdir().unwrap();
    let mut next = 1;
    for _ in 0..30 {
        let log = open(dir.path());
        add(&log, next, 100);
        add(&log, next + 1, 100);
        next += 2;
    }
    assert_eq!(intact(&read(dir.path()).unwrap()), next - 1);
    let bytes: u64 = segments(dir.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes < 30 * 5 * PAGE + 3 * (64 << 10), "{bytes}");
}

#[test]
fn a_kill_at_any_step_of_opening_and_appending_loses_nothing() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (bytes, at, _) = with_large_last_block(dir.path());
    for torn in [false, true] {
        for steps in 0..40 {
            copy(dir.path(), work.path());
            let mut image = bytes.clone();
            if torn {
                image[at + 8192..at + 12288].fill(0);
            }
            std::fs::write(segment(work.path(), 2), &image).unwrap();
            let mut acknowledged = if torn { 2 } else { 3 };
            let disk = Arc::new(Dying { left: steps.into() });
            if let Ok((log, recovered)) = LocalLog::open_on(options(work.path()), disk) {
                assert_eq!(recovered.positions[0], acknowledged);
                let mut events = log.events();
                for next in acknowledged + 1..acknowledged + 4 {
                    if log.try_append(&mut vec![(next, entry(next, 30_000), false)]).is_err() {
                        break;
                    }
                }
                let _ = log.close();
                while let Some(event) = events.try_next() {
                    if let Event::Durable { position } = event {
                        acknowledged = position;
                    }
                }
            }
            let found = recovered(work.path());
            assert!(found >= Some(acknowledged), "{steps} steps, torn {torn}: {found:?} of {acknowledged}");
        }
    }
}

#[test]
fn the_state_comes_back_from_the_beginning_and_from_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let id = Bytes::copy_from_slice(&log.log_id());
    let genesis = Genesis { log_id: id.clone(), format: 1, shards: 1, hash_seed: 7 };
    let epoch = Epoch { log_id: id, shard: 0, owner: "r1".into(), incarnation: "i1".into() };
    let write = |records: Vec<Record>| {
        let records = records.into_iter().map(|record| AnyRecord { record: Some(record) }).collect();
        Bytes::from(Entry { at_ms: 1000, records }.encode_to_vec())
    };
    let first = write(vec![Record::Genesis(genesis), Record::Epoch(epoch.clone())]);
    add_all(&log, vec![(1, first, false)]);
    let (state, report) = offline::recover_state(&Source::local(dir.path())).unwrap();
    assert_eq!((state.position(), state.epoch(), report.checkpoint, report.entries), (1, 1, None, 1));
    let mut next = 2;
    for piece in state.to_checkpoint(0) {
        add_all(&log, vec![(next, write(vec![Record::Checkpoint(piece)]), next == 2)]);
        next += 1;
    }
    add_all(&log, vec![(next, write(vec![Record::Epoch(Epoch { incarnation: "i2".into(), ..epoch })]), false)]);
    let (from_checkpoint, report) = offline::recover_state(&Source::local(dir.path())).unwrap();
    assert_eq!((report.checkpoint, report.last_position), (Some(2), next));
    let (from_start, _) = offline::fold_from_start(&Source::local(dir.path()), Some(next)).unwrap();
    assert_eq!(from_checkpoint.hash(), from_start.hash());
    add_all(&log, vec![(next + 1, Bytes::from_static(b"\xff\xff"), false)]);
    let error = offline::recover_state(&Source::local(dir.path())).map(|_| ()).unwrap_err();
    assert!(matches!(error, LogError::Entry { position, .. } if position == next + 1));
}

fn piece(position: u64, n: u32, pieces: u32) -> Bytes {
    let checkpoint = Checkpoint {
        log_id: Bytes::from_static(b"id"),
        shard: 0,
        position,
        epoch: 1,
        fold_version: 1,
        hash: Bytes::from_static(b"hash"),
        piece: n,
        pieces,
        data: Bytes::from(vec![0; 3000]),
    };
    let record = AnyRecord { record: Some(Record::Checkpoint(checkpoint)) };
    Bytes::from(Entry { at_ms: 1, records: vec![record] }.encode_to_vec())
}

#[test]
fn the_newest_whole_checkpoint_is_found_and_a_half_written_one_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let newest = || Reader::open(dir.path()).unwrap().newest_checkpoint().unwrap();
    let log = open(dir.path());
    add(&log, 1, 100);
    assert_eq!(newest(), None);
    for n in 0..3 {
        assert_eq!(newest(), None, "{n} of 3 pieces are there");
        add_all(&log, vec![(2 + u64::from(n), piece(1, n, 3), n == 0)]);
    }
    assert_eq!(newest(), Some(2));
    add(&log, 5, 60_000);
    // The next one, and an entry between its pieces: not whole.
    add_all(&log, vec![(6, piece(5, 0, 2), true)]);
    assert_eq!(newest(), Some(2));
    add(&log, 7, 100);
    add_all(&log, vec![(8, piece(5, 1, 2), false)]);
    assert_eq!(newest(), Some(2));
    drop(log);
    let (log, recovered) = LocalLog::open(options(dir.path())).unwrap();
    assert_eq!(recovered.checkpoints[0], Some(2));
    add_all(&log, vec![(9, piece(8, 0, 1), true)]);
    assert_eq!(newest(), Some(9));
}

#[test]
fn new_segments_ask_for_a_checkpoint_and_a_large_one_is_asked_for_less_often() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path());
    let mut events = log.events();
    let mut next = 1;
    let mut entries_until_due = |checkpoint: u32| {
        for n in 0..checkpoint {
            add_all(&log, vec![(next, piece(next - 1 - u64::from(n), n, checkpoint), n == 0)]);
            next += 1;
        }
        let begun = next;
        loop {
            until("spare", || log.spares_ready() == 1);
            add(&log, next, 4000);
            next += 1;
            while let Some(event) = events.try_next() {
                if matches!(event, Event::NewSegment) {
                    return next - begun;
                }
            }
            assert!(next - begun < 1000);
        }
    };
    let first = entries_until_due(0);
    let after_small = entries_until_due(1);
    let after_large = entries_until_due(20);
    assert!(first < 40 && after_small < 40, "{first} {after_small}");
    assert!(after_large > 40, "{after_large}");
}

/// A file system of its own, gone with the value.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        assert!(
            mount.is_ok_and(|s| s.success()),
            "this test mounts a tmpfs of its own: run it as root, or in `unshare -rm`"
        );
        Self(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_others_fill_leaves_room_for_what_runs_then_stops_and_recovers() {
    let disk = Tmpfs::new(40 << 20);
    let dir = disk.0.path().join("log");
    let options = Options { segment_bytes: 8 << 20, ..Options::new(&dir) };
    let (log, _) = LocalLog::open(options.clone()).unwrap();
    until("spare", || log.spares_ready() == 1);
    add(&log, 1, 1000);
    until("spare", || log.spares_ready() == 1);
    let mut events = log.events();
    // Somebody else takes all there is.
    let filled = std::fs::write(disk.0.path().join("other"), vec![1; 40 << 20]);
    assert!(filled.is_err(), "the disk is full now");
    until("low", || events.try_next().is_some_and(|e| matches!(e, Event::Room(LogRoom::Low))));
    // What runs goes on in what is the log's already, past the last mark, for at least the 4 MiB that are promised.
    let (mut next, mut last_mark) = (2, None);
    let failed = loop {
        let mut entry = vec![(next, entry(next, 100_000), false)];
        if log.try_append(&mut entry).is_err() {
            break true;
        }
        let mut done = false;
        let mut stopped = false;
        until("an answer", || {
            while let Some(event) = events.try_next() {
                match event {
                    Event::Durable { position } => done |= position >= next,
                    Event::Room(LogRoom::Last) => last_mark = Some(next),
                    Event::Failed(_) => stopped = true,
                    Event::Alone { .. } | Event::Room(_) | Event::NewSegment => {}
                }
            }
            done || stopped
        });
        if stopped {
            break true;
        }
        next += 1;
        assert!(next < 400);
    };
    assert!(failed);
    let last_mark = last_mark.expect("the last mark comes before the end");
    let after = (next - last_mark) * 100_000;
    assert!(after > 3_000_000, "{after} bytes after the last mark");
    assert!(matches!(log.close(), Err(LogError::Stopped(_))));
    assert!(intact(&read(&dir).unwrap()) >= next - 1);
    // Room again: everything acknowledged is there.
    std::fs::remove_file(disk.0.path().join("other")).unwrap();
    let (log, recovered) = LocalLog::open(options).unwrap();
    assert!(recovered.positions[0] >= next - 1);
    add(&log, recovered.positions[0] + 1, 100);
    log.close().unwrap();
    assert_eq!(intact(&read(&dir).unwrap()), recovered.positions[0] + 1);
}

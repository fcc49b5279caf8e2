//! One local log of several shards: each has its own positions, all of them one set of files. What a crash leaves, and what is
//! read back of each.

#![allow(clippy::unwrap_used, reason = "what fails in here fails the test")]

mod log_support;

use atp_core::record::{Checkpoint, Entry, Epoch, Faster, Genesis, Record};
use atp_core::state::{FORMAT, State};
use atp_router::log::{Event, LocalLog, LogError, Options, Reader, Source, offline};
use bytes::Bytes;
use log_support::{Dying, Faulty, PAGE, blocks, copy, segment, segments, until};
use prost::Message;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn options(dir: &Path, shards: u32) -> Options {
    Options { shards, ..log_support::options(dir) }
}

fn open(dir: &Path, shards: u32) -> LocalLog {
    LocalLog::open(options(dir, shards)).unwrap().0
}

/// An entry that says whose it is.
fn entry(shard: u32, position: u64, bytes: usize) -> Bytes {
    log_support::entry(u64::from(shard) << 40 | position, bytes)
}

/// Appends so many entries to a shard, behind what it has, and waits until they are durable.
fn add(log: &LocalLog, shard: u32, from: u64, count: u64, bytes: usize) {
    let entries = (from..from + count).map(|position| (position, entry(shard, position, bytes), false)).collect();
    log_support::add_all(&log.shard(shard), entries);
}

/// Checks that a shard holds exactly the entries 1..=n, each as `entry` made it, and returns n.
fn intact(shard: u32, entries: &[(u64, Bytes)]) -> u64 {
    for ((position, found), due) in entries.iter().zip(1..) {
        assert_eq!((*position, found), (due, &entry(shard, due, found.len())), "shard {shard}");
    }
    entries.len() as u64
}

fn read(dir: &Path, shard: u32) -> Result<Vec<(u64, Bytes)>, LogError> {
    Reader::open(dir)?.shard(shard).entries(1).collect()
}

/// The last position of each shard, by one pass over all.
fn at_once(dir: &Path, shards: u32) -> Result<Vec<u64>, LogError> {
    let mut all = vec![Vec::new(); shards as usize];
    for item in Reader::open(dir)?.all(vec![1; shards as usize])? {
        let (shard, position, entry) = item?;
        all[shard as usize].push((position, entry));
    }
    Ok((0..).zip(&all).map(|(shard, entries)| intact(shard, entries)).collect())
}

/// The same, and each shard read alone says so too.
fn positions(dir: &Path, shards: u32) -> Result<Vec<u64>, LogError> {
    let alone: Result<Vec<u64>, _> = (0..shards).map(|shard| Ok(intact(shard, &read(dir, shard)?))).collect();
    let all = at_once(dir, shards)?;
    assert_eq!(alone?, all);
    Ok(all)
}

#[test]
fn each_shard_reads_back_its_own_entries_from_anywhere() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 5);
    let mut next = [1_u64; 5];
    // Shard 4 never writes anything.
    for n in 0..120_u64 {
        let shard = u32::try_from(n * n % 4).unwrap();
        add(&log, shard, next[shard as usize], n % 3 + 1, 1500);
        next[shard as usize] += n % 3 + 1;
    }
    for (shard, from) in [(2, 1), (3, 1)] {
        add(&log, shard, from, 1, 10);
        next[shard as usize] += 1;
    }
    let due: Vec<u64> = next.iter().map(|next| next - 1).collect();
    assert!(segments(dir.path()).len() > 3);
    assert_eq!(positions(dir.path(), 5).unwrap(), due);
    for shard in 0..5 {
        let (reader, last) = (Reader::open(dir.path()).unwrap().shard(shard), due[shard as usize]);
        for from in 1..=last {
            let (position, bytes) = reader.entries(from).next().unwrap().unwrap();
            assert_eq!((position, &bytes), (from, &entry(shard, from, bytes.len())));
            let upto = (from + 3).min(last);
            assert_eq!(reader.entries_between(from, upto).count() as u64, upto - from + 1);
        }
        assert_eq!(reader.entries(last + 1).count(), 0);
        let missing = reader.entries_between(1, last + 1).last();
        assert!(matches!(missing, Some(Err(LogError::Missing { shard: of, .. })) if of == shard));
    }
    // Of each shard what lies behind some position, in one pass.
    let from: Vec<u64> = due.iter().map(|last| last / 2 + 1).collect();
    let mut found = vec![Vec::new(); 5];
    for item in Reader::open(dir.path()).unwrap().all(from.clone()).unwrap() {
        let (shard, position, _) = item.unwrap();
        found[shard as usize].push(position);
    }
    for (found, (from, last)) in found.iter().zip(from.iter().zip(&due)) {
        assert_eq!(*found, (*from..=*last).collect::<Vec<_>>());
    }
    log.close().unwrap();
    let (log, recovered) = LocalLog::open(options(dir.path(), 1)).unwrap();
    assert_eq!((log.shards(), recovered.positions), (5, due), "the log keeps its number of shards");
    let source = Source::local(dir.path());
    assert_eq!((source.shards().unwrap(), source.shard(3).number()), (5, 3));
    let beyond = source.shard(5).entries(1).unwrap().next();
    assert!(matches!(beyond, Some(Err(LogError::NoShard { shard: 5, shards: 5 }))), "{beyond:?}");
}

#[test]
fn a_log_of_one_shard_stays_one() {
    let dir = tempfile::tempdir().unwrap();
    log_support::add(&log_support::open(dir.path()), 1, 100);
    let log = open(dir.path(), 64);
    assert_eq!(log.shards(), 1);
    log_support::add(&log, 2, 100);
    assert_eq!(log_support::intact(&log_support::read(dir.path()).unwrap()), 2);
    for path in segments(dir.path()) {
        let bytes = std::fs::read(path).unwrap();
        assert!(blocks(&bytes).iter().all(|(at, _)| bytes[at + 4] == 1), "its blocks keep their format");
    }
    for shards in [0, 1025] {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(LocalLog::open(options(dir.path(), shards)), Err(LogError::Shards { .. })));
    }
}

#[test]
fn many_append_at_once_and_each_hears_of_its_own_entries() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 8);
    std::thread::scope(|scope| {
        for shard in 0..8 {
            let log = log.shard(shard);
            scope.spawn(move || {
                let mut events = log.events();
                let mut durable = 0;
                for position in 1..=50 {
                    let mut entries = vec![(position, entry(shard, position, 200), false)];
                    assert!(log.try_append(&mut entries).unwrap());
                    until("its durable entry", || {
                        if let Some(Event::Durable { position: now }) = events.try_next() {
                            assert!(now > durable && now <= position, "{now} of {position}");
                            durable = now;
                        }
                        durable == position
                    });
                }
            });
        }
    });
    assert_eq!(positions(dir.path(), 8).unwrap(), [50; 8]);
    // Far fewer blocks than entries would be needed alone, but at least one for each turn.
    log.close().unwrap();
}

#[test]
fn positions_of_a_shard_have_no_gap_whatever_the_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 2);
    add(&log, 0, 1, 5, 10);
    let gap = log.shard(1).try_append(&mut vec![(6, entry(1, 6, 10), false)]);
    assert!(matches!(gap, Err(LogError::Position { shard: 1, expected: 1, found: 6 })), "{gap:?}");
    add(&log, 1, 1, 1, 10);
    drop(log);
    let log = open(dir.path(), 2);
    let again = log.try_append(&mut vec![(5, entry(0, 5, 10), false)]);
    assert!(matches!(again, Err(LogError::Position { shard: 0, expected: 6, found: 5 })), "{again:?}");
}

#[test]
fn the_directory_is_given_back_with_the_last_shard() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 3);
    let (one, two) = (log.shard(1), log.shard(2));
    let entries = |shard, from: u64| (from..from + 300).map(|p| (p, entry(shard, p, 1000), false)).collect::<Vec<_>>();
    for shard in [&log, &one, &two] {
        assert!(shard.try_append(&mut entries(0, 1)).unwrap());
    }
    one.close().unwrap();
    let read = Reader::open(dir.path()).unwrap().shard(1).entries(1).count();
    assert_eq!(read, 300, "what a shard has queued is written when it is closed");
    drop(log);
    assert!(matches!(LocalLog::open(options(dir.path(), 3)), Err(LogError::InUse { .. })));
    two.close().unwrap();
    let (_, recovered) = LocalLog::open(options(dir.path(), 3)).unwrap();
    assert!(recovered.sealed);
    assert_eq!(recovered.positions, [300; 3]);
}

#[test]
fn a_failed_sync_stops_every_shard() {
    let (dir, disk) = (tempfile::tempdir().unwrap(), Arc::new(Faulty::default()));
    let (log, _) = LocalLog::open_on(options(dir.path(), 2), disk.clone()).unwrap();
    add(&log, 0, 1, 1, 10);
    disk.sync_fails.store(true, Ordering::SeqCst);
    log.try_append(&mut vec![(2, entry(0, 2, 10), false)]).unwrap();
    let mut events = log.shard(1).events();
    until("failure", || matches!(events.try_next(), Some(Event::Failed(_))));
    let refused = log.shard(1).try_append(&mut vec![(1, entry(1, 1, 10), false)]);
    assert!(matches!(refused, Err(LogError::Stopped(_))), "{refused:?}");
    assert!(log.close().is_err());
}

/// A closed log of two shards in segment 2 of its directory; the entries of each after each of its blocks.
fn sealed(dir: &Path) -> (Vec<u8>, Vec<(usize, [u64; 2])>) {
    let log = open(dir, 2);
    until("spare", || log.spares_ready() == 1);
    add(&log, 0, 1, 1, 40);
    add(&log, 1, 1, 2, 5000);
    add(&log, 1, 3, 1, 100);
    add(&log, 0, 2, 2, 60);
    log.close().unwrap();
    let bytes = std::fs::read(segment(dir, 2)).unwrap();
    let mut holds = [0; 2];
    let mut ends = Vec::new();
    for (at, _) in blocks(&bytes) {
        let int = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        for run in 0..int(at + 72) as usize {
            let index = at + 80 + run * 16;
            holds[int(index) as usize] += u64::from(int(index + 4));
        }
        ends.push((at + 80 + int(at + 64) as usize, holds));
    }
    assert_eq!(holds, [3, 3]);
    (bytes, ends)
}

#[test]
fn a_tail_that_is_torn_at_any_byte_leaves_both_shards_as_their_whole_blocks_are() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (bytes, ends) = sealed(dir.path());
    let due = |length: usize| ends.iter().rfind(|(end, _)| *end <= length).map_or([0; 2], |(_, holds)| *holds);
    copy(dir.path(), work.path());
    let victim = std::fs::OpenOptions::new().write(true).open(segment(work.path(), 2)).unwrap();
    for length in (0..=ends.last().unwrap().0 + 100).rev() {
        victim.set_len(length as u64).unwrap();
        let read = if length % 32 == 0 { positions } else { at_once };
        assert_eq!(read(work.path(), 2).unwrap(), due(length), "length {length}");
    }
    // Who writes on cuts there, and a second time nothing changes.
    for length in ends.iter().flat_map(|(end, _)| [end - 1, *end, end + 1]).chain([0, 1, 79, 80, 115, 116, 4096]) {
        copy(dir.path(), work.path());
        std::fs::write(segment(work.path(), 2), &bytes[..length]).unwrap();
        for _ in 0..2 {
            let (log, recovered) = LocalLog::open(options(work.path(), 2)).unwrap();
            assert_eq!(recovered.positions, due(length), "length {length}");
            drop(log);
            assert_eq!(positions(work.path(), 2).unwrap(), due(length), "length {length}");
        }
        let log = open(work.path(), 2);
        for shard in 0..2 {
            add(&log, shard, due(length)[shard as usize] + 1, 1, 10);
        }
        log.close().unwrap();
        assert_eq!(positions(work.path(), 2).unwrap(), due(length).map(|last| last + 1), "length {length}");
    }
}

#[test]
fn a_flipped_bit_of_any_byte_is_harmless_or_called_corruption() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (bytes, ends) = sealed(dir.path());
    copy(dir.path(), work.path());
    let victim = std::fs::OpenOptions::new().write(true).open(segment(work.path(), 2)).unwrap();
    let mut corrupt = 0;
    for ((at, _), (end, _)) in blocks(&bytes).iter().zip(&ends) {
        for offset in (*at..(*end).min(at + 200)).chain([end - 1]) {
            for bit in [offset % 8, (offset + 3) % 8] {
                victim.write_all_at(&[bytes[offset] ^ (1 << bit)], offset as u64).unwrap();
                let read = positions(work.path(), 2);
                let opened = (bit == offset % 8 && offset % 5 == 0).then(|| {
                    let again = tempfile::tempdir().unwrap();
                    copy(work.path(), again.path());
                    LocalLog::open(options(again.path(), 2)).map(|(_, recovered)| recovered.positions)
                });
                victim.write_all_at(&[bytes[offset]], offset as u64).unwrap();
                match &read {
                    Ok(positions) => assert_eq!(*positions, [3, 3], "offset {offset} bit {bit}"),
                    Err(LogError::Corrupt { .. }) => corrupt += 1,
                    Err(other) => panic!("{other}"),
                }
                match opened {
                    Some(Ok(positions)) => assert!(read.is_ok() && positions == [3, 3], "offset {offset} bit {bit}"),
                    Some(Err(error)) => assert!(matches!(error, LogError::Corrupt { .. }), "{error}"),
                    None => {}
                }
            }
        }
    }
    assert!(corrupt > 800, "{corrupt}");
}

#[test]
fn a_kill_at_any_step_of_opening_and_appending_loses_nothing_of_any_shard() {
    let (dir, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    sealed(dir.path());
    for steps in 0..50 {
        copy(dir.path(), work.path());
        let mut acknowledged = [3, 3];
        if let Ok((log, recovered)) = LocalLog::open_on(options(work.path(), 2), Arc::new(Dying { left: steps.into() }))
        {
            assert_eq!(recovered.positions, acknowledged);
            let mut events = [log.events(), log.shard(1).events()];
            'full: for n in 0..3 {
                for shard in 0..2 {
                    let next = 4 + n;
                    let mut entries = vec![(next, entry(shard, next, 30_000), false)];
                    if log.shard(shard).try_append(&mut entries).is_err() {
                        break 'full;
                    }
                }
            }
            let _ = log.close();
            for (events, acknowledged) in events.iter_mut().zip(&mut acknowledged) {
                while let Some(event) = events.try_next() {
                    if let Event::Durable { position } = event {
                        *acknowledged = position;
                    }
                }
            }
        }
        drop(LocalLog::open(options(work.path(), 2)).unwrap());
        let found = positions(work.path(), 2).unwrap();
        assert!(
            found.iter().zip(&acknowledged).all(|(found, due)| found >= due),
            "{steps}: {found:?} {acknowledged:?}"
        );
    }
}

#[test]
fn restarts_dont_grow_the_log_by_segments() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..30 {
        let log = open(dir.path(), 3);
        add(&log, round % 3, u64::from(round / 3) + 1, 1, 100);
    }
    assert_eq!(positions(dir.path(), 3).unwrap(), [10; 3]);
    let bytes: u64 = segments(dir.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert!(bytes < 30 * 5 * PAGE + 3 * (64 << 10), "{bytes}");
}

// ---- states -------------------------------------------------------------------------------------------------------

fn written(records: Vec<Record>) -> Bytes {
    Entry { at_ms: 1_000, records: records.into_iter().map(Into::into).collect() }.encode_to_vec().into()
}

/// Begins the shards of a log as their owners do; the position behind each.
fn begin(log: &LocalLog) -> Vec<u64> {
    let log_id = Bytes::copy_from_slice(&log.log_id());
    for shard in 0..log.shards() {
        let genesis = Genesis { log_id: log_id.clone(), format: FORMAT, shards: log.shards(), hash_seed: 0 };
        let epoch = Epoch { log_id: log_id.clone(), shard, owner: "r1".into(), incarnation: "i1".into() };
        let first = written(vec![Record::Genesis(genesis), Record::Epoch(epoch)]);
        log_support::add_all(&log.shard(shard), vec![(1, first, false)]);
    }
    vec![2; log.shards() as usize]
}

fn fill(log: &LocalLog, shard: u32, next: &mut [u64], count: u64, bytes: usize) {
    let next = &mut next[shard as usize];
    let record = |n: u64| Faster { account: format!("a{n}"), by: "x".repeat(bytes), ..Faster::default() };
    let entries = (*next..*next + count).map(|n| (n, written(vec![Record::Faster(record(n))]), false)).collect();
    log_support::add_all(&log.shard(shard), entries);
    *next += count;
}

fn checkpoint(log: &LocalLog, shard: u32, next: &mut [u64], pieces: &[Checkpoint]) {
    let next = &mut next[shard as usize];
    let entries: Vec<_> = (*next..)
        .zip(pieces)
        .map(|(position, piece)| (position, written(vec![Record::Checkpoint(piece.clone())]), piece.piece == 0))
        .collect();
    *next += entries.len() as u64;
    log_support::add_all(&log.shard(shard), entries);
}

fn fold(source: &Source, shard: u32) -> State {
    offline::fold_from_start(&source.shard(shard), None).unwrap().0
}

#[test]
fn the_states_of_all_shards_come_back_by_one_pass_behind_their_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 4);
    let source = Source::local(dir.path());
    let mut next = begin(&log);
    // Shard 0: a checkpoint of several pieces. 1: one, and nothing behind it. 2: none. 3: its second one is half.
    fill(&log, 0, &mut next, 30, 100_000);
    fill(&log, 1, &mut next, 5, 10);
    fill(&log, 2, &mut next, 5, 10);
    fill(&log, 3, &mut next, 30, 100_000);
    let mut due = [None; 4];
    for shard in [3, 0, 1] {
        due[shard as usize] = Some(next[shard as usize]);
        let pieces = fold(&source, shard).to_checkpoint(shard);
        checkpoint(&log, shard, &mut next, &pieces);
    }
    fill(&log, 3, &mut next, 3, 10);
    let half = fold(&source, 3).to_checkpoint(3);
    assert!(half.len() > 2);
    checkpoint(&log, 3, &mut next, &half[..half.len() - 1]);
    fill(&log, 0, &mut next, 3, 10);
    fill(&log, 2, &mut next, 3, 10);

    let check = || {
        let all = offline::recover_all(&source).unwrap();
        for (shard, (state, report)) in (0..).zip(&all) {
            let whole = fold(&source, shard);
            assert_eq!((state.position(), state.hash()), (whole.position(), whole.hash()), "shard {shard}");
            assert_eq!(report.checkpoint, due[shard as usize], "shard {shard}");
            let alone = offline::recover_state(&source.shard(shard)).unwrap();
            assert_eq!((alone.0.hash(), alone.1), (state.hash(), *report), "shard {shard}");
        }
        let hashes: Vec<String> = all.iter().map(|(state, _)| state.hash()).collect();
        let combined = offline::hash_of_all(&hashes);
        assert!(combined.starts_with("v1:") && combined.len() == 67 && !hashes.contains(&combined), "{combined}");
        assert_eq!(offline::hash_of_all(&hashes[2..3]), hashes[2]);
    };
    check();
    log.close().unwrap();
    let (_log, recovered) = LocalLog::open(options(dir.path(), 4)).unwrap();
    assert_eq!(recovered.checkpoints, due);
    check();
}

#[test]
fn all_shards_are_asked_for_a_checkpoint_until_the_last_has_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 3);
    let mut next = begin(&log);
    let mut events = [log.events(), log.shard(1).events(), log.shard(2).events()];
    let mut asked = || {
        let each = events.each_mut().map(|events| {
            let mut asked = false;
            while let Some(event) = events.try_next() {
                asked |= matches!(event, Event::NewSegment);
            }
            asked
        });
        assert!(each.iter().all(|one| *one == each[0]), "all or none: {each:?}");
        each[0]
    };
    let mut until_asked = |next: &mut Vec<u64>| {
        let begun = next[0];
        while !asked() {
            assert!(next[0] - begun < 100);
            until("spare", || log.spares_ready() == 1);
            fill(&log, 0, next, 1, 4000);
        }
        next[0] - begun
    };
    let small = State::default().to_checkpoint(0);
    until_asked(&mut next);
    for shard in [0, 1] {
        checkpoint(&log, shard, &mut next, &small);
    }
    // Shard 2 is still owed: its beginning would have to be read again.
    until_asked(&mut next);
    for shard in [0, 1, 2] {
        checkpoint(&log, shard, &mut next, &small);
    }
    // Three quarters of a segment of such blocks, and what may have been asked for before the last one stood.
    assert!(until_asked(&mut next) + until_asked(&mut next) >= 6);
}

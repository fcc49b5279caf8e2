//! What every log keeps, whatever it is made of: the same tests over the local log and over Kafka.
#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests
#![cfg(feature = "kafka")]

mod kafka_support;

use atp_core::record::{Checkpoint, Entry, Epoch, Genesis, Record};
use atp_core::state::{FORMAT, State};
use atp_router::log::{ENTRY_BYTES_MAX, Events, LocalLog, Log, LogError, Options, Source, offline};
use bytes::Bytes;
use kafka_support::{address, block_on, entry, try_add};
use prost::Message;
use std::path::PathBuf;
use tempfile::TempDir;

/// An open log whose newest entry is its owner's Epoch.
struct Open {
    log: Box<dyn Log>,
    source: Source,
    state: State,
    report: offline::Report,
    events: Events,
    /// A checkpoint was asked for.
    asked: bool,
}

impl Open {
    fn next(&self) -> u64 {
        self.state.position() + 1
    }

    fn add(&mut self, from: u64, entries: &[Bytes]) {
        let entries = (from..).zip(entries).map(|(position, entry)| (position, entry.clone(), false)).collect();
        self.asked |= try_add(&*self.log, &mut self.events, entries).unwrap();
    }

    fn read(&self) -> Vec<(u64, Bytes)> {
        self.source.entries(1).unwrap().collect::<Result<_, _>>().unwrap()
    }
}

/// A place where a log can be.
trait Place {
    /// Takes the log as this owner, on a machine of its own where it can be taken from several.
    fn open(&self, machine: &str) -> Result<Open, LogError>;
}

struct Local(TempDir);

impl Place for Local {
    fn open(&self, machine: &str) -> Result<Open, LogError> {
        let dir = self.0.path().join("log");
        let (log, recovered) = LocalLog::open(Options { segment_bytes: 64 << 10, ..Options::new(&dir) })?;
        let source = Source::local(dir);
        let (mut state, report) = match recovered.positions[0] {
            0 => Default::default(),
            _ => offline::recover_state(&source)?,
        };
        // As the shard does at its start.
        let log_id = Bytes::copy_from_slice(&log.log_id());
        let genesis = Genesis { log_id: log_id.clone(), format: FORMAT, shards: 1, hash_seed: 0 };
        let epoch = Epoch { log_id, shard: 0, owner: machine.into(), incarnation: "i1".into() };
        let mut records = vec![Record::Epoch(epoch).into()];
        if state.position() == 0 {
            records.insert(0, Record::Genesis(genesis).into());
        }
        let begin = Entry { at_ms: 1_000, records };
        let position = state.position() + 1;
        let mut events = log.events();
        try_add(&log, &mut events, vec![(position, begin.encode_to_vec().into(), false)])?;
        state.apply(position, &begin).unwrap();
        Ok(Open { log: Box::new(log), source, state, report, events, asked: false })
    }
}

struct Kafka {
    address: atp_router::log::KafkaAddress,
    machines: TempDir,
}

impl Place for Kafka {
    fn open(&self, machine: &str) -> Result<Open, LogError> {
        let dir: PathBuf = self.machines.path().join(machine);
        let opened = kafka_support::open(&self.address, &dir, machine)?;
        let report = offline::recover_state(&opened.source)?.1;
        let events = opened.log.events();
        Ok(Open { log: Box::new(opened.log), source: opened.source, state: opened.state, report, events, asked: false })
    }
}

fn everywhere(test: impl Fn(&dyn Place)) {
    let dir = || tempfile::tempdir().unwrap();
    test(&Local(dir()));
    test(&Kafka { address: address(), machines: dir() });
}

/// The state as every later reader has it.
fn fold(source: &Source) -> State {
    offline::fold_from_start(source, None).unwrap().0
}

#[test]
fn what_is_durable_is_read_back_in_order() {
    everywhere(|place| {
        let mut open = place.open("r1").unwrap();
        let first = open.next();
        let entries: Vec<Bytes> = (0..3_000).map(|n| entry(n, n as usize % 500)).collect();
        for (chunk, from) in entries.chunks(700).zip((first..).step_by(700)) {
            open.add(from, chunk);
        }
        let read = open.read();
        assert!((1..).zip(&read).all(|(due, (position, _))| due == *position), "positions without a gap");
        let begin = usize::try_from(first - 1).unwrap();
        assert!(read[begin..].iter().map(|(_, entry)| entry).eq(&entries));

        let last = first + 2_999;
        let some = open.source.entries_between(first + 1_234, first + 1_236).unwrap();
        let some: Vec<_> = some.collect::<Result<_, _>>().unwrap();
        assert_eq!(some[..], read[begin + 1_234..begin + 1_237]);
        assert_eq!(open.source.entries(last).unwrap().count(), 1);
        assert_eq!(open.source.entries(last + 1).unwrap().count(), 0);
        assert_eq!(open.source.entries_between(5, 4).unwrap().count(), 0);
        let missing = open.source.entries_between(last, last + 1).unwrap().last().unwrap();
        assert!(matches!(missing, Err(LogError::Missing { position, .. }) if position == last + 1));
    });
}

#[test]
fn a_log_goes_on_where_it_was_closed_under_a_higher_epoch() {
    everywhere(|place| {
        let mut epochs = Vec::new();
        let mut due = State::default();
        for round in 0..4 {
            let mut open = place.open("r1").unwrap();
            assert_eq!(open.state.position(), due.position() + if round == 0 { open.state.epoch() } else { 1 });
            epochs.push(open.state.epoch());
            open.add(open.next(), &[entry(round, 10), entry(round, 20)]);
            due = fold(&open.source);
            assert_eq!(due.position(), open.state.position() + 2);
            assert_eq!(due.epoch(), open.state.epoch());
            open.log.close().unwrap();
        }
        assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
    });
}

#[test]
fn closing_writes_what_is_queued_and_a_closed_log_takes_no_more() {
    everywhere(|place| {
        let open = place.open("r1").unwrap();
        let first = open.next();
        let entries = (first..first + 500).map(|position| (position, entry(position, 100), false)).collect();
        block_on(open.log.append(entries)).unwrap();
        open.log.close().unwrap();
        assert_eq!(fold(&open.source).position(), first + 499);
        drop(open.events);

        // One that is dropped gives its right back too.
        drop(place.open("r1").unwrap());
        place.open("r1").unwrap().log.close().unwrap();
    });
}

#[test]
fn of_two_owners_at_most_one_writes() {
    everywhere(|place| {
        let mut one = place.open("r1").unwrap();
        one.add(one.next(), &[entry(1, 10)]);
        let two = place.open("r2");
        let position = one.next() + 1;
        let late = try_add(&*one.log, &mut one.events, vec![(position, entry(2, 10), false)]);
        match (two, late) {
            (Err(LogError::InUse { .. }), Ok(_)) => {}
            (Ok(mut two), Err(LogError::Stopped(why))) => {
                let why = why.to_string();
                assert!(why.contains("router r2 (incarnation i1) has taken over shard 0"), "{why}");
                assert!(two.state.epoch() > one.state.epoch());
                assert!(one.log.close().is_err());
                two.add(two.next(), &[entry(3, 10)]);
                let read = two.read();
                assert!(read.iter().all(|(_, found)| *found != entry(2, 10)), "nobody was told that it is durable");
                assert_eq!(read.last(), Some(&(two.next(), entry(3, 10))));
            }
            (two, late) => panic!("{:?} and {late:?}", two.map(|_| ())),
        }
    });
}

#[test]
fn entries_have_a_largest_size() {
    everywhere(|place| {
        let mut open = place.open("r1").unwrap();
        let largest = |more: usize| {
            let spare = entry(1, ENTRY_BYTES_MAX).len() - ENTRY_BYTES_MAX;
            let entry = entry(1, ENTRY_BYTES_MAX - spare + more);
            assert_eq!(entry.len(), ENTRY_BYTES_MAX + more);
            entry
        };
        let position = open.next();
        let refused = block_on(open.log.append(vec![(position, largest(1), false)]));
        assert!(matches!(refused, Err(LogError::EntryTooBig { .. })), "{refused:?}");
        let wrong = block_on(open.log.append(vec![(position + 1, entry(1, 1), false)]));
        assert!(matches!(wrong, Err(LogError::Position { .. })), "{wrong:?}");
        open.add(position, &[largest(0)]);
        assert_eq!(open.read().pop(), Some((position, largest(0))));
    });
}

fn checkpoint(open: &mut Open, from: u64, pieces: &[Checkpoint]) {
    let entries = (from..).zip(pieces).map(|(position, piece)| {
        let entry = Entry { at_ms: 1_000, records: vec![Record::Checkpoint(piece.clone()).into()] };
        (position, entry.encode_to_vec().into(), piece.piece == 0)
    });
    try_add(&*open.log, &mut open.events, entries.collect()).unwrap();
}

#[test]
fn recovery_begins_at_the_newest_whole_checkpoint() {
    everywhere(|place| {
        let mut open = place.open("r1").unwrap();
        // Enough for several pieces.
        let entries: Vec<Bytes> = (0..30).map(|n| entry(n, 100_000)).collect();
        open.add(open.next(), &entries);
        let state = fold(&open.source);
        let pieces = state.to_checkpoint(0);
        assert!(pieces.len() > 2, "{} pieces", pieces.len());
        let first = state.position() + 1;
        checkpoint(&mut open, first, &pieces);
        let behind = first + pieces.len() as u64;
        open.add(behind, &[entry(31, 10), entry(32, 10)]);
        // The router died within the next one.
        let half = fold(&open.source).to_checkpoint(0);
        checkpoint(&mut open, behind + 2, &half[..half.len() - 1]);
        open.log.close().unwrap();

        let again = place.open("r1").unwrap();
        assert_eq!(again.report.checkpoint, Some(first));
        let whole = fold(&again.source);
        assert_eq!((again.state.position(), again.state.hash()), (whole.position(), whole.hash()));
        // Those behind the state that the checkpoint holds: itself, two entries, half a checkpoint, and perhaps the Epoch.
        let read = pieces.len() + 2 + half.len() - 1;
        assert!((read..=read + 1).contains(&usize::try_from(again.report.entries).unwrap()), "{:?}", again.report);
    });
}

#[test]
fn a_checkpoint_is_asked_for_once_enough_lies_behind_the_last() {
    everywhere(|place| {
        let mut open = place.open("r1").unwrap();
        let mut position = open.next();
        for _ in 0..3 {
            let mut bytes = 0;
            loop {
                open.add(position, &[entry(1, 5_000)]);
                (position, bytes) = (position + 1, bytes + 5_000);
                if std::mem::take(&mut open.asked) {
                    break;
                }
                assert!(bytes < 2_000_000, "no wish for a checkpoint");
            }
            assert!(bytes >= 20_000, "asked for too soon, after {bytes} bytes");
            let piece = State::default().to_checkpoint(0).remove(0);
            checkpoint(&mut open, position, &[piece]);
            position += 1;
        }
    });
}

#[test]
fn a_log_is_read_while_it_is_written() {
    everywhere(|place| {
        let mut open = place.open("r1").unwrap();
        let first = open.next();
        let (source, stop) = (open.source.clone(), std::sync::atomic::AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut longest = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let read: Vec<_> = source.entries(1).unwrap().collect::<Result<_, _>>().unwrap();
                    assert!((1..).zip(&read).all(|(due, (position, _))| due == *position));
                    assert!(read.len() >= longest, "what was read stays");
                    longest = read.len();
                }
            });
            for n in 0..200 {
                open.add(first + n, &[entry(n, 300)]);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().unwrap();
        });
    });
}

#[test]
fn sources_are_written_as_they_are_read() {
    for text in ["local:/var/lib/atp/log", "kafka://127.0.0.1:9092/atp.frames"] {
        assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("log")).unwrap();
    let data_dir = format!("local:{}", dir.path().display());
    assert_eq!(data_dir.parse::<Source>().unwrap().to_string(), format!("{data_dir}/log"), "a data directory");
    for wrong in ["nowhere", "local:", "kafka://", "kafka:x"] {
        assert!(wrong.parse::<Source>().is_err(), "{wrong}");
    }
    assert!(Source::local("/nowhere/at/all").entries(1).is_err());
}

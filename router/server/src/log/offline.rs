//! Rebuilds the state from a log: newest whole checkpoint, then every later entry. Takes no lock and writes nothing.

use super::{LogError, Reader, checkpoint};
use atp_core::record::{Checkpoint, Entry, Record};
use atp_core::state::State;
use prost::Message;
use std::path::Path;

/// What a recovery read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// First piece of the checkpoint that was taken; `None`: the log was read from its beginning.
    pub checkpoint: Option<u64>,
    /// Entries applied behind it.
    pub entries: u64,
    /// The last entry of the log; 0: none.
    pub last_position: u64,
}

/// The state that the log in `dir` stands for.
///
/// # Errors
/// `NoLog`, `Corrupt`, I/O; `Entry` for an entry that cannot be read or contradicts what came before it.
pub fn recover_state(dir: &Path) -> Result<(State, Report), LogError> {
    let reader = Reader::open(dir)?;
    let checkpoint = reader.newest_checkpoint()?;
    let mut state = State::default();
    if let Some(position) = checkpoint {
        state = State::from_checkpoint(&pieces(&reader, position)?)
            .map_err(|corrupt| LogError::Entry { position: corrupt.position, what: corrupt.message })?;
    }
    let report = replay(&reader, &mut state, checkpoint)?;
    Ok((state, report))
}

/// The state from the first entry on, checkpoints apart: what `verify` compares with. `upto`: stop behind this position.
///
/// # Errors
/// As [`recover_state`]; `Missing` if the log ends before `upto`.
pub fn fold_from_start(dir: &Path, upto: Option<u64>) -> Result<(State, Report), LogError> {
    let reader = Reader::open(dir)?;
    let mut state = State::default();
    let entries = upto.map_or_else(|| reader.entries(1), |upto| reader.entries_between(1, upto));
    let mut report = Report { checkpoint: None, entries: 0, last_position: 0 };
    for item in entries {
        apply(&mut state, item?, &mut report)?;
    }
    Ok((state, report))
}

fn replay(reader: &Reader, state: &mut State, checkpoint: Option<u64>) -> Result<Report, LogError> {
    let from = state.position() + 1;
    let mut report = Report { checkpoint, entries: 0, last_position: state.position() };
    for item in reader.entries(from) {
        apply(state, item?, &mut report)?;
    }
    Ok(report)
}

fn apply(state: &mut State, (position, bytes): (u64, bytes::Bytes), report: &mut Report) -> Result<(), LogError> {
    let entry = Entry::decode(bytes).map_err(|error| LogError::Entry { position, what: error.to_string() })?;
    state.apply(position, &entry).map_err(|corrupt| LogError::Entry { position, what: corrupt.message })?;
    report.entries += 1;
    report.last_position = position;
    Ok(())
}

/// The pieces of the whole checkpoint that begins at `position`.
fn pieces(reader: &Reader, position: u64) -> Result<Vec<Checkpoint>, LogError> {
    let mut pieces: Vec<Checkpoint> = Vec::new();
    for item in reader.entries(position) {
        let (position, entry) = item?;
        let piece = checkpoint::piece(&entry).ok_or_else(|| {
            let what = "a piece of a checkpoint is due here".into();
            LogError::Entry { position, what }
        })?;
        let last = piece.piece + 1 >= piece.pieces;
        pieces.push(piece);
        if last {
            break;
        }
    }
    Ok(pieces)
}

/// One entry as its records, for callers that print a log.
///
/// # Errors
/// `Entry`: not readable, or a record that was written by a newer version.
pub fn records(position: u64, bytes: bytes::Bytes) -> Result<(u64, Vec<Record>), LogError> {
    let entry = Entry::decode(bytes).map_err(|error| LogError::Entry { position, what: error.to_string() })?;
    let records: Option<Vec<Record>> = entry.records.into_iter().map(|any| any.record).collect();
    let records = records.ok_or_else(|| LogError::Entry {
        position,
        what: "written by a newer version; read it with that one".into(),
    })?;
    Ok((entry.at_ms, records))
}

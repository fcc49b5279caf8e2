//! Rebuilds the state from a log: newest whole checkpoint, then every later entry. Takes no lock and writes nothing.

use super::{Entries, LogError, Source, checkpoint};
use atp_core::record::{Checkpoint, Entry, Record};
use atp_core::state::State;
use prost::Message;

/// What a recovery read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// First piece of the checkpoint that was taken; `None`: the log was read from its beginning.
    pub checkpoint: Option<u64>,
    /// Entries applied behind it.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The bytes of that checkpoint.
    pub checkpoint_bytes: u64,
    /// The last entry of the log; 0: none.
    pub last_position: u64,
}

/// The state that a log stands for.
///
/// # Errors
/// `NoLog`, `NotThisLog`, `Corrupt`, I/O; `Entry` for an entry that cannot be read or contradicts what came before it.
pub fn recover_state(source: &Source) -> Result<(State, Report), LogError> {
    let mut state = State::default();
    let mut report = Report { checkpoint: source.newest_checkpoint()?, ..Report::default() };
    if let Some(position) = report.checkpoint {
        let pieces = pieces(source.entries(position)?, &mut report)?;
        state = State::from_checkpoint(&pieces)
            .map_err(|corrupt| LogError::Entry { position: corrupt.position, what: corrupt.message })?;
    }
    report.last_position = state.position();
    go_on(&mut state, source, &mut report)?;
    Ok((state, report))
}

fn go_on(state: &mut State, source: &Source, report: &mut Report) -> Result<(), LogError> {
    for item in source.entries(state.position() + 1)? {
        apply(state, item?, report)?;
    }
    Ok(())
}

/// A state that is kept up with a log which somebody else writes.
pub struct Follower {
    source: Source,
    state: State,
    report: Report,
}

impl Follower {
    /// Reads what there is.
    ///
    /// # Errors
    /// As [`recover_state`].
    pub fn read(source: Source) -> Result<Self, LogError> {
        let (state, report) = recover_state(&source)?;
        Ok(Self { source, state, report })
    }

    /// Reads what has come since. After an error it is worth nothing.
    ///
    /// # Errors
    /// As [`recover_state`].
    pub fn catch_up(&mut self) -> Result<(), LogError> {
        go_on(&mut self.state, &self.source, &mut self.report)
    }

    /// The last position that was read.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.state.position()
    }

    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The state at the end of `source`, which is the same log, maybe cut before its end.
    pub(super) fn finish(mut self, source: &Source) -> Result<(State, Report), LogError> {
        go_on(&mut self.state, source, &mut self.report)?;
        Ok((self.state, self.report))
    }

    pub(super) fn is_of(&self, log_id: &[u8]) -> bool {
        self.state.log_id()[..] == *log_id
    }
}

/// The state from the first entry on, checkpoints apart: what `verify` compares with. `upto`: stop behind this position.
///
/// # Errors
/// As [`recover_state`]; `Missing` if the log ends before `upto`.
pub fn fold_from_start(source: &Source, upto: Option<u64>) -> Result<(State, Report), LogError> {
    let (mut state, mut report) = (State::default(), Report::default());
    for item in upto.map_or_else(|| source.entries(1), |upto| source.entries_between(1, upto))? {
        apply(&mut state, item?, &mut report)?;
    }
    Ok((state, report))
}

fn apply(state: &mut State, (position, bytes): (u64, bytes::Bytes), report: &mut Report) -> Result<(), LogError> {
    report.bytes += bytes.len() as u64;
    let entry = Entry::decode(bytes).map_err(|error| LogError::Entry { position, what: error.to_string() })?;
    state.apply(position, &entry).map_err(|corrupt| LogError::Entry { position, what: corrupt.message })?;
    report.entries += 1;
    report.last_position = position;
    Ok(())
}

/// The pieces of the whole checkpoint that these entries begin with.
fn pieces(entries: Entries, report: &mut Report) -> Result<Vec<Checkpoint>, LogError> {
    let mut pieces: Vec<Checkpoint> = Vec::new();
    for item in entries {
        let (position, entry) = item?;
        report.checkpoint_bytes += entry.len() as u64;
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

//! Rebuilds the state from a log: newest whole checkpoint, then every later entry. Takes no lock and writes nothing.

use super::{Beginning, Entries, LogError, Reader, Source, checkpoint};
use atp_core::record::{Checkpoint, Entry, hex};
use atp_core::state::{FOLD_VERSION, State};
use prost::Message;
use sha2::{Digest, Sha256};

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

/// The state that a shard of a log stands for.
///
/// # Errors
/// `NoLog`, `NotThisLog`, `Corrupt`, I/O; `Entry` for an entry that cannot be read or contradicts what came before it.
pub fn recover_state(source: &Source) -> Result<(State, Report), LogError> {
    let shard = source.number();
    let mut state = State::default();
    let mut report = Report { checkpoint: source.newest_checkpoint()?, ..Report::default() };
    if let Some(position) = report.checkpoint {
        state = from_checkpoint(shard, source.entries(position)?, &mut report)?;
    }
    report.last_position = state.position();
    go_on(&mut state, source, &mut report)?;
    Ok((state, report))
}

/// The states of all shards of a log, by shard. A local log is read once for all of them.
///
/// # Errors
/// As [`recover_state`].
pub fn recover_all(source: &Source) -> Result<Vec<(State, Report)>, LogError> {
    let shards = source.shards()?;
    let dir = match source {
        Source::Local { dir, .. } => dir,
        #[cfg(feature = "kafka")]
        Source::Kafka(_) => return (0..shards).map(|shard| recover_state(&source.shard(shard))).collect(),
    };
    let reader = Reader::open(dir)?;
    let numbers: Vec<u32> = (0..shards).collect();
    let newest = checkpoint::newest(&reader, &numbers)?;
    fold_all(&reader, &newest)
}

/// The states of all shards of a local log, each from this checkpoint on, or from its first entry.
pub(super) fn fold_all(
    reader: &Reader,
    checkpoints: &[Option<checkpoint::Found>],
) -> Result<Vec<(State, Report)>, LogError> {
    let mut all = Vec::new();
    for (shard, found) in (0..).zip(checkpoints) {
        let (mut state, mut report) = (State::default(), Report::default());
        if let Some(found) = found {
            report.checkpoint = Some(found.position);
            let entries = reader.entries_at(shard, found.segment, found.offset, found.position);
            state = from_checkpoint(shard, Box::new(entries), &mut report)?;
        }
        report.last_position = state.position();
        all.push((state, report));
    }
    for item in reader.all(all.iter().map(|(state, _)| state.position() + 1).collect())? {
        let (shard, position, bytes) = item?;
        let (state, report) = &mut all[shard as usize];
        apply(state, shard, (position, bytes), report)?;
    }
    Ok(all)
}

/// What a fold of this shard begins with: nothing, or, where the log was pruned, its oldest checkpoint.
///
/// # Errors
/// As [`recover_state`].
pub fn begin(source: &Source) -> Result<(State, Option<Beginning>), LogError> {
    let Some(beginning) = source.beginning()? else { return Ok((State::default(), None)) };
    let entries = source.entries(beginning.checkpoint)?;
    let state = from_checkpoint(source.number(), entries, &mut Report::default())?;
    Ok((state, Some(beginning)))
}

/// The state of one shard at this position, from the checkpoint that begins at that one.
#[cfg(feature = "kafka")]
pub(super) fn fold_from(source: &Source, checkpoint: u64, upto: u64) -> Result<State, LogError> {
    let mut report = Report::default();
    let mut state = from_checkpoint(source.number(), source.entries(checkpoint)?, &mut report)?;
    for item in source.entries_between(state.position() + 1, upto)? {
        apply(&mut state, source.number(), item?, &mut report)?;
    }
    Ok(state)
}

fn from_checkpoint(shard: u32, entries: Entries, report: &mut Report) -> Result<State, LogError> {
    State::from_checkpoint(&pieces(shard, entries, report)?).map_err(|corrupt| LogError::Entry {
        shard,
        position: corrupt.position,
        what: corrupt.message,
    })
}

fn go_on(state: &mut State, source: &Source, report: &mut Report) -> Result<(), LogError> {
    for item in source.entries(state.position() + 1)? {
        apply(state, source.number(), item?, report)?;
    }
    Ok(())
}

/// The hash of the states of all shards, given theirs in order: of one its own, of more a SHA-256 over their texts, one behind
/// the other.
#[must_use]
pub fn hash_of_all(hashes: &[String]) -> String {
    if let [one] = hashes {
        return one.clone();
    }
    let mut all = Sha256::new();
    hashes.iter().for_each(|hash| all.update(hash));
    format!("v{FOLD_VERSION}:{}", hex(&all.finalize()))
}

/// A shard's state that is kept up with a log which somebody else writes.
pub struct Follower {
    source: Source,
    state: State,
    report: Report,
    /// Where the log ended before it was read last, if that costs less than to read.
    end: Option<u64>,
}

impl Follower {
    /// Reads what there is.
    ///
    /// # Errors
    /// As [`recover_state`].
    pub fn read(source: Source) -> Result<Self, LogError> {
        let end = source.end()?;
        let (state, report) = recover_state(&source)?;
        Ok(Self { source, state, report, end })
    }

    /// Reads what has come since. After an error it is worth nothing.
    ///
    /// # Errors
    /// As [`recover_state`].
    pub fn catch_up(&mut self) -> Result<(), LogError> {
        let end = self.source.end()?;
        if end.is_some() && end == self.end {
            return Ok(());
        }
        self.end = end;
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
    #[cfg(feature = "kafka")]
    pub(super) fn finish(mut self, source: &Source) -> Result<(State, Report), LogError> {
        go_on(&mut self.state, source, &mut self.report)?;
        Ok((self.state, self.report))
    }

    #[cfg(feature = "kafka")]
    pub(super) fn is_of(&self, log_id: &[u8]) -> bool {
        self.state.log_id()[..] == *log_id
    }
}

/// The state from the first entry on, checkpoints apart, but for the one that a pruned log begins with. `upto`: stop behind this
/// position.
///
/// # Errors
/// As [`recover_state`]; `Missing` if the log ends before `upto`.
pub fn fold_from_start(source: &Source, upto: Option<u64>) -> Result<(State, Report), LogError> {
    let (mut state, beginning) = begin(source)?;
    let mut report = Report { checkpoint: beginning.map(|b| b.checkpoint), ..Report::default() };
    report.last_position = state.position();
    let from = state.position() + 1;
    for item in upto.map_or_else(|| source.entries(from), |upto| source.entries_between(from, upto))? {
        apply(&mut state, source.number(), item?, &mut report)?;
    }
    Ok((state, report))
}

fn apply(
    state: &mut State,
    shard: u32,
    (position, bytes): (u64, bytes::Bytes),
    report: &mut Report,
) -> Result<(), LogError> {
    report.bytes += bytes.len() as u64;
    let wrong = |what| LogError::Entry { shard, position, what };
    let entry = Entry::decode(bytes).map_err(|error| wrong(error.to_string()))?;
    state.apply(position, &entry).map_err(|corrupt| wrong(corrupt.message))?;
    report.entries += 1;
    report.last_position = position;
    Ok(())
}

/// The pieces of the whole checkpoint that these entries begin with.
fn pieces(shard: u32, entries: Entries, report: &mut Report) -> Result<Vec<Checkpoint>, LogError> {
    let mut pieces: Vec<Checkpoint> = Vec::new();
    for item in entries {
        let (position, entry) = item?;
        report.checkpoint_bytes += entry.len() as u64;
        let piece = checkpoint::piece(&entry).ok_or_else(|| {
            let what = "a piece of a checkpoint is due here".into();
            LogError::Entry { shard, position, what }
        })?;
        let last = piece.piece + 1 >= piece.pieces;
        pieces.push(piece);
        if last {
            break;
        }
    }
    Ok(pieces)
}

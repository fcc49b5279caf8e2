//! `atp log prune`: what lies before the two newest checkpoints of a shard, and before the oldest stream that it remembers, goes.
//! First it is shown that the older of these checkpoints folds to the same state; then it is noted where the log begins; only
//! then is anything removed. A crash between two steps leaves a log that begins where the newest note says.

mod local;

#[cfg(feature = "kafka")]
use super::kafka::prune as kafka;
use super::{Disk, LogError, RealDisk, Source};
use atp_core::clock::rfc3339;
use atp_core::record::Entry;
use atp_core::state::State;
use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;
use std::path::Path;
use std::sync::Arc;

/// How a log is pruned.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    /// Unix ms: entries of this time or later are kept. `None`: age keeps nothing.
    pub keep_from_ms: Option<u64>,
    /// Now, Unix ms: it is noted, and shown to who reads the log later.
    pub now_ms: u64,
}

/// What goes, or went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub log: String,
    /// False: nothing was removed.
    pub pruned: bool,
    /// Bytes that go; a Kafka log's are those of its entries.
    pub bytes: u64,
    /// Entries that go, of all shards.
    pub entries: u64,
    /// Files of a local log that go.
    pub segments: u64,
    pub shards: Vec<ShardPlan>,
}

/// One shard's part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShardPlan {
    pub shard: u32,
    /// The first position that is there; 0: the shard is empty.
    pub first: u64,
    pub last: u64,
    /// First pieces of the newest whole checkpoints, the newest first, two at most.
    pub checkpoints: Vec<u64>,
    /// The oldest stream that is open or may be resumed.
    pub oldest_stream: Option<OldestStream>,
    /// Where what is kept by age begins.
    pub young: Option<u64>,
    /// Nothing from this position on may go.
    pub safe: u64,
    /// What holds it there: `checkpoint`, `stream`, `age`, or `no_checkpoint` where there aren't two.
    pub held_by: &'static str,
    /// Entries that go.
    pub entries: u64,
}

/// A stream that the log must still have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OldestStream {
    pub tenant: String,
    pub stream_id: String,
    /// Of its first entry.
    pub position: u64,
    /// Its last record, RFC 3339.
    pub last_event_at: String,
}

/// What a prune of this log would remove. Takes no lock, removes nothing.
///
/// # Errors
/// The log can't be read; `Entry` where the older checkpoint doesn't fold to the state.
pub fn plan(source: &Source, wish: Wish) -> Result<Plan, LogError> {
    match source {
        Source::Local { dir, .. } => Ok(local::plan(dir, wish)?.0),
        #[cfg(feature = "kafka")]
        Source::Kafka(source) => kafka::plan(source, wish),
    }
}

/// Removes what `plan` shows. A local log must not be open; one in Kafka may.
///
/// # Errors
/// As [`plan`]; `InUse`; what the disk or the brokers refuse.
pub fn prune(source: &Source, wish: Wish) -> Result<Plan, LogError> {
    match source {
        Source::Local { dir, .. } => prune_on(dir, wish, &(Arc::new(RealDisk) as Arc<dyn Disk>)),
        #[cfg(feature = "kafka")]
        Source::Kafka(source) => kafka::prune(source, wish),
    }
}

/// As [`prune`] of the local log in `dir`, on a disk of the caller's: how tests make it fail.
///
/// # Errors
/// As [`prune`].
pub fn prune_on(dir: &Path, wish: Wish, disk: &Arc<dyn Disk>) -> Result<Plan, LogError> {
    local::prune(dir, wish, &**disk)
}

impl ShardPlan {
    /// `first`: its first position. `checkpoints`: first pieces of the newest ones, the newest first.
    pub(super) fn new(shard: u32, first: u64, checkpoints: Vec<u64>, state: &State) -> Self {
        let oldest = state.streams().min_by_key(|(_, stream)| stream.from).map(|(_, stream)| OldestStream {
            tenant: stream.accept.key.tenant.clone(),
            stream_id: stream.accept.key.stream.clone(),
            position: stream.from + 1,
            last_event_at: rfc3339(stream.last_at),
        });
        let (mut safe, mut held_by) = checkpoints.get(1).map_or((first, "no_checkpoint"), |at| (*at, "checkpoint"));
        if let Some(stream) = oldest.as_ref().filter(|stream| stream.position < safe) {
            (safe, held_by) = (stream.position.max(first), "stream");
        }
        let last = state.position();
        Self { shard, first, last, checkpoints, oldest_stream: oldest, young: None, safe, held_by, entries: 0 }
    }

    /// What is young begins at this position.
    pub(super) fn keep_from(&mut self, young: u64) {
        self.young = Some(young);
        if young < self.safe {
            (self.safe, self.held_by) = (young, "age");
        }
    }
}

/// The state behind the older checkpoint must be the one behind the newest: what is kept is the whole ledger.
pub(super) fn same_state(shard: u32, checkpoint: u64, newest: &State, older: &State) -> Result<(), LogError> {
    if newest.position() == older.position() && newest.hash() == older.hash() {
        return Ok(());
    }
    let what = format!(
        "the checkpoint here folds to {} at position {}, the newest one to {} at {}; nothing was pruned: keep the log, and \
         report it",
        older.hash(),
        older.position(),
        newest.hash(),
        newest.position()
    );
    Err(LogError::Entry { shard, position: checkpoint, what })
}

pub(super) fn logged_ms(shard: u32, position: u64, entry: Bytes) -> Result<u64, LogError> {
    let wrong = |e: prost::DecodeError| LogError::Entry { shard, position, what: e.to_string() };
    Ok(Entry::decode(entry).map_err(wrong)?.at_ms)
}

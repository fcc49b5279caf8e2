//! What can go wrong with a log, told so that an operator knows the file and what to do.

use super::LogId;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An error of the log. All of them end the router's use of this log: none is worth a retry on the same handle.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the log in {} is used by another router (it holds {}/lock); stop that one, or set another data_dir", dir.display(), dir.display())]
    InUse { dir: PathBuf },
    #[error("no log in {}: there is no segment like 0000000001.log; check the directory", dir.display())]
    NoLog { dir: PathBuf },
    /// Acknowledged bytes are damaged; nothing is cut or repaired.
    #[error("the log is corrupt: {} at offset {offset}: {what}; restore the file from a copy", file.display())]
    Corrupt { file: PathBuf, offset: u64, what: String },
    #[error("{} at offset {offset}: a block of format {format}, written by a newer version; this one reads formats 1 and 2: use the version that wrote it", file.display())]
    Newer { file: PathBuf, offset: u64, format: u8 },
    #[error("{} at offset {offset} belongs to log {}, not to {}; remove the file that came from elsewhere", file.display(), hex(found), hex(expected))]
    OtherLog { file: PathBuf, offset: u64, found: LogId, expected: LogId },
    #[error(
        "shard {shard} of the log ends before entry {position}, which was durable; restore the log's end from a copy"
    )]
    Missing { shard: u32, position: u64 },
    #[error("the log has {shards} shards, from 0 on: there is no shard {shard}")]
    NoShard { shard: u32, shards: u32 },
    #[error("{found} shards: a log has 1 to {max}")]
    Shards { found: u32, max: u32 },
    #[error("entry {position} has {bytes} bytes, the limit is {limit}")]
    EntryTooBig { position: u64, bytes: usize, limit: usize },
    /// The caller numbers entries otherwise than the log: a bug, nothing was written.
    #[error("entry {found} was appended to shard {shard} where entry {expected} is due")]
    Position { shard: u32, expected: u64, found: u64 },
    #[error("segment_bytes is {found}: it must be a multiple of 4096 and at least {min}")]
    SegmentBytes { found: u64, min: u64 },
    /// Fail-stop: a write or sync failed before, nothing is retried.
    #[error("the log has stopped: {0}")]
    Stopped(Arc<LogError>),
    #[error("the log is closed")]
    Closed,
    /// The brokers refused, or couldn't be reached in time.
    #[error("cannot {doing} {address}: {why}")]
    Kafka { doing: &'static str, address: String, why: String },
    /// Acknowledged records are gone, or were never in this topic, or could get lost there.
    #[error("ELOG: {address}: {what}")]
    NotThisLog { address: String, what: String },
    /// An entry stands in the log or not: nobody knows before it is read again.
    #[error(
        "no broker confirmed entry {position} of shard {shard}, so it may stand in the log or not: {why}; its next owner reads what stands"
    )]
    Unknown { shard: u32, position: u64, why: String },
    /// Another owner has begun.
    #[error("{by} has taken over shard {shard} at offset {offset}; this router has stepped down")]
    Fenced { shard: u32, offset: u64, by: String },
    /// The log holds what this owner can't explain.
    #[error("stepped down from shard {shard}: {why}; its next owner reads what stands")]
    SteppedDown { shard: u32, why: String },
    #[error("{} can't be read or written: {what}; restore it from a copy, or remove it to trust the topic as it is", path.display())]
    Memory { path: PathBuf, what: String },
    /// The entries are whole, but what they say cannot be.
    #[error("entry {position} of shard {shard}: {what}")]
    Entry { shard: u32, position: u64, what: String },
}

impl LogError {
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }
    pub(super) fn corrupt(file: &Path, offset: u64, what: impl Into<String>) -> Self {
        Self::Corrupt { file: file.to_path_buf(), offset, what: what.into() }
    }
}

fn hex(id: &LogId) -> String {
    atp_core::record::hex(id)
}

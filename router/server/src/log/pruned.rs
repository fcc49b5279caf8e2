//! What `atp log prune` leaves beside the segments: the note by which a log that begins late is told from one that has lost its
//! beginning. Written before anything is removed; from then on the log begins where it says, whatever still lies before.

use super::disk::Disk;
use super::segment::{self, Segment};
use super::{LogError, LogId};
use atp_core::clock::rfc3339;
use atp_core::record::hex;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Among the segments, and named so that who copies `*.log` copies it too.
const FILE: &str = "pruned.log";
const UNFINISHED: &str = "pruned.new";

/// Where a pruned shard begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beginning {
    /// Its first position.
    pub position: u64,
    /// The first piece of the oldest whole checkpoint behind it: a fold begins there.
    pub checkpoint: u64,
    /// When it was pruned, Unix ms.
    pub pruned_ms: u64,
}

impl Beginning {
    /// The same in words.
    #[must_use]
    pub fn told(&self) -> String {
        let at = rfc3339(self.pruned_ms);
        format!("from checkpoint at {}; what is before was pruned by `atp log prune` at {at}", self.checkpoint)
    }
}

/// The file's content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    /// Hex.
    pub(super) log_id: String,
    /// The first segment of the log.
    pub(super) segment: u64,
    /// By shard; `None`: nothing of it was pruned.
    pub(super) shards: Vec<Option<Beginning>>,
}

/// The segments of a log, and what lies before its beginning.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) note: Option<Note>,
    pub(super) segments: Vec<u64>,
    /// Segments that a prune has given up and not removed.
    pub(super) leftover: Vec<u64>,
    /// Files that were being made when a router died.
    pub(super) unfinished: Vec<PathBuf>,
}

/// Lists a log's segments from its beginning on, and checks that its beginning is there.
pub(super) fn find(dir: &Path) -> Result<Found, LogError> {
    let (mut segments, unfinished) = segment::list(dir)?;
    let note = read(dir)?;
    let first = note.as_ref().map_or(0, |note| note.segment);
    let kept = segments.split_off(segments.partition_point(|number| *number < first));
    let found = Found { note, segments: kept, leftover: segments, unfinished };
    found.check(dir)?;
    Ok(found)
}

impl Found {
    fn check(&self, dir: &Path) -> Result<(), LogError> {
        let lost = |what: String| LogError::NotThisLog { address: format!("the log in {}", dir.display()), what };
        let Some(note) = &self.note else {
            let Some(number) = self.segments.first() else { return Ok(()) };
            // A first block that is damaged is found by who reads it.
            return match Segment::open(dir, *number)?.header(0)? {
                Some(header) if header.number > 1 => Err(lost(format!(
                    "it begins with block {} in segment {number}: acknowledged records were deleted; restore the earlier \
                     segments from a copy, or {FILE} if `atp log prune` had removed them",
                    header.number
                ))),
                _ => Ok(()),
            };
        };
        // Whose it is comes first: where another log begins says nothing of this one.
        let any = self.segments.first().or(self.leftover.first());
        let header = any.map(|number| Segment::open(dir, *number)?.header(0)).transpose()?.flatten();
        if let Some(header) = header.filter(|header| hex(&header.log_id) != note.log_id) {
            return Err(lost(format!(
                "{FILE} is of log {}, the segments are of log {}; remove what came from elsewhere",
                note.log_id,
                hex(&header.log_id)
            )));
        }
        if self.segments.first() != Some(&note.segment) {
            return Err(lost(format!(
                "segment {} is gone, with which it begins since it was pruned: acknowledged records were deleted; \
                 restore it from a copy",
                note.segment
            )));
        }
        Ok(())
    }

    /// Removes what a prune has left, durably; how many segments that were.
    pub(super) fn finish(&self, dir: &Path, disk: &dyn Disk) -> Result<usize, LogError> {
        for number in &self.leftover {
            let path = segment::path(dir, *number);
            disk.remove(&path).map_err(LogError::io("remove", &path))?;
        }
        if !self.leftover.is_empty() {
            disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))?;
        }
        Ok(self.leftover.len())
    }
}

fn read(dir: &Path) -> Result<Option<Note>, LogError> {
    let path = dir.join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LogError::io("read", &path)(error)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| LogError::corrupt(&path, 0, error.to_string()))
}

/// Writes the note; durable when it returns.
pub(super) fn write(dir: &Path, disk: &dyn Disk, note: &Note) -> Result<(), LogError> {
    let (new, path) = (dir.join(UNFINISHED), dir.join(FILE));
    if new.exists() {
        disk.remove(&new).map_err(LogError::io("remove", &new))?;
    }
    let bytes = serde_json::to_vec_pretty(note).map_err(|e| LogError::corrupt(&path, 0, e.to_string()))?;
    let file = disk.create(&new).map_err(LogError::io("create", &new))?;
    disk.write(&file, &bytes, 0).map_err(LogError::io("write", &new))?;
    disk.sync(&file).map_err(LogError::io("sync", &new))?;
    disk.rename(&new, &path).map_err(LogError::io("rename", &new))?;
    disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))
}

/// The note of a prune by which the log begins with `segment`.
pub(super) fn note(log_id: &LogId, segment: u64, shards: Vec<Option<Beginning>>) -> Note {
    Note { log_id: hex(log_id), segment, shards }
}

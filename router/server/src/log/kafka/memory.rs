//! What this machine remembers of its log in `data_dir`: which one it is, how far it reached, where to begin. It only ever
//! refuses or shortens a recovery; money rests on the log alone. One file for all shards that this router owns.

use crate::log::disk::Lock;
use crate::log::{LogError, LogId};
use atp_core::partition::Mark;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const FILE: &str = "kafka-log.json";

/// Of one shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reached {
    /// The offset behind the last message that was known to be durable.
    pub(super) end: u64,
    /// The place right before the newest whole checkpoint.
    pub(super) checkpoint: Option<Mark>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// Hex.
    log_id: String,
    topic: String,
    shards: BTreeMap<u32, Reached>,
}

/// The file, and the right to write it.
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
    content: Content,
    /// When it was written last, and whether there is news since.
    saved: Instant,
    news: bool,
    _lock: Lock,
}

impl Memory {
    /// # Errors
    /// `InUse`; I/O; `Memory` for a file that isn't ours.
    pub(super) fn open(data_dir: &Path) -> Result<Self, LogError> {
        fs::create_dir_all(data_dir).map_err(LogError::io("create the directory", data_dir))?;
        let lock_path = data_dir.join("lock");
        let lock = Lock::take(&lock_path).map_err(LogError::io("lock", &lock_path))?;
        let lock = lock.ok_or_else(|| LogError::InUse { dir: data_dir.into() })?;
        let path = data_dir.join(FILE);
        let content = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| LogError::Memory { path: path.clone(), what: error.to_string() })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(LogError::io("read", &path)(error)),
        };
        Ok(Self { path, content, saved: Instant::now(), news: false, _lock: lock })
    }

    /// The log that was used here before, in hex, and its topic.
    pub(super) fn log(&self) -> Option<(&str, &str)> {
        (!self.content.log_id.is_empty()).then_some((&self.content.log_id, &self.content.topic))
    }
    pub(super) fn reached(&self, shard: u32) -> Reached {
        self.content.shards.get(&shard).copied().unwrap_or_default()
    }

    /// The log that is used from now on.
    pub(super) fn set_log(&mut self, log_id: &LogId, topic: &str) {
        self.content.log_id = atp_core::record::hex(log_id);
        self.content.topic = topic.into();
        self.news = true;
    }
    pub(super) fn set_reached(&mut self, shard: u32, reached: Reached) {
        self.news |= self.content.shards.insert(shard, reached) != Some(reached);
    }

    /// Written if there is news and the last time was so long ago.
    pub(super) fn save_every(&mut self, pause: Duration) -> Result<(), LogError> {
        if self.news && self.saved.elapsed() >= pause { self.save() } else { Ok(()) }
    }

    /// Written anew as a whole, durable when it returns.
    pub(super) fn save(&mut self) -> Result<(), LogError> {
        self.saved = Instant::now();
        let bytes = serde_json::to_vec_pretty(&self.content)
            .map_err(|error| LogError::Memory { path: self.path.clone(), what: error.to_string() })?;
        let part = self.path.with_extension("part");
        let written = File::create(&part).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&part, &self.path)).map_err(LogError::io("write", &self.path))?;
        let dir = self.path.parent().unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(LogError::io("sync the directory", dir))?;
        self.news = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_remembered_and_one_process_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::open(dir.path()).unwrap();
        assert_eq!(memory.log(), None);
        let checkpoint = Some(Mark { offset: 3, position: 4, epoch: Some(1), n: 2 });
        let reached = Reached { end: 9, checkpoint };
        memory.set_log(&[0xab; 16], "t");
        memory.set_reached(0, reached);
        memory.save_every(Duration::from_secs(3600)).unwrap();
        assert!(!dir.path().join(FILE).exists(), "not yet");
        memory.save_every(Duration::ZERO).unwrap();
        assert!(matches!(Memory::open(dir.path()), Err(LogError::InUse { .. })));
        drop(memory);
        let memory = Memory::open(dir.path()).unwrap();
        assert_eq!(memory.log(), Some(("ab".repeat(16).as_str(), "t")));
        assert_eq!((memory.reached(0), memory.reached(1)), (reached, Reached::default()));
    }

    #[test]
    fn a_file_that_cant_be_read_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Memory::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(FILE), "{error}");
        assert_eq!(fs::read(dir.path().join(FILE)).unwrap(), b"{");
    }
}

//! Spare segments: new files, zero-filled and synced by a thread of their own before the writer needs them.
//! A file that held a block never becomes a spare.

use super::disk::{Disk, is_full};
use super::room::LAST_BYTES;
use super::{Durability, LogError, segment};
use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Zeros are written and synced in steps, so that a commit never waits behind a whole segment of them.
const STEP: usize = 512 << 10;
/// Where the disk has no room for a whole spare, one of this size still keeps what runs out of the fill's reach.
const SHORT_BYTES: u64 = 2 * LAST_BYTES;

/// A zero-filled, durable segment that nothing was written to.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) bytes: u64,
}

/// Between the writer, which takes spares, and the thread, which makes them.
#[derive(Debug)]
pub(super) struct Spares {
    state: Mutex<State>,
    asked: Condvar,
    durability: Durability,
}

#[derive(Debug)]
struct State {
    ready: VecDeque<Spare>,
    /// The number of the spare to make next; set while one is wanted.
    wanted: Option<u64>,
    failed: Option<LogError>,
    closing: bool,
}

impl Spares {
    pub(super) fn new(ready: VecDeque<Spare>, durability: Durability) -> Self {
        let state = State { ready, wanted: None, failed: None, closing: false };
        Self { state: Mutex::new(state), asked: Condvar::new(), durability }
    }
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The oldest spare, if one is ready.
    pub(super) fn take(&self) -> Result<Option<Spare>, LogError> {
        let mut state = self.lock();
        state.failed.take().map_or_else(|| Ok(state.ready.pop_front()), Err)
    }
    /// An error of the thread other than a full disk: fail-stop.
    pub(super) fn failure(&self) -> Result<(), LogError> {
        self.lock().failed.take().map_or(Ok(()), Err)
    }
    /// Asks for a spare of this number unless one is ready or under way.
    pub(super) fn want(&self, number: u64) {
        let mut state = self.lock();
        if state.ready.is_empty() && state.wanted.is_none() {
            state.wanted = Some(number);
            self.asked.notify_one();
        }
    }
    pub(super) fn ready(&self) -> usize {
        self.lock().ready.len()
    }
    /// Zero-filled bytes that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().ready.iter().map(|spare| spare.bytes).sum()
    }
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.asked.notify_one();
    }

    /// The thread: makes spares until the log closes.
    pub(super) fn run(&self, disk: &dyn Disk, dir: &Path, segment_bytes: u64) {
        loop {
            let mut state = self.lock();
            while state.wanted.is_none() && !state.closing {
                state = self.asked.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closing {
                return;
            }
            let number = state.wanted.unwrap_or_default();
            drop(state);
            let made = self.make_what_fits(disk, dir, number, segment_bytes);
            let mut state = self.lock();
            state.wanted = None;
            match made {
                Ok(spare) => state.ready.extend(spare),
                Err(error) => state.failed = Some(error),
            }
        }
    }

    /// `None`: no room for a spare now, or the log closes.
    fn make_what_fits(
        &self,
        disk: &dyn Disk,
        dir: &Path,
        number: u64,
        segment_bytes: u64,
    ) -> Result<Option<Spare>, LogError> {
        let free = disk.free(dir).map_err(LogError::io("read the free space of", dir))?;
        let bytes = match free {
            _ if free >= segment_bytes => segment_bytes,
            _ if free >= SHORT_BYTES.min(segment_bytes) => SHORT_BYTES.min(segment_bytes),
            _ => return Ok(None),
        };
        let new = dir.join(format!("{number:010}.new"));
        let made = self.fill(disk, &new, bytes);
        match made {
            Ok(Some(file)) => {
                let path = segment::path(dir, number);
                disk.rename(&new, &path).map_err(LogError::io("rename", &new))?;
                disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))?;
                Ok(Some(Spare { number, path, file, bytes }))
            }
            Ok(None) => Ok(None),
            Err(error) if is_full(&error) => {
                // Never held anything: nothing is lost with it, and its room is needed.
                disk.remove(&new).map_err(LogError::io("remove", &new))?;
                Ok(None)
            }
            Err(error) => Err(LogError::io("fill with zeros", &new)(error)),
        }
    }

    fn fill(&self, disk: &dyn Disk, new: &Path, bytes: u64) -> std::io::Result<Option<File>> {
        let file = match disk.create(new) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                disk.remove(new)?;
                disk.create(new)?
            }
            other => other?,
        };
        // Written zeros make the sync of a block cheap; where no commit waits for one, room is enough.
        if self.durability == Durability::Async {
            match disk.reserve(&file, bytes) {
                Ok(()) => return disk.sync(&file).map(|()| Some(file)),
                Err(error) if is_full(&error) => return Err(error),
                Err(_) => {}
            }
        }
        let zeros = vec![0; STEP];
        let mut at = 0;
        while at < bytes {
            if self.lock().closing {
                // The next open removes what is unfinished.
                return Ok(None);
            }
            let n = (bytes - at).min(STEP as u64);
            disk.write(&file, &zeros[..usize::try_from(n).unwrap_or(STEP)], at)?;
            disk.sync(&file)?;
            at += n;
        }
        Ok(Some(file))
    }
}

/// The thread's handle for the log.
pub(super) fn spawn(
    spares: Arc<Spares>,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name("atp-log-spare".into()).spawn(move || spares.run(&*disk, &dir, segment_bytes))
}

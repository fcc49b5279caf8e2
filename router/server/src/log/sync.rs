//! Background sync for `async` durability: written files are synced soon, nobody waits for it. Unused with `fsync`.

use super::LogError;
use super::disk::Disk;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between two syncs, so that a development log doesn't keep the disk busy for its own sake.
const PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
pub(super) struct Dirty {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Files with unsynced bytes, each once.
    files: Vec<(Arc<File>, PathBuf)>,
    closing: bool,
}

impl Dirty {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn add(&self, file: &Arc<File>, path: &std::path::Path) {
        let mut state = self.lock();
        if !state.files.iter().any(|(known, _)| Arc::ptr_eq(known, file)) {
            state.files.push((file.clone(), path.to_path_buf()));
            self.changed.notify_one();
        }
    }
    /// All that is dirty is synced, then the thread ends.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_one();
    }

    /// The thread; `failed` is told of the first error, which ends it.
    pub(super) fn run(&self, disk: &dyn Disk, failed: impl Fn(LogError)) {
        loop {
            let mut state = self.lock();
            while state.files.is_empty() && !state.closing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.files.is_empty() {
                return;
            }
            let closing = state.closing;
            let files = std::mem::take(&mut state.files);
            drop(state);
            for (file, path) in files {
                if let Err(error) = disk.sync(&file) {
                    failed(LogError::io("sync", &path)(error));
                    return;
                }
            }
            if !closing {
                // A close needn't wait for the pause to end.
                let state = self.lock();
                drop(self.changed.wait_timeout_while(state, PAUSE, |state| !state.closing));
            }
        }
    }
}

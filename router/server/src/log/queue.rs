//! Entries on their way to the writer: bounded in bytes, one side fills while the other writes. It never touches a file.

use super::{ENTRY_BYTES_MAX, LogError};
use bytes::Bytes;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// Entries that wait, in bytes, before an append has to wait too. A larger entry goes in alone.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// One entry: its position, its bytes, whether it is the first piece of a checkpoint.
pub type Entry = (u64, Bytes, bool);

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    drained: Notify,
}

#[derive(Debug)]
struct State {
    entries: Vec<Entry>,
    bytes: usize,
    /// The position that the next append must begin with.
    next: u64,
    writer_waits: bool,
    closing: bool,
    stopped: Option<Arc<LogError>>,
}

/// Why the writer was woken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    Entries,
    Idle,
    Close,
}

impl Queue {
    pub(super) fn new(next: u64) -> Self {
        let state = State { entries: Vec::new(), bytes: 0, next, writer_waits: false, closing: false, stopped: None };
        Self { state: Mutex::new(state), filled: Condvar::new(), drained: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `entries` and leaves them empty; `Ok(false)`: there is no room, nothing was taken.
    pub(super) fn offer(&self, entries: &mut Vec<Entry>) -> Result<bool, LogError> {
        let mut state = self.lock();
        if let Some(why) = &state.stopped {
            return Err(LogError::Stopped(why.clone()));
        }
        if state.closing {
            return Err(LogError::Closed);
        }
        let mut bytes = 0;
        for (due, (position, entry, _)) in (state.next..).zip(entries.iter()) {
            if *position != due {
                return Err(LogError::Position { expected: due, found: *position });
            }
            if entry.len() > ENTRY_BYTES_MAX {
                let (position, bytes) = (*position, entry.len());
                return Err(LogError::EntryTooBig { position, bytes, limit: ENTRY_BYTES_MAX });
            }
            bytes += entry.len();
        }
        if state.bytes > 0 && state.bytes + bytes > QUEUE_BYTES_MAX {
            return Ok(false);
        }
        state.next += entries.len() as u64;
        state.bytes += bytes;
        state.entries.append(entries);
        if state.writer_waits {
            state.writer_waits = false;
            self.filled.notify_one();
        }
        Ok(true)
    }

    /// As `offer`, but waits for room.
    pub(super) async fn put(&self, mut entries: Vec<Entry>) -> Result<(), LogError> {
        loop {
            let drained = self.drained.notified();
            tokio::pin!(drained);
            drained.as_mut().enable();
            if self.offer(&mut entries)? {
                return Ok(());
            }
            drained.await;
        }
    }

    /// Writer: takes all that waits into the empty `batch`, or waits for it until `deadline`.
    pub(super) fn take(&self, batch: &mut Vec<Entry>, deadline: Instant) -> Wake {
        let mut state = self.lock();
        loop {
            if !state.entries.is_empty() {
                std::mem::swap(&mut state.entries, batch);
                state.bytes = 0;
                self.drained.notify_waiters();
                return Wake::Entries;
            }
            if state.closing {
                return Wake::Close;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Wake::Idle;
            }
            state.writer_waits = true;
            state = self.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.writer_waits = false;
        }
    }

    /// No append after this; the writer ends when it has written what waits.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.filled.notify_one();
    }

    /// Fail-stop: what waits is dropped. The first cause stands.
    pub(super) fn stop(&self, why: &Arc<LogError>) {
        let mut state = self.lock();
        state.stopped.get_or_insert_with(|| why.clone());
        state.entries.clear();
        state.bytes = 0;
        state.closing = true;
        self.filled.notify_one();
        self.drained.notify_waiters();
    }

    pub(super) fn stopped(&self) -> Option<Arc<LogError>> {
        self.lock().stopped.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(position: u64, bytes: usize) -> Entry {
        (position, Bytes::from(vec![0; bytes]), false)
    }

    #[test]
    fn the_queue_is_bounded_in_bytes() {
        let queue = Queue::new(1);
        assert!(queue.offer(&mut vec![entry(1, QUEUE_BYTES_MAX - 1)]).unwrap());
        assert!(queue.offer(&mut vec![entry(2, 1)]).unwrap());
        let mut refused = vec![entry(3, 1)];
        assert!(!queue.offer(&mut refused).unwrap());
        assert_eq!(refused.len(), 1, "nothing is taken from a refused append");
        let mut batch = Vec::new();
        assert_eq!(queue.take(&mut batch, Instant::now()), Wake::Entries);
        assert!(queue.offer(&mut refused).unwrap());
    }

    #[test]
    fn an_entry_of_the_limit_goes_in_alone_and_one_byte_more_never() {
        let queue = Queue::new(1);
        assert!(queue.offer(&mut vec![entry(1, ENTRY_BYTES_MAX)]).unwrap());
        let too_big = queue.offer(&mut vec![entry(2, ENTRY_BYTES_MAX + 1)]);
        assert!(matches!(too_big, Err(LogError::EntryTooBig { position: 2, .. })));
    }

    #[test]
    fn positions_must_follow_each_other() {
        let queue = Queue::new(5);
        assert!(matches!(queue.offer(&mut vec![entry(4, 1)]), Err(LogError::Position { expected: 5, found: 4 })));
        assert!(matches!(
            queue.offer(&mut vec![entry(5, 1), entry(7, 1)]),
            Err(LogError::Position { expected: 6, found: 7 })
        ));
        assert!(queue.offer(&mut vec![entry(5, 1), entry(6, 1)]).unwrap());
    }

    #[test]
    fn after_a_stop_every_append_names_the_cause() {
        let queue = Queue::new(1);
        queue.stop(&Arc::new(LogError::Closed));
        assert!(matches!(queue.offer(&mut vec![entry(1, 1)]), Err(LogError::Stopped(_))));
    }
}

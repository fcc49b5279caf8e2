//! Entries on their way to the writer: bounded in bytes, one side fills while the other writes. It never touches a file.

use super::{ENTRY_BYTES_MAX, LogError};
use bytes::Bytes;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Semaphore, TryAcquireError};

/// Entries that wait, of all shards, in bytes, before an append has to wait too. A larger append goes in alone.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// One entry: its position, its bytes, whether it is the first piece of a checkpoint.
pub type Entry = (u64, Bytes, bool);

/// One that waits; its position follows from those before it.
#[derive(Clone, Debug)]
pub(super) struct Waiting {
    pub(super) shard: u32,
    pub(super) entry: Bytes,
    pub(super) checkpoint: bool,
}

#[derive(Debug)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// Bytes that there is room for. Who waits for some is served in turn, so no shard is passed over for ever.
    room: Semaphore,
    filled: Condvar,
    written: Condvar,
}

#[derive(Debug)]
struct State {
    entries: Vec<Waiting>,
    /// What they hold of the room.
    held: usize,
    /// Appends so far, of them taken by the writer, of them written.
    appends: u64,
    taken: u64,
    written: u64,
    /// By shard: the position that its next append must begin with.
    next: Vec<u64>,
    writer_waits: bool,
    /// The writer is to do at once what it does when it is idle.
    look: bool,
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

impl State {
    /// The room that `entries` need, if they may be appended.
    fn check(&self, shard: u32, entries: &[Entry]) -> Result<u32, LogError> {
        if let Some(why) = &self.stopped {
            return Err(LogError::Stopped(why.clone()));
        }
        if self.closing {
            return Err(LogError::Closed);
        }
        let mut bytes = 0;
        for (due, (position, entry, _)) in (self.next[shard as usize]..).zip(entries.iter()) {
            if *position != due {
                return Err(LogError::Position { shard, expected: due, found: *position });
            }
            if entry.len() > ENTRY_BYTES_MAX {
                let (position, bytes) = (*position, entry.len());
                return Err(LogError::EntryTooBig { position, bytes, limit: ENTRY_BYTES_MAX });
            }
            bytes += entry.len();
        }
        Ok(u32::try_from(bytes.min(QUEUE_BYTES_MAX)).unwrap_or(u32::MAX))
    }
}

impl Queue {
    /// `next`: by shard, the position of its next entry.
    pub(super) fn new(next: Vec<u64>) -> Self {
        let state = State {
            entries: Vec::new(),
            held: 0,
            appends: 0,
            taken: 0,
            written: 0,
            next,
            writer_waits: false,
            look: false,
            closing: false,
            stopped: None,
        };
        let room = Semaphore::new(QUEUE_BYTES_MAX);
        Self { state: Mutex::new(state), room, filled: Condvar::new(), written: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `entries` and leaves them empty; `Ok(false)`: there is no room, nothing was taken.
    pub(super) fn offer(&self, shard: u32, entries: &mut Vec<Entry>) -> Result<bool, LogError> {
        let bytes = self.lock().check(shard, entries)?;
        match self.room.try_acquire_many(bytes) {
            Ok(room) => room.forget(),
            Err(TryAcquireError::NoPermits) => return Ok(false),
            // `push` says why.
            Err(TryAcquireError::Closed) => {}
        }
        self.push(shard, entries, bytes)?;
        Ok(true)
    }

    /// As `offer`, but waits for room.
    pub(super) async fn put(&self, shard: u32, mut entries: Vec<Entry>) -> Result<(), LogError> {
        let bytes = self.lock().check(shard, &entries)?;
        if let Ok(room) = self.room.acquire_many(bytes).await {
            room.forget();
        }
        self.push(shard, &mut entries, bytes)
    }

    fn push(&self, shard: u32, entries: &mut Vec<Entry>, bytes: u32) -> Result<(), LogError> {
        let mut state = self.lock();
        if let Err(error) = state.check(shard, entries) {
            self.room.add_permits(bytes as usize);
            return Err(error);
        }
        state.next[shard as usize] += entries.len() as u64;
        state.held += bytes as usize;
        state.appends += 1;
        let waiting = |(_, entry, checkpoint)| Waiting { shard, entry, checkpoint };
        state.entries.extend(entries.drain(..).map(waiting));
        if state.writer_waits {
            state.writer_waits = false;
            self.filled.notify_one();
        }
        Ok(())
    }

    /// Writer: takes all that waits into the empty `batch`, or waits for it until `deadline`. What was taken before is written.
    pub(super) fn take(&self, batch: &mut Vec<Waiting>, deadline: Instant) -> Wake {
        let mut state = self.lock();
        state.written = state.taken;
        self.written.notify_all();
        loop {
            if std::mem::take(&mut state.look) {
                return Wake::Idle;
            }
            if !state.entries.is_empty() {
                std::mem::swap(&mut state.entries, batch);
                state.taken = state.appends;
                self.room.add_permits(std::mem::take(&mut state.held));
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

    /// Wakes the writer as if it were idle, before it takes what waits.
    #[cfg(any(feature = "kafka", test))]
    pub(super) fn look(&self) {
        self.lock().look = true;
        self.filled.notify_one();
    }

    /// Blocks until all that was queued before is written, or never will be.
    pub(super) fn wait_until_written(&self) {
        let state = self.lock();
        let upto = state.appends;
        let waits = |state: &mut State| state.written < upto && state.stopped.is_none();
        drop(self.written.wait_while(state, waits));
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
        state.closing = true;
        self.filled.notify_one();
        self.written.notify_all();
        self.room.close();
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
    fn the_queue_is_bounded_in_bytes_over_all_shards() {
        let queue = Queue::new(vec![1, 9]);
        assert!(queue.offer(0, &mut vec![entry(1, QUEUE_BYTES_MAX - 1)]).unwrap());
        assert!(queue.offer(1, &mut vec![entry(9, 1)]).unwrap());
        let mut refused = vec![entry(10, 1)];
        assert!(!queue.offer(1, &mut refused).unwrap());
        assert_eq!(refused.len(), 1, "nothing is taken from a refused append");
        let mut batch = Vec::new();
        assert_eq!(queue.take(&mut batch, Instant::now()), Wake::Entries);
        assert!(queue.offer(1, &mut refused).unwrap());
    }

    #[test]
    fn an_entry_of_the_limit_goes_in_alone_and_one_byte_more_never() {
        let queue = Queue::new(vec![1]);
        assert!(queue.offer(0, &mut vec![entry(1, ENTRY_BYTES_MAX)]).unwrap());
        let too_big = queue.offer(0, &mut vec![entry(2, ENTRY_BYTES_MAX + 1)]);
        assert!(matches!(too_big, Err(LogError::EntryTooBig { position: 2, .. })));
        assert!(!queue.offer(0, &mut vec![entry(2, 1)]).unwrap());
    }

    #[test]
    fn positions_of_a_shard_must_follow_each_other() {
        let queue = Queue::new(vec![5, 1]);
        let before = queue.offer(0, &mut vec![entry(4, 1)]);
        assert!(matches!(before, Err(LogError::Position { shard: 0, expected: 5, found: 4 })));
        let gap = queue.offer(1, &mut vec![entry(1, 1), entry(3, 1)]);
        assert!(matches!(gap, Err(LogError::Position { shard: 1, expected: 2, found: 3 })));
        assert!(queue.offer(0, &mut vec![entry(5, 1), entry(6, 1)]).unwrap());
        assert!(queue.offer(1, &mut vec![entry(1, 1)]).unwrap());
    }

    #[test]
    fn a_look_comes_before_what_waits_and_once() {
        let queue = Queue::new(vec![1]);
        assert!(queue.offer(0, &mut vec![entry(1, 1)]).unwrap());
        queue.look();
        queue.look();
        let far = Instant::now() + std::time::Duration::from_secs(60);
        let mut batch = Vec::new();
        assert_eq!(queue.take(&mut batch, far), Wake::Idle);
        assert_eq!(queue.take(&mut batch, far), Wake::Entries);
        assert_eq!(batch.len(), 1);
    }

    #[tokio::test]
    async fn whoever_waits_for_room_comes_before_those_who_ask_later() {
        let queue = Queue::new(vec![1, 1]);
        assert!(queue.offer(0, &mut vec![entry(1, 9)]).unwrap());
        let large = queue.put(1, vec![entry(1, QUEUE_BYTES_MAX)]);
        tokio::pin!(large);
        assert!(futures_util::poll!(&mut large).is_pending());
        assert!(!queue.offer(0, &mut vec![entry(2, 9)]).unwrap(), "else a large append might wait for ever");
        queue.take(&mut Vec::new(), Instant::now());
        large.await.unwrap();
        queue.take(&mut Vec::new(), Instant::now());
        assert!(queue.offer(0, &mut vec![entry(2, 9)]).unwrap());
    }

    #[tokio::test]
    async fn after_a_stop_every_append_names_the_cause() {
        let queue = Queue::new(vec![1]);
        assert!(queue.offer(0, &mut vec![entry(1, QUEUE_BYTES_MAX)]).unwrap());
        let waits = queue.put(0, vec![entry(2, 1)]);
        tokio::pin!(waits);
        assert!(futures_util::poll!(&mut waits).is_pending());
        queue.stop(&Arc::new(LogError::Closed));
        assert!(matches!(waits.await, Err(LogError::Stopped(_))));
        assert!(matches!(queue.offer(0, &mut vec![entry(2, 1)]), Err(LogError::Stopped(_))));
    }
}

//! The handles of an open log: options, opening, appending, closing. One log per directory, whose threads do the work; each
//! shard of it is a log of its own to its owner.

use super::disk::{Disk, Lock, RealDisk};
use super::queue::{Entry, Queue};
use super::recovery::{self, Recovered};
use super::spare::{self, Spares};
use super::status::{Events, Status};
use super::sync::Dirty;
use super::writer::{Setup, Writer};
use super::{Guarantee, Log, LogError, LogId};
use atp_core::placement::SHARDS_MAX;
use futures_util::future::BoxFuture;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use tokio::sync::watch;

/// When an append counts as durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// After `fdatasync`.
    #[default]
    Fsync,
    /// After the write; a sync follows every few ms. For development: a power cut may take what was acknowledged.
    Async,
}

impl From<Durability> for Guarantee {
    fn from(durability: Durability) -> Self {
        match durability {
            Durability::Fsync => Self::Fsync,
            Durability::Async => Self::Async,
        }
    }
}

/// How a log is opened.
#[derive(Clone, Debug)]
pub struct Options {
    pub dir: PathBuf,
    /// Size of a segment in bytes, a multiple of 4096.
    pub segment_bytes: u64,
    pub durability: Durability,
    /// Of a log that is made; one that is there keeps its number.
    pub shards: u32,
}

impl Options {
    const SEGMENT_BYTES_MIN: u64 = 16 << 10;

    /// Segments of 64 MiB, `fsync`, one shard.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), segment_bytes: 64 << 20, durability: Durability::Fsync, shards: 1 }
    }

    fn check(&self) -> Result<(), LogError> {
        if self.segment_bytes < Self::SEGMENT_BYTES_MIN || !self.segment_bytes.is_multiple_of(super::block::PAGE) {
            return Err(LogError::SegmentBytes { found: self.segment_bytes, min: Self::SEGMENT_BYTES_MIN });
        }
        if !(1..=SHARDS_MAX).contains(&self.shards) {
            return Err(LogError::Shards { found: self.shards, max: SHARDS_MAX });
        }
        Ok(())
    }
}

/// One shard of an open log: the exclusive right to append to it. The log is open as long as one of its shards is; the last
/// that is closed, or dropped (errors unseen), seals it and gives its lock back.
#[derive(Debug)]
pub struct LocalLog {
    shard: u32,
    open: Arc<Open>,
}

#[derive(Debug)]
struct Open {
    dir: PathBuf,
    log_id: LogId,
    queue: Arc<Queue>,
    spares: Arc<Spares>,
    dirty: Arc<Dirty>,
    /// By shard: its status, and what was durable when the log was opened.
    shards: Vec<(watch::Receiver<Status>, u64)>,
    threads: Vec<JoinHandle<()>>,
    /// Holds the writer's lock.
    _lock: Lock,
}

impl LocalLog {
    /// Takes the lock, cuts a torn tail, writes the last block anew; all that stands is durable when this returns. Makes
    /// the directory and the log if there is none. This is shard 0 of it. Blocks for some milliseconds.
    ///
    /// # Errors
    /// `InUse`, `Corrupt`, `OtherLog`, `SegmentBytes`, `Shards`, I/O.
    pub fn open(options: Options) -> Result<(Self, Recovered), LogError> {
        Self::open_on(options, Arc::new(RealDisk))
    }

    /// As `open`, on a disk of the caller's: how tests make it fail.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_on(options: Options, disk: Arc<dyn Disk>) -> Result<(Self, Recovered), LogError> {
        options.check()?;
        let Options { dir, segment_bytes, durability, shards } = options;
        make_dir(&dir, &*disk)?;
        let lock_path = dir.join("lock");
        let lock = Lock::take(&lock_path).map_err(LogError::io("lock", &lock_path))?;
        let Some(lock) = lock else { return Err(LogError::InUse { dir }) };

        let mut end = recovery::recover(&dir, &*disk, uuid::Uuid::new_v4().into_bytes(), shards)?;
        let recovered = end.recovered.clone();
        let log_id = end.link.log_id;
        let queue = Arc::new(Queue::new(end.next.clone()));
        let ready = std::mem::take(&mut end.spares);
        let next_number = ready.iter().map(|spare| spare.number).max().unwrap_or(end.segment.number) + 1;
        let spares = Arc::new(Spares::new(ready, durability));
        let dirty = Arc::new(Dirty::default());
        let status = |durable: &u64| watch::channel(Status { durable: *durable, ..Status::default() });
        let (senders, receivers): (Vec<_>, Vec<_>) = recovered.positions.iter().map(status).unzip();
        let setup = Setup {
            dir: dir.clone(),
            disk: disk.clone(),
            durability,
            segment_bytes,
            queue: queue.clone(),
            spares: spares.clone(),
            dirty: dirty.clone(),
            status: senders.clone(),
            next_number,
        };
        let mut open = Open {
            log_id,
            queue: queue.clone(),
            spares: spares.clone(),
            dirty: dirty.clone(),
            shards: receivers.into_iter().zip(recovered.positions.iter().copied()).collect(),
            threads: Vec::new(),
            _lock: lock,
            dir,
        };
        let started = open.start(Writer::new(setup, end), disk, durability, segment_bytes, senders);
        started.map_err(LogError::io("start the threads of the log in", &open.dir))?;
        Ok((Self { shard: 0, open: Arc::new(open) }, recovered))
    }

    /// Shard `shard` of the same log.
    ///
    /// # Panics
    /// If there is no such shard: `Recovered::positions` says how many there are.
    #[must_use]
    pub fn shard(&self, shard: u32) -> Self {
        assert!((shard as usize) < self.open.shards.len(), "the log has no shard {shard}");
        Self { shard, open: self.open.clone() }
    }

    /// How many shards the log has.
    #[must_use]
    pub fn shards(&self) -> u32 {
        u32::try_from(self.open.shards.len()).expect("bounded by SHARDS_MAX")
    }

    /// Drawn when the log was made; Genesis repeats it.
    #[must_use]
    pub fn log_id(&self) -> LogId {
        self.open.log_id
    }
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.open.dir
    }

    /// As [`Log::append`].
    ///
    /// # Errors
    /// As there.
    pub async fn append(&self, entries: Vec<(u64, bytes::Bytes, bool)>) -> Result<(), LogError> {
        self.open.queue.put(self.shard, entries).await
    }

    /// As `append` without waiting: takes all of `entries` or, if there is no room (`Ok(false)`), none.
    ///
    /// # Errors
    /// As `append`.
    pub fn try_append(&self, entries: &mut Vec<Entry>) -> Result<bool, LogError> {
        self.open.queue.offer(self.shard, entries)
    }

    /// News of this shard, from the log's opening on; of the disk every shard is told. Each call gives a stream of its own.
    #[must_use]
    pub fn events(&self) -> Events {
        let (status, durable_at_open) = &self.open.shards[self.shard as usize];
        Events::new(status.clone(), *durable_at_open)
    }

    /// Spare segments that wait, zero-filled.
    #[must_use]
    pub fn spares_ready(&self) -> usize {
        self.open.spares.ready()
    }

    /// Makes durable what is queued; the last shard to be closed seals the log and gives its lock back. Blocks until that is
    /// done.
    ///
    /// # Errors
    /// `Stopped` if the log failed before or now.
    pub fn close(self) -> Result<(), LogError> {
        let queue = self.open.queue.clone();
        match Arc::try_unwrap(self.open) {
            Ok(mut last) => last.finish(),
            Err(open) => {
                queue.wait_until_written();
                // Another shard may have been closed meanwhile, and this be the last one now.
                if let Some(mut last) = Arc::into_inner(open) {
                    last.finish();
                }
            }
        }
        queue.stopped().map_or(Ok(()), |why| Err(LogError::Stopped(why)))
    }
}

impl Open {
    fn start(
        &mut self,
        writer: Writer,
        disk: Arc<dyn Disk>,
        durability: Durability,
        segment_bytes: u64,
        status: Vec<watch::Sender<Status>>,
    ) -> std::io::Result<()> {
        self.threads.push(spare::spawn(self.spares.clone(), disk.clone(), self.dir.clone(), segment_bytes)?);
        if durability == Durability::Async {
            let (dirty, queue) = (self.dirty.clone(), self.queue.clone());
            let failed = move |error| {
                let error = Arc::new(error);
                queue.stop(&error);
                for status in &status {
                    status.send_modify(|status| status.failed = Some(error.clone()));
                }
            };
            let sync = std::thread::Builder::new().name("atp-log-sync".into());
            self.threads.push(sync.spawn(move || dirty.run(&*disk, failed))?);
        }
        let thread = std::thread::Builder::new().name("atp-log".into());
        self.threads.push(thread.spawn(move || writer.run())?);
        Ok(())
    }

    /// Writes what is queued, seals, syncs; the lock goes with this value.
    fn finish(&mut self) {
        self.queue.close();
        self.spares.close();
        // The writer first: it still makes files dirty.
        if let Some(writer) = self.threads.pop() {
            join(writer);
        }
        self.dirty.close();
        self.threads.drain(..).for_each(join);
    }
}

impl Log for LocalLog {
    fn append(&self, entries: Vec<Entry>) -> BoxFuture<'_, Result<(), LogError>> {
        Box::pin(Self::append(self, entries))
    }
    fn events(&self) -> Events {
        Self::events(self)
    }
    fn look(&self) -> bool {
        false
    }

    fn close(self: Box<Self>) -> Result<(), LogError> {
        Self::close(*self)
    }
}

fn join(thread: JoinHandle<()>) {
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.queue.close();
        self.spares.close();
        while let Some(thread) = self.threads.pop() {
            // The last one pushed is the writer; a panic was reported by its own thread.
            let _ = thread.join();
            self.dirty.close();
        }
    }
}

fn make_dir(dir: &Path, disk: &dyn Disk) -> Result<(), LogError> {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir).map_err(LogError::io("create the directory", dir))?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    disk.sync_dir(parent).map_err(LogError::io("sync the directory", parent))
}

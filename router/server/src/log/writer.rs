//! The writer's thread: what waits becomes one block, is written by one call and synced, then told. One block in flight.
//! It never decides what is in an entry and never retries a failed write.

use super::block::{Builder, CHECKPOINT, Header, Run, SEAL, index_bytes_max, padded};
use super::disk::Disk;
use super::queue::{Queue, Waiting, Wake};
use super::reader::Link;
use super::recovery::End;
use super::room::room;
use super::spare::Spares;
use super::status::Status;
use super::sync::Dirty;
use super::{Durability, LogError, checkpoint};
use atp_core::message::LogRoom;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// A log without appends for so long is sealed.
const IDLE: Duration = Duration::from_millis(100);
/// Free disk is looked at so often: others fill disks too.
const ROOM_EVERY: Duration = Duration::from_millis(200);
const ROOM_EVERY_BYTES: u64 = 4 << 20;
/// A block is not made larger than this unless one entry is: the next one would wait too long.
const BLOCK_BYTES: usize = 4 << 20;
/// `async` has no sync that gathers a batch; behind a small block the next gathers for so long, or padding would be the log.
const GATHER: Duration = Duration::from_micros(200);
const GATHER_BELOW: u64 = 16 << 10;

pub(super) struct Writer {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) durability: Durability,
    pub(super) segment_bytes: u64,
    pub(super) queue: Arc<Queue>,
    pub(super) spares: Arc<Spares>,
    pub(super) dirty: Arc<Dirty>,
    /// By shard.
    pub(super) status: Vec<watch::Sender<Status>>,
    segment: Current,
    link: Link,
    /// By shard: the position of the next entry.
    next: Vec<u64>,
    builder: Builder,
    sealed: bool,
    /// Bytes of log, counted from some time before the oldest checkpoint that still counts.
    written: u64,
    /// By shard: its newest checkpoint.
    checkpoints: Vec<Newest>,
    next_number: u64,
    room: LogRoom,
    room_seen: Instant,
    written_since_room: u64,
}

/// A shard's newest checkpoint: its bytes, and where it began in what was written.
#[derive(Clone, Copy)]
struct Newest {
    bytes: u64,
    begun: u64,
}

struct Current {
    number: u64,
    path: PathBuf,
    file: Arc<File>,
    offset: u64,
    /// Zero-filled up to here; what goes beyond grows the file.
    bytes: u64,
}

/// What the shell chose and shares with the writer.
pub(super) struct Setup {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) durability: Durability,
    pub(super) segment_bytes: u64,
    pub(super) queue: Arc<Queue>,
    pub(super) spares: Arc<Spares>,
    pub(super) dirty: Arc<Dirty>,
    /// By shard.
    pub(super) status: Vec<watch::Sender<Status>>,
    pub(super) next_number: u64,
}

impl Writer {
    pub(super) fn new(setup: Setup, end: End) -> Self {
        let Setup { dir, disk, durability, segment_bytes, queue, spares, dirty, status, next_number } = setup;
        let spare = end.segment;
        let written = end.checkpoints.iter().map(|(_, since)| *since).max().unwrap_or(0);
        let newest = |(bytes, since): &(u64, u64)| Newest { bytes: *bytes, begun: written - since };
        Self {
            dir,
            disk,
            durability,
            segment_bytes,
            queue,
            spares,
            dirty,
            status,
            segment: Current {
                number: spare.number,
                path: spare.path,
                file: Arc::new(spare.file),
                offset: end.offset,
                bytes: spare.bytes,
            },
            link: end.link,
            builder: Builder::default(),
            sealed: end.recovered.sealed,
            next: end.next,
            written,
            checkpoints: end.checkpoints.iter().map(newest).collect(),
            next_number,
            room: LogRoom::Enough,
            room_seen: Instant::now(),
            written_since_room: 0,
        }
    }

    /// Until the log is closed or fails.
    pub(super) fn run(mut self) {
        if let Err(error) = self.work() {
            let error = Arc::new(error);
            self.spares.close();
            self.queue.stop(&error);
            self.tell(|status| status.failed = Some(error.clone()));
        }
    }

    /// Tells all shards.
    fn tell(&self, news: impl Fn(&mut Status)) {
        self.status.iter().for_each(|status| status.send_modify(&news));
    }

    fn work(&mut self) -> Result<(), LogError> {
        self.want_spare();
        self.look_at_room()?;
        if self.checkpoint_is_due() {
            self.tell(|status| status.checkpoints_due += 1);
        }
        let mut batch: Vec<Waiting> = Vec::new();
        loop {
            let wait = if self.sealed { ROOM_EVERY } else { IDLE };
            match self.queue.take(&mut batch, Instant::now() + wait) {
                Wake::Entries => {
                    let bytes = self.commit(&mut batch)?;
                    batch.clear();
                    if self.durability == Durability::Async && bytes < GATHER_BELOW {
                        std::thread::sleep(GATHER);
                    }
                }
                Wake::Idle => {
                    self.look_at_room()?;
                    self.seal()?;
                    self.want_spare();
                }
                Wake::Close => {
                    self.seal()?;
                    return self.disk.sync(&self.segment.file).map_err(LogError::io("sync", &self.segment.path));
                }
            }
        }
    }

    /// Writes a batch, block by block; how many bytes that took.
    fn commit(&mut self, mut batch: &mut [Waiting]) -> Result<u64, LogError> {
        let mut written = 0;
        let index = index_bytes_max(self.link.shards);
        while let Some(first) = batch.first() {
            let space = self.space_for(index + first.entry.len() + 4)?;
            let (mut taken, mut body) = (0, index);
            for waiting in &*batch {
                let bytes = body + 4 + waiting.entry.len();
                if taken > 0 && (bytes > BLOCK_BYTES || padded(bytes) > space) {
                    break;
                }
                (taken, body) = (taken + 1, bytes);
            }
            let (block, rest) = batch.split_at_mut(taken);
            batch = rest;
            let extent = self.block(block)?;
            written += extent;
            metrics::histogram!("atp_log_batch_records").record(f64::from(self.builder.entries()));
            metrics::histogram!("atp_log_batch_bytes").record(extent as f64);
            self.written_since_room += extent;
            // Near the end each block is measured: the last 4 MiB are soon written.
            let near = self.room != LogRoom::Enough;
            if near || self.written_since_room >= ROOM_EVERY_BYTES || self.room_seen.elapsed() >= ROOM_EVERY {
                self.look_at_room()?;
            }
        }
        Ok(written)
    }

    /// Writes these entries as the next block, those of a shard behind each other, and tells their shards.
    fn block(&mut self, entries: &mut [Waiting]) -> Result<u64, LogError> {
        entries.sort_by_key(|waiting| waiting.shard);
        let mut runs: Vec<Run> = Vec::new();
        for waiting in &*entries {
            match runs.last_mut().filter(|run| run.shard == waiting.shard) {
                Some(run) => run.entries += 1,
                None => runs.push(Run { shard: waiting.shard, entries: 1, first: self.next[waiting.shard as usize] }),
            }
        }
        self.builder.begin(&self.index(&runs));
        let mut flags = 0;
        for waiting in &*entries {
            self.builder.push(&waiting.entry);
            if waiting.checkpoint {
                flags |= CHECKPOINT;
            }
        }
        let begun = self.written;
        let extent = self.write(flags)?;
        self.sealed = false;
        for waiting in entries.iter().filter(|waiting| waiting.checkpoint) {
            let bytes = checkpoint::bytes_estimate(&waiting.entry);
            self.checkpoints[waiting.shard as usize] = Newest { bytes, begun };
        }
        for run in runs {
            self.next[run.shard as usize] = run.next();
            self.status[run.shard as usize].send_modify(|status| status.durable = run.next() - 1);
        }
        Ok(extent)
    }

    /// The runs that the next block's index has, which holds these.
    fn index(&self, runs: &[Run]) -> Vec<Run> {
        if self.link.shards == 1 {
            return Vec::new();
        }
        if self.segment.offset > 0 {
            return runs.to_vec();
        }
        let mut all: Vec<Run> =
            (0..).zip(&self.next).map(|(shard, next)| Run { shard, entries: 0, first: *next }).collect();
        for run in runs {
            all[run.shard as usize] = *run;
        }
        all
    }

    /// Bytes that the next block may take, its first entry taking `bytes` of its body: in this segment if that fits, else in
    /// a new one if a spare is ready, else this one grows. The last page stays free for a seal.
    fn space_for(&mut self, bytes: usize) -> Result<u64, LogError> {
        let space = |segment: &Current| segment.bytes.saturating_sub(segment.offset + padded(0));
        if padded(bytes) <= space(&self.segment) {
            return Ok(space(&self.segment));
        }
        if self.segment.offset > 0
            && let Some(spare) = self.spares.take()?
        {
            self.roll(spare);
            return Ok(space(&self.segment).max(padded(bytes)));
        }
        self.want_spare();
        Ok(u64::MAX)
    }

    fn roll(&mut self, spare: super::spare::Spare) {
        self.segment = Current {
            number: spare.number,
            path: spare.path,
            file: Arc::new(spare.file),
            offset: 0,
            bytes: spare.bytes,
        };
        self.next_number = self.next_number.max(spare.number + 1);
        self.want_spare();
        if self.checkpoint_is_due() {
            self.tell(|status| status.checkpoints_due += 1);
        }
    }

    /// One segment of log since the oldest of the shards' newest checkpoints (give or take what its ends leave unused), four
    /// times the size of them all if more.
    fn checkpoint_is_due(&self) -> bool {
        let begun =
            self.checkpoints.iter().zip(&self.next).filter(|(_, next)| **next > 1).map(|(newest, _)| newest.begun);
        let since = self.written - begun.min().unwrap_or(self.written);
        let bytes: u64 = self.checkpoints.iter().map(|newest| newest.bytes).sum();
        since >= self.segment_bytes - self.segment_bytes / 4 && since >= 4 * bytes
    }

    fn want_spare(&mut self) {
        self.next_number = self.next_number.max(self.segment.number + 1);
        self.spares.want(self.next_number);
    }

    /// Writes what the builder holds as the next block, and syncs it.
    fn write(&mut self, flags: u8) -> Result<u64, LogError> {
        let mut header = Header {
            flags,
            segment: self.segment.number,
            offset: self.segment.offset,
            number: self.link.number + 1,
            previous: self.link.checksum,
            first: self.link.next_entry,
            ..Header::first(self.link.log_id, self.link.shards)
        };
        let bytes = self.builder.finish(&mut header);
        let segment = &mut self.segment;
        self.disk.write(&segment.file, bytes, segment.offset).map_err(LogError::io("write", &segment.path))?;
        match self.durability {
            Durability::Fsync => self.disk.sync(&segment.file).map_err(LogError::io("sync", &segment.path))?,
            Durability::Async => self.dirty.add(&segment.file, &segment.path),
        }
        let extent = header.extent();
        segment.offset += extent;
        self.written += extent;
        self.link = Link::of(&header);
        Ok(extent)
    }

    /// An empty block behind the last one: damage to that is corruption from now on, no torn tail.
    fn seal(&mut self) -> Result<(), LogError> {
        let fits = self.segment.offset + padded(0) <= self.segment.bytes;
        // On a full disk a segment doesn't grow for a seal: that room belongs to what still runs.
        if self.sealed || !(fits || self.room == LogRoom::Enough) {
            return Ok(());
        }
        let index = self.index(&[]);
        self.builder.begin(&index);
        self.write(SEAL)?;
        self.sealed = true;
        Ok(())
    }

    fn look_at_room(&mut self) -> Result<(), LogError> {
        self.room_seen = Instant::now();
        self.written_since_room = 0;
        self.spares.failure()?;
        let free = self.disk.free(&self.dir).map_err(LogError::io("read the free space of", &self.dir))?;
        let reserved = self.segment.bytes.saturating_sub(self.segment.offset) + self.spares.bytes();
        let now = room(free, reserved, self.segment_bytes);
        if now != self.room {
            self.room = now;
            self.tell(|status| status.room = now);
        }
        Ok(())
    }
}

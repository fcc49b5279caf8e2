//! The writer's thread: what waits becomes one block, is written by one call and synced, then told. One block in flight.
//! It never decides what is in an entry and never retries a failed write.

use super::block::{Builder, CHECKPOINT, Header, SEAL, padded};
use super::disk::Disk;
use super::queue::{Entry, Queue, Wake};
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
    pub(super) status: watch::Sender<Status>,
    segment: Current,
    link: Link,
    builder: Builder,
    sealed: bool,
    checkpoint_bytes: u64,
    since_checkpoint: u64,
    next_number: u64,
    room: LogRoom,
    room_seen: Instant,
    written_since_room: u64,
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
    pub(super) status: watch::Sender<Status>,
    pub(super) next_number: u64,
}

impl Writer {
    pub(super) fn new(setup: Setup, end: End) -> Self {
        let Setup { dir, disk, durability, segment_bytes, queue, spares, dirty, status, next_number } = setup;
        let spare = end.segment;
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
            checkpoint_bytes: end.checkpoint_bytes,
            since_checkpoint: end.since_checkpoint,
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
            self.status.send_modify(|status| status.failed = Some(error));
        }
    }

    fn work(&mut self) -> Result<(), LogError> {
        self.want_spare();
        self.look_at_room()?;
        if self.checkpoint_is_due() {
            self.status.send_modify(|status| status.checkpoints_due += 1);
        }
        let mut batch: Vec<Entry> = Vec::new();
        loop {
            let wait = if self.sealed { ROOM_EVERY } else { IDLE };
            match self.queue.take(&mut batch, Instant::now() + wait) {
                Wake::Entries => {
                    let bytes = self.commit(&batch)?;
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
    fn commit(&mut self, mut batch: &[Entry]) -> Result<u64, LogError> {
        let mut written = 0;
        while let Some((_, first, _)) = batch.first() {
            let space = self.space_for(first.len() + 4)?;
            self.builder.clear();
            let mut flags = 0;
            let mut checkpoint_bytes = None;
            let mut taken = 0;
            for (_, entry, is_checkpoint) in batch {
                let bytes = self.builder.body_bytes() + 4 + entry.len();
                if taken > 0 && (bytes > BLOCK_BYTES || padded(bytes) > space) {
                    break;
                }
                self.builder.push(entry);
                taken += 1;
                if *is_checkpoint {
                    flags |= CHECKPOINT;
                    checkpoint_bytes = Some(checkpoint::bytes_estimate(entry));
                }
            }
            batch = &batch[taken..];
            let extent = self.write(flags)?;
            written += extent;
            self.sealed = false;
            if let Some(bytes) = checkpoint_bytes {
                self.checkpoint_bytes = bytes;
                self.since_checkpoint = extent;
            }
            metrics::histogram!("atp_log_batch_records").record(f64::from(self.builder.entries()));
            metrics::histogram!("atp_log_batch_bytes").record(extent as f64);
            let position = self.link.next_position - 1;
            self.status.send_modify(|status| status.durable = position);
            self.written_since_room += extent;
            // Near the end each block is measured: the last 4 MiB are soon written.
            let near = self.room != LogRoom::Enough;
            if near || self.written_since_room >= ROOM_EVERY_BYTES || self.room_seen.elapsed() >= ROOM_EVERY {
                self.look_at_room()?;
            }
        }
        Ok(written)
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
            self.status.send_modify(|status| status.checkpoints_due += 1);
        }
    }

    /// One segment of log since the last checkpoint (give or take what its ends leave unused), four times its size if more.
    fn checkpoint_is_due(&self) -> bool {
        self.since_checkpoint >= self.segment_bytes - self.segment_bytes / 4
            && self.since_checkpoint >= 4 * self.checkpoint_bytes
    }

    fn want_spare(&mut self) {
        self.next_number = self.next_number.max(self.segment.number + 1);
        self.spares.want(self.next_number);
    }

    /// Writes what the builder holds as the next block, and syncs it.
    fn write(&mut self, flags: u8) -> Result<u64, LogError> {
        let mut header = Header {
            flags,
            log_id: self.link.log_id,
            segment: self.segment.number,
            offset: self.segment.offset,
            number: self.link.number + 1,
            previous: self.link.checksum,
            entries: 0,
            first: self.link.next_position,
            body_bytes: 0,
            body_crc: 0,
            checksum: 0,
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
        self.since_checkpoint += extent;
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
        self.builder.clear();
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
            self.status.send_modify(|status| status.room = now);
        }
        Ok(())
    }
}

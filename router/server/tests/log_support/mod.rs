//! What the tests of the log share: opening, appending and waiting, reading back, and a disk that can fail.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "only tests use it; what fails here fails the test")]

use atp_router::log::{Disk, Event, LocalLog, LogError, Options, Reader};
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PAGE: u64 = 4096;
pub const HEADER: u64 = 80;
const PATIENCE: Duration = Duration::from_secs(30);

pub fn options(dir: &Path) -> Options {
    Options { segment_bytes: 64 << 10, ..Options::new(dir) }
}

pub fn open(dir: &Path) -> LocalLog {
    LocalLog::open(options(dir)).unwrap().0
}

/// An entry that says its position, so that a wrong one is seen.
pub fn entry(position: u64, bytes: usize) -> Bytes {
    let mut entry = vec![u8::try_from(position % 251).unwrap(); bytes.max(8)];
    entry[..8].copy_from_slice(&position.to_le_bytes());
    Bytes::from(entry)
}

pub fn add(log: &LocalLog, position: u64, bytes: usize) {
    add_all(log, vec![(position, entry(position, bytes), false)]);
}

pub fn add_all(log: &LocalLog, mut entries: Vec<(u64, Bytes, bool)>) {
    let last = entries.last().unwrap().0;
    let mut events = log.events();
    until("room in the queue", || log.try_append(&mut entries).unwrap());
    until("a durable append", || {
        let mut durable = 0;
        while let Some(event) = events.try_next() {
            match event {
                Event::Durable { position } => durable = position,
                Event::Failed(error) => panic!("{error}"),
                Event::Alone { .. } | Event::Room(_) | Event::NewSegment => {}
            }
        }
        durable >= last
    });
}

/// Waits for a condition; its deadline is far.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "no {what} within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

pub fn read(dir: &Path) -> Result<Vec<(u64, Bytes)>, LogError> {
    Reader::open(dir)?.entries(1).collect()
}

/// Checks that a log holds exactly the entries 1..=n, each as `entry` made it, and returns n.
pub fn intact(entries: &[(u64, Bytes)]) -> u64 {
    for ((position, found), due) in entries.iter().zip(1..) {
        assert_eq!(*position, due);
        assert_eq!(*found, entry(due, found.len()), "entry {due}");
    }
    entries.len() as u64
}

pub fn segment(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:010}.log"))
}

pub fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "log"));
    paths.sort();
    paths
}

/// Copies a log, so that it can be damaged, or opened as it stands while its writer lives.
pub fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).unwrap();
    for path in segments(from) {
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Offsets of the blocks in the bytes of a segment, by the format that the log's page documents.
pub fn blocks(bytes: &[u8]) -> Vec<(usize, usize)> {
    let (mut at, mut blocks) = (0, Vec::new());
    while bytes.get(at..at + 4) == Some(b"ATPB") {
        let body = u32::from_le_bytes(bytes[at + 64..at + 68].try_into().unwrap()) as usize;
        let extent = (80 + body).div_ceil(4096) * 4096;
        blocks.push((at, extent));
        at += extent;
    }
    blocks
}

/// The machine's disk, with faults on demand.
#[derive(Default)]
pub struct Faulty {
    pub sync_fails: AtomicBool,
    pub write_fails: AtomicBool,
    pub syncs_after_failure: AtomicU64,
    pub writes_after_failure: AtomicU64,
    /// Free bytes to report; 0: the truth.
    pub free: AtomicU64,
    failed: AtomicBool,
}

fn broken() -> io::Error {
    io::Error::from_raw_os_error(5)
}

impl Disk for Faulty {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.failed.load(Ordering::SeqCst) {
            self.writes_after_failure.fetch_add(1, Ordering::SeqCst);
        }
        if self.write_fails.load(Ordering::SeqCst) {
            self.failed.store(true, Ordering::SeqCst);
            return Err(broken());
        }
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        if self.failed.load(Ordering::SeqCst) {
            self.syncs_after_failure.fetch_add(1, Ordering::SeqCst);
        }
        if self.sync_fails.load(Ordering::SeqCst) {
            self.failed.store(true, Ordering::SeqCst);
            return Err(broken());
        }
        file.sync_data()
    }
    fn free(&self, dir: &Path) -> io::Result<u64> {
        match self.free.load(Ordering::SeqCst) {
            0 => atp_router::log::RealDisk.free(dir),
            free => Ok(free - 1),
        }
    }
}

/// The machine's disk for so many changes; then the process counts as killed: nothing gets through any more.
pub struct Dying {
    pub left: std::sync::atomic::AtomicI64,
}

impl Dying {
    fn step(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 { Ok(()) } else { Err(broken()) }
    }
}

impl Disk for Dying {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.step()?;
        atp_router::log::RealDisk.create(path)
    }
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        atp_router::log::RealDisk.write(file, bytes, offset)
    }
    fn sync(&self, _file: &File) -> io::Result<()> {
        self.step()
    }
    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        self.step()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        atp_router::log::RealDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        atp_router::log::RealDisk.remove(path)
    }
    fn shorten(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.step()?;
        atp_router::log::RealDisk.shorten(file, bytes)
    }
}

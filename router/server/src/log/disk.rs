//! What the log asks of a file system, in one trait: the real one here, faulty ones in the tests. It never retries.

use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Every change that the log makes to its directory. Reads go straight to the files. The defaults are the real thing.
pub trait Disk: Send + Sync + 'static {
    /// A new file for reading and writing.
    ///
    /// # Errors
    /// If it exists, or cannot be made.
    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).open(path)
    }
    /// Writes all of `bytes` at `offset`; by one system call unless the kernel takes only a part.
    ///
    /// # Errors
    /// The log counts the file's bytes as unknown afterwards.
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }
    /// Gives `file` that many bytes of disk, which read as zeros, without writing them. Not every file system can.
    ///
    /// # Errors
    /// As of `fallocate(2)`.
    fn reserve(&self, file: &File, bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?)
    }
    /// `fdatasync`.
    ///
    /// # Errors
    /// Fail-stop: the kernel may have thrown the dirty pages away.
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }
    /// `fsync` of a directory: names in it are durable.
    ///
    /// # Errors
    /// Fail-stop.
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
    /// # Errors
    /// As of `rename(2)`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
    /// # Errors
    /// As of `unlink(2)`.
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
    /// Gives back what lies behind `bytes`.
    ///
    /// # Errors
    /// As of `ftruncate(2)`.
    fn shorten(&self, file: &File, bytes: u64) -> io::Result<()> {
        file.set_len(bytes)
    }
    /// Free bytes of the file system that holds `dir`, for users without privileges.
    ///
    /// # Errors
    /// As of `statvfs(2)`.
    fn free(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// The file system of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {}

/// True where the disk is full or a quota is: what was asked for isn't there, but nothing is broken.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The exclusive writer's lock of a directory.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// Takes it; `Ok(None)`: another process (or handle) holds it.
    pub(super) fn take(path: &Path) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would leave it to a child that was forked meanwhile, until that one's exec.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

//! Power cuts, drawn from a seed: a disk that keeps of what wasn't synced whatever it likes, forgets names and cuts, and after a
//! failed sync takes for clean what it never wrote. What was acknowledged or served survives, and nothing is called corrupt.

#![allow(clippy::unwrap_used, reason = "what fails in here fails the test")]

mod log_support;

use atp_router::log::{Disk, Event, LocalLog, LogError, RealDisk};
use log_support::{entry, intact, options, read};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const SCHEDULES: u64 = 400;
const SECTOR: usize = 4096;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// What the platter has of a file; the file itself is the page cache.
#[derive(Clone, Default)]
struct Platter {
    bytes: Vec<u8>,
    /// Sectors that were written since the last sync.
    dirty: BTreeSet<usize>,
}

#[derive(Clone)]
enum Name {
    Made(PathBuf, u64),
    Moved(PathBuf, PathBuf),
    Removed(PathBuf),
}

#[derive(Default)]
struct Cache {
    /// By inode.
    files: BTreeMap<u64, Platter>,
    /// Names that are durable, and what was done to them since.
    names: BTreeMap<PathBuf, u64>,
    undone: Vec<Name>,
    /// Files that have lost their name; open, so that no other gets their inode.
    nameless: BTreeMap<u64, File>,
    /// Changes until the machine stops, and syncs until one fails.
    changes_left: u64,
    syncs_left: u64,
}

/// A disk that can lose power.
#[derive(Default)]
struct Volatile(Mutex<Cache>);

fn broken() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn inode(path: &Path) -> io::Result<u64> {
    Ok(path.metadata()?.ino())
}

impl Cache {
    fn step(&mut self) -> io::Result<()> {
        self.changes_left = self.changes_left.checked_sub(1).ok_or_else(broken)?;
        Ok(())
    }
    fn sync_step(&mut self) -> io::Result<bool> {
        self.step()?;
        self.syncs_left = self.syncs_left.saturating_sub(1);
        Ok(self.syncs_left > 0)
    }
}

impl Disk for Volatile {
    fn create(&self, path: &Path) -> io::Result<File> {
        let mut cache = self.0.lock().unwrap();
        cache.step()?;
        let file = RealDisk.create(path)?;
        let ino = file.metadata()?.ino();
        cache.files.insert(ino, Platter::default());
        cache.undone.push(Name::Made(path.into(), ino));
        Ok(file)
    }
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        cache.step()?;
        RealDisk.write(file, bytes, offset)?;
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset).unwrap() + bytes.len());
        let platter = cache.files.entry(file.metadata()?.ino()).or_default();
        platter.dirty.extend(from / SECTOR..to.div_ceil(SECTOR));
        Ok(())
    }
    fn reserve(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.0.lock().unwrap().step()?;
        file.set_len(bytes)
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        let works = cache.sync_step()?;
        let platter = cache.files.entry(file.metadata()?.ino()).or_default();
        let dirty = std::mem::take(&mut platter.dirty);
        if !works {
            return Err(broken());
        }
        let cached = bytes_of(file)?;
        platter.bytes.resize(cached.len(), 0);
        dirty.into_iter().for_each(|sector| copy_sector(&cached, &mut platter.bytes, sector));
        Ok(())
    }
    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        if !cache.sync_step()? {
            return Err(broken());
        }
        let undone = std::mem::take(&mut cache.undone);
        apply(&mut cache.names, &undone);
        Ok(())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        cache.step()?;
        if let Ok(file) = File::open(to) {
            cache.nameless.insert(file.metadata()?.ino(), file);
        }
        RealDisk.rename(from, to)?;
        cache.undone.push(Name::Moved(from.into(), to.into()));
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        cache.step()?;
        let ino = inode(path)?;
        cache.nameless.insert(ino, File::open(path)?);
        RealDisk.remove(path)?;
        cache.undone.push(Name::Removed(path.into()));
        Ok(())
    }
    fn shorten(&self, file: &File, bytes: u64) -> io::Result<()> {
        self.0.lock().unwrap().step()?;
        RealDisk.shorten(file, bytes)
    }
}

fn bytes_of(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap()];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0)?;
    Ok(bytes)
}

fn copy_sector(from: &[u8], to: &mut [u8], sector: usize) {
    let (begin, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(from.len()).min(to.len()));
    if begin < end {
        to[begin..end].copy_from_slice(&from[begin..end]);
    }
}

fn apply(names: &mut BTreeMap<PathBuf, u64>, changes: &[Name]) {
    for change in changes {
        match change {
            Name::Made(path, ino) => {
                names.insert(path.clone(), *ino);
            }
            Name::Moved(from, to) => {
                if let Some(ino) = names.remove(from) {
                    names.insert(to.clone(), ino);
                }
            }
            Name::Removed(path) => {
                names.remove(path);
            }
        }
    }
}

impl Volatile {
    /// The machine runs again: for so many changes, until that many syncs.
    fn power(&self, changes: u64, syncs: u64) {
        let mut cache = self.0.lock().unwrap();
        (cache.changes_left, cache.syncs_left) = (changes, syncs);
    }

    /// The page cache is gone. Of what wasn't synced any part is there; names change in their order.
    fn cut(&self, dir: &Path, rng: &mut Rng) {
        let mut cache = self.0.lock().unwrap();
        let Cache { files, names, undone, nameless, .. } = &mut *cache;
        let nameless = std::mem::take(nameless).into_iter();
        let mut cached: BTreeMap<u64, Vec<u8>> = nameless.map(|(ino, file)| (ino, bytes_of(&file).unwrap())).collect();
        for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|path| is_segment(path)) {
            cached.insert(inode(&path).unwrap(), fs::read(&path).unwrap());
            fs::remove_file(path).unwrap();
        }
        let done = usize::try_from(rng.below(undone.len() as u64 + 1)).unwrap();
        apply(names, &undone[..done]);
        undone.clear();
        let mut found = BTreeMap::new();
        for (path, ino) in std::mem::take(names) {
            let Platter { mut bytes, dirty } = files.remove(&ino).unwrap_or_default();
            let cached = &cached[&ino];
            if rng.percent(50) {
                bytes.resize(cached.len(), 0);
            }
            dirty.iter().filter(|_| rng.percent(50)).for_each(|sector| copy_sector(cached, &mut bytes, *sector));
            fs::write(&path, &bytes).unwrap();
            let ino = inode(&path).unwrap();
            found.insert(ino, Platter { bytes, dirty: BTreeSet::new() });
            names.insert(path, ino);
        }
        *files = found;
    }
}

fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "log" || e == "new")
}

/// One router's life: opens the log, appends, and ends when it likes or its disk does. What has been acknowledged or served.
fn live(dir: &Path, disk: &Arc<Volatile>, rng: &mut Rng, acknowledged: u64) -> Result<u64, String> {
    let (log, recovered) = match LocalLog::open_on(options(dir), disk.clone()) {
        Ok(opened) => opened,
        Err(error @ (LogError::Corrupt { .. } | LogError::OtherLog { .. })) => return Err(error.to_string()),
        Err(_) => return Ok(acknowledged),
    };
    let mut served = recovered.positions[0];
    if served < acknowledged {
        return Err(format!("{acknowledged} entries were acknowledged or served, {served} are there"));
    }
    let mut events = log.events();
    for _ in 0..rng.below(6) {
        let (first, n) = (served + 1, rng.below(3) + 1);
        let size = [10, 3_000, 9_000, 30_000][usize::try_from(rng.below(4)).unwrap()];
        let mut batch: Vec<_> = (first..first + n).map(|next| (next, entry(next, size), false)).collect();
        if log.try_append(&mut batch).is_err() {
            break;
        }
        let mut over = false;
        log_support::until("a word of the log", || {
            while let Some(event) = events.try_next() {
                match event {
                    Event::Durable { position } => served = position,
                    Event::Failed(_) => over = true,
                    Event::Alone { .. } | Event::Room(_) | Event::NewSegment => {}
                }
            }
            over || served + 1 == first + n
        });
        if over {
            break;
        }
    }
    let _ = log.close();
    Ok(served)
}

fn schedule(seed: u64) -> Result<(), String> {
    let mut rng = Rng(seed);
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Volatile::default());
    let mut acknowledged = 0;
    for _ in 0..=rng.below(5) {
        let changes = if rng.percent(70) { rng.below(40) } else { 10_000 };
        let syncs = if rng.percent(40) { rng.below(12) + 1 } else { 10_000 };
        disk.power(changes, syncs);
        acknowledged = live(dir.path(), &disk, &mut rng, acknowledged)?;
        if rng.percent(60) {
            disk.cut(dir.path(), &mut rng);
        }
    }
    disk.power(10_000, 10_000);
    disk.cut(dir.path(), &mut rng);
    acknowledged = live(dir.path(), &disk, &mut rng, acknowledged)?;
    let entries = read(dir.path()).map_err(|error| error.to_string())?;
    if intact(&entries) < acknowledged {
        return Err(format!("{acknowledged} entries were acknowledged, {} are read", entries.len()));
    }
    Ok(())
}

#[test]
fn what_was_acknowledged_or_served_survives_power_cuts_and_failed_syncs() {
    let failed: Vec<_> = (1..=SCHEDULES).filter_map(|seed| schedule(seed).err().map(|why| (seed, why))).collect();
    assert!(failed.is_empty(), "{} of {SCHEDULES} schedules failed, {:?} first", failed.len(), failed[0]);
}

//! What happens before a log is written again: the last block is found, a torn tail cut, and the last block written anew
//! into a new segment. Corruption is reported and nothing is touched.

use super::block::{Block, Builder, Header, SEAL};
use super::disk::Disk;
use super::reader::Link;
use super::segment::{self, Segment, Tail};
use super::spare::Spare;
use super::{LogError, LogId, Reader, checkpoint};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// What was found when a log was opened.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The last entry that stands; 0: none.
    pub last_position: u64,
    /// The first piece of the newest whole checkpoint.
    pub checkpoint: Option<u64>,
    /// True: this opening made the log.
    pub new: bool,
    /// Bytes of the torn tail that was cut; 0: the log ended cleanly.
    pub torn_bytes: u64,
    /// False: the router before this one was killed, or the machine was.
    pub sealed: bool,
    /// The same for people, one fact per line.
    pub report: Vec<String>,
}

/// The end of a log that can be written.
pub(super) struct End {
    pub(super) recovered: Recovered,
    pub(super) link: Link,
    /// The new segment, with the last block in it, durable.
    pub(super) segment: Spare,
    pub(super) offset: u64,
    pub(super) spares: VecDeque<Spare>,
    /// Bytes of the newest checkpoint, and bytes of log from its beginning.
    pub(super) checkpoint_bytes: u64,
    pub(super) since_checkpoint: u64,
}

/// What the segments hold, before anything is changed.
struct Found {
    /// The segment with the last whole block, that block, and where it ends.
    last: Option<(Segment, Block, u64)>,
    /// What lies behind it in the same segment.
    tail: Tail,
    /// Later segments without a whole block: zeros only, or the torn write of a first block.
    zero: Vec<u64>,
    torn: Vec<(u64, u64)>,
    unfinished: Vec<PathBuf>,
    next_number: u64,
}

fn look(dir: &Path) -> Result<Found, LogError> {
    let (numbers, unfinished) = segment::list(dir)?;
    let (mut zero, mut torn) = (Vec::new(), Vec::new());
    let next_number = numbers.last().map_or(1, |last| last + 1);
    for (index, number) in numbers.iter().enumerate().rev() {
        let segment = Segment::open(dir, *number)?;
        if segment.block(0)?.is_none() {
            match segment.tail(0)? {
                Tail::Zero => zero.insert(0, *number),
                Tail::Torn { bytes } => torn.push((*number, bytes)),
                Tail::Block { offset } => {
                    let what = format!("damaged, but a whole block follows at offset {offset}");
                    return Err(LogError::corrupt(&segment.path, 0, what));
                }
            }
            continue;
        }
        let (block, end, tail) = walk(&segment)?;
        check_link(dir, &numbers[..index], &segment)?;
        return Ok(Found { last: Some((segment, block, end)), tail, zero, torn, unfinished, next_number });
    }
    // A log begins with an empty block that is durable before anything else: only its own write can have been torn.
    if let Some((number, _)) = torn.iter().find(|_| numbers.len() > 1) {
        return Err(LogError::corrupt(&segment::path(dir, *number), 0, "damaged, and no segment holds a whole block"));
    }
    Ok(Found { last: None, tail: Tail::Zero, zero, torn, unfinished, next_number })
}

/// From block to block to the end of a segment.
fn walk(segment: &Segment) -> Result<(Block, u64, Tail), LogError> {
    let mut last: Option<Block> = None;
    let mut offset = 0;
    loop {
        let Some(block) = segment.block(offset)? else { break };
        if let Some(last) = &last {
            Link::of(&last.header).admits(&block.header, &segment.path)?;
        }
        offset += block.header.extent();
        last = Some(block);
    }
    let tail = segment.tail(offset)?;
    if let Tail::Block { offset: whole } = tail {
        let what = format!("damaged, but a whole block follows at offset {whole}");
        return Err(LogError::corrupt(&segment.path, offset, what));
    }
    let last = last.ok_or_else(|| LogError::corrupt(&segment.path, 0, "it changes while it is read"))?;
    Ok((last, offset, tail))
}

/// The last segment must go on where an earlier one ends: acknowledged blocks may be missing there too.
fn check_link(dir: &Path, earlier: &[u64], last: &Segment) -> Result<(), LogError> {
    let Some(first) = last.header(0)? else { return Ok(()) };
    let Some(number) = earlier.last() else { return Ok(()) };
    let segment = Segment::open(dir, *number)?;
    let (mut offset, mut link) = (0, None);
    while let Some(header) = segment.header(offset)? {
        if header.number >= first.number {
            break;
        }
        offset += header.extent();
        link = Some(Link::of(&header));
    }
    match link {
        Some(link) => link.admits(&first, &last.path).map(|_| ()).map_err(|error| match error {
            LogError::Corrupt { .. } => {
                let what = format!(
                    "damaged, or blocks are missing: block {} follows in {}",
                    first.number,
                    last.path.display()
                );
                LogError::corrupt(&segment.path, offset, what)
            }
            other => other,
        }),
        // The segment before holds nothing but an older copy of the same block.
        None if segment.header(0)?.is_some_and(|header| header.number == first.number) => Ok(()),
        None => Err(LogError::corrupt(&segment.path, 0, "damaged, but whole segments follow")),
    }
}

/// Finds the end, cuts, and writes the last block anew; durable when it returns.
pub(super) fn recover(dir: &Path, disk: &dyn Disk, new_id: LogId) -> Result<End, LogError> {
    let found = look(dir)?;
    let mut report = Vec::new();
    for path in &found.unfinished {
        disk.remove(path).map_err(LogError::io("remove", path))?;
    }
    let mut torn_bytes = 0;
    for (number, bytes) in &found.torn {
        let path = segment::path(dir, *number);
        disk.remove(&path).map_err(LogError::io("remove", &path))?;
        torn_bytes += bytes;
        report.push(format!("torn tail: {bytes} bytes of an unfinished first block in {} removed", path.display()));
    }
    if !found.torn.is_empty() || !found.unfinished.is_empty() {
        // Durable before a later segment is made: two torn ones in a row never stand in one log.
        disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))?;
    }
    if let Some((segment, _, end)) = &found.last {
        torn_bytes += cut(disk, segment, *end, found.tail, &mut report)?;
    }
    let since = checkpoint_distance(dir, &found)?;

    let mut spares = VecDeque::new();
    for number in &found.zero {
        spares.push_back(open_spare(dir, *number)?);
    }
    let segment = match spares.pop_front() {
        Some(spare) => spare,
        None => create(dir, disk, found.next_number)?,
    };
    let (link, offset) = rewrite(dir, disk, &segment, found.last.as_ref().map(|(_, block, _)| block), new_id)?;
    if let Some((old, _, end)) = &found.last {
        // What is behind is zero and durably so; this only gives the room back.
        let file = writable(&old.path)?;
        disk.shorten(&file, *end).map_err(LogError::io("shorten", &old.path))?;
    }
    let recovered = Recovered {
        last_position: link.next_position - 1,
        checkpoint: since.0,
        new: found.last.is_none(),
        torn_bytes,
        sealed: found.last.as_ref().is_none_or(|(_, block, _)| block.header.is_seal()) && torn_bytes == 0,
        report,
    };
    Ok(End { recovered, link, segment, offset, spares, checkpoint_bytes: since.1, since_checkpoint: since.2 })
}

/// Zeroes what lies behind the last whole block, and syncs the segment whether or not anything did.
fn cut(disk: &dyn Disk, segment: &Segment, end: u64, tail: Tail, report: &mut Vec<String>) -> Result<u64, LogError> {
    let file = writable(&segment.path)?;
    let torn = match tail {
        Tail::Torn { bytes } => bytes,
        Tail::Zero | Tail::Block { .. } => 0,
    };
    let zeros = vec![0; 1 << 20];
    let mut done = 0;
    while done < torn {
        let n = (torn - done).min(1 << 20);
        let step = &zeros[..usize::try_from(n).unwrap_or(zeros.len())];
        disk.write(&file, step, end + done).map_err(LogError::io("zero the torn tail of", &segment.path))?;
        done += n;
    }
    disk.sync(&file).map_err(LogError::io("sync", &segment.path))?;
    if torn > 0 {
        report.push(format!("torn tail: {torn} bytes cut from {} at offset {end}", segment.path.display()));
    }
    Ok(torn)
}

/// (position of the newest checkpoint, its bytes, bytes of log since it began).
fn checkpoint_distance(dir: &Path, found: &Found) -> Result<(Option<u64>, u64, u64), LogError> {
    let Some((last, _, end)) = &found.last else { return Ok((None, 0, 0)) };
    let reader = Reader::open(dir)?;
    let checkpoint = checkpoint::newest(&reader)?;
    let (from, skipped) = checkpoint.map_or((0, 0), |found| (found.segment, found.offset));
    let mut since = *end;
    for number in reader.segments().iter().filter(|number| **number >= from && **number < last.number) {
        since += reader.segment(*number)?.bytes()?;
    }
    Ok((checkpoint.map(|c| c.position), checkpoint.map_or(0, |c| c.bytes), since.saturating_sub(skipped)))
}

fn writable(path: &Path) -> Result<File, LogError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(LogError::io("open", path))
}

/// A spare that an earlier run made and didn't use: read to be all zeros.
fn open_spare(dir: &Path, number: u64) -> Result<Spare, LogError> {
    let path = segment::path(dir, number);
    let file = writable(&path)?;
    let bytes = file.metadata().map_err(LogError::io("read the size of", &path))?.len();
    Ok(Spare { number, path, file, bytes })
}

/// A segment that starts empty, so that opening never waits for zeros: it grows until the first spare is ready.
fn create(dir: &Path, disk: &dyn Disk, number: u64) -> Result<Spare, LogError> {
    let path = segment::path(dir, number);
    let file = disk.create(&path).map_err(LogError::io("create", &path))?;
    Ok(Spare { number, path, file, bytes: 0 })
}

/// Writes the last block, or block 1 of a new log, as the first of `segment`; durable, with its name.
fn rewrite(
    dir: &Path,
    disk: &dyn Disk,
    segment: &Spare,
    last: Option<&Block>,
    new_id: LogId,
) -> Result<(Link, u64), LogError> {
    let mut builder = Builder::default();
    builder.clear();
    let first = Header {
        flags: SEAL,
        log_id: new_id,
        segment: 0,
        offset: 0,
        number: 1,
        previous: 0,
        entries: 0,
        first: 1,
        body_bytes: 0,
        body_crc: 0,
        checksum: 0,
    };
    let mut header = last.map_or(first, |block| block.header);
    if let Some(block) = last {
        builder.copy(block);
    }
    (header.segment, header.offset) = (segment.number, 0);
    let bytes = builder.finish(&mut header);
    disk.write(&segment.file, bytes, 0).map_err(LogError::io("write", &segment.path))?;
    disk.sync(&segment.file).map_err(LogError::io("sync", &segment.path))?;
    disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))?;
    Ok((Link::of(&header), header.extent()))
}

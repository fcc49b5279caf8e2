//! What happens before a log is written again: the last block is found, a torn tail cut, and the last block written anew
//! into a new segment. Corruption is reported and nothing is touched.

use super::block::{Block, Builder, HEADER, Header, Run};
use super::disk::Disk;
use super::reader::{Due, Link};
use super::segment::{self, Segment, Tail};
use super::spare::Spare;
use super::{LogError, LogId, Reader, checkpoint, pruned};
use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// What was found when a log was opened.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// By shard: the last entry that stands; 0: none.
    pub positions: Vec<u64>,
    /// By shard: the first piece of the newest whole checkpoint.
    pub checkpoints: Vec<Option<u64>>,
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
    /// By shard: the position of the next entry.
    pub(super) next: Vec<u64>,
    /// The new segment, with the last block in it, durable.
    pub(super) segment: Spare,
    pub(super) offset: u64,
    pub(super) spares: VecDeque<Spare>,
    /// By shard: bytes of the newest checkpoint, and bytes of log from its beginning.
    pub(super) checkpoints: Vec<(u64, u64)>,
}

/// What the segments hold, before anything is changed.
struct Found {
    /// The segment with the last whole block.
    last: Option<Last>,
    /// What lies behind it in the same segment.
    tail: Tail,
    /// Later segments without a whole block: zeros only, or the torn write of a first block.
    zero: Vec<u64>,
    torn: Vec<(u64, u64)>,
    unfinished: Vec<PathBuf>,
    next_number: u64,
}

/// A segment that holds the log's last whole block.
struct Last {
    segment: Segment,
    block: Block,
    /// Where it ends.
    end: u64,
    /// By shard: the position that is due behind it.
    due: Due,
}

fn look(dir: &Path, begins: pruned::Found) -> Result<Found, LogError> {
    let pruned::Found { segments: numbers, unfinished, .. } = begins;
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
        let (last, tail) = walk(segment)?;
        check_link(dir, &numbers[..index], &last.segment)?;
        return Ok(Found { last: Some(last), tail, zero, torn, unfinished, next_number });
    }
    // A log begins with an empty block that is durable before anything else: only its own write can have been torn.
    if let Some((number, _)) = torn.iter().find(|_| numbers.len() > 1) {
        return Err(LogError::corrupt(&segment::path(dir, *number), 0, "damaged, and no segment holds a whole block"));
    }
    Ok(Found { last: None, tail: Tail::Zero, zero, torn, unfinished, next_number })
}

/// From block to block to the end of a segment.
fn walk(segment: Segment) -> Result<(Last, Tail), LogError> {
    let mut last: Option<Block> = None;
    let (mut end, mut due) = (0, Due::default());
    while let Some(block) = segment.block(end)? {
        if let Some(last) = &last {
            Link::of(last.header()).admits(block.header(), &segment.path)?;
        }
        due.pass(block.header(), &block.head.runs, &segment.path)?;
        end += block.header().extent();
        last = Some(block);
    }
    let tail = segment.tail(end)?;
    if let Tail::Block { offset: whole } = tail {
        let what = format!("damaged, but a whole block follows at offset {whole}");
        return Err(LogError::corrupt(&segment.path, end, what));
    }
    let block = last.ok_or_else(|| LogError::corrupt(&segment.path, 0, "it changes while it is read"))?;
    Ok((Last { segment, block, end, due }, tail))
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

/// Finds the end, cuts, and writes the last block anew; durable when it returns. `new_id` and `shards` are for a log that is made.
pub(super) fn recover(dir: &Path, disk: &dyn Disk, new_id: LogId, shards: u32) -> Result<End, LogError> {
    let begins = pruned::find(dir)?;
    let mut report = Vec::new();
    match begins.finish(dir, disk)? {
        0 => {}
        n => report.push(format!("{n} segments removed that `atp log prune` had given up")),
    }
    let found = look(dir, begins)?;
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
    if let Some(last) = &found.last {
        torn_bytes += cut(disk, last, found.tail, &mut report)?;
    }
    let next = found.last.as_ref().map_or_else(|| vec![1; shards as usize], |last| last.due.positions().to_vec());
    let checkpoints = checkpoint_distances(dir, &found, next.len())?;

    let mut spares = VecDeque::new();
    for number in &found.zero {
        spares.push_back(open_spare(dir, *number)?);
    }
    let segment = match spares.pop_front() {
        Some(spare) => spare,
        None => create(dir, disk, found.next_number)?,
    };
    let last = found.last.as_ref().map(|last| &last.block);
    let (link, offset) = rewrite(dir, disk, &segment, last, &next, new_id)?;
    if let Some(Last { segment: old, end, .. }) = &found.last {
        // What is behind is zero and durably so; this only gives the room back.
        let file = writable(&old.path)?;
        disk.shorten(&file, *end).map_err(LogError::io("shorten", &old.path))?;
    }
    let recovered = Recovered {
        positions: next.iter().map(|next| next - 1).collect(),
        checkpoints: checkpoints.iter().map(|(position, _, _)| *position).collect(),
        new: last.is_none(),
        torn_bytes,
        sealed: last.is_none_or(|block| block.header().is_seal()) && torn_bytes == 0,
        report,
    };
    let checkpoints = checkpoints.into_iter().map(|(_, bytes, since)| (bytes, since)).collect();
    Ok(End { recovered, link, next, segment, offset, spares, checkpoints })
}

/// Zeroes what lies behind the last whole block, writes that one over itself, and syncs. After a failed sync the page cache holds
/// what the disk doesn't: without a copy in this place the next start would find nothing between what it goes on from and the
/// one that follows in a new segment.
fn cut(disk: &dyn Disk, last: &Last, tail: Tail, report: &mut Vec<String>) -> Result<u64, LogError> {
    let Last { segment, end, .. } = last;
    let (end, header) = (*end, last.block.header());
    let file = writable(&segment.path)?;
    let same = segment.up_to(Vec::new(), header.offset, HEADER + header.body_bytes as usize)?;
    disk.write(&file, &same, header.offset).map_err(LogError::io("write", &segment.path))?;
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

/// By shard: position of the newest checkpoint, its bytes, bytes of log since it began.
fn checkpoint_distances(dir: &Path, found: &Found, shards: usize) -> Result<Vec<(Option<u64>, u64, u64)>, LogError> {
    let Some(last) = &found.last else { return Ok(vec![(None, 0, 0); shards]) };
    let reader = Reader::open(dir)?;
    // Bytes of log before each segment.
    let (mut before, mut sum) = (BTreeMap::new(), 0);
    for number in reader.segments().iter().filter(|number| **number <= last.segment.number) {
        before.insert(*number, sum);
        sum += if *number == last.segment.number { last.end } else { reader.segment(*number)?.bytes()? };
    }
    let all: Vec<u32> = (0..).take(shards).collect();
    let since = |found: &checkpoint::Found| sum - before.get(&found.segment).copied().unwrap_or(0) - found.offset;
    let newest = checkpoint::newest(&reader, &all)?;
    Ok(newest.iter().map(|c| c.as_ref().map_or((None, 0, sum), |c| (Some(c.position), c.bytes, since(c)))).collect())
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

/// Writes the last block, or block 1 of a new log, as the first of `segment`; durable, with its name. `next`: by shard, the
/// position behind it.
fn rewrite(
    dir: &Path,
    disk: &dyn Disk,
    segment: &Spare,
    last: Option<&Block>,
    next: &[u64],
    new_id: LogId,
) -> Result<(Link, u64), LogError> {
    let mut builder = Builder::default();
    let shards = u32::try_from(next.len()).expect("bounded by SHARDS_MAX");
    let entries = |shard| last.and_then(|block| block.head.run(shard)).map_or(0, |run| run.entries);
    let runs: Vec<Run> = match shards {
        1 => Vec::new(),
        _ => (0..)
            .zip(next)
            .map(|(shard, next)| (shard, entries(shard), next))
            .map(|(shard, entries, next)| Run { shard, entries, first: next - u64::from(entries) })
            .collect(),
    };
    match last {
        Some(block) => builder.copy(block, &runs),
        None => builder.begin(&runs),
    }
    let mut header = last.map_or(Header::first(new_id, shards), |block| *block.header());
    (header.segment, header.offset) = (segment.number, 0);
    let bytes = builder.finish(&mut header);
    disk.write(&segment.file, bytes, 0).map_err(LogError::io("write", &segment.path))?;
    disk.sync(&segment.file).map_err(LogError::io("sync", &segment.path))?;
    disk.sync_dir(dir).map_err(LogError::io("sync the directory", dir))?;
    Ok((Link::of(&header), header.extent()))
}

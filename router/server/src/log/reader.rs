//! Reading a log, without a lock, also while it is written: whole blocks in their order up to the last one.
//! It tells the end of the log from damage in its middle, and it never changes anything.

use super::block::{Block, Header, Run};
use super::pruned::{self, Beginning, Note};
use super::segment::{self, Segment, Tail};
use super::{LogError, LogId};
use bytes::Bytes;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A log to read, as one of its shards. Cheap to open: one directory listing.
#[derive(Clone, Debug)]
pub struct Reader {
    dir: PathBuf,
    segments: Vec<u64>,
    shard: u32,
    pruned: Option<Arc<Note>>,
}

impl Reader {
    /// Shard 0 of the log in `dir`.
    ///
    /// # Errors
    /// `NoLog` where `dir` holds no segment; `NotThisLog` where its beginning is gone and nobody pruned it; I/O.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, LogError> {
        let dir = dir.into();
        if !dir.is_dir() {
            return Err(LogError::NoLog { dir });
        }
        let found = pruned::find(&dir)?;
        if found.segments.is_empty() {
            return Err(LogError::NoLog { dir });
        }
        Ok(Self { dir, segments: found.segments, shard: 0, pruned: found.note.map(Arc::new) })
    }

    /// The same log's shard `shard`.
    #[must_use]
    pub fn shard(self, shard: u32) -> Self {
        Self { shard, ..self }
    }

    /// The entries from position `from` (0 and 1 are the beginning; of a pruned log what is left of it) to the end of the log. The end is searched for damage:
    /// a whole block behind it makes the last item an error.
    #[must_use]
    pub fn entries(&self, from: u64) -> Entries {
        Entries::new(self, from, None)
    }

    /// The entries `from..=upto`, which are known to be durable: it is an error if the log ends before. Ends without a look
    /// at what lies behind; the way to read the log of a running router.
    #[must_use]
    pub fn entries_between(&self, from: u64, upto: u64) -> Entries {
        Entries::new(self, from, Some(upto))
    }

    /// The entries of all shards in the order in which they were written, of each from its position in `from` on: one pass.
    ///
    /// # Errors
    /// I/O; `NoShard` where `from` has more shards than the log.
    pub fn all(&self, from: Vec<u64>) -> Result<AllEntries, LogError> {
        let mut begin = self.segments.len() - 1;
        for (shard, from) in (0..).zip(&from) {
            begin = begin.min(self.place(shard, *from)?);
        }
        Ok(AllEntries { blocks: Blocks::at(self, begin, 0), from, block: Vec::new().into_iter(), done: false })
    }

    /// The id that the log's blocks carry; `None`: no whole block yet.
    ///
    /// # Errors
    /// I/O.
    pub fn log_id(&self) -> Result<Option<LogId>, LogError> {
        Ok(self.first_header()?.map(|header| header.log_id))
    }

    /// How many shards the log has.
    ///
    /// # Errors
    /// `NoLog` where there is no whole block; I/O.
    pub fn shards(&self) -> Result<u32, LogError> {
        let first = self.first_header()?.ok_or_else(|| LogError::NoLog { dir: self.dir.clone() })?;
        Ok(first.shards)
    }

    /// Where this shard begins since the log was pruned; `None`: at its first entry.
    #[must_use]
    pub fn beginning(&self) -> Option<Beginning> {
        self.pruned.as_ref()?.shards.get(self.shard as usize).copied().flatten()
    }

    fn first_header(&self) -> Result<Option<Header>, LogError> {
        for number in &self.segments {
            if let Some(header) = self.segment(*number)?.header(0)? {
                return Ok(Some(header));
            }
        }
        Ok(None)
    }

    /// The shard that it reads.
    pub(super) const fn of(&self) -> u32 {
        self.shard
    }
    pub(super) fn segments(&self) -> &[u64] {
        &self.segments
    }
    pub(super) fn segment(&self, number: u64) -> Result<Segment, LogError> {
        Segment::open(&self.dir, number)
    }

    /// The entries of a shard from the block that stands at `offset` of this segment.
    pub(super) fn entries_at(&self, shard: u32, segment: u64, offset: u64, from: u64) -> Entries {
        let index = self.segments.partition_point(|number| *number < segment);
        let begun = Some(Blocks::at(self, index, offset));
        Entries { shard, blocks: begun, ..Entries::new(self, from, None) }
    }

    /// The last segment before which the shard has no entry from `from` on. One that doesn't begin with a whole block counts as
    /// later: reading toward it finds out what is wrong with it.
    fn place(&self, shard: u32, from: u64) -> Result<usize, LogError> {
        if let Some(header) = self.first_header()?
            && shard >= header.shards
        {
            return Err(LogError::NoShard { shard, shards: header.shards });
        }
        let (mut low, mut high) = (0, self.segments.len());
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            let head = self.segment(self.segments[middle])?.head(0)?;
            let before = head.and_then(|(head, _)| head.run(shard)).is_some_and(|run| run.first <= from);
            if before {
                low = middle;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }
}

/// Where the walk stands: what the next block must say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link {
    pub(super) log_id: LogId,
    pub(super) shards: u32,
    pub(super) number: u64,
    pub(super) checksum: u32,
    pub(super) next_entry: u64,
}

impl Link {
    pub(super) const fn of(header: &Header) -> Self {
        Self {
            log_id: header.log_id,
            shards: header.shards,
            number: header.number,
            checksum: header.checksum,
            next_entry: header.next_entry(),
        }
    }

    /// Checks that a whole block is the next one; `Ok(false)`: it was read before, at the end of an older segment.
    pub(super) fn admits(&self, header: &Header, file: &Path) -> Result<bool, LogError> {
        same_log(header, self.log_id, file)?;
        if header.number <= self.number && header.offset == 0 {
            return Ok(false);
        }
        if header.number != self.number + 1 {
            let what = format!("block {} where block {} is due", header.number, self.number + 1);
            return Err(LogError::corrupt(file, header.offset, what));
        }
        if header.previous != self.checksum {
            return Err(LogError::corrupt(file, header.offset, "it does not chain to the block before it"));
        }
        if (header.first, header.shards) != (self.next_entry, self.shards) {
            let what = format!(
                "it begins with entry {} of a log of {} shards, entry {} of {} shards is due",
                header.first, header.shards, self.next_entry, self.shards
            );
            return Err(LogError::corrupt(file, header.offset, what));
        }
        Ok(true)
    }
}

/// By shard: the position that is due, 0 where it isn't known yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Due(Vec<u64>);

impl Due {
    /// Goes on behind a block that wasn't read before.
    pub(super) fn pass(&mut self, header: &Header, runs: &[Run], file: &Path) -> Result<(), LogError> {
        self.0.resize(header.shards as usize, 0);
        for run in runs {
            let due = &mut self.0[run.shard as usize];
            if *due > 0 && run.first != *due {
                let what = format!("shard {} goes on with entry {}, entry {due} is due", run.shard, run.first);
                return Err(LogError::corrupt(file, header.offset, what));
            }
            *due = run.next();
        }
        Ok(())
    }

    pub(super) fn positions(&self) -> &[u64] {
        &self.0
    }
}

fn same_log(header: &Header, expected: LogId, file: &Path) -> Result<(), LogError> {
    if header.log_id == expected {
        return Ok(());
    }
    Err(LogError::OtherLog { file: file.to_path_buf(), offset: header.offset, found: header.log_id, expected })
}

/// Whole blocks in order, each once.
#[derive(Debug)]
struct Blocks {
    reader: Reader,
    index: usize,
    segment: Option<Segment>,
    offset: u64,
    link: Option<Link>,
    due: Due,
    /// A whole block was seen behind this offset of this segment, which was damaged at the first look.
    doubt: Option<(u64, u64)>,
}

impl Blocks {
    fn at(reader: &Reader, index: usize, offset: u64) -> Self {
        let (reader, due) = (reader.clone(), Due::default());
        Self { reader, index, segment: None, offset, link: None, due, doubt: None }
    }

    /// The next one that wasn't read before and holds something `wanted`; `None`: the end of the log.
    fn next(&mut self, wanted: impl Fn(&Run) -> bool) -> Result<Option<Block>, LogError> {
        let mut segment = match self.segment.take() {
            Some(segment) => segment,
            None => self.reader.segment(self.reader.segments[self.index])?,
        };
        if self.link.is_none()
            && let (Some(header), Some(log_id)) = (segment.header(self.offset)?, self.reader.log_id()?)
        {
            same_log(&header, log_id, &segment.path)?;
        }
        loop {
            if let Some((block, new)) = self.block(&segment, &wanted)? {
                if let Some(block) = block.filter(|_| new) {
                    self.segment = Some(segment);
                    return Ok(Some(block));
                }
            } else if let Some(next) = self.next_segment(&segment)? {
                segment = next;
                self.offset = 0;
            } else if !self.damage_is_real(&segment)? {
                return Ok(None);
            }
        }
    }

    /// Goes over the next block of a segment: itself if it holds something wanted, and whether it wasn't read before. `None`:
    /// there is no whole one.
    fn block(
        &mut self,
        segment: &Segment,
        wanted: impl Fn(&Run) -> bool,
    ) -> Result<Option<(Option<Block>, bool)>, LogError> {
        let Some((head, bytes)) = segment.head(self.offset)? else { return Ok(None) };
        let header = head.header;
        // A block is passed over unread only if a whole one follows: else its body decides whether it is the torn tail.
        let passed = !head.runs.iter().any(|run| run.entries > 0 && wanted(run))
            && segment.header(self.offset + header.extent())?.is_some();
        let mut block = None;
        if !passed {
            block = segment.rest(header, bytes)?;
            if block.is_none() {
                return Ok(None);
            }
        }
        let new = self.link.as_ref().map_or(Ok(true), |link| link.admits(&header, &segment.path))?;
        if new {
            self.due.pass(&header, &head.runs, &segment.path)?;
        }
        self.offset += header.extent();
        self.link = Some(Link::of(&header));
        Ok(Some((block, new)))
    }

    /// The segment behind this one, if it goes on where this one ends. One that begins further on isn't damage yet: a writer
    /// may have filled this one and begun that one since this one was read.
    fn next_segment(&mut self, segment: &Segment) -> Result<Option<Segment>, LogError> {
        if self.index + 1 == self.reader.segments.len() {
            self.reader.segments = segment::list(&self.reader.dir)?.0;
            self.index = self.reader.segments.partition_point(|number| *number < segment.number);
        }
        let Some(number) = self.reader.segments.get(self.index + 1) else { return Ok(None) };
        let next = self.reader.segment(*number)?;
        let Some(first) = next.block(0)? else { return Ok(None) };
        let goes_on = match &self.link {
            Some(link) => {
                same_log(first.header(), link.log_id, &next.path)?;
                first.header().number <= link.number + 1
            }
            None => self.offset > 0,
        };
        if !goes_on {
            return Ok(None);
        }
        self.index += 1;
        Ok(Some(next))
    }

    /// True: look again, a writer went on meanwhile. False: the end of the log.
    fn damage_is_real(&mut self, segment: &Segment) -> Result<bool, LogError> {
        let mut whole = None;
        if let Tail::Block { offset } = segment.tail(self.offset)? {
            whole = Some((segment.path.clone(), offset));
        }
        for number in &self.reader.segments[self.index + 1..] {
            let later = self.reader.segment(*number)?;
            if let Tail::Block { offset } = later.tail(0)? {
                whole.get_or_insert((later.path, offset));
            }
        }
        let Some((path, offset)) = whole else { return Ok(false) };
        if self.doubt.replace((segment.number, self.offset)) == Some((segment.number, self.offset)) {
            let what = format!("damaged, but a whole block follows in {} at offset {offset}", path.display());
            return Err(LogError::corrupt(&segment.path, self.offset, what));
        }
        Ok(true)
    }
}

/// One shard's entries with their positions, in order. An error is the last item.
#[derive(Debug)]
pub struct Entries {
    reader: Reader,
    shard: u32,
    /// `None`: not begun.
    blocks: Option<Blocks>,
    from: u64,
    upto: Option<u64>,
    block: std::vec::IntoIter<(u64, Bytes)>,
    done: bool,
}

impl Entries {
    fn new(reader: &Reader, from: u64, upto: Option<u64>) -> Self {
        Self {
            reader: reader.clone(),
            shard: reader.shard,
            blocks: None,
            from: from.max(1),
            upto,
            block: Vec::new().into_iter(),
            done: upto.is_some_and(|upto| upto < from.max(1)),
        }
    }

    fn advance(&mut self) -> Result<Option<(u64, Bytes)>, LogError> {
        let (shard, from) = (self.shard, self.from);
        loop {
            if let Some((position, entry)) = self.block.next() {
                if position < from {
                    continue;
                }
                self.done = self.upto.is_some_and(|upto| position >= upto);
                return Ok(Some((position, entry)));
            }
            let blocks = match &mut self.blocks {
                Some(blocks) => blocks,
                none => none.insert(Blocks::at(&self.reader, self.reader.place(shard, from)?, 0)),
            };
            match blocks.next(|run| run.shard == shard && run.next() > from)? {
                Some(block) => {
                    let own = block.entries().filter(|(of, _, _)| *of == shard);
                    self.block = own.map(|(_, position, entry)| (position, entry)).collect::<Vec<_>>().into_iter();
                }
                None => return self.upto.map_or(Ok(None), |position| Err(LogError::Missing { shard, position })),
            }
        }
    }
}

impl Iterator for Entries {
    type Item = Result<(u64, Bytes), LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.done = true;
        }
        item
    }
}

/// Entries of all shards: shard, position, bytes. An error is the last item.
#[derive(Debug)]
pub struct AllEntries {
    blocks: Blocks,
    from: Vec<u64>,
    block: std::vec::IntoIter<(u32, u64, Bytes)>,
    done: bool,
}

impl AllEntries {
    fn advance(&mut self) -> Result<Option<(u32, u64, Bytes)>, LogError> {
        let from = |shard: u32| self.from.get(shard as usize).copied().unwrap_or(u64::MAX);
        loop {
            if let Some(entry) = self.block.by_ref().find(|(shard, position, _)| *position >= from(*shard)) {
                return Ok(Some(entry));
            }
            match self.blocks.next(|run| run.next() > from(run.shard))? {
                Some(block) => self.block = block.entries().collect::<Vec<_>>().into_iter(),
                None => return Ok(None),
            }
        }
    }
}

impl Iterator for AllEntries {
    type Item = Result<(u32, u64, Bytes), LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

//! Reading a log, without a lock, also while it is written: whole blocks in their order up to the last one.
//! It tells the end of the log from damage in its middle, and it never changes anything.

use super::block::{Block, Header};
use super::segment::{self, Segment, Tail};
use super::{LogError, LogId};
use bytes::Bytes;
use std::path::{Path, PathBuf};

/// A log to read. Cheap to open: one directory listing.
#[derive(Clone, Debug)]
pub struct Reader {
    dir: PathBuf,
    segments: Vec<u64>,
}

impl Reader {
    /// # Errors
    /// `NoLog` where `dir` holds no segment; I/O.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, LogError> {
        let dir = dir.into();
        if !dir.is_dir() {
            return Err(LogError::NoLog { dir });
        }
        let (segments, _) = segment::list(&dir)?;
        if segments.is_empty() {
            return Err(LogError::NoLog { dir });
        }
        Ok(Self { dir, segments })
    }

    /// The entries from position `from` (0 and 1 are the beginning) to the end of the log. The end is searched for damage:
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

    /// The id that the log's blocks carry; `None`: no whole block yet.
    ///
    /// # Errors
    /// I/O.
    pub fn log_id(&self) -> Result<Option<LogId>, LogError> {
        for number in &self.segments {
            if let Some(header) = self.segment(*number)?.header(0)? {
                return Ok(Some(header.log_id));
            }
        }
        Ok(None)
    }

    pub(super) fn segments(&self) -> &[u64] {
        &self.segments
    }
    pub(super) fn segment(&self, number: u64) -> Result<Segment, LogError> {
        Segment::open(&self.dir, number)
    }

    /// The last segment that begins at or before `from`. One that doesn't begin with a whole header counts as later: reading
    /// toward it finds out what is wrong with it.
    fn place(&self, from: u64) -> Result<usize, LogError> {
        let (mut low, mut high) = (0, self.segments.len());
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            let before = self.segment(self.segments[middle])?.header(0)?.is_some_and(|h| h.first <= from);
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
    pub(super) number: u64,
    pub(super) checksum: u32,
    pub(super) next_position: u64,
}

impl Link {
    pub(super) const fn of(header: &Header) -> Self {
        Self {
            log_id: header.log_id,
            number: header.number,
            checksum: header.checksum,
            next_position: header.next_position(),
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
        if header.first != self.next_position {
            let what = format!("it begins with entry {}, entry {} is due", header.first, self.next_position);
            return Err(LogError::corrupt(file, header.offset, what));
        }
        Ok(true)
    }
}

fn same_log(header: &Header, expected: LogId, file: &Path) -> Result<(), LogError> {
    if header.log_id == expected {
        return Ok(());
    }
    Err(LogError::OtherLog { file: file.to_path_buf(), offset: header.offset, found: header.log_id, expected })
}

/// Entries with their positions, in order. An error is the last item.
#[derive(Debug)]
pub struct Entries {
    reader: Reader,
    index: usize,
    segment: Option<Segment>,
    offset: u64,
    link: Option<Link>,
    from: u64,
    upto: Option<u64>,
    block: std::vec::IntoIter<(u64, Bytes)>,
    /// A whole block was seen behind this offset of this segment, which was damaged at the first look.
    doubt: Option<(u64, u64)>,
    done: bool,
}

impl Entries {
    fn new(reader: &Reader, from: u64, upto: Option<u64>) -> Self {
        Self {
            reader: reader.clone(),
            index: 0,
            segment: None,
            offset: 0,
            link: None,
            from: from.max(1),
            upto,
            block: Vec::new().into_iter(),
            doubt: None,
            done: upto.is_some_and(|upto| upto < from.max(1)),
        }
    }

    /// Opens the first segment and goes to the block that holds `from`, by headers alone.
    fn seek(&mut self) -> Result<Segment, LogError> {
        self.index = self.reader.place(self.from)?;
        let segment = self.reader.segment(self.reader.segments[self.index])?;
        let log_id = self.reader.log_id()?;
        while let Some(header) = segment.header(self.offset)? {
            same_log(&header, log_id.unwrap_or(header.log_id), &segment.path)?;
            if let Some(link) = &self.link {
                link.admits(&header, &segment.path)?;
            }
            if header.next_position() > self.from {
                break;
            }
            // The block is skipped unread only if a whole one follows: else its body decides whether it is the torn tail.
            let next = self.offset + header.extent();
            if segment.header(next)?.is_none() {
                break;
            }
            self.link = Some(Link::of(&header));
            self.offset = next;
        }
        Ok(segment)
    }

    /// The next whole block that wasn't read before; `None`: the end of the log.
    fn next_block(&mut self) -> Result<Option<Block>, LogError> {
        let mut segment = match self.segment.take() {
            Some(segment) => segment,
            None => self.seek()?,
        };
        loop {
            if let Some(block) = segment.block(self.offset)? {
                let new = self.link.as_ref().map_or(Ok(true), |link| link.admits(&block.header, &segment.path))?;
                self.offset += block.header.extent();
                self.link = Some(Link::of(&block.header));
                if new {
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
                same_log(&first.header, link.log_id, &next.path)?;
                first.header.number <= link.number + 1
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

    fn advance(&mut self) -> Result<Option<(u64, Bytes)>, LogError> {
        loop {
            if let Some((position, entry)) = self.block.next() {
                if position < self.from {
                    continue;
                }
                self.done = self.upto.is_some_and(|upto| position >= upto);
                return Ok(Some((position, entry)));
            }
            match self.next_block()? {
                Some(block) => self.block = block.entries().collect::<Vec<_>>().into_iter(),
                None => return self.upto.map_or(Ok(None), |position| Err(LogError::Missing { position })),
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

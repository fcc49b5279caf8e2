//! One block: its header, its index, its entries, and how they are checked. Bytes only; it never reads or writes a file.
//!
//! A log of one shard has blocks of format 1, whose entries follow each other without an index; any other one has blocks of
//! format 2, which begin with the runs of their shards. The first block of a segment has a run for every shard, also for one
//! without entries: so a reader finds where to begin.

use super::LogId;
use atp_core::placement::SHARDS_MAX;
use bytes::{BufMut, Bytes};

/// Blocks begin at multiples of this: a page, and the largest sector that disks write as one.
pub(super) const PAGE: u64 = 4096;
pub(super) const HEADER: usize = 80;
/// More than any writer makes (one entry of `ENTRY_BYTES_MAX`); checked before memory is taken.
pub(super) const BODY_MAX: usize = 40 << 20;
pub(super) const CHECKPOINT: u8 = 1;
pub(super) const SEAL: u8 = 2;

const MAGIC: [u8; 4] = *b"ATPB";
const ONE_SHARD: u8 = 1;
const SHARDS: u8 = 2;
const RUN: usize = 16;
const _: () = assert!(BODY_MAX > super::ENTRY_BYTES_MAX + 4 + index_bytes(SHARDS_MAX));
const _: () = assert!(HEADER < PAGE as usize && SHARDS_MAX <= u16::MAX as u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    /// Of the log. 1: a block of format 1.
    pub(super) shards: u32,
    pub(super) log_id: LogId,
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) number: u64,
    /// The checksum of the block before; 0 for block 1.
    pub(super) previous: u32,
    pub(super) entries: u32,
    /// Number of the first entry, counted over all shards.
    pub(super) first: u64,
    pub(super) body_bytes: u32,
    pub(super) body_crc: u32,
    /// Runs in the index; 0 in format 1.
    pub(super) runs: u32,
    /// Its own checksum; filled in by `encode`.
    pub(super) checksum: u32,
}

impl Header {
    /// Block 1 of a log, which is empty.
    pub(super) const fn first(log_id: LogId, shards: u32) -> Self {
        Self {
            flags: SEAL,
            shards,
            log_id,
            segment: 0,
            offset: 0,
            number: 1,
            previous: 0,
            entries: 0,
            first: 1,
            body_bytes: 0,
            body_crc: 0,
            runs: 0,
            checksum: 0,
        }
    }

    /// Bytes that the block takes in its segment.
    pub(super) const fn extent(&self) -> u64 {
        padded(self.body_bytes as usize)
    }
    /// The number of the first entry behind this block.
    pub(super) const fn next_entry(&self) -> u64 {
        self.first + self.entries as u64
    }
    pub(super) const fn is_seal(&self) -> bool {
        self.flags & SEAL != 0
    }
    pub(super) const fn index_bytes(&self) -> usize {
        index_bytes(self.runs)
    }

    /// Reads a header that claims to stand at (segment, offset); `None`: it is none, or a damaged one, or of another place.
    pub(super) fn decode(bytes: &[u8], segment: u64, offset: u64) -> Option<Self> {
        let bytes = bytes.get(..HEADER)?;
        if bytes[..4] != MAGIC {
            return None;
        }
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (shards, runs) = match bytes[4] {
            ONE_SHARD => (1, 0),
            SHARDS => (u16_at(6).into(), u32_at(72)),
            _ => return None,
        };
        let header = Self {
            flags: bytes[5],
            shards,
            log_id: bytes[8..24].try_into().expect("sixteen bytes"),
            segment: u64_at(24),
            offset: u64_at(32),
            number: u64_at(40),
            previous: u32_at(48),
            entries: u32_at(52),
            first: u64_at(56),
            body_bytes: u32_at(64),
            body_crc: u32_at(68),
            runs,
            checksum: u32_at(76),
        };
        let whole = crc32c::crc32c(&bytes[..76]) == header.checksum
            && header.segment == segment
            && header.offset == offset
            && header.body_bytes as usize <= BODY_MAX
            && header.runs <= header.shards
            && header.index_bytes() <= header.body_bytes as usize
            && (bytes[4] == ONE_SHARD || header.shards > 1 && (offset > 0 || header.runs == header.shards));
        whole.then_some(header)
    }

    /// The format of a block that a newer version wrote, if `bytes` begin with one: magic and checksum stay where they are.
    pub(super) fn newer_format(bytes: &[u8]) -> Option<u8> {
        let bytes = bytes.get(..HEADER)?;
        let checksum = u32::from_le_bytes(bytes[76..].try_into().expect("four bytes"));
        let newer = bytes[..4] == MAGIC && bytes[4] > SHARDS && crc32c::crc32c(&bytes[..76]) == checksum;
        newer.then_some(bytes[4])
    }

    /// Writes the header over the first bytes of `block` and keeps the checksum.
    fn encode(&mut self, block: &mut [u8]) {
        block[..4].copy_from_slice(&MAGIC);
        block[4] = if self.shards == 1 { ONE_SHARD } else { SHARDS };
        block[5] = self.flags;
        let shards = if self.shards == 1 { 0 } else { u16::try_from(self.shards).expect("bounded by SHARDS_MAX") };
        block[6..8].copy_from_slice(&shards.to_le_bytes());
        block[8..24].copy_from_slice(&self.log_id);
        block[24..32].copy_from_slice(&self.segment.to_le_bytes());
        block[32..40].copy_from_slice(&self.offset.to_le_bytes());
        block[40..48].copy_from_slice(&self.number.to_le_bytes());
        block[48..52].copy_from_slice(&self.previous.to_le_bytes());
        block[52..56].copy_from_slice(&self.entries.to_le_bytes());
        block[56..64].copy_from_slice(&self.first.to_le_bytes());
        block[64..68].copy_from_slice(&self.body_bytes.to_le_bytes());
        block[68..72].copy_from_slice(&self.body_crc.to_le_bytes());
        block[72..76].copy_from_slice(&self.runs.to_le_bytes());
        self.checksum = crc32c::crc32c(&block[..76]);
        block[76..80].copy_from_slice(&self.checksum.to_le_bytes());
    }
}

/// Bytes in the segment of a block whose body has so many.
pub(super) const fn padded(body_bytes: usize) -> u64 {
    ((HEADER + body_bytes) as u64).div_ceil(PAGE) * PAGE
}

/// Bytes of an index: its runs and their checksum.
const fn index_bytes(runs: u32) -> usize {
    if runs == 0 { 0 } else { runs as usize * RUN + 4 }
}

/// The largest index that a block of such a log may have.
pub(super) const fn index_bytes_max(shards: u32) -> usize {
    if shards == 1 { 0 } else { index_bytes(shards) }
}

/// One shard's entries in a block: `entries` of them, from position `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) shard: u32,
    pub(super) entries: u32,
    pub(super) first: u64,
}

impl Run {
    /// The shard's position behind this block.
    pub(super) const fn next(&self) -> u64 {
        self.first + self.entries as u64
    }
}

/// Header and index of a block: what is in it, before its entries are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) header: Header,
    /// In order of their shards, each once.
    pub(super) runs: Vec<Run>,
}

impl Head {
    /// `index`: as many bytes of the body as `header` says. `None`: damaged.
    pub(super) fn decode(header: Header, index: &[u8]) -> Option<Self> {
        if header.shards == 1 {
            let run = Run { shard: 0, entries: header.entries, first: header.first };
            return Some(Self { header, runs: vec![run] });
        }
        let index = index.get(..header.index_bytes())?;
        let Some((runs, checksum)) = index.split_last_chunk::<4>() else {
            return (header.entries == 0).then_some(Self { header, runs: Vec::new() });
        };
        if crc32c::crc32c(runs) != u32::from_le_bytes(*checksum) {
            return None;
        }
        let u32_at = |run: &[u8], at: usize| u32::from_le_bytes(run[at..at + 4].try_into().expect("four bytes"));
        let runs: Vec<Run> = runs
            .chunks_exact(RUN)
            .map(|run| Run {
                shard: u32_at(run, 0),
                entries: u32_at(run, 4),
                first: u64::from_le_bytes(run[8..].try_into().expect("eight bytes")),
            })
            .collect();
        let sound = runs.is_sorted_by(|a, b| a.shard < b.shard)
            && runs.last().is_none_or(|run| run.shard < header.shards)
            && runs.iter().map(|run| u64::from(run.entries)).sum::<u64>() == u64::from(header.entries);
        sound.then_some(Self { header, runs })
    }

    pub(super) fn run(&self, shard: u32) -> Option<Run> {
        let at = self.runs.binary_search_by_key(&shard, |run| run.shard).ok()?;
        Some(self.runs[at])
    }
}

/// A whole block as it was read.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) head: Head,
    /// Its entries, each behind its length.
    frames: Bytes,
}

impl Block {
    /// Checks the body against its header; `None`: damaged.
    pub(super) fn check(header: Header, mut body: Bytes) -> Option<Self> {
        if body.len() != header.body_bytes as usize || crc32c::crc32c(&body) != header.body_crc {
            return None;
        }
        let head = Head::decode(header, &body)?;
        let block = Self { head, frames: body.split_off(header.index_bytes()) };
        block.frames_add_up().then_some(block)
    }

    pub(super) const fn header(&self) -> &Header {
        &self.head.header
    }

    fn frames_add_up(&self) -> bool {
        let (mut at, mut n) = (0_usize, 0_u32);
        while let Some(length) = self.frames.get(at..at + 4) {
            at += 4 + u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
            n += 1;
            if at > self.frames.len() {
                return false;
            }
        }
        at == self.frames.len() && n == self.head.header.entries
    }

    /// Its entries with their shards and positions; they share the block's memory.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u32, u64, Bytes)> + use<> {
        let mut frames = self.frames.clone();
        let places = |run: Run| (run.first..run.next()).map(move |position| (run.shard, position));
        self.head.runs.clone().into_iter().flat_map(places).map(move |(shard, position)| {
            let length = u32::from_le_bytes(frames[..4].try_into().expect("checked when it was read")) as usize;
            let entry = frames.slice(4..4 + length);
            frames = frames.slice(4 + length..);
            (shard, position, entry)
        })
    }
}

/// The one buffer in which blocks are made, ready to be written by one call.
#[derive(Debug, Default)]
pub(super) struct Builder {
    buffer: Vec<u8>,
    runs: u32,
    entries: u32,
}

impl Builder {
    /// Begins a block, whose entries come in this order; without runs it is one of format 1, or a seal. Memory of an
    /// unusually large one before is given back.
    pub(super) fn begin(&mut self, runs: &[Run]) {
        const KEEP: usize = 8 << 20;
        self.buffer.clear();
        self.buffer.shrink_to(KEEP);
        self.buffer.resize(HEADER, 0);
        (self.runs, self.entries) = (u32::try_from(runs.len()).expect("bounded by SHARDS_MAX"), 0);
        for run in runs {
            self.buffer.put_u32_le(run.shard);
            self.buffer.put_u32_le(run.entries);
            self.buffer.put_u64_le(run.first);
        }
        if !runs.is_empty() {
            self.buffer.put_u32_le(crc32c::crc32c(&self.buffer[HEADER..]));
        }
    }
    pub(super) fn push(&mut self, entry: &[u8]) {
        let length = u32::try_from(entry.len()).expect("entries are bounded by ENTRY_BYTES_MAX");
        self.buffer.put_u32_le(length);
        self.buffer.extend_from_slice(entry);
        self.entries += 1;
    }
    pub(super) const fn entries(&self) -> u32 {
        self.entries
    }
    /// A block read before, to be written again under these runs.
    pub(super) fn copy(&mut self, block: &Block, runs: &[Run]) {
        self.begin(runs);
        self.buffer.extend_from_slice(&block.frames);
        self.entries = block.header().entries;
    }
    /// Closes the block: `header` gets its counts and checksums.
    pub(super) fn finish(&mut self, header: &mut Header) -> &[u8] {
        (header.entries, header.runs) = (self.entries, self.runs);
        header.body_bytes = u32::try_from(self.buffer.len() - HEADER).expect("blocks are bounded by BODY_MAX");
        header.body_crc = crc32c::crc32c(&self.buffer[HEADER..]);
        let extent = usize::try_from(header.extent()).expect("a block fits into memory");
        self.buffer.resize(extent, 0);
        header.encode(&mut self.buffer);
        &self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: [Run; 2] = [Run { shard: 0, entries: 2, first: 20 }, Run { shard: 5, entries: 1, first: 7 }];

    fn header(shards: u32) -> Header {
        Header {
            flags: CHECKPOINT,
            segment: 3,
            offset: 8192,
            number: 9,
            previous: 77,
            first: 41,
            ..Header::first([7; 16], shards)
        }
    }

    fn block_of(shards: u32, runs: &[Run], entries: &[&[u8]]) -> (Header, Vec<u8>) {
        let (mut builder, mut header) = (Builder::default(), header(shards));
        builder.begin(runs);
        for entry in entries {
            builder.push(entry);
        }
        let bytes = builder.finish(&mut header).to_vec();
        (header, bytes)
    }

    fn read(bytes: &[u8]) -> Option<Block> {
        let header = Header::decode(bytes, 3, 8192)?;
        Block::check(header, Bytes::copy_from_slice(&bytes[HEADER..HEADER + header.body_bytes as usize]))
    }

    #[test]
    fn a_block_comes_back_as_it_was_made() {
        let (header, bytes) = block_of(1, &[], &[b"one", b"", b"three"]);
        assert_eq!((bytes.len(), bytes[4]), (4096, 1));
        let block = read(&bytes).unwrap();
        assert_eq!((*block.header(), block.header().next_entry()), (header, 44));
        let entries: Vec<_> = block.entries().collect();
        let due = [(0, 41, &b"one"[..]), (0, 42, b""), (0, 43, b"three")];
        assert_eq!(entries, due.map(|(shard, at, entry)| (shard, at, Bytes::from_static(entry))));
    }

    #[test]
    fn a_block_of_several_shards_says_which_entry_is_whose() {
        let (header, bytes) = block_of(64, &RUNS, &[b"one", b"", b"three"]);
        assert_eq!(bytes[4], 2);
        let block = read(&bytes).unwrap();
        assert_eq!((*block.header(), block.header().next_entry()), (header, 44));
        assert_eq!((block.head.run(5), block.head.run(1)), (Some(RUNS[1]), None));
        let entries: Vec<_> = block.entries().collect();
        let due = [(0, 20, &b"one"[..]), (0, 21, b""), (5, 7, b"three")];
        assert_eq!(entries, due.map(|(shard, at, entry)| (shard, at, Bytes::from_static(entry))));
        // A seal has no index.
        assert_eq!(read(&block_of(64, &[], &[]).1).unwrap().entries().count(), 0);
    }

    #[test]
    fn an_index_that_contradicts_itself_is_damage() {
        let [one, two] = RUNS;
        let entries: &[&[u8]] = &[b"one", b"", b"three"];
        for (shards, runs) in [
            (64, vec![two, one]),
            (64, vec![one, one]),
            (5, vec![one, two]),
            (64, vec![one]),
            (64, vec![one, Run { entries: 2, ..two }]),
        ] {
            assert!(read(&block_of(shards, &runs, entries).1).is_none(), "{runs:?}");
        }
        // At the beginning of a segment every shard is due.
        let (mut header, _) = block_of(64, &RUNS, entries);
        let mut builder = Builder::default();
        builder.begin(&RUNS);
        header.offset = 0;
        let bytes = builder.finish(&mut header).to_vec();
        assert!(Header::decode(&bytes, 3, 0).is_none());
    }

    #[test]
    fn a_block_is_valid_only_where_it_was_written() {
        let (_, bytes) = block_of(1, &[], &[b"x"]);
        assert!(Header::decode(&bytes, 4, 8192).is_none());
        assert!(Header::decode(&bytes, 3, 4096).is_none());
        assert!(Header::decode(&bytes[..HEADER - 1], 3, 8192).is_none());
    }

    #[test]
    fn padding_goes_to_the_next_page() {
        let page = PAGE as usize;
        assert_eq!(padded(0), PAGE);
        assert_eq!(padded(page - HEADER), PAGE);
        assert_eq!(padded(page - HEADER + 1), 2 * PAGE);
    }

    #[test]
    fn every_flipped_bit_of_header_and_body_is_seen() {
        for (header, bytes) in [block_of(1, &[], &[b"payload"]), block_of(64, &RUNS[1..], &[b"payload"])] {
            for bit in 0..8 * (HEADER + header.body_bytes as usize) {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(read(&bytes).is_none(), "bit {bit}");
            }
        }
    }
}

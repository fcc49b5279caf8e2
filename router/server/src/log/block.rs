//! One block: its header, its body, and how both are checked. Bytes only; it never reads or writes a file.

use super::LogId;
use bytes::Bytes;

/// Blocks begin at multiples of this: a page, and the largest sector that disks write as one.
pub(super) const PAGE: u64 = 4096;
pub(super) const HEADER: usize = 80;
/// More than any writer makes (one entry of `ENTRY_BYTES_MAX`); checked before memory is taken.
pub(super) const BODY_MAX: usize = 40 << 20;
pub(super) const CHECKPOINT: u8 = 1;
pub(super) const SEAL: u8 = 2;

const MAGIC: [u8; 4] = *b"ATPB";
const VERSION: u8 = 1;
const _: () = assert!(BODY_MAX > super::ENTRY_BYTES_MAX + 4 && HEADER < PAGE as usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) log_id: LogId,
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) number: u64,
    /// The checksum of the block before; 0 for block 1.
    pub(super) previous: u32,
    pub(super) entries: u32,
    pub(super) first: u64,
    pub(super) body_bytes: u32,
    pub(super) body_crc: u32,
    /// Its own checksum; filled in by `encode`.
    pub(super) checksum: u32,
}

impl Header {
    /// Bytes that the block takes in its segment.
    pub(super) const fn extent(&self) -> u64 {
        padded(self.body_bytes as usize)
    }
    /// The position of the first entry behind this block.
    pub(super) const fn next_position(&self) -> u64 {
        self.first + self.entries as u64
    }
    pub(super) const fn is_seal(&self) -> bool {
        self.flags & SEAL != 0
    }

    /// Reads a header that claims to stand at (segment, offset); `None`: it is none, or a damaged one, or of another place.
    pub(super) fn decode(bytes: &[u8], segment: u64, offset: u64) -> Option<Self> {
        let bytes = bytes.get(..HEADER)?;
        if bytes[..4] != MAGIC || bytes[4] != VERSION {
            return None;
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let header = Self {
            flags: bytes[5],
            log_id: bytes[8..24].try_into().expect("sixteen bytes"),
            segment: u64_at(24),
            offset: u64_at(32),
            number: u64_at(40),
            previous: u32_at(48),
            entries: u32_at(52),
            first: u64_at(56),
            body_bytes: u32_at(64),
            body_crc: u32_at(68),
            checksum: u32_at(76),
        };
        let whole = crc32c::crc32c(&bytes[..76]) == header.checksum
            && header.segment == segment
            && header.offset == offset
            && header.body_bytes as usize <= BODY_MAX;
        whole.then_some(header)
    }

    /// Writes the header over the first bytes of `block` and keeps the checksum.
    fn encode(&mut self, block: &mut [u8]) {
        block[..4].copy_from_slice(&MAGIC);
        block[4] = VERSION;
        block[5] = self.flags;
        block[6..8].fill(0);
        block[8..24].copy_from_slice(&self.log_id);
        block[24..32].copy_from_slice(&self.segment.to_le_bytes());
        block[32..40].copy_from_slice(&self.offset.to_le_bytes());
        block[40..48].copy_from_slice(&self.number.to_le_bytes());
        block[48..52].copy_from_slice(&self.previous.to_le_bytes());
        block[52..56].copy_from_slice(&self.entries.to_le_bytes());
        block[56..64].copy_from_slice(&self.first.to_le_bytes());
        block[64..68].copy_from_slice(&self.body_bytes.to_le_bytes());
        block[68..72].copy_from_slice(&self.body_crc.to_le_bytes());
        block[72..76].fill(0);
        self.checksum = crc32c::crc32c(&block[..76]);
        block[76..80].copy_from_slice(&self.checksum.to_le_bytes());
    }
}

/// Bytes in the segment of a block whose body has so many.
pub(super) const fn padded(body_bytes: usize) -> u64 {
    ((HEADER + body_bytes) as u64).div_ceil(PAGE) * PAGE
}

/// A whole block as it was read.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) header: Header,
    pub(super) body: Bytes,
}

impl Block {
    /// Checks the body against its header; `None`: damaged.
    pub(super) fn check(header: Header, body: Bytes) -> Option<Self> {
        let block = Self { header, body };
        let whole = block.body.len() == header.body_bytes as usize
            && crc32c::crc32c(&block.body) == header.body_crc
            && block.frames_add_up();
        whole.then_some(block)
    }

    fn frames_add_up(&self) -> bool {
        let (mut at, mut n) = (0_usize, 0_u32);
        while let Some(length) = self.body.get(at..at + 4) {
            at += 4 + u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
            n += 1;
            if at > self.body.len() {
                return false;
            }
        }
        at == self.body.len() && n == self.header.entries
    }

    /// Its entries with their positions; they share the block's memory.
    pub(super) fn entries(&self) -> impl Iterator<Item = (u64, Bytes)> + use<> {
        let (mut body, first) = (self.body.clone(), self.header.first);
        (0..u64::from(self.header.entries)).map(move |n| {
            let length = u32::from_le_bytes(body[..4].try_into().expect("checked when it was read")) as usize;
            let entry = body.slice(4..4 + length);
            body = body.slice(4 + length..);
            (first + n, entry)
        })
    }
}

/// The one buffer in which blocks are made, ready to be written by one call.
#[derive(Debug, Default)]
pub(super) struct Builder {
    buffer: Vec<u8>,
    entries: u32,
}

impl Builder {
    /// Forgets the block before; memory of an unusually large one is given back.
    pub(super) fn clear(&mut self) {
        const KEEP: usize = 8 << 20;
        self.buffer.clear();
        self.buffer.shrink_to(KEEP);
        self.buffer.resize(HEADER, 0);
        self.entries = 0;
    }
    pub(super) fn push(&mut self, entry: &[u8]) {
        let length = u32::try_from(entry.len()).expect("entries are bounded by ENTRY_BYTES_MAX");
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(entry);
        self.entries += 1;
    }
    pub(super) const fn entries(&self) -> u32 {
        self.entries
    }
    pub(super) const fn body_bytes(&self) -> usize {
        self.buffer.len() - HEADER
    }
    /// A block read before, to be written again.
    pub(super) fn copy(&mut self, block: &Block) {
        self.clear();
        self.buffer.extend_from_slice(&block.body);
        self.entries = block.header.entries;
    }
    /// Closes the block: `header` gets its counts and checksums.
    pub(super) fn finish(&mut self, header: &mut Header) -> &[u8] {
        header.entries = self.entries;
        header.body_bytes = u32::try_from(self.body_bytes()).expect("blocks are bounded by BODY_MAX");
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

    fn header() -> Header {
        Header {
            flags: CHECKPOINT,
            log_id: [7; 16],
            segment: 3,
            offset: 8192,
            number: 9,
            previous: 77,
            entries: 0,
            first: 41,
            body_bytes: 0,
            body_crc: 0,
            checksum: 0,
        }
    }

    fn block_of(entries: &[&[u8]]) -> (Header, Vec<u8>) {
        let (mut builder, mut header) = (Builder::default(), header());
        builder.clear();
        for entry in entries {
            builder.push(entry);
        }
        let bytes = builder.finish(&mut header).to_vec();
        (header, bytes)
    }

    #[test]
    fn a_block_comes_back_as_it_was_made() {
        let (header, bytes) = block_of(&[b"one", b"", b"three"]);
        assert_eq!(bytes.len(), 4096);
        let read = Header::decode(&bytes, 3, 8192).unwrap();
        assert_eq!(read, header);
        assert_eq!(read.next_position(), 44);
        let body = Bytes::copy_from_slice(&bytes[HEADER..HEADER + read.body_bytes as usize]);
        let block = Block::check(read, body).unwrap();
        let entries: Vec<_> = block.entries().collect();
        assert_eq!(entries, [(41, Bytes::from_static(b"one")), (42, Bytes::new()), (43, Bytes::from_static(b"three"))]);
    }

    #[test]
    fn a_block_is_valid_only_where_it_was_written() {
        let (_, bytes) = block_of(&[b"x"]);
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
        let (header, bytes) = block_of(&[b"payload"]);
        for bit in 0..8 * (HEADER + header.body_bytes as usize) {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let whole = Header::decode(&bytes, 3, 8192)
                .and_then(|h| Block::check(h, Bytes::copy_from_slice(&bytes[HEADER..HEADER + h.body_bytes as usize])));
            assert!(whole.is_none(), "bit {bit}");
        }
    }
}

//! Segment files: their names, whole blocks in them, and what lies behind the last one. It only reads.

use super::LogError;
use super::block::{Block, HEADER, Head, Header, PAGE};
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A segment that is open for reading.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u64,
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// What stands behind an offset where no whole block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    Zero,
    /// Something, but no whole block; so many bytes up to the last that isn't zero.
    Torn {
        bytes: u64,
    },
    /// A whole block stands at this offset.
    Block {
        offset: u64,
    },
}

pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:010}.log"))
}

/// The numbers of the segments in `dir`, in order, and files that were being made when a router died.
pub(super) fn list(dir: &Path) -> Result<(Vec<u64>, Vec<PathBuf>), LogError> {
    let (mut numbers, mut unfinished) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(dir).map_err(LogError::io("read the directory", dir))? {
        let path = entry.map_err(LogError::io("read the directory", dir))?.path();
        let extension = path.extension().and_then(|e| e.to_str());
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        match (extension, number) {
            (Some("log"), Some(number)) if self::path(dir, number) == path => numbers.push(number),
            (Some("new"), Some(_)) => unfinished.push(path),
            _ => {}
        }
    }
    numbers.sort_unstable();
    Ok((numbers, unfinished))
}

impl Segment {
    pub(super) fn open(dir: &Path, number: u64) -> Result<Self, LogError> {
        let path = path(dir, number);
        let file = File::open(&path).map_err(LogError::io("open", &path))?;
        Ok(Self { number, path, file })
    }

    pub(super) fn header(&self, offset: u64) -> Result<Option<Header>, LogError> {
        let mut bytes = [0; HEADER];
        let n = read_up_to(&self.file, &mut bytes, offset).map_err(LogError::io("read", &self.path))?;
        Ok(Header::decode(&bytes[..n], self.number, offset))
    }

    /// Header and index of the block at `offset`, and the bytes that were read for them; `None`: there are none, or damaged
    /// ones. What lies behind them in the block isn't checked.
    pub(super) fn head(&self, offset: u64) -> Result<Option<(Head, Vec<u8>)>, LogError> {
        // Most blocks fit into the first read.
        let mut bytes = self.up_to(Vec::new(), offset, PAGE as usize)?;
        let Some(header) = Header::decode(&bytes, self.number, offset) else { return Ok(None) };
        let index = HEADER + header.index_bytes();
        if index > bytes.len() {
            bytes = self.up_to(bytes, offset, index)?;
        }
        Ok(Head::decode(header, &bytes[HEADER..]).map(|head| (head, bytes)))
    }

    /// The block that begins with these bytes, which `head` has read.
    pub(super) fn rest(&self, header: Header, mut bytes: Vec<u8>) -> Result<Option<Block>, LogError> {
        let end = HEADER + header.body_bytes as usize;
        if end > bytes.len() {
            if header.offset + end as u64 > self.bytes()? {
                return Ok(None);
            }
            bytes = self.up_to(bytes, header.offset, end)?;
        }
        bytes.truncate(end);
        Ok(Block::check(header, Bytes::from(bytes).split_off(HEADER)))
    }

    /// The whole block at `offset`; `None`: there is none, or it is damaged.
    pub(super) fn block(&self, offset: u64) -> Result<Option<Block>, LogError> {
        match self.head(offset)? {
            Some((head, bytes)) => self.rest(head.header, bytes),
            None => Ok(None),
        }
    }

    /// `bytes`, which stand at `offset`, and those behind them up to `length`, as far as the file goes.
    pub(super) fn up_to(&self, mut bytes: Vec<u8>, offset: u64, length: usize) -> Result<Vec<u8>, LogError> {
        let n = bytes.len();
        bytes.resize(length, 0);
        let more =
            read_up_to(&self.file, &mut bytes[n..], offset + n as u64).map_err(LogError::io("read", &self.path))?;
        bytes.truncate(n + more);
        Ok(bytes)
    }

    pub(super) fn bytes(&self) -> Result<u64, LogError> {
        Ok(self.file.metadata().map_err(LogError::io("read the size of", &self.path))?.len())
    }

    /// What stands at `offset` and behind, up to the end of the file.
    pub(super) fn tail(&self, offset: u64) -> Result<Tail, LogError> {
        const CHUNK: usize = 1 << 20;
        let mut chunk = vec![0; CHUNK];
        let mut at = offset;
        let mut torn = 0;
        loop {
            let n = read_up_to(&self.file, &mut chunk, at).map_err(LogError::io("read", &self.path))?;
            for (index, page) in chunk[..n].chunks(PAGE as usize).enumerate() {
                if page == &ZEROS[..page.len()] {
                    continue;
                }
                let here = at + index as u64 * PAGE;
                if Header::decode(page, self.number, here).is_some() && self.block(here)?.is_some() {
                    return Ok(Tail::Block { offset: here });
                }
                let last = page.iter().rposition(|byte| *byte != 0).unwrap_or(0) as u64;
                torn = here + last + 1 - offset;
            }
            at += n as u64;
            if n < CHUNK {
                return Ok(if torn == 0 { Tail::Zero } else { Tail::Torn { bytes: torn } });
            }
        }
    }
}

static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// Fills `bytes` from `offset` as far as the file goes.
fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

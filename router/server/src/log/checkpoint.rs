//! Finds the newest checkpoint whose pieces are all there. The one place where the log looks into entries.

use super::block::CHECKPOINT;
use super::{LogError, Reader};
use atp_core::record::{Checkpoint, Entry, Record};
use bytes::Bytes;
use prost::Message;

/// A whole checkpoint in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Of its first piece.
    pub(super) position: u64,
    /// Of all pieces.
    pub(super) bytes: u64,
    /// The block that holds the first piece.
    pub(super) segment: u64,
    pub(super) offset: u64,
}

impl Reader {
    /// The position of the first piece of the newest checkpoint of this shard that is whole; one whose pieces don't all follow
    /// each other is passed over.
    ///
    /// # Errors
    /// I/O, corruption on the way.
    pub fn newest_checkpoint(&self) -> Result<Option<u64>, LogError> {
        Ok(newest(self, &[self.of()])?[0].map(|found| found.position))
    }
}

/// The newest whole checkpoint of each of these shards.
pub(super) fn newest(reader: &Reader, shards: &[u32]) -> Result<Vec<Option<Found>>, LogError> {
    Ok(newest_of(reader, shards, 1)?.into_iter().map(|found| found.first().copied()).collect())
}

/// The newest whole checkpoints of each of these shards, at most `count` of each, the newest first: by one walk from the log's
/// end.
pub(super) fn newest_of(reader: &Reader, shards: &[u32], count: usize) -> Result<Vec<Vec<Found>>, LogError> {
    let mut found = vec![Vec::new(); shards.len()];
    // Indexes of those that are still looked for.
    let mut wanted: Vec<usize> = (0..shards.len()).collect();
    for number in reader.segments().iter().rev() {
        if wanted.is_empty() {
            break;
        }
        let segment = reader.segment(*number)?;
        let (mut begun, mut offset) = (Vec::new(), 0);
        while let Some(header) = segment.header(offset)? {
            if header.flags & CHECKPOINT != 0 {
                begun.push(offset);
            }
            offset += header.extent();
        }
        for offset in begun.into_iter().rev() {
            let Some(block) = segment.block(offset)? else { continue };
            let mut candidates: Vec<_> = block.entries().collect();
            candidates.retain(|(of, position, entry)| {
                wanted.iter().any(|index| shards[*index] == *of)
                    && piece(entry).is_some_and(|piece| piece.piece == 0 && piece.position + 1 == *position)
            });
            for (shard, position, _) in candidates.into_iter().rev() {
                let Some(at) = wanted.iter().position(|index| shards[*index] == shard) else { continue };
                let found: &mut Vec<Found> = &mut found[wanted[at]];
                // A block that stands in two segments holds it twice.
                if found.last().is_some_and(|newer| newer.position == position) {
                    continue;
                }
                if let Some((_, bytes)) = whole(reader.entries_at(shard, *number, offset, position))? {
                    found.push(Found { position, bytes, segment: *number, offset });
                    if found.len() == count {
                        wanted.remove(at);
                    }
                }
            }
        }
        // Before a segment that begins with a shard's first entry there is nothing of it.
        if let Some((head, _)) = segment.head(0)? {
            wanted.retain(|index| head.run(shards[*index]).is_some_and(|run| run.first > 1));
        }
    }
    Ok(found)
}

/// The checkpoint that these entries begin with: its first piece and the bytes of all, if all follow each other.
pub(super) fn whole(
    entries: impl Iterator<Item = Result<(u64, Bytes), LogError>>,
) -> Result<Option<(Checkpoint, u64)>, LogError> {
    let mut bytes = 0;
    let mut first: Option<Checkpoint> = None;
    for (n, entry) in (0_u32..).zip(entries) {
        let (_, entry) = entry?;
        let Some(piece) = piece(&entry) else { return Ok(None) };
        let same = first.as_ref().is_none_or(|first| belong(first, &piece));
        if !same || piece.piece != n {
            return Ok(None);
        }
        bytes += entry.len() as u64;
        let last = n + 1 == piece.pieces;
        let first = first.get_or_insert(piece);
        if last {
            return Ok(Some((std::mem::take(first), bytes)));
        }
    }
    Ok(None)
}

/// Whether two pieces are of one checkpoint.
pub(super) fn belong(first: &Checkpoint, piece: &Checkpoint) -> bool {
    (first.position, first.epoch, first.pieces, &first.hash, &first.log_id)
        == (piece.position, piece.epoch, piece.pieces, &piece.hash, &piece.log_id)
}

/// The piece of a checkpoint that an entry is; `None`: it is something else.
pub(super) fn piece(entry: &Bytes) -> Option<Checkpoint> {
    let entry = Entry::decode(entry.clone()).ok()?;
    entry.records.into_iter().find_map(|record| match record.record {
        Some(Record::Checkpoint(piece)) => Some(piece),
        _ => None,
    })
}

/// What the checkpoint that begins with this entry will take, about: its pieces are of one size but for the last.
pub(super) fn bytes_estimate(first_piece: &Bytes) -> u64 {
    piece(first_piece).map_or(0, |piece| u64::from(piece.pieces) * first_piece.len() as u64)
}

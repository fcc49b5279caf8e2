//! What `atp log prune` leaves of a Kafka log: notes in a topic of their own beside it, `TOPIC.pruned`, by which a partition that
//! begins late is told from one whose records were deleted. A note is durable before the records that it gives up are deleted.
//!
//! The notes are JSON, one message each, the newest of a partition counts; the key is the partition, so that the brokers may
//! drop older ones. The header is that of a Genesis: the log's id.

use super::client::{Messages, PATIENCE};
use super::sender::{Producing, Sender};
use super::topic;
use crate::log::{Beginning, KafkaAddress, LogError, LogId};
use atp_core::partition::Mark;
use atp_core::partition::{Header, Parsed};
use atp_core::record::{Genesis, hex};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Where a pruned partition begins, and what its first message said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    pub(super) shard: u32,
    /// Of its Genesis; the log's id in hex.
    pub(super) log_id: String,
    pub(super) format: u32,
    pub(super) shards: u32,
    pub(super) hash_seed: u64,
    /// The place right before its first message.
    pub(super) before: Mark,
    /// The place right before the oldest whole checkpoint that is kept.
    pub(super) checkpoint: Mark,
    /// Unix ms.
    pub(super) pruned_ms: u64,
}

impl Note {
    /// The first offset that is kept.
    pub(super) const fn begins(&self) -> u64 {
        self.before.offset + 1
    }

    pub(super) const fn beginning(&self) -> Beginning {
        Beginning {
            position: self.before.position + 1,
            checkpoint: self.checkpoint.position + 1,
            pruned_ms: self.pruned_ms,
        }
    }

    pub(super) fn genesis(&self, address: &KafkaAddress) -> Result<Genesis, LogError> {
        let id = u128::from_str_radix(&self.log_id, 16).map(u128::to_be_bytes).ok();
        let id = id.filter(|id| hex(id) == self.log_id);
        let id = id.ok_or_else(|| notes_of(address).refused("a note has no log id; restore it from a copy"))?;
        let log_id = Bytes::copy_from_slice(&id);
        Ok(Genesis { log_id, format: self.format, shards: self.shards, hash_seed: self.hash_seed })
    }
}

/// Where the notes of a log are.
fn notes_of(address: &KafkaAddress) -> KafkaAddress {
    KafkaAddress { topic: format!("{}.pruned", address.topic), ..address.clone() }
}

/// The newest note of each shard that has one.
pub(super) fn read(address: &KafkaAddress) -> Result<BTreeMap<u32, Note>, LogError> {
    let address = notes_of(address);
    let mut messages = Messages::new(&address, 0)?;
    let mut notes = BTreeMap::new();
    if topic::shape(&address, &messages)?.is_none() {
        return Ok(notes);
    }
    let (low, end) = messages.ends(PATIENCE)?;
    messages.seek(low, end)?;
    while let Some(message) = messages.next()? {
        let Parsed::Ours(Header::Genesis { log_id }) = message.header else { continue };
        let note: Note = serde_json::from_slice(&message.entry)
            .map_err(|e| address.refused(format!("the note at offset {}: {e}", message.offset)))?;
        if note.log_id == hex(&log_id) {
            notes.insert(note.shard, note);
        }
    }
    Ok(notes)
}

/// Writes notes, and makes their topic where there is none; durable when it returns.
pub(super) fn write(address: &KafkaAddress, log_id: LogId, notes: &[Note]) -> Result<(), LogError> {
    let (log, address) = (address, notes_of(address));
    let messages = Messages::new(&address, 0)?;
    if topic::shape(&address, &messages)?.is_none() {
        let single = topic::look(log, &messages)?.is_some_and(|log| !log.is_replicated());
        topic::create_notes(&address, &messages, single)?;
    }
    let sender = Sender::new(Arc::new(Producing::new(&address)?), 0);
    let failed = |why: String| LogError::Kafka { doing: "write a note to", address: address.to_string(), why };
    for note in notes {
        let text = serde_json::to_vec(note).map_err(|e| failed(e.to_string()))?;
        sender.send_one_keyed(&Header::Genesis { log_id }, Some(&note.shard.to_string()), &text).map_err(failed)?;
    }
    Ok(())
}

/// Deletes what lies before these notes.
pub(super) fn remove(address: &KafkaAddress, notes: &[Note]) -> Result<(), LogError> {
    let before = notes.iter().map(|note| (i32::try_from(note.shard).unwrap_or(i32::MAX), note.begins()));
    topic::delete_records(address, before)
}

//! The fold: what a log says, and nothing else. Live shard, recovery, verify and replay share it, so that replay calls no
//! decision: every number that a decision used stands in its record. A record out of its grammar is corruption.

mod escrow;
mod fold;
mod image;
mod tool;

use crate::account::Account;
use crate::record::{AgentRecord, AmountPb, AnyRecord, Entry, Genesis, Late, Record};
use crate::said::Said;
use crate::statistics::{Lesson, Statistics};
use crate::stream::Stream;
use atp_proto::CallId;
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, VecDeque};

/// Version of this fold and of its checkpoints.
pub const FOLD_VERSION: u32 = 1;
/// Version of the record format that Genesis names.
pub const FORMAT: u32 = 2;
/// Ids and keys are remembered for this long after a stream's end (ATP-4), in logged time.
pub const REMEMBERED_MS: u64 = 24 * 3_600_000;
/// Bytes of text and findings of all lanes in a result; more is cut there and marked, the partials had it all. It bounds
/// the entry of a Close: text stands twice in it and may grow sixfold as JSON.
pub const RESULT_BYTES_MAX: usize = 512 * 1024;
/// Findings of one lane in the result.
pub const RESULT_FINDINGS_MAX: usize = 4096;
/// Bytes of a checkpoint's piece.
const PIECE_BYTES: usize = 1024 * 1024;

/// The log can't be what this program wrote: stop, say where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log corrupt at position {position}: {message}")]
pub struct Corrupt {
    pub position: u64,
    pub message: String,
}

/// What the log remembers of an agent across its incarnations.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AgentTotals {
    /// Of all its settled calls, in micro-USD.
    #[prost(uint64, tag = "1")]
    pub spent_usd_micros: u64,
    /// The largest overshoot of a grant; it raises the declared reach.
    #[prost(message, required, tag = "2")]
    pub overshoot: AmountPb,
}

/// The state of one shard up to a position.
#[derive(Clone, Default)]
pub struct State {
    position: u64,
    epoch: u64,
    logged_ms: u64,
    genesis: Genesis,
    pub(crate) accounts: BTreeMap<String, Account>,
    pub(crate) streams: BTreeMap<u64, Stream>,
    pub(crate) agents: BTreeMap<String, AgentTotals>,
    pub(crate) statistics: Statistics,
    /// How each agent stands, by handle.
    pub(crate) standings: BTreeMap<String, AgentRecord>,
    next_no: u64,
    by_id: BTreeMap<String, BTreeMap<String, u64>>,
    by_key: BTreeMap<String, BTreeMap<String, u64>>,
    by_call: BTreeMap<CallId, (u64, u32)>,
    ended: VecDeque<(u64, u64)>,
    /// This shard's number.
    shard: u32,
    lent: BTreeMap<u32, Lent>,
    holding: BTreeMap<u32, Holding>,
    late: BTreeMap<String, Late>,
    /// What the last record taught, for other shards; no part of the fold.
    lesson: Option<Box<Lesson>>,
}

type Done = Result<(), String>;

impl State {
    /// Position of the last entry.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }
    /// Position of the newest Epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    /// Logged time of the last entry, Unix milliseconds.
    #[must_use]
    pub fn logged_ms(&self) -> u64 {
        self.logged_ms
    }
    /// 16 bytes from Genesis; empty for a new log.
    #[must_use]
    pub fn log_id(&self) -> &Bytes {
        &self.genesis.log_id
    }
    #[must_use]
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }
    /// The stream of a tenant by id.
    #[must_use]
    pub fn stream_no(&self, tenant: &str, stream: &str) -> Option<u64> {
        self.by_id.get(tenant)?.get(stream).copied()
    }
    /// The newest stream that was accepted under an idempotency key.
    #[must_use]
    pub fn stream_of_key(&self, tenant: &str, key: &str) -> Option<u64> {
        self.by_key.get(tenant)?.get(key).copied()
    }
    #[must_use]
    pub fn stream(&self, no: u64) -> Option<&Stream> {
        self.streams.get(&no)
    }
    /// Every stream that is remembered, oldest first.
    pub fn streams(&self) -> impl Iterator<Item = (u64, &Stream)> {
        self.streams.iter().map(|(no, s)| (*no, s))
    }
    #[must_use]
    pub fn call(&self, id: &CallId) -> Option<(u64, u32)> {
        self.by_call.get(id).copied()
    }
    #[must_use]
    pub fn agent_totals(&self, agent: &str) -> AgentTotals {
        self.agents.get(agent).copied().unwrap_or_default()
    }
    /// What calls really cost. Not part of the hash.
    #[must_use]
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// What the last record taught; once.
    pub(crate) fn take_lesson(&mut self) -> Option<Box<Lesson>> {
        self.lesson.take()
    }

    /// How an agent stands: its last word and the operator's; `None` where neither said anything.
    #[must_use]
    pub fn standing(&self, agent: &str) -> Option<&AgentRecord> {
        self.standings.get(agent)
    }

    /// Folds one entry.
    ///
    /// # Errors
    /// `Corrupt` when the position or a record doesn't follow from what came before; the state is then useless.
    pub fn apply(&mut self, position: u64, entry: &Entry) -> Result<(), Corrupt> {
        let corrupt = |message: String| Corrupt { position, message };
        if position != self.position + 1 {
            return Err(corrupt(format!("follows position {}", self.position)));
        }
        let at_ms = match &entry.records[..] {
            // A log may have an owner write its Epoch before it has read what time it is there.
            [AnyRecord { record: Some(Record::Epoch(_)) }] => entry.at_ms.max(self.logged_ms),
            _ => entry.at_ms,
        };
        self.begin(at_ms).map_err(corrupt)?;
        for AnyRecord { record } in &entry.records {
            let Some(record) = record else {
                return Err(corrupt("record kind written by a newer version".into()));
            };
            let said = match record {
                Record::Frame(frame) if frame.lane > 0 => read_said(frame),
                _ => None,
            };
            self.apply_record(record, said).map_err(|e| corrupt(format!("{}: {e}", record.kind())))?;
        }
        self.end();
        Ok(())
    }

    /// Begins an entry at a logged time.
    pub(crate) fn begin(&mut self, at_ms: u64) -> Done {
        if at_ms < self.logged_ms {
            return Err(format!("logged time goes back from {} to {at_ms}", self.logged_ms));
        }
        self.logged_ms = at_ms;
        Ok(())
    }

    /// Ends an entry: it has the next position. Forgets what ended long ago.
    pub(crate) fn end(&mut self) {
        self.position += 1;
        while let Some(&(ended_at, no)) = self.ended.front() {
            if ended_at + REMEMBERED_MS >= self.logged_ms {
                break;
            }
            self.ended.pop_front();
            match self.streams.get_mut(&no).filter(|s| s.has_open_calls()) {
                Some(stream) => {
                    stream.ended_at = self.logged_ms;
                    self.ended.push_back((self.logged_ms, no));
                }
                None => self.forget(no),
            }
        }
    }

    fn forget(&mut self, no: u64) {
        let Some(stream) = self.streams.remove(&no) else { return };
        let key = &stream.accept.key;
        if let Some(ids) = self.by_id.get_mut(&key.tenant) {
            ids.remove(&key.stream);
        }
        if let Some(keys) = self.by_key.get_mut(&key.tenant)
            && keys.get(&stream.accept.idempotency_key) == Some(&no)
        {
            keys.remove(&stream.accept.idempotency_key);
        }
        for call in &stream.calls {
            self.by_call.remove(&key.call(call.reserve.lane));
        }
    }

    /// Folds one record of the entry that was begun.
    pub(crate) fn apply_record(&mut self, record: &Record, said: Option<Said>) -> Done {
        match record {
            Record::Genesis(r) => self.genesis_first(r),
            Record::Epoch(r) => self.epoch_begins(r),
            Record::Window(r) => self.window(r),
            Record::Accept(r) => self.accept(r),
            Record::Deny(r) => self.deny(r),
            Record::Reserve(r) => self.reserve(r),
            Record::Intent(r) => self.intent(r),
            Record::Extend(r) => self.extend(r),
            Record::Settle(r) => self.settle(r),
            Record::Void(r) => self.void(r),
            Record::Adjust(r) => self.adjust(r),
            Record::Close(r) => self.close(r),
            Record::Frame(r) => self.frame(r, said),
            Record::Tool(r) => self.tool(r),
            Record::Tier(r) => self.tier(r),
            Record::Faster(r) => {
                self.accounts.entry(r.account.clone()).or_default().faster = Some(r.clone());
                Ok(())
            }
            Record::Checkpoint(_) => Ok(()),
            Record::Share(r) => self.share(r),
            Record::ShareIn(r) => self.share_in(r),
            Record::ShareOut(r) => self.share_out(r),
            Record::ShareBack(r) => self.share_back(r),
            Record::ShareLate(r) => self.share_late(r),
            Record::Agent(r) => {
                self.standings.insert(r.agent.clone(), r.clone());
                Ok(())
            }
        }
    }
}

pub use escrow::{Holding, Lent, LentTo, Out, Piece};
pub use fold::NO_COST;
pub(crate) use fold::read_said;
pub use image::remaining;

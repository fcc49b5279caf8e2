//! What a log holds: entries of records. One input's decision is one entry; it survives whole or not at all.
//! Protobuf by derive, so that later versions can add fields; an unknown record kind stops the shard.

mod agent;
mod amount;
mod call;
mod escrow;
mod json;
mod tool;

pub use agent::AgentRecord;
pub use amount::{AmountPb, CostPb, LimitPb};
use atp_proto::{CallId, StreamId, TenantId};
use bytes::Bytes;
pub use call::{Adjust, Ended, Extend, Intent, ProofPb, Reserve, ReserveCall, Settle, SourcePb, Void, WindowRef};
pub use escrow::{Late, Share, ShareBack, ShareIn, ShareLate, ShareOut, Shared};
use prost::Message;
pub use tool::{Tool, ToolVerdict};

/// What one input decided of one task, or of what belongs to none.
#[derive(Clone, PartialEq, Message)]
pub struct Entry {
    /// Logged time, Unix milliseconds.
    #[prost(uint64, tag = "1")]
    pub at_ms: u64,
    /// In the order in which they count.
    #[prost(message, repeated, tag = "2")]
    pub records: Vec<AnyRecord>,
}

/// One record. Without one it is of a kind that a newer version wrote.
#[derive(Clone, PartialEq, Message)]
pub struct AnyRecord {
    #[prost(
        oneof = "Record",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 30"
    )]
    pub record: Option<Record>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Record {
    #[prost(message, tag = "1")]
    Genesis(Genesis),
    #[prost(message, tag = "2")]
    Epoch(Epoch),
    #[prost(message, tag = "3")]
    Window(Window),
    #[prost(message, tag = "4")]
    Accept(Accept),
    #[prost(message, tag = "5")]
    Deny(Deny),
    #[prost(message, tag = "6")]
    Reserve(Reserve),
    #[prost(message, tag = "7")]
    Intent(Intent),
    #[prost(message, tag = "8")]
    Extend(Extend),
    #[prost(message, tag = "9")]
    Settle(Settle),
    #[prost(message, tag = "10")]
    Void(Void),
    #[prost(message, tag = "11")]
    Adjust(Adjust),
    #[prost(message, tag = "12")]
    Close(Close),
    #[prost(message, tag = "13")]
    Frame(FrameRecord),
    #[prost(message, tag = "14")]
    Checkpoint(Checkpoint),
    #[prost(message, tag = "15")]
    Agent(AgentRecord),
    #[prost(message, tag = "20")]
    Tool(Tool),
    #[prost(message, tag = "21")]
    Tier(Tier),
    #[prost(message, tag = "22")]
    Share(Share),
    #[prost(message, tag = "23")]
    ShareIn(ShareIn),
    #[prost(message, tag = "24")]
    ShareOut(ShareOut),
    #[prost(message, tag = "25")]
    ShareBack(ShareBack),
    #[prost(message, tag = "26")]
    ShareLate(ShareLate),
    #[prost(message, tag = "30")]
    Faster(Faster),
}

/// First record of a shard.
#[derive(Clone, PartialEq, Message)]
pub struct Genesis {
    /// 16 bytes; the blocks carry the same.
    #[prost(bytes = "bytes", tag = "1")]
    pub log_id: Bytes,
    /// Version of the record format.
    #[prost(uint32, tag = "2")]
    pub format: u32,
    /// Number of shards, for ever.
    #[prost(uint32, tag = "3")]
    pub shards: u32,
    /// Of the hash from stream to shard, for ever.
    #[prost(uint64, tag = "4")]
    pub hash_seed: u64,
}

/// A new owner; its position is the epoch.
#[derive(Clone, PartialEq, Message)]
pub struct Epoch {
    /// Genesis's.
    #[prost(bytes = "bytes", tag = "1")]
    pub log_id: Bytes,
    /// From 0.
    #[prost(uint32, tag = "2")]
    pub shard: u32,
    /// `router.id`.
    #[prost(string, tag = "3")]
    pub owner: String,
    /// Random, new for each run of the owner.
    #[prost(string, tag = "4")]
    pub incarnation: String,
}

/// A window of an account begins, or its limit is another now.
#[derive(Clone, PartialEq, Message)]
pub struct Window {
    #[prost(string, tag = "1")]
    pub account: String,
    /// Its id: the calendar time at which it begins (`2024-02-29T12`), or `total`.
    #[prost(string, tag = "2")]
    pub window: String,
    /// From here on.
    #[prost(message, required, tag = "3")]
    pub limit: LimitPb,
    /// Unix ms; absent: never.
    #[prost(uint64, optional, tag = "4")]
    pub ends_ms: Option<u64>,
    /// `minute`, `hour`, `day`, `month` or `total`.
    #[prost(string, tag = "5")]
    pub per: String,
}

/// Somebody lets an account go faster than its pace. The newest one counts.
#[derive(Clone, PartialEq, Message)]
pub struct Faster {
    #[prost(string, tag = "1")]
    pub account: String,
    /// So much above the line.
    #[prost(message, required, tag = "2")]
    pub more: AmountPb,
    /// Unix ms of logged time.
    #[prost(uint64, tag = "3")]
    pub until_ms: u64,
    /// Who takes the responsibility.
    #[prost(string, tag = "4")]
    pub by: String,
}

/// The stream that a record belongs to: one task per stream.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Message)]
pub struct Key {
    /// Whose it is.
    #[prost(string, tag = "1")]
    pub tenant: String,
    /// The stream's id, which the client chose.
    #[prost(string, tag = "2")]
    pub stream: String,
}

impl Key {
    #[must_use]
    pub fn new(tenant: &TenantId, stream: &StreamId) -> Self {
        Self { tenant: tenant.as_str().into(), stream: stream.as_str().into() }
    }
    #[must_use]
    pub fn call(&self, lane: u32) -> CallId {
        CallId::of(&TenantId::new(&self.tenant), &StreamId::new(&self.stream), lane)
    }
}

/// The task is ours. Its frames stand in the same entry.
#[derive(Clone, PartialEq, Message)]
pub struct Accept {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    /// SHA-256 of content, agents, budget, QoS and deadline.
    #[prost(bytes = "bytes", tag = "2")]
    pub payload_hash: Bytes,
    /// The client's; empty: none.
    #[prost(string, tag = "3")]
    pub idempotency_key: String,
    #[prost(string, tag = "4")]
    pub account: String,
    /// The stream's own limit: the task's budget under the stream window.
    #[prost(message, required, tag = "5")]
    pub limit: LimitPb,
    /// Calls at once; absent: no limit of its own.
    #[prost(uint32, optional, tag = "6")]
    pub max_parallel: Option<u32>,
    /// A duration, counted anew by each owner.
    #[prost(uint64, tag = "7")]
    pub deadline_ms: u64,
    /// 1 gold, 2 silver, 3 bronze.
    #[prost(uint32, tag = "8")]
    pub qos: u32,
    /// `meta.task_type`.
    #[prost(string, tag = "9")]
    pub task_type: String,
    /// `router.id` of the router that took it.
    #[prost(string, tag = "10")]
    pub host: String,
    /// Its agents must be in one of these; empty: any agent.
    #[prost(string, repeated, tag = "40")]
    pub security_groups_any: Vec<String>,
    /// What the task names beside its type, for the choice of agents: at most 16 languages.
    #[prost(string, repeated, tag = "24")]
    pub languages: Vec<String>,
    /// `meta.category`.
    #[prost(string, tag = "25")]
    pub category: String,
    /// The policy rule that the task fell under, from 1; 0: none.
    #[prost(uint32, tag = "31")]
    pub rule: u32,
    /// Of that rule: no ladder step below this model.
    #[prost(string, tag = "32")]
    pub floor: String,
    /// Of that rule: triggers.
    #[prost(string, repeated, tag = "33")]
    pub escalate_on: Vec<String>,
    /// Of that rule: agents in the order in which they are asked.
    #[prost(string, repeated, tag = "34")]
    pub escalate_to: Vec<String>,
}

/// Judged and refused: at once, or after waiting.
#[derive(Clone, PartialEq, Message)]
pub struct Deny {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    /// As in Accept.
    #[prost(bytes = "bytes", tag = "2")]
    pub payload_hash: Bytes,
    /// As in Accept.
    #[prost(string, tag = "3")]
    pub idempotency_key: String,
    /// `control.error` as it is sent, JSON.
    #[prost(bytes = "bytes", tag = "4")]
    pub error: Bytes,
}

/// An agent's estimates were too low too often, or good again: its QoS tier is another one now.
#[derive(Clone, PartialEq, Message)]
pub struct Tier {
    #[prost(string, tag = "1")]
    pub agent: String,
    /// 1 gold, 2 silver, 3 bronze.
    #[prost(uint32, tag = "2")]
    pub tier: u32,
    /// The errors that decided: runs since the last change.
    #[prost(uint64, tag = "3")]
    pub runs: u64,
    /// Share of them that cost over 20 % more than estimated.
    #[prost(uint64, tag = "4")]
    pub under_ppm: u64,
}

/// What the client is told, exactly once; duplicates get it again.
#[derive(Clone, PartialEq, Message)]
pub struct Close {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    /// `done`, `provisional`, `failed`, `cancelled`.
    #[prost(string, tag = "2")]
    pub state: String,
    /// Why it isn't `done`, a code of the protocol; empty: none.
    #[prost(string, tag = "3")]
    pub code: String,
    /// SHA-256 of the final's content.
    #[prost(bytes = "bytes", tag = "4")]
    pub result_hash: Bytes,
    /// Content of `agent.result.final`, JSON.
    #[prost(bytes = "bytes", tag = "5")]
    pub result: Bytes,
    /// Content of `control.bill`, JSON.
    #[prost(bytes = "bytes", tag = "6")]
    pub bill: Bytes,
    /// msg_seq of the final; the bill's is the next.
    #[prost(uint64, tag = "7")]
    pub out_seq: u64,
}

/// A received message: the bodies of its fragments as they came.
#[derive(Clone, PartialEq, Message)]
pub struct FrameRecord {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    /// 0: from the client; else from the agent of this lane.
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// Of the sender on its stream.
    #[prost(uint64, tag = "3")]
    pub msg_seq: u64,
    /// Of each fragment the encoded `Body`, as `docs/protocol.md` has it.
    #[prost(bytes = "bytes", repeated, tag = "4")]
    pub bodies: Vec<Bytes>,
    /// An agent's chunk: what is booked for the call so far.
    #[prost(message, optional, tag = "5")]
    pub booked: Option<CostPb>,
    /// An agent's chunk: msg_seq of the client's partial. 0: none of its own.
    #[prost(uint64, tag = "6")]
    pub out_seq: u64,
    /// `task.cancel` was in it.
    #[prost(bool, tag = "7")]
    pub cancel: bool,
    /// The agent broke its contract in it: nothing of it counts.
    #[prost(bool, tag = "8")]
    pub unreadable: bool,
}

/// One piece of the fold up to `position`; the pieces follow each other without a gap.
#[derive(Clone, PartialEq, Message)]
pub struct Checkpoint {
    /// Genesis's.
    #[prost(bytes = "bytes", tag = "1")]
    pub log_id: Bytes,
    /// From 0.
    #[prost(uint32, tag = "2")]
    pub shard: u32,
    /// The fold stands for all entries up to here: the one before the first piece.
    #[prost(uint64, tag = "3")]
    pub position: u64,
    /// The newest one at `position`.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Version of the fold, its image and its hash.
    #[prost(uint32, tag = "5")]
    pub fold_version: u32,
    /// State hash at `position`.
    #[prost(bytes = "bytes", tag = "6")]
    pub hash: Bytes,
    /// From 0.
    #[prost(uint32, tag = "7")]
    pub piece: u32,
    /// How many there are.
    #[prost(uint32, tag = "8")]
    pub pieces: u32,
    /// This piece of the Image.
    #[prost(bytes = "bytes", tag = "9")]
    pub data: Bytes,
}

impl From<Record> for AnyRecord {
    fn from(record: Record) -> Self {
        Self { record: Some(record) }
    }
}

impl Record {
    /// The kind as `replay` prints it.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Genesis(_) => "genesis",
            Self::Epoch(_) => "epoch",
            Self::Window(_) => "window",
            Self::Accept(_) => "accept",
            Self::Deny(_) => "deny",
            Self::Reserve(_) => "reserve",
            Self::Intent(_) => "intent",
            Self::Extend(_) => "extend",
            Self::Settle(_) => "settle",
            Self::Void(_) => "void",
            Self::Adjust(_) => "adjust",
            Self::Close(_) => "close",
            Self::Frame(_) => "frame",
            Self::Checkpoint(_) => "checkpoint",
            Self::Tool(_) => "tool",
            Self::Tier(_) => "tier",
            Self::Agent(_) => "agent",
            Self::Faster(_) => "faster",
            Self::Share(_) => "share",
            Self::ShareIn(_) => "share_in",
            Self::ShareOut(_) => "share_out",
            Self::ShareBack(_) => "share_back",
            Self::ShareLate(_) => "share_late",
        }
    }

    /// The stream it belongs to, if it belongs to one.
    #[must_use]
    pub const fn key(&self) -> Option<&Key> {
        match self {
            Self::Accept(r) => Some(&r.key),
            Self::Deny(r) => Some(&r.key),
            Self::Reserve(r) => Some(&r.key),
            Self::Intent(r) => Some(&r.key),
            Self::Extend(r) => Some(&r.key),
            Self::Settle(r) => Some(&r.key),
            Self::Void(r) => Some(&r.key),
            Self::Adjust(r) => Some(&r.key),
            Self::Close(r) => Some(&r.key),
            Self::Frame(r) => Some(&r.key),
            Self::Tool(r) => Some(&r.key),
            Self::Genesis(_)
            | Self::Epoch(_)
            | Self::Window(_)
            | Self::Checkpoint(_)
            | Self::Agent(_)
            | Self::Tier(_)
            | Self::Share(_)
            | Self::ShareIn(_)
            | Self::ShareOut(_)
            | Self::ShareBack(_)
            | Self::ShareLate(_)
            | Self::Faster(_) => None,
        }
    }
}

/// Bytes as lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

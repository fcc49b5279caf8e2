//! The record of a tool request and of what came of it: the ledger's word on its money, and the audit of its permission.

use super::{AmountPb, Key};
use bytes::Bytes;
use prost::Message;

/// One word on one request of a call. It stands in the entry of the agent's message that caused it.
#[derive(Clone, PartialEq, Message)]
pub struct Tool {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// The agent's message that asked. `Reported`: the one that said so.
    #[prost(uint64, tag = "3")]
    pub msg_seq: u64,
    /// Its name.
    #[prost(string, tag = "4")]
    pub tool: String,
    /// What was decided, or what happened.
    #[prost(enumeration = "ToolVerdict", tag = "5")]
    pub verdict: i32,
    /// `Allowed`: what the hold grows by. `Reported`: the agent's running total for this tool.
    #[prost(message, required, tag = "6")]
    pub cost: AmountPb,
    /// `Refused`: the error as it is sent, JSON.
    #[prost(bytes = "bytes", tag = "7")]
    pub error: Bytes,
    /// `Allowed`, `Own`, `Refused`: what was asked for, JSON, cut.
    #[prost(string, tag = "8")]
    pub args: String,
    /// `Done`: it did what was asked.
    #[prost(bool, tag = "9")]
    pub ok: bool,
    /// `Done`: length of the data that the agent was sent, JSON.
    #[prost(uint64, tag = "10")]
    pub bytes: u64,
    /// `Done`: SHA-256 of that data.
    #[prost(bytes = "bytes", tag = "11")]
    pub hash: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ToolVerdict {
    /// The router runs it; its cost is held from here on.
    Allowed = 0,
    /// The agent may run its own tool.
    Own = 1,
    /// `error` says why.
    Refused = 2,
    /// A mediated tool has ended.
    Done = 3,
    /// What the agent says that its own tool has cost.
    Reported = 4,
}

impl ToolVerdict {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Own => "own",
            Self::Refused => "refused",
            Self::Done => "done",
            Self::Reported => "reported",
        }
    }
}

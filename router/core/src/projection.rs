//! What a shard shows of itself to a state store: rows as they stand at one durable position. Nothing ever comes back from
//! there, so a row may be lost, late or doubled.

use crate::message::Position;
use crate::view::AgentView;
use atp_proto::content::{OpenMessage, TaskState, WindowView};
use atp_proto::{Qos, StreamId, TenantId};
use bytes::Bytes;

/// What has changed since the last one, as of `position`.
#[derive(Clone, Debug, PartialEq)]
pub struct Projection {
    pub log_id: Bytes,
    pub shard: u32,
    pub position: Position,
    pub epoch: u64,
    /// Where the newest checkpoint of this owner begins; 0: it has written none.
    pub checkpoint: Position,
    pub streams: Vec<StreamRow>,
    /// Every agent, without its statistics, where that was asked for.
    pub agents: Option<Vec<AgentView>>,
    /// More rows wait; ask again.
    pub more: bool,
}

/// A stream as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRow {
    pub tenant: TenantId,
    pub stream: StreamId,
    pub state: TaskState,
    pub qos: Qos,
    /// Of the next numbered frame to its client.
    pub next_msg_seq: u64,
    /// What it was accepted with.
    pub window: WindowView,
    /// What it may still begin, in calls, tokens and micro-USD.
    pub left: WindowView,
    /// What its agents have to send again, by lane.
    pub missing: Vec<(u32, OpenMessage)>,
    /// SHA-256 over the findings that wait to be merged, by lane, in hex; empty: none.
    pub findings_hash: String,
    /// Logged time of its last record, Unix milliseconds.
    pub last_at: u64,
}

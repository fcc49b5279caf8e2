//! `control.bill`: what each call of a stream was thought to cost, was allowed, and cost.

use super::TaskState;
use crate::id::{AgentName, CallId};
use crate::money::{Amount, Cost, Limit, Tokens, UsdMicros};
use serde::{Deserialize, Serialize};

/// `FIN control.bill`, `atp bill`, `GET /v1/streams/{id}/bill`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bill {
    pub stream_id: String,
    pub account: String,
    pub state: TaskState,
    pub limit: Limit,
    pub settled: Amount,
    pub held: Amount,
    pub remaining: Limit,
    pub calls: Vec<BillCall>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    /// Money is held, nothing has left.
    Reserved,
    /// Its dispatch is durable.
    Running,
    /// It was asked to stop or its stream has ended; its outcome is still awaited.
    Open,
    Settled,
    Void,
}

/// Where a settled amount comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Reported,
    Counted,
    UnknownAtHold,
    Expired,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BillCall {
    pub call_id: CallId,
    pub lane: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_of: Option<CallId>,
    pub agent: AgentName,
    pub model: String,
    pub state: CallState,
    pub estimate: EstimateView,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub k_ppm: u64,
    pub guarded: Amount,
    pub grant: Amount,
    /// Slices that were added.
    pub extends: u32,
    pub actual: Cost,
    /// What the agent itself said, where that differs from what is booked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stated_usd_micros: Option<UsdMicros>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// What `actual` has of each tool.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_cost_breakdown: Vec<ToolSpent>,
    pub price_version: String,
    /// What chose this agent.
    pub rule: String,
    /// RFC 3339.
    pub reserved_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_at: Option<String>,
}

/// One tool's share of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ToolSpent {
    pub tool: String,
    /// Requests that were allowed, and those that were refused.
    pub allowed: u32,
    pub refused: u32,
    pub tokens: Tokens,
    pub usd_micros: UsdMicros,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EstimateView {
    pub tokens: Tokens,
    pub usd_micros: UsdMicros,
    pub sd_tokens: Tokens,
    pub sd_usd_micros: UsdMicros,
    /// `declared`, `class_default` (later: `preflight`, `statistics`, `registry`).
    pub source: String,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub samples: u64,
}

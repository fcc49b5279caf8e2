//! Contents of an agent's connection: what it can and how it is.

use super::{EstimateDeclaration, WindowView};
use crate::frame::Qos;
use crate::id::{AgentName, CallId};
use crate::money::{Amount, Cost};
use serde::{Deserialize, Serialize};

/// How a call can be stopped, per adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// Closing the connection ends the billing.
    #[default]
    Close,
    /// Only the provider's `max_tokens` does: no slices, the hold is the worst case of that limit.
    Limit,
    /// The process group is killed.
    Kill,
    /// Nothing does: the declared worst case is held in full.
    None,
}

/// What a call does besides answering.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effects {
    #[default]
    None,
    /// It changes something outside; an unknown outcome is never tried again.
    External,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    pub id: String,
    /// micro-USD per million tokens, as the agent declares it; used where the price book lacks the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub in_usd_micros_per_mtok: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub out_usd_micros_per_mtok: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub context_tokens: Option<u64>,
}

/// `control.capabilities`, agent to router after its hello; sent again it replaces the former.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The handle.
    pub agent: AgentName,
    #[serde(default)]
    pub host: String,
    /// `openai`, `command`, `scripted`, ...
    #[serde(default)]
    pub adapter: String,
    #[serde(default)]
    pub models: Vec<ModelInfo>,
    /// Task types and skills; none: any task type.
    #[serde(default)]
    pub skills: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub security_groups: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_permissions: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub qos: Vec<Qos>,
    #[serde(default = "one")]
    pub max_parallel: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<EstimateDeclaration>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub raw_apis: Vec<String>,
    /// Random, new per start of the agent's process.
    pub incarnation: String,
    #[serde(default)]
    pub stop: Stop,
    #[serde(default)]
    pub reach: Amount,
    #[serde(default)]
    pub effects: Effects,
    /// Under `stop: none` or `limit`: the most that one call can cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_case: Option<Amount>,
    /// How long the upstream dedupes a repeated upstream key; 0: it doesn't.
    #[serde(default)]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub idempotent_for_ms: u64,
    /// Stated: the running costs are the adapter's own count. `counted` usage is booked this much up (absent: 100,000, which
    /// is 10 %), and the grant that the agent is told leaves room for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted_up_ppm: Option<u32>,
    /// Calls that are still running or whose end wasn't acknowledged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calls: Vec<ListedCall>,
}

fn one() -> u32 {
    1
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            agent: AgentName::new(""),
            host: String::new(),
            adapter: String::new(),
            models: Vec::new(),
            skills: Vec::new(),
            tools: Vec::new(),
            security_groups: Vec::new(),
            tool_permissions: Vec::new(),
            qos: Vec::new(),
            max_parallel: 1,
            estimate: None,
            raw_apis: Vec::new(),
            incarnation: String::new(),
            stop: Stop::Close,
            reach: Amount::ZERO,
            effects: Effects::None,
            worst_case: None,
            idempotent_for_ms: 0,
            counted_up_ppm: None,
            calls: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListedCall {
    pub call_id: CallId,
    pub shard: u32,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub epoch: u64,
    /// The last msg_seq that the agent sent on this call's stream.
    #[serde(default)]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub msg_seq: u64,
    #[serde(default)]
    pub cost: Cost,
    #[serde(default)]
    pub done: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    #[default]
    Ready,
    Busy,
    Pause,
    Draining,
}

impl Status {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Busy => "BUSY",
            Self::Pause => "PAUSE",
            Self::Draining => "DRAINING",
        }
    }
}

/// `control.status`, agent to router.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    pub status: Status,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suggested_window: Option<WindowView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub retry_after_ms: Option<u64>,
}

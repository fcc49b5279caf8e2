//! Contents of `tool.*` on a call's stream: an agent asks, the router answers each request once.

use super::is_default;
use crate::code::WireError;
use crate::money::Amount;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// `tool.request`, agent to router, numbered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolRequest {
    /// 1 to 64 of `A-Za-z0-9._-`.
    pub tool: String,
    /// What the tool takes; nothing for leave to run the agent's own tool.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub args: Value,
    /// The most that the agent's own tool will cost; a mediated tool has the router's price.
    #[serde(default, skip_serializing_if = "is_default")]
    pub budget: Amount,
}

/// `tool.result`, router to agent, numbered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ToolResult {
    /// msg_seq of the request that this answers.
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub request: u64,
    pub ok: bool,
    /// True: leave is given, the agent runs its own tool and reports what it cost.
    #[serde(default, skip_serializing_if = "is_default")]
    pub own: bool,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
    /// What the router booked for this request.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cost: Amount,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

//! Contents of a call's stream between router and agent.

use super::{InputText, is_default};
use crate::code::Code;
use crate::id::CallId;
use crate::money::{Amount, Cost};
use serde::{Deserialize, Serialize};

/// `SYN agent.dispatch`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dispatch {
    pub call_id: CallId,
    pub shard: u32,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub epoch: u64,
    pub upstream_key: String,
    #[serde(default)]
    pub task: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub task_type: String,
    /// Tools that a `tool.request` of this call may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    pub grant: Amount,
    /// The provider's `max_tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub max_output_tokens: Option<u64>,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub deadline_ms: u64,
    /// True: a question to an agent that may run this call already. It goes on, or answers `proof: not_called`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub go_on: bool,
}

/// `control.budget_update`: the whole grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetUpdate {
    pub call_id: CallId,
    pub shard: u32,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub epoch: u64,
    pub grant: Amount,
    /// No more will come.
    #[serde(default)]
    pub last: bool,
}

/// `agent.cancel`: 5 s to end the call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentCancel {
    pub call_id: CallId,
    pub shard: u32,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub epoch: u64,
    #[serde(default)]
    pub reason: String,
}

/// `agent.result.partial`, agent to router. `cost` is the running total; the first one includes the prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentPartial {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub findings: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    pub cost: Cost,
    /// `counted`: the adapter's own count, which a reported final may undercut.
    #[serde(default, skip_serializing_if = "is_default")]
    pub usage_source: UsageSource,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    #[default]
    Reported,
    Counted,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    #[default]
    Complete,
    /// Ended at the grant.
    Grant,
    Cancelled,
}

impl Finish {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Grant => "grant",
            Self::Cancelled => "cancelled",
        }
    }
}

/// `FIN agent.result.final`, agent to router. `text` is the last increment: what the partials had not.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "AgentFinalIn")]
pub struct AgentFinal {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub findings: Option<Vec<serde_json::Value>>,
    /// 0..1 in ppm; on the wire the decimal `confidence`.
    #[serde(rename = "confidence", skip_serializing_if = "Option::is_none", serialize_with = "decimal")]
    pub confidence_ppm: Option<u32>,
    #[serde(default)]
    pub cost: Cost,
    #[serde(default)]
    pub usage_source: UsageSource,
    #[serde(default)]
    pub finish: Finish,
}

/// What is taken for an `AgentFinal`: `confidence` as a decimal, or `confidence_ppm`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct AgentFinalIn {
    text: Option<String>,
    findings: Option<Vec<serde_json::Value>>,
    confidence: Option<crate::json::Ppm>,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    confidence_ppm: Option<u32>,
    cost: Cost,
    usage_source: UsageSource,
    finish: Finish,
}

impl From<AgentFinalIn> for AgentFinal {
    fn from(v: AgentFinalIn) -> Self {
        let confidence_ppm = v.confidence.map(|ratio| ratio.0).or(v.confidence_ppm);
        let AgentFinalIn { text, findings, cost, usage_source, finish, .. } = v;
        Self { text, findings, confidence_ppm, cost, usage_source, finish }
    }
}

/// Six digits are exact: the nearest float of a decimal prints as that decimal.
#[expect(clippy::ref_option, reason = "serde's signature")]
fn decimal<S: serde::Serializer>(ppm: &Option<u32>, s: S) -> Result<S::Ok, S::Error> {
    ppm.map(|ppm| f64::from(ppm) / 1e6).serialize(s)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proof {
    /// Refused before the provider was called.
    NotCalled,
    /// The provider's 4xx before any output.
    Rejected,
}

/// `RST control.error` on a call's stream, agent to router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentError {
    pub code: Code,
    #[serde(default)]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub retry_after_ms: Option<u64>,
    /// What the call cost until it failed; absent without proof: unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<Proof>,
}

//! The content of every payload type: one JSON document each (ATP-3, and the shapes people rely on).
//! Unknown fields are ignored; money and tokens are integers; absent means default.

use crate::code::{Code, WireError};
use crate::frame::Qos;
use crate::id::{AgentName, CallId};
use crate::money::{Amount, Cost, Limit, Tokens, UsdMicros};
use serde::{Deserialize, Serialize};

fn is_default<T: Default + PartialEq>(v: &T) -> bool {
    *v == T::default()
}

// ---- sessions -------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Client,
    Agent,
    Router,
}

/// `SYN control.hello`: the first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    #[serde(default)]
    pub minor_max: u32,
    pub role: Role,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// `SYN|ACK control.hello`: the router's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    pub minor: u32,
    pub session_id: String,
    pub limits: HelloLimits,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub heartbeat_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloLimits {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub frame_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub fragment_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub message_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub streams: u64,
}

/// `control.resume{token, after}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    #[serde(default)]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub after: u64,
}

/// `control.ack`, router to sender: all up to `msg_seq` is durable here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub msg_seq: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub open: Vec<OpenMessage>,
}

/// A message of which something is missing; no range means the whole message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenMessage {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub msg_seq: u64,
    /// Fragments that are here.
    #[serde(default)]
    pub frag: u32,
    /// Inclusive ranges of frag_seq that are asked for again.
    #[serde(default)]
    pub missing: Vec<(u32, u32)>,
}

// ---- client stream --------------------------------------------------------------------------------------------------

/// `task.submit`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    pub task: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputText>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub budget: Limit,
    /// Named agents, each one a lane.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agents: Vec<AgentName>,
    /// The best n that match; without `agents`; absent means 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fanout: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub deadline_ms: Option<u64>,
    /// False: refused at once instead of queued.
    #[serde(default = "yes")]
    pub wait: bool,
}

impl Default for Submit {
    fn default() -> Self {
        Self {
            task: String::new(),
            inputs: Vec::new(),
            budget: Limit::NONE,
            agents: Vec::new(),
            fanout: None,
            strategy: None,
            deadline_ms: None,
            wait: true,
        }
    }
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputText {
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub content_type: String,
    pub text: String,
}

/// `task.cancel`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskCancel {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `SYN|ACK control.accepted`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accepted {
    pub stream_id: String,
    pub state: TaskState,
    pub qos: Qos,
    pub window: WindowView,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_token: Option<String>,
}

/// A window as JSON: an absent component means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowView {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_parallel: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<Tokens>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_usd_micros: Option<UsdMicros>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    #[default]
    Queued,
    Running,
    Settling,
    Done,
    Provisional,
    Failed,
    Cancelled,
    Refused,
}

impl TaskState {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Settling => "settling",
            Self::Done => "done",
            Self::Provisional => "provisional",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
        }
    }
    /// True when final and bill were sent.
    #[must_use]
    pub const fn is_closed(self) -> bool {
        !matches!(self, Self::Queued | Self::Running | Self::Settling)
    }
}

/// `agent.result.partial`, router to client: one lane's output; the last of a lane carries `ended`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Partial {
    pub call_id: CallId,
    pub agent: AgentName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub findings: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    pub cost: Cost,
    /// `complete`, `grant`, `cancelled`, or a code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

/// `agent.result.final`, router to client: exactly one per accepted stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Final {
    pub state: TaskState,
    pub result: TaskResult,
    pub consensus: Consensus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskResult {
    /// The only agent's text, or all of them in order of agent name under `## NAME` headings.
    pub text: String,
    pub texts: Vec<AgentText>,
    pub findings: Vec<serde_json::Value>,
    /// True when an agent's text was longer than the router keeps for the result; the partials had all of it.
    #[serde(skip_serializing_if = "is_default")]
    pub truncated: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentText {
    pub agent: AgentName,
    pub call_id: CallId,
    pub text: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Consensus {
    pub strategy: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement_ppm: Option<u32>,
    pub uncertainties: Vec<String>,
}

// ---- the bill -------------------------------------------------------------------------------------------------------

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
    pub price_version: String,
    /// What chose this agent.
    pub rule: String,
    /// RFC 3339.
    pub reserved_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled_at: Option<String>,
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

// ---- agents ---------------------------------------------------------------------------------------------------------

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

/// The figures of an estimate, as declared in capabilities or answered to `agent.estimate`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EstimateFigures {
    pub in_tokens: Tokens,
    pub out_tokens: Tokens,
    /// Absent: priced by the model's price from the tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usd_micros: Option<UsdMicros>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p95_tokens: Option<Tokens>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p95_usd_micros: Option<UsdMicros>,
    /// tokens squared, micro-USD squared.
    pub variance: Variance,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub confidence_ppm: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Variance {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub tokens: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub usd_micros: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EstimateMode {
    Preflight,
    #[default]
    Declared,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EstimateDeclaration {
    pub mode: EstimateMode,
    #[serde(flatten)]
    pub figures: EstimateFigures,
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
    /// `counted` usage is booked this much up; absent 100,000 (10 %).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Flags, Frame};

    fn read<T: serde::de::DeserializeOwned>(content: &'static str) -> Result<T, WireError> {
        Frame::raw("s", 1, Flags::NONE, "k", bytes::Bytes::from_static(content.as_bytes())).read()
    }

    #[test]
    fn atp_3_3_null_is_absent_and_numbers_may_be_strings() {
        let submit: Submit = read(
            r#"{"task":"t","agents":null,"budget":{"tokens":"5","usd_micros":null},"deadline_ms":"7","wait":null}"#,
        )
        .unwrap();
        assert_eq!((submit.deadline_ms, submit.budget.tokens, submit.wait), (Some(7), Some(Tokens(5)), true));
        assert!(submit.agents.is_empty() && submit.budget.usd_micros.is_none());
    }

    #[test]
    fn atp_3_3_what_is_wrong_is_named() {
        let message = |e: Result<Submit, WireError>| e.map_err(|e| (e.code, e.message)).unwrap_err();
        let (code, text) = message(read(r#"{"task":"t","budget":{"tokens":-1}}"#));
        assert!(code == Code::Proto && text.starts_with("k: budget.tokens: "), "{text}");
        assert!(message(read(r#"{"task":null}"#)).1.starts_with("k: "));
        assert!(message(read("{")).1.starts_with("k: "));
    }

    #[test]
    fn confidence_is_a_decimal_on_the_wire() {
        for ppm in [0, 1, 900_000, 333_333, 1_000_000] {
            let end = AgentFinal { confidence_ppm: Some(ppm), ..AgentFinal::default() };
            let text = serde_json::to_string(&end).unwrap();
            assert!(text.contains("\"confidence\":"), "{text}");
            assert_eq!(serde_json::from_str::<AgentFinal>(&text).unwrap(), end);
        }
        let end: AgentFinal = read(r#"{"confidence_ppm":5,"text":null,"cost":null}"#).unwrap();
        assert_eq!(end.confidence_ppm, Some(5));
        assert!(read::<AgentFinal>(r#"{"confidence":1.5}"#).unwrap_err().message.contains("confidence"));
    }
}

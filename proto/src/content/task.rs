//! Contents of a client's stream: the task, its state, its answer.

use super::is_default;
use crate::code::WireError;
use crate::frame::Qos;
use crate::id::{AgentName, CallId};
use crate::money::{Cost, Limit, Tokens, UsdMicros};
use serde::{Deserialize, Serialize};

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

/// `control.window_update`: the window as it is now (absolute); the latest counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowUpdate {
    /// `stream:ID`, `tenant:NAME` (on stream "") or `agent:NAME`.
    pub scope: String,
    /// What may still begin: calls, tokens and micro-USD that are neither spent nor held.
    pub window: WindowView,
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

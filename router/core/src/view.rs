//! Rows of `ps`, `agents`, `accounts` and `verify`, in the shapes that people's scripts rely on.

use atp_proto::content::{TaskState, WindowView};
use atp_proto::{AgentName, Amount, Limit, Qos, UsdMicros};
use serde::{Deserialize, Serialize};

/// A row of `ps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamView {
    pub stream_id: String,
    pub account: String,
    pub state: TaskState,
    pub qos: Qos,
    pub task_type: String,
    pub agents: Vec<AgentName>,
    pub spent_usd_micros: UsdMicros,
    pub budget_usd_micros: Option<UsdMicros>,
    pub started_at: String,
    pub last_event_at: String,
}

/// A row of `accounts`: one window of one account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountView {
    pub account: String,
    pub per: String,
    pub window_id: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reset_at: Option<String>,
    pub limit: Limit,
    pub settled: Amount,
    pub held: Amount,
    pub remaining: Limit,
    /// Of what remains, what other shards may spend.
    #[serde(skip_serializing_if = "is_nothing", default)]
    pub lent: Amount,
    /// True: not the account itself but what this shard may spend for its home.
    #[serde(skip)]
    pub of_shares: bool,
    /// Of the current window of a paced account.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pace: Option<PaceView>,
}

fn is_nothing(amount: &Amount) -> bool {
    amount.is_zero()
}

/// How an account's use compares with an even one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaceView {
    /// observe, warn, enforce.
    pub mode: String,
    /// True: more is used (settled + held) than the line and what was authorised allow.
    pub ahead: bool,
    /// What an even use had reached by now.
    pub line: Limit,
    /// Remaining usage / remaining time.
    pub per_hour: Limit,
    /// When new calls may begin again under `enforce`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resumes_at: Option<String>,
    /// What was authorised above the line, while it counts.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub faster: Option<FasterView>,
}

/// An authorisation to go faster than the pace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FasterView {
    pub more: Amount,
    pub until: String,
    pub by: String,
}

/// What calls of one agent, model and task type have cost: of the last 128 runs that were measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatisticsView {
    pub model: String,
    pub task_type: String,
    /// Runs that the figures are of.
    pub runs: u64,
    pub mean: Amount,
    /// Square root of the variance, rounded up.
    pub sd: Amount,
    pub p50: Amount,
    pub p90: Amount,
    pub p50_ms: u64,
    pub p90_ms: u64,
}

/// A row of `agents`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentView {
    pub name: AgentName,
    pub host: String,
    pub incarnation: String,
    pub adapter: String,
    pub models: Vec<String>,
    /// READY, BUSY, PAUSE, DRAINING, or GONE when it isn't connected.
    pub status: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// When a pause may be over at the earliest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub retry_at: Option<String>,
    /// An operator wants nothing new sent to it.
    #[serde(default)]
    pub drained: bool,
    /// It is connected and answered lately.
    #[serde(default)]
    pub healthy: bool,
    /// closed, open, half_open
    #[serde(default)]
    pub breaker: String,
    /// Calls at once that its results have earned.
    #[serde(default)]
    pub aimd: u32,
    /// What its effective cost is raised by while it cools off.
    #[serde(default)]
    pub surcharge_ppm: u32,
    pub window: AgentWindows,
    pub in_flight: u32,
    /// Mean absolute error of its estimates over 7 days; absent below 3 runs, as the next two.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mape_7d_ppm: Option<u64>,
    /// Share of its runs more than 20 % above their estimate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub under_rate_7d_ppm: Option<u64>,
    /// What 95 % of its runs cost at most, as a multiple of their estimate.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub p95_overage_ppm: Option<u64>,
    /// By model and task type, from 3 runs on.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub statistics: Vec<StatisticsView>,
    /// For a task that names nothing, among those connected; absent when it isn't.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub score_ppm: Option<u64>,
    /// The highest QoS that it is offered to while others match.
    #[serde(default = "gold")]
    pub qos_tier: Qos,
    pub spent_usd_micros: UsdMicros,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_heartbeat_at: Option<String>,
}

fn gold() -> Qos {
    Qos::Gold
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentWindows {
    pub router: WindowView,
    pub agent: WindowView,
    pub effective: WindowView,
}

/// The live state at a position, or the fold of a log up to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyView {
    pub position: u64,
    pub epoch: u64,
    /// SHA-256 in hex, with the fold's version in front.
    pub state_hash: String,
    pub streams: u64,
    pub open_reservations: u64,
    pub accounts: Vec<AccountView>,
}

//! What an operator may set, as typed values. The shell parses the file; this crate only reads the result.

use crate::ladder::OnLimit;
use crate::pacing::Mode;
use crate::placement::Placement;
use crate::policy::Policy;
use crate::price::PriceBook;
use crate::registry::Registry;
use crate::tool::ToolSettings;
use atp_proto::{Limit, TenantId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long an account's window lasts; windows are calendar windows in UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Per {
    Minute,
    Hour,
    #[default]
    Day,
    Month,
    /// Never resets.
    Total,
}

impl Per {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
            Self::Month => "month",
            Self::Total => "total",
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountSettings {
    pub limit: Limit,
    pub per: Per,
    /// Calls in flight at once; absent: no limit.
    pub max_parallel: Option<u32>,
    /// `None`: as `OnLimit::default`, and who can't be paid in this window is refused at once.
    pub on_limit: Option<OnLimit>,
    /// Models, the dearest first.
    pub ladder: Vec<String>,
    /// No step goes below this model of the ladder.
    pub floor: Option<String>,
    /// `None`: not paced. A window that never resets has no pace either.
    pub pacing: Option<Mode>,
    /// Its share of an agent's slots within a tier, beside other tenants that wait; 0 counts as 1.
    pub weight: u32,
}

/// {calls, tokens, micro-USD} of one stream or agent; absent: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSettings {
    pub max_parallel: Option<u32>,
    pub limit: Limit,
}

/// Settings of a shard and of its agents.
#[derive(Clone, Debug)]
pub struct Settings {
    pub router_id: Arc<str>,
    /// This shard's number, from 0.
    pub shard: u32,
    /// How many shards there are, and what belongs to which.
    pub placement: Placement,
    pub stream_window: WindowSettings,
    /// Issue of slots: at most this many calls of one agent at once.
    pub agent_window: WindowSettings,
    pub accounts: BTreeMap<TenantId, AccountSettings>,
    /// For a tenant without an entry in `accounts`: limits like these, of its own.
    pub default_account: AccountSettings,
    pub deadline_ms: u64,
    pub agent_timeout_ms: u64,
    pub retries: u32,
    pub prices: Arc<PriceBook>,
    pub registry: Arc<Registry>,
    pub policy: Arc<Policy>,
    pub tools: ToolSettings,
    pub limits: Limits,
    pub flow: FlowSettings,
}

/// How an agent is given work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowSettings {
    /// Calls that a new agent may run at once.
    pub aimd_base: u32,
    /// The most that its results can earn.
    pub aimd_cap: u32,
    /// New dispatches per agent and second.
    pub burst: u32,
    /// A result within this time lets the window grow.
    pub latency_target_ms: u64,
    /// An actual so far above its guarded estimate cools the agent off, in ppm.
    pub cool_off_ppm: u64,
    /// Gold may pass a PAUSE after its `retry_after_ms`, one call at a time.
    pub gold_passes_pause: bool,
}

impl Default for FlowSettings {
    fn default() -> Self {
        Self {
            aimd_base: 4,
            aimd_cap: 64,
            burst: 64,
            latency_target_ms: 30_000,
            cool_off_ppm: 250_000,
            gold_passes_pause: false,
        }
    }
}

/// Bounds of a shard's memory, each with its code.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open streams, those of the router's other shards counted (ELIMIT).
    pub streams_open_max: usize,
    /// Lanes of one stream, retries included (no further retry).
    pub lanes_max: u32,
    /// Refusals of judged tasks per tenant: this many a second ...
    pub denials_per_second: u64,
    /// ... after this many at once.
    pub denials_burst: u64,
    /// Out frames per stream kept in memory for a connection that catches up.
    pub recent_frames: usize,
    /// A gold task that waited this long presses on the tiers below it, in milliseconds.
    pub preempt_after_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams_open_max: 100_000,
            lanes_max: 64,
            denials_per_second: 50,
            denials_burst: 500,
            recent_frames: 16,
            preempt_after_ms: 2_000,
        }
    }
}

impl Default for Settings {
    /// The documented defaults of the configuration file.
    fn default() -> Self {
        let limit = |tokens, usd_micros| Limit {
            tokens: Some(atp_proto::Tokens(tokens)),
            usd_micros: Some(atp_proto::UsdMicros(usd_micros)),
        };
        Self {
            router_id: "r1".into(),
            shard: 0,
            placement: Placement::default(),
            stream_window: WindowSettings { max_parallel: Some(8), limit: limit(200_000, 5_000_000) },
            agent_window: WindowSettings { max_parallel: Some(16), limit: limit(400_000, 10_000_000) },
            accounts: BTreeMap::new(),
            default_account: AccountSettings {
                limit: limit(50_000_000, 100_000_000),
                per: Per::Day,
                ..AccountSettings::default()
            },
            deadline_ms: 120_000,
            agent_timeout_ms: 60_000,
            retries: 1,
            prices: Arc::new(PriceBook::default()),
            registry: Arc::default(),
            policy: Arc::new(Policy::default()),
            tools: ToolSettings::default(),
            limits: Limits::default(),
            flow: FlowSettings::default(),
        }
    }
}

//! Records of one call, from its money to its end: Reserve, Intent, Extend, Settle, Void, Adjust.

use super::{AmountPb, CostPb, Key};
use prost::Message;

/// Money for calls, all of them or none.
#[derive(Clone, PartialEq, Message)]
pub struct Reserve {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    /// One for each lane, numbered on from the stream's last.
    #[prost(message, repeated, tag = "2")]
    pub calls: Vec<ReserveCall>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ReserveCall {
    #[prost(uint32, tag = "1")]
    pub lane: u32,
    /// The lane that this one replaces; 0: none.
    #[prost(uint32, tag = "2")]
    pub retry_of: u32,
    #[prost(string, tag = "3")]
    pub agent: String,
    #[prost(string, tag = "4")]
    pub model: String,
    /// The estimate.
    #[prost(message, required, tag = "5")]
    pub mean: AmountPb,
    /// Its standard deviation.
    #[prost(message, required, tag = "6")]
    pub sd: AmountPb,
    /// Where the estimate came from: `preflight`, `statistics`, `declared` or `class_default`.
    #[prost(string, tag = "7")]
    pub source: String,
    /// Runs behind the estimate; 0 where it isn't measured.
    #[prost(uint64, tag = "8")]
    pub samples: u64,
    /// Deviations added to the mean as a guard.
    #[prost(uint64, tag = "9")]
    pub k_ppm: u64,
    /// Mean plus guard.
    #[prost(message, required, tag = "10")]
    pub guarded: AmountPb,
    /// What is held from here on.
    #[prost(message, required, tag = "11")]
    pub hold: AmountPb,
    /// The window of each account above the stream that the hold stands in.
    #[prost(message, repeated, tag = "12")]
    pub windows: Vec<WindowRef>,
    /// A duration, counted anew by each owner.
    #[prost(uint64, tag = "13")]
    pub deadline_ms: u64,
    /// The price book's version.
    #[prost(string, tag = "14")]
    pub price_version: String,
    /// Of the model: micro-USD for a million tokens of prompt.
    #[prost(uint64, tag = "15")]
    pub in_price: u64,
    /// Of the model: micro-USD for a million tokens of answer.
    #[prost(uint64, tag = "16")]
    pub out_price: u64,
    /// Why this agent, in words for the bill.
    #[prost(string, tag = "17")]
    pub rule: String,
    /// The prompt as it was counted.
    #[prost(uint64, tag = "24")]
    pub prompt_tokens: u64,
    /// The p95 overage factor of such estimates, 1,000,000 without one: what the call may still need beside its hold.
    #[prost(uint64, tag = "25")]
    pub overage_ppm: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct WindowRef {
    #[prost(string, tag = "1")]
    pub account: String,
    /// The window's id.
    #[prost(string, tag = "2")]
    pub window: String,
    /// The hold stands in shares of it: the account's home is another shard.
    #[prost(bool, tag = "3")]
    pub shared: bool,
}

/// Durable before the dispatch leaves. What a new owner must know of the agent stands here too.
#[derive(Clone, PartialEq, Message)]
pub struct Intent {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    #[prost(string, tag = "3")]
    pub agent: String,
    /// The agent's process that it is sent to.
    #[prost(string, tag = "4")]
    pub incarnation: String,
    /// What the agent calls its provider under.
    #[prost(string, tag = "5")]
    pub upstream_key: String,
    /// What a provider can still bill once the agent has decided to stop.
    #[prost(message, required, tag = "6")]
    pub reach: AmountPb,
    /// True: `effects: external`.
    #[prost(bool, tag = "7")]
    pub external: bool,
    /// How long its provider answers a repeated upstream key without doing it again; 0: never.
    #[prost(uint64, tag = "8")]
    pub idempotent_for_ms: u64,
    /// True where the hold may grow in slices.
    #[prost(bool, tag = "9")]
    pub slices: bool,
    /// How much an amount that the agent counted is booked up.
    #[prost(uint64, tag = "10")]
    pub counted_up_ppm: u64,
    /// Where the agent runs.
    #[prost(string, tag = "11")]
    pub host: String,
    /// The agent counts on its way, so it is told this much less than its hold.
    #[prost(uint64, tag = "12")]
    pub margin_ppm: u64,
}

/// The hold grows; `hold` is the new total.
#[derive(Clone, PartialEq, Message)]
pub struct Extend {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// The new total.
    #[prost(message, required, tag = "3")]
    pub hold: AmountPb,
}

/// How a lane's output ended, and as which message the client is told.
#[derive(Clone, PartialEq, Message)]
pub struct Ended {
    /// `complete`, `grant`, `cancelled`, or a code.
    #[prost(string, tag = "1")]
    pub how: String,
    /// msg_seq of the client's `agent.result.partial` that says so; 0: the stream had ended, nobody is told.
    #[prost(uint64, tag = "2")]
    pub out_seq: u64,
}

/// One per call.
#[derive(Clone, PartialEq, Message)]
pub struct Settle {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// What is booked.
    #[prost(message, required, tag = "3")]
    pub actual: CostPb,
    /// What the agent itself said; 0: nothing.
    #[prost(uint64, tag = "4")]
    pub stated_usd_micros: u64,
    /// Where the figure comes from.
    #[prost(enumeration = "SourcePb", tag = "5")]
    pub source: i32,
    /// How it ended.
    #[prost(message, required, tag = "6")]
    pub ended: Ended,
    /// The agent's confidence in ppm plus one; 0: none.
    #[prost(uint32, tag = "7")]
    pub confidence_ppm_plus_1: u32,
}

/// Proof that a call had no effect; its hold comes back.
#[derive(Clone, PartialEq, Message)]
pub struct Void {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// Which one.
    #[prost(enumeration = "ProofPb", tag = "3")]
    pub proof: i32,
    /// How it ended.
    #[prost(message, required, tag = "4")]
    pub ended: Ended,
}

/// A later and better figure for a settled call: the new total. The same evidence counts once.
#[derive(Clone, PartialEq, Message)]
pub struct Adjust {
    #[prost(message, required, tag = "1")]
    pub key: Key,
    #[prost(uint32, tag = "2")]
    pub lane: u32,
    /// What says so; the call's own id: its late final.
    #[prost(string, tag = "3")]
    pub evidence: String,
    /// The new total.
    #[prost(message, required, tag = "4")]
    pub actual: CostPb,
    /// Where the figure comes from.
    #[prost(enumeration = "SourcePb", tag = "5")]
    pub source: i32,
    /// The call's own final said `complete`: a measured run.
    #[prost(bool, tag = "6")]
    pub complete: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum SourcePb {
    /// By the provider.
    Reported = 0,
    /// By the adapter, booked up.
    Counted = 1,
    /// Lost: all that was held, and the reach.
    UnknownAtHold = 2,
    /// No end before its deadline: all that was held, and the reach.
    Expired = 3,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ProofPb {
    /// The owner that wrote the Intent (or none) never handed the dispatch over.
    NeverSent = 0,
    /// The agent's router answered `unsent`.
    Unsent = 1,
    /// The agent refused before it called its provider.
    NotCalled = 2,
    /// The provider's 4xx before any output.
    Rejected = 3,
    /// The agent's incarnation, asked under the new epoch, never got the call.
    NotListed = 4,
}

impl SourcePb {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Reported => "reported",
            Self::Counted => "counted",
            Self::UnknownAtHold => "unknown_at_hold",
            Self::Expired => "expired",
        }
    }
}

impl ProofPb {
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NeverSent => "never_sent",
            Self::Unsent => "unsent",
            Self::NotCalled => "not_called",
            Self::Rejected => "rejected",
            Self::NotListed => "not_listed",
        }
    }
}

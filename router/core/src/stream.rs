//! One stream and its calls as the fold knows them. Kept small: what a client or an agent could be told again.

use crate::account::Level;
use crate::record::{Accept, AmountPb, CostPb, Intent, ReserveCall};
use crate::tool::CallTools;
use atp_proto::content::{CallState, TaskState};
use atp_proto::{AgentName, Amount, CallId, Cost, Limit, StreamId, TenantId};
use bytes::Bytes;
use prost::Message;

/// One task's stream, from its Accept or Deny until 24 h after its end.
#[derive(Clone, PartialEq, Message)]
pub struct Stream {
    /// The Accept; of a refused stream what the Deny says.
    #[prost(message, required, tag = "1")]
    pub accept: Accept,
    /// Unix ms.
    #[prost(uint64, tag = "2")]
    pub accepted_at: u64,
    /// Unix ms of its last record.
    #[prost(uint64, tag = "3")]
    pub last_at: u64,
    /// The entries of this stream begin behind this position.
    #[prost(uint64, tag = "4")]
    pub from: u64,
    /// Content of `task.submit`; empty once the stream is closed.
    #[prost(bytes = "bytes", tag = "5")]
    pub submit: Bytes,
    /// What its ended calls cost.
    #[prost(message, required, tag = "6")]
    pub settled: AmountPb,
    /// What its open calls may still cost.
    #[prost(message, required, tag = "7")]
    pub held: AmountPb,
    /// Lane n stands at index n - 1.
    #[prost(message, repeated, tag = "8")]
    pub calls: Vec<Call>,
    /// The last msg_seq that was given to the client.
    #[prost(uint64, tag = "9")]
    pub out_seq: u64,
    /// Its client has asked to stop.
    #[prost(bool, tag = "10")]
    pub cancel: bool,
    /// `TaskState` once it is closed or refused; empty before.
    #[prost(string, tag = "11")]
    pub closed: String,
    /// Of its Close.
    #[prost(string, tag = "12")]
    pub code: String,
    /// Of its Close.
    #[prost(bytes = "bytes", tag = "13")]
    pub result_hash: Bytes,
    /// `control.error` of a refusal, JSON.
    #[prost(bytes = "bytes", tag = "14")]
    pub error: Bytes,
    /// Unix ms; 0 while it runs.
    #[prost(uint64, tag = "15")]
    pub ended_at: u64,
    /// `meta.tool_permissions` of the submit.
    #[prost(string, repeated, tag = "40")]
    pub tool_permissions: Vec<String>,
}

/// One call: a dispatch to one agent, or money held for one.
#[derive(Clone, PartialEq, Message)]
pub struct Call {
    /// As it was reserved.
    #[prost(message, required, tag = "1")]
    pub reserve: ReserveCall,
    /// What is held now: the grant.
    #[prost(message, required, tag = "2")]
    pub hold: AmountPb,
    /// Unix ms.
    #[prost(uint64, tag = "3")]
    pub reserved_at: u64,
    /// The newest one.
    #[prost(message, optional, tag = "4")]
    pub intent: Option<Intent>,
    /// Unix ms of the newest Intent.
    #[prost(uint64, tag = "5")]
    pub intent_at: u64,
    /// The epoch that wrote the newest Intent.
    #[prost(uint64, tag = "6")]
    pub intent_epoch: u64,
    /// Messages of the agent that are taken.
    #[prost(uint64, tag = "7")]
    pub in_seq: u64,
    /// The running total that is booked so far.
    #[prost(message, required, tag = "8")]
    pub booked: CostPb,
    /// The most that one message of its agent added.
    #[prost(message, required, tag = "9")]
    pub largest_chunk: AmountPb,
    /// How many.
    #[prost(uint32, tag = "10")]
    pub extends: u32,
    /// Where it stands.
    #[prost(enumeration = "Phase", tag = "11")]
    pub phase: i32,
    /// What is booked once it has ended.
    #[prost(message, required, tag = "12")]
    pub actual: CostPb,
    /// What the agent itself said; 0: nothing.
    #[prost(uint64, tag = "13")]
    pub stated_usd_micros: u64,
    /// Of `actual`.
    #[prost(enumeration = "crate::record::SourcePb", tag = "14")]
    pub source: i32,
    /// Unix ms.
    #[prost(uint64, tag = "15")]
    pub settled_at: u64,
    /// Of each Adjust.
    #[prost(string, repeated, tag = "16")]
    pub evidence: Vec<String>,
    /// `complete`, `grant`, `cancelled`, or a code; empty while it runs.
    #[prost(string, tag = "17")]
    pub ended: String,
    /// What it has said, up to the bound of a result.
    #[prost(string, tag = "18")]
    pub text: String,
    /// Findings as JSON documents.
    #[prost(string, repeated, tag = "19")]
    pub findings: Vec<String>,
    /// Text or findings were cut at that bound.
    #[prost(bool, tag = "20")]
    pub truncated: bool,
    /// The highest total that was reported (not counted); it never falls.
    #[prost(message, required, tag = "21")]
    pub reported: CostPb,
    /// A void call's proof.
    #[prost(enumeration = "crate::record::ProofPb", tag = "22")]
    pub proof: i32,
    /// More than one: an earlier attempt may have had its effect, so no proof of a later one voids the call.
    #[prost(uint32, tag = "23")]
    pub intents: u32,
    /// From here on an upstream remembers the call's key.
    #[prost(uint64, tag = "24")]
    pub first_intent_at: u64,
    /// Bytes of `findings`.
    #[prost(uint64, tag = "25")]
    pub findings_bytes: u64,
    /// What it asked of tools.
    #[prost(message, optional, boxed, tag = "40")]
    pub tools: Option<Box<CallTools>>,
    /// Of its final, in ppm plus one; 0: none.
    #[prost(uint32, tag = "41")]
    pub confidence_ppm_plus_1: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    Reserved = 0,
    Running = 1,
    Settled = 2,
    Void = 3,
}

impl Stream {
    #[must_use]
    pub fn tenant(&self) -> TenantId {
        TenantId::new(&self.accept.key.tenant)
    }
    #[must_use]
    pub fn id(&self) -> StreamId {
        StreamId::new(&self.accept.key.stream)
    }
    #[must_use]
    pub fn level(&self) -> Level {
        Level { limit: self.accept.limit.into(), settled: self.settled.into(), held: self.held.into() }
    }
    #[must_use]
    pub fn limit(&self) -> Limit {
        self.accept.limit.into()
    }
    #[must_use]
    pub fn is_closed(&self) -> bool {
        !self.closed.is_empty()
    }
    /// True while a call of it holds money.
    #[must_use]
    pub fn has_open_calls(&self) -> bool {
        self.calls.iter().any(Call::is_open)
    }
    /// True when a dispatch of it may have left.
    #[must_use]
    pub fn had_intent(&self) -> bool {
        self.calls.iter().any(|c| c.intent.is_some())
    }
    #[must_use]
    pub fn call(&self, lane: u32) -> Option<&Call> {
        self.calls.get((lane as usize).checked_sub(1)?)
    }
    pub(crate) fn call_mut(&mut self, lane: u32) -> Option<&mut Call> {
        self.calls.get_mut((lane as usize).checked_sub(1)?)
    }
    #[must_use]
    pub fn call_id(&self, lane: u32) -> CallId {
        self.accept.key.call(lane)
    }
    #[must_use]
    pub fn state(&self) -> TaskState {
        match self.closed.as_str() {
            "" if self.cancel => TaskState::Settling,
            "" if self.had_intent() => TaskState::Running,
            "" => TaskState::Queued,
            closed => closed_state(closed),
        }
    }
}

/// Reads the state of a Close or a refusal.
#[must_use]
pub fn closed_state(text: &str) -> TaskState {
    [TaskState::Done, TaskState::Provisional, TaskState::Failed, TaskState::Cancelled, TaskState::Refused]
        .into_iter()
        .find(|s| s.as_str() == text)
        .unwrap_or_default()
}

impl Call {
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.phase(), Phase::Reserved | Phase::Running)
    }
    #[must_use]
    pub fn hold(&self) -> Amount {
        self.hold.into()
    }
    /// What its agent may spend: the hold without what is held for mediated tools.
    #[must_use]
    pub fn grant(&self) -> Amount {
        self.hold().less(self.tool_cost())
    }
    /// What mediated tools have cost it.
    #[must_use]
    pub fn tool_cost(&self) -> Amount {
        self.tools.as_ref().map_or(Amount::ZERO, |t| t.cost.into())
    }
    #[must_use]
    pub fn booked(&self) -> Cost {
        self.booked.into()
    }
    /// `cost` of its agent, and of mediated tools beside it.
    #[must_use]
    pub fn with_tools(&self, cost: Cost) -> Cost {
        let tools = self.tool_cost();
        Cost {
            out_tokens: cost.out_tokens.add(tools.tokens).unwrap_or(cost.out_tokens),
            usd_micros: cost.usd_micros.add(tools.usd_micros).unwrap_or(cost.usd_micros),
            ..cost
        }
    }
    /// What its agent cost, without the mediated tools beside it.
    #[must_use]
    pub fn own_cost(&self) -> Cost {
        let (cost, tools) = (Cost::from(self.actual), self.tool_cost());
        Cost {
            out_tokens: cost.out_tokens.less(tools.tokens),
            usd_micros: cost.usd_micros.less(tools.usd_micros),
            ..cost
        }
    }
    #[must_use]
    pub fn agent(&self) -> AgentName {
        AgentName::new(&self.reserve.agent)
    }
    /// Bytes that it keeps for the result.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.text.len() + self.findings_bytes as usize
    }
    /// True while its upstream still knows its key.
    #[must_use]
    pub fn is_young(&self, logged_ms: u64) -> bool {
        self.intent.as_ref().is_some_and(|i| logged_ms < self.first_intent_at.saturating_add(i.idempotent_for_ms))
    }
    /// True when its output ended without success, so that another lane may replace it.
    #[must_use]
    pub fn failed(&self) -> bool {
        !self.is_open() && !matches!(self.ended.as_str(), "complete" | "grant" | "cancelled")
    }
    /// As the bill shows it.
    #[must_use]
    pub fn state(&self, stream_closed: bool) -> CallState {
        match self.phase() {
            Phase::Reserved => CallState::Reserved,
            Phase::Running if stream_closed => CallState::Open,
            Phase::Running => CallState::Running,
            Phase::Settled => CallState::Settled,
            Phase::Void => CallState::Void,
        }
    }
}

//! What goes into a `Shard` and what comes out of it, and the messages between `Shard` and `Agent`.
//! Inputs are facts; effects are requests to the shell. Nothing here does I/O.

use crate::agent::breaker::BreakerState;
use crate::agent::queue::Wish;
use crate::clock::Now;
use crate::escrow::Escrow;
use crate::projection::Projection;
use crate::statistics::{Lesson, Statistics};
use crate::view::{AccountView, AgentView, StreamView, VerifyView};
use atp_proto::codec::Received;
use atp_proto::content::{AgentStatus, Bill, Capabilities, Final};
use atp_proto::{AgentName, Amount, CallId, ConnId, Frame, StreamId, TenantId, WireError};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The number of an entry in its log, from 1. Epochs are positions.
pub type Position = u64;

/// One fact for a shard. What one input decides of one task is one entry of the log.
#[derive(Clone, Debug)]
pub enum Input {
    /// A frame of a client's stream (never of stream ""), from a connection of `tenant`.
    Client { conn: ConnId, tenant: TenantId, received: Received },
    /// The connection is gone. It cancels nothing.
    ConnGone { conn: ConnId },
    /// An answer or a notice of an `Agent`.
    Agent(FromAgent),
    /// Every entry up to `position` is durable.
    Durable { position: Position },
    /// How much room the log has left.
    LogRoom(LogRoom),
    /// The shell has sent what `Effect::Replay` asked for.
    Replayed { conn: ConnId, tenant: TenantId, stream: StreamId, upto: u64 },
    /// A question; exactly one `Effect::Answer` with the same id follows, after all it shows is durable.
    Query { id: u64, query: Query },
    /// What came of `Effect::Tool`.
    ToolDone(Box<ToolDone>),
    /// What another shard says about an account's money.
    Escrow { from: u32, message: Escrow },
    /// What all shards of this router have learned of agents, lessons of this one among them.
    Learned(Arc<Statistics>),
    /// Write the fold into the log now (a new segment has begun).
    Checkpoint,
    /// New work is refused with EDRAINING; running streams end.
    Drain,
    /// An operator's word on an agent: nothing new for it, or (`drained: false`) as it says itself. Answered like a query, by
    /// the agent's row; without one where nobody knows the agent.
    DrainAgent { id: u64, agent: AgentName, drained: bool },
    /// An operator lets an account go so much above its pace, for so long from now. Answered by the account's rows; without one
    /// where the account isn't paced. The newest counts.
    Faster { id: u64, account: TenantId, more: Amount, for_ms: u64, by: String },
}

/// What a mediated tool did. Content is bounded by who ran it.
#[derive(Clone, Debug)]
pub struct ToolDone {
    pub call: CallId,
    /// As in `Effect::Tool`.
    pub attempt: u32,
    pub request: u64,
    pub outcome: Result<serde_json::Value, WireError>,
}

/// Free space of the log, as the low marks see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogRoom {
    #[default]
    Enough,
    /// Accept, Reserve and Extend are refused with ELOG; what runs may end.
    Low,
    /// Running calls are told to stop.
    Last,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// All streams of a tenant, open ones and those of the last 24 h.
    Streams {
        tenant: TenantId,
    },
    Stream {
        tenant: TenantId,
        stream: StreamId,
    },
    Bill {
        tenant: TenantId,
        stream: StreamId,
    },
    Accounts,
    Agents,
    /// Position, hash and figures of the live state.
    Verify,
    /// For a state store: at most `max` streams that have changed since they were last shown, or with `all` every one that
    /// runs or ended lately, from the first one on; with `agents` how every agent stands.
    Projection {
        all: bool,
        agents: bool,
        max: usize,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    Streams(Vec<StreamView>),
    /// `None`: no such stream of this tenant.
    Stream(Option<Box<StreamAnswer>>),
    Bill(Option<Bill>),
    Accounts {
        position: Position,
        accounts: Vec<AccountView>,
    },
    Agents(Vec<AgentView>),
    Verify(Box<VerifyView>),
    /// Never leaves its process.
    #[serde(skip)]
    Projection(Box<Projection>),
}

/// A stream as it stands: its row, its bill, and where its Close stands in the log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamAnswer {
    pub view: StreamView,
    pub bill: Bill,
    /// What was sent as `agent.result.final`: present while it is in memory; else the shell reads it at `from`.
    pub result: Option<Final>,
    /// The entries of the stream begin behind this position.
    pub from: Position,
}

#[allow(
    clippy::large_enum_variant,
    reason = "frames are the common effect; boxing them would allocate on the hot path"
)]
/// A request to the shell. Effects come in order; those that reveal state come only when it is durable.
#[derive(Clone, Debug)]
pub enum Effect {
    /// Append this entry; its position is the last one's plus one. `checkpoint` marks the first piece of a fold.
    Append {
        position: Position,
        entry: Bytes,
        checkpoint: bool,
    },
    /// Send to a client's connection.
    Send {
        conn: ConnId,
        frame: Frame,
    },
    /// Read the log behind `from` and send the client frames `after < msg_seq <= upto` of this stream (see
    /// `replay::StreamReplay`), then say `Input::Replayed`.
    Replay {
        conn: ConnId,
        tenant: TenantId,
        stream: StreamId,
        from: Position,
        after: u64,
        upto: u64,
    },
    ToAgent {
        agent: AgentName,
        message: ToAgent,
    },
    /// For another shard, here or at another router. It may be lost: what counts is said again.
    ToShard {
        shard: u32,
        message: Escrow,
    },
    Close {
        conn: ConnId,
        error: WireError,
    },
    /// Run a mediated tool, then say `Input::ToolDone` with the same call, attempt and request. A tool that runs twice has
    /// no other effect than once.
    Tool {
        call: CallId,
        attempt: u32,
        request: u64,
        tool: Arc<str>,
        args: serde_json::Value,
    },
    Answer {
        id: u64,
        answer: Answer,
    },
    /// Where there are several shards: for the others to learn too.
    Learned(Box<Lesson>),
    Metric(Metric),
}

/// Facts for `/metrics`; the shell gives them their Prometheus names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metric {
    Admission {
        outcome: &'static str,
        code: &'static str,
    },
    Settled {
        account: TenantId,
        agent: AgentName,
        model: Arc<str>,
        usd_micros: u64,
        in_tokens: u64,
        out_tokens: u64,
        estimated_usd_micros: u64,
        duration_ms: u64,
    },
    FirstToken {
        agent: AgentName,
        model: Arc<str>,
        ms: u64,
    },
    /// An agent's call cost more than its hold and its reach: the promise P <= L + K x reach rested on a wrong figure of it.
    Breach {
        agent: AgentName,
        usd_micros: u64,
        tokens: u64,
    },
    Redelivered,
    Dropped {
        reason: &'static str,
    },
    /// A tool's request has ended: `ok`, `failed`, `own` or `refused`.
    Tool {
        tool: Arc<str>,
        outcome: &'static str,
    },
    StreamsOpen {
        qos: atp_proto::Qos,
        n: u64,
    },
    CallsInFlight {
        agent: AgentName,
        n: u64,
    },
    Account {
        account: TenantId,
        held_usd_micros: u64,
        remaining_usd_micros: Option<u64>,
        limit_usd_micros: Option<u64>,
        /// `None`: the account isn't paced.
        ahead_of_pace: Option<bool>,
    },
    /// The highest QoS that an agent's estimates are trusted with.
    AgentTier {
        agent: AgentName,
        tier: atp_proto::Qos,
    },
}

/// Shard to agent. (call, epoch) makes repeats harmless; a lower epoch than the highest seen of that shard is refused. As JSON
/// it is without its frame, which travels beside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToAgent {
    /// A new owner of the shard: slots of lower epochs fall. Answered by `Up` if the agent is connected.
    Owner { shard: u32, epoch: u64 },
    /// Lend a slot for this call. Repeated until `Lent`, or withdrawn by `Back`.
    Want { shard: u32, epoch: u64, call: CallId, wish: Wish },
    /// The slot, lent or wanted, isn't needed.
    Back { shard: u32, epoch: u64, call: CallId },
    /// Send `agent.dispatch` to this incarnation, to no other. Repeated until `Sent` or `Unsent`. With `go_on` it is a
    /// question and needs no slot, and so it is at every machine but the one that lent the slot, its `keeper`.
    Dispatch {
        shard: u32,
        epoch: u64,
        call: CallId,
        incarnation: Arc<str>,
        go_on: bool,
        keeper: Arc<str>,
        #[serde(skip)]
        frame: Frame,
    },
    /// Send a frame of a call to this incarnation, the one that it was dispatched to, and to no other:
    /// `control.budget_update`, `agent.cancel`, `tool.result`, `control.ack`; before a dispatch `agent.estimate`.
    Pass {
        shard: u32,
        epoch: u64,
        call: CallId,
        incarnation: Arc<str>,
        #[serde(skip)]
        frame: Frame,
    },
    /// The call is settled or void: its slot is free, and this is what it says of the agent.
    Ended { shard: u32, epoch: u64, call: CallId, outcome: Outcome },
    /// What the log says of the agent: its status, if that isn't READY, for a machine that hasn't heard it itself; and the
    /// operator's word.
    Standing { shard: u32, epoch: u64, incarnation: Arc<str>, status: Option<AgentStatus>, drained: bool },
}

impl ToAgent {
    /// The shard that says it, and its epoch.
    #[must_use]
    pub fn of(&self) -> (u32, u64) {
        match self {
            Self::Owner { shard, epoch }
            | Self::Want { shard, epoch, .. }
            | Self::Back { shard, epoch, .. }
            | Self::Dispatch { shard, epoch, .. }
            | Self::Pass { shard, epoch, .. }
            | Self::Ended { shard, epoch, .. }
            | Self::Standing { shard, epoch, .. } => (*shard, *epoch),
        }
    }

    /// The frame that it carries.
    #[must_use]
    pub fn frame(&self) -> Option<&Frame> {
        match self {
            Self::Dispatch { frame, .. } | Self::Pass { frame, .. } => Some(frame),
            Self::Owner { .. } | Self::Want { .. } | Self::Back { .. } | Self::Ended { .. } | Self::Standing { .. } => {
                None
            }
        }
    }

    /// The same with this frame, where it carries one.
    #[must_use]
    pub fn with_frame(mut self, carried: Frame) -> Self {
        if let Self::Dispatch { frame, .. } | Self::Pass { frame, .. } = &mut self {
            *frame = carried;
        }
        self
    }
}

/// How a call ended, as far as its agent's window is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It answered: how long after its dispatch, how far above its guarded estimate (0: not), and whether a frame of it
    /// carried a congestion mark.
    Done { latency_ms: u64, over_ppm: u64, congested: bool },
    /// An error, a time-out, or a lost process.
    Failed,
    /// It was asked too much (EWINDOW_AGENT, EDRAINING): nothing more before then.
    Refused { retry_after_ms: u64 },
    /// Cancelled, never sent, or refused for what it asks: says nothing of the agent.
    Unknown,
}

/// How much an agent is given now, and why. Absolute: the latest counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Calls that may run at once: the effective window.
    pub window: u32,
    /// What its results have earned.
    pub aimd: u32,
    pub breaker: BreakerState,
    /// What its effective cost is raised by while it cools off.
    pub surcharge_ppm: u32,
    /// It answered lately.
    pub healthy: bool,
}

/// Agent to shard. A call's frame has no JSON: it travels as it was received.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromAgent {
    /// Connected (or asked by a new owner): what it can, which calls it still has (`capabilities.calls`), what it said of
    /// itself here (`None`: nothing yet), and whether it is drained as far as its router knows.
    Up {
        agent: AgentName,
        capabilities: Arc<Capabilities>,
        status: Option<AgentStatus>,
        drained: bool,
    },
    /// The connection is gone; the agent goes on and may come back with the same incarnation.
    Down {
        agent: AgentName,
        incarnation: Arc<str>,
    },
    Status {
        agent: AgentName,
        status: AgentStatus,
    },
    Flow {
        agent: AgentName,
        flow: Flow,
    },
    /// A slot, for 2 s, lent by this machine on this connection.
    Lent {
        agent: AgentName,
        incarnation: Arc<str>,
        call: CallId,
        epoch: u64,
        keeper: Arc<str>,
    },
    /// The dispatch is on the wire.
    Sent {
        agent: AgentName,
        call: CallId,
        epoch: u64,
    },
    /// The dispatch never left and never will: proof for a Void.
    Unsent {
        agent: AgentName,
        call: CallId,
        epoch: u64,
    },
    /// A frame on a call's stream, from a connection of this incarnation.
    #[serde(skip)]
    Frame {
        agent: AgentName,
        incarnation: Arc<str>,
        received: Received,
    },
}

/// Input of an `Agent`: from its connection, or from a shard.
#[derive(Clone, Debug)]
pub enum AgentInput {
    /// The agent said hello and capabilities on `conn`.
    Connected {
        conn: ConnId,
        capabilities: Box<Capabilities>,
    },
    /// `control.status`.
    Status {
        conn: ConnId,
        status: AgentStatus,
    },
    /// It said so at another router, where it is connected.
    SaidElsewhere {
        incarnation: Arc<str>,
        status: AgentStatus,
    },
    /// Any frame or heartbeat answer from the loop that takes dispatches.
    Alive {
        conn: ConnId,
    },
    Disconnected {
        conn: ConnId,
    },
    Shard(ToAgent),
}

/// Effect of an `Agent`.
#[derive(Clone, Debug)]
pub enum AgentEffect {
    Send {
        conn: ConnId,
        frame: Frame,
    },
    Close {
        conn: ConnId,
        error: WireError,
    },
    /// To the shard named, or (`None`) to every shard.
    ToShard {
        shard: Option<u32>,
        message: FromAgent,
    },
}

/// What every state machine of this crate offers: one change, then drain.
pub trait Machine {
    type Input;
    type Effect;
    fn handle(&mut self, now: Now, input: Self::Input);
    fn poll_effect(&mut self) -> Option<Self::Effect>;
    /// When to call `handle_timeout`, in monotonic milliseconds.
    fn poll_timeout(&self) -> Option<u64>;
    fn handle_timeout(&mut self, now: Now);
}

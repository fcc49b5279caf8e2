//! One call from Intent on: its dispatch, the agent that comes and goes, and what follows when that is lost.

use super::settle::told;
use super::tool::LiveTools;
use super::{OWNER_LATER_MS, REPEAT_MS, Shard, Timer};
use crate::estimate::{CALL_AMOUNT_MAX, output_tokens};
use crate::message::{Metric, ToAgent};
use crate::price::Price;
use crate::record::{Intent, ProofPb, Record, SourcePb};
use crate::stream::{Call, Phase};
use atp_proto::content::{AgentCancel, Dispatch, Effects, Stop, Submit};
use atp_proto::frame::{Flags, kind};
use atp_proto::reassembly::Inbound;
use atp_proto::{AgentName, Amount, CallId, Code, Frame, Tokens, UsdMicros};
use std::sync::Arc;

/// A call whose connection is lost is waited for this long before its outcome is called unknown.
const LIST_MS: u64 = 15_000;
/// `counted` usage is booked this much up, unless the agent's capabilities say otherwise.
pub(super) const COUNTED_UP_PPM: u64 = 100_000;

/// How far the dispatch of a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handing {
    /// Its dispatch goes to the agent's router again and again; true: the agent must be asked afterwards.
    Over(bool),
    /// The agent, which may run it, is asked to go on.
    Asking,
    Done,
}

/// What the memory holds of a call beside the fold.
pub(super) struct LiveCall {
    pub(super) agent: AgentName,
    pub(super) no: u64,
    pub(super) lane: u32,
    pub(super) inbound: Inbound,
    pub(super) handing: Handing,
    /// The machine that lent its slot.
    pub(super) keeper: Arc<str>,
    pub(super) expires_at: u64,
    /// Its agent is away: until then it may come back.
    pub(super) lost_at: Option<u64>,
    /// Its agent was lost, its upstream dedupes: it is called again when a slot is there.
    pub(super) wants_slot: bool,
    /// It holds a slot of its agent.
    pub(super) in_flight: bool,
    /// When to look at it again.
    pub(super) due: u64,
    pub(super) asked: usize,
    pub(super) gap: bool,
    /// How far the messages behind a gap had come when they were last looked at.
    pub(super) progress: (u64, usize),
    pub(super) answered: bool,
    pub(super) tools: LiveTools,
    /// A frame of it carried a congestion mark.
    pub(super) congested: bool,
}

impl LiveCall {
    pub(super) fn new(no: u64, lane: u32, agent: AgentName, expires_at: u64) -> Self {
        Self {
            agent,
            no,
            lane,
            inbound: Inbound::default(),
            handing: Handing::Over(false),
            keeper: "".into(),
            expires_at,
            lost_at: None,
            wants_slot: false,
            in_flight: false,
            due: 0,
            asked: 0,
            gap: false,
            progress: (0, 0),
            answered: false,
            tools: LiveTools::default(),
            congested: false,
        }
    }

    /// A running call that a new owner found in the log.
    pub(super) fn adopted(no: u64, lane: u32, call: &Call, now_ms: u64) -> Self {
        let expires_at = now_ms + call.reserve.deadline_ms + OWNER_LATER_MS;
        Self {
            inbound: Inbound::after(call.in_seq),
            handing: Handing::Asking,
            lost_at: Some(expires_at.min(now_ms + LIST_MS)),
            answered: call.in_seq > 0,
            ..Self::new(no, lane, call.agent(), expires_at)
        }
    }
}

impl Shard {
    /// Looks at a call again at `at`, or earlier.
    pub(super) fn call_timer(&mut self, id: CallId, at: u64) {
        let now = self.now_ms;
        if let Some(live) = self.calls.get_mut(&id)
            && (live.due <= now || at < live.due)
        {
            live.due = at;
            self.timer(at, Timer::Call(id));
        }
    }

    /// Notes that a call holds a slot of its agent, or no longer does.
    pub(super) fn flies(&mut self, id: CallId, flies: bool) {
        let Some(live) = self.calls.get_mut(&id).filter(|c| c.in_flight != flies) else { return };
        live.in_flight = flies;
        let n = self.in_flight.entry(live.agent.clone()).or_default();
        *n = if flies { *n + 1 } else { n.saturating_sub(1) };
        let (agent, n) = (live.agent.clone(), u64::from(*n));
        self.metric(Metric::CallsInFlight { agent, n });
        self.note_flight(id, flies);
    }

    // ---- dispatch ---------------------------------------------------------------------------------------------------

    /// A slot is here: Intent, and behind it the dispatch.
    pub(super) fn intend(&mut self, no: u64, lane: u32, agent: &AgentName, keeper: Arc<str>) {
        let Some(seat) = self.seats.get(agent) else { return };
        let (c, incarnation) = (seat.capabilities.clone(), seat.incarnation.clone());
        let Some(stream) = self.state.stream(no) else { return };
        let id = stream.call_id(lane);
        let learned = self.statistics().agent(agent.as_str()).map(crate::statistics::Learned::overshoot);
        let overshoot =
            Amount::from(self.state.agent_totals(agent.as_str()).overshoot).max(learned.unwrap_or_default());
        let intent = Intent {
            key: stream.accept.key.clone(),
            lane,
            agent: agent.as_str().into(),
            incarnation: incarnation.to_string(),
            upstream_key: id.to_string(),
            reach: c.reach.min(Amount::new(CALL_AMOUNT_MAX, CALL_AMOUNT_MAX)).max(overshoot).into(),
            external: c.effects == Effects::External,
            idempotent_for_ms: c.idempotent_for_ms,
            slices: matches!(c.stop, Stop::Close | Stop::Kill),
            counted_up_ppm: c.counted_up_ppm.map_or(COUNTED_UP_PPM, u64::from).min(1_000_000),
            margin_ppm: c.counted_up_ppm.map_or(0, u64::from).min(1_000_000),
            host: c.host.clone(),
        };
        self.record(Record::Intent(intent));
        // What an earlier incarnation said is not for this one to hear acknowledged.
        self.acks.remove(&id);
        self.acks_held.1.remove(&id);
        let time = self.time_left(no, lane);
        let expires_at = self.now_ms + time + OWNER_LATER_MS;
        let call = LiveCall { keeper, ..LiveCall::new(no, lane, agent.clone(), expires_at) };
        self.calls.insert(id, call);
        self.call_timer(id, self.now_ms + REPEAT_MS);
        self.flies(id, true);
        self.hand_over(id, false);
    }

    pub(super) fn time_left(&self, no: u64, lane: u32) -> u64 {
        let of_call = self.state.stream(no).and_then(|s| s.call(lane)).map_or(1, |c| c.reserve.deadline_ms);
        let of_task = self.live.get(&no).map_or(of_call, |l| l.deadline_at.saturating_sub(self.now_ms));
        of_call.min(of_task).max(1)
    }

    /// Sends `agent.dispatch` to the agent's router; `go_on` asks an agent that may run the call.
    pub(super) fn hand_over(&mut self, id: CallId, go_on: bool) {
        let Some(live) = self.calls.get(&id) else { return };
        let (no, lane, agent, keeper) = (live.no, live.lane, live.agent.clone(), live.keeper.clone());
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let Some(intent) = &call.intent else { return };
        let deadline_ms = live.expires_at.saturating_sub(OWNER_LATER_MS).saturating_sub(self.now_ms).max(1);
        let hold = call.grant();
        let price =
            Price { in_usd_micros_per_mtok: call.reserve.in_price, out_usd_micros_per_mtok: call.reserve.out_price };
        let input = self.input_of(no, price);
        let ceiling = if intent.slices {
            self.levels(stream, &call.reserve.windows)
                .iter()
                .map(|l| l.free().add(hold).unwrap_or(l.free()))
                .reduce(Amount::min)
                .unwrap_or(hold)
        } else {
            hold
        };
        let submit = if go_on { Submit::default() } else { super::client::read_content(&stream.submit) };
        let dispatch = Dispatch {
            call_id: id,
            shard: self.settings.shard,
            epoch: self.epoch,
            upstream_key: intent.upstream_key.clone(),
            task: submit.task,
            inputs: submit.inputs,
            model: Some(call.reserve.model.clone()).filter(|m| !m.is_empty()),
            task_type: stream.accept.task_type.clone(),
            tools: stream.tool_permissions.clone(),
            grant: told(call, hold),
            max_output_tokens: output_tokens(told(call, ceiling), input, price).map(|n| n.max(1)),
            deadline_ms,
            go_on,
        };
        let frame = Frame::json(id.to_string(), 1, Flags::SYN, kind::DISPATCH, &dispatch);
        let incarnation = intent.incarnation.as_str().into();
        let (shard, epoch) = (self.settings.shard, self.epoch);
        let message = ToAgent::Dispatch { shard, epoch, call: id, incarnation, go_on, keeper, frame };
        self.tell_agent(&agent, message);
    }

    pub(super) fn input_of(&self, no: u64, price: Price) -> Amount {
        let tokens = Tokens(self.live.get(&no).map_or(0, |l| l.wants.prompt_tokens));
        Amount { tokens, usd_micros: price.cost(tokens, Tokens::ZERO).unwrap_or(UsdMicros::ZERO) }
    }

    pub(super) fn dispatch_sent(&mut self, id: CallId, epoch: u64) {
        let Some(live) = self.calls.get_mut(&id).filter(|_| epoch == self.epoch) else { return };
        let ask = live.handing == Handing::Over(true);
        live.handing = if ask { Handing::Asking } else { Handing::Done };
        if ask {
            self.hand_over(id, true);
        }
    }

    /// Proof that the dispatch never left and never will.
    pub(super) fn dispatch_unsent(&mut self, id: CallId, epoch: u64) {
        let Some(live) = self.calls.get(&id).filter(|_| epoch == self.epoch) else { return };
        let (no, lane) = (live.no, live.lane);
        let call = self.state.stream(no).and_then(|s| s.call(lane));
        let silent = call.is_some_and(|c| c.phase() == Phase::Running && c.intent_epoch == self.epoch && c.in_seq == 0);
        if silent && !live.answered {
            self.disproved(no, lane, ProofPb::Unsent, Code::AgentDown.as_str());
        }
    }

    pub(super) fn pass(&mut self, id: CallId, frame: Frame) {
        if self.calls.contains_key(&id)
            && let Some((agent, message)) = self.to_its_process(id, frame)
        {
            self.tell_agent(&agent, message);
        }
    }

    /// A frame for the process that the call was last sent to, and the agent whose router passes it on.
    pub(super) fn to_its_process(&self, call: CallId, frame: Frame) -> Option<(AgentName, ToAgent)> {
        let (no, lane) = self.state.call(&call)?;
        let sent = self.state.stream(no)?.call(lane)?;
        let incarnation = sent.intent.as_ref()?.incarnation.as_str().into();
        let (shard, epoch) = (self.settings.shard, self.epoch);
        Some((sent.agent(), ToAgent::Pass { shard, epoch, call, incarnation, frame }))
    }

    pub(super) fn ask_to_stop(&mut self, id: CallId, reason: &str) {
        let content = AgentCancel { call_id: id, shard: self.settings.shard, epoch: self.epoch, reason: reason.into() };
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::AGENT_CANCEL, &content));
    }

    // ---- agents come and go -----------------------------------------------------------------------------------------

    /// The agent is connected: a call of this incarnation may run there; a call of an older one is lost.
    pub(super) fn agent_back(&mut self, id: CallId, incarnation: &Arc<str>) {
        let Some(live) = self.calls.get_mut(&id) else { return };
        let (no, lane) = (live.no, live.lane);
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        if call.phase() != Phase::Running || live.wants_slot {
            return;
        }
        if call.intent.as_ref().is_some_and(|i| i.incarnation != **incarnation) {
            return self.lost(no, lane);
        }
        live.lost_at = None;
        let plain = matches!(live.handing, Handing::Over(_));
        live.handing = if plain { Handing::Over(true) } else { Handing::Asking };
        self.hand_over(id, !plain);
        self.call_timer(id, self.now_ms + REPEAT_MS);
    }

    pub(super) fn agent_away(&mut self, id: CallId) {
        let until = self.now_ms + LIST_MS;
        let Some(live) = self.calls.get_mut(&id).filter(|c| !c.wants_slot) else { return };
        let at = until.min(live.expires_at);
        live.lost_at = Some(at);
        self.call_timer(id, at);
    }

    /// The process that ran the call is gone, and its answer with it.
    pub(super) fn lost(&mut self, no: u64, lane: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let Some(intent) = &call.intent else { return };
        let id = stream.call_id(lane);
        let young = call.is_young(self.clock.logged_ms());
        let external = intent.external;
        if young && self.live.get(&no).is_some_and(|l| l.stopping.is_none()) {
            if let Some(live) = self.calls.get_mut(&id) {
                (live.wants_slot, live.lost_at) = (true, None);
            }
            self.flies(id, false);
            self.want_again(id);
            return;
        }
        let code = if external { Code::OutcomeUnknown } else { Code::AgentDown };
        self.settle_unknown(no, lane, SourcePb::UnknownAtHold, code.as_str());
    }

    pub(super) fn want_again(&mut self, id: CallId) {
        let Some(live) = self.calls.get(&id) else { return };
        let (no, lane, agent) = (live.no, live.lane, live.agent.clone());
        let amount = self.state.stream(no).and_then(|s| s.call(lane)).map(Call::hold).unwrap_or_default();
        self.want_slot(no, &agent, id, amount, u64::MAX);
        self.call_timer(id, self.now_ms + REPEAT_MS);
    }

    /// Repeats what wasn't answered; ends what had its time.
    pub(super) fn call_due(&mut self, id: CallId) {
        let Some(live) = self.calls.get(&id).filter(|c| c.due <= self.now_ms) else { return };
        let (no, lane, now) = (live.no, live.lane, self.now_ms);
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        if call.phase() != Phase::Running {
            return;
        }
        if now >= live.expires_at {
            self.ask_to_stop(id, "deadline");
            return self.settle_unknown(no, lane, SourcePb::Expired, Code::Timeout.as_str());
        }
        if live.lost_at.is_some_and(|at| now >= at) {
            return self.lost(no, lane);
        }
        let (handing, due) = (live.handing, live.lost_at.unwrap_or(live.expires_at).min(live.expires_at));
        if live.wants_slot {
            let wanted = self.live.get(&no).is_some_and(|l| l.stopping.is_none());
            let young = wanted && call.is_young(self.clock.logged_ms());
            return if young { self.want_again(id) } else { self.lost(no, lane) };
        }
        match handing {
            Handing::Over(_) => self.hand_over(id, false),
            Handing::Asking => self.hand_over(id, true),
            Handing::Done => {
                self.call_timer(id, due);
                return;
            }
        }
        self.call_timer(id, due.min(now + REPEAT_MS));
    }
}

//! One call from Intent to its end: dispatch, chunks, slices, settlement, and what follows when its agent is lost.

use super::{OWNER_LATER_MS, REPEAT_MS, Shard, Timer};
use crate::estimate::{CALL_AMOUNT_MAX, output_tokens};
use crate::message::{LogRoom, Metric, ToAgent};
use crate::price::Price;
use crate::record::{Adjust, Ended, Extend, FrameRecord, Intent, ProofPb, Record, Settle, SourcePb, Void};
use crate::replay;
use crate::state::Output;
use crate::stream::{Call, Phase};
use atp_proto::codec::Received;
use atp_proto::content::{
    Ack, AgentCancel, AgentError, AgentFinal, AgentPartial, BudgetUpdate, Dispatch, Effects, Proof, Stop, Submit,
    UsageSource,
};
use atp_proto::frame::{Flags, kind};
use atp_proto::limits::RETRY_MS;
use atp_proto::reassembly::{Fed, Inbound, Message};
use atp_proto::{AgentName, Amount, CallId, Code, Cost, Frame, Tokens, UsdMicros, WireError};
use std::sync::Arc;

/// A call whose connection is lost is waited for this long before its outcome is called unknown.
const LIST_MS: u64 = 15_000;
/// `counted` usage is booked this much up, unless the agent's capabilities say otherwise.
const COUNTED_UP_PPM: u64 = 100_000;

/// How far the dispatch of a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Handing {
    /// Its dispatch goes to the agent's router again and again; true: the agent must be asked afterwards.
    Over(bool),
    /// The agent, which may run it, is asked to go on.
    Asking,
    Done,
}

/// What the memory holds of a call beside the fold.
pub(super) struct LiveCall {
    pub(super) agent: AgentName,
    no: u64,
    lane: u32,
    inbound: Inbound,
    handing: Handing,
    pub(super) expires_at: u64,
    /// Its agent is away: until then it may come back.
    pub(super) lost_at: Option<u64>,
    /// Its agent was lost, its upstream dedupes: it is called again when a slot is there.
    pub(super) wants_slot: bool,
    /// It holds a slot of its agent.
    pub(super) in_flight: bool,
    /// When to look at it again.
    due: u64,
    asked: usize,
    gap: bool,
    answered: bool,
}

impl LiveCall {
    fn new(no: u64, lane: u32, agent: AgentName, expires_at: u64) -> Self {
        Self {
            agent,
            no,
            lane,
            inbound: Inbound::default(),
            handing: Handing::Over(false),
            expires_at,
            lost_at: None,
            wants_slot: false,
            in_flight: false,
            due: 0,
            asked: 0,
            gap: false,
            answered: false,
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
    }

    // ---- dispatch ---------------------------------------------------------------------------------------------------

    /// A slot is here: Intent, and behind it the dispatch.
    pub(super) fn intend(&mut self, no: u64, lane: u32, agent: &AgentName) {
        let Some(seat) = self.seats.get(agent) else { return };
        let (c, incarnation) = (seat.capabilities.clone(), seat.incarnation.clone());
        let Some(stream) = self.state.stream(no) else { return };
        let id = stream.call_id(lane);
        let overshoot = Amount::from(self.state.agent_totals(agent.as_str()).overshoot);
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
            counted_up_ppm: c.counted_up_ppm.map_or(COUNTED_UP_PPM, u64::from),
            host: c.host.clone(),
        };
        self.record(Record::Intent(intent));
        let time = self.time_left(no, lane);
        let call = LiveCall::new(no, lane, agent.clone(), self.now_ms + time + OWNER_LATER_MS);
        self.calls.insert(id, call);
        self.call_timer(id, self.now_ms + REPEAT_MS);
        self.flies(id, true);
        self.hand_over(id, false);
    }

    fn time_left(&self, no: u64, lane: u32) -> u64 {
        let of_call = self.state.stream(no).and_then(|s| s.call(lane)).map_or(1, |c| c.reserve.deadline_ms);
        let of_task = self.live.get(&no).map_or(of_call, |l| l.deadline_at.saturating_sub(self.now_ms));
        of_call.min(of_task).max(1)
    }

    /// Sends `agent.dispatch` to the agent's router; `go_on` asks an agent that may run the call.
    fn hand_over(&mut self, id: CallId, go_on: bool) {
        let Some(live) = self.calls.get(&id) else { return };
        let (no, lane, agent) = (live.no, live.lane, live.agent.clone());
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let Some(intent) = &call.intent else { return };
        let deadline_ms = live.expires_at.saturating_sub(OWNER_LATER_MS).saturating_sub(self.now_ms).max(1);
        let hold = call.hold();
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
        let submit: Submit =
            if go_on { Submit::default() } else { serde_json::from_slice(&stream.submit).unwrap_or_default() };
        let dispatch = Dispatch {
            call_id: id,
            shard: self.settings.shard,
            epoch: self.epoch,
            upstream_key: intent.upstream_key.clone(),
            task: submit.task,
            inputs: submit.inputs,
            model: Some(call.reserve.model.clone()).filter(|m| !m.is_empty()),
            task_type: stream.accept.task_type.clone(),
            grant: hold,
            max_output_tokens: output_tokens(ceiling, input, price).map(|n| n.max(1)),
            deadline_ms,
            go_on,
        };
        let frame = Frame::json(id.to_string(), 1, Flags::SYN, kind::DISPATCH, &dispatch);
        let message = ToAgent::Dispatch { shard: self.settings.shard, epoch: self.epoch, call: id, go_on, frame };
        self.to_agent(&agent, message);
    }

    fn input_of(&self, no: u64, price: Price) -> Amount {
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
        let first = call.is_some_and(|c| c.phase() == Phase::Running && c.intent_epoch == self.epoch && c.in_seq == 0);
        if first && !live.answered {
            self.void(no, lane, ProofPb::Unsent, Code::AgentDown.as_str());
        }
    }

    fn pass(&mut self, id: CallId, frame: Frame) {
        if let Some(agent) = self.calls.get(&id).map(|c| c.agent.clone()) {
            let message = ToAgent::Pass { shard: self.settings.shard, epoch: self.epoch, call: id, frame };
            self.to_agent(&agent, message);
        }
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
    fn lost(&mut self, no: u64, lane: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let Some(intent) = &call.intent else { return };
        let id = stream.call_id(lane);
        let young = self.clock.logged_ms() < call.intent_at.saturating_add(intent.idempotent_for_ms);
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

    fn want_again(&mut self, id: CallId) {
        let Some(live) = self.calls.get(&id) else { return };
        let agent = live.agent.clone();
        let message = ToAgent::Want { shard: self.settings.shard, epoch: self.epoch, call: id };
        self.to_agent(&agent, message);
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
            let young = call
                .intent
                .as_ref()
                .is_some_and(|i| self.clock.logged_ms() < call.intent_at.saturating_add(i.idempotent_for_ms));
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

    // ---- the agent's frames -----------------------------------------------------------------------------------------

    pub(super) fn agent_frame(&mut self, agent: &AgentName, received: Received) {
        let known = CallId::parse(&received.frame.stream_id).and_then(|id| Some((id, self.state.call(&id)?)));
        let Some((id, (no, lane))) = known else {
            return self.forget_there(agent, &received.frame);
        };
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        if call.reserve.agent != agent.as_str() || call.intent.is_none() || received.frame.msg_seq == 0 {
            return self.metric(Metric::Dropped { reason: "not_its_call" });
        }
        if call.phase() == Phase::Void {
            return self.forget_there(agent, &received.frame);
        }
        let in_seq = call.in_seq;
        let live = self.calls.entry(id).or_insert_with(|| LiveCall {
            inbound: Inbound::after(in_seq),
            handing: Handing::Done,
            ..LiveCall::new(no, lane, agent.clone(), 0)
        });
        live.answered = true;
        match live.inbound.feed(received) {
            Ok(Fed::Ready(message)) => {
                let mut next = Some(message);
                while let Some(message) = next {
                    self.call_message(id, no, lane, message);
                    next = self.calls.get_mut(&id).and_then(|c| c.inbound.next_ready());
                }
            }
            Ok(Fed::Waiting) if live.gap => {}
            Ok(Fed::Waiting) => {
                live.gap = true;
                self.timer(self.now_ms + RETRY_MS[0], Timer::CallGap(id));
            }
            Ok(Fed::Duplicate(_)) => {
                self.acks.insert(id, in_seq);
                self.metric(Metric::Redelivered);
            }
            Err(error) => self.garbage(id, no, lane, &error),
        }
        // Of an ended call only what waits for order is kept.
        if self.calls.get(&id).is_some_and(|c| c.inbound.is_idle())
            && !self.state.stream(no).and_then(|s| s.call(lane)).is_some_and(Call::is_open)
        {
            self.calls.remove(&id);
        }
    }

    /// Frames of a call that isn't remembered here: the agent may forget it too.
    fn forget_there(&mut self, agent: &AgentName, frame: &Frame) {
        self.metric(Metric::Dropped { reason: "unknown_call" });
        let Some(call) = CallId::parse(&frame.stream_id).filter(|_| frame.msg_seq > 0) else { return };
        let ack =
            Frame::json(call.to_string(), 0, Flags::NONE, kind::ACK, &Ack { msg_seq: frame.msg_seq, open: Vec::new() });
        let message = ToAgent::Pass { shard: self.settings.shard, epoch: self.epoch, call, frame: ack };
        self.to_agent(agent, message);
    }

    pub(super) fn call_gap_due(&mut self, id: CallId) {
        let Some(live) = self.calls.get_mut(&id) else { return };
        let (no, lane) = (live.no, live.lane);
        if live.inbound.is_idle() {
            (live.gap, live.asked) = (false, 0);
            return;
        }
        if live.asked == RETRY_MS.len() {
            let error = WireError::new(Code::SeqRetry, "messages of the agent are missing");
            return self.garbage(id, no, lane, &error);
        }
        let ack = Ack { msg_seq: live.inbound.next_expected() - 1, open: live.inbound.missing() };
        let wait = RETRY_MS[live.asked];
        live.asked += 1;
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::ACK, &ack));
        self.timer(self.now_ms + wait, Timer::CallGap(id));
    }

    /// What the agent says can't be read: its outcome will never be known.
    fn garbage(&mut self, id: CallId, no: u64, lane: u32, error: &WireError) {
        self.metric(Metric::Dropped { reason: "adapter_fault" });
        self.ask_to_stop(id, &error.to_string());
        self.settle_unknown(no, lane, SourcePb::UnknownAtHold, error.code.as_str());
    }

    fn call_message(&mut self, id: CallId, no: u64, lane: u32, message: Message) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let running = call.phase() == Phase::Running;
        let mut record = FrameRecord {
            key: stream.accept.key.clone(),
            lane,
            msg_seq: message.frame.msg_seq,
            ..FrameRecord::default()
        };
        let frame = message.frame;
        record.bodies = message.bodies.into_vec();
        self.acks.insert(id, frame.msg_seq);
        match &*frame.kind {
            kind::RESULT_PARTIAL => match read_cost(frame.read::<AgentPartial>(), |p| Some(p.cost)) {
                Ok(part) => self.chunk(id, no, lane, record, part, running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            kind::RESULT_FINAL => match read_cost(frame.read::<AgentFinal>(), |f| Some(f.cost)) {
                Ok(last) => self.last(no, lane, record, last, running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            kind::ERROR => match read_cost(frame.read::<AgentError>(), |e| e.cost) {
                Ok(error) => self.failed(no, lane, record, &error, running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            _ => self.record(Record::Frame(record)),
        }
    }

    fn unreadable(&mut self, id: CallId, no: u64, lane: u32, record: FrameRecord, error: &WireError, running: bool) {
        self.record(Record::Frame(record));
        if running {
            self.garbage(id, no, lane, error);
        }
    }

    fn next_out(&self, no: u64) -> u64 {
        self.state.stream(no).filter(|s| !s.is_closed()).map_or(0, |s| s.out_seq + 1)
    }

    /// A chunk of the answer: booked, durable, then shown; the grant grows before it is used up.
    fn chunk(&mut self, id: CallId, no: u64, lane: u32, mut record: FrameRecord, part: AgentPartial, running: bool) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let booked = booked(call, part.cost);
        let (agent, first) = (call.agent(), call.in_seq == 0);
        let model: Arc<str> = call.reserve.model.as_str().into();
        let since = self.clock.logged_ms().saturating_sub(call.intent_at);
        let out_seq = if running { self.next_out(no) } else { 0 };
        (record.booked, record.out_seq) = (Some(booked.into()), out_seq);
        let shown = (out_seq > 0).then(|| AgentPartial { cost: booked, ..part.clone() });
        let stream_id = record.key.stream.clone();
        self.record_output(Record::Frame(record), Some(Output::from(part)));
        if let Some(part) = shown {
            self.tell(no, replay::partial(&stream_id, out_seq, id, &agent, part, None));
        }
        if first {
            self.metric(Metric::FirstToken { agent, model, ms: since });
        }
        if running {
            self.extend(no, lane);
        }
    }

    /// Extends a running call's hold when what is left of its grant is below one slice; oldest call first.
    pub(super) fn extend(&mut self, no: u64, lane: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let stopping = self.live.get(&no).is_none_or(|l| l.stopping.is_some());
        if stopping || !call.intent.as_ref().is_some_and(|i| i.slices) {
            return;
        }
        let (hold, guarded) = (call.hold(), Amount::from(call.reserve.guarded));
        let Ok(spent) = call.booked().amount() else { return };
        let (left, chunk) = (hold.less(spent), Amount::from(call.largest_chunk));
        let slice = |guarded: u64, chunk: u64| guarded.div_ceil(4).max(chunk.saturating_mul(4));
        let slice =
            Amount::new(slice(guarded.tokens.0, chunk.tokens.0), slice(guarded.usd_micros.0, chunk.usd_micros.0));
        let wanted = Amount::new(
            if left.tokens < slice.tokens { slice.tokens.0 } else { 0 },
            if left.usd_micros < slice.usd_micros { slice.usd_micros.0 } else { 0 },
        );
        let account = stream.accept.account.clone();
        let at = (no, lane);
        if wanted.is_zero() {
            if let Some(book) = self.books.get_mut(&account) {
                book.starved.remove(&at);
            }
            return;
        }
        let levels = self.levels(stream, &call.reserve.windows);
        let (key, id) = (stream.accept.key.clone(), stream.call_id(lane));
        let older = self.books.get(&account).is_some_and(|b| b.starved.first().is_some_and(|first| *first < at));
        let free = levels.iter().map(crate::account::Level::free).reduce(Amount::min).unwrap_or_default();
        let blocked = older || self.room > LogRoom::Enough;
        let given = if blocked { Amount::ZERO } else { wanted.min(free) };
        let book = self.books.entry(account).or_default();
        match wanted.fits(given) {
            true => book.starved.remove(&at),
            false => book.starved.insert(at),
        };
        let Ok(total) = hold.add(given) else { return };
        if given.is_zero() {
            return;
        }
        self.record(Record::Extend(Extend { key, lane, hold: total.into() }));
        self.note_short(no, lane);
        // No more will come where nobody else holds what could come back.
        let last = !wanted.fits(given)
            && levels.iter().any(|l| l.held == hold && !wanted.less(given).fits(l.free().less(given)));
        let update = BudgetUpdate { call_id: id, shard: self.settings.shard, epoch: self.epoch, grant: total, last };
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::BUDGET_UPDATE, &update));
    }

    /// `agent.result.final`: the settlement.
    fn last(&mut self, no: u64, lane: u32, record: FrameRecord, last: AgentFinal, running: bool) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let counted = last.usage_source == UsageSource::Counted;
        let actual = if counted { counted_up(call, last.cost) } else { reported(call, last.cost) };
        let (stated, how) = (last.cost.usd_micros.0, last.finish.as_str());
        let confidence = last.confidence_ppm.map_or(0, |c| c.saturating_add(1));
        if !running {
            self.record_output(Record::Frame(record), None);
            return self.adjust(no, lane, actual);
        }
        let part = replay::part_of_final(last.clone());
        self.record_output(Record::Frame(record), Some(Output::from(last)));
        let source = if counted { SourcePb::Counted } else { SourcePb::Reported };
        self.settle(no, lane, actual, stated, source, how, confidence, part);
    }

    /// `control.error` on a call's stream: proof voids it, a cost settles it, else the outcome is unknown.
    fn failed(&mut self, no: u64, lane: u32, record: FrameRecord, error: &AgentError, running: bool) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let silent = call.in_seq == 0 && call.booked().amount().is_ok_and(Amount::is_zero);
        let (agent, external) = (call.agent(), call.intent.as_ref().is_some_and(|i| i.external));
        let actual = error.cost.map(|cost| reported(call, cost));
        self.record(Record::Frame(record));
        if matches!(error.code, Code::WindowAgent | Code::Draining)
            && let Some(seat) = self.seats.get_mut(&agent)
        {
            seat.skip_until = self.now_ms + error.retry_after_ms.unwrap_or(REPEAT_MS).min(3_600_000);
        }
        let code = error.code.as_str();
        match (error.proof, actual) {
            (Some(proof), _) if silent && running => {
                let proof = if proof == Proof::Rejected { ProofPb::Rejected } else { ProofPb::NotCalled };
                self.void(no, lane, proof, code);
            }
            (Some(_), _) if silent => self.adjust(no, lane, Cost::default()),
            (_, Some(actual)) if running => {
                let stated = error.cost.map_or(0, |c| c.usd_micros.0);
                self.settle(no, lane, actual, stated, SourcePb::Reported, code, 0, AgentPartial::default());
            }
            (_, Some(actual)) => self.adjust(no, lane, actual),
            (_, None) if running => {
                let code = if external { Code::OutcomeUnknown.as_str() } else { code };
                self.settle_unknown(no, lane, SourcePb::UnknownAtHold, code);
            }
            (_, None) => {}
        }
    }

    // ---- the end of a call ------------------------------------------------------------------------------------------

    pub(super) fn void(&mut self, no: u64, lane: u32, proof: ProofPb, how: &str) {
        let Some(stream) = self.state.stream(no) else { return };
        let told = stream.call(lane).is_some_and(|c| c.intent.is_some());
        let (key, id) = (stream.accept.key.clone(), stream.call_id(lane));
        let agent = stream.call(lane).map_or_else(|| AgentName::new(""), Call::agent);
        let out_seq = if told { self.next_out(no) } else { 0 };
        let stream_id = key.stream.clone();
        let ended = Ended { how: how.into(), out_seq };
        self.record(Record::Void(Void { key, lane, proof: proof as i32, ended }));
        if out_seq > 0 {
            self.tell(no, replay::partial(&stream_id, out_seq, id, &agent, AgentPartial::default(), Some(how)));
        }
        self.ended(no, lane, id, &agent);
    }

    fn settle_unknown(&mut self, no: u64, lane: u32, source: SourcePb, how: &str) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)).filter(|c| c.phase() == Phase::Running)
        else {
            return;
        };
        let reach = call.intent.as_ref().map(|i| Amount::from(i.reach)).unwrap_or_default();
        let (booked, worst) = (call.booked(), call.hold().add(reach).unwrap_or(call.hold()));
        let actual = Cost {
            in_tokens: booked.in_tokens,
            out_tokens: booked.out_tokens.max(worst.tokens.less(booked.in_tokens)),
            usd_micros: booked.usd_micros.max(worst.usd_micros),
        };
        self.settle(no, lane, actual, 0, source, how, 0, AgentPartial::default());
    }

    #[allow(clippy::too_many_arguments, reason = "one Settle record, field by field")]
    fn settle(
        &mut self,
        no: u64,
        lane: u32,
        actual: Cost,
        stated: u64,
        source: SourcePb,
        how: &str,
        confidence: u32,
        part: AgentPartial,
    ) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let (key, id, agent) = (stream.accept.key.clone(), stream.call_id(lane), call.agent());
        let metric = Metric::Settled {
            account: stream.tenant(),
            agent: agent.clone(),
            model: call.reserve.model.as_str().into(),
            usd_micros: actual.usd_micros.0,
            in_tokens: actual.in_tokens.0,
            out_tokens: actual.out_tokens.0,
            estimated_usd_micros: call.reserve.mean.usd_micros,
            duration_ms: self.clock.logged_ms().saturating_sub(call.intent_at),
        };
        let out_seq = self.next_out(no);
        let stream_id = key.stream.clone();
        self.record(Record::Settle(Settle {
            key,
            lane,
            actual: actual.into(),
            stated_usd_micros: stated,
            source: source as i32,
            ended: Ended { how: how.into(), out_seq },
            confidence_ppm_plus_1: confidence,
        }));
        self.metric(metric);
        if out_seq > 0 {
            self.tell(
                no,
                replay::partial(&stream_id, out_seq, id, &agent, AgentPartial { cost: actual, ..part }, Some(how)),
            );
        }
        self.ended(no, lane, id, &agent);
    }

    /// The call's hold is back: its slot, its account, its stream.
    fn ended(&mut self, no: u64, lane: u32, id: CallId, agent: &AgentName) {
        if self.calls.contains_key(&id) {
            self.flies(id, false);
            self.calls.remove(&id);
            let message = ToAgent::Ended { shard: self.settings.shard, epoch: self.epoch, call: id };
            self.to_agent(agent, message);
        } else {
            self.give_back(agent, id);
        }
        self.note_short(no, lane);
        let account = self.state.stream(no).map(|s| s.accept.account.clone()).unwrap_or_default();
        // First the next lane of the same task, in the same entry; then whoever waits.
        self.advance(no);
        self.money_returned(&account);
        self.account_metric(&account);
    }

    /// A later and better figure for a settled call: once.
    fn adjust(&mut self, no: u64, lane: u32, actual: Cost) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Settled) else { return };
        let evidence = "final".to_owned();
        if call.evidence.contains(&evidence) {
            return;
        }
        let key = stream.accept.key.clone();
        let account = stream.accept.account.clone();
        self.record(Record::Adjust(Adjust { key, lane, evidence, actual: actual.into() }));
        self.money_returned(&account);
    }

    pub(super) fn account_metric(&mut self, account: &str) {
        let Some(found) = self.state.accounts.get(account) else { return };
        let Some(level) = found.windows.get(&found.current).map(crate::account::AccountWindow::level) else { return };
        let remaining = level.limit.usd_micros.map(|_| level.free().usd_micros.0);
        let account = atp_proto::TenantId::new(account);
        self.metric(Metric::Account {
            account,
            held_usd_micros: level.held.usd_micros.0,
            remaining_usd_micros: remaining,
        });
    }
}

/// Refuses figures that no provider states.
fn read_cost<T>(read: Result<T, WireError>, cost: impl Fn(&T) -> Option<Cost>) -> Result<T, WireError> {
    let content = read?;
    let stated = cost(&content).unwrap_or_default();
    let largest = stated.in_tokens.0.max(stated.out_tokens.0).max(stated.usd_micros.0);
    if largest > CALL_AMOUNT_MAX {
        return Err(WireError::proto(format!("cost: {largest} is more than a call can cost")));
    }
    Ok(content)
}

/// The price of the tokens at the Reserve's price version, rounded up once; never less than what the agent says.
fn priced(call: &Call, tokens: Cost) -> UsdMicros {
    let price =
        Price { in_usd_micros_per_mtok: call.reserve.in_price, out_usd_micros_per_mtok: call.reserve.out_price };
    let own = price.cost(tokens.in_tokens, tokens.out_tokens).unwrap_or(UsdMicros(CALL_AMOUNT_MAX));
    own.max(tokens.usd_micros).min(UsdMicros(CALL_AMOUNT_MAX))
}

/// The running total that is booked for a chunk: totals never fall.
fn booked(call: &Call, stated: Cost) -> Cost {
    let total = call.booked().max(stated);
    Cost { usd_micros: priced(call, total), ..total }
}

/// The end of a call whose provider reported usage.
fn reported(call: &Call, stated: Cost) -> Cost {
    let total = Cost::from(call.reported).max(stated);
    Cost { usd_micros: priced(call, total), ..total }
}

/// The end of a call whose usage was counted: booked up until a report adjusts it.
fn counted_up(call: &Call, stated: Cost) -> Cost {
    let up = 1_000_000 + call.intent.as_ref().map_or(COUNTED_UP_PPM, |i| i.counted_up_ppm);
    let total = booked(call, stated);
    Cost {
        in_tokens: total.in_tokens.scale_ppm_up(up).unwrap_or(total.in_tokens),
        out_tokens: total.out_tokens.scale_ppm_up(up).unwrap_or(total.out_tokens),
        usd_micros: total.usd_micros.scale_ppm_up(up).unwrap_or(total.usd_micros),
    }
}

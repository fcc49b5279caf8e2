//! What an agent says on a call's stream: order, chunks, its last message, its errors. Every message is logged before it
//! counts.

use super::REPEAT_MS;
use super::lane::Handing;
use super::lane::LiveCall;
use super::settle::{booked, counted_up, reported};
use super::{Shard, Timer};
use crate::estimate::CALL_AMOUNT_MAX;
use crate::message::{Metric, ToAgent};
use crate::record::{FrameRecord, ProofPb, Record, SourcePb};
use crate::said::Said;
use crate::stream::{Call, Phase};
use atp_proto::codec::Received;
use atp_proto::content::{Ack, AgentError, AgentFinal, Finish, Proof, UsageSource, estimated_call};
use atp_proto::frame::{Flags, kind};
use atp_proto::limits::RETRY_MS;
use atp_proto::reassembly::{Fed, Inbound, Message};
use atp_proto::{AgentName, Amount, CallId, Code, Cost, Frame, WireError};

impl Shard {
    pub(super) fn agent_frame(&mut self, agent: &AgentName, incarnation: &str, received: Received) {
        if let Some(call) = estimated_call(&received.frame.stream_id) {
            return self.preflight_frame(agent, call, &received);
        }
        let known = CallId::parse(&received.frame.stream_id).and_then(|id| Some((id, self.state.call(&id)?)));
        let Some((id, (no, lane))) = known else {
            return self.forget_there(agent, incarnation, &received.frame);
        };
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        if call.reserve.agent != agent.as_str() || call.intent.is_none() || received.frame.msg_seq == 0 {
            return self.metric(Metric::Dropped { reason: "not_its_call" });
        }
        if call.phase() == Phase::Void {
            return self.forget_there(agent, incarnation, &received.frame);
        }
        // What one process says is nothing that another one of the same handle has said.
        if call.intent.as_ref().is_some_and(|i| i.incarnation != incarnation) {
            return self.metric(Metric::Dropped { reason: "other_incarnation" });
        }
        let in_seq = call.in_seq;
        let live = self.calls.entry(id).or_insert_with(|| LiveCall {
            inbound: Inbound::after(in_seq),
            handing: Handing::Done,
            ..LiveCall::new(no, lane, agent.clone(), 0)
        });
        live.answered = true;
        let asks = (&*received.frame.kind == kind::TOOL_REQUEST).then(|| received.frame.clone());
        live.congested |= received.frame.hop.as_deref().is_some_and(|hop| hop.ecn);
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
                if let Some(frame) = asks {
                    self.tool_again(id, no, lane, &frame);
                }
            }
            Err(error) => {
                self.garbage(id, no, lane, &error);
                self.calls.remove(&id);
            }
        }
        // Of an ended call only what waits for order is kept.
        if self.calls.get(&id).is_some_and(|c| c.inbound.is_idle())
            && !self.state.stream(no).and_then(|s| s.call(lane)).is_some_and(Call::is_open)
        {
            self.calls.remove(&id);
        }
    }

    /// Frames of a call that isn't remembered here: the agent may forget it too.
    pub(super) fn forget_there(&mut self, agent: &AgentName, incarnation: &str, frame: &Frame) {
        self.metric(Metric::Dropped { reason: "unknown_call" });
        let Some(call) = CallId::parse(&frame.stream_id).filter(|_| frame.msg_seq > 0) else { return };
        let ack =
            Frame::json(call.to_string(), 0, Flags::NONE, kind::ACK, &Ack { msg_seq: frame.msg_seq, open: Vec::new() });
        let (shard, epoch, incarnation) = (self.settings.shard, self.epoch, incarnation.into());
        self.tell_agent(agent, ToAgent::Pass { shard, epoch, call, incarnation, frame: ack });
    }

    pub(super) fn call_gap_due(&mut self, id: CallId) {
        let Some(live) = self.calls.get_mut(&id) else { return };
        let (no, lane) = (live.no, live.lane);
        if live.inbound.is_idle() {
            (live.gap, live.asked) = (false, 0);
            return;
        }
        let progress = (live.inbound.next_expected(), live.inbound.waiting_bytes());
        if progress != live.progress || live.inbound.missing().is_empty() {
            (live.progress, live.asked) = (progress, 0);
        }
        if live.asked == RETRY_MS.len() {
            let error = WireError::new(Code::SeqRetry, "messages of the agent are missing");
            self.garbage(id, no, lane, &error);
            self.calls.remove(&id);
            return;
        }
        let ack = Ack { msg_seq: live.inbound.next_expected() - 1, open: live.inbound.missing() };
        let wait = RETRY_MS[live.asked];
        live.asked += 1;
        self.changes.mark(no);
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::ACK, &ack));
        self.timer(self.now_ms + wait, Timer::CallGap(id));
    }

    /// What the agent says can't be read: its outcome will never be known.
    pub(super) fn garbage(&mut self, id: CallId, no: u64, lane: u32, error: &WireError) {
        self.metric(Metric::Dropped { reason: "adapter_fault" });
        self.ask_to_stop(id, &error.to_string());
        self.settle_unknown(no, lane, SourcePb::UnknownAtHold, error.code.as_str());
    }

    pub(super) fn call_message(&mut self, id: CallId, no: u64, lane: u32, message: Message) {
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
        self.tools_reported(id, no, lane, &frame);
        self.acks.insert(id, frame.msg_seq);
        match &*frame.kind {
            kind::RESULT_PARTIAL => match read_cost(Said::read(&frame, false), |said| Some(said.cost)) {
                Ok(said) => self.chunk(id, no, lane, record, said, running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            kind::RESULT_FINAL => match read_cost(frame.read::<AgentFinal>(), |f| Some(f.cost)) {
                Ok(last) => self.last(no, lane, record, &last, Said::read(&frame, true).unwrap_or_default(), running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            kind::TOOL_REQUEST => self.tool_request(id, no, lane, record, &frame),
            kind::ERROR => match read_cost(frame.read::<AgentError>(), |e| e.cost) {
                Ok(error) => self.failed(no, lane, record, &error, running),
                Err(error) => self.unreadable(id, no, lane, record, &error, running),
            },
            _ => self.record(Record::Frame(record)),
        }
    }

    pub(super) fn unreadable(
        &mut self,
        id: CallId,
        no: u64,
        lane: u32,
        record: FrameRecord,
        error: &WireError,
        running: bool,
    ) {
        self.record(Record::Frame(FrameRecord { unreadable: true, ..record }));
        if running {
            self.garbage(id, no, lane, error);
        }
    }

    pub(super) fn next_out(&self, no: u64) -> u64 {
        self.state.stream(no).filter(|s| !s.is_closed()).map_or(0, |s| s.out_seq + 1)
    }

    /// A chunk of the answer: booked, durable, then shown; the grant grows before it is used up.
    pub(super) fn chunk(&mut self, id: CallId, no: u64, lane: u32, mut record: FrameRecord, said: Said, running: bool) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let booked = booked(call, said.cost);
        let agent = self.calls.get(&id).map_or_else(|| call.agent(), |live| live.agent.clone());
        let first = (call.in_seq == 0).then(|| Metric::FirstToken {
            agent: agent.clone(),
            model: call.reserve.model.as_str().into(),
            ms: self.clock.logged_ms().saturating_sub(call.intent_at),
        });
        let out_seq = if running { self.next_out(no) } else { 0 };
        (record.booked, record.out_seq) = (Some(booked.into()), out_seq);
        let shown = (out_seq > 0).then(|| said.to_client(&record.key.stream, out_seq, id, &agent, booked, None));
        self.record_said(Record::Frame(record), Some(said));
        if let Some(frame) = shown {
            self.tell(no, frame);
        }
        if let Some(metric) = first {
            self.metric(metric);
        }
        if running {
            self.extend(no, lane);
        }
    }
    /// `agent.result.final`: the settlement.
    pub(super) fn last(
        &mut self,
        no: u64,
        lane: u32,
        record: FrameRecord,
        last: &AgentFinal,
        said: Said,
        running: bool,
    ) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let counted = last.usage_source == UsageSource::Counted;
        let actual = if counted { counted_up(call, last.cost) } else { reported(call, last.cost) };
        let (stated, how) = (last.cost.usd_micros.0, last.finish.as_str());
        let confidence = last.confidence_ppm.map_or(0, |c| c.saturating_add(1));
        // Cut short, a second attempt saw less than its upstream may have billed for the first one.
        let partial_view = call.intents > 1 && last.finish != Finish::Complete;
        if partial_view {
            self.record_said(Record::Frame(record), Some(said.clone()));
            return self.settle_at_worst(no, lane, SourcePb::UnknownAtHold, how, &said);
        }
        if !running {
            self.record_said(Record::Frame(record), Some(said));
            let source = if counted { SourcePb::Counted } else { SourcePb::Reported };
            return self.adjust(no, lane, actual, source, last.finish == Finish::Complete);
        }
        self.record_said(Record::Frame(record), Some(said.clone()));
        let source = if counted { SourcePb::Counted } else { SourcePb::Reported };
        self.settle(no, lane, actual, stated, source, how, confidence, &said);
    }

    /// `control.error` on a call's stream: proof voids it, a cost settles it, else the outcome is unknown.
    pub(super) fn failed(&mut self, no: u64, lane: u32, record: FrameRecord, error: &AgentError, running: bool) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let silent = call.in_seq == 0 && call.booked().amount().is_ok_and(Amount::is_zero);
        let (agent, external) = (call.agent(), call.intent.as_ref().is_some_and(|i| i.external));
        let twice = call.intents > 1;
        // Where anything was counted on the way, an error's cost is a count too.
        let counted = Cost::from(call.booked).in_tokens > Cost::from(call.reported).in_tokens
            || Cost::from(call.booked).out_tokens > Cost::from(call.reported).out_tokens;
        let source = if counted { SourcePb::Counted } else { SourcePb::Reported };
        let actual = error.cost.map(|cost| if counted { counted_up(call, cost) } else { reported(call, cost) });
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
                self.disproved(no, lane, proof, code);
            }
            (Some(_), _) if silent && !twice => self.adjust(no, lane, Cost::default(), SourcePb::Reported, false),
            (_, Some(_)) if twice => self.settle_unknown(no, lane, SourcePb::UnknownAtHold, code),
            (_, Some(actual)) if running => {
                let stated = error.cost.map_or(0, |c| c.usd_micros.0);
                self.settle(no, lane, actual, stated, source, code, 0, &Said::default());
            }
            (_, Some(actual)) => self.adjust(no, lane, actual, source, false),
            (_, None) if running => {
                let code = if external { Code::OutcomeUnknown.as_str() } else { code };
                self.settle_unknown(no, lane, SourcePb::UnknownAtHold, code);
            }
            (_, None) => {}
        }
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

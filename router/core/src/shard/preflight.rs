//! Asking the agents chosen what a task would cost (ATP-7), before a slot is asked for: it would lapse meanwhile. What they say
//! lives in memory and stands in the Reserve; a failed estimate never counts as zero, the next in rank is asked instead.

use super::choice::Request;
use super::offer::Offer;
use super::{Shard, Timer};
use crate::message::{Metric, ToAgent};
use atp_proto::codec::Received;
use atp_proto::content::{EstimateFigures, EstimateMode, EstimateRequest, estimate_stream};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, Code, Frame, WireError};

/// An agent answers within this time, or its estimate has failed.
const ANSWER_MS: u64 = 2_000;
/// An agent whose estimate failed isn't asked about the same task again before.
const FAILED_MS: u64 = 10_000;

/// What an agent said of a task.
pub(super) enum Preflight {
    Asked,
    Known(EstimateFigures),
    /// No figure, until then.
    Failed(u64),
}

/// What the estimates of a task's agents allow now.
pub(super) enum Estimates {
    Ready,
    /// An answer is due.
    Awaited,
    /// All of them failed.
    Nobody,
}

impl Shard {
    fn must_ask(&self, agent: &AgentName) -> bool {
        let estimate = self.seats.get(agent).and_then(|s| s.capabilities.estimate.as_ref());
        estimate.is_some_and(|e| e.mode == EstimateMode::Preflight)
    }

    fn preflight(&self, no: u64, agent: &AgentName) -> Option<&Preflight> {
        self.live.get(&no)?.preflights.get(agent).filter(|_| self.must_ask(agent))
    }

    fn is_estimated(&self, no: u64, agent: &AgentName) -> bool {
        !self.must_ask(agent) || matches!(self.preflight(no, agent), Some(Preflight::Known(_)))
    }

    /// Puts an agent's own answer about this task in place of what was known; false where that fails.
    pub(super) fn take_preflight(&self, no: u64, offer: &mut Offer) -> bool {
        match self.preflight(no, &offer.agent) {
            None | Some(Preflight::Asked) => true,
            Some(Preflight::Failed(until)) => *until <= self.now_ms,
            Some(Preflight::Known(figures)) => {
                let Some((stream, live)) = self.state.stream(no).zip(self.live.get(&no)) else { return false };
                let request = Request::of(&stream.accept, &live.wants);
                let estimate = self.estimate_of(&offer.agent, &request, Some(figures));
                estimate.map(|estimate| offer.estimate = estimate).is_some()
            }
        }
    }

    /// Drops offers whose estimate failed and puts known answers in. The order stays: ranking uses what was known before.
    pub(super) fn take_preflights(&self, no: u64, named: bool, offers: &mut Vec<Offer>) {
        let before = offers.len();
        offers.retain_mut(|offer| self.take_preflight(no, offer));
        if named && offers.len() < before {
            offers.clear();
        }
    }

    /// Asks those of the first `chosen` offers that answer preflight and weren't asked. With `either` the offers that can be
    /// asked for a slot without a further question stay.
    pub(super) fn preflights(&mut self, no: u64, chosen: usize, either: bool, offers: &mut Vec<Offer>) -> Estimates {
        if offers.is_empty() {
            return Estimates::Nobody;
        }
        let missing: Vec<(usize, AgentName)> = offers
            .iter()
            .enumerate()
            .take(chosen)
            .filter(|(_, o)| !self.is_estimated(no, &o.agent))
            .map(|(i, o)| (i, o.agent.clone()))
            .collect();
        if missing.is_empty() {
            if either {
                offers.retain(|o| self.is_estimated(no, &o.agent));
            }
            return Estimates::Ready;
        }
        for (i, agent) in missing {
            if !matches!(self.preflight(no, &agent), Some(Preflight::Asked)) {
                self.ask_preflight(no, i as u32 + 1, &agent);
            }
        }
        Estimates::Awaited
    }

    fn ask_preflight(&mut self, no: u64, lane: u32, agent: &AgentName) {
        let Some((stream, seat)) = self.state.stream(no).zip(self.seats.get(agent)) else { return };
        let (call_id, incarnation) = (stream.call_id(lane), seat.incarnation.clone());
        // Always of its first model: a step of a ladder is priced from that.
        let model = seat.capabilities.models.first().map(|m| m.id.clone());
        let submit = super::client::read_content(&stream.submit);
        let task_type = stream.accept.task_type.clone();
        let request = EstimateRequest { call_id, task: submit.task, inputs: submit.inputs, model, task_type };
        let frame = Frame::json(estimate_stream(call_id), 1, Flags::SYN, kind::ESTIMATE, &request);
        let (shard, epoch) = (self.settings.shard, self.epoch);
        self.tell_agent(agent, ToAgent::Pass { shard, epoch, call: call_id, incarnation, frame });
        if let Some(live) = self.live.get_mut(&no) {
            live.preflights.insert(agent.clone(), Preflight::Asked);
        }
        self.preflights.insert((call_id, agent.clone()), no);
        self.timer(self.now_ms + ANSWER_MS, Timer::Preflight(call_id, agent.clone()));
    }

    /// A frame on a preflight's stream.
    pub(super) fn preflight_frame(&mut self, agent: &AgentName, call: CallId, received: &Received) {
        let frame = &received.frame;
        let whole = !frame.flags.has(Flags::MORE) && frame.frag_seq == 0;
        match &*frame.kind {
            kind::ESTIMATE_RESULT if whole => self.preflight_ended(agent, call, frame.read().ok()),
            kind::ESTIMATE_RESULT | kind::ERROR => self.preflight_ended(agent, call, None),
            _ => self.metric(Metric::Dropped { reason: "unknown_type" }),
        }
    }

    pub(super) fn preflight_due(&mut self, call: CallId, agent: &AgentName) {
        self.preflight_ended(agent, call, None);
    }

    fn preflight_ended(&mut self, agent: &AgentName, call: CallId, figures: Option<EstimateFigures>) {
        // Late or never asked for: nobody waits for it.
        let Some(no) = self.preflights.remove(&(call, agent.clone())) else { return };
        let failed = Preflight::Failed(self.now_ms + FAILED_MS);
        let Some(live) = self.live.get_mut(&no) else { return };
        let ok = figures.is_some();
        live.preflights.insert(agent.clone(), figures.map_or(failed, Preflight::Known));
        if !ok {
            self.metric(Metric::Dropped { reason: "estimate_failed" });
        }
        if self.state.stream(no).is_some_and(|s| s.calls.is_empty() && !s.is_closed()) {
            self.ask(no);
        }
    }

    /// Nobody could say what this task costs.
    pub(super) fn no_estimate(&self, no: u64) -> WireError {
        let agent = self.failed_estimate(no).map_or_else(|| "?".to_owned(), ToString::to_string);
        let message = format!("agent {agent} gave no valid estimate, and no other agent is left");
        WireError::new(Code::AgentDown, message).scope(format!("agent:{agent}"))
    }

    /// The first agent whose estimate of this task failed.
    pub(super) fn failed_estimate(&self, no: u64) -> Option<&AgentName> {
        let asked = &self.live.get(&no)?.preflights;
        asked.iter().find(|(_, p)| matches!(p, Preflight::Failed(_))).map(|(agent, _)| agent)
    }
}

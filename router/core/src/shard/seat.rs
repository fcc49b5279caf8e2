//! What a shard knows of the agents that it may call: who is here, what it can, when to leave it alone.

use super::offer::stream_qos;
use super::{REPEAT_MS, Shard, Timer};
use crate::agent::breaker::BreakerState;
use crate::agent::queue::Wish;
use crate::message::{Flow, LogRoom, Outcome, ToAgent};
use crate::record::{AgentRecord, Record};
use atp_proto::content::{Ack, AgentCancel, AgentStatus, Capabilities, ListedCall, Status};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, CallId, Frame};
use std::sync::Arc;

/// One agent as this shard sees it.
pub(super) struct Seat {
    pub(super) capabilities: Arc<Capabilities>,
    pub(super) incarnation: Arc<str>,
    pub(super) up: bool,
    pub(super) status: AgentStatus,
    /// It asked for a pause until then.
    pub(super) skip_until: u64,
    /// An operator wants nothing new sent to it.
    pub(super) drained: bool,
    pub(super) flow: Flow,
}

impl Seat {
    /// True while something new may be sent to it, as far as its own word and the operator's go.
    pub(super) fn takes_work(&self) -> bool {
        !self.drained && matches!(self.status.status, Status::Ready | Status::Busy)
    }

    /// True while a slot that is lent may be used: its router may not have heard yet what the log says of it.
    pub(super) fn may_begin(&self, gold_passes_pause: bool) -> bool {
        self.takes_work() || (gold_passes_pause && !self.drained && self.status.status == Status::Pause)
    }

    /// Calls that it may run at once.
    pub(super) fn window(&self) -> u32 {
        if self.flow.breaker == BreakerState::Open || !self.flow.healthy { 0 } else { self.flow.window }
    }
}

impl Shard {
    /// Tells an agent's router who owns the shard now, until it answers with `Up`.
    pub(super) fn announce(&mut self, agent: AgentName) {
        if self.seats.get(&agent).is_some_and(|s| s.up) {
            return;
        }
        let message = ToAgent::Owner { shard: self.settings.shard, epoch: self.epoch };
        self.tell_agent(&agent, message);
        if self.calls.values().any(|c| c.agent == agent) {
            self.timer(self.now_ms + REPEAT_MS, Timer::Owner(agent));
        }
    }

    pub(super) fn agent_up(
        &mut self,
        agent: AgentName,
        capabilities: Arc<Capabilities>,
        said: Option<AgentStatus>,
        drained_there: bool,
    ) {
        let incarnation: Arc<str> = capabilities.incarnation.as_str().into();
        let (skip_until, flow) = self
            .seats
            .get(&agent)
            .filter(|s| s.incarnation == incarnation)
            .map_or((0, None), |s| (s.skip_until, Some(s.flow)));
        // Nothing is known yet of how it does: it may begin with all it takes.
        let flow = flow.unwrap_or(Flow { window: capabilities.max_parallel, healthy: true, ..Flow::default() });
        let known = self.state.standing(agent.as_str()).cloned().unwrap_or_default();
        // Its home has it in its log; others have it from the agent's router.
        let drained = if self.is_home_of_agent(&agent) { known.drained } else { drained_there };
        let mute = said.is_none();
        // Who hasn't spoken since this router began is as the log has it, unless another process has taken its place.
        let status = match said {
            None if *known.incarnation == *incarnation => known.said(self.clock.logged_ms()),
            said => {
                let status = said.unwrap_or_default();
                self.stands(&agent, &incarnation, &status, drained);
                status
            }
        };
        let tell = drained != drained_there || (mute && status != AgentStatus::default());
        let seat = Seat {
            capabilities: capabilities.clone(),
            incarnation: incarnation.clone(),
            up: true,
            status,
            skip_until,
            drained,
            flow,
        };
        self.seats.insert(agent.clone(), seat);
        self.tier_metric(&agent);
        if tell {
            self.tell_standing(&agent);
        }
        let calls: Vec<CallId> = self.calls.iter().filter(|(_, c)| c.agent == agent).map(|(id, _)| *id).collect();
        for call in calls {
            self.agent_back(call, &incarnation);
            self.commit();
        }
        for listed in &capabilities.calls {
            self.answer_listed(&agent, &incarnation, listed);
        }
        let waiting: Vec<u64> = self.live.keys().copied().collect();
        waiting
            .into_iter()
            .filter(|no| self.is_asking(*no))
            .collect::<Vec<_>>()
            .into_iter()
            .for_each(|no| self.ask(no));
    }

    /// A call on the agent's list that isn't running here is forgotten or stopped there.
    fn answer_listed(&mut self, agent: &AgentName, incarnation: &Arc<str>, listed: &ListedCall) {
        let call = listed.call_id;
        let open = self
            .state
            .call(&call)
            .and_then(|(no, lane)| self.state.stream(no)?.call(lane))
            .is_some_and(crate::stream::Call::is_open);
        if open {
            return;
        }
        if listed.shard != self.settings.shard {
            return;
        }
        let known = self.state.call(&call).is_some();
        let (shard, epoch) = (self.settings.shard, self.epoch);
        // Its slot may still be kept for it: the owner that settled it may not have come to say so.
        self.tell_agent(agent, ToAgent::Ended { shard, epoch, call, outcome: Outcome::Unknown });
        let on = call.to_string();
        let frame = if listed.done && !known {
            Frame::json(on, 0, Flags::NONE, kind::ACK, &Ack { msg_seq: listed.msg_seq, open: Vec::new() })
        } else if listed.done {
            // Its final may still count as an Adjust: it is acknowledged when it has been taken.
            return;
        } else {
            let cancel = AgentCancel { call_id: call, shard, epoch, reason: "this router doesn't wait for it".into() };
            Frame::json(on, 0, Flags::NONE, kind::AGENT_CANCEL, &cancel)
        };
        self.tell_agent(agent, ToAgent::Pass { shard, epoch, call, incarnation: incarnation.clone(), frame });
    }

    pub(super) fn agent_down(&mut self, agent: &AgentName, incarnation: &Arc<str>) {
        let Some(seat) = self.seats.get_mut(agent).filter(|s| s.incarnation == *incarnation) else { return };
        seat.up = false;
        let calls: Vec<CallId> = self.calls.iter().filter(|(_, c)| c.agent == *agent).map(|(id, _)| *id).collect();
        calls.into_iter().for_each(|call| self.agent_away(call));
    }

    pub(super) fn agent_status(&mut self, agent: &AgentName, status: AgentStatus) {
        let Some(seat) = self.seats.get_mut(agent) else { return };
        seat.status = status.clone();
        let (incarnation, drained) = (seat.incarnation.clone(), seat.drained);
        self.stands(agent, &incarnation, &status, drained);
    }

    pub(super) fn agent_flow(&mut self, agent: &AgentName, flow: Flow) {
        if let Some(seat) = self.seats.get_mut(agent) {
            seat.flow = flow;
        }
    }

    /// True where this shard writes down how the agent stands.
    pub(super) fn is_home_of_agent(&self, agent: &AgentName) -> bool {
        let placement = &self.settings.placement;
        placement.shards() == 1 || placement.home_of_agent(agent) == self.settings.shard
    }

    /// Writes down how an agent stands, where the log has it otherwise.
    fn stands(&mut self, agent: &AgentName, incarnation: &Arc<str>, status: &AgentStatus, drained: bool) {
        if !self.is_home_of_agent(agent) {
            return;
        }
        let known = self.state.standing(agent.as_str()).cloned().unwrap_or_default();
        let now = AgentRecord::new(agent, incarnation, status, drained, self.clock.logged_ms());
        if !now.says_the_same(&known) && self.room < LogRoom::Last {
            self.record(Record::Agent(now));
        }
    }

    /// Tells an agent's router what the log says of it.
    pub(super) fn tell_standing(&mut self, agent: &AgentName) {
        let Some(known) = self.state.standing(agent.as_str()) else { return };
        let said = known.said(self.clock.logged_ms());
        let message = ToAgent::Standing {
            shard: self.settings.shard,
            epoch: self.epoch,
            incarnation: known.incarnation.as_str().into(),
            status: (said.status != Status::Ready || said.suggested_window.is_some()).then_some(said),
            drained: known.drained,
        };
        self.tell_agent(agent, message);
    }

    /// An operator's word on an agent. False where nobody knows the agent.
    pub(super) fn drain_agent(&mut self, agent: &AgentName, drained: bool) -> bool {
        let known = self.state.standing(agent.as_str()).cloned();
        let seat = self.seats.get_mut(agent);
        if known.is_none() && seat.is_none() && !self.state.agents.contains_key(agent.as_str()) {
            return false;
        }
        if let Some(seat) = seat {
            seat.drained = drained;
        }
        let mut record = known.unwrap_or_default();
        if record.drained != drained {
            (record.agent, record.drained) = (agent.as_str().into(), drained);
            self.record(Record::Agent(record));
        }
        self.tell_standing(agent);
        true
    }

    /// Asks for a slot, in the place of its stream's tier and tenant.
    pub(super) fn want_slot(&mut self, no: u64, agent: &AgentName, call: CallId, amount: Amount, lasts_ms: u64) {
        let Some(stream) = self.state.stream(no) else { return };
        let tenant = stream.tenant();
        let weight = self.account_settings(tenant.as_str()).weight;
        let wish = Wish { qos: stream_qos(stream), tenant: tenant.as_str().into(), weight, amount, lasts_ms };
        let message = ToAgent::Want { shard: self.settings.shard, epoch: self.epoch, call, wish };
        self.tell_agent(agent, message);
    }
}

//! What a shard knows of the agents that it may call: who is here, what it can, when to leave it alone.

use super::{REPEAT_MS, Shard, Timer};
use crate::message::ToAgent;
use atp_proto::AgentName;
use atp_proto::content::{Ack, AgentCancel, AgentStatus, Capabilities, ListedCall};
use atp_proto::frame::{Flags, kind};
use atp_proto::{CallId, Frame};
use std::sync::Arc;

/// One agent as this shard sees it.
pub(super) struct Seat {
    pub(super) capabilities: Arc<Capabilities>,
    pub(super) incarnation: Arc<str>,
    pub(super) up: bool,
    pub(super) status: AgentStatus,
    /// It asked for a pause until then.
    pub(super) skip_until: u64,
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

    pub(super) fn agent_up(&mut self, agent: AgentName, capabilities: Arc<Capabilities>, status: AgentStatus) {
        let incarnation: Arc<str> = capabilities.incarnation.as_str().into();
        let skip_until = self.seats.get(&agent).filter(|s| s.incarnation == incarnation).map_or(0, |s| s.skip_until);
        let seat =
            Seat { capabilities: capabilities.clone(), incarnation: incarnation.clone(), up: true, status, skip_until };
        self.seats.insert(agent.clone(), seat);
        let calls: Vec<CallId> = self.calls.iter().filter(|(_, c)| c.agent == agent).map(|(id, _)| *id).collect();
        for call in calls {
            self.agent_back(call, &incarnation);
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
        self.tell_agent(agent, ToAgent::Ended { shard, epoch, call });
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
        if let Some(seat) = self.seats.get_mut(agent) {
            seat.status = status;
        }
    }
}

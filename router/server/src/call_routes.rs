//! Which shard a call of one agent belongs to: its id doesn't say so, its dispatch and the agent's own list do. A call that
//! runs is remembered; of those that have ended so many that what an agent still says of one finds its shard.

use crate::outbox::Outbox;
use atp_core::message::ToAgent;
use atp_proto::CallId;
use atp_proto::content::{ListedCall, estimated_call};
use std::collections::{HashMap, VecDeque};

/// Calls that are remembered beside those that run; an agent lists at most half as many.
const PAST_MAX: usize = 8192;

/// The way to a shard, for what one agent has to say.
#[derive(Clone)]
pub(crate) enum Via {
    Here,
    /// The link on which its owner was heard last.
    Link(Outbox),
}

#[derive(Default)]
pub(crate) struct CallRoutes {
    running: HashMap<CallId, u32>,
    past: HashMap<CallId, u32>,
    /// The calls of `past`, the one that is forgotten next first.
    order: VecDeque<CallId>,
    /// Where each shard's newest owner was heard, and its epoch.
    owners: HashMap<u32, (u64, Via)>,
}

impl CallRoutes {
    /// Learns from what a shard tells the agent, and from where it does.
    pub(crate) fn note(&mut self, message: &ToAgent, via: &Via) {
        let (shard, epoch) = message.of();
        let owner = self.owners.entry(shard).or_insert_with(|| (epoch, via.clone()));
        if epoch >= owner.0 {
            *owner = (epoch, via.clone());
        }
        match message {
            ToAgent::Dispatch { shard, call, .. } => {
                self.running.insert(*call, *shard);
            }
            // Before its dispatch an agent may be asked for an estimate.
            ToAgent::Pass { shard, call, .. } => self.learn(*call, *shard),
            ToAgent::Ended { call, .. } | ToAgent::Back { call, .. } => self.ended(call),
            ToAgent::Owner { .. } | ToAgent::Want { .. } | ToAgent::Standing { .. } => {}
        }
    }

    /// Learns from the agent's list. What runs is dispatched anew, as a question, and is remembered by that.
    pub(crate) fn listed(&mut self, calls: &[ListedCall]) {
        calls.iter().for_each(|listed| self.learn(listed.call_id, listed.shard));
    }

    /// The call has ended, or was never sent.
    pub(crate) fn ended(&mut self, call: &CallId) {
        if let Some(shard) = self.running.remove(call) {
            self.learn(*call, shard);
        }
    }

    /// The way to a shard; one that was never heard is looked for here.
    pub(crate) fn via(&self, shard: u32) -> Via {
        self.owners.get(&shard).map_or(Via::Here, |(_, via)| via.clone())
    }

    fn learn(&mut self, call: CallId, shard: u32) {
        if self.running.contains_key(&call) || self.past.contains_key(&call) {
            return;
        }
        self.past.insert(call, shard);
        self.order.push_back(call);
        if self.order.len() > PAST_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.past.remove(&oldest);
        }
    }

    /// The shard of the call that this stream is of; `None`: nobody here has named it.
    pub(crate) fn shard_of(&self, stream: &str) -> Option<u32> {
        let call = CallId::parse(stream).or_else(|| estimated_call(stream))?;
        self.running.get(&call).or_else(|| self.past.get(&call)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_core::message::Outcome;
    use atp_proto::{Flags, Frame, StreamId, TenantId};

    fn call(n: u32) -> CallId {
        CallId::of(&TenantId::new("t"), &StreamId::new("s"), n)
    }

    fn dispatch(n: u32, shard: u32) -> ToAgent {
        let (incarnation, frame) = ("i".into(), Frame::raw("x", 1, Flags::NONE, "x", "{}".into()));
        ToAgent::Dispatch { shard, epoch: 1, call: call(n), incarnation, go_on: false, keeper: "".into(), frame }
    }

    fn ended(n: u32) -> ToAgent {
        ToAgent::Ended { shard: 0, epoch: 1, call: call(n), outcome: Outcome::Unknown }
    }

    #[test]
    fn a_running_call_is_never_forgotten_and_ended_ones_in_turn() {
        let mut routes = CallRoutes::default();
        let first = call(0).to_string();
        routes.note(&dispatch(0, 7), &Via::Here);
        for n in 1..=2 * PAST_MAX as u32 {
            routes.note(&dispatch(n, 3), &Via::Here);
            routes.note(&ended(n), &Via::Here);
        }
        assert_eq!(routes.shard_of(&first), Some(7), "it runs");
        assert_eq!((routes.running.len(), routes.past.len(), routes.order.len()), (1, PAST_MAX, PAST_MAX));
        assert_eq!(routes.shard_of(&call(PAST_MAX as u32).to_string()), None);
        assert_eq!(routes.shard_of(&call(PAST_MAX as u32 + 1).to_string()), Some(3));
        routes.note(&ended(0), &Via::Here);
        assert_eq!(routes.shard_of(&first), Some(7), "its final may still come");
        assert_eq!(routes.shard_of("s-1"), None);
    }

    #[test]
    fn a_list_and_a_question_name_the_shard_too() {
        let mut routes = CallRoutes::default();
        let listed =
            ListedCall { call_id: call(1), shard: 5, epoch: 1, msg_seq: 1, cost: Default::default(), done: true };
        routes.note(&dispatch(2, 9), &Via::Here);
        routes.listed(&[listed.clone(), ListedCall { call_id: call(2), ..listed }]);
        assert_eq!(routes.shard_of(&call(1).to_string()), Some(5));
        assert_eq!(routes.shard_of(&call(2).to_string()), Some(9), "its shard knows better than the agent");
        let (incarnation, frame) = ("i".into(), Frame::raw("x", 1, Flags::NONE, "x", "{}".into()));
        routes.note(&ToAgent::Pass { shard: 4, epoch: 1, call: call(3), incarnation, frame }, &Via::Here);
        assert_eq!(routes.shard_of(&format!("{}.e", call(3))), Some(4));
    }

    #[test]
    fn a_shard_is_where_its_newest_owner_was_heard() {
        let mut routes = CallRoutes::default();
        let link = Via::Link(crate::outbox::outbox(Default::default()).0);
        let owner = |epoch| ToAgent::Owner { shard: 3, epoch };
        assert!(matches!(routes.via(3), Via::Here));
        routes.note(&owner(7), &link);
        routes.note(&owner(6), &Via::Here);
        assert!(matches!(routes.via(3), Via::Link(_)), "one that was fenced is no owner");
        routes.note(&owner(8), &Via::Here);
        assert!(matches!(routes.via(3), Via::Here));
    }
}

//! Slots: a dispatch leaves only under a slot that is lent and under the highest epoch its agent's keeper has seen; an
//! agent never runs more calls than it takes.

use super::Verdict;
use super::queue::Queue;
use super::status::Statuses;
use crate::simulation::plan::AgentPlan;
use atp_core::message::{FromAgent, ToAgent};
use atp_proto::CallId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long a slot is lent for.
const LEASE_MS: u64 = 2_000;

#[derive(Debug)]
struct Lent {
    epoch: u64,
    until: u64,
    used: bool,
    /// The incarnation that it is for: another one's slots have fallen with it.
    of: Arc<str>,
}

#[derive(Debug, Default)]
struct Keeper {
    epoch: u64,
    lent: BTreeMap<CallId, Lent>,
    queue: Queue,
}

#[derive(Debug, Default)]
pub struct Slots {
    keepers: BTreeMap<usize, Keeper>,
}

impl Slots {
    /// The keeper (`Agent`) began anew.
    pub fn restarted(&mut self, agent: usize) {
        self.keepers.remove(&agent);
    }

    /// A message of the shard is handed to the keeper.
    pub fn told(&mut self, agent: usize, message: &ToAgent, now_ms: u64) {
        let keeper = self.keepers.entry(agent).or_default();
        let (epoch, ended) = match message {
            ToAgent::Owner { epoch, .. }
            | ToAgent::Standing { epoch, .. }
            | ToAgent::Want { epoch, .. }
            | ToAgent::Dispatch { epoch, .. }
            | ToAgent::Pass { epoch, .. } => (*epoch, None),
            ToAgent::Back { epoch, call, .. } | ToAgent::Ended { epoch, call, .. } => (*epoch, Some(call)),
        };
        if epoch > keeper.epoch {
            keeper.epoch = epoch;
            keeper.lent.retain(|_, slot| slot.epoch >= epoch);
            keeper.queue.fence(epoch);
        }
        match message {
            ToAgent::Want { call, wish, .. } if epoch == keeper.epoch => keeper.queue.wants(*call, epoch, wish, now_ms),
            ToAgent::Back { call, .. } if epoch == keeper.epoch => keeper.queue.gives_back(call),
            ToAgent::Dispatch { call, .. } | ToAgent::Ended { call, .. } => keeper.queue.knows(*call),
            _ => {}
        }
        if let Some(call) = ended
            && keeper.lent.get(call).is_some_and(|slot| slot.epoch <= epoch)
        {
            keeper.lent.remove(call);
        }
    }

    /// The agent lists a call that it has: the keeper takes it for a running one.
    pub fn listed(&mut self, agent: usize, call: CallId) {
        self.keepers.entry(agent).or_default().queue.knows(call);
    }

    /// The keeper answers.
    pub fn said(&mut self, agent: usize, message: &FromAgent, now_ms: u64, statuses: &Statuses, verdict: &mut Verdict) {
        let keeper = self.keepers.entry(agent).or_default();
        if let FromAgent::Lent { call, epoch, incarnation, .. } = message {
            verdict.expect(*epoch >= keeper.epoch, "agents fence lower epochs", || {
                format!("a slot was lent for {call} under epoch {epoch}, {} was seen", keeper.epoch)
            });
            // Said again it is still the slot that was lent first.
            let until = now_ms + LEASE_MS;
            let same = |slot: &&Lent| !slot.used && slot.until > now_ms && slot.of == *incarnation;
            let old = keeper.lent.get(call).filter(same).map(|slot| slot.until);
            keeper.lent.insert(
                *call,
                Lent { epoch: *epoch, until: old.unwrap_or(until), used: false, of: incarnation.clone() },
            );
            if old.is_none() {
                keeper.queue.lent(*call, now_ms, verdict);
                let in_use =
                    keeper.lent.values().filter(|s| s.of == *incarnation && (s.used || s.until > now_ms)).count();
                statuses.lent(agent, in_use, now_ms, verdict);
            }
        }
        if let FromAgent::Unsent { call, .. } = message {
            keeper.lent.remove(call);
        }
    }

    /// The keeper sends a dispatch (not a question to go on) to its agent.
    pub fn dispatched(&mut self, agent: usize, call: CallId, epoch: u64, now_ms: u64, verdict: &mut Verdict) {
        let keeper = self.keepers.entry(agent).or_default();
        verdict.expect(epoch >= keeper.epoch, "agents fence lower epochs", || {
            format!("{call} was dispatched under epoch {epoch}, {} was seen", keeper.epoch)
        });
        let slot = keeper.lent.get(&call);
        verdict.expect(
            slot.is_some_and(|slot| slot.epoch == epoch && now_ms <= slot.until),
            "no dispatch without a live slot",
            || format!("{call} under epoch {epoch} at {now_ms}, slot {slot:?}"),
        );
        if let Some(slot) = keeper.lent.get_mut(&call) {
            slot.used = true;
        }
    }

    /// The agent's process begins a call; `running` counts it.
    pub fn started(&mut self, agent: usize, running: usize, plan: &AgentPlan, verdict: &mut Verdict) {
        let most = plan.capabilities.max_parallel as usize;
        verdict.expect(running <= most, "slots in use <= slots there are", || {
            format!("agent {agent} runs {running} calls, it takes {most}")
        });
    }
}

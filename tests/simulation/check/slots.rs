//! Slots: a dispatch leaves only under a slot that is lent and under the highest epoch its agent's keeper has seen; an
//! agent never runs more calls than it takes.

use super::Verdict;
use super::queue::Queue;
use super::status::Statuses;
use crate::simulation::plan::AgentPlan;
use atp_core::message::{FromAgent, ToAgent};
use atp_proto::CallId;
use atp_proto::content::{Dispatch, ListedCall};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How long a slot is lent for.
const LEASE_MS: u64 = 2_000;

#[derive(Debug)]
struct Lent {
    shard: u32,
    epoch: u64,
    until: u64,
    used: bool,
    /// The incarnation that it is for: another one's slots have fallen with it.
    of: Arc<str>,
}

#[derive(Debug, Default)]
struct Keeper {
    /// The highest epoch of each shard.
    epochs: BTreeMap<u32, u64>,
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

    /// A message of the shard is handed to the keeper. False: a higher epoch was seen, it is fenced.
    pub fn told(&mut self, agent: usize, message: &ToAgent, now_ms: u64) -> bool {
        let keeper = self.keepers.entry(agent).or_default();
        let (shard, epoch, ended) = match message {
            ToAgent::Owner { shard, epoch }
            | ToAgent::Standing { shard, epoch, .. }
            | ToAgent::Want { shard, epoch, .. }
            | ToAgent::Dispatch { shard, epoch, .. }
            | ToAgent::Pass { shard, epoch, .. } => (*shard, *epoch, None),
            ToAgent::Back { shard, epoch, call, .. } | ToAgent::Ended { shard, epoch, call, .. } => {
                (*shard, *epoch, Some(call))
            }
        };
        let highest = keeper.epochs.entry(shard).or_default();
        if epoch > *highest {
            *highest = epoch;
            keeper.lent.retain(|_, slot| slot.shard != shard || slot.epoch >= epoch);
            keeper.queue.fence(shard, epoch);
        }
        let newest = epoch == *highest;
        match message {
            ToAgent::Want { call, wish, .. } if newest => keeper.queue.wants(*call, (shard, epoch), wish, now_ms),
            ToAgent::Back { call, .. } if newest => keeper.queue.gives_back(call),
            ToAgent::Dispatch { call, .. } | ToAgent::Ended { call, .. } => keeper.queue.knows(*call),
            _ => {}
        }
        if let Some(call) = ended
            && keeper.lent.get(call).is_some_and(|slot| slot.epoch <= epoch)
        {
            keeper.lent.remove(call);
        }
        newest
    }

    /// The agent lists a call that it has: the keeper takes it for a running one.
    pub fn listed(&mut self, agent: usize, call: &ListedCall) {
        let keeper = self.keepers.entry(agent).or_default();
        keeper.queue.knows(call.call_id);
        let highest = keeper.epochs.entry(call.shard).or_default();
        if call.epoch > *highest {
            *highest = call.epoch;
            keeper.lent.retain(|_, slot| slot.shard != call.shard || slot.epoch >= call.epoch);
            keeper.queue.fence(call.shard, call.epoch);
        }
    }

    /// The keeper answers.
    pub fn said(
        &mut self,
        agent: usize,
        shard: u32,
        message: &FromAgent,
        now_ms: u64,
        statuses: &Statuses,
        verdict: &mut Verdict,
    ) {
        let keeper = self.keepers.entry(agent).or_default();
        if let FromAgent::Lent { call, epoch, incarnation, .. } = message {
            let seen = keeper.epochs.get(&shard).copied().unwrap_or_default();
            verdict.expect(*epoch >= seen, "agents fence lower epochs", || {
                format!("a slot was lent for {call} under epoch {epoch}, {seen} was seen")
            });
            // Said again it is still the slot that was lent first.
            let until = now_ms + LEASE_MS;
            let same = |slot: &&Lent| !slot.used && slot.until > now_ms && slot.of == *incarnation;
            let old = keeper.lent.get(call).filter(same).map(|slot| slot.until);
            keeper.lent.insert(
                *call,
                Lent { shard, epoch: *epoch, until: old.unwrap_or(until), used: false, of: incarnation.clone() },
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
    pub fn dispatched(&mut self, agent: usize, d: &Dispatch, now_ms: u64, verdict: &mut Verdict) {
        let (call, epoch) = (d.call_id, d.epoch);
        let keeper = self.keepers.entry(agent).or_default();
        let seen = keeper.epochs.get(&d.shard).copied().unwrap_or_default();
        verdict.expect(epoch >= seen, "agents fence lower epochs", || {
            format!("{call} was dispatched under epoch {epoch}, {seen} was seen")
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

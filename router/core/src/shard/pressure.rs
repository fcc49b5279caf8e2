//! Pressure: a gold task that waits too long sheds new tasks of the tiers below it that want the same, then has the oldest
//! running bronze task asked to stop, then silver (ATP-10). Gold never gives way, and nothing is settled here: a task that
//! gives way ends by its calls' finals.

use super::closing::Stopping;
use super::offer::stream_qos;
use super::{REPEAT_MS, Shard};
use crate::message::Metric;
use crate::stream::{Phase, Stream};
use atp_proto::content::Submit;
use atp_proto::{AgentName, CallId, Code, Qos, TenantId, WireError};
use std::collections::{BTreeMap, BTreeSet};

/// New tasks are shed for this long after a gold one was seen to wait.
const SHED_MS: u64 = 2 * REPEAT_MS;

/// What gold tasks wait for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Scarce {
    Slot(AgentName),
    Money(String),
}

/// Who is under pressure, and which calls could give way.
#[derive(Default)]
pub(super) struct Pressure {
    /// Running calls below gold: bronze before silver, oldest task first.
    below: BTreeSet<(u8, u64, u32)>,
    /// Until when new tasks that want the same are shed: bronze, silver.
    until: BTreeMap<Scarce, [u64; 2]>,
}

/// Who gives way first; `None`: never.
fn rank(qos: Qos) -> Option<u8> {
    match qos {
        Qos::Gold => None,
        Qos::Silver => Some(1),
        Qos::Bronze => Some(0),
    }
}

impl Shard {
    /// Notes that a call began or ended.
    pub(super) fn note_flight(&mut self, id: CallId, flies: bool) {
        let Some((no, lane)) = self.calls.get(&id).map(|c| (c.no, c.lane)) else { return };
        let Some(rank) = self.state.stream(no).and_then(|s| rank(stream_qos(s))) else { return };
        match flies {
            true => self.pressure.below.insert((rank, no, lane)),
            false => self.pressure.below.remove(&(rank, no, lane)),
        };
    }

    /// A new task of a tier that gives way is refused while gold waits for what it wants; nothing was judged.
    pub(super) fn shed(&self, tenant: &TenantId, submit: &Submit, qos: Qos, task_type: &str) -> Result<(), WireError> {
        let Some(rank) = rank(qos).filter(|_| !self.pressure.until.is_empty()) else { return Ok(()) };
        let until = |scarce: Scarce| {
            self.pressure.until.get(&scarce).and_then(|tiers| tiers.get(usize::from(rank)).copied()).unwrap_or(0)
        };
        let of_slot = |agent: &AgentName| until(Scarce::Slot(agent.clone()));
        let slots = if submit.agents.is_empty() {
            // One agent that nobody waits for will do.
            let skilled = |skills: &[String]| skills.is_empty() || skills.iter().any(|s| s == task_type);
            let here = self.seats.iter().filter(|(_, s)| s.up);
            let able = here.filter(|(_, s)| task_type.is_empty() || skilled(&s.capabilities.skills));
            able.map(|(agent, _)| of_slot(agent)).min()
        } else {
            submit.agents.iter().map(of_slot).max()
        };
        let until = slots.unwrap_or(0).max(until(Scarce::Money(tenant.to_string())));
        if self.now_ms >= until {
            return Ok(());
        }
        let message = format!("gold tasks wait; new {} tasks are shed until they don't", qos.as_str());
        let mut error = WireError::new(Code::Window, message).scope(format!("qos:{}", qos.as_str()));
        error.judged = false;
        Err(error.retry_after_ms(until - self.now_ms))
    }

    /// What a waiting task lacks: money of its account, or slots of agents that are busy.
    fn lacks(&self, no: u64, account: &str) -> Vec<Scarce> {
        if self.waits_for_money(no, account) {
            return vec![Scarce::Money(account.into())];
        }
        let offers = self.offers_of(no).unwrap_or_default();
        offers.into_iter().filter(|o| self.in_flight(&o.agent) > 0).map(|o| Scarce::Slot(o.agent)).collect()
    }

    /// A task asks again for what it lacks: a gold one that waited too long presses on those below it.
    pub(super) fn press(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| stream_qos(s) == Qos::Gold && !s.had_intent()) else {
            return;
        };
        let Some(live) = self.live.get(&no).filter(|l| l.stopping.is_none()) else { return };
        let waited = self.clock.logged_ms().saturating_sub(stream.accepted_at);
        if waited < self.settings.limits.preempt_after_ms {
            return;
        }
        let lacks = self.lacks(no, &stream.accept.account);
        // Who was asked to give way has its time for that; a call that won't stop is no reason to wait longer.
        let gives_way = |victim: u64| {
            self.live.contains_key(&victim) && self.state.stream(victim).is_some_and(Stream::has_open_calls)
        };
        let found = if live.victim.is_some_and(gives_way) { None } else { self.gives_way(&lacks) };
        let (now, until) = (self.now_ms, self.now_ms + SHED_MS);
        self.pressure.until.retain(|_, [bronze, _]| *bronze > now);
        for scarce in lacks {
            let [bronze, silver] = self.pressure.until.entry(scarce).or_default();
            *bronze = until;
            // Once silver gives way, none begins until gold has what it needs.
            if *silver > now || found.is_some_and(|(rank, _)| rank > 0) {
                *silver = until;
            }
        }
        let Some((_, victim)) = found else { return };
        if let Some(live) = self.live.get_mut(&no) {
            live.victim = Some(victim);
        }
        self.metric(Metric::Admission { outcome: "preempted", code: Code::Preempt.as_str() });
        self.stop(victim, Stopping::preempt(self.now_ms));
    }

    /// The first task in the order of giving way whose end would bring what is lacking.
    fn gives_way(&self, lacks: &[Scarce]) -> Option<(u8, u64)> {
        let found = self.pressure.below.iter().find(|(_, no, lane)| {
            let stops = self.live.get(no).is_none_or(|l| l.stopping.is_some());
            let stream = self.state.stream(*no).filter(|_| !stops);
            let call = stream.and_then(|s| s.call(*lane)).filter(|c| c.phase() == Phase::Running);
            stream.zip(call).is_some_and(|(stream, call)| {
                lacks.iter().any(|scarce| match scarce {
                    Scarce::Slot(agent) => call.reserve.agent == agent.as_str(),
                    Scarce::Money(account) => stream.accept.account == *account,
                })
            })
        });
        found.map(|(rank, no, _)| (*rank, *no))
    }
}

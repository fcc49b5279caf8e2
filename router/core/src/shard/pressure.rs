//! Pressure: a gold task that waits too long sheds new tasks of the tiers below it that want the same, then has the oldest
//! running bronze task asked to stop, then silver (ATP-10), in whatever shard it runs. Gold never gives way, and nothing is settled
//! here: a task that gives way ends by its calls' finals. Other shards are asked one beat ahead who they have.

use super::closing::Stopping;
use super::offer::stream_qos;
use super::{REPEAT_MS, Shard, Timer};
use crate::escrow::{Below, Lack, Lower, Press, Say};
use crate::message::Metric;
use crate::stream::{Phase, Stream};
use atp_proto::content::Submit;
use atp_proto::{AgentName, CallId, Code, Qos, TenantId, WireError};
use std::collections::{BTreeMap, BTreeSet};

/// New tasks are shed for this long after a gold one was seen to wait.
const SHED_MS: u64 = 2 * REPEAT_MS;
/// What other shards are told of gold that waits is gathered for so long.
const GATHER_MS: u64 = 50;
/// What another shard said holds for this long.
const HEARD_MS: u64 = 2 * REPEAT_MS;
/// Calls that a shard offers to another one's gold tasks.
const LOWER_MAX: usize = 16;

/// What gold tasks wait for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Scarce {
    Slot(AgentName),
    Money(String),
}

impl Scarce {
    fn is_freed_by(&self, agent: &str, account: &str) -> bool {
        match self {
            Self::Slot(wanted) => wanted.as_str() == agent,
            Self::Money(wanted) => wanted == account,
        }
    }
}

/// Who is under pressure, and which calls could give way.
#[derive(Default)]
pub(super) struct Pressure {
    /// Running calls below gold: bronze before silver, oldest task first.
    below: BTreeSet<(u8, u64, u32)>,
    /// Until when new tasks that want the same are shed: bronze, silver.
    until: BTreeMap<Scarce, [u64; 2]>,
    /// Tasks that were asked to give way.
    giving_way: BTreeSet<u64>,
    /// What gold tasks of this shard wait for: as of when, and how many tiers are shed for it.
    lacks: BTreeMap<Scarce, (u64, u32)>,
    /// When other shards were last asked who could give way.
    asked_at: Option<u64>,
    /// What isn't said to them yet: who of theirs is to stop.
    unsaid: BTreeMap<u32, Vec<u64>>,
    says_at: Option<u64>,
    /// What they said, and when.
    far: BTreeMap<u32, (u64, Below)>,
}

/// A task that was asked to give way: its shard, its number there, and when it was asked.
#[derive(Clone, Copy)]
pub(super) struct Victim {
    shard: u32,
    no: u64,
    at: u64,
}

/// In the order of giving way: bronze before silver, oldest first.
type Place = (u32, u64, u32, u64);

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

    /// What a waiting task lacks: money of its account, or slots of agents that are busy. What runs in other shards isn't known
    /// here, so there any of its agents may be.
    fn lacks(&self, no: u64, account: &str) -> Vec<Scarce> {
        if self.waits_for_money(no, account) {
            return vec![Scarce::Money(account.into())];
        }
        let offers = self.offers_of(no).unwrap_or_default();
        let busy = |agent: &AgentName| self.has_others() || self.in_flight(agent) > 0;
        offers.into_iter().filter(|o| busy(&o.agent)).map(|o| Scarce::Slot(o.agent)).collect()
    }

    fn has_others(&self) -> bool {
        self.settings.placement.shards() > 1
    }

    /// A task asks again for what it lacks: a gold one that waited too long presses on those below it.
    pub(super) fn press(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| stream_qos(s) == Qos::Gold && !s.had_intent()) else {
            return;
        };
        let Some(live) = self.live.get(&no).filter(|l| l.stopping.is_none()) else { return };
        let (now, after) = (self.now_ms, self.settings.limits.preempt_after_ms);
        let waited = self.clock.logged_ms().saturating_sub(stream.accepted_at);
        let is_due = waited >= after;
        if !(is_due || self.has_others() && waited + REPEAT_MS >= after) {
            return;
        }
        let lacks = self.lacks(no, &stream.accept.account);
        // Who was asked to give way has its time for that; a call that won't stop is no reason to wait longer.
        let waits = !is_due || live.victim.is_some_and(|victim| self.still_gives_way(victim)) || !self.has_asked();
        let found = if waits { None } else { self.gives_way(&lacks) };
        let until = now + SHED_MS;
        self.pressure.until.retain(|_, [bronze, _]| *bronze > now);
        for scarce in lacks {
            let mut sheds = 0;
            if is_due {
                let [bronze, silver] = self.pressure.until.entry(scarce.clone()).or_default();
                *bronze = until;
                // Once silver gives way, none begins until gold has what it needs.
                if *silver > now || found.is_some_and(|(rank, ..)| rank > 0) {
                    *silver = until;
                }
                sheds = 1 + u32::from(*silver > now);
            }
            self.tell_others(scarce, sheds);
        }
        let Some((_, _, shard, victim)) = found else { return };
        if let Some(live) = self.live.get_mut(&no) {
            live.victim = Some(Victim { shard, no: victim, at: now });
        }
        if shard == self.settings.shard {
            return self.give_way(victim);
        }
        self.pressure.unsaid.entry(shard).or_default().push(victim);
        if let Some((_, below)) = self.pressure.far.get_mut(&shard) {
            below.lower.retain(|lower| lower.no != victim);
        }
    }

    fn give_way(&mut self, no: u64) {
        self.metric(Metric::Admission { outcome: "preempted", code: Code::Preempt.as_str() });
        let mut giving_way = std::mem::take(&mut self.pressure.giving_way);
        giving_way.retain(|no| self.is_giving_way(*no));
        giving_way.insert(no);
        self.pressure.giving_way = giving_way;
        self.stop(no, Stopping::preempt(self.now_ms));
    }

    fn is_giving_way(&self, no: u64) -> bool {
        self.live.contains_key(&no) && self.state.stream(no).is_some_and(Stream::has_open_calls)
    }

    fn still_gives_way(&self, victim: Victim) -> bool {
        if victim.shard == self.settings.shard {
            return self.is_giving_way(victim.no);
        }
        match self.pressure.far.get(&victim.shard) {
            // It was heard of since it was told.
            Some((at, below)) if *at > victim.at + GATHER_MS => below.stopping.contains(&victim.no),
            Some(_) | None => self.now_ms < victim.at + HEARD_MS,
        }
    }

    /// Calls here whose end would bring some of what is lacking, in the order of giving way.
    fn lower(&self, lacks: &[Scarce]) -> impl Iterator<Item = Lower> {
        self.pressure.below.iter().filter_map(move |(rank, no, lane)| {
            let stops = self.live.get(no).is_none_or(|l| l.stopping.is_some());
            let stream = self.state.stream(*no).filter(|_| !stops)?;
            let call = stream.call(*lane).filter(|c| c.phase() == Phase::Running)?;
            let (agent, account) = (&call.reserve.agent, &stream.accept.account);
            lacks.iter().any(|scarce| scarce.is_freed_by(agent, account)).then(|| Lower {
                no: *no,
                rank: (*rank).into(),
                since: stream.accepted_at,
                agent: agent.clone(),
                account: account.clone(),
            })
        })
    }

    /// The first task in the order of giving way, in any shard, whose end would bring what is lacking.
    fn gives_way(&self, lacks: &[Scarce]) -> Option<Place> {
        let place = |shard: u32, lower: &Lower| (lower.rank, lower.since, shard, lower.no);
        let here = self.lower(lacks).next().map(|lower| place(self.settings.shard, &lower));
        let fresh = self.pressure.far.iter().filter(|(_, (at, _))| self.now_ms < at + HEARD_MS);
        let far = fresh.filter_map(|(shard, (_, below))| {
            let frees = |l: &&Lower| lacks.iter().any(|s| s.is_freed_by(&l.agent, &l.account));
            below.lower.iter().find(frees).map(|lower| place(*shard, lower))
        });
        far.chain(here).min()
    }

    // ---- between shards ---------------------------------------------------------------------------------------------

    /// True once the other shards have had their time to say who they have.
    fn has_asked(&self) -> bool {
        !self.has_others() || self.pressure.asked_at.is_some_and(|at| self.now_ms < at + HEARD_MS)
    }

    fn tell_others(&mut self, scarce: Scarce, sheds: u32) {
        if !self.has_others() {
            return;
        }
        let lack = self.pressure.lacks.entry(scarce).or_default();
        *lack = (self.now_ms, sheds);
        if self.pressure.says_at.is_none() {
            let at = self.now_ms + GATHER_MS;
            self.pressure.says_at = Some(at);
            self.timer(at, Timer::Press);
        }
    }

    /// Tells every other shard what gold tasks here wait for, and who of it is to stop.
    pub(super) fn say_pressure(&mut self) {
        let now = self.now_ms;
        self.pressure.says_at = None;
        self.pressure.asked_at = Some(now);
        self.pressure.lacks.retain(|_, (at, _)| now < *at + HEARD_MS);
        let lack = |(scarce, (_, sheds)): (&Scarce, &(u64, u32))| match scarce {
            Scarce::Slot(agent) => Lack { agent: agent.to_string(), sheds: *sheds, ..Lack::default() },
            Scarce::Money(account) => Lack { account: account.clone(), sheds: *sheds, ..Lack::default() },
        };
        let lacks: Vec<Lack> = self.pressure.lacks.iter().map(lack).collect();
        let mut unsaid = std::mem::take(&mut self.pressure.unsaid);
        let (here, shards) = (self.settings.shard, self.settings.placement.shards());
        for shard in (0..shards).filter(|shard| *shard != here) {
            let give_way = unsaid.remove(&shard).unwrap_or_default();
            self.say(shard, Say::Press(Press { lacks: lacks.clone(), give_way }));
        }
    }

    /// Gold tasks of another shard wait.
    pub(super) fn pressed(&mut self, from: u32, press: Press) {
        let (now, mut lacks) = (self.now_ms, Vec::new());
        self.pressure.until.retain(|_, [bronze, _]| *bronze > now);
        for Lack { agent, account, sheds } in press.lacks {
            let scarce = if agent.is_empty() { Scarce::Money(account) } else { Scarce::Slot(AgentName::new(&agent)) };
            for until in self.pressure.until.entry(scarce.clone()).or_default().iter_mut().take(sheds as usize) {
                *until = now + SHED_MS;
            }
            lacks.push(scarce);
        }
        for no in press.give_way {
            if self.lower(&lacks).any(|lower| lower.no == no) {
                self.give_way(no);
            }
        }
        let lower = self.lower(&lacks).take(LOWER_MAX).collect();
        let stopping = self.pressure.giving_way.iter().copied().filter(|no| self.is_giving_way(*no)).collect();
        self.say(from, Say::Below(Below { lower, stopping }));
    }

    /// Who could give way in another shard.
    pub(super) fn heard_below(&mut self, from: u32, mut below: Below) {
        // Who is to stop there isn't told so yet.
        let unsaid = self.pressure.unsaid.get(&from);
        below.lower.retain(|lower| unsaid.is_none_or(|unsaid| !unsaid.contains(&lower.no)));
        self.pressure.far.insert(from, (self.now_ms, below));
    }
}

//! Pressure: a gold task that waits too long sheds new bronze tasks, then has the oldest running bronze task asked to stop,
//! then silver (ATP-8). Gold never gives way, and nothing is settled here: a task that gives way ends by its calls' finals.

use super::closing::Stopping;
use super::offer::stream_qos;
use super::{REPEAT_MS, Shard};
use crate::message::Metric;
use crate::stream::{Phase, Stream};
use atp_proto::{AgentName, CallId, Code, Qos, WireError};
use std::collections::BTreeSet;

/// Who is under pressure, and which calls could give way.
#[derive(Default)]
pub(super) struct Pressure {
    /// Running calls below gold: bronze before silver, oldest task first.
    below: BTreeSet<(u8, u64, u32)>,
    bronze_until: u64,
    silver_until: u64,
}

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

    /// A new task of a tier that sheds load is refused for now; nothing was judged.
    pub(super) fn shed(&self, qos: Qos) -> Result<(), WireError> {
        let until = match qos {
            Qos::Gold => 0,
            Qos::Silver => self.pressure.silver_until,
            Qos::Bronze => self.pressure.bronze_until,
        };
        if self.now_ms >= until {
            return Ok(());
        }
        let message = format!("gold tasks wait; new {} tasks are shed until they don't", qos.as_str());
        let mut error = WireError::new(Code::Window, message).scope(format!("qos:{}", qos.as_str()));
        error.judged = false;
        Err(error.retry_after_ms(until - self.now_ms))
    }

    /// A task asks again for what it lacks: a gold one that waited too long presses on those below it.
    pub(super) fn press(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| stream_qos(s) == Qos::Gold && !s.had_intent()) else {
            return;
        };
        let Some(live) = self.live.get(&no).filter(|l| l.stopping.is_none()) else { return };
        let after = self.settings.limits.preempt_after_ms;
        if self.clock.logged_ms().saturating_sub(stream.accepted_at) < after {
            return;
        }
        let gives_way = |victim: u64| self.state.stream(victim).is_some_and(Stream::has_open_calls);
        if live.victim.is_some_and(gives_way) {
            return;
        }
        let account = stream.accept.account.clone();
        let short_of_money = self.books.get(&account).is_some_and(|b| b.waiting.contains_key(&no));
        let agents: BTreeSet<AgentName> =
            self.offers_of(no).map(|offers| offers.into_iter().map(|o| o.agent).collect()).unwrap_or_default();
        let helps = |victim: &Stream, lane: u32| match short_of_money {
            true => victim.accept.account == account,
            false => victim.call(lane).is_some_and(|c| agents.contains(&c.agent())),
        };
        let found = self.pressure.below.iter().copied().find(|(_, victim, lane)| {
            let stops = self.live.get(victim).is_none_or(|l| l.stopping.is_some());
            let running = |s: &&Stream| s.call(*lane).is_some_and(|c| c.phase() == Phase::Running);
            !stops && self.state.stream(*victim).filter(running).is_some_and(|s| helps(s, *lane))
        });
        let until = self.now_ms + 2 * REPEAT_MS;
        self.pressure.bronze_until = until;
        let Some((rank, victim, _)) = found else { return };
        if rank > 0 {
            self.pressure.silver_until = until;
        }
        if let Some(live) = self.live.get_mut(&no) {
            live.victim = Some(victim);
        }
        self.metric(Metric::Admission { outcome: "preempted", code: Code::Preempt.as_str() });
        self.stop(victim, Stopping::preempt(self.now_ms));
    }
}

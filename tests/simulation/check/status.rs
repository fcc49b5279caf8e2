//! How agents stand: nothing new leaves for an agent that said PAUSE or DRAINING once the grace is over, also behind a
//! restart, as the log has it; a window that it suggests bounds what is lent.

use super::Verdict;
use atp_core::record::AgentRecord;
use atp_proto::CallId;
use atp_proto::content::{AgentStatus, Status};
use std::collections::BTreeMap;

/// What was on its way to the log may still leave for this long.
const GRACE_MS: u64 = 250;

#[derive(Clone, Debug, Default)]
struct Keeper {
    conn: usize,
    incarnation: String,
    status: Status,
    calls_max: Option<u32>,
    /// Since when nothing new may leave.
    stopped_at: Option<u64>,
    /// What it was before a connection that may yet be refused.
    before: Option<Box<Keeper>>,
}

impl Keeper {
    fn hears(&mut self, status: &AgentStatus, now_ms: u64) {
        self.status = status.status;
        self.calls_max = status.suggested_window.and_then(|w| w.max_parallel);
        let stops = matches!(status.status, Status::Pause | Status::Draining);
        self.stopped_at = if stops { self.stopped_at.or(Some(now_ms)) } else { None };
    }
}

#[derive(Debug, Default)]
pub struct Statuses {
    keepers: BTreeMap<usize, Keeper>,
    /// The last word of each incarnation, at whichever router.
    words: BTreeMap<String, Status>,
}

impl Statuses {
    /// The keeper (`Agent`) began anew: it knows what the log says.
    pub fn restarted(&mut self, agent: usize) {
        self.keepers.remove(&agent);
    }

    /// The agent's hello and capabilities are read. `log`: its last word in the durable log.
    pub fn connected(&mut self, agent: usize, conn: usize, incarnation: &str, log: Option<&AgentRecord>) {
        let before = self.keepers.remove(&agent);
        let mut keeper = match &before {
            Some(known) if known.incarnation == incarnation => Keeper { before: None, ..known.clone() },
            Some(_) => Keeper::default(),
            None => {
                // What it has said since at another router may not be logged yet.
                let last = self.words.get(incarnation);
                let same = log.filter(|r| r.incarnation == incarnation && last.is_none_or(|word| *word == r.status()));
                let status = same.map_or(Status::Ready, AgentRecord::status);
                let stopped_at = matches!(status, Status::Pause | Status::Draining).then_some(0);
                Keeper { status, stopped_at, ..Keeper::default() }
            }
        };
        (keeper.conn, keeper.incarnation) = (conn, incarnation.into());
        keeper.before = before.map(|b| Box::new(Keeper { before: None, ..b }));
        self.keepers.insert(agent, keeper);
    }

    /// The keeper closes a connection; if it is the newest, it was refused.
    pub fn closed(&mut self, agent: usize, conn: usize) {
        if let Some(keeper) = self.keepers.get_mut(&agent)
            && keeper.conn == conn
            && let Some(before) = keeper.before.take()
        {
            *keeper = *before;
        }
    }

    /// `control.status` is read.
    pub fn said(&mut self, agent: usize, conn: usize, status: &AgentStatus, now_ms: u64) {
        let Some(keeper) = self.keepers.get_mut(&agent).filter(|k| k.conn == conn) else { return };
        self.words.insert(keeper.incarnation.clone(), status.status);
        keeper.hears(status, now_ms);
    }

    /// `control.status` was read at another router, and this keeper hears of it.
    pub fn said_elsewhere(&mut self, agent: usize, incarnation: &str, status: &AgentStatus, now_ms: u64) {
        let keeper = self.keepers.entry(agent).or_default();
        (keeper.incarnation, keeper.before) = (incarnation.into(), None);
        keeper.hears(status, now_ms);
    }

    /// A dispatch leaves.
    pub fn dispatched(&self, agent: usize, call: CallId, now_ms: u64, verdict: &mut Verdict) {
        let Some(keeper) = self.keepers.get(&agent) else { return };
        verdict.expect(
            keeper.stopped_at.is_none_or(|at| now_ms < at + GRACE_MS),
            "no dispatch after PAUSE grace",
            || format!("{call} leaves at {now_ms}, agent {agent}: {:?} since {:?}", keeper.status, keeper.stopped_at),
        );
    }

    /// A slot is lent that wasn't before; `in_use` counts it.
    pub fn lent(&self, agent: usize, in_use: usize, now_ms: u64, verdict: &mut Verdict) {
        let Some(keeper) = self.keepers.get(&agent) else { return };
        let most = keeper.calls_max.map_or(usize::MAX, |n| n as usize);
        // What a keeper lends before it hears what the log says isn't used.
        let stopped = keeper.stopped_at.is_some_and(|at| at > 0);
        verdict.expect(!stopped && in_use <= most, "no slot is lent beyond an agent's word", || {
            format!("agent {agent} at {now_ms}: {in_use} in use, {keeper:?}")
        });
    }
}

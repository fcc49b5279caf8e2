//! One agent handle: its connection, status, window and slots. It lends slots to shards and passes their frames on; it never
//! touches money and never decides what a call costs.
//!
//! ```text
//!            Want            room in the window             Dispatch
//!   (unknown) ----> Wanted ----------------------> Lent ----------------> Running ---- Ended / incarnation lost ---> (gone)
//!                     | Back, 5 s without repeat     | Back, 2 s, higher epoch
//!                     v                              v
//!                   (gone)                         (gone)      Dispatch without a live slot -> Unsent, remembered
//! ```

use crate::clock::Now;
use crate::message::{AgentEffect, AgentInput, FromAgent, Machine, ToAgent};
use crate::settings::Settings;
use atp_proto::content::{AgentStatus, Capabilities, ListedCall, Status};
use atp_proto::{AgentName, CallId, Code, ConnId, Frame, WireError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A lent slot lapses after this long.
pub const SLOT_MS: u64 = 2_000;
/// A shard that wants a slot repeats itself more often than this.
const WANT_MS: u64 = 5_000;
/// After PAUSE a dispatch that was on its way to the log may leave for this long.
pub const GRACE_MS: u64 = 250;
/// An agent that answered nothing for this long gets no slot lent.
pub const HEALTHY_MS: u64 = 30_000;
/// A handle is taken while its connection was heard within this long.
const LIVE_MS: u64 = 15_000;
/// What is remembered of calls that ended, so that a late repeat never leaves again.
const MEMORY_MS: u64 = 600_000;
const MEMORY_MAX: usize = 65_536;

/// What an agent's router knows of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Wanted {
        epoch: u64,
        until: u64,
    },
    Lent {
        epoch: u64,
        until: u64,
    },
    Running {
        epoch: u64,
    },
    /// It was sent to an incarnation that is gone. Its owner may ask for another slot, if the upstream dedupes.
    Lost,
    /// Never sent under this epoch, and never will be; or ended.
    Over {
        epoch: u64,
        unsent: bool,
    },
}

struct Link {
    conn: ConnId,
    capabilities: Arc<Capabilities>,
    alive_at: u64,
    up: bool,
}

/// The machine of one handle; it lives across reconnects.
pub struct Agent {
    name: AgentName,
    settings: Arc<Settings>,
    now_ms: u64,
    link: Option<Link>,
    status: AgentStatus,
    status_at: u64,
    epochs: BTreeMap<u32, u64>,
    calls: BTreeMap<CallId, (u32, Slot)>,
    queue: VecDeque<CallId>,
    used: u32,
    over: VecDeque<(u64, CallId)>,
    /// No slot lapses and no wish grows stale before.
    due: u64,
    effects: VecDeque<AgentEffect>,
}

impl Agent {
    #[must_use]
    pub fn new(name: AgentName, settings: Arc<Settings>, now: Now) -> Self {
        Self {
            name,
            settings,
            now_ms: now.mono_ms,
            link: None,
            status: AgentStatus::default(),
            status_at: 0,
            epochs: BTreeMap::new(),
            calls: BTreeMap::new(),
            queue: VecDeque::new(),
            used: 0,
            over: VecDeque::new(),
            due: u64::MAX,
            effects: VecDeque::new(),
        }
    }

    pub fn set_settings(&mut self, settings: Arc<Settings>) {
        self.settings = settings;
    }

    #[must_use]
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    /// Slots that are lent or run.
    #[must_use]
    pub fn slots_used(&self) -> u32 {
        self.used
    }

    /// Calls that run on this agent as far as its router knows.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.calls.values().filter(|(_, s)| matches!(s, Slot::Running { .. })).count() as u32
    }

    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.link.as_ref().is_some_and(|l| l.up)
    }

    fn connected(&mut self, conn: ConnId, capabilities: Capabilities) {
        let now = self.now_ms;
        if let Some(link) = &self.link
            && link.conn != conn
        {
            let other = link.capabilities.incarnation != capabilities.incarnation;
            if other && link.up && now < link.alive_at + LIVE_MS {
                let message = format!(
                    "agent {} is connected with another incarnation that answers; stop that one first",
                    self.name
                );
                let error = WireError::new(Code::Sec, message).scope(format!("agent:{}", self.name));
                self.effects
                    .push_back(AgentEffect::Close { conn, error: error.fatal(atp_proto::code::Fatal::Connection) });
                return;
            }
            if link.up {
                let error = WireError::new(Code::AgentDown, "replaced by a newer connection of this agent");
                let error = error.fatal(atp_proto::code::Fatal::Connection);
                self.effects.push_back(AgentEffect::Close { conn: link.conn, error });
            }
            if other {
                self.incarnation_lost();
            }
        }
        let capabilities = Arc::new(capabilities);
        if self.link.as_ref().is_none_or(|l| l.conn != conn) {
            self.status = AgentStatus::default();
        }
        self.link = Some(Link { conn, capabilities: capabilities.clone(), alive_at: now, up: true });
        for listed in capabilities.calls.iter().filter(|c| !c.done) {
            if let std::collections::btree_map::Entry::Vacant(free) = self.calls.entry(listed.call_id) {
                free.insert((listed.shard, Slot::Running { epoch: listed.epoch }));
                self.used += 1;
            }
        }
        self.up(None);
        self.lend();
    }

    fn up(&mut self, shard: Option<u32>) {
        let Some(link) = self.link.as_ref().filter(|l| l.up) else { return };
        let mut capabilities = link.capabilities.clone();
        let unlisted = self.calls.iter().filter_map(|(id, (shard, slot))| match slot {
            Slot::Running { epoch } => Some((*id, *shard, *epoch)),
            Slot::Wanted { .. } | Slot::Lent { .. } | Slot::Lost | Slot::Over { .. } => None,
        });
        // A new owner must also hear of calls that only their slot remembers.
        for (call_id, shard, epoch) in unlisted {
            if capabilities.calls.iter().all(|c| c.call_id != call_id) {
                let (msg_seq, cost) = (0, atp_proto::Cost::default());
                let listed = ListedCall { call_id, shard, epoch, msg_seq, cost, done: false };
                Arc::make_mut(&mut capabilities).calls.push(listed);
            }
        }
        let message = FromAgent::Up { agent: self.name.clone(), capabilities, status: self.status.clone() };
        self.effects.push_back(AgentEffect::ToShard { shard, message });
    }

    /// The process behind the handle is another: its slots fall with the calls that it ran.
    fn incarnation_lost(&mut self) {
        self.calls.retain(|_, (_, slot)| !matches!(slot, Slot::Lent { .. }));
        let until = self.now_ms + MEMORY_MS;
        for (call, (_, slot)) in &mut self.calls {
            if matches!(slot, Slot::Running { .. }) {
                *slot = Slot::Lost;
                self.over.push_back((until, *call));
            }
        }
        self.used = 0;
    }

    fn disconnected(&mut self, conn: ConnId) {
        let Some(link) = self.link.as_mut().filter(|l| l.conn == conn && l.up) else { return };
        link.up = false;
        let incarnation = link.capabilities.incarnation.as_str().into();
        let message = FromAgent::Down { agent: self.name.clone(), incarnation };
        self.effects.push_back(AgentEffect::ToShard { shard: None, message });
    }

    fn status(&mut self, conn: ConnId, status: AgentStatus) {
        if self.link.as_ref().is_none_or(|l| l.conn != conn || !l.up) {
            return;
        }
        if status.status != self.status.status {
            self.status_at = self.now_ms;
        }
        self.status = status.clone();
        let message = FromAgent::Status { agent: self.name.clone(), status };
        self.effects.push_back(AgentEffect::ToShard { shard: None, message });
        self.lend();
    }

    // ---- slots ------------------------------------------------------------------------------------------------------

    /// Calls that may run at once: the router's window, the agent's own, and what it suggests while BUSY.
    #[must_use]
    pub fn window(&self) -> u32 {
        let own = self.link.as_ref().map_or(0, |l| l.capabilities.max_parallel);
        let suggested = self.status.suggested_window.and_then(|w| w.max_parallel).unwrap_or(u32::MAX);
        own.min(self.settings.agent_window.max_parallel.unwrap_or(u32::MAX)).min(suggested)
    }

    fn may_lend(&self) -> bool {
        let healthy = |l: &Link| l.up && self.now_ms < l.alive_at + HEALTHY_MS;
        self.link.as_ref().is_some_and(healthy) && matches!(self.status.status, Status::Ready | Status::Busy)
    }

    fn lend(&mut self) {
        while self.may_lend() && self.used < self.window() {
            let Some(call) = self.queue.pop_front() else { return };
            let Some((shard, slot)) = self.calls.get_mut(&call) else { continue };
            let Slot::Wanted { epoch, until } = *slot else { continue };
            if until <= self.now_ms {
                self.calls.remove(&call);
                continue;
            }
            self.due = self.due.min(self.now_ms + SLOT_MS);
            *slot = Slot::Lent { epoch, until: self.now_ms + SLOT_MS };
            let shard = *shard;
            self.used += 1;
            self.lent(shard, call, epoch);
        }
    }

    fn lent(&mut self, shard: u32, call: CallId, epoch: u64) {
        let incarnation = self.link.as_ref().map_or_else(|| "".into(), |l| l.capabilities.incarnation.as_str().into());
        let message = FromAgent::Lent { agent: self.name.clone(), incarnation, call, epoch };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
    }

    /// Notes the epoch; false where a higher one was seen of that shard.
    fn fence(&mut self, shard: u32, epoch: u64) -> bool {
        let highest = self.epochs.entry(shard).or_insert(epoch);
        if epoch < *highest {
            return false;
        }
        if epoch > *highest {
            *highest = epoch;
            let mut fallen = 0;
            self.calls.retain(|_, (s, slot)| match slot {
                Slot::Lent { epoch: e, .. } if *s == shard && *e < epoch => {
                    fallen += 1;
                    false
                }
                Slot::Wanted { epoch: e, .. } => *s != shard || *e >= epoch,
                Slot::Lent { .. } | Slot::Running { .. } | Slot::Lost | Slot::Over { .. } => true,
            });
            self.used -= fallen;
            self.lend();
        }
        true
    }

    fn shard(&mut self, message: ToAgent) {
        match message {
            ToAgent::Owner { shard, epoch } => {
                if self.fence(shard, epoch) {
                    self.up(Some(shard));
                }
            }
            ToAgent::Want { shard, epoch, call } => {
                if self.fence(shard, epoch) {
                    self.want(shard, epoch, call);
                }
            }
            ToAgent::Back { shard, epoch, call } => {
                if self.fence(shard, epoch) {
                    self.back(call);
                }
            }
            ToAgent::Dispatch { shard, epoch, call, incarnation, go_on, frame } => {
                let live = self.fence(shard, epoch);
                // What one incarnation says proves nothing of another.
                let here = self.is_here(&incarnation);
                match go_on {
                    true if live && here => self.go_on(shard, epoch, call, frame),
                    true => {}
                    // The slot that is asked for now is for a later dispatch of this call.
                    false if !here && self.holds_place(&call) => {}
                    false => self.dispatch(shard, epoch, call, frame, live && here),
                }
            }
            ToAgent::Pass { shard, epoch, incarnation, frame, .. } => {
                // What was on its way to a process that is gone would be taken for an answer by the next one.
                if self.fence(shard, epoch)
                    && self.is_here(&incarnation)
                    && let Some(conn) = self.conn()
                {
                    self.effects.push_back(AgentEffect::Send { conn, frame });
                }
            }
            ToAgent::Ended { shard, epoch, call } => {
                if self.fence(shard, epoch) {
                    self.over(shard, epoch, call, false);
                    self.lend();
                }
            }
        }
    }

    fn is_here(&self, incarnation: &str) -> bool {
        self.link.as_ref().is_some_and(|l| l.capabilities.incarnation == incarnation)
    }

    fn conn(&self) -> Option<ConnId> {
        self.link.as_ref().filter(|l| l.up).map(|l| l.conn)
    }

    fn want(&mut self, shard: u32, epoch: u64, call: CallId) {
        let until = self.now_ms + WANT_MS;
        self.due = self.due.min(until);
        match self.calls.get_mut(&call).map(|(_, slot)| slot) {
            Some(Slot::Wanted { until: old, .. }) => *old = until,
            Some(Slot::Lent { .. }) => self.lent(shard, call, epoch),
            Some(Slot::Running { .. }) => {}
            Some(Slot::Over { epoch: over, .. }) if *over >= epoch => {}
            Some(Slot::Over { .. } | Slot::Lost) | None => {
                self.calls.insert(call, (shard, Slot::Wanted { epoch, until }));
                self.queue.push_back(call);
            }
        }
        self.lend();
    }

    fn back(&mut self, call: CallId) {
        match self.calls.get(&call) {
            Some((_, Slot::Wanted { .. })) => {
                self.calls.remove(&call);
                self.queue.retain(|c| *c != call);
            }
            Some((_, Slot::Lent { .. })) => {
                self.calls.remove(&call);
                self.used -= 1;
                self.lend();
            }
            Some((_, Slot::Running { .. } | Slot::Lost | Slot::Over { .. })) | None => {}
        }
    }

    fn holds_place(&self, call: &CallId) -> bool {
        matches!(self.calls.get(call), Some((_, Slot::Wanted { .. } | Slot::Lent { .. })))
    }

    fn dispatch(&mut self, shard: u32, epoch: u64, call: CallId, frame: Frame, live: bool) {
        let slot = self.calls.get(&call).map(|(_, slot)| *slot);
        let unsent = match slot {
            Some(Slot::Running { .. } | Slot::Lost) => false,
            Some(Slot::Over { unsent, .. }) => unsent,
            Some(Slot::Lent { epoch: lent, until })
                if live && lent == epoch && self.now_ms < until && self.may_leave() =>
            {
                if let Some(conn) = self.conn() {
                    self.calls.insert(call, (shard, Slot::Running { epoch }));
                    self.effects.push_back(AgentEffect::Send { conn, frame });
                }
                false
            }
            Some(Slot::Lent { .. } | Slot::Wanted { .. }) | None => {
                self.over(shard, epoch, call, true);
                true
            }
        };
        let (agent, call) = (self.name.clone(), call);
        let message =
            if unsent { FromAgent::Unsent { agent, call, epoch } } else { FromAgent::Sent { agent, call, epoch } };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
        if unsent {
            self.lend();
        }
    }

    /// True while a dispatch with a live slot may go out: connected, and not in PAUSE for longer than the grace.
    fn may_leave(&self) -> bool {
        let paused = self.status.status == Status::Pause && self.now_ms >= self.status_at + GRACE_MS;
        self.conn().is_some() && !paused
    }

    /// Asks an agent that may run the call. From now on a plain dispatch of it never leaves under this epoch.
    fn go_on(&mut self, shard: u32, epoch: u64, call: CallId, frame: Frame) {
        let Some(conn) = self.conn() else { return };
        if let Some((_, Slot::Over { epoch: over, unsent })) = self.calls.get(&call)
            && *over >= epoch
        {
            if *unsent {
                let message = FromAgent::Unsent { agent: self.name.clone(), call, epoch };
                self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
            }
            return;
        }
        match self.calls.insert(call, (shard, Slot::Running { epoch })) {
            Some((_, Slot::Running { .. } | Slot::Lent { .. })) => {}
            Some((_, Slot::Wanted { .. } | Slot::Lost | Slot::Over { .. })) | None => self.used += 1,
        }
        self.effects.push_back(AgentEffect::Send { conn, frame });
        let message = FromAgent::Sent { agent: self.name.clone(), call, epoch };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
    }

    fn over(&mut self, shard: u32, epoch: u64, call: CallId, unsent: bool) {
        match self.calls.insert(call, (shard, Slot::Over { epoch, unsent })) {
            Some((_, Slot::Lent { .. } | Slot::Running { .. })) => self.used -= 1,
            Some((_, Slot::Over { unsent: true, .. })) => {
                self.calls.insert(call, (shard, Slot::Over { epoch, unsent: true }));
                return;
            }
            Some((_, Slot::Wanted { .. } | Slot::Lost | Slot::Over { .. })) | None => {}
        }
        self.over.push_back((self.now_ms + MEMORY_MS, call));
        self.forget();
    }

    fn forget(&mut self) {
        while let Some(&(until, call)) = self.over.front() {
            if until > self.now_ms && self.over.len() <= MEMORY_MAX {
                return;
            }
            self.over.pop_front();
            if matches!(self.calls.get(&call), Some((_, Slot::Over { .. } | Slot::Lost))) {
                self.calls.remove(&call);
            }
        }
    }

    fn lapse(&mut self) {
        let now = self.now_ms;
        let before = self.calls.len();
        let mut lapsed = 0;
        self.calls.retain(|_, (_, slot)| match slot {
            Slot::Lent { until, .. } if *until <= now => {
                lapsed += 1;
                false
            }
            Slot::Wanted { until, .. } => *until > now,
            Slot::Lent { .. } | Slot::Running { .. } | Slot::Lost | Slot::Over { .. } => true,
        });
        self.used -= lapsed;
        let until = |slot: &Slot| match slot {
            Slot::Lent { until, .. } | Slot::Wanted { until, .. } => Some(*until),
            Slot::Running { .. } | Slot::Lost | Slot::Over { .. } => None,
        };
        self.due = self.calls.values().filter_map(|(_, s)| until(s)).min().unwrap_or(u64::MAX);
        if before != self.calls.len() {
            let calls = &self.calls;
            self.queue.retain(|c| matches!(calls.get(c), Some((_, Slot::Wanted { .. }))));
        }
        self.lend();
    }
}

impl Machine for Agent {
    type Input = AgentInput;
    type Effect = AgentEffect;

    fn handle(&mut self, now: Now, input: AgentInput) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        match input {
            AgentInput::Connected { conn, capabilities } => self.connected(conn, *capabilities),
            AgentInput::Status { conn, status } => self.status(conn, status),
            AgentInput::Alive { conn } => {
                let now = self.now_ms;
                if let Some(link) = self.link.as_mut().filter(|l| l.conn == conn) {
                    let silent = now >= link.alive_at + HEALTHY_MS;
                    link.alive_at = now;
                    if silent {
                        self.lend();
                    }
                }
            }
            AgentInput::Disconnected { conn } => self.disconnected(conn),
            AgentInput::Shard(message) => self.shard(message),
        }
    }

    fn poll_effect(&mut self) -> Option<AgentEffect> {
        self.effects.pop_front()
    }

    fn poll_timeout(&self) -> Option<u64> {
        (self.due < u64::MAX).then_some(self.due)
    }

    fn handle_timeout(&mut self, now: Now) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        self.lapse();
        self.forget();
    }
}

//! One agent handle: its connection, its status, and how much it is given to do at once. It lends slots to shards and passes
//! their frames on; it never touches money and never decides what a call costs.

pub mod breaker;
pub mod queue;
mod slot;
pub mod window;

pub use slot::SLOT_MS;

use crate::clock::Now;
use crate::message::{AgentEffect, AgentInput, Flow, FromAgent, Machine};
use crate::settings::Settings;
use crate::window::{Cadence, Due, effective};
use atp_proto::content::{AgentStatus, Capabilities, ListedCall, Status, WindowUpdate, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, CallId, Code, ConnId, Frame, Limit, WireError};
use breaker::{Breaker, BreakerState};
use queue::{Queue, Wish};
use slot::{Slot, Used};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use window::{Aimd, Burst, CoolOff};

/// After PAUSE or DRAINING a dispatch that was on its way to the log may leave for this long.
pub const GRACE_MS: u64 = 250;
/// An agent that answered nothing for this long gets no slot lent.
pub const HEALTHY_MS: u64 = 30_000;
/// A handle is taken while its connection was heard within this long.
const LIVE_MS: u64 = 15_000;

struct Link {
    conn: ConnId,
    capabilities: Arc<Capabilities>,
    alive_at: u64,
    up: bool,
    /// What it was told of its window.
    told: Option<Cadence>,
    /// Who lends a slot: this machine, while its agent has this connection. Behind the next one the agent may have been at another
    /// router, where it said what it doesn't run, so that what was lent before can't be used any more.
    lender: Arc<str>,
}

/// What is known of an agent's own word on how it is.
#[derive(Default)]
struct Said {
    status: AgentStatus,
    /// The incarnation whose word it is.
    of: Arc<str>,
    /// It said so to this machine, or to that of another router; else the log says it.
    here: bool,
    /// When a pause may be over at the earliest.
    retry_at: Option<u64>,
}

/// The machine of one handle; it lives across reconnects.
pub struct Agent {
    name: AgentName,
    /// One run of one router: no other machine of this handle has it.
    id: Arc<str>,
    settings: Arc<Settings>,
    now_ms: u64,
    link: Option<Link>,
    said: Said,
    /// An operator wants nothing new sent to it.
    drained: bool,
    /// Since when nothing new is lent to it, by its own word or the operator's.
    stopped_at: Option<u64>,
    /// It refused a call until then.
    skip_until: u64,
    aimd: Aimd,
    burst: Burst,
    cool_off: CoolOff,
    breaker: Breaker,
    flow: Flow,
    epochs: BTreeMap<u32, u64>,
    calls: BTreeMap<CallId, (u32, Slot)>,
    queue: Queue,
    used: Used,
    over: VecDeque<(u64, CallId)>,
    /// No slot lapses and no wish grows stale before.
    due: u64,
    /// When its window has to be looked at again.
    window_due: Option<u64>,
    effects: VecDeque<AgentEffect>,
}

impl Agent {
    #[must_use]
    pub fn new(name: AgentName, settings: Arc<Settings>, now: Now) -> Self {
        let aimd = Aimd::new(settings.flow.aimd_base);
        Self {
            name,
            id: "".into(),
            settings,
            now_ms: now.mono_ms,
            link: None,
            said: Said::default(),
            drained: false,
            stopped_at: None,
            skip_until: 0,
            aimd,
            burst: Burst::default(),
            cool_off: CoolOff::default(),
            breaker: Breaker::default(),
            flow: Flow::default(),
            epochs: BTreeMap::new(),
            calls: BTreeMap::new(),
            queue: Queue::default(),
            used: Used::default(),
            over: VecDeque::new(),
            due: u64::MAX,
            window_due: None,
            effects: VecDeque::new(),
        }
    }

    /// Of several machines of a handle, one at each router: what no other one is called, now or later.
    #[must_use]
    pub fn called(self, id: Arc<str>) -> Self {
        Self { id, ..self }
    }

    /// Takes new settings; a lower cap counts at once.
    pub fn set_settings(&mut self, settings: Arc<Settings>) {
        self.aimd.cap(settings.flow.aimd_cap);
        self.settings = settings;
    }

    #[must_use]
    pub fn name(&self) -> &AgentName {
        &self.name
    }

    /// Slots that are lent or run.
    #[must_use]
    pub fn slots_used(&self) -> u32 {
        self.used.calls
    }

    /// Calls that wait for a slot.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.queue.len()
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

    /// Its live connection and incarnation.
    #[must_use]
    pub fn link(&self) -> Option<(ConnId, &str)> {
        self.link.as_ref().filter(|l| l.up).map(|l| (l.conn, &*l.capabilities.incarnation))
    }

    /// READY, BUSY, PAUSE or DRAINING, by its own word or the operator's; `None` while it isn't connected.
    #[must_use]
    pub fn stands(&self) -> Option<Status> {
        self.is_connected().then_some(if self.drained { Status::Draining } else { self.said.status.status })
    }

    // ---- its connection ---------------------------------------------------------------------------------------------

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
        if *self.said.of != *capabilities.incarnation {
            // Another process: what the former one said of itself is no news of this one.
            self.said = Said { of: capabilities.incarnation.as_str().into(), ..Said::default() };
            self.skip_until = 0;
            self.note_stop();
        }
        let lender = format!("{}/{}", self.id, conn.0).into();
        self.link =
            Some(Link { conn, capabilities: capabilities.clone(), alive_at: now, up: true, told: None, lender });
        // Its calls may be of owners that this machine has not heard of; what their predecessors say is fenced from now on.
        for call in &capabilities.calls {
            self.fence(call.shard, call.epoch);
        }
        for call in capabilities.calls.iter().filter(|c| !c.done) {
            self.listed(call.call_id, call.shard, call.epoch);
        }
        self.up(None);
        self.lend();
    }

    fn up(&mut self, shard: Option<u32>) {
        let Some(link) = self.link.as_ref().filter(|l| l.up) else { return };
        let mut capabilities = link.capabilities.clone();
        let unlisted = self.calls.iter().filter_map(|(id, (shard, slot))| match slot {
            Slot::Running { epoch, .. } => Some((*id, *shard, *epoch)),
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
        let status = self.said.here.then(|| self.said.status.clone());
        let message = FromAgent::Up { agent: self.name.clone(), capabilities, status, drained: self.drained };
        self.effects.push_back(AgentEffect::ToShard { shard, message });
        self.tell_flow(shard);
    }

    fn disconnected(&mut self, conn: ConnId) {
        let Some(link) = self.link.as_mut().filter(|l| l.conn == conn && l.up) else { return };
        link.up = false;
        let incarnation = link.capabilities.incarnation.as_str().into();
        let message = FromAgent::Down { agent: self.name.clone(), incarnation };
        self.effects.push_back(AgentEffect::ToShard { shard: None, message });
    }

    fn conn(&self) -> Option<ConnId> {
        self.link.as_ref().filter(|l| l.up).map(|l| l.conn)
    }

    fn alive(&mut self, conn: ConnId) {
        let now = self.now_ms;
        if let Some(link) = self.link.as_mut().filter(|l| l.conn == conn) {
            let silent = now >= link.alive_at + HEALTHY_MS;
            link.alive_at = now;
            if silent {
                self.lend();
            }
        }
    }

    // ---- its status -------------------------------------------------------------------------------------------------

    fn status(&mut self, conn: ConnId, status: AgentStatus) {
        if self.link.as_ref().is_none_or(|l| l.conn != conn || !l.up) {
            return;
        }
        self.hear(status.clone(), true);
        let message = FromAgent::Status { agent: self.name.clone(), status };
        self.effects.push_back(AgentEffect::ToShard { shard: None, message });
        self.lend();
    }

    /// Its newest word counts, wherever it said it: it may come back without saying it again.
    fn said_elsewhere(&mut self, incarnation: Arc<str>, status: AgentStatus) {
        if !self.is_connected() {
            self.said.of = incarnation;
            self.hear(status, true);
        }
    }

    fn hear(&mut self, status: AgentStatus, here: bool) {
        self.said.retry_at = status.retry_after_ms.map(|ms| self.now_ms.saturating_add(ms));
        self.said.status = status;
        self.said.here = here;
        self.note_stop();
    }

    /// What the log says of an agent that hasn't spoken here, and the operator's word.
    fn standing(&mut self, incarnation: &Arc<str>, status: Option<AgentStatus>, drained: bool) {
        let unknown = !self.said.here && (self.link.is_none() || self.said.of == *incarnation);
        if let Some(status) = status.filter(|_| unknown) {
            self.said.of = incarnation.clone();
            self.hear(status, false);
            // Its grace was over before this machine began.
            self.stopped_at = self.stopped_at.map(|_| 0);
        }
        self.drained = drained;
        self.note_stop();
    }

    /// A shard that hasn't it in its own log hears how the agent stands.
    fn stands_told(&mut self, shard: u32) {
        if !self.is_connected() {
            return;
        }
        self.up(Some(shard));
        if !self.said.here && self.said.status != AgentStatus::default() {
            let message = FromAgent::Status { agent: self.name.clone(), status: self.said.status.clone() };
            self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
        }
    }

    fn takes_work(&self) -> bool {
        !self.drained && matches!(self.said.status.status, Status::Ready | Status::Busy)
    }

    fn note_stop(&mut self) {
        self.stopped_at = if self.takes_work() { None } else { self.stopped_at.or(Some(self.now_ms)) };
    }

    /// Gold may pass a pause by explicit policy: one call in flight, and never before the agent's own `retry_after_ms`.
    fn gold_may_pass(&self) -> bool {
        self.settings.flow.gold_passes_pause
            && !self.drained
            && self.said.status.status == Status::Pause
            && self.said.retry_at.is_some_and(|at| self.now_ms >= at)
    }

    /// True while a dispatch with a live slot may go out: connected, and not stopped for longer than the grace.
    fn may_leave(&self, gold: bool) -> bool {
        let stopped = self.stopped_at.is_some_and(|at| self.now_ms >= at + GRACE_MS);
        self.conn().is_some() && (!stopped || (gold && self.gold_may_pass()))
    }

    fn is_healthy(&self) -> bool {
        self.link.as_ref().is_some_and(|l| l.up && self.now_ms < l.alive_at + HEALTHY_MS)
    }

    // ---- its window -------------------------------------------------------------------------------------------------

    /// Calls that may run at once: the least of what its results have earned, the router's window, its own and the one
    /// that it suggests (ATP-8-8).
    #[must_use]
    pub fn window(&self) -> u32 {
        let own = self.link.as_ref().map_or(0, |l| l.capabilities.max_parallel);
        let suggested = self.said.status.suggested_window.and_then(|w| w.max_parallel).unwrap_or(u32::MAX);
        let earned = self.cool_off.of(self.aimd.limit());
        own.min(self.settings.agent_window.max_parallel.unwrap_or(u32::MAX)).min(suggested).min(earned)
    }

    /// Its window of tokens and micro-USD.
    fn amounts(&self) -> WindowView {
        let Limit { tokens, usd_micros } = self.settings.agent_window.limit;
        let own = WindowView { max_parallel: None, max_tokens: tokens, max_usd_micros: usd_micros };
        effective(own, self.said.status.suggested_window.unwrap_or_default())
    }

    /// Tells the agent itself what of its window is free (ATP-10-1), when that has moved.
    fn tell_window(&mut self) {
        self.window_due = None;
        let takes = self.takes_work() && self.breaker.state() != BreakerState::Open && self.now_ms >= self.skip_until;
        let calls = if takes { self.window().saturating_sub(self.used.calls) } else { 0 };
        let (limit, used) = (self.amounts(), self.used.amount);
        let window = WindowView {
            max_parallel: Some(calls),
            max_tokens: limit.max_tokens.map(|most| most.less(used.tokens)),
            max_usd_micros: limit.max_usd_micros.map(|most| most.less(used.usd_micros)),
        };
        let now = self.now_ms;
        let Some(link) = self.link.as_mut().filter(|l| l.up) else { return };
        match link.told.as_mut().map_or(Due::Now, |told| told.look(window, now)) {
            Due::Never => {}
            Due::At(at) => self.window_due = Some(at),
            Due::Now => {
                link.told = Some(Cadence::new(window, now));
                let content = WindowUpdate { scope: format!("agent:{}", self.name), window };
                let frame = Frame::json("", 0, Flags::NONE, kind::WINDOW_UPDATE, &content);
                self.effects.push_back(AgentEffect::Send { conn: link.conn, frame });
            }
        }
    }

    /// Whether what is outstanding leaves room for a call of this amount. One that is larger than the whole window may run
    /// alone; a window of zero takes none.
    fn has_room(&self, amount: Amount) -> bool {
        let WindowView { max_tokens: tokens, max_usd_micros: usd, .. } = self.amounts();
        let fits = |used: u64, more: u64, most: Option<u64>| {
            most.is_none_or(|most| most > 0 && used.saturating_add(more.min(most)) <= most)
        };
        fits(self.used.amount.tokens.0, amount.tokens.0, tokens.map(|t| t.0))
            && fits(self.used.amount.usd_micros.0, amount.usd_micros.0, usd.map(|u| u.0))
    }

    /// Who gets the next slot, if there is one to lend now.
    fn next_in_turn(&mut self) -> Option<(CallId, Wish)> {
        if self.queue.is_empty() || !self.is_healthy() || self.now_ms < self.skip_until {
            return None;
        }
        self.breaker.tick(self.now_ms);
        self.cool_off.decay(self.now_ms);
        let window = self.window();
        let burst = self.burst.left(self.now_ms, self.settings.flow.burst);
        if self.used.calls >= window || self.used.lent >= burst || !self.breaker.lets_pass() {
            return None;
        }
        let next = match self.takes_work() {
            true => self.queue.next(self.used.gold, window),
            false if self.gold_may_pass() && self.used.calls == 0 => self.queue.next_gold(),
            false => None,
        };
        let (call, wish) = next?;
        self.has_room(wish.amount).then(|| (call, wish.clone()))
    }

    fn flow_now(&self) -> Flow {
        Flow {
            window: self.window(),
            aimd: self.aimd.limit(),
            breaker: self.breaker.state(),
            surcharge_ppm: self.cool_off.surcharge_ppm(),
            healthy: self.is_healthy(),
        }
    }

    fn tell_flow(&mut self, shard: Option<u32>) {
        self.flow = self.flow_now();
        let message = FromAgent::Flow { agent: self.name.clone(), flow: self.flow };
        self.effects.push_back(AgentEffect::ToShard { shard, message });
    }

    /// After each input: time's doings, and what shards should know of them.
    fn settle(&mut self) {
        self.breaker.tick(self.now_ms);
        self.cool_off.decay(self.now_ms);
        if self.link.is_some() && self.flow != self.flow_now() {
            self.tell_flow(None);
        }
        self.tell_window();
    }
}

impl Machine for Agent {
    type Input = AgentInput;
    type Effect = AgentEffect;

    fn handle(&mut self, now: Now, input: AgentInput) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        if self.now_ms >= self.due {
            self.lapse();
        }
        match input {
            AgentInput::Connected { conn, capabilities } => self.connected(conn, *capabilities),
            AgentInput::Status { conn, status } => self.status(conn, status),
            AgentInput::SaidElsewhere { incarnation, status } => self.said_elsewhere(incarnation, status),
            AgentInput::Alive { conn } => self.alive(conn),
            AgentInput::Disconnected { conn } => self.disconnected(conn),
            AgentInput::Shard(message) => self.shard(message),
        }
        self.settle();
    }

    fn poll_effect(&mut self) -> Option<AgentEffect> {
        self.effects.pop_front()
    }

    fn poll_timeout(&self) -> Option<u64> {
        let waiting = !self.queue.is_empty();
        let health = self.link.as_ref().filter(|l| l.up).map(|l| l.alive_at + HEALTHY_MS);
        let burst = self.burst.next_at().filter(|_| waiting);
        let skip = waiting.then_some(self.skip_until);
        let retry = self.said.retry_at.filter(|_| waiting && self.settings.flow.gold_passes_pause);
        let by_time = [health, burst, skip, retry, self.breaker.next_at(), self.cool_off.next_at(), self.window_due];
        // What lies behind has been looked at.
        let next = by_time.into_iter().flatten().filter(|at| *at > self.now_ms).min();
        [next, (self.due < u64::MAX).then_some(self.due)].into_iter().flatten().min()
    }

    fn handle_timeout(&mut self, now: Now) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        self.lapse();
        self.forget();
        self.lend();
        self.settle();
    }
}

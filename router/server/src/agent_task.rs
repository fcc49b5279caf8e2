//! The owner task of each `Agent`, by handle, living across reconnects, and the list of them.
//! Never touches money; a call's frames go past it, straight to the shard. An agent of another router has no task here.

use crate::call_routes::{CallRoutes, Via};
use crate::inbox::ToShard;
use crate::metric;
use crate::outbox::Outbox;
use crate::peer::{Peers, say};
use crate::shards::Shards;
use crate::time::Clocks;
use atp_core::agent::Agent;
use atp_core::message::{AgentEffect, AgentInput, Flow, FromAgent, Machine, ToAgent};
use atp_core::settings::Settings;
use atp_proto::content::{AgentRoute, AgentStatus, Capabilities, Status};
use atp_proto::limits::UNSENT_FULL_MS;
use atp_proto::{AgentName, Code, ConnId, Frame, WireError};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

/// Messages that may wait for one agent's task.
const MESSAGES_MAX: usize = 1024;
/// Every shard is told how much the agent is given at most so often, unless it has become well or unwell: it moves with each
/// result, and a slot is lent by the agent alone.
const FLOW_EVERY: Duration = Duration::from_millis(50);

/// One message to the owner task of an agent.
pub(crate) enum AgentMessage {
    /// Hello and capabilities are read. `up` is answered when the shards have been told, so that no frame overtakes it.
    Connected {
        conn: ConnId,
        capabilities: Box<Capabilities>,
        outbox: Outbox,
        up: oneshot::Sender<()>,
    },
    Status {
        conn: ConnId,
        status: AgentStatus,
    },
    SaidElsewhere {
        incarnation: Arc<str>,
        status: AgentStatus,
    },
    Alive {
        conn: ConnId,
    },
    Disconnected {
        conn: ConnId,
    },
    Shard(Vec<ToAgent>, Via),
    /// It is connected to another router, and that counts.
    Elsewhere(WireError),
    Settings(Arc<Settings>),
}

/// The way to one agent's task.
#[derive(Clone)]
pub(crate) struct AgentHandle {
    pub(crate) queue: mpsc::Sender<AgentMessage>,
    /// Unix milliseconds of its last sign of life; 0: none.
    last_heartbeat_ms: Arc<AtomicU64>,
    slots_used: Arc<AtomicU32>,
    routes: Arc<Mutex<CallRoutes>>,
    here: Arc<Mutex<Option<Presence>>>,
}

/// The live connection of an agent.
#[derive(Clone)]
struct Presence {
    conn: ConnId,
    incarnation: String,
    since: Instant,
}

impl AgentHandle {
    /// Which shard each of its calls belongs to.
    pub(crate) fn routes(&self) -> MutexGuard<'_, CallRoutes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn route(&self, name: &AgentName, wall_ms: u64) -> Option<AgentRoute> {
        let here = self.here.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let heard_ms = wall_ms.saturating_sub(self.last_heartbeat_ms.load(Ordering::Relaxed));
        let connected_ms = u64::try_from(here.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(AgentRoute { agent_prefix: name.clone(), incarnation: here.incarnation, connected_ms, heard_ms })
    }
}

/// All agents of this process.
#[derive(Clone)]
pub(crate) struct Agents {
    list: Arc<Mutex<BTreeMap<AgentName, AgentHandle>>>,
    /// This run of this router: what its machines are called, and no others.
    run: Arc<str>,
    settings: Arc<Mutex<Arc<Settings>>>,
    shards: Shards,
    clocks: Clocks,
    tasks: TaskTracker,
    agents_max: usize,
    peers: Peers,
}

impl Agents {
    pub(crate) fn new(
        settings: Arc<Settings>,
        shards: Shards,
        clocks: Clocks,
        tasks: TaskTracker,
        agents_max: usize,
        peers: Peers,
    ) -> Self {
        let (list, settings) = (Arc::default(), Arc::new(Mutex::new(settings)));
        let run = uuid::Uuid::new_v4().simple().to_string().into();
        Self { list, run, settings, shards, clocks, tasks, agents_max, peers }
    }

    /// The agent's task, started if it doesn't run yet.
    ///
    /// # Errors
    /// ELIMIT when there are too many handles.
    pub(crate) fn of(&self, name: &AgentName) -> Result<AgentHandle, WireError> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = list.get(name) {
            return Ok(handle.clone());
        }
        if list.len() >= self.agents_max {
            return Err(WireError::new(
                Code::Limit,
                "agents: this router has no room for another agent handle (limits.agents)",
            )
            .used(list.len() as u64, self.agents_max as u64)
            .scope(format!("agent:{name}")));
        }
        let (sender, queue) = mpsc::channel(MESSAGES_MAX);
        let handle = AgentHandle {
            queue: sender,
            last_heartbeat_ms: Arc::default(),
            slots_used: Arc::default(),
            routes: Arc::default(),
            here: Arc::default(),
        };
        let settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let machine = Agent::new(name.clone(), settings, self.clocks.now()).called(self.run.clone());
        let task = AgentTask {
            machine,
            queue,
            shards: self.shards.clone(),
            clocks: self.clocks,
            last_heartbeat_ms: handle.last_heartbeat_ms.clone(),
            slots_used: handle.slots_used.clone(),
            routes: handle.routes.clone(),
            here: handle.here.clone(),
            peers: self.peers.clone(),
            connections: BTreeMap::new(),
            flow: None,
            told: None,
            shown: None,
        };
        self.tasks.spawn(task.run());
        list.insert(name.clone(), handle.clone());
        Ok(handle)
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// The task of an agent that was here already.
    pub(crate) fn known(&self, name: &AgentName) -> Option<AgentHandle> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Tells an agent, at whichever router it is, as many of these messages as there is room for; true: all of them.
    ///
    /// # Errors
    /// ELIMIT when there are too many handles.
    pub(crate) fn tell(&self, name: &AgentName, messages: &mut Vec<ToAgent>) -> Result<bool, WireError> {
        if let Some(link) = self.peers.link_of(name) {
            let told = messages.iter().take_while(|message| link.send_one(say::to_agent(name, message))).count();
            messages.drain(..told);
            return Ok(messages.is_empty());
        }
        let sent = self.of(name)?.queue.try_send(AgentMessage::Shard(std::mem::take(messages), Via::Here));
        if let Err(TrySendError::Full(AgentMessage::Shard(back, _))) = sent {
            *messages = back;
        }
        Ok(messages.is_empty())
    }

    /// The agents that have a task, or are at another router.
    pub(crate) fn names(&self) -> Vec<AgentName> {
        let mut names = self.peers.far_agents();
        names.extend(self.list.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned());
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The agents that are connected here.
    pub(crate) fn here(&self) -> Vec<AgentRoute> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.iter().filter_map(|(name, handle)| handle.route(name, self.clocks.now().wall_ms)).collect()
    }

    /// Unix milliseconds of the agent's last sign of life.
    pub(crate) fn last_heartbeat_ms(&self, name: &AgentName) -> Option<u64> {
        if let Some(ago) = self.peers.unheard_ms(name) {
            return Some(self.clocks.now().wall_ms.saturating_sub(ago));
        }
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.get(name).map(|h| h.last_heartbeat_ms.load(Ordering::Relaxed)).filter(|ms| *ms > 0)
    }

    /// Slots that are lent or run, of all shards.
    pub(crate) fn slots_used(&self, name: &AgentName) -> u32 {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.get(name).map_or(0, |h| h.slots_used.load(Ordering::Relaxed))
    }

    /// Hands new settings to every agent.
    pub(crate) async fn set_settings(&self, settings: &Arc<Settings>) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings.clone();
        let handles: Vec<AgentHandle> =
            self.list.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        for handle in handles {
            let _ = handle.queue.send(AgentMessage::Settings(settings.clone())).await;
        }
    }

    /// Ends every agent's task once its queue is empty.
    pub(crate) fn close(&self) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// A connection of this agent: the newest, and older ones until they are closed.
struct Connection {
    outbox: Outbox,
    /// Frames that the outbox had no room for. They share their content with the shard's memory.
    waiting: VecDeque<Frame>,
    full_since: Option<Instant>,
}

struct AgentTask {
    machine: Agent,
    queue: mpsc::Receiver<AgentMessage>,
    shards: Shards,
    clocks: Clocks,
    last_heartbeat_ms: Arc<AtomicU64>,
    slots_used: Arc<AtomicU32>,
    routes: Arc<Mutex<CallRoutes>>,
    here: Arc<Mutex<Option<Presence>>>,
    peers: Peers,
    connections: BTreeMap<ConnId, Connection>,
    /// How much it is given, where the shards haven't all been told; what they were told last, and when.
    flow: Option<Flow>,
    told: Option<(Flow, Instant)>,
    /// Its status and the calls that wait for it, as the metrics say.
    shown: Option<(&'static str, usize)>,
}

impl AgentTask {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(64);
        loop {
            let timeout = self.machine.poll_timeout().map(|at| self.clocks.instant(at));
            let waiting = self.connections.values().find(|c| !c.waiting.is_empty()).map(|c| c.outbox.clone());
            let flow = self.flow.and(self.told).map(|(_, at)| at + FLOW_EVERY);
            tokio::select! {
                n = self.queue.recv_many(&mut batch, 256) => if n == 0 { return },
                () = sleep_until(timeout), if timeout.is_some() => {}
                () = sleep_until(flow), if flow.is_some() => {}
                () = room_or_a_second(waiting.as_ref()), if waiting.is_some() => {}
            }
            let now = self.clocks.now();
            if self.machine.poll_timeout().is_some_and(|at| at <= now.mono_ms) {
                self.machine.handle_timeout(now);
            }
            let mut ups = Vec::new();
            for message in batch.drain(..) {
                match message {
                    AgentMessage::Connected { conn, capabilities, outbox, up } => {
                        self.connections
                            .insert(conn, Connection { outbox, waiting: VecDeque::new(), full_since: None });
                        self.alive(now.wall_ms);
                        self.routes().listed(&capabilities.calls);
                        self.machine.handle(now, AgentInput::Connected { conn, capabilities });
                        ups.push(up);
                    }
                    AgentMessage::Status { conn, status } => {
                        self.machine.handle(now, AgentInput::Status { conn, status });
                    }
                    AgentMessage::SaidElsewhere { incarnation, status } => {
                        self.machine.handle(now, AgentInput::SaidElsewhere { incarnation, status });
                    }
                    AgentMessage::Alive { conn } => {
                        self.alive(now.wall_ms);
                        self.machine.handle(now, AgentInput::Alive { conn });
                    }
                    AgentMessage::Disconnected { conn } => {
                        self.connections.remove(&conn);
                        self.machine.handle(now, AgentInput::Disconnected { conn });
                    }
                    AgentMessage::Elsewhere(error) => {
                        for (conn, connection) in std::mem::take(&mut self.connections) {
                            connection.outbox.close(Some(error.clone()));
                            self.machine.handle(now, AgentInput::Disconnected { conn });
                        }
                    }
                    AgentMessage::Shard(messages, via) => {
                        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
                        messages.iter().for_each(|message| routes.note(message, &via));
                        drop(routes);
                        for message in messages {
                            self.machine.handle(now, AgentInput::Shard(message));
                        }
                    }
                    AgentMessage::Settings(settings) => self.machine.set_settings(settings),
                }
            }
            self.show();
            self.note_presence();
            for (shard, told) in self.drain() {
                let Some(inbox) = self.shards.at(shard) else { continue };
                // A shard that has ended asks who is here when it begins anew.
                let _ = inbox.send(256 * told.len(), ToShard::Agent(told)).await;
            }
            for up in ups {
                let _ = up.send(());
            }
        }
    }

    fn show(&mut self) {
        self.slots_used.store(self.machine.slots_used(), Ordering::Relaxed);
        let status = self.machine.stands().map_or(metric::GONE, Status::as_str);
        let now = (status, self.machine.waiting());
        if self.shown != Some(now) {
            self.shown = Some(now);
            metric::agent(self.machine.name(), status, now.1);
        }
    }

    /// Other routers hear of an agent that came or went.
    fn note_presence(&mut self) {
        let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
        let link = self.machine.link();
        if here.as_ref().map(|h| (h.conn, &*h.incarnation)) == link {
            return;
        }
        *here = link.map(|(conn, incarnation)| {
            self.peers.is_here(self.machine.name());
            Presence { conn, incarnation: incarnation.into(), since: Instant::now() }
        });
        drop(here);
        self.peers.agents_changed();
    }

    fn alive(&self, wall_ms: u64) {
        self.last_heartbeat_ms.store(wall_ms, Ordering::Relaxed);
    }

    fn routes(&self) -> MutexGuard<'_, CallRoutes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every shard, wherever it is.
    fn tell_all(&self, told: &mut BTreeMap<u32, Vec<FromAgent>>, message: &FromAgent) {
        self.peers.tell_all(message);
        for (shard, _) in self.shards.all_here() {
            told.entry(shard).or_default().push(message.clone());
        }
    }

    /// Carries out what the machine wants; returns what the shards are told.
    fn drain(&mut self) -> BTreeMap<u32, Vec<FromAgent>> {
        let mut told: BTreeMap<u32, Vec<FromAgent>> = BTreeMap::new();
        while let Some(effect) = self.machine.poll_effect() {
            match effect {
                AgentEffect::Send { conn, frame } => {
                    if let Some(connection) = self.connections.get_mut(&conn) {
                        connection.waiting.push_back(frame);
                    }
                }
                AgentEffect::Close { conn, error } => {
                    if let Some(mut connection) = self.connections.remove(&conn) {
                        connection.outbox.send(&mut connection.waiting);
                        connection.outbox.close(Some(error));
                    }
                }
                AgentEffect::ToShard { shard: None, message: FromAgent::Flow { agent, flow } } => {
                    metric::agent_flow(&agent, &flow);
                    self.flow = Some(flow);
                }
                AgentEffect::ToShard { shard: Some(shard), message } => {
                    if let FromAgent::Unsent { call, .. } = &message {
                        self.routes().ended(call);
                    }
                    match self.routes().via(shard) {
                        Via::Here => told.entry(shard).or_default().push(message),
                        Via::Link(link) => say::or_close(&link, say::from_agent(Some(shard), &message)),
                    }
                }
                // It left here, and is connected elsewhere.
                AgentEffect::ToShard { shard: None, message: FromAgent::Down { .. } }
                    if self.peers.is_far(self.machine.name()) => {}
                AgentEffect::ToShard { shard: None, message } => {
                    if matches!(message, FromAgent::Up { .. }) {
                        self.told = None;
                    }
                    self.tell_all(&mut told, &message);
                }
            }
        }
        if let Some(flow) = self.flow {
            let well = |flow: &Flow| (flow.healthy, flow.breaker);
            let now = Instant::now();
            if self.told.is_none_or(|(last, at)| well(&last) != well(&flow) || now >= at + FLOW_EVERY) {
                let agent = self.machine.name().clone();
                self.tell_all(&mut told, &FromAgent::Flow { agent, flow });
                (self.flow, self.told) = (None, Some((flow, now)));
            }
        }
        for connection in self.connections.values_mut().filter(|c| !c.waiting.is_empty()) {
            connection.outbox.send(&mut connection.waiting);
            if connection.waiting.is_empty() {
                connection.full_since = None;
                continue;
            }
            let full_since = *connection.full_since.get_or_insert_with(Instant::now);
            if full_since.elapsed().as_millis() >= u128::from(UNSENT_FULL_MS) {
                connection.waiting.clear();
                let error =
                    WireError::new(Code::Limit, "unsent bytes: the agent took nothing for 10 s while 8 MiB waited");
                connection.outbox.close(Some(error));
            }
        }
        told
    }
}

async fn room_or_a_second(outbox: Option<&Outbox>) {
    if let Some(outbox) = outbox {
        let _ = tokio::time::timeout(Duration::from_secs(1), outbox.room()).await;
    }
}

pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

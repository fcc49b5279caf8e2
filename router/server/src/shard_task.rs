//! The owner task of a shard: takes a batch of inputs, reads the clocks once, lets the core decide, carries out the effects.
//! Decides nothing itself but what the process's bounds demand. One task, no locks.

use crate::agent_task::{Agents, sleep_until};
use crate::catch_up::Replay;
use crate::clients::Clients;
use crate::connection::not_here;
use crate::denials::{Denial, Denials, Verdict};
use crate::inbox::{Inbox, Taking, ToShard};
use crate::lessons::Lessons;
use crate::log::{Event, Events, Guarantee, Log, LogError, QueuedEntry, Source};
use crate::metric::{self, Facts, Part};
use crate::peer::say;
use crate::shards::{Place, Shards};
use crate::time::Clocks;
use crate::tool::Tools;
use atp_core::clock::Now;
use atp_core::escrow::Escrow;
use atp_core::message::{Answer, Effect, FromAgent, Input, LogRoom, Machine, ToAgent};
use atp_core::shard::Shard;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Flags, Frame};
use metrics::{Histogram, gauge, histogram};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Messages that are taken at once; the bytes are bounded by the inbox.
const BATCH_MAX: usize = 64;
/// How often an agent whose queue is full is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// What others may know of the shard without asking it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    /// Serving: the own Epoch is durable.
    pub(crate) serving: bool,
    pub(crate) guarantee: Guarantee,
    pub(crate) room: LogRoom,
    pub(crate) durable: u64,
    /// The own epoch, and when this owner began, Unix milliseconds.
    pub(crate) epoch: u64,
    pub(crate) since_ms: u64,
    /// When the log was asked last whether another router has begun to own the shard, and said no; `None`: none can.
    pub(crate) alone_at: Option<Instant>,
    /// Why the router has stopped.
    pub(crate) failed: Option<String>,
    /// Wall clock minus logged time, and when that was looked at.
    pub(crate) clock_ms: i64,
    pub(crate) clock_at: Option<Instant>,
}

impl Health {
    /// The shard is served, and nobody else had begun to own it since this process last stood still (`None`: it never has).
    pub(crate) fn is_owned(&self, woke: Option<Instant>) -> bool {
        let is_doubtful = || woke.zip(self.alone_at).is_some_and(|(woke, at)| at < woke);
        self.serving && self.failed.is_none() && !is_doubtful()
    }
}

/// What the task needs to begin.
pub(crate) struct Begin {
    pub(crate) number: u32,
    pub(crate) shard: Shard,
    pub(crate) taking: Taking,
    pub(crate) inbox: Inbox,
    pub(crate) log: Box<dyn Log>,
    pub(crate) agents: Agents,
    pub(crate) shards: Shards,
    pub(crate) clocks: Clocks,
    pub(crate) source: Source,
    pub(crate) health: watch::Sender<Health>,
    pub(crate) stop: CancellationToken,
    /// No other router can own the shard: of one that failed its place goes on to say why.
    pub(crate) alone: bool,
    pub(crate) tasks: TaskTracker,
    pub(crate) tools: Tools,
    pub(crate) lessons: Lessons,
    /// Open streams of all shards that run here.
    pub(crate) open: Arc<AtomicUsize>,
}

/// One shard's part of the streams that are open in a router; given back when the shard ends.
struct Open {
    all: Arc<AtomicUsize>,
    own: usize,
}

impl Open {
    /// Tells it, and how many others are open in the other shards.
    fn count(&mut self, own: usize) -> usize {
        let before = std::mem::replace(&mut self.own, own);
        let all = match own.checked_sub(before) {
            Some(more) => self.all.fetch_add(more, Ordering::Relaxed) + more,
            None => self.all.fetch_sub(before - own, Ordering::Relaxed) - (before - own),
        };
        all.saturating_sub(own)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

pub(crate) struct ShardTask {
    number: u32,
    shard: Shard,
    taking: Taking,
    /// The way into itself, for those who work for it.
    inbox: Inbox,
    log: Box<dyn Log>,
    events: Events,
    agents: Agents,
    shards: Shards,
    tools: Tools,
    lessons: Lessons,
    open: Open,
    clocks: Clocks,
    health: watch::Sender<Health>,
    stop: CancellationToken,
    alone: bool,
    clients: Clients,
    asked: BTreeMap<u64, oneshot::Sender<Answer>>,
    next_ask: u64,
    denials: Denials,
    /// Who waits until no stream is open.
    draining: Vec<oneshot::Sender<()>>,
    appends: Vec<QueuedEntry>,
    /// Last position and time of each append that isn't durable yet.
    in_flight: VecDeque<(u64, Instant)>,
    /// Messages for agents, grouped; what an agent's full queue refused stays here and is tried again.
    to_agents: BTreeMap<AgentName, Vec<ToAgent>>,
    /// A checkpoint waits until the disk has room: what is left belongs to the calls that run.
    checkpoint_waits: bool,
    meters: Meters,
}

struct Meters {
    append_seconds: Histogram,
    inbox_bytes: Part,
    lag_entries: Part,
    facts: Facts,
}

/// Writes what is queued and seals. That waits for the disk and for threads, so no async worker does it.
async fn close(log: Box<dyn Log>) -> Result<(), String> {
    let closed = tokio::task::spawn_blocking(move || log.close()).await;
    closed.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// The same whether an append or the log's news tells it first.
fn log_failed(why: &LogError) -> String {
    format!("the log failed, so nothing is acknowledged any more: {why}")
}

impl ShardTask {
    pub(crate) fn new(begin: Begin) -> Self {
        let placement = begin.shards.placement().clone();
        Self {
            clients: Clients::new(placement.shards(), begin.inbox.clone(), begin.source, begin.tasks),
            inbox: begin.inbox,
            number: begin.number,
            shard: begin.shard,
            taking: begin.taking,
            events: begin.log.events(),
            log: begin.log,
            agents: begin.agents,
            shards: begin.shards,
            tools: begin.tools,
            lessons: begin.lessons,
            open: Open { all: begin.open, own: 0 },
            clocks: begin.clocks,
            health: begin.health,
            stop: begin.stop,
            alone: begin.alone,
            asked: BTreeMap::new(),
            next_ask: 1,
            denials: Denials::default(),
            draining: Vec::new(),
            appends: Vec::new(),
            in_flight: VecDeque::new(),
            to_agents: BTreeMap::new(),
            checkpoint_waits: false,
            meters: Meters {
                append_seconds: histogram!("atp_log_append_seconds"),
                inbox_bytes: Part::of(gauge!("atp_shard_inbox_bytes")),
                lag_entries: Part::of(gauge!("atp_log_lag_entries")),
                facts: Facts::of(begin.number, placement),
            },
        }
    }

    /// Runs until it is stopped or the log fails; the log is sealed and closed in the first case.
    ///
    /// # Errors
    /// Why the log can't be written any more. Nothing may be served after that.
    pub(crate) async fn run(mut self) -> Result<(), String> {
        let ended = self.serve().await;
        // Before its clients hear of it, or they would come back here.
        if ended.is_ok() || !self.alone {
            self.shards.set(self.number, Place::Unknown);
        }
        for message in self.taking.close().await {
            self.unread(message);
        }
        for denial in self.denials.end() {
            self.ask_again(denial);
        }
        self.clients.flush();
        self.clients.end(self.number, &not_here());
        match ended {
            Ok(()) => {
                self.health.send_modify(|h| h.serving = false);
                close(self.log).await
            }
            Err(why) => {
                self.health.send_modify(|h| {
                    h.serving = false;
                    h.failed = Some(why.clone());
                });
                // Gives the lock back; what it says of the failure is known.
                let _ = close(self.log).await;
                Err(why)
            }
        }
    }

    /// A message that came too late: who sent it may have to send it again, elsewhere.
    fn unread(&mut self, message: ToShard) {
        match message {
            ToShard::Opened { conn, tenant, outbox, bounds } => self.clients.open(conn, tenant, outbox, bounds),
            ToShard::Resume { conn, tenant, outbox, bounds, .. } => {
                self.clients.open(conn, tenant, outbox, bounds);
                self.clients.unread(conn);
            }
            ToShard::Frames { conn, frames } if !frames.is_empty() => self.clients.unread(conn),
            ToShard::Gone { conn } => self.clients.gone(conn),
            _ => {}
        }
    }

    async fn serve(&mut self) -> Result<(), String> {
        self.open.count(self.shard.streams_open());
        // The Epoch of this owner.
        self.drain().await?;
        if self.health.borrow().serving {
            self.ask_who_is_here();
        }
        let mut batch = Vec::with_capacity(BATCH_MAX);
        let stop = self.stop.clone();
        let stopped = stop.cancelled();
        tokio::pin!(stopped);
        loop {
            let timeout = self.shard.poll_timeout().map(|at| self.clocks.instant(at));
            let retry = (!self.to_agents.is_empty()).then(|| Instant::now() + RETRY);
            let late = self.denials.next_late();
            let event = tokio::select! {
                biased;
                event = self.events.next() => Some(event.ok_or("the log was closed under the shard")?),
                _ = self.taking.take(&mut batch, BATCH_MAX) => None,
                () = sleep_until(timeout), if timeout.is_some() => None,
                () = sleep_until(retry), if retry.is_some() => None,
                () = sleep_until(late), if late.is_some() => None,
                () = &mut stopped => return self.drain().await,
            };
            let elsewhere = self.open.count(self.shard.streams_open());
            self.shard.set_open_elsewhere(elsewhere);
            let now = self.clocks.now();
            if let Some(event) = event {
                self.news(now, event)?;
                while let Some(event) = self.events.try_next() {
                    self.news(now, event)?;
                }
            }
            for denial in self.denials.late() {
                self.ask_again(denial);
            }
            if self.shard.poll_timeout().is_some_and(|at| at <= now.mono_ms) {
                self.shard.handle_timeout(now);
            }
            if !batch.is_empty() {
                self.meters.inbox_bytes.set(self.taking.bytes() as f64);
                let mut weight = 0;
                for (w, message) in batch.drain(..) {
                    weight += w as usize;
                    self.message(now, message).await;
                }
                self.taking.release(weight);
            }
            // Before it is told what was decided: who comes next in another shard finds it counted.
            self.open.count(self.shard.streams_open());
            self.drain().await?;
            if self.shard.streams_open() == 0 {
                for over in self.draining.drain(..) {
                    let _ = over.send(());
                }
            }
        }
    }

    fn news(&mut self, now: Now, event: Event) -> Result<(), String> {
        match event {
            Event::Alone { at } => {
                let at = Instant::from_std(at);
                self.health.send_modify(|h| h.alone_at = Some(at));
                for denial in self.denials.said_by(at) {
                    self.say(denial);
                }
            }
            Event::Durable { position } => {
                let at = Instant::now();
                while self.in_flight.front().is_some_and(|(last, _)| *last <= position) {
                    let (_, since) = self.in_flight.pop_front().expect("looked at just now");
                    self.meters.append_seconds.record((at - since).as_secs_f64());
                }
                self.shard.handle(now, Input::Durable { position });
                self.lag(position);
                let clock_ms = i64::try_from(now.wall_ms)
                    .unwrap_or(i64::MAX)
                    .saturating_sub_unsigned(self.shard.state().logged_ms());
                let epoch = self.shard.epoch();
                let first = self.health.send_if_modified(|h| {
                    let first = !h.serving;
                    (h.serving, h.durable, h.epoch) = (true, position, epoch);
                    (h.clock_ms, h.clock_at) = (clock_ms, Some(at));
                    first
                });
                if first {
                    self.ask_who_is_here();
                }
            }
            Event::Room(room) => {
                match room {
                    LogRoom::Enough => tracing::info!("the disk of the log has room again"),
                    LogRoom::Low => {
                        tracing::warn!("the disk of the log is nearly full; new tasks are refused until there is room");
                    }
                    LogRoom::Last => {
                        tracing::warn!("the disk of the log is full; running calls are told to stop");
                    }
                }
                self.health.send_modify(|h| h.room = room);
                self.shard.handle(now, Input::LogRoom(room));
                if room == LogRoom::Enough && std::mem::take(&mut self.checkpoint_waits) {
                    self.shard.handle(now, Input::Checkpoint);
                }
            }
            Event::NewSegment if self.health.borrow().room == LogRoom::Enough => {
                self.shard.handle(now, Input::Checkpoint);
            }
            Event::NewSegment => self.checkpoint_waits = true,
            Event::Failed(error) => {
                return Err(log_failed(&error));
            }
        }
        Ok(())
    }

    /// Agents that came before this owner say that they are here.
    fn ask_who_is_here(&mut self) {
        self.introduce(self.agents.names());
    }

    fn introduce(&mut self, agents: Vec<AgentName>) {
        let (shard, epoch) = (self.number, self.shard.epoch());
        for agent in agents {
            self.to_agents.entry(agent).or_default().push(ToAgent::Owner { shard, epoch });
        }
    }

    /// Entries that are decided and not durable.
    fn lag(&mut self, durable: u64) {
        self.meters.lag_entries.set(self.shard.state().position().saturating_sub(durable) as f64);
    }

    async fn message(&mut self, now: Now, message: ToShard) {
        match message {
            ToShard::Opened { conn, tenant, outbox, bounds } => self.clients.open(conn, tenant, outbox, bounds),
            ToShard::Frames { conn, frames } => self.clients.frames(&mut self.shard, now, conn, frames),
            ToShard::Resume { conn, tenant, outbox, bounds, streams } => {
                self.clients.open(conn, tenant, outbox, bounds);
                self.clients.resume(conn, streams);
            }
            ToShard::Gone { conn } => {
                self.clients.gone(conn);
                self.shard.handle(now, Input::ConnGone { conn });
            }
            ToShard::AgentFrames { agent, incarnation, frames } => {
                for received in frames {
                    let (agent, incarnation) = (agent.clone(), incarnation.clone());
                    let frame = FromAgent::Frame { agent, incarnation, received };
                    self.shard.handle(now, Input::Agent(frame));
                }
            }
            ToShard::Agent(messages) => {
                for message in messages {
                    self.shard.handle(now, Input::Agent(message));
                }
            }
            ToShard::Replayed { conn, tenant, done } => {
                self.clients.replayed(conn);
                for (stream, upto) in done {
                    self.shard.handle(now, Input::Replayed { conn, tenant: tenant.clone(), stream, upto });
                }
            }
            ToShard::Input(input) => self.shard.handle(now, *input),
            ToShard::Escrow { from, message } => self.shard.handle(now, Input::Escrow { from, message }),
            ToShard::Introduce(agents) => self.introduce(agents),
            ToShard::Room { conn } => {
                for input in self.clients.room(conn) {
                    self.shard.handle(now, input);
                }
            }
            ToShard::Ask { query, reply } => {
                let id = self.ask(reply);
                self.shard.handle(now, Input::Query { id, query });
            }
            ToShard::DrainAgent { agent, drained, reply } => {
                let id = self.ask(reply);
                self.shard.handle(now, Input::DrainAgent { id, agent, drained });
            }
            ToShard::Faster { account, more, for_ms, by, reply } => {
                let id = self.ask(reply);
                self.shard.handle(now, Input::Faster { id, account, more, for_ms, by });
            }
            ToShard::Settings(settings) => self.shard.set_settings(settings),
            ToShard::Drain { over } => {
                self.draining.push(over);
                self.shard.handle(now, Input::Drain);
            }
        }
    }

    /// The number under which an answer comes back.
    fn ask(&mut self, reply: oneshot::Sender<Answer>) -> u64 {
        let id = self.next_ask;
        self.next_ask += 1;
        self.asked.insert(id, reply);
        id
    }

    fn deny(&mut self, denial: Denial) {
        match self.denials.judge(&*self.log, denial) {
            Verdict::Say(denial) => self.say(denial),
            Verdict::AskAgain(denial) => self.ask_again(denial),
            Verdict::Wait => {}
        }
    }

    fn say(&mut self, denial: Denial) {
        match denial {
            Denial::Frame(conn, frame) => self.clients.send(conn, frame),
            Denial::Answer(id, answer) => self.answer(id, answer),
        }
    }

    /// Nobody knows just now: who asked may find the stream elsewhere.
    fn ask_again(&mut self, denial: Denial) {
        match denial {
            Denial::Frame(conn, frame) => {
                let again = Frame::json(&*frame.stream_id, 0, Flags::RST, kind::ERROR, &not_here());
                self.clients.send(conn, again);
            }
            Denial::Answer(id, _) => {
                self.asked.remove(&id);
            }
        }
    }

    fn answer(&mut self, id: u64, answer: Answer) {
        if let Some(reply) = self.asked.remove(&id) {
            // Whoever asked may have gone; that is no fault.
            let _ = reply.send(answer);
        }
    }

    /// Carries out every effect: entries to the log in one append, frames grouped by connection, messages by agent.
    async fn drain(&mut self) -> Result<(), String> {
        while let Some(effect) = self.shard.poll_effect() {
            match effect {
                Effect::Send { conn, frame } if Denial::is_frame(&frame) => self.deny(Denial::Frame(conn, frame)),
                Effect::Send { conn, frame } => self.clients.send(conn, frame),
                Effect::Append { position, entry, checkpoint } => self.appends.push((position, entry, checkpoint)),
                Effect::ToAgent { agent, message } => self.to_agents.entry(agent).or_default().push(message),
                Effect::Replay { conn, tenant: _, stream, from, after, upto } => {
                    self.clients.replay(conn, Replay { stream, from, after, upto });
                }
                Effect::Close { conn, error } => self.clients.close(conn, error),
                Effect::Answer { id, answer } if Denial::is_answer(&answer) => self.deny(Denial::Answer(id, answer)),
                Effect::Answer { id, answer } => self.answer(id, answer),
                Effect::Tool { call, attempt, request, tool, args } => {
                    self.tools.run(self.inbox.clone(), call, attempt, request, tool, args);
                }
                Effect::ToShard { shard, message } => self.to_shard(shard, message),
                Effect::Learned(lesson) => self.lessons.teach(lesson),
                Effect::Metric(metric) => self.meters.facts.record(metric),
            }
        }
        if let Some((last, _, _)) = self.appends.last() {
            self.in_flight.push_back((*last, Instant::now()));
            let entries = std::mem::take(&mut self.appends);
            self.log.append(entries).await.map_err(|error| match error {
                LogError::Stopped(why) => log_failed(&why),
                error => format!("the log takes no entries: {error}"),
            })?;
        }
        self.clients.flush();
        self.tell_agents();
        Ok(())
    }

    /// Never waits: two shards that wait for each other would for ever. What is lost is said again.
    fn to_shard(&self, shard: u32, message: Escrow) {
        let from = self.number;
        let taken = match self.shards.place(shard) {
            Place::Here(here) => here.inbox.offer(256, ToShard::Escrow { from, message }),
            Place::At(site) => self.agents.peers().say(&site.router, say::escrow(from, shard, message)),
            Place::Unknown => false,
        };
        if !taken {
            metric::dropped("escrow");
        }
    }

    fn tell_agents(&mut self) {
        self.to_agents.retain(|name, messages| match self.agents.tell(name, messages) {
            Ok(told) => !told,
            Err(error) => {
                tracing::warn!(agent = %name, %error, "no room for the agent's task; it is told nothing");
                false
            }
        });
    }
}

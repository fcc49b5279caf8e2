//! A shard: the owner of streams, money and the merge of answers. One change at a time, then drain. This file takes inputs,
//! keeps what they decide in one entry, and holds back every effect until the entries before it are durable; the work on a
//! stream lives in the files beside it.

mod answer;
mod book;
mod choice;
mod client;
mod closing;
mod escalate;
mod escrow;
mod holder;
mod lane;
mod lender;
mod looks;
mod offer;
mod outflow;
mod output;
mod preflight;
mod pressure;
mod project;
mod purchase;
mod seat;
mod settle;
mod step;
mod tool;
mod windows;

use crate::clock::{Clock, Now};
use crate::message::{Effect, FromAgent, Input, LogRoom, Machine, Metric, Position, ToAgent};
use crate::record::{AnyRecord, Checkpoint, Entry, Epoch, Genesis, Record};
use crate::said::Said;
use crate::settings::Settings;
use crate::state::State;
use crate::statistics::Statistics;
use crate::stream::{Phase, Stream};
use atp_proto::content::Ack;
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, ConnId, Frame, StreamId, TenantId};
use book::Book;
use client::{Bucket, Pending};
use closing::Stopping;
use escrow::Escrows;
use lane::LiveCall;
use outflow::Outflow;
use preflight::Preflight;
use pressure::{Pressure, Victim};
use project::Changes;
use prost::Message;
use purchase::Bid;
use seat::Seat;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use windows::{Moved, Told};

/// Slots and dispatches that weren't answered are asked for again this often.
const REPEAT_MS: u64 = 1_000;
/// Bytes of content of the frames that a stream keeps for a connection that catches up.
const RECENT_BYTES_MAX: usize = 32 * 1024;
/// How much later the owner's deadline of a call is than the agent's.
const OWNER_LATER_MS: u64 = 5_000;

/// When to look again at something; a timer that has lost its reason does nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// What a stream still asks for: slots, agents, money.
    Ask(u64),
    Deadline(u64),
    /// Lanes that were asked to stop have had their time.
    Stop(u64),
    Call(CallId),
    /// An account's window ends.
    Roll(String),
    /// The line of an account's pace has caught up.
    Pace(String),
    /// A client's message waits behind a gap.
    Gap(ConnId, StreamId),
    /// An agent's message waits behind a gap.
    CallGap(CallId),
    Owner(AgentName),
    /// A slot was lent, by an agent that isn't the best.
    Choice(u64),
    /// A stream's window has moved and wasn't told.
    Window(u64),
    /// An account's window has moved and wasn't told.
    AccountWindow(String),
    /// An agent that was asked for an estimate has had its time.
    Preflight(CallId, AgentName),
    /// Who asked for an account's money decides without it.
    Sought(String),
    /// Shares of an account may be idle.
    Idle(String),
    /// What other shards haven't confirmed.
    Escrow,
    /// Other shards hear what gold tasks wait for.
    Press,
}

/// What the memory holds of an open stream beside the fold.
struct Live {
    subscribers: Vec<ConnId>,
    /// The last frames that were sent, for a connection that catches up.
    recent: VecDeque<Frame>,
    bid: Option<Bid>,
    /// It gave a slot back, to look for the money of all its lanes.
    turned_back: bool,
    /// Until then it looks for nothing more for its other lanes.
    looked_until: u64,
    wants: client::Wants,
    deadline_at: u64,
    /// When it asks again for what it lacks.
    ask_at: u64,
    stopping: Option<Stopping>,
    /// Agents that the money had no room for, and why.
    left_out: Vec<String>,
    /// What its clients were told that it may still use, once that has moved.
    told: Option<Box<Told>>,
    /// The task that was asked to give way to this one.
    victim: Option<Victim>,
    /// What agents that were asked said of this task.
    preflights: BTreeMap<AgentName, Preflight>,
}

/// One shard's machine. See `message` for what goes in and what comes out.
pub struct Shard {
    settings: Arc<Settings>,
    state: State,
    clock: Clock,
    now_ms: u64,
    epoch: u64,
    durable: Position,
    room: LogRoom,
    /// Open streams of the other shards that share the bound.
    open_elsewhere: usize,
    draining: bool,
    entry: Option<Vec<AnyRecord>>,
    /// Windows that this input moved.
    moved: Moved,
    changes: Changes,
    /// The first piece of the newest checkpoint.
    checkpoint_at: Position,
    pressure: Pressure,
    out: Outflow,
    live: BTreeMap<u64, Live>,
    calls: BTreeMap<CallId, LiveCall>,
    /// Calls that are asked a slot for and not reserved.
    bids: BTreeMap<CallId, u64>,
    /// Questions for an estimate whose answer is due, and their streams.
    preflights: BTreeMap<(CallId, AgentName), u64>,
    seats: BTreeMap<AgentName, Seat>,
    books: BTreeMap<String, Book>,
    pending: BTreeMap<(ConnId, StreamId), Pending>,
    /// Connections that a reader serves from the log, by stream, and the least `after` that was wished for meanwhile.
    replaying: BTreeMap<(ConnId, u64), u64>,
    denials: BTreeMap<TenantId, Bucket>,
    /// Slots in use per agent, as far as this shard's calls go.
    in_flight: BTreeMap<AgentName, u32>,
    timers: BTreeSet<(u64, Timer)>,
    escrows: Escrows,
    /// What all shards of this router have learned; `None`: this one alone.
    learned: Option<Arc<Statistics>>,
    acks: BTreeMap<CallId, u64>,
    acks_held: (Position, BTreeMap<CallId, u64>),
}

impl Shard {
    /// Takes over what the log says. Appends [Genesis and] Epoch; nothing is revealed before they are durable. `genesis` is
    /// for an empty log only.
    #[must_use]
    pub fn recover(
        settings: Arc<Settings>,
        state: State,
        now: Now,
        incarnation: &str,
        genesis: Option<Genesis>,
    ) -> Self {
        let epoch = state.position() + 1;
        let mut shard = Self::of(settings, state, now, epoch);
        if let Some(genesis) = genesis.filter(|_| epoch == 1) {
            shard.record(Record::Genesis(genesis));
        }
        let epoch = Epoch {
            log_id: shard.state.log_id().clone(),
            shard: shard.settings.shard,
            owner: shard.settings.router_id.to_string(),
            incarnation: incarnation.into(),
        };
        shard.record(Record::Epoch(epoch));
        shard.rebuild();
        shard.commit();
        shard
    }

    /// As `recover`, where the newest entry of the log is this owner's Epoch already, and durable.
    #[must_use]
    pub fn recover_behind_epoch(settings: Arc<Settings>, state: State, now: Now) -> Self {
        assert!(state.position() == state.epoch(), "the newest entry is the Epoch");
        let epoch = state.epoch();
        let mut shard = Self::of(settings, state, now, epoch);
        shard.rebuild();
        shard.commit();
        shard
    }

    /// A shard that knows the log and nothing of its own.
    fn of(settings: Arc<Settings>, mut state: State, now: Now, epoch: u64) -> Self {
        // It was taught long ago.
        state.take_lesson();
        Self {
            durable: state.position(),
            clock: Clock::start(now, state.logged_ms()),
            settings,
            state,
            now_ms: now.mono_ms,
            epoch,
            room: LogRoom::Enough,
            open_elsewhere: 0,
            draining: false,
            entry: None,
            moved: Moved::default(),
            changes: Changes::default(),
            checkpoint_at: 0,
            pressure: Pressure::default(),
            out: Outflow::default(),
            live: BTreeMap::new(),
            calls: BTreeMap::new(),
            bids: BTreeMap::new(),
            preflights: BTreeMap::new(),
            seats: BTreeMap::new(),
            books: BTreeMap::new(),
            pending: BTreeMap::new(),
            replaying: BTreeMap::new(),
            denials: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            timers: BTreeSet::new(),
            escrows: Escrows::default(),
            learned: None,
            acks: BTreeMap::new(),
            acks_held: (0, BTreeMap::new()),
        }
    }

    /// The volatile part, from the fold: queues, deadlines (begun anew), calls whose agent has to be asked.
    fn rebuild(&mut self) {
        let open: Vec<u64> =
            self.state.streams().filter(|(_, s)| !s.is_closed() || s.has_open_calls()).map(|(no, _)| no).collect();
        let mut agents = BTreeSet::new();
        for no in open {
            let Some(stream) = self.state.stream(no) else { continue };
            let lanes: Vec<u32> = stream.calls.iter().filter(|c| c.is_open()).map(|c| c.reserve.lane).collect();
            if !stream.is_closed() {
                let live = self.new_live(stream);
                self.timer(live.deadline_at, Timer::Deadline(no));
                self.live.insert(no, live);
                self.timer(self.now_ms, Timer::Ask(no));
            }
            for lane in lanes {
                agents.extend(self.adopt(no, lane));
            }
        }
        for agent in agents {
            self.timer(self.now_ms, Timer::Owner(agent));
        }
        let standings: Vec<String> = self.state.standings.keys().cloned().collect();
        standings.iter().for_each(|agent| self.tell_standing(&AgentName::new(agent)));
        let configured = self.settings.accounts.keys().map(|t| t.as_str().to_owned());
        let mut accounts: BTreeSet<String> = self.state.accounts.keys().cloned().chain(configured).collect();
        accounts.insert("default".into());
        accounts.into_iter().for_each(|account| self.rolled(&account));
        self.rebuild_escrow();
    }

    fn new_live(&self, stream: &Stream) -> Live {
        Live {
            subscribers: Vec::new(),
            recent: VecDeque::new(),
            bid: None,
            turned_back: false,
            looked_until: 0,
            wants: client::Wants { needs: self.needs(stream), ..client::Wants::of(&stream.submit) },
            deadline_at: self.now_ms + stream.accept.deadline_ms,
            ask_at: 0,
            stopping: None,
            left_out: Vec::new(),
            told: None,
            victim: None,
            preflights: BTreeMap::new(),
        }
    }

    /// Takes new settings. A limit that changed is recorded at once: running calls live under it too.
    pub fn set_settings(&mut self, settings: Arc<Settings>) {
        self.settings = settings;
        self.forget_told();
        let accounts: Vec<String> = self.state.accounts.keys().cloned().collect();
        accounts.into_iter().for_each(|account| self.rolled(&account));
        self.note_settings();
        self.commit();
    }

    /// The fold, ahead of what is durable.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Streams without a Close.
    #[must_use]
    pub fn streams_open(&self) -> usize {
        self.live.len()
    }

    /// How many streams are open in the other shards of the router: `streams_open_max` counts them too.
    pub const fn set_open_elsewhere(&mut self, streams: usize) {
        self.open_elsewhere = streams;
    }

    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Wall clock minus logged time, in milliseconds.
    #[must_use]
    pub fn clock_behind_ms(&self) -> i64 {
        self.clock.behind_ms()
    }

    // ---- records and effects ----------------------------------------------------------------------------------------

    /// Adds a record to this input's entry and folds it.
    fn record(&mut self, record: Record) {
        self.record_said(record, None);
    }

    fn record_said(&mut self, record: Record, said: Option<Said>) {
        if self.entry.is_none() {
            self.state.begin(self.clock.logged_ms()).expect("logged time never goes back");
            self.entry = Some(Vec::new());
        }
        let kind = record.kind();
        self.note_moved(&record);
        if let Err(e) = self.state.apply_record(&record, said) {
            panic!("a decision broke the record grammar, {kind}: {e}");
        }
        self.note_changed(&record);
        if let Some(lesson) = self.state.take_lesson() {
            self.out.hold(Effect::Learned(lesson));
        }
        if let Some(entry) = &mut self.entry {
            entry.push(record.into());
        }
    }

    /// What one input decided becomes one entry; what it reveals waits for it. An input that bears on many tasks, each by itself,
    /// makes an entry for each: all of their answers together may be more than an entry takes.
    fn commit(&mut self) {
        if let Some(records) = self.entry.take() {
            let checkpoint =
                matches!(records.first().and_then(|r| r.record.as_ref()), Some(Record::Checkpoint(c)) if c.piece == 0);
            let entry = Entry { at_ms: self.clock.logged_ms(), records };
            self.state.end();
            let position = self.state.position();
            if checkpoint {
                self.checkpoint_at = position;
            }
            self.out.free(Effect::Append { position, entry: entry.encode_to_vec().into(), checkpoint });
        }
        self.tell_windows();
        let position = self.state.position();
        self.out.place(position);
        self.out.release(self.durable);
        self.flush_acks();
    }

    /// `control.ack` once per group commit and stream: what was taken before the commit began is durable when it ends.
    fn flush_acks(&mut self) {
        loop {
            if self.acks_held.0 > self.durable {
                return;
            }
            for (call, msg_seq) in std::mem::take(&mut self.acks_held.1) {
                let ack = Ack { msg_seq, open: Vec::new() };
                let frame = Frame::json(call.to_string(), 0, Flags::NONE, kind::ACK, &ack);
                if let Some((agent, message)) = self.to_its_process(call, frame) {
                    self.out.free(Effect::ToAgent { agent, message });
                }
            }
            if self.acks.is_empty() {
                return;
            }
            self.acks_held = (self.state.position(), std::mem::take(&mut self.acks));
        }
    }

    fn effect(&mut self, effect: Effect) {
        self.out.hold(effect);
    }

    fn metric(&mut self, metric: Metric) {
        self.out.hold(Effect::Metric(metric));
    }

    fn send(&mut self, conn: ConnId, frame: Frame) {
        self.out.hold(Effect::Send { conn, frame });
    }

    fn tell_agent(&mut self, agent: &AgentName, message: ToAgent) {
        self.out.hold(Effect::ToAgent { agent: agent.clone(), message });
    }

    /// Sends a numbered frame to all who follow the stream, and keeps it for those who catch up.
    fn tell(&mut self, no: u64, frame: Frame) {
        self.changes.mark(no);
        let keep = self.settings.limits.recent_frames;
        let Some(live) = self.live.get_mut(&no) else { return };
        for conn in &live.subscribers {
            self.out.hold(Effect::Send { conn: *conn, frame: frame.clone() });
        }
        // `accepted` alone isn't worth its memory in an idle stream; the log has it.
        if frame.msg_seq == 1 {
            return;
        }
        live.recent.push_back(frame);
        let bytes = |recent: &VecDeque<Frame>| recent.iter().map(|f| f.content.len()).sum::<usize>();
        while live.recent.len() > keep || bytes(&live.recent) > RECENT_BYTES_MAX {
            live.recent.pop_front();
        }
    }

    fn timer(&mut self, at: u64, timer: Timer) {
        self.timers.insert((at, timer));
    }

    /// One repeat of `ask` per stream and second, whoever wished for it.
    fn ask_later(&mut self, no: u64) {
        let at = self.now_ms + REPEAT_MS;
        if let Some(live) = self.live.get_mut(&no)
            && live.ask_at <= self.now_ms
        {
            live.ask_at = at;
            self.timer(at, Timer::Ask(no));
        }
    }

    fn checkpoint(&mut self) {
        let pieces: Vec<Checkpoint> = self.state.to_checkpoint(self.settings.shard);
        for piece in pieces {
            self.record(Record::Checkpoint(piece));
            self.commit();
        }
    }

    fn agent_message(&mut self, message: FromAgent) {
        match message {
            FromAgent::Up { agent, capabilities, status, drained } => {
                self.agent_up(agent, capabilities, status, drained);
            }
            FromAgent::Flow { agent, flow } => self.agent_flow(&agent, flow),
            FromAgent::Down { agent, incarnation } => self.agent_down(&agent, &incarnation),
            FromAgent::Status { agent, status } => self.agent_status(&agent, status),
            FromAgent::Lent { agent, incarnation, call, epoch, keeper } => {
                self.slot_lent(agent, &incarnation, call, epoch, keeper);
            }
            FromAgent::Sent { call, epoch, .. } => self.dispatch_sent(call, epoch),
            FromAgent::Unsent { call, epoch, .. } => self.dispatch_unsent(call, epoch),
            FromAgent::Frame { agent, incarnation, received } => self.agent_frame(&agent, &incarnation, received),
        }
    }

    fn log_room(&mut self, room: LogRoom) {
        self.room = room;
        if room == LogRoom::Last {
            let running: Vec<u64> = self.live.keys().copied().filter(|no| self.is_running(*no)).collect();
            for no in running {
                self.stop(no, Stopping::log(self.now_ms));
                self.commit();
            }
        }
    }

    fn is_running(&self, no: u64) -> bool {
        self.state.stream(no).is_some_and(|s| s.calls.iter().any(|c| c.phase() == Phase::Running))
    }

    fn fire(&mut self, timer: Timer) {
        match timer {
            Timer::Ask(no) => self.ask_again(no),
            Timer::Deadline(no) => self.deadline(no),
            Timer::Stop(no) => self.stop_due(no),
            Timer::Call(call) => self.call_due(call),
            Timer::Roll(account) => self.rolled(&account),
            Timer::Pace(account) => self.account_metric(&account),
            Timer::Gap(conn, stream) => self.gap_due(conn, &stream),
            Timer::CallGap(call) => self.call_gap_due(call),
            Timer::Owner(agent) => self.announce(agent),
            Timer::Choice(no) => self.choose(no),
            Timer::Window(no) => self.tell_window(no),
            Timer::AccountWindow(account) => self.tell_account_window(&account),
            Timer::Preflight(call, agent) => self.preflight_due(call, &agent),
            Timer::Sought(account) => self.sought(&account),
            Timer::Press => self.say_pressure(),
            Timer::Idle(account) => self.idle_due(&account),
            Timer::Escrow => self.say_all_again(),
        }
    }
}

impl Machine for Shard {
    type Input = Input;
    type Effect = Effect;

    fn handle(&mut self, now: Now, input: Input) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        self.clock.tick(now);
        match input {
            Input::Client { conn, tenant, received } => self.client_frame(conn, tenant, received),
            Input::ConnGone { conn } => self.conn_gone(conn),
            Input::Agent(message) => self.agent_message(message),
            Input::Durable { position } => self.durable = self.durable.max(position),
            Input::LogRoom(room) => self.log_room(room),
            Input::Replayed { conn, tenant, stream, upto } => self.replayed(conn, &tenant, &stream, upto),
            Input::Query { id, query } => self.query(id, query),
            Input::Escrow { from, message } => self.escrow(from, message),
            Input::Learned(statistics) => self.learned(statistics),
            Input::Checkpoint => self.checkpoint(),
            Input::ToolDone(done) => self.tool_done(*done),
            Input::Drain => self.draining = true,
            Input::DrainAgent { id, agent, drained } => self.drain_and_answer(id, agent, drained),
            Input::Faster { id, account, more, for_ms, by } => self.go_faster(id, &account, more, for_ms, by),
        }
        self.commit();
    }

    fn poll_effect(&mut self) -> Option<Effect> {
        self.out.pop()
    }

    fn poll_timeout(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    fn handle_timeout(&mut self, now: Now) {
        self.now_ms = self.now_ms.max(now.mono_ms);
        self.clock.tick(now);
        while self.timers.first().is_some_and(|(at, _)| *at <= self.now_ms) {
            if let Some((_, timer)) = self.timers.pop_first() {
                self.fire(timer);
                self.commit();
            }
        }
    }
}

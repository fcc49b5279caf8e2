//! A shard whose log is durable at once, on a clock that tests move from timer to timer, with agents that are a number of
//! slots: a wish waits, in order, until one is free. Notes what each connection is told, and when.

use atp_core::clock::Now;
use atp_core::message::{Effect, FromAgent, Input, Machine, ToAgent};
use atp_core::record::{Entry, Genesis};
use atp_core::replay::StreamReplay;
use atp_core::settings::{Per, Settings};
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::*;
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, ConnId, Cost, Frame, Limit, Qos, StreamId, TenantId, Tokens, UsdMicros, WireError};
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;

#[derive(Default)]
struct Slots {
    most: usize,
    used: Vec<CallId>,
    wanted: Vec<(CallId, u64)>,
}

pub(crate) struct House {
    settings: Arc<Settings>,
    pub(crate) shard: Shard,
    log: Vec<Entry>,
    now: Now,
    slots: BTreeMap<AgentName, Slots>,
    said: BTreeMap<CallId, u64>,
    /// Whose connections submit.
    pub(crate) tenant: &'static str,
    /// When, to whom, what.
    pub(crate) told: Vec<(u64, ConnId, Frame)>,
    /// Calls that were dispatched, and calls that were asked to stop, in order.
    pub(crate) dispatched: Vec<CallId>,
    pub(crate) asked_to_stop: Vec<CallId>,
}

/// 1,000 tokens a stream, 10,000 tokens a minute of the account, no limit in USD; windows of 100 calls a stream.
pub(crate) fn settings() -> Settings {
    let tokens = |n| Limit { tokens: Some(Tokens(n)), usd_micros: None };
    let mut settings = Settings::default();
    (settings.stream_window.max_parallel, settings.stream_window.limit) = (Some(100), tokens(1_000));
    (settings.default_account.limit, settings.default_account.per) = (tokens(10_000), Per::Minute);
    settings
}

pub(crate) fn call(stream: &str, lane: u32) -> CallId {
    CallId::of(&TenantId::new("default"), &StreamId::new(stream), lane)
}

pub(crate) fn window(calls: Option<u32>, tokens: u64) -> WindowView {
    WindowView { max_parallel: calls, max_tokens: Some(Tokens(tokens)), max_usd_micros: None }
}

impl House {
    pub(crate) fn new(settings: Settings) -> Self {
        // 40 s before a new minute.
        let (settings, now) = (Arc::new(settings), Now { mono_ms: 0, wall_ms: 1_700_000_000_000 });
        let genesis = Genesis { log_id: vec![7; 16].into(), format: 1, shards: 1, hash_seed: 0 };
        let shard = Shard::recover(settings.clone(), State::default(), now, "i1", Some(genesis));
        let mut house = Self {
            settings,
            shard,
            log: vec![],
            now,
            slots: BTreeMap::new(),
            said: BTreeMap::new(),
            tenant: "default",
            told: vec![],
            dispatched: vec![],
            asked_to_stop: vec![],
        };
        house.run();
        house
    }

    /// An agent whose calls hold `tokens` each; with `slices` they grow.
    pub(crate) fn agent(&mut self, name: &str, tokens: u64, slots: usize, slices: bool) {
        let name = AgentName::new(name);
        let figures = EstimateFigures {
            out_tokens: Tokens(tokens),
            usd_micros: Some(UsdMicros(0)),
            ..EstimateFigures::default()
        };
        let capabilities = Capabilities {
            agent: name.clone(),
            incarnation: "p1".into(),
            max_parallel: slots as u32,
            estimate: Some(EstimateDeclaration { figures, ..EstimateDeclaration::default() }),
            stop: if slices { Stop::Close } else { Stop::Limit },
            ..Capabilities::default()
        };
        self.slots.entry(name.clone()).or_default().most = slots;
        let status = Some(AgentStatus::default());
        let up = FromAgent::Up { agent: name, capabilities: Arc::new(capabilities), status, drained: false };
        self.input(Input::Agent(up));
    }

    pub(crate) fn input(&mut self, input: Input) {
        self.shard.handle(self.now, input);
        self.run();
    }

    fn run(&mut self) {
        while let Some(effect) = self.shard.poll_effect() {
            match effect {
                Effect::Append { position, entry, .. } => {
                    self.log.push(Entry::decode(entry).unwrap());
                    self.shard.handle(self.now, Input::Durable { position });
                }
                Effect::Send { conn, frame } => self.told.push((self.now.mono_ms, conn, frame)),
                Effect::ToAgent { agent, message } => self.hears(&agent, message),
                Effect::Replay { conn, tenant, stream, from, after, upto } => {
                    let mut replay = StreamReplay::new(&tenant, &stream, after, upto);
                    for (i, entry) in self.log.iter().enumerate().skip(from as usize) {
                        for frame in replay.feed(i as u64 + 1, entry) {
                            self.told.push((self.now.mono_ms, conn, frame));
                        }
                    }
                    self.shard.handle(self.now, Input::Replayed { conn, tenant, stream, upto });
                }
                Effect::Close { error, .. } => panic!("{error}"),
                Effect::Answer { .. }
                | Effect::Tool { .. }
                | Effect::ToShard { .. }
                | Effect::Learned(_)
                | Effect::Metric(_) => {}
            }
        }
    }

    fn hears(&mut self, agent: &AgentName, message: ToAgent) {
        let slots = self.slots.entry(agent.clone()).or_default();
        match message {
            ToAgent::Want { call, epoch, .. } if slots.wanted.iter().all(|(c, _)| *c != call) => {
                slots.wanted.push((call, epoch));
            }
            ToAgent::Back { call, .. } | ToAgent::Ended { call, .. } => {
                slots.used.retain(|c| *c != call);
                slots.wanted.retain(|(c, _)| *c != call);
            }
            ToAgent::Dispatch { call, epoch, .. } => {
                self.dispatched.push(call);
                let sent = FromAgent::Sent { agent: agent.clone(), call, epoch };
                self.shard.handle(self.now, Input::Agent(sent));
            }
            ToAgent::Pass { call, frame, .. } if &*frame.kind == kind::AGENT_CANCEL => self.asked_to_stop.push(call),
            ToAgent::Want { .. } | ToAgent::Pass { .. } | ToAgent::Owner { .. } | ToAgent::Standing { .. } => {}
        }
        let slots = self.slots.entry(agent.clone()).or_default();
        if slots.used.len() < slots.most && !slots.wanted.is_empty() {
            let (call, epoch) = slots.wanted.remove(0);
            slots.used.push(call);
            let lent =
                FromAgent::Lent { agent: agent.clone(), incarnation: "p1".into(), call, epoch, keeper: "".into() };
            self.shard.handle(self.now, Input::Agent(lent));
        }
    }

    /// Time goes on to `ms`; every timer fires when it is due.
    pub(crate) fn until(&mut self, ms: u64) {
        while let Some(at) = self.shard.poll_timeout().filter(|at| *at <= ms) {
            self.clock(at.max(self.now.mono_ms));
            self.shard.handle_timeout(self.now);
            self.run();
        }
        self.clock(ms);
    }

    fn clock(&mut self, ms: u64) {
        self.now.wall_ms += ms - self.now.mono_ms;
        self.now.mono_ms = ms;
    }

    /// A frame of a client.
    pub(crate) fn client(&mut self, conn: u64, frame: Frame) {
        let received = Received { body: encode_body(&frame), frame };
        self.input(Input::Client { conn: ConnId(conn), tenant: TenantId::new(self.tenant), received });
    }

    /// A task with a lane for each of `agents`.
    pub(crate) fn submit(&mut self, conn: u64, stream: &str, qos: Qos, agents: &[&str], submit: Submit) {
        let agents = agents.iter().map(|a| AgentName::new(a)).collect();
        let task = Submit { task: "t".into(), agents, ..submit };
        let frame = Frame { qos: qos as u32, ..Frame::json(stream, 1, Flags::SYN, kind::TASK_SUBMIT, &task) };
        self.client(conn, frame);
    }

    fn says(&mut self, call: CallId, flags: Flags, what: &'static str, content: &impl serde::Serialize) {
        let (no, lane) = self.shard.state().call(&call).expect("a call");
        let agent = self.shard.state().stream(no).unwrap().call(lane).unwrap().agent();
        let seq = self.said.entry(call).or_default();
        *seq += 1;
        let frame = Frame::json(call.to_string(), *seq, flags, what, content);
        let received = Received { body: encode_body(&frame), frame };
        self.input(Input::Agent(FromAgent::Frame { agent, incarnation: "p1".into(), received }));
    }

    /// The call's running total is `tokens`.
    pub(crate) fn chunk(&mut self, call: CallId, tokens: u64) {
        let cost = Cost { out_tokens: Tokens(tokens), ..Cost::default() };
        let partial = AgentPartial { text: Some("x".into()), cost, ..AgentPartial::default() };
        self.says(call, Flags::NONE, kind::RESULT_PARTIAL, &partial);
    }

    /// The call ends and has cost `tokens`.
    pub(crate) fn end(&mut self, call: CallId, tokens: u64, finish: Finish) {
        let cost = Cost { out_tokens: Tokens(tokens), ..Cost::default() };
        let last = AgentFinal { cost, finish, ..AgentFinal::default() };
        self.says(call, Flags::FIN, kind::RESULT_FINAL, &last);
    }

    /// Window updates of a scope that a connection got: when, and what.
    pub(crate) fn windows(&self, conn: u64, scope: &str) -> Vec<(u64, WindowView)> {
        let mine = self.told.iter().filter(|(_, c, f)| *c == ConnId(conn) && &*f.kind == kind::WINDOW_UPDATE);
        let read = mine.map(|(at, _, f)| (*at, f.read::<WindowUpdate>().unwrap()));
        read.filter(|(_, u)| u.scope == scope).map(|(at, u)| (at, u.window)).collect()
    }

    /// What `RST control.error` or the final says is wrong with a stream, and when.
    pub(crate) fn error(&self, stream: &str) -> (u64, WireError) {
        self.ended_with(stream).unwrap_or_else(|| panic!("nothing is wrong with {stream}"))
    }

    pub(crate) fn ended_with(&self, stream: &str) -> Option<(u64, WireError)> {
        let of_stream = self.told.iter().filter(|(_, _, f)| &*f.stream_id == stream);
        let mut errors = of_stream.filter_map(|(at, _, f)| match &*f.kind {
            kind::ERROR => Some((*at, f.read::<WireError>().unwrap())),
            kind::RESULT_FINAL => Some((*at, f.read::<Final>().unwrap().error?)),
            _ => None,
        });
        errors.next()
    }

    /// How often a stream was refused.
    pub(crate) fn count(&self, stream: &str) -> usize {
        let refusals = self.told.iter().filter(|(_, _, f)| &*f.stream_id == stream && &*f.kind == kind::ERROR);
        refusals.count()
    }

    /// The final of a stream, if it has ended.
    pub(crate) fn answer(&self, stream: &str) -> Option<Final> {
        let mut of_stream = self.told.iter().filter(|(_, _, f)| &*f.stream_id == stream);
        of_stream.find(|(_, _, f)| &*f.kind == kind::RESULT_FINAL).map(|(_, _, f)| f.read().unwrap())
    }

    /// Another owner of the shard, out of the log alone.
    pub(crate) fn restart(&mut self) {
        let mut state = State::default();
        for (i, entry) in self.log.iter().enumerate() {
            state.apply(i as u64 + 1, entry).unwrap();
        }
        self.shard = Shard::recover(self.settings.clone(), state, self.now, "i2", None);
        self.run();
    }

    /// Takes other settings.
    pub(crate) fn set(&mut self, settings: Settings) {
        self.settings = Arc::new(settings);
        self.shard.set_settings(self.settings.clone());
        self.run();
    }
}

/// Calls of a task's budget, for `..`.
pub(crate) fn patient(deadline_ms: u64) -> Submit {
    Submit { deadline_ms: Some(deadline_ms), ..Submit::default() }
}

pub(crate) fn hurried() -> Submit {
    Submit { wait: false, ..Submit::default() }
}

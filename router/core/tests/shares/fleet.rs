//! Four shards and an agent or two on a virtual clock. Logs are durable at once.

use atp_core::agent::Agent;
use atp_core::clock::Now;
use atp_core::escrow::{Escrow, Say};
use atp_core::message::{AgentEffect, AgentInput, Effect, FromAgent, Input, Machine};
use atp_core::placement::Placement;
use atp_core::record::{Entry, Genesis, Record};
use atp_core::settings::{AccountSettings, FlowSettings, Settings, WindowSettings};
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_core::statistics::Statistics;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::*;
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, ConnId, Cost, Frame, Limit, Qos, StreamId, TenantId, Tokens, UsdMicros, WireError};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

pub(crate) const CLIENT: ConnId = ConnId(1);
pub(crate) const AGENT: ConnId = ConnId(2);
pub(crate) const SHARDS: u32 = 4;
pub(crate) const TENANT: &str = "acme";

pub(crate) struct Fleet {
    pub(crate) shards: Vec<Shard>,
    pub(crate) logs: Vec<Vec<Entry>>,
    pub(crate) settings: Settings,
    agents: Vec<Agent>,
    pub(crate) now: Now,
    pub(crate) to_client: Vec<Frame>,
    pub(crate) to_agent: Vec<Frame>,
    /// Whose each call is that was ever dispatched.
    pub(crate) agent_of: BTreeMap<String, AgentName>,
    /// The shard of each call that was dispatched and has no end.
    pub(crate) calls: BTreeMap<String, u32>,
    /// The last that a call said.
    said: BTreeMap<String, u64>,
    /// Messages between shards that don't arrive: (from, to).
    pub(crate) cut: BTreeSet<(u32, u32)>,
    pub(crate) runs: u64,
    /// How often somebody was asked for idle shares.
    pub(crate) recalls: usize,
    /// What all shards have learned.
    pub(crate) learned: Statistics,
}

pub(crate) fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

/// An account with so much for ever; a call is estimated at 10 micro-USD and 100 tokens.
pub(crate) fn settings(usd_micros: u64, max_parallel: Option<u32>) -> Settings {
    let account = AccountSettings {
        limit: Limit { tokens: None, usd_micros: Some(UsdMicros(usd_micros)) },
        per: atp_core::settings::Per::Total,
        max_parallel,
        ..AccountSettings::default()
    };
    Settings {
        placement: Placement::new(SHARDS, 1),
        accounts: BTreeMap::from([(TenantId::new(TENANT), account)]),
        stream_window: WindowSettings::default(),
        agent_window: WindowSettings::default(),
        flow: FlowSettings { aimd_base: 200, aimd_cap: 200, burst: 1_000, ..FlowSettings::default() },
        ..Settings::default()
    }
}

impl Fleet {
    pub(crate) fn new(settings: Settings) -> Self {
        let now = Now { mono_ms: 0, wall_ms: 1_700_000_000_000 };
        let genesis = |_| Genesis { log_id: vec![7; 16].into(), format: 2, shards: SHARDS, hash_seed: 1 };
        let shard = |n| {
            let settings = Arc::new(Settings { shard: n, ..settings.clone() });
            Shard::recover(settings, State::default(), now, "i1", Some(genesis(n)))
        };
        let mut fleet = Self {
            shards: (0..SHARDS).map(shard).collect(),
            logs: vec![Vec::new(); SHARDS as usize],
            settings,
            agents: Vec::new(),
            now,
            to_client: Vec::new(),
            to_agent: Vec::new(),
            agent_of: BTreeMap::new(),
            calls: BTreeMap::new(),
            said: BTreeMap::new(),
            cut: BTreeSet::new(),
            runs: 0,
            recalls: 0,
            learned: Statistics::default(),
        };
        fleet.run();
        fleet.connect("a", 10, 200);
        fleet
    }

    /// An agent whose calls are estimated at so many micro-USD, with so many at once.
    pub(crate) fn connect(&mut self, name: &str, usd_micros: u64, max_parallel: u32) {
        let mut agent = Agent::new(AgentName::new(name), Arc::new(self.settings.clone()), self.now);
        let capabilities = Capabilities {
            agent: AgentName::new(name),
            incarnation: "p1".into(),
            max_parallel,
            models: vec![ModelInfo {
                id: "m1".into(),
                in_usd_micros_per_mtok: Some(10_000),
                out_usd_micros_per_mtok: Some(10_000),
                context_tokens: None,
            }],
            estimate: Some(EstimateDeclaration {
                mode: EstimateMode::Declared,
                figures: EstimateFigures {
                    in_tokens: Tokens(300),
                    out_tokens: Tokens(50),
                    usd_micros: Some(UsdMicros(usd_micros)),
                    ..EstimateFigures::default()
                },
            }),
            reach: Amount::new(0, 0),
            ..Capabilities::default()
        };
        agent.handle(self.now, AgentInput::Connected { conn: AGENT, capabilities: Box::new(capabilities) });
        self.agents.push(agent);
        self.run();
    }

    pub(crate) fn home(&self) -> u32 {
        self.settings.placement.home_of(TENANT)
    }

    /// A stream id on the n-th shard from the account's home.
    pub(crate) fn stream_on(&self, shard: u32) -> impl Iterator<Item = String> + use<> {
        let (placement, tenant) = (self.settings.placement.clone(), TenantId::new(TENANT));
        (0..).map(|n| format!("s{n}")).filter(move |id| placement.shard_of(&tenant, &StreamId::new(id)) == shard)
    }

    pub(crate) fn away(&self, n: u32) -> u32 {
        (self.home() + n) % SHARDS
    }

    pub(crate) fn run(&mut self) {
        // Far more than any answer takes: who talks on without time passing does so for ever.
        for _ in 0..3_000 {
            let mut moved = false;
            for n in 0..SHARDS {
                while let Some(effect) = self.shards[n as usize].poll_effect() {
                    moved = true;
                    self.carry_out(n, effect);
                }
            }
            let effect_of = |agent: &mut Agent| Some((agent.name().clone(), agent.poll_effect()?));
            while let Some((agent, effect)) = self.agents.iter_mut().find_map(effect_of) {
                moved = true;
                match effect {
                    AgentEffect::Send { frame, .. } => {
                        if &*frame.kind == kind::DISPATCH {
                            let dispatch: Dispatch = frame.read().unwrap();
                            self.calls.insert(frame.stream_id.to_string(), dispatch.shard);
                            self.agent_of.insert(frame.stream_id.to_string(), agent);
                        }
                        self.to_agent.push(frame);
                    }
                    AgentEffect::ToShard { shard, message } => {
                        for n in (0..SHARDS).filter(|n| shard.is_none_or(|s| s == *n)) {
                            self.shards[n as usize].handle(self.now, Input::Agent(message.clone()));
                        }
                    }
                    AgentEffect::Close { error, .. } => panic!("{error}"),
                }
            }
            if !moved {
                return;
            }
        }
        panic!("they never stop talking");
    }

    pub(crate) fn carry_out(&mut self, from: u32, effect: Effect) {
        let i = from as usize;
        match effect {
            Effect::Append { position, entry, .. } => {
                assert_eq!(position, self.logs[i].len() as u64 + 1);
                self.logs[i].push(Entry::decode(entry).unwrap());
                self.shards[i].handle(self.now, Input::Durable { position });
            }
            Effect::Send { frame, .. } => self.to_client.push(frame),
            Effect::ToAgent { agent, message } => {
                let to = self.agents.iter_mut().find(|a| *a.name() == agent).unwrap();
                to.handle(self.now, AgentInput::Shard(message));
            }
            Effect::ToShard { shard, message } => {
                self.recalls += usize::from(matches!(message.say, Some(Say::Recall(_))));
                // What is said is bytes between routers.
                let message = Escrow::decode(message.encode_to_vec().as_slice()).unwrap();
                if !self.cut.contains(&(from, shard)) {
                    self.shards[shard as usize].handle(self.now, Input::Escrow { from, message });
                }
            }
            Effect::Learned(lesson) => self.learned.learn(&lesson),
            Effect::Replay { .. } | Effect::Answer { .. } | Effect::Tool { .. } | Effect::Metric(_) => {}
            Effect::Close { error, .. } => panic!("{error}"),
        }
    }

    /// All shards hear what all have learned.
    pub(crate) fn teach(&mut self) {
        let learned = Arc::new(self.learned.clone());
        for shard in &mut self.shards {
            shard.handle(self.now, Input::Learned(learned.clone()));
        }
        self.run();
    }

    pub(crate) fn wait(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now.mono_ms += 100;
            self.now.wall_ms += 100;
            self.shards.iter_mut().for_each(|s| s.handle_timeout(self.now));
            for agent in &mut self.agents {
                agent.handle_timeout(self.now);
                agent.handle(self.now, AgentInput::Alive { conn: AGENT });
            }
            self.run();
        }
    }

    pub(crate) fn submit(&mut self, id: &str, wait: bool) {
        self.submit_as(Qos::Silver, id, wait);
    }

    /// Submits a shard's first stream, and returns its call.
    pub(crate) fn first_call_on(&mut self, shard: u32) -> String {
        let id = self.stream_on(shard).next().unwrap();
        self.submit(&id, true);
        self.calls.iter().find(|(_, of)| **of == shard).unwrap().0.clone()
    }

    /// A call costs more and more, until it waits for a slice. Returns what it cost.
    pub(crate) fn run_on(&mut self, call: &str) -> u64 {
        let (shard, mut cost) = (self.calls[call], 10);
        while cost <= self.account(shard).2 {
            cost += 20;
            self.say(call, cost);
        }
        cost
    }

    pub(crate) fn others(&self, call: &str) -> Vec<String> {
        self.calls.keys().filter(|other| *other != call).cloned().collect()
    }

    /// Every call but this one ends at this cost.
    pub(crate) fn finish_others(&mut self, call: &str, usd_micros: u64) {
        self.others(call).iter().for_each(|other| self.finish(other, usd_micros, Finish::Complete));
    }

    pub(crate) fn submit_as(&mut self, qos: Qos, id: &str, wait: bool) {
        let submit = Submit { task: "t".into(), wait, deadline_ms: Some(60_000), ..Submit::default() };
        self.submit_this(qos, id, &submit);
    }

    pub(crate) fn submit_this(&mut self, qos: Qos, id: &str, submit: &Submit) {
        let frame = Frame { qos: qos as u32, ..Frame::json(id, 1, Flags::SYN, kind::TASK_SUBMIT, submit) };
        let shard = self.settings.placement.shard_of(&TenantId::new(TENANT), &StreamId::new(id)) as usize;
        let tenant = TenantId::new(TENANT);
        self.shards[shard].handle(self.now, Input::Client { conn: CLIENT, tenant, received: received(frame) });
        self.run();
    }

    /// A running call says its next message, and has cost so much until then.
    pub(crate) fn say(&mut self, call: &str, usd_micros: u64) {
        let msg_seq = self.said.entry(call.into()).or_default();
        *msg_seq += 1;
        let msg_seq = *msg_seq;
        let cost = Cost { in_tokens: Tokens(50), out_tokens: Tokens(40), usd_micros: UsdMicros(usd_micros) };
        let part = AgentPartial { text: Some("so far".into()), cost, ..AgentPartial::default() };
        let frame = Frame::json(call, msg_seq, Flags::NONE, kind::RESULT_PARTIAL, &part);
        self.agent_says(self.calls[call], frame);
    }

    fn agent_says(&mut self, shard: u32, frame: Frame) {
        let (agent, incarnation) = (self.agent_of[&*frame.stream_id].clone(), "p1".into());
        let message = FromAgent::Frame { agent, incarnation, received: received(frame) };
        self.shards[shard as usize].handle(self.now, Input::Agent(message));
        self.run();
    }

    /// Every dispatched call that has no end yet ends at this cost.
    pub(crate) fn finish_all(&mut self, usd_micros: u64) {
        for call in self.calls.keys().cloned().collect::<Vec<_>>() {
            self.finish(&call, usd_micros, Finish::Complete);
        }
    }

    pub(crate) fn finish(&mut self, call: &str, usd_micros: u64, finish: Finish) {
        let Some(shard) = self.calls.remove(call) else { panic!("{call} doesn't run") };
        let cost = Cost { in_tokens: Tokens(50), out_tokens: Tokens(40), usd_micros: UsdMicros(usd_micros) };
        let last = AgentFinal { text: Some("ok".into()), cost, finish, ..AgentFinal::default() };
        let msg_seq = self.said.remove(call).unwrap_or(0) + 1;
        let frame = Frame::json(call, msg_seq, Flags::FIN, kind::RESULT_FINAL, &last);
        self.runs += 1;
        self.agent_says(shard, frame);
    }

    /// (limit, settled, held, lent) in micro-USD of the account at its home; the same of a shard's purse.
    pub(crate) fn account(&self, shard: u32) -> (u64, u64, u64, u64) {
        let rows = self.shards[shard as usize].state().account_views();
        let row = rows.iter().find(|r| r.account == TENANT);
        row.map_or((0, 0, 0, 0), |r| {
            let limit = r.limit.usd_micros.map_or(0, |u| u.0);
            (limit, r.settled.usd_micros.0, r.held.usd_micros.0, r.lent.usd_micros.0)
        })
    }

    pub(crate) fn final_of(&self, id: &str) -> Option<Final> {
        let found = self.to_client.iter().find(|f| &*f.stream_id == id && &*f.kind == kind::RESULT_FINAL);
        found.map(|f| f.read().unwrap())
    }

    pub(crate) fn refusal_of(&self, id: &str) -> Option<WireError> {
        let found = self.to_client.iter().find(|f| &*f.stream_id == id && &*f.kind == kind::ERROR);
        found.map(|f| f.read().unwrap())
    }

    pub(crate) fn records(&self, shard: u32, kind: &str) -> usize {
        let records = self.logs[shard as usize].iter().flat_map(|e| &e.records);
        records.filter(|r| r.record.as_ref().is_some_and(|r| Record::kind(r) == kind)).count()
    }

    pub(crate) fn restart(&mut self, shard: u32) {
        let i = shard as usize;
        let mut state = State::default();
        for (n, entry) in self.logs[i].iter().enumerate() {
            state.apply(n as u64 + 1, entry).unwrap();
        }
        assert_eq!(state.hash(), self.shards[i].state().hash(), "the fold is the live state");
        let pieces = state.to_checkpoint(shard);
        let state = State::from_checkpoint(&pieces).unwrap();
        let settings = Arc::new(Settings { shard, ..self.settings.clone() });
        self.shards[i] = Shard::recover(settings, state, self.now, "i2", None);
        self.run();
    }
}

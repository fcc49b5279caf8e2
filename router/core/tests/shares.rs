//! Money between shards: an account's home lends, others spend and give back. Shards, one agent, no socket; logs are durable at
//! once. What schedules of faults do to it is the simulation's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::agent::Agent;
use atp_core::clock::Now;
use atp_core::escrow::Escrow;
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
use atp_proto::{AgentName, Amount, ConnId, Cost, Frame, Limit, StreamId, TenantId, Tokens, UsdMicros, WireError};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const CLIENT: ConnId = ConnId(1);
const AGENT: ConnId = ConnId(2);
const SHARDS: u32 = 4;
const TENANT: &str = "acme";

struct Fleet {
    shards: Vec<Shard>,
    logs: Vec<Vec<Entry>>,
    settings: Settings,
    agent: Agent,
    now: Now,
    to_client: Vec<Frame>,
    to_agent: Vec<Frame>,
    /// The shard of each call that was dispatched.
    calls: BTreeMap<String, u32>,
    /// Messages between shards that don't arrive: (from, to).
    cut: BTreeSet<(u32, u32)>,
    runs: u64,
    /// What all shards have learned.
    learned: Statistics,
}

fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

/// An account with so much for ever; a call is estimated at 10 micro-USD and 100 tokens.
fn settings(usd_micros: u64, max_parallel: Option<u32>) -> Settings {
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
    fn new(settings: Settings) -> Self {
        let now = Now { mono_ms: 0, wall_ms: 1_700_000_000_000 };
        let genesis = |_| Genesis { log_id: vec![7; 16].into(), format: 2, shards: SHARDS, hash_seed: 1 };
        let shard = |n| {
            let settings = Arc::new(Settings { shard: n, ..settings.clone() });
            Shard::recover(settings, State::default(), now, "i1", Some(genesis(n)))
        };
        let agent = Agent::new(AgentName::new("a"), Arc::new(settings.clone()), now);
        let mut fleet = Self {
            shards: (0..SHARDS).map(shard).collect(),
            logs: vec![Vec::new(); SHARDS as usize],
            settings,
            agent,
            now,
            to_client: Vec::new(),
            to_agent: Vec::new(),
            calls: BTreeMap::new(),
            cut: BTreeSet::new(),
            runs: 0,
            learned: Statistics::default(),
        };
        fleet.run();
        let capabilities = Capabilities {
            agent: AgentName::new("a"),
            incarnation: "p1".into(),
            max_parallel: 200,
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
                    usd_micros: Some(UsdMicros(10)),
                    ..EstimateFigures::default()
                },
            }),
            reach: Amount::new(0, 0),
            ..Capabilities::default()
        };
        fleet.agent.handle(fleet.now, AgentInput::Connected { conn: AGENT, capabilities: Box::new(capabilities) });
        fleet.run();
        fleet
    }

    fn home(&self) -> u32 {
        self.settings.placement.home_of(TENANT)
    }

    /// A stream id on the n-th shard from the account's home.
    fn stream_on(&self, shard: u32) -> impl Iterator<Item = String> + use<> {
        let (placement, tenant) = (self.settings.placement.clone(), TenantId::new(TENANT));
        (0..).map(|n| format!("s{n}")).filter(move |id| placement.shard_of(&tenant, &StreamId::new(id)) == shard)
    }

    fn away(&self, n: u32) -> u32 {
        (self.home() + n) % SHARDS
    }

    fn run(&mut self) {
        loop {
            let mut moved = false;
            for n in 0..SHARDS {
                while let Some(effect) = self.shards[n as usize].poll_effect() {
                    moved = true;
                    self.carry_out(n, effect);
                }
            }
            while let Some(effect) = self.agent.poll_effect() {
                moved = true;
                match effect {
                    AgentEffect::Send { frame, .. } => {
                        if &*frame.kind == kind::DISPATCH {
                            let dispatch: Dispatch = frame.read().unwrap();
                            self.calls.insert(frame.stream_id.to_string(), dispatch.shard);
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
    }

    fn carry_out(&mut self, from: u32, effect: Effect) {
        let i = from as usize;
        match effect {
            Effect::Append { position, entry, .. } => {
                assert_eq!(position, self.logs[i].len() as u64 + 1);
                self.logs[i].push(Entry::decode(entry).unwrap());
                self.shards[i].handle(self.now, Input::Durable { position });
            }
            Effect::Send { frame, .. } => self.to_client.push(frame),
            Effect::ToAgent { message, .. } => self.agent.handle(self.now, AgentInput::Shard(message)),
            Effect::ToShard { shard, message } => {
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
    fn teach(&mut self) {
        let learned = Arc::new(self.learned.clone());
        for shard in &mut self.shards {
            shard.handle(self.now, Input::Learned(learned.clone()));
        }
        self.run();
    }

    fn wait(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now.mono_ms += 100;
            self.now.wall_ms += 100;
            self.shards.iter_mut().for_each(|s| s.handle_timeout(self.now));
            self.agent.handle_timeout(self.now);
            self.agent.handle(self.now, AgentInput::Alive { conn: AGENT });
            self.run();
        }
    }

    fn submit(&mut self, id: &str, wait: bool) {
        let submit = Submit { task: "t".into(), wait, deadline_ms: Some(60_000), ..Submit::default() };
        let frame = Frame::json(id, 1, Flags::SYN, kind::TASK_SUBMIT, &submit);
        let shard = self.settings.placement.shard_of(&TenantId::new(TENANT), &StreamId::new(id)) as usize;
        let tenant = TenantId::new(TENANT);
        self.shards[shard].handle(self.now, Input::Client { conn: CLIENT, tenant, received: received(frame) });
        self.run();
    }

    /// Every dispatched call that has no end yet ends at this cost.
    fn finish_all(&mut self, usd_micros: u64) {
        for (call, shard) in std::mem::take(&mut self.calls) {
            let cost = Cost { in_tokens: Tokens(50), out_tokens: Tokens(40), usd_micros: UsdMicros(usd_micros) };
            let last = AgentFinal { text: Some("ok".into()), cost, ..AgentFinal::default() };
            let frame = Frame::json(call, 1, Flags::FIN, kind::RESULT_FINAL, &last);
            let (agent, incarnation) = (AgentName::new("a"), "p1".into());
            let message = FromAgent::Frame { agent, incarnation, received: received(frame) };
            self.shards[shard as usize].handle(self.now, Input::Agent(message));
            self.runs += 1;
            self.run();
        }
    }

    /// (limit, settled, held, lent) in micro-USD of the account at its home; the same of a shard's purse.
    fn account(&self, shard: u32) -> (u64, u64, u64, u64) {
        let rows = self.shards[shard as usize].state().account_views();
        let row = rows.iter().find(|r| r.account == TENANT);
        row.map_or((0, 0, 0, 0), |r| {
            let limit = r.limit.usd_micros.map_or(0, |u| u.0);
            (limit, r.settled.usd_micros.0, r.held.usd_micros.0, r.lent.usd_micros.0)
        })
    }

    fn final_of(&self, id: &str) -> Option<Final> {
        let found = self.to_client.iter().find(|f| &*f.stream_id == id && &*f.kind == kind::RESULT_FINAL);
        found.map(|f| f.read().unwrap())
    }

    fn refusal_of(&self, id: &str) -> Option<WireError> {
        let found = self.to_client.iter().find(|f| &*f.stream_id == id && &*f.kind == kind::ERROR);
        found.map(|f| f.read().unwrap())
    }

    fn records(&self, shard: u32, kind: &str) -> usize {
        let records = self.logs[shard as usize].iter().flat_map(|e| &e.records);
        records.filter(|r| r.record.as_ref().is_some_and(|r| Record::kind(r) == kind)).count()
    }

    fn restart(&mut self, shard: u32) {
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

#[test]
fn a_task_away_from_home_spends_a_share_that_comes_back() {
    let mut fleet = Fleet::new(settings(100_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let id = fleet.stream_on(away).next().unwrap();
    fleet.submit(&id, true);
    assert_eq!(fleet.calls.len(), 1, "{:?}", fleet.to_client);
    let (limit, _, held, _) = fleet.account(away);
    assert!(held == 10 && limit > 10, "a share with some to spare: {held} of {limit}");
    assert_eq!(fleet.account(home), (100_000, 0, 0, limit));
    fleet.finish_all(9);
    assert_eq!(fleet.final_of(&id).unwrap().state, TaskState::Done);
    fleet.wait(15_000);
    assert_eq!(fleet.account(home), (100_000, 9, 0, 0), "idle shares go back");
    assert_eq!((fleet.records(away, "share_out"), fleet.records(away, "share_back")), (2, 2));
    assert!(fleet.shards[away as usize].state().holding().values().all(|line| line.out.is_empty()));
}

#[test]
fn who_can_t_be_paid_is_told_so_before_it_is_accepted_wherever_it_is() {
    let mut fleet = Fleet::new(settings(25, None));
    let (home, away, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    for shard in [away, other] {
        let id = fleet.stream_on(shard).next().unwrap();
        fleet.submit(&id, true);
    }
    assert_eq!(fleet.calls.len(), 2);
    fleet.finish_all(10);
    // 5 are left: a call is estimated at 10.
    for (n, wait) in [(1, true), (2, false), (3, true)] {
        let id = fleet.stream_on(fleet.away(n)).nth(1).unwrap();
        fleet.submit(&id, wait);
        fleet.wait(1_500);
        let error = fleet.refusal_of(&id).unwrap_or_else(|| panic!("shard {n}: {:?}", fleet.final_of(&id)));
        assert_eq!((error.code.as_str(), error.limit), ("EBUDGET", Some(25)), "{error}");
    }
    assert_eq!(fleet.account(home).1, 20);
}

#[test]
fn idle_shares_are_found_for_whoever_needs_them() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (away, other) = (fleet.away(1), fleet.away(2));
    // All of the money is lent out, bit by bit, and idle.
    for id in fleet.stream_on(away).take(60).collect::<Vec<_>>() {
        fleet.submit(&id, true);
    }
    fleet.finish_all(1);
    assert_eq!(fleet.runs, 60);
    for wait in [true, false] {
        let ids: Vec<String> = fleet.stream_on(other).skip(if wait { 0 } else { 40 }).take(40).collect();
        for id in &ids {
            fleet.submit(id, wait);
        }
        fleet.wait(1_000);
        assert!(ids.iter().all(|id| fleet.refusal_of(id).is_none()), "wait: {wait}");
        assert_eq!(fleet.calls.len(), 40);
        fleet.finish_all(1);
        assert!(ids.iter().all(|id| fleet.final_of(id).is_some_and(|f| f.state == TaskState::Done)));
    }
    fleet.wait(15_000);
    assert_eq!(fleet.account(fleet.home()), (1_000, 140, 0, 0));
}

#[test]
fn every_cent_can_be_spent_and_none_twice() {
    let mut fleet = Fleet::new(settings(500, None));
    let ids: Vec<String> = (0..SHARDS).flat_map(|n| fleet.stream_on(n).take(25).collect::<Vec<_>>()).collect();
    for id in &ids {
        fleet.submit(id, true);
    }
    for _ in 0..30 {
        fleet.wait(300);
        fleet.finish_all(10);
    }
    fleet.wait(61_000);
    assert_eq!(fleet.runs, 50, "500 buy 50 calls at 10");
    let done = ids.iter().filter(|id| fleet.final_of(id).is_some_and(|f| f.state == TaskState::Done)).count();
    assert_eq!(done, 50);
    assert_eq!(fleet.account(fleet.home()), (500, 500, 0, 0));
}

#[test]
fn a_shard_that_is_cut_off_spends_what_it_holds_and_no_more() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let ids: Vec<String> = fleet.stream_on(away).take(200).collect();
    fleet.submit(&ids[0], true);
    let (limit, ..) = fleet.account(away);
    fleet.cut.extend([(home, away), (away, home)]);
    ids[1..].iter().for_each(|id| fleet.submit(id, true));
    fleet.wait(2_000);
    // A running call keeps a quarter of its estimate free for its next slice.
    let bought = fleet.calls.len() as u64;
    assert!(bought <= limit / 10 && bought >= limit / 13, "{bought} of {limit}");
    assert_eq!(fleet.account(home).3, limit, "no time-out frees them");
    fleet.cut.clear();
    fleet.wait(3_000);
    assert!(fleet.calls.len() > 75, "{}", fleet.calls.len());
}

#[test]
fn owners_die_between_any_two_messages() {
    for n in 0..12 {
        let mut fleet = Fleet::new(settings(1_000, None));
        let (home, away) = (fleet.home(), fleet.away(1));
        let ids: Vec<String> = fleet.stream_on(away).take(6).collect();
        for (i, id) in ids.iter().enumerate() {
            match n % 3 {
                0 => fleet.cut.insert((home, away)),
                1 => fleet.cut.insert((away, home)),
                _ => false,
            };
            fleet.submit(id, true);
            if (n / 3) % 2 == 0 {
                fleet.restart(if i % 2 == 0 { home } else { away });
            } else {
                fleet.restart(if i % 2 == 0 { away } else { home });
            }
            fleet.cut.clear();
            // A new owner asks its agents; this one has nothing to say.
            fleet.to_agent.clear();
            fleet.wait(1_500);
        }
        fleet.finish_all(7);
        fleet.wait(90_000);
        let (limit, settled, held, lent) = fleet.account(home);
        assert_eq!((limit, held, lent), (1_000, 0, 0), "run {n}");
        let away_settled: u64 = fleet.account(away).1;
        assert_eq!(away_settled, 0);
        assert!(settled >= 7 * fleet.runs, "run {n}: {settled} of {} calls", fleet.runs);
    }
}

#[test]
fn calls_at_once_are_counted_over_all_shards() {
    let mut fleet = Fleet::new(settings(100_000, Some(5)));
    let ids: Vec<String> = (0..SHARDS).flat_map(|n| fleet.stream_on(n).take(5).collect::<Vec<_>>()).collect();
    for id in &ids {
        fleet.submit(id, true);
    }
    let mut most = 0;
    for _ in 0..200 {
        fleet.wait(300);
        most = most.max(fleet.calls.len());
        fleet.finish_all(1);
    }
    assert!(most <= 5, "{most} at once");
    assert_eq!(fleet.runs, 20);
}

#[test]
fn what_one_shard_learns_of_an_agent_all_know() {
    let mut fleet = Fleet::new(settings(100_000, None));
    for n in 0..3 {
        let id = fleet.stream_on(fleet.away(n)).next().unwrap();
        fleet.submit(&id, true);
        fleet.finish_all(4);
    }
    fleet.teach();
    let last = fleet.away(3);
    let id = fleet.stream_on(last).next().unwrap();
    fleet.submit(&id, true);
    let reserved = fleet.logs[last as usize].iter().flat_map(|e| &e.records).find_map(|r| match &r.record {
        Some(Record::Reserve(r)) => Some(r.calls[0].clone()),
        _ => None,
    });
    let call = reserved.expect("it was reserved");
    assert_eq!((call.source.as_str(), call.samples, call.mean.usd_micros), ("statistics", 3, 4));
}

#[test]
fn an_agent_s_home_lowers_its_tier_and_writes_down_who_is_drained() {
    let mut fleet = Fleet::new(settings(1_000_000, None));
    let home = fleet.settings.placement.home_of_agent(&AgentName::new("a"));
    for n in 0..12 {
        let id = fleet.stream_on(n % SHARDS).nth(n as usize).unwrap();
        fleet.submit(&id, true);
        fleet.finish_all(100);
    }
    fleet.teach();
    fleet.teach();
    let tiers: Vec<usize> = (0..SHARDS).map(|n| fleet.records(n, "tier")).collect();
    assert_eq!((tiers.iter().sum::<usize>(), tiers[home as usize]), (1, 1), "{tiers:?}");
    let agent = AgentName::new("a");
    fleet.shards[home as usize].handle(fleet.now, Input::DrainAgent { id: 1, agent, drained: true });
    fleet.run();
    assert_eq!((0..SHARDS).map(|n| fleet.records(n, "agent")).sum::<usize>(), 1, "its home writes it down");
    for n in 0..SHARDS {
        let id = fleet.stream_on(n).nth(50).unwrap();
        fleet.submit(&id, false);
        let error = fleet.refusal_of(&id).expect("nobody takes it");
        assert_eq!(error.code.as_str(), "EAGENTDOWN", "shard {n}: {error}");
    }
}

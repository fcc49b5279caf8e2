//! One task through the two machines, without a socket: a frame in, a bill out; a restart in the middle.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::agent::Agent;
use atp_core::clock::Now;
use atp_core::message::{AgentEffect, AgentInput, Answer, Effect, FromAgent, Input, Machine, Query, ToAgent};
use atp_core::record::{Entry, Genesis, Record, Tier};
use atp_core::registry::RunCost;
use atp_core::replay::StreamReplay;
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::*;
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, ConnId, Cost, Frame, Limit, Qos, StreamId, TenantId, Tokens, UsdMicros};
use prost::Message;
use std::collections::VecDeque;
use std::sync::Arc;

const CLIENT: ConnId = ConnId(1);
const AGENT: ConnId = ConnId(2);

struct House {
    settings: Arc<Settings>,
    shard: Shard,
    agent: Agent,
    log: Vec<Entry>,
    now: Now,
    to_client: Vec<Frame>,
    to_agent: VecDeque<Frame>,
    answers: Vec<Answer>,
    counted_up_ppm: Option<u32>,
}

fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

impl House {
    fn new() -> Self {
        Self::with(Settings::default())
    }

    fn with(settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let now = Now { mono_ms: 0, wall_ms: 1_700_000_000_000 };
        let genesis = Genesis { log_id: vec![7; 16].into(), format: 1, shards: 1, hash_seed: 0 };
        let shard = Shard::recover(settings.clone(), State::default(), now, "i1", Some(genesis));
        let agent = Agent::new(AgentName::new("a"), settings.clone(), now);
        let mut house = Self {
            settings,
            shard,
            agent,
            log: vec![],
            now,
            to_client: vec![],
            to_agent: VecDeque::new(),
            answers: vec![],
            counted_up_ppm: None,
        };
        house.run();
        house
    }

    /// Carries out effects until nothing moves; the log is durable at once.
    fn run(&mut self) {
        loop {
            let mut moved = false;
            while let Some(effect) = self.shard.poll_effect() {
                moved = true;
                match effect {
                    Effect::Append { position, entry, .. } => {
                        assert_eq!(position, self.log.len() as u64 + 1);
                        self.log.push(Entry::decode(entry).unwrap());
                        self.shard.handle(self.now, Input::Durable { position });
                    }
                    Effect::Send { frame, .. } => self.to_client.push(frame),
                    Effect::ToAgent { message, .. } => self.agent.handle(self.now, AgentInput::Shard(message)),
                    Effect::Replay { conn, tenant, stream, from, after, upto } => {
                        let mut replay = StreamReplay::new(&tenant, &stream, after, upto);
                        for (i, entry) in self.log.iter().enumerate().skip(from as usize) {
                            self.to_client.extend(replay.feed(i as u64 + 1, entry));
                        }
                        self.shard.handle(self.now, Input::Replayed { conn, tenant, stream, upto });
                    }
                    Effect::Answer { answer, .. } => self.answers.push(answer),
                    Effect::Close { error, .. } => panic!("{error}"),
                    Effect::ToShard { .. } | Effect::Tool { .. } | Effect::Learned(_) | Effect::Metric(_) => {}
                }
            }
            while let Some(effect) = self.agent.poll_effect() {
                moved = true;
                match effect {
                    // Its window comes by itself whenever it moves.
                    AgentEffect::Send { frame, .. } if &*frame.kind == kind::WINDOW_UPDATE => {}
                    AgentEffect::Send { frame, .. } => self.to_agent.push_back(frame),
                    AgentEffect::ToShard { message, .. } => self.shard.handle(self.now, Input::Agent(message)),
                    AgentEffect::Close { error, .. } => panic!("{error}"),
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn wait(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now.mono_ms += 100;
            self.now.wall_ms += 100;
            self.shard.handle_timeout(self.now);
            self.agent.handle_timeout(self.now);
            self.agent.handle(self.now, AgentInput::Alive { conn: AGENT });
            self.run();
        }
    }

    fn connect(&mut self, calls: Vec<ListedCall>) {
        self.connect_as("p1", AGENT, calls);
        self.run();
    }

    fn connect_as(&mut self, incarnation: &str, conn: ConnId, calls: Vec<ListedCall>) {
        let capabilities = Capabilities {
            agent: AgentName::new("a"),
            incarnation: incarnation.into(),
            max_parallel: 2,
            models: vec![ModelInfo {
                id: "m1".into(),
                in_usd_micros_per_mtok: Some(1_000_000),
                out_usd_micros_per_mtok: Some(4_000_000),
                context_tokens: None,
            }],
            reach: Amount::new(20, 80),
            calls,
            counted_up_ppm: self.counted_up_ppm,
            ..Capabilities::default()
        };
        self.agent.handle(self.now, AgentInput::Connected { conn, capabilities: Box::new(capabilities) });
    }

    fn submit(&mut self, id: &str, submit: &Submit) {
        let frame = Frame::json(id, 1, Flags::SYN, kind::TASK_SUBMIT, submit);
        self.shard.handle(
            self.now,
            Input::Client { conn: CLIENT, tenant: TenantId::new("default"), received: received(frame) },
        );
        self.run();
    }

    fn says(&mut self, frame: Frame) {
        self.says_as("p1", frame);
    }

    fn says_as(&mut self, incarnation: &str, frame: Frame) {
        let (agent, incarnation) = (AgentName::new("a"), incarnation.into());
        let message = FromAgent::Frame { agent, incarnation, received: received(frame) };
        self.shard.handle(self.now, Input::Agent(message));
        self.run();
    }

    fn dispatched(&mut self) -> Dispatch {
        let frame = self.to_agent.pop_front().expect("a dispatch");
        assert_eq!(&*frame.kind, kind::DISPATCH);
        frame.read().unwrap()
    }

    fn restart(&mut self) {
        let mut state = State::default();
        for (i, entry) in self.log.iter().enumerate() {
            state.apply(i as u64 + 1, entry).unwrap();
        }
        assert_eq!(state.hash(), self.shard.state().hash());
        self.shard = Shard::recover(self.settings.clone(), state, self.now, "i2", None);
        self.run();
        let owner = ToAgent::Owner { shard: 0, epoch: self.shard.epoch() };
        self.agent.handle(self.now, AgentInput::Shard(owner));
        self.run();
    }

    fn kinds(&self) -> Vec<String> {
        self.to_client.iter().filter(|f| f.msg_seq > 0).map(|f| f.kind.to_string()).collect()
    }
}

fn partial(call: &Dispatch, seq: u64, text: &str, out: u64) -> Frame {
    let cost = Cost { in_tokens: Tokens(70), out_tokens: Tokens(out), usd_micros: UsdMicros(0) };
    let content = AgentPartial { text: Some(text.into()), cost, ..AgentPartial::default() };
    Frame::json(call.call_id.to_string(), seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

fn last(call: &Dispatch, seq: u64, out: u64) -> Frame {
    let cost = Cost { in_tokens: Tokens(70), out_tokens: Tokens(out), usd_micros: UsdMicros(0) };
    Frame::json(
        call.call_id.to_string(),
        seq,
        Flags::FIN,
        kind::RESULT_FINAL,
        &AgentFinal { cost, ..AgentFinal::default() },
    )
}

fn task(text: &str) -> Submit {
    Submit { task: text.into(), ..Submit::default() }
}

#[test]
fn a_frame_in_a_bill_out() {
    let mut house = House::new();
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    assert_eq!((call.task.as_str(), call.go_on), ("hi", false));
    house.says(partial(&call, 1, "one ", 10));
    house.says(partial(&call, 2, "two", 20));
    house.says(last(&call, 3, 25));
    assert_eq!(
        house.kinds(),
        [
            "control.accepted",
            "agent.result.partial",
            "agent.result.partial",
            "agent.result.partial",
            "agent.result.final",
            "control.bill"
        ]
    );
    let bill: Bill = house.to_client.last().unwrap().read().unwrap();
    assert_eq!(bill.settled, Amount::new(95, 170));
    assert_eq!((bill.held, bill.calls[0].source), (Amount::ZERO, Some(Source::Reported)));
    let answer: Final = house.to_client[house.to_client.len() - 2].read().unwrap();
    assert_eq!((answer.state, answer.result.text.as_str()), (TaskState::Done, "one two"));
    // The same SYN again gets the same frames again, out of the log.
    let first: Vec<Frame> = house.to_client.drain(..).filter(|f| f.msg_seq > 0).collect();
    house.submit("s1", &task("hi"));
    let again: Vec<Frame> = house.to_client.drain(..).filter(|f| f.msg_seq > 0).collect();
    assert_eq!(first, again);
    house.shard.handle(house.now, Input::Query { id: 1, query: Query::Verify });
    house.run();
    assert!(matches!(house.answers.last(), Some(Answer::Verify(v)) if v.open_reservations == 0));
}

#[test]
fn what_another_process_of_the_handle_says_does_not_count() {
    let mut house = House::new();
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    house.says(partial(&call, 1, "one", 10));
    house.says_as("p2", last(&call, 2, 1));
    assert_eq!(house.kinds().last().unwrap(), "agent.result.partial", "still running");
    house.says(last(&call, 2, 25));
    let bill: Bill = house.to_client.last().unwrap().read().unwrap();
    assert_eq!(bill.settled, Amount::new(95, 170));
}

#[test]
fn atp_4_15_what_was_meant_for_a_process_that_is_gone_is_never_told_to_the_next() {
    let mut house = House::new();
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    house.says(partial(&call, 1, "one", 10));
    let told: Vec<Frame> = house.to_agent.drain(..).collect();
    assert!(told.iter().any(|f| &*f.kind == kind::ACK), "what it says is acknowledged to it: {told:?}");
    // Another process is there, and the shard hears of it only behind what the first one had said.
    house.agent.handle(house.now, AgentInput::Disconnected { conn: AGENT });
    house.connect_as("p2", ConnId(3), vec![]);
    house.says(partial(&call, 2, "two", 20));
    assert_eq!(house.kinds().iter().filter(|k| *k == "agent.result.partial").count(), 3, "two, and how it ended");
    let its_own = call.call_id.to_string();
    assert!(house.to_agent.iter().all(|f| *f.stream_id != *its_own), "{:?}", house.to_agent);
}

#[test]
fn an_agent_that_counts_is_told_less_than_its_hold() {
    let mut house = House::new();
    house.counted_up_ppm = Some(100_000);
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    // Guarded: 201 tokens of prompt, 1000 + 500 of output; 10 % of what is told stay for what is booked on top.
    assert_eq!(call.grant.tokens, Tokens(1_701 * 10 / 11));
    let counted = AgentFinal {
        cost: Cost { in_tokens: Tokens(201), out_tokens: Tokens(1_345), usd_micros: UsdMicros(0) },
        usage_source: UsageSource::Counted,
        finish: Finish::Grant,
        ..AgentFinal::default()
    };
    house.says(Frame::json(call.call_id.to_string(), 1, Flags::FIN, kind::RESULT_FINAL, &counted));
    let bill: Bill = house.to_client.last().unwrap().read().unwrap();
    assert_eq!(bill.calls[0].actual.amount().unwrap().tokens, Tokens(222 + 1_480));
}

#[test]
fn a_restart_in_mid_answer_loses_nothing() {
    let mut house = House::new();
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    house.says(partial(&call, 1, "one ", 10));
    house.restart();
    house.wait(200);
    let asked: Vec<Dispatch> = house.to_agent.drain(..).filter_map(|f| f.read().ok()).collect();
    assert!(asked.iter().any(|d| d.go_on && d.call_id == call.call_id && d.epoch > call.epoch), "{asked:?}");
    house.says(partial(&call, 2, "two", 20));
    house.says(last(&call, 3, 25));
    house.to_client.clear();
    house.submit("s1", &task("hi"));
    assert_eq!(house.kinds().len(), 6);
    let bill: Bill = house.to_client.last().unwrap().read().unwrap();
    assert_eq!(bill.settled, Amount::new(95, 170));
}

#[test]
fn the_grant_grows_in_slices_up_to_the_budget() {
    let mut house = House::new();
    house.connect(vec![]);
    let budget = Limit { tokens: Some(Tokens(3_000)), usd_micros: Some(UsdMicros(1_000_000)) };
    house.submit("s1", &Submit { budget, ..task("hi") });
    let call = house.dispatched();
    assert_eq!(call.grant.tokens, Tokens(201 + 1_000 + 500));
    let mut grant = call.grant;
    for seq in 1..=12 {
        house.says(partial(&call, seq, "x", seq * 200));
        while let Some(frame) = house.to_agent.pop_front() {
            if &*frame.kind == kind::BUDGET_UPDATE {
                let update: BudgetUpdate = frame.read().unwrap();
                assert!(grant.fits(update.grant));
                grant = update.grant;
            }
        }
    }
    assert_eq!(grant.tokens, Tokens(3_000));
}

#[test]
fn what_can_never_be_paid_is_refused_at_once_and_for_good() {
    let mut house = House::new();
    house.connect(vec![]);
    let poor = Submit { budget: Limit { tokens: Some(Tokens(10)), usd_micros: None }, ..task("hi") };
    house.submit("s1", &poor);
    let refusal = house.to_client.pop().unwrap();
    assert!(refusal.flags.has(Flags::RST));
    let error: atp_proto::WireError = refusal.read().unwrap();
    assert_eq!((error.code, error.judged), (atp_proto::Code::Budget, true));
    house.restart();
    house.submit("s1", &poor);
    assert_eq!(house.to_client.pop().unwrap().read::<atp_proto::WireError>().unwrap(), error);
    assert!(house.to_agent.iter().all(|f| &*f.kind != kind::DISPATCH));
}

#[test]
fn a_lost_agent_settles_at_hold_and_reach_and_is_replaced() {
    let mut house = House::new();
    house.connect(vec![]);
    house.submit("s1", &task("hi"));
    let call = house.dispatched();
    house.agent.handle(house.now, AgentInput::Disconnected { conn: AGENT });
    house.run();
    house.wait(16_000);
    house.connect(vec![]);
    house.wait(1_500);
    let second = loop {
        let next = house.dispatched();
        if next.call_id != call.call_id {
            break next;
        }
    };
    house.says(last(&second, 1, 5));
    let bill: Bill = house.to_client.last().unwrap().read().unwrap();
    assert_eq!(bill.calls[0].source, Some(Source::UnknownAtHold));
    assert_eq!(bill.calls[0].actual.usd_micros.0, call.grant.usd_micros.0 + 80);
    assert_eq!(bill.calls[1].retry_of, Some(call.call_id));
    assert_eq!(StreamId::new("s1").as_str(), bill.stream_id);
}

#[test]
fn what_an_agent_s_end_decides_is_an_entry_for_each_of_its_calls() {
    let mut house = House::with(Settings { retries: 0, ..Settings::default() });
    house.connect(vec![]);
    for id in ["s1", "s2"] {
        house.submit(id, &task("hi"));
    }
    for _ in 0..2 {
        let call = house.dispatched();
        house.says(partial(&call, 1, &"word ".repeat(10_000), 10));
    }
    house.agent.handle(house.now, AgentInput::Disconnected { conn: AGENT });
    house.run();
    // Another process has its name: what the first one ran is lost, all at once.
    house.connect_as("p2", ConnId(9), vec![]);
    house.run();
    let closes = |entry: &Entry| entry.records.iter().filter(|r| matches!(r.record, Some(Record::Close(_)))).count();
    let closes: Vec<usize> = house.log.iter().map(closes).filter(|n| *n > 0).collect();
    assert_eq!(closes, [1, 1], "the answers of all its calls may be more than an entry takes");
}

#[test]
fn statistics_take_over_and_underestimation_lowers_a_tier() {
    let mut house = House::new();
    house.connect(vec![]);
    let mut out = 1_500;
    let mut sources = Vec::new();
    for n in 1..=10 {
        house.submit(&format!("s{n}"), &task("hi"));
        let call = house.dispatched();
        house.says(last(&call, 1, out));
        let bill: Bill = house.to_client.last().unwrap().read().unwrap();
        sources.push((bill.calls[0].estimate.source.clone(), bill.calls[0].estimate.samples));
        house.to_agent.clear();
        // Each answer is longer than the mean of those before it, by more than 20 %.
        out = out * 13 / 10;
    }
    assert_eq!(sources[2], ("class_default".into(), 0));
    assert_eq!(sources[3..5], [("statistics".into(), 3), ("statistics".into(), 4)]);
    let tiers: Vec<&Record> = house
        .log
        .iter()
        .flat_map(|e| &e.records)
        .filter_map(|r| r.record.as_ref())
        .filter(|r| matches!(r, Record::Tier(_)))
        .collect();
    let silver = Tier { agent: "a".into(), tier: 2, runs: 10, under_ppm: 1_000_000 };
    assert_eq!(tiers, [&Record::Tier(silver)]);
    house.shard.handle(house.now, Input::Query { id: 1, query: Query::Agents });
    house.run();
    let Some(Answer::Agents(agents)) = house.answers.pop() else { panic!("no answer") };
    assert_eq!((agents[0].qos_tier, agents[0].under_rate_7d_ppm), (Qos::Silver, Some(1_000_000)));
    // Nobody else matches: gold is served all the same. A new owner has learned the same.
    let learned = house.shard.state().statistics().clone();
    house.restart();
    assert_eq!(*house.shard.state().statistics(), learned);
    let submit = Frame { qos: Qos::Gold as u32, ..Frame::json("g1", 1, Flags::SYN, kind::TASK_SUBMIT, &task("hi")) };
    let tenant = TenantId::new("default");
    house.shard.handle(house.now, Input::Client { conn: CLIENT, tenant, received: received(submit) });
    house.run();
    house.dispatched();
}

#[test]
fn a_task_that_ended_asks_no_agent_for_a_slot() {
    let mut house = House::new();
    house.connect(vec![]);
    for (n, deadline_ms) in [(1, 60_000), (2, 60_000), (3, 500), (4, 60_000)] {
        house.submit(&format!("s{n}"), &Submit { deadline_ms: Some(deadline_ms), ..task("hi") });
    }
    assert_eq!((house.agent.running(), house.agent.waiting()), (2, 2));
    house.wait(600);
    assert!(house.to_client.iter().any(|f| &*f.stream_id == "s3" && &*f.kind == kind::BILL));
    assert_eq!((house.agent.running(), house.agent.waiting()), (2, 1), "its place is nobody's");
}

#[test]
fn atp_8_13_no_slot_is_asked_for_a_call_that_would_be_cut_off() {
    let mut house = House::new();
    house.connect(vec![]);
    // What is known then: such calls take 1 s.
    for n in 1..=3 {
        house.submit(&format!("m{n}"), &task("hi"));
        let call = house.dispatched();
        house.wait(1_000);
        house.says(last(&call, 1, 10));
        house.to_agent.clear();
    }
    let within = |deadline_ms| Submit { deadline_ms: Some(deadline_ms), ..task("hi") };
    (1..=2).for_each(|n| house.submit(&format!("r{n}"), &within(600_000)));
    let first = house.dispatched();
    (1..=3).for_each(|n| house.submit(&format!("s{n}"), &within(10_000)));
    house.wait(7_900);
    house.to_agent.clear();
    house.says(last(&first, 1, 10));
    house.to_agent.retain(|f| &*f.kind == kind::DISPATCH);
    let second = house.dispatched();
    assert_eq!((house.agent.running(), house.agent.waiting()), (2, 2), "twice as long is left for the next");
    house.wait(200);
    house.says(last(&second, 1, 10));
    assert_eq!(house.agent.running(), 1, "and no longer for those behind it");
    // A short task is tried all the same.
    house.submit("s4", &within(1_000));
    assert_eq!(house.agent.running(), 2);
}

#[test]
fn the_registry_speaks_of_runs_that_the_router_has_not_seen() {
    let mut settings = Settings::default();
    let cost = RunCost { mean: 1_500, p90: 1_800, runs: 9, preliminary: false, in_ppm: None };
    Arc::make_mut(&mut settings.registry).add("plugin:a", "m1", cost);
    let mut house = House::with(settings);
    house.connect(vec![]);
    let mut seen = Vec::new();
    for n in 1..=4 {
        house.submit(&format!("s{n}"), &task("hi"));
        let call = house.dispatched();
        house.says(last(&call, 1, 1_500));
        let bill: Bill = house.to_client.last().unwrap().read().unwrap();
        let e = &bill.calls[0].estimate;
        seen.push((e.source.clone(), e.samples, e.tokens.0, e.usd_micros.0));
        house.to_agent.clear();
    }
    assert_eq!(seen[2], ("registry".into(), 9, 1_500, 6_000));
    assert_eq!((seen[3].0.as_str(), seen[3].1), ("statistics", 3));
}

//! Tools through the shard: who may use which, what it costs, and one answer to each request, also after a restart.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::clock::Now;
use atp_core::message::{Effect, FromAgent, Input, Machine, ToAgent, ToolDone};
use atp_core::policy::Rule;
use atp_core::record::{Entry, Genesis, Record, ToolVerdict};
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::*;
use atp_proto::frame::{Extra, Flags, Meta, kind};
use atp_proto::pb::ToolCost;
use atp_proto::{AgentName, Amount, CallId, Code, ConnId, Cost, Frame, Limit, TenantId, Tokens, UsdMicros, WireError};
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

/// A shard whose log is durable at once, and one agent that gets a slot whenever it is asked for.
struct House {
    settings: Arc<Settings>,
    shard: Shard,
    log: Vec<Entry>,
    now: Now,
    to_client: VecDeque<Frame>,
    to_agent: VecDeque<Frame>,
    runs: VecDeque<(CallId, u32, u64, String, Value)>,
}

fn settings() -> Settings {
    let mut settings = Settings::default();
    let price = Amount { usd_micros: UsdMicros(70), ..Amount::ZERO };
    settings.tools.mediated.insert("fs.read".into(), price);
    let all = ["fs.read", "search", "free"].map(str::to_owned);
    settings.tools.allowed_default = Some(all.into_iter().collect());
    settings
}

fn agent(tools: &[&str], asks: &[&str]) -> Capabilities {
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    let model = ModelInfo {
        id: "m".into(),
        in_usd_micros_per_mtok: Some(1_000_000),
        out_usd_micros_per_mtok: Some(1_000_000),
        context_tokens: None,
    };
    Capabilities {
        agent: AgentName::new("a"),
        incarnation: "p1".into(),
        max_parallel: 2,
        models: vec![model],
        reach: Amount::new(20, 20),
        tools: names(tools),
        tool_permissions: names(asks),
        ..Capabilities::default()
    }
}

fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

impl House {
    fn new(settings: Settings, capabilities: Capabilities) -> Self {
        let (settings, now) = (Arc::new(settings), Now { mono_ms: 0, wall_ms: 1_700_000_000_000 });
        let genesis = Genesis { log_id: vec![7; 16].into(), format: 1, shards: 1, hash_seed: 0 };
        let shard = Shard::recover(settings.clone(), State::default(), now, "i1", Some(genesis));
        let mut house = Self {
            settings,
            shard,
            log: vec![],
            now,
            to_client: VecDeque::new(),
            to_agent: VecDeque::new(),
            runs: VecDeque::new(),
        };
        house.run();
        house.agent_up(capabilities);
        house
    }

    fn agent_up(&mut self, capabilities: Capabilities) {
        let agent = capabilities.agent.clone();
        let status = Some(AgentStatus::default());
        let up = FromAgent::Up { agent, capabilities: Arc::new(capabilities), status, drained: false };
        self.shard.handle(self.now, Input::Agent(up));
        self.run();
    }

    fn run(&mut self) {
        while let Some(effect) = self.shard.poll_effect() {
            match effect {
                Effect::Append { position, entry, .. } => {
                    self.log.push(Entry::decode(entry).unwrap());
                    self.shard.handle(self.now, Input::Durable { position });
                }
                Effect::Send { frame, .. } => self.to_client.push_back(frame),
                Effect::ToAgent { agent, message: ToAgent::Want { call, epoch, .. } } => {
                    let incarnation = "p1".into();
                    let lent = FromAgent::Lent { agent, incarnation, call, epoch, keeper: "".into() };
                    self.shard.handle(self.now, Input::Agent(lent));
                }
                Effect::ToAgent { agent, message: ToAgent::Dispatch { call, epoch, frame, .. } } => {
                    self.to_agent.push_back(frame);
                    self.shard.handle(self.now, Input::Agent(FromAgent::Sent { agent, call, epoch }));
                }
                Effect::ToAgent { message: ToAgent::Pass { frame, .. }, .. } => self.to_agent.push_back(frame),
                Effect::Tool { call, attempt, request, tool, args } => {
                    self.runs.push_back((call, attempt, request, tool.to_string(), args));
                }
                _ => {}
            }
        }
    }

    fn submit(&mut self, stream: &str, tools: &[&str]) {
        let meta = Meta { tool_permissions: tools.iter().map(|t| (*t).to_owned()).collect(), ..Meta::default() };
        let task = Submit { task: "t".into(), ..Submit::default() };
        let frame =
            Frame { meta: Some(Box::new(meta)), ..Frame::json(stream, 1, Flags::SYN, kind::TASK_SUBMIT, &task) };
        let (conn, tenant) = (ConnId(1), TenantId::new("default"));
        self.shard.handle(self.now, Input::Client { conn, tenant, received: received(frame) });
        self.run();
    }

    fn dispatched(&mut self) -> Dispatch {
        let at = self.to_agent.iter().position(|f| &*f.kind == kind::DISPATCH).expect("a dispatch");
        self.to_agent.remove(at).unwrap().read().unwrap()
    }

    fn says(&mut self, frame: Frame) {
        let message =
            FromAgent::Frame { agent: AgentName::new("a"), incarnation: "p1".into(), received: received(frame) };
        self.shard.handle(self.now, Input::Agent(message));
        self.run();
    }

    fn asks(&mut self, call: CallId, seq: u64, tool: &str, budget: u64) {
        let budget = Amount { usd_micros: UsdMicros(budget), ..Amount::ZERO };
        let request = ToolRequest { tool: tool.into(), args: json!({"path": "x"}), budget };
        self.says(Frame::json(call.to_string(), seq, Flags::NONE, kind::TOOL_REQUEST, &request));
    }

    fn ran(&mut self, outcome: Result<Value, WireError>) {
        let (call, attempt, request, ..) = self.runs.pop_front().expect("a run");
        self.shard.handle(self.now, Input::ToolDone(Box::new(ToolDone { call, attempt, request, outcome })));
        self.run();
    }

    /// Results that the agent was sent since the last look.
    fn results(&mut self) -> Vec<ToolResult> {
        let frames: Vec<Frame> = self.to_agent.drain(..).collect();
        frames.iter().filter(|f| &*f.kind == kind::TOOL_RESULT).map(|f| f.read().unwrap()).collect()
    }

    fn refused(&mut self) -> Code {
        let results = self.results();
        assert!(results.len() == 1 && !results[0].ok, "{results:?}");
        results[0].error.as_ref().unwrap().code
    }

    fn ends(&mut self, call: CallId, seq: u64, out: u64) -> Bill {
        let cost = Cost { out_tokens: Tokens(out), ..Cost::default() };
        let last = AgentFinal { cost, ..AgentFinal::default() };
        self.says(Frame::json(call.to_string(), seq, Flags::FIN, kind::RESULT_FINAL, &last));
        let records = self.log.iter().flat_map(|e| &e.records).filter_map(|r| r.record.as_ref());
        let closes = records.filter_map(|r| if let Record::Close(c) = r { Some(c) } else { None });
        serde_json::from_slice(&closes.last().unwrap().bill).unwrap()
    }

    fn verdicts(&self) -> Vec<(ToolVerdict, String)> {
        let records = self.log.iter().flat_map(|e| &e.records).filter_map(|r| r.record.as_ref());
        let tools = records.filter_map(|r| if let Record::Tool(t) = r { Some(t) } else { None });
        tools.map(|t| (t.verdict(), t.tool.clone())).collect()
    }

    /// Another owner, out of the log alone.
    fn restart(&mut self, capabilities: Capabilities) {
        let mut state = State::default();
        for (i, entry) in self.log.iter().enumerate() {
            state.apply(i as u64 + 1, entry).unwrap();
        }
        assert_eq!(state.hash(), self.shard.state().hash());
        let pieces = state.to_checkpoint(0);
        assert_eq!(State::from_checkpoint(&pieces).unwrap().hash(), state.hash());
        self.shard = Shard::recover(self.settings.clone(), state, self.now, "i2", None);
        self.runs.clear();
        self.run();
        self.agent_up(capabilities);
    }
}

#[test]
fn a_mediated_tool_is_held_beside_the_grant_and_billed() {
    let mut house = House::new(settings(), agent(&[], &["fs.read"]));
    house.submit("s", &["fs.read"]);
    let dispatch = house.dispatched();
    let call = dispatch.call_id;
    assert_eq!(dispatch.tools, ["fs.read"]);
    let held = house.shard.state().account_views()[0].held;
    house.asks(call, 1, "fs.read", 0);
    assert_eq!(house.shard.state().account_views()[0].held, held.add(Amount::new(0, 70)).unwrap());
    assert_eq!(house.runs[0].3, "fs.read");
    assert!(house.results().is_empty(), "answered when it has run");
    house.ran(Ok(json!({"text": "hello"})));
    let results = house.results();
    assert_eq!((results.len(), results[0].request, results[0].ok), (1, 1, true));
    assert_eq!((results[0].data["text"].as_str(), results[0].cost), (Some("hello"), Amount::new(0, 70)));
    // The answer was lost: it is run once more, and neither held nor recorded again.
    house.asks(call, 1, "fs.read", 0);
    house.ran(Ok(json!({"text": "hello"})));
    assert_eq!(house.results().len(), 1);
    let bill = house.ends(call, 2, 10);
    assert_eq!(bill.settled, Amount::new(10, 80));
    let spent = ToolSpent { tool: "fs.read".into(), allowed: 1, usd_micros: UsdMicros(70), ..ToolSpent::default() };
    assert_eq!(bill.calls[0].tool_cost_breakdown, [spent]);
    let verdicts: Vec<_> = house.verdicts().into_iter().map(|v| v.0).collect();
    assert_eq!(verdicts, [ToolVerdict::Allowed, ToolVerdict::Done]);
}

#[test]
fn every_refusal_is_told_and_recorded() {
    let mut settings = settings();
    Arc::make_mut(&mut settings.policy)
        .tools_budget_caps
        .insert("fs.read".into(), Limit { usd_micros: Some(UsdMicros(140)), tokens: None });
    let mut house = House::new(settings, agent(&["search"], &["fs.read", "free"]));
    house.submit("s", &["fs.read", "search", "free"]);
    let call = house.dispatched().call_id;
    house.asks(call, 1, "shell", 0);
    assert_eq!(house.refused(), Code::Sec);
    house.asks(call, 2, "free", 0);
    assert_eq!(house.refused(), Code::Sec, "nobody has it");
    house.asks(call, 3, "a b", 0);
    assert_eq!(house.refused(), Code::Proto);
    house.says(Frame::raw(call.to_string(), 4, Flags::NONE, kind::TOOL_REQUEST, "{".into()));
    assert_eq!(house.refused(), Code::Proto);
    // Twice 70 is the cap, and once more is not.
    house.asks(call, 5, "fs.read", 0);
    house.asks(call, 6, "fs.read", 0);
    assert!(house.results().is_empty());
    house.asks(call, 7, "fs.read", 0);
    assert_eq!(house.refused(), Code::Budget);
    // The same request again is the same refusal, and no second record.
    let before = house.verdicts().len();
    house.asks(call, 7, "fs.read", 0);
    assert_eq!((house.refused(), house.verdicts().len()), (Code::Budget, before));
    // An own tool that would cost more than the stream has.
    house.asks(call, 8, "search", 5_000_001);
    assert_eq!(house.refused(), Code::Budget);
    house.ran(Err(WireError::new(Code::Sec, "leads out of the root")));
    let results = house.results();
    assert_eq!((results[0].ok, results[0].error.as_ref().unwrap().code), (false, Code::Sec));
    let bill = house.ends(call, 9, 10);
    assert_eq!(bill.settled, Amount::new(10, 10 + 140));
    let refused: u32 = bill.calls[0].tool_cost_breakdown.iter().map(|t| t.refused).sum();
    assert_eq!(refused, 6);
    // A call that has ended is told nothing any more.
    house.asks(call, 10, "fs.read", 0);
    assert!(house.results().is_empty() && house.runs.len() == 1);
    house.ran(Ok(Value::Null));
    assert!(house.results().is_empty());
}

#[test]
fn four_run_at_once_and_a_fifth_waits() {
    let mut house = House::new(settings(), agent(&[], &["fs.read"]));
    house.submit("s", &["fs.read"]);
    let call = house.dispatched().call_id;
    (1..=4).for_each(|seq| house.asks(call, seq, "fs.read", 0));
    assert!(house.results().is_empty());
    house.asks(call, 5, "fs.read", 0);
    assert_eq!(house.refused(), Code::Window);
    house.ran(Ok(Value::Null));
    house.results();
    house.asks(call, 6, "fs.read", 0);
    assert_eq!(house.runs.len(), 4);
}

#[test]
fn a_task_that_asks_for_too_much_is_refused_for_good() {
    let refusal = |house: &mut House| house.to_client.pop_back().unwrap().read::<WireError>().unwrap();
    let mut house = House::new(settings(), agent(&["search"], &[]));
    house.submit("s1", &["shell"]);
    let error = refusal(&mut house);
    assert_eq!((error.code, error.scope.as_deref()), (Code::Sec, Some("tenant:default")));
    // It may, but the only agent can't.
    house.submit("s2", &["fs.read"]);
    let error = refusal(&mut house);
    assert!(error.code == Code::Sec && error.judged && error.message.contains("fs.read"), "{error}");
    let names: Vec<String> = (0..65).map(|n| format!("t{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    house.submit("s3", &names);
    assert_eq!(refusal(&mut house).code, Code::Proto);
    house.submit("s4", &names[..64]);
    assert_eq!(refusal(&mut house).code, Code::Sec, "64 are read");
    house.submit("s5", &["a b"]);
    assert_eq!(refusal(&mut house).code, Code::Proto);
    house.submit("s6", &["search"]);
    assert_eq!(house.dispatched().tools, ["search"]);
    let denied = house.log.iter().flat_map(|e| &e.records).filter(|r| matches!(r.record, Some(Record::Deny(_))));
    assert_eq!(denied.count(), 3);
}

#[test]
fn a_request_survives_its_owner() {
    let able = || agent(&["search"], &["fs.read"]);
    let mut house = House::new(settings(), able());
    house.submit("s", &["fs.read", "search"]);
    let call = house.dispatched().call_id;
    house.asks(call, 1, "fs.read", 0);
    house.asks(call, 2, "search", 0);
    house.asks(call, 3, "shell", 0);
    house.results();
    house.restart(able());
    house.results();
    // What isn't answered is said again: run, given leave, refused, each as before.
    (1..=2).for_each(|seq| house.asks(call, seq, if seq == 1 { "fs.read" } else { "search" }, 0));
    house.asks(call, 3, "shell", 0);
    assert_eq!(house.runs.len(), 1);
    house.ran(Ok(json!(1)));
    let results = house.results();
    let told: Vec<(u64, bool, bool)> = results.iter().map(|r| (r.request, r.ok, r.own)).collect();
    assert_eq!(told, [(2, true, true), (3, false, false), (1, true, false)]);
    let bill = house.ends(call, 4, 5);
    assert_eq!(bill.settled, Amount::new(5, 75));
}

#[test]
fn what_an_own_tool_costs_is_part_of_the_call() {
    let mut settings = settings();
    Arc::make_mut(&mut settings.policy)
        .tools_budget_caps
        .insert("search".into(), Limit { usd_micros: Some(UsdMicros(100)), tokens: None });
    let mut house = House::new(settings, agent(&["search"], &[]));
    house.submit("s", &["search"]);
    let grant = house.dispatched();
    let call = grant.call_id;
    house.asks(call, 1, "search", 60);
    assert!(house.results()[0].own);
    let report = |seq: u64, tool: &str, usd_micros: u64| {
        let cost = Cost { out_tokens: Tokens(1), usd_micros: UsdMicros(usd_micros + 1), ..Cost::default() };
        let partial = AgentPartial { cost, ..AgentPartial::default() };
        let tool_cost_breakdown = vec![ToolCost { tool: tool.into(), tokens: 0, usd_micros }];
        let extra = Some(Box::new(Extra { tool_cost_breakdown, ..Extra::default() }));
        Frame { extra, ..Frame::json(call.to_string(), seq, Flags::NONE, kind::RESULT_PARTIAL, &partial) }
    };
    house.says(report(2, "search", 55));
    house.asks(call, 3, "search", 46);
    assert_eq!(house.refused(), Code::Budget, "55 and 46 are more than 100");
    house.asks(call, 4, "search", 45);
    assert!(house.results()[0].own);
    house.says(report(5, "search", 101));
    house.says(report(6, "shell", 5));
    let bill = house.ends(call, 7, 1);
    assert_eq!(bill.settled.usd_micros, UsdMicros(102), "its cost contains it");
    assert_eq!(bill.calls[0].tool_cost_breakdown[0].usd_micros, UsdMicros(101));
    let refused = house.verdicts().into_iter().filter(|v| v.0 == ToolVerdict::Refused).count();
    assert_eq!(refused, 2, "the request, and the first breach in the reports");
}

#[test]
fn a_budget_without_room_for_a_tool_refuses_it() {
    let mut settings = settings();
    settings.tools.mediated.insert("fs.read".into(), Amount { usd_micros: UsdMicros(5_000_000), ..Amount::ZERO });
    let mut house = House::new(settings, agent(&[], &["fs.read"]));
    house.submit("s", &["fs.read"]);
    let call = house.dispatched().call_id;
    house.asks(call, 1, "fs.read", 0);
    assert_eq!(house.refused(), Code::Budget);
    assert_eq!(house.ends(call, 2, 5).settled, Amount::new(5, 5));
}

#[test]
fn a_rule_keeps_agents_out_that_are_in_none_of_its_groups() {
    let ruled = |groups: &[&str]| {
        let mut settings = settings();
        let security_groups_any = groups.iter().map(|g| (*g).to_owned()).collect();
        Arc::make_mut(&mut settings.policy).rules = vec![Rule { security_groups_any, ..Rule::default() }];
        settings
    };
    let boxed = || Capabilities { security_groups: vec!["boxed".into()], ..agent(&["search"], &[]) };
    let mut house = House::new(ruled(&["boxed", "local"]), boxed());
    house.submit("s", &[]);
    let call = house.dispatched().call_id;
    // The task keeps what its rule said, across owners; a process that left the group gets no more leave.
    house.restart(boxed());
    assert_eq!(house.ends(call, 1, 1).settled, Amount::new(1, 1));
    let mut house = House::new(ruled(&["local"]), boxed());
    house.submit("s", &["search"]);
    let error: WireError = house.to_client.pop_back().unwrap().read().unwrap();
    assert!(error.code == Code::Sec && error.message.contains("local"), "{error}");
    house.submit("t", &[]);
    assert_eq!(house.to_client.pop_back().unwrap().read::<WireError>().unwrap().code, Code::Sec);
}

fn set() -> impl Strategy<Value = BTreeSet<&'static str>> {
    proptest::collection::btree_set(prop_oneof![Just("fs.read"), Just("search"), Just("free"), Just("shell")], 0..4)
}

proptest! {
    /// Leave is given exactly where the task names the tool, the account has it, and router or agent can run it.
    #[test]
    fn leave_needs_all_of_task_account_and_runner(task in set(), allowed in set(), own in set(), asks in set(), asked in set()) {
        let mut settings = settings();
        settings.tools.allowed_default = Some(allowed.iter().map(|t| (*t).to_owned()).collect());
        let list = |set: &BTreeSet<&'static str>| set.iter().copied().collect::<Vec<_>>();
        let mut house = House::new(settings, agent(&list(&own), &list(&asks)));
        house.submit("s", &list(&task));
        let welcome = task.iter().all(|t| allowed.contains(t) && (own.contains(t) || asks.contains(t)));
        prop_assert_eq!(house.to_agent.iter().any(|f| &*f.kind == kind::DISPATCH), welcome);
        if !welcome {
            return Ok(());
        }
        let call = house.dispatched().call_id;
        for (seq, tool) in (1..).zip(&asked) {
            house.asks(call, seq, tool, 0);
            let runs = house.runs.pop_front().is_some();
            let own_leave = house.results().first().is_some_and(|r| r.ok && r.own);
            prop_assert_eq!(runs, task.contains(tool) && *tool == "fs.read");
            prop_assert_eq!(own_leave, task.contains(tool) && *tool != "fs.read" && own.contains(tool));
        }
        let mut state = State::default();
        for (i, entry) in house.log.iter().enumerate() {
            state.apply(i as u64 + 1, entry).unwrap();
        }
        prop_assert_eq!(state.hash(), house.shard.state().hash());
    }
}

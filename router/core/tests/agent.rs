//! One `Agent` on a virtual clock: what its results, its word and the operator's let through.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::agent::Agent;
use atp_core::agent::queue::Wish;
use atp_core::clock::Now;
use atp_core::message::{AgentEffect, AgentInput, FromAgent, Machine, Outcome, ToAgent};
use atp_core::settings::{FlowSettings, Settings, WindowSettings};
use atp_proto::content::{AgentStatus, Capabilities, Status, WindowUpdate, WindowView};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, CallId, ConnId, Frame, Limit, Qos, Tokens};
use std::sync::Arc;

struct Keeper {
    agent: Agent,
    now: u64,
    lent: Vec<CallId>,
    /// When it was told which window.
    windows: Vec<(u64, WindowView)>,
}

fn call(n: u8) -> CallId {
    CallId([n; 10])
}

impl Keeper {
    fn new(flow: FlowSettings, window: WindowSettings) -> Self {
        let settings = Arc::new(Settings { flow, agent_window: window, ..Settings::default() });
        let agent = Agent::new(AgentName::new("a"), settings, Now::default());
        let mut keeper = Self { agent, now: 0, lent: Vec::new(), windows: Vec::new() };
        let capabilities =
            Box::new(Capabilities { incarnation: "i".into(), max_parallel: 100, ..Capabilities::default() });
        keeper.take(AgentInput::Connected { conn: ConnId(1), capabilities });
        keeper
    }

    fn take(&mut self, input: AgentInput) {
        self.agent.handle(Now { mono_ms: self.now, wall_ms: self.now }, input);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(effect) = self.agent.poll_effect() {
            match effect {
                AgentEffect::ToShard { message: FromAgent::Lent { call, .. }, .. } => self.lent.push(call),
                AgentEffect::Send { frame, .. } if &*frame.kind == kind::WINDOW_UPDATE => {
                    let WindowUpdate { scope, window } = frame.read().unwrap();
                    assert_eq!(scope, "agent:a");
                    self.windows.push((self.now, window));
                }
                _ => {}
            }
        }
    }

    fn wait(&mut self, until: u64) {
        while let Some(at) = self.agent.poll_timeout().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.agent.handle_timeout(Now { mono_ms: self.now, wall_ms: self.now });
            self.drain();
        }
        self.now = until;
        self.take(AgentInput::Alive { conn: ConnId(1) });
    }

    fn want(&mut self, n: u8, qos: Qos, tokens: u64) {
        let wish = Wish { qos, tenant: "t".into(), weight: 1, amount: Amount::new(tokens, 0), lasts_ms: u64::MAX };
        self.take(AgentInput::Shard(ToAgent::Want { shard: 0, epoch: 1, call: call(n), wish }));
    }

    fn dispatch(&mut self, n: u8) {
        let (incarnation, frame) = ("i".into(), Frame::heartbeat(false));
        let message = ToAgent::Dispatch {
            shard: 0,
            epoch: 1,
            call: call(n),
            incarnation,
            go_on: false,
            keeper: "/1".into(),
            frame,
        };
        self.take(AgentInput::Shard(message));
    }

    fn ended(&mut self, n: u8, outcome: Outcome) {
        self.take(AgentInput::Shard(ToAgent::Ended { shard: 0, epoch: 1, call: call(n), outcome }));
    }

    fn says(&mut self, status: AgentStatus) {
        self.take(AgentInput::Status { conn: ConnId(1), status });
    }

    fn lent(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.lent).into_iter().map(|c| c.0[0]).collect()
    }
}

const DONE: Outcome = Outcome::Done { latency_ms: 10, over_ppm: 0, congested: false };

#[test]
fn atp_10_1_the_agent_is_told_what_of_its_window_is_free() {
    let window = WindowSettings { max_parallel: Some(3), limit: Limit { tokens: Some(Tokens(100)), usd_micros: None } };
    let mut keeper = Keeper::new(FlowSettings::default(), window);
    let free = |calls, tokens| WindowView {
        max_parallel: Some(calls),
        max_tokens: Some(Tokens(tokens)),
        max_usd_micros: None,
    };
    assert_eq!(keeper.windows, [(0, free(3, 100))], "when it connects");
    keeper.wait(100);
    keeper.want(1, Qos::Silver, 10);
    keeper.want(2, Qos::Silver, 10);
    keeper.wait(499);
    assert_eq!(keeper.windows.len(), 1, "held for half a second");
    keeper.wait(500);
    assert_eq!(keeper.windows[1..], [(500, free(1, 80))]);
    keeper.wait(510);
    keeper.want(3, Qos::Silver, 10);
    assert_eq!(keeper.windows[2..], [(510, free(0, 70))], "a fall to zero goes out at once");
    (1..=3).for_each(|n| keeper.dispatch(n));
    keeper.ended(1, DONE);
    keeper.says(AgentStatus { status: Status::Pause, ..AgentStatus::default() });
    keeper.wait(1_010);
    assert_eq!(keeper.windows[3..], [(1_010, free(0, 80))], "no calls while it takes no work");
}

#[test]
fn results_widen_and_failures_narrow_what_is_lent() {
    let mut keeper = Keeper::new(FlowSettings { aimd_base: 2, ..FlowSettings::default() }, WindowSettings::default());
    (1..=9).for_each(|n| keeper.want(n, Qos::Silver, 0));
    assert_eq!(keeper.lent(), [1, 2]);
    (1..=2).for_each(|n| keeper.dispatch(n));
    keeper.ended(1, DONE);
    assert_eq!(keeper.lent(), [3, 4], "one came back, one was earned");
    (3..=4).for_each(|n| keeper.dispatch(n));
    keeper.ended(2, Outcome::Failed);
    assert_eq!((keeper.agent.window(), keeper.lent()), (1, vec![]), "3 halved, 2 run");
    keeper.ended(3, Outcome::Done { latency_ms: 10, over_ppm: 0, congested: true });
    keeper.ended(4, Outcome::Unknown);
    assert_eq!((keeper.agent.window(), keeper.lent()), (1, vec![5]));
}

#[test]
fn a_burst_ends_with_its_second_and_unused_slots_count_for_nothing() {
    let flow = FlowSettings { aimd_base: 50, burst: 3, ..FlowSettings::default() };
    let mut keeper = Keeper::new(flow, WindowSettings::default());
    (1..=8).for_each(|n| keeper.want(n, Qos::Silver, 0));
    assert_eq!(keeper.lent(), [1, 2, 3]);
    keeper.take(AgentInput::Shard(ToAgent::Back { shard: 0, epoch: 1, call: call(1) }));
    assert_eq!(keeper.lent(), [4], "it didn't leave");
    (2..=4).for_each(|n| keeper.dispatch(n));
    keeper.wait(999);
    assert_eq!(keeper.lent(), [] as [u8; 0]);
    keeper.wait(1_000);
    assert_eq!(keeper.lent(), [5, 6, 7]);
}

#[test]
fn tokens_outstanding_are_bounded_and_a_giant_runs_alone() {
    let limit = Limit { tokens: Some(Tokens(100)), usd_micros: None };
    let mut keeper = Keeper::new(FlowSettings::default(), WindowSettings { max_parallel: None, limit });
    keeper.want(1, Qos::Silver, 60);
    keeper.want(2, Qos::Silver, 40);
    keeper.want(3, Qos::Silver, 1);
    assert_eq!(keeper.lent(), [1, 2], "100 of 100");
    (1..=2).for_each(|n| keeper.dispatch(n));
    keeper.ended(2, DONE);
    assert_eq!(keeper.lent(), [3]);
    keeper.want(4, Qos::Silver, 1_000);
    keeper.dispatch(3);
    keeper.ended(3, DONE);
    assert_eq!(keeper.lent(), [] as [u8; 0], "60 are out");
    keeper.ended(1, DONE);
    assert_eq!(keeper.lent(), [4]);
    let none = WindowView { max_tokens: Some(Tokens(0)), ..WindowView::default() };
    keeper.dispatch(4);
    keeper.ended(4, DONE);
    keeper.says(AgentStatus { status: Status::Busy, suggested_window: Some(none), ..AgentStatus::default() });
    keeper.want(5, Qos::Silver, 0);
    assert_eq!(keeper.lent(), [] as [u8; 0], "zero lets nothing through");
}

#[test]
fn gold_passes_a_pause_only_by_policy_alone_and_after_its_time() {
    let pause = AgentStatus { status: Status::Pause, retry_after_ms: Some(1_000), ..AgentStatus::default() };
    for policy in [false, true] {
        let flow = FlowSettings { gold_passes_pause: policy, ..FlowSettings::default() };
        let mut keeper = Keeper::new(flow, WindowSettings::default());
        keeper.says(pause.clone());
        (1..=2).for_each(|n| keeper.want(n, Qos::Gold, 0));
        keeper.want(3, Qos::Silver, 0);
        keeper.wait(999);
        assert_eq!(keeper.lent(), [] as [u8; 0]);
        keeper.wait(1_000);
        assert_eq!(keeper.lent(), if policy { vec![1] } else { vec![] });
        if policy {
            keeper.dispatch(1);
            assert_eq!(keeper.agent.running(), 1);
            keeper.ended(1, DONE);
            assert_eq!(keeper.lent(), [2], "one at a time");
        }
        keeper.says(AgentStatus { status: Status::Pause, ..AgentStatus::default() });
        keeper.wait(4_000);
        assert_eq!(keeper.lent(), [] as [u8; 0], "without a time there is no end");
    }
}

#[test]
fn what_was_on_its_way_leaves_within_the_grace_only() {
    let mut keeper = Keeper::new(FlowSettings::default(), WindowSettings::default());
    (1..=2).for_each(|n| keeper.want(n, Qos::Gold, 0));
    assert_eq!(keeper.lent(), [1, 2]);
    keeper.says(AgentStatus { status: Status::Draining, ..AgentStatus::default() });
    keeper.wait(249);
    keeper.dispatch(1);
    assert_eq!(keeper.agent.running(), 1);
    keeper.wait(250);
    keeper.dispatch(2);
    assert_eq!((keeper.agent.running(), keeper.agent.slots_used()), (1, 1));
}

#[test]
fn five_failures_open_the_breaker_and_probes_close_it() {
    let flow = FlowSettings { aimd_base: 64, ..FlowSettings::default() };
    let mut keeper = Keeper::new(flow, WindowSettings::default());
    for n in 1..=5 {
        keeper.want(n, Qos::Silver, 0);
        keeper.dispatch(n);
        keeper.ended(n, Outcome::Failed);
    }
    assert_eq!(keeper.lent(), [1, 2, 3, 4, 5]);
    let again = |keeper: &mut Keeper| (6..=8).for_each(|n| keeper.want(n, Qos::Silver, 0));
    keeper.wait(10_000);
    keeper.wait(20_000);
    keeper.wait(29_999);
    again(&mut keeper);
    assert_eq!(keeper.lent(), [] as [u8; 0]);
    keeper.wait(30_000);
    assert_eq!(keeper.lent(), [6], "one probe");
    keeper.dispatch(6);
    keeper.ended(6, DONE);
    assert_eq!(keeper.lent(), [7], "and another");
    keeper.dispatch(7);
    keeper.ended(7, DONE);
    assert_eq!(keeper.lent(), [8]);
    keeper.want(9, Qos::Silver, 0);
    assert_eq!(keeper.lent(), [9], "closed");
}

#[test]
fn a_refusal_is_no_fault_and_holds_the_rest_back() {
    let mut keeper = Keeper::new(FlowSettings::default(), WindowSettings::default());
    keeper.want(1, Qos::Silver, 0);
    keeper.dispatch(1);
    keeper.ended(1, Outcome::Refused { retry_after_ms: 700 });
    keeper.lent();
    keeper.want(2, Qos::Silver, 0);
    keeper.wait(699);
    assert_eq!(keeper.lent(), [] as [u8; 0]);
    keeper.wait(700);
    assert_eq!((keeper.lent(), keeper.agent.window()), (vec![2], 4));
}

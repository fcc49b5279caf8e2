//! The router's own policy: the real shard and agent machines in virtual time, with a log that is durable at once. It passes
//! frames and keeps none of their decisions; what a task costs is known to nobody before it is made.

use super::replay::{IN_USD_MICROS, OUT_USD_MICROS, Order, Policy, REACH_TOKENS, REACH_USD_MICROS};
use super::trace::Task;
use anyhow::ensure;
use atp_core::agent::Agent;
use atp_core::clock::Now;
use atp_core::message::{AgentEffect, AgentInput, Answer, Effect, FromAgent, Input, Machine, Query};
use atp_core::record::Genesis;
use atp_core::settings::{AccountSettings, Per, Settings, WindowSettings};
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::{
    AgentFinal, AgentPartial, BudgetUpdate, Capabilities, Dispatch, EstimateDeclaration, EstimateFigures, Finish,
    ModelInfo, Submit, Variance,
};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, CallId, ConnId, Cost, Frame, Limit, Qos, TenantId, Tokens, UsdMicros};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const CLIENT: ConnId = ConnId(1);
const INCARNATION: &str = "i1";
const TENANT: &str = "bench";
const WALL_MS: u64 = 1_704_067_200_000;
/// Tasks wait for money as long as a task may.
const DEADLINE_MS: u64 = 24 * 3_600_000;
/// Bytes of prose per token, as its tokenizer sees it; the router counts three.
const BYTES_PER_TOKEN: u64 = 4;

/// What an agent declares of a model: mean and variance of its answers' tokens, learnt from earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Learned {
    pub(crate) out_tokens: u64,
    pub(crate) variance: u64,
}

struct Running {
    call: CallId,
    /// Messages that it sent.
    sent: u64,
}

/// A router with one account and one agent per model.
pub(crate) struct Ours<'a> {
    tasks: &'a [Task],
    qos: Qos,
    shard: Shard,
    agents: Vec<(AgentName, Agent)>,
    now: Now,
    running: BTreeMap<usize, Running>,
    of_call: BTreeMap<String, usize>,
    orders: VecDeque<Order>,
    answers: Vec<Answer>,
}

impl<'a> Ours<'a> {
    pub(crate) fn new(tasks: &'a [Task], learned: &[Learned], qos: Qos, limit: u64, parallel: u32) -> Self {
        let free = WindowSettings { max_parallel: None, limit: Limit::NONE };
        let budget = Limit { tokens: None, usd_micros: Some(UsdMicros(limit)) };
        let settings = Arc::new(Settings {
            stream_window: free,
            agent_window: free,
            default_account: AccountSettings { limit: budget, per: Per::Total, ..AccountSettings::default() },
            deadline_ms: DEADLINE_MS,
            agent_timeout_ms: DEADLINE_MS,
            retries: 0,
            ..Settings::default()
        });
        let now = Now { mono_ms: 0, wall_ms: WALL_MS };
        let genesis = Genesis { log_id: vec![1; 16].into(), format: 1, shards: 1, hash_seed: 0 };
        let shard = Shard::recover(settings.clone(), State::default(), now, "bench", Some(genesis));
        let agents = (0..learned.len()).map(agent_name);
        let agents = agents.map(|name| (name.clone(), Agent::new(name, settings.clone(), now))).collect();
        let (running, of_call, orders, answers) = Default::default();
        let mut ours = Self { tasks, qos, shard, agents, now, running, of_call, orders, answers };
        ours.run();
        for (model, learned) in learned.iter().enumerate() {
            let capabilities = Box::new(capabilities(model, *learned, parallel));
            let conn = conn_of(model);
            ours.agents[model].1.handle(now, AgentInput::Connected { conn, capabilities });
        }
        ours.run();
        ours
    }

    /// Nothing is held any more, and what was settled is what the providers billed.
    ///
    /// # Errors
    /// Says what differs.
    pub(crate) fn verify(&mut self, billed: u64) -> anyhow::Result<()> {
        self.answers.clear();
        self.shard.handle(self.now, Input::Query { id: 1, query: Query::Verify });
        self.run();
        let Some(Answer::Verify(view)) = self.answers.pop() else { anyhow::bail!("the core didn't answer") };
        ensure!(view.open_reservations == 0, "{} reservations are open at the end", view.open_reservations);
        // An account in which nothing was ever reserved may be unknown.
        let settled = view.accounts.iter().find(|a| a.account == TENANT).map_or(0, |a| a.settled.usd_micros.0);
        ensure!(settled == billed, "the ledger says {settled} micro-USD, providers billed {billed}");
        Ok(())
    }

    /// Carries out effects until nothing moves.
    fn run(&mut self) {
        loop {
            let mut moved = false;
            while let Some(effect) = self.shard.poll_effect() {
                moved = true;
                self.effect(effect);
            }
            for at in 0..self.agents.len() {
                while let Some(effect) = self.agents[at].1.poll_effect() {
                    moved = true;
                    match effect {
                        AgentEffect::Send { frame, .. } => self.agent_hears(&frame),
                        AgentEffect::ToShard { message, .. } => self.shard.handle(self.now, Input::Agent(message)),
                        AgentEffect::Close { error, .. } => panic!("an agent's connection was closed: {error}"),
                    }
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Append { position, .. } => self.shard.handle(self.now, Input::Durable { position }),
            Effect::Send { frame, .. } => self.client_hears(&frame),
            Effect::ToAgent { agent, message } => {
                if let Some((_, machine)) = self.agents.iter_mut().find(|(name, _)| *name == agent) {
                    machine.handle(self.now, AgentInput::Shard(message));
                }
            }
            Effect::Answer { answer, .. } => self.answers.push(answer),
            Effect::Close { error, .. } => panic!("the client's connection was closed: {error}"),
            Effect::Replay { .. }
            | Effect::Tool { .. }
            | Effect::ToShard { .. }
            | Effect::Learned(_)
            | Effect::Metric(_) => {}
        }
    }

    fn agent_hears(&mut self, frame: &Frame) {
        match &*frame.kind {
            kind::DISPATCH => {
                let dispatch: Dispatch = frame.read().expect("the core's own frame");
                let task = dispatch.task.split(' ').next().and_then(|n| n.parse().ok()).expect("it begins so");
                self.of_call.insert(dispatch.call_id.to_string(), task);
                self.running.insert(task, Running { call: dispatch.call_id, sent: 0 });
                self.orders.push_back(Order::Start { task, grant: Some(dispatch.grant.usd_micros.0) });
            }
            kind::BUDGET_UPDATE => {
                let update: BudgetUpdate = frame.read().expect("the core's own frame");
                if let Some(task) = self.of_call.get(&update.call_id.to_string()) {
                    self.orders.push_back(Order::Grant { task: *task, grant: update.grant.usd_micros.0 });
                }
            }
            kind::AGENT_CANCEL => {
                if let Some(task) = self.of_call.get(&*frame.stream_id) {
                    self.orders.push_back(Order::Stop { task: *task });
                }
            }
            _ => {}
        }
    }

    fn client_hears(&mut self, frame: &Frame) {
        let ended = frame.flags.has(Flags::FIN) || frame.flags.has(Flags::RST);
        let task = frame.stream_id.strip_prefix('t').and_then(|n| n.parse().ok());
        if let Some(task) = task.filter(|task| ended && !self.running.contains_key(task)) {
            self.orders.push_back(Order::Refuse { task });
        }
    }

    /// Every agent answers its heartbeats.
    fn at(&mut self, now_ms: u64) {
        self.now = Now { mono_ms: now_ms, wall_ms: WALL_MS + now_ms };
        for (at, (_, agent)) in self.agents.iter_mut().enumerate() {
            agent.handle(self.now, AgentInput::Alive { conn: conn_of(at) });
        }
    }

    fn says(&mut self, task: usize, build: impl FnOnce(String, u64) -> Frame) {
        let Some(running) = self.running.get_mut(&task) else { return };
        running.sent += 1;
        let frame = build(running.call.to_string(), running.sent);
        let agent = agent_name(self.tasks[task].model);
        let message = FromAgent::Frame { agent, incarnation: INCARNATION.into(), received: received(frame) };
        self.shard.handle(self.now, Input::Agent(message));
        self.run();
    }

    fn cost(&self, task: usize, out_tokens: u64) -> Cost {
        let in_tokens = Tokens(self.tasks[task].in_tokens);
        Cost { in_tokens, out_tokens: Tokens(out_tokens), usd_micros: UsdMicros::ZERO }
    }
}

impl Policy for Ours<'_> {
    fn submit(&mut self, now_ms: u64, task: usize) {
        self.at(now_ms);
        let of = &self.tasks[task];
        let number = format!("{task} ");
        let bytes = usize::try_from(of.in_tokens * BYTES_PER_TOKEN).unwrap_or(usize::MAX);
        let text = number.chars().chain(std::iter::repeat('x')).take(bytes.max(number.len())).collect();
        let submit = Submit {
            task: text,
            agents: vec![agent_name(of.model)],
            deadline_ms: Some(DEADLINE_MS),
            ..Submit::default()
        };
        let mut frame = Frame::json(format!("t{task}"), 1, Flags::SYN, kind::TASK_SUBMIT, &submit);
        frame.qos = self.qos as u32;
        let input = Input::Client { conn: CLIENT, tenant: TenantId::new(TENANT), received: received(frame) };
        self.shard.handle(self.now, input);
        self.run();
    }

    fn heard(&mut self, now_ms: u64, task: usize, out_tokens: u64) {
        self.at(now_ms);
        let cost = self.cost(task, out_tokens);
        let partial = AgentPartial { cost, ..AgentPartial::default() };
        self.says(task, |call, seq| Frame::json(call, seq, Flags::NONE, kind::RESULT_PARTIAL, &partial));
    }

    fn ended(&mut self, now_ms: u64, task: usize, out_tokens: u64, whole: bool) {
        self.at(now_ms);
        let finish = if whole { Finish::Complete } else { Finish::Grant };
        let last = AgentFinal { cost: self.cost(task, out_tokens), finish, ..AgentFinal::default() };
        self.says(task, |call, seq| Frame::json(call, seq, Flags::FIN, kind::RESULT_FINAL, &last));
        if let Some(running) = self.running.remove(&task) {
            self.of_call.remove(&running.call.to_string());
        }
    }

    fn due(&self) -> Option<u64> {
        self.agents.iter().filter_map(|(_, agent)| agent.poll_timeout()).chain(self.shard.poll_timeout()).min()
    }

    fn wake(&mut self, now_ms: u64) {
        self.at(now_ms);
        self.shard.handle_timeout(self.now);
        let now = self.now;
        self.agents.iter_mut().for_each(|(_, agent)| agent.handle_timeout(now));
        self.run();
    }

    fn order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }
}

fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

fn agent_name(model: usize) -> AgentName {
    AgentName::new(&format!("agent-{model}"))
}

fn conn_of(model: usize) -> ConnId {
    ConnId(CLIENT.0 + 1 + model as u64)
}

fn capabilities(model: usize, learned: Learned, parallel: u32) -> Capabilities {
    let figures = EstimateFigures {
        out_tokens: Tokens(learned.out_tokens),
        variance: Variance {
            tokens: learned.variance,
            usd_micros: learned.variance.saturating_mul(OUT_USD_MICROS * OUT_USD_MICROS),
        },
        ..EstimateFigures::default()
    };
    Capabilities {
        agent: agent_name(model),
        incarnation: INCARNATION.into(),
        max_parallel: parallel,
        models: vec![ModelInfo {
            id: format!("model-{model}"),
            in_usd_micros_per_mtok: Some(IN_USD_MICROS * 1_000_000),
            out_usd_micros_per_mtok: Some(OUT_USD_MICROS * 1_000_000),
            context_tokens: None,
        }],
        estimate: Some(EstimateDeclaration { figures, ..EstimateDeclaration::default() }),
        reach: Amount::new(REACH_TOKENS, REACH_USD_MICROS),
        ..Capabilities::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::replay::{Outcome, replay};

    const fn task(at_ms: u64, out_tokens: u64) -> Task {
        Task { at_ms, in_tokens: 1_000, out_tokens, model: 0 }
    }

    /// 3,240, 3,480, 18,000 and 3,240 micro-USD; the third is ten times what is estimated.
    const TASKS: [Task; 4] = [task(0, 16), task(0, 32), task(0, 1_000), task(60_000, 16)];

    fn run(limit: u64) -> Outcome {
        let learned = [Learned { out_tokens: 100, variance: 0 }];
        let mut ours = Ours::new(&TASKS, &learned, Qos::Silver, limit, 2);
        let outcome = replay(&TASKS, &mut ours).expect("ends");
        ours.verify(outcome.billed).expect("the ledger agrees");
        outcome
    }

    #[test]
    fn the_core_finishes_what_the_budget_pays() {
        let outcome = run(60_000);
        assert_eq!((outcome.finished, outcome.cut, outcome.billed), (4, 0, 27_960));
    }

    #[test]
    fn a_call_that_costs_more_than_all_that_is_left_is_cut_within_its_reach() {
        let outcome = run(20_000);
        assert_eq!((outcome.finished, outcome.cut, outcome.refused), (2, 1, 1));
        assert!((20_000..=20_000 + REACH_USD_MICROS).contains(&outcome.billed), "{outcome:?}");
    }

    #[test]
    fn what_can_never_be_paid_is_refused_at_once() {
        // A prompt of 4,000 bytes counts 1,534 tokens: 4,602 micro-USD, and 1,500 for the answer.
        assert_eq!((run(6_101).refused, run(6_101).billed), (4, 0));
        assert_eq!((run(6_102).refused, run(6_102).billed, run(6_102).finished), (3, 3_240, 1));
    }
}

//! The event loop of one schedule: takes the next event in virtual time, hands it to its actor, and stops at the first
//! broken promise, or when all is healed and quiet.

use crate::simulation::check::ledger::Seen;
use crate::simulation::check::{Check, Violation, ending};
use crate::simulation::client::{Client, Clients, Task};
use crate::simulation::crowd;
use crate::simulation::net::Peer;
use crate::simulation::plan::Plan;
use crate::simulation::process::Process;
use crate::simulation::rng::Rng;
use crate::simulation::router::Router;
use crate::simulation::sched::{Event, Sched};
use crate::simulation::tools;
use atp_core::message::{Input, Machine, Query};
use atp_proto::{StreamId, TenantId};
use std::hash::Hasher;

/// After healing all must be over within this long.
const HEALING_MS: u64 = 120_000;
/// Lent slots lapse within this long.
const QUIET_MS: u64 = 8_000;
/// More events than this in one schedule: something spins.
const STEPS_MAX: u64 = 200_000;
/// Between two questions for what has changed.
const SHOWN_STEPS: u64 = 32;
/// Of so many schedules one lets a crowd queue up at one agent.
const QUEUE_EVERY: u64 = 100;

/// What came of one schedule.
#[derive(Debug, Default)]
pub struct Outcome {
    pub violation: Option<Violation>,
    pub trace_hash: u64,
    pub events: u64,
    pub trace: Vec<String>,
    pub counts: Counts,
}

/// How often things happened: a schedule in which nothing happens proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub entries: u64,
    pub calls: u64,
    pub settled: u64,
    pub void: u64,
    pub unknown: u64,
    pub owners: u64,
    pub answered: u64,
    pub refused: u64,
    /// Tool requests that an agent had an answer to.
    pub tool_answers: u64,
    pub virtual_ms: u64,
    pub seen: Seen,
}

impl Counts {
    pub fn add(&mut self, o: &Self) {
        self.entries += o.entries;
        self.calls += o.calls;
        self.settled += o.settled;
        self.void += o.void;
        self.unknown += o.unknown;
        self.owners += o.owners;
        self.answered += o.answered;
        self.refused += o.refused;
        self.tool_answers += o.tool_answers;
        self.virtual_ms += o.virtual_ms;
        self.seen.add(&o.seen);
    }
}

struct World {
    s: Sched,
    check: Check,
    router: Router,
    processes: Vec<Process>,
    clients: Clients,
}

/// Runs the schedule of a seed.
#[must_use]
pub fn run(seed: u64, trace: bool) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut plan = Plan::of(&mut rng);
    tools::plan(&mut rng, &mut plan);
    if plan.tasks.len() > 3 && rng.percent(30) {
        crowd::gather(&mut rng, &mut plan);
    }
    if seed.is_multiple_of(QUEUE_EVERY) {
        crowd::queue_up(&mut rng, &mut plan);
    }
    let mut s = Sched::new(rng, plan.wall0_ms, plan.faults.clone(), trace);
    s.say(|| format!("{plan:#?}"));
    schedule(&mut s, &plan);
    let clients = plan
        .clients
        .iter()
        .enumerate()
        .map(|(index, tenant)| Client { index, tenant: plan.tenants[*tenant].clone(), conn: None })
        .collect();
    let tasks = plan.tasks.iter().map(|t| Task::new(t.clone())).collect();
    let processes = plan.agents.iter().enumerate().map(|(i, a)| Process::new(i, a.clone())).collect();
    let mut check = Check { patience_ms: 3_000 + 4 * plan.faults.delay_max_ms, ..Check::default() };
    let caps = plan.settings.policy.tools_budget_caps.iter();
    check.tools.caps = caps.map(|(tool, cap)| (tool.clone(), cap.amount().usd_micros.0.into())).collect();
    let mut world =
        World { router: Router::new(&plan, seed), check, processes, clients: Clients { clients, tasks }, s };
    world.run(plan.heal_at);
    world.outcome()
}

fn schedule(s: &mut Sched, plan: &Plan) {
    s.at(0, Event::Restart);
    for agent in 0..plan.agents.len() {
        let ms = s.rng.range(0, 200);
        s.after(ms, Event::AgentStart { agent });
    }
    for client in 0..plan.clients.len() {
        s.after(1, Event::Connect { client });
    }
    for (task, t) in plan.tasks.iter().enumerate() {
        s.at(t.start_at, Event::Start { task });
        if let Some(at) = t.cancel_at {
            s.at(at, Event::CancelTask { task });
        }
    }
    plan.crash_at.iter().for_each(|at| s.at(*at, Event::Crash));
    for at in &plan.break_client_at {
        let client = s.rng.index(plan.clients.len());
        s.at(*at, Event::BreakClient { client });
    }
    for at in &plan.break_agent_at {
        let agent = s.rng.index(plan.agents.len());
        s.at(*at, Event::BreakAgent { agent });
    }
    for at in &plan.agent_crash_at {
        let agent = s.rng.index(plan.agents.len());
        s.at(*at, Event::AgentCrash { agent });
    }
    for at in &plan.status_at {
        let agent = s.rng.index(plan.agents.len());
        s.at(*at, Event::AgentStatus { agent });
    }
    plan.checkpoint_at.iter().for_each(|at| s.at(*at, Event::Checkpoint));
    plan.query_at.iter().for_each(|at| s.at(*at, Event::Query));
    plan.room_at.iter().for_each(|at| s.at(*at, Event::LogRoom));
    plan.reload_at.iter().for_each(|at| s.at(*at, Event::Reload));
    for at in &plan.wall_jump_at {
        let by_ms = s.rng.pick(&[-60_000, -500, 700, 60_000]);
        s.at(*at, Event::WallJump { by_ms });
    }
    if let Some(at) = plan.drain_at {
        s.at(at, Event::Drain);
    }
    s.at(plan.heal_at, Event::Heal);
}

impl World {
    fn run(&mut self, heal_at: u64) {
        let mut quiet_since = None;
        loop {
            if self.check.verdict.violation.is_some() {
                return;
            }
            self.s.steps += 1;
            if self.s.steps > STEPS_MAX {
                let now = self.s.now_ms;
                return self.check.verdict.fail("nothing spins", || format!("{STEPS_MAX} events, {now} ms"));
            }
            if self.s.healed {
                let quiet = self.is_quiet();
                match quiet_since {
                    None if quiet => quiet_since = Some(self.s.now_ms),
                    Some(_) if !quiet => quiet_since = None,
                    Some(since) if self.s.now_ms > since + QUIET_MS => return self.finish(),
                    _ => {}
                }
                if self.s.now_ms > heal_at + HEALING_MS {
                    return self.finish();
                }
            }
            let event_at = self.s.next_at();
            let timer_at = self.router.next_timeout();
            match (event_at, timer_at) {
                (Some(event), timer) if timer.is_none_or(|t| event <= t) => {
                    if let Some(event) = self.s.pop() {
                        self.handle(event);
                    }
                }
                (_, Some(timer)) => {
                    self.s.now_ms = self.s.now_ms.max(timer);
                    self.router.timeouts(&mut self.s, &mut self.check, &mut self.processes);
                }
                (_, None) => return self.finish(),
            }
            if self.check.shown.owner != self.router.owner || self.s.steps.is_multiple_of(SHOWN_STEPS) {
                show(&mut self.router, &mut self.s, &mut self.check, &mut self.processes, false);
            }
        }
    }

    fn is_quiet(&self) -> bool {
        self.router.shard.is_some()
            && self.clients.tasks.iter().all(Task::is_over)
            && self.check.ledger.open_calls().next().is_none()
    }

    fn finish(&mut self) {
        self.router.verified = false;
        show(&mut self.router, &mut self.s, &mut self.check, &mut self.processes, true);
        self.router.ask(&mut self.s, &mut self.check, &mut self.processes, Query::Verify);
        for _ in 0..1_000 {
            if self.router.verified || self.check.verdict.violation.is_some() {
                break;
            }
            let Some(event) = self.s.pop() else { break };
            self.handle(event);
        }
        self.check.verdict.expect(self.router.verified, "a question is answered", || "verify at the end".into());
        for (agent, machine) in self.router.machines.iter().enumerate() {
            let used = machine.as_ref().map_or(0, atp_core::agent::Agent::slots_used);
            self.check.verdict.expect(used == 0, "slots = running calls after healing", || {
                format!("agent {agent} has {used} slots in use, and no call runs")
            });
        }
        if let Some(shard) = &self.router.shard {
            self.check.fold.statistics(shard.state(), &mut self.check.verdict);
        }
        ending::check(&mut self.check, &self.clients.tasks, self.s.now_ms);
    }

    fn handle(&mut self, event: Event) {
        let Self { s, check, router, processes, clients } = self;
        match event {
            Event::Up { conn, seq, frame } => {
                if s.arrives(conn, true, seq) {
                    router.up(s, check, processes, conn, *frame);
                }
            }
            Event::Down { conn, seq, frame } => {
                if s.arrives(conn, false, seq) {
                    match s.net.conns[conn].peer {
                        Peer::Client(client) => clients.receive(s, check, client, conn, &frame),
                        Peer::Agent { agent, .. } => processes[agent].receive(s, check, conn, &frame),
                    }
                }
            }
            Event::RouterLearnsGone { conn } => router.gone(s, check, processes, conn),
            Event::PeerLearnsGone { conn } => match s.net.conns[conn].peer {
                Peer::Client(client) => clients.disconnected(s, conn, client),
                Peer::Agent { agent, .. } => processes[agent].disconnected(s, conn),
            },
            Event::ToMachine { agent, generation, message } => {
                router.hand_to_machine(s, check, agent, generation, *message)
            }
            Event::ToShard { generation, message } => router.from_machine(s, check, processes, generation, *message),
            Event::ToolDone { owner, done } => router.tool_done(s, check, processes, owner, done),
            Event::Commit { owner } => router.commit(s, check, processes, owner),
            Event::Unpause { owner } => router.unpause(s, check, processes, owner),
            Event::Replay { owner, request } => router.replay(s, check, processes, owner, &request),
            Event::Crash => {
                if !s.healed {
                    router.crash(s, check, processes);
                }
            }
            Event::Restart => router.restart(s, check, processes),
            Event::Connect { client } if router.shard.is_some() => clients.connect(s, check, client),
            Event::Connect { client } => s.after(100, Event::Connect { client }),
            Event::Start { task } => clients.start(s, check, task),
            Event::Patience { task, sends } => clients.patience(s, check, task, sends),
            Event::CancelTask { task } => clients.cancel(s, task),
            Event::AgentStart { agent } => processes[agent].start(s),
            Event::AgentConnect { agent, life } if router.shard.is_some() => processes[agent].connect(s, life),
            Event::AgentConnect { agent, life } => s.after(100, Event::AgentConnect { agent, life }),
            Event::AgentCrash { agent } => processes[agent].crash(s, check),
            Event::Step { agent, life, call, step } => processes[agent].step(s, check, life, call, step),
            Event::AgentDeadline { agent, life, call } => processes[agent].deadline(s, check, life, call),
            Event::Beat { agent, life } => processes[agent].beat(s, life),
            Event::AgentStatus { agent } => processes[agent].change_status(s),
            Event::BreakClient { client } => {
                if let Some(conn) = clients.clients[client].conn {
                    s.break_conn(conn);
                }
            }
            Event::BreakAgent { agent } => {
                if let Some(conn) = processes[agent].conn {
                    s.break_conn(conn);
                }
            }
            Event::Checkpoint => router.input(s, check, processes, Input::Checkpoint),
            Event::Query => {
                let streams: Vec<(TenantId, StreamId)> = clients
                    .tasks
                    .iter()
                    .map(|t| (clients.clients[t.plan.client].tenant.clone(), StreamId::new(&t.follows)))
                    .collect();
                let query = Router::random_query(s, &streams);
                router.ask(s, check, processes, query);
            }
            Event::LogRoom => router.room(s, check, processes),
            Event::Reload => router.reload(s, check, processes),
            Event::WallJump { by_ms } => s.wall_skew_ms += by_ms,
            Event::Drain => {
                router.input(s, check, processes, Input::Drain);
                let ms = s.rng.range(100, 3_000);
                s.after(ms, Event::Crash);
            }
            Event::Heal => self.heal(),
        }
    }

    /// Nothing goes wrong from here on.
    fn heal(&mut self) {
        let Self { s, check, router, processes, .. } = self;
        s.note(&"heal", || "HEAL".into());
        // A router that was told to drain is stopped, and started again by its supervisor.
        router.crash(s, check, processes);
        s.healed = true;
        router.restart(s, check, processes);
        router.room(s, check, processes);
        for process in processes.iter_mut() {
            process.change_status(s);
        }
    }

    fn outcome(self) -> Outcome {
        let ledger = &self.check.ledger;
        let calls = || ledger.streams.values().flat_map(|s| &s.calls);
        let phase = |p| calls().filter(|c| c.phase == p).count() as u64;
        let unknown = |c: &&crate::simulation::check::ledger::Call| {
            c.source.is_some_and(|s| {
                matches!(s, atp_core::record::SourcePb::UnknownAtHold | atp_core::record::SourcePb::Expired)
            })
        };
        let counts = Counts {
            entries: ledger.position,
            calls: calls().count() as u64,
            settled: phase(crate::simulation::check::ledger::Phase::Settled),
            void: phase(crate::simulation::check::ledger::Phase::Void),
            unknown: calls().filter(unknown).count() as u64,
            owners: u64::from(self.router.owner),
            tool_answers: self.check.tools.answered,
            answered: self
                .clients
                .tasks
                .iter()
                .filter(|t| t.state == crate::simulation::client::TaskState::Answered)
                .count() as u64,
            refused: self
                .clients
                .tasks
                .iter()
                .filter(|t| t.state == crate::simulation::client::TaskState::Refused)
                .count() as u64,
            virtual_ms: self.s.now_ms,
            seen: ledger.seen,
        };
        Outcome {
            violation: self.check.verdict.violation,
            trace_hash: self.s.hash.finish(),
            events: self.s.steps,
            trace: self.s.trace.unwrap_or_default(),
            counts,
        }
    }
}

const _: fn() = || {
    fn machine<M: Machine>() {}
    machine::<atp_core::shard::Shard>();
    machine::<atp_core::agent::Agent>();
};

/// Asks for what a state store lacks, a few rows at a time; at the end for all of it, and then for the whole.
fn show(router: &mut Router, s: &mut Sched, check: &mut Check, processes: &mut [Process], end: bool) {
    if router.shard.is_none() {
        return;
    }
    let (all, max) = (check.shown.is_new(router.owner), if end { usize::MAX } else { 2 });
    router.ask(s, check, processes, Query::Projection { all, agents: true, max });
    if end {
        router.ask(s, check, processes, Query::Projection { all: true, agents: false, max });
    }
}

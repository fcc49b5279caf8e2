//! The event loop of one schedule: takes the next event in virtual time, hands it to its actor, and stops at the first
//! broken promise, or when all is healed and quiet.

mod fleet;

use crate::simulation::check::ledger::{Call, Phase, Seen};
use crate::simulation::check::{Check, Violation, ending, escrow};
use crate::simulation::client::{Client, Clients, Task, TaskState};
use crate::simulation::crowd;
use crate::simulation::keepers::{Keepers, between};
use crate::simulation::net::Peer;
use crate::simulation::owner::{Around, Place};
use crate::simulation::partition;
use crate::simulation::plan::{self, Plan, Reload};
use crate::simulation::process::Process;
use crate::simulation::rng::Rng;
use crate::simulation::sched::{Event, Sched};
use crate::simulation::show::{frame_hash, show_frame};
use crate::simulation::tools;
use atp_core::message::{Input, Machine, Query};
use atp_core::record::SourcePb;
use atp_proto::{ConnId, Frame, StreamId, TenantId};
use std::hash::Hasher;

/// After healing all must be over within this long.
const HEALING_MS: u64 = 120_000;
/// Lent slots lapse within this long, and what shards say to each other is answered.
const QUIET_MS: u64 = 8_000;
/// More events than this in one schedule: something spins.
const STEPS_MAX: u64 = 200_000;
/// Between two questions for what has changed.
const SHOWN_STEPS: u64 = 32;
/// Of so many schedules one lets a crowd queue up at one agent.
const QUEUE_EVERY: u64 = 100;
/// What decides where streams and accounts belong, and what the log is, doesn't change what else a seed decides.
const SPREAD: u64 = 0x7368_6172_6473;
const BROKERS: u64 = 0x6272_6f6b_6572;
const ROUTERS: u64 = 0x726f_7574_6572;

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
    pub shards: u64,
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
    pub escrow: escrow::Seen,
    pub partition: partition::Seen,
}

impl Counts {
    pub fn add(&mut self, o: &Self) {
        self.shards += o.shards;
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
        self.escrow.add(&o.escrow);
        self.partition.add(&o.partition);
    }
}

struct World {
    s: Sched,
    check: Check,
    places: Vec<Place>,
    keepers: Keepers,
    processes: Vec<Process>,
    clients: Clients,
}

/// Runs the schedule of a seed.
#[must_use]
pub fn run(seed: u64, trace: bool) -> Outcome {
    let mut rng = Rng::new(seed);
    let mut plan = Plan::of(&mut rng);
    plan::spread(&mut Rng::new(seed ^ SPREAD), &mut plan);
    plan::share_the_log(&mut Rng::new(seed ^ BROKERS), &mut plan);
    tools::plan(&mut rng, &mut plan);
    if plan.tasks.len() > 3 && rng.percent(30) {
        crowd::gather(&mut rng, &mut plan);
    }
    if seed.is_multiple_of(QUEUE_EVERY) {
        crowd::queue_up(&mut rng, &mut plan);
    }
    between::plan(&mut Rng::new(seed ^ ROUTERS), &mut plan);
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
    let mut check = Check { patience_ms: 3_000 + 4 * plan.faults.delay_max_ms, ..Check::of(&plan.placement) };
    let caps = plan.settings.policy.tools_budget_caps.iter();
    check.tools.caps = caps.map(|(tool, cap)| (tool.clone(), cap.amount().usd_micros.0.into())).collect();
    check.balance.settings(&plan.settings);
    check.balance.calm = plan.placement.shards() > 1 && plan.is_calm();
    let places = (0..plan.placement.shards()).map(|no| Place::new(&plan, seed, no)).collect();
    let keepers = Keepers::new(&plan);
    let mut world = World { places, keepers, check, processes, clients: Clients { clients, tasks }, s };
    world.run(plan.heal_at);
    world.outcome()
}

fn schedule(s: &mut Sched, plan: &Plan) {
    let shards = plan.placement.shards();
    (0..shards).for_each(|shard| s.at(0, Event::Restart { shard }));
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
    let one = |s: &mut Sched| if shards == 1 { 0 } else { s.rng.below(shards.into()) as u32 };
    for at in &plan.crash_at {
        let shard = one(s);
        s.at(*at, Event::Crash { shard });
    }
    for at in &plan.take_over_at {
        let shard = one(s);
        s.at(*at, Event::TakeOver { shard });
    }
    for at in &plan.cut_at {
        let (a, b) = (one(s), one(s));
        let ms = s.rng.pick(&[300, 1_500, 6_000]);
        s.at(*at, Event::Cut { pair: (a.min(b), a.max(b)), ms });
    }
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
    between::schedule(s, plan);
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
            if self.check.balance.calm {
                self.check.balance.alive = self.clients.alive();
            }
            let event_at = self.s.next_at();
            let timer_at = self.next_timeout();
            match (event_at, timer_at) {
                (Some(event), timer) if timer.is_none_or(|t| event <= t) => {
                    if let Some(event) = self.s.pop() {
                        self.handle(event);
                    }
                }
                (_, Some(timer)) => {
                    self.s.now_ms = self.s.now_ms.max(timer);
                    self.timeouts();
                }
                (_, None) => return self.finish(),
            }
            let every = self.s.steps.is_multiple_of(SHOWN_STEPS);
            for shard in 0..self.places.len() {
                if every || self.check.shards[shard].shown.owner != self.places[shard].number {
                    self.show(shard, false);
                }
            }
        }
    }

    fn next_timeout(&self) -> Option<u64> {
        let places = self.places.iter().filter_map(Place::next_timeout).min();
        [places, self.keepers.next_timeout()].into_iter().flatten().min()
    }

    fn timeouts(&mut self) {
        self.keepers.timeouts(&mut self.s, &mut self.check);
        for shard in 0..self.places.len() {
            let (place, mut around) = self.at(shard);
            place.timeouts(&mut around);
        }
    }

    /// A shard, and all that it acts on.
    fn at(&mut self, shard: usize) -> (&mut Place, Around<'_>) {
        let Self { s, check, places, keepers, processes, .. } = self;
        (&mut places[shard], Around { s, check, processes, keepers })
    }

    fn input(&mut self, shard: u32, input: Input) {
        let (place, mut around) = self.at(shard as usize);
        place.input(&mut around, input);
    }

    fn each(&mut self, what: impl Fn(&mut Place, &mut Around<'_>)) {
        for shard in 0..self.places.len() {
            let (place, mut around) = self.at(shard);
            what(place, &mut around);
        }
    }

    fn one_shard(&mut self) -> u32 {
        if self.places.len() == 1 { 0 } else { self.s.rng.index(self.places.len()) as u32 }
    }

    fn is_quiet(&self) -> bool {
        self.places.iter().all(Place::is_idle)
            && self.clients.tasks.iter().all(Task::is_over)
            && self.check.ledgers().all(|ledger| ledger.open_calls().next().is_none())
            && self.check.nothing_between()
    }

    /// Asks for what a state store lacks, a few rows at a time; at the end for all of it, and then for the whole.
    fn show(&mut self, shard: usize, end: bool) {
        if !self.places[shard].is_up() {
            return;
        }
        if let Some(owner) = self.places[shard].newest() {
            self.check.live(shard as u32, owner.shard.state());
        }
        let owner = self.places[shard].number;
        let (all, max) = (self.check.shards[shard].shown.is_new(owner), if end { usize::MAX } else { 2 });
        let (place, mut around) = self.at(shard);
        place.ask(&mut around, Query::Projection { all, agents: true, max });
        if end {
            place.ask(&mut around, Query::Projection { all: true, agents: false, max });
        }
    }

    fn finish(&mut self) {
        for shard in 0..self.places.len() {
            self.places[shard].verified = false;
            self.show(shard, true);
            let (place, mut around) = self.at(shard);
            place.ask(&mut around, Query::Verify);
        }
        for _ in 0..1_000 {
            if self.places.iter().all(|p| p.verified) || self.check.verdict.violation.is_some() {
                break;
            }
            let Some(event) = self.s.pop() else { break };
            self.handle(event);
        }
        let verified = self.places.iter().all(|p| p.verified);
        self.check.verdict.expect(verified, "a question is answered", || "verify at the end".into());
        for (agent, machine) in self.keepers.machines.iter().enumerate() {
            // A router that an agent has left hears of its calls when it comes back.
            let machine = machine.as_ref().filter(|m| !self.keepers.is_fleet() || m.is_connected());
            let used = machine.map_or(0, atp_core::agent::Agent::slots_used);
            self.check.verdict.expect(used == 0, "slots = running calls after healing", || {
                format!("agent {agent} has {used} slots in use, and no call runs")
            });
        }
        for (place, of) in self.places.iter().zip(&mut self.check.shards) {
            if let Some(owner) = place.newest() {
                of.fold.statistics(owner.shard.state(), &mut self.check.verdict);
            }
        }
        ending::check(&mut self.check, &self.clients.tasks, self.s.now_ms);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Up { conn, seq, frame } => {
                if self.s.arrives(conn, true, seq) {
                    self.up(conn, *frame);
                }
            }
            Event::Down { conn, seq, frame } => {
                let Self { s, check, processes, clients, .. } = self;
                if s.arrives(conn, false, seq) {
                    match s.net.conns[conn].peer {
                        Peer::Client(client) => clients.receive(s, check, client, conn, &frame),
                        Peer::Agent { agent, .. } => processes[agent].receive(s, check, conn, &frame),
                    }
                }
            }
            Event::RouterLearnsGone { conn } => self.gone(conn),
            Event::PeerLearnsGone { conn } => match self.s.net.conns[conn].peer {
                Peer::Client(client) => self.clients.disconnected(&mut self.s, conn, client),
                Peer::Agent { agent, .. } => self.processes[agent].disconnected(&mut self.s, conn),
            },
            Event::ToMachine { keeper, generation, from, link, message } => {
                self.keepers.hand(&mut self.s, &mut self.check, keeper, (generation, from, link), *message);
            }
            Event::Between(between) => self.between(*between),
            Event::ToShard { shard, generation, message } => {
                if self.keepers.is_same_run(generation) {
                    self.input(shard, Input::Agent(*message));
                }
            }
            Event::Escrow { from, to, message } => {
                let (place, mut around) = self.at(to as usize);
                place.escrow(&mut around, from, *message);
            }
            Event::ToolDone { shard, owner, done } => {
                let (place, mut around) = self.at(shard as usize);
                place.tool_done(&mut around, owner, Input::ToolDone(done));
            }
            Event::Commit { shard, owner } => {
                let (place, mut around) = self.at(shard as usize);
                place.commit(&mut around, owner);
            }
            Event::Arrive { shard, sent } => {
                let (place, mut around) = self.at(shard as usize);
                place.arrive(&mut around, sent);
            }
            Event::Reports { shard, owner, reports } => {
                let (place, mut around) = self.at(shard as usize);
                place.reports(&mut around, owner, reports);
            }
            Event::Unpause { shard, owner } => {
                let (place, mut around) = self.at(shard as usize);
                place.unpause(&mut around, owner);
            }
            Event::Replay { shard, owner, request } => {
                let (place, mut around) = self.at(shard as usize);
                place.replay(&mut around, owner, &request);
            }
            Event::Crash { shard } if !self.s.healed => {
                let (place, mut around) = self.at(shard as usize);
                place.dies(&mut around);
            }
            Event::ProcessDies if !self.s.healed => self.each(Place::dies),
            Event::Crash { .. } | Event::ProcessDies => {}
            Event::ConnLost { conn } => self.each(|place, around| {
                place.input(around, Input::ConnGone { conn: ConnId(conn as u64) });
            }),
            Event::Restart { shard } => {
                let (place, mut around) = self.at(shard as usize);
                place.restart(&mut around);
            }
            Event::TakeOver { shard } => {
                let (place, mut around) = self.at(shard as usize);
                place.take_over(&mut around);
            }
            Event::StepDown { shard, owner } => {
                let (place, mut around) = self.at(shard as usize);
                place.step_down(&mut around, owner);
            }
            Event::Cut { pair, ms } => self.s.cut_shards(pair, ms),
            Event::Heal => self.heal(),
            other => self.peer_or_operator(other),
        }
    }

    fn peer_or_operator(&mut self, event: Event) {
        let up = self.places.iter().any(Place::is_up);
        let Self { s, check, processes, clients, keepers, .. } = self;
        match event {
            Event::Connect { client } if up => clients.connect(s, check, client),
            Event::Connect { client } => s.after(100, Event::Connect { client }),
            Event::Start { task } => clients.start(s, check, task),
            Event::Patience { task, sends } => clients.patience(s, check, task, sends),
            Event::CancelTask { task } => clients.cancel(s, task),
            Event::AgentStart { agent } => processes[agent].start(s),
            Event::AgentConnect { agent, life } => match keepers.any_router(s, &[]).filter(|_| up) {
                Some(router) => processes[agent].connect(s, life, router),
                None => s.after(100, Event::AgentConnect { agent, life }),
            },
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
            Event::Checkpoint => {
                let shard = self.one_shard();
                self.input(shard, Input::Checkpoint);
            }
            Event::Query => {
                let streams: Vec<(TenantId, StreamId)> = clients
                    .tasks
                    .iter()
                    .map(|t| (clients.clients[t.plan.client].tenant.clone(), StreamId::new(&t.follows)))
                    .collect();
                let query = Place::random_query(s, &streams);
                let shard = match &query {
                    Query::Stream { tenant, stream } | Query::Bill { tenant, stream } => {
                        check.placement.shard_of(tenant, stream)
                    }
                    _ => self.one_shard(),
                };
                let (place, mut around) = self.at(shard as usize);
                place.ask(&mut around, query);
            }
            Event::LogRoom => {
                let shard = self.one_shard();
                let (place, mut around) = self.at(shard as usize);
                place.room(&mut around);
            }
            Event::Reload => {
                let changed = Reload::of(&mut s.rng);
                s.say(|| format!("  reload {:?}", changed.accounts));
                self.each(|place, around| place.reload(around, &changed));
                self.check.balance.settings(&self.places[0].settings);
            }
            Event::WallJump { by_ms } => s.wall_skew_ms += by_ms,
            Event::Drain => {
                let shard = self.one_shard();
                self.input(shard, Input::Drain);
                let ms = self.s.rng.range(100, 3_000);
                self.s.after(ms, Event::Crash { shard });
            }
            _ => {}
        }
    }

    /// A frame reaches the router on a connection.
    fn up(&mut self, conn: usize, frame: Frame) {
        if !self.s.net.conns[conn].router_open {
            return;
        }
        self.s.note(&frame_hash(&frame), || format!("up {conn} {}", show_frame(&frame)));
        match self.s.net.conns[conn].peer {
            Peer::Client(_) => {
                let (tenant, stream) = (&self.s.net.conns[conn].tenant, StreamId::new(&frame.stream_id));
                let shard = self.check.placement.shard_of(tenant, &stream);
                let (place, mut around) = self.at(shard as usize);
                place.client(&mut around, conn, frame);
            }
            Peer::Agent { router, agent, .. } => {
                let keeper = self.keepers.at(router, agent);
                self.keepers.up(&mut self.s, &mut self.check, keeper, conn, frame);
            }
        }
    }

    fn gone(&mut self, conn: usize) {
        if !self.s.net.conns[conn].router_open {
            return;
        }
        self.s.net.conns[conn].router_open = false;
        match self.s.net.conns[conn].peer {
            Peer::Client(_) => {
                self.each(|place, around| place.input(around, Input::ConnGone { conn: ConnId(conn as u64) }));
            }
            Peer::Agent { router, agent, .. } => {
                let keeper = self.keepers.at(router, agent);
                self.keepers.disconnected(&mut self.s, &mut self.check, keeper, conn);
            }
        }
    }

    /// Nothing goes wrong from here on.
    fn heal(&mut self) {
        self.s.note(&"heal", || "HEAL".into());
        // A router that was told to drain is stopped, and started again by its supervisor.
        self.each(Place::dies);
        self.s.healed = true;
        let news = self.keepers.heal(&mut self.s);
        self.hear(news);
        self.each(|place, around| {
            place.all_step_down();
            place.restart(around);
            place.room(around);
        });
        for process in &mut self.processes {
            process.change_status(&mut self.s);
        }
    }

    fn outcome(self) -> Outcome {
        let calls = || self.check.ledgers().flat_map(|ledger| ledger.streams.values()).flat_map(|s| &s.calls);
        let phase = |p| calls().filter(|c| c.phase == p).count() as u64;
        let unknown = |c: &&Call| c.source.is_some_and(|s| matches!(s, SourcePb::UnknownAtHold | SourcePb::Expired));
        let tasks = |state| self.clients.tasks.iter().filter(|t| t.state == state).count() as u64;
        let mut counts = Counts {
            shards: self.places.len() as u64,
            calls: calls().count() as u64,
            settled: phase(Phase::Settled),
            void: phase(Phase::Void),
            unknown: calls().filter(unknown).count() as u64,
            owners: self.places.iter().map(|p| u64::from(p.number)).sum(),
            tool_answers: self.check.tools.answered,
            answered: tasks(TaskState::Answered),
            refused: tasks(TaskState::Refused),
            virtual_ms: self.s.now_ms,
            escrow: self.check.escrow.seen,
            ..Counts::default()
        };
        self.places.iter().for_each(|place| counts.partition.add(&place.seen()));
        for ledger in self.check.ledgers() {
            counts.entries += ledger.position;
            counts.seen.add(&ledger.seen);
        }
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

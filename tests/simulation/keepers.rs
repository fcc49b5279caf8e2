//! The keepers of agents, simulated: the real `Agent` of each handle at each router, and the way of its messages to every shard and
//! back. They live on when a shard's owner dies, as on another router, or die with it.

pub mod between;

use crate::simulation::check::Check;
use crate::simulation::owner::received;
use crate::simulation::plan::Plan;
use crate::simulation::sched::{Event, Sched};
use crate::simulation::show::{frame_hash, show_frame, show_from_agent};
use atp_core::agent::Agent;
use atp_core::message::{AgentEffect, AgentInput, FromAgent, Machine, ToAgent};
use atp_core::settings::Settings;
use atp_proto::content::{AgentStatus, Capabilities, Dispatch};
use atp_proto::frame::kind;
use atp_proto::{AgentName, CallId, ConnId, Frame};
use between::Fleet;
use std::collections::BTreeMap;
use std::sync::Arc;

pub struct Keepers {
    /// By router and agent: a keeper's number is `router * agents + agent`.
    pub machines: Vec<Option<Agent>>,
    /// Of each router: one run of its process.
    generation: Vec<u32>,
    pub names: Vec<AgentName>,
    settings: Arc<Settings>,
    shards: usize,
    /// At each router, which shard a call is of: its dispatch and its agent's list say so.
    calls: Vec<BTreeMap<CallId, u32>>,
    /// What is said of each agent's connection and frames keeps its order, towards every shard and from it.
    in_order_at: Vec<u64>,
    to_order_at: Vec<u64>,
    fleet: Fleet,
}

impl Keepers {
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let (agents, shards, routers) = (plan.agents.len(), plan.placement.shards() as usize, plan.routers);
        Self {
            machines: (0..routers * agents).map(|_| None).collect(),
            generation: vec![0; routers],
            names: plan.agents.iter().map(|a| a.name.clone()).collect(),
            settings: Arc::new(plan.settings.clone()),
            shards,
            calls: vec![BTreeMap::new(); routers],
            in_order_at: vec![0; agents * shards],
            to_order_at: vec![0; routers * agents * shards],
            fleet: Fleet::new(routers, agents, shards),
        }
    }

    /// The keeper of an agent at a router.
    #[must_use]
    pub fn at(&self, router: usize, agent: usize) -> usize {
        router * self.names.len() + agent
    }

    /// The router and the agent of a keeper.
    fn of(&self, keeper: usize) -> (usize, usize) {
        (keeper / self.names.len(), keeper % self.names.len())
    }

    /// When a machine wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        self.machines.iter().flatten().filter_map(Machine::poll_timeout).min()
    }

    pub fn timeouts(&mut self, s: &mut Sched, check: &mut Check) {
        let now = s.now();
        for keeper in 0..self.machines.len() {
            let machine = self.machines[keeper].as_mut();
            let due = machine.filter(|m| m.poll_timeout().is_some_and(|at| at <= now.mono_ms));
            if let Some(machine) = due {
                machine.handle_timeout(now);
                self.drain(s, check, keeper);
            }
        }
    }

    /// True where nobody has died since something was sent to shards. Of one router only.
    #[must_use]
    pub fn is_same_run(&self, generation: u32) -> bool {
        self.generation[0] == generation
    }

    /// The process of a router dies.
    pub fn die(&mut self, check: &mut Check, router: usize) {
        self.generation[router] += 1;
        self.calls[router].clear();
        for keeper in self.at(router, 0)..self.at(router + 1, 0) {
            self.machines[keeper] = None;
            check.slots.restarted(keeper);
            check.statuses.restarted(keeper);
        }
    }

    // ---- from shards ------------------------------------------------------------------------------------------------

    /// A message of a shard, whose owner is at this router, on its way to an agent's keeper: late, twice, out of order, lost where
    /// it is repeated.
    pub fn send(&mut self, s: &mut Sched, from: usize, shard: u32, agent: usize, message: ToAgent) {
        let keeper = self.where_is(from, agent);
        let near = self.is_fleet() && self.of(keeper).0 == from;
        let far = !s.healed && !near && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        if !far || matches!(message, ToAgent::Ended { .. } | ToAgent::Standing { .. }) {
            return self.send_in_order(s, from, shard, agent, message);
        }
        let Some(link) = self.link(from, self.of(keeper).0) else { return };
        let (generation, copies) = (self.generation[self.of(keeper).0], s.copies());
        for _ in 0..copies {
            let ms = s.delay();
            s.after(ms, Event::ToMachine { keeper, generation, from, link, message: Box::new(message.clone()) });
        }
    }

    pub fn send_in_order(&mut self, s: &mut Sched, from: usize, shard: u32, agent: usize, message: ToAgent) {
        let keeper = self.where_is(from, agent);
        let Some(link) = self.link(from, self.of(keeper).0) else { return };
        let ms = s.delay();
        let last = &mut self.to_order_at[keeper * self.shards + shard as usize];
        let at = (*last).max(s.now_ms + ms);
        *last = at;
        let generation = self.generation[self.of(keeper).0];
        s.at(at, Event::ToMachine { keeper, generation, from, link, message: Box::new(message) });
    }

    /// A handle has its keeper from the first word of or for it.
    fn keep(&mut self, s: &Sched, keeper: usize) {
        if self.machines[keeper].is_none() {
            let (router, agent) = self.of(keeper);
            let (name, settings) = (self.names[agent].clone(), self.settings.clone());
            let run = format!("r{router}-{}", self.generation[router]);
            self.machines[keeper] = Some(Agent::new(name, settings, s.now()).called(run.into()));
        }
    }

    pub fn hand(&mut self, s: &mut Sched, check: &mut Check, keeper: usize, sent: (u32, usize, u32), message: ToAgent) {
        let (generation, from, link) = sent;
        let (router, _) = self.of(keeper);
        let unknown = from != router && self.machines[keeper].is_none();
        if generation != self.generation[router] || unknown || self.link(from, router) != Some(link) {
            return;
        }
        self.keep(s, keeper);
        self.note_way(keeper, &message, from, link);
        if let ToAgent::Dispatch { shard, call, .. } | ToAgent::Pass { shard, call, .. } = &message {
            self.calls[router].insert(*call, *shard);
        }
        if check.slots.told(keeper, &message, s.now_ms) {
            check.to_keeper(&message);
        }
        self.machine(s, check, keeper, AgentInput::Shard(message));
    }

    // ---- from agents ------------------------------------------------------------------------------------------------

    /// A frame of an agent's process.
    pub fn up(&mut self, s: &mut Sched, check: &mut Check, keeper: usize, conn: usize, frame: Frame) {
        let id = ConnId(conn as u64);
        let (router, agent) = self.of(keeper);
        self.fleet.heard[keeper] = s.now_ms;
        match &*frame.kind {
            kind::CAPABILITIES => {
                let capabilities: Box<Capabilities> = Box::new(frame.read().expect("the process's own"));
                if !self.may_connect(s, keeper, &capabilities.incarnation) {
                    return s.router_closes(conn);
                }
                s.net.conns[conn].incarnation = Some(capabilities.incarnation.as_str().into());
                self.keep(s, keeper);
                let log = check.standing(&self.names[agent]);
                check.statuses.connected(keeper, conn, &capabilities.incarnation, log.as_ref());
                self.calls[router].extend(capabilities.calls.iter().map(|c| (c.call_id, c.shard)));
                self.machine(s, check, keeper, AgentInput::Connected { conn: id, capabilities });
            }
            kind::STATUS => {
                let status: AgentStatus = frame.read().expect("the process's own");
                check.statuses.said(keeper, conn, &status, s.now_ms);
                self.machine(s, check, keeper, AgentInput::Status { conn: id, status });
            }
            "" => self.machine(s, check, keeper, AgentInput::Alive { conn: id }),
            _ => {
                self.machine(s, check, keeper, AgentInput::Alive { conn: id });
                let name = self.names[agent].clone();
                let incarnation = s.net.conns[conn].incarnation.clone().expect("the process introduces itself first");
                let shard = CallId::parse(frame.stream_id.split('.').next().unwrap_or_default())
                    .and_then(|call| self.calls[router].get(&call).copied());
                let message = FromAgent::Frame { agent: name, incarnation, received: received(frame) };
                // Who died with what it knew hears of its calls from the list, before any of their frames.
                let Some(shard) = shard else { return s.say(|| "  of no shard's call".into()) };
                self.tell(s, keeper, shard, message);
            }
        }
    }

    pub fn disconnected(&mut self, s: &mut Sched, check: &mut Check, keeper: usize, conn: usize) {
        self.machine(s, check, keeper, AgentInput::Disconnected { conn: ConnId(conn as u64) });
    }

    fn machine(&mut self, s: &mut Sched, check: &mut Check, keeper: usize, input: AgentInput) {
        let Some(machine) = &mut self.machines[keeper] else { return };
        if let AgentInput::Connected { conn, capabilities } = &input {
            s.say(|| {
                format!("{keeper} says hello on {}: {} with {:?}", conn.0, capabilities.incarnation, capabilities.calls)
            });
        }
        let connects = match &input {
            AgentInput::Connected { conn, .. } => Some(*conn),
            _ => None,
        };
        let listed = match &input {
            AgentInput::Connected { capabilities, .. } => capabilities.calls.clone(),
            _ => Vec::new(),
        };
        machine.handle(s.now(), input);
        if connects.is_some() && machine.link().map(|(conn, _)| conn) == connects {
            listed.iter().for_each(|call| check.slots.listed(keeper, call));
        }
        if self.is_fleet() {
            self.note_presence(s, keeper);
        }
        self.drain(s, check, keeper);
    }

    fn drain(&mut self, s: &mut Sched, check: &mut Check, keeper: usize) {
        while let Some(effect) = self.machines[keeper].as_mut().and_then(Machine::poll_effect) {
            match effect {
                AgentEffect::Send { conn, frame } => {
                    let index = usize::try_from(conn.0).expect("few connections");
                    if &*frame.kind == kind::DISPATCH
                        && let Ok(d) = frame.read::<Dispatch>()
                        && !d.go_on
                    {
                        check.slots.dispatched(keeper, &d, s.now_ms, &mut check.verdict);
                        check.statuses.dispatched(keeper, d.call_id, s.now_ms, &mut check.verdict);
                    }
                    s.note(&frame_hash(&frame), || format!("agent {keeper} down {} {}", conn.0, show_frame(&frame)));
                    if s.net.conns[index].router_open {
                        s.send_down(index, frame);
                    }
                }
                AgentEffect::Close { conn, error } => {
                    s.note(&conn.0, || format!("agent {keeper} closes {}: {error}", conn.0));
                    let index = usize::try_from(conn.0).expect("few connections");
                    check.statuses.closed(keeper, index);
                    if s.net.conns[index].router_open {
                        s.router_closes(index);
                    }
                }
                AgentEffect::ToShard { shard: Some(shard), message } => {
                    check.slots.said(keeper, shard, &message, s.now_ms, &check.statuses, &mut check.verdict);
                    self.tell(s, keeper, shard, message);
                }
                AgentEffect::ToShard { shard: None, message } if self.is_fleet() => {
                    self.tell_all(s, keeper, &message);
                }
                AgentEffect::ToShard { shard: None, message } => {
                    for shard in 0..self.shards as u32 {
                        self.tell(s, keeper, shard, message.clone());
                    }
                }
            }
        }
    }

    fn tell(&mut self, s: &mut Sched, keeper: usize, shard: u32, message: FromAgent) {
        s.note(&keeper, || format!("agent {keeper} tells shard {shard} {}", show_from_agent(&message)));
        let far = !s.healed && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        let repeated = matches!(message, FromAgent::Lent { .. } | FromAgent::Sent { .. } | FromAgent::Unsent { .. });
        if self.is_fleet() {
            return self.tell_owner(s, keeper, shard, message, far && repeated);
        }
        let generation = self.generation[0];
        if far && repeated {
            for _ in 0..s.copies() {
                let ms = s.delay();
                s.after(ms, Event::ToShard { shard, generation, message: Box::new(message.clone()) });
            }
            return;
        }
        let ms = s.delay();
        let last = &mut self.in_order_at[keeper * self.shards + shard as usize];
        let at = (*last).max(s.now_ms + ms);
        *last = at;
        s.at(at, Event::ToShard { shard, generation, message: Box::new(message) });
    }
}

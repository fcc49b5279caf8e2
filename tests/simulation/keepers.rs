//! The keepers of agents, simulated: the real `Agent` of each handle, and the way of its messages to every shard and back. They
//! live on when a shard's owner dies, as on another router, or die with it.

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
use std::collections::BTreeMap;
use std::sync::Arc;

pub struct Keepers {
    pub machines: Vec<Option<Agent>>,
    pub generation: u32,
    pub names: Vec<AgentName>,
    settings: Arc<Settings>,
    shards: usize,
    /// Which shard a call is of: its dispatch and its agent's list say so.
    calls: BTreeMap<CallId, u32>,
    /// What is said of each agent's connection and frames keeps its order, towards every shard and from it.
    in_order_at: Vec<u64>,
    to_order_at: Vec<u64>,
}

impl Keepers {
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let (agents, shards) = (plan.agents.len(), plan.placement.shards() as usize);
        Self {
            machines: (0..agents).map(|_| None).collect(),
            generation: 0,
            names: plan.agents.iter().map(|a| a.name.clone()).collect(),
            settings: Arc::new(plan.settings.clone()),
            shards,
            calls: BTreeMap::new(),
            in_order_at: vec![0; agents * shards],
            to_order_at: vec![0; agents * shards],
        }
    }

    /// When a machine wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        self.machines.iter().flatten().filter_map(Machine::poll_timeout).min()
    }

    pub fn timeouts(&mut self, s: &mut Sched, check: &mut Check) {
        let now = s.now();
        for agent in 0..self.machines.len() {
            let due = self.machines[agent].as_ref().and_then(Machine::poll_timeout).is_some_and(|at| at <= now.mono_ms);
            if due && let Some(machine) = &mut self.machines[agent] {
                machine.handle_timeout(now);
                self.drain(s, check, agent);
            }
        }
    }

    /// Their process dies.
    pub fn die(&mut self, check: &mut Check) {
        self.generation += 1;
        self.calls.clear();
        for agent in 0..self.machines.len() {
            self.machines[agent] = None;
            check.slots.restarted(agent);
            check.statuses.restarted(agent);
        }
    }

    // ---- from shards ------------------------------------------------------------------------------------------------

    /// A message of a shard on its way to a keeper: late, twice, out of order, lost where it is repeated.
    pub fn send(&mut self, s: &mut Sched, shard: u32, agent: usize, message: ToAgent) {
        let far = !s.healed && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        if !far || matches!(message, ToAgent::Ended { .. } | ToAgent::Standing { .. }) {
            return self.send_in_order(s, shard, agent, message);
        }
        let (generation, copies) = (self.generation, s.copies());
        for _ in 0..copies {
            let ms = s.delay();
            s.after(ms, Event::ToMachine { agent, generation, message: Box::new(message.clone()) });
        }
    }

    pub fn send_in_order(&mut self, s: &mut Sched, shard: u32, agent: usize, message: ToAgent) {
        let ms = s.delay();
        let last = &mut self.to_order_at[agent * self.shards + shard as usize];
        let at = (*last).max(s.now_ms + ms);
        *last = at;
        s.at(at, Event::ToMachine { agent, generation: self.generation, message: Box::new(message) });
    }

    /// A handle has its keeper from the first word of or for it.
    fn keep(&mut self, s: &Sched, agent: usize) {
        if self.machines[agent].is_none() {
            let (name, settings) = (self.names[agent].clone(), self.settings.clone());
            self.machines[agent] = Some(Agent::new(name, settings, s.now()));
        }
    }

    pub fn hand(&mut self, s: &mut Sched, check: &mut Check, agent: usize, generation: u32, message: ToAgent) {
        if generation != self.generation {
            return;
        }
        self.keep(s, agent);
        if let ToAgent::Dispatch { shard, call, .. } | ToAgent::Pass { shard, call, .. } = &message {
            self.calls.insert(*call, *shard);
        }
        check.slots.told(agent, &message, s.now_ms);
        self.machine(s, check, agent, AgentInput::Shard(message));
    }

    // ---- from agents ------------------------------------------------------------------------------------------------

    /// A frame of an agent's process.
    pub fn up(&mut self, s: &mut Sched, check: &mut Check, agent: usize, conn: usize, frame: Frame) {
        let id = ConnId(conn as u64);
        match &*frame.kind {
            kind::CAPABILITIES => {
                let capabilities: Box<Capabilities> = Box::new(frame.read().expect("the process's own"));
                s.net.conns[conn].incarnation = Some(capabilities.incarnation.as_str().into());
                self.keep(s, agent);
                let log = check.standing(&self.names[agent]);
                check.statuses.connected(agent, conn, &capabilities.incarnation, log.as_ref());
                capabilities.calls.iter().for_each(|c| check.slots.listed(agent, c.call_id));
                self.calls.extend(capabilities.calls.iter().map(|c| (c.call_id, c.shard)));
                self.machine(s, check, agent, AgentInput::Connected { conn: id, capabilities });
            }
            kind::STATUS => {
                let status: AgentStatus = frame.read().expect("the process's own");
                check.statuses.said(agent, conn, &status, s.now_ms);
                self.machine(s, check, agent, AgentInput::Status { conn: id, status });
            }
            "" => self.machine(s, check, agent, AgentInput::Alive { conn: id }),
            _ => {
                self.machine(s, check, agent, AgentInput::Alive { conn: id });
                let name = self.names[agent].clone();
                let incarnation = s.net.conns[conn].incarnation.clone().expect("the process introduces itself first");
                let shard = CallId::parse(frame.stream_id.split('.').next().unwrap_or_default())
                    .and_then(|call| self.calls.get(&call).copied());
                let message = FromAgent::Frame { agent: name, incarnation, received: received(frame) };
                // Who died with what it knew hears of its calls from the list, before any of their frames.
                let Some(shard) = shard else { return s.say(|| "  of no shard's call".into()) };
                self.tell(s, agent, shard, message);
            }
        }
    }

    pub fn disconnected(&mut self, s: &mut Sched, check: &mut Check, agent: usize, conn: usize) {
        self.machine(s, check, agent, AgentInput::Disconnected { conn: ConnId(conn as u64) });
    }

    fn machine(&mut self, s: &mut Sched, check: &mut Check, agent: usize, input: AgentInput) {
        let Some(machine) = &mut self.machines[agent] else { return };
        if let AgentInput::Connected { conn, capabilities } = &input {
            s.say(|| {
                format!("{agent} says hello on {}: {} with {:?}", conn.0, capabilities.incarnation, capabilities.calls)
            });
        }
        machine.handle(s.now(), input);
        self.drain(s, check, agent);
    }

    fn drain(&mut self, s: &mut Sched, check: &mut Check, agent: usize) {
        while let Some(effect) = self.machines[agent].as_mut().and_then(Machine::poll_effect) {
            match effect {
                AgentEffect::Send { conn, frame } => {
                    let index = usize::try_from(conn.0).expect("few connections");
                    if &*frame.kind == kind::DISPATCH
                        && let Ok(d) = frame.read::<Dispatch>()
                        && !d.go_on
                    {
                        check.slots.dispatched(agent, &d, s.now_ms, &mut check.verdict);
                        check.statuses.dispatched(agent, d.call_id, s.now_ms, &mut check.verdict);
                    }
                    s.note(&frame_hash(&frame), || format!("agent {agent} down {} {}", conn.0, show_frame(&frame)));
                    if s.net.conns[index].router_open {
                        s.send_down(index, frame);
                    }
                }
                AgentEffect::Close { conn, error } => {
                    s.note(&conn.0, || format!("agent {agent} closes {}: {error}", conn.0));
                    let index = usize::try_from(conn.0).expect("few connections");
                    check.statuses.closed(agent, index);
                    if s.net.conns[index].router_open {
                        s.router_closes(index);
                    }
                }
                AgentEffect::ToShard { shard: Some(shard), message } => {
                    check.slots.said(agent, shard, &message, s.now_ms, &check.statuses, &mut check.verdict);
                    self.tell(s, agent, shard, message);
                }
                AgentEffect::ToShard { shard: None, message } => {
                    for shard in 0..self.shards as u32 {
                        self.tell(s, agent, shard, message.clone());
                    }
                }
            }
        }
    }

    fn tell(&mut self, s: &mut Sched, agent: usize, shard: u32, message: FromAgent) {
        s.note(&agent, || format!("agent {agent} tells shard {shard} {}", show_from_agent(&message)));
        let far = !s.healed && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        let repeated = matches!(message, FromAgent::Lent { .. } | FromAgent::Sent { .. } | FromAgent::Unsent { .. });
        let generation = self.generation;
        if far && repeated {
            for _ in 0..s.copies() {
                let ms = s.delay();
                s.after(ms, Event::ToShard { shard, generation, message: Box::new(message.clone()) });
            }
            return;
        }
        let ms = s.delay();
        let last = &mut self.in_order_at[agent * self.shards + shard as usize];
        let at = (*last).max(s.now_ms + ms);
        *last = at;
        s.at(at, Event::ToShard { shard, generation, message: Box::new(message) });
    }
}

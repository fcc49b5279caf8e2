//! The router's shell, simulated: carries out effects in order, stands still or dies between any two of them, and starts
//! again from the log. Owns the real `Shard`, the real `Agent`s and the fake log.

use crate::simulation::check::{Check, fold};
use crate::simulation::log::FakeLog;
use crate::simulation::net::Peer;
use crate::simulation::plan::{self, Plan};
use crate::simulation::process::Process;
use crate::simulation::sched::{Event, Replay, Sched};
use crate::simulation::show::{frame_hash, show_entry, show_frame, show_from_agent, show_input, show_to_agent};
use crate::simulation::tools;
use atp_core::agent::Agent;
use atp_core::message::{
    AgentEffect, AgentInput, Effect, FromAgent, Input, LogRoom, Machine, Query, ToAgent, ToolDone,
};
use atp_core::record::{Entry, Genesis};
use atp_core::replay::StreamReplay;
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::content::{AgentStatus, Capabilities, Dispatch};
use atp_proto::frame::kind;
use atp_proto::{AgentName, ConnId, Frame, StreamId, TenantId};
use bytes::Bytes;
use prost::Message;
use std::collections::VecDeque;
use std::sync::Arc;

pub struct Router {
    pub settings: Arc<Settings>,
    pub shard: Option<Shard>,
    pub log: FakeLog,
    pub owner: u32,
    pub paused: bool,
    pub machines: Vec<Option<Agent>>,
    generation: u32,
    names: Vec<AgentName>,
    outbox: VecDeque<Effect>,
    inbox: VecDeque<Input>,
    crashes: u32,
    queries: u64,
    /// What is said of each agent's connection and frames keeps its order.
    in_order_at: Vec<u64>,
    to_order_at: Vec<u64>,
    /// The final question is answered.
    pub verified: bool,
    genesis: Genesis,
    told_owner: bool,
}

impl Router {
    #[must_use]
    pub fn new(plan: &Plan, log_id: u64) -> Self {
        let agents = plan.agents.len();
        Self {
            settings: Arc::new(plan.settings.clone()),
            shard: None,
            log: FakeLog::default(),
            owner: 0,
            paused: false,
            machines: (0..agents).map(|_| None).collect(),
            generation: 0,
            names: plan.agents.iter().map(|a| a.name.clone()).collect(),
            outbox: VecDeque::new(),
            inbox: VecDeque::new(),
            crashes: 0,
            queries: 0,
            in_order_at: vec![0; agents],
            to_order_at: vec![0; agents],
            verified: false,
            genesis: Genesis {
                log_id: Bytes::copy_from_slice(&[log_id.to_be_bytes(), log_id.to_le_bytes()].concat()),
                format: 1,
                shards: 1,
                hash_seed: 0,
            },
            told_owner: false,
        }
    }

    /// When a machine wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        let shard = self.shard.as_ref().filter(|_| !self.paused).and_then(Machine::poll_timeout);
        let agents = self.machines.iter().flatten().filter_map(Machine::poll_timeout).min();
        [shard, agents].into_iter().flatten().min()
    }

    pub fn timeouts(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        let now = s.now();
        for agent in 0..self.machines.len() {
            let due = self.machines[agent].as_ref().and_then(Machine::poll_timeout).is_some_and(|at| at <= now.mono_ms);
            if due && let Some(machine) = &mut self.machines[agent] {
                machine.handle_timeout(now);
                self.drain_machine(s, check, agent);
            }
        }
        if self.paused {
            return;
        }
        if let Some(shard) = &mut self.shard
            && shard.poll_timeout().is_some_and(|at| at <= now.mono_ms)
        {
            s.note(&0_u8, || "shard: timeout".into());
            shard.handle_timeout(now);
            self.drain(s, check, processes);
        }
    }

    // ---- the shard --------------------------------------------------------------------------------------------------

    pub fn input(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], input: Input) {
        if self.shard.is_none() {
            return;
        }
        if self.paused {
            self.inbox.push_back(input);
            return;
        }
        if let Some(shard) = &mut self.shard {
            s.say(|| format!("  -> shard {}", show_input(&input)));
            shard.handle(s.now(), input);
        }
        self.drain(s, check, processes);
    }

    fn drain(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        if let Some(shard) = &mut self.shard {
            while let Some(effect) = shard.poll_effect() {
                self.outbox.push_back(effect);
            }
        }
        while let Some(effect) = self.outbox.pop_front() {
            self.carry_out(s, check, effect);
            if s.healed {
                continue;
            }
            if self.crashes < s.faults.crashes_max && s.rng.ppm(s.faults.crash_ppm) {
                s.say(|| "dies between two effects".into());
                self.crash(s, check, processes);
                return;
            }
            if s.rng.ppm(s.faults.pause_ppm) {
                self.paused = true;
                let ms = s.rng.range(1, 1_500);
                s.say(|| format!("stands still for {ms} ms, {} effects wait", self.outbox.len()));
                s.after(ms, Event::Unpause { owner: self.owner });
                return;
            }
        }
    }

    pub fn unpause(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], owner: u32) {
        if owner != self.owner || !self.paused || self.shard.is_none() {
            return;
        }
        self.paused = false;
        self.drain(s, check, processes);
        while !self.paused
            && let Some(input) = self.inbox.pop_front()
        {
            self.input(s, check, processes, input);
        }
    }

    fn carry_out(&mut self, s: &mut Sched, check: &mut Check, effect: Effect) {
        match effect {
            Effect::Append { position, entry, .. } => {
                s.note(&entry, || format!("append {position}: {}", show_entry(&entry)));
                let next = self.log.append(position, entry);
                check.verdict.expect(next, "one order without a hole", || {
                    format!("append at {position}, the log has {}", self.log.len() - 1)
                });
                self.schedule_commit(s);
            }
            Effect::Send { conn, frame } => {
                s.note(&frame_hash(&frame), || format!("send {} {}", conn.0, show_frame(&frame)));
                let index = usize::try_from(conn.0).expect("few connections");
                if s.net.conns[index].router_open {
                    let tenant = s.net.conns[index].tenant.clone();
                    check.to_client(tenant.as_str(), &frame);
                    s.send_down(index, frame);
                }
            }
            Effect::Replay { conn, tenant, stream, from, after, upto } => {
                let request = Box::new(Replay { conn, tenant, stream, from, after, upto });
                s.note(&(from, after, upto), || format!("replay {request:?}"));
                let ms = s.delay();
                s.after(ms, Event::Replay { owner: self.owner, request });
            }
            Effect::ToAgent { agent, message } => {
                s.note(&agent, || format!("to {agent}: {}", show_to_agent(&message)));
                check.to_agent(&agent, &message);
                if let Some(agent) = self.names.iter().position(|n| *n == agent) {
                    self.send_to_machine(s, agent, message);
                }
            }
            Effect::Close { conn, .. } => {
                let index = usize::try_from(conn.0).expect("few connections");
                s.router_closes(index);
            }
            Effect::Answer { answer, id } => {
                s.note(&id, || format!("answer {id}: {answer:?}"));
                check.answered(&answer, self.log.acked() as u64);
                self.verified |= s.healed && matches!(answer, atp_core::message::Answer::Verify(_));
            }
            Effect::Tool { call, attempt, request, .. } => {
                s.note(&request, || format!("tool of {call}, attempt {attempt}, message {request}"));
                check.tool_runs(call, attempt, request);
                tools::run(s, self.owner, call, attempt, request);
            }
            // One shard has nobody to say it to.
            Effect::ToShard { .. } | Effect::Learned(_) | Effect::Metric(_) => {}
        }
    }

    pub fn tool_done(
        &mut self,
        s: &mut Sched,
        check: &mut Check,
        processes: &mut [Process],
        owner: u32,
        done: Box<ToolDone>,
    ) {
        if owner == self.owner {
            self.input(s, check, processes, Input::ToolDone(done));
        }
    }

    fn schedule_commit(&mut self, s: &mut Sched) {
        if !self.log.commit_scheduled && self.log.len() > self.log.acked() {
            self.log.commit_scheduled = true;
            let most = if s.healed { 3 } else { s.faults.commit_max_ms };
            let ms = s.rng.range(0, most);
            s.after(ms, Event::Commit { owner: self.owner });
        }
    }

    pub fn commit(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], owner: u32) {
        if owner != self.owner || self.shard.is_none() {
            return;
        }
        self.log.commit_scheduled = false;
        let before = self.log.acked();
        let split = s.faults.commit_split_percent;
        let upto = self.log.commit(&mut s.rng, split);
        self.made_durable(s, check, processes, before, upto);
        self.schedule_commit(s);
        self.input(s, check, processes, Input::Durable { position: upto as u64 });
        if !self.told_owner && self.shard.is_some() {
            self.told_owner = true;
            // Keepers on another router hear of the new owner from theirs.
            let epoch = check.ledger.epoch;
            for agent in 0..self.machines.len() {
                self.send_in_order(s, agent, ToAgent::Owner { shard: 0, epoch });
            }
        }
    }

    fn made_durable(&self, s: &Sched, check: &mut Check, processes: &[Process], before: usize, upto: usize) {
        for position in before + 1..=upto {
            check.durable(position as u64, self.log.entry(position), processes, s.now_ms);
        }
    }

    pub fn crash(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        if self.shard.take().is_none() {
            return;
        }
        self.crashes += 1;
        self.paused = false;
        self.outbox.clear();
        self.inbox.clear();
        let before = self.log.acked();
        self.log.crash(&mut s.rng);
        self.made_durable(s, check, processes, before, self.log.len());
        let live = s.rng.percent(s.faults.machines_live_percent);
        s.note(&live, || format!("CRASH, the log ends at {}, keepers live: {live}", self.log.len()));
        for conn in 0..s.net.conns.len() {
            let dies = match s.net.conns[conn].peer {
                Peer::Client(_) => true,
                Peer::Agent { .. } => !live,
            };
            if dies && s.net.conns[conn].router_open {
                s.router_dies(conn);
            }
        }
        if !live {
            self.generation += 1;
            for agent in 0..self.machines.len() {
                self.machines[agent] = None;
                check.slots.restarted(agent);
                check.statuses.restarted(agent);
            }
        }
        let ms = if s.rng.percent(15) { s.rng.range(1_000, 8_000) } else { s.rng.range(1, 500) };
        s.after(ms, Event::Restart);
    }

    pub fn restart(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        if self.shard.is_some() {
            return;
        }
        let decoded: Result<Vec<Entry>, _> =
            (1..=self.log.len()).map(|p| Entry::decode(self.log.entry(p).clone())).collect();
        let entries = match decoded {
            Ok(entries) => entries,
            Err(e) => return check.verdict.fail("replay halts nowhere", || e.to_string()),
        };
        let mut state = match fold::recover(&entries, true) {
            Ok(state) => state,
            Err(e) => return check.verdict.fail("replay halts nowhere", || e),
        };
        if s.rng.percent(s.faults.full_replay_percent) {
            let whole = fold::recover(&entries, false).unwrap_or_else(|_| State::default());
            check.verdict.expect(whole.hash() == state.hash(), "a checkpoint stands for what it covers", || {
                format!("from the beginning {:?}, from a checkpoint {:?}", whole.verify_view(), state.verify_view())
            });
            state = whole;
        }
        check.fold.statistics(&state, &mut check.verdict);
        for name in &self.names {
            let (folded, logged) = (state.standing(name.as_str()), check.ledger.standing(name.as_str()));
            check.verdict.expect(folded == logged, "status after a restart is the log's", || {
                format!("{name} stands as {folded:?}, the log has {logged:?}")
            });
        }
        self.owner += 1;
        self.told_owner = false;
        let incarnation = format!("o{}", self.owner);
        s.note(&self.owner, || format!("RESTART {incarnation} at {}", state.position()));
        self.shard =
            Some(Shard::recover(self.settings.clone(), state, s.now(), &incarnation, Some(self.genesis.clone())));
        self.drain(s, check, processes);
    }

    pub fn replay(
        &mut self,
        s: &mut Sched,
        check: &mut Check,
        processes: &mut [Process],
        owner: u32,
        request: &Replay,
    ) {
        if owner != self.owner || self.shard.is_none() {
            return;
        }
        let index = usize::try_from(request.conn.0).expect("few connections");
        if !s.net.conns[index].router_open {
            return;
        }
        let mut replay = StreamReplay::new(&request.tenant, &request.stream, request.after, request.upto);
        for position in usize::try_from(request.from).expect("small") + 1..=self.log.acked() {
            let Ok(entry) = Entry::decode(self.log.entry(position).clone()) else { continue };
            for frame in replay.feed(position as u64, &entry) {
                s.note(&frame_hash(&frame), || format!("replayed {} {}", request.conn.0, show_frame(&frame)));
                check.to_client(request.tenant.as_str(), &frame);
                s.send_down(index, frame);
            }
        }
        let (conn, tenant, stream) = (request.conn, request.tenant.clone(), request.stream.clone());
        self.input(s, check, processes, Input::Replayed { conn, tenant, stream, upto: request.upto });
    }

    // ---- connections ------------------------------------------------------------------------------------------------

    pub fn up(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], conn: usize, frame: Frame) {
        if !s.net.conns[conn].router_open {
            return;
        }
        let id = ConnId(conn as u64);
        s.note(&frame_hash(&frame), || format!("up {conn} {}", show_frame(&frame)));
        match s.net.conns[conn].peer {
            Peer::Client(_) => {
                let tenant = s.net.conns[conn].tenant.clone();
                let received = received(frame);
                self.input(s, check, processes, Input::Client { conn: id, tenant, received });
            }
            Peer::Agent { agent, .. } => match &*frame.kind {
                kind::CAPABILITIES => {
                    let capabilities: Box<Capabilities> = Box::new(frame.read().expect("the process's own"));
                    s.net.conns[conn].incarnation = Some(capabilities.incarnation.as_str().into());
                    self.keep(s, agent);
                    let log = check.ledger.standing(self.names[agent].as_str());
                    check.statuses.connected(agent, conn, &capabilities.incarnation, log);
                    capabilities.calls.iter().for_each(|c| check.slots.listed(agent, c.call_id));
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
                    let incarnation =
                        s.net.conns[conn].incarnation.clone().expect("the process introduces itself first");
                    self.tell_shard(s, agent, FromAgent::Frame { agent: name, incarnation, received: received(frame) });
                }
            },
        }
    }

    pub fn gone(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], conn: usize) {
        if !s.net.conns[conn].router_open {
            return;
        }
        s.net.conns[conn].router_open = false;
        let id = ConnId(conn as u64);
        match s.net.conns[conn].peer {
            Peer::Client(_) => self.input(s, check, processes, Input::ConnGone { conn: id }),
            Peer::Agent { agent, .. } => self.machine(s, check, agent, AgentInput::Disconnected { conn: id }),
        }
    }

    // ---- the keepers of agents --------------------------------------------------------------------------------------

    /// A message of the shard on its way to a keeper: late, twice, out of order, lost where it is repeated.
    fn send_to_machine(&mut self, s: &mut Sched, agent: usize, message: ToAgent) {
        let far = !s.healed && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        if !far || matches!(message, ToAgent::Ended { .. } | ToAgent::Standing { .. }) {
            return self.send_in_order(s, agent, message);
        }
        let (generation, mut copies) = (self.generation, 1);
        if s.rng.percent(s.faults.loss_percent) {
            copies = 0;
        } else if s.rng.percent(s.faults.duplicate_percent) {
            copies = 2;
        }
        for _ in 0..copies {
            let ms = s.delay();
            s.after(ms, Event::ToMachine { agent, generation, message: Box::new(message.clone()) });
        }
    }

    fn send_in_order(&mut self, s: &mut Sched, agent: usize, message: ToAgent) {
        let ms = s.delay();
        let at = self.to_order_at[agent].max(s.now_ms + ms);
        self.to_order_at[agent] = at;
        s.at(at, Event::ToMachine { agent, generation: self.generation, message: Box::new(message) });
    }

    /// A handle has its keeper from the first word of or for it.
    fn keep(&mut self, s: &Sched, agent: usize) {
        if self.machines[agent].is_none() {
            let (name, settings) = (self.names[agent].clone(), self.settings.clone());
            self.machines[agent] = Some(Agent::new(name, settings, s.now()));
        }
    }

    pub fn hand_to_machine(
        &mut self,
        s: &mut Sched,
        check: &mut Check,
        agent: usize,
        generation: u32,
        message: ToAgent,
    ) {
        if generation != self.generation {
            return;
        }
        self.keep(s, agent);
        check.slots.told(agent, &message, s.now_ms);
        self.machine(s, check, agent, AgentInput::Shard(message));
    }

    fn machine(&mut self, s: &mut Sched, check: &mut Check, agent: usize, input: AgentInput) {
        let Some(machine) = &mut self.machines[agent] else { return };
        if let AgentInput::Connected { conn, capabilities } = &input {
            s.say(|| {
                format!("{agent} says hello on {}: {} with {:?}", conn.0, capabilities.incarnation, capabilities.calls)
            });
        }
        machine.handle(s.now(), input);
        self.drain_machine(s, check, agent);
    }

    fn drain_machine(&mut self, s: &mut Sched, check: &mut Check, agent: usize) {
        while let Some(effect) = self.machines[agent].as_mut().and_then(Machine::poll_effect) {
            match effect {
                AgentEffect::Send { conn, frame } => {
                    let index = usize::try_from(conn.0).expect("few connections");
                    if &*frame.kind == kind::DISPATCH
                        && let Ok(d) = frame.read::<Dispatch>()
                        && !d.go_on
                    {
                        check.slots.dispatched(agent, d.call_id, d.epoch, s.now_ms, &mut check.verdict);
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
                AgentEffect::ToShard { message, .. } => {
                    check.slots.said(agent, &message, s.now_ms, &check.statuses, &mut check.verdict);
                    self.tell_shard(s, agent, message);
                }
            }
        }
    }

    fn tell_shard(&mut self, s: &mut Sched, agent: usize, message: FromAgent) {
        s.note(&agent, || format!("agent {agent} tells the shard {}", show_from_agent(&message)));
        let far = !s.healed && (s.faults.loss_percent > 0 || s.faults.duplicate_percent > 0);
        let repeated = matches!(message, FromAgent::Lent { .. } | FromAgent::Sent { .. } | FromAgent::Unsent { .. });
        if far && repeated {
            let copies = match () {
                () if s.rng.percent(s.faults.loss_percent) => 0,
                () if s.rng.percent(s.faults.duplicate_percent) => 2,
                () => 1,
            };
            for _ in 0..copies {
                let ms = s.delay();
                s.after(ms, Event::ToShard { generation: self.generation, message: Box::new(message.clone()) });
            }
            return;
        }
        let ms = s.delay();
        let at = self.in_order_at[agent].max(s.now_ms + ms);
        self.in_order_at[agent] = at;
        s.at(at, Event::ToShard { generation: self.generation, message: Box::new(message) });
    }

    pub fn from_machine(
        &mut self,
        s: &mut Sched,
        check: &mut Check,
        processes: &mut [Process],
        generation: u32,
        message: FromAgent,
    ) {
        if generation == self.generation {
            self.input(s, check, processes, Input::Agent(message));
        }
    }

    // ---- questions --------------------------------------------------------------------------------------------------

    pub fn ask(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process], query: Query) {
        self.queries += 1;
        self.input(s, check, processes, Input::Query { id: self.queries, query });
    }

    pub fn random_query(s: &mut Sched, streams: &[(TenantId, StreamId)]) -> Query {
        let which = if streams.is_empty() { 0 } else { s.rng.below(7) };
        let (tenant, stream) = match streams.get(s.rng.index(streams.len())) {
            Some(known) => known.clone(),
            None => return Query::Verify,
        };
        match which {
            0 | 1 => Query::Verify,
            2 => Query::Accounts,
            3 => Query::Stream { tenant, stream },
            4 => Query::Bill { tenant, stream },
            5 => Query::Agents,
            _ => Query::Streams { tenant },
        }
    }

    /// Other limits, other steps at them, and accounts that weren't there. What runs goes on under its own windows.
    pub fn reload(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        let mut settings = (*self.settings).clone();
        (settings.accounts, settings.default_account) = plan::accounts(&mut s.rng);
        settings.retries = s.rng.pick(&[0, 1, 2]) as u32;
        s.say(|| format!("  reload {:?} {:?}", settings.accounts, settings.default_account));
        self.settings = Arc::new(settings);
        if self.paused {
            return;
        }
        if let Some(shard) = &mut self.shard {
            shard.set_settings(self.settings.clone());
        }
        self.drain(s, check, processes);
    }

    pub fn room(&mut self, s: &mut Sched, check: &mut Check, processes: &mut [Process]) {
        let room = if s.healed { LogRoom::Enough } else { s.rng.pick(&[LogRoom::Low, LogRoom::Last, LogRoom::Enough]) };
        self.input(s, check, processes, Input::LogRoom(room));
    }
}

fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

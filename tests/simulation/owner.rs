//! The owners of one shard, simulated: carry out effects in order, stand still or die between any two of them, and start again from
//! the log. Of several only the newest counts; an older one hears of it late. Owns the real `Shard`s and the fake log.

mod brokers;
mod fleet;
mod operator;

use crate::simulation::check::{Check, fold};
use crate::simulation::keepers::Keepers;
use crate::simulation::log::FakeLog;
use crate::simulation::net::Peer;
use crate::simulation::partition::{Partition, Seen};
use crate::simulation::plan::Plan;
use crate::simulation::process::Process;
use crate::simulation::sched::{Event, Replay, Sched};
use crate::simulation::show::{frame_hash, show_entry, show_frame, show_input, show_to_agent};
use crate::simulation::tools;
use atp_core::message::{Answer, Effect, Input, Machine, ToAgent};
use atp_core::partition::Owner as Rule;
use atp_core::record::{AnyRecord, Entry, Epoch, Genesis, Record};
use atp_core::replay::StreamReplay;
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::State;
use atp_proto::codec::{Received, encode_body};
use atp_proto::{ConnId, Frame};
use bytes::Bytes;
use prost::Message;
use std::collections::VecDeque;
use std::sync::Arc;

/// What an owner acts on.
pub struct Around<'a> {
    pub s: &'a mut Sched,
    pub check: &'a mut Check,
    pub processes: &'a mut [Process],
    pub keepers: &'a mut Keepers,
}

/// One process that believes it owns the shard.
pub struct Owner {
    number: u32,
    router: usize,
    pub shard: Shard,
    paused: bool,
    outbox: VecDeque<Effect>,
    inbox: VecDeque<Input>,
    /// Sent to the log, not there yet.
    pending: VecDeque<Bytes>,
    /// Where it began. The last position of its entries that is in the log, and the last one that it was told of.
    at: usize,
    written: usize,
    acked: usize,
    commit_scheduled: bool,
    told_keepers: bool,
    /// Where the log is a partition: when its entries are durable, how many of them the brokers have got, the last of those.
    rule: Option<Rule>,
    handed: u64,
    batch: brokers::Batch,
}

impl Owner {
    fn new(number: u32, router: usize, shard: Shard, at: usize) -> Self {
        Self {
            number,
            router,
            shard,
            paused: false,
            outbox: VecDeque::new(),
            inbox: VecDeque::new(),
            pending: VecDeque::new(),
            at,
            written: at,
            acked: at,
            commit_scheduled: false,
            told_keepers: false,
            rule: None,
            handed: 0,
            batch: brokers::Batch::default(),
        }
    }
}

/// One shard: its log, and who owns it.
pub struct Place {
    pub no: u32,
    pub settings: Arc<Settings>,
    log: FakeLog,
    /// The newest is the last one, if it lives; `number` is the newest's.
    owners: Vec<Owner>,
    pub number: u32,
    /// Where the log is a partition: who is about to take it, and how many have tried.
    taking: Option<brokers::Taking>,
    tried: u32,
    /// A follower of the log, as far as it has read.
    standby: State,
    /// Clients' frames for the owner to come.
    waiting: Vec<(usize, Frame)>,
    crashes: u32,
    queries: u64,
    /// The final question is answered.
    pub verified: bool,
    genesis: Genesis,
}

impl Place {
    #[must_use]
    pub fn new(plan: &Plan, log_id: u64, no: u32) -> Self {
        let log_id = u128::from(log_id.to_be()) << 64 | u128::from(log_id);
        let partition = plan.brokers.then(|| Box::new(Partition::new(log_id.to_le_bytes(), plan.mishaps)));
        Self {
            no,
            settings: Arc::new(Settings { shard: no, ..plan.settings.clone() }),
            log: FakeLog::of(partition),
            owners: Vec::new(),
            number: 0,
            taking: None,
            tried: 0,
            standby: State::default(),
            waiting: Vec::new(),
            crashes: 0,
            queries: 0,
            verified: false,
            genesis: Genesis {
                log_id: Bytes::copy_from_slice(&log_id.to_le_bytes()),
                format: atp_core::state::FORMAT,
                shards: plan.placement.shards(),
                hash_seed: 0,
            },
        }
    }

    /// The owner that counts, while it lives.
    #[must_use]
    pub fn newest(&self) -> Option<&Owner> {
        self.owners.last().filter(|o| o.number == self.number)
    }

    #[must_use]
    pub fn is_up(&self) -> bool {
        self.newest().is_some()
    }

    /// Its owner lives, and nothing of it is on its way to the log.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let idle = |o: &Owner| o.pending.is_empty() && o.outbox.is_empty() && o.batch.is_over();
        self.newest().is_some_and(|o| idle(o) && !self.log.is_fenced(o.number))
    }

    /// What a partition has been through.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.log.partition.as_ref().map_or_else(Seen::default, |p| p.seen)
    }

    fn index(&self, number: u32) -> Option<usize> {
        self.owners.iter().position(|o| o.number == number)
    }

    /// When an owner wants to be called.
    #[must_use]
    pub fn next_timeout(&self) -> Option<u64> {
        self.owners.iter().filter(|o| !o.paused).filter_map(|o| o.shard.poll_timeout()).min()
    }

    pub fn timeouts(&mut self, a: &mut Around<'_>) {
        let now = a.s.now();
        let numbers: Vec<u32> = self.owners.iter().filter(|o| !o.paused).map(|o| o.number).collect();
        for number in numbers {
            let Some(at) = self.index(number) else { continue };
            if self.owners[at].shard.poll_timeout().is_some_and(|at| at <= now.mono_ms) {
                a.s.note(&0_u8, || format!("shard {}: timeout", self.no));
                self.owners[at].shard.handle_timeout(now);
                self.drain(a, number);
            }
        }
    }

    // ---- inputs and effects -----------------------------------------------------------------------------------------

    /// For the newest owner; lost while there is none.
    pub fn input(&mut self, a: &mut Around<'_>, input: Input) {
        self.input_of(a, self.number, input);
    }

    /// What another shard says; a peer may take one that was replaced for the owner still.
    pub fn escrow(&mut self, a: &mut Around<'_>, from: u32, message: atp_core::escrow::Escrow) {
        let old = self.owners.first().map(|o| o.number).filter(|n| *n != self.number);
        let to = old.filter(|_| a.s.rng.percent(30)).unwrap_or(self.number);
        self.input_of(a, to, Input::Escrow { from, message });
    }

    fn input_of(&mut self, a: &mut Around<'_>, number: u32, input: Input) {
        let Some(at) = self.index(number) else { return };
        let owner = &mut self.owners[at];
        if owner.paused {
            owner.inbox.push_back(input);
            return;
        }
        a.s.say(|| format!("  -> shard {} {}", self.no, show_input(&input)));
        owner.shard.handle(a.s.now(), input);
        self.drain(a, number);
    }

    fn drain(&mut self, a: &mut Around<'_>, number: u32) {
        let Some(at) = self.index(number) else { return };
        let owner = &mut self.owners[at];
        while let Some(effect) = owner.shard.poll_effect() {
            owner.outbox.push_back(effect);
        }
        while let Some(effect) = self.owners[at].outbox.pop_front() {
            self.carry_out(a, at, effect);
            let s = &mut *a.s;
            if s.healed {
                continue;
            }
            if self.crashes < s.faults.crashes_max && s.rng.ppm(s.faults.crash_ppm) {
                s.say(|| "dies between two effects".into());
                self.crash(a, number);
                return;
            }
            if s.rng.ppm(s.faults.pause_ppm) {
                let owner = &mut self.owners[at];
                owner.paused = true;
                let ms = s.rng.range(1, 1_500);
                s.say(|| format!("stands still for {ms} ms, {} effects wait", owner.outbox.len()));
                s.after(ms, Event::Unpause { shard: self.no, owner: number });
                return;
            }
        }
    }

    pub fn unpause(&mut self, a: &mut Around<'_>, number: u32) {
        let Some(at) = self.index(number).filter(|at| self.owners[*at].paused) else { return };
        self.owners[at].paused = false;
        self.drain(a, number);
        while let Some(at) = self.index(number).filter(|at| !self.owners[*at].paused)
            && let Some(input) = self.owners[at].inbox.pop_front()
        {
            self.input_of(a, number, input);
        }
    }

    fn carry_out(&mut self, a: &mut Around<'_>, at: usize, effect: Effect) {
        let (no, number) = (self.no, self.owners[at].number);
        let Around { s, check, keepers, .. } = a;
        match effect {
            Effect::Append { position, entry, .. } => {
                s.note(&entry, || format!("append {no}/{position}: {}", show_entry(&entry)));
                let owner = &mut self.owners[at];
                owner.pending.push_back(entry);
                let next = owner.written + owner.pending.len();
                check.verdict.expect(position == next as u64, "one order without a hole", || {
                    format!("append at {position}, the next position of shard {no} is {next}")
                });
                self.schedule_commit(s, at);
            }
            Effect::Send { conn, frame } => {
                s.note(&frame_hash(&frame), || format!("send {} {}", conn.0, show_frame(&frame)));
                let index = usize::try_from(conn.0).expect("few connections");
                if s.net.conns[index].router_open {
                    let tenant = s.net.conns[index].tenant.clone();
                    check.to_client(no, tenant.as_str(), &frame);
                    s.send_down(index, frame);
                }
            }
            Effect::Replay { conn, tenant, stream, from, after, upto } => {
                let request = Box::new(Replay { conn, tenant, stream, from, after, upto });
                s.note(&(from, after, upto), || format!("replay {request:?}"));
                let ms = s.delay();
                s.after(ms, Event::Replay { shard: no, owner: number, request });
            }
            Effect::ToAgent { agent, message } => {
                s.note(&agent, || format!("shard {no} to {agent}: {}", show_to_agent(&message)));
                check.to_agent(no, &agent, &message, self.log.is_fenced(number));
                if let Some(agent) = keepers.names.iter().position(|n| *n == agent) {
                    keepers.send(s, self.owners[at].router, no, agent, message);
                }
            }
            Effect::ToShard { shard, message } => {
                s.note(&message.encode_to_vec(), || format!("shard {no} to shard {shard}: {message:?}"));
                check.to_shard(no, shard, &message);
                s.send_escrow(no, shard, message);
            }
            Effect::Close { conn, .. } => {
                let index = usize::try_from(conn.0).expect("few connections");
                s.router_closes(index);
            }
            Effect::Answer { answer, id } => {
                s.note(&id, || format!("answer {id}: {answer:?}"));
                // A store takes nothing from an owner whose epoch isn't the newest.
                if !(self.log.is_fenced(number) && matches!(answer, Answer::Projection(_))) {
                    check.answered(no, &answer, self.owners[at].acked as u64);
                }
                self.verified |= s.healed && matches!(answer, Answer::Verify(_));
            }
            Effect::Tool { call, attempt, request, .. } => {
                s.note(&request, || format!("tool of {call}, attempt {attempt}, message {request}"));
                check.tool_runs(call, attempt, request);
                tools::run(s, no, number, call, attempt, request);
            }
            Effect::Learned(_) | Effect::Metric(_) => {}
        }
    }

    pub fn tool_done(&mut self, a: &mut Around<'_>, number: u32, input: Input) {
        self.input_of(a, number, input);
    }

    // ---- the log ----------------------------------------------------------------------------------------------------

    fn schedule_commit(&mut self, s: &mut Sched, at: usize) {
        let owner = &mut self.owners[at];
        if !owner.commit_scheduled && !owner.pending.is_empty() && owner.batch.is_over() {
            owner.commit_scheduled = true;
            let most = if s.healed { 3 } else { s.faults.commit_max_ms };
            let ms = s.rng.range(0, most);
            s.after(ms, Event::Commit { shard: self.no, owner: owner.number });
        }
    }

    /// Some of what waits is written, and its owner is told.
    pub fn commit(&mut self, a: &mut Around<'_>, number: u32) {
        let Some(at) = self.index(number) else { return };
        self.owners[at].commit_scheduled = false;
        if self.log.partition.is_none() && self.log.is_fenced(number) {
            // What it had sent before counts, and it hears so before it hears the rest.
            let position = self.owners[at].written;
            self.owners[at].acked = position;
            self.input_of(a, number, Input::Durable { position: position as u64 });
            return a.s.after(0, Event::StepDown { shard: self.no, owner: number });
        }
        let waiting = self.owners[at].pending.len();
        let split = a.s.rng.percent(a.s.faults.commit_split_percent);
        let n = if split { a.s.rng.index(waiting) + 1 } else { waiting };
        if self.log.partition.is_some() {
            return self.hand_over(a.s, at, n);
        }
        self.write(a, at, n);
        self.owners[at].acked = self.owners[at].written;
        let position = self.owners[at].acked as u64;
        self.schedule_commit(a.s, at);
        self.input_of(a, number, Input::Durable { position });
        self.tell_keepers(a, number);
    }

    fn write(&mut self, a: &mut Around<'_>, at: usize, n: usize) {
        for _ in 0..n {
            let owner = &mut self.owners[at];
            let Some(entry) = owner.pending.pop_front() else { return };
            owner.written += 1;
            let (number, position) = (owner.number, owner.written);
            if self.log.write(number, entry) {
                a.check.durable(self.no, position as u64, self.log.entry(position), a.processes, a.s.now_ms);
            }
        }
    }

    /// Keepers on another router hear of the new owner from theirs.
    fn tell_keepers(&mut self, a: &mut Around<'_>, number: u32) {
        let Some(at) = self.index(number).filter(|at| !self.owners[*at].told_keepers) else { return };
        self.owners[at].told_keepers = true;
        for agent in a.keepers.known_at(self.owners[at].router) {
            self.introduce_owner(a, at, agent);
        }
    }

    fn introduce_owner(&self, a: &mut Around<'_>, at: usize, agent: usize) {
        let (shard, epoch, router) = (self.no, self.owners[at].shard.epoch(), self.owners[at].router);
        a.keepers.send_in_order(a.s, router, shard, agent, ToAgent::Owner { shard, epoch });
    }

    // ---- owners come and go -----------------------------------------------------------------------------------------

    /// The newest owner dies.
    pub fn dies(&mut self, a: &mut Around<'_>) {
        self.crash(a, self.number);
    }

    fn crash(&mut self, a: &mut Around<'_>, number: u32) {
        self.ends(a, number, false);
    }

    /// An owner is no more; `with`: its process was killed, else it may be that alone, or take its process with it.
    fn ends(&mut self, a: &mut Around<'_>, number: u32, with: bool) {
        let Some(at) = self.index(number) else { return };
        self.crashes += 1;
        if number != self.number {
            self.owners.remove(at);
            return;
        }
        let sent = self.owners[at].pending.len();
        let kept = a.s.rng.index(sent + 1);
        match &self.log.partition {
            None => self.write(a, at, kept),
            Some(_) if self.owners[at].batch.is_over() => self.hand_over(a.s, at, kept),
            Some(_) => {}
        }
        let router = self.owners.remove(at).router;
        let live = with || a.s.rng.percent(a.s.faults.machines_live_percent);
        let (no, end) = (self.no, self.log.len());
        a.s.note(&live, || format!("CRASH of shard {no}, its log ends at {end}, keepers live: {live}"));
        let others = a.check.shards.len() > 1;
        self.lose_clients(a.s, others);
        if !live {
            self.process_dies(a, router, others);
        }
        let ms = if a.s.rng.percent(15) { a.s.rng.range(1_000, 8_000) } else { a.s.rng.range(1, 500) };
        a.s.after(ms, Event::Restart { shard: self.no });
    }

    /// Clients are cut off from a shard with their connection; the other shards hear of it.
    fn lose_clients(&self, s: &mut Sched, others: bool) {
        for conn in 0..s.net.conns.len() {
            if matches!(s.net.conns[conn].peer, Peer::Client(_)) && s.net.conns[conn].router_open {
                s.router_dies(conn);
                if others {
                    s.after(0, Event::ConnLost { conn });
                }
            }
        }
    }

    /// An owner that was replaced hears of it.
    pub fn step_down(&mut self, a: &mut Around<'_>, number: u32) {
        if self.log.partition.is_some() {
            self.look(a, number);
        } else if number != self.number {
            self.owners.retain(|o| o.number != number);
        }
    }

    /// All who were replaced have heard of it.
    pub fn all_step_down(&mut self) {
        let newest = self.number;
        self.taking = None;
        self.owners.retain(|o| o.number == newest);
    }

    /// What the log says up to a position, read in one of the ways in which it is read.
    fn read(&mut self, a: &mut Around<'_>, end: usize) -> Option<State> {
        let Around { s, check, .. } = a;
        let decoded: Result<Vec<Entry>, _> = (1..=end).map(|p| Entry::decode(self.log.entry(p).clone())).collect();
        let recovered = decoded.map_err(|e| e.to_string()).and_then(|entries| {
            let state = fold::recover(&entries, true)?;
            Ok((entries, state))
        });
        let (entries, mut state) = match recovered {
            Ok(recovered) => recovered,
            Err(e) => {
                check.verdict.fail("replay halts nowhere", || e);
                return None;
            }
        };
        if s.rng.percent(s.faults.full_replay_percent) {
            let whole = fold::recover(&entries, false).unwrap_or_else(|_| State::default());
            check.verdict.expect(whole.hash() == state.hash(), "a checkpoint stands for what it covers", || {
                format!("from the beginning {:?}, from a checkpoint {:?}", whole.verify_view(), state.verify_view())
            });
            state = whole;
        }
        if check.shards.len() > 1 && s.rng.percent(30) {
            for (index, entry) in entries.iter().enumerate().skip(self.standby.position() as usize) {
                let applied = self.standby.apply(index as u64 + 1, entry);
                check.verdict.expect(applied.is_ok(), "replay halts nowhere", || format!("standby: {applied:?}"));
            }
            check.verdict.expect(self.standby.hash() == state.hash(), "warm = cold", || {
                format!("standby {:?}, read {:?}", self.standby.verify_view(), state.verify_view())
            });
            state = self.standby.clone();
        }
        check.shards[self.no as usize].fold.statistics(&state, &mut check.verdict);
        for name in &a.keepers.names {
            let ledger = &check.shards[self.no as usize].ledger;
            let (folded, logged) = (state.standing(name.as_str()), ledger.standing(name.as_str()));
            check.verdict.expect(folded == logged, "status after a restart is the log's", || {
                format!("{name} stands as {folded:?}, the log has {logged:?}")
            });
        }
        Some(state)
    }

    pub fn restart(&mut self, a: &mut Around<'_>) {
        if self.is_up() {
            return;
        }
        if self.log.partition.is_some() {
            return self.claim(a);
        }
        let Some(router) = self.any_router(a) else {
            return a.s.after(200, Event::Restart { shard: self.no });
        };
        let Some(state) = self.read(a, self.log.len()) else { return };
        self.number += 1;
        let (no, number) = (self.no, self.number);
        let incarnation = format!("o{number}");
        a.s.note(&number, || format!("RESTART of shard {no}, {incarnation} at {}", state.position()));
        let at = self.log.len();
        let shard = Shard::recover(self.settings.clone(), state, a.s.now(), &incarnation, Some(self.genesis.clone()));
        self.owners.push(Owner::new(number, router, shard, at));
        self.drain(a, number);
        self.let_in(a);
    }

    /// Another owner begins its epoch in the log, reads what is before it, and serves; the one that was the owner may go on for
    /// a while without knowing.
    pub fn take_over(&mut self, a: &mut Around<'_>) {
        if a.s.healed || !self.is_up() || self.log.is_empty() {
            return;
        }
        if self.log.partition.is_some() {
            return self.claim(a);
        }
        let Some(router) = self.any_router(a) else { return };
        let at = self.owners.len() - 1;
        let sent = self.owners[at].pending.len();
        let before = a.s.rng.index(sent + 1);
        self.write(a, at, before);
        let old = self.number;
        self.number += 1;
        let (no, number) = (self.no, self.number);
        let entry = self.epoch_of(number, a.s);
        self.log.begin_epoch(number);
        self.log.write(number, entry);
        let position = self.log.len();
        a.s.note(&number, || format!("TAKEOVER of shard {no} by o{number}, Epoch at {position}"));
        a.check.escrow.seen.takeovers += 1;
        a.check.durable(no, position as u64, self.log.entry(position), a.processes, a.s.now_ms);
        let others = a.check.shards.len() > 1;
        self.lose_clients(a.s, others);
        let ms = a.s.rng.range(0, 4_000);
        a.s.after(ms, Event::StepDown { shard: no, owner: old });
        let Some(state) = self.read(a, position) else { return };
        let shard = Shard::recover_behind_epoch(self.settings.clone(), state, a.s.now());
        self.owners.push(Owner::new(number, router, shard, position));
        self.drain(a, number);
        self.tell_keepers(a, number);
        self.let_in(a);
    }

    /// The entry by which owner `number` begins.
    fn epoch_of(&self, number: u32, s: &mut Sched) -> Bytes {
        let epoch = Epoch {
            log_id: self.genesis.log_id.clone(),
            shard: self.no,
            owner: "r2".into(),
            incarnation: format!("o{number}"),
        };
        // Its writer has not read the log's time yet, and its clock is its own.
        let at_ms = s.now().wall_ms.saturating_sub(s.rng.pick(&[0, 1_000, 30_000]));
        let entry = Entry { at_ms, records: vec![AnyRecord { record: Some(Record::Epoch(epoch)) }] };
        entry.encode_to_vec().into()
    }

    fn let_in(&mut self, a: &mut Around<'_>) {
        for (conn, frame) in std::mem::take(&mut self.waiting) {
            self.client(a, conn, frame);
        }
    }

    // ---- clients ----------------------------------------------------------------------------------------------------

    /// A client's frame: for who owns the shard, or will.
    pub fn client(&mut self, a: &mut Around<'_>, conn: usize, frame: Frame) {
        if !a.s.net.conns[conn].router_open {
            return;
        }
        if !self.is_up() {
            return self.waiting.push((conn, frame));
        }
        let (id, tenant) = (ConnId(conn as u64), a.s.net.conns[conn].tenant.clone());
        self.input(a, Input::Client { conn: id, tenant, received: received(frame) });
    }

    pub fn replay(&mut self, a: &mut Around<'_>, number: u32, request: &Replay) {
        let Some(at) = self.index(number) else { return };
        let index = usize::try_from(request.conn.0).expect("few connections");
        if !a.s.net.conns[index].router_open {
            return;
        }
        let mut replay = StreamReplay::new(&request.tenant, &request.stream, request.after, request.upto);
        for position in usize::try_from(request.from).expect("small") + 1..=self.owners[at].acked {
            let Ok(entry) = Entry::decode(self.log.entry(position).clone()) else { continue };
            for frame in replay.feed(position as u64, &entry) {
                a.s.note(&frame_hash(&frame), || format!("replayed {} {}", request.conn.0, show_frame(&frame)));
                a.check.to_client(self.no, request.tenant.as_str(), &frame);
                a.s.send_down(index, frame);
            }
        }
        let (conn, tenant, stream) = (request.conn, request.tenant.clone(), request.stream.clone());
        self.input_of(a, number, Input::Replayed { conn, tenant, stream, upto: request.upto });
    }
}

pub fn received(frame: Frame) -> Received {
    let body = encode_body(&frame);
    Received { frame, body }
}

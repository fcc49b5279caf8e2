//! An agent process, the far end of a call: what the SDK and an adapter do. It outlives connections and routers, keeps
//! its calls until their end is acknowledged, fences lower epochs, and spends no more than its grant and its reach.

mod bill;

use crate::simulation::check::Check;
use crate::simulation::estimates;
use crate::simulation::net::Peer;
use crate::simulation::plan::AgentPlan;
use crate::simulation::sched::{Event, Sched};
use crate::simulation::tools::Asking;
use atp_proto::content::{
    Ack, AgentError, AgentFinal, AgentPartial, AgentStatus, BudgetUpdate, Capabilities, Dispatch, Finish, ListedCall,
    Proof, Status, Stop, ToolResult, UsageSource, WindowView,
};
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Code, Cost, Flags, Frame, TenantId, Tokens};
use std::collections::BTreeMap;

/// How a call ends, decided when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Complete,
    Refused,
    Rejected,
    UpstreamError,
    ErrorWithCost,
    Crash,
    Hang,
    Late,
}

/// A call as its agent knows it.
#[derive(Debug)]
pub struct Running {
    shard: u32,
    pub epoch: u64,
    grant: Amount,
    stop_at_output: Option<u64>,
    upstream_key: String,
    in_tokens: u64,
    chunks: Vec<u64>,
    interval_ms: u64,
    ending: Ending,
    falling_at: usize,
    /// One of its chunks is larger than its reach.
    breach: bool,
    counted: bool,
    /// Its chunks carry the adapter's own count.
    guesses: bool,
    pub deadline_at: u64,
    out_tokens: u64,
    pub sent_seq: u64,
    pub unacked: Vec<Frame>,
    pub done: bool,
    pub hung: bool,
    /// A late call waits behind its owner's deadline.
    overdue: bool,
    cancelled: bool,
    /// After a reconnect: frames wait until the owner answers the list.
    pub parked: bool,
    /// When its end was made, if it was in time and says what it cost.
    pub ended_at: Option<u64>,
    /// It ended with proof of no effect.
    pub proved: bool,
    pub asking: Asking,
}

#[derive(Debug)]
pub struct Process {
    pub index: usize,
    pub plan: AgentPlan,
    pub life: u32,
    pub alive: bool,
    pub conn: Option<usize>,
    pub connected_at: u64,
    pub calls: BTreeMap<CallId, Running>,
    /// The highest epoch of each shard.
    pub epochs_seen: BTreeMap<u32, u64>,
    pub status: AgentStatus,
}

impl Process {
    #[must_use]
    pub fn new(index: usize, plan: AgentPlan) -> Self {
        Self {
            index,
            plan,
            life: 0,
            alive: false,
            conn: None,
            connected_at: 0,
            calls: BTreeMap::new(),
            epochs_seen: BTreeMap::new(),
            status: AgentStatus::default(),
        }
    }

    #[must_use]
    pub fn incarnation(&self) -> String {
        format!("i{}-{}", self.index, self.life)
    }

    pub fn start(&mut self, s: &mut Sched) {
        if self.alive {
            return;
        }
        self.life += 1;
        self.alive = true;
        // Another process knows nothing of what the former one said.
        self.status = AgentStatus::default();
        self.calls.clear();
        self.epochs_seen.clear();
        let (agent, life) = (self.index, self.life);
        s.say(|| format!("{} starts as {}", self.plan.name, self.incarnation()));
        s.after(0, Event::AgentConnect { agent, life });
        s.after(5_000, Event::Beat { agent, life });
    }

    pub fn crash(&mut self, s: &mut Sched, check: &mut Check) {
        if !self.alive {
            return;
        }
        s.say(|| format!("{} ({}) dies", self.plan.name, self.incarnation()));
        let calls: Vec<_> = self.calls.iter().filter(|(_, c)| !c.done && c.out_tokens > 0).map(|(id, _)| *id).collect();
        for id in calls {
            self.bill_tail(s, check, id);
        }
        self.alive = false;
        self.calls.clear();
        if let Some(conn) = self.conn.take() {
            s.peer_dies(conn);
        }
        let delay = if s.rng.percent(30) { s.rng.range(2_000, 9_000) } else { s.rng.range(10, 1_000) };
        s.after(delay, Event::AgentStart { agent: self.index });
    }

    pub fn connect(&mut self, s: &mut Sched, life: u32, router: usize) {
        if !self.alive || life != self.life || self.conn.is_some() {
            return;
        }
        let conn = s.open(Peer::Agent { router, agent: self.index, life }, TenantId::new("default"));
        self.conn = Some(conn);
        self.connected_at = s.now_ms;
        let calls = self
            .calls
            .iter()
            .map(|(id, c)| ListedCall {
                call_id: *id,
                shard: c.shard,
                epoch: c.epoch,
                msg_seq: c.sent_seq,
                cost: self.plan.price(if c.out_tokens > 0 { c.in_tokens } else { 0 }, c.out_tokens),
                done: c.done,
            })
            .collect();
        let capabilities = Capabilities { incarnation: self.incarnation(), calls, ..self.plan.capabilities.clone() };
        s.send_up(conn, Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities));
        // Who says nothing again is known to the router from the log.
        if s.healed || (self.status.status != Status::Ready && !self.plan.taciturn) {
            s.send_up(conn, Frame::json("", 0, Flags::NONE, kind::STATUS, &self.status));
        }
        let eager = self.plan.eager;
        for call in self.calls.values_mut() {
            call.parked = !eager;
            if eager {
                call.unacked.iter().for_each(|f| s.send_up(conn, f.clone()));
            }
        }
    }

    /// The connection is gone; calls go on.
    pub fn disconnected(&mut self, s: &mut Sched, conn: usize) {
        s.net.conns[conn].peer_open = false;
        if self.conn != Some(conn) {
            return;
        }
        self.conn = None;
        let ms = if !s.healed && s.rng.percent(15) { s.rng.range(1_000, 8_000) } else { s.rng.range(5, 400) };
        s.after(ms, Event::AgentConnect { agent: self.index, life: self.life });
    }

    pub fn beat(&mut self, s: &mut Sched, life: u32) {
        if !self.alive || life != self.life {
            return;
        }
        if let Some(conn) = self.conn {
            s.send_up(conn, Frame::heartbeat(true));
        }
        s.after(5_000, Event::Beat { agent: self.index, life });
    }

    /// A new status; READY once all is healed.
    pub fn change_status(&mut self, s: &mut Sched) {
        let all = [Status::Pause, Status::Pause, Status::Busy, Status::Draining, Status::Ready];
        let status = if s.healed { Status::Ready } else { s.rng.pick(&all) };
        let retry_after_ms = (status == Status::Pause).then(|| s.rng.range(100, 2_000));
        let max_parallel = (status == Status::Busy && s.rng.percent(60)).then(|| s.rng.range(0, 2) as u32);
        let suggested_window = max_parallel.map(|n| WindowView { max_parallel: Some(n), ..WindowView::default() });
        self.status = AgentStatus { status, retry_after_ms, suggested_window, ..AgentStatus::default() };
        s.say(|| format!("{} says {:?}", self.plan.name, status));
        if let Some(conn) = self.conn {
            s.send_up(conn, Frame::json("", 0, Flags::NONE, kind::STATUS, &self.status));
        }
    }

    pub fn receive(&mut self, s: &mut Sched, check: &mut Check, conn: usize, frame: &Frame) {
        if !self.alive || self.conn != Some(conn) {
            return;
        }
        let Some(id) = CallId::parse(&frame.stream_id) else {
            if let Some(answer) = estimates::answer(&mut s.rng, &self.plan, frame) {
                s.send_up(conn, answer);
            }
            return;
        };
        match &*frame.kind {
            kind::DISPATCH => {
                let dispatch: Dispatch = frame.read().expect("the router's own dispatch");
                self.dispatched(s, check, id, &dispatch);
            }
            kind::BUDGET_UPDATE => {
                let update: BudgetUpdate = frame.read().expect("the router's own update");
                if !self.fences(update.shard, update.epoch)
                    && let Some(call) = self.calls.get_mut(&id)
                {
                    call.grant = call.grant.max(update.grant);
                }
            }
            kind::AGENT_CANCEL => {
                let cancel: atp_proto::content::AgentCancel = frame.read().expect("the router's own cancel");
                if !self.fences(cancel.shard, cancel.epoch) {
                    self.cancel(s, id);
                }
            }
            kind::TOOL_RESULT => {
                let result: ToolResult = frame.read().expect("the router's own result");
                if let Some(call) = self.calls.get_mut(&id) {
                    call.asking.answered(check, id, &result);
                }
            }
            kind::ACK => {
                let ack: Ack = frame.read().expect("the router's own ack");
                self.acknowledged(s, id, &ack);
            }
            _ => {}
        }
    }

    fn fences(&mut self, shard: u32, epoch: u64) -> bool {
        let seen = self.epochs_seen.entry(shard).or_default();
        let lower = epoch < *seen;
        *seen = epoch.max(*seen);
        lower
    }

    fn dispatched(&mut self, s: &mut Sched, check: &mut Check, id: CallId, dispatch: &Dispatch) {
        if self.fences(dispatch.shard, dispatch.epoch) {
            s.say(|| format!("{} fences {id} of epoch {}", self.plan.name, dispatch.epoch));
            return;
        }
        if let Some(call) = self.calls.get_mut(&id) {
            call.epoch = dispatch.epoch;
            call.grant = call.grant.max(dispatch.grant);
            self.unpark(s, id);
            return;
        }
        if dispatch.go_on {
            let error = AgentError {
                code: Code::AgentDown,
                message: "not called".into(),
                retry_after_ms: None,
                cost: None,
                proof: Some(Proof::NotCalled),
            };
            if let Some(conn) = self.conn {
                s.send_up(conn, Frame::json(id.to_string(), 1, Flags::RST, kind::ERROR, &error));
            }
            return;
        }
        let call = self.plan_call(s, dispatch);
        check.slots.started(self.index, self.running(s.now_ms) + 1, &self.plan, &mut check.verdict);
        let (agent, life, deadline_at) = (self.index, self.life, call.deadline_at);
        let refused = call.ending == Ending::Refused;
        s.say(|| format!("{} takes {id}: {:?} grant {:?}", self.plan.name, call.ending, dispatch.grant));
        self.calls.insert(id, call);
        if refused {
            let retry_after_ms = Some(s.rng.range(50, 1_000));
            self.fail(s, id, Code::WindowAgent, None, Some(Proof::NotCalled), retry_after_ms);
            return;
        }
        let ms = s.rng.range(0, 40);
        s.after(ms, Event::Step { agent, life, call: id, step: 0 });
        s.at(deadline_at, Event::AgentDeadline { agent, life, call: id });
    }

    /// Calls that occupy this agent: begun, not ended, not hung.
    fn running(&self, now_ms: u64) -> usize {
        self.calls.values().filter(|c| !c.done && !c.hung && now_ms < c.deadline_at).count()
    }

    fn plan_call(&self, s: &mut Sched, dispatch: &Dispatch) -> Running {
        let mood = self.plan.mood;
        let table = [
            (mood.refuse, Ending::Refused),
            (mood.rejected, Ending::Rejected),
            (mood.upstream_error, Ending::UpstreamError),
            (mood.error_with_cost, Ending::ErrorWithCost),
            (mood.crash, Ending::Crash),
            (mood.hang, Ending::Hang),
            (mood.late, Ending::Late),
        ];
        let mut dice = if s.healed { 100 } else { s.rng.below(100) };
        let mut ending = Ending::Complete;
        for (percent, possible) in table {
            if dice < percent {
                ending = possible;
                break;
            }
            dice -= percent;
        }
        let n = s.rng.range(1, self.plan.chunks_max);
        let mut chunks: Vec<u64> = (0..n).map(|_| s.rng.range(1, self.plan.chunk_max)).collect();
        let breach = !s.healed && s.rng.percent(mood.breach);
        if breach {
            chunks.push(self.plan.chunk_max * 5);
        }
        let slow = self.plan.slow && !s.healed;
        Running {
            shard: dispatch.shard,
            epoch: dispatch.epoch,
            grant: dispatch.grant,
            stop_at_output: dispatch.max_output_tokens,
            upstream_key: dispatch.upstream_key.clone(),
            in_tokens: s.rng.range(1, 3),
            falling_at: if s.rng.percent(mood.falling) { s.rng.index(chunks.len()) } else { usize::MAX },
            chunks,
            breach,
            interval_ms: if slow { s.rng.range(50, 900) } else { s.rng.range(1, 60) },
            ending,
            counted: s.rng.percent(mood.counted),
            guesses: s.rng.percent(mood.counted),
            deadline_at: s.now_ms + dispatch.deadline_ms,
            out_tokens: 0,
            sent_seq: 0,
            unacked: Vec::new(),
            done: false,
            hung: false,
            overdue: false,
            cancelled: false,
            parked: false,
            ended_at: None,
            proved: false,
            asking: Asking::default(),
        }
    }

    fn unpark(&mut self, s: &mut Sched, id: CallId) {
        let Some(conn) = self.conn else { return };
        if let Some(call) = self.calls.get_mut(&id) {
            call.parked = false;
            call.unacked.iter().for_each(|f| s.send_up(conn, f.clone()));
        }
    }

    fn cancel(&mut self, s: &mut Sched, id: CallId) {
        self.unpark(s, id);
        let (agent, life) = (self.index, self.life);
        if let Some(call) = self.calls.get_mut(&id)
            && !call.done
            && !call.cancelled
            && call.ending != Ending::Late
        {
            call.cancelled = true;
            let ms = s.rng.range(0, 300);
            s.after(ms, Event::Step { agent, life, call: id, step: u32::MAX });
        }
    }

    fn acknowledged(&mut self, s: &mut Sched, id: CallId, ack: &Ack) {
        let Some(conn) = self.conn else { return };
        let Some(call) = self.calls.get_mut(&id) else { return };
        for missing in &ack.open {
            for frame in call.unacked.iter().filter(|f| f.msg_seq == missing.msg_seq) {
                s.send_up(conn, frame.clone());
            }
        }
        call.unacked.retain(|f| f.msg_seq > ack.msg_seq);
        let forgotten = ack.msg_seq >= call.sent_seq && (call.done || call.hung);
        if forgotten {
            s.say(|| format!("{} forgets {id}", self.plan.name));
            self.calls.remove(&id);
        }
    }

    pub fn deadline(&mut self, s: &mut Sched, check: &mut Check, life: u32, id: CallId) {
        if !self.alive || life != self.life {
            return;
        }
        let Some(call) = self.calls.get(&id) else { return };
        if call.done || call.hung || call.deadline_at > s.now_ms {
            return;
        }
        if call.ending == Ending::Late {
            // Deaf to its deadline: it ends after the owner's.
            return;
        }
        self.end(s, check, id, Finish::Cancelled);
    }

    /// The call goes one step on. `u32::MAX`: it was asked to stop.
    pub fn step(&mut self, s: &mut Sched, check: &mut Check, life: u32, id: CallId, step: u32) {
        if !self.alive || life != self.life {
            return;
        }
        let (agent, dedupes) = (self.index, self.plan.capabilities.idempotent_for_ms);
        let Some(call) = self.calls.get_mut(&id) else { return };
        if call.done || call.hung {
            return;
        }
        if step == u32::MAX {
            self.end(s, check, id, Finish::Cancelled);
            return;
        }
        if step == 0 {
            if call.ending == Ending::Rejected {
                self.fail(s, id, Code::WindowAgent, None, Some(Proof::Rejected), Some(200));
                return;
            }
            let key = call.upstream_key.clone();
            check.provider_called(agent, id, &key, s.now_ms, dedupes);
            let known = check.known_answer(&id);
            if let Some((in_tokens, out_tokens)) = known
                && let Some(call) = self.calls.get_mut(&id)
            {
                // The stored answer again: nothing new is billed.
                (call.in_tokens, call.out_tokens) = (in_tokens, out_tokens);
                self.end_without_tail(s, check, id, Finish::Complete);
                return;
            }
            self.next_step(s, id, 1);
            return;
        }
        let index = step as usize - 1;
        match (call.ending, call.chunks.get(index).copied()) {
            (Ending::UpstreamError, _) if index >= 1 || call.chunks.len() == 1 => {
                let in_tokens = call.in_tokens;
                check.bill(agent, id, self.plan.price(in_tokens, call.out_tokens), Amount::ZERO, false);
                self.fail(s, id, Code::AgentDown, None, None, None);
            }
            (Ending::ErrorWithCost, _) if index >= 1 => {
                let cost = self.plan.price(call.in_tokens, call.out_tokens);
                self.bill(s, check, id);
                self.fail(s, id, Code::AgentDown, Some(cost), None, None);
            }
            (Ending::Crash, _) if index >= 1 || call.chunks.len() == 1 => s.after(0, Event::AgentCrash { agent }),
            (Ending::Hang, _) if index >= 1 || call.chunks.len() == 1 => {
                self.bill_tail(s, check, id);
                if let Some(call) = self.calls.get_mut(&id) {
                    call.hung = true;
                }
            }
            (Ending::Late, None) if !call.overdue => {
                // Past the owner's deadline, which is 5 s behind the agent's.
                let at = call.deadline_at + 5_000 + s.rng.range(100, 4_000);
                let life = self.life;
                call.chunks.clear();
                call.overdue = true;
                s.at(at, Event::Step { agent, life, call: id, step });
            }
            // A task that wants tools waits for what they bring, saying again what isn't answered.
            (_, None) if call.asking.waits() && s.now_ms < call.deadline_at => {
                s.after(250, Event::Step { agent, life: self.life, call: id, step });
                self.ask_again(s, check, id);
            }
            (_, None) => self.end(s, check, id, Finish::Complete),
            (_, Some(_)) if self.plan.asks_percent > 0 && s.rng.percent(self.plan.asks_percent) => {
                self.ask(s, id);
                self.next_step(s, id, step);
            }
            (_, Some(chunk)) => self.chunk(s, check, id, index, chunk),
        }
    }

    fn next_step(&self, s: &mut Sched, id: CallId, step: u32) {
        let Some(call) = self.calls.get(&id) else { return };
        let ms = s.rng.range(1, call.interval_ms);
        s.after(ms, Event::Step { agent: self.index, life: self.life, call: id, step });
    }

    /// A chunk arrives: billed already. Metered at arrival; past the grant the call ends.
    fn chunk(&mut self, s: &mut Sched, check: &mut Check, id: CallId, index: usize, chunk: u64) {
        let limited = self.plan.capabilities.stop == Stop::Limit;
        let stoppable = matches!(self.plan.capabilities.stop, Stop::Close | Stop::Kill);
        let Some(call) = self.calls.get_mut(&id) else { return };
        let room = call.stop_at_output.map_or(u64::MAX, |most| most.saturating_sub(call.out_tokens));
        let at_limit = limited && chunk >= room;
        call.out_tokens += if limited { chunk.min(room) } else { chunk };
        let falling = index == call.falling_at;
        let out_tokens = call.out_tokens;
        let usage_source = if call.guesses { UsageSource::Counted } else { UsageSource::Reported };
        let cost = self.plan.price(call.in_tokens, if falling { out_tokens / 2 } else { out_tokens });
        let over = stoppable && !self.plan.price(call.in_tokens, out_tokens).amount().is_ok_and(|a| a.fits(call.grant));
        self.bill(s, check, id);
        let partial = AgentPartial { text: Some(format!("{index} ")), findings: None, cost, usage_source };
        self.emit(s, id, Flags::NONE, kind::RESULT_PARTIAL, &partial);
        if over {
            self.end(s, check, id, Finish::Grant);
        } else if at_limit {
            self.end_without_tail(s, check, id, Finish::Complete);
        } else {
            self.next_step(s, id, index as u32 + 2);
        }
    }

    pub fn emit<T: serde::Serialize>(
        &mut self,
        s: &mut Sched,
        id: CallId,
        flags: Flags,
        kind: &'static str,
        content: &T,
    ) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.sent_seq += 1;
        let frame = Frame::json(id.to_string(), call.sent_seq, flags, kind, content);
        call.unacked.push(frame.clone());
        if let Some(conn) = self.conn
            && !call.parked
        {
            s.send_up(conn, frame);
        }
    }

    fn fail(
        &mut self,
        s: &mut Sched,
        id: CallId,
        code: Code,
        cost: Option<Cost>,
        proof: Option<Proof>,
        retry_after_ms: Option<u64>,
    ) {
        let error = AgentError { code, message: "simulated".into(), retry_after_ms, cost, proof };
        self.emit(s, id, Flags::RST, kind::ERROR, &error);
        if let Some(call) = self.calls.get_mut(&id) {
            call.done = true;
            call.ended_at = cost.is_some().then_some(s.now_ms);
            call.proved = proof.is_some();
        }
    }

    /// The call stops: what was on its way is billed too, within the reach.
    fn end(&mut self, s: &mut Sched, check: &mut Check, id: CallId, finish: Finish) {
        self.bill_tail(s, check, id);
        self.end_without_tail(s, check, id, finish);
    }

    fn end_without_tail(&mut self, s: &mut Sched, check: &mut Check, id: CallId, finish: Finish) {
        let Some(call) = self.calls.get_mut(&id) else { return };
        let known = check.is_billed(&id);
        let in_tokens = if call.out_tokens > 0 || known { call.in_tokens } else { 0 };
        let cost = self.plan.price(in_tokens, call.out_tokens);
        call.done = true;
        call.ended_at = (s.now_ms <= call.deadline_at).then_some(s.now_ms);
        let counted = call.counted;
        let (cost, usage_source) = if counted {
            // An honest count: a few percent low at most, which is booked up.
            let low = Cost { out_tokens: Tokens(cost.out_tokens.0 - cost.out_tokens.0 / 20), ..cost };
            (self.plan.price(low.in_tokens.0, low.out_tokens.0), UsageSource::Counted)
        } else {
            check.reported(&id, cost);
            (cost, UsageSource::Reported)
        };
        let done = AgentFinal {
            text: Some("end".into()),
            findings: None,
            // Any of 0.1 to 0.9, without a random number of its own.
            confidence_ppm: Some(100_000 * (1 + (cost.out_tokens.0 % 9) as u32)),
            cost,
            usage_source,
            finish,
        };
        self.emit(s, id, Flags::FIN, kind::RESULT_FINAL, &done);
    }
}

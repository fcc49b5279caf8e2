//! Clients at the level of frames: they send the same SYN again while unanswered, take a new stream id under the same key
//! after a refusal, cancel, come back by SYN or resume, and watch each other's streams.

use crate::simulation::check::Check;
use crate::simulation::net::Peer;
use crate::simulation::plan::TaskPlan;
use crate::simulation::sched::{Event, Sched};
use atp_proto::content::{Accepted, Resume, TaskCancel};
use atp_proto::frame::{Meta, kind};
use atp_proto::reassembly::fragment;
use atp_proto::{Code, Flags, Frame, TenantId, WireError};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Not sent yet.
    Idle,
    /// Sent, no answer so far.
    Waiting,
    Accepted,
    Refused,
    Answered,
}

#[derive(Debug)]
pub struct Task {
    pub plan: TaskPlan,
    /// The stream id under which it was sent.
    pub stream: String,
    /// The stream that `accepted` named.
    pub follows: String,
    pub state: TaskState,
    tries: u32,
    sends: u32,
    delivered: u64,
    finals: u32,
}

impl Task {
    #[must_use]
    pub fn new(plan: TaskPlan) -> Self {
        let stream = plan.stream.clone();
        let tries = if stream.ends_with(".2") { 2 } else { 1 };
        Self { follows: stream.clone(), stream, plan, state: TaskState::Idle, tries, sends: 0, delivered: 0, finals: 0 }
    }
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, TaskState::Refused | TaskState::Answered)
    }
    /// Nobody keeps that it was attached: its own id is judged anew, what the other stream says is no answer to that.
    fn detach(&mut self) {
        if self.is_attached() {
            self.state = TaskState::Waiting;
            self.follows.clone_from(&self.stream);
            (self.delivered, self.finals) = (0, 0);
        }
    }
    /// `accepted` named another stream than its own.
    fn is_attached(&self) -> bool {
        self.follows != self.stream
    }
}

/// One client: a connection and the tasks that it speaks for.
#[derive(Debug)]
pub struct Client {
    pub index: usize,
    pub tenant: TenantId,
    pub conn: Option<usize>,
}

/// All clients and their tasks; the last client only watches.
#[derive(Debug)]
pub struct Clients {
    pub clients: Vec<Client>,
    pub tasks: Vec<Task>,
}

impl Clients {
    fn watcher(&self) -> usize {
        self.clients.len() - 1
    }

    /// Tasks of each tenant that were sent and aren't over.
    #[must_use]
    pub fn alive(&self) -> BTreeMap<String, usize> {
        let mut alive = BTreeMap::new();
        for task in self.tasks.iter().filter(|t| matches!(t.state, TaskState::Waiting | TaskState::Accepted)) {
            *alive.entry(self.clients[task.plan.client].tenant.to_string()).or_default() += 1;
        }
        alive
    }

    pub fn connect(&mut self, s: &mut Sched, check: &mut Check, client: usize) {
        if self.clients[client].conn.is_some() {
            return;
        }
        let conn = s.open(Peer::Client(client), self.clients[client].tenant.clone());
        self.clients[client].conn = Some(conn);
        let mine: Vec<usize> = (0..self.tasks.len())
            .filter(|t| self.tasks[*t].plan.client == client && !self.tasks[*t].is_over())
            .collect();
        for task in mine {
            match self.tasks[task].state {
                TaskState::Waiting => self.submit(s, check, task),
                TaskState::Accepted if s.rng.percent(s.faults.resume_percent) => {
                    let (stream, after) = (self.tasks[task].follows.clone(), self.tasks[task].delivered);
                    resume(s, check, conn, &stream, after);
                }
                TaskState::Accepted => {
                    self.tasks[task].detach();
                    self.submit(s, check, task);
                }
                TaskState::Idle | TaskState::Refused | TaskState::Answered => {}
            }
        }
        if client == self.watcher() {
            let streams: Vec<String> =
                self.tasks.iter().filter(|t| self.is_watched(t)).map(|t| t.follows.clone()).collect();
            streams.iter().for_each(|stream| resume(s, check, conn, stream, 0));
        }
    }

    fn is_watched(&self, task: &Task) -> bool {
        let accepted = matches!(task.state, TaskState::Accepted | TaskState::Answered);
        task.plan.watch && accepted && self.clients[task.plan.client].tenant == self.clients[self.watcher()].tenant
    }

    pub fn start(&mut self, s: &mut Sched, check: &mut Check, task: usize) {
        if self.tasks[task].state == TaskState::Idle {
            self.tasks[task].state = TaskState::Waiting;
        }
        if self.tasks[task].state == TaskState::Waiting {
            self.submit(s, check, task);
        }
    }

    /// The SYN, byte for byte the same as before.
    fn submit(&mut self, s: &mut Sched, check: &mut Check, index: usize) {
        let task = &mut self.tasks[index];
        task.sends += 1;
        let patience = s.rng.range(1_500, 4_000);
        s.after(patience, Event::Patience { task: index, sends: task.sends });
        let Some(conn) = self.clients[task.plan.client].conn else { return };
        let mut frame = Frame::json(task.stream.as_str(), 1, Flags::SYN, kind::TASK_SUBMIT, &task.plan.submit);
        frame.qos = task.plan.qos as u32;
        frame.meta = Some(Box::new(Meta {
            task_type: task.plan.task_type.into(),
            idempotency_key: task.plan.key.clone().unwrap_or_default(),
            tool_permissions: task.plan.tools.iter().map(|t| (*t).to_owned()).collect(),
            ..Meta::default()
        }));
        check.order.attached(conn, &task.stream, 0);
        let size = frame.content.len() / usize::try_from(task.plan.fragments).expect("few") + 1;
        let mut parts = fragment(frame, size);
        if parts.len() > 1 && s.rng.percent(50) {
            // Any arrival order, and one of them twice.
            let (a, b) = (s.rng.index(parts.len()), s.rng.index(parts.len()));
            parts.swap(a, b);
            let twice = parts[a].clone();
            parts.push(twice);
        }
        parts.into_iter().for_each(|part| s.send_up(conn, part));
    }

    pub fn patience(&mut self, s: &mut Sched, check: &mut Check, task: usize, sends: u32) {
        if self.tasks[task].state == TaskState::Waiting && self.tasks[task].sends == sends {
            self.submit(s, check, task);
        }
    }

    pub fn cancel(&mut self, s: &mut Sched, task: usize) {
        let task = &self.tasks[task];
        if task.state == TaskState::Accepted
            && let Some(conn) = self.clients[task.plan.client].conn
        {
            let reason = TaskCancel { reason: Some("no longer needed".into()) };
            s.send_up(conn, Frame::json(task.follows.as_str(), 0, Flags::NONE, kind::TASK_CANCEL, &reason));
        }
    }

    pub fn disconnected(&mut self, s: &mut Sched, conn: usize, client: usize) {
        s.net.conns[conn].peer_open = false;
        if self.clients[client].conn == Some(conn) {
            self.clients[client].conn = None;
            let ms = s.rng.range(5, if s.healed { 100 } else { 1_500 });
            s.after(ms, Event::Connect { client });
        }
    }

    pub fn receive(&mut self, s: &mut Sched, check: &mut Check, client: usize, conn: usize, frame: &Frame) {
        if self.clients[client].conn != Some(conn) {
            return;
        }
        let tenant = self.clients[client].tenant.clone();
        check.order.arrived(conn, tenant.as_str(), frame, &mut check.verdict);
        let id = &*frame.stream_id;
        match &*frame.kind {
            kind::ACCEPTED => self.accepted(s, check, client, conn, frame),
            kind::ERROR if frame.flags.has(Flags::RST) => self.refused(s, check, client, id, frame),
            _ => {}
        }
        for task in self.tasks.iter_mut().filter(|t| t.plan.client == client && t.follows == *id) {
            if frame.msg_seq == task.delivered + 1 {
                task.delivered = frame.msg_seq;
                task.finals += u32::from(&*frame.kind == kind::RESULT_FINAL);
                if &*frame.kind == kind::BILL {
                    task.state = TaskState::Answered;
                    let finals = task.finals;
                    check.verdict.expect(finals == 1, "exactly one final", || format!("{id} had {finals}"));
                }
            }
        }
    }

    fn accepted(&mut self, s: &mut Sched, check: &mut Check, client: usize, conn: usize, frame: &Frame) {
        let accepted: Accepted = frame.read().expect("checked when it left");
        let id = &*frame.stream_id;
        let mut watch = None;
        let watcher = self.watcher();
        let other_tenant = self.clients[watcher].tenant != self.clients[client].tenant;
        for task in self.tasks.iter_mut().filter(|t| t.plan.client == client && t.stream == *id) {
            if task.state == TaskState::Waiting {
                task.state = TaskState::Accepted;
                if task.plan.watch && !other_tenant {
                    watch = Some(accepted.stream_id.clone());
                }
            }
            if task.follows != accepted.stream_id {
                task.follows.clone_from(&accepted.stream_id);
                // Another stream: the key's, or a fresh try after that had ended without a call.
                (task.delivered, task.finals) = (0, 0);
                check.order.attached(conn, &accepted.stream_id, 0);
            }
        }
        if let (Some(stream), Some(conn)) = (watch, self.clients[watcher].conn) {
            let after = s.rng.below(2);
            resume(s, check, conn, &stream, after);
        }
    }

    fn refused(&mut self, s: &mut Sched, check: &mut Check, client: usize, id: &str, frame: &Frame) {
        let error: WireError = frame.read().expect("checked when it left");
        for index in 0..self.tasks.len() {
            let task = &mut self.tasks[index];
            if task.plan.client != client || task.stream != id && task.follows != id {
                continue;
            }
            let lost = error.code == Code::ResumeGone || error.judged && !task.is_attached();
            if task.state == TaskState::Accepted && lost {
                check.verdict.fail("no acknowledged task is lost", || format!("{id}: {error}"));
            }
            // The stream that it was attached to had ended without a call: its own was a fresh try, and is judged.
            let fresh_try = task.state == TaskState::Accepted && task.follows != task.stream && task.stream == id;
            if (task.state != TaskState::Waiting && !fresh_try) || !error.judged {
                continue;
            }
            task.state = TaskState::Waiting;
            check
                .verdict
                .expect(error.code != Code::Idempotency, "the same SYN, the same answer", || format!("{id}: {error}"));
            let again = error.code != Code::Idempotency && task.tries < 2;
            match task.plan.key.as_deref().filter(|_| again) {
                Some(key) => {
                    task.tries += 1;
                    task.stream = atp_proto::id::stream_of_key(key, task.tries).as_str().into();
                    task.follows.clone_from(&task.stream);
                    (task.delivered, task.finals) = (0, 0);
                    // Until it is sent, what is said of that stream is for another task of the key.
                    task.state = TaskState::Idle;
                    task.sends += 1;
                    let ms = s.rng.range(10, 2_000);
                    s.after(ms, Event::Start { task: index });
                }
                None => task.state = TaskState::Refused,
            }
        }
    }
}

fn resume(s: &mut Sched, check: &mut Check, conn: usize, stream: &str, after: u64) {
    check.order.attached(conn, stream, after);
    s.send_up(conn, Frame::json(stream, 0, Flags::SYN, kind::RESUME, &Resume { token: None, after }));
}

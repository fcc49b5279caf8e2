//! The client's side of a stream: submit, duplicates, attach by key, resume, cancel, and refusals.

use super::choice::Request;
use super::closing::Stopping;
use super::offer::Refusal;
use super::tool::Needs;
use super::{Shard, Timer};
use crate::estimate::{CALL_AMOUNT_MAX, prompt_tokens};
use crate::message::{Effect, LogRoom, Metric};
use crate::policy::Facts;
use crate::record::{Accept, Deny, FrameRecord, Key, Record};
use crate::replay;
use crate::score::Task;
use crate::stream::Stream;
use atp_proto::codec::Received;
use atp_proto::content::{Ack, OpenMessage, Resume, Submit, TaskCancel, TaskState};
use atp_proto::frame::{Flags, Meta, kind};
use atp_proto::id::{is_id, key_prefix};
use atp_proto::limits::{GAP_BYTES_MAX, RETRY_MS, STREAMS_MAX};
use atp_proto::reassembly::{Fed, Inbound, Message};
use atp_proto::{AgentName, Code, ConnId, Frame, Limit, Qos, StreamId, TenantId, WireError};
use bytes::Bytes;
use sha2::{Digest, Sha256};

/// Lanes that one submit may name or ask for.
const FANOUT_MAX: usize = 32;
/// The longest deadline that is taken, in milliseconds.
const DEADLINE_MS_MAX: u64 = 24 * 3_600_000;
const KEY_BYTES_MAX: usize = 256;
/// Languages of a task that the choice of agents looks at, and the bytes of one or of a category.
const LANGUAGES_MAX: usize = 16;
const NAME_BYTES_MAX: usize = 64;
/// Bytes of one connection that may wait for the rest of their submits.
const PENDING_BYTES_MAX: usize = 2 * GAP_BYTES_MAX;

/// What a task wants, read once from its submit.
#[derive(Clone)]
pub(super) struct Wants {
    pub(super) agents: Vec<AgentName>,
    pub(super) fanout: usize,
    pub(super) prompt_tokens: u64,
    /// False: what can't be had at once is refused.
    pub(super) wait: bool,
    pub(super) needs: Needs,
}

impl Wants {
    /// From the content of `task.submit`, which was read when it was accepted.
    pub(super) fn of(content: &Bytes) -> Self {
        Self::read(&read_content(content))
    }

    pub(super) fn read(submit: &Submit) -> Self {
        let bytes: usize = submit.inputs.iter().map(|i| i.text.len() + i.name.len()).sum();
        Self {
            fanout: submit.fanout.map_or(1, |n| n as usize).max(submit.agents.len()),
            prompt_tokens: prompt_tokens(submit.task.len() + bytes),
            agents: submit.agents.clone(),
            wait: submit.wait,
            needs: Needs::default(),
        }
    }
}

/// A client's stream whose submit isn't whole, or whose messages wait behind a gap.
pub(super) struct Pending {
    inbound: Inbound,
    asked: usize,
    armed: bool,
    progress: (u64, usize),
}

/// Refusals of a tenant that may be logged.
pub(super) struct Bucket {
    thousandths: u64,
    at: u64,
}

impl Shard {
    pub(super) fn client_frame(&mut self, conn: ConnId, tenant: TenantId, received: Received) {
        let frame = &received.frame;
        if !is_id(&frame.stream_id) {
            self.effect(Effect::Close { conn, error: WireError::proto("stream_id: 1 to 64 of A-Za-z0-9._-") });
            return;
        }
        let id = StreamId::new(&frame.stream_id);
        if frame.msg_seq == 0 {
            self.unnumbered(conn, &tenant, &id, frame);
            return;
        }
        let key = (conn, id.clone());
        let whole = frame.msg_seq == 1 && frame.frag_seq == 0 && !frame.flags.has(Flags::MORE);
        if whole && !self.pending.contains_key(&key) {
            self.message(conn, &tenant, &id, received.into());
            return;
        }
        let known = self.state.stream_no(tenant.as_str(), id.as_str()).is_some();
        if known && frame.msg_seq > 1 && !self.pending.contains_key(&key) {
            // The submit is here; what follows it on an accepted stream needs no order.
            self.message(conn, &tenant, &id, received.into());
            return;
        }
        if !self.pending.contains_key(&key)
            && self.pending.range((conn, StreamId::new(""))..).take_while(|((c, _), _)| *c == conn).count()
                >= STREAMS_MAX
        {
            let error = WireError::new(Code::Limit, "too many unfinished submits on this connection")
                .used(STREAMS_MAX as u64, STREAMS_MAX as u64);
            self.refuse(conn, &id, &error);
            return;
        }
        let pending = self.pending.entry(key.clone()).or_insert_with(|| Pending {
            inbound: Inbound::default(),
            asked: 0,
            armed: false,
            progress: (0, 0),
        });
        let armed = pending.armed;
        match pending.inbound.feed(received) {
            Ok(Fed::Ready(message)) => {
                let mut next = Some(message);
                while let Some(message) = next {
                    self.message(conn, &tenant, &id, message);
                    next = self.pending.get_mut(&key).and_then(|p| p.inbound.next_ready());
                }
                if self.pending.get(&key).is_some_and(|p| p.inbound.is_idle()) {
                    self.pending.remove(&key);
                }
            }
            Ok(Fed::Waiting) if self.pending_bytes(conn) > PENDING_BYTES_MAX => {
                self.pending.remove(&key);
                let error = WireError::new(Code::Limit, "too many bytes of unfinished submits on this connection");
                self.refuse(conn, &id, &error.used(PENDING_BYTES_MAX as u64, PENDING_BYTES_MAX as u64));
            }
            Ok(Fed::Waiting) if armed => {}
            Ok(Fed::Waiting) => {
                if let Some(pending) = self.pending.get_mut(&key) {
                    pending.armed = true;
                }
                self.timer(self.now_ms + RETRY_MS[0], Timer::Gap(conn, id));
            }
            Ok(Fed::Duplicate(_)) => self.metric(Metric::Redelivered),
            Err(error) => {
                self.pending.remove(&key);
                self.refuse(conn, &id, &error);
            }
        }
    }

    fn pending_bytes(&self, conn: ConnId) -> usize {
        let of_conn = self.pending.range((conn, StreamId::new(""))..).take_while(|((c, _), _)| *c == conn);
        of_conn.map(|(_, p)| p.inbound.waiting_bytes()).sum()
    }

    /// A message still lacks something: ask for it, and give up after the last interval.
    pub(super) fn gap_due(&mut self, conn: ConnId, id: &StreamId) {
        let key = (conn, id.clone());
        let Some(pending) = self.pending.get_mut(&key) else { return };
        let progress = (pending.inbound.next_expected(), pending.inbound.waiting_bytes());
        if progress != pending.progress || pending.inbound.missing().is_empty() {
            (pending.progress, pending.asked) = (progress, 0);
        }
        if pending.asked == RETRY_MS.len() {
            self.pending.remove(&key);
            let error = WireError::new(Code::SeqRetry, "fragments or messages are missing; send the message again");
            self.refuse(conn, id, &error);
            return;
        }
        let open: Vec<OpenMessage> = pending.inbound.missing();
        let ack = Ack { msg_seq: pending.inbound.next_expected() - 1, open };
        let wait = RETRY_MS[pending.asked];
        pending.asked += 1;
        self.metric(Metric::Dropped { reason: "ESEQ_RETRY" });
        self.send(conn, Frame::json(id.as_str(), 0, Flags::NONE, kind::ACK, &ack));
        self.timer(self.now_ms + wait, Timer::Gap(conn, id.clone()));
    }

    fn unnumbered(&mut self, conn: ConnId, tenant: &TenantId, id: &StreamId, frame: &Frame) {
        let no = self.state.stream_no(tenant.as_str(), id.as_str());
        match &*frame.kind {
            kind::RESUME => {
                let resume: Resume = match frame.read() {
                    Ok(resume) => resume,
                    Err(error) => return self.refuse(conn, id, &error),
                };
                match no {
                    Some(no) => self.resume(conn, no, resume.after),
                    None => self.refuse(conn, id, &unknown(id)),
                }
            }
            kind::TASK_CANCEL => match (no, frame.read::<TaskCancel>()) {
                (_, Err(error)) => self.refuse(conn, id, &error),
                (None, _) => self.refuse(conn, id, &unknown(id)),
                (Some(no), Ok(_)) => self.cancel(no, frame),
            },
            kind::TASK_SUBMIT => {
                self.refuse(conn, id, &WireError::proto("msg_seq: task.submit is message 1 of its stream"))
            }
            _ => self.metric(Metric::Dropped { reason: "unknown_type" }),
        }
    }

    fn message(&mut self, conn: ConnId, tenant: &TenantId, id: &StreamId, message: Message) {
        match &*message.frame.kind {
            kind::TASK_SUBMIT if message.frame.msg_seq > 1 => {
                self.refuse(conn, id, &WireError::proto("task.submit: one task per stream; open another stream"));
            }
            kind::TASK_SUBMIT => self.submit(conn, tenant, id, message),
            _ => self.metric(Metric::Dropped { reason: "unknown_type" }),
        }
    }

    // ---- submit -----------------------------------------------------------------------------------------------------

    pub(super) fn submit(&mut self, conn: ConnId, tenant: &TenantId, id: &StreamId, message: Message) {
        let frame = &message.frame;
        let key = frame.meta.as_ref().map_or("", |m| m.idempotency_key.as_str());
        let read = self.read_submit(frame, id, key);
        let (submit, qos) = match read {
            Ok(read) => read,
            Err(error) => return self.refuse(conn, id, &error),
        };
        let task_type = frame.meta.as_ref().map_or("", |m| m.task_type.as_str());
        let hash = payload_hash(&frame.content, qos, task_type);
        if let Some(no) = self.state.stream_no(tenant.as_str(), id.as_str()) {
            self.metric(Metric::Redelivered);
            return self.again(conn, no, id, &hash);
        }
        if !key.is_empty()
            && let Some(no) = self.state.stream_of_key(tenant.as_str(), key)
        {
            let Some(stream) = self.state.stream(no) else { return };
            if stream.accept.payload_hash[..] != hash[..] {
                return self.refuse(conn, id, &other_content("idempotency key"));
            }
            if !stream.is_closed() || stream.had_intent() {
                self.metric(Metric::Redelivered);
                return self.attach(conn, no, id, 0);
            }
        }
        if let Err(error) = self.before_the_ledger().and_then(|()| self.shed(tenant, &submit, qos, task_type)) {
            self.metric(Metric::Admission { outcome: "refused", code: error.code.as_str() });
            return self.refuse(conn, id, &error);
        }
        let record_key = Key::new(tenant, id);
        let needs = self.needs_of(tenant, qos, frame.meta.as_deref());
        let secure =
            self.tools_allowed(tenant, &needs.tools).and_then(|()| self.somebody_may(&submit, task_type, &needs));
        let (languages, category) = frame.meta.as_ref().map(|m| named(m)).unwrap_or_default();
        let wants = Wants { needs, ..Wants::read(&submit) };
        let task = Task { task_type, languages: &languages, category: &category };
        let request = Request { task, prompt_tokens: wants.prompt_tokens, qos, needs: &wants.needs };
        let settings = self.settings.clone();
        let facts = Facts { tenant: tenant.as_str(), qos, meta: frame.meta.as_deref() };
        let (number, rule) = settings.policy.rule(&facts).map_or((0, None), |(n, rule)| (n, Some(rule)));
        let secure = secure.map_err(Refusal::of);
        let refusal = secure.and_then(|()| self.judge(tenant, &submit, &wants, &request, rule)).err();
        if let Some(need) = refusal.as_ref().and_then(|r| r.short)
            && self.parks(tenant, qos, need)
        {
            return self.park(conn, tenant, message);
        }
        if let Some(Refusal { error, .. }) = refusal.filter(|r| !r.waits) {
            self.metric(Metric::Admission { outcome: "denied", code: error.code.as_str() });
            if !self.may_deny(tenant) {
                let error = WireError::new(Code::Limit, "too many refusals a second; slow down").retry_after_ms(1_000);
                return self.refuse(conn, id, &error.scope(format!("tenant:{tenant}")));
            }
            let text = serde_json::to_vec(&error).unwrap_or_default();
            self.record(Record::Deny(Deny {
                key: record_key,
                payload_hash: hash,
                idempotency_key: key.into(),
                error: text.into(),
            }));
            return self.refuse(conn, id, &error);
        }
        self.metric(Metric::Admission { outcome: "accepted", code: "" });
        let window = self.settings.stream_window;
        let escalation = rule.and_then(|r| r.escalation.as_ref());
        let accept = Accept {
            key: record_key.clone(),
            payload_hash: hash,
            idempotency_key: key.into(),
            account: tenant.as_str().into(),
            limit: submit.budget.min(rule.map_or(Limit::NONE, |r| r.budget)).min(window.limit).into(),
            max_parallel: window.max_parallel,
            deadline_ms: submit.deadline_ms.unwrap_or(self.settings.deadline_ms),
            qos: qos as u32,
            task_type: task_type.into(),
            host: self.settings.router_id.to_string(),
            security_groups_any: wants.needs.groups_any,
            languages,
            category,
            rule: number,
            floor: rule.and_then(|r| r.floor.clone()).unwrap_or_default(),
            escalate_on: escalation.iter().flat_map(|e| e.on.iter().map(|t| t.as_str().to_owned())).collect(),
            escalate_to: escalation.iter().flat_map(|e| e.to.iter().map(|a| a.as_str().to_owned())).collect(),
        };
        self.record(Record::Accept(accept));
        let msg_seq = frame.msg_seq;
        self.record(Record::Frame(FrameRecord {
            key: record_key,
            msg_seq,
            bodies: message.bodies.into_vec(),
            ..FrameRecord::default()
        }));
        self.opened(conn, tenant, id);
    }

    /// The stream was made by this input: `accepted`, then its first wish for slots.
    fn opened(&mut self, conn: ConnId, tenant: &TenantId, id: &StreamId) {
        let Some(no) = self.state.stream_no(tenant.as_str(), id.as_str()) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        let mut live = self.new_live(stream);
        live.subscribers.push(conn);
        live.left_out = self.kept_out(&live.wants.needs);
        let accepted = accepted(id.as_str(), 1, stream, TaskState::Queued);
        self.join(conn, no, true);
        self.timer(live.deadline_at, Timer::Deadline(no));
        self.live.insert(no, live);
        self.send(conn, Frame::json(id.as_str(), 0, Flags::NONE, kind::ACK, &Ack { msg_seq: 1, open: Vec::new() }));
        self.tell(no, accepted);
        self.ask(no);
    }

    fn read_submit(&self, frame: &Frame, id: &StreamId, key: &str) -> Result<(Submit, Qos), WireError> {
        if !frame.flags.has(Flags::SYN) {
            return Err(WireError::proto("flags: task.submit opens a stream, set SYN"));
        }
        let submit: Submit = frame.read()?;
        let qos = Qos::from_wire(frame.qos)?;
        let wrong = |what: &str| Err(WireError::proto(format!("task.submit: {what}")));
        if submit.agents.len() > FANOUT_MAX || submit.fanout.is_some_and(|n| n == 0 || n as usize > FANOUT_MAX) {
            return wrong("agents, fanout: 1 to 32 lanes");
        }
        if let Some(name) = submit.agents.iter().find(|a| !is_id(a.as_str())) {
            return wrong(&format!("agents: `{name}` is not 1 to 64 of A-Za-z0-9._-"));
        }
        let mut names: Vec<&AgentName> = submit.agents.iter().collect();
        names.sort_unstable();
        if names.windows(2).any(|w| w[0] == w[1]) {
            return wrong("agents: a name stands twice");
        }
        if !submit.agents.is_empty() && submit.fanout.is_some() {
            return wrong("agents, fanout: name the agents or give their number, not both");
        }
        if submit.strategy.as_deref().is_some_and(|s| s != "union") {
            return wrong("strategy: `union` is the one that this version has");
        }
        if submit.deadline_ms.is_some_and(|ms| ms == 0 || ms > DEADLINE_MS_MAX) {
            return wrong("deadline_ms: 1 to 86400000");
        }
        let largest = submit.budget.tokens.map_or(0, |t| t.0).max(submit.budget.usd_micros.map_or(0, |u| u.0));
        if largest > CALL_AMOUNT_MAX {
            return wrong("budget: at most 1000000000000 tokens or micro-USD");
        }
        super::tool::check_permissions(frame.meta.as_ref().map_or(&[][..], |m| &m.tool_permissions))?;
        if key.len() > KEY_BYTES_MAX {
            return Err(WireError::proto("meta.idempotency_key: at most 256 bytes"));
        }
        let number = |tail: &str| tail.parse::<u32>().is_ok_and(|n| n > 0 && n.to_string() == tail);
        if !key.is_empty() && !id.as_str().strip_prefix(&key_prefix(key)).is_some_and(number) {
            let message = format!(
                "stream_id: beside this idempotency key it is {}N, N the number of the try from 1",
                key_prefix(key)
            );
            return Err(WireError::proto(message));
        }
        Ok((submit, qos))
    }

    /// Refusals that judge nothing: the same frame may come again.
    fn before_the_ledger(&self) -> Result<(), WireError> {
        let unjudged = |mut error: WireError| {
            error.judged = false;
            Err(error)
        };
        if self.draining {
            return unjudged(
                WireError::new(Code::Draining, "this router is stopping; use another one or come back")
                    .retry_after_ms(5_000),
            );
        }
        if self.room > LogRoom::Enough {
            return unjudged(
                WireError::new(Code::Log, "the log's disk is nearly full: new tasks are refused until there is room")
                    .retry_after_ms(5_000),
            );
        }
        let (open, most) = (self.live.len() + self.open_elsewhere, self.settings.limits.streams_open_max);
        if open >= most {
            return unjudged(
                WireError::new(Code::Limit, "too many open streams")
                    .used(open as u64, most as u64)
                    .retry_after_ms(1_000),
            );
        }
        Ok(())
    }

    fn may_deny(&mut self, tenant: &TenantId) -> bool {
        let (now, limits) = (self.now_ms, self.settings.limits);
        // This shard's part of what the tenant may have: the others have as much.
        let cost = 1_000 * u64::from(self.settings.placement.shards());
        let most = (limits.denials_burst * 1_000).max(cost);
        let bucket = self.denials.entry(tenant.clone()).or_insert(Bucket { thousandths: most, at: now });
        bucket.thousandths = most.min(bucket.thousandths + (now - bucket.at) * limits.denials_per_second);
        bucket.at = now;
        let may = bucket.thousandths >= cost;
        bucket.thousandths -= if may { cost } else { 0 };
        may
    }

    // ---- the same again ---------------------------------------------------------------------------------------------

    /// A SYN under a used stream id: the same answer, refusals included.
    fn again(&mut self, conn: ConnId, no: u64, id: &StreamId, hash: &Bytes) {
        let Some(stream) = self.state.stream(no) else { return };
        if stream.accept.payload_hash != *hash {
            return self.refuse(conn, id, &other_content("stream id"));
        }
        if let Ok(error) = serde_json::from_slice::<WireError>(&stream.error) {
            return self.refuse(conn, id, &error);
        }
        self.follow(conn, no, 0);
    }

    /// A new stream id under the key of stream `no`: `accepted` names that one, and its frames follow.
    fn attach(&mut self, conn: ConnId, no: u64, on: &StreamId, after: u64) {
        let Some(stream) = self.state.stream(no) else { return };
        let frame = accepted(on.as_str(), 0, stream, stream.state());
        self.send(conn, frame);
        self.follow(conn, no, after);
    }

    fn resume(&mut self, conn: ConnId, no: u64, after: u64) {
        let Some(stream) = self.state.stream(no) else { return };
        let id = stream.id();
        if let Ok(error) = serde_json::from_slice::<WireError>(&stream.error) {
            return self.refuse(conn, &id, &error);
        }
        self.attach(conn, no, &id, after);
    }

    /// Sends what lies behind `after`, from memory where it is there, else from the log; then what comes.
    fn follow(&mut self, conn: ConnId, no: u64, after: u64) {
        if let Some(wish) = self.replaying.get_mut(&(conn, no)) {
            // One reader at a time, and nothing overtakes it: this wish is served when it is back.
            *wish = (*wish).min(after);
            return;
        }
        let Some(stream) = self.state.stream(no) else { return };
        let (upto, from) = (stream.out_seq, stream.from);
        let (tenant, id) = (stream.tenant(), stream.id());
        self.part(conn, no);
        if let Some(live) = self.live.get_mut(&no) {
            live.subscribers.retain(|c| *c != conn);
            let first = live.recent.front().map_or(upto + 1, |f| f.msg_seq);
            if after.saturating_add(1) >= first {
                let frames: Vec<Frame> = live.recent.iter().filter(|f| f.msg_seq > after).cloned().collect();
                live.subscribers.push(conn);
                frames.into_iter().for_each(|frame| self.send(conn, frame));
                self.join(conn, no, false);
                return;
            }
        } else if after >= upto {
            return;
        }
        self.replaying.insert((conn, no), u64::MAX);
        self.effect(Effect::Replay { conn, tenant, stream: id, from, after, upto });
    }

    pub(super) fn replayed(&mut self, conn: ConnId, tenant: &TenantId, stream: &StreamId, upto: u64) {
        if let Some(no) = self.state.stream_no(tenant.as_str(), stream.as_str())
            && let Some(wish) = self.replaying.remove(&(conn, no))
        {
            self.follow(conn, no, upto.min(wish));
        }
    }

    pub(super) fn conn_gone(&mut self, conn: ConnId) {
        for live in self.live.values_mut() {
            live.subscribers.retain(|c| *c != conn);
        }
        self.books.values_mut().for_each(|book| book.followers.gone(conn));
        self.pending.retain(|(c, _), _| *c != conn);
        self.replaying.retain(|(c, _), _| *c != conn);
        self.unpark(conn);
    }

    fn cancel(&mut self, no: u64, frame: &Frame) {
        let Some(stream) = self.state.stream(no) else { return };
        if stream.is_closed() || stream.cancel {
            return;
        }
        let body = atp_proto::codec::encode_body(frame);
        let key = stream.accept.key.clone();
        self.record(Record::Frame(FrameRecord { key, bodies: vec![body], cancel: true, ..FrameRecord::default() }));
        self.stop(no, Stopping::cancel(self.now_ms));
    }

    /// `RST control.error` on a stream.
    pub(super) fn refuse(&mut self, conn: ConnId, id: &StreamId, error: &WireError) {
        self.send(conn, Frame::json(id.as_str(), 0, Flags::RST, kind::ERROR, error));
    }
}

/// Languages and category of a task, as many and as long as an agent would list them.
fn named(meta: &Meta) -> (Vec<String>, String) {
    let short = |text: &&String| text.len() <= NAME_BYTES_MAX;
    let languages = meta.languages.iter().filter(short).take(LANGUAGES_MAX).cloned().collect();
    (languages, Some(&meta.category).filter(short).cloned().unwrap_or_default())
}

fn accepted(on: &str, seq: u64, stream: &Stream, state: TaskState) -> Frame {
    let accept = &stream.accept;
    let qos = Qos::from_wire(accept.qos).unwrap_or_default();
    replay::accepted(on, seq, &accept.key.stream, state, qos, accept.max_parallel, Limit::from(accept.limit))
}

fn unknown(id: &StreamId) -> WireError {
    let what = format!("no stream {id} here: ids are remembered for 24 h after their end; submit the task anew");
    let mut error = WireError::new(Code::ResumeGone, what);
    error.judged = false;
    error
}

fn other_content(what: &str) -> WireError {
    WireError::new(Code::Idempotency, format!("this {what} was used with other content; take a new one"))
}

/// The content of a submit that was read when it was accepted.
pub(super) fn read_content(content: &Bytes) -> Submit {
    Frame::raw("", 1, Flags::SYN, kind::TASK_SUBMIT, content.clone()).read().unwrap_or_default()
}

/// SHA-256 over what the task is: content (with agents, budget and deadline), QoS and task type.
fn payload_hash(content: &Bytes, qos: Qos, task_type: &str) -> Bytes {
    let mut hash = Sha256::new();
    hash.update(content);
    hash.update([0, qos as u8, 0]);
    hash.update(task_type);
    let digest = hash.finalize();
    Bytes::copy_from_slice(&digest)
}

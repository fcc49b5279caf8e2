//! What becomes of a task: lanes that are owed, stopping, and the one answer with its bill.

use super::choice::Request;
use super::client::Wants;
use super::tool::barrier;
use super::{OWNER_LATER_MS, REPEAT_MS, Shard, Timer};
use crate::account::Level;
use crate::clock::rfc3339;
use crate::message::{LogRoom, Metric};
use crate::record::{Close, ProofPb, Record, SourcePb};
use crate::replay;
use crate::state::{RESULT_FINDINGS_MAX, remaining};
use crate::stream::{Call, Phase, Stream};
use atp_canonicalizer::Source as FindingsOf;
use atp_proto::content::{AgentText, Bill, BillCall, Consensus, EstimateView, Final, Source, TaskResult, TaskState};
use atp_proto::{AgentName, Amount, CallId, Code, Cost, Qos, UsdMicros, WireError};
use sha2::{Digest, Sha256};

/// Why a task is being stopped, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopping {
    why: Why,
    at: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Cancel,
    Deadline,
    Log,
    Preempt,
}

impl Stopping {
    pub(super) fn cancel(at: u64) -> Self {
        Self { why: Why::Cancel, at }
    }
    pub(super) fn log(at: u64) -> Self {
        Self { why: Why::Log, at }
    }
    pub(super) fn preempt(at: u64) -> Self {
        Self { why: Why::Preempt, at }
    }
}

impl Shard {
    // ---- stopping ---------------------------------------------------------------------------------------------------

    pub(super) fn deadline(&mut self, no: u64) {
        if self.live.get(&no).is_some_and(|l| l.deadline_at <= self.now_ms) {
            self.stop(no, Stopping { why: Why::Deadline, at: self.now_ms });
        }
    }

    /// Asks the task's calls to stop. Nothing is settled by that: a call keeps its hold until its end is known.
    pub(super) fn stop(&mut self, no: u64, why: Stopping) {
        let Some(live) = self.live.get_mut(&no).filter(|l| l.stopping.is_none()) else { return };
        live.stopping = Some(why);
        self.withdraw_loudly(no, None);
        self.leave_books(no);
        self.timer(self.now_ms + REPEAT_MS, Timer::Stop(no));
        self.ask_all_to_stop(no);
        let reserved: Vec<u32> = self.lanes(no, |c| c.phase() == Phase::Reserved);
        for lane in reserved {
            // It may have closed by then, with the last of them.
            if self.state.stream(no).and_then(|s| s.call(lane)).is_some_and(Call::is_open) {
                self.void(no, lane, ProofPb::NeverSent, "cancelled");
            }
        }
        self.advance(no);
    }

    fn lanes(&self, no: u64, which: impl Fn(&Call) -> bool) -> Vec<u32> {
        let Some(stream) = self.state.stream(no) else { return Vec::new() };
        stream.calls.iter().filter(|c| which(c)).map(|c| c.reserve.lane).collect()
    }

    fn ask_all_to_stop(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no) else { return };
        let reason = match self.live.get(&no).and_then(|l| l.stopping).map(|s| s.why) {
            Some(Why::Deadline) => "deadline",
            Some(Why::Log) => "the router's log is full",
            Some(Why::Preempt) => "preempted",
            Some(Why::Cancel) | None => "cancelled",
        };
        let running: Vec<CallId> = stream
            .calls
            .iter()
            .filter(|c| c.phase() == Phase::Running)
            .map(|c| stream.call_id(c.reserve.lane))
            .collect();
        running.into_iter().for_each(|id| self.ask_to_stop(id, reason));
    }

    /// The calls had their 5 s: the answer needn't wait for them, the bill shows them as open.
    pub(super) fn stop_due(&mut self, no: u64) {
        let Some(stopping) = self.live.get(&no).and_then(|l| l.stopping) else { return };
        if self.now_ms >= stopping.at + OWNER_LATER_MS {
            return self.close(no, None);
        }
        self.ask_all_to_stop(no);
        self.timer(self.now_ms + REPEAT_MS, Timer::Stop(no));
    }

    // ---- lanes that are owed ----------------------------------------------------------------------------------------

    /// Goes on with a task whose lanes have changed: replaces what failed and may be tried again, or closes it.
    pub(super) fn advance(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| !s.is_closed()) else { return };
        if self.live.get(&no).is_none_or(|l| l.stopping.is_some()) || stream.cancel {
            if stream.cancel && self.live.get(&no).is_some_and(|l| l.stopping.is_none()) {
                return self.stop(no, Stopping::cancel(self.now_ms));
            }
            if !stream.has_open_calls() {
                self.close(no, None);
            }
            return;
        }
        if stream.calls.is_empty() {
            return;
        }
        let owed: Vec<u32> = self.owed(stream);
        let mut waiting = false;
        for lane in owed {
            match self.reserve_retry(no, lane) {
                Ok(true) => {}
                Ok(false) => waiting = true,
                Err(error) => {
                    let said = format!("lane {lane} was not tried again: {error}");
                    if let Some(live) = self.live.get_mut(&no).filter(|l| !l.left_out.contains(&said)) {
                        live.left_out.push(said);
                    }
                }
            }
        }
        let open = self.state.stream(no).is_some_and(Stream::has_open_calls);
        if !self.lanes(no, |c| c.phase() == Phase::Reserved).is_empty() {
            self.ask(no);
        } else if waiting {
            self.ask_later(no);
        } else if !open {
            match self.escalate(no) {
                true => self.ask(no),
                false => self.close(no, None),
            }
        }
    }

    pub(super) fn owes(&self, stream: &Stream) -> bool {
        !self.owed(stream).is_empty()
    }

    /// Lanes that failed, may be tried again, and have no successor.
    fn owed(&self, stream: &Stream) -> Vec<u32> {
        let replaced = |lane: u32| stream.calls.iter().any(|c| c.reserve.retry_of == lane);
        let room = (stream.calls.len() as u32) < self.settings.limits.lanes_max;
        let failed = stream.calls.iter().filter(|c| c.failed() && !replaced(c.reserve.lane));
        failed.filter(|c| room && self.may_retry(stream, c)).map(|c| c.reserve.lane).collect()
    }

    fn may_retry(&self, stream: &Stream, call: &Call) -> bool {
        let code = Code::parse(&call.ended);
        match call.phase() {
            // It had no effect: another try costs nothing, unless the provider will say the same again.
            Phase::Void => matches!(code, Some(Code::WindowAgent | Code::Draining | Code::AgentDown | Code::Timeout)),
            Phase::Settled => {
                let external = call.intent.as_ref().is_some_and(|i| i.external);
                let hopeless = matches!(code, Some(Code::Sec | Code::Auth | Code::Budget | Code::OutcomeUnknown));
                !external && !hopeless && self.tries(stream, call) <= self.settings.retries
            }
            Phase::Reserved | Phase::Running => false,
        }
    }

    /// Settled lanes of the chain that ends in this one.
    fn tries(&self, stream: &Stream, call: &Call) -> u32 {
        let mut tries = 0;
        let mut at = Some(call);
        while let Some(call) = at {
            tries += u32::from(call.phase() == Phase::Settled);
            at = stream.call(call.reserve.retry_of);
        }
        tries
    }

    // ---- the answer -------------------------------------------------------------------------------------------------

    /// A waiting task that can never be paid.
    pub(super) fn close_refused(&mut self, no: u64, error: WireError) {
        self.close(no, Some(error));
    }

    fn close(&mut self, no: u64, refused: Option<WireError>) {
        let Some(stream) = self.state.stream(no).filter(|s| !s.is_closed()) else { return };
        let (state, error) = self.verdict(no, stream, refused);
        let answer = Final { state, result: result(stream), consensus: self.consensus(no, stream), error };
        let code = answer.error.as_ref().map_or("", |e| e.code.as_str()).to_owned();
        let content = serde_json::to_vec(&answer).unwrap_or_default();
        let bill = Bill { state, ..self.bill(stream, true) };
        let close = Close {
            key: stream.accept.key.clone(),
            state: state.as_str().into(),
            code: code.clone(),
            result_hash: Sha256::digest(&content).to_vec().into(),
            result: content.into(),
            bill: serde_json::to_vec(&bill).unwrap_or_default().into(),
            out_seq: stream.out_seq + 1,
        };
        let id = stream.id();
        self.withdraw_loudly(no, None);
        self.leave_books(no);
        self.record(Record::Close(close.clone()));
        for frame in replay::closing(id.as_str(), &close) {
            self.tell(no, frame);
        }
        if let Some(live) = self.live.remove(&no) {
            self.timers.remove(&(live.deadline_at, Timer::Deadline(no)));
            self.timers.remove(&(live.ask_at, Timer::Ask(no)));
            self.forget_window(no, live.told.as_deref(), &live.subscribers);
        }
        self.metric(Metric::Admission { outcome: state.as_str(), code: Code::parse(&code).map_or("", Code::as_str) });
    }

    fn verdict(&self, no: u64, stream: &Stream, refused: Option<WireError>) -> (TaskState, Option<WireError>) {
        if let Some(error) = refused {
            return (TaskState::Failed, Some(error));
        }
        let scope = format!("stream:{}", stream.accept.key.stream);
        let any = |how: &str| stream.calls.iter().any(|c| c.ended == how);
        let has_text = stream.calls.iter().any(|c| !c.text.is_empty() || !c.findings.is_empty());
        let why = self.live.get(&no).and_then(|l| l.stopping).map(|s| s.why);
        let replaced = |call: &Call| stream.calls.iter().any(|c| c.reserve.retry_of == call.reserve.lane);
        if stream.cancel || why == Some(Why::Cancel) {
            return (TaskState::Cancelled, None);
        }
        let partly = |error: WireError| {
            let state = if has_text || any("complete") { TaskState::Provisional } else { TaskState::Failed };
            let named = error.scope.is_some();
            (state, Some(if named { error } else { error.scope(scope.clone()) }))
        };
        match why {
            Some(Why::Deadline) if stream.calls.is_empty() => return partly(self.waited_in_vain(no, stream)),
            Some(Why::Deadline) => {
                return partly(WireError::new(Code::Timeout, "the task's deadline passed; this is what is known"));
            }
            Some(Why::Log) => {
                return partly(WireError::new(Code::Log, "the router's log is full; this is what is known"));
            }
            // What came to its end before it could stop is whole.
            Some(Why::Preempt) if stream.calls.iter().any(|c| c.ended != "complete" && !replaced(c)) => {
                let message = "the task gave way to a gold one; this is what is known, try again later";
                return partly(WireError::new(Code::Preempt, message).retry_after_ms(REPEAT_MS));
            }
            Some(Why::Preempt | Why::Cancel) | None => {}
        }
        if any("grant") && self.room > LogRoom::Enough {
            return partly(WireError::new(
                Code::Log,
                "the log's disk is nearly full: no grant could grow; this is what is known",
            ));
        }
        if any("grant") {
            let limit = stream.level();
            let error = WireError::new(
                Code::Budget,
                "an agent was stopped at its grant: the budget is spent; raise it for the rest",
            );
            let error = error.used(limit.settled.usd_micros.0, limit.limit.amount().usd_micros.0);
            return (TaskState::Provisional, Some(error.scope(scope)));
        }
        if any("complete") {
            return (TaskState::Done, None);
        }
        let unknown = stream.calls.iter().find(|c| c.ended == Code::OutcomeUnknown.as_str());
        let last = unknown.or(stream.calls.last());
        let code = last.and_then(|c| Code::parse(&c.ended)).unwrap_or(Code::AgentDown);
        let agent = last.map_or_else(|| "?".to_owned(), |c| c.reserve.agent.clone());
        let message = match code {
            Code::OutcomeUnknown => format!(
                "agent {agent} was lost in a call with effects outside; whether it happened is unknown, so it isn't tried again"
            ),
            _ => format!("agent {agent} failed with {code} and no try is left"),
        };
        (TaskState::Failed, Some(WireError::new(code, message).scope(format!("agent:{agent}"))))
    }

    /// What a task that never got a call waited for.
    fn waited_in_vain(&self, no: u64, stream: &Stream) -> WireError {
        let wants = self.live.get(&no).map_or_else(|| Wants::of(&stream.submit), |l| l.wants.clone());
        let named = &wants.agents;
        if let Some(agent) = named.iter().find(|a| self.seats.get(*a).is_none_or(|s| !s.up)) {
            return WireError::new(Code::AgentDown, format!("agent {agent} wasn't connected until the deadline"));
        }
        if self.seats.values().all(|s| !s.up) {
            return WireError::new(Code::AgentDown, "no agent was connected until the deadline");
        }
        if self.failed_estimate(no).is_some() {
            return self.no_estimate(no);
        }
        let barred = |a: &AgentName| self.seats.get(a).and_then(|s| barrier(&s.capabilities, &wants.needs));
        if let Some((agent, why)) = named.iter().find_map(|a| Some((a, barred(a)?))) {
            return WireError::new(Code::Sec, why).scope(format!("agent:{agent}"));
        }
        let request = Request::of(&stream.accept, &wants);
        if named.is_empty() && self.ranked(&request).is_empty() {
            let message = format!("no connected agent matched until the deadline ({})", self.filters(&request));
            return WireError::new(Code::AgentDown, message);
        }
        let Some(mut error) = self.obstacle(no) else {
            return WireError::new(Code::Window, "no agent that matches took work until the deadline");
        };
        error.message = format!("it didn't begin until its deadline: {}", error.message);
        error
    }

    fn consensus(&self, no: u64, stream: &Stream) -> Consensus {
        let mut uncertainties = self.live.get(&no).map(|l| l.left_out.clone()).unwrap_or_default();
        let replaced = |lane: u32| stream.calls.iter().any(|c| c.reserve.retry_of == lane);
        for call in stream.calls.iter().filter(|c| !replaced(c.reserve.lane)) {
            let (agent, lane) = (&call.reserve.agent, call.reserve.lane);
            match call.ended.as_str() {
                "complete" => {}
                "" => uncertainties.push(format!("agent {agent} (lane {lane}) had not ended")),
                how => uncertainties.push(format!("agent {agent} (lane {lane}) ended with {how}")),
            }
        }
        Consensus { strategy: "union".into(), agreement_ppm: None, uncertainties }
    }

    /// The bill as it stands.
    pub(super) fn bill(&self, stream: &Stream, closing: bool) -> Bill {
        let level: Level = stream.level();
        Bill {
            stream_id: stream.accept.key.stream.clone(),
            account: stream.accept.account.clone(),
            state: stream.state(),
            limit: level.limit,
            settled: level.settled,
            held: level.held,
            remaining: remaining(&level),
            calls: stream.calls.iter().map(|c| bill_call(stream, c, closing || stream.is_closed())).collect(),
        }
    }
}

fn bill_call(stream: &Stream, c: &Call, closed: bool) -> BillCall {
    let r = &c.reserve;
    let (mean, sd) = (Amount::from(r.mean), Amount::from(r.sd));
    let ended = !c.is_open();
    let source = (c.phase() == Phase::Settled).then(|| match c.source() {
        SourcePb::Reported => Source::Reported,
        SourcePb::Counted => Source::Counted,
        SourcePb::UnknownAtHold => Source::UnknownAtHold,
        SourcePb::Expired => Source::Expired,
    });
    BillCall {
        call_id: stream.call_id(r.lane),
        lane: r.lane,
        retry_of: (r.retry_of > 0).then(|| stream.call_id(r.retry_of)),
        agent: c.agent(),
        model: r.model.clone(),
        state: c.state(closed),
        estimate: EstimateView {
            tokens: mean.tokens,
            usd_micros: mean.usd_micros,
            sd_tokens: sd.tokens,
            sd_usd_micros: sd.usd_micros,
            source: r.source.clone(),
            samples: r.samples,
        },
        k_ppm: r.k_ppm,
        guarded: r.guarded.into(),
        grant: c.hold(),
        extends: c.extends,
        actual: if ended { Cost::from(c.actual) } else { c.with_tools(c.booked()) },
        stated_usd_micros: (c.stated_usd_micros != c.actual.usd_micros && c.stated_usd_micros > 0)
            .then_some(UsdMicros(c.stated_usd_micros)),
        source,
        tool_cost_breakdown: super::tool::breakdown(c),
        price_version: r.price_version.clone(),
        rule: r.rule.clone(),
        reserved_at: rfc3339(c.reserved_at),
        settled_at: (ended && c.settled_at > 0).then(|| rfc3339(c.settled_at)),
    }
}

/// All that the agents said: texts in order of agent name, findings as one list with provenance.
fn result(stream: &Stream) -> TaskResult {
    let mut spoke: Vec<&Call> = stream.calls.iter().filter(|c| !c.text.is_empty()).collect();
    spoke.sort_by(|a, b| (&a.reserve.agent, a.reserve.lane).cmp(&(&b.reserve.agent, b.reserve.lane)));
    let texts: Vec<AgentText> = spoke
        .iter()
        .map(|c| AgentText { agent: c.agent(), call_id: stream.call_id(c.reserve.lane), text: c.text.clone() })
        .collect();
    let text = match texts.as_slice() {
        [only] => only.text.clone(),
        all => all.iter().map(|t| format!("## {}\n\n{}\n", t.agent, t.text)).collect::<Vec<_>>().join("\n"),
    };
    let parsed: Vec<(String, String, Vec<serde_json::Value>)> = stream
        .calls
        .iter()
        .map(|c| {
            let findings = c.findings.iter().filter_map(|f| serde_json::from_str(f).ok()).collect();
            (c.reserve.agent.clone(), stream.call_id(c.reserve.lane).to_string(), findings)
        })
        .collect();
    let sources: Vec<FindingsOf<'_>> =
        parsed.iter().map(|(agent, call_id, findings)| FindingsOf { agent, call_id, findings }).collect();
    let findings = atp_canonicalizer::union(&sources, RESULT_FINDINGS_MAX);
    TaskResult { text, texts, findings, truncated: stream.calls.iter().any(|c| c.truncated) }
}

/// QoS of a stream as its row shows it.
pub(super) fn qos(stream: &Stream) -> Qos {
    super::offer::stream_qos(stream)
}

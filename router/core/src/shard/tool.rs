//! Tools of a running call: who may use which, at what price, and one answer to each request. The router's own tools are run
//! by the shell; what they cost is held beside the agent's grant. Every refusal is a record.

use super::Shard;
use super::settle::{told, with_margin};
use crate::account::Level;
use crate::message::{Effect, LogRoom, Metric, ToolDone};
use crate::policy::Facts;
use crate::record::{Extend, FrameRecord, Record, Tool, ToolVerdict, WindowRef, hex};
use crate::stream::{Call, Phase, Stream};
use crate::tool::{CallTools, OTHER};
use atp_proto::content::{BudgetUpdate, Capabilities, Submit, ToolRequest, ToolResult, ToolSpent};
use atp_proto::frame::{Flags, Meta, kind};
use atp_proto::id::is_id;
use atp_proto::limits::FRAGMENT_BYTES;
use atp_proto::{Amount, CallId, Code, Frame, Qos, TenantId, WireError};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Tools that a task may name.
const PERMISSIONS_MAX: usize = 64;
/// Mediated tools of one call that run at once.
const RUNNING_MAX: usize = 4;
/// Requests of one call.
const REQUESTS_MAX: u64 = 1_000;
/// Answers that are made a second time because the agent lost them.
const AGAIN_MAX: u32 = 64;
/// Bytes of a request's arguments that stand in its audit record.
const ARGS_SHOWN: usize = 512;
/// Tools in one report of an agent.
const REPORTED_MAX: usize = 64;

/// What security demands of the agents of a task.
#[derive(Clone, Debug, Default)]
pub(super) struct Needs {
    /// Tools that the task names: its agents must be able to use all of them.
    pub(super) tools: Vec<String>,
    /// An agent must be in one of these; empty: any agent.
    pub(super) groups_any: Vec<String>,
}

/// What the memory holds of a call's tools beside the fold.
#[derive(Default)]
pub(super) struct LiveTools {
    /// Messages to the agent behind the dispatch, in this epoch.
    told: u64,
    /// Requests that the shell runs.
    running: BTreeSet<u64>,
    again: u32,
    /// A breach in the agent's own reports is recorded.
    audited: bool,
}

/// What a request may do.
enum Leave {
    Mediated(Amount),
    /// The agent's own tool, and what its grant must grow by.
    Own(Amount),
}

/// Why an agent isn't offered a task with these needs.
pub(super) fn barrier(c: &Capabilities, needs: &Needs) -> Option<String> {
    let any = &needs.groups_any;
    if !any.is_empty() && !c.security_groups.iter().any(|g| any.contains(g)) {
        return Some(format!("agent {} is in none of the security groups {}", c.agent, any.join(", ")));
    }
    let lacks = needs.tools.iter().find(|t| !c.tools.contains(t) && !c.tool_permissions.contains(t))?;
    Some(format!("agent {} has no tool {lacks} and doesn't ask for it", c.agent))
}

/// # Errors
/// EPROTO for a list that can't be kept.
pub(super) fn check_permissions(tools: &[String]) -> Result<(), WireError> {
    if tools.len() > PERMISSIONS_MAX {
        return Err(WireError::proto(format!("meta.tool_permissions: at most {PERMISSIONS_MAX} tools")));
    }
    match tools.iter().find(|t| !is_id(t)) {
        Some(tool) => Err(WireError::proto(format!("meta.tool_permissions: `{tool}` is not 1 to 64 of A-Za-z0-9._-"))),
        None => Ok(()),
    }
}

/// Each tool's share of a call, as the bill shows it.
pub(super) fn breakdown(call: &Call) -> Vec<ToolSpent> {
    let tools = call.tools.iter().flat_map(|t| t.totals.iter().map(move |(name, totals)| (t, name, totals)));
    let spent = tools.map(|(tools, name, totals)| {
        let Amount { tokens, usd_micros } = tools.spent(name);
        ToolSpent { tool: name.clone(), allowed: totals.allowed, refused: totals.refused, tokens, usd_micros }
    });
    spent.collect()
}

fn refusal(tool: &str, code: Code, message: String) -> WireError {
    WireError::new(code, message).scope(format!("tool:{tool}")).fatal(atp_proto::code::Fatal::None)
}

impl Shard {
    // ---- before a task is taken -------------------------------------------------------------------------------------

    /// # Errors
    /// ESEC where a task asks for more than its account may use.
    pub(super) fn tools_allowed(&self, tenant: &TenantId, tools: &[String]) -> Result<(), WireError> {
        let Some(tool) = tools.iter().find(|t| !self.settings.tools.allows(tenant, t)) else { return Ok(()) };
        let message = format!(
            "meta.tool_permissions: account {tenant} may not use {tool}; leave it out, or name it in accounts.{tenant}.tools"
        );
        Err(WireError::new(Code::Sec, message).scope(format!("tenant:{tenant}")))
    }

    /// # Errors
    /// ESEC where agents are here that match, and security keeps all of them out.
    pub(super) fn somebody_may(&self, submit: &Submit, task_type: &str, needs: &Needs) -> Result<(), WireError> {
        let barred = |name| self.seats.get(name).filter(|s| s.up).and_then(|s| barrier(&s.capabilities, needs));
        if let Some((agent, why)) = submit.agents.iter().find_map(|a| Some((a, barred(a)?))) {
            return Err(WireError::new(Code::Sec, why).scope(format!("agent:{agent}")));
        }
        let fits =
            |c: &Capabilities| task_type.is_empty() || c.skills.is_empty() || c.skills.iter().any(|s| s == task_type);
        let mut here = self.seats.values().filter(|s| s.up && fits(&s.capabilities)).peekable();
        if !submit.agents.is_empty() || here.peek().is_none() {
            return Ok(());
        }
        let reasons: Option<Vec<String>> = here.map(|s| barrier(&s.capabilities, needs)).collect();
        match reasons.and_then(|all| all.into_iter().next()) {
            Some(why) => Err(WireError::new(Code::Sec, format!("no agent that matches may run this task: {why}"))),
            None => Ok(()),
        }
    }

    /// What security demands of the agents of an accepted task.
    pub(super) fn needs(&self, stream: &Stream) -> Needs {
        let groups_any = stream.accept.security_groups_any.clone();
        Needs { tools: stream.tool_permissions.clone(), groups_any }
    }

    /// The same of a task that is judged: its meta, and the first rule of the policy that it falls under.
    pub(super) fn needs_of(&self, tenant: &TenantId, qos: Qos, meta: Option<&Meta>) -> Needs {
        let tools = meta.map_or_else(Vec::new, |m| m.tool_permissions.clone());
        let rule = self.settings.policy.rule(&Facts { tenant: tenant.as_str(), qos, meta });
        Needs { tools, groups_any: rule.map_or_else(Vec::new, |(_, rule)| rule.security_groups_any.clone()) }
    }

    /// Connected agents that security keeps from a task, and why.
    pub(super) fn kept_out(&self, needs: &Needs) -> Vec<String> {
        if needs.tools.is_empty() && needs.groups_any.is_empty() {
            return Vec::new();
        }
        let here = self.seats.values().filter(|s| s.up);
        here.filter_map(|s| barrier(&s.capabilities, needs)).map(|why| format!("left out: {why}")).collect()
    }

    // ---- a request --------------------------------------------------------------------------------------------------

    /// `tool.request`: logged, judged, and answered once it is known what came of it.
    pub(super) fn tool_request(&mut self, id: CallId, no: u64, lane: u32, record: FrameRecord, frame: &Frame) {
        let (key, fragments) = (record.key.clone(), record.bodies.len());
        self.record(Record::Frame(record));
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else {
            return self.metric(Metric::Dropped { reason: "tool_after_the_end" });
        };
        let read = match fragments {
            1 => frame.read::<ToolRequest>(),
            _ => {
                let error = WireError::new(Code::Limit, "tool.request: a request is at most 64 KiB long");
                Err(error.used(frame.content.len() as u64, FRAGMENT_BYTES as u64))
            }
        };
        let (request, leave) = match read {
            Ok(request) => {
                let leave = self.leave(stream, call, no, &request);
                (request, leave)
            }
            Err(error) => (ToolRequest::default(), Err(error)),
        };
        let named = stream.tool_permissions.contains(&request.tool);
        // Money that may be found elsewhere is no refusal yet.
        let purse = match &leave {
            Err(error) if error.code == Code::Budget => call.reserve.windows.iter().find(|w| w.shared).cloned(),
            _ => None,
        };
        let label: Arc<str> = if named { request.tool.as_str().into() } else { OTHER.into() };
        let attempt = call.intents;
        let cost = self.settings.tools.mediated.get(&request.tool).copied().unwrap_or(request.budget);
        let free = |at: &WindowRef| {
            let window = self.state.accounts.get(&at.account).and_then(|a| a.windows.get(&at.window));
            window.map(|w| w.level().free()).unwrap_or_default()
        };
        let leave = match purse.filter(|at| !cost.fits(free(at))) {
            Some(at) if self.seeks(&at.account, &at.window, self.place(no), cost) => {
                let message = "the account's money is on its way to this shard; ask again".to_owned();
                Err(refusal(&request.tool, Code::Window, message).retry_after_ms(100))
            }
            _ => leave,
        };
        let mut tool = Tool {
            key: key.clone(),
            lane,
            msg_seq: frame.msg_seq,
            tool: if is_id(&request.tool) { request.tool.clone() } else { OTHER.into() },
            args: shown(&request.args),
            ..Tool::default()
        };
        match leave {
            Ok(Leave::Mediated(cost)) => {
                (tool.cost, tool.verdict) = (cost.into(), ToolVerdict::Allowed as i32);
                self.record(Record::Tool(tool));
                self.note_short(no, lane);
                self.run_tool(id, attempt, frame.msg_seq, request.tool.as_str().into(), request.args);
            }
            Ok(Leave::Own(more)) => {
                tool.verdict = ToolVerdict::Own as i32;
                self.record(Record::Tool(tool));
                if !more.is_zero() {
                    self.widen(id, no, lane, more);
                }
                self.metric(Metric::Tool { tool: label, outcome: "own" });
                let result = ToolResult { request: frame.msg_seq, ok: true, own: true, ..ToolResult::default() };
                self.answer_tool(id, &result);
            }
            Err(error) => {
                tool.verdict = ToolVerdict::Refused as i32;
                tool.error = serde_json::to_vec(&error).unwrap_or_default().into();
                self.record(Record::Tool(tool));
                self.metric(Metric::Tool { tool: label, outcome: "refused" });
                let result = ToolResult { request: frame.msg_seq, error: Some(error), ..ToolResult::default() };
                self.answer_tool(id, &result);
            }
        }
    }

    /// Whether a request may be carried out, in the order in which its refusals are told.
    fn leave(&self, stream: &Stream, call: &Call, no: u64, request: &ToolRequest) -> Result<Leave, WireError> {
        let tool = request.tool.as_str();
        if !is_id(tool) {
            return Err(WireError::proto("tool.request: tool: a name is 1 to 64 of A-Za-z0-9._-"));
        }
        let sec = |message: String| Err(refusal(tool, Code::Sec, message));
        self.permitted(stream, tool)?;
        let Some(seat) = self.seats.get(&call.agent()) else {
            let message = "this router doesn't know the agent's capabilities yet; ask again".to_owned();
            return Err(refusal(tool, Code::AgentDown, message).retry_after_ms(1_000));
        };
        let mediated = self.settings.tools.mediated.get(tool).copied();
        let own = seat.capabilities.tools.iter().any(|t| t == tool);
        if mediated.is_none() && !own {
            return sec(format!("neither the router nor agent {} has a tool {tool}", call.reserve.agent));
        }
        let needs = self.live.get(&no).map(|l| &l.wants.needs);
        if let Some(why) = needs.and_then(|needs| barrier(&seat.capabilities, needs)) {
            return sec(why);
        }
        if self.live.get(&no).is_none_or(|l| l.stopping.is_some()) {
            return Err(refusal(tool, Code::Timeout, "the call was asked to stop".into()));
        }
        if self.room > LogRoom::Enough {
            let message = "the log's disk is nearly full: no tool is run until there is room".to_owned();
            return Err(refusal(tool, Code::Log, message));
        }
        let so_far = call.tools.as_deref();
        let (running, requests) = (so_far.map_or(0, CallTools::running), so_far.map_or(0, CallTools::requests));
        if requests >= REQUESTS_MAX {
            let message = "this call has asked for tools too often".to_owned();
            return Err(refusal(tool, Code::Limit, message).used(requests, REQUESTS_MAX));
        }
        if mediated.is_some() && running >= RUNNING_MAX {
            let message = "too many tools of this call run at once; wait for a result".to_owned();
            return Err(refusal(tool, Code::Window, message).used(running as u64, RUNNING_MAX as u64));
        }
        self.affordable(stream, call, request, mediated)
    }

    /// # Errors
    /// ESEC where the task or its account has no leave for this tool.
    fn permitted(&self, stream: &Stream, tool: &str) -> Result<(), WireError> {
        if !stream.tool_permissions.iter().any(|t| t == tool) {
            let message = "the task's meta.tool_permissions don't name this tool".to_owned();
            return Err(refusal(tool, Code::Sec, message));
        }
        if !self.settings.tools.allows(&stream.tenant(), tool) {
            let message = format!("account {} may not use this tool", stream.accept.account);
            return Err(refusal(tool, Code::Sec, message));
        }
        Ok(())
    }

    /// The tool's own cap in this stream, then the stream and its account.
    fn affordable(
        &self,
        stream: &Stream,
        call: &Call,
        request: &ToolRequest,
        mediated: Option<Amount>,
    ) -> Result<Leave, WireError> {
        let tool = request.tool.as_str();
        let cost = mediated.unwrap_or(request.budget);
        let spent = spent(stream, tool);
        if let Some(cap) = self.settings.policy.tools_budget_caps.get(tool).map(|l| l.amount())
            && !spent.add(cost).is_ok_and(|sum| sum.fits(cap))
        {
            let message = format!("the cap of {tool} in one task (tools_budget_caps) has no room for {}", words(cost));
            let tight = spent.usd_micros.add(cost.usd_micros).is_ok_and(|sum| sum <= cap.usd_micros);
            let (used, limit) =
                if tight { (spent.tokens.0, cap.tokens.0) } else { (spent.usd_micros.0, cap.usd_micros.0) };
            return Err(refusal(tool, Code::Budget, message).used(used, limit));
        }
        let levels = self.levels(stream, &call.reserve.windows);
        let free = levels.iter().map(Level::free).reduce(Amount::min).unwrap_or_default();
        let more = match mediated {
            Some(cost) => cost,
            // Its agent pays it out of its grant, which must have room for it.
            None => {
                let spent =
                    call.booked().amount().and_then(|spent| with_margin(call, spent.add(cost)?)).unwrap_or(WORST);
                spent.less(call.grant())
            }
        };
        let may_grow = mediated.is_some() || call.intent.as_ref().is_some_and(|i| i.slices);
        if !more.fits(free) || !(more.is_zero() || may_grow) {
            let message = format!("{tool} needs {}, and the budget has no room for that", words(more));
            let level = stream.level();
            let used = level.settled.add(level.held).unwrap_or(level.held);
            let error = refusal(tool, Code::Budget, message);
            return Err(error.used(used.usd_micros.0, level.limit.amount().usd_micros.0));
        }
        Ok(if mediated.is_some() { Leave::Mediated(cost) } else { Leave::Own(more) })
    }

    /// The grant grows by what the agent's own tool may cost.
    fn widen(&mut self, id: CallId, no: u64, lane: u32, more: Amount) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let Ok(hold) = call.hold().add(more) else { return };
        let (key, grant) = (stream.accept.key.clone(), told(call, hold.less(call.tool_cost())));
        self.record(Record::Extend(Extend { key, lane, hold: hold.into() }));
        self.note_short(no, lane);
        let (shard, epoch) = (self.settings.shard, self.epoch);
        let update = BudgetUpdate { call_id: id, shard, epoch, grant, last: false };
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::BUDGET_UPDATE, &update));
    }

    fn run_tool(&mut self, call: CallId, attempt: u32, request: u64, tool: Arc<str>, args: Value) {
        let Some(live) = self.calls.get_mut(&call) else { return };
        if live.tools.running.insert(request) {
            self.effect(Effect::Tool { call, attempt, request, tool, args });
        }
    }

    fn answer_tool(&mut self, id: CallId, result: &ToolResult) {
        let Some(live) = self.calls.get_mut(&id) else { return };
        live.tools.told += 1;
        let msg_seq = 1 + live.tools.told;
        self.pass(id, Frame::json(id.to_string(), msg_seq, Flags::NONE, kind::TOOL_RESULT, result));
    }

    /// The agent asks again, so it lacks the answer: the same one, or, where that isn't kept, a tool without effects is run
    /// once more at no cost.
    pub(super) fn tool_again(&mut self, id: CallId, no: u64, lane: u32, frame: &Frame) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        if call.phase() != Phase::Running || frame.flags.has(Flags::MORE) {
            return;
        }
        let attempt = call.intents;
        let result = ToolResult { request: frame.msg_seq, ..ToolResult::default() };
        let Some(asked) = call.tools.as_ref().and_then(|t| t.asked(frame.msg_seq)) else {
            let message = "this request's answer isn't remembered any more; ask anew".to_owned();
            let error = Some(refusal(OTHER, Code::OutcomeUnknown, message));
            return self.answer_tool(id, &ToolResult { error, ..result });
        };
        let verdict = asked.verdict();
        match verdict {
            ToolVerdict::Refused => {
                let error = serde_json::from_slice(&asked.error).ok();
                self.answer_tool(id, &ToolResult { error, ..result });
            }
            ToolVerdict::Own => self.answer_tool(id, &ToolResult { ok: true, own: true, ..result }),
            ToolVerdict::Allowed | ToolVerdict::Done | ToolVerdict::Reported => {
                let Some(live) = self.calls.get_mut(&id).filter(|l| l.tools.again < AGAIN_MAX) else { return };
                live.tools.again += u32::from(verdict == ToolVerdict::Done);
                if let Ok(request) = frame.read::<ToolRequest>() {
                    self.run_tool(id, attempt, frame.msg_seq, request.tool.as_str().into(), request.args);
                }
            }
        }
    }

    /// A mediated tool has ended: recorded once, told each time.
    pub(super) fn tool_done(&mut self, done: ToolDone) {
        let id = done.call;
        let Some(live) = self.calls.get_mut(&id) else { return };
        let (no, lane) = (live.no, live.lane);
        let ran = live.tools.running.remove(&done.request);
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let asked = call.tools.as_ref().and_then(|t| t.asked(done.request));
        let Some(asked) = asked.filter(|_| ran && call.intents == done.attempt) else { return };
        let (cost, open, tool) =
            (Amount::from(asked.cost), asked.verdict() == ToolVerdict::Allowed, asked.tool.clone());
        let key = stream.accept.key.clone();
        let (ok, data, error) = match done.outcome {
            Ok(data) => (true, data, None),
            Err(error) => {
                (false, Value::Null, Some(error.scope(format!("tool:{tool}")).fatal(atp_proto::code::Fatal::None)))
            }
        };
        if open {
            let json = serde_json::to_vec(&data).unwrap_or_default();
            let text = error.as_ref().map(|e| serde_json::to_vec(e).unwrap_or_default()).unwrap_or_default();
            self.record(Record::Tool(Tool {
                key,
                lane,
                msg_seq: done.request,
                tool: tool.clone(),
                verdict: ToolVerdict::Done as i32,
                error: text.into(),
                ok,
                bytes: json.len() as u64,
                hash: Sha256::digest(&json).to_vec().into(),
                ..Tool::default()
            }));
            self.metric(Metric::Tool { tool: tool.as_str().into(), outcome: if ok { "ok" } else { "failed" } });
        }
        let result = ToolResult { request: done.request, ok, own: false, data, cost, error };
        self.answer_tool(id, &result);
    }

    // ---- what the agent says of its own tools -----------------------------------------------------------------------

    /// `tool_cost_breakdown` of a partial or a final: running totals that its cost contains. Use without leave is recorded.
    pub(super) fn tools_reported(&mut self, id: CallId, no: u64, lane: u32, frame: &Frame) {
        let Some(extra) = frame.extra.as_ref().filter(|e| !e.tool_cost_breakdown.is_empty()) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let key = stream.accept.key.clone();
        let said = |tool: &str, cost: Amount| Tool {
            key: key.clone(),
            lane,
            msg_seq: frame.msg_seq,
            tool: tool.to_owned(),
            verdict: ToolVerdict::Reported as i32,
            cost: cost.into(),
            ..Tool::default()
        };
        let (mut records, mut breach) = (Vec::new(), None);
        for reported in extra.tool_cost_breakdown.iter().take(REPORTED_MAX) {
            let tool = reported.tool.as_str();
            let cost = Amount::new(reported.tokens, reported.usd_micros).min(WORST);
            if let Err(error) = self.permitted(stream, tool) {
                breach.get_or_insert((if is_id(tool) { tool } else { OTHER }, error));
                continue;
            }
            let before = call.tools.as_ref().and_then(|t| t.totals.get(tool)).map_or(Amount::ZERO, |t| t.own.into());
            if cost.fits(before) {
                continue;
            }
            records.push(said(tool, cost));
            let cap = self.settings.policy.tools_budget_caps.get(tool).map(|l| l.amount());
            let sum = spent(stream, tool).add(cost.less(before)).unwrap_or(WORST);
            if let Some(cap) = cap.filter(|cap| !sum.fits(*cap)) {
                let message = format!("the agent spent {} on {tool}, more than its cap in one task", words(sum));
                let error = refusal(tool, Code::Budget, message).used(sum.usd_micros.0, cap.usd_micros.0);
                breach.get_or_insert((tool, error));
            }
        }
        let breach = breach.map(|(tool, error)| {
            let error = serde_json::to_vec(&error).unwrap_or_default().into();
            Tool { verdict: ToolVerdict::Refused as i32, error, ..said(tool, Amount::ZERO) }
        });
        records.into_iter().for_each(|record| self.record(Record::Tool(record)));
        if let Some(record) = breach
            && let Some(live) = self.calls.get_mut(&id)
            && !std::mem::replace(&mut live.tools.audited, true)
        {
            self.record(Record::Tool(record));
            self.metric(Metric::Tool { tool: OTHER.into(), outcome: "breach" });
        }
    }
}

/// More than any call can cost.
const WORST: Amount = Amount::new(crate::estimate::CALL_AMOUNT_MAX, crate::estimate::CALL_AMOUNT_MAX);

/// What a tool has cost a stream.
fn spent(stream: &Stream, tool: &str) -> Amount {
    let each = stream.calls.iter().filter_map(|c| c.tools.as_ref()).map(|t| t.spent(tool));
    each.fold(Amount::ZERO, |sum, one| sum.add(one).unwrap_or(WORST))
}

fn words(a: Amount) -> String {
    format!("{} micro-USD and {} tokens", a.usd_micros, a.tokens)
}

/// The arguments as the audit record keeps them: whole where they are short, else their hash behind their beginning.
fn shown(args: &Value) -> String {
    if args.is_null() {
        return String::new();
    }
    let text = args.to_string();
    if text.len() <= ARGS_SHOWN {
        return text;
    }
    let cut = (0..=ARGS_SHOWN).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
    format!("{}... sha256 {}", &text[..cut], hex(&Sha256::digest(&text)))
}

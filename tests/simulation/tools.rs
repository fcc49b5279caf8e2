//! Tools in a schedule: an agent process that asks for them at random, and a shell that runs the router's own. What isn't
//! answered is said again, and an answer never changes.

use crate::simulation::check::Check;
use crate::simulation::plan::Plan;
use crate::simulation::process::Process;
use crate::simulation::rng::Rng;
use crate::simulation::sched::{Event, Sched};
use atp_core::message::ToolDone;
use atp_proto::content::{ToolRequest, ToolResult};
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Code, Flags, Frame, Limit, Tokens, UsdMicros, WireError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A request that has been waiting for this long is said again.
const AGAIN_MS: u64 = 1_000;

/// Tools of a plan: what the router lends and at which price, who may use what, and which tasks want them.
pub fn plan(rng: &mut Rng, plan: &mut Plan) {
    if rng.percent(50) {
        return;
    }
    let tools = &mut plan.settings.tools;
    let price = Amount { tokens: Tokens(rng.pick(&[0, 0, 5])), usd_micros: UsdMicros(rng.pick(&[0, 7, 40, 300])) };
    tools.mediated.insert("fs.read".into(), price);
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
    tools.allowed_default = Some(names(&["fs.read", "search"]));
    if rng.percent(10) {
        tools.allowed.insert(plan.tenants[1].clone(), names(&["search"]));
    }
    if rng.percent(50) {
        let cap = Limit { usd_micros: Some(UsdMicros(rng.range(0, 400))), tokens: None };
        Arc::make_mut(&mut plan.settings.policy).tools_budget_caps.insert("fs.read".into(), cap);
    }
    for agent in &mut plan.agents {
        if rng.percent(92) {
            agent.capabilities.tools = vec!["search".into()];
            agent.capabilities.tool_permissions = vec!["fs.read".into()];
        }
        agent.asks_percent = rng.pick(&[0, 20, 50]);
    }
    for task in &mut plan.tasks {
        // A task under another's key is the same task.
        if task.stream.ends_with(".2") || rng.percent(45) {
            continue;
        }
        task.tools = rng.pick(&[&["fs.read"][..], &["fs.read", "search"], &["search"]]);
    }
}

/// The requests of one call, as its agent knows them.
#[derive(Debug, Default)]
pub struct Asking {
    waiting: BTreeMap<u64, (Frame, u64)>,
    /// What each was told: its code, or nothing for a yes.
    told: BTreeMap<u64, Option<Code>>,
    /// Since when it waits while nothing goes wrong any more.
    healed_wait_since: Option<u64>,
}

impl Asking {
    #[must_use]
    pub fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A request for a tool of the three kinds: lent, own, and nobody's.
    pub fn request(s: &mut Sched) -> ToolRequest {
        let tool = s.rng.pick(&["fs.read", "fs.read", "search", "shell"]);
        let budget = Amount { usd_micros: UsdMicros(s.rng.pick(&[0, 0, 50])), ..Amount::ZERO };
        ToolRequest { tool: tool.into(), args: serde_json::json!({"path": "x"}), budget }
    }

    pub fn asked(&mut self, s: &Sched, frame: Frame) {
        self.waiting.insert(frame.msg_seq, (frame, s.now_ms));
    }

    /// What has waited for long and isn't on its way anyway.
    pub fn again(&mut self, s: &Sched, unacked_from: u64) -> Vec<Frame> {
        let mut frames = Vec::new();
        for (_, (frame, said_at)) in self.waiting.range_mut(..unacked_from) {
            if s.now_ms >= *said_at + AGAIN_MS {
                *said_at = s.now_ms;
                frames.push(frame.clone());
            }
        }
        frames
    }

    /// After healing an answer comes soon, whatever was lost before.
    pub fn is_answered_in_time(&mut self, s: &Sched, check: &mut Check, id: CallId) {
        if !s.healed {
            return;
        }
        let since = *self.healed_wait_since.get_or_insert(s.now_ms);
        let late = s.now_ms > since + check.patience_ms + 2 * AGAIN_MS;
        check.verdict.expect(!late, "after healing every tool request is answered", || {
            format!("{id} waits since {since} for messages {:?}", self.waiting.keys())
        });
    }

    /// An answer arrives; the second one to a request says what the first one said.
    pub fn answered(&mut self, check: &mut Check, id: CallId, result: &ToolResult) {
        let code = (!result.ok).then(|| result.error.as_ref().map_or(Code::Proto, |e| e.code));
        let waited = self.waiting.remove(&result.request).is_some();
        self.healed_wait_since = None;
        let before = self.told.get(&result.request).copied();
        check.verdict.expect(waited || before.is_some(), "a tool's result answers a request", || {
            format!("{id}: {result:?} answers nothing")
        });
        let same = before.is_none_or(|before| before == code || code == Some(Code::OutcomeUnknown));
        check.verdict.expect(same, "a tool request has one answer", || {
            format!("{id}: message {} was told {before:?}, and now {code:?}", result.request)
        });
        self.told.entry(result.request).or_insert(code);
        check.tools.answered += u64::from(waited);
    }
}

/// The shell runs a mediated tool: late, or never, if the process dies before.
pub fn run(s: &mut Sched, shard: u32, owner: u32, call: CallId, attempt: u32, request: u64) {
    // What a request comes to is the same each time: the tools have no effects.
    let outcome = match request % 5 {
        0 => Err(WireError::proto("no such file")),
        _ => Ok(serde_json::json!({"text": "x"})),
    };
    let done = Box::new(ToolDone { call, attempt, request, outcome });
    let ms = s.delay();
    s.after(ms, Event::ToolDone { shard, owner, done });
}

/// The frame of a request.
#[must_use]
pub fn frame(id: CallId, msg_seq: u64, request: &ToolRequest) -> Frame {
    Frame::json(id.to_string(), msg_seq, Flags::NONE, kind::TOOL_REQUEST, request)
}

impl Process {
    /// Asks for a tool and goes on.
    pub fn ask(&mut self, s: &mut Sched, id: CallId) {
        let request = Asking::request(s);
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.asking.asked(s, frame(id, call.sent_seq + 1, &request));
        self.emit(s, id, Flags::NONE, kind::TOOL_REQUEST, &request);
    }

    /// Says again what has waited for long.
    pub fn ask_again(&mut self, s: &mut Sched, check: &mut Check, id: CallId) {
        let Some(conn) = self.conn else { return };
        let Some(call) = self.calls.get_mut(&id).filter(|c| !c.parked) else { return };
        call.asking.is_answered_in_time(s, check, id);
        let unacked = call.unacked.first().map_or(u64::MAX, |f| f.msg_seq);
        call.asking.again(s, unacked).into_iter().for_each(|f| s.send_up(conn, f));
    }
}

//! Tools against the log: leave only for what the task names, held money before a run, one end per run, a stream's spending
//! on a tool within its cap.

use super::Check;
use super::ledger::{Pair, amount, plus};
use atp_core::record::{Key, Record, Tool, ToolVerdict};
use atp_proto::CallId;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct Tools {
    /// Caps in micro-USD by tool.
    pub caps: BTreeMap<String, i128>,
    /// Requests that an agent had an answer to.
    pub answered: u64,
    /// By call and attempt and message: what the log last said.
    requests: BTreeMap<(CallId, u32, u64), ToolVerdict>,
    spent: BTreeMap<(Key, String), Pair>,
}

impl Check {
    /// A mediated tool is about to be run.
    pub fn tool_runs(&mut self, call: CallId, attempt: u32, request: u64) {
        let said = self.tools.requests.get(&(call, attempt, request));
        let ready = matches!(said, Some(ToolVerdict::Allowed | ToolVerdict::Done));
        self.verdict.expect(ready, "a tool runs => durable leave", || format!("{call}, message {request}: {said:?}"));
    }

    /// A Tool record is durable, and its money is in the ledger.
    pub fn tool(&mut self, record: &Record) {
        let Record::Tool(r) = record else { return };
        let id = r.key.call(r.lane);
        let attempt = self.call(&id).map_or(0, |c| c.intents);
        if let Err(why) = self.tools.word(id, attempt, r) {
            self.verdict.fail("grammar of tool requests", || format!("{id}, message {}: {why}", r.msg_seq));
        }
        let caps = &self.tools.caps;
        let over = self.tools.spent.iter().find(|((_, tool), s)| caps.get(tool).is_some_and(|cap| s[1] > *cap));
        let over = over.map(|(at, spent)| format!("{at:?}: {spent:?}"));
        self.verdict.expect(over.is_none(), "a tool stays within its cap", || over.clone().unwrap_or_default());
    }
}

impl Tools {
    fn word(&mut self, id: CallId, attempt: u32, r: &Tool) -> Result<(), String> {
        let at = (id, attempt, r.msg_seq);
        let before = self.requests.get(&at).copied();
        let verdict = r.verdict();
        match (before, verdict) {
            (_, ToolVerdict::Reported) => return Ok(()),
            (None, ToolVerdict::Allowed | ToolVerdict::Own | ToolVerdict::Refused) => {}
            (Some(ToolVerdict::Allowed), ToolVerdict::Done) => {}
            _ => return Err(format!("{verdict:?} follows {before:?}")),
        }
        if matches!(verdict, ToolVerdict::Allowed | ToolVerdict::Own) && r.tool == "shell" {
            return Err("leave for a tool that no task names".into());
        }
        if verdict == ToolVerdict::Allowed {
            let spent = self.spent.entry((r.key.clone(), r.tool.clone())).or_default();
            *spent = plus(*spent, amount(&r.cost));
        }
        self.requests.insert(at, verdict);
        Ok(())
    }
}

//! Tools as settings and log know them: which the router lends and at what price, who may use what, and what a call has asked
//! for. Part of the fold; decides nothing.

use crate::record::{AmountPb, ToolVerdict};
use atp_proto::{Amount, TenantId};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};

/// Requests of one call that are remembered for an agent that asks again.
pub(crate) const REMEMBERED_MAX: usize = 16;
/// What all tools are counted under that the task doesn't name.
pub(crate) const OTHER: &str = "other";

/// What an operator says of tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolSettings {
    /// Tools that the router runs itself, and the price of one request.
    pub mediated: BTreeMap<String, Amount>,
    /// The tools of an account, by name.
    pub allowed: BTreeMap<TenantId, BTreeSet<String>>,
    /// For accounts that aren't in `allowed`. Absent: agents' own tools, none of the router's.
    pub allowed_default: Option<BTreeSet<String>>,
}

impl ToolSettings {
    /// Whether the account may use this tool.
    #[must_use]
    pub fn allows(&self, tenant: &TenantId, tool: &str) -> bool {
        match self.allowed.get(tenant).or(self.allowed_default.as_ref()) {
            Some(allowed) => allowed.contains(tool),
            None => !self.mediated.contains_key(tool),
        }
    }
}

/// What the log says of a call's tools.
#[derive(Clone, PartialEq, Message)]
pub struct CallTools {
    /// The newest requests of the newest attempt, oldest first.
    #[prost(message, repeated, tag = "1")]
    pub asked: Vec<Asked>,
    /// By tool; what the task doesn't name is under `other`.
    #[prost(btree_map = "string, message", tag = "2")]
    pub totals: BTreeMap<String, Totals>,
    /// What mediated tools cost: part of the call's hold, never of its agent's grant.
    #[prost(message, required, tag = "3")]
    pub cost: AmountPb,
}

/// One request.
#[derive(Clone, PartialEq, Message)]
pub struct Asked {
    /// The agent's message that asked.
    #[prost(uint64, tag = "1")]
    pub msg_seq: u64,
    /// The tool's name.
    #[prost(string, tag = "2")]
    pub tool: String,
    /// What was decided.
    #[prost(enumeration = "ToolVerdict", tag = "3")]
    pub verdict: i32,
    /// What is held for it.
    #[prost(message, required, tag = "4")]
    pub cost: AmountPb,
    /// A refusal's `control.error`, JSON.
    #[prost(bytes = "bytes", tag = "5")]
    pub error: bytes::Bytes,
}

/// One tool in one call.
#[derive(Clone, PartialEq, Message)]
pub struct Totals {
    /// Requests that were.
    #[prost(uint32, tag = "1")]
    pub allowed: u32,
    /// Requests that were.
    #[prost(uint32, tag = "2")]
    pub refused: u32,
    /// Booked by the router.
    #[prost(message, required, tag = "3")]
    pub mediated: AmountPb,
    /// The agent's own running total; its call's cost contains it.
    #[prost(message, required, tag = "4")]
    pub own: AmountPb,
}

impl CallTools {
    /// The request that the agent's message `msg_seq` made.
    #[must_use]
    pub fn asked(&self, msg_seq: u64) -> Option<&Asked> {
        self.asked.iter().find(|a| a.msg_seq == msg_seq)
    }

    /// Requests that run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.asked.iter().filter(|a| a.verdict() == ToolVerdict::Allowed).count()
    }

    /// All requests, refused ones too.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.totals.values().map(|t| u64::from(t.allowed) + u64::from(t.refused)).sum()
    }

    /// What a tool has cost this call.
    #[must_use]
    pub fn spent(&self, tool: &str) -> Amount {
        let Some(totals) = self.totals.get(tool) else { return Amount::ZERO };
        let (own, mediated) = (Amount::from(totals.own), Amount::from(totals.mediated));
        own.add(mediated).unwrap_or(own.max(mediated))
    }

    /// Keeps the list short; what runs stays.
    pub(crate) fn remember(&mut self, asked: Asked) {
        if self.asked.len() >= REMEMBERED_MAX
            && let Some(at) = self.asked.iter().position(|a| a.verdict() != ToolVerdict::Allowed)
        {
            self.asked.remove(at);
        }
        self.asked.push(asked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn what_the_router_lends_needs_a_word() {
        let mut settings = ToolSettings::default();
        settings.mediated.insert("fs.read".into(), Amount::ZERO);
        let (acme, other) = (TenantId::new("acme"), TenantId::new("other"));
        assert!(!settings.allows(&acme, "fs.read") && settings.allows(&acme, "search"));
        settings.allowed.insert(acme.clone(), names(&["fs.read"]));
        assert!(settings.allows(&acme, "fs.read") && !settings.allows(&acme, "search"));
        assert!(!settings.allows(&other, "fs.read") && settings.allows(&other, "search"));
        settings.allowed_default = Some(BTreeSet::new());
        assert!(settings.allows(&acme, "fs.read") && !settings.allows(&other, "search"));
    }

    #[test]
    fn the_sixteen_newest_requests_are_remembered_and_none_that_runs_is_forgotten() {
        let asked = |msg_seq, verdict: ToolVerdict| Asked { msg_seq, verdict: verdict as i32, ..Asked::default() };
        let mut tools = CallTools::default();
        tools.remember(asked(1, ToolVerdict::Allowed));
        for seq in 2..=REMEMBERED_MAX as u64 + 1 {
            tools.remember(asked(seq, ToolVerdict::Refused));
        }
        assert_eq!(tools.asked.len(), REMEMBERED_MAX);
        assert!(tools.asked(1).is_some() && tools.asked(2).is_none() && tools.asked(3).is_some());
        assert_eq!(tools.running(), 1);
    }
}

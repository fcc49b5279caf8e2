//! The metering provider: keeps the true bill of every call, and how often each took effect. Nothing is ever taken back.

use crate::simulation::check::Verdict;
use atp_proto::{Amount, CallId, Cost};
use std::collections::BTreeMap;

/// What the provider knows of a call.
#[derive(Clone, Debug, Default)]
pub struct TrueCall {
    pub agent: usize,
    pub effects: u32,
    /// Running total of what is billed.
    pub billed: Cost,
    /// What an announced breach billed beyond grant and reach; the bound is allowed to be off by it.
    pub excess: Amount,
    pub breach: bool,
    /// The agent reported its final cost exactly.
    pub reported: Option<Cost>,
}

#[derive(Debug, Default)]
pub struct Provider {
    pub calls: BTreeMap<CallId, TrueCall>,
    /// (agent, upstream key) -> when it was first called.
    keys: BTreeMap<(usize, String), u64>,
}

impl Provider {
    /// The provider is called; true when it knew the key and repeats its answer without a second effect.
    pub fn called(
        &mut self,
        agent: usize,
        call: CallId,
        key: &str,
        now_ms: u64,
        dedupes_for_ms: u64,
        verdict: &mut Verdict,
    ) -> bool {
        let first = self.keys.get(&(agent, key.to_string())).copied();
        let true_call = self.calls.entry(call).or_default();
        true_call.agent = agent;
        if first.is_some_and(|at| now_ms <= at + dedupes_for_ms) {
            return true;
        }
        self.keys.insert((agent, key.to_string()), now_ms);
        true_call.effects += 1;
        if true_call.effects > 1 {
            verdict.fail("effects per call <= 1", || format!("{call} took effect twice (upstream key {key})"));
        }
        false
    }

    /// The provider billed more for a call.
    pub fn bill(&mut self, call: CallId, total: Cost) -> &mut TrueCall {
        let true_call = self.calls.entry(call).or_default();
        true_call.billed = true_call.billed.max(total);
        true_call
    }

    #[must_use]
    pub fn effects(&self, call: &CallId) -> u32 {
        self.calls.get(call).map_or(0, |c| c.effects)
    }
}

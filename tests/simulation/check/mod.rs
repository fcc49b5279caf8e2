//! The checkers: one file per kind of promise, none of them uses the core's own arithmetic. The first violation stops
//! a schedule.

pub mod answers;
pub mod ending;
pub mod fold;
pub mod grammar;
pub mod ledger;
pub mod order;
pub mod queue;
pub mod shown;
pub mod slots;
pub mod status;
pub mod tool;
pub mod truth;
pub mod turn;
pub mod wire;

use crate::simulation::process::Process;
use crate::simulation::provider::Provider;
use atp_core::record::Entry;
use atp_proto::{Amount, CallId, Cost};
use bytes::Bytes;
use prost::Message;

/// A promise that was broken, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub detail: String,
}

/// Keeps the first violation.
#[derive(Debug, Default)]
pub struct Verdict {
    pub violation: Option<Violation>,
}

impl Verdict {
    pub fn fail(&mut self, invariant: &'static str, detail: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { invariant, detail: detail() });
        }
    }

    pub fn expect(&mut self, holds: bool, invariant: &'static str, detail: impl FnOnce() -> String) {
        if !holds {
            self.fail(invariant, detail);
        }
    }
}

/// All that the checkers know.
#[derive(Default)]
pub struct Check {
    pub verdict: Verdict,
    pub ledger: ledger::Ledger,
    pub provider: Provider,
    pub fold: fold::Fold,
    pub order: order::Order,
    pub slots: slots::Slots,
    pub statuses: status::Statuses,
    pub wire: wire::Wire,
    pub tools: tool::Tools,
    pub shown: shown::Shown,
    /// How long what an agent says may be on its way.
    pub patience_ms: u64,
}

impl Check {
    /// An entry has become durable.
    pub fn durable(&mut self, position: u64, bytes: &Bytes, processes: &[Process], now_ms: u64) {
        let entry = match Entry::decode(bytes.clone()) {
            Ok(entry) => entry,
            Err(e) => return self.verdict.fail("replay halts nowhere", || format!("entry {position}: {e}")),
        };
        grammar::whole(position, &entry, &mut self.verdict);
        self.ledger.apply(position, &entry, &mut self.verdict);
        entry.records.iter().filter_map(|r| r.record.as_ref()).for_each(|record| self.tool(record));
        truth::entry(position, &entry, self, processes, now_ms);
        self.fold.push(entry);
    }

    pub fn provider_called(&mut self, agent: usize, call: CallId, key: &str, now_ms: u64, dedupes_for_ms: u64) {
        let known = self.provider.called(agent, call, key, now_ms, dedupes_for_ms, &mut self.verdict);
        self.wire.repeats = known;
        truth::called(self, &call);
    }

    /// After `provider_called`: tokens of the stored answer, if it was one.
    #[must_use]
    pub fn known_answer(&self, call: &CallId) -> Option<(u64, u64)> {
        let known = self.provider.calls.get(call)?;
        self.wire.repeats.then_some((known.billed.in_tokens.0, known.billed.out_tokens.0))
    }

    #[must_use]
    pub fn is_billed(&self, call: &CallId) -> bool {
        self.provider.calls.get(call).is_some_and(|c| c.billed != Cost::default())
    }

    pub fn reported(&mut self, call: &CallId, cost: Cost) {
        if let Some(known) = self.provider.calls.get_mut(call) {
            known.reported = Some(cost);
        }
    }

    /// The provider bills `total` for a call so far; `over` is beyond the grant and the reach that the agent knows.
    pub fn bill(&mut self, agent: usize, call: CallId, total: Cost, over: Amount, breach: bool) {
        let known = self.provider.bill(call, total);
        known.agent = agent;
        known.breach |= breach;
        if breach {
            known.excess = known.excess.max(over);
        } else {
            self.verdict.expect(over.is_zero(), "the hold covers the declared worst case", || {
                format!("{call} was billed {total:?}, {over:?} beyond its grant and reach")
            });
        }
        truth::billed(self, &call);
    }
}

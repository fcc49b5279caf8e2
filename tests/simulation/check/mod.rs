//! The checkers: one file per kind of promise, none of them uses the core's own arithmetic. The first violation stops
//! a schedule.

pub mod answers;
pub mod balance;
pub mod ending;
pub mod escrow;
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
use atp_core::placement::Placement;
use atp_core::record::{AgentRecord, Entry, Record};
use atp_proto::{AgentName, Amount, CallId, Cost};
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

/// What is known of one shard.
#[derive(Default)]
pub struct OfShard {
    pub ledger: ledger::Ledger,
    pub fold: fold::Fold,
    pub shown: shown::Shown,
}

/// All that the checkers know.
#[derive(Default)]
pub struct Check {
    pub verdict: Verdict,
    pub shards: Vec<OfShard>,
    pub placement: Placement,
    pub provider: Provider,
    pub order: order::Order,
    pub slots: slots::Slots,
    pub statuses: status::Statuses,
    pub wire: wire::Wire,
    pub tools: tool::Tools,
    pub escrow: escrow::Escrows,
    pub balance: balance::Balance,
    /// How long what an agent says may be on its way.
    pub patience_ms: u64,
}

/// A call, whichever shard it is of.
fn call_of<'a>(shards: &'a [OfShard], id: &CallId) -> Option<&'a ledger::Call> {
    shards.iter().find_map(|of| of.ledger.call(id))
}

impl Check {
    #[must_use]
    pub fn of(placement: &Placement) -> Self {
        let ledger = |no| ledger::Ledger::of(no, placement.clone());
        let shards = (0..placement.shards()).map(|no| OfShard { ledger: ledger(no), ..OfShard::default() });
        Self { shards: shards.collect(), placement: placement.clone(), ..Self::default() }
    }

    #[must_use]
    pub fn ledger(&self, shard: u32) -> &ledger::Ledger {
        &self.shards[shard as usize].ledger
    }

    pub fn ledgers(&self) -> impl Iterator<Item = &ledger::Ledger> {
        self.shards.iter().map(|of| &of.ledger)
    }

    /// A call, whichever shard it is of.
    #[must_use]
    pub fn call(&self, id: &CallId) -> Option<&ledger::Call> {
        call_of(&self.shards, id)
    }

    /// A stream, in the log of its shard.
    #[must_use]
    pub fn stream_of_call(&self, id: &CallId) -> Option<&ledger::Stream> {
        self.ledgers().find_map(|ledger| ledger.streams.get(&ledger.by_call.get(id)?.0))
    }

    /// How an agent stands, where all shards that know it agree.
    #[must_use]
    pub fn standing(&self, agent: &AgentName) -> Option<AgentRecord> {
        let first = self.shards.first()?.ledger.standing(agent.as_str())?;
        let same = |r: &AgentRecord| r.status == first.status && r.incarnation == first.incarnation;
        self.ledgers().all(|ledger| ledger.standing(agent.as_str()).is_some_and(same)).then(|| first.clone())
    }

    /// An entry of a shard has become durable.
    pub fn durable(&mut self, shard: u32, position: u64, bytes: &Bytes, processes: &[Process], now_ms: u64) {
        let entry = match Entry::decode(bytes.clone()) {
            Ok(entry) => entry,
            Err(e) => return self.verdict.fail("replay halts nowhere", || format!("entry {position}: {e}")),
        };
        grammar::whole(position, &entry, &mut self.verdict);
        self.shards[shard as usize].ledger.apply(position, &entry, &mut self.verdict);
        for record in entry.records.iter().filter_map(|r| r.record.as_ref()) {
            self.tool(record);
            if let Record::Deny(r) = record {
                self.refused_for_money(r);
            }
            if let Record::Reserve(r) = record {
                let account = r.calls.first().and_then(|c| c.windows.first()).map(|w| w.account.clone());
                account.into_iter().for_each(|account| self.reserved(&account));
                self.escrow.seen.calls += r.calls.iter().filter(|c| c.windows.iter().any(|w| w.shared)).count() as u64;
            }
            if self.shards.len() > 1 {
                self.shared(shard, record);
            }
        }
        truth::entry(position, &entry, self, processes, now_ms);
        self.shards[shard as usize].fold.push(entry);
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

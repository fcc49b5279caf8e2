//! Who waits for a slot of one agent, and that nobody starves: within a tier and tenant nobody is overtaken, and no tier is
//! passed over more often than the bound. Looks only at calls that never had a slot and never stopped waiting: of others the
//! keeper knows more.

use super::Verdict;
use atp_core::agent::queue::Wish;
use atp_proto::{CallId, Qos};
use std::collections::{BTreeMap, BTreeSet};

/// A wish that isn't repeated for this long is no more.
const WISH_MS: u64 = 5_000;
/// A tier that waits is next after so many slots went to others.
const PASSED_MAX: u32 = 24;

#[derive(Debug)]
struct Waiting {
    no: u64,
    /// Shard and epoch of who wants it.
    of: (u32, u64),
    wish: Wish,
    until: u64,
}

#[derive(Debug, Default)]
pub struct Queue {
    last_no: u64,
    /// Calls that had a slot, were dispatched or have ended.
    known: BTreeSet<CallId>,
    waiting: BTreeMap<CallId, Waiting>,
    passed: BTreeMap<Qos, u32>,
}

impl Queue {
    /// A shard says that it wants a slot, for the first time or again.
    pub fn wants(&mut self, call: CallId, of: (u32, u64), wish: &Wish, now_ms: u64) {
        let until = now_ms + wish.lasts_ms.min(WISH_MS);
        self.lapse(now_ms);
        if let Some(waiting) = self.waiting.get_mut(&call) {
            waiting.until = until;
        } else if !self.known.contains(&call) {
            self.last_no += 1;
            self.waiting.insert(call, Waiting { no: self.last_no, of, wish: wish.clone(), until });
        }
    }

    /// Whether a wish that lapsed and comes again keeps its place depends on when the keeper looked.
    fn lapse(&mut self, now_ms: u64) {
        let known = &mut self.known;
        self.waiting.retain(|call, w| {
            let waits = now_ms < w.until;
            if !waits {
                known.insert(*call);
            }
            waits
        });
    }

    /// A higher epoch was seen: what a former owner wanted is no more.
    pub fn fence(&mut self, shard: u32, epoch: u64) {
        self.waiting.retain(|_, w| w.of.0 != shard || w.of.1 >= epoch);
    }

    pub fn gives_back(&mut self, call: &CallId) {
        self.waiting.remove(call);
    }

    /// From now on the keeper knows more of this call than can be told from outside.
    pub fn knows(&mut self, call: CallId) {
        self.waiting.remove(&call);
        self.known.insert(call);
    }

    /// A slot is lent that wasn't before.
    pub fn lent(&mut self, call: CallId, now_ms: u64, verdict: &mut Verdict) {
        let served = self.waiting.remove(&call);
        self.known.insert(call);
        self.lapse(now_ms);
        let Some(Waiting { no, wish, .. }) = served else { return };
        let mut tiers = BTreeSet::new();
        for (other, w) in &self.waiting {
            let same = (w.wish.qos, &w.wish.tenant) == (wish.qos, &wish.tenant);
            verdict.expect(!same || w.no > no, "first come, first served", || {
                format!("{call} got a slot before {other} of the same tier and tenant, which waits longer")
            });
            tiers.insert(w.wish.qos);
        }
        tiers.remove(&wish.qos);
        self.passed.retain(|tier, _| tiers.contains(tier));
        for tier in tiers {
            let passed = self.passed.entry(tier).or_default();
            *passed += 1;
            verdict.expect(*passed <= PASSED_MAX, "no tier starves", || {
                format!("{passed} slots went to others while {tier:?} waited; the last one to {call}")
            });
        }
    }
}

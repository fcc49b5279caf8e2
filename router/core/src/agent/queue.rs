//! Who waits for a slot of one agent, and whose turn it is: weighted deficit round robin over the tiers with a reserved
//! minimum for gold and a bound on how often a lower tier is passed over; tenants share a tier by their weights; first come,
//! first served within a tenant (ATP-9-1, ATP-9-2). Work-conserving: while anybody waits, somebody is next. It lends nothing.

use atp_proto::{Amount, CallId, Qos};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Slots of a round: gold, silver, bronze.
pub const QUANTA: [u32; 3] = [8, 4, 1];
/// A tier that waits is next after so many slots went to others.
pub const PASSED_MAX: u32 = 24;
/// While gold waits and has less than this part of the agent's window, the next slot is gold's.
pub const GOLD_RESERVED: u32 = 4;

/// What a call that waits for a slot says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Wish {
    pub qos: Qos,
    pub tenant: Arc<str>,
    /// The tenant's share of its tier, at least 1.
    pub weight: u32,
    /// What the call is expected to hold.
    pub amount: Amount,
    /// Milliseconds for which the slot is of use; later ones go to the next in turn.
    pub lasts_ms: u64,
}

#[derive(Default)]
struct Tenant {
    calls: BTreeMap<u64, CallId>,
    weight: u32,
    /// Slots that it has left in its turn.
    credit: u32,
}

#[derive(Default)]
struct Tier {
    tenants: BTreeMap<Arc<str>, Tenant>,
    turns: VecDeque<Arc<str>>,
    credit: u32,
    passed: u32,
}

/// All calls that wait for this agent.
#[derive(Default)]
pub struct Queue {
    tiers: [Tier; 3],
    places: BTreeMap<CallId, (u64, Wish)>,
    next_no: u64,
}

const fn index(qos: Qos) -> usize {
    match qos {
        Qos::Gold => 0,
        Qos::Silver => 1,
        Qos::Bronze => 2,
    }
}

impl Queue {
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// A call begins to wait. One that waits already keeps its place.
    pub fn push(&mut self, call: CallId, wish: Wish) {
        if let Some((_, old)) = self.places.get_mut(&call) {
            if (old.qos, &old.tenant) == (wish.qos, &wish.tenant) {
                old.amount = wish.amount;
                return;
            }
            self.remove(&call);
        }
        self.next_no += 1;
        let tier = &mut self.tiers[index(wish.qos)];
        if !tier.tenants.contains_key(&wish.tenant) {
            tier.turns.push_back(wish.tenant.clone());
        }
        let tenant = tier.tenants.entry(wish.tenant.clone()).or_default();
        tenant.weight = wish.weight.max(1);
        tenant.calls.insert(self.next_no, call);
        self.places.insert(call, (self.next_no, wish));
    }

    /// A call no longer waits. Its going counts for nobody's share.
    pub fn remove(&mut self, call: &CallId) -> Option<Wish> {
        let (no, wish) = self.places.remove(call)?;
        let tier = &mut self.tiers[index(wish.qos)];
        if let Some(tenant) = tier.tenants.get_mut(&wish.tenant) {
            tenant.calls.remove(&no);
            if tenant.calls.is_empty() {
                tier.tenants.remove(&wish.tenant);
                tier.turns.retain(|t| *t != wish.tenant);
            }
        }
        if tier.tenants.is_empty() {
            tier.passed = 0;
        }
        Some(wish)
    }

    /// Whose turn it is, and its wish, if `gold_used` of the agent's `window` slots are gold's. Asking changes nobody's
    /// turn.
    #[must_use]
    pub fn next(&self, gold_used: u32, window: u32) -> Option<(CallId, &Wish)> {
        let waiting = |t: &usize| !self.tiers[*t].tenants.is_empty();
        let starved = (0..3).filter(waiting).filter(|t| self.tiers[*t].passed >= PASSED_MAX);
        let reserved = Some(0).filter(waiting).filter(|_| gold_used < window / GOLD_RESERVED);
        let in_round = (0..3).filter(waiting).find(|t| self.tiers[*t].credit > 0);
        let tier = starved.max_by_key(|t| self.tiers[*t].passed).or(reserved).or(in_round);
        let tier = tier.or_else(|| (0..3).find(waiting))?;
        self.first(tier)
    }

    /// The first of gold, for a policy that lets only gold through.
    #[must_use]
    pub fn next_gold(&self) -> Option<(CallId, &Wish)> {
        self.first(0)
    }

    fn first(&self, tier: usize) -> Option<(CallId, &Wish)> {
        let tier = &self.tiers[tier];
        let (_, call) = tier.tenants.get(tier.turns.front()?)?.calls.first_key_value()?;
        let (_, wish) = self.places.get(call)?;
        Some((*call, wish))
    }

    /// A slot goes to this call, which was next.
    pub fn take(&mut self, call: &CallId) -> Option<Wish> {
        let (_, wish) = self.places.get(call)?;
        let (at, name) = (index(wish.qos), wish.tenant.clone());
        if self.tiers.iter().all(|t| t.credit == 0 || t.tenants.is_empty()) {
            // The next round begins.
            for (tier, quantum) in self.tiers.iter_mut().zip(QUANTA) {
                tier.credit = quantum;
            }
        }
        for (other, tier) in self.tiers.iter_mut().enumerate() {
            tier.passed = if other == at || tier.tenants.is_empty() { 0 } else { tier.passed + 1 };
        }
        let tier = &mut self.tiers[at];
        // One that was passed over too often, or reserved gold, may be ahead of its share.
        tier.credit = tier.credit.saturating_sub(1);
        if let Some(tenant) = tier.tenants.get_mut(&name) {
            if tenant.credit == 0 {
                tenant.credit = tenant.weight;
            }
            tenant.credit -= 1;
            if tenant.credit == 0 {
                tier.turns.retain(|t| *t != name);
                tier.turns.push_back(name);
            }
        }
        self.remove(call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn call(n: u32) -> CallId {
        let mut id = [0; 10];
        id[..4].copy_from_slice(&n.to_be_bytes());
        CallId(id)
    }

    fn wish(qos: Qos, tenant: &str, weight: u32) -> Wish {
        Wish { qos, tenant: tenant.into(), weight, amount: Amount::ZERO, lasts_ms: u64::MAX }
    }

    const ALL: [Qos; 3] = [Qos::Gold, Qos::Silver, Qos::Bronze];

    /// Serves `n` slots and returns who got them.
    fn serve(queue: &mut Queue, n: usize) -> Vec<Wish> {
        (0..n)
            .filter_map(|_| {
                let (call, _) = queue.next(0, 0)?;
                queue.take(&call)
            })
            .collect()
    }

    fn letters(served: &[Wish]) -> String {
        served.iter().map(|w| &w.qos.as_str()[..1]).collect()
    }

    #[test]
    fn a_round_is_eight_gold_four_silver_one_bronze() {
        let mut queue = Queue::default();
        for n in 0..60 {
            queue.push(call(n), wish(ALL[n as usize % 3], "t", 1));
        }
        assert_eq!(letters(&serve(&mut queue, 26)), "ggggggggssssbggggggggssssb");
        // Gold is used up: the others share what is there.
        assert_eq!(letters(&serve(&mut queue, 15)), "ggggssssbssssbs");
    }

    #[test]
    fn gold_that_comes_late_is_next() {
        let mut queue = Queue::default();
        (0..10).for_each(|n| queue.push(call(n), wish(Qos::Bronze, "t", 1)));
        assert_eq!(letters(&serve(&mut queue, 3)), "bbb");
        queue.push(call(50), wish(Qos::Gold, "t", 1));
        assert_eq!(letters(&serve(&mut queue, 2)), "gb");
    }

    #[test]
    fn gold_has_a_reserved_quarter_of_the_window() {
        let mut queue = Queue::default();
        for n in 0..60 {
            queue.push(call(n), wish(ALL[n as usize % 3], "t", 1));
        }
        serve(&mut queue, 8);
        let next = |gold| queue.next(gold, 8).map(|(_, w)| w.qos);
        assert_eq!((next(1), next(2)), (Some(Qos::Gold), Some(Qos::Silver)), "below 2 of 8 it is gold's");
        assert_eq!(queue.next(0, 3).map(|(_, w)| w.qos), Some(Qos::Silver), "a quarter of 3 is none");
    }

    #[test]
    fn nobody_who_waits_is_passed_over_more_than_24_times() {
        let mut queue = Queue::default();
        queue.push(call(1_000), wish(Qos::Bronze, "t", 1));
        let mut before = 0;
        for n in 0..100 {
            queue.push(call(n), wish(Qos::Gold, "t", 1));
            // Gold never has its reserved part, so that it is always first.
            let (next, _) = queue.next(0, 8).expect("somebody waits");
            if queue.take(&next).is_some_and(|w| w.qos == Qos::Bronze) {
                break;
            }
            before += 1;
        }
        assert_eq!(before, PASSED_MAX);
    }

    #[test]
    fn a_repeated_wish_keeps_its_place_and_a_withdrawn_one_loses_it() {
        let mut queue = Queue::default();
        (0..4).for_each(|n| queue.push(call(n), wish(Qos::Silver, "t", 1)));
        queue.push(call(0), Wish { amount: Amount::new(5, 5), ..wish(Qos::Silver, "t", 1) });
        queue.remove(&call(1));
        queue.push(call(1), wish(Qos::Silver, "t", 1));
        let mut order = Vec::new();
        while let Some((next, _)) = queue.next(0, 0) {
            order.push((next, queue.take(&next).map(|w| w.amount.tokens.0)));
        }
        let want = [(0, 5), (2, 0), (3, 0), (1, 0)].map(|(n, tokens)| (call(n), Some(tokens)));
        assert_eq!(order, want);
        assert!(queue.is_empty() && queue.remove(&call(0)).is_none());
    }

    #[test]
    fn tenants_take_turns_by_weight() {
        let mut queue = Queue::default();
        for n in 0..30 {
            queue.push(call(n), wish(Qos::Silver, ["a", "b"][n as usize % 2], [1, 3][n as usize % 2]));
        }
        let names: String = serve(&mut queue, 9).iter().map(|w| w.tenant.to_string()).collect();
        assert_eq!(names, "abbbabbba");
    }

    proptest! {
        /// While all tiers wait, each has its share of the slots within one quantum.
        #[test]
        fn tiers_have_their_shares_within_one_quantum(slots in 1_usize..400) {
            let mut queue = Queue::default();
            for n in 0..1_500 {
                queue.push(call(n), wish(ALL[n as usize % 3], "t", 1));
            }
            let served = serve(&mut queue, slots);
            for (qos, quantum) in ALL.into_iter().zip(QUANTA) {
                let got = served.iter().filter(|w| w.qos == qos).count() as i64 * 13;
                let due = slots as i64 * i64::from(quantum);
                prop_assert!((got - due).abs() <= 13 * i64::from(quantum), "{qos:?} got {got}, due {due}");
            }
        }

        /// While all tenants wait, each has its share of the tier within one quantum.
        #[test]
        fn tenants_have_their_shares_within_one_quantum(
            weights in proptest::collection::vec(1_u32..6, 1..6),
            slots in 1_usize..150,
        ) {
            let mut queue = Queue::default();
            let names = ["a", "b", "c", "d", "e"];
            for n in 0..1_000_u32 {
                let t = n as usize % weights.len();
                queue.push(call(n), wish(Qos::Silver, names[t], weights[t]));
            }
            let served = serve(&mut queue, slots);
            let sum = i64::from(weights.iter().sum::<u32>());
            for (name, weight) in names.iter().zip(&weights) {
                let got = served.iter().filter(|w| *w.tenant == **name).count() as i64 * sum;
                let due = slots as i64 * i64::from(*weight);
                prop_assert!((got - due).abs() <= sum * i64::from(*weight), "{name} got {got}, due {due}");
            }
        }

        /// Whatever comes and goes: somebody is next while anybody waits, and nobody is passed over too often.
        #[test]
        fn work_conserving_and_no_starvation(
            steps in proptest::collection::vec((0_usize..3, 0_usize..3, any::<bool>(), 0_u32..9), 1..600),
        ) {
            let mut queue = Queue::default();
            let mut passed = [0_u32; 3];
            for (n, (tier, tenant, serves, gold_used)) in steps.into_iter().enumerate() {
                if serves {
                    let Some((next, _)) = queue.next(gold_used, 16) else {
                        prop_assert!(queue.is_empty());
                        continue;
                    };
                    let taken = queue.take(&next).expect("it waits");
                    for (t, qos) in ALL.into_iter().enumerate() {
                        let waits = queue.places.values().any(|(_, w)| w.qos == qos);
                        passed[t] = if taken.qos == qos || !waits { 0 } else { passed[t] + 1 };
                        prop_assert!(passed[t] <= PASSED_MAX + 1, "{qos:?}");
                    }
                } else {
                    queue.push(call(n as u32), wish(ALL[tier], ["a", "b", "c"][tenant], 1 + tenant as u32));
                }
            }
        }
    }
}

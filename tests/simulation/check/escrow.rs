//! Money between shards, from the records of both sides alone. What is durable at one shard is held against what is durable at the
//! other at that moment: nothing durable is ever lost, so this stands for every pair of prefixes.

use super::Check;
use super::ledger::{Ledger, Pair, amount, fits, minus, plus};
use crate::simulation::check::Verdict;
use atp_core::escrow::{Escrow, Say};
use atp_core::record::{AmountPb, Late, Record, Share, ShareBack, ShareIn, ShareLate, ShareOut, Shared};
use std::collections::{BTreeMap, BTreeSet};

/// Home, holder, number.
type At = (u32, u32, u64);

/// What the logs of all shards say of shares.
#[derive(Debug, Default)]
pub struct Escrows {
    lent: BTreeMap<At, Shared>,
    taken: BTreeSet<At>,
    out: BTreeMap<At, (AmountPb, AmountPb)>,
    back: BTreeSet<At>,
    pub seen: Seen,
}

/// How often what needs several shards happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub shares: u64,
    pub taken: u64,
    pub back: u64,
    /// Calls on a share.
    pub calls: u64,
    pub lates: u64,
    pub takeovers: u64,
}

impl Seen {
    pub fn add(&mut self, o: &Self) {
        self.shares += o.shares;
        self.taken += o.taken;
        self.back += o.back;
        self.calls += o.calls;
        self.lates += o.lates;
        self.takeovers += o.takeovers;
    }
}

impl Check {
    /// A record is durable at a shard: compared with the other side's.
    pub fn shared(&mut self, shard: u32, record: &Record) {
        let e = &mut self.escrow;
        let wrong = match record {
            Record::Share(r) => {
                e.seen.shares += 1;
                let again = e.lent.insert((shard, r.holder, r.no), r.of.clone()).is_some();
                again.then(|| ("a share has one number", format!("{r:?} of {shard}")))
            }
            Record::ShareIn(r) => {
                e.seen.taken += 1;
                let at = (r.home, shard, r.no);
                let (same, first) = (e.lent.get(&at) == Some(&r.of), e.taken.insert(at));
                (!same || !first)
                    .then(|| ("a ShareIn has its Share", format!("{at:?}: {:?} and {r:?}", e.lent.get(&at))))
            }
            Record::ShareOut(r) => {
                let at = (r.home, shard, r.no);
                let first = e.out.insert(at, (r.settled, r.unused)).is_none();
                (!first || !e.taken.contains(&at)).then(|| ("a share goes out once", format!("{at:?}")))
            }
            Record::ShareBack(r) => {
                let at = (r.home, r.holder, r.no);
                let out = e.out.get(&at) == Some(&(r.settled, r.unused));
                let fits = if r.home == shard { e.back.insert(at) } else { e.back.contains(&at) };
                e.seen.back += u64::from(r.home == shard);
                (!out || !fits)
                    .then(|| ("a ShareBack has its ShareOut, once", format!("{at:?} at shard {shard}: {r:?}")))
            }
            Record::ShareLate(r) => {
                let said = self.shards[r.holder as usize].ledger.lates.get(&r.late.evidence) == Some(&r.late);
                e.seen.lates += u64::from(r.home == shard);
                (!said).then(|| ("a ShareLate has its Adjust", format!("{r:?}")))
            }
            _ => None,
        };
        if let Some((invariant, text)) = wrong {
            self.verdict.fail(invariant, || text);
        }
    }

    /// No share is on its way, and no home lacks an Adjust.
    #[must_use]
    pub fn nothing_between(&self) -> bool {
        let count = |home| self.ledgers().flat_map(|l| l.open_shares.keys()).filter(|(h, _, _)| *h == home).count();
        count(true) == count(false) && self.ledgers().all(|ledger| ledger.lates_open.is_empty())
    }

    /// A shard says something to another: what it claims is durable.
    pub fn to_shard(&mut self, from: u32, to: u32, message: &Escrow) {
        let e = &self.escrow;
        let durable = match &message.say {
            Some(Say::Share(m)) => e.lent.get(&(from, to, m.no)) == Some(&m.of),
            Some(Say::Taken(m)) => e.taken.contains(&(to, from, m.no)),
            Some(Say::Back(m)) => e.out.get(&(to, from, m.no)) == Some(&(m.settled, m.unused)),
            Some(Say::BackTaken(m)) => e.back.contains(&(from, to, m.no)),
            Some(Say::Late(m)) if m.taken => self.ledger(from).counted.contains(&m.late.evidence),
            Some(Say::Late(m)) => self.ledger(from).lates.get(&m.late.evidence) == Some(&m.late),
            Some(Say::Recalled(m)) => {
                m.backs.iter().all(|m| e.out.get(&(to, from, m.no)) == Some(&(m.settled, m.unused)))
            }
            Some(
                Say::Stands(_)
                | Say::Wish(_)
                | Say::Recall(_)
                | Say::Look(_)
                | Say::NoMore(_)
                | Say::Press(_)
                | Say::Below(_),
            ) => true,
            None => false,
        };
        self.verdict
            .expect(durable, "said to another shard => durable", || format!("shard {from} to shard {to}: {message:?}"));
    }
}

impl Ledger {
    fn next_no(&mut self, home: bool, other: u32, no: u64, verdict: &mut Verdict) {
        let last = self.numbers.entry((home, other)).or_default();
        verdict
            .expect(no == *last + 1, "numbers of shares rise by one", || format!("{no} follows {last} with {other}"));
        *last = no;
    }

    pub(super) fn share(&mut self, r: &Share, verdict: &mut Verdict) {
        self.next_no(true, r.holder, r.no, verdict);
        let (at, more) = ((r.of.account.clone(), r.of.window.clone()), amount(&r.of.amount));
        let home = self.is_home(&at.0);
        verdict.expect(home, "only the home lends", || format!("{r:?}"));
        let window = self.windows.entry(at).or_default();
        let sum = plus(plus(plus(window.settled, window.held), window.lent), more);
        let over = (0..2).any(|i| more[i] > 0 && sum[i] > window.limit[i]);
        verdict.expect(!over, "free + lent + settled + held = L", || format!("{r:?} in {window:?}"));
        window.lent = plus(window.lent, more);
        self.open_shares.insert((true, r.holder, r.no), r.of.clone());
    }

    pub(super) fn share_in(&mut self, r: &ShareIn, verdict: &mut Verdict) {
        self.next_no(false, r.home, r.no, verdict);
        let at = (r.of.account.clone(), r.of.window.clone());
        if r.of.current {
            self.current.insert(at.0.clone(), at.1.clone());
        }
        let window = self.windows.entry(at).or_default();
        window.ends_ms = r.of.ends_ms;
        window.limit = plus(window.limit, amount(&r.of.amount));
        self.open_shares.insert((false, r.home, r.no), r.of.clone());
    }

    pub(super) fn share_out(&mut self, r: &ShareOut, verdict: &mut Verdict) {
        let Some(of) = self.open_shares.remove(&(false, r.home, r.no)) else {
            return verdict.fail("a share goes out once", || format!("{r:?} isn't here"));
        };
        let (lent, settled, unused) = (amount(&of.amount), amount(&r.settled), amount(&r.unused));
        let less = |i: usize| (lent[i] - settled[i]).max(0);
        verdict.expect(unused == [less(0), less(1)], "a share comes back whole", || format!("{r:?} of {of:?}"));
        let at = (of.account, of.window);
        let last = !self.open_shares.iter().any(|((home, _, _), s)| !home && s.account == at.0 && s.window == at.1);
        let window = self.windows.entry(at.clone()).or_default();
        verdict.expect(fits(settled, window.settled), "a share comes back whole", || format!("{r:?} of {window:?}"));
        window.limit = minus(window.limit, lent);
        window.settled = minus(window.settled, settled);
        let sum = plus(window.settled, window.held);
        let over = (0..2).any(|i| window.held[i] > 0 && sum[i] > window.limit[i]);
        verdict.expect(!over, "no call is left without its share", || format!("{r:?} leaves {window:?}"));
        verdict
            .expect(!last || sum == [0, 0], "the last share takes all with it", || format!("{r:?} leaves {window:?}"));
    }

    pub(super) fn share_back(&mut self, r: &ShareBack, verdict: &mut Verdict) {
        if r.home != self.no {
            return;
        }
        let Some(of) = self.open_shares.remove(&(true, r.holder, r.no)) else {
            return verdict.fail("a ShareBack has its ShareOut, once", || format!("{r:?} isn't lent"));
        };
        let window = self.windows.entry((of.account, of.window)).or_default();
        window.lent = minus(window.lent, amount(&of.amount));
        window.settled = plus(window.settled, amount(&r.settled));
    }

    pub(super) fn share_late(&mut self, r: &ShareLate, verdict: &mut Verdict) {
        if r.home != self.no {
            self.lates_open.remove(&r.late.evidence);
            return;
        }
        let first = self.counted.insert(r.late.evidence.clone());
        verdict.expect(first, "evidence counts once", || format!("{r:?}"));
        let window = self.windows.entry((r.late.account.clone(), r.late.window.clone())).or_default();
        window.settled = plus(window.settled, minus(amount(&r.late.to), amount(&r.late.from)));
    }

    /// A settled call costs more or less than was booked: its purse counts that, or, where that has been given back, its home.
    pub(super) fn adjusted(&mut self, at: (String, String), evidence: String, from: Pair, to: Pair) {
        let home = self.is_home(&at.0);
        let here = |s: (&(bool, u32, u64), &Shared)| !s.0.0 && s.1.account == at.0 && s.1.window == at.1;
        let purse = self.open_shares.iter().any(here);
        let window = self.windows.entry(at.clone()).or_default();
        if home || (purse && fits(from, window.settled)) {
            window.settled = plus(window.settled, minus(to, from));
            return;
        }
        let pb = |p: Pair| AmountPb {
            tokens: u64::try_from(p[0]).unwrap_or_default(),
            usd_micros: u64::try_from(p[1]).unwrap_or_default(),
        };
        let late = Late { evidence: evidence.clone(), account: at.0, window: at.1, from: pb(from), to: pb(to) };
        self.lates.insert(evidence.clone(), late);
        self.lates_open.insert(evidence);
    }

    #[must_use]
    pub fn is_home(&self, account: &str) -> bool {
        self.placement.home_of(account) == self.no
    }
}

//! All shards of an account together: what they book is what calls cost, what providers bill stays within the limit and the reach,
//! and no more calls run at once than the account may have.

use super::Check;
use super::ledger::{Ledger, Pair, Phase, larger, minus, plus};
use atp_core::record::Deny;
use atp_core::settings::Settings;
use atp_proto::{Code, WireError};
use std::collections::BTreeMap;

/// No call of these schedules needs more.
const DEAREST: Pair = [4_000, 50_000];

/// What an operator has allowed so far.
#[derive(Debug, Default)]
pub struct Balance {
    /// By account, and for all others, the most calls at once that were ever allowed; `None`: no limit.
    parallel: BTreeMap<String, Option<u32>>,
    others: Option<Option<u32>>,
    /// Nothing goes wrong in this schedule.
    pub calm: bool,
    /// Tasks of each tenant that were sent and aren't over.
    pub alive: BTreeMap<String, usize>,
}

fn most(a: Option<u32>, b: Option<u32>) -> Option<u32> {
    Some(a?.max(b?))
}

impl Balance {
    /// These settings count from now on, beside those before them: what runs goes on.
    pub fn settings(&mut self, settings: &Settings) {
        for (tenant, account) in &settings.accounts {
            let before = self.parallel.get(tenant.as_str()).copied().or(self.others);
            let now = before.map_or(account.max_parallel, |before| most(before, account.max_parallel));
            self.parallel.insert(tenant.to_string(), now);
        }
        let now = settings.default_account.max_parallel;
        for (tenant, known) in &mut self.parallel {
            if !settings.accounts.contains_key(&atp_proto::TenantId::new(tenant)) {
                *known = most(*known, now);
            }
        }
        self.others = Some(self.others.map_or(now, |before| most(before, now)));
    }

    fn parallel(&self, account: &str) -> Option<u32> {
        self.parallel.get(account).copied().or(self.others).flatten()
    }
}

impl Check {
    /// Calls were reserved: no more run at once, on all shards, than the account may have.
    pub fn reserved(&mut self, account: &str) {
        let Some(most) = self.balance.parallel(account) else { return };
        let open: u32 = self.ledgers().map(|ledger| ledger.open.get(account).copied().unwrap_or_default()).sum();
        self.verdict.expect(open <= most, "max_parallel of an account, over all shards", || {
            format!("{open} calls of {account} are open, {most} may be")
        });
    }

    /// A task was refused: no false word about money, which may lie idle at other shards. Looks only at the only task of an account
    /// in a schedule without faults; of several each may have taken it from the others.
    pub fn refused_for_money(&mut self, r: &Deny) {
        let tenant = &r.key.tenant;
        let alone = self.balance.calm && self.balance.alive.get(tenant) == Some(&1);
        let Ok(error) = serde_json::from_slice::<WireError>(&r.error) else { return };
        let scope = error.scope.as_deref().unwrap_or_default();
        if !alone || !matches!(error.code, Code::Budget | Code::Window) || scope != format!("tenant:{tenant}") {
            return;
        }
        let open: u32 = self.ledgers().map(|ledger| ledger.open.get(tenant).copied().unwrap_or_default()).sum();
        let home = &self.shards[self.placement.home_of(tenant) as usize].ledger;
        let Some(window) = home.current.get(tenant).map(|id| (tenant.clone(), id.clone())) else { return };
        let limit = home.windows.get(&window).map_or([0, 0], |w| w.limit);
        let spent =
            self.shards.iter().flat_map(|of| of.ledger.calls_in(&window)).fold([0, 0], |sum, c| plus(sum, c.actual));
        let left = minus(limit, spent);
        self.verdict.expect(
            open > 0 || larger(left, DEAREST) != left,
            "no refusal while the account has the money",
            || format!("{} was refused with {}, {left:?} is left of {window:?}", r.key.stream, error.code),
        );
    }

    /// All is over: every share is back or idle, and the sums are those of the calls.
    pub fn balances(&mut self) {
        let mut lent = BTreeMap::new();
        let mut held = BTreeMap::new();
        for ledger in self.shards.iter().map(|of| &of.ledger) {
            for ((home, other, no), shared) in &ledger.open_shares {
                let (side, at) =
                    if *home { (&mut lent, (ledger.no, *other, *no)) } else { (&mut held, (*other, ledger.no, *no)) };
                side.insert(at, shared.clone());
            }
            let untold = ledger.lates_open.iter().next();
            self.verdict.expect(untold.is_none(), "after healing homes know every Adjust", || format!("{untold:?}"));
        }
        self.verdict.expect(lent == held, "after healing every share is back or idle", || {
            format!("lent {lent:?}, held {held:?}")
        });
        let windows: std::collections::BTreeSet<(String, String)> =
            self.shards.iter().flat_map(|of| of.ledger.windows.keys().cloned()).collect();
        for at in windows {
            self.balance_of(&at);
        }
    }

    fn balance_of(&mut self, at: &(String, String)) {
        let calls = || self.shards.iter().flat_map(|of| of.ledger.calls_in(at));
        let actual = calls().filter(|c| c.phase == Phase::Settled).fold([0, 0], |sum, c| plus(sum, c.actual));
        let known = |ledger: &Ledger| ledger.windows.get(at).map_or([0, 0], |w| w.settled);
        let booked = self.shards.iter().fold([0, 0], |sum, of| plus(sum, known(&of.ledger)));
        self.verdict.expect(booked == actual, "all shards together book what calls cost", || {
            format!("{at:?}: the calls cost {actual:?}, {booked:?} is booked")
        });
        let home = self.placement.home_of(&at.0);
        let limit = self.shards[home as usize].ledger.windows.get(at).map_or([0, 0], |w| w.limit_max);
        // What is beyond a call's hold is within its reach, or was announced as a breach: `truth` looks at each.
        let within = |c: &super::ledger::Call| -> Pair {
            let billed = self.provider.calls.get(&c.id).map_or([0, 0], |known| super::truth::true_pair(known.billed));
            [billed[0].min(c.hold[0]), billed[1].min(c.hold[1])]
        };
        let billed = calls().fold([0, 0], |sum, c| plus(sum, within(c)));
        self.verdict.expect(larger(billed, limit) == limit, "P <= L + K x reach over all shards", || {
            format!("{at:?}: providers billed {billed:?} within holds, the limit is {limit:?}")
        });
    }
}

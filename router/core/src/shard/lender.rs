//! An account's home: lends shares of its windows to shards that wish for them, wants idle ones back when it runs short, and takes
//! what comes back. A share that isn't back counts as held: no time-out frees it.

use super::{Shard, Timer};
use crate::account::AccountWindow;
use crate::escrow::{Back, LateSaid, Number, Numbered, Say, Stands, Wanted, Wish};
use crate::message::LogRoom;
use crate::record::{AmountPb, Late, Record, Share, ShareBack, ShareLate, Shared};
use atp_proto::Amount;
use std::collections::BTreeSet;

/// A wish that isn't repeated for so long is forgotten, in milliseconds.
const WISH_MS: u64 = 3_000;
/// Holders have so long to give back what is idle.
const RECALL_MS: u64 = 500;
/// What idle shares were asked for holds for this long.
const RECALLED_MS: u64 = 250;
/// Idle shares are wanted back no sooner again for those who can begin and only look for more: who holds them may need them.
const MORE_MS: u64 = 5_000;
/// Beside what is needed a holder gets at most so many times as much, and at most this part of what its shards could share.
const SPARE_TIMES: u64 = 16;
const SPARE_PART: u64 = 4;

/// What a holder wishes for.
pub(super) struct Wished {
    wish: Wish,
    /// Since when, in logged time.
    since: u64,
    /// When it was last said.
    at: u64,
    answered: bool,
}

/// Idle shares of an account are wanted back.
#[derive(Default)]
pub(super) struct Recall {
    at: u64,
    /// For a running call.
    running: bool,
    /// Holders that haven't answered.
    waits_for: BTreeSet<u32>,
    done_at: Option<u64>,
}

/// A slice helps, however small.
pub(super) fn a_bit(need: Amount) -> Amount {
    Amount::new(need.tokens.0.min(1), need.usd_micros.0.min(1))
}

impl Shard {
    pub(super) fn has_lent(&self, account: &str) -> bool {
        self.state.accounts.get(account).is_some_and(|a| !a.lent_to.is_empty())
    }

    /// Calls of the account that other shards may run at once.
    pub(super) fn calls_lent(&self, account: &str) -> u32 {
        let to = self.state.accounts.get(account).map(|a| a.lent_to.values());
        to.into_iter().flatten().fold(0, |sum, to| sum.saturating_add(to.calls))
    }

    /// What wishes for new calls have a claim on before a task of this tier and age.
    pub(super) fn wishes_before(&self, account: &str, qos: u32, since: u64) -> Amount {
        let alive = self.wishes_for(account).map(|(_, w)| w);
        let before = alive.filter(|w| w.wish.window.is_empty() && (w.wish.qos, w.since) < (qos, since));
        before.fold(Amount::ZERO, |sum, w| sum.add(w.wish.least.into()).unwrap_or(sum))
    }

    /// What holders wish for, as far as it isn't forgotten.
    pub(super) fn wishes_for(&self, account: &str) -> impl Iterator<Item = (&(u32, String), &Wished)> {
        let wishes = self.escrows.wishes.get(account).into_iter().flatten();
        wishes.filter(|(_, w)| self.now_ms < w.at + WISH_MS)
    }

    pub(super) fn wished(&mut self, holder: u32, wish: Wish) {
        if !self.is_home(&wish.account) {
            return;
        }
        let (now, logged, account) = (self.now_ms, self.clock.logged_ms(), wish.account.clone());
        if !wish.window.is_empty() && wish.need == AmountPb::default() {
            let wishes = self.escrows.wishes.get_mut(&account);
            if wishes.is_some_and(|wishes| wishes.remove(&(holder, wish.window)).is_some()) {
                self.money_returned(&account);
            }
            return;
        }
        if self.says_again(holder, &account, wish.last) {
            return;
        }
        let wishes = self.escrows.wishes.entry(account.clone()).or_default();
        let since = wishes.get(&(holder, wish.window.clone())).map_or(logged, |w| w.since);
        wishes.insert((holder, wish.window.clone()), Wished { wish, since, at: now, answered: false });
        self.serve(&account);
    }

    /// Says again the shares after `last` that a holder hasn't confirmed. True where there are some: it asks again if they aren't
    /// enough. Else a share that got lost would be lent again and again.
    pub(super) fn says_again(&mut self, holder: u32, account: &str, last: u64) -> bool {
        self.escrows.unsaid.retain(|(h, no)| *h != holder || *no > last);
        let open = self.state.lent().get(&holder).map(|line| &line.open);
        let unsaid = self.escrows.unsaid.range((holder, 0)..=(holder, u64::MAX));
        let of = unsaid.filter_map(|(_, no)| Some((*no, open?.get(no)?.clone())));
        let on_its_way: Vec<(u64, Shared)> = of.filter(|(_, of)| of.account == account).collect();
        let any = !on_its_way.is_empty();
        on_its_way.into_iter().for_each(|(no, of)| self.say(holder, Say::Share(Numbered { no, of })));
        any
    }

    /// Gives holders what they wish for, as far as there is money: running calls first, then by tier and age.
    pub(super) fn serve(&mut self, account: &str) {
        let now = self.now_ms;
        let Some(wishes) = self.escrows.wishes.get_mut(account) else { return };
        wishes.retain(|_, w| now < w.at + WISH_MS);
        // Who is asked what it can do without says whether it still waits; only running calls are sure to.
        let asked = self.escrows.recalls.get(account).filter(|recall| recall.done_at.is_none());
        let waits = |at: &(u32, String)| !at.1.is_empty() || asked.is_none_or(|r| !r.waits_for.contains(&at.0));
        let waiting = wishes.iter().filter(|(at, _)| waits(at));
        let mut order: Vec<(bool, u32, u64, (u32, String))> =
            waiting.map(|(at, w)| (at.1.is_empty(), w.wish.qos, w.since, at.clone())).collect();
        order.sort_unstable();
        let mut ahead = Amount::ZERO;
        for (_, _, _, at) in order {
            let Some(wished) = self.escrows.wishes.get(account).and_then(|w| w.get(&at)) else { continue };
            let wish = wished.wish.clone();
            let given = match self.room == LogRoom::Enough {
                true => self.lend(at.0, &wish, ahead),
                false => None,
            };
            // Running calls of another window take nothing from new ones, and those of this one let none begin.
            if given.is_none() && wish.window.is_empty() {
                ahead = ahead.add(wish.least.into()).unwrap_or(ahead);
            }
            if given.is_none() && self.recall(account, Some(at.0), false) {
                continue;
            }
            let Some(wishes) = self.escrows.wishes.get_mut(account) else { return };
            let rest = Amount::from(wish.need).less(given.unwrap_or_default());
            let answered = match wishes.get_mut(&at) {
                // What a slice lacks comes before what is new, as it comes back.
                Some(wished) if given.is_some() && !wish.window.is_empty() && !rest.is_zero() => {
                    (wished.wish.need, wished.wish.least, wished.answered) = (rest.into(), a_bit(rest).into(), true);
                    false
                }
                Some(_) if given.is_some() => wishes.remove(&at).is_none(),
                Some(wished) => std::mem::replace(&mut wished.answered, true),
                None => true,
            };
            if !answered {
                let stands = self.stands_now(account, at.0, given.is_some());
                self.say(at.0, Say::Stands(stands));
            }
        }
        if self.escrows.wishes.get(account).is_some_and(std::collections::BTreeMap::is_empty) {
            self.escrows.wishes.remove(account);
        }
    }

    /// Lends what a wish needs and, where there is plenty, some to spare: as a share of its own, that comes back unspent. Returns
    /// what of the need it has met.
    fn lend(&mut self, holder: u32, wish: &Wish, ahead: Amount) -> Option<Amount> {
        let account = wish.account.as_str();
        let (need, least) = (Amount::from(wish.need), Amount::from(wish.least));
        let fresh = wish.window.is_empty();
        let waits = match fresh {
            true => self.runs_short(account) || self.is_held_back(account),
            false => self.books.get(account).is_some_and(|b| b.starves(&wish.window, None)),
        };
        if waits {
            return None;
        }
        let (window, id) = if fresh {
            self.fresh_window(account)
        } else {
            let known = self.state.accounts.get(account).and_then(|a| a.windows.get(&wish.window));
            (known.cloned()?, wish.window.clone())
        };
        let mut free = window.level().free();
        if fresh {
            let book = self.books.get(account);
            let wishes = self.escrows.wishes.get(account);
            let since = wishes.and_then(|w| w.get(&(holder, String::new()))).map_or(u64::MAX, |w| w.since);
            let claims = book.map_or(Amount::ZERO, |book| self.claims_before(book, wish.qos, since, &id));
            free = free.less(claims).less(ahead);
        }
        if !least.fits(free) {
            return None;
        }
        let most = self.account_settings(account).max_parallel;
        let room = self.calls_room(account).filter(|_| fresh);
        if room == Some(0) && wish.calls > 0 {
            return None;
        }
        let given = need.min(free).max(least);
        // What running calls need lets no other begin.
        let calls = most.map(|_| room.map_or(0, |room| wish.calls.min(room)));
        self.lend_share(holder, account, &id, &window, given, calls);
        let part = SPARE_PART * u64::from(self.settings.placement.shards());
        let spare = |given: u64, free: u64| (given.saturating_mul(SPARE_TIMES)).min((free - given) / part);
        let spare = Amount::new(spare(given.tokens.0, free.tokens.0), spare(given.usd_micros.0, free.usd_micros.0));
        // Who runs on comes back for the next slices; in a window that is over nothing else begins.
        let (worth, calls) = if fresh {
            let rest = room.zip(calls).map(|(room, calls)| u64::from(room - calls) / part);
            (least, rest.map(|rest| u32::try_from(rest).unwrap_or(u32::MAX)))
        } else {
            (given, most.map(|_| 0))
        };
        let goes_on = if fresh { calls != Some(0) } else { self.is_current(account, &id) };
        if goes_on && worth.fits(spare) {
            self.lend_share(holder, account, &id, &window, spare, calls);
        }
        Some(given)
    }

    /// The account's window for new calls, begun if it has to be.
    pub(super) fn fresh_window(&mut self, account: &str) -> (AccountWindow, String) {
        let (window, at, record) = self.window_now(account);
        if let Some(record) = record {
            self.record(Record::Window(record));
            self.roll_timer(account);
        }
        (window, at.window)
    }

    fn is_current(&self, account: &str, window: &str) -> bool {
        self.state.accounts.get(account).is_some_and(|a| a.current == window)
    }

    pub(super) fn lend_share(
        &mut self,
        holder: u32,
        account: &str,
        id: &str,
        window: &AccountWindow,
        amount: Amount,
        calls: Option<u32>,
    ) {
        let of = Shared {
            account: account.into(),
            window: id.into(),
            ends_ms: window.ends_ms,
            per: self.account_settings(account).per.as_str().into(),
            current: self.is_current(account, id),
            amount: amount.into(),
            calls,
        };
        let no = self.state.lent().get(&holder).map_or(0, |line| line.last) + 1;
        self.record(Record::Share(Share { holder, no, of: of.clone() }));
        self.escrows.unsaid.insert((holder, no));
        self.say(holder, Say::Share(Numbered { no, of }));
        self.say_again_later();
        self.account_metric(account);
    }

    /// How the account stands, for a holder to decide with.
    fn stands_now(&self, account: &str, holder: u32, given: bool) -> Stands {
        let (window, ..) = self.window_now(account);
        let held_back = self.pace(account).filter(|_| self.is_held_back(account));
        Stands {
            account: account.into(),
            limit: window.limit,
            settled: window.settled,
            held: window.held,
            lent: window.lent,
            ends_ms: window.ends_ms,
            given,
            running: self.runs_short_but(account, holder),
            resumes_ms: held_back.map_or(0, |(_, pace)| pace.resumes_ms(self.clock.logged_ms())),
        }
    }

    // ---- idle shares ------------------------------------------------------------------------------------------------

    /// Wants idle shares back from all who hold some, but `but`. True while they may still come. `more`: for those who can begin and
    /// only look for more.
    pub(super) fn recall(&mut self, account: &str, but: Option<u32>, more: bool) -> bool {
        let (now, running) = (self.now_ms, self.runs_short(account));
        // What was asked for new calls is asked again, and with more weight, for a running one.
        if let Some(recall) = self.escrows.recalls.get(account).filter(|recall| recall.running || !running) {
            match recall.done_at {
                None if now < recall.at + RECALL_MS => return true,
                Some(done) if now < done + RECALLED_MS => return false,
                Some(_) | None => {}
            }
        }
        let holders = self.state.accounts.get(account).map(|a| a.lent_to.keys().copied());
        let waits_for: BTreeSet<u32> = holders.into_iter().flatten().filter(|h| Some(*h) != but).collect();
        let book = self.books.entry(account.into()).or_default();
        if waits_for.is_empty() || more && now < book.more_at {
            return false;
        }
        if more {
            book.more_at = now + MORE_MS;
        }
        for holder in &waits_for {
            let running = self.runs_short_but(account, *holder);
            self.say(*holder, Say::Recall(Wanted { account: account.into(), running }));
        }
        self.escrows.recalls.insert(account.into(), Recall { at: now, running, waits_for, done_at: None });
        self.timer(now + RECALL_MS, Timer::Sought(account.into()));
        true
    }

    /// A holder has given back what was idle.
    pub(super) fn has_recalled(&mut self, holder: u32, account: &str) {
        let Some(recall) = self.escrows.recalls.get_mut(account) else { return };
        recall.waits_for.remove(&holder);
        if recall.waits_for.is_empty() && recall.done_at.is_none() {
            recall.done_at = Some(self.now_ms);
            self.recalled_all(account);
        }
    }

    /// Who hasn't answered by now isn't waited for.
    pub(super) fn recall_ends(&mut self, account: &str) {
        let now = self.now_ms;
        match self.escrows.recalls.get_mut(account) {
            Some(recall) if recall.done_at.is_none() && now >= recall.at + RECALL_MS => {
                recall.done_at = Some(now);
                self.recalled_all(account);
            }
            Some(recall) if recall.done_at.is_some_and(|at| now >= at + RECALLED_MS) => {
                self.escrows.recalls.remove(account);
            }
            Some(_) | None => {}
        }
    }

    fn recalled_all(&mut self, account: &str) {
        self.answered(account);
        self.found(account);
        self.looked_all(account);
    }

    /// A share comes back: once for each number.
    pub(super) fn share_is_back(&mut self, holder: u32, back: Back) {
        let Back { no, settled, unused } = back;
        let Some(lent) = self.state.lent().get(&holder).filter(|line| no <= line.last) else { return };
        if let Some(of) = lent.open.get(&no) {
            // The share of that number is another one: this owner was replaced and doesn't know it yet.
            if Amount::from(unused) != Amount::from(of.amount).less(settled.into()) {
                return;
            }
            let account = of.account.clone();
            let home = self.settings.shard;
            self.record(Record::ShareBack(ShareBack { home, holder, no, settled, unused }));
            self.escrows.unsaid.remove(&(holder, no));
            self.say(holder, Say::BackTaken(Number { no }));
            self.money_returned(&account);
            self.account_metric(&account);
        } else {
            self.say(holder, Say::BackTaken(Number { no }));
        }
    }

    /// A call of a holder cost more or less than its share gave back.
    pub(super) fn late(&mut self, holder: u32, late: Late) {
        if !self.is_home(&late.account) {
            return;
        }
        let window = self.state.accounts.get(&late.account).and_then(|a| a.windows.get(&late.window));
        if let Some(window) = window.filter(|w| !w.late.contains(&late.evidence)) {
            // What it replaces may stand in a share that isn't back yet.
            if !Amount::from(late.from).fits(window.settled.into()) {
                return;
            }
            let account = late.account.clone();
            let home = self.settings.shard;
            self.record(Record::ShareLate(ShareLate { home, holder, late: late.clone() }));
            self.say(holder, Say::Late(LateSaid { late, taken: true }));
            self.money_returned(&account);
            return;
        }
        self.say(holder, Say::Late(LateSaid { late, taken: true }));
    }
}

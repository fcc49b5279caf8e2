//! A shard that spends for an account whose home is elsewhere: it wishes for shares, spends only what it holds, and gives back what
//! is idle. Shares of one window are one purse.

use super::book::{Place, sum};
use super::escrow::AGAIN_MAX;
use super::lender::a_bit;
use super::{Shard, Timer};
use crate::account::AccountWindow;
use crate::escrow::{Back, LateSaid, Number, Recalled, Say, Stands, Wish};
use crate::message::LogRoom;
use crate::record::{AmountPb, Late, LimitPb, Record, ShareBack, ShareIn, ShareLate, ShareOut, Shared, WindowRef};
use crate::state::Out;
use atp_proto::{Amount, Tokens, UsdMicros};

/// Shares that nobody uses for so long go back, in milliseconds.
const IDLE_MS: u64 = 10_000;
/// Who asked for a share has so long to use it.
const KEPT_MS: u64 = 250;
/// A recall holds for this long: what falls idle meanwhile goes back too.
const RECALL_MS: u64 = 2_000;
/// So long a running call of another shard goes before new ones here; while it waits it asks once a second, or two if an answer got
/// lost.
const STANDS_BACK_MS: u64 = 2_500;
/// Waiting tasks, or running calls, that a wish speaks for.
const WAITING_MAX: usize = 256;

/// What the home last said of an account.
pub(super) struct Told {
    stands: Stands,
}

impl Shard {
    /// The purse of an account for new calls: its shares of the newest window, while that lasts.
    pub(super) fn purse_now(&self, account: &str) -> (AccountWindow, WindowRef) {
        let current = self.state.accounts.get(account).map_or("", |a| a.current.as_str());
        let purse = self.purse(account).map(|w| (w.limit, w.ends_ms, w.settled, w.held));
        let none = LimitPb { tokens: Some(0), usd_micros: Some(0) };
        let (limit, ends_ms, settled, held) = purse.unwrap_or((none, None, AmountPb::default(), AmountPb::default()));
        let at = WindowRef { account: account.into(), window: current.into(), shared: true };
        (AccountWindow { limit, ends_ms, settled, held, ..AccountWindow::default() }, at)
    }

    /// True where calls of the account can be reserved: at its home, elsewhere with a share.
    pub(super) fn has_window(&self, account: &str) -> bool {
        self.is_home(account) || self.purse(account).is_some()
    }

    fn purse(&self, account: &str) -> Option<&AccountWindow> {
        let known = self.state.accounts.get(account)?;
        let now = self.clock.logged_ms();
        known.windows.get(&known.current).filter(|w| w.ends_ms.is_none_or(|ends| now < ends))
    }

    /// Calls of an account that may run at once here; `None`: no limit.
    pub(super) fn calls_max(&self, account: &str) -> Option<u32> {
        let most = self.account_settings(account).max_parallel;
        match self.is_home(account) {
            true => most.map(|most| most.saturating_sub(self.calls_lent(account))),
            false => most.and_then(|_| self.purse(account).map_or(Some(0), AccountWindow::calls)),
        }
    }

    /// Calls of an account that may begin here; `None`: no limit.
    pub(super) fn calls_room(&self, account: &str) -> Option<u32> {
        let open = self.books.get(account).map_or(0, |b| u32::try_from(b.open.len()).unwrap_or(u32::MAX));
        self.calls_max(account).map(|most| most.saturating_sub(open))
    }

    /// What the account's limit leaves beside what is settled, as far as it is known here; no end where it isn't.
    pub(super) fn left_elsewhere(&self, account: &str) -> Amount {
        if !self.knows(account) {
            return Amount { tokens: Tokens::MAX, usd_micros: UsdMicros::MAX };
        }
        self.shown_window(account).level().left()
    }

    /// The account's window as errors and clients are told of it: the home's word, or what the settings say. What is spent of
    /// the shares here the home doesn't know yet.
    pub(super) fn shown_window(&self, account: &str) -> AccountWindow {
        if self.is_home(account) {
            return self.window_now(account).0;
        }
        let told = self.escrows.told.get(account).map(|told| &told.stands);
        let limit = told.map_or_else(|| self.account_settings(account).limit.into(), |t| t.limit);
        let (settled, held, lent) = told.map(|t| (t.settled, t.held, t.lent)).unwrap_or_default();
        let spent = self.purse(account).map(|w| Amount::from(w.settled)).unwrap_or_default();
        let settled = Amount::from(settled).add(spent).map_or(settled, Into::into);
        let lent = Amount::from(lent).less(spent).into();
        AccountWindow { limit, settled, held, lent, ends_ms: told.and_then(|t| t.ends_ms), ..AccountWindow::default() }
    }

    /// From when on the account's home lets new calls begin; 0: it does now.
    pub(super) fn home_resumes_ms(&self, account: &str) -> u64 {
        self.escrows.told.get(account).map_or(0, |told| told.stands.resumes_ms)
    }

    /// Tells the home what is needed: for running calls of a window, or for all new ones that wait, the task at this place among
    /// them.
    pub(super) fn wish(&mut self, account: &str, window: &str, place: Place, need: Amount) {
        let wish = match window.is_empty() {
            true => self.wish_for_new(account, place, need),
            false => self.wish_for_running(account, window, need),
        };
        self.say(self.settings.placement.home_of(account), Say::Wish(wish));
    }

    fn wish_for_running(&mut self, account: &str, window: &str, need: Amount) -> Wish {
        let book = self.books.get(account);
        if book.is_some_and(|b| b.starves(window, None)) {
            self.escrows.slices.insert((account.into(), window.into()));
        }
        // All that wait for a slice: asked for one by one, they would wait for each other, and new tasks for them.
        let all = book.map_or(need, |b| need.max(b.starved_of(window, WAITING_MAX)));
        Wish { need: all.into(), least: a_bit(need).into(), ..self.a_wish(account, window) }
    }

    fn wish_for_new(&mut self, account: &str, place: Place, need: Amount) -> Wish {
        // What goes home in the same breath is counted there.
        self.return_wanted(account);
        let mut waiting = self.waiting_for_money(account, WAITING_MAX);
        waiting.insert(place, need);
        let ((qos, _), first) = waiting.first_key_value().map_or((place, need), |(place, need)| (*place, *need));
        // What running calls have a claim on isn't theirs: a share that only covers the claims would go back and come again.
        let short = self.claimed_beside(account);
        let beside = |need: Amount| need.add(short).unwrap_or(need).into();
        let (least, need) = (beside(first), beside(sum(waiting.values())));
        let calls =
            u32::try_from(waiting.len()).unwrap_or(u32::MAX).saturating_sub(self.calls_room(account).unwrap_or(0));
        Wish { least, need, qos, calls, ..self.a_wish(account, "") }
    }

    /// What running calls have a claim on beside what is free here.
    pub(super) fn claimed_beside(&self, account: &str) -> Amount {
        let (purse, at) = self.purse_now(account);
        let claims = self.books.get(account).map_or(Amount::ZERO, |b| b.claimed(&at.window));
        claims.less(purse.level().free())
    }

    fn a_wish(&self, account: &str, window: &str) -> Wish {
        let home = self.settings.placement.home_of(account);
        Wish { account: account.into(), window: window.into(), last: self.newest_of(home), ..Wish::default() }
    }

    /// The newest share of a home that is here.
    pub(super) fn newest_of(&self, home: u32) -> u64 {
        self.state.holding().get(&home).map_or(0, |line| line.last)
    }

    /// Tells the home that no running call waits here any more: new ones of all shards wait for that.
    pub(super) fn no_longer_short(&mut self, account: &str) {
        let starves = |window: &str| self.books.get(account).is_some_and(|b| b.starves(window, None));
        let over = self.escrows.slices.iter().filter(|(a, window)| a == account && !starves(window));
        for of in over.cloned().collect::<Vec<_>>() {
            let wish = self.a_wish(account, &of.1);
            self.say(self.settings.placement.home_of(account), Say::Wish(wish));
            self.escrows.slices.remove(&of);
        }
    }

    /// A share comes: the next number is taken, a known one is answered by what the log has of it.
    pub(super) fn share_comes(&mut self, home: u32, no: u64, of: Shared) {
        let last = self.newest_of(home);
        if no <= last {
            let out = self.state.holding().get(&home).and_then(|line| line.out.get(&no).copied());
            let say = match out {
                Some(out) => Say::Back(Back { no, settled: out.settled, unused: out.unused }),
                None => Say::Taken(Number { no }),
            };
            return self.say(home, say);
        }
        if no != last + 1 || self.settings.placement.home_of(&of.account) != home || self.room == LogRoom::Last {
            return;
        }
        let account = of.account.clone();
        self.granted(&account, &of.window);
        if of.current {
            self.granted(&account, "");
            // Where the home lends, no other call waits.
            self.stand_back(&account, false);
        }
        self.record(Record::ShareIn(ShareIn { home, no, of }));
        self.escrows.came.insert((home, no), self.now_ms);
        self.say(home, Say::Taken(Number { no }));
        self.roll_timer(&account);
        self.idle_later(&account);
        self.found(&account);
        self.look_on(&account, false);
        self.account_metric(&account);
    }

    /// How the account stands at home: the answer to a wish.
    pub(super) fn stands_so(&mut self, home: u32, stands: Stands) {
        let (account, given) = (stands.account.clone(), stands.given);
        if self.settings.placement.home_of(&account) != home {
            return;
        }
        self.stand_back(&account, stands.running);
        self.escrows.told.insert(account.clone(), Told { stands });
        // What was given is known when it is here.
        if !given {
            self.answered(&account);
        }
        self.tell_account_window(&account);
        self.found(&account);
    }

    // ---- giving back ------------------------------------------------------------------------------------------------

    /// The home wants back what is idle; `running`: for a running call.
    pub(super) fn recalled(&mut self, home: u32, account: String, running: bool) {
        if self.settings.placement.home_of(&account) != home {
            return;
        }
        self.escrows.recalled.insert(account.clone(), self.now_ms + RECALL_MS);
        self.stand_back(&account, running);
        self.return_idle(&account, true);
        let out = self.state.holding().get(&home).into_iter().flat_map(|line| &line.out);
        let back = |(no, out): (&u64, &Out)| Back { no: *no, settled: out.settled, unused: out.unused };
        let backs = out.take(AGAIN_MAX).map(back).collect();
        let waits = self.lacks_money(&account);
        self.say(home, Say::Recalled(Recalled { account, backs, waits }));
    }

    fn stand_back(&mut self, account: &str, running: bool) {
        match running {
            true => self.escrows.stands_back.insert(account.into(), self.now_ms + STANDS_BACK_MS),
            false => self.escrows.stands_back.remove(account),
        };
    }

    /// What is idle goes back, if the home wants it or its window is over.
    pub(super) fn return_wanted(&mut self, account: &str) {
        if self.is_home(account) {
            return;
        }
        let recalled = self.escrows.recalled.get(account).is_some_and(|until| self.now_ms < *until);
        self.return_idle(account, recalled);
    }

    /// Gives back every share that its purse can do without; `all`: also of the window in which new calls begin.
    fn return_idle(&mut self, account: &str, all: bool) {
        let home = self.settings.placement.home_of(account);
        let (now, at) = (self.clock.logged_ms(), self.now_ms);
        let Some(known) = self.state.accounts.get(account).filter(|a| a.shared) else { return };
        let bids = self.bids_for(account) && !self.runs_short(account);
        let kept = |no: &u64| bids && self.escrows.came.get(&(home, *no)).is_some_and(|came| at < came + KEPT_MS);
        let over = |id: &str, w: &AccountWindow| id != known.current || w.ends_ms.is_some_and(|ends| now >= ends);
        let windows = known.windows.iter().filter(|(id, w)| all || (w.open == 0 && over(id, w)));
        let candidates: Vec<(String, u64)> = windows
            .flat_map(|(id, w)| w.shares.keys().rev().map(move |no| (id.clone(), *no)))
            .filter(|(_, no)| !kept(no))
            .collect();
        let before = self.state.holding().get(&home).map_or(0, |line| line.open.len());
        for (window, no) in candidates {
            let known = self.state.accounts.get(account).and_then(|a| a.windows.get(&window));
            let Some(out) = known.and_then(|w| w.gives_back(no)) else { continue };
            let (settled, unused) = (out.settled, out.unused);
            self.record(Record::ShareOut(ShareOut { home, no, settled, unused }));
            self.escrows.came.remove(&(home, no));
            self.say(home, Say::Back(Back { no, settled, unused }));
            self.say_again_later();
        }
        if self.state.holding().get(&home).map_or(0, |line| line.open.len()) < before {
            self.account_metric(account);
        }
    }

    /// True while a task of the account has asked for slots, or could: it may begin at any moment.
    fn bids_for(&self, account: &str) -> bool {
        self.escrows.looks.contains_key(account)
            || self.bids.values().any(|no| self.state.stream(*no).is_some_and(|s| s.accept.account == account))
    }

    pub(super) fn idle_later(&mut self, account: &str) {
        if !self.escrows.idle_at.contains_key(account) {
            let at = self.now_ms + IDLE_MS;
            self.escrows.idle_at.insert(account.into(), at);
            self.timer(at, Timer::Idle(account.into()));
        }
    }

    /// Shares that nobody uses go back.
    pub(super) fn idle_due(&mut self, account: &str) {
        self.escrows.idle_at.remove(account);
        let Some(known) = self.state.accounts.get(account).filter(|a| a.shared && !a.windows.is_empty()) else {
            return;
        };
        let busy = known.windows.values().any(|w| w.open > 0) || self.anybody_waits(account);
        if !busy && !self.bids_for(account) {
            self.return_idle(account, true);
        }
        if self.state.accounts.get(account).is_some_and(|a| a.shared && !a.windows.is_empty()) {
            self.idle_later(account);
        } else {
            self.escrows.told.remove(account);
            self.escrows.recalled.remove(account);
            self.escrows.stands_back.remove(account);
        }
    }

    /// The home has written a share down as back.
    pub(super) fn home_knows(&mut self, home: u32, no: u64) {
        let Some(out) = self.state.holding().get(&home).and_then(|line| line.out.get(&no).copied()) else { return };
        let (holder, settled, unused) = (self.settings.shard, out.settled, out.unused);
        self.record(Record::ShareBack(ShareBack { home, holder, no, settled, unused }));
    }

    /// An Adjust whose share is gone is for the home to count.
    pub(super) fn tell_late(&mut self, evidence: &str) {
        let Some(late) = self.state.late().get(evidence).cloned() else { return };
        let home = self.settings.placement.home_of(&late.account);
        self.say(home, Say::Late(LateSaid { late, taken: false }));
        self.say_again_later();
    }

    pub(super) fn late_is_known(&mut self, home: u32, late: Late) {
        if self.state.late().get(&late.evidence) == Some(&late) {
            let holder = self.settings.shard;
            self.record(Record::ShareLate(ShareLate { home, holder, late }));
        }
    }
}

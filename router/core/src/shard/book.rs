//! Accounts as the shard decides with them: windows that roll, who waits for money, and who gets it when it comes back.

use super::offer::stream_qos;
use super::windows::Followers;
use super::{REPEAT_MS, Shard, Timer};
use crate::account::{AccountWindow, Level, window_at};
use crate::message::LogRoom;
use crate::record::{Record, Window, WindowRef};
use crate::settings::AccountSettings;
use crate::stream::Stream;
use atp_proto::Amount;
use std::collections::{BTreeMap, BTreeSet};

/// Waiting tasks that are woken when money comes back; when a share comes, which is for many.
const WOKEN_MAX: usize = 16;
const WOKEN_BY_SHARE_MAX: usize = 256;

/// Where a task stands in line: its tier, then its age.
pub(super) type Place = (u32, u64);

/// Who waits for an account's money.
#[derive(Default)]
pub(super) struct Book {
    /// Running calls that wait for a slice, oldest first.
    pub(super) starved: Lacks,
    /// Tasks that had a slot and no money, and what they need: gold first, then silver, oldest first.
    waiting: BTreeMap<Place, Amount>,
    /// Running calls whose hold is below their guarded estimate, and by how much.
    short: Lacks,
    /// Calls that hold money of the account.
    pub(super) open: BTreeSet<(u64, u32)>,
    /// Who is told what is left of the account.
    pub(super) followers: Followers,
    roll_at: u64,
    /// When running calls that wait for a slice ask again.
    starved_at: u64,
    /// When the account's pace is looked at again.
    pace_at: u64,
    /// Until then no idle share is wanted back for those who can begin and only look for more.
    pub(super) more_at: u64,
}

/// What running calls lack, by age, and the window that each was reserved in: no other one's money helps it.
type Lacks = BTreeMap<(u64, u32), (String, Amount)>;

/// The sum, or as much of it as can be told.
pub(super) fn sum<'a>(amounts: impl Iterator<Item = &'a Amount>) -> Amount {
    amounts.fold(Amount::ZERO, |sum, amount| sum.add(*amount).unwrap_or(sum))
}

fn of_window<'a>(lacks: &'a Lacks, window: &str) -> impl Iterator<Item = &'a Amount> {
    lacks.values().filter(move |(of, _)| of == window).map(|(_, lacks)| lacks)
}

impl Book {
    /// True while running calls of a window wait for a slice, those in front of `before` where it is given.
    pub(super) fn starves(&self, window: &str, before: Option<(u64, u32)>) -> bool {
        let end = before.unwrap_or((u64::MAX, u32::MAX));
        self.starved.range(..end).any(|(_, (of, _))| of == window)
    }

    /// What the first `most` of them lack.
    pub(super) fn starved_of(&self, window: &str, most: usize) -> Amount {
        sum(of_window(&self.starved, window).take(most))
    }

    /// What running calls of a window still need by their statistics.
    pub(super) fn claimed(&self, window: &str) -> Amount {
        sum(of_window(&self.short, window))
    }
}

impl Shard {
    /// The place of a task among those that wait for money; one that isn't accepted yet comes last.
    pub(super) fn place(&self, no: u64) -> Place {
        (self.state.stream(no).map_or(u32::MAX, |s| stream_qos(s) as u32), no)
    }

    pub(super) fn waits_for_money(&self, no: u64, account: &str) -> bool {
        self.books.get(account).is_some_and(|b| b.waiting.contains_key(&self.place(no)))
    }

    pub(super) fn wait_for_money(&mut self, no: u64, need: Amount) {
        let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone()) else { return };
        let place = self.place(no);
        self.books.entry(account).or_default().waiting.insert(place, need);
    }

    /// What others have a claim on before task `no`: those that wait in front of it, and running calls below their estimate.
    pub(super) fn claims(&self, book: &Book, no: u64, window: &str) -> Amount {
        let waiting = book.waiting.range(..self.place(no)).map(|(_, need)| need);
        sum(waiting.chain([&book.claimed(window)]))
    }

    pub(super) fn account_settings(&self, tenant: &str) -> &AccountSettings {
        self.settings.accounts.get(tenant).unwrap_or(&self.settings.default_account)
    }

    /// The account's window at this time, and the record that begins it where the log doesn't have it.
    pub(super) fn window_now(&self, tenant: &str) -> (AccountWindow, WindowRef, Option<Window>) {
        if !self.is_home(tenant) {
            let (purse, at) = self.purse_now(tenant);
            return (purse, at, None);
        }
        let settings = self.account_settings(tenant);
        let (mut id, mut ends_ms) = window_at(settings.per, self.clock.logged_ms());
        let account = self.state.accounts.get(tenant);
        if let Some(account) = account
            && account.per == settings.per.as_str()
            && account.current > id
        {
            // A window never begins again, whatever the clock says.
            id = account.current.clone();
            ends_ms = account.windows.get(&id).and_then(|w| w.ends_ms);
        }
        let known = account.and_then(|a| a.windows.get(&id));
        let limit = settings.limit.into();
        let current = account.is_some_and(|a| a.current == id && a.per == settings.per.as_str());
        let record = (!current || known.is_none_or(|w| w.limit != limit)).then(|| Window {
            account: tenant.into(),
            window: id.clone(),
            limit,
            ends_ms,
            per: settings.per.as_str().into(),
        });
        let window = AccountWindow { limit, ends_ms, ..known.cloned().unwrap_or_default() };
        (window, WindowRef { account: tenant.into(), window: id, shared: false }, record)
    }

    pub(super) fn roll_timer(&mut self, account: &str) {
        let (window, ..) = self.window_now(account);
        if let Some(ends) = window.ends_ms {
            let at = self.now_ms + ends.saturating_sub(self.clock.logged_ms()).max(1);
            let book = self.books.entry(account.into()).or_default();
            if book.roll_at <= self.now_ms || at < book.roll_at {
                book.roll_at = at;
                self.timer(at, Timer::Roll(account.into()));
            }
        }
    }

    /// Shows an account that is ahead of its pace anew when the line has caught up.
    pub(super) fn pace_timer(&mut self, account: &str) {
        let Some((_, pace)) = self.pace(account) else { return };
        let logged = self.clock.logged_ms();
        let at = self.now_ms + pace.resumes_ms(logged).saturating_sub(logged).max(1);
        let book = self.books.entry(account.into()).or_default();
        if book.pace_at <= self.now_ms || at < book.pace_at {
            book.pace_at = at;
            self.timer(at, Timer::Pace(account.into()));
        }
    }

    /// A running call that waits for a slice says nothing more by itself: what it asked for, or the answer, may be lost or forgotten.
    pub(super) fn starved_again_later(&mut self, account: &str) {
        if self.settings.placement.shards() == 1 {
            return;
        }
        let (now, at) = (self.now_ms, self.now_ms + REPEAT_MS);
        let book = self.books.entry(account.into()).or_default();
        if book.starved_at <= now {
            book.starved_at = at;
            self.timer(at, Timer::Sought(account.into()));
        }
    }

    pub(super) fn starved_are_due(&self, account: &str) -> bool {
        self.books.get(account).is_some_and(|b| !b.starved.is_empty() && b.starved_at <= self.now_ms)
    }

    /// An account's window has ended: the next one begins, and who waited for money is asked again.
    pub(super) fn rolled(&mut self, account: &str) {
        if let (_, _, Some(window)) = self.window_now(account)
            && self.room == LogRoom::Enough
        {
            self.record(Record::Window(window));
        }
        self.money_returned(account);
        self.account_metric(account);
        self.roll_timer(account);
    }

    /// What tasks need that wait for money here, the first ones: by tier and age.
    pub(super) fn waiting_for_money(&self, account: &str, most: usize) -> BTreeMap<Place, Amount> {
        let waiting = self.books.get(account).into_iter().flat_map(|b| &b.waiting);
        waiting.take(most).map(|(place, need)| (*place, *need)).collect()
    }

    pub(super) fn anybody_waits(&self, account: &str) -> bool {
        self.books.get(account).is_some_and(|b| !b.waiting.is_empty())
    }

    /// What tasks here have a claim on before a wish of this tier and age, and running calls below their estimate.
    pub(super) fn claims_before(&self, book: &Book, qos: u32, since: u64, window: &str) -> Amount {
        let older = |no: u64| self.state.stream(no).is_some_and(|s| s.accepted_at <= since);
        let waiting = book.waiting.iter().filter(|((q, no), _)| *q < qos || (*q == qos && older(*no)));
        sum(waiting.map(|(_, need)| need).chain([&book.claimed(window)]))
    }

    /// The levels of a call of this stream: its account's window in which it was reserved, and the stream.
    pub(super) fn levels(&self, stream: &Stream, windows: &[WindowRef]) -> Vec<Level> {
        let window =
            |w: &WindowRef| self.state.accounts.get(&w.account)?.windows.get(&w.window).map(AccountWindow::level);
        windows.iter().filter_map(window).chain([stream.level()]).collect()
    }

    /// Gives money that came back: first to running calls, oldest first, then to waiting tasks.
    pub(super) fn money_returned(&mut self, account: &str) {
        let starved = self.books.get(account).map(|b| b.starved.keys().copied().collect::<Vec<_>>());
        for (no, lane) in starved.into_iter().flatten() {
            self.extend(no, lane);
        }
        if self.settings.placement.shards() > 1 {
            self.serve(account);
            self.no_longer_short(account);
        }
        if let Some(book) = self.books.get(account).filter(|_| !self.runs_short(account)) {
            let most = if self.is_home(account) { WOKEN_MAX } else { WOKEN_BY_SHARE_MAX };
            let woken: Vec<u64> = book.waiting.keys().map(|(_, no)| *no).take(most).collect();
            woken.into_iter().for_each(|no| self.ask(no));
        }
        self.return_wanted(account);
    }

    /// Keeps the account's list of calls whose hold is below their estimate true.
    pub(super) fn note_short(&mut self, no: u64, lane: u32) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let room = self.state.stream(no).map(|s| s.level().free()).unwrap_or_default();
        // What such calls need at p95 beside what this one may spend already.
        let mean = Amount::from(call.reserve.mean);
        let p95 = |n: u64| crate::estimate::overage(n, call.reserve.overage_ppm);
        let need = Amount::from(call.reserve.guarded).max(Amount::new(p95(mean.tokens.0), p95(mean.usd_micros.0)));
        let mut short = need.less(call.grant());
        if short.is_zero() {
            // It needs more than it was thought to, and will ask for another slice.
            let guarded = call.reserve.guarded;
            short = Amount::new(guarded.tokens / 4, guarded.usd_micros / 4);
        }
        let short = short.min(room);
        let open = call.is_open();
        let window = call.reserve.windows.first().map_or_else(String::new, |w| w.window.clone());
        let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone()) else { return };
        if open {
            self.books.entry(account.clone()).or_default().open.insert((no, lane));
        } else if let Some(book) = self.books.get_mut(&account) {
            book.open.remove(&(no, lane));
        }
        if open && !short.is_zero() {
            self.books.entry(account).or_default().short.insert((no, lane), (window, short));
        } else if let Some(book) = self.books.get_mut(&account) {
            book.short.remove(&(no, lane));
            if !open {
                book.starved.remove(&(no, lane));
            }
        }
    }

    pub(super) fn leave_books(&mut self, no: u64) {
        let place = self.place(no);
        if let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone())
            && let Some(book) = self.books.get_mut(&account)
        {
            book.waiting.remove(&place);
        }
    }
}

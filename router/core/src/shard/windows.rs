//! What streams and accounts may still use, and telling their clients when that has moved (ATP-10). It never admits
//! anything. A stream's window is its own; what may begin is the least of it and its account's, each told under its scope.

use super::{Shard, Timer};
use crate::account::{AccountWindow, Level};
use crate::record::Record;
use crate::stream::{Call, Stream};
use crate::window::{Cadence, Due};
use atp_proto::content::{WindowUpdate, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{ConnId, Frame};
use std::collections::BTreeSet;

/// What this input has moved, and who began to follow.
#[derive(Default)]
pub(super) struct Moved {
    streams: BTreeSet<u64>,
    accounts: BTreeSet<String>,
    joined: Vec<Joined>,
}

struct Joined {
    conn: ConnId,
    no: u64,
    /// `control.accepted` has just told it the stream's window.
    fresh: bool,
    /// It follows no other stream of the account.
    first: bool,
}

/// What was last told of a window, and the timer that looks at it again.
#[derive(Clone, Copy)]
pub(super) struct Told {
    cadence: Cadence,
    due: Option<u64>,
}

impl Told {
    fn new(window: WindowView, now: u64) -> Self {
        Self { cadence: Cadence::new(window, now), due: None }
    }
}

/// The connections that follow an account's streams.
#[derive(Default)]
pub(super) struct Followers {
    of: BTreeSet<(ConnId, u64)>,
    told: Option<Told>,
}

impl Followers {
    fn has(&self, conn: ConnId) -> bool {
        self.of.range((conn, 0)..=(conn, u64::MAX)).next().is_some()
    }

    fn conns(&self) -> BTreeSet<ConnId> {
        self.of.iter().map(|(conn, _)| *conn).collect()
    }

    fn is_one(&self) -> bool {
        self.of.first().map(|(conn, _)| conn) == self.of.last().map(|(conn, _)| conn)
    }

    /// The connection is lost.
    pub(super) fn gone(&mut self, conn: ConnId) {
        self.of.retain(|(c, _)| *c != conn);
    }
}

fn left(level: &Level, max_parallel: Option<u32>, open: usize) -> WindowView {
    let free = level.free();
    WindowView {
        max_parallel: max_parallel.map(|most| most.saturating_sub(u32::try_from(open).unwrap_or(u32::MAX))),
        max_tokens: level.limit.tokens.map(|_| free.tokens),
        max_usd_micros: level.limit.usd_micros.map(|_| free.usd_micros),
    }
}

/// What `control.accepted` says.
pub(super) fn accepted(stream: &Stream) -> WindowView {
    left(&Level { limit: stream.limit(), ..Level::default() }, stream.accept.max_parallel, 0)
}

pub(super) fn stream_window(stream: &Stream) -> WindowView {
    let open = stream.calls.iter().filter(|c: &&Call| c.is_open()).count();
    left(&stream.level(), stream.accept.max_parallel, open)
}

fn update(on: &str, scope: String, window: WindowView) -> Frame {
    Frame::json(on, 0, Flags::NONE, kind::WINDOW_UPDATE, &WindowUpdate { scope, window })
}

impl Shard {
    /// Notes what a record moves.
    pub(super) fn note_moved(&mut self, record: &Record) {
        match record {
            Record::Reserve(_) | Record::Extend(_) | Record::Settle(_) | Record::Void(_) | Record::Adjust(_) => {
                let no = record.key().and_then(|key| self.state.stream_no(&key.tenant, &key.stream));
                self.moved.streams.extend(no);
            }
            Record::Window(window) => {
                self.moved.accounts.insert(window.account.clone());
            }
            _ => {}
        }
    }

    /// New settings may have moved every account's window.
    pub(super) fn note_settings(&mut self) {
        self.moved.accounts.extend(self.books.keys().cloned());
    }

    /// A connection begins to follow a stream: it is told what it can't know, at once (`fresh`: all but the stream's).
    pub(super) fn join(&mut self, conn: ConnId, no: u64, fresh: bool) {
        let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone()) else { return };
        let followers = &mut self.books.entry(account).or_default().followers;
        let first = !followers.has(conn);
        if followers.of.insert((conn, no)) {
            self.moved.joined.push(Joined { conn, no, fresh, first });
        }
    }

    /// It doesn't follow the stream any more.
    pub(super) fn part(&mut self, conn: ConnId, no: u64) {
        if let Some(stream) = self.state.stream(no)
            && let Some(book) = self.books.get_mut(&stream.accept.account)
        {
            book.followers.of.remove(&(conn, no));
        }
    }

    /// Looks at every window that this input has moved.
    pub(super) fn tell_windows(&mut self) {
        for joined in std::mem::take(&mut self.moved.joined) {
            self.tell_joined(&joined);
        }
        if self.moved.streams.is_empty() && self.moved.accounts.is_empty() {
            return;
        }
        let mut accounts = std::mem::take(&mut self.moved.accounts);
        for no in std::mem::take(&mut self.moved.streams) {
            self.tell_window(no);
            accounts.extend(self.state.stream(no).map(|s| s.accept.account.clone()));
        }
        accounts.into_iter().for_each(|account| self.tell_account_window(&account));
    }

    fn tell_joined(&mut self, joined: &Joined) {
        let &Joined { conn, no, fresh, first } = joined;
        let now = self.now_ms;
        let Some(stream) = self.state.stream(no).filter(|s| !s.is_closed()) else { return };
        let (id, account, window) = (stream.id(), stream.accept.account.clone(), stream_window(stream));
        let known = fresh || window == accepted(stream);
        if let Some(live) = self.live.get_mut(&no).filter(|l| !fresh && l.subscribers == [conn]) {
            // Nobody else has to be told what this one is told.
            live.told.get_or_insert_with(|| Box::new(Told::new(window, now))).cadence.sent(window, now);
        }
        if !known {
            self.send(conn, update(id.as_str(), format!("stream:{id}"), window));
        }
        let window = self.account_window(&account);
        let Some(book) = self.books.get_mut(&account).filter(|b| first && b.followers.has(conn)) else { return };
        let followers = &mut book.followers;
        if followers.told.is_none() || followers.is_one() {
            followers.told.get_or_insert_with(|| Told::new(window, now)).cadence.sent(window, now);
        }
        self.send(conn, update("", format!("tenant:{account}"), window));
    }

    /// What is left of the account's current window.
    fn account_window(&self, account: &str) -> WindowView {
        let open = self.books.get(account).map_or(0, |b| b.open.len());
        if !self.is_home(account) {
            return self.window_elsewhere(account, open);
        }
        let known = self.state.accounts.get(account).and_then(|a| a.windows.get(&a.current));
        let level = known.map_or_else(|| self.window_now(account).0.level(), AccountWindow::level);
        left(&level, self.calls_max(account), open)
    }

    /// What the home of an account had left when it last said so, and what is left of its shares here.
    fn window_elsewhere(&self, account: &str, open: usize) -> WindowView {
        let here = self.window_now(account).0.level().free();
        let there = left(&self.shown_window(account).level(), None, 0);
        WindowView {
            max_tokens: there.max_tokens.map(|n| n.add(here.tokens).unwrap_or(n)),
            max_usd_micros: there.max_usd_micros.map(|n| n.add(here.usd_micros).unwrap_or(n)),
            max_parallel: left(&Level::default(), self.account_settings(account).max_parallel, open).max_parallel,
        }
    }

    pub(super) fn tell_window(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| !s.is_closed()) else { return };
        let (window, first, id) = (stream_window(stream), accepted(stream), stream.id());
        let now = self.now_ms;
        let age = self.clock.logged_ms().saturating_sub(stream.accepted_at);
        let Some(live) = self.live.get_mut(&no).filter(|l| !l.subscribers.is_empty()) else { return };
        let told = live.told.get_or_insert_with(|| Box::new(Told::new(first, now.saturating_sub(age))));
        let (look, timer) = (told.cadence.look(window, now), Timer::Window(no));
        let due = std::mem::replace(&mut told.due, if let Due::At(at) = look { Some(at) } else { None });
        if look == Due::Now {
            told.cadence.sent(window, now);
            let frame = update(id.as_str(), format!("stream:{id}"), window);
            for conn in &live.subscribers {
                self.out.hold(crate::message::Effect::Send { conn: *conn, frame: frame.clone() });
            }
        }
        self.look_again(due, look, timer);
    }

    /// An account's window goes to each connection that follows one of its streams, once, on stream "".
    pub(super) fn tell_account_window(&mut self, account: &str) {
        if self.books.get(account).is_none_or(|b| b.followers.of.is_empty()) {
            return;
        }
        let (window, now) = (self.account_window(account), self.now_ms);
        let Some(book) = self.books.get_mut(account) else { return };
        let told = book.followers.told.get_or_insert_with(|| Told::new(window, now));
        let look = told.cadence.look(window, now);
        let due = std::mem::replace(&mut told.due, if let Due::At(at) = look { Some(at) } else { None });
        if look == Due::Now {
            told.cadence.sent(window, now);
            let frame = update("", format!("tenant:{account}"), window);
            for conn in book.followers.conns() {
                self.out.hold(crate::message::Effect::Send { conn, frame: frame.clone() });
            }
        }
        self.look_again(due, look, Timer::AccountWindow(account.into()));
    }

    fn look_again(&mut self, due: Option<u64>, look: Due, timer: Timer) {
        let next = if let Due::At(at) = look { Some(at) } else { None };
        if due == next {
            return;
        }
        if let Some(at) = due {
            self.timers.remove(&(at, timer.clone()));
        }
        if let Some(at) = next {
            self.timer(at, timer);
        }
    }

    /// The stream has ended: nothing looks at its window again.
    pub(super) fn forget_window(&mut self, no: u64, told: Option<&Told>, subscribers: &[ConnId]) {
        if let Some(at) = told.and_then(|t| t.due) {
            self.timers.remove(&(at, Timer::Window(no)));
        }
        subscribers.iter().for_each(|conn| self.part(*conn, no));
    }
}

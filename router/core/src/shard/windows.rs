//! What a stream and its account may still use, and telling their clients when that has moved (ATP-6). It never admits
//! anything.

use super::{Shard, Timer};
use crate::account::{AccountWindow, Level};
use crate::record::Record;
use crate::stream::{Call, Stream};
use crate::window::{Cadence, Due, effective};
use atp_proto::content::{WindowUpdate, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{ConnId, Frame};
use std::collections::BTreeSet;

/// True for records that change what is left of a stream and its account.
pub(super) const fn moves_money(record: &Record) -> bool {
    matches!(record, Record::Reserve(_) | Record::Extend(_) | Record::Settle(_) | Record::Void(_) | Record::Adjust(_))
}

fn left(level: &Level, max_parallel: Option<u32>, open: usize) -> WindowView {
    let free = level.free();
    WindowView {
        max_parallel: max_parallel.map(|most| most.saturating_sub(u32::try_from(open).unwrap_or(u32::MAX))),
        max_tokens: level.limit.tokens.map(|_| free.tokens),
        max_usd_micros: level.limit.usd_micros.map(|_| free.usd_micros),
    }
}

impl Shard {
    /// What is left of the account's current window.
    pub(super) fn account_window_left(&self, account: &str) -> WindowView {
        let open = self.books.get(account).map_or(0, |b| b.open.len());
        let found = self.state.accounts.get(account);
        let level = found.and_then(|a| a.windows.get(&a.current)).map(AccountWindow::level);
        left(&level.unwrap_or_default(), self.account_settings(account).max_parallel, open)
    }

    /// What the stream may still use: the least of its own window and its account's.
    fn window_left(&self, stream: &Stream) -> WindowView {
        let open = stream.calls.iter().filter(|c: &&Call| c.is_open()).count();
        let own = left(&stream.level(), stream.accept.max_parallel, open);
        effective(own, self.account_window_left(&stream.accept.account))
    }

    /// Looks at every window that this input has moved.
    pub(super) fn tell_windows(&mut self) {
        if self.moved.is_empty() {
            return;
        }
        let mut accounts = BTreeSet::new();
        for no in std::mem::take(&mut self.moved) {
            self.tell_window(no);
            accounts.extend(self.state.stream(no).map(|s| s.accept.account.clone()));
        }
        accounts.into_iter().for_each(|account| self.tell_account_window(&account));
    }

    pub(super) fn tell_window(&mut self, no: u64) {
        let Some(stream) = self.state.stream(no).filter(|s| !s.is_closed()) else { return };
        let window = self.window_left(stream);
        let (now, id) = (self.now_ms, stream.id());
        let level = Level { limit: stream.limit(), ..Level::default() };
        // What `control.accepted` said.
        let first = left(&level, stream.accept.max_parallel, 0);
        let Some(live) = self.live.get_mut(&no) else { return };
        let cadence = live.window.get_or_insert_with(|| Box::new(Cadence::new(first, now)));
        match cadence.look(window, now) {
            Due::Never => {}
            Due::At(at) => self.timer(at, Timer::Window(no)),
            Due::Now => {
                cadence.sent(window, now);
                let conns = live.subscribers.clone();
                let frame = update(id.as_str(), format!("stream:{id}"), window);
                conns.into_iter().for_each(|conn| self.send(conn, frame.clone()));
            }
        }
    }

    /// An account's window goes to each connection that follows one of its streams, once, on stream "".
    pub(super) fn tell_account_window(&mut self, account: &str) {
        let window = self.account_window_left(account);
        let now = self.now_ms;
        let Some(book) = self.books.get_mut(account) else { return };
        let cadence = book.window.get_or_insert_with(|| Cadence::new(WindowView::default(), now));
        match cadence.look(window, now) {
            Due::Never => {}
            Due::At(at) => self.timer(at, Timer::AccountWindow(account.into())),
            Due::Now => {
                cadence.sent(window, now);
                let of_account = |no: &u64| self.state.stream(*no).is_some_and(|s| s.accept.account == account);
                let conns: BTreeSet<ConnId> = self
                    .live
                    .iter()
                    .filter(|(no, live)| !live.subscribers.is_empty() && of_account(no))
                    .flat_map(|(_, live)| live.subscribers.iter().copied())
                    .collect();
                let frame = update("", format!("tenant:{account}"), window);
                conns.into_iter().for_each(|conn| self.send(conn, frame.clone()));
            }
        }
    }
}

fn update(on: &str, scope: String, window: WindowView) -> Frame {
    Frame::json(on, 0, Flags::NONE, kind::WINDOW_UPDATE, &WindowUpdate { scope, window })
}

//! The other lanes of a task whose first one can begin: what they lack is looked for before one is dropped. All of it or nothing, behind
//! all who can't begin, and at most once a second for a task.

use super::book::Place;
use super::escrow::PATIENCE_MS;
use super::{REPEAT_MS, Shard, Timer};
use crate::escrow::{Look, NoMore, Say};
use crate::message::{LogRoom, Position};
use atp_proto::Amount;
use std::collections::BTreeMap;

/// What a task's lanes lack here beside the first.
pub(super) struct More {
    pub(super) need: Amount,
    pub(super) calls: u32,
}

/// Who looks for more of an account.
pub(super) struct Looks {
    /// Of the question.
    id: u64,
    no: u64,
    at: u64,
    /// The question leaves when this is durable.
    behind: Position,
    /// Who asks next, and since when it waits for that.
    then: BTreeMap<Place, u64>,
}

/// As home: who is answered when idle shares are back, by holder.
pub(super) type Looked = BTreeMap<u32, Look>;

impl Shard {
    /// True while more may be found for a task: it goes on when the answer is here. One task of an account asks at a time.
    pub(super) fn looks(&mut self, account: &str, no: u64, more: &More) -> bool {
        let (now, place) = (self.now_ms, self.place(no));
        if self.live.get(&no).is_none_or(|l| now < l.looked_until) {
            return false;
        }
        if let Some(looks) = self.escrows.looks.get_mut(account) {
            let since = if looks.no == no { now } else { *looks.then.entry(place).or_insert(now) };
            if now < since + REPEAT_MS {
                return true;
            }
            // Too many ask before it.
            looks.then.remove(&place);
            self.has_looked(no);
            return false;
        }
        self.escrows.looked_times += 1;
        let id = self.escrows.looked_times;
        if self.is_home(account) {
            if !self.recall(account, None, true) {
                return false;
            }
        } else {
            let home = self.settings.placement.home_of(account);
            let (last, calls) = (self.newest_of(home), more.calls);
            let need = more.need.add(self.claimed_beside(account)).unwrap_or(more.need).into();
            self.say(home, Say::Look(Look { account: account.into(), id, need, calls, qos: place.0, last }));
        }
        let looks = Looks { id, no, at: now, behind: self.state.position(), then: BTreeMap::new() };
        self.escrows.looks.insert(account.into(), looks);
        self.timer(now + PATIENCE_MS, Timer::Sought(account.into()));
        true
    }

    /// An answer is here: who asked goes on, and the next one asks. `over`: there is no more.
    pub(super) fn look_on(&mut self, account: &str, over: bool) {
        let Some(Looks { no, mut then, .. }) = self.escrows.looks.remove(account) else { return };
        if over {
            self.has_looked(no);
        }
        self.ask(no);
        while !self.escrows.looks.contains_key(account)
            && let Some(((_, next), _)) = then.pop_first()
        {
            self.ask(next);
        }
        if let Some(looks) = self.escrows.looks.get_mut(account) {
            looks.then.append(&mut then);
        }
    }

    /// The home has no more.
    pub(super) fn no_more(&mut self, home: u32, of: &NoMore) {
        let is_it = self.escrows.looks.get(&of.account).is_some_and(|looks| looks.id == of.id);
        if is_it && self.settings.placement.home_of(&of.account) == home {
            self.look_on(&of.account, true);
        }
    }

    fn has_looked(&mut self, no: u64) {
        if let Some(live) = self.live.get_mut(&no) {
            live.looked_until = self.now_ms + REPEAT_MS;
        }
    }

    /// Nobody has answered in time: all go on with what is here.
    pub(super) fn look_ends(&mut self, account: &str) {
        let (now, durable) = (self.now_ms, self.durable);
        let Some(looks) = self.escrows.looks.get_mut(account) else { return };
        if durable < looks.behind {
            looks.at = now;
            self.timer(now + PATIENCE_MS, Timer::Sought(account.into()));
        } else if now >= looks.at + PATIENCE_MS
            && let Some(Looks { no, then, .. }) = self.escrows.looks.remove(account)
        {
            for no in std::iter::once(no).chain(then.into_keys().map(|(_, no)| no)) {
                self.has_looked(no);
                self.ask(no);
            }
        }
    }

    // ---- as home ----------------------------------------------------------------------------------------------------

    pub(super) fn looked(&mut self, holder: u32, look: Look) {
        let account = look.account.clone();
        if !self.is_home(&account) {
            return;
        }
        if self.says_again(holder, &account, look.last) || self.lend_more(holder, &look) {
            return;
        }
        match self.recall(&account, Some(holder), true) {
            true => _ = self.escrows.looked.entry(account).or_default().insert(holder, look),
            false => self.say(holder, Say::NoMore(NoMore { account, id: look.id })),
        }
    }

    /// What was idle is back: who looked for more is answered.
    pub(super) fn looked_all(&mut self, account: &str) {
        for (holder, look) in self.escrows.looked.remove(account).unwrap_or_default() {
            if !self.lend_more(holder, &look) {
                self.say(holder, Say::NoMore(NoMore { account: account.into(), id: look.id }));
            }
        }
        if self.is_home(account) {
            self.look_on(account, false);
        }
    }

    /// Lends all that is looked for, if nobody of its tier or a higher one who can't begin has a claim on it.
    fn lend_more(&mut self, holder: u32, look: &Look) -> bool {
        let account = look.account.as_str();
        let room = self.calls_room(account);
        if self.room != LogRoom::Enough
            || self.runs_short(account)
            || self.is_held_back(account)
            || room.is_some_and(|room| room < look.calls)
        {
            return false;
        }
        let (window, id) = self.fresh_window(account);
        let now = self.clock.logged_ms();
        let book = self.books.get(account);
        let claims = book.map_or(Amount::ZERO, |book| self.claims_before(book, look.qos, now, &id));
        let wishes = self.wishes_before(account, look.qos.saturating_add(1), 0);
        let need = Amount::from(look.need);
        let fits = need.fits(window.level().free().less(claims).less(wishes));
        if fits {
            self.lend_share(holder, account, &id, &window, need, room.map(|_| look.calls));
        }
        fits
    }
}

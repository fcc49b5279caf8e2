//! An account's money between shards, as both sides see it: who is asked for more, what is said again until it is confirmed, and
//! what comes in from other shards. The home's side is in `lender`, the other in `holder`.

use super::book::Place;
use super::holder::Told;
use super::lender::{Recall, Wished};
use super::looks::{Looked, Looks};
use super::{REPEAT_MS, Shard, Timer};
use crate::escrow::{Back, Escrow, LateSaid, Number, Numbered, Recalled, Say, Wanted};
use crate::message::{Effect, Position};
use crate::record::WindowRef;
use atp_proto::reassembly::Message;
use atp_proto::{Amount, ConnId, Qos, StreamId, TenantId};
use std::collections::{BTreeMap, BTreeSet};

/// Who asked for money decides without it after this long, in milliseconds.
pub(super) const PATIENCE_MS: u64 = 1_000;
/// An answer that brought too little holds for this long.
const FRESH_MS: u64 = 250;
/// Messages that are said again at once.
pub(super) const AGAIN_MAX: usize = 1_024;
/// Submits that may wait for an answer.
const PARKED_MAX: usize = 1_024;

/// What the memory holds of money between shards.
#[derive(Default)]
pub(super) struct Escrows {
    /// As home: shares whose holder hasn't confirmed them to this owner.
    pub(super) unsaid: BTreeSet<(u32, u64)>,
    /// As home: what holders wish for, by account; by holder and window.
    pub(super) wishes: BTreeMap<String, BTreeMap<(u32, String), Wished>>,
    /// As home: idle shares that are wanted back, by account.
    pub(super) recalls: BTreeMap<String, Recall>,
    /// As holder: what the home said of an account.
    pub(super) told: BTreeMap<String, Told>,
    /// As holder: until when the home wants back what is idle, by account.
    pub(super) recalled: BTreeMap<String, u64>,
    /// As holder: until when running calls of other shards go before new ones here, by account.
    pub(super) stands_back: BTreeMap<String, u64>,
    /// As holder: windows whose running calls the home knows to wait, by account.
    pub(super) slices: BTreeSet<(String, String)>,
    /// As holder: when a share came.
    pub(super) came: BTreeMap<(u32, u64), u64>,
    /// As holder: when to look whether an account's shares are idle.
    pub(super) idle_at: BTreeMap<String, u64>,
    /// Who looks for money: by account, and the window of running calls (empty: new ones).
    asked: BTreeMap<(String, String), Asked>,
    /// Who looks for what its other lanes lack, by account.
    pub(super) looks: BTreeMap<String, Looks>,
    /// Questions of that kind so far.
    pub(super) looked_times: u64,
    /// As home: who is answered when idle shares are back, by account.
    pub(super) looked: BTreeMap<String, Looked>,
    /// Submits that are judged when the answer is here, by account.
    parked: BTreeMap<String, Vec<(ConnId, TenantId, Message)>>,
    /// What has to be confirmed is said again then.
    again_at: Option<u64>,
}

#[derive(Clone, Copy)]
struct Asked {
    at: u64,
    /// The question leaves when this is durable, and has its time from then on.
    behind: Position,
    need: Amount,
    /// When an answer came that brought too little.
    answered_at: Option<u64>,
}

impl Asked {
    /// When who asked decided without an answer.
    fn given_up_at(&self, now: u64, durable: Position) -> Option<u64> {
        (self.answered_at.is_none() && durable >= self.behind && now >= self.at + PATIENCE_MS)
            .then_some(self.at + PATIENCE_MS)
    }
}

impl Shard {
    /// True where this shard keeps the account itself.
    pub(super) fn is_home(&self, account: &str) -> bool {
        let placement = &self.settings.placement;
        placement.shards() == 1 || placement.home_of(account) == self.settings.shard
    }

    pub(super) fn say(&mut self, shard: u32, say: Say) {
        self.out.hold(Effect::ToShard { shard, message: Escrow::from(say) });
    }

    pub(super) fn escrow(&mut self, from: u32, message: Escrow) {
        let Some(say) = message.say else { return };
        if from == self.settings.shard || from >= self.settings.placement.shards() {
            return;
        }
        match say {
            Say::Wish(wish) => self.wished(from, wish),
            Say::Look(look) => self.looked(from, look),
            Say::NoMore(of) => self.no_more(from, &of),
            Say::Share(Numbered { no, of }) => self.share_comes(from, no, of),
            Say::Taken(Number { no }) => {
                self.escrows.unsaid.remove(&(from, no));
            }
            Say::Back(back) => self.share_is_back(from, back),
            Say::BackTaken(Number { no }) => self.home_knows(from, no),
            Say::Stands(stands) => self.stands_so(from, stands),
            Say::Recall(Wanted { account, running }) => self.recalled(from, account, running),
            Say::Recalled(Recalled { account, backs, waits }) => {
                if !waits && let Some(wishes) = self.escrows.wishes.get_mut(&account) {
                    wishes.remove(&(from, String::new()));
                }
                backs.into_iter().for_each(|back| self.share_is_back(from, back));
                self.has_recalled(from, &account);
            }
            Say::Late(LateSaid { late, taken: false }) => self.late(from, late),
            Say::Late(LateSaid { late, taken: true }) => self.late_is_known(from, late),
            Say::Press(press) => self.pressed(from, press),
            Say::Below(below) => self.heard_below(from, below),
        }
    }

    // ---- looking for more -------------------------------------------------------------------------------------------

    /// True where more money than is here may be found, and it is asked for: who needs it waits for the answer. A holder asks the
    /// home, the home those who hold shares. `window`: of a running call; empty: for new ones of the task at this place.
    pub(super) fn seeks(&mut self, account: &str, window: &str, place: Place, need: Amount) -> bool {
        if self.settings.placement.shards() == 1 {
            return false;
        }
        let home = self.is_home(account);
        if home && !self.has_lent(account) {
            return false;
        }
        let (now, at) = (self.now_ms, (account.to_owned(), window.to_owned()));
        let before = self.escrows.asked.get(&at).copied();
        if let Some(asked) = before {
            let answered_at = asked.answered_at.or(asked.given_up_at(now, self.durable));
            match answered_at {
                Some(answered_at) if now < answered_at + FRESH_MS => return false,
                // It is on its way, for as much.
                None if need.fits(asked.need) => return true,
                Some(_) | None => {}
            }
        }
        let found = !home || self.recall(account, None, false);
        if !home {
            self.wish(account, window, place, need);
        }
        if found {
            let behind = self.state.position();
            self.escrows.asked.insert(at, Asked { at: now, behind, need, answered_at: None });
            self.timer(now + PATIENCE_MS, Timer::Sought(account.into()));
        }
        found
    }

    /// An answer is here that brought nothing: it holds for a while.
    pub(super) fn answered(&mut self, account: &str) {
        let now = self.now_ms;
        for (_, asked) in self.escrows.asked.iter_mut().filter(|((a, _), _)| a == account) {
            asked.answered_at.get_or_insert(now);
        }
    }

    /// A share of a window is here: its running calls may ask for the next one.
    pub(super) fn granted(&mut self, account: &str, window: &str) {
        self.escrows.asked.remove(&(account.to_owned(), window.to_owned()));
    }

    /// True while an answer that brought too little holds: what is known now decides.
    pub(super) fn knows(&self, account: &str) -> bool {
        let asked = self.escrows.asked.get(&(account.to_owned(), String::new()));
        let answered_at = asked.and_then(|a| a.answered_at);
        answered_at.is_some_and(|at| self.now_ms < at + FRESH_MS)
    }

    /// True where a submit that needs so much is kept until it can be judged: more may be found.
    pub(super) fn parks(&mut self, tenant: &TenantId, qos: Qos, need: Amount) -> bool {
        let room = self.escrows.parked.get(tenant.as_str()).is_none_or(|p| p.len() < PARKED_MAX);
        room && self.seeks(tenant.as_str(), "", (qos as u32, u64::MAX), need)
    }

    /// True while running calls of an account's window wait for a slice, in whatever shard: no new call is reserved in it.
    pub(super) fn runs_short(&self, account: &str) -> bool {
        self.escrows.stands_back.get(account).is_some_and(|until| self.now_ms < *until)
            || self.runs_short_but(account, self.settings.shard)
    }

    /// The same of this shard's own calls and of what holders have wished for here, but for this one.
    pub(super) fn runs_short_but(&self, account: &str, holder: u32) -> bool {
        let book = self.books.get(account).filter(|b| !b.starved.is_empty());
        let wishes = self.escrows.wishes.get(account);
        if book.is_none() && wishes.is_none() {
            return false;
        }
        let (_, WindowRef { window, .. }, _) = self.window_now(account);
        let wished = || self.wishes_for(account).any(|((of, w), _)| *of != holder && *w == window);
        book.is_some_and(|b| b.starves(&window, None)) || wished()
    }

    /// True while tasks here lack money of an account.
    pub(super) fn lacks_money(&self, account: &str) -> bool {
        self.escrows.parked.contains_key(account) || self.anybody_waits(account)
    }

    pub(super) fn park(&mut self, conn: ConnId, tenant: &TenantId, submit: Message) {
        self.escrows.parked.entry(tenant.as_str().into()).or_default().push((conn, tenant.clone(), submit));
    }

    /// What is known of an account's money has changed: those who wait are looked at again.
    pub(super) fn found(&mut self, account: &str) {
        for (conn, tenant, submit) in self.escrows.parked.remove(account).unwrap_or_default() {
            let id = StreamId::new(&submit.frame.stream_id);
            self.submit(conn, &tenant, &id, submit);
            self.commit();
        }
        self.money_returned(account);
    }

    /// Nobody answered in time, or running calls ask again.
    pub(super) fn sought(&mut self, account: &str) {
        let now = self.now_ms;
        // What an answer said is over too.
        self.escrows
            .asked
            .retain(|(a, _), asked| a != account || asked.answered_at.is_none_or(|at| now < at + FRESH_MS));
        let (mut late, mut unsaid) = (false, false);
        for (_, asked) in self.escrows.asked.iter_mut().filter(|((a, _), _)| a == account) {
            if asked.answered_at.is_none() && self.durable < asked.behind {
                (asked.at, unsaid) = (now, true);
            } else if asked.given_up_at(now, self.durable).is_some() {
                (asked.answered_at, late) = (Some(now), true);
            }
        }
        if unsaid {
            self.timer(now + PATIENCE_MS, Timer::Sought(account.into()));
        }
        self.recall_ends(account);
        self.look_ends(account);
        if late || self.starved_are_due(account) {
            self.found(account);
        }
    }

    /// A connection is gone: nobody waits for its answers.
    pub(super) fn unpark(&mut self, conn: ConnId) {
        self.escrows.parked.retain(|_, parked| {
            parked.retain(|(c, _, _)| *c != conn);
            !parked.is_empty()
        });
    }

    // ---- until it is confirmed --------------------------------------------------------------------------------------

    /// What was said must be confirmed, or it is said again.
    pub(super) fn say_again_later(&mut self) {
        if self.escrows.again_at.is_none() {
            let at = self.now_ms + REPEAT_MS;
            self.escrows.again_at = Some(at);
            self.timer(at, Timer::Escrow);
        }
    }

    /// A new owner: everything that its log leaves open is said again.
    pub(super) fn rebuild_escrow(&mut self) {
        let lent = self.state.lent().iter();
        self.escrows.unsaid = lent.flat_map(|(holder, line)| line.open.keys().map(|no| (*holder, *no))).collect();
        self.say_all_again();
        let held: Vec<String> = self.state.accounts.iter().filter(|(_, a)| a.shared).map(|(n, _)| n.clone()).collect();
        held.iter().for_each(|account| self.idle_later(account));
    }

    /// New settings: what was said before them decides nothing.
    pub(super) fn forget_told(&mut self) {
        self.escrows.told.clear();
        self.escrows.asked.clear();
    }

    pub(super) fn say_all_again(&mut self) {
        self.escrows.again_at = None;
        let mut again: Vec<(u32, Say)> = Vec::new();
        for (holder, no) in &self.escrows.unsaid {
            let shared = self.state.lent().get(holder).and_then(|line| line.open.get(no));
            again.extend(shared.map(|of| (*holder, Say::Share(Numbered { no: *no, of: of.clone() }))));
        }
        for (home, line) in self.state.holding() {
            let back = |(no, out): (&u64, &crate::state::Out)| {
                (*home, Say::Back(Back { no: *no, settled: out.settled, unused: out.unused }))
            };
            again.extend(line.out.iter().map(back));
        }
        for late in self.state.late().values() {
            let home = self.settings.placement.home_of(&late.account);
            again.push((home, Say::Late(LateSaid { late: late.clone(), taken: false })));
        }
        if again.is_empty() {
            return;
        }
        again.truncate(AGAIN_MAX);
        again.into_iter().for_each(|(shard, say)| self.say(shard, say));
        self.say_again_later();
    }
}

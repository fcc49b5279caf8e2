//! The slots of one agent: lent, used by a dispatch, given back, lapsed. Whose turn it is says `queue`; how many there are
//! says the machine.
//!
//! ```text
//!            Want            room in the window             Dispatch
//!   (unknown) ----> Wanted ----------------------> Lent ----------------> Running ---- Ended / incarnation lost ---> (gone)
//!                     | Back, 5 s without repeat     | Back, 2 s, higher epoch
//!                     v                              v
//!                   (gone)                         (gone)      Dispatch without a live slot -> Unsent, remembered
//! ```
//!
//! Only the machine that lent a slot sends the plain dispatch of it, so its word that it didn't proves that nobody did. Anywhere else,
//! at another router or after a restart, the dispatch becomes a question: its agent knows whether it runs the call.

use super::Agent;
use super::queue::Wish;
use crate::message::{AgentEffect, FromAgent, Outcome, ToAgent};
use atp_proto::content::Dispatch;
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Frame, Qos};
use std::sync::Arc;

/// A lent slot lapses after this long.
pub const SLOT_MS: u64 = 2_000;
/// A shard that wants a slot repeats itself more often than this.
const WANT_MS: u64 = 5_000;
/// What is remembered of calls that ended, so that a late repeat never leaves again.
const MEMORY_MS: u64 = 600_000;
const MEMORY_MAX: usize = 65_536;

/// What an agent's router knows of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Wanted {
        epoch: u64,
        until: u64,
        /// From then on a slot is of no use to it.
        late_at: u64,
        /// It was `Lost` before, and is again if nothing comes of this.
        lost: bool,
    },
    Lent {
        epoch: u64,
        until: u64,
        held: Held,
        lost: bool,
    },
    Running {
        epoch: u64,
        held: Held,
    },
    /// It was sent to an incarnation that is gone. Its owner may ask for another slot, if the upstream dedupes.
    Lost,
    /// Never sent under this epoch, and never will be; or ended.
    Over {
        epoch: u64,
        unsent: bool,
    },
}

/// What a slot in use holds of its agent's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    gold: bool,
    amount: Amount,
    /// When it was lent.
    began: u64,
}

impl Held {
    /// Of a call that only its agent or its owner remembers.
    pub(super) const fn unknown(began: u64) -> Self {
        Self { gold: false, amount: Amount::ZERO, began }
    }
}

/// What is in use of an agent's window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) calls: u32,
    pub(super) gold: u32,
    /// Lent, not dispatched.
    pub(super) lent: u32,
    pub(super) amount: Amount,
}

impl Used {
    fn add(&mut self, held: Held) {
        self.calls += 1;
        self.gold += u32::from(held.gold);
        self.amount.tokens.0 = self.amount.tokens.0.saturating_add(held.amount.tokens.0);
        self.amount.usd_micros.0 = self.amount.usd_micros.0.saturating_add(held.amount.usd_micros.0);
    }

    fn free(&mut self, held: Held) {
        self.calls -= 1;
        self.gold -= u32::from(held.gold);
        self.amount = self.amount.less(held.amount);
    }
}

impl Agent {
    /// Lends slots while somebody waits and there is room.
    pub(super) fn lend(&mut self) {
        while let Some((call, wish)) = self.next_in_turn() {
            let live = self.calls.get_mut(&call).and_then(|(shard, slot)| match *slot {
                Slot::Wanted { epoch, until, late_at, lost } if self.now_ms < until.min(late_at) => {
                    Some((*shard, epoch, lost, slot))
                }
                _ => None,
            });
            let Some((shard, epoch, lost, slot)) = live else {
                // Nobody's turn is spent on it.
                self.drop_slot(call);
                self.queue.remove(&call);
                continue;
            };
            self.queue.take(&call);
            self.due = self.due.min(self.now_ms + SLOT_MS);
            let held = Held { gold: wish.qos == Qos::Gold, amount: wish.amount, began: self.now_ms };
            *slot = Slot::Lent { epoch, until: self.now_ms + SLOT_MS, held, lost };
            self.used.add(held);
            self.used.lent += 1;
            self.breaker.lent(call);
            self.lent(shard, call, epoch);
        }
    }

    fn lent(&mut self, shard: u32, call: CallId, epoch: u64) {
        let (agent, incarnation, keeper) = (self.name.clone(), self.incarnation(), self.lender());
        let message = FromAgent::Lent { agent, incarnation, call, epoch, keeper };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
    }

    /// The slot of a call is free again.
    fn free(&mut self, call: CallId, held: Held, lent: bool) {
        self.used.free(held);
        self.used.lent -= u32::from(lent);
        self.breaker.freed(call);
    }

    fn lender(&self) -> Arc<str> {
        self.link.as_ref().map_or_else(|| "".into(), |l| l.lender.clone())
    }

    fn lent_by_me(&self, keeper: &str) -> bool {
        keeper.rsplit_once('/').is_some_and(|(id, _)| id == &*self.id)
    }

    /// The process behind the handle is another: its slots fall with the calls that it ran.
    pub(super) fn incarnation_lost(&mut self) {
        let mut died = 0;
        let slots: Vec<(CallId, Slot)> = self.calls.iter().map(|(id, (_, slot))| (*id, *slot)).collect();
        for (call, slot) in slots {
            match slot {
                Slot::Lent { held, lost, .. } => {
                    self.free(call, held, true);
                    self.leave(call, lost);
                }
                Slot::Running { held, .. } => {
                    self.free(call, held, false);
                    self.leave(call, true);
                    died += 1;
                }
                Slot::Wanted { .. } | Slot::Lost | Slot::Over { .. } => {}
            }
        }
        if died > 0 {
            // However many calls it ran: one process that died is one failure.
            self.failed(self.now_ms);
        }
    }

    /// Notes the epoch; false where a higher one was seen of that shard.
    pub(super) fn fence(&mut self, shard: u32, epoch: u64) -> bool {
        let highest = self.epochs.entry(shard).or_insert(epoch);
        if epoch < *highest {
            return false;
        }
        if epoch > *highest {
            *highest = epoch;
            let old = |(s, slot): &(u32, Slot)| match slot {
                Slot::Lent { epoch: e, .. } | Slot::Wanted { epoch: e, .. } => *s == shard && *e < epoch,
                Slot::Running { .. } | Slot::Lost | Slot::Over { .. } => false,
            };
            let fallen: Vec<CallId> = self.calls.iter().filter(|(_, c)| old(c)).map(|(id, _)| *id).collect();
            fallen.into_iter().for_each(|call| self.drop_slot(call));
            self.lend();
        }
        true
    }

    /// A slot that is lent or wanted is no more.
    fn drop_slot(&mut self, call: CallId) {
        match self.calls.get(&call) {
            Some((_, Slot::Wanted { lost, .. })) => {
                self.leave(call, *lost);
                self.queue.remove(&call);
            }
            Some((_, Slot::Lent { held, lost, .. })) => {
                let (held, lost) = (*held, *lost);
                self.leave(call, lost);
                self.free(call, held, true);
            }
            Some((_, Slot::Running { .. } | Slot::Lost | Slot::Over { .. })) | None => {}
        }
    }

    /// A call has no slot here any more. That it was sent to a process that is gone isn't forgotten with it.
    fn leave(&mut self, call: CallId, lost: bool) {
        if lost && let Some((_, slot)) = self.calls.get_mut(&call) {
            *slot = Slot::Lost;
            self.over.push_back((self.now_ms + MEMORY_MS, call));
        } else {
            self.calls.remove(&call);
        }
    }

    pub(super) fn shard(&mut self, message: ToAgent) {
        match message {
            ToAgent::Owner { shard, epoch } => {
                if self.fence(shard, epoch) {
                    self.up(Some(shard));
                }
            }
            ToAgent::Want { shard, epoch, call, wish } => {
                if self.fence(shard, epoch) {
                    self.want(shard, epoch, call, wish);
                }
            }
            ToAgent::Back { shard, epoch, call } => {
                if self.fence(shard, epoch) {
                    self.drop_slot(call);
                    self.lend();
                }
            }
            ToAgent::Dispatch { shard, epoch, call, incarnation, go_on, keeper, frame } => {
                let live = self.fence(shard, epoch);
                // What one incarnation says proves nothing of another.
                let here = self.is_here(&incarnation);
                match go_on {
                    true if live && here => self.go_on(shard, epoch, call, frame),
                    true => {}
                    // The slot that is wanted or lent is for a later dispatch of this call.
                    false if !here && self.holds_place(&call) => {}
                    false if !self.lent_by_me(&keeper) => {
                        if live && here {
                            self.go_on(shard, epoch, call, question(&frame));
                        }
                    }
                    false => {
                        let live = live && here && keeper == self.lender();
                        self.dispatch(shard, epoch, call, frame, live);
                    }
                }
            }
            ToAgent::Pass { shard, epoch, incarnation, frame, .. } => {
                // What was on its way to a process that is gone would be taken for an answer by the next one.
                if self.fence(shard, epoch)
                    && self.is_here(&incarnation)
                    && let Some(conn) = self.conn()
                {
                    self.effects.push_back(AgentEffect::Send { conn, frame });
                }
            }
            ToAgent::Ended { shard, epoch, call, outcome } => {
                if self.fence(shard, epoch) {
                    self.learn(&call, outcome);
                    self.over(shard, epoch, call, false);
                    self.lend();
                }
            }
            ToAgent::Standing { shard, epoch, incarnation, status, drained } => {
                if self.fence(shard, epoch) {
                    self.standing(&incarnation, status, drained);
                    let others: Vec<u32> = self.epochs.keys().copied().filter(|n| *n != shard).collect();
                    others.into_iter().for_each(|other| self.stands_told(other));
                    self.lend();
                }
            }
        }
    }

    /// What the end of a call says of its agent.
    fn learn(&mut self, call: &CallId, outcome: Outcome) {
        if let Outcome::Refused { retry_after_ms } = outcome {
            self.skip_until = self.skip_until.max(self.now_ms.saturating_add(retry_after_ms));
        }
        let Some((_, Slot::Running { held, .. })) = self.calls.get(call) else { return };
        let (began, now, flow) = (held.began, self.now_ms, &self.settings.flow);
        match outcome {
            Outcome::Done { latency_ms, over_ppm, congested } => {
                self.breaker.succeeded(began);
                self.cool_off.over(over_ppm, flow.cool_off_ppm, began, now);
                if congested {
                    self.aimd.cut(began, now);
                } else if latency_ms <= flow.latency_target_ms {
                    self.aimd.met(self.used.calls, flow.aimd_cap);
                }
            }
            Outcome::Failed => self.failed(began),
            Outcome::Refused { .. } | Outcome::Unknown => {}
        }
    }

    fn failed(&mut self, began: u64) {
        self.aimd.cut(began, self.now_ms);
        self.breaker.failed(began, self.now_ms);
    }

    fn want(&mut self, shard: u32, epoch: u64, call: CallId, wish: Wish) {
        let (until, late_at) = (self.now_ms + WANT_MS, self.now_ms.saturating_add(wish.lasts_ms));
        self.due = self.due.min(until);
        match self.calls.get_mut(&call).map(|(_, slot)| slot) {
            Some(Slot::Wanted { until: old, late_at: old_late, .. }) => {
                (*old, *old_late) = (until, late_at);
                self.queue.push(call, wish);
            }
            Some(Slot::Lent { .. }) => self.lent(shard, call, epoch),
            Some(Slot::Running { .. }) => {}
            Some(Slot::Over { epoch: over, .. }) if *over >= epoch => {}
            slot @ (Some(Slot::Over { .. } | Slot::Lost) | None) => {
                let lost = slot.is_some_and(|slot| *slot == Slot::Lost);
                self.calls.insert(call, (shard, Slot::Wanted { epoch, until, late_at, lost }));
                self.queue.push(call, wish);
            }
        }
        self.lend();
    }

    fn holds_place(&self, call: &CallId) -> bool {
        matches!(self.calls.get(call), Some((_, Slot::Wanted { .. } | Slot::Lent { .. })))
    }

    fn dispatch(&mut self, shard: u32, epoch: u64, call: CallId, frame: Frame, live: bool) {
        let slot = self.calls.get(&call).map(|(_, slot)| *slot);
        let unsent = match slot {
            Some(Slot::Running { .. } | Slot::Lost) => false,
            Some(Slot::Over { unsent, .. }) => unsent,
            Some(Slot::Lent { epoch: lent, until, held, .. })
                if live && lent == epoch && self.now_ms < until && self.may_leave(held.gold) =>
            {
                if let Some(conn) = self.conn() {
                    self.calls.insert(call, (shard, Slot::Running { epoch, held }));
                    self.used.lent -= 1;
                    self.burst.note(self.now_ms, self.settings.flow.burst);
                    self.effects.push_back(AgentEffect::Send { conn, frame });
                }
                false
            }
            Some(Slot::Lent { .. } | Slot::Wanted { .. }) | None => {
                self.over(shard, epoch, call, true);
                true
            }
        };
        let agent = self.name.clone();
        let message =
            if unsent { FromAgent::Unsent { agent, call, epoch } } else { FromAgent::Sent { agent, call, epoch } };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
        if unsent {
            self.lend();
        }
    }

    /// Asks an agent that may run the call. From now on a plain dispatch of it never leaves under this epoch.
    fn go_on(&mut self, shard: u32, epoch: u64, call: CallId, frame: Frame) {
        let Some(conn) = self.conn() else { return };
        let mut held = Held::unknown(self.now_ms);
        match self.calls.get(&call).map(|(_, slot)| *slot) {
            Some(Slot::Over { epoch: over, unsent }) if over >= epoch => {
                if unsent {
                    let message = FromAgent::Unsent { agent: self.name.clone(), call, epoch };
                    self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
                }
                return;
            }
            Some(Slot::Running { held: known, .. }) => held = known,
            Some(Slot::Lent { held: known, .. }) => {
                self.used.lent -= 1;
                held = known;
            }
            Some(Slot::Wanted { .. } | Slot::Lost | Slot::Over { .. }) | None => {
                self.queue.remove(&call);
                self.used.add(held);
            }
        }
        self.calls.insert(call, (shard, Slot::Running { epoch, held }));
        self.effects.push_back(AgentEffect::Send { conn, frame });
        let message = FromAgent::Sent { agent: self.name.clone(), call, epoch };
        self.effects.push_back(AgentEffect::ToShard { shard: Some(shard), message });
    }

    /// A call that its agent lists runs, whoever else forgot it.
    pub(super) fn listed(&mut self, call: CallId, shard: u32, epoch: u64) {
        if let std::collections::btree_map::Entry::Vacant(free) = self.calls.entry(call) {
            let held = Held::unknown(self.now_ms);
            free.insert((shard, Slot::Running { epoch, held }));
            self.used.add(held);
        }
    }

    fn over(&mut self, shard: u32, epoch: u64, call: CallId, unsent: bool) {
        match self.calls.insert(call, (shard, Slot::Over { epoch, unsent })) {
            Some((_, Slot::Lent { held, .. })) => self.free(call, held, true),
            Some((_, Slot::Running { held, .. })) => self.free(call, held, false),
            Some((_, Slot::Over { unsent: true, .. })) => {
                self.calls.insert(call, (shard, Slot::Over { epoch, unsent: true }));
                return;
            }
            Some((_, Slot::Wanted { .. })) => {
                self.queue.remove(&call);
            }
            Some((_, Slot::Lost | Slot::Over { .. })) | None => {}
        }
        self.over.push_back((self.now_ms + MEMORY_MS, call));
        self.forget();
    }

    pub(super) fn forget(&mut self) {
        while let Some(&(until, call)) = self.over.front() {
            if until > self.now_ms && self.over.len() <= MEMORY_MAX {
                return;
            }
            self.over.pop_front();
            if matches!(self.calls.get(&call), Some((_, Slot::Over { .. } | Slot::Lost))) {
                self.calls.remove(&call);
            }
        }
    }

    /// Slots that weren't used and wishes that weren't repeated are no more.
    pub(super) fn lapse(&mut self) {
        let until = |slot: &Slot| match slot {
            Slot::Lent { until, .. } | Slot::Wanted { until, .. } => Some(*until),
            Slot::Running { .. } | Slot::Lost | Slot::Over { .. } => None,
        };
        let now = self.now_ms;
        let lapsed: Vec<CallId> = self
            .calls
            .iter()
            .filter(|(_, (_, slot))| until(slot).is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        lapsed.into_iter().for_each(|call| self.drop_slot(call));
        self.due = self.calls.values().filter_map(|(_, s)| until(s)).min().unwrap_or(u64::MAX);
    }

    fn is_here(&self, incarnation: &str) -> bool {
        self.link.as_ref().is_some_and(|l| l.capabilities.incarnation == incarnation)
    }

    pub(super) fn incarnation(&self) -> Arc<str> {
        self.link.as_ref().map_or_else(|| "".into(), |l| l.capabilities.incarnation.as_str().into())
    }
}

/// The same dispatch as a question: an agent that doesn't run the call says so, and doesn't begin it.
fn question(frame: &Frame) -> Frame {
    let Ok(dispatch) = frame.read::<Dispatch>() else { return frame.clone() };
    let dispatch = Dispatch { go_on: true, ..dispatch };
    Frame::json(&*frame.stream_id, frame.msg_seq, frame.flags, kind::DISPATCH, &dispatch)
}

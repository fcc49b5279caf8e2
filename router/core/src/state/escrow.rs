//! Shares in the fold: what an account's home has lent, what this shard holds of other homes, and what both still have to tell
//! each other. The shares of one account and window that a shard holds are one purse: its limit is their sum.

use super::fold::range;
use super::{Done, State};
use crate::account::{AccountWindow, replace};
use crate::record::{AmountPb, Late, Share, ShareBack, ShareIn, ShareLate, ShareOut, Shared, WindowRef};
use atp_proto::Amount;
use prost::Message;
use std::collections::BTreeMap;

/// Shares that this shard, as home, has lent to one other.
#[derive(Clone, PartialEq, Message)]
pub struct Lent {
    /// The newest number; kept for ever.
    #[prost(uint64, tag = "1")]
    pub last: u64,
    /// Not back yet, by number.
    #[prost(btree_map = "uint64, message", tag = "2")]
    pub open: BTreeMap<u64, Shared>,
}

/// Shares that this shard has of one home.
#[derive(Clone, PartialEq, Message)]
pub struct Holding {
    /// The newest number; kept for ever.
    #[prost(uint64, tag = "1")]
    pub last: u64,
    /// To spend, by number.
    #[prost(btree_map = "uint64, message", tag = "2")]
    pub open: BTreeMap<u64, WindowRef>,
    /// Given back, and home may not know it yet.
    #[prost(btree_map = "uint64, message", tag = "3")]
    pub out: BTreeMap<u64, Out>,
}

/// What a share gives back.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Out {
    /// What was spent.
    #[prost(message, required, tag = "1")]
    pub settled: AmountPb,
    /// What wasn't.
    #[prost(message, required, tag = "2")]
    pub unused: AmountPb,
}

/// Of one account, what one other shard has.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LentTo {
    /// How many it has.
    #[prost(uint32, tag = "1")]
    pub shares: u32,
    /// Calls at once, where the shares say how many.
    #[prost(uint32, tag = "2")]
    pub calls: u32,
}

/// One share in a purse.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Piece {
    /// Of money.
    #[prost(message, required, tag = "1")]
    pub amount: AmountPb,
    /// Calls at once; absent: without a limit.
    #[prost(uint32, optional, tag = "2")]
    pub calls: Option<u32>,
}

impl AccountWindow {
    /// What share `no` would give back now; `None` while calls need it.
    ///
    /// What is spent goes first: it is the home's to know. With calls open, what stays behind has to hold them, all of them.
    #[must_use]
    pub fn gives_back(&self, no: u64) -> Option<Out> {
        let amount = Amount::from(self.shares.get(&no)?.amount);
        let (settled, held) = (Amount::from(self.settled), Amount::from(self.held));
        let last = self.shares.len() == 1;
        if last && self.open > 0 {
            return None;
        }
        let goes = if last { settled } else { settled.min(amount) };
        let rest = self.level().limit.amount().less(amount);
        let stays = settled.less(goes).add(held).ok()?;
        let calls = self
            .shares
            .iter()
            .filter(|(n, _)| **n != no)
            .try_fold(0_u32, |sum, (_, p)| Some(sum.saturating_add(p.calls?)));
        let carried = stays.fits(rest) && calls.is_none_or(|most| self.open <= most);
        (self.open == 0 || carried).then(|| Out { settled: goes.into(), unused: amount.less(goes).into() })
    }

    /// Calls that may run at once on the purse; `None`: no limit.
    #[must_use]
    pub fn calls(&self) -> Option<u32> {
        self.shares.values().try_fold(0_u32, |sum, piece| Some(sum.saturating_add(piece.calls?)))
    }
}

impl State {
    pub(super) fn share(&mut self, r: &Share) -> Done {
        let (shared, amount) = (&r.of, r.of.amount.into());
        let line = self.lent.entry(r.holder).or_default();
        if r.no != line.last + 1 {
            return Err(format!("number {} follows {}", r.no, line.last));
        }
        line.last = r.no;
        line.open.insert(r.no, shared.clone());
        let window = self.account_window(&shared.account, &shared.window)?;
        replace(&mut window.lent, Amount::ZERO, amount).map_err(range)?;
        if let Some(account) = self.accounts.get_mut(&shared.account) {
            let to = account.lent_to.entry(r.holder).or_default();
            to.shares += 1;
            to.calls = to.calls.saturating_add(shared.calls.unwrap_or(0));
        }
        Ok(())
    }

    pub(super) fn share_in(&mut self, r: &ShareIn) -> Done {
        let (shared, amount) = (&r.of, Amount::from(r.of.amount));
        let line = self.holding.entry(r.home).or_default();
        if r.no != line.last + 1 {
            return Err(format!("number {} follows {}", r.no, line.last));
        }
        line.last = r.no;
        let at = WindowRef { account: shared.account.clone(), window: shared.window.clone(), shared: true };
        line.open.insert(r.no, at);
        let account = self.accounts.entry(shared.account.clone()).or_default();
        account.shared = true;
        if shared.current {
            (account.current, account.per) = (shared.window.clone(), shared.per.clone());
        }
        let window = account.windows.entry(shared.window.clone()).or_default();
        window.ends_ms = shared.ends_ms;
        window.shares.insert(r.no, Piece { amount: amount.into(), calls: shared.calls });
        window.limit_shares()
    }

    pub(super) fn share_out(&mut self, r: &ShareOut) -> Done {
        let line = self.holding.entry(r.home).or_default();
        let at = line.open.remove(&r.no).ok_or_else(|| format!("share {} isn't here", r.no))?;
        let out = Out { settled: r.settled, unused: r.unused };
        line.out.insert(r.no, out);
        let window = self.account_window(&at.account, &at.window)?;
        if window.gives_back(r.no) != Some(out) {
            return Err(format!("share {} can't be given back so", r.no));
        }
        window.shares.remove(&r.no);
        replace(&mut window.settled, out.settled.into(), Amount::ZERO).map_err(range)?;
        window.limit_shares()?;
        if window.shares.is_empty()
            && let Some(account) = self.accounts.get_mut(&at.account)
        {
            account.windows.remove(&at.window);
            if account.windows.is_empty() && account.faster.is_none() {
                self.accounts.remove(&at.account);
            }
        }
        Ok(())
    }

    pub(super) fn share_back(&mut self, r: &ShareBack) -> Done {
        if r.home != self.shard {
            let known = self.holding.get_mut(&r.home).and_then(|line| line.out.remove(&r.no));
            return match known {
                Some(out) if (out.settled, out.unused) == (r.settled, r.unused) => Ok(()),
                _ => Err(format!("share {} wasn't given back so", r.no)),
            };
        }
        let line = self.lent.get_mut(&r.holder);
        let shared =
            line.and_then(|line| line.open.remove(&r.no)).ok_or_else(|| format!("share {} isn't lent", r.no))?;
        let (amount, settled) = (Amount::from(shared.amount), Amount::from(r.settled));
        if Amount::from(r.unused) != amount.less(settled) {
            return Err(format!("share {} doesn't add up", r.no));
        }
        let window = self.account_window(&shared.account, &shared.window)?;
        replace(&mut window.lent, amount, Amount::ZERO).map_err(range)?;
        replace(&mut window.settled, Amount::ZERO, settled).map_err(range)?;
        if let Some(account) = self.accounts.get_mut(&shared.account)
            && let Some(to) = account.lent_to.get_mut(&r.holder)
        {
            to.shares = to.shares.saturating_sub(1);
            to.calls = to.calls.saturating_sub(shared.calls.unwrap_or(0));
            if to.shares == 0 {
                account.lent_to.remove(&r.holder);
            }
        }
        Ok(())
    }

    pub(super) fn share_late(&mut self, r: &ShareLate) -> Done {
        let late = &r.late;
        if r.home != self.shard {
            return match self.late.remove(&late.evidence) {
                Some(known) if known == *late => Ok(()),
                _ => Err(format!("{} isn't late", late.evidence)),
            };
        }
        // A window that is long over may be forgotten.
        let Ok(window) = self.account_window(&late.account, &late.window) else { return Ok(()) };
        if window.late.contains(&late.evidence) {
            return Err(format!("evidence {} counts once", late.evidence));
        }
        window.late.push(late.evidence.clone());
        replace(&mut window.settled, late.from.into(), late.to.into()).map_err(range)
    }

    /// A settled call cost more or less than was booked: in the purse if that still has it, else the home has to be told.
    pub(super) fn adjust_share(&mut self, at: &WindowRef, evidence: String, from: Amount, to: Amount) -> Done {
        if let Ok(window) = self.account_window(&at.account, &at.window)
            && from.fits(window.settled.into())
        {
            return replace(&mut window.settled, from, to).map_err(range);
        }
        let (account, window) = (at.account.clone(), at.window.clone());
        let late = Late { evidence: evidence.clone(), account, window, from: from.into(), to: to.into() };
        self.late.insert(evidence, late);
        Ok(())
    }

    /// As home: lent and not back, by holder.
    #[must_use]
    pub fn lent(&self) -> &BTreeMap<u32, Lent> {
        &self.lent
    }
    /// As holder: what is here of each home.
    #[must_use]
    pub fn holding(&self) -> &BTreeMap<u32, Holding> {
        &self.holding
    }
    /// Adjusts that a home may not know yet, by evidence.
    #[must_use]
    pub fn late(&self) -> &BTreeMap<String, Late> {
        &self.late
    }
    /// The newest Epoch's.
    #[must_use]
    pub fn shard(&self) -> u32 {
        self.shard
    }
}

impl AccountWindow {
    /// The purse's limit is the sum of its shares.
    fn limit_shares(&mut self) -> Done {
        let sum = self.shares.values().try_fold(Amount::ZERO, |sum, piece| sum.add(piece.amount.into()));
        let sum = sum.map_err(range)?;
        self.limit = crate::record::LimitPb { tokens: Some(sum.tokens.0), usd_micros: Some(sum.usd_micros.0) };
        Ok(())
    }
}

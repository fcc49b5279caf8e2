//! Accounts and their windows: limit, settled, held. Part of the fold; decides nothing.

use crate::clock::{civil, days_to_month};
use crate::record::{AmountPb, LimitPb};
use crate::settings::Per;
use crate::state::{LentTo, Piece};
use atp_proto::money::OutOfRange;
use atp_proto::{Amount, Limit};
use prost::Message;
use std::collections::BTreeMap;

/// One account: every window that is open or may still be adjusted.
#[derive(Clone, PartialEq, Message)]
pub struct Account {
    /// `minute`, `hour`, `day`, `month` or `total`.
    #[prost(string, tag = "1")]
    pub per: String,
    /// The window in which new calls are reserved.
    #[prost(string, tag = "2")]
    pub current: String,
    /// By id of the window.
    #[prost(btree_map = "string, message", tag = "3")]
    pub windows: BTreeMap<String, AccountWindow>,
    /// The newest authorisation to go faster than the account's pace.
    #[prost(message, optional, tag = "4")]
    pub faster: Option<crate::record::Faster>,
    /// Its home is another shard: the windows are purses of shares.
    #[prost(bool, tag = "5")]
    pub shared: bool,
    /// As home: which shards have shares of it.
    #[prost(btree_map = "uint32, message", tag = "6")]
    pub lent_to: BTreeMap<u32, LentTo>,
}

#[derive(Clone, PartialEq, Message)]
pub struct AccountWindow {
    /// The newest one.
    #[prost(message, required, tag = "1")]
    pub limit: LimitPb,
    /// Unix ms; absent: never.
    #[prost(uint64, optional, tag = "2")]
    pub ends_ms: Option<u64>,
    /// What ended calls cost.
    #[prost(message, required, tag = "3")]
    pub settled: AmountPb,
    /// What open calls may still cost.
    #[prost(message, required, tag = "4")]
    pub held: AmountPb,
    /// As home: what other shards may spend of it.
    #[prost(message, required, tag = "5")]
    pub lent: AmountPb,
    /// Of a purse: its shares by number.
    #[prost(btree_map = "uint64, message", tag = "6")]
    pub shares: BTreeMap<u64, Piece>,
    /// As home: evidence of Adjusts that came behind their share.
    #[prost(string, repeated, tag = "7")]
    pub late: Vec<String>,
    /// Of a purse: calls that are reserved or run on it.
    #[prost(uint32, tag = "8")]
    pub open: u32,
}

/// Limit, settled and held of one level: an account's window or a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    pub limit: Limit,
    pub settled: Amount,
    pub held: Amount,
}

impl Level {
    /// What the limit leaves beside what is settled; `u64::MAX` without a limit.
    #[must_use]
    pub fn left(&self) -> Amount {
        unlimited(self.limit, self.limit.amount().less(self.settled))
    }

    /// What is neither settled nor held.
    #[must_use]
    pub fn free(&self) -> Amount {
        unlimited(self.limit, self.limit.amount().less(self.settled).less(self.held))
    }
}

/// A dimension without a limit stays without one, whatever was spent.
fn unlimited(limit: Limit, mut amount: Amount) -> Amount {
    if limit.tokens.is_none() {
        amount.tokens = atp_proto::Tokens::MAX;
    }
    if limit.usd_micros.is_none() {
        amount.usd_micros = atp_proto::UsdMicros::MAX;
    }
    amount
}

impl AccountWindow {
    /// As it bears on decisions: what is lent counts as held.
    #[must_use]
    pub fn level(&self) -> Level {
        let held = Amount::from(self.held).add(self.lent.into()).unwrap_or(Amount::new(u64::MAX, u64::MAX));
        Level { limit: self.limit.into(), settled: self.settled.into(), held }
    }
}

/// Replaces `from` by `to` in a sum that contains `from`.
pub(crate) fn replace(sum: &mut AmountPb, from: Amount, to: Amount) -> Result<(), OutOfRange> {
    *sum = Amount::from(*sum).sub(from)?.add(to)?.into();
    Ok(())
}

/// The calendar window (UTC) of a logged time: its id and its end in Unix milliseconds.
#[must_use]
pub fn window_at(per: Per, at_ms: u64) -> (String, Option<u64>) {
    let minutes = at_ms / 60_000;
    let (year, month, day) = civil(at_ms / 86_400_000);
    let (hour, minute) = (minutes / 60 % 24, minutes % 60);
    match per {
        Per::Minute => (format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}"), Some((minutes + 1) * 60_000)),
        Per::Hour => (format!("{year:04}-{month:02}-{day:02}T{hour:02}"), Some((at_ms / 3_600_000 + 1) * 3_600_000)),
        Per::Day => (format!("{year:04}-{month:02}-{day:02}"), Some((at_ms / 86_400_000 + 1) * 86_400_000)),
        Per::Month => {
            let next = if month == 12 { days_to_month(year + 1, 1) } else { days_to_month(year, month + 1) };
            (format!("{year:04}-{month:02}"), Some(next * 86_400_000))
        }
        Per::Total => ("total".into(), None),
    }
}

/// When the calendar window that ends at `ends_ms` begins; `None` for one that never ends.
#[must_use]
pub fn window_begin(per: Per, ends_ms: u64) -> Option<u64> {
    let length = match per {
        Per::Minute => 60_000,
        Per::Hour => 3_600_000,
        Per::Day => 86_400_000,
        Per::Month => {
            let (year, month, _) = civil(ends_ms.checked_sub(1)? / 86_400_000);
            return Some(days_to_month(year, month) * 86_400_000);
        }
        Per::Total => return None,
    };
    ends_ms.checked_sub(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_calendar_windows() {
        let at = 1_709_210_096_789; // 2024-02-29T12:34:56.789Z
        assert_eq!(window_at(Per::Minute, at), ("2024-02-29T12:34".into(), Some(1_709_210_100_000)));
        assert_eq!(window_at(Per::Hour, at), ("2024-02-29T12".into(), Some(1_709_211_600_000)));
        assert_eq!(window_at(Per::Day, at), ("2024-02-29".into(), Some(1_709_251_200_000)));
        assert_eq!(window_at(Per::Month, at), ("2024-02".into(), Some(1_709_251_200_000)));
        assert_eq!(window_at(Per::Total, at), ("total".into(), None));
        assert_eq!(window_at(Per::Month, 1_735_603_200_000), ("2024-12".into(), Some(1_735_689_600_000)));
    }

    #[test]
    fn a_window_begins_where_the_one_before_ends() {
        let at = 1_709_210_096_789;
        for per in [Per::Minute, Per::Hour, Per::Day, Per::Month] {
            let (id, ends) = window_at(per, at);
            let begins = window_begin(per, ends.expect("it ends")).expect("it begins");
            assert!(begins <= at && window_at(per, begins).0 == id && window_at(per, begins - 1).1 == Some(begins));
        }
        assert_eq!(window_begin(Per::Total, 0), None);
    }

    #[test]
    fn a_missing_limit_never_binds() {
        let level = Level {
            limit: Limit { tokens: Some(atp_proto::Tokens(10)), usd_micros: None },
            settled: Amount::new(4, 9),
            held: Amount::new(5, 9),
        };
        assert_eq!(level.left(), Amount::new(6, u64::MAX));
        assert_eq!(level.free(), Amount::new(1, u64::MAX));
    }
}

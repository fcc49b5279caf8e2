//! Records of money that one shard spends for another: the account's home lends a share, the holder gives it back. Both sides
//! write; a share is known by (home, holder, number), numbers rise by one.

use super::AmountPb;
use prost::Message;

/// Home: so much of a window is the holder's to spend.
#[derive(Clone, PartialEq, Message)]
pub struct Share {
    /// The shard that may spend it.
    #[prost(uint32, tag = "1")]
    pub holder: u32,
    /// From 1, for each (home, holder).
    #[prost(uint64, tag = "2")]
    pub no: u64,
    /// What the holder is told of it.
    #[prost(message, required, tag = "3")]
    pub of: Shared,
}

/// Holder: it has the share, and may spend it from here on.
#[derive(Clone, PartialEq, Message)]
pub struct ShareIn {
    /// The account's home shard.
    #[prost(uint32, tag = "1")]
    pub home: u32,
    /// As in Share.
    #[prost(uint64, tag = "2")]
    pub no: u64,
    /// As in Share.
    #[prost(message, required, tag = "3")]
    pub of: Shared,
}

/// What a share is of.
#[derive(Clone, PartialEq, Message)]
pub struct Shared {
    #[prost(string, tag = "1")]
    pub account: String,
    /// The account's window that it counts in, for ever.
    #[prost(string, tag = "2")]
    pub window: String,
    /// Of that window: Unix ms; absent: never.
    #[prost(uint64, optional, tag = "3")]
    pub ends_ms: Option<u64>,
    /// Of the account: `minute`, `hour`, `day`, `month` or `total`.
    #[prost(string, tag = "4")]
    pub per: String,
    /// False: a window that is over, for calls that run in it still.
    #[prost(bool, tag = "5")]
    pub current: bool,
    /// What may be spent.
    #[prost(message, required, tag = "6")]
    pub amount: AmountPb,
    /// Calls of the account that may run at once on it; absent: no limit.
    #[prost(uint32, optional, tag = "7")]
    pub calls: Option<u32>,
}

/// Holder: nothing is reserved in the share any more, and this is what it gives back.
#[derive(Clone, PartialEq, Message)]
pub struct ShareOut {
    /// As in ShareIn.
    #[prost(uint32, tag = "1")]
    pub home: u32,
    /// As in Share.
    #[prost(uint64, tag = "2")]
    pub no: u64,
    /// What was spent; more than the share where calls cost more than their hold.
    #[prost(message, required, tag = "3")]
    pub settled: AmountPb,
    /// What wasn't.
    #[prost(message, required, tag = "4")]
    pub unused: AmountPb,
}

/// Home: the share is back. Holder: home knows, nobody has to be told again.
#[derive(Clone, PartialEq, Message)]
pub struct ShareBack {
    /// As in ShareIn.
    #[prost(uint32, tag = "1")]
    pub home: u32,
    /// As in Share.
    #[prost(uint32, tag = "2")]
    pub holder: u32,
    /// As in Share.
    #[prost(uint64, tag = "3")]
    pub no: u64,
    /// As in ShareOut.
    #[prost(message, required, tag = "4")]
    pub settled: AmountPb,
    /// As in ShareOut.
    #[prost(message, required, tag = "5")]
    pub unused: AmountPb,
}

/// An Adjust of a call whose share is gone. Home: counted, once for each (call, evidence). Holder: home knows.
#[derive(Clone, PartialEq, Message)]
pub struct ShareLate {
    /// As in ShareIn.
    #[prost(uint32, tag = "1")]
    pub home: u32,
    /// As in Share.
    #[prost(uint32, tag = "2")]
    pub holder: u32,
    /// What is counted.
    #[prost(message, required, tag = "3")]
    pub late: Late,
}

/// By how much a settled call of a window cost more, or less, than was booked.
#[derive(Clone, PartialEq, Message)]
pub struct Late {
    /// The call's id and its Adjust's evidence.
    #[prost(string, tag = "1")]
    pub evidence: String,
    #[prost(string, tag = "2")]
    pub account: String,
    /// Its window.
    #[prost(string, tag = "3")]
    pub window: String,
    /// Replaced by `to` in what is settled.
    #[prost(message, required, tag = "4")]
    pub from: AmountPb,
    /// What is settled instead.
    #[prost(message, required, tag = "5")]
    pub to: AmountPb,
}

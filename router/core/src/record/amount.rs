//! Amounts as records hold them.

use atp_proto::{Amount, Cost, Limit, Tokens, UsdMicros};
use prost::Message;

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AmountPb {
    #[prost(uint64, tag = "1")]
    pub tokens: u64,
    #[prost(uint64, tag = "2")]
    pub usd_micros: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LimitPb {
    #[prost(uint64, optional, tag = "1")]
    pub tokens: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    pub usd_micros: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CostPb {
    #[prost(uint64, tag = "1")]
    pub in_tokens: u64,
    #[prost(uint64, tag = "2")]
    pub out_tokens: u64,
    #[prost(uint64, tag = "3")]
    pub usd_micros: u64,
}

impl From<Amount> for AmountPb {
    fn from(a: Amount) -> Self {
        Self { tokens: a.tokens.0, usd_micros: a.usd_micros.0 }
    }
}
impl From<AmountPb> for Amount {
    fn from(a: AmountPb) -> Self {
        Self::new(a.tokens, a.usd_micros)
    }
}
impl From<Limit> for LimitPb {
    fn from(l: Limit) -> Self {
        Self { tokens: l.tokens.map(|t| t.0), usd_micros: l.usd_micros.map(|u| u.0) }
    }
}
impl From<LimitPb> for Limit {
    fn from(l: LimitPb) -> Self {
        Self { tokens: l.tokens.map(Tokens), usd_micros: l.usd_micros.map(UsdMicros) }
    }
}
impl From<Cost> for CostPb {
    fn from(c: Cost) -> Self {
        Self { in_tokens: c.in_tokens.0, out_tokens: c.out_tokens.0, usd_micros: c.usd_micros.0 }
    }
}
impl From<CostPb> for Cost {
    fn from(c: CostPb) -> Self {
        Self { in_tokens: Tokens(c.in_tokens), out_tokens: Tokens(c.out_tokens), usd_micros: UsdMicros(c.usd_micros) }
    }
}

//! What shards say to each other about an account's money: the home lends shares, holders wish for them and give them back; and
//! about gold tasks that wait for what others use. Each message may be lost, repeated or late; what counts is in the logs of
//! both. The shell only carries it.

use crate::record::{AmountPb, Late, LimitPb, Shared};
use prost::Message;

/// One message between an account's home shard and a shard that spends for it, or between a shard in which gold waits and any
/// other.
#[derive(Clone, PartialEq, Message)]
pub struct Escrow {
    #[prost(oneof = "Say", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    pub say: Option<Say>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Say {
    /// Holder: more money is needed. The newest of an account counts.
    #[prost(message, tag = "1")]
    Wish(Wish),
    /// Home: a share; repeated until `Taken` or `Back`.
    #[prost(message, tag = "2")]
    Share(Numbered),
    /// Holder: that number is in its log.
    #[prost(message, tag = "3")]
    Taken(Number),
    /// Holder: a share comes back; repeated until `BackTaken`.
    #[prost(message, tag = "4")]
    Back(Back),
    /// Home: that number is back, in its log.
    #[prost(message, tag = "5")]
    BackTaken(Number),
    /// Home: how the account stands; the answer to a wish, behind the shares that it brought.
    #[prost(message, tag = "6")]
    Stands(Stands),
    /// Home: what is idle is wanted back. Answered by `Recalled`.
    #[prost(message, tag = "7")]
    Recall(Wanted),
    /// Holder: nothing more is idle.
    #[prost(message, tag = "8")]
    Recalled(Recalled),
    /// Holder: an Adjust of a call whose share is gone; repeated until it comes back as it is.
    #[prost(message, tag = "9")]
    Late(LateSaid),
    /// Gold tasks of the sender wait. Answered by `Below`.
    #[prost(message, tag = "10")]
    Press(Press),
    /// Who could give way to them.
    #[prost(message, tag = "11")]
    Below(Below),
    /// Holder: a task that can begin looks for what its other lanes lack. Answered by `Share` or `NoMore`.
    #[prost(message, tag = "12")]
    Look(Look),
    /// Home: there is no more.
    #[prost(message, tag = "13")]
    NoMore(NoMore),
}

impl From<Say> for Escrow {
    fn from(say: Say) -> Self {
        Self { say: Some(say) }
    }
}

#[derive(Clone, PartialEq, Message)]
pub struct Wish {
    #[prost(string, tag = "1")]
    pub account: String,
    /// The window of running calls that need more; empty: new calls, whatever window is current.
    #[prost(string, tag = "2")]
    pub window: String,
    /// What all who wait here need; zero: no running call does any more.
    #[prost(message, required, tag = "3")]
    pub need: AmountPb,
    /// What the first of them needs: less helps nobody.
    #[prost(message, required, tag = "4")]
    pub least: AmountPb,
    /// Of the first: 1 gold, 2 silver, 3 bronze.
    #[prost(uint32, tag = "5")]
    pub qos: u32,
    /// Calls that wait and can't begin on what is here.
    #[prost(uint32, tag = "6")]
    pub calls: u32,
    /// The newest share of this home that is here: a later one is on its way, and may be all that is needed.
    #[prost(uint64, tag = "7")]
    pub last: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Look {
    #[prost(string, tag = "1")]
    pub account: String,
    /// A part of it helps nobody.
    #[prost(message, required, tag = "2")]
    pub need: AmountPb,
    /// Of the task: 1 gold, 2 silver, 3 bronze.
    #[prost(uint32, tag = "3")]
    pub qos: u32,
    /// Lanes that can't begin for want of calls.
    #[prost(uint32, tag = "4")]
    pub calls: u32,
    /// As in `Wish`.
    #[prost(uint64, tag = "5")]
    pub last: u64,
    /// Of the question; the answer says it again.
    #[prost(uint64, tag = "6")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct NoMore {
    #[prost(string, tag = "1")]
    pub account: String,
    /// Of the question.
    #[prost(uint64, tag = "2")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct Numbered {
    #[prost(uint64, tag = "1")]
    pub no: u64,
    #[prost(message, required, tag = "2")]
    pub of: Shared,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Number {
    #[prost(uint64, tag = "1")]
    pub no: u64,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub struct Back {
    #[prost(uint64, tag = "1")]
    pub no: u64,
    #[prost(message, required, tag = "2")]
    pub settled: AmountPb,
    #[prost(message, required, tag = "3")]
    pub unused: AmountPb,
}

/// The account's current window as its home sees it. What is lent is neither settled nor held in it.
#[derive(Clone, PartialEq, Message)]
pub struct Stands {
    #[prost(string, tag = "1")]
    pub account: String,
    #[prost(message, required, tag = "2")]
    pub limit: LimitPb,
    #[prost(message, required, tag = "3")]
    pub settled: AmountPb,
    #[prost(message, required, tag = "4")]
    pub held: AmountPb,
    #[prost(message, required, tag = "5")]
    pub lent: AmountPb,
    /// Unix ms; absent: never.
    #[prost(uint64, optional, tag = "6")]
    pub ends_ms: Option<u64>,
    /// Unix ms from which on an enforced pace lets new calls begin; 0: it does now.
    #[prost(uint64, tag = "7")]
    pub resumes_ms: u64,
    /// True: the wish was granted.
    #[prost(bool, tag = "8")]
    pub given: bool,
    /// True: a running call of another shard waits for a slice.
    #[prost(bool, tag = "9")]
    pub running: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct Wanted {
    #[prost(string, tag = "1")]
    pub account: String,
    /// True: for a running call, before which no new one is reserved.
    #[prost(bool, tag = "2")]
    pub running: bool,
}

/// What was idle comes in the same message: a home that heard first that nothing more comes would decide without it.
#[derive(Clone, PartialEq, Message)]
pub struct Recalled {
    #[prost(string, tag = "1")]
    pub account: String,
    /// Shares that are given back and that the home may not know of; each is said by itself too.
    #[prost(message, repeated, tag = "2")]
    pub backs: Vec<Back>,
    /// Tasks wait for money there; else what it wished for new calls is no more.
    #[prost(bool, tag = "3")]
    pub waits: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct LateSaid {
    #[prost(message, required, tag = "1")]
    pub late: Late,
    /// True: home has it.
    #[prost(bool, tag = "2")]
    pub taken: bool,
}

/// What gold tasks of a shard wait for, and who of the receiver's tasks is to stop for them.
#[derive(Clone, PartialEq, Message)]
pub struct Press {
    #[prost(message, repeated, tag = "1")]
    pub lacks: Vec<Lack>,
    #[prost(uint64, repeated, tag = "2")]
    pub give_way: Vec<u64>,
}

/// Slots of an agent or money of an account: one of them is empty.
#[derive(Clone, PartialEq, Message)]
pub struct Lack {
    #[prost(string, tag = "1")]
    pub agent: String,
    #[prost(string, tag = "2")]
    pub account: String,
    /// Tiers whose new tasks are shed: 0 none yet, 1 bronze, 2 silver too.
    #[prost(uint32, tag = "3")]
    pub sheds: u32,
}

/// The first tasks of a shard in the order of giving way, and those that were asked to and haven't stopped.
#[derive(Clone, PartialEq, Message)]
pub struct Below {
    #[prost(message, repeated, tag = "1")]
    pub lower: Vec<Lower>,
    #[prost(uint64, repeated, tag = "2")]
    pub stopping: Vec<u64>,
}

/// A running call whose end brings a slot of its agent and money of its account.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Lower {
    /// Its task's number in its shard.
    #[prost(uint64, tag = "1")]
    pub no: u64,
    /// 0 bronze, 1 silver.
    #[prost(uint32, tag = "2")]
    pub rank: u32,
    /// When the task was accepted, Unix ms.
    #[prost(uint64, tag = "3")]
    pub since: u64,
    #[prost(string, tag = "4")]
    pub agent: String,
    #[prost(string, tag = "5")]
    pub account: String,
}

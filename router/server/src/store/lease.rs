//! Who may try to own which shard: what a router asks of the store and is told, at one go for all shards. A lease spares
//! contention and proves nothing: the log alone decides.

use super::Watermark;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a lease that was given back says so.
pub(super) const GIVEN_BACK: Duration = Duration::from_secs(600);

/// A router's turn: it says that it lives, keeps its leases, and looks around.
#[derive(Clone, Debug)]
pub struct Turn<'a> {
    pub router: &'a str,
    /// One run of that router, and how it is reached; what its leases hold as text. Not empty.
    pub holder: &'a str,
    /// The shards whose leases it takes or keeps.
    pub wanted: &'a BTreeSet<u32>,
    /// The shards that it follows, and up to which position.
    pub followed: &'a BTreeMap<u32, u64>,
    /// How many shards the log has.
    pub shards: u32,
    /// Wall clock, Unix milliseconds.
    pub at_ms: u64,
    /// How long a lease lives, and the word that this router does.
    pub ttl: Duration,
}

/// Whose a shard's lease is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Lease {
    /// Nobody's; whoever had it may still live.
    #[default]
    Lapsed,
    /// Nobody's: who had it has given it back.
    Free,
    Of(String),
}

/// What is known of one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub lease: Lease,
    /// How far it has been shown, and by whom.
    pub watermark: Option<Watermark>,
    /// The owner's epoch, and since when it owns the shard.
    pub epoch: u64,
    pub since: String,
    /// Who follows the shard's log, and up to where.
    pub standby: Option<(String, u64)>,
}

/// What a turn finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The routers that live, by name: the text that their leases hold.
    pub alive: BTreeMap<String, String>,
    /// By router: the run of it that was told to own nothing.
    pub drained: BTreeMap<String, String>,
    /// All shards, by number.
    pub shards: Vec<Seen>,
}

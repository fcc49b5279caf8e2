//! The state store: what is going on, for people and programs that look from outside. A projection of the log that may be
//! lost, flushed or late at any moment: nothing waits for it and nothing is decided from it.

mod keys;
mod lease;
mod memory;
mod open;
mod projector;
mod redis;
mod row;
mod same_log;

pub use lease::{Found, Lease, Seen, Turn};
pub use memory::MemoryStore;
pub use redis::{RedisConfig, RedisStore};

pub(crate) use open::Opened;
pub(crate) use projector::{Identity, Projector, StoreHealth};
#[cfg(feature = "kafka")]
pub(crate) use same_log::differs;

use atp_core::projection::StreamRow;
use atp_core::view::AgentView;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Where projections live.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StoreConfig {
    /// In this process, for nobody else.
    #[default]
    Memory,
    Redis(RedisConfig),
}

/// What one shard shows, as of one position of its log. Written whole or not at all.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The log's id in hex.
    pub log: String,
    pub shard: u32,
    pub position: u64,
    pub epoch: u64,
    /// Wall clock, Unix milliseconds: when its owner began.
    pub since_ms: u64,
    /// Where the owner's newest checkpoint begins; 0: it has written none.
    pub checkpoint: u64,
    /// The owner's `router.id`.
    pub router: Arc<str>,
    /// Wall clock, Unix milliseconds.
    pub at_ms: u64,
    /// How long a row lives that isn't written again, and that of a stream that has ended (zero: it is
    /// forgotten at once).
    pub ttl: Duration,
    pub ended_ttl: Duration,
    pub streams: Vec<StreamRow>,
    pub agents: Vec<AgentView>,
}

impl Batch {
    fn ttl_of(&self, row: &StreamRow) -> Duration {
        if row.state.is_closed() { self.ended_ttl } else { self.ttl }
    }
}

/// A router's entry in the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    pub router: Arc<str>,
    /// One run of its process.
    pub incarnation: String,
    /// Where it is reached.
    pub atp: String,
    pub http: String,
    /// The shards that it owns.
    pub shards: Vec<u32>,
    /// Unix milliseconds: when it began, and now.
    pub since_ms: u64,
    pub at_ms: u64,
    pub ttl: Duration,
}

/// How far a shard has been shown, by whom, of which log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// The log's id in hex.
    pub log: String,
    pub position: u64,
    pub router: String,
}

/// A row as it is read: a value by field name. `docs/operator.md` lists the fields.
pub type Fields = BTreeMap<String, String>;

/// Everything that a store has, at most [`READ_MAX`] rows of a kind and shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Snapshot {
    pub routers: Vec<Fields>,
    pub shards: Vec<Fields>,
    pub agents: Vec<Fields>,
    pub streams: Vec<Fields>,
}

/// Rows of a kind and shard that one reading takes.
pub const READ_MAX: usize = 10_000;

/// Why a store didn't take or give something. No text of it holds a credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It may have been written all the same.
    #[error("{0}")]
    Away(String),
    #[error("router {router} has shown position {position} of this shard already, which is beyond {ours}")]
    Stale { position: u64, ours: u64, router: String },
    #[error("it holds log {log} of router {router}, and this is log {ours}")]
    OtherLog { log: String, ours: String, router: String },
}

/// A place for projections. The watermark of a shard only rises: a batch below it is refused, one at it may come again.
pub trait StateStore: Send + 'static {
    /// Writes a batch; gives the watermark that stood there before (`None`: nothing was known of the shard).
    fn write(&mut self, batch: &Batch) -> impl Future<Output = Result<Option<u64>, StoreError>> + Send;
    /// Enters or renews a router in the directory.
    fn beat(&mut self, beat: &Beat) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// How far a shard has been shown.
    fn watermark(&mut self, shard: u32) -> impl Future<Output = Result<Option<Watermark>, StoreError>> + Send;
    /// Says that a router lives, takes or keeps its leases where nobody else has them, and reads all that there is to know of
    /// routers and shards. Where another run of the same router still lives nothing is taken, and `alive` has that one.
    fn turn(&mut self, turn: &Turn<'_>) -> impl Future<Output = Result<Found, StoreError>> + Send;
    /// Gives leases back that are still this holder's: to an heir for `ttl`, or to whoever comes.
    fn release(
        &mut self,
        shards: &[u32],
        holder: &str,
        heir: Option<(&str, Duration)>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// The router, which is this holder, lives no longer.
    fn leave(&mut self, router: &str, holder: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Says that a run of a router is to own nothing; `None`: it may again.
    fn drain(&mut self, router: &str, run: Option<&str>) -> impl Future<Output = Result<(), StoreError>> + Send;
    /// Reads everything of the shards that routers in the directory have named.
    fn read(&mut self) -> impl Future<Output = Result<Snapshot, StoreError>> + Send;
}

/// Refuses a batch that isn't of the log or is behind the watermark that stands there.
fn admit(batch: &Batch, before: Option<&Watermark>) -> Result<Option<u64>, StoreError> {
    let Some(Watermark { log, position, router }) = before else { return Ok(None) };
    let router = router.clone();
    if *log != batch.log {
        return Err(StoreError::OtherLog { log: log.clone(), ours: batch.log.clone(), router });
    }
    if *position > batch.position {
        return Err(StoreError::Stale { position: *position, ours: batch.position, router });
    }
    Ok(Some(*position))
}

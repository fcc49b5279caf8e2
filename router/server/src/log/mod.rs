//! The log: entries in one order, durable when it says so; in local files or in Kafka (its own page: `kafka`).
//! It numbers entries and makes them durable; what is in them it never asks, but for checkpoints, which it can find.
//! The local format, and what damage means: `docs/log-format.md`.

mod address;
mod block;
mod checkpoint;
mod disk;
mod error;
#[cfg(feature = "kafka")]
mod kafka;
mod local;
pub mod offline;
pub mod prune;
mod pruned;
mod queue;
mod reader;
mod recovery;
mod room;
mod segment;
mod source;
mod spare;
mod status;
mod sync;
mod writer;

pub use address::{KafkaAddress, KafkaSasl, KafkaTls, check_broker, check_topic};
pub use atp_core::partition::LogId;
pub use disk::{Disk, RealDisk};
pub use error::LogError;
#[cfg(feature = "kafka")]
pub use kafka::{KafkaEntries, KafkaLog, KafkaOptions, KafkaShards, KafkaSource, Made, Opened, init};
pub use local::{Durability, LocalLog, Options};
pub use pruned::Beginning;
pub use queue::Entry as QueuedEntry;
pub use reader::{AllEntries as LocalAllEntries, Entries as LocalEntries, Reader};
pub use recovery::Recovered;
pub use room::LAST_BYTES;
pub use source::{AllEntries, Entries, Source};
pub use status::{Event, Events};

use futures_util::future::BoxFuture;

/// The largest entry: a message of 16 MiB and what is recorded around it.
pub const ENTRY_BYTES_MAX: usize = 32 << 20;

/// An open log, one shard of it: the exclusive right to append.
pub trait Log: Send + Sync {
    /// Queues entries (position, bytes, first piece of a checkpoint); `Event::Durable` says when they are durable. Waits
    /// while 16 MiB are queued, of all shards that share the queue. Positions follow each other, so one task appends.
    ///
    /// # Errors
    /// `Stopped` after a failure, `Closed`, `EntryTooBig`, `Position`; nothing was queued then.
    fn append(&self, entries: Vec<QueuedEntry>) -> BoxFuture<'_, Result<(), LogError>>;

    /// News of this shard, from its opening on. Each call gives a stream of its own.
    fn events(&self) -> Events;

    /// Asks whether somebody else has begun to own the shard: [`Event::Alone`] says no, [`Event::Failed`] yes; while the log can't be
    /// read neither comes. False: nobody else ever can, and no answer comes.
    fn look(&self) -> bool;

    /// Makes durable what is queued, and gives the right back; what the shards share is closed with the last of them. Blocks
    /// until that is done.
    ///
    /// # Errors
    /// `Stopped` if the log failed before or now.
    fn close(self: Box<Self>) -> Result<(), LogError>;
}

/// What `durable` means for a log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guarantee {
    /// On this machine's disk.
    #[default]
    Fsync,
    /// With this machine's kernel; on its disk a few ms later.
    Async,
    /// With two brokers at least.
    Replicated,
    /// With one broker.
    Single,
}

impl Guarantee {
    /// As views and pages call it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fsync => "fsync",
            Self::Async => "async",
            Self::Replicated => "replicated",
            Self::Single => "single",
        }
    }
}

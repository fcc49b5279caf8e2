//! The log: entries in one order, durable when it says so; in local files or in Kafka (its own page: `kafka`).
//! It numbers entries and makes them durable; what is in them it never asks, but for checkpoints, which it can find.
//!
//! **The local log** is segment files of chained blocks, one writer, readers without a lock. It is a directory: `lock`, and segments `0000000001.log`, `0000000002.log`, ... A segment is a run of blocks from offset
//! 0 and zeros behind them (it was filled with zeros before its first use). One commit is one block, written by one call and
//! synced by one `fdatasync`. A block begins at a multiple of 4096, so that no later write touches a page of an
//! acknowledged one. All integers are little-endian:
//!
//! ```text
//!        +0            +4      +5      +6          +8                                      +24
//!   0    | "ATPB"      | 1     | flags | 0         | log id, 16 random bytes                |
//!        +24           +32             +40                     +48                 +52     +56
//!  24    | segment     | offset        | block number          | previous checksum | entries |
//!        +56                   +64             +68                 +72     +76             +80
//!  56    | first position      | body length   | CRC32C of body    | 0     | CRC32C of 0..76 |
//!  80    | body: for each entry  length (4 bytes), bytes                                     |
//!        | zeros up to the next multiple of 4096                                             |
//! ```
//!
//! `flags`: 1 the block holds the first piece of a checkpoint, 2 it seals (no entries; written when the log falls idle and at
//! shutdown). The checksum that the next block repeats is the one at +76, which covers the body's. Block numbers go up by one
//! from 1, positions of entries too; an empty block's first position is that of the next entry to come.
//!
//! **What damage means.** One block is in flight, so only the last can be torn: damage with a whole block anywhere behind it is
//! corruption; damage with nothing whole behind it is the torn tail of a write that was never acknowledged, and is cut. With
//! [`Durability::Async`] that holds for a killed process; after a power cut such a log may have to be thrown away.
//!
//! **The last block is never trusted**: [`LocalLog::open`] writes it again, under its old number, as the first block of a new
//! segment. So a segment may begin with the block that ended the one before; a reader takes each number once.

mod address;
mod block;
mod checkpoint;
mod disk;
mod error;
#[cfg(feature = "kafka")]
mod kafka;
mod local;
pub mod offline;
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
pub use disk::{Disk, RealDisk};
pub use error::LogError;
#[cfg(feature = "kafka")]
pub use kafka::{KafkaEntries, KafkaLog, KafkaOptions, KafkaSource, Made, Opened, init};
pub use local::{Durability, LocalLog, Options};
pub use queue::Entry as QueuedEntry;
pub use reader::{Entries as LocalEntries, Reader};
pub use recovery::Recovered;
pub use room::LAST_BYTES;
pub use source::{Entries, Source};
pub use status::{Event, Events};

use futures_util::future::BoxFuture;

/// 16 random bytes, drawn when a log is made; each of its blocks carries them.
pub type LogId = [u8; 16];

/// The largest entry: a message of 16 MiB and what is recorded around it.
pub const ENTRY_BYTES_MAX: usize = 32 << 20;

/// An open log: the exclusive right to append.
pub trait Log: Send + Sync {
    /// Queues entries (position, bytes, first piece of a checkpoint); `Event::Durable` says when they are durable. Waits
    /// while 16 MiB are queued. Positions follow each other, so one task appends.
    ///
    /// # Errors
    /// `Stopped` after a failure, `Closed`, `EntryTooBig`, `Position`; nothing was queued then.
    fn append(&self, entries: Vec<QueuedEntry>) -> BoxFuture<'_, Result<(), LogError>>;

    /// News of this log, from its opening on. Each call gives a stream of its own.
    fn events(&self) -> Events;

    /// Makes durable what is queued, and gives the right back. Blocks until that is done.
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

//! The local log: segment files of chained blocks, one writer, readers without a lock.
//! It numbers entries and makes them durable; what is in them it never asks, but for checkpoints, which it can find.
//! The format, and what damage means: `docs/log-format.md`.

mod block;
mod checkpoint;
mod disk;
mod error;
mod local;
pub mod offline;
mod queue;
mod reader;
mod recovery;
mod room;
mod segment;
mod spare;
mod status;
mod sync;
mod writer;

pub use disk::{Disk, RealDisk};
pub use error::LogError;
pub use local::{Durability, LocalLog, Options};
pub use reader::{Entries, Reader};
pub use recovery::Recovered;
pub use room::LAST_BYTES;
pub use status::{Event, Events};

/// 16 random bytes, drawn when a log is made; each of its blocks carries them.
pub type LogId = [u8; 16];

/// The largest entry: a message of 16 MiB and what is recorded around it.
pub const ENTRY_BYTES_MAX: usize = 32 << 20;

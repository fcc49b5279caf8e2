//! The rules of a shard's log that several may write to at once, a partition of Kafka: which messages count (`Walk`), when one
//! is durable (`Owner`), how a partition is taken (`Claim`). Nothing here reads or writes; the server and the simulation do.

mod claim;
mod header;
mod owning;
mod reading;
#[cfg(test)]
mod tests;

pub use claim::{Claim, Claimed, NotTaken};
pub use header::{Header, NAME, Parsed};
pub use owning::{Next, Owner, StepDown};
pub use reading::{Halt, Mark, Verdict, Void, Walk};

/// 16 random bytes, drawn when a log is made; Genesis and every Epoch carry them.
pub type LogId = [u8; 16];

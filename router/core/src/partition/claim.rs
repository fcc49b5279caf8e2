//! The taker's rule: its own Epoch first, then all that stands before it, and only then it serves. What is read before the Epoch
//! stands could be stale: the owner before may go on until it meets that Epoch.

use super::{Header, LogId, Owner};
use crate::state::State;

/// The partition wasn't taken; nothing may be served from what was read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    #[error("the own Epoch was reported at offset {offset}, but the partition reached {end} before: records are gone")]
    Before { offset: u64, end: u64 },
    #[error("the own Epoch at offset {epoch} isn't the last valid message before it")]
    NotLast { epoch: u64 },
}

/// A router that is about to take a partition.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    log_id: LogId,
    end: u64,
}

impl Claim {
    /// `end`: the offset behind the partition's last message, as far as is known.
    #[must_use]
    pub const fn new(log_id: LogId, end: u64) -> Self {
        Self { log_id, end }
    }

    /// The header of the Epoch that has to be written.
    #[must_use]
    pub const fn header(&self) -> Header {
        Header::Epoch { log_id: self.log_id }
    }

    /// The Epoch is durable at `offset`.
    ///
    /// # Errors
    /// The partition was longer once.
    pub const fn written(self, offset: u64) -> Result<Claimed, NotTaken> {
        if offset < self.end {
            return Err(NotTaken::Before { offset, end: self.end });
        }
        Ok(Claimed { epoch: offset })
    }
}

/// A partition whose newest Epoch was this router's when it was written.
#[derive(Clone, Copy, Debug)]
pub struct Claimed {
    epoch: u64,
}

impl Claimed {
    /// The offset of the own Epoch.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Where reading ends: from this offset on nothing may be read before it is served.
    #[must_use]
    pub const fn upto(&self) -> u64 {
        self.epoch + 1
    }

    /// `state`: the fold of all that counts before `upto`.
    ///
    /// # Errors
    /// The fold doesn't end with an Epoch.
    pub fn serve(self, state: &State) -> Result<Owner, NotTaken> {
        if state.position() == 0 || state.epoch() != state.position() {
            return Err(NotTaken::NotLast { epoch: self.epoch });
        }
        Ok(Owner::new(self.epoch))
    }
}

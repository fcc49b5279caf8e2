//! The reader's rule: which messages of a partition count. Owner, recovery, verify and replay judge by it alike, and it
//! depends on the messages before alone.

use super::{Header, LogId, Parsed};

/// A place in the log: what holds right behind the valid message at `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    pub offset: u64,
    /// Valid messages up to this one, itself counted.
    pub position: u64,
    /// Offset of the current owner's Epoch; `None`: only Genesis has been read.
    pub epoch: Option<u64>,
    /// The owner's entries so far.
    pub n: u64,
}

/// Why a message doesn't count. None of these is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Void {
    /// Of the current epoch, read before.
    Duplicate,
    /// Of the current epoch, behind one that is missing: nothing behind a hole was ever acknowledged.
    Hole,
    /// Of an epoch that isn't the current one.
    OtherEpoch,
    /// A second Genesis, the Epoch of another log, or no message of ours.
    Foreign,
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Valid { position: u64 },
    Void(Void),
}

/// The partition can't be what our writers made: nothing may be served from it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    #[error("offset {expected} holds no message, the next one stands at {found}")]
    Missing { expected: u64, found: u64 },
    #[error("the message at offset {offset} has version {version}: written by a newer version, read it with that one")]
    Newer { offset: u64, version: u8 },
    #[error("offset 0 doesn't hold this log's Genesis")]
    NoGenesis,
}

/// A reader on its way.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    log_id: LogId,
    next: u64,
    position: u64,
    epoch: Option<u64>,
    n: u64,
    hole: bool,
}

impl Walk {
    /// From offset 0, where the Genesis of this log must stand.
    #[must_use]
    pub const fn from_start(log_id: LogId) -> Self {
        Self { log_id, next: 0, position: 0, epoch: None, n: 0, hole: false }
    }

    /// Goes on behind a valid message.
    #[must_use]
    pub const fn behind(log_id: LogId, mark: Mark) -> Self {
        let Mark { offset, position, epoch, n } = mark;
        Self { log_id, next: offset + 1, position, epoch, n, hole: false }
    }

    /// The offset that is due.
    #[must_use]
    pub const fn next(&self) -> u64 {
        self.next
    }

    /// Where it stands; sound only right behind a valid message.
    #[must_use]
    pub const fn mark(&self) -> Mark {
        Mark { offset: self.next - 1, position: self.position, epoch: self.epoch, n: self.n }
    }

    /// Judges the message at `offset`, which must be the next one.
    ///
    /// # Errors
    /// This isn't the partition that our writers made, or a newer version wrote to it.
    pub fn take(&mut self, offset: u64, message: &Parsed) -> Result<Verdict, Halt> {
        if offset != self.next {
            return Err(Halt::Missing { expected: self.next, found: offset });
        }
        self.next += 1;
        let header = match message {
            Parsed::Newer { version } => return Err(Halt::Newer { offset, version: *version }),
            Parsed::Foreign if offset > 0 => return Ok(Verdict::Void(Void::Foreign)),
            Parsed::Ours(header) => header,
            Parsed::Foreign => return Err(Halt::NoGenesis),
        };
        let void = |why| Ok(Verdict::Void(why));
        match header {
            Header::Genesis { log_id } if offset == 0 && *log_id == self.log_id => {}
            _ if offset == 0 => return Err(Halt::NoGenesis),
            Header::Epoch { log_id } if *log_id == self.log_id => {
                (self.epoch, self.n, self.hole) = (Some(offset), 0, false);
            }
            Header::Genesis { .. } | Header::Epoch { .. } => return void(Void::Foreign),
            Header::Entry { epoch, .. } if Some(*epoch) != self.epoch => return void(Void::OtherEpoch),
            Header::Entry { .. } if self.hole => return void(Void::Hole),
            Header::Entry { n, .. } if *n <= self.n => return void(Void::Duplicate),
            Header::Entry { n, .. } if *n == self.n + 1 => self.n = *n,
            Header::Entry { .. } => {
                self.hole = true;
                return void(Void::Hole);
            }
        }
        self.position += 1;
        Ok(Verdict::Valid { position: self.position })
    }
}

//! The owner's rule: when a message that was handed to the brokers is durable, and when to step down. It says which
//! offsets have to be read, and somebody else reads them.

use super::{Header, Parsed};

/// Nothing more may be written or acknowledged under this epoch; what was durable before stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepDown {
    #[error("offset {offset} holds the Epoch of another owner")]
    Fenced { offset: u64 },
    #[error("offset {offset} holds a message of this owner's epoch that was not reported there")]
    OwnEpoch { offset: u64 },
    #[error("offset {offset} holds what no older owner wrote")]
    Unexplained { offset: u64 },
    #[error("offset {offset} holds no message")]
    Missing { offset: u64 },
    #[error("nobody knows the offset of message {n}")]
    NoOffset { n: u64 },
    #[error("message {n} was reported at offset {found}, {expected} or a later one was due")]
    Before { n: u64, expected: u64, found: u64 },
    #[error("message {found} was reported where {expected} was due")]
    Order { expected: u64, found: u64 },
}

/// What a report leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Every offset up to the reported one is explained.
    Explained,
    /// Read the messages `from..to`, each goes to [`Owner::read`].
    Read { from: u64, to: u64 },
}

/// One owner's view of its partition.
#[derive(Clone, Debug)]
pub struct Owner {
    epoch: u64,
    sent: u64,
    durable: u64,
    /// The last offset that is explained.
    last: u64,
    /// The offset of the last durable message of its own, the Epoch at first.
    own: u64,
    /// While offsets are read: where the reading ends, and whether the message there is the next own one.
    reading: Option<(u64, bool)>,
}

impl Owner {
    /// `epoch`: the offset of the own Epoch, which is durable, and before which all is read.
    pub(super) const fn new(epoch: u64) -> Self {
        Self { epoch, sent: 0, durable: 0, last: epoch, own: epoch, reading: None }
    }

    /// The header of the next entry, which is handed over now. `checkpoint`: it is the first piece of one.
    pub const fn send(&mut self, checkpoint: bool) -> Header {
        self.sent += 1;
        Header::Entry { epoch: self.epoch, n: self.sent, checkpoint }
    }

    /// The last offset that is explained: a message of this owner's or an older one's.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.last
    }
    /// The offset of the last durable message of this owner's, its Epoch counted.
    #[must_use]
    pub const fn own(&self) -> u64 {
        self.own
    }
    /// Entries of this owner's that are durable.
    #[must_use]
    pub const fn durable(&self) -> u64 {
        self.durable
    }

    /// The delivery report of message `n`, in order. `None`: it has no offset, or nobody knows whether it was written.
    ///
    /// # Errors
    /// The ownership is over.
    pub fn reported(&mut self, n: u64, offset: Option<u64>) -> Result<Next, StepDown> {
        if n != self.durable + 1 || n > self.sent || self.reading.is_some() {
            return Err(StepDown::Order { expected: self.durable + 1, found: n });
        }
        let offset = offset.ok_or(StepDown::NoOffset { n })?;
        let expected = self.last + 1;
        if offset < expected {
            return Err(StepDown::Before { n, expected, found: offset });
        }
        if offset == expected {
            (self.last, self.own, self.durable) = (offset, offset, n);
            return Ok(Next::Explained);
        }
        self.reading = Some((offset, true));
        Ok(Next::Read { from: expected, to: offset })
    }

    /// The partition ends at `end` (exclusive) while nothing of this owner's is in flight.
    pub fn looked(&mut self, end: u64) -> Next {
        let from = self.last + 1;
        if end <= from || self.reading.is_some() || self.sent != self.durable {
            return Next::Explained;
        }
        self.reading = Some((end, false));
        Next::Read { from, to: end }
    }

    /// A message that was asked for by [`Next::Read`], in order.
    ///
    /// # Errors
    /// The ownership is over.
    pub fn read(&mut self, offset: u64, message: &Parsed) -> Result<Next, StepDown> {
        let expected = self.last + 1;
        let Some((to, own)) = self.reading.filter(|_| offset == expected) else {
            return Err(StepDown::Missing { offset: expected });
        };
        match message {
            Parsed::Ours(Header::Entry { epoch, .. }) if *epoch < self.epoch => {}
            Parsed::Ours(Header::Entry { epoch, .. }) if *epoch == self.epoch => {
                return Err(StepDown::OwnEpoch { offset });
            }
            Parsed::Ours(Header::Epoch { .. }) => return Err(StepDown::Fenced { offset }),
            Parsed::Ours(_) | Parsed::Foreign | Parsed::Newer { .. } => return Err(StepDown::Unexplained { offset }),
        }
        self.last = offset;
        if offset + 1 < to {
            return Ok(Next::Read { from: offset + 1, to });
        }
        self.reading = None;
        if own {
            (self.last, self.own, self.durable) = (to, to, self.durable + 1);
        }
        Ok(Next::Explained)
    }
}

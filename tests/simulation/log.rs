//! The fake log of one shard: what is in it counts for every reader, in one order. Who writes it loses any part of what it has not
//! been told is there, and is told so when another has begun an epoch behind it. It may be a partition of Kafka: `partition`.

use crate::simulation::partition::Partition;
use bytes::Bytes;

#[derive(Debug, Default)]
pub struct FakeLog {
    entries: Vec<Bytes>,
    /// The owner whose Epoch is the newest.
    writer: u32,
    /// What it is made of, if there is more in it than what counts.
    pub partition: Option<Box<Partition>>,
}

impl FakeLog {
    #[must_use]
    pub fn of(partition: Option<Box<Partition>>) -> Self {
        Self { partition, ..Self::default() }
    }
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    /// The entry at a position (from 1).
    #[must_use]
    pub fn entry(&self, position: usize) -> &Bytes {
        &self.entries[position - 1]
    }
    /// From now on only this owner's messages count.
    pub fn begin_epoch(&mut self, owner: u32) {
        self.writer = owner;
    }
    #[must_use]
    pub fn is_fenced(&self, owner: u32) -> bool {
        match &self.partition {
            Some(partition) => partition.writer() != owner,
            None => self.writer > owner,
        }
    }
    /// A message of an owner is written; false: it doesn't count.
    pub fn write(&mut self, owner: u32, entry: Bytes) -> bool {
        let counts = !self.is_fenced(owner);
        if counts {
            self.writer = owner;
            self.entries.push(entry);
        }
        counts
    }
    /// One more of the partition's messages counts.
    pub fn counts(&mut self, entry: Bytes) {
        self.entries.push(entry);
    }
}

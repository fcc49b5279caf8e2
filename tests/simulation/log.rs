//! The fake log: splits a commit at random, delays it, and at a crash keeps any prefix of what wasn't acknowledged.

use crate::simulation::rng::Rng;
use bytes::Bytes;

#[derive(Debug, Default)]
pub struct FakeLog {
    entries: Vec<Bytes>,
    /// Entries that the owner was told are durable.
    acked: usize,
    pub commit_scheduled: bool,
}

impl FakeLog {
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
    #[must_use]
    pub fn acked(&self) -> usize {
        self.acked
    }
    /// The entry at a position (from 1).
    #[must_use]
    pub fn entry(&self, position: usize) -> &Bytes {
        &self.entries[position - 1]
    }

    /// False when the position isn't the next one.
    #[must_use]
    pub fn append(&mut self, position: u64, entry: Bytes) -> bool {
        self.entries.push(entry);
        position == self.entries.len() as u64
    }

    /// Makes some of what waits durable; returns the new durable position.
    pub fn commit(&mut self, rng: &mut Rng, split_percent: u64) -> usize {
        let waiting = self.entries.len() - self.acked;
        let n = if rng.percent(split_percent) { rng.index(waiting) + 1 } else { waiting };
        self.acked += n.min(waiting);
        self.acked
    }

    /// The process dies: some of what waited is there, the rest never was.
    pub fn crash(&mut self, rng: &mut Rng) {
        let waiting = self.entries.len() - self.acked;
        let kept = rng.index(waiting + 1);
        self.entries.truncate(self.acked + kept);
        self.acked = self.entries.len();
        self.commit_scheduled = false;
    }
}

//! A partition of Kafka, simulated: messages of several owners and of strangers at their offsets. It knows who really wrote what,
//! as which one, and holds against that what the core's rules read from the headers alone.

use crate::simulation::check::Verdict;
use crate::simulation::rng::Rng;
use atp_core::partition::{Halt, Header, LogId, Mark, Next, Owner, Parsed, StepDown, Walk};
use bytes::Bytes;
use std::collections::BTreeMap;

const ALIKE: &str = "every reader counts the same";

/// What the brokers say of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    Offset,
    /// It may stand in the log or not.
    Unknown,
    /// All was said before.
    Silent,
}

/// A message on its way to the brokers.
#[derive(Debug)]
pub struct Sent {
    /// The owner's number; 0: a stranger.
    pub by: u32,
    /// The owner's entries in the order in which it made them, from 1; 0: its Epoch.
    pub nth: u64,
    pub header: Parsed,
    pub entry: Bytes,
    /// How often it will stand in the log.
    pub copies: u32,
    pub report: Report,
}

/// How often brokers did what an owner doesn't expect, and what became of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub epochs: u64,
    /// Messages that count nothing: behind a hole, of an owner that was replaced, twice, of strangers.
    pub void: u64,
    pub zombies: u64,
    /// Reports with messages of others before them.
    pub gaps: u64,
    pub unknown: u64,
    pub stepped_down: u64,
}

impl Seen {
    pub fn add(&mut self, o: &Self) {
        self.epochs += o.epochs;
        self.void += o.void;
        self.zombies += o.zombies;
        self.gaps += o.gaps;
        self.unknown += o.unknown;
        self.stepped_down += o.stepped_down;
    }
}

#[derive(Debug)]
pub struct Partition {
    log_id: LogId,
    messages: Vec<Parsed>,
    /// Of those that count, in order.
    offsets: Vec<u64>,
    /// The owner whose Epoch is the newest, its last entry that counts, and whether one behind it is missing.
    writer: u32,
    nth: u64,
    hole: bool,
    /// Entries of each owner that count.
    counted: BTreeMap<u32, u64>,
    /// A reader that is always at the end, and where it was behind each message that counts.
    follower: Walk,
    marks: Vec<Mark>,
    pub mishaps_left: u32,
    pub seen: Seen,
}

impl Partition {
    /// With its Genesis at offset 0.
    #[must_use]
    pub fn new(log_id: LogId, mishaps: u32) -> Self {
        Self {
            log_id,
            messages: Vec::new(),
            offsets: Vec::new(),
            writer: 0,
            nth: 0,
            hole: false,
            counted: BTreeMap::new(),
            follower: Walk::from_start(log_id),
            marks: Vec::new(),
            mishaps_left: mishaps,
            seen: Seen::default(),
        }
    }

    #[must_use]
    pub const fn log_id(&self) -> LogId {
        self.log_id
    }
    #[must_use]
    pub const fn writer(&self) -> u32 {
        self.writer
    }
    /// The offset behind the last message.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.messages.len() as u64
    }

    /// Entries of an owner that count.
    #[must_use]
    pub fn counted(&self, owner: u32) -> u64 {
        self.counted.get(&owner).copied().unwrap_or_default()
    }

    /// A message gets its offset; true: it counts.
    pub fn arrive(&mut self, by: u32, nth: u64, header: Parsed, verdict: &mut Verdict) -> (u64, bool) {
        let offset = self.end();
        self.messages.push(header);
        let counts = match (by, nth) {
            (0, _) => offset == 0,
            (_, 0) => {
                (self.writer, self.nth, self.hole) = (by, 0, false);
                self.seen.epochs += 1;
                true
            }
            _ if by != self.writer => {
                self.seen.zombies += 1;
                false
            }
            _ => {
                self.hole |= nth > self.nth + 1;
                !self.hole && nth == self.nth + 1
            }
        };
        if counts {
            self.nth = nth;
            self.offsets.push(offset);
            if nth > 0 {
                *self.counted.entry(by).or_default() += 1;
            }
        } else {
            self.seen.void += 1;
        }
        self.follow(offset, counts, verdict);
        (offset, counts)
    }

    fn follow(&mut self, offset: u64, counts: bool, verdict: &mut Verdict) {
        let position = self.offsets.len() as u64;
        match take(&mut self.follower, offset, &self.messages[index(offset)]) {
            Ok(found) if found == counts.then_some(position) => {}
            Ok(found) => verdict.fail(ALIKE, || {
                let message = self.messages[index(offset)];
                format!("offset {offset}, {message:?}: a reader takes it for {found:?}, it counts: {counts}")
            }),
            Err(halt) => verdict.fail("replay halts nowhere", || halt.to_string()),
        }
        if counts {
            self.marks.push(self.follower.mark());
        }
    }

    /// How many entries a reader finds before `upto`, wherever it begins.
    pub fn read(&self, rng: &mut Rng, upto: u64, verdict: &mut Verdict) -> usize {
        let stands = self.offsets.partition_point(|offset| *offset < upto);
        let known = if rng.percent(50) { rng.index(stands + 1) } else { 0 };
        let mut walk = match known.checked_sub(1) {
            Some(last) => Walk::behind(self.log_id, self.marks[last]),
            None => Walk::from_start(self.log_id),
        };
        let mut expected = known;
        for offset in walk.next()..upto {
            let counts = self.offsets.get(expected) == Some(&offset);
            expected += usize::from(counts);
            match take(&mut walk, offset, &self.messages[index(offset)]) {
                Ok(found) => verdict.expect(found == counts.then_some(expected as u64), ALIKE, || {
                    format!("from behind {known}: offset {offset} is taken for {found:?}, it counts: {counts}")
                }),
                Err(halt) => verdict.fail("replay halts nowhere", || halt.to_string()),
            }
        }
        stands
    }

    /// Reads what an owner's rule asks for, to the end.
    ///
    /// # Errors
    /// The owner has to step down.
    pub fn explain(&mut self, rule: &mut Owner, next: Result<Next, StepDown>) -> Result<(), StepDown> {
        let mut next = next?;
        self.seen.gaps += u64::from(next != Next::Explained);
        while let Next::Read { from, .. } = next {
            let message = self.messages.get(index(from)).ok_or(StepDown::Missing { offset: from })?;
            next = rule.read(from, message)?;
        }
        Ok(())
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("few messages")
}

/// The position of a message that counts.
fn take(walk: &mut Walk, offset: u64, message: &Parsed) -> Result<Option<u64>, Halt> {
    Ok(match walk.take(offset, message)? {
        atp_core::partition::Verdict::Valid { position } => Some(position),
        atp_core::partition::Verdict::Void(_) => None,
    })
}

/// What somebody writes who has no business here.
#[must_use]
pub fn stray(rng: &mut Rng, log_id: LogId) -> Parsed {
    let other = log_id.map(|byte| !byte);
    rng.pick(&[
        Parsed::Foreign,
        Parsed::Ours(Header::Genesis { log_id }),
        Parsed::Ours(Header::Epoch { log_id: other }),
        Parsed::Ours(Header::Epoch { log_id: other }),
    ])
}

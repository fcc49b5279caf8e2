//! Both rules together: whatever a broker does to the messages of several owners, what an owner took for durable counts for
//! every reader, and every reader counts the same.

use super::{Claim, Halt, Header, LogId, Mark, Next, NotTaken, Owner, Parsed, StepDown, Verdict, Void, Walk};
use crate::state::State;
use proptest::prelude::*;

const ID: LogId = [1; 16];
const OTHER: LogId = [2; 16];

fn genesis() -> Parsed {
    Parsed::Ours(Header::Genesis { log_id: ID })
}
fn epoch() -> Parsed {
    Parsed::Ours(Header::Epoch { log_id: ID })
}
fn entry(epoch: u64, n: u64) -> Parsed {
    Parsed::Ours(Header::Entry { epoch, n, checkpoint: false })
}

fn judge(log: &[Parsed]) -> Vec<Verdict> {
    let mut walk = Walk::from_start(ID);
    (0..).zip(log).map(|(offset, message)| walk.take(offset, message).unwrap()).collect()
}

fn valid(positions: &[u64], log: &[Parsed]) {
    let found: Vec<u64> = judge(log)
        .iter()
        .zip(0..)
        .filter_map(|(verdict, offset)| matches!(verdict, Verdict::Valid { .. }).then_some(offset))
        .collect();
    assert_eq!(found, positions);
}

// ---- the reader ---------------------------------------------------------------------------------------------------

#[test]
fn positions_count_valid_messages_only() {
    let log = [genesis(), epoch(), entry(1, 1), Parsed::Foreign, entry(1, 1), entry(1, 2)];
    let at = |position| Verdict::Valid { position };
    let void = Verdict::Void;
    assert_eq!(judge(&log), [at(1), at(2), at(3), void(Void::Foreign), void(Void::Duplicate), at(4)]);
}

#[test]
fn a_hole_voids_the_rest_of_its_epoch_and_no_more() {
    // Message 2 comes after all: too late.
    valid(
        &[0, 1, 2, 6, 7],
        &[genesis(), epoch(), entry(1, 1), entry(1, 3), entry(1, 2), entry(1, 3), epoch(), entry(6, 1)],
    );
}

#[test]
fn a_zombie_behind_a_new_epoch_counts_nothing() {
    valid(&[0, 1, 2, 3, 5], &[genesis(), epoch(), entry(1, 1), epoch(), entry(1, 2), entry(3, 1), entry(1, 3)]);
    // Not even when its numbers would go on.
    valid(&[0, 1, 2, 3], &[genesis(), epoch(), entry(1, 1), epoch(), entry(1, 1), entry(1, 2)]);
}

#[test]
fn an_entry_before_any_epoch_is_void() {
    valid(&[0, 2], &[genesis(), entry(0, 1), epoch()]);
}

#[test]
fn an_epoch_or_genesis_of_elsewhere_changes_nothing() {
    let other = [Header::Epoch { log_id: OTHER }, Header::Genesis { log_id: OTHER }, Header::Genesis { log_id: ID }];
    for header in other {
        valid(&[0, 1, 3], &[genesis(), epoch(), Parsed::Ours(header), entry(1, 1)]);
    }
}

#[test]
fn a_partition_that_doesnt_begin_with_this_logs_genesis_halts() {
    for first in [epoch(), entry(0, 1), Parsed::Foreign, Parsed::Ours(Header::Genesis { log_id: OTHER })] {
        assert_eq!(Walk::from_start(ID).take(0, &first), Err(Halt::NoGenesis));
    }
}

#[test]
fn an_offset_without_a_message_and_a_newer_version_halt() {
    let mut walk = Walk::from_start(ID);
    walk.take(0, &genesis()).unwrap();
    assert_eq!(walk.take(2, &epoch()), Err(Halt::Missing { expected: 1, found: 2 }));
    let newer = Parsed::Newer { version: 9 };
    assert_eq!(walk.take(1, &newer), Err(Halt::Newer { offset: 1, version: 9 }));
}

// ---- the owner ----------------------------------------------------------------------------------------------------

/// An owner with epoch 5 that sent `n` messages.
fn owner(n: u64) -> Owner {
    let mut owner = Owner::new(5);
    for _ in 0..n {
        owner.send(false);
    }
    owner
}

#[test]
fn offsets_that_follow_are_durable_at_once() {
    let mut owner = owner(2);
    assert_eq!(owner.reported(1, Some(6)), Ok(Next::Explained));
    assert_eq!(owner.reported(2, Some(7)), Ok(Next::Explained));
    assert_eq!((owner.durable(), owner.last()), (2, 7));
}

#[test]
fn every_offset_of_a_gap_is_read_not_only_the_first() {
    let mut owner = owner(2);
    assert_eq!(owner.reported(1, Some(6)), Ok(Next::Explained));
    assert_eq!(owner.reported(2, Some(9)), Ok(Next::Read { from: 7, to: 9 }));
    assert_eq!(owner.read(7, &entry(3, 9)), Ok(Next::Read { from: 8, to: 9 }));
    assert_eq!(owner.durable(), 1, "not before all is read");
    assert_eq!(owner.clone().read(8, &entry(3, 10)), Ok(Next::Explained));
    assert_eq!(owner.read(8, &epoch()), Err(StepDown::Fenced { offset: 8 }));
    assert_eq!(owner.durable(), 1);
}

#[test]
fn what_is_no_older_owners_message_ends_the_ownership() {
    for (message, why) in [
        (epoch(), StepDown::Fenced { offset: 6 }),
        (Parsed::Ours(Header::Epoch { log_id: OTHER }), StepDown::Fenced { offset: 6 }),
        (entry(5, 1), StepDown::OwnEpoch { offset: 6 }),
        (entry(6, 1), StepDown::Unexplained { offset: 6 }),
        (genesis(), StepDown::Unexplained { offset: 6 }),
        (Parsed::Foreign, StepDown::Unexplained { offset: 6 }),
        (Parsed::Newer { version: 2 }, StepDown::Unexplained { offset: 6 }),
    ] {
        let mut owner = owner(1);
        assert_eq!(owner.reported(1, Some(7)), Ok(Next::Read { from: 6, to: 7 }));
        assert_eq!(owner.read(6, &message), Err(why));
        assert_eq!(owner.durable(), 0);
    }
}

#[test]
fn a_report_without_an_offset_or_below_the_due_one_ends_the_ownership() {
    assert_eq!(owner(1).reported(1, None), Err(StepDown::NoOffset { n: 1 }));
    assert_eq!(owner(1).reported(1, Some(5)), Err(StepDown::Before { n: 1, expected: 6, found: 5 }));
    assert_eq!(owner(2).reported(2, Some(6)), Err(StepDown::Order { expected: 1, found: 2 }));
    assert_eq!(owner(1).reported(2, Some(6)), Err(StepDown::Order { expected: 1, found: 2 }), "never sent");
}

#[test]
fn a_gap_offset_without_a_message_ends_the_ownership() {
    let mut owner = owner(1);
    assert_eq!(owner.reported(1, Some(8)), Ok(Next::Read { from: 6, to: 8 }));
    assert_eq!(owner.read(7, &entry(3, 1)), Err(StepDown::Missing { offset: 6 }));
}

#[test]
fn an_idle_owner_finds_its_successor() {
    let mut owner = owner(0);
    assert_eq!(owner.looked(6), Next::Explained);
    assert_eq!(owner.looked(8), Next::Read { from: 6, to: 8 });
    assert_eq!(owner.read(6, &entry(3, 4)), Ok(Next::Read { from: 7, to: 8 }));
    assert_eq!(owner.clone().read(7, &entry(3, 5)), Ok(Next::Explained));
    assert_eq!(owner.read(7, &epoch()), Err(StepDown::Fenced { offset: 7 }));
}

// ---- the taker ----------------------------------------------------------------------------------------------------

#[test]
fn who_takes_a_partition_serves_only_what_ends_with_its_epoch() {
    let claim = Claim::new(ID, 4);
    assert_eq!(claim.header(), Header::Epoch { log_id: ID });
    assert_eq!(claim.written(3).unwrap_err(), NotTaken::Before { offset: 3, end: 4 });
    let claimed = claim.written(6).unwrap();
    assert_eq!((claimed.epoch(), claimed.upto()), (6, 7));
    assert_eq!(claimed.serve(&State::default()).unwrap_err(), NotTaken::NotLast { epoch: 6 });
}

// ---- both ---------------------------------------------------------------------------------------------------------

/// What the brokers make of one message.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Written,
    /// Written, but the report is an error: unknown to its owner.
    Unknown,
    Twice,
    Lost,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A new owner begins.
    Take,
    /// The owner that came so many before the newest sends, whether or not it has stepped down.
    Send(usize, Fate),
    /// A stranger writes.
    Junk,
}

#[derive(Clone)]
struct World {
    log: Vec<Parsed>,
    /// Each with its epoch and whether it goes on.
    owners: Vec<(u64, Owner, bool)>,
    /// (epoch, n) that owners took for durable.
    durable: Vec<(u64, u64)>,
}

impl World {
    fn new() -> Self {
        Self { log: vec![genesis()], owners: Vec::new(), durable: Vec::new() }
    }

    fn end(&self) -> u64 {
        self.log.len() as u64
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Take => {
                self.owners.push((self.end(), Owner::new(self.end()), true));
                self.log.push(epoch());
            }
            Step::Junk => self.log.push(Parsed::Foreign),
            Step::Send(back, fate) => {
                let Some(at) = self.owners.len().checked_sub(back + 1) else { return };
                let header = self.owners[at].1.send(false);
                let first = self.end();
                let (writes, report) = match fate {
                    Fate::Written => (1, Some(first)),
                    Fate::Unknown => (1, None),
                    Fate::Twice => (2, Some(first + 1)),
                    Fate::Lost => (0, None),
                };
                self.log.extend(std::iter::repeat_n(Parsed::Ours(header), writes));
                self.report(at, &header, report);
            }
        }
    }

    fn report(&mut self, at: usize, header: &Header, offset: Option<u64>) {
        let (epoch, owner, goes_on) = &mut self.owners[at];
        let Header::Entry { n, .. } = header else { unreachable!() };
        if !*goes_on {
            return;
        }
        let mut next = owner.reported(*n, offset);
        while let Ok(Next::Read { from, .. }) = next {
            next = owner.read(from, &self.log[usize::try_from(from).unwrap()]);
        }
        match next {
            Ok(_) => self.durable.push((*epoch, *n)),
            Err(_) => *goes_on = false,
        }
    }

    fn check(&self) {
        let mut counted = Vec::new();
        for (verdict, message) in judge(&self.log).iter().zip(&self.log) {
            if let (Verdict::Valid { .. }, Parsed::Ours(Header::Entry { epoch, n, .. })) = (verdict, message) {
                counted.push((*epoch, *n));
            }
        }
        for durable in &self.durable {
            assert!(counted.contains(durable), "{durable:?} was durable and doesn't count: {:?}", self.log);
        }
        assert!(counted.windows(2).all(|w| w[0] < w[1]), "in order, once each: {counted:?}");
        self.check_marks();
    }

    /// From behind any valid message the rest is judged as from the start.
    fn check_marks(&self) {
        let mut walk = Walk::from_start(ID);
        let verdicts = judge(&self.log);
        for (offset, message) in (0..).zip(&self.log) {
            let Ok(Verdict::Valid { .. }) = walk.take(offset, message) else { continue };
            let mark: Mark = walk.mark();
            let mut later = Walk::behind(ID, mark);
            let from = usize::try_from(later.next()).unwrap();
            for (at, message) in self.log.iter().enumerate().skip(from) {
                assert_eq!(later.take(at as u64, message), Ok(verdicts[at]));
            }
        }
    }
}

const FATES: [Fate; 4] = [Fate::Written, Fate::Unknown, Fate::Twice, Fate::Lost];

fn steps() -> Vec<Step> {
    let sends = (0..2).flat_map(|back| FATES.map(|fate| Step::Send(back, fate)));
    [Step::Take, Step::Junk].into_iter().chain(sends).collect()
}

/// Every history of so many steps behind a first owner.
fn all(world: &World, left: usize) {
    if left == 0 {
        return world.check();
    }
    for step in steps() {
        let mut world = world.clone();
        world.step(step);
        all(&world, left - 1);
    }
}

#[test]
fn what_an_owner_took_for_durable_counts_in_every_short_history() {
    let mut world = World::new();
    world.step(Step::Take);
    all(&world, 5);
}

proptest! {
    #[test]
    fn and_in_long_ones(picks in prop::collection::vec(0_usize..40, 0..200)) {
        let mut world = World::new();
        for pick in picks {
            // Three of four messages just arrive, or no history would get far.
            let step = steps().get(pick).copied().unwrap_or(Step::Send(pick % 3 / 2, Fate::Written));
            world.step(step);
        }
        world.check();
    }
}

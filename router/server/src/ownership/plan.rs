//! What a router does about one shard, given what it knows. Pure.

use std::time::Duration;

/// Whose the lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lease {
    Mine,
    Others,
    /// Given back by who had it, so long ago.
    Free {
        since: Duration,
    },
    /// Lost so long ago; who had it may still own the shard, as long as it can write.
    Lapsed {
        since: Duration,
    },
}

/// What is known of the last owner of a shard whose lease has lapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Last {
    /// Nobody has ever owned the shard, or it was this run of this router.
    Nobody,
    /// Somebody may have.
    Unknown,
    /// Another router, which has not been asked lately whether it still does.
    Unasked,
    Owns,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Idle,
    /// It was taken from here, or can't be written: not to be tried again yet.
    BacksOff,
    /// On its way here, or from here to another.
    Moves,
    Runs,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) state: State,
    pub(super) lease: Lease,
    /// How long a lease lives.
    pub(super) ttl: Duration,
    /// The place of this router among those that may own something, 0 the nearest; `None`: it may not.
    pub(super) rank: Option<u32>,
    /// Another router that the shard belongs to, and that has been there for long enough.
    pub(super) heir: bool,
    pub(super) last: Last,
    /// How long this router has looked on.
    pub(super) up: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Wait,
    /// Ask the last owner whether it still is.
    Ask,
    Take,
    Give,
}

pub(super) fn step(facts: &Facts) -> Step {
    // Each in turn has the time of a lease to take what is nobody's.
    let is_due = |since: Duration| facts.rank.is_some_and(|rank| since >= facts.ttl * rank);
    match (facts.state, facts.lease) {
        (State::Runs, Lease::Mine) if facts.heir => Step::Give,
        (State::Idle, Lease::Mine) if facts.rank.is_some() => Step::Take,
        (State::Idle, Lease::Free { since }) if is_due(since) => Step::Take,
        (State::Idle, Lease::Lapsed { since }) if is_due(since) => match facts.last {
            // A lease can be lost while its owner lives: it gets the time of one to take it again.
            Last::Unknown if facts.up < facts.ttl => Step::Wait,
            Last::Owns => Step::Wait,
            Last::Unasked => Step::Ask,
            Last::Nobody | Last::Unknown | Last::Gone => Step::Take,
        },
        (State::Idle | State::Runs | State::Moves | State::BacksOff, _) => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(5);
    const LAPSED: Lease = Lease::Lapsed { since: Duration::ZERO };
    const FREE: Lease = Lease::Free { since: Duration::ZERO };

    fn idle(lease: Lease, last: Last) -> Facts {
        Facts { state: State::Idle, lease, ttl: TTL, rank: Some(0), heir: false, last, up: 10 * TTL }
    }

    #[test]
    fn a_lapsed_lease_is_taken_when_its_owner_is_gone() {
        assert_eq!(step(&idle(LAPSED, Last::Unasked)), Step::Ask);
        assert_eq!(step(&idle(LAPSED, Last::Owns)), Step::Wait);
        assert_eq!(step(&idle(LAPSED, Last::Gone)), Step::Take);
        assert_eq!(step(&idle(LAPSED, Last::Nobody)), Step::Take);
        assert_eq!(step(&idle(Lease::Others, Last::Gone)), Step::Wait);
    }

    #[test]
    fn a_newcomer_waits_for_an_owner_that_it_does_not_know() {
        let newcomer = Facts { up: TTL / 2, ..idle(LAPSED, Last::Unknown) };
        assert_eq!(step(&newcomer), Step::Wait);
        assert_eq!(step(&Facts { up: TTL, ..newcomer }), Step::Take);
        assert_eq!(step(&Facts { last: Last::Nobody, ..newcomer }), Step::Take, "a new log has no owner");
    }

    #[test]
    fn who_ranks_lower_waits_for_who_ranks_higher() {
        let second = Facts { rank: Some(1), ..idle(LAPSED, Last::Gone) };
        assert_eq!(step(&second), Step::Wait);
        assert_eq!(step(&Facts { lease: Lease::Lapsed { since: TTL }, ..second }), Step::Take);
        assert_eq!(step(&Facts { lease: Lease::Lapsed { since: TTL }, rank: Some(2), ..second }), Step::Wait);
        assert_eq!(step(&Facts { rank: None, lease: Lease::Lapsed { since: 9 * TTL }, ..second }), Step::Wait);
    }

    #[test]
    fn what_was_given_back_is_the_nearest_ones_and_what_was_left_to_one_is_its() {
        assert_eq!(step(&idle(FREE, Last::Owns)), Step::Take);
        assert_eq!(step(&Facts { rank: Some(1), ..idle(FREE, Last::Gone) }), Step::Wait);
        assert_eq!(step(&Facts { rank: Some(1), ..idle(Lease::Free { since: TTL }, Last::Gone) }), Step::Take);
        assert_eq!(step(&Facts { rank: Some(2), ..idle(Lease::Mine, Last::Owns) }), Step::Take);
        assert_eq!(step(&Facts { rank: None, ..idle(Lease::Mine, Last::Owns) }), Step::Wait);
    }

    #[test]
    fn an_owner_gives_only_what_it_holds() {
        let runs = Facts { state: State::Runs, heir: true, ..idle(Lease::Mine, Last::Nobody) };
        assert_eq!(step(&runs), Step::Give);
        assert_eq!(step(&Facts { heir: false, ..runs }), Step::Wait);
        for lease in [Lease::Others, FREE, LAPSED] {
            assert_eq!(step(&Facts { lease, ..runs }), Step::Wait);
        }
        for state in [State::Moves, State::BacksOff] {
            assert_eq!(step(&Facts { state, ..runs }), Step::Wait);
        }
    }
}

//! "No such stream" is said only once the log has said that nobody else owned the shard when it was asked: who stood still, or lost
//! its lease, may have missed that another router owns it by now and has accepted just that. What a shard does know stays true.

use crate::log::Log;
use atp_core::message::Answer;
use atp_proto::{Code, ConnId, Flags, Frame, WireError};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// How long the log may take; then who asked is told to ask again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Those that may wait in one shard.
const WAITING_MAX: usize = 1024;

/// What isn't said yet.
pub(crate) enum Denial {
    Frame(ConnId, Frame),
    Answer(u64, Answer),
}

impl Denial {
    pub(crate) fn is_frame(frame: &Frame) -> bool {
        frame.flags.has(Flags::RST) && frame.read::<WireError>().is_ok_and(|error| error.code == Code::ResumeGone)
    }

    pub(crate) const fn is_answer(answer: &Answer) -> bool {
        matches!(answer, Answer::Stream(None) | Answer::Bill(None))
    }
}

/// Those of one shard, in the order in which they were decided.
#[derive(Default)]
pub(crate) struct Denials(VecDeque<(Instant, Denial)>);

/// What is to be done with one.
pub(crate) enum Verdict {
    Say(Denial),
    /// Who asked is to ask again.
    AskAgain(Denial),
    /// The log was asked.
    Wait,
}

impl Denials {
    /// Keeps it and asks the log, unless nobody else can own the shard.
    pub(crate) fn judge(&mut self, log: &dyn Log, denial: Denial) -> Verdict {
        // Before the log is asked: only what it says of later counts.
        let now = Instant::now();
        if !log.look() {
            return Verdict::Say(denial);
        }
        if self.0.len() >= WAITING_MAX {
            return Verdict::AskAgain(denial);
        }
        self.0.push_back((now, denial));
        Verdict::Wait
    }

    /// What may be said: at that time nobody else owned the shard.
    pub(crate) fn said_by(&mut self, at: Instant) -> Vec<Denial> {
        self.upto(|since| since <= at)
    }

    /// What the log has said nothing of for too long.
    pub(crate) fn late(&mut self) -> Vec<Denial> {
        let now = Instant::now();
        self.upto(|since| since + PATIENCE <= now)
    }

    /// All of it: the shard ends.
    pub(crate) fn end(&mut self) -> Vec<Denial> {
        self.upto(|_| true)
    }

    fn upto(&mut self, is_due: impl Fn(Instant) -> bool) -> Vec<Denial> {
        let due = self.0.iter().take_while(|(since, _)| is_due(*since)).count();
        self.0.drain(..due).map(|(_, denial)| denial).collect()
    }

    /// When the next one is late.
    pub(crate) fn next_late(&self) -> Option<Instant> {
        self.0.front().map(|(since, _)| *since + PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Events, LogError, QueuedEntry};
    use futures_util::future::BoxFuture;

    /// A log of which others may own a part.
    struct Shared(bool);

    impl Log for Shared {
        fn append(&self, _: Vec<QueuedEntry>) -> BoxFuture<'_, Result<(), LogError>> {
            unreachable!("nothing is written here")
        }
        fn events(&self) -> Events {
            unreachable!("nothing is read here")
        }
        fn look(&self) -> bool {
            self.0
        }
        fn close(self: Box<Self>) -> Result<(), LogError> {
            Ok(())
        }
    }

    fn denial(id: u64) -> Denial {
        Denial::Answer(id, Answer::Bill(None))
    }

    #[tokio::test(start_paused = true)]
    async fn a_denial_waits_for_a_look_at_the_log_that_began_later() {
        let mut denials = Denials::default();
        assert!(matches!(denials.judge(&Shared(false), denial(1)), Verdict::Say(_)), "nobody else can own the shard");
        let before = Instant::now();
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(matches!(denials.judge(&Shared(true), denial(2)), Verdict::Wait));
        assert!(denials.said_by(before).is_empty(), "somebody may have begun since");
        assert_eq!(denials.said_by(Instant::now()).len(), 1);
        assert_eq!(denials.next_late(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_too_long_or_behind_too_many_is_to_ask_again() {
        let mut denials = Denials::default();
        for n in 0..WAITING_MAX as u64 {
            assert!(matches!(denials.judge(&Shared(true), denial(n)), Verdict::Wait));
        }
        assert!(matches!(denials.judge(&Shared(true), denial(0)), Verdict::AskAgain(_)));
        assert!(denials.late().is_empty());
        tokio::time::advance(PATIENCE).await;
        assert_eq!(denials.late().len(), WAITING_MAX);
        assert!(denials.end().is_empty());
    }
}

//! Effects on their way out: what reveals state waits for the entries before it. Each effect is moved in once and out once.
//! Decides nothing.

use crate::message::{Effect, Position};
use std::collections::VecDeque;

/// Effects that an idle queue has room for.
const QUEUE_KEPT: usize = 4096;

#[derive(Default)]
pub(super) struct Outflow {
    /// Entries, and what reveals nothing that isn't durable.
    free: VecDeque<Effect>,
    held: VecDeque<Effect>,
    /// How many of `held`, from the front, may leave.
    released: usize,
    /// How many of `held` have their place in `waits` or may leave.
    placed: usize,
    /// So many effects wait until this position is durable.
    waits: VecDeque<(Position, usize)>,
    /// The most effects that waited lately.
    most: usize,
}

impl Outflow {
    /// Leaves at once.
    pub(super) fn free(&mut self, effect: Effect) {
        self.free.push_back(effect);
    }

    /// Leaves when the entry that this input makes, or the last one before it, is durable.
    pub(super) fn hold(&mut self, effect: Effect) {
        self.held.push_back(effect);
    }

    /// All effects since the last call wait for `position`.
    pub(super) fn place(&mut self, position: Position) {
        let n = self.held.len() - self.placed;
        if n > 0 {
            self.placed += n;
            match self.waits.back_mut() {
                Some((last, count)) if *last == position => *count += n,
                Some(_) | None => self.waits.push_back((position, n)),
            }
        }
    }

    pub(super) fn release(&mut self, durable: Position) {
        while let Some((_, n)) = self.waits.front().copied().filter(|(position, _)| *position <= durable) {
            self.released += n;
            self.waits.pop_front();
        }
    }

    pub(super) fn pop(&mut self) -> Option<Effect> {
        if let Some(effect) = self.free.pop_front() {
            return Some(effect);
        }
        if self.released == 0 {
            self.shrink();
            return None;
        }
        self.most = self.most.max(self.held.len());
        self.released -= 1;
        self.placed -= 1;
        self.held.pop_front()
    }

    /// The room of a burst is given back, but not between the batches of a steady load.
    fn shrink(&mut self) {
        self.most -= self.most / 16;
        if self.held.capacity() > QUEUE_KEPT.max(4 * self.most) {
            self.held.shrink_to(QUEUE_KEPT.max(2 * self.held.len()));
        }
        if self.free.capacity() > QUEUE_KEPT.max(4 * self.most) {
            self.free.shrink_to(QUEUE_KEPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Metric;

    fn effect(reason: &'static str) -> Effect {
        Effect::Metric(Metric::Dropped { reason })
    }

    fn drain(out: &mut Outflow) -> Vec<&'static str> {
        std::iter::from_fn(|| out.pop())
            .filter_map(|e| if let Effect::Metric(Metric::Dropped { reason }) = e { Some(reason) } else { None })
            .collect()
    }

    #[test]
    fn effects_leave_in_order_when_their_position_is_durable() {
        let mut out = Outflow::default();
        out.hold(effect("a"));
        out.hold(effect("b"));
        out.place(1);
        out.hold(effect("c"));
        out.place(2);
        out.hold(effect("not yet placed"));
        out.release(0);
        out.free(effect("entry"));
        assert_eq!(drain(&mut out), ["entry"]);
        out.release(1);
        assert_eq!(drain(&mut out), ["a", "b"]);
        out.release(9);
        assert_eq!(drain(&mut out), ["c"]);
        out.place(9);
        out.release(8);
        assert!(drain(&mut out).is_empty());
        out.release(9);
        assert_eq!(drain(&mut out), ["not yet placed"]);
    }
}

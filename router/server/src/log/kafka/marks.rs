//! Where positions stand among the offsets: a thin index, so that a reader needn't begin at the log's first message. It only
//! knows what somebody read or wrote; a log without marks is read from its beginning.

use atp_core::partition::Mark;
use std::collections::BTreeMap;

/// Marks that are kept. At twice this number every other one goes.
const KEPT: usize = 4096;
/// Positions between two marks, at first.
const STRIDE: u64 = 256;

#[derive(Debug)]
pub(super) struct Marks {
    by_position: BTreeMap<u64, Mark>,
    stride: u64,
    /// The mark right before the newest whole checkpoint that is known.
    checkpoint: Option<Mark>,
}

impl Default for Marks {
    fn default() -> Self {
        Self { by_position: BTreeMap::new(), stride: STRIDE, checkpoint: None }
    }
}

impl Marks {
    /// Offers the place behind a valid message; kept if it is far enough from the one before.
    pub(super) fn offer(&mut self, mark: Mark) {
        let before = self.by_position.range(..=mark.position).next_back();
        if before.map_or(mark.position >= self.stride, |(at, _)| mark.position - at >= self.stride) {
            self.by_position.insert(mark.position, mark);
            if self.by_position.len() >= 2 * KEPT {
                self.thin();
            }
        }
    }

    fn thin(&mut self) {
        self.stride *= 2;
        let mut odd = false;
        self.by_position.retain(|_, _| {
            odd = !odd;
            !odd
        });
    }

    pub(super) fn set_checkpoint(&mut self, mark: Mark) {
        self.checkpoint = Some(mark);
    }
    pub(super) fn checkpoint(&self) -> Option<Mark> {
        self.checkpoint
    }

    /// The last known place before `position`.
    pub(super) fn before(&self, position: u64) -> Option<Mark> {
        let checkpoint = self.checkpoint.filter(|mark| mark.position < position);
        let near = self.by_position.range(..position).next_back().map(|(_, mark)| *mark);
        near.into_iter().chain(checkpoint).max_by_key(|mark| mark.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(position: u64) -> Mark {
        Mark { offset: 2 * position, position, epoch: Some(1), n: position - 1 }
    }

    #[test]
    fn the_last_place_before_a_position_is_found() {
        let mut marks = Marks::default();
        (1..=10 * STRIDE).for_each(|position| marks.offer(mark(position)));
        assert_eq!(marks.before(STRIDE), None, "the beginning is near enough");
        assert_eq!(marks.before(STRIDE + 1), Some(mark(STRIDE)));
        assert_eq!(marks.before(3 * STRIDE + 5), Some(mark(3 * STRIDE)));
        marks.set_checkpoint(mark(3 * STRIDE + 2));
        assert_eq!(marks.before(3 * STRIDE + 5), Some(mark(3 * STRIDE + 2)));
        assert_eq!(marks.checkpoint(), Some(mark(3 * STRIDE + 2)));
    }

    #[test]
    fn a_long_log_has_thin_marks() {
        let mut marks = Marks::default();
        let last = 20 * STRIDE * KEPT as u64;
        (1..=last).step_by(STRIDE as usize / 4).for_each(|position| marks.offer(mark(position)));
        assert!(marks.by_position.len() < 2 * KEPT);
        let near = marks.before(last).unwrap();
        assert!(last - near.position <= 2 * marks.stride, "{} is far from {last}", near.position);
    }
}

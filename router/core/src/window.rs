//! Windows: the triplet {calls, tokens, micro-USD}, its algebra, and when a changed one is told (ATP-10). Decides nothing about
//! what fits in one.

use atp_proto::content::WindowView;
use atp_proto::{Tokens, UsdMicros};

/// No two updates of a window stand closer together than this, but for a fall to zero (`tau_min`), in milliseconds.
pub const TAU_MIN_MS: u64 = 500;
/// A component that moved by one part in this many from the value that was last sent is told at once: 20 %.
const MOVE_PART: u64 = 5;

/// The component-wise minimum. An absent component means no limit, zero means none.
#[must_use]
pub fn effective(a: WindowView, b: WindowView) -> WindowView {
    fn least<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
        a.into_iter().chain(b).min()
    }
    WindowView {
        max_parallel: least(a.max_parallel, b.max_parallel),
        max_tokens: least(a.max_tokens, b.max_tokens),
        max_usd_micros: least(a.max_usd_micros, b.max_usd_micros),
    }
}

fn components(w: WindowView) -> [Option<u64>; 3] {
    [w.max_parallel.map(u64::from), w.max_tokens.map(|Tokens(n)| n), w.max_usd_micros.map(|UsdMicros(n)| n)]
}

/// When a window has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// What was sent last still holds.
    Never,
    At(u64),
    Now,
}

/// What a peer was last told of a window, and since when it no longer holds. Times are monotonic milliseconds.
#[derive(Clone, Copy, Debug)]
pub struct Cadence {
    sent: WindowView,
    sent_at: u64,
    moved_at: Option<u64>,
}

impl Cadence {
    /// The peer has just been told `window`.
    #[must_use]
    pub const fn new(window: WindowView, now: u64) -> Self {
        Self { sent: window, sent_at: now, moved_at: None }
    }

    /// Looks at the window as it is: at once when a component falls to zero; else not within `TAU_MIN_MS` of the last update;
    /// then at once if a component is 20 % off the last sent value, otherwise `TAU_MIN_MS` after the first unsent change.
    pub fn look(&mut self, window: WindowView, now: u64) -> Due {
        if window == self.sent {
            self.moved_at = None;
            return Due::Never;
        }
        let first = *self.moved_at.get_or_insert(now);
        let pairs = || components(self.sent).into_iter().zip(components(window));
        if pairs().any(|(sent, is)| is == Some(0) && sent != Some(0)) {
            return Due::Now;
        }
        let open = self.sent_at + TAU_MIN_MS;
        let far = |(sent, is): (Option<u64>, Option<u64>)| match (sent, is) {
            // Exact without overflow: |is - sent| >= sent / 5, and any move away from zero.
            (Some(sent), Some(is)) => is != sent && is.abs_diff(sent) >= sent.div_ceil(MOVE_PART),
            (sent, is) => sent != is,
        };
        let at = if pairs().any(far) { open } else { open.max(first + TAU_MIN_MS) };
        if at <= now { Due::Now } else { Due::At(at) }
    }

    /// The peer is told `window` now.
    pub fn sent(&mut self, window: WindowView, now: u64) {
        *self = Self::new(window, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(calls: Option<u32>, tokens: Option<u64>, usd: Option<u64>) -> WindowView {
        WindowView { max_parallel: calls, max_tokens: tokens.map(Tokens), max_usd_micros: usd.map(UsdMicros) }
    }

    fn tokens(n: u64) -> WindowView {
        window(Some(8), Some(n), None)
    }

    #[test]
    fn a_move_of_20_percent_goes_out_at_once_and_less_half_a_second_later() {
        let mut cadence = Cadence::new(tokens(1_000), 0);
        assert_eq!(cadence.look(tokens(1_000), 600), Due::Never);
        assert_eq!(cadence.look(tokens(801), 600), Due::At(1_100), "19.9 %");
        assert_eq!(cadence.look(tokens(800), 700), Due::Now, "20 %");
        cadence.sent(tokens(800), 700);
        assert_eq!(cadence.look(tokens(400), 701), Due::At(1_200), "held for half a second after one was sent");
        assert_eq!(cadence.look(tokens(400), 1_200), Due::Now);
    }

    #[test]
    fn small_steps_add_up() {
        let mut cadence = Cadence::new(tokens(1_000), 0);
        for (at, n) in [(1_000, 950), (1_100, 900), (1_200, 850)] {
            assert_eq!(cadence.look(tokens(n), at), Due::At(1_500), "half a second after the first of them");
        }
        assert_eq!(cadence.look(tokens(800), 1_300), Due::Now, "together they are 20 %");
    }

    #[test]
    fn a_fall_to_zero_waits_for_nothing() {
        let mut cadence = Cadence::new(tokens(1_000), 0);
        assert_eq!(cadence.look(tokens(0), 1), Due::Now);
        cadence.sent(tokens(0), 1);
        assert_eq!(cadence.look(tokens(5), 2), Due::At(501), "a rise from zero is held like any other");
        assert_eq!(cadence.look(window(Some(0), Some(0), None), 3), Due::Now, "another component");
    }

    #[test]
    fn what_came_back_in_time_is_not_told() {
        let mut cadence = Cadence::new(tokens(1_000), 0);
        assert_eq!(cadence.look(tokens(990), 10), Due::At(510));
        assert_eq!(cadence.look(tokens(1_000), 20), Due::Never);
        assert_eq!(cadence.look(tokens(990), 400), Due::At(900), "the next change counts anew");
        assert_eq!(cadence.look(window(Some(8), None, None), 600), Due::Now, "a limit that goes is a move");
    }

    fn any_window() -> impl Strategy<Value = WindowView> {
        let n = || proptest::option::of(0..5_u64);
        (proptest::option::of(0..5_u32), n(), n()).prop_map(|(calls, tokens, usd)| window(calls, tokens, usd))
    }

    proptest! {
        #[test]
        fn effective_is_a_meet(a in any_window(), b in any_window(), c in any_window()) {
            prop_assert_eq!(effective(a, b), effective(b, a));
            prop_assert_eq!(effective(effective(a, b), c), effective(a, effective(b, c)));
            prop_assert_eq!(effective(a, a), a);
            prop_assert_eq!(effective(a, WindowView::default()), a);
            for (both, one) in components(effective(a, b)).into_iter().zip(components(a)) {
                prop_assert!(one.is_none_or(|one| both.is_some_and(|both| both <= one)));
            }
        }

        #[test]
        fn updates_stand_half_a_second_apart_and_none_is_forgotten(steps in proptest::collection::vec((1..400_u64, 1..2_000_u64), 1..60)) {
            let mut cadence = Cadence::new(tokens(1_000), 0);
            let (mut now, mut last, mut is) = (0, 0, tokens(1_000));
            for (wait, n) in steps {
                now += wait;
                is = tokens(n);
                if cadence.look(is, now) == Due::Now {
                    prop_assert!(now - last >= TAU_MIN_MS);
                    cadence.sent(is, now);
                    last = now;
                }
            }
            if let Due::At(at) = cadence.look(is, now) {
                prop_assert!(at > now && at <= now + TAU_MIN_MS);
                prop_assert_eq!(cadence.look(is, at), Due::Now);
            }
        }
    }
}

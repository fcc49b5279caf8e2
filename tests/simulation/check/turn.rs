//! Whose turn it is when money comes back: no running call gets a slice while an older one of its account's window lacks one.
//! Told from the log alone: who got a slice later was neither stopped nor satisfied before.

use super::Verdict;
use super::ledger::{Ledger, Phase, Stream, minus};
use atp_core::record::Key;
use atp_proto::CallId;
use std::collections::BTreeMap;

/// Running calls that lack a slice, by window and age, each with the younger call that got one meanwhile.
#[derive(Debug, Default)]
pub struct Turns {
    short: BTreeMap<Place, Option<CallId>>,
}

/// A window of an account, and the call's age in it.
type Place = ((String, String), u64, u32);

fn place(stream: &Stream, lane: u32) -> Option<Place> {
    Some((stream.call(lane)?.windows.first()?.clone(), stream.no, lane))
}

impl Turns {
    /// A new owner asks anew.
    pub fn forget(&mut self) {
        self.short.clear();
    }
}

impl Ledger {
    /// A dispatch that leaves has asked for nothing yet.
    pub(super) fn begins_anew(&mut self, key: &Key, lane: u32) {
        if let Some(at) = self.streams.get(key).and_then(|stream| place(stream, lane)) {
            self.turns.short.remove(&at);
        }
    }

    /// The call's agent said what it has spent, or the call grew or ended: it is short of a slice now, or it isn't.
    pub(super) fn look_for_shortage(&mut self, key: &Key, lane: u32) {
        let Some(stream) = self.streams.get(key) else { return };
        let Some((call, at)) = stream.call(lane).zip(place(stream, lane)) else { return };
        let left = minus(minus(call.hold, call.tools), call.booked);
        let free = minus(minus(stream.limit, stream.settled), stream.held);
        // What the task itself has no room for is nobody's to wait for.
        let slice = |i: usize| (call.guarded[i] / 4).max(4 * call.chunk[i]);
        let short = call.phase == Phase::Running && (0..2).any(|i| left[i] < slice(i) && free[i] > 0);
        match short {
            true => self.turns.short.insert(at, None),
            false => self.turns.short.remove(&at),
        };
    }

    /// The call got a slice.
    pub(super) fn takes_its_turn(&mut self, key: &Key, lane: u32, verdict: &mut Verdict) {
        let Some(stream) = self.streams.get(key) else { return };
        let Some((call, at)) = stream.call(lane).zip(place(stream, lane)) else { return };
        let id = call.id;
        if let Some(Some(younger)) = self.turns.short.get(&at) {
            verdict
                .fail("older calls are extended first", || format!("{younger} got a slice while {id} waited for one"));
        }
        for (_, overtaken) in self.turns.short.range_mut((at.0.clone(), 0, 0)..at) {
            overtaken.get_or_insert(id);
        }
        self.look_for_shortage(key, lane);
    }
}

//! Remembers which streams a state store hasn't been shown since they changed, and shows them. Decides nothing, and no
//! decision reads it: without a store it is a bounded set of numbers.

use super::Shard;
use super::closing::qos;
use super::windows::{accepted, stream_window};
use crate::projection::{Projection, StreamRow};
use crate::record::{Record, hex};
use crate::stream::Stream;
use atp_proto::AgentName;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

/// Changed streams that are remembered; beyond it every stream counts as changed.
const CHANGED_MAX: usize = 65_536;
/// Streams that one answer looks at while it goes through all.
const LOOKED_AT_MAX: usize = 8_192;
/// A stream that ended is shown for this long, in logged time.
const SHOWN_MS: u64 = 60_000;

/// What a store has to be shown.
#[derive(Default)]
pub(super) struct Changes {
    streams: BTreeSet<u64>,
    /// The one that was marked last: chunks of one answer come in a row.
    last: u64,
    /// All streams are to be shown; those below this number were.
    walk: Option<u64>,
}

impl Changes {
    pub(super) fn mark(&mut self, no: u64) {
        if self.last == no && no > 0 {
            return;
        }
        self.last = no;
        self.streams.insert(no);
        if self.streams.len() > CHANGED_MAX {
            self.mark_all();
        }
    }

    fn mark_all(&mut self) {
        self.streams.clear();
        (self.last, self.walk) = (0, Some(0));
    }
}

impl Shard {
    /// A record may change what is shown of its stream. Frames of agents don't; what is told of them does.
    pub(super) fn note_changed(&mut self, record: &Record) {
        if matches!(record, Record::Frame(frame) if !frame.cancel) {
            return;
        }
        let no = record.key().and_then(|key| self.state.stream_no(&key.tenant, &key.stream));
        no.into_iter().for_each(|no| self.changes.mark(no));
    }

    /// At most `max` streams that have changed (with `all`: those that run or ended lately, from the first one on); each
    /// is shown once until it changes again.
    pub(super) fn projection(&mut self, all: bool, agents: bool, max: usize) -> Projection {
        if all {
            self.changes.mark_all();
        }
        let (position, epoch) = (self.state.position(), self.epoch);
        let names = agents.then(|| self.agent_names());
        let streams = self.changed_rows(max.max(1));
        Projection {
            log_id: self.state.log_id().clone(),
            shard: self.settings.shard,
            position,
            epoch,
            checkpoint: self.checkpoint_at,
            streams,
            agents: names.map(|names: BTreeSet<AgentName>| names.into_iter().map(|n| self.agent_now(n)).collect()),
            more: self.changes.walk.is_some() || !self.changes.streams.is_empty(),
        }
    }

    fn changed_rows(&mut self, max: usize) -> Vec<StreamRow> {
        let mut rows = Vec::new();
        if let Some(from) = self.changes.walk {
            let since = self.clock.logged_ms().saturating_sub(SHOWN_MS);
            let mut next = None;
            for (looked_at, (no, stream)) in self.state.streams.range(from..).enumerate() {
                if looked_at == LOOKED_AT_MAX || rows.len() == max {
                    next = Some(*no);
                    break;
                }
                if !stream.is_closed() || stream.has_open_calls() || stream.ended_at >= since {
                    rows.push(self.row(stream));
                }
            }
            self.changes.walk = next;
        }
        self.changes.last = 0;
        while rows.len() < max
            && let Some(no) = self.changes.streams.pop_first()
        {
            // One that is forgotten by now ended a day ago.
            rows.extend(self.state.stream(no).map(|stream| self.row(stream)));
        }
        rows
    }

    fn row(&self, stream: &Stream) -> StreamRow {
        let mut missing = Vec::new();
        for call in stream.calls.iter().filter(|c| c.is_open()) {
            let lane = call.reserve.lane;
            if let Some(live) = self.calls.get(&stream.call_id(lane)).filter(|l| !l.inbound.is_idle()) {
                missing.extend(live.inbound.missing().into_iter().map(|open| (lane, open)));
            }
        }
        StreamRow {
            tenant: stream.tenant(),
            stream: stream.id(),
            state: stream.state(),
            qos: qos(stream),
            next_msg_seq: stream.out_seq + 1,
            window: accepted(stream),
            left: stream_window(stream),
            missing,
            findings_hash: findings_hash(stream),
            last_at: stream.last_at,
        }
    }
}

fn findings_hash(stream: &Stream) -> String {
    let mut hash = Sha256::new();
    let mut any = false;
    for call in stream.calls.iter().filter(|c| !c.findings.is_empty()) {
        any = true;
        hash.update(call.reserve.lane.to_be_bytes());
        for finding in &call.findings {
            hash.update((finding.len() as u64).to_be_bytes());
            hash.update(finding);
        }
    }
    if any { hex(&hash.finalize()) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_changes_than_are_remembered_are_all_streams() {
        let mut changes = Changes::default();
        let max = CHANGED_MAX as u64;
        (0..max).chain(0..max).for_each(|no| changes.mark(no));
        assert_eq!((changes.streams.len(), changes.walk), (CHANGED_MAX, None));
        changes.mark(max);
        assert_eq!((changes.streams.len(), changes.walk), (0, Some(0)));
        changes.mark(max);
        assert_eq!(changes.streams.len(), 1, "what changes during the walk is shown again");
    }
}

//! Client frames, built one way: when they are sent first, and again out of the log for one who missed them.

use crate::record::{Ended, Entry, Key, Record};
use crate::state::read_said;
use atp_proto::content::{Accepted, TaskState, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, Cost, Frame, Limit, Qos, StreamId, TenantId};
use std::collections::BTreeMap;

/// `SYN|ACK control.accepted`; numbered 1 where it answers the submit that made the stream, else unnumbered.
#[must_use]
pub(crate) fn accepted(
    on: &str,
    seq: u64,
    stream: &str,
    state: TaskState,
    qos: Qos,
    max_parallel: Option<u32>,
    limit: Limit,
) -> Frame {
    let window = WindowView { max_parallel, max_tokens: limit.tokens, max_usd_micros: limit.usd_micros };
    let content = Accepted { stream_id: stream.into(), state, qos, window, resume_token: None };
    Frame::json(on, seq, Flags::SYN.with(Flags::ACK), kind::ACCEPTED, &content)
}

/// The final and the bill of a closed stream.
#[must_use]
pub(crate) fn closing(stream: &str, close: &crate::record::Close) -> [Frame; 2] {
    [
        Frame::raw(stream, close.out_seq, Flags::NONE, kind::RESULT_FINAL, close.result.clone()),
        Frame::raw(stream, close.out_seq + 1, Flags::FIN, kind::BILL, close.bill.clone()),
    ]
}

/// Reads the client frames of one stream out of log entries. Feed it every entry behind the stream's first position.
pub struct StreamReplay {
    key: Key,
    after: u64,
    upto: u64,
    agents: BTreeMap<u32, (CallId, AgentName)>,
}

impl StreamReplay {
    /// Frames with `after < msg_seq <= upto`.
    #[must_use]
    pub fn new(tenant: &TenantId, stream: &StreamId, after: u64, upto: u64) -> Self {
        Self { key: Key::new(tenant, stream), after, upto, agents: BTreeMap::new() }
    }

    /// The client frames that this entry made, in order.
    pub fn feed(&mut self, _position: u64, entry: &Entry) -> Vec<Frame> {
        let mut frames = Vec::new();
        for record in entry.records.iter().filter_map(|r| r.record.as_ref()) {
            if record.key() == Some(&self.key) {
                self.record(entry, record, &mut frames);
            }
        }
        frames.retain(|f| f.msg_seq > self.after && f.msg_seq <= self.upto);
        frames
    }

    fn record(&mut self, entry: &Entry, record: &Record, frames: &mut Vec<Frame>) {
        let stream = self.key.stream.as_str();
        match record {
            Record::Accept(r) => {
                let qos = Qos::from_wire(r.qos).unwrap_or_default();
                frames.push(accepted(stream, 1, stream, TaskState::Queued, qos, r.max_parallel, r.limit.into()));
            }
            Record::Reserve(r) => {
                for call in &r.calls {
                    self.agents.insert(call.lane, (r.key.call(call.lane), AgentName::new(&call.agent)));
                }
            }
            Record::Frame(r) if r.lane > 0 && r.out_seq > 0 => {
                if let (Some((id, agent)), Some(said)) = (self.agents.get(&r.lane), read_said(r)) {
                    let booked = r.booked.map(Cost::from).unwrap_or_default();
                    frames.push(said.to_client(stream, r.out_seq, *id, agent, booked, None));
                }
            }
            Record::Settle(r) => self.ended(entry, r.lane, &r.ended, Some(r.actual.into()), frames),
            Record::Void(r) => self.ended(entry, r.lane, &r.ended, None, frames),
            Record::Close(r) => frames.extend(closing(stream, r)),
            Record::Frame(_)
            | Record::Faster(_)
            | Record::Genesis(_)
            | Record::Epoch(_)
            | Record::Window(_)
            | Record::Deny(_)
            | Record::Intent(_)
            | Record::Extend(_)
            | Record::Adjust(_)
            | Record::Tool(_)
            | Record::Checkpoint(_)
            | Record::Agent(_)
            | Record::Share(_)
            | Record::ShareIn(_)
            | Record::ShareOut(_)
            | Record::ShareBack(_)
            | Record::ShareLate(_)
            | Record::Tier(_) => {}
        }
    }

    fn ended(&self, entry: &Entry, lane: u32, ended: &Ended, cost: Option<Cost>, frames: &mut Vec<Frame>) {
        let Some((id, agent)) = self.agents.get(&lane).filter(|_| ended.out_seq > 0) else { return };
        // The agent's last message stands in the same entry, if one ended the lane.
        let last = entry.records.iter().rev().find_map(|r| match r.record.as_ref()? {
            Record::Frame(f) if f.lane == lane && f.key == self.key => Some(f),
            _ => None,
        });
        // A chunk in this entry has a message of its own.
        let last = last.filter(|f| f.out_seq == 0).and_then(read_said).unwrap_or_default();
        let cost = cost.unwrap_or_default();
        frames.push(last.to_client(&self.key.stream, ended.out_seq, *id, agent, cost, Some(&ended.how)));
    }
}

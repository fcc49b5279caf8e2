//! Client frames, built one way: when they are sent first, and again out of the log for one who missed them.

use crate::record::{Ended, Entry, FrameRecord, Key, Record};
use crate::state::join;
use atp_proto::content::{Accepted, AgentFinal, AgentPartial, Partial, TaskState, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, Cost, Frame, Limit, Qos, StreamId, TenantId, codec};
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

/// `agent.result.partial` to the client.
pub(crate) fn partial(
    stream: &str,
    seq: u64,
    call_id: CallId,
    agent: &AgentName,
    part: AgentPartial,
    ended: Option<&str>,
) -> Frame {
    let content = Partial {
        call_id,
        agent: agent.clone(),
        text: part.text,
        findings: part.findings,
        cost: part.cost,
        ended: ended.map(Into::into),
    };
    Frame::json(stream, seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

/// What an agent's last message adds to its lane's output.
pub(crate) fn part_of_final(last: AgentFinal) -> AgentPartial {
    AgentPartial { text: last.text, findings: last.findings, cost: last.cost, usage_source: last.usage_source }
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
                if let (Some((id, agent)), Some(part)) = (self.agents.get(&r.lane), part_of(r)) {
                    frames.push(partial(stream, r.out_seq, *id, agent, part, None));
                }
            }
            Record::Settle(r) => self.ended(entry, r.lane, &r.ended, Some(r.actual.into()), frames),
            Record::Void(r) => self.ended(entry, r.lane, &r.ended, None, frames),
            Record::Close(r) => frames.extend(closing(stream, r)),
            Record::Frame(_)
            | Record::Genesis(_)
            | Record::Epoch(_)
            | Record::Window(_)
            | Record::Deny(_)
            | Record::Intent(_)
            | Record::Extend(_)
            | Record::Adjust(_)
            | Record::Checkpoint(_) => {}
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
        let last = last.filter(|f| f.out_seq == 0).and_then(part_of);
        let part = AgentPartial { cost: cost.unwrap_or_default(), ..last.unwrap_or_default() };
        frames.push(partial(&self.key.stream, ended.out_seq, *id, agent, part, Some(&ended.how)));
    }
}

/// The output of a logged agent message, with the cost that was booked for it.
fn part_of(frame: &FrameRecord) -> Option<AgentPartial> {
    let content = join(&frame.bodies).ok()?;
    let kind_of = codec::decode_body(frame.bodies.first()?.clone()).ok()?.kind;
    let part = match &*kind_of {
        kind::RESULT_PARTIAL => serde_json::from_slice::<AgentPartial>(&content).ok()?,
        kind::RESULT_FINAL => part_of_final(serde_json::from_slice::<AgentFinal>(&content).ok()?),
        _ => return None,
    };
    Some(AgentPartial { cost: frame.booked.map(Cost::from).unwrap_or(part.cost), ..part })
}

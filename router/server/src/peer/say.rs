//! What routers say to each other on a link: `peer.say`, one message each. A message is larger than a frame may be where a task is:
//! it travels in fragments, which arrive in order because the link is one connection.

use crate::outbox::Outbox;
use atp_core::escrow::Escrow;
use atp_core::message::{FromAgent, ToAgent};
use atp_proto::codec::{self, Received};
use atp_proto::content::RouteUpdate;
use atp_proto::frame::kind;
use atp_proto::limits::MESSAGE_BYTES_MAX;
use atp_proto::{AgentName, Code, Flags, Frame, WireError, pb};
use bytes::Bytes;
use prost::Message;

/// The stream of a link's messages.
const STREAM: &str = "link";
/// Bytes of one message: a task's largest, and what stands around it.
const SAID_BYTES_MAX: usize = 2 * MESSAGE_BYTES_MAX;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Say {
    #[prost(oneof = "Said", tags = "1, 2, 3, 4, 5, 6")]
    pub(crate) said: Option<Said>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Said {
    /// A shard to an agent.
    #[prost(message, tag = "1")]
    ToAgent(ForAgent),
    /// An agent's router to a shard, or to all.
    #[prost(message, tag = "2")]
    FromAgent(OfAgent),
    /// The frames of an agent's calls.
    #[prost(message, tag = "3")]
    AgentFrames(AgentFrames),
    #[prost(message, tag = "4")]
    Escrow(BetweenShards),
    /// A question to the shards of that router.
    #[prost(message, tag = "5")]
    Ask(Numbered),
    #[prost(message, tag = "6")]
    Answer(Numbered),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct ForAgent {
    #[prost(string, tag = "1")]
    pub(crate) agent: String,
    /// `ToAgent` as JSON, without its frame.
    #[prost(bytes = "bytes", tag = "2")]
    head: Bytes,
    /// The body of its frame.
    #[prost(bytes = "bytes", tag = "3")]
    body: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct OfAgent {
    #[prost(uint32, optional, tag = "1")]
    pub(crate) shard: Option<u32>,
    /// `FromAgent` as JSON.
    #[prost(bytes = "bytes", tag = "2")]
    head: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct AgentFrames {
    #[prost(uint32, tag = "1")]
    pub(crate) shard: u32,
    #[prost(string, tag = "2")]
    pub(crate) agent: String,
    #[prost(string, tag = "3")]
    pub(crate) incarnation: String,
    #[prost(message, repeated, tag = "4")]
    frames: Vec<Carried>,
}

/// A frame of somebody else: its body as it was received.
#[derive(Clone, PartialEq, Message)]
struct Carried {
    #[prost(bytes = "bytes", tag = "1")]
    body: Bytes,
    #[prost(bool, tag = "2")]
    ecn: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct BetweenShards {
    #[prost(uint32, tag = "1")]
    pub(crate) from: u32,
    #[prost(uint32, tag = "2")]
    pub(crate) to: u32,
    #[prost(message, optional, tag = "3")]
    pub(crate) escrow: Option<Escrow>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Numbered {
    #[prost(uint64, tag = "1")]
    pub(crate) id: u64,
    /// JSON.
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) what: Bytes,
}

impl ForAgent {
    pub(crate) fn message(self) -> Result<ToAgent, WireError> {
        let message: ToAgent = read(&self.head)?;
        if message.frame().is_none() {
            return Ok(message);
        }
        Ok(message.with_frame(codec::decode_body(self.body)?))
    }
}

impl OfAgent {
    pub(crate) fn message(&self) -> Result<FromAgent, WireError> {
        read(&self.head)
    }
}

impl AgentFrames {
    pub(crate) fn frames(self) -> Result<Vec<Received>, WireError> {
        let frame = |Carried { body, ecn }| {
            let mut frame = codec::decode_body(Bytes::clone(&body))?;
            if ecn {
                frame.hop = Some(Box::new(pb::Hop { ecn, ..pb::Hop::default() }));
            }
            Ok(Received { frame, body })
        };
        self.frames.into_iter().map(frame).collect()
    }
}

fn read<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(json).map_err(|e| WireError::proto(format!("peer.say: {e}")))
}

fn json<T: serde::Serialize>(what: &T) -> Bytes {
    serde_json::to_vec(what).expect("messages of shards and agents have text keys alone").into()
}

fn frame(said: Said) -> Frame {
    let content = Say { said: Some(said) }.encode_to_vec().into();
    let frame = Frame::raw(STREAM, 1, Flags::NONE, kind::PEER_SAY, content);
    Frame { content_type: "application/x-protobuf".into(), ..frame }
}

pub(crate) fn to_agent(agent: &AgentName, message: &ToAgent) -> Frame {
    let body = message.frame().map(codec::encode_body).unwrap_or_default();
    frame(Said::ToAgent(ForAgent { agent: agent.to_string(), head: json(message), body }))
}

/// `shard`: `None` is every one.
pub(crate) fn from_agent(shard: Option<u32>, message: &FromAgent) -> Frame {
    frame(Said::FromAgent(OfAgent { shard, head: json(message) }))
}

pub(crate) fn agent_frames(shard: u32, agent: &AgentName, incarnation: &str, frames: &[Received]) -> Frame {
    let carried = |received: &Received| {
        let ecn = received.frame.hop.as_ref().is_some_and(|hop| hop.ecn);
        Carried { body: received.body.clone(), ecn }
    };
    let frames = frames.iter().map(carried).collect();
    frame(Said::AgentFrames(AgentFrames { shard, agent: agent.to_string(), incarnation: incarnation.into(), frames }))
}

pub(crate) fn escrow(from: u32, to: u32, escrow: Escrow) -> Frame {
    frame(Said::Escrow(BetweenShards { from, to, escrow: Some(escrow) }))
}

pub(crate) fn ask<T: serde::Serialize>(id: u64, what: &T) -> Frame {
    frame(Said::Ask(Numbered { id, what: json(what) }))
}

pub(crate) fn answer<T: serde::Serialize>(id: u64, what: &T) -> Frame {
    frame(Said::Answer(Numbered { id, what: json(what) }))
}

pub(crate) fn route_update(update: &RouteUpdate) -> Frame {
    Frame::json(STREAM, 1, Flags::NONE, kind::ROUTE_UPDATE, update)
}

/// What isn't said again must not be lost: a link that has no room for it ends, and everything is said anew on the next one.
pub(crate) fn or_close(link: &Outbox, frame: Frame) {
    if !link.send_one(frame) {
        link.close(Some(WireError::new(Code::Limit, "unsent bytes: this router can't keep up with its link")));
    }
}

/// One whole message of a link.
pub(crate) enum Heard {
    Say(Box<Said>),
    Routes(RouteUpdate),
    /// A later version's.
    Unknown,
}

/// Puts fragments together again.
#[derive(Default)]
pub(crate) struct Assembly {
    kind: String,
    content: Vec<u8>,
}

impl Assembly {
    /// The message that this frame completes.
    ///
    /// # Errors
    /// EPROTO, ELIMIT: the link can't go on.
    pub(crate) fn take(&mut self, frame: Frame) -> Result<Option<Heard>, WireError> {
        let more = frame.flags.has(Flags::MORE);
        if frame.frag_seq == 0 && !more {
            return heard(&frame.kind, frame.content).map(Some);
        }
        if frame.frag_seq == 0 {
            (self.kind, self.content) = (frame.kind.to_string(), Vec::new());
        }
        if self.content.len() + frame.content.len() > SAID_BYTES_MAX {
            let (used, most) = ((self.content.len() + frame.content.len()) as u64, SAID_BYTES_MAX as u64);
            return Err(WireError::new(Code::Limit, "peer.say: larger than a message may be").used(used, most));
        }
        self.content.extend_from_slice(&frame.content);
        if more {
            return Ok(None);
        }
        heard(&std::mem::take(&mut self.kind), std::mem::take(&mut self.content).into()).map(Some)
    }
}

fn heard(what: &str, content: Bytes) -> Result<Heard, WireError> {
    match what {
        kind::PEER_SAY => {
            let say = Say::decode(content).map_err(|e| WireError::proto(format!("peer.say: {e}")))?;
            Ok(say.said.map_or(Heard::Unknown, |said| Heard::Say(Box::new(said))))
        }
        kind::ROUTE_UPDATE => read(&content).map(Heard::Routes),
        _ => Ok(Heard::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::limits::FRAGMENT_BYTES;
    use atp_proto::reassembly::fragment;
    use atp_proto::{CallId, StreamId, TenantId};

    fn call() -> CallId {
        CallId::of(&TenantId::new("t"), &StreamId::new("s"), 1)
    }

    fn heard_of(frame: Frame) -> Said {
        let mut assembly = Assembly::default();
        let mut parts =
            if frame.content.len() > FRAGMENT_BYTES { fragment(frame, FRAGMENT_BYTES) } else { vec![frame] };
        let last = parts.pop().expect("one");
        for part in parts {
            assert!(assembly.take(part).unwrap().is_none());
        }
        match assembly.take(last).unwrap() {
            Some(Heard::Say(said)) => *said,
            _ => panic!("something else"),
        }
    }

    #[test]
    fn a_dispatch_of_any_size_arrives_as_it_was() {
        for bytes in [10, 3 * FRAGMENT_BYTES + 7] {
            let frame = Frame::raw("c", 1, Flags::SYN, kind::DISPATCH, vec![b'x'; bytes].into());
            let incarnation: std::sync::Arc<str> = "i1".into();
            let (keeper, sent): (std::sync::Arc<str>, _) = ("k".into(), frame.clone());
            let message =
                ToAgent::Dispatch { shard: 3, epoch: 9, call: call(), incarnation, go_on: false, keeper, frame: sent };
            let Said::ToAgent(said) = heard_of(to_agent(&AgentName::new("a"), &message)) else { panic!() };
            assert_eq!(said.agent, "a");
            let ToAgent::Dispatch { shard: 3, epoch: 9, call: of, incarnation, go_on: false, keeper, frame: got } =
                said.message().unwrap()
            else {
                panic!("another message")
            };
            assert_eq!((of, &*incarnation, &*keeper, got), (call(), "i1", "k", frame));
        }
    }

    #[test]
    fn frames_of_an_agent_keep_their_bytes_and_their_congestion_mark() {
        let mut frame = Frame::raw("c", 7, Flags::NONE, kind::RESULT_PARTIAL, "{}".into());
        let body = codec::encode_body(&frame);
        frame.hop = Some(Box::new(pb::Hop { ecn: true, ..pb::Hop::default() }));
        let sent = [Received { frame, body }];
        let Said::AgentFrames(said) = heard_of(agent_frames(5, &AgentName::new("a"), "i", &sent)) else { panic!() };
        assert_eq!((said.shard, &*said.agent, &*said.incarnation), (5, "a", "i"));
        assert_eq!(said.frames().unwrap(), sent);
    }

    #[test]
    fn what_an_agent_says_reads_back() {
        let (agent, incarnation, keeper) = (AgentName::new("a"), "i".into(), "k".into());
        let message = FromAgent::Lent { agent, incarnation, call: call(), epoch: 4, keeper };
        let Said::FromAgent(said) = heard_of(from_agent(Some(2), &message)) else { panic!() };
        assert_eq!(said.shard, Some(2));
        assert_eq!(format!("{:?}", said.message().unwrap()), format!("{message:?}"));
        assert!(serde_json::from_slice::<ToAgent>(b"{\"Nothing\":{}}").is_err());
    }

    #[test]
    fn n_bytes_of_a_message_are_taken_and_one_more_is_not() {
        let part = |seq: u32, bytes: usize, more: bool| {
            let flags = if more { Flags::MORE } else { Flags::NONE };
            let frame = Frame::raw(STREAM, 1, flags, kind::PEER_SAY, vec![0; bytes].into());
            Frame { frag_seq: seq, ..frame }
        };
        let mut assembly = Assembly::default();
        assert!(assembly.take(part(0, SAID_BYTES_MAX, true)).unwrap().is_none());
        assert_eq!(assembly.take(part(1, 1, true)).err().map(|e| e.code), Some(Code::Limit));
    }
}

//! Contents of a session: hello, resume, acknowledgements.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Client,
    Agent,
    Router,
}

/// `SYN control.hello`: the first frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    #[serde(default)]
    pub minor_max: u32,
    pub role: Role,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The peer follows `control.redirect`; a router serves one that doesn't by forwarding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub redirect: bool,
}

/// `SYN|ACK control.hello`: the router's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    pub minor: u32,
    pub session_id: String,
    pub limits: HelloLimits,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub heartbeat_ms: u64,
}

/// `control.redirect`, instead of the router's hello: this router has no shard, and knows one that has. The connection ends behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Redirect {
    /// `atp://HOST:PORT`.
    pub url: String,
    pub shard: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloLimits {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub frame_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub fragment_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub message_bytes: u64,
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub streams: u64,
}

/// `control.resume{token, after}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    #[serde(default)]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub after: u64,
}

/// `control.ack`, router to sender: all up to `msg_seq` is durable here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub msg_seq: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub open: Vec<OpenMessage>,
}

/// A message of which something is missing; no range means the whole message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenMessage {
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub msg_seq: u64,
    /// Fragments that are here.
    #[serde(default)]
    pub frag: u32,
    /// Inclusive ranges of frag_seq that are asked for again.
    #[serde(default)]
    pub missing: Vec<(u32, u32)>,
}

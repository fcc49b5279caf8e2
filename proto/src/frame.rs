//! One frame in memory: what the codec yields and what it takes. Texts and content are slices of the received bytes.

use crate::code::WireError;
use crate::pb;
use bytes::Bytes;
use bytestring::ByteString;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Deref;

/// UTF-8 text that shares the buffer it was received in. Keep it no longer than the frame: make an id of it instead.
///
/// It is checked once, when it is made; reading it costs nothing. The proof that lets `deref` skip the check is kept by
/// `bytestring`, because this workspace forbids `unsafe`.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text(ByteString);

impl Text {
    pub const EMPTY: Self = Self(ByteString::new());

    /// # Errors
    /// When the bytes aren't UTF-8.
    pub fn from_utf8(bytes: Bytes) -> Result<Self, std::str::Utf8Error> {
        ByteString::try_from(bytes).map(Self)
    }

    #[must_use]
    pub const fn from_static(text: &'static str) -> Self {
        Self(ByteString::from_static(text))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Deref for Text {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}
impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(ByteString::from(text))
    }
}
impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(ByteString::from(text))
    }
}
impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}
impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}
impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}
impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// The bits of `Body.flags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(pub u32);

impl Flags {
    pub const NONE: Self = Self(0);
    pub const SYN: Self = Self(1);
    pub const ACK: Self = Self(2);
    pub const FIN: Self = Self(4);
    pub const RST: Self = Self(8);
    /// More fragments of this msg_seq, and nothing else.
    pub const MORE: Self = Self(16);
    pub const HB: Self = Self(32);
    /// msg_seq is 0.
    pub const CTRL: Self = Self(64);
    /// Every bit that means something in this version.
    pub const ALL: Self = Self(127);
    pub const NAMES: [(&'static str, Self); 7] = [
        ("SYN", Self::SYN),
        ("ACK", Self::ACK),
        ("FIN", Self::FIN),
        ("RST", Self::RST),
        ("MORE", Self::MORE),
        ("HB", Self::HB),
        ("CTRL", Self::CTRL),
    ];

    #[must_use]
    pub const fn has(self, flag: Self) -> bool {
        self.0 & flag.0 == flag.0
    }
    #[must_use]
    pub const fn with(self, flag: Self) -> Self {
        Self(self.0 | flag.0)
    }
}

/// Quality of service; absent on the wire reads as silver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Qos {
    Gold = 1,
    #[default]
    Silver = 2,
    Bronze = 3,
}

impl Qos {
    /// # Errors
    /// EPROTO for anything but 0 to 3.
    pub fn from_wire(n: u32) -> Result<Self, WireError> {
        match n {
            0 | 2 => Ok(Self::Silver),
            1 => Ok(Self::Gold),
            3 => Ok(Self::Bronze),
            _ => Err(WireError::proto(format!("qos: {n} is not 0 (absent), 1 gold, 2 silver or 3 bronze"))),
        }
    }

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gold => "gold",
            Self::Silver => "silver",
            Self::Bronze => "bronze",
        }
    }

    /// k squared of the guard band in ppm: k = 2, 1, 1/2.
    #[must_use]
    pub const fn k_squared_ppm(self) -> u64 {
        match self {
            Self::Gold => 4_000_000,
            Self::Silver => 1_000_000,
            Self::Bronze => 250_000,
        }
    }

    /// k of the guard band in ppm.
    #[must_use]
    pub const fn k_ppm(self) -> u64 {
        match self {
            Self::Gold => 2_000_000,
            Self::Silver => 1_000_000,
            Self::Bronze => 500_000,
        }
    }
}

pub use pb::{Hop, Meta};

/// The payload types of section 3 that this version knows. Others are ignored and counted.
pub mod kind {
    pub const TASK_SUBMIT: &str = "task.submit";
    pub const TASK_ANSWER: &str = "task.answer";
    pub const TASK_CANCEL: &str = "task.cancel";
    pub const RESULT_PARTIAL: &str = "agent.result.partial";
    pub const RESULT_PROVISIONAL: &str = "agent.result.provisional";
    pub const RESULT_FINAL: &str = "agent.result.final";
    pub const AGENT_LOG: &str = "agent.log";
    pub const ESTIMATE: &str = "agent.estimate";
    pub const ESTIMATE_RESULT: &str = "agent.estimate.result";
    pub const DISPATCH: &str = "agent.dispatch";
    pub const AGENT_CANCEL: &str = "agent.cancel";
    pub const TOOL_REQUEST: &str = "tool.request";
    pub const TOOL_RESULT: &str = "tool.result";
    pub const HELLO: &str = "control.hello";
    pub const REDIRECT: &str = "control.redirect";
    pub const CAPABILITIES: &str = "control.capabilities";
    pub const ACCEPTED: &str = "control.accepted";
    pub const RESUME: &str = "control.resume";
    pub const BILL: &str = "control.bill";
    pub const STATUS: &str = "control.status";
    pub const WINDOW_UPDATE: &str = "control.window_update";
    pub const BUDGET_UPDATE: &str = "control.budget_update";
    pub const ACK: &str = "control.ack";
    pub const ERROR: &str = "control.error";
    pub const ROUTE_UPDATE: &str = "control.route_update";
    pub const PEER_CHALLENGE: &str = "peer.challenge";
    pub const PEER_PROOF: &str = "peer.proof";
    pub const PEER_SAY: &str = "peer.say";
}

/// One frame: `Hop` beside `Body` (ATP-2).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frame {
    /// What a hop may change; `None` is the same as all absent.
    pub hop: Option<Box<Hop>>,
    pub session_id: Text,
    /// Empty on the connection's own stream (hello, heartbeats, capabilities, status).
    pub stream_id: Text,
    /// From 1 per stream and direction; 0: unnumbered.
    pub msg_seq: u64,
    pub frag_seq: u32,
    pub flags: Flags,
    /// 0 absent; checked by `Qos::from_wire`.
    pub qos: u32,
    pub meta: Option<Box<Meta>>,
    /// One of `kind`, or a type of a later version. Empty: a frame without payload (heartbeat, fragment after the first).
    pub kind: Text,
    pub content: Bytes,
    /// Absent means `application/json`.
    pub content_type: Text,
    /// The fields of `Payload` that few frames carry.
    pub extra: Option<Box<Extra>>,
}

/// The rarely used fields of `Payload`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extra {
    pub confidence_ppm: Option<u32>,
    pub cost_est: Option<pb::Cost>,
    pub checksum: Bytes,
    pub expiry_ms: Option<u64>,
    pub rev: u32,
    pub tool_cost_breakdown: Vec<pb::ToolCost>,
}

impl Frame {
    /// A frame of `kind` whose content is `content` as one JSON document. `msg_seq` 0 sets CTRL.
    #[must_use]
    pub fn json<T: Serialize + ?Sized>(
        stream_id: impl Into<Text>,
        msg_seq: u64,
        flags: Flags,
        kind: &'static str,
        content: &T,
    ) -> Self {
        let content = serde_json::to_vec(content).expect("content types serialize: they hold no maps with other keys");
        Self::raw(stream_id, msg_seq, flags, kind, content.into())
    }

    /// A frame whose content is already a JSON document.
    #[must_use]
    pub fn raw(stream_id: impl Into<Text>, msg_seq: u64, flags: Flags, kind: &'static str, content: Bytes) -> Self {
        let flags = if msg_seq == 0 { flags.with(Flags::CTRL) } else { flags };
        Self { stream_id: stream_id.into(), msg_seq, flags, kind: Text::from_static(kind), content, ..Self::default() }
    }

    /// A heartbeat on stream ""; `answer` makes it HB|ACK.
    #[must_use]
    pub fn heartbeat(answer: bool) -> Self {
        let flags = Flags::HB.with(Flags::CTRL);
        Self { flags: if answer { flags.with(Flags::ACK) } else { flags }, ..Self::default() }
    }

    /// Reads the content as `T`; unknown fields are ignored, `null` is absent.
    ///
    /// # Errors
    /// EPROTO naming the payload type, the field and what is wrong with it.
    pub fn read<T: serde::de::DeserializeOwned>(&self) -> Result<T, WireError> {
        serde_json::from_slice(&self.content).or_else(|_| self.read_again())
    }

    /// The slow way: without the nulls that no type expects, or with the name of the field that is wrong.
    fn read_again<T: serde::de::DeserializeOwned>(&self) -> Result<T, WireError> {
        let mut json = serde_json::Deserializer::from_slice(&self.content);
        let error = match serde_path_to_error::deserialize::<_, T>(&mut json) {
            Ok(_) => "goes on behind its end".to_owned(),
            Err(e) if e.path().iter().next().is_none() => e.inner().to_string(),
            Err(e) => format!("{}: {}", e.path(), e.inner()),
        };
        if let Ok(mut document) = serde_json::from_slice::<serde_json::Value>(&self.content)
            && strip_nulls(&mut document)
            && let Ok(content) = serde_json::from_value(document)
        {
            return Ok(content);
        }
        Err(WireError::proto(format!("{}: {error}", self.kind)))
    }
}

/// Takes the members that are `null` out of every object; true when there was one.
fn strip_nulls(value: &mut serde_json::Value) -> bool {
    match value {
        serde_json::Value::Object(members) => {
            let before = members.len();
            members.retain(|_, v| !v.is_null());
            let found = before != members.len();
            members.values_mut().fold(found, |found, v| strip_nulls(v) | found)
        }
        serde_json::Value::Array(list) => list.iter_mut().fold(false, |found, v| strip_nulls(v) | found),
        _ => false,
    }
}

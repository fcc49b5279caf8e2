//! A frame as JSON and back: `watch --json`, `replay --json`, text messages (ATP-6). The content of a whole JSON message
//! stands there as the document itself, byte for byte but for line ends. Signatures have no place in it.

use crate::code::{Code, WireError};
use crate::codec::{Received, check};
use crate::frame::{Extra, Flags, Frame, Hop, Qos};
use crate::lenient::{Lenient, lenient};
use crate::limits::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX};
use crate::pb;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::fmt::Write;

/// The content type that an absent one means.
pub const APPLICATION_JSON: &str = "application/json";
const ECN: &str = "ECN";

/// A frame that serializes as its JSON view.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    frame: &'a Frame,
    body: Option<&'a [u8]>,
}

impl<'a> View<'a> {
    #[must_use]
    pub const fn new(frame: &'a Frame) -> Self {
        Self { frame, body: None }
    }

    /// With `checksum` beside: SHA-256 of the body as it was received or logged, in hex.
    #[must_use]
    pub fn with_checksum(received: &'a Received) -> Self {
        Self { frame: &received.frame, body: Some(&received.body) }
    }
}

/// One line of JSON.
#[must_use]
pub fn to_json(view: View<'_>) -> String {
    serde_json::to_string(&view).expect("texts and numbers serialize")
}

impl Serialize for View<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let frame = self.frame;
        let hop = frame.hop.as_deref();
        let mut flags: Vec<_> =
            Flags::NAMES.iter().filter(|(_, f)| frame.flags.has(*f)).map(|(name, _)| *name).collect();
        flags.extend(hop.is_some_and(|h| h.ecn).then_some(ECN));
        let qos = (frame.qos != 0).then(|| Qos::from_wire(frame.qos).map_or("", Qos::as_str));
        FrameOut {
            v: 1,
            session_id: &frame.session_id,
            stream_id: &frame.stream_id,
            msg_seq: frame.msg_seq,
            frag_seq: frame.frag_seq,
            flags,
            qos,
            ttl: hop.and_then(|h| h.ttl),
            window: hop.and_then(|h| h.window),
            budget_left: hop.and_then(|h| h.budget_left),
            meta: frame.meta.as_deref(),
            payload: PayloadOut::of(frame),
            checksum: self.body.map(|body| hex(&Sha256::digest(body))),
        }
        .serialize(s)
    }
}

#[derive(Serialize)]
struct FrameOut<'a> {
    v: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    session_id: &'a str,
    stream_id: &'a str,
    msg_seq: u64,
    frag_seq: u32,
    flags: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qos: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ttl: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    window: Option<pb::Window>,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_left: Option<pb::Amount>,
    #[serde(skip_serializing_if = "Option::is_none")]
    meta: Option<&'a pb::Meta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<PayloadOut<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

#[derive(Serialize)]
struct PayloadOut<'a> {
    #[serde(rename = "type", skip_serializing_if = "str::is_empty")]
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<Cow<'a, RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_base64: Option<String>,
    #[serde(skip_serializing_if = "str::is_empty")]
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    confidence: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_est: Option<pb::Cost>,
    #[serde(skip_serializing_if = "String::is_empty")]
    checksum: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry_ms: Option<u64>,
    #[serde(skip_serializing_if = "crate::lenient::is_default")]
    rev: u32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_cost_breakdown: &'a [pb::ToolCost],
}

impl<'a> PayloadOut<'a> {
    /// `None` for a frame without payload.
    fn of(frame: &'a Frame) -> Option<Self> {
        let extra = frame.extra.as_deref();
        if frame.kind.is_empty() && frame.content.is_empty() && frame.content_type.is_empty() && extra.is_none() {
            return None;
        }
        let content = document(frame);
        let raw = content.is_none() && !frame.content.is_empty();
        Some(Self {
            kind: &frame.kind,
            content,
            content_base64: raw.then(|| STANDARD.encode(&frame.content)),
            content_type: &frame.content_type,
            confidence: extra.and_then(|e| e.confidence_ppm).map(decimal),
            cost_est: extra.and_then(|e| e.cost_est),
            checksum: extra.map(|e| hex(&e.checksum)).unwrap_or_default(),
            expiry_ms: extra.and_then(|e| e.expiry_ms),
            rev: extra.map_or(0, |e| e.rev),
            tool_cost_breakdown: extra.map_or(&[], |e| &e.tool_cost_breakdown),
        })
    }
}

/// The content as a JSON document, where it is one; `None` means base64 has to stand instead.
fn document(frame: &Frame) -> Option<Cow<'_, RawValue>> {
    if is_fragment(frame) || !is_json(&frame.content_type) || frame.content.is_empty() {
        return None;
    }
    let text = std::str::from_utf8(&frame.content).ok()?;
    if text.contains(['\n', '\r']) {
        // Inside a JSON string a line end is escaped; elsewhere it is white space. Output is one line.
        return RawValue::from_string(text.replace(['\n', '\r'], " ")).ok().map(Cow::Owned);
    }
    serde_json::from_str::<&RawValue>(text).ok().map(Cow::Borrowed)
}

fn is_fragment(frame: &Frame) -> bool {
    frame.frag_seq > 0 || frame.flags.has(Flags::MORE)
}

fn is_json(content_type: &str) -> bool {
    content_type.is_empty() || content_type == APPLICATION_JSON
}

/// Reads a JSON frame. Unknown fields are ignored, also a checksum: a text has no bytes that survive a parser.
///
/// # Errors
/// EPROTO naming the field; ELIMIT for a text or a list beyond its bound.
pub fn from_json(text: &str) -> Result<Frame, WireError> {
    if text.len() > FRAME_BYTES_MAX {
        let message = format!("text of {} bytes; at most {FRAME_BYTES_MAX} are taken", text.len());
        return Err(WireError::new(Code::Limit, message).used(text.len() as u64, FRAME_BYTES_MAX as u64));
    }
    if !text.trim_start().starts_with('{') {
        return Err(WireError::proto("frame: is a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let frame: FrameIn<'_> = serde_path_to_error::deserialize(&mut json).map_err(|e| named(&e))?;
    json.end().map_err(|e| WireError::proto(format!("frame: {e}")))?;
    frame.into_frame()
}

/// `path: what is wrong`; the path of the whole document is its name.
fn named(error: &serde_path_to_error::Error<serde_json::Error>) -> WireError {
    match error.path().to_string().as_str() {
        "." => WireError::proto(format!("frame: {}", error.inner())),
        path => WireError::proto(format!("{path}: {}", error.inner())),
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct FrameIn<'a> {
    #[serde(deserialize_with = "lenient")]
    v: Option<u32>,
    #[serde(deserialize_with = "lenient")]
    session_id: String,
    #[serde(deserialize_with = "lenient")]
    stream_id: String,
    #[serde(deserialize_with = "lenient")]
    msg_seq: u64,
    #[serde(deserialize_with = "lenient")]
    frag_seq: u32,
    #[serde(deserialize_with = "lenient")]
    flags: Vec<String>,
    qos: Option<Qos>,
    #[serde(deserialize_with = "lenient")]
    ttl: Option<u32>,
    window: Option<pb::Window>,
    budget_left: Option<pb::Amount>,
    meta: Option<Box<pb::Meta>>,
    #[serde(borrow)]
    payload: Option<PayloadIn<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PayloadIn<'a> {
    #[serde(rename = "type", deserialize_with = "lenient")]
    kind: String,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
    content_base64: Option<Base64>,
    #[serde(deserialize_with = "lenient")]
    content_type: String,
    confidence: Option<Ppm>,
    cost_est: Option<pb::Cost>,
    checksum: Option<Hex>,
    #[serde(deserialize_with = "lenient")]
    expiry_ms: Option<u64>,
    #[serde(deserialize_with = "lenient")]
    rev: u32,
    #[serde(deserialize_with = "lenient")]
    tool_cost_breakdown: Vec<pb::ToolCost>,
}

impl FrameIn<'_> {
    fn into_frame(self) -> Result<Frame, WireError> {
        if let Some(v @ (0 | 2..)) = self.v {
            return Err(WireError::proto(format!("v: wire version {v} is not spoken here, send 1")));
        }
        let lists = self
            .meta
            .as_deref()
            .map_or(0, |m| m.languages.len() + m.data_scope.len() + m.tool_permissions.len() + m.security_groups.len());
        let costs = self.payload.as_ref().map_or(0, |p| p.tool_cost_breakdown.len());
        if lists + costs > FRAME_ENTRIES_MAX {
            let message = format!("frame of more than {FRAME_ENTRIES_MAX} list entries");
            return Err(WireError::new(Code::Limit, message).used((lists + costs) as u64, FRAME_ENTRIES_MAX as u64));
        }
        let (mut flags, mut ecn) = (Flags::NONE, false);
        for (i, name) in self.flags.iter().enumerate() {
            match Flags::NAMES.iter().find(|(known, _)| known == name) {
                Some((_, flag)) => flags = flags.with(*flag),
                None if name == ECN => ecn = true,
                None => {
                    return Err(WireError::proto(format!("flags[{i}]: there is no flag `{}`", name.escape_debug())));
                }
            }
        }
        let hop = Hop { ttl: self.ttl, window: self.window, ecn, budget_left: self.budget_left, ..Hop::default() };
        if self.msg_seq == 0 {
            flags = flags.with(Flags::CTRL);
        }
        let mut frame = Frame {
            hop: (hop != Hop::default()).then(|| Box::new(hop)),
            session_id: self.session_id.into(),
            stream_id: self.stream_id.into(),
            msg_seq: self.msg_seq,
            frag_seq: self.frag_seq,
            flags,
            qos: self.qos.map_or(0, |qos| qos as u32),
            meta: self.meta,
            ..Frame::default()
        };
        if let Some(payload) = self.payload {
            payload.into_frame(&mut frame)?;
        }
        check(&frame)?;
        Ok(frame)
    }
}

impl PayloadIn<'_> {
    fn into_frame(self, frame: &mut Frame) -> Result<(), WireError> {
        let instead = "is for a whole message of application/json, send content_base64";
        frame.content = match (self.content, self.content_base64) {
            (Some(_), Some(_)) => {
                return Err(WireError::proto("payload.content_base64: stands instead of content, not beside it"));
            }
            (Some(_), None) if is_fragment(frame) || !is_json(&self.content_type) => {
                return Err(WireError::proto(format!("payload.content: {instead}")));
            }
            (Some(document), None) => Bytes::copy_from_slice(document.get().as_bytes()),
            (None, Some(Base64(content))) => content.into(),
            (None, None) => Bytes::new(),
        };
        frame.kind = self.kind.into();
        frame.content_type = self.content_type.into();
        let extra = Extra {
            confidence_ppm: self.confidence.map(|Ppm(ppm)| ppm),
            cost_est: self.cost_est,
            checksum: self.checksum.map(|Hex(bytes)| bytes.into()).unwrap_or_default(),
            expiry_ms: self.expiry_ms,
            rev: self.rev,
            tool_cost_breakdown: self.tool_cost_breakdown,
        };
        frame.extra = (extra != Extra::default()).then(|| Box::new(extra));
        Ok(())
    }
}

struct Base64(Vec<u8>);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::lenient(d)?;
        STANDARD.decode(text).map(Self).map_err(|e| serde::de::Error::custom(format!("is not base64: {e}")))
    }
}

struct Hex(Vec<u8>);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        unhex(&String::lenient(d)?).map(Self).ok_or_else(|| serde::de::Error::custom("is not pairs of hex digits"))
    }
}

/// Lower-case hex digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a String grows");
        text
    })
}

/// Reads pairs of hex digits of either case; `None` for anything else.
#[must_use]
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut pairs = text.as_bytes().chunks_exact(2);
    let bytes = pairs.by_ref().map(|pair| Some(digit(&pair[0])? << 4 | digit(&pair[1])?)).collect();
    if pairs.remainder().is_empty() { bytes } else { None }
}

// ---- ratios ---------------------------------------------------------------------------------------------------------

/// A decimal of JSON as parts per million.
pub(crate) struct Ppm(pub(crate) u32);

impl<'de> Deserialize<'de> for Ppm {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(d)?;
        let raw = raw.get();
        let text = raw.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(raw);
        parse_ppm(text).map(Self).map_err(serde::de::Error::custom)
    }
}

/// A decimal from 0 to 1, as JSON writes numbers, in parts per million; rounded to the nearest, halves up.
///
/// # Errors
/// Says what is wrong: not a decimal, or outside of 0 to 1.
pub fn parse_ppm(text: &str) -> Result<u32, String> {
    let bad = || format!("`{}` is not a decimal from 0 to 1", text.escape_debug());
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().map_err(|_| bad())?),
        None => (text, 0),
    };
    let (whole, frac) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = || whole.bytes().chain(frac.bytes());
    if whole.is_empty() || !digits().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    // The digit at index i stands for 10^(point - 1 - i) millionths.
    let point = i64::try_from(whole.len()).map_err(|_| bad())? + i64::from(exponent) + 6;
    let mut ppm: u64 = 0;
    for (i, digit) in (0i64..).zip(digits().map(|b| u64::from(b - b'0'))) {
        if digit == 0 {
            continue;
        }
        match point - 1 - i {
            place @ 0..=6 => ppm += digit * 10u64.pow(place.unsigned_abs() as u32),
            -1 => ppm += u64::from(digit >= 5),
            7.. => return Err(bad()),
            _ => {}
        }
    }
    u32::try_from(ppm).ok().filter(|ppm| *ppm <= 1_000_000).ok_or_else(bad)
}

/// Parts per million as a decimal: `0.9`, `1`, `0.000001`.
#[must_use]
pub fn show_ppm(ppm: u32) -> String {
    let text = format!("{}.{:06}", ppm / 1_000_000, ppm % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn decimal(ppm: u32) -> Box<RawValue> {
    RawValue::from_string(show_ppm(ppm)).expect("a decimal is JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_read_from_their_digits() {
        for (text, ppm) in [
            ("0", 0),
            ("1", 1_000_000),
            ("1.0000000", 1_000_000),
            ("0.9", 900_000),
            ("0.30000000000000004", 300_000),
            ("0.8999999999999999", 900_000),
            ("0.0000005", 1),
            ("0.00000049", 0),
            ("1e-05", 10),
            ("2.5E-1", 250_000),
            ("0.01e+2", 1_000_000),
            ("0e400", 0),
            ("9e-2000000000", 0),
        ] {
            assert_eq!(parse_ppm(text), Ok(ppm), "{text}");
        }
        for bad in ["", ".5", "-0.1", "1.000001", "2", "1e1", "NaN", "0.5x", "1e", "0.9 ", "1e99999999999"] {
            assert!(parse_ppm(bad).is_err(), "{bad}");
        }
        for ppm in [0, 1, 10, 250_000, 999_999, 1_000_000] {
            assert_eq!(parse_ppm(&show_ppm(ppm)), Ok(ppm));
        }
        assert_eq!([show_ppm(900_000), show_ppm(1), show_ppm(0), show_ppm(1_000_000)], ["0.9", "0.000001", "0", "1"]);
    }

    #[test]
    fn hex_round_trips() {
        assert_eq!(unhex(&hex(&[0, 0xab, 0xff])), Some(vec![0, 0xab, 0xff]));
        assert_eq!((unhex("abc"), unhex("zz"), unhex("AB")), (None, None, Some(vec![0xab])));
    }
}

//! What an agent's message says, read without copying: text and findings stay the JSON that they came as, so that a chunk
//! passes through a router without being unescaped and escaped again.

use crate::estimate::CALL_AMOUNT_MAX;
use atp_proto::content::{AgentFinal, AgentPartial, UsageSource};
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, CallId, Cost, Frame, WireError};
use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::io::Write;

/// Text, findings and running total of an `agent.result.partial` or `agent.result.final`.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// A JSON string.
    text: Option<Bytes>,
    /// The text where the JSON string has escapes.
    unescaped: Option<String>,
    /// A JSON array.
    findings: Option<Bytes>,
    pub cost: Cost,
    /// The provider reported this total; else the adapter counted it.
    pub reported: bool,
}

#[derive(Deserialize)]
struct Quick<'a> {
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    findings: Option<&'a RawValue>,
    #[serde(default)]
    cost: Cost,
    #[serde(default)]
    usage_source: UsageSource,
}

impl Said {
    /// Reads the content of a partial or of a final (`last`).
    ///
    /// # Errors
    /// EPROTO naming the field.
    pub fn read(frame: &Frame, last: bool) -> Result<Self, WireError> {
        let said = match Self::quick(&frame.content) {
            Some(said) => said,
            None => Self::slow(frame, last)?,
        };
        let largest = said.cost.in_tokens.0.max(said.cost.out_tokens.0).max(said.cost.usd_micros.0);
        if largest > CALL_AMOUNT_MAX {
            return Err(WireError::proto(format!("cost: {largest} is more than a call can cost")));
        }
        Ok(said)
    }

    /// The common form: every field as this program writes it.
    fn quick(content: &Bytes) -> Option<Self> {
        let quick: Quick<'_> = serde_json::from_slice(content).ok()?;
        let raw = |value: &RawValue| content.slice_ref(value.get().as_bytes());
        let text = quick.text.map(raw);
        if text.as_ref().is_some_and(|t| t.first() != Some(&b'"'))
            || quick.findings.is_some_and(|f| !f.get().starts_with('['))
        {
            return None;
        }
        let escaped = text.as_ref().filter(|t| t.contains(&b'\\'));
        let unescaped = escaped.map(|t| serde_json::from_slice::<String>(t)).transpose().ok()?;
        if let Some(findings) = quick.findings {
            // Rare, and they go to people's programs: they must be JSON to the last escape.
            serde_json::from_str::<Vec<serde_json::Value>>(findings.get()).ok()?;
        }
        let reported = quick.usage_source == UsageSource::Reported;
        Some(Self { text, unescaped, findings: quick.findings.map(raw), cost: quick.cost, reported })
    }

    /// What else is allowed (null, numbers as strings), or the error.
    fn slow(frame: &Frame, last: bool) -> Result<Self, WireError> {
        let (text, findings, cost, source) = if last {
            let v: AgentFinal = frame.read()?;
            (v.text, v.findings, v.cost, v.usage_source)
        } else {
            let v: AgentPartial = frame.read()?;
            (v.text, v.findings, v.cost, v.usage_source)
        };
        let json = |bytes: Result<Vec<u8>, serde_json::Error>| bytes.ok().map(Bytes::from);
        Ok(Self {
            unescaped: text.clone(),
            text: text.and_then(|t| json(serde_json::to_vec(&t))),
            findings: findings.and_then(|f| json(serde_json::to_vec(&f))),
            cost,
            reported: source == UsageSource::Reported,
        })
    }

    /// The text itself.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        if let Some(text) = &self.unescaped {
            return Some(text);
        }
        let quoted = self.text.as_ref()?;
        std::str::from_utf8(quoted.get(1..quoted.len().checked_sub(1)?)?).ok()
    }

    /// Each finding as a JSON document.
    #[must_use]
    pub fn findings(&self) -> Vec<String> {
        let Some(array) = &self.findings else { return Vec::new() };
        let each: Vec<&RawValue> = serde_json::from_slice(array).unwrap_or_default();
        each.into_iter().map(|f| f.get().to_owned()).collect()
    }

    /// `agent.result.partial` to the client: what was said, under what is booked for it.
    #[must_use]
    pub fn to_client(
        &self,
        stream: &str,
        seq: u64,
        call: CallId,
        agent: &AgentName,
        booked: Cost,
        ended: Option<&str>,
    ) -> Frame {
        let size = |part: &Option<Bytes>| part.as_ref().map_or(0, Bytes::len);
        let mut out = BytesMut::with_capacity(size(&self.text) + size(&self.findings) + 256);
        let _ = write!((&mut out).writer(), "{{\"call_id\":\"{call}\",\"agent\":");
        let _ = serde_json::to_writer((&mut out).writer(), agent);
        for (name, part) in [(&b",\"text\":"[..], &self.text), (b",\"findings\":", &self.findings)] {
            if let Some(part) = part {
                out.put_slice(name);
                out.put_slice(part);
            }
        }
        let Cost { in_tokens, out_tokens, usd_micros } = booked;
        let _ = write!(
            (&mut out).writer(),
            ",\"cost\":{{\"in_tokens\":{in_tokens},\"out_tokens\":{out_tokens},\"usd_micros\":{usd_micros}}}"
        );
        if let Some(ended) = ended {
            out.put_slice(b",\"ended\":");
            let _ = serde_json::to_writer((&mut out).writer(), ended);
        }
        out.put_u8(b'}');
        Frame::raw(stream, seq, Flags::NONE, kind::RESULT_PARTIAL, out.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::content::Partial;

    fn said(content: &'static str) -> Result<Said, WireError> {
        Said::read(
            &Frame::raw("c", 1, Flags::NONE, kind::RESULT_PARTIAL, Bytes::from_static(content.as_bytes())),
            false,
        )
    }

    #[test]
    fn text_passes_through_as_it_came() {
        let said =
            said(r#"{"text":"a\n\"b\" ä","findings":[{"claim":"x"}],"cost":{"in_tokens":1,"out_tokens":2}}"#).unwrap();
        assert_eq!(said.text(), Some("a\n\"b\" ä"));
        let call = CallId([7; 10]);
        let frame = said.to_client("s", 3, call, &AgentName::new("a.b"), said.cost, Some("complete"));
        let partial: Partial = frame.read().unwrap();
        assert_eq!((partial.text.as_deref(), partial.ended.as_deref()), (Some("a\n\"b\" ä"), Some("complete")));
        assert_eq!((partial.call_id, partial.cost, partial.findings.unwrap().len()), (call, said.cost, 1));
    }

    #[test]
    fn other_forms_are_read_and_wrong_ones_named() {
        let lenient = said(r#"{"text":null,"cost":{"in_tokens":"5"}}"#).unwrap();
        assert_eq!((lenient.text(), lenient.cost.in_tokens.0), (None, 5));
        assert!(said(r#"{"text":5}"#).unwrap_err().message.contains("text"));
        assert!(said(r#"{"text":"\ud800"}"#).is_err());
        assert!(said(r#"{"findings":{}}"#).unwrap_err().message.contains("findings"));
        assert!(said(r#"{"cost":{"usd_micros":-1}}"#).unwrap_err().message.contains("usd_micros"));
        assert!(said(r#"{"cost":{"usd_micros":NaN}}"#).is_err());
    }
}

//! Bytes <-> frames on a stream: `u32` big-endian length, then that many bytes of `Envelope` (ATP-1).
//! The length is checked before memory is taken, the checksum before anything is decoded further.

use crate::code::WireError;
use crate::frame::{Extra, Flags, Frame, Text};
use crate::limits::FRAME_BYTES_MAX;
use crate::pb;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use sha2::{Digest, Sha256};

/// A frame and the bytes of its body as they were received: what is logged and signed.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    pub frame: Frame,
    pub body: Bytes,
}

/// Takes the next whole frame from `buffer`: `None` while more bytes are needed.
///
/// # Errors
/// EPROTO or ELIMIT; the connection can't go on.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Received>, WireError> {
    let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > FRAME_BYTES_MAX {
        let message = format!("frame of {length} bytes; at most {FRAME_BYTES_MAX} are taken");
        return Err(WireError::new(crate::Code::Limit, message).used(length as u64, FRAME_BYTES_MAX as u64));
    }
    if buffer.len() < 4 + length {
        return Ok(None);
    }
    buffer.advance(4);
    decode_envelope(buffer.split_to(length).freeze()).map(Some)
}

/// Decodes one encoded `Envelope`.
///
/// # Errors
/// EPROTO naming the part that is wrong.
pub fn decode_envelope(bytes: Bytes) -> Result<Received, WireError> {
    let bad = |part: &str, e: &dyn std::fmt::Display| WireError::proto(format!("{part}: {e}"));
    let envelope = pb::Envelope::decode(bytes).map_err(|e| bad("envelope", &e))?;
    if envelope.sig.is_empty()
        && !envelope.checksum.is_empty()
        && envelope.checksum != Sha256::digest(&envelope.body)[..]
    {
        return Err(WireError::proto("checksum: is not the SHA-256 of body"));
    }
    let body = pb::Body::decode(envelope.body.clone()).map_err(|e| bad("body", &e))?;
    let frame = Frame { hop: envelope.hop.map(Box::new), ..from_body(body)? };
    Ok(Received { frame, body: envelope.body })
}

/// Decodes one encoded `Body`, as the log holds it.
///
/// # Errors
/// EPROTO naming the part that is wrong.
pub fn decode_body(bytes: Bytes) -> Result<Frame, WireError> {
    from_body(pb::Body::decode(bytes).map_err(|e| WireError::proto(format!("body: {e}")))?)
}

fn from_body(body: pb::Body) -> Result<Frame, WireError> {
    if body.v != 1 {
        return Err(WireError::proto(format!("v: wire version {} is not spoken here, send 1", body.v)));
    }
    let payload = body.payload.unwrap_or_default();
    let extra = Extra {
        confidence_ppm: payload.confidence_ppm,
        cost_est: payload.cost_est,
        checksum: payload.checksum,
        expiry_ms: payload.expiry_ms,
        rev: payload.rev,
        tool_cost_breakdown: payload.tool_cost_breakdown,
    };
    Ok(Frame {
        hop: None,
        session_id: body.session_id.into(),
        stream_id: body.stream_id.into(),
        msg_seq: body.msg_seq,
        frag_seq: body.frag_seq,
        flags: Flags(body.flags),
        qos: body.qos,
        meta: body.meta.map(Box::new),
        kind: Text::from(payload.r#type),
        content: payload.content,
        content_type: Text::from(payload.content_type),
        extra: (extra != Extra::default()).then(|| Box::new(extra)),
    })
}

/// The body of a frame, encoded: the bytes that are logged, signed and forwarded.
#[must_use]
pub fn encode_body(frame: &Frame) -> Bytes {
    let extra = frame.extra.as_deref().cloned().unwrap_or_default();
    let payload = pb::Payload {
        r#type: frame.kind.to_string(),
        content: frame.content.clone(),
        content_type: frame.content_type.to_string(),
        confidence_ppm: extra.confidence_ppm,
        cost_est: extra.cost_est,
        checksum: extra.checksum,
        expiry_ms: extra.expiry_ms,
        rev: extra.rev,
        tool_cost_breakdown: extra.tool_cost_breakdown,
    };
    let body = pb::Body {
        v: 1,
        session_id: frame.session_id.to_string(),
        stream_id: frame.stream_id.to_string(),
        msg_seq: frame.msg_seq,
        frag_seq: frame.frag_seq,
        flags: frame.flags.0,
        qos: frame.qos,
        meta: frame.meta.as_deref().cloned(),
        payload: (payload != pb::Payload::default()).then_some(payload),
    };
    body.encode_to_vec().into()
}

/// Appends the frame to `out`, length first.
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    let body = encode_body(frame);
    let envelope = pb::Envelope { hop: frame.hop.as_deref().cloned(), body, ..pb::Envelope::default() };
    out.put_u32(u32::try_from(envelope.encoded_len()).unwrap_or(u32::MAX));
    envelope.encode(out).expect("a BytesMut grows");
}

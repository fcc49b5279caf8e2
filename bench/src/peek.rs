//! Looks into an encoded frame without copying or allocating: just enough to count chunks and to follow streams.
//! The product's codec reads what the ends must understand; this only keeps them from being what is measured.

use atp_proto::limits::FRAME_BYTES_MAX;

/// The parts of a frame that the ends look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peek<'a> {
    pub(crate) stream_id: &'a [u8],
    pub(crate) msg_seq: u64,
    pub(crate) flags: u32,
    pub(crate) kind: &'a [u8],
    pub(crate) content: &'a [u8],
}

/// The encoded envelope of the first frame in `bytes` and the length of both with the prefix: `None` while it isn't whole.
pub(crate) fn first(bytes: &[u8]) -> anyhow::Result<Option<(&[u8], usize)>> {
    let Some(head) = bytes.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    anyhow::ensure!(length <= FRAME_BYTES_MAX, "the router sent a frame of {length} bytes");
    Ok(bytes.get(4..4 + length).map(|envelope| (envelope, 4 + length)))
}

/// Reads an encoded envelope; `None` where it isn't one.
pub(crate) fn peek(envelope: &[u8]) -> Option<Peek<'_>> {
    let mut found = Peek::default();
    let body =
        fields(envelope, |field, value| if let (2, Value::Bytes(body)) = (field, value) { Some(body) } else { None })?;
    let mut rest = body;
    while !rest.is_empty() {
        match next(&mut rest)? {
            (3, Value::Bytes(id)) => found.stream_id = id,
            (4, Value::Number(seq)) => found.msg_seq = seq,
            (6, Value::Number(flags)) => found.flags = flags as u32,
            (9, Value::Bytes(payload)) => {
                let mut rest = payload;
                while !rest.is_empty() {
                    match next(&mut rest)? {
                        (1, Value::Bytes(kind)) => found.kind = kind,
                        (2, Value::Bytes(content)) => found.content = content,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(found)
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn fields<'a>(mut rest: &'a [u8], wanted: impl Fn(u64, Value<'a>) -> Option<&'a [u8]>) -> Option<&'a [u8]> {
    while !rest.is_empty() {
        let (field, value) = next(&mut rest)?;
        if let Some(found) = wanted(field, value) {
            return Some(found);
        }
    }
    None
}

fn next<'a>(rest: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let tag = varint(rest)?;
    let value = match tag & 7 {
        0 => Value::Number(varint(rest)?),
        2 => {
            let length = usize::try_from(varint(rest)?).ok()?;
            let (bytes, after) = rest.split_at_checked(length)?;
            *rest = after;
            Value::Bytes(bytes)
        }
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 127) << shift;
        if byte & 128 == 0 {
            return Some(value);
        }
    }
    None
}

/// The unsigned number behind `"name":` in a JSON document that was written without spaces.
pub(crate) fn number(content: &[u8], name: &str) -> Option<u64> {
    let key = format!("\"{name}\":");
    let at = content.windows(key.len()).position(|w| w == key.as_bytes())? + key.len();
    let digits = content[at..].iter().take_while(|b| b.is_ascii_digit());
    digits.map(|b| u64::from(b - b'0')).try_fold(0_u64, |n, d| n.checked_mul(10)?.checked_add(d))
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::frame::kind;
    use atp_proto::{Flags, Frame, codec};
    use bytes::BytesMut;

    #[test]
    fn it_sees_what_the_codec_sees() {
        let content = serde_json::json!({"msg_seq": 70_000, "text": "x".repeat(300)});
        let frame = Frame::json("c-1", 300, Flags::SYN.with(Flags::FIN), kind::RESULT_PARTIAL, &content);
        let mut bytes = BytesMut::new();
        codec::encode(&frame, &mut bytes);
        let (envelope, length) = first(&bytes).expect("short").expect("whole");
        assert_eq!(length, bytes.len());
        let seen = peek(envelope).expect("an envelope");
        assert_eq!((seen.stream_id, seen.msg_seq, seen.flags), (&b"c-1"[..], 300, 5));
        assert_eq!((seen.kind, seen.content), (kind::RESULT_PARTIAL.as_bytes(), &frame.content[..]));
        assert_eq!(number(seen.content, "msg_seq"), Some(70_000));
        assert_eq!(number(seen.content, "seq"), None);
        assert!(first(&bytes[..length - 1]).expect("short").is_none());
        assert!(peek(&envelope[..envelope.len() - 1]).is_none());
    }
}

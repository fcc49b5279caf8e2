//! Bytes <-> frames on a stream: `u32` big-endian length, then that many bytes of `Envelope` (ATP-1, ATP-2).
//! The length is checked before memory is taken, the checksum before the body is read, entries before they are made.
//! Texts and content are slices of the received bytes: a common frame is decoded without an allocation.

use crate::code::{Code, WireError};
use crate::frame::{Extra, Flags, Frame, Qos, Text};
use crate::id::is_id;
use crate::limits::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX};
use crate::pb;
use crate::wire::{Reader, bytes_len, message_len, number_len, put_bytes, put_head, put_number};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use sha2::{Digest, Sha256};

/// Bytes of the length prefix.
const PREFIX: usize = 4;

/// A frame and the bytes of its body as they were received: what is logged and signed.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    pub frame: Frame,
    pub body: Bytes,
}

impl Received {
    /// A frame that came in another form than bytes (JSON, in-process): its body is its encoding.
    #[must_use]
    pub fn from_frame(frame: Frame) -> Self {
        let body = encode_body(&frame);
        Self { frame, body }
    }
}

/// Takes the next whole frame from `buffer`: `None` while more bytes are needed.
///
/// # Errors
/// EPROTO or ELIMIT; the connection can't go on.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Received>, WireError> {
    let Some(head) = buffer.first_chunk::<PREFIX>() else { return Ok(None) };
    let length = u32::from_be_bytes(*head) as usize;
    if length > FRAME_BYTES_MAX {
        let message = format!("frame of {length} bytes; at most {FRAME_BYTES_MAX} are taken");
        return Err(WireError::new(Code::Limit, message).used(length as u64, FRAME_BYTES_MAX as u64));
    }
    if buffer.len() < PREFIX + length {
        return Ok(None);
    }
    buffer.advance(PREFIX);
    decode_envelope(buffer.split_to(length).freeze()).map(Some)
}

/// Decodes one encoded `Envelope`.
///
/// # Errors
/// EPROTO naming the field that is wrong; ELIMIT for more than `FRAME_ENTRIES_MAX` entries.
pub fn decode_envelope(bytes: Bytes) -> Result<Received, WireError> {
    let mut entries = Entries(0);
    let (mut hop, mut body, mut checksum, mut signed): (Option<Box<pb::Hop>>, _, &[u8], _) =
        (None, &[][..], &[], false);
    let mut reader = Reader::new(&bytes, "envelope");
    while let Some(field) = reader.next()? {
        match field.number {
            1 => {
                let bytes = field.value.bytes("hop")?;
                entries.add(1)?;
                entries.count(bytes, "hop", &[2, 4])?;
                merge(hop.get_or_insert_default().as_mut(), bytes, "hop")?;
            }
            2 => body = field.value.bytes("body")?,
            3 => checksum = field.value.bytes("checksum")?,
            // Signatures are verified by a later version; until then one only stands in for the checksum.
            4 => signed = !field.value.bytes("sig")?.is_empty(),
            _ => {}
        }
    }
    if !signed && !checksum.is_empty() && checksum != &Sha256::digest(body)[..] {
        return Err(WireError::proto("checksum: is not the SHA-256 of body"));
    }
    let body = bytes.slice_ref(body);
    let frame = Frame { hop, ..read_body(&body, entries)? };
    Ok(Received { frame, body })
}

/// Decodes one encoded `Body`, as the log holds it.
///
/// # Errors
/// EPROTO naming the field that is wrong; ELIMIT for more than `FRAME_ENTRIES_MAX` entries.
pub fn decode_body(bytes: Bytes) -> Result<Frame, WireError> {
    read_body(&bytes, Entries(0))
}

fn read_body(body: &Bytes, mut entries: Entries) -> Result<Frame, WireError> {
    let mut frame = Frame::default();
    let mut extra = None;
    let mut v = 0;
    let mut reader = Reader::new(body, "body");
    while let Some(field) = reader.next()? {
        let value = field.value;
        match field.number {
            1 => v = value.u32("v")?,
            2 => frame.session_id = text(body, value.bytes("session_id")?, "session_id")?,
            3 => frame.stream_id = text(body, value.bytes("stream_id")?, "stream_id")?,
            4 => frame.msg_seq = value.u64("msg_seq")?,
            5 => frame.frag_seq = value.u32("frag_seq")?,
            6 => frame.flags = Flags(value.u32("flags")?),
            7 => frame.qos = value.u32("qos")?,
            8 => {
                let bytes = value.bytes("meta")?;
                entries.add(1)?;
                entries.count(bytes, "meta", &[2, 4, 6, 8])?;
                merge(frame.meta.get_or_insert_default().as_mut(), bytes, "meta")?;
            }
            9 => {
                entries.add(1)?;
                read_payload(body, value.bytes("payload")?, &mut frame, &mut extra, &mut entries)?;
            }
            _ => {}
        }
    }
    frame.extra = extra.filter(|e| **e != Extra::default());
    if v != 1 {
        return Err(WireError::proto(format!("v: wire version {v} is not spoken here, send 1")));
    }
    check(&frame)?;
    if frame.msg_seq == 0 {
        frame.flags = frame.flags.with(Flags::CTRL);
    }
    Ok(frame)
}

fn read_payload(
    body: &Bytes,
    bytes: &[u8],
    frame: &mut Frame,
    extra: &mut Option<Box<Extra>>,
    entries: &mut Entries,
) -> Result<(), WireError> {
    let mut reader = Reader::new(bytes, "payload");
    while let Some(field) = reader.next()? {
        let value = field.value;
        match field.number {
            1 => frame.kind = text(body, value.bytes("payload.type")?, "payload.type")?,
            2 => frame.content = slice(body, value.bytes("payload.content")?),
            3 => frame.content_type = text(body, value.bytes("payload.content_type")?, "payload.content_type")?,
            n @ 4..=9 => {
                let extra = extra.get_or_insert_default().as_mut();
                match n {
                    4 => extra.confidence_ppm = Some(value.u32("payload.confidence_ppm")?),
                    5 => {
                        entries.add(1)?;
                        let cost = value.bytes("payload.cost_est")?;
                        merge(extra.cost_est.get_or_insert_default(), cost, "payload.cost_est")?;
                    }
                    6 => extra.checksum = slice(body, value.bytes("payload.checksum")?),
                    7 => extra.expiry_ms = Some(value.u64("payload.expiry_ms")?),
                    8 => extra.rev = value.u32("payload.rev")?,
                    _ => {
                        entries.add(1)?;
                        let mut cost = pb::ToolCost::default();
                        let name = "payload.tool_cost_breakdown";
                        merge(&mut cost, value.bytes(name)?, name)?;
                        extra.tool_cost_breakdown.push(cost);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// What a frame of this version must keep to, whatever form it came in (ATP-2).
///
/// # Errors
/// EPROTO naming the field and the fix.
pub fn check(frame: &Frame) -> Result<(), WireError> {
    let flags = frame.flags;
    let bad = |message: String| Err(WireError::proto(message));
    if flags.0 & !Flags::ALL.0 != 0 {
        return bad(format!(
            "flags: {} has bits that mean nothing in this version, send 0 to {}",
            flags.0,
            Flags::ALL.0
        ));
    }
    if flags.has(Flags::ACK) && !flags.has(Flags::SYN) && !flags.has(Flags::HB) {
        return bad("flags: ACK stands only with SYN or HB".into());
    }
    if frame.msg_seq == 0 {
        if flags.has(Flags::MORE) || frame.frag_seq != 0 {
            return bad("frag_seq: a frame without msg_seq has no fragments, number it or send it whole".into());
        }
    } else if flags.has(Flags::CTRL) {
        return bad(format!("flags: CTRL stands only where msg_seq is 0, here it is {}", frame.msg_seq));
    }
    Qos::from_wire(frame.qos)?;
    if !frame.stream_id.is_empty() && !is_id(&frame.stream_id) {
        return bad("stream_id: is 1 to 64 of A-Za-z0-9._- or empty".into());
    }
    match frame.extra.as_deref() {
        Some(Extra { confidence_ppm: Some(ppm @ 1_000_001..), .. }) => {
            bad(format!("payload.confidence_ppm: {ppm} is more than 1000000"))
        }
        _ => Ok(()),
    }
}

/// Sub-messages and list entries of one frame, counted before memory is taken for them: an empty one is two bytes on the
/// wire and a hundred in memory.
struct Entries(usize);

impl Entries {
    fn add(&mut self, n: usize) -> Result<(), WireError> {
        self.0 += n;
        if self.0 <= FRAME_ENTRIES_MAX {
            return Ok(());
        }
        let message = format!("frame of more than {FRAME_ENTRIES_MAX} sub-messages and list entries");
        Err(WireError::new(Code::Limit, message).used(self.0 as u64, FRAME_ENTRIES_MAX as u64))
    }

    /// Adds what stands in `fields` of the encoded message.
    fn count(&mut self, message: &[u8], name: &'static str, fields: &[u32]) -> Result<(), WireError> {
        let mut reader = Reader::new(message, name);
        while let Some(field) = reader.next()? {
            self.add(usize::from(fields.contains(&field.number)))?;
        }
        Ok(())
    }
}

fn merge<M: Message>(into: &mut M, bytes: &[u8], name: &str) -> Result<(), WireError> {
    into.merge(bytes).map_err(|e| WireError::proto(format!("{name}: {e}")))
}

fn slice(whole: &Bytes, part: &[u8]) -> Bytes {
    if part.is_empty() { Bytes::new() } else { whole.slice_ref(part) }
}

fn text(whole: &Bytes, part: &[u8], name: &str) -> Result<Text, WireError> {
    Text::from_utf8(slice(whole, part)).map_err(|_| WireError::proto(format!("{name}: is not UTF-8")))
}

// ---- encoding -------------------------------------------------------------------------------------------------------

/// What an encoder adds to a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// `Envelope.checksum`: SHA-256 of the body.
    pub checksum: bool,
}

/// Lengths of the nested parts: protobuf writes them in front of the parts.
struct Lengths {
    /// `None` where there is no payload at all.
    payload: Option<usize>,
    meta: Option<usize>,
    body: usize,
}

impl Lengths {
    fn of(frame: &Frame) -> Self {
        let payload = payload_len(frame);
        let meta = frame.meta.as_deref().map(Message::encoded_len);
        let body = number_len(1)
            + bytes_len(frame.session_id.as_bytes())
            + bytes_len(frame.stream_id.as_bytes())
            + number_len(frame.msg_seq)
            + number_len(frame.frag_seq.into())
            + number_len(frame.flags.0.into())
            + number_len(frame.qos.into())
            + meta.map_or(0, message_len)
            + payload.map_or(0, message_len);
        Self { payload, meta, body }
    }
}

fn payload_len(frame: &Frame) -> Option<usize> {
    let plain = bytes_len(frame.kind.as_bytes()) + bytes_len(&frame.content) + bytes_len(frame.content_type.as_bytes());
    let Some(extra) = frame.extra.as_deref().filter(|e| **e != Extra::default()) else {
        return Some(plain).filter(|n| *n > 0);
    };
    let present = |n: u64| 1 + crate::wire::varint_len(n);
    let more = extra.confidence_ppm.map_or(0, |n| present(n.into()))
        + extra.cost_est.map_or(0, |c| message_len(c.encoded_len()))
        + bytes_len(&extra.checksum)
        + extra.expiry_ms.map_or(0, present)
        + number_len(extra.rev.into())
        + extra.tool_cost_breakdown.iter().map(|c| message_len(c.encoded_len())).sum::<usize>();
    Some(plain + more)
}

fn put_body(frame: &Frame, lengths: &Lengths, out: &mut BytesMut) {
    put_number(out, 1, 1);
    put_bytes(out, 2, frame.session_id.as_bytes());
    put_bytes(out, 3, frame.stream_id.as_bytes());
    put_number(out, 4, frame.msg_seq);
    put_number(out, 5, frame.frag_seq.into());
    put_number(out, 6, frame.flags.0.into());
    put_number(out, 7, frame.qos.into());
    if let Some((meta, length)) = frame.meta.as_deref().zip(lengths.meta) {
        put_message(out, 8, meta, length);
    }
    let Some(payload) = lengths.payload else { return };
    put_head(out, 9, payload);
    put_bytes(out, 1, frame.kind.as_bytes());
    put_bytes(out, 2, &frame.content);
    put_bytes(out, 3, frame.content_type.as_bytes());
    let Some(extra) = frame.extra.as_deref() else { return };
    let put_present = |out: &mut BytesMut, field: u8, n: u64| {
        out.put_u8(field << 3);
        crate::wire::put_varint(out, n);
    };
    if let Some(ppm) = extra.confidence_ppm {
        put_present(out, 4, ppm.into());
    }
    if let Some(cost) = &extra.cost_est {
        put_message(out, 5, cost, cost.encoded_len());
    }
    put_bytes(out, 6, &extra.checksum);
    if let Some(expiry) = extra.expiry_ms {
        put_present(out, 7, expiry);
    }
    put_number(out, 8, extra.rev.into());
    for cost in &extra.tool_cost_breakdown {
        put_message(out, 9, cost, cost.encoded_len());
    }
}

fn put_message<M: Message>(out: &mut BytesMut, field: u8, message: &M, length: usize) {
    put_head(out, field, length);
    message.encode(out).expect("a BytesMut grows");
}

/// The body of a frame, encoded: the bytes that are logged, signed and forwarded.
#[must_use]
pub fn encode_body(frame: &Frame) -> Bytes {
    let lengths = Lengths::of(frame);
    let mut out = BytesMut::with_capacity(lengths.body);
    put_body(frame, &lengths, &mut out);
    out.freeze()
}

/// Appends the frame to `out`, length first. What is larger than `FRAME_BYTES_MAX` is for `reassembly::fragment` first: the
/// other side refuses it.
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    encode_into(frame, EncodeOptions::default(), out);
}

/// Appends the frame to `out` with what `options` add, length first.
pub fn encode_into(frame: &Frame, options: EncodeOptions, out: &mut BytesMut) {
    let lengths = Lengths::of(frame);
    let hop = frame.hop.as_deref().map(|hop| (hop, hop.encoded_len()));
    let digest_len = if options.checksum { message_len(Sha256::output_size()) } else { 0 };
    let length = hop.map_or(0, |(_, n)| message_len(n)) + message_len(lengths.body) + digest_len;
    out.reserve(PREFIX + length);
    out.put_u32(u32::try_from(length).expect("content is bounded far below 4 GiB"));
    if let Some((hop, n)) = hop {
        put_message(out, 1, hop, n);
    }
    put_head(out, 2, lengths.body);
    let body = out.len();
    put_body(frame, &lengths, out);
    if options.checksum {
        let digest = Sha256::digest(&out[body..]);
        put_bytes(out, 3, &digest);
    }
}

/// Appends a frame whose body goes on as it was received, length first.
pub fn encode_received(hop: Option<&pb::Hop>, body: &[u8], out: &mut BytesMut) {
    let hop = hop.map(|hop| (hop, hop.encoded_len()));
    let length = hop.map_or(0, |(_, n)| message_len(n)) + message_len(body.len());
    out.reserve(PREFIX + length);
    out.put_u32(u32::try_from(length).expect("a received body is bounded far below 4 GiB"));
    if let Some((hop, n)) = hop {
        put_message(out, 1, hop, n);
    }
    put_head(out, 2, body.len());
    out.put_slice(body);
}

/// Bytes that `encode` appends, without the length prefix: what `FRAME_BYTES_MAX` bounds.
#[must_use]
pub fn encoded_len(frame: &Frame) -> usize {
    let hop = frame.hop.as_deref().map_or(0, |hop| message_len(hop.encoded_len()));
    hop + message_len(Lengths::of(frame).body)
}

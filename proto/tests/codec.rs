//! The hand-written codec against the one that prost generates, and against bytes that nobody should send.

mod any;

use atp_proto::codec::{
    EncodeOptions, decode, decode_body, decode_envelope, encode, encode_body, encode_into, encoded_len,
};
use atp_proto::limits::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX};
use atp_proto::{Code, Flags, Frame, WireError, pb};
use bytes::{BufMut, Bytes, BytesMut};
use proptest::prelude::*;
use prost::Message;

fn wire(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    encode(frame, &mut out);
    out
}

/// What a frame with these parts of a body is refused with.
fn refused(body: &pb::Body) -> WireError {
    decode_body(body.encode_to_vec().into()).expect_err("the body breaks a rule")
}

fn body() -> pb::Body {
    pb::Body { v: 1, stream_id: "s".into(), msg_seq: 1, ..pb::Body::default() }
}

proptest! {
    #[test]
    fn atp_2_1_encoding_is_the_canonical_one(frame in any::frame()) {
        let (envelope, body) = any::generated(&frame);
        prop_assert_eq!(&encode_body(&frame)[..], &body.encode_to_vec()[..]);
        let bytes = wire(&frame);
        prop_assert_eq!(&bytes[4..], &envelope.encode_to_vec()[..]);
        prop_assert_eq!(bytes.len() - 4, encoded_len(&frame));
        prop_assert_eq!(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize, bytes.len() - 4);
    }

    #[test]
    fn atp_2_1_what_is_encoded_is_decoded(frame in any::frame(), checksum: bool) {
        let mut bytes = BytesMut::new();
        encode_into(&frame, EncodeOptions { checksum }, &mut bytes);
        let received = decode(&mut bytes).unwrap().unwrap();
        prop_assert!(bytes.is_empty());
        prop_assert_eq!(&received.frame, &frame);
        prop_assert_eq!(received.body, encode_body(&frame));
    }

    /// Whatever both take they read alike; what ours takes, prost takes too.
    #[test]
    fn atp_2_1_decoding_is_that_of_prost(frame in any::frame(), noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
        let mut bytes = encode_body(&frame).to_vec();
        for (at, byte) in noise {
            let i = at.index(bytes.len());
            bytes[i] = byte;
        }
        if let Ok(ours) = decode_body(bytes.clone().into()) {
            let theirs = pb::Body::decode(&bytes[..]).unwrap();
            let mut again = any::generated(&ours).1;
            if theirs.flags & Flags::CTRL.0 == 0 {
                again.flags &= !Flags::CTRL.0;
            }
            let payload = theirs.payload.clone().filter(|p| *p != pb::Payload::default());
            prop_assert_eq!(again, pb::Body { payload, ..theirs });
        }
    }

    #[test]
    fn atp_2_2_no_garbage_panics(bytes in any::bytes(300)) {
        let _ = decode_envelope(bytes.clone());
        let _ = decode_body(bytes.clone());
        let mut stream = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = decode(&mut stream) {}
    }

    /// Every cut of the stream waits for more and takes nothing; every cut of the envelope is refused or shorter.
    #[test]
    fn atp_1_2_a_cut_frame_waits(frame in any::frame(), at in any::<prop::sample::Index>()) {
        let whole = wire(&frame);
        let cut = at.index(whole.len());
        let mut stream = BytesMut::from(&whole[..cut]);
        prop_assert_eq!(decode(&mut stream).unwrap(), None);
        prop_assert_eq!(stream.len(), cut);
        stream.extend_from_slice(&whole[cut..]);
        prop_assert_eq!(decode(&mut stream).unwrap().unwrap().frame, frame);
    }
}

#[test]
fn atp_1_3_a_frame_has_at_most_so_many_bytes() {
    let mut frame = Frame::raw("s", 1, Flags::NONE, "agent.log", Bytes::new());
    frame.content = vec![b'x'; FRAME_BYTES_MAX - 100].into();
    let missing = FRAME_BYTES_MAX - encoded_len(&frame);
    frame.content = vec![b'x'; FRAME_BYTES_MAX - 100 + missing].into();
    assert_eq!(encoded_len(&frame), FRAME_BYTES_MAX);
    assert_eq!(decode(&mut wire(&frame)).unwrap().unwrap().frame, frame);
    frame.content = vec![b'x'; frame.content.len() + 1].into();
    let error = decode(&mut wire(&frame)).unwrap_err();
    assert_eq!((error.code, error.limit), (Code::Limit, Some(FRAME_BYTES_MAX as u64)));
}

#[test]
fn atp_1_4_a_claimed_length_takes_no_memory() {
    let mut stream = BytesMut::with_capacity(16);
    stream.put_u32(u32::MAX);
    let before = stream.capacity();
    assert_eq!(decode(&mut stream).unwrap_err().code, Code::Limit);
    assert_eq!(stream.capacity(), before);
    let mut stream = BytesMut::with_capacity(16);
    stream.put_u32(FRAME_BYTES_MAX as u32);
    let before = stream.capacity();
    assert_eq!(decode(&mut stream), Ok(None));
    assert_eq!(stream.capacity(), before);
}

#[test]
fn atp_1_5_entries_are_counted_before_they_are_made() {
    // The payload and the meta are an entry each.
    for (n, taken) in [(FRAME_ENTRIES_MAX, true), (FRAME_ENTRIES_MAX + 1, false)] {
        let costs = pb::Payload { tool_cost_breakdown: vec![pb::ToolCost::default(); n - 1], ..Default::default() };
        let costs = pb::Body { payload: Some(costs), ..body() };
        let languages = pb::Meta { languages: vec![String::new(); n - 1], ..Default::default() };
        let languages = pb::Body { meta: Some(languages), ..body() };
        for body in [costs, languages] {
            let result = decode_body(body.encode_to_vec().into());
            assert_eq!(result.is_ok(), taken, "{n}");
            if let Err(error) = result {
                assert_eq!((error.code, error.limit), (Code::Limit, Some(FRAME_ENTRIES_MAX as u64)));
            }
        }
    }
    // Repeated sub-messages that are one field in memory count too, across the parts of the frame.
    let mut envelope = vec![0x0a, 0];
    envelope.extend([0x12, 2, 8, 1]);
    assert!(decode_envelope(envelope.repeat(FRAME_ENTRIES_MAX).into()).is_ok());
    assert_eq!(decode_envelope(envelope.repeat(FRAME_ENTRIES_MAX + 1).into()).unwrap_err().code, Code::Limit);
}

#[test]
fn atp_2_4_the_checksum_is_of_the_body() {
    let frame = Frame::raw("s", 1, Flags::SYN, "task.submit", Bytes::from_static(b"{}"));
    let mut out = BytesMut::new();
    encode_into(&frame, EncodeOptions { checksum: true }, &mut out);
    let mut envelope = pb::Envelope::decode(&out[4..]).unwrap();
    assert_eq!(envelope.checksum.len(), 32);
    let bytes = |e: &pb::Envelope| Bytes::from(e.encode_to_vec());
    assert_eq!(decode_envelope(bytes(&envelope)).unwrap().frame, frame);
    for wrong in [&[0; 32][..], &envelope.checksum[..31]] {
        let bad = pb::Envelope { checksum: Bytes::copy_from_slice(wrong), ..envelope.clone() };
        let error = decode_envelope(bytes(&bad)).unwrap_err();
        assert!(error.code == Code::Proto && error.message.starts_with("checksum:"), "{error}");
    }
    // A signature stands in for the checksum.
    (envelope.checksum, envelope.sig) = (Bytes::from_static(&[0; 32]), Bytes::from_static(&[1]));
    assert_eq!(decode_envelope(bytes(&envelope)).unwrap().frame, frame);
}

#[test]
fn atp_2_5_only_wire_version_1_is_spoken() {
    for v in [0, 2, u32::MAX] {
        let error = refused(&pb::Body { v, ..body() });
        assert!(error.code == Code::Proto && error.message.starts_with("v:"), "{error}");
    }
    assert!(decode_body(body().encode_to_vec().into()).is_ok());
}

#[test]
fn atp_2_6_flags_keep_their_rules() {
    let numbered = |flags: Flags| pb::Body { flags: flags.0, ..body() };
    let unnumbered = |flags: Flags| pb::Body { flags: flags.0, msg_seq: 0, ..body() };
    let taken = |b: pb::Body| decode_body(b.encode_to_vec().into());
    for bad in [
        numbered(Flags(128)),
        numbered(Flags::ACK),
        numbered(Flags::ACK.with(Flags::FIN)),
        numbered(Flags::CTRL),
        unnumbered(Flags::MORE),
        unnumbered(Flags::MORE.with(Flags::CTRL)),
    ] {
        assert_eq!(refused(&bad).code, Code::Proto, "{bad:?}");
    }
    assert!(refused(&pb::Body { frag_seq: 1, ..unnumbered(Flags::CTRL) }).message.starts_with("frag_seq:"));
    for good in [Flags::SYN.with(Flags::ACK), Flags::FIN, Flags::RST, Flags::MORE, Flags::NONE] {
        assert_eq!(taken(numbered(good)).unwrap().flags, good);
    }
    assert!(taken(unnumbered(Flags::HB.with(Flags::ACK).with(Flags::CTRL))).is_ok());
    // CTRL says again what msg_seq says; who left it out is understood.
    assert!(taken(unnumbered(Flags::SYN)).unwrap().flags.has(Flags::CTRL));
}

#[test]
fn atp_2_7_a_wrong_field_is_named() {
    let cases: [(&str, pb::Body); 5] = [
        ("qos:", pb::Body { qos: 4, ..body() }),
        ("stream_id:", pb::Body { stream_id: "a b".into(), ..body() }),
        ("stream_id:", pb::Body { stream_id: "a".repeat(65), ..body() }),
        ("stream_id:", pb::Body { stream_id: "ä".into(), ..body() }),
        (
            "payload.confidence_ppm:",
            pb::Body { payload: Some(pb::Payload { confidence_ppm: Some(1_000_001), ..Default::default() }), ..body() },
        ),
    ];
    for (field, bad) in cases {
        let error = refused(&bad);
        assert!(error.code == Code::Proto && error.message.starts_with(field), "{error}");
    }
    let raw: [(&str, &[u8]); 6] = [
        ("session_id:", &[8, 1, 0x12, 1, 0xff]),
        ("payload.type:", &[8, 1, 0x4a, 3, 0x0a, 1, 0xff]),
        ("flags:", &[8, 1, 0x30, 0x80, 0x80, 0x80, 0x80, 0x10]),
        ("stream_id:", &[8, 1, 0x18, 1]),
        ("body:", &[8, 1, 0x12, 9]),
        ("body:", &[8, 1, 0x0b]),
    ];
    for (field, bytes) in raw {
        let error = decode_body(Bytes::from_static(bytes)).unwrap_err();
        assert!(error.code == Code::Proto && error.message.starts_with(field), "{error}");
    }
}

#[test]
fn atp_2_3_unknown_fields_are_ignored() {
    let mut bytes = body().encode_to_vec();
    bytes.extend([0x98, 0x06, 1, 0x9a, 0x06, 2, 7, 7, 0x9d, 0x06, 0, 0, 0, 0, 0x99, 0x06, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(decode_body(bytes.into()).unwrap(), decode_body(body().encode_to_vec().into()).unwrap());
}

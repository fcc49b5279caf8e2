//! Bytes and frames (rules 1 and 2): sizes at n and n + 1, deadlines, garbage, and what is ignored.

use crate::{agent, dial, shared};
use atp_proto::codec::{encode_body, encoded_len};
use atp_proto::content::Role;
use atp_proto::frame::{Meta, kind};
use atp_proto::limits::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX};
use atp_proto::{Code, Flags, Frame, pb};
use atp_tests::blackbox::peer::{Peer, encoded, hello, submit, task};
use atp_tests::simulation::rng::Rng;
use prost::Message;
use std::io::ErrorKind;
use std::time::Duration;

/// An envelope around a body's bytes, with more fields if wanted.
fn envelope(body: &[u8], checksum: &[u8]) -> Vec<u8> {
    let envelope =
        pb::Envelope { body: body.to_vec().into(), checksum: checksum.to_vec().into(), ..pb::Envelope::default() };
    let bytes = envelope.encode_to_vec();
    let length = u32::try_from(bytes.len()).expect("small");
    [&length.to_be_bytes()[..], &bytes].concat()
}

/// The same frame with its body changed by hand.
fn with_body(frame: &Frame, change: impl FnOnce(&mut pb::Body)) -> Vec<u8> {
    let mut body = pb::Body::decode(encode_body(frame)).expect("a body");
    change(&mut body);
    envelope(&body.encode_to_vec(), &[])
}

/// A hello whose envelope has exactly this many bytes.
fn hello_of(bytes: usize) -> Frame {
    let padded = |n: usize| {
        let content = format!(r#"{{"minor_max":1,"role":"client","pad":"{}"}}"#, "x".repeat(n));
        Frame::raw("", 0, Flags::SYN, kind::HELLO, content.into())
    };
    let overhead = encoded(&padded(bytes)).len() - 4 - bytes;
    let frame = padded(bytes - overhead);
    assert_eq!(encoded(&frame).len() - 4, bytes, "{}", encoded_len(&frame));
    frame
}

#[test]
fn atp_1_2_a_frame_may_come_byte_by_byte() {
    let router = shared();
    let mut peer = dial(router.atp());
    for byte in encoded(&hello(Role::Client, 1)) {
        peer.send_bytes(&[byte]);
    }
    assert_eq!(&*peer.frame().kind, kind::HELLO);
}

#[test]
fn atp_1_3_n_bytes_are_a_frame_and_one_more_is_elimit() {
    let router = shared();
    let mut peer = dial(router.atp());
    peer.send(&hello_of(FRAME_BYTES_MAX));
    assert_eq!(&*peer.frame().kind, kind::HELLO);
    let mut peer = dial(router.atp());
    peer.send(&hello_of(FRAME_BYTES_MAX + 1));
    let error = peer.closed();
    let facts = (error.code, error.limit, error.used, error.judged);
    assert_eq!(facts, (Code::Limit, Some(FRAME_BYTES_MAX as u64), Some(FRAME_BYTES_MAX as u64 + 1), false));
}

#[test]
fn atp_1_4_a_length_of_4_gib_takes_no_memory() {
    let router = shared();
    for _ in 0..64 {
        let mut peer = dial(router.atp());
        peer.send_bytes(&u32::MAX.to_be_bytes());
        let error = peer.closed();
        assert_eq!((error.code, error.used), (Code::Limit, Some(u32::MAX.into())));
    }
    // Behind a hello it is the same.
    let mut peer = Peer::client(router.atp());
    peer.send_bytes(&u32::MAX.to_be_bytes());
    assert_eq!(peer.closed().code, Code::Limit);
}

#[test]
fn atp_1_5_n_entries_are_a_frame_and_one_more_is_elimit() {
    let router = shared();
    let with = |stream: &str, languages: usize| {
        let meta = Meta { languages: vec!["r".into(); languages], ..Meta::default() };
        Frame { meta: Some(Box::new(meta)), ..submit(stream, &task("nobody")) }
    };
    // The payload and the meta count too.
    let mut peer = Peer::client(router.atp());
    peer.send(&with("entries-n", FRAME_ENTRIES_MAX - 2));
    peer.expect(kind::ACCEPTED);
    peer.send(&Frame::raw("entries-n", 0, Flags::NONE, kind::TASK_CANCEL, "{}".into()));
    peer.to_the_bill("entries-n");
    peer.send(&with("entries-n1", FRAME_ENTRIES_MAX - 1));
    assert_eq!(peer.closed().code, Code::Limit);
}

#[test]
fn atp_1_6_the_first_frame_has_a_deadline() {
    let router = shared();
    let mut silent = dial(router.atp());
    silent.beats = false;
    let mut half = dial(router.atp());
    half.beats = false;
    let bytes = encoded(&hello(Role::Client, 1));
    half.send_bytes(&bytes[..bytes.len() / 2]);
    for mut peer in [silent, half] {
        let error = peer.closed();
        assert_eq!(error.code, Code::Proto);
        assert!(error.message.contains("first frame"), "{}", error.message);
    }
}

#[test]
fn atp_1_6_a_begun_frame_has_a_deadline() {
    let router = shared();
    let mut peer = Peer::client(router.atp());
    // From here on it says one byte now and then, and nothing else.
    peer.beats = false;
    let bytes = encoded(&submit("slow-loris", &task("nobody")));
    let mut bytes = bytes.iter().take(bytes.len() - 1);
    let error = loop {
        match peer.try_next(Duration::from_secs(1)) {
            Ok(Some(frame)) if &*frame.kind == kind::ERROR => break frame.read::<atp_proto::WireError>().unwrap(),
            Ok(Some(_)) => {}
            Err(e) if e.kind() == ErrorKind::TimedOut => {
                peer.send_bytes(&[*bytes.next().expect("the deadline comes before the frame is whole")]);
            }
            other => panic!("closed without a word: {other:?}"),
        }
    };
    assert_eq!(error.code, Code::Proto);
    assert!(error.message.contains("begun"), "{}", error.message);
    peer.ended();
}

#[test]
fn atp_1_7_garbage_ends_its_connection_and_no_other() {
    let router = shared();
    let mut rng = Rng::new(atp_tests::blackbox::seed(17));
    let mut bystander = Peer::client(router.atp());
    for round in 0..100 {
        let mut peer = if round % 2 == 0 { dial(router.atp()) } else { Peer::client(router.atp()) };
        let length = rng.range(1, 300);
        let mut bytes: Vec<u8> = (0..length).map(|_| rng.below(256) as u8).collect();
        if round % 3 > 0 {
            // A length that is right, so that the envelope is looked at.
            bytes = [&u32::try_from(length).expect("small").to_be_bytes()[..], &bytes].concat();
        } else {
            bytes.splice(0..0, [255, 255, 255, 255]);
        }
        peer.send_bytes(&bytes);
        let error = peer.closed();
        assert!(matches!(error.code, Code::Proto | Code::Limit), "round {round}: {error}");
        assert!(!error.judged);
    }
    bystander.send(&Frame::heartbeat(false));
    bystander.beats = false;
    assert!(bystander.frame().flags.has(Flags::HB));
}

#[test]
fn atp_2_3_unknown_types_and_fields_are_ignored() {
    let router = shared();
    let mut worker = agent(&router, "a-2-3");
    let mut peer = Peer::client(router.atp());
    for stream in ["", "u-2-3"] {
        peer.send(&Frame::raw(stream, 0, Flags::NONE, "weather.report", "{\"rain\":true}".into()));
    }
    // A field of a later version in the body, another in the document.
    let content = r#"{"task":"review","agents":["a-2-3"],"colour":{"of":["the",{"moon":1}]}}"#;
    let frame = Frame::raw("u-2-3", 1, Flags::SYN, kind::TASK_SUBMIT, content.into());
    let mut body = encode_body(&frame).to_vec();
    body.extend_from_slice(&[0x98, 0x06, 0x01]);
    peer.send_bytes(&envelope(&body, &[]));
    peer.expect(kind::ACCEPTED);
    let call = worker.dispatched().call_id;
    // A numbered message of an unknown type takes its place in the order.
    worker.send(&Frame::raw(call.to_string(), 2, Flags::NONE, "agent.mood", "{}".into()));
    worker.send(&crate::last(call, 3, 5));
    worker.send(&crate::partial(call, 1, "one ", 1));
    let frames = peer.to_the_bill("u-2-3");
    assert_eq!(crate::bill(&frames).settled.tokens.0, 15);
}

#[test]
fn atp_2_4_a_wrong_checksum_is_eproto() {
    let router = shared();
    let body = encode_body(&hello(Role::Client, 1));
    let mut sum = <sha2::Sha256 as sha2::Digest>::digest(&body).to_vec();
    let mut peer = dial(router.atp());
    peer.send_bytes(&envelope(&body, &sum));
    assert_eq!(&*peer.frame().kind, kind::HELLO);
    sum[0] ^= 1;
    let mut peer = dial(router.atp());
    peer.send_bytes(&envelope(&body, &sum));
    let error = peer.closed();
    assert!(error.code == Code::Proto && error.message.contains("checksum"), "{error}");
}

/// Sends one frame on a connection that has said hello, and reads why it is closed.
fn closed_by(bytes: &[u8]) -> String {
    let mut peer = Peer::client(shared().atp());
    peer.send_bytes(bytes);
    let error = peer.closed();
    assert_eq!(error.code, Code::Proto, "{error}");
    error.message
}

#[test]
fn atp_2_5_another_wire_version_is_eproto() {
    let _router = shared();
    let frame = submit("v-2-5", &task("nobody"));
    for v in [0, 2, u32::MAX] {
        let message = closed_by(&with_body(&frame, |body| body.v = v));
        assert!(message.contains("v:") || message.contains("version"), "{message}");
    }
}

#[test]
fn atp_2_6_flags_that_contradict_are_eproto() {
    let _router = shared();
    let frame = submit("f-2-6", &task("nobody"));
    for (flags, msg_seq) in [(1 | 128, 1), (2, 1), (1 | 64, 1), (16 | 64, 0)] {
        let message = closed_by(&with_body(&frame, |body| (body.flags, body.msg_seq) = (flags, msg_seq)));
        let named = message.contains("flags") || message.contains("frag_seq");
        assert!(named, "{flags} {msg_seq}: {message}");
    }
    let message = closed_by(&with_body(&frame, |body| (body.flags, body.msg_seq, body.frag_seq) = (64, 0, 1)));
    assert!(message.contains("frag_seq"), "{message}");
}

#[test]
fn atp_2_7_a_field_out_of_range_is_named() {
    let _router = shared();
    let frame = submit("q-2-7", &task("nobody"));
    let message = closed_by(&with_body(&frame, |body| body.qos = 4));
    assert!(message.contains("qos"), "{message}");
    let message = closed_by(&with_body(&frame, |body| {
        body.payload.get_or_insert_default().confidence_ppm = Some(1_000_001);
    }));
    assert!(message.contains("confidence_ppm"), "{message}");
}

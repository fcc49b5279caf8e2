//! The vector files are what the generator writes, and this implementation agrees with every case in them.

#[path = "vectors/cases.rs"]
mod cases;

use atp_proto::codec::{Received, decode_envelope, encode_body};
use atp_proto::id::stream_of_key;
use atp_proto::json::{View, from_json, hex, unhex};
use atp_proto::reassembly::{Fed, Inbound, Message};
use atp_proto::{CallId, Code, StreamId, TenantId, WireError};
use serde_json::{Value, json};
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(name)
}

fn cases_of(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(path(name)).expect("the vector files are in the repository");
    let document: Value = serde_json::from_str(&text).expect("a vector file is JSON");
    document["cases"].as_array().expect("a vector file has cases").clone()
}

fn text<'a>(case: &'a Value, field: &str) -> &'a str {
    case[field].as_str().unwrap_or_else(|| panic!("{field} of {case}"))
}

fn bytes(case: &Value, field: &str) -> Vec<u8> {
    unhex(text(case, field)).expect("hex digits")
}

fn agrees(error: &WireError, case: &Value) {
    assert_eq!(error.code.as_str(), text(case, "code"), "{case}");
    assert!(error.message.starts_with(text(case, "field")), "{case}: {error}");
}

#[test]
fn the_files_are_what_the_generator_writes() {
    for (name, content) in cases::files() {
        let file = std::fs::read_to_string(path(name)).unwrap_or_default();
        let parsed = |text: &str| serde_json::from_str::<Value>(text).ok();
        assert!(parsed(&file) == parsed(&content), "{name} differs: cargo run -p atp-proto --example vectors");
    }
}

#[test]
fn frames_agree() {
    for case in cases_of("frames.json") {
        let received = decode_envelope(bytes(&case, "envelope").into()).unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(hex(&received.body), text(&case, "body"));
        assert_eq!(hex(&encode_body(&received.frame)), text(&case, "body"));
        assert_eq!(serde_json::to_value(View::new(&received.frame)).unwrap(), case["frame"]);
        assert_eq!(from_json(&case["frame"].to_string()), Ok(received.frame));
    }
}

#[test]
fn refusals_agree() {
    for case in cases_of("bad_frames.json") {
        agrees(&decode_envelope(bytes(&case, "envelope").into()).expect_err(text(&case, "name")), &case);
    }
    for case in cases_of("json_frames.json") {
        match from_json(text(&case, "text")) {
            Ok(frame) => assert_eq!(hex(&encode_body(&frame)), text(&case, "body"), "{case}"),
            Err(error) => agrees(&error, &case),
        }
    }
}

#[test]
fn reassembly_agrees() {
    for case in cases_of("reassembly.json") {
        let mut inbound = Inbound::after(case["after"].as_u64().unwrap());
        for step in case["frames"].as_array().unwrap() {
            let number = |field: &str| step[field].as_u64().unwrap();
            let frag_seq = u32::try_from(number("frag_seq")).unwrap();
            let frame = cases::step(number("msg_seq"), frag_seq, step["more"] == true, bytes(step, "content"));
            let shown = |m: Message| json!({"msg_seq": m.frame.msg_seq, "content": hex(&m.frame.content)});
            let outcome = match inbound.feed(Received::from_frame(frame)) {
                Ok(Fed::Ready(first)) => {
                    let mut messages = vec![shown(first)];
                    messages.extend(std::iter::from_fn(|| inbound.next_ready()).map(shown));
                    json!({ "messages": messages })
                }
                Ok(Fed::Waiting) => json!({"waiting": true}),
                Ok(Fed::Duplicate(seq)) => json!({ "duplicate": seq }),
                Err(error) => json!({"code": error.code}),
            };
            assert_eq!(outcome, step["outcome"], "{case}");
        }
        if !case["missing"].is_null() {
            assert_eq!(serde_json::to_value(inbound.missing()).unwrap(), case["missing"], "{case}");
        }
    }
}

#[test]
fn names_agree() {
    for case in cases_of("codes.json") {
        let code = Code::parse(text(&case, "code")).unwrap();
        assert_eq!(Some(u64::from(code.http_status())), case["http"].as_u64());
    }
    for case in cases_of("ids.json") {
        let number = |field: &str| u32::try_from(case[field].as_u64().unwrap()).unwrap();
        if case.get("key").is_some() {
            assert_eq!(stream_of_key(text(&case, "key"), number("try")).as_str(), text(&case, "stream_id"));
        } else {
            let (tenant, stream) = (TenantId::new(text(&case, "tenant")), StreamId::new(text(&case, "stream_id")));
            assert_eq!(CallId::of(&tenant, &stream, number("lane")).to_string(), text(&case, "call_id"));
        }
    }
}

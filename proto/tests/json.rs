//! The JSON view, both ways.

mod any;

use atp_proto::codec::Received;
use atp_proto::frame::Extra;
use atp_proto::json::{View, from_json, to_json};
use atp_proto::limits::{FRAME_BYTES_MAX, FRAME_ENTRIES_MAX};
use atp_proto::{Code, Flags, Frame, Hop, pb};
use bytes::Bytes;
use proptest::prelude::*;
use serde_json::{Value, json};

fn value(frame: &Frame) -> Value {
    serde_json::from_str(&to_json(View::new(frame))).expect("a view is JSON")
}

fn refused(text: &str) -> String {
    let error = from_json(text).expect_err(text);
    assert_eq!(error.code, Code::Proto, "{text}");
    error.message
}

proptest! {
    /// Everything but what a text can't carry (a hop's signature) comes back.
    #[test]
    fn atp_6_1_the_view_round_trips(frame in any::frame()) {
        let mut frame = frame;
        if let Some(hop) = &mut frame.hop {
            **hop = Hop { hop_sig: Bytes::new(), hop_kid: String::new(), ..(**hop).clone() };
        }
        frame.hop = frame.hop.filter(|hop| **hop != Hop::default());
        let text = to_json(View::new(&frame));
        prop_assert!(!text.contains('\n'));
        prop_assert_eq!(from_json(&text), Ok(frame));
    }

    #[test]
    fn no_garbage_panics(text in "[\\[\\]{}\":,a-z0-9 \\\\.-]{0,60}") {
        let _ = from_json(&text);
        let _ = from_json(&format!("{{\"payload\":{{\"confidence\":{text},\"content\":{text}}},\"flags\":{text}}}"));
    }
}

#[test]
fn atp_6_1_names_are_those_of_the_contract() {
    let text = r#"{"v":1,"session_id":"s-7","stream_id":"k-6f1d.1","msg_seq":1,"frag_seq":0,"flags":["SYN"],"qos":"silver","ttl":8,
      "window":{"max_parallel":4,"max_tokens":80000,"max_usd_micros":500000},
      "meta":{"task_type":"code_review","languages":["rust"],"traceparent":"00-1","idempotency_key":"pr-17"},
      "payload":{"type":"task.submit","content":{"task":"Review the diff","wait":true}}}"#;
    let frame = from_json(text).unwrap();
    assert_eq!(frame.qos, 2);
    assert_eq!(&frame.content[..], br#"{"task":"Review the diff","wait":true}"#);
    assert_eq!(frame.meta.as_ref().unwrap().idempotency_key, "pr-17");
    assert_eq!(value(&frame), serde_json::from_str::<Value>(text).unwrap());
    let answer = Frame {
        hop: Some(Box::new(Hop { ecn: true, ..Hop::default() })),
        extra: Some(Box::new(Extra {
            confidence_ppm: Some(900_000),
            cost_est: Some(pb::Cost { in_tokens: 1, out_tokens: 0, usd_micros: u64::MAX }),
            tool_cost_breakdown: vec![pb::ToolCost { tool: "fs_read".into(), tokens: 3, usd_micros: 0 }],
            ..Extra::default()
        })),
        ..Frame::json("s", 2, Flags::SYN.with(Flags::ACK), "control.accepted", &json!({}))
    };
    let expected = json!({
        "v": 1, "stream_id": "s", "msg_seq": 2, "frag_seq": 0, "flags": ["SYN", "ACK", "ECN"],
        "payload": {
            "type": "control.accepted", "content": {}, "confidence": 0.9,
            "cost_est": {"in_tokens": 1, "usd_micros": u64::MAX}, "tool_cost_breakdown": [{"tool": "fs_read", "tokens": 3}],
        }
    });
    assert_eq!(value(&answer), expected);
    assert!(to_json(View::new(&answer)).contains("\"confidence\":0.9,"));
    assert_eq!(value(&Frame::heartbeat(true))["flags"], json!(["ACK", "HB", "CTRL"]));
    assert_eq!(value(&Frame::heartbeat(true)).get("payload"), None);
}

#[test]
fn atp_6_2_content_is_the_document_or_base64() {
    let text = |frame: &Frame| value(frame)["payload"].clone();
    let pretty =
        Frame::raw("s", 1, Flags::NONE, "agent.log", Bytes::from_static(b"{\n \"text\":\"a\\nb\",\r\n \"n\":1.10}"));
    assert!(to_json(View::new(&pretty)).contains("{  \"text\":\"a\\nb\",   \"n\":1.10}"));
    let part = Frame { flags: Flags::MORE, ..Frame::raw("s", 1, Flags::NONE, "agent.log", Bytes::from_static(b"{}")) };
    assert_eq!(text(&part), json!({"type": "agent.log", "content_base64": "e30="}));
    let plain = Frame {
        content_type: "text/plain".into(),
        ..Frame::raw("s", 1, Flags::NONE, "agent.log", Bytes::from_static(b"{}"))
    };
    assert_eq!(text(&plain)["content_base64"], "e30=");
    let broken = Frame::raw("s", 1, Flags::NONE, "agent.log", Bytes::from_static(b"{\xff"));
    assert_eq!(text(&broken)["content_base64"], "e/8=");
    for frame in [part, plain, broken] {
        assert_eq!(from_json(&to_json(View::new(&frame))), Ok(frame));
    }
}

#[test]
fn atp_6_4_people_and_other_languages_are_understood() {
    let text = r#"{"stream_id":"s","msg_seq":"18446744073709551615","frag_seq":null,"flags":null,"qos":null,"ttl":"3","window":null,
      "meta":{"task_type":null,"languages":null,"diff_loc":"12","later":[1]},"sig":"ignored","checksum":"ignored","v":null,
      "payload":{"type":"agent.log","content":null,"confidence":"0.25","expiry_ms":"5","rev":null,"cost_est":{"in_tokens":"7","out_tokens":null}}}"#;
    let frame = from_json(text).unwrap();
    assert_eq!((frame.msg_seq, frame.flags, frame.qos, frame.content.len()), (u64::MAX, Flags::NONE, 0, 0));
    assert_eq!(frame.meta.unwrap().diff_loc, Some(12));
    let extra = frame.extra.unwrap();
    assert_eq!((extra.confidence_ppm, extra.expiry_ms, extra.cost_est.unwrap().in_tokens), (Some(250_000), Some(5), 7));
    // Absent means default; CTRL follows from msg_seq.
    assert_eq!(from_json(r#"{"flags":["HB"]}"#), Ok(Frame::heartbeat(false)));
}

#[test]
fn atp_6_5_a_wrong_field_is_named() {
    for (field, text) in [
        ("msg_seq:", r#"{"msg_seq":-1}"#),
        ("msg_seq:", r#"{"msg_seq":1.5}"#),
        ("msg_seq:", r#"{"msg_seq":"x"}"#),
        ("frag_seq:", r#"{"msg_seq":1,"frag_seq":4294967296}"#),
        ("v:", r#"{"v":2}"#),
        ("flags[1]:", r#"{"flags":["SYN","SIN"]}"#),
        ("flags:", r#"{"flags":["ACK"]}"#),
        ("flags:", r#"{"msg_seq":1,"flags":["CTRL"]}"#),
        ("qos:", r#"{"qos":"platinum"}"#),
        ("stream_id:", r#"{"stream_id":"a b"}"#),
        ("window.max_tokens:", r#"{"window":{"max_tokens":-5}}"#),
        ("meta.languages:", r#"{"meta":{"languages":"rust"}}"#),
        ("payload.confidence:", r#"{"payload":{"confidence":1.1}}"#),
        ("payload.confidence:", r#"{"payload":{"confidence":[]}}"#),
        ("payload.checksum:", r#"{"payload":{"checksum":"abc"}}"#),
        ("payload.content_base64:", r#"{"payload":{"content_base64":"*"}}"#),
        ("payload.content_base64:", r#"{"payload":{"content":{},"content_base64":"e30="}}"#),
        ("payload.content:", r#"{"payload":{"content":{},"content_type":"text/plain"}}"#),
        ("payload.content:", r#"{"msg_seq":1,"flags":["MORE"],"payload":{"content":{}}}"#),
        ("frame:", "[]"),
        ("frame:", r#"{"flags":[]} {}"#),
    ] {
        let message = refused(text);
        assert!(message.starts_with(field), "{text}: {message}");
    }
}

#[test]
fn atp_6_6_texts_and_lists_are_bounded() {
    let padded = |n: usize| format!("{{\"flags\":[\"HB\"]{}}}", " ".repeat(n - 16));
    assert!(padded(FRAME_BYTES_MAX).len() == FRAME_BYTES_MAX && from_json(&padded(FRAME_BYTES_MAX)).is_ok());
    assert_eq!(from_json(&padded(FRAME_BYTES_MAX + 1)).unwrap_err().code, Code::Limit);
    let listed = |n: usize| json!({"meta": {"languages": vec![""; n], "data_scope": [""]}}).to_string();
    assert!(from_json(&listed(FRAME_ENTRIES_MAX - 1)).is_ok());
    assert_eq!(from_json(&listed(FRAME_ENTRIES_MAX)).unwrap_err().code, Code::Limit);
    assert!(refused(&listed(FRAME_ENTRIES_MAX + 1)).starts_with("meta.languages"));
}

#[test]
fn atp_6_7_a_checksum_of_the_body_stands_beside() {
    let received = Received::from_frame(Frame::heartbeat(false));
    let view: Value = serde_json::from_str(&to_json(View::with_checksum(&received))).unwrap();
    // The body is `08 01 30 60`.
    assert_eq!(view["checksum"].as_str().map(str::len), Some(64));
    assert_eq!(serde_json::to_value(View::new(&received.frame)).unwrap().get("checksum"), None);
    assert_eq!(from_json(&view.to_string()), Ok(received.frame));
}

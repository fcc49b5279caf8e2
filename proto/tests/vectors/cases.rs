//! What the vector files hold. Bytes come from prost's encoder, digests from `sha2` directly, so that the files don't repeat
//! a mistake of our own codec. Asserts nothing.

use atp_proto::{Code, Flags, Frame, pb};
use bytes::Bytes;
use prost::Message;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Name and content of every file, each one JSON document.
pub(crate) fn files() -> Vec<(&'static str, String)> {
    let file = |name, about: &str, cases: Vec<Value>| {
        let document = json!({"about": about, "cases": cases});
        (name, serde_json::to_string_pretty(&document).expect("texts and numbers serialize") + "\n")
    };
    vec![
        file(
            "frames.json",
            "`envelope` in hex decodes to `frame`, its body is `body`, and `frame` encodes to `body`.",
            frames(),
        ),
        file(
            "bad_frames.json",
            "`envelope` in hex is refused with `code`; the message begins with `field`.",
            bad_frames(),
        ),
        file(
            "json_frames.json",
            "`text` is refused with `code` and `field`, or reads as the body in hex.",
            json_frames(),
        ),
        file(
            "reassembly.json",
            "Feed `frames` in order to a receiver that has all up to `after`: each has an `outcome`, `content` in hex.",
            reassembly(),
        ),
        file("codes.json", "Every code with the HTTP status that says the same.", codes()),
        file("ids.json", "Call ids of (tenant, stream, lane) and stream ids of (key, try).", ids()),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn body(stream_id: &str, msg_seq: u64, flags: Flags, payload: Option<pb::Payload>) -> pb::Body {
    pb::Body { v: 1, stream_id: stream_id.into(), msg_seq, flags: flags.0, payload, ..pb::Body::default() }
}

fn payload(kind: &str, content: &'static str) -> Option<pb::Payload> {
    Some(pb::Payload { r#type: kind.into(), content: content.as_bytes().into(), ..pb::Payload::default() })
}

/// A content as it stands in the JSON view.
fn document(content: &str) -> Value {
    serde_json::from_str(content).expect("contents here are JSON")
}

fn envelope(body: &pb::Body) -> pb::Envelope {
    pb::Envelope { body: body.encode_to_vec().into(), ..pb::Envelope::default() }
}

// ---- frames ---------------------------------------------------------------------------------------------------------

fn frames() -> Vec<Value> {
    let case = |name: &str, rule: &str, envelope: pb::Envelope, frame: Value| {
        let bytes = envelope.encode_to_vec();
        json!({"name": name, "rule": rule, "envelope": hex(&bytes), "body": hex(&envelope.body), "frame": frame})
    };
    let hello = r#"{"minor_max":1,"role":"client","token":"atp_x"}"#;
    let submit = r#"{"agents":["reviewer.a"],"budget":{"tokens":20000,"usd_micros":500000},"task":"Review the diff"}"#;
    let submit_body = pb::Body {
        session_id: "s-7".into(),
        qos: 1,
        meta: Some(pb::Meta {
            task_type: "code_review".into(),
            languages: vec!["rust".into(), "c".into()],
            diff_loc: Some(0),
            idempotency_key: "pr-17".into(),
            ..pb::Meta::default()
        }),
        ..body("k-6f1d.1", 1, Flags::SYN, payload("task.submit", submit))
    };
    let hop = pb::Hop {
        ttl: Some(8),
        window: Some(pb::Window { max_parallel: Some(4), max_tokens: Some(0), max_usd_micros: None }),
        ecn: true,
        ..pb::Hop::default()
    };
    let partial = "{\"cost\":{\"in_tokens\":3,\"out_tokens\":1,\"usd_micros\":9},\"text\":\"ä€\u{1f980}\"}";
    let partial_body = pb::Body {
        msg_seq: u64::MAX,
        ..body("c-00112233445566778899", 2, Flags::NONE, payload("agent.result.partial", partial))
    };
    let sum = Sha256::digest(partial_body.encode_to_vec()).to_vec();
    let last = r#"{"text":"done"}"#;
    let mut final_payload = payload("agent.result.final", last).unwrap_or_default();
    final_payload.confidence_ppm = Some(900_000);
    final_payload.cost_est = Some(pb::Cost { in_tokens: 5, out_tokens: 0, usd_micros: 12 });
    final_payload.tool_cost_breakdown = vec![pb::ToolCost { tool: "fs_read".into(), tokens: 2, usd_micros: 1 }];
    let fragment =
        pb::Payload { r#type: "agent.log".into(), content: Bytes::from_static(b"{\"te"), ..pb::Payload::default() };
    let mut later = envelope(&body("", 0, Flags::HB.with(Flags::CTRL), None)).encode_to_vec();
    later.extend([0x9a, 0x06, 2, 7, 7]);
    vec![
        case(
            "hello",
            "ATP-4-1",
            envelope(&body("", 0, Flags::SYN.with(Flags::CTRL), payload("control.hello", hello))),
            json!({"v": 1, "stream_id": "", "msg_seq": 0, "frag_seq": 0, "flags": ["SYN", "CTRL"],
                   "payload": {"type": "control.hello", "content": document(hello)}}),
        ),
        case(
            "submit with hop and meta",
            "ATP-2-1",
            pb::Envelope { hop: Some(hop), ..envelope(&submit_body) },
            json!({"v": 1, "session_id": "s-7", "stream_id": "k-6f1d.1", "msg_seq": 1, "frag_seq": 0, "flags": ["SYN", "ECN"],
                   "qos": "gold", "ttl": 8, "window": {"max_parallel": 4, "max_tokens": 0},
                   "meta": {"task_type": "code_review", "languages": ["rust", "c"], "diff_loc": 0, "idempotency_key": "pr-17"},
                   "payload": {"type": "task.submit", "content": document(submit)}}),
        ),
        case(
            "partial with checksum and the highest msg_seq",
            "ATP-2-4",
            pb::Envelope { checksum: sum.into(), ..envelope(&partial_body) },
            json!({"v": 1, "stream_id": "c-00112233445566778899", "msg_seq": u64::MAX, "frag_seq": 0, "flags": [],
                   "payload": {"type": "agent.result.partial", "content": document(partial)}}),
        ),
        case(
            "final with estimate",
            "ATP-2-1",
            envelope(&body("c-00112233445566778899", 3, Flags::FIN, Some(final_payload))),
            json!({"v": 1, "stream_id": "c-00112233445566778899", "msg_seq": 3, "frag_seq": 0, "flags": ["FIN"],
                   "payload": {"type": "agent.result.final", "content": document(last), "confidence": 0.9,
                               "cost_est": {"in_tokens": 5, "usd_micros": 12},
                               "tool_cost_breakdown": [{"tool": "fs_read", "tokens": 2, "usd_micros": 1}]}}),
        ),
        case(
            "first fragment",
            "ATP-6-2",
            envelope(&body("s", 4, Flags::MORE, Some(fragment))),
            json!({"v": 1, "stream_id": "s", "msg_seq": 4, "frag_seq": 0, "flags": ["MORE"],
                   "payload": {"type": "agent.log", "content_base64": "eyJ0ZQ=="}}),
        ),
        case(
            "heartbeat answer",
            "ATP-4-9",
            envelope(&body("", 0, Flags::HB.with(Flags::ACK).with(Flags::CTRL), None)),
            json!({"v": 1, "stream_id": "", "msg_seq": 0, "frag_seq": 0, "flags": ["ACK", "HB", "CTRL"]}),
        ),
        json!({"name": "field of a later version", "rule": "ATP-2-3", "envelope": hex(&later),
               "body": hex(&body("", 0, Flags::HB.with(Flags::CTRL), None).encode_to_vec()),
               "frame": {"v": 1, "stream_id": "", "msg_seq": 0, "frag_seq": 0, "flags": ["HB", "CTRL"]}}),
    ]
}

fn bad_frames() -> Vec<Value> {
    let case = |name: &str, rule: &str, code: &str, field: &str, bytes: Vec<u8>| json!({"name": name, "rule": rule, "code": code, "field": field, "envelope": hex(&bytes)});
    let broken = |name: &str, rule: &str, field: &str, body: pb::Body| {
        case(name, rule, "EPROTO", field, envelope(&body).encode_to_vec())
    };
    let good = || body("s", 1, Flags::NONE, None);
    let raw = |bytes: &'static [u8]| {
        pb::Envelope { body: Bytes::from_static(bytes), ..pb::Envelope::default() }.encode_to_vec()
    };
    let ppm = Some(pb::Payload { confidence_ppm: Some(1_000_001), ..pb::Payload::default() });
    let mut many = Vec::new();
    for _ in 0..4097 {
        many.extend([0x0a, 0]);
    }
    vec![
        case("empty envelope", "ATP-2-5", "EPROTO", "v:", Vec::new()),
        broken("wire version 2", "ATP-2-5", "v:", pb::Body { v: 2, ..good() }),
        broken("unknown flag", "ATP-2-6", "flags:", pb::Body { flags: 128, ..good() }),
        broken("ACK alone", "ATP-2-6", "flags:", pb::Body { flags: Flags::ACK.0, ..good() }),
        broken("CTRL with msg_seq", "ATP-2-6", "flags:", pb::Body { flags: Flags::CTRL.0, ..good() }),
        broken("MORE without msg_seq", "ATP-2-6", "frag_seq:", body("s", 0, Flags::MORE.with(Flags::CTRL), None)),
        broken("qos 4", "ATP-2-7", "qos:", pb::Body { qos: 4, ..good() }),
        broken("stream id with a space", "ATP-4-3", "stream_id:", body("a b", 1, Flags::NONE, None)),
        broken("stream id of 65", "ATP-4-3", "stream_id:", body(&"a".repeat(65), 1, Flags::NONE, None)),
        broken("confidence above 1", "ATP-2-7", "payload.confidence_ppm:", pb::Body { payload: ppm, ..good() }),
        case(
            "checksum of another body",
            "ATP-2-4",
            "EPROTO",
            "checksum:",
            pb::Envelope { checksum: Bytes::from_static(&[0; 32]), ..envelope(&good()) }.encode_to_vec(),
        ),
        case("session id is not UTF-8", "ATP-2-7", "EPROTO", "session_id:", raw(&[8, 1, 0x12, 1, 0xff])),
        case("stream id as a number", "ATP-2-7", "EPROTO", "stream_id:", raw(&[8, 1, 0x18, 1])),
        case("flags of 33 bits", "ATP-2-7", "EPROTO", "flags:", raw(&[8, 1, 0x30, 0x80, 0x80, 0x80, 0x80, 0x10])),
        case("field longer than the body", "ATP-2-2", "EPROTO", "body:", raw(&[8, 1, 0x12, 9])),
        case("group", "ATP-2-2", "EPROTO", "body:", raw(&[8, 1, 0x0b, 0x0c])),
        case("body cut off", "ATP-2-2", "EPROTO", "envelope:", vec![0x12, 5, 8, 1]),
        case("4097 sub-messages", "ATP-1-5", "ELIMIT", "", many),
    ]
}

fn json_frames() -> Vec<Value> {
    let good = |rule: &str, text: &str, body: pb::Body| json!({"rule": rule, "text": text, "body": hex(&body.encode_to_vec())});
    let bad = |field: &str, text: &str| json!({"rule": "ATP-6-5", "text": text, "code": "EPROTO", "field": field});
    let log = |content: &'static str| {
        Some(pb::Payload {
            r#type: "agent.log".into(),
            content: Bytes::from_static(content.as_bytes()),
            ..pb::Payload::default()
        })
    };
    let sure = Some(pb::Payload { confidence_ppm: Some(10), ..pb::Payload::default() });
    vec![
        good("ATP-6-1", r#"{"flags":["HB"]}"#, body("", 0, Flags::HB.with(Flags::CTRL), None)),
        good(
            "ATP-6-2",
            r#"{"stream_id":"s","msg_seq":"7","payload":{"type":"agent.log","content":{"n":1.10, "b":null}}}"#,
            body("s", 7, Flags::NONE, log(r#"{"n":1.10, "b":null}"#)),
        ),
        good(
            "ATP-6-2",
            r#"{"stream_id":"s","msg_seq":7,"flags":["MORE"],"payload":{"type":"agent.log","content_base64":"eyI="}}"#,
            body("s", 7, Flags::MORE, log("{\"")),
        ),
        good(
            "ATP-6-3",
            r#"{"stream_id":"s","msg_seq":1,"payload":{"confidence":1e-05}}"#,
            body("s", 1, Flags::NONE, sure),
        ),
        good(
            "ATP-6-4",
            r#"{"stream_id":"s","msg_seq":1,"flags":null,"qos":null,"meta":null,"payload":null,"later":[]}"#,
            body("s", 1, Flags::NONE, None),
        ),
        bad("msg_seq:", r#"{"msg_seq":-1}"#),
        bad("flags[0]:", r#"{"flags":["SIN"]}"#),
        bad("qos:", r#"{"qos":"platinum"}"#),
        bad("payload.confidence:", r#"{"payload":{"confidence":1.1}}"#),
        bad("payload.content:", r#"{"msg_seq":1,"flags":["MORE"],"payload":{"content":{}}}"#),
        bad("frame:", "[]"),
    ]
}

// ---- messages -------------------------------------------------------------------------------------------------------

/// One step: (msg_seq, frag_seq, MORE, content) and what comes of it.
type Step = (u64, u32, bool, &'static str, Value);

fn reassembly() -> Vec<Value> {
    let wait = || json!({"waiting": true});
    let ready = |messages: &[(u64, &str)]| {
        let list = messages.iter().map(|(seq, content)| json!({"msg_seq": seq, "content": hex(content.as_bytes())}));
        json!({"messages": list.collect::<Vec<_>>()})
    };
    let refused = |code: Code| json!({"code": code});
    let duplicate = |seq: u64| json!({"duplicate": seq});
    let case = |name: &str, rule: &str, after: u64, steps: Vec<Step>, missing: Value| {
        let steps = steps.into_iter().map(|(msg_seq, frag_seq, more, content, outcome)| {
            json!({"msg_seq": msg_seq, "frag_seq": frag_seq, "more": more, "content": hex(content.as_bytes()), "outcome": outcome})
        });
        json!({"name": name, "rule": rule, "after": after, "frames": steps.collect::<Vec<_>>(), "missing": missing})
    };
    vec![
        case(
            "in order",
            "ATP-4-5",
            0,
            vec![(1, 0, false, "a", ready(&[(1, "a")])), (2, 0, false, "", ready(&[(2, "")]))],
            json!([]),
        ),
        case(
            "a gap is held",
            "ATP-4-5",
            4,
            vec![
                (7, 0, false, "c", wait()),
                (6, 0, false, "b", wait()),
                (5, 0, false, "a", ready(&[(5, "a"), (6, "b"), (7, "c")])),
            ],
            json!([]),
        ),
        case(
            "fragments backwards",
            "ATP-4-6",
            0,
            vec![(1, 2, false, "c", wait()), (1, 1, true, "b", wait()), (1, 0, true, "a", ready(&[(1, "abc")]))],
            json!([]),
        ),
        case(
            "duplicates are harmless",
            "ATP-4-8",
            0,
            vec![
                (1, 0, true, "a", wait()),
                (1, 0, true, "a", wait()),
                (1, 1, false, "b", ready(&[(1, "ab")])),
                (1, 0, true, "a", wait()),
                (1, 1, false, "b", duplicate(1)),
            ],
            json!([]),
        ),
        case(
            "what is missing is named",
            "ATP-4-7",
            0,
            vec![(1, 0, true, "a", wait()), (1, 3, true, "d", wait()), (3, 1, false, "b", wait())],
            json!([
                {"msg_seq": 1, "frag": 2, "missing": [[1, 2], [4, u32::MAX]]},
                {"msg_seq": 2, "frag": 0, "missing": []},
                {"msg_seq": 3, "frag": 1, "missing": [[0, 0]]},
            ]),
        ),
        case(
            "two lasts",
            "ATP-4-6",
            0,
            vec![(1, 2, false, "c", wait()), (1, 1, false, "b", refused(Code::Proto))],
            json!([{"msg_seq": 1, "frag": 1, "missing": [[0, 1]]}]),
        ),
        case(
            "past the last",
            "ATP-4-6",
            0,
            vec![(1, 1, false, "b", wait()), (1, 2, true, "c", refused(Code::Proto))],
            json!([{"msg_seq": 1, "frag": 1, "missing": [[0, 0]]}]),
        ),
        case(
            "changed duplicate",
            "ATP-4-6",
            0,
            vec![(1, 1, true, "b", wait()), (1, 1, true, "x", refused(Code::Proto))],
            json!([{"msg_seq": 1, "frag": 1, "missing": [[0, 0]]}]),
        ),
        case(
            "too far ahead",
            "ATP-4-5",
            0,
            vec![(65, 0, false, "x", wait()), (66, 0, false, "x", refused(Code::Limit))],
            Value::Null,
        ),
    ]
}

/// The frame of a step.
#[allow(dead_code)] // The test feeds it; the generator only writes.
pub(crate) fn step(msg_seq: u64, frag_seq: u32, more: bool, content: Vec<u8>) -> Frame {
    let flags = if more { Flags::MORE } else { Flags::NONE };
    Frame { frag_seq, ..Frame::raw("s", msg_seq, flags, "agent.log", content.into()) }
}

// ---- names ----------------------------------------------------------------------------------------------------------

fn codes() -> Vec<Value> {
    Code::ALL.iter().map(|code| json!({"code": code, "http": code.http_status()})).collect()
}

fn ids() -> Vec<Value> {
    let ten = |parts: &[&[u8]]| hex(&Sha256::digest(parts.concat())[..10]);
    let call = |tenant: &str, stream: &str, lane: u32| {
        let id = ten(&[tenant.as_bytes(), &[0], stream.as_bytes(), &[0], lane.to_string().as_bytes()]);
        json!({"rule": "ATP-4-3", "tenant": tenant, "stream_id": stream, "lane": lane, "call_id": format!("c-{id}")})
    };
    let key = |key: &str, number: u32| json!({"rule": "ATP-4-4", "key": key, "try": number, "stream_id": format!("k-{}.{number}", ten(&[key.as_bytes()]))});
    vec![
        call("default", "s", 1),
        call("default", "s", 2),
        call("acme", "k-6f1d.1", 4_294_967_295),
        key("pr-17", 1),
        key("ä", 12),
    ]
}

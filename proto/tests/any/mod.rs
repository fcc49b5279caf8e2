//! Arbitrary valid frames, as Rust values and as protobuf's own messages. Owns no assertion.
#![allow(dead_code)] // Each test binary uses its part.

use atp_proto::frame::Extra;
use atp_proto::{Flags, Frame, Hop, Text, pb};
use bytes::Bytes;
use proptest::prelude::*;

pub(crate) fn bytes(max: usize) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..=max).prop_map(Bytes::from)
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[a-zäß€. ]{0,12}"]
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(text(), 0..4)
}

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 0..300u64, any::<u64>()]
}

fn number32() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), 0..300u32, any::<u32>()]
}

pub(crate) fn hop() -> impl Strategy<Value = Hop> {
    let window = (of(number32()), of(number()), of(number()))
        .prop_map(|(max_parallel, max_tokens, max_usd_micros)| pb::Window { max_parallel, max_tokens, max_usd_micros });
    let amount = (of(number()), of(number())).prop_map(|(tokens, usd_micros)| pb::Amount { tokens, usd_micros });
    (of(number32()), of(window), any::<bool>(), of(amount), bytes(4), text()).prop_map(
        |(ttl, window, ecn, budget_left, hop_sig, hop_kid)| Hop { ttl, window, ecn, budget_left, hop_sig, hop_kid },
    )
}

fn of<T: std::fmt::Debug>(s: impl Strategy<Value = T>) -> impl Strategy<Value = Option<T>> {
    prop::option::of(s)
}

pub(crate) fn meta() -> impl Strategy<Value = pb::Meta> {
    let lists = (texts(), texts(), texts(), texts());
    let words = (text(), text(), text(), text(), text(), text(), text(), text(), text());
    let figures = (of(number()), of(number()), of(number()), of(number()));
    (lists, words, figures).prop_map(|(l, w, f)| pb::Meta {
        task_type: w.0,
        languages: l.0,
        risk: w.1,
        data_scope: l.1,
        traceparent: w.2,
        tool_permissions: l.2,
        environment_id: w.3,
        security_groups: l.3,
        phase: w.4,
        category: w.5,
        diff_loc: f.0,
        prompt_tokens: f.1,
        file_count: f.2,
        reasoning_depth: f.3,
        geometry: w.6,
        group_id: w.7,
        idempotency_key: w.8,
    })
}

fn extra() -> impl Strategy<Value = Extra> {
    let cost = (number(), number(), number()).prop_map(|(in_tokens, out_tokens, usd_micros)| pb::Cost {
        in_tokens,
        out_tokens,
        usd_micros,
    });
    let tool =
        (text(), number(), number()).prop_map(|(tool, tokens, usd_micros)| pb::ToolCost { tool, tokens, usd_micros });
    (of(0..=1_000_000u32), of(cost), bytes(4), of(number()), number32(), prop::collection::vec(tool, 0..3)).prop_map(
        |(confidence_ppm, cost_est, checksum, expiry_ms, rev, tool_cost_breakdown)| Extra {
            confidence_ppm,
            cost_est,
            checksum,
            expiry_ms,
            rev,
            tool_cost_breakdown,
        },
    )
}

/// A frame that keeps every rule; `content` may be any bytes.
pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    let ids = (text(), prop_oneof![Just(String::new()), "[A-Za-z0-9._-]{1,64}"]);
    let numbers = (number(), number32(), 0..32u32, 0..=3u32);
    let payload = (text(), bytes(200), prop_oneof![Just(""), Just("application/json"), Just("text/plain")]);
    (of(hop()), ids, numbers, of(meta()), payload, of(extra())).prop_map(|(hop, ids, n, meta, payload, extra)| {
        let (msg_seq, frag_seq, bits, qos) = n;
        let mut flags = Flags(bits);
        if flags.has(Flags::ACK) {
            flags = flags.with(Flags::SYN);
        }
        let mut frag_seq = frag_seq;
        if msg_seq == 0 {
            (flags, frag_seq) = (Flags(flags.0 & !Flags::MORE.0).with(Flags::CTRL), 0);
        }
        Frame {
            hop: hop.map(Box::new),
            session_id: ids.0.into(),
            stream_id: ids.1.into(),
            msg_seq,
            frag_seq,
            flags,
            qos,
            meta: meta.map(Box::new),
            kind: Text::from(payload.0),
            content: payload.1,
            content_type: payload.2.into(),
            extra: extra.filter(|e| *e != Extra::default()).map(Box::new),
        }
    })
}

/// The same frame as the messages that prost generates.
pub(crate) fn generated(frame: &Frame) -> (pb::Envelope, pb::Body) {
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
    let encoded = prost::Message::encode_to_vec(&body);
    let hop = frame.hop.as_deref().cloned();
    (pb::Envelope { hop, body: encoded.into(), ..pb::Envelope::default() }, body)
}

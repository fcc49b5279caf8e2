//! One router over in-memory connections: hello and its deadlines, limits at n and n+1, a task from submit to bill,
//! `verify`, and the same state after a restart. Peers are written by hand, so that nothing but the wire is shared.

mod support;

use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{Amount, Code, Cost, Flags, Frame, Tokens, UsdMicros, WireError};
use atp_router::Router;
use atp_router::log::Source;
use std::time::Duration;
use support::{Peer, agent, config, http, submit};
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn hello_is_answered_with_the_lower_minor_and_a_session_of_its_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let (_a, first) = Peer::hello(&router, Role::Client).await;
    let (_b, second) = Peer::hello(&router, Role::Client).await;
    assert_eq!((first.minor, first.heartbeat_ms, first.limits.frame_bytes), (1, 5000, 262_144));
    assert_ne!(first.session_id, second.session_id);
    router.stop().await.expect("seals");
    let router = Router::start(config(dir.path())).await.expect("starts again");
    let (_c, third) = Peer::hello(&router, Role::Client).await;
    assert_ne!(first.session_id, third.session_id, "never used again, also across restarts");
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn what_isn_t_a_hello_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let hello = |text: &'static str| Frame::raw("", 0, Flags::SYN, kind::HELLO, text.into());
    for (frame, code, says) in [
        (submit("s", "a"), Code::Proto, "first frame"),
        (hello(r#"{"role":"router","minor_max":1}"#), Code::Proto, "router"),
        (hello(r#"{"role":"king"}"#), Code::Proto, "control.hello"),
        (hello(r#"{"role":"client","token":"atp_1034"}"#), Code::Auth, "token"),
    ] {
        let mut peer = Peer::new(&router);
        peer.send(frame).await;
        let error = peer.refused().await;
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(says), "{error}");
    }
    let mut garbage = Peer::new(&router);
    garbage.io.write_all(&u32::MAX.to_be_bytes()).await.expect("the router reads");
    assert_eq!(garbage.refused().await.code, Code::Limit, "4 GiB are refused before memory is taken");
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &Capabilities::default())).await;
    assert!(client.refused().await.message.contains("role `agent`"));
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn streams_of_a_connection_end_at_n() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = config(dir.path());
    config.limits.streams_per_connection = 2;
    let router = Router::start(config).await.expect("starts");
    let (mut client, ack) = Peer::hello(&router, Role::Client).await;
    assert_eq!(ack.limits.streams, 2);
    // An agent that takes calls and never ends them keeps the streams open.
    let mut silent = agent(&router, "silent").await;
    for stream in ["s1", "s2"] {
        client.send(submit(stream, "silent")).await;
        client.expect(kind::ACCEPTED).await;
    }
    client.send(submit("s3", "silent")).await;
    let refused = client.expect(kind::ERROR).await;
    assert_eq!((&*refused.stream_id, refused.read::<WireError>().expect("an error").code), ("s3", Code::Limit));
    silent.expect(kind::DISPATCH).await;
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn a_task_goes_from_submit_to_bill_and_survives_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let mut agent = agent(&router, "greeter").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "greeter")).await;
    client.expect(kind::ACCEPTED).await;

    let dispatch = agent.expect(kind::DISPATCH).await;
    let call = dispatch.stream_id.to_string();
    let cost = Cost { in_tokens: Tokens(10), out_tokens: Tokens(2), usd_micros: UsdMicros(12) };
    let part = AgentPartial { text: Some("hello ".into()), cost, ..AgentPartial::default() };
    agent.send(Frame::json(call.as_str(), 1, Flags::NONE, kind::RESULT_PARTIAL, &part)).await;
    let cost = Cost { out_tokens: Tokens(3), usd_micros: UsdMicros(13), ..cost };
    let last = AgentFinal { text: Some("you".into()), cost, ..AgentFinal::default() };
    agent.send(Frame::json(call.as_str(), 2, Flags::FIN, kind::RESULT_FINAL, &last)).await;

    let mut kinds = Vec::new();
    let bill: Bill = loop {
        let frame = client.next().await.expect("open");
        kinds.push(frame.kind.to_string());
        if &*frame.kind == kind::RESULT_FINAL {
            assert_eq!(frame.read::<Final>().expect("a final").result.text, "hello you");
        }
        if &*frame.kind == kind::BILL {
            break frame.read().expect("a bill");
        }
    };
    assert_eq!(kinds.first().map(String::as_str), Some(kind::RESULT_PARTIAL), "{kinds:?}");
    assert_eq!((bill.state, bill.settled), (TaskState::Done, Amount::new(13, 13)));

    let (status, report) = http(&router, "POST /v1/verify").await;
    assert_eq!(
        (status, &report["ok"], &report["differences"]),
        (200, &true.into(), &serde_json::json!([])),
        "{report}"
    );
    let (status, answer) = http(&router, "GET /v1/streams/s1").await;
    assert_eq!((status, &answer["state"], &answer["result"]["text"]), (200, &"done".into(), &"hello you".into()));
    assert_eq!(http(&router, "GET /v1/streams/nope").await.0, 404);
    assert_eq!(http(&router, "GET /v1/streams?state=sleepy").await.0, 400);
    assert_eq!(http(&router, "GET /readyz").await.0, 200);
    let (_, fleet) = http(&router, "GET /v1/fleet").await;
    assert_eq!(fleet["agents"][0]["name"], "greeter", "{fleet}");
    router.drain().await;
    router.stop().await.expect("seals");

    let offline = atp_router::verify::offline_verify(&Source::local(dir.path().join("log"))).expect("readable");
    assert!(offline.ok, "{:?}", offline.differences);
    let router = Router::start(config(dir.path())).await.expect("starts again");
    let (_, again) = http(&router, "GET /v1/streams/s1").await;
    assert_eq!(again["result"], answer["result"], "read back from the log");
    assert_eq!(again["bill"], answer["bill"]);
    let (_, report) = http(&router, "POST /v1/verify").await;
    assert_eq!(report["ok"], true, "{report}");
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn draining_refuses_what_is_new_and_ends_with_the_last_stream() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let mut agent = agent(&router, "slow").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "slow")).await;
    client.expect(kind::ACCEPTED).await;
    let call = agent.expect(kind::DISPATCH).await.stream_id;
    let drain = router.drain();
    tokio::pin!(drain);
    // One poll says it; the next submit comes behind it.
    assert!(tokio::time::timeout(Duration::ZERO, &mut drain).await.is_err());
    client.send(submit("s2", "slow")).await;
    let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
    assert_eq!(refused.code, Code::Draining, "{refused}");
    assert!(tokio::time::timeout(Duration::from_millis(20), &mut drain).await.is_err(), "s1 still runs");
    let last = AgentFinal { cost: Cost { out_tokens: Tokens(1), ..Cost::default() }, ..AgentFinal::default() };
    agent.send(Frame::json(&*call, 1, Flags::FIN, kind::RESULT_FINAL, &last)).await;
    drain.await;
    for wanted in [kind::RESULT_PARTIAL, kind::RESULT_FINAL, kind::BILL] {
        client.expect(wanted).await;
    }
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn a_data_dir_in_use_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let error = Router::start(config(dir.path())).await.err().expect("refused").to_string();
    assert!(error.contains("data_dir") && error.contains("another router"), "{error}");
    router.stop().await.expect("seals");
    let mut other = config(dir.path());
    other.listen.atp = "0.0.0.0:0".parse().expect("an address");
    assert!(Router::start(other).await.err().expect("refused").to_string().contains("listen.insecure"));
}

/// A client that doesn't read while more than its outbox holds is sent gets every chunk all the same, in order: what didn't
/// fit is read again from the log.
#[tokio::test]
async fn a_slow_client_misses_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = config(dir.path());
    config.settings.stream_window.limit = atp_proto::Limit::NONE;
    let router = Router::start(config).await.expect("starts");
    let mut agent = agent(&router, "talker").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = agent.expect(kind::DISPATCH).await.stream_id.to_string();
    let text = "x".repeat(100_000);
    let chunks = 140;
    for seq in 1..=chunks {
        let cost = Cost { in_tokens: Tokens(1), out_tokens: Tokens(seq), usd_micros: UsdMicros(seq) };
        let part = AgentPartial { text: Some(text.clone()), cost, ..AgentPartial::default() };
        agent.send(Frame::json(call.as_str(), seq, Flags::NONE, kind::RESULT_PARTIAL, &part)).await;
    }
    let cost = Cost { in_tokens: Tokens(1), out_tokens: Tokens(chunks), usd_micros: UsdMicros(chunks) };
    agent
        .send(Frame::json(
            call.as_str(),
            chunks + 1,
            Flags::FIN,
            kind::RESULT_FINAL,
            &AgentFinal { cost, ..AgentFinal::default() },
        ))
        .await;
    // The router knows the end, and the client has read nothing yet: more than 8 MiB wait.
    let ended = tokio::time::Instant::now() + Duration::from_secs(60);
    while http(&router, "GET /v1/streams/s1").await.1["state"] != "done" {
        assert!(tokio::time::Instant::now() < ended, "the task ends");
    }
    let (mut due, mut partials) = (2, 0);
    loop {
        let frame = client.next().await.expect("open");
        if frame.msg_seq == 0 || frame.msg_seq < due {
            continue;
        }
        assert_eq!(frame.msg_seq, due, "no gap");
        if frame.flags.has(Flags::MORE) {
            assert!(frame.content.len() <= 64 * 1024, "long messages go in fragments");
            partials += u64::from(&*frame.kind == kind::RESULT_PARTIAL);
            continue;
        }
        due += 1;
        partials += u64::from(&*frame.kind == kind::RESULT_PARTIAL);
        if &*frame.kind == kind::BILL {
            break;
        }
    }
    assert!(partials >= chunks, "{partials}");
    router.stop().await.expect("seals");
}

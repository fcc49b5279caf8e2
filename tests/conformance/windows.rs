//! Windows and pressure over the wire (rules 12-1 to 12-8); their milliseconds are checked in the core's own tests.

use crate::{agent, bill, capabilities, cost, last, partial};
use atp_proto::content::{AgentFinal, Final, Finish, Submit, TaskState, WindowUpdate};
use atp_proto::frame::kind;
use atp_proto::{CallId, Code, Flags, Frame, Qos};
use atp_sdk::{Client, ClientOptions, Dialer, EventKind, SubmitRequest};
use atp_tests::blackbox::peer::{Peer, at_home, submit, task};
use atp_tests::blackbox::process::Router;

/// At most two calls of an account at once; gold presses on others soon.
fn house() -> Router {
    Router::start(
        "log: {durability: async}\nlimits: {preempt_after: 50ms}\n\
         accounts: {default: {usd: 1, per: total, max_parallel: 2}}",
    )
}

fn with(qos: Qos, stream: &str, content: &Submit) -> Frame {
    Frame { qos: qos as u32, ..submit(stream, content) }
}

fn windows(client: &mut Peer, scope: &str) -> (Frame, WindowUpdate) {
    loop {
        let frame = client.expect(kind::WINDOW_UPDATE);
        let update: WindowUpdate = frame.read().expect("an update");
        if update.scope == scope {
            return (frame, update);
        }
    }
}

fn cancelled(call: CallId, seq: u64, out: u64) -> Frame {
    let end = AgentFinal { cost: cost(out), finish: Finish::Cancelled, ..AgentFinal::default() };
    Frame::json(call.to_string(), seq, Flags::FIN, kind::RESULT_FINAL, &end)
}

#[test]
fn atp_10_1_windows_of_stream_and_account_are_told_where_they_belong() {
    let router = house();
    let mut worker = agent(&router, "a-12-1");
    let mut client = Peer::client(router.atp());
    client.send(&submit("s", &task("a-12-1")));
    let (frame, update) = windows(&mut client, "tenant:default");
    assert!(frame.stream_id.is_empty() && frame.msg_seq == 0, "{frame:?}");
    assert_eq!((update.window.max_tokens, update.window.max_usd_micros.is_some()), (None, true), "no limit in tokens");
    let call = worker.dispatched().call_id;
    let (frame, update) = windows(&mut client, "stream:s");
    assert_eq!((&*frame.stream_id, frame.msg_seq), ("s", 0));
    // One of eight calls runs; what it holds is gone from 200,000 tokens.
    assert_eq!(update.window.max_parallel, Some(7));
    assert!(update.window.max_tokens.is_some_and(|t| t.0 < 200_000), "{update:?}");
    worker.send(&last(call, 1, 1));
    client.to_the_bill("s");
}

#[test]
fn atp_10_6_an_account_with_all_its_calls_in_flight_is_named() {
    let router = house();
    let mut worker = agent(&router, "a-12-6");
    let mut client = Peer::client(router.atp());
    let mut calls = Vec::new();
    // Where the account is at home; another shard would have to ask first.
    let home = at_home("default");
    let [one, two, three, four] = [1, 2, 3, 4].map(|n| format!("{home}.{n}"));
    for stream in [&one, &two] {
        client.send(&submit(stream, &task("a-12-6")));
        calls.push(worker.dispatched().call_id);
    }
    client.send(&submit(&three, &Submit { wait: false, ..task("a-12-6") }));
    let error = client.refused(&three);
    let facts = (error.code, error.scope.as_deref(), error.used, error.limit, error.retry_after_ms);
    assert_eq!(facts, (Code::Window, Some("tenant:default"), Some(2), Some(2), Some(1_000)), "{error}");
    client.send(&submit(&four, &Submit { deadline_ms: Some(300), ..task("a-12-6") }));
    let frames = client.to_the_bill(&four);
    let error = frames[frames.len() - 2].read::<Final>().unwrap().error.expect("an error");
    let facts = (error.code, error.scope.as_deref(), error.used, error.limit, error.retry_after_ms);
    assert_eq!(facts, (Code::Window, Some("tenant:default"), Some(2), Some(2), Some(1_000)), "{error}");
    calls.into_iter().for_each(|call| worker.send(&last(call, 1, 1)));
    client.to_the_bill(&two);
    router.settled();
}

#[test]
fn atp_10_8_bronze_gives_way_to_gold_and_is_billed_for_what_it_used() {
    let router = house();
    let one = atp_proto::content::Capabilities { max_parallel: 1, ..capabilities("a-12-8") };
    let mut worker = Peer::agent(router.atp(), &one);
    router.has_agent("a-12-8");
    let mut client = Peer::client(router.atp());
    client.send(&with(Qos::Bronze, "s.low", &task("a-12-8")));
    let low = worker.dispatched().call_id;
    worker.send(&partial(low, 1, "half ", 5));
    client.expect(kind::RESULT_PARTIAL);
    client.send(&with(Qos::Gold, "s.high", &task("a-12-8")));
    assert_eq!(&*worker.expect(kind::AGENT_CANCEL).stream_id, low.to_string());
    client.send(&with(Qos::Bronze, "s.new", &task("a-12-8")));
    let error = client.refused("s.new");
    assert_eq!(
        (error.code, error.scope.as_deref(), error.judged),
        (Code::Window, Some("qos:bronze"), false),
        "{error}"
    );
    assert!(error.retry_after_ms.is_some());
    worker.send(&cancelled(low, 2, 7));
    let frames = client.to_the_bill("s.low");
    let answer: Final = frames[frames.len() - 2].read().unwrap();
    assert_eq!((answer.state, answer.result.text.as_str()), (TaskState::Provisional, "half "));
    assert_eq!(answer.error.map(|e| e.code), Some(Code::Preempt));
    assert_eq!(bill(&frames).settled.tokens.0, 17, "to the token");
    let high = worker.dispatched().call_id;
    worker.send(&last(high, 1, 1));
    assert_eq!(bill(&client.to_the_bill("s.high")).state, TaskState::Done);
    router.settled();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atp_10_1_a_client_in_rust_sees_them() {
    let (router, worker) = tokio::task::spawn_blocking(|| {
        let router = house();
        let worker = agent(&router, "b-12-1");
        (router, worker)
    })
    .await
    .unwrap();
    let client = Client::connect(Dialer::tcp(router.atp().to_string()), ClientOptions::default()).await.unwrap();
    let request = SubmitRequest::new("t").stream_id(atp_proto::StreamId::new("s")).agents(["b-12-1"]);
    let mut stream = client.submit(request).await.unwrap();
    let mut scopes = std::collections::BTreeSet::new();
    while scopes.len() < 2 {
        if let EventKind::Window(update) = stream.next().await.expect("an event").unwrap().kind {
            scopes.insert(update.scope);
        }
    }
    assert_eq!(scopes.into_iter().collect::<Vec<_>>(), ["stream:s", "tenant:default"]);
    drop((worker, router));
}

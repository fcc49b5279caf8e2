//! Refusals (section 5): code, scope, limit, what was used, and the bounds of a submit at n and n + 1.

use crate::{agent, last, shared};
use atp_proto::content::{Final, Hello, Role, Submit, TaskState};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Code, Flags, Frame, Limit, Tokens, UsdMicros, WireError};
use atp_tests::blackbox::peer::{Peer, encoded, submit, task};
use atp_tests::blackbox::process::Router;
use std::collections::BTreeSet;

fn cancel(peer: &mut Peer, stream: &str) {
    peer.send(&Frame::raw(stream, 0, Flags::NONE, kind::TASK_CANCEL, "{}".into()));
    peer.to_the_bill(stream);
}

#[test]
fn atp_5_1_ebudget_names_scope_limit_and_use() {
    let router = shared();
    let _worker = agent(&router, "a-5-1");
    let mut client = Peer::client(router.atp());
    let budgets = [
        ("b-usd", Limit { usd_micros: Some(UsdMicros(3)), tokens: None }, 3),
        ("b-tokens", Limit { usd_micros: None, tokens: Some(Tokens(20)) }, 20),
    ];
    for (stream, budget, limit) in budgets {
        client.send(&submit(stream, &Submit { budget, ..task("a-5-1") }));
        let error = client.refused(stream);
        assert_eq!((error.code, error.limit, error.used), (Code::Budget, Some(limit), Some(0)), "{error:?}");
        assert!(error.judged && error.scope.is_some_and(|s| s.starts_with("stream:")), "{stream}");
        // Durable before it was said: the same again is refused in the same words.
        client.send(&submit(stream, &Submit { budget, ..task("a-5-1") }));
        assert_eq!(client.refused(stream).code, Code::Budget);
        let (status, row) = router.http("GET", &format!("/v1/streams/{stream}"));
        assert_eq!((status, &row["state"]), (200, &"refused".into()), "{row}");
    }
}

#[test]
fn atp_5_1_eagentdown_and_ewindow_for_who_will_not_wait() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    let hurried = |name: &str| Submit { wait: false, ..task(name) };
    client.send(&submit("down", &hurried("b-5-1")));
    let error = client.refused("down");
    assert_eq!((error.code, error.scope.as_deref()), (Code::AgentDown, Some("agent:b-5-1")), "{error}");

    let mut one = crate::capabilities("b-5-1");
    one.max_parallel = 1;
    let mut worker = Peer::agent(router.atp(), &one);
    router.has_agent("b-5-1");
    // Of one shard, by their names: another one would learn only from the agent that its slot is taken.
    client.send(&submit("pair.1", &hurried("b-5-1")));
    let call = worker.dispatched().call_id;
    client.send(&submit("pair.2", &hurried("b-5-1")));
    let error = client.refused("pair.2");
    let facts = (error.code, error.scope.as_deref(), error.used, error.limit);
    assert_eq!(facts, (Code::Window, Some("agent:b-5-1"), Some(1), Some(1)), "{error}");
    worker.send(&last(call, 1, 1));
    client.to_the_bill("pair.1");
}

#[test]
fn atp_5_1_who_will_not_wait_never_waits_also_in_a_burst() {
    let router = shared();
    let mut one = crate::capabilities("c-5-1");
    one.max_parallel = 1;
    let mut worker = Peer::agent(router.atp(), &one);
    router.has_agent("c-5-1");
    let mut client = Peer::client(router.atp());
    let id = |n: usize| format!("burst-{n}");
    // All of them in one write, so that most are judged before the slot is known to be taken.
    let hurried = Submit { wait: false, ..task("c-5-1") };
    let burst: Vec<u8> = (0..30).flat_map(|n| encoded(&submit(&id(n), &hurried))).collect();
    client.send_bytes(&burst);
    let call = worker.dispatched().call_id;
    // One runs. The others are told no while it does, before or after they were accepted.
    let mut told = BTreeSet::new();
    while told.len() < 29 {
        let frame = client.frame();
        let error = match &*frame.kind {
            kind::ERROR => Some(frame.read::<WireError>().unwrap()),
            kind::RESULT_FINAL => frame.read::<Final>().unwrap().error,
            _ => continue,
        };
        assert_eq!(error.map(|e| e.code), Some(Code::Window), "{frame:?}");
        assert!(told.insert(frame.stream_id.to_string()), "told twice");
    }
    worker.send(&last(call, 1, 1));
    loop {
        let frame = client.frame();
        if &*frame.kind == kind::RESULT_FINAL {
            assert_eq!(frame.read::<Final>().unwrap().state, TaskState::Done);
            assert!(!told.contains(&*frame.stream_id));
            return;
        }
    }
}

#[test]
fn atp_5_3_an_unknown_credential_is_eauth() {
    let router = shared();
    for (token, taken) in [("atp_nobody_has_this", false), ("eyJhbGciOi.eyJzdWIi.c2ln", false), ("sk-anything", true)] {
        let mut peer = crate::dial(router.atp());
        let hello = Hello { minor_max: 1, role: Role::Client, token: Some(token.into()), redirect: false };
        peer.send(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello));
        if taken {
            assert_eq!(&*peer.frame().kind, kind::HELLO);
        } else {
            let error = peer.closed();
            assert_eq!((error.code, error.judged), (Code::Auth, false), "{error}");
        }
    }
}

#[test]
fn atp_5_3_n_connections_are_served_and_one_more_is_elimit() {
    let router = Router::start("log: {durability: async}\nlimits: {connections: 2}");
    let first = Peer::client(router.atp());
    let mut second = Peer::client(router.atp());
    let error = crate::dial(router.atp()).closed();
    assert_eq!((error.code, error.limit, error.judged), (Code::Limit, Some(2), false), "{error}");
    second.send(&submit("still-served", &task("nobody")));
    second.expect(kind::ACCEPTED);
    // Who leaves makes room.
    drop(first);
    atp_tests::blackbox::wait_for("a free place", || Peer::hello(router.atp(), Role::Client).ok());
}

#[test]
fn atp_5_2_a_frame_that_is_not_judged_may_come_again() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    client.send(&Frame::raw("j-5-2", 1, Flags::SYN, kind::TASK_SUBMIT, r#"{"task":7}"#.into()));
    let error = client.refused("j-5-2");
    assert_eq!((error.code, error.judged), (Code::Proto, false), "{error}");
    client.send(&submit("j-5-2", &task("nobody")));
    client.expect(kind::ACCEPTED);
    cancel(&mut client, "j-5-2");
}

#[test]
fn atp_3_3_bounds_of_a_submit_at_n_and_one_more() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    let names = |n: usize| (0..n).map(|i| AgentName::new(&format!("nobody-{i}"))).collect::<Vec<_>>();
    let any = Submit { task: "t".into(), ..Submit::default() };
    let money = |n: u64| Limit { usd_micros: Some(UsdMicros(n)), tokens: Some(Tokens(n)) };
    let named = |n: usize| Submit { agents: names(n), ..any.clone() };
    let spread = |n: u32| Submit { fanout: Some(n), ..named(0) };
    let until = |ms: u64| Submit { deadline_ms: Some(ms), ..named(1) };
    let with = |n: u64| Submit { budget: money(n), ..named(1) };
    for (n, content) in [named(32), until(86_400_000), with(1_000_000_000_000)].iter().enumerate() {
        let stream = format!("bound-n-{n}");
        client.send(&submit(&stream, content));
        client.expect(kind::ACCEPTED);
        cancel(&mut client, &stream);
    }
    let past = [
        ("agents", named(33)),
        ("fanout", spread(33)),
        ("fanout", spread(0)),
        ("deadline_ms", until(86_400_001)),
        ("deadline_ms", until(0)),
        ("budget", with(1_000_000_000_001)),
        ("agents", Submit { agents: vec![AgentName::new("x"), AgentName::new("x")], ..any.clone() }),
        ("fanout", Submit { fanout: Some(1), ..named(1) }),
        ("strategy", Submit { strategy: Some("vote".into()), ..named(1) }),
    ];
    for (n, (field, content)) in past.iter().enumerate() {
        let stream = format!("bound-n1-{n}");
        client.send(&submit(&stream, content));
        let error = client.refused(&stream);
        assert!(error.code == Code::Proto && error.message.contains(field), "{field}: {error}");
    }
}

#[test]
fn atp_5_1_a_deadline_that_passes_names_what_was_waited_for() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    client.send(&submit("late", &Submit { deadline_ms: Some(50), ..task("nobody") }));
    let frames = client.to_the_bill("late");
    let answer: atp_proto::content::Final = frames[frames.len() - 2].read().unwrap();
    let error = answer.error.expect("an error");
    assert_eq!(error.code, Code::AgentDown, "{error}");
    assert!(error.message.contains("nobody"), "{error}");
}

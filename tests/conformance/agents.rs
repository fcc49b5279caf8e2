//! The agent's side (rules 3-2, 3-4, 4-1, 4-2): capabilities, dispatch, acks, coming back, and figures that no provider
//! states.

use crate::{agent, bill, capabilities, kinds, last, partial, shared};
use atp_proto::content::{
    Ack, AgentFinal, AgentPartial, BillCall, CallState, Dispatch, Final, ListedCall, Role, Source, TaskState,
};
use atp_proto::frame::kind;
use atp_proto::{AgentName, CallId, Code, Cost, Flags, Frame, Tokens, UsdMicros};
use atp_tests::blackbox::peer::{MODEL, Peer, submit, task};

/// The worst case of a call of these agents: what they were told that they may spend, and their reach.
fn hold_and_reach(call: &BillCall) -> u64 {
    call.grant.usd_micros.0 + capabilities("x").reach.usd_micros.0
}

/// Reads acks of a call until one reaches `msg_seq`.
fn acked(worker: &mut Peer, call: CallId, msg_seq: u64) {
    loop {
        let frame = worker.expect(kind::ACK);
        assert_eq!(&*frame.stream_id, call.to_string());
        if frame.read::<Ack>().expect("an ack").msg_seq >= msg_seq {
            return;
        }
    }
}

#[test]
fn atp_4_1_an_agent_says_its_capabilities_first() {
    let router = shared();
    let call = CallId([7; 10]);
    let status = Frame::raw("", 0, Flags::NONE, kind::STATUS, r#"{"status":"READY"}"#.into());
    for frame in [status, partial(call, 1, "x", 1)] {
        let (mut peer, _) = Peer::hello(router.atp(), Role::Agent).unwrap();
        peer.send(&frame);
        let error = peer.closed();
        assert!(error.code == Code::Proto && error.message.contains("control.capabilities"), "{error}");
    }
    for (name, incarnation) in
        [("", "i"), ("a b", "i"), (&*"n".repeat(65), "i"), ("fine", ""), ("fine", &*"i".repeat(65))]
    {
        let mut wrong = capabilities("x");
        wrong.agent = AgentName::new(name);
        wrong.incarnation = incarnation.into();
        let mut peer = Peer::agent(router.atp(), &wrong);
        assert_eq!(peer.closed().code, Code::Proto, "{name} {incarnation}");
    }
    let mut peer = Peer::agent(router.atp(), &capabilities(&"n".repeat(64)));
    peer.send(&Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities("other")));
    assert_eq!(peer.closed().code, Code::Proto, "one handle per connection");
}

#[test]
fn atp_3_2_a_dispatch_says_what_may_be_spent() {
    let router = shared();
    let mut worker = agent(&router, "a-3-2");
    let mut client = Peer::client(router.atp());
    client.send(&submit("p-3-2", &task("a-3-2")));
    let frame = worker.expect(kind::DISPATCH);
    assert!(frame.flags.has(Flags::SYN) && frame.msg_seq == 1, "{frame:?}");
    let dispatch: Dispatch = frame.read().unwrap();
    assert_eq!(&*frame.stream_id, dispatch.call_id.to_string());
    assert_eq!((dispatch.task.as_str(), dispatch.go_on), ("review", false));
    assert_eq!(dispatch.model.as_deref(), Some(MODEL));
    // 100 out as declared, and the prompt or the 100 in that are declared, whichever is more, at 4 and 1 USD per million.
    let (tokens, usd) = (dispatch.grant.tokens.0, dispatch.grant.usd_micros.0);
    assert!(tokens >= 200 && usd == 400 + (tokens - 100), "{tokens} {usd}");
    assert!(dispatch.deadline_ms > 0 && dispatch.max_output_tokens.is_some() && !dispatch.upstream_key.is_empty());
    worker.send(&last(dispatch.call_id, 1, 1));
    client.to_the_bill("p-3-2");
}

#[test]
fn atp_3_4_what_is_durable_is_acknowledged_also_the_second_time() {
    let router = shared();
    let mut worker = agent(&router, "a-3-4");
    let mut client = Peer::client(router.atp());
    client.send(&submit("k-3-4", &task("a-3-4")));
    let Dispatch { call_id: call, shard, epoch, .. } = worker.dispatched();
    worker.send(&partial(call, 1, "one ", 1));
    acked(&mut worker, call, 1);
    worker.send(&last(call, 2, 2));
    acked(&mut worker, call, 2);
    let frames = client.to_the_bill("k-3-4");
    // A final whose ack was lost comes again over another connection.
    drop(worker);
    let mut back = capabilities("a-3-4");
    let stranger = CallId([9; 10]);
    let listed = ListedCall { call_id: call, shard, epoch, msg_seq: 2, cost: crate::cost(2), done: true };
    back.calls = vec![listed.clone(), ListedCall { call_id: stranger, msg_seq: 1, ..listed }];
    let mut worker = Peer::agent(router.atp(), &back);
    // A call that its shard doesn't know is forgotten there; one on no list has no shard, and is ignored.
    acked(&mut worker, stranger, 1);
    worker.send(&last(CallId([8; 10]), 1, 2));
    worker.send(&last(stranger, 1, 2));
    acked(&mut worker, stranger, 1);
    worker.send(&last(call, 2, 2));
    acked(&mut worker, call, 2);
    let (_, now) = router.http("GET", "/v1/streams/k-3-4/bill");
    assert_eq!(now["settled"]["usd_micros"], bill(&frames).settled.usd_micros.0, "billed once");
}

#[test]
fn atp_3_2_an_agent_that_comes_back_goes_on_with_its_call() {
    let router = shared();
    let mut worker = agent(&router, "b-3-2");
    let mut client = Peer::client(router.atp());
    client.send(&submit("g-3-2", &task("b-3-2")));
    let first = worker.dispatched();
    let call = first.call_id;
    worker.send(&partial(call, 1, "before ", 5));
    client.expect(kind::RESULT_PARTIAL);
    drop(worker);
    let mut back = capabilities("b-3-2");
    let listed = ListedCall {
        call_id: call,
        shard: first.shard,
        epoch: first.epoch,
        msg_seq: 1,
        cost: crate::cost(5),
        done: false,
    };
    back.calls.push(listed);
    let mut worker = Peer::agent(router.atp(), &back);
    let asked = worker.dispatched();
    assert_eq!((asked.call_id, asked.go_on), (call, true), "a question, not a second dispatch");
    // What it isn't sure of it says again.
    worker.send(&partial(call, 1, "before ", 5));
    worker.send(&last(call, 2, 8));
    let frames = client.to_the_bill("g-3-2");
    assert_eq!(frames[frames.len() - 2].read::<Final>().unwrap().result.text, "before end");
    let bill = bill(&frames);
    assert_eq!((bill.calls.len(), bill.calls[0].source), (1, Some(Source::Reported)));
}

#[test]
fn atp_4_1_a_second_incarnation_is_refused_while_the_first_answers() {
    let router = shared();
    let mut worker = agent(&router, "c-4-1");
    let mut second = capabilities("c-4-1");
    second.incarnation = "second".into();
    let mut refused = Peer::agent(router.atp(), &second);
    let error = refused.closed();
    assert_eq!((error.code, error.scope.as_deref()), (Code::Sec, Some("agent:c-4-1")), "{error}");
    let mut client = Peer::client(router.atp());
    client.send(&submit("i-4-1", &task("c-4-1")));
    let call = worker.dispatched().call_id;
    // The first one is lost: the second one is taken, and the call of the first is lost with it.
    drop(worker);
    let mut worker = loop {
        let mut peer = Peer::agent(router.atp(), &second);
        // Refused as long as the router hasn't seen the end of the first one.
        if let Some(dispatch) = peer.try_dispatched(atp_tests::blackbox::process::LOOK) {
            assert!(!dispatch.go_on && dispatch.call_id != call, "{dispatch:?}");
            peer.send(&last(dispatch.call_id, 1, 1));
            break peer;
        }
    };
    let bill = bill(&client.to_the_bill("i-4-1"));
    let sources: Vec<Option<Source>> = bill.calls.iter().map(|c| c.source).collect();
    assert_eq!(sources, [Some(Source::UnknownAtHold), Some(Source::Reported)]);
    assert_eq!(bill.calls[1].retry_of, Some(call));
    assert_eq!((bill.calls[0].actual.usd_micros.0, bill.state), (hold_and_reach(&bill.calls[0]), TaskState::Done));
    worker.send(&Frame::heartbeat(false));
}

#[test]
fn atp_3_3_a_cost_that_no_provider_states_settles_at_the_worst_case() {
    let router = shared();
    let mut worker = agent(&router, "a-3-3");
    let mut client = Peer::client(router.atp());
    let wrong = [
        r#"{"text":"x","cost":{"in_tokens":1,"out_tokens":1,"usd_micros":NaN}}"#,
        r#"{"text":"x","cost":{"in_tokens":-1,"out_tokens":1,"usd_micros":1}}"#,
        r#"{"text":"x","cost":{"in_tokens":1,"out_tokens":1,"usd_micros":1e400}}"#,
        r#"{"text":"x","cost":{"in_tokens":1,"out_tokens":1,"usd_micros":1000000000001}}"#,
        r#"{"text": "half a"#,
    ];
    for (n, content) in wrong.into_iter().enumerate() {
        let stream = format!("w-3-3-{n}");
        client.send(&submit(&stream, &task("a-3-3")));
        let call = worker.dispatched().call_id;
        let frame = Frame::raw(call.to_string(), 1, Flags::NONE, kind::RESULT_PARTIAL, content.into());
        worker.send(&frame);
        // The lane is lost, its money counts as spent, and the task goes on with the next lane.
        let second = worker.dispatched();
        assert_ne!(second.call_id, call);
        worker.send(&last(second.call_id, 1, 5));
        let frames = client.to_the_bill(&stream);
        let bill = bill(&frames);
        assert_eq!(bill.state, TaskState::Done, "{content}");
        let first = &bill.calls[0];
        assert_eq!((first.state, first.source), (CallState::Settled, Some(Source::UnknownAtHold)), "{content}");
        assert_eq!(first.actual.usd_micros.0, hold_and_reach(first), "{content}");
        assert!(kinds(&frames).contains(&kind::RESULT_FINAL));
    }
}

#[test]
fn atp_3_3_running_totals_never_fall() {
    let router = shared();
    let mut worker = agent(&router, "b-3-3");
    let mut client = Peer::client(router.atp());
    client.send(&submit("t-3-3", &task("b-3-3")));
    let call = worker.dispatched().call_id;
    worker.send(&partial(call, 1, "a", 40));
    worker.send(&partial(call, 2, "b", 20));
    let end = AgentFinal { cost: crate::cost(20), ..AgentFinal::default() };
    worker.send(&Frame::json(call.to_string(), 3, Flags::FIN, kind::RESULT_FINAL, &end));
    let frames = client.to_the_bill("t-3-3");
    let shown: Vec<u64> = frames
        .iter()
        .filter(|f| &*f.kind == kind::RESULT_PARTIAL)
        .map(|f| f.read::<atp_proto::content::Partial>().unwrap().cost.out_tokens.0)
        .collect();
    assert_eq!(shown, [40, 40, 40]);
    assert_eq!(bill(&frames).settled.usd_micros.0, 10 + 4 * 40);
}

#[test]
fn atp_3_3_the_larger_of_price_and_statement_is_booked() {
    let router = shared();
    let mut worker = agent(&router, "c-3-3");
    let mut client = Peer::client(router.atp());
    for (stream, stated, booked) in [("cheap", 1, 50), ("dear", 90, 90)] {
        client.send(&submit(stream, &task("c-3-3")));
        let call = worker.dispatched().call_id;
        let cost = Cost { in_tokens: Tokens(10), out_tokens: Tokens(10), usd_micros: UsdMicros(stated) };
        let part = AgentPartial { text: Some("x".into()), cost, ..AgentPartial::default() };
        worker.send(&Frame::json(call.to_string(), 1, Flags::NONE, kind::RESULT_PARTIAL, &part));
        let end = AgentFinal { cost, ..AgentFinal::default() };
        worker.send(&Frame::json(call.to_string(), 2, Flags::FIN, kind::RESULT_FINAL, &end));
        assert_eq!(bill(&client.to_the_bill(stream)).settled.usd_micros.0, booked, "{stream}");
    }
}

#[test]
fn atp_3_2_a_refusal_with_proof_costs_nothing() {
    let router = shared();
    let mut worker = agent(&router, "d-3-2");
    let mut client = Peer::client(router.atp());
    client.send(&submit("v-3-2", &task("d-3-2")));
    let call = worker.dispatched().call_id;
    let refusal = r#"{"code":"EWINDOW_AGENT","message":"full","retry_after_ms":1,"proof":"not_called"}"#;
    worker.send(&Frame::raw(call.to_string(), 1, Flags::RST, kind::ERROR, refusal.into()));
    let second = worker.dispatched().call_id;
    assert_ne!(second, call);
    worker.send(&last(second, 1, 5));
    let bill = bill(&client.to_the_bill("v-3-2"));
    assert_eq!((bill.calls[0].state, bill.calls[0].actual.usd_micros.0), (CallState::Void, 0));
    assert_eq!((bill.calls[1].retry_of, bill.settled.usd_micros.0), (Some(call), 30));
}

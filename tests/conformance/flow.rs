//! How an agent is given work (rules 9-8 to 9-12): what it says of itself stops or narrows what it gets, a refusal moves the
//! call, and an operator's drain outlives the router.

use crate::{agent, bill, capabilities, last, shared};
use atp_proto::content::{AgentStatus, CallState, Dispatch, Status, Submit, TaskState, WindowView};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Flags, Frame};
use atp_tests::blackbox::atp;
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::{LOOK, Router};

fn says(worker: &mut Peer, status: Status) {
    let status = AgentStatus { status, reason: Some("test".into()), ..AgentStatus::default() };
    worker.send(&Frame::json("", 0, Flags::NONE, kind::STATUS, &status));
}

/// Waits until the router shows the agent's status.
fn shown(router: &Router, name: &str, status: &str) -> serde_json::Value {
    loop {
        let (_, document) = router.http("GET", &format!("/v1/agents/{name}"));
        if document["agents"][0]["status"] == status {
            return document["agents"][0].clone();
        }
    }
}

/// True if no dispatch comes within a look.
fn idle(worker: &mut Peer) -> bool {
    loop {
        match worker.try_next(LOOK) {
            Ok(Some(frame)) if &*frame.kind == kind::DISPATCH => return false,
            Ok(Some(_)) => {}
            Ok(None) => panic!("the router closed"),
            Err(_) => return true,
        }
    }
}

#[test]
fn atp_8_9_pause_stops_dispatches_until_ready() {
    let router = shared();
    let mut worker = agent(&router, "a-9-9");
    let mut client = Peer::client(router.atp());
    client.send(&submit("p-9-9-1", &task("a-9-9")));
    let running = worker.dispatched().call_id;
    let pause = AgentStatus { status: Status::Pause, retry_after_ms: Some(1), ..AgentStatus::default() };
    worker.send(&Frame::json("", 0, Flags::NONE, kind::STATUS, &pause));
    shown(&router, "a-9-9", "PAUSE");
    client.send(&submit("p-9-9-2", &task("a-9-9")));
    assert!(idle(&mut worker), "its time is over, but it hasn't said so");
    worker.send(&last(running, 1, 1));
    client.to_the_bill("p-9-9-1");
    says(&mut worker, Status::Ready);
    let call = worker.dispatched().call_id;
    worker.send(&last(call, 1, 1));
    assert_eq!(bill(&client.to_the_bill("p-9-9-2")).state, TaskState::Done);
}

#[test]
fn atp_8_8_the_suggested_window_bounds_what_runs() {
    let router = shared();
    let mut worker = agent(&router, "a-9-8");
    let mut client = Peer::client(router.atp());
    let window = WindowView { max_parallel: Some(1), ..WindowView::default() };
    let busy = AgentStatus { status: Status::Busy, suggested_window: Some(window), ..AgentStatus::default() };
    worker.send(&Frame::json("", 0, Flags::NONE, kind::STATUS, &busy));
    let row = shown(&router, "a-9-8", "BUSY");
    assert_eq!(
        (&row["window"]["agent"]["max_parallel"], &row["window"]["effective"]["max_parallel"]),
        (&1.into(), &1.into())
    );
    for stream in ["w-9-8-1", "w-9-8-2"] {
        client.send(&submit(stream, &task("a-9-8")));
    }
    let first = worker.dispatched().call_id;
    assert!(idle(&mut worker), "one at once");
    worker.send(&last(first, 1, 1));
    let second = worker.dispatched().call_id;
    // Zero lets nothing through, and what runs goes on.
    let none = WindowView { max_tokens: Some(atp_proto::Tokens(0)), ..WindowView::default() };
    let shut = AgentStatus { status: Status::Busy, suggested_window: Some(none), ..AgentStatus::default() };
    worker.send(&Frame::json("", 0, Flags::NONE, kind::STATUS, &shut));
    worker.send(&last(second, 1, 1));
    client.send(&submit("w-9-8-3", &task("a-9-8")));
    assert!(idle(&mut worker), "no tokens");
    says(&mut worker, Status::Ready);
    let third = worker.dispatched().call_id;
    worker.send(&last(third, 1, 1));
    client.to_the_bill("w-9-8-3");
}

#[test]
fn atp_8_9_draining_takes_nothing_new_and_finishes() {
    let router = shared();
    let mut worker = agent(&router, "b-9-9");
    let mut client = Peer::client(router.atp());
    client.send(&submit("d-9-9-1", &task("b-9-9")));
    let call = worker.dispatched().call_id;
    says(&mut worker, Status::Draining);
    let row = shown(&router, "b-9-9", "DRAINING");
    assert_eq!(row["reason"], "test");
    client.send(&submit("d-9-9-2", &task("b-9-9")));
    assert!(idle(&mut worker));
    worker.send(&last(call, 1, 1));
    assert_eq!(bill(&client.to_the_bill("d-9-9-1")).state, TaskState::Done);
    says(&mut worker, Status::Ready);
    let call = worker.dispatched().call_id;
    worker.send(&last(call, 1, 1));
    client.to_the_bill("d-9-9-2");
}

#[test]
fn atp_8_10_a_refused_call_goes_to_another_agent_with_its_money() {
    for code in ["EWINDOW_AGENT", "EDRAINING"] {
        let router = Router::start("log: {durability: async}");
        let mut workers = [agent(&router, "one"), agent(&router, "two")];
        let mut client = Peer::client(router.atp());
        let any = Submit { task: "review".into(), ..Submit::default() };
        client.send(&submit("r-9-10", &any));
        let first: Dispatch = workers[0].dispatched();
        let refusal = format!(r#"{{"code":"{code}","message":"full","retry_after_ms":600000,"proof":"not_called"}}"#);
        workers[0].send(&Frame::raw(first.call_id.to_string(), 1, Flags::RST, kind::ERROR, refusal.into()));
        let second = workers[1].dispatched();
        assert_eq!(second.grant, first.grant, "{code}");
        workers[1].send(&last(second.call_id, 1, 5));
        let bill = bill(&client.to_the_bill("r-9-10"));
        assert_eq!((bill.calls[0].state, bill.calls[1].retry_of), (CallState::Void, Some(first.call_id)), "{code}");
        // Nothing else goes to the one that refused.
        client.send(&submit("s-9-10", &any));
        let call = workers[1].dispatched().call_id;
        workers[1].send(&last(call, 1, 5));
        client.to_the_bill("s-9-10");
        assert!(idle(&mut workers[0]), "{code}");
    }
}

#[test]
fn atp_8_11_a_status_outlives_the_router() {
    let mut router = Router::start("");
    let mut worker = agent(&router, "keeps");
    says(&mut worker, Status::Pause);
    shown(&router, "keeps", "PAUSE");
    router.kill();
    router.restart();
    drop(worker);
    let mut worker = agent(&router, "keeps");
    assert_eq!(shown(&router, "keeps", "PAUSE")["reason"], "test");
    let mut client = Peer::client(router.atp());
    client.send(&submit("k-8-11", &task("keeps")));
    assert!(idle(&mut worker), "the same incarnation said PAUSE");
    drop(worker);
    let mut other = capabilities("keeps");
    other.incarnation = "second".into();
    let mut worker = loop {
        // Refused as long as the router hasn't seen the end of the first one.
        let mut peer = Peer::agent(router.atp(), &other);
        if let Some(dispatch) = peer.try_dispatched(LOOK) {
            peer.send(&last(dispatch.call_id, 1, 1));
            break peer;
        }
    };
    assert_eq!(bill(&client.to_the_bill("k-8-11")).state, TaskState::Done);
    worker.send(&Frame::heartbeat(false));
}

#[test]
fn atp_8_12_an_operators_drain_outlives_the_router_until_it_is_undone() {
    let mut router = Router::start("");
    let (status, _) = router.http("POST", "/v1/agents/nobody/drain");
    assert_eq!(status, 404);
    let mut worker = agent(&router, "drained");
    let (_, fleet) = router.http("GET", "/v1/fleet");
    let url = format!("http://{}", fleet["router"]["http"].as_str().expect("an address"));
    let row = atp::run_json(&["--url", &url, "drain", "agent", "drained"]);
    assert_eq!((&row["status"], &row["drained"]), (&"DRAINING".into(), &true.into()), "{row}");
    says(&mut worker, Status::Ready);
    let mut client = Peer::client(router.atp());
    client.send(&submit("o-8-12", &task("drained")));
    assert!(idle(&mut worker), "whatever it says itself");
    router.kill();
    router.restart();
    drop(worker);
    let mut worker = agent(&router, "drained");
    shown(&router, "drained", "DRAINING");
    assert!(idle(&mut worker), "the log knows");
    let (_, fleet) = router.http("GET", "/v1/fleet");
    let url = format!("http://{}", fleet["router"]["http"].as_str().expect("an address"));
    let row = atp::run_json(&["--url", &url, "drain", "agent", "drained", "--undo"]);
    assert_eq!((&row["status"], &row["drained"]), (&"READY".into(), &false.into()), "{row}");
    let call = worker.dispatched().call_id;
    worker.send(&last(call, 1, 1));
    // Its client's connection broke with the router: the same frame again is told the same stream's end.
    let mut client = Peer::client(router.atp());
    client.send(&submit("o-8-12", &task("drained")));
    let bill = bill(&client.to_the_bill("o-8-12"));
    assert_eq!((bill.state, &bill.calls[0].agent), (TaskState::Done, &AgentName::new("drained")));
}

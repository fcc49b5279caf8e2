//! The same again (rules 4-4, 4-8, 4-13, 4-14): one answer per stream id, one piece of work per idempotency key.

use crate::{agent, last, partial, shared, whole_task};
use atp_proto::content::{Accepted, Resume, Submit, TaskCancel, TaskState};
use atp_proto::frame::{Meta, kind};
use atp_proto::id::stream_of_key;
use atp_proto::{Code, Flags, Frame, Limit, StreamId, UsdMicros};
use atp_tests::blackbox::peer::{Peer, submit, submit_by_key, task};

#[test]
fn atp_4_13_a_repeated_syn_gets_the_same_frames_and_runs_nothing() {
    let router = shared();
    let mut worker = agent(&router, "a-4-13");
    let mut client = Peer::client(router.atp());
    let frames = whole_task(&mut client, &mut worker, "a-4-13", "d-4-13");
    for _ in 0..3 {
        client.send(&submit("d-4-13", &task("a-4-13")));
        assert_eq!(client.to_the_bill("d-4-13"), frames);
    }
    let mut other = Peer::client(router.atp());
    other.send(&submit("d-4-13", &task("a-4-13")));
    assert_eq!(other.to_the_bill("d-4-13"), frames);
    // What a hop or a tracer changes is no other content.
    let meta = Meta { traceparent: "00-1-2-01".into(), ..Meta::default() };
    let traced = Frame { session_id: "s-9".into(), meta: Some(Box::new(meta)), ..submit("d-4-13", &task("a-4-13")) };
    other.send(&traced);
    assert_eq!(other.to_the_bill("d-4-13"), frames);
    // The next dispatch is the next task's: nothing ran in between.
    whole_task(&mut client, &mut worker, "a-4-13", "d-4-13-next");
}

#[test]
fn atp_4_8_duplicates_while_it_runs_change_nothing() {
    let router = shared();
    let mut worker = agent(&router, "a-4-8");
    let mut client = Peer::client(router.atp());
    for _ in 0..5 {
        client.send(&submit("d-4-8", &task("a-4-8")));
    }
    let call = worker.dispatched().call_id;
    worker.send(&partial(call, 1, "one ", 5));
    client.send(&submit("d-4-8", &task("a-4-8")));
    worker.send(&partial(call, 1, "one ", 5));
    worker.send(&last(call, 2, 6));
    worker.send(&last(call, 2, 6));
    // Its frames come again with each repetition; which ones, the numbers say.
    let frames = client.to_the_bill("d-4-8");
    let bill = crate::bill(&frames);
    assert_eq!((bill.calls.len(), bill.settled.tokens.0), (1, 16));
    for pair in frames.iter().flat_map(|a| frames.iter().map(move |b| (a, b))) {
        assert!(pair.0.msg_seq != pair.1.msg_seq || pair.0 == pair.1, "one number, one message");
    }
    whole_task(&mut client, &mut worker, "a-4-8", "d-4-8-next");
}

#[test]
fn atp_4_13_other_content_under_a_used_id_is_refused() {
    let router = shared();
    let mut worker = agent(&router, "b-4-13");
    let mut client = Peer::client(router.atp());
    let frames = whole_task(&mut client, &mut worker, "b-4-13", "o-4-13");
    let same = task("b-4-13");
    let others = [
        Submit { task: "another".into(), ..same.clone() },
        Submit { deadline_ms: Some(7_000), ..same.clone() },
        Submit { budget: Limit { usd_micros: Some(UsdMicros(5_000)), tokens: None }, ..same.clone() },
    ];
    for other in others {
        client.send(&submit("o-4-13", &other));
        assert_eq!(client.refused("o-4-13").code, Code::Idempotency);
    }
    client.send(&Frame { qos: 1, ..submit("o-4-13", &same) });
    assert_eq!(client.refused("o-4-13").code, Code::Idempotency);
    client.send(&submit("o-4-13", &same));
    assert_eq!(client.to_the_bill("o-4-13"), frames, "the stream itself is as it was");
}

#[test]
fn atp_4_4_a_keys_stream_id_follows_from_the_key() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    let by_key = submit_by_key("k-4-4", 1, &task("nobody"));
    let prefix = stream_of_key("k-4-4", 1).as_str().strip_suffix(".1").unwrap().to_owned();
    for id in ["mine", &format!("{prefix}.0"), &format!("{prefix}.01"), &format!("{prefix}.x"), &prefix] {
        client.send(&Frame { stream_id: id.into(), ..by_key.clone() });
        let error = client.refused(id);
        assert!(error.code == Code::Proto && error.message.contains("stream_id"), "{id}: {error}");
    }
    for (bytes, taken) in [(256, true), (257, false)] {
        let key = "k".repeat(bytes);
        let frame = submit_by_key(&key, 1, &task("nobody"));
        client.send(&frame);
        if taken {
            client.expect(kind::ACCEPTED);
            client.send(&Frame::raw(&*frame.stream_id, 0, atp_proto::Flags::NONE, kind::TASK_CANCEL, "{}".into()));
            client.to_the_bill(&frame.stream_id);
        } else {
            let error = client.refused(&frame.stream_id);
            assert!(error.message.contains("idempotency_key"), "{error}");
        }
    }
}

#[test]
fn atp_4_13_a_new_try_attaches_to_the_keys_stream() {
    let router = shared();
    let mut worker = agent(&router, "c-4-13");
    let mut client = Peer::client(router.atp());
    let content = task("c-4-13");
    let first = stream_of_key("k-4-13", 1);
    client.send(&submit_by_key("k-4-13", 1, &content));
    client.expect(kind::ACCEPTED);
    let call = worker.dispatched().call_id;
    let mut other = Peer::client(router.atp());
    let attached = |peer: &mut Peer, number| {
        let try_ = submit_by_key("k-4-13", number, &content);
        peer.send(&try_);
        let frame = peer.expect(kind::ACCEPTED);
        assert_eq!((frame.stream_id.clone(), frame.msg_seq), (try_.stream_id, 0), "it answers the new try");
        let accepted: Accepted = frame.read().unwrap();
        assert_eq!(accepted.stream_id, first.as_str(), "and names the key's stream");
        accepted.state
    };
    assert_eq!(attached(&mut other, 2), TaskState::Running);
    worker.send(&last(call, 1, 5));
    let frames = client.to_the_bill(first.as_str());
    let followed = other.to_the_bill(first.as_str());
    assert_eq!(followed.last(), frames.last());
    // Closed, and a call was dispatched: still that stream.
    assert_eq!(attached(&mut other, 3), TaskState::Done);
    assert_eq!(other.to_the_bill(first.as_str()).last(), frames.last());
    // Other content under the key.
    client.send(&submit_by_key("k-4-13", 4, &Submit { task: "another".into(), ..content.clone() }));
    assert_eq!(client.refused(stream_of_key("k-4-13", 4).as_str()).code, Code::Idempotency);
}

#[test]
fn atp_4_13_a_refusal_belongs_to_the_stream_id_and_work_to_the_key() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    let content = Submit { wait: false, ..task("d-4-13") };
    let first = stream_of_key("r-4-13", 1);
    client.send(&submit_by_key("r-4-13", 1, &content));
    let refused = client.refused(first.as_str());
    assert_eq!((refused.code, refused.judged), (Code::AgentDown, true), "{refused}");
    let mut worker = agent(&router, "d-4-13");
    // The agent is here now, and the same SYN is refused as before.
    client.send(&submit_by_key("r-4-13", 1, &content));
    assert_eq!(client.refused(first.as_str()), refused);
    // A new stream id under the key is a fresh try.
    let second = stream_of_key("r-4-13", 2);
    client.send(&submit_by_key("r-4-13", 2, &content));
    let call = worker.dispatched().call_id;
    worker.send(&last(call, 1, 5));
    let frames = client.to_the_bill(second.as_str());
    assert_eq!(crate::bill(&frames).state, TaskState::Done);
}

#[test]
fn atp_4_14_an_attachment_is_not_kept_and_the_named_stream_is_resumed() {
    let router = shared();
    let content = task("nobody-4-14");
    let (first, second) = (stream_of_key("a-4-14", 1), stream_of_key("a-4-14", 2));
    let mut client = Peer::client(router.atp());
    let named = |peer: &mut Peer, number| {
        peer.send(&submit_by_key("a-4-14", number, &content));
        let frame = peer.expect(kind::ACCEPTED);
        (frame.msg_seq, frame.read::<Accepted>().unwrap().stream_id)
    };
    let cancel = |peer: &mut Peer, id: &StreamId| {
        let reason = TaskCancel { reason: None };
        peer.send(&Frame::json(id.as_str(), 0, Flags::NONE, kind::TASK_CANCEL, &reason));
        peer.to_the_bill(id.as_str())
    };
    assert_eq!(named(&mut client, 1), (1, first.as_str().to_owned()));
    let mut other = Peer::client(router.atp());
    assert_eq!(named(&mut other, 2), (0, first.as_str().to_owned()));
    drop(other);
    // It ends without a dispatched call while the other one is away.
    cancel(&mut client, &first);
    let mut other = Peer::client(router.atp());
    let resume = Resume { token: None, after: 0 };
    other.send(&Frame::json(first.as_str(), 0, Flags::SYN, kind::RESUME, &resume));
    let frames = other.to_the_bill(first.as_str());
    assert_eq!(crate::bill(&frames).state, TaskState::Cancelled);
    // Its own SYN is a fresh try now.
    assert_eq!(named(&mut other, 2), (1, second.as_str().to_owned()));
    cancel(&mut other, &second);
}

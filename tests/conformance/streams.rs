//! A client's stream from SYN to FIN (rules 4-2, 4-3, 4-11, 4-12): numbers, ids, resume from any point, cancel.

use crate::{STREAMS, agent, bill, kinds, last, partial, shared, whole_task};
use atp_proto::content::{Accepted, CallState, Final, Partial, Resume, Submit, TaskState};
use atp_proto::frame::kind;
use atp_proto::{CallId, Code, Flags, Frame, StreamId, TenantId, WireError};
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::Router;
use atp_tests::blackbox::{PATIENCE, wait_for};
use std::io::ErrorKind;

fn resume(stream: &str, after: u64) -> Frame {
    Frame::json(stream, 0, Flags::SYN, kind::RESUME, &Resume { token: None, after })
}

fn cancel(stream: &str) -> Frame {
    Frame::raw(stream, 0, Flags::NONE, kind::TASK_CANCEL, r#"{"reason":"enough"}"#.into())
}

#[test]
fn atp_4_2_a_stream_is_numbered_from_one_without_a_gap() {
    let router = shared();
    let mut worker = agent(&router, "a-4-2");
    let mut client = Peer::client(router.atp());
    let frames = whole_task(&mut client, &mut worker, "a-4-2", "n-4-2");
    let numbers: Vec<u64> = frames.iter().map(|f| f.msg_seq).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    let p = kind::RESULT_PARTIAL;
    assert_eq!(kinds(&frames), [kind::ACCEPTED, p, p, p, kind::RESULT_FINAL, kind::BILL]);
    assert!(frames[0].flags.has(Flags::SYN.with(Flags::ACK)));
    let fins: Vec<bool> = frames.iter().map(|f| f.flags.has(Flags::FIN)).collect();
    assert_eq!(fins, [false, false, false, false, false, true], "FIN is the bill's");
    let ends: Vec<Option<String>> = frames[1..4].iter().map(|f| f.read::<Partial>().unwrap().ended).collect();
    assert_eq!(ends, [None, None, Some("complete".into())], "the last of a lane says how it ended");
    let answer: Final = frames[4].read().unwrap();
    assert_eq!((answer.state, answer.result.text.as_str()), (TaskState::Done, "one two end"));
    let bill = bill(&frames);
    // 10 in, 15 out at 1 and 4 USD per million.
    assert_eq!((bill.settled.tokens.0, bill.settled.usd_micros.0), (25, 70));
}

#[test]
fn atp_4_3_ids_have_1_to_64_safe_bytes() {
    let router = shared();
    let mut worker = agent(&router, "a-4-3");
    let mut client = Peer::client(router.atp());
    for id in ["i", &"i".repeat(64), "A-Za-z0-9._-"] {
        client.send(&submit(id, &task("a-4-3")));
        let call = worker.dispatched().call_id;
        assert_eq!(call, CallId::of(&TenantId::new("default"), &StreamId::new(id), 1));
        worker.send(&last(call, 1, 1));
        client.to_the_bill(id);
    }
    for id in [&"i".repeat(65), "a/b", "ä", "a b", "a\n"] {
        let mut client = Peer::client(router.atp());
        client.send(&submit(id, &task("nobody")));
        let error = client.closed();
        assert!(error.code == Code::Proto && error.message.contains("stream_id"), "{id}: {error}");
    }
}

#[test]
fn atp_4_11_a_stream_is_resumed_from_any_point_also_when_it_is_closed() {
    let router = shared();
    let mut worker = agent(&router, "a-4-11");
    let mut client = Peer::client(router.atp());
    client.send(&submit("r-4-11", &task("a-4-11")));
    let call = worker.dispatched().call_id;
    // Watched while it runs, from each point that exists.
    let mut watchers = Vec::new();
    let mut seen = vec![client.expect(kind::ACCEPTED)];
    // More than the router keeps in memory.
    for seq in 1..=40 {
        worker.send(&partial(call, seq, "x", seq));
        seen.push(client.expect(kind::RESULT_PARTIAL));
        if seq % 8 == 0 {
            for after in [0, seq / 2, seq + 1] {
                let mut watcher = Peer::client(router.atp());
                watcher.send(&resume("r-4-11", after));
                let accepted = watcher.expect(kind::ACCEPTED);
                assert!(accepted.msg_seq == 0 && accepted.flags.has(Flags::SYN.with(Flags::ACK)), "{accepted:?}");
                let accepted: Accepted = accepted.read().unwrap();
                assert_eq!((accepted.stream_id.as_str(), accepted.state), ("r-4-11", TaskState::Running));
                watchers.push((after, watcher));
            }
        }
    }
    worker.send(&last(call, 41, 41));
    seen.extend(client.to_the_bill("r-4-11"));
    for (after, mut watcher) in watchers {
        assert_eq!(watcher.to_the_bill("r-4-11"), seen[after as usize..], "watched after {after}");
    }
    for after in 0..seen.len() {
        client.send(&resume("r-4-11", after as u64));
        assert_eq!(client.to_the_bill("r-4-11"), seen[after..], "resumed after {after}");
    }
    // Behind the end there is nothing but the state.
    client.send(&resume("r-4-11", seen.len() as u64));
    let accepted: Accepted = client.expect(kind::ACCEPTED).read().unwrap();
    assert_eq!(accepted.state, TaskState::Done);
}

#[test]
fn atp_4_11_an_unknown_stream_is_gone() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    client.send(&resume("never-was", 0));
    let error = client.refused("never-was");
    assert_eq!((error.code, error.judged), (Code::ResumeGone, false), "{error}");
    client.send(&cancel("never-was"));
    assert_eq!(client.refused("never-was").code, Code::ResumeGone);
}

#[test]
fn atp_4_11_a_stream_opens_with_syn_and_has_one_task() {
    let router = shared();
    let mut worker = agent(&router, "b-4-11");
    let mut client = Peer::client(router.atp());
    let content = task("b-4-11");
    client.send(&Frame { flags: Flags::NONE, ..submit("o-4-11", &content) });
    let error = client.refused("o-4-11");
    assert!(error.code == Code::Proto && error.message.contains("SYN"), "{error}");
    client.send(&Frame { msg_seq: 0, flags: Flags::SYN.with(Flags::CTRL), ..submit("o-4-11", &content) });
    assert_eq!(client.refused("o-4-11").code, Code::Proto);
    client.send(&submit("o-4-11", &content));
    client.expect(kind::ACCEPTED);
    let call = worker.dispatched().call_id;
    client.send(&Frame { msg_seq: 2, ..submit("o-4-11", &content) });
    let error = client.refused("o-4-11");
    assert!(error.code == Code::Proto && error.message.contains("one task"), "{error}");
    // The task that was accepted goes on.
    worker.send(&last(call, 1, 1));
    client.send(&resume("o-4-11", 1));
    let frames = client.to_the_bill("o-4-11");
    assert_eq!(bill(&frames).state, TaskState::Done);
}

#[test]
fn atp_4_12_cancel_is_a_request_that_ends_with_final_and_bill() {
    let router = shared();
    let mut worker = agent(&router, "a-4-12");
    let mut client = Peer::client(router.atp());
    client.send(&submit("c-4-12", &task("a-4-12")));
    let call = worker.dispatched().call_id;
    worker.send(&partial(call, 1, "half ", 5));
    client.expect(kind::RESULT_PARTIAL);
    client.send(&cancel("c-4-12"));
    let asked = worker.expect(kind::AGENT_CANCEL);
    assert_eq!(&*asked.stream_id, call.to_string());
    let end = atp_proto::content::AgentFinal {
        cost: crate::cost(7),
        finish: atp_proto::content::Finish::Cancelled,
        ..atp_proto::content::AgentFinal::default()
    };
    worker.send(&Frame::json(call.to_string(), 2, Flags::FIN, kind::RESULT_FINAL, &end));
    let frames = client.to_the_bill("c-4-12");
    let answer: Final = frames[frames.len() - 2].read().unwrap();
    assert_eq!((answer.state, answer.result.text.as_str()), (TaskState::Cancelled, "half "));
    let bill = bill(&frames);
    assert_eq!((bill.state, bill.settled.tokens.0), (TaskState::Cancelled, 17), "billed to the token");
    assert_eq!(bill.calls[0].state, CallState::Settled);
    // Once more it changes nothing.
    client.send(&cancel("c-4-12"));
    client.send(&resume("c-4-12", 0));
    assert_eq!(client.to_the_bill("c-4-12").last(), frames.last());
}

#[test]
fn atp_4_12_a_lost_connection_cancels_nothing() {
    let router = shared();
    let mut worker = agent(&router, "b-4-12");
    let mut client = Peer::client(router.atp());
    client.send(&submit("l-4-12", &task("b-4-12")));
    client.expect(kind::ACCEPTED);
    let call = worker.dispatched().call_id;
    drop(client);
    worker.send(&partial(call, 1, "still ", 5));
    worker.send(&last(call, 2, 6));
    let mut client = Peer::client(router.atp());
    client.send(&resume("l-4-12", 0));
    let frames = client.to_the_bill("l-4-12");
    assert_eq!(frames[frames.len() - 2].read::<Final>().unwrap().result.text, "still end");
}

#[test]
fn atp_4_1_n_streams_are_open_on_a_connection_and_one_more_is_elimit() {
    let router = shared();
    let mut client = Peer::client(router.atp());
    let waiting = Submit { task: "wait".into(), ..task("nobody") };
    let id = |n: usize| format!("many-{n}");
    for n in 0..STREAMS {
        client.send(&submit(&id(n), &waiting));
        client.expect(kind::ACCEPTED);
    }
    client.send(&submit(&id(STREAMS), &waiting));
    let error = client.refused(&id(STREAMS));
    assert_eq!((error.code, error.limit), (Code::Limit, Some(STREAMS as u64)), "{error}");
    // What ends makes room.
    client.send(&cancel(&id(0)));
    client.to_the_bill(&id(0));
    client.send(&submit(&id(STREAMS), &waiting));
    client.expect(kind::ACCEPTED);
    for n in 1..=STREAMS {
        client.send(&cancel(&id(n)));
        client.to_the_bill(&id(n));
    }
}

/// The unsent bytes of a connection are bounded; what a slow reader missed is in the log.
#[test]
fn atp_1_6_a_slow_reader_misses_nothing() {
    const CHUNKS: u64 = 400;
    let router = Router::start("log: {durability: async}");
    let mut worker = agent(&router, "slow");
    let mut client = Peer::client(router.atp());
    client.send(&submit("slow-1-6", &task("slow")));
    let call = worker.dispatched().call_id;
    // 24 MB: more than the outbox and the sockets hold. Nobody reads them.
    let text = "x".repeat(60_000);
    for seq in 1..=CHUNKS {
        worker.send(&partial(call, seq, &text, 1));
    }
    worker.send(&last(call, CHUNKS + 1, 1));
    wait_for("the task's end", || {
        client.send(&Frame::heartbeat(false));
        (router.http("GET", "/v1/streams/slow-1-6").1["state"] == "done").then_some(())
    });
    // Now it reads; should the router have hung up meanwhile, it goes on where it was.
    let mut seen: Vec<Frame> = Vec::new();
    while seen.last().is_none_or(|f| &*f.kind != kind::BILL) {
        match client.try_next(PATIENCE) {
            Ok(Some(frame)) if &*frame.kind == kind::ERROR => {
                assert_eq!(frame.read::<WireError>().unwrap().code, Code::Limit);
            }
            Ok(Some(frame)) if frame.msg_seq > 0 => {
                let (last, part) = seen.last().map_or((0, 0), |f| (f.msg_seq, f.frag_seq));
                let next = (frame.msg_seq, frame.frag_seq);
                // Long messages, the final here, come in fragments.
                assert!(next == (last + 1, 0) || next <= (last, part + 1), "a gap: {next:?} after {last}, {part}");
                if next > (last, part) {
                    seen.push(frame);
                }
            }
            Ok(Some(_)) => {}
            Err(e) if e.kind() == ErrorKind::TimedOut => panic!("nothing comes after {}", seen.len()),
            Ok(None) | Err(_) => {
                while seen.last().is_some_and(|f| f.flags.has(Flags::MORE)) {
                    seen.pop();
                }
                client = Peer::client(router.atp());
                client.send(&resume("slow-1-6", seen.last().map_or(0, |f| f.msg_seq)));
            }
        }
    }
    assert_eq!(seen.last().map(|f| f.msg_seq), Some(1 + CHUNKS + 3));
    let mut other = Peer::client(router.atp());
    other.send(&resume("slow-1-6", 0));
    for (again, first) in other.to_the_bill("slow-1-6").iter().zip(&seen) {
        assert_eq!(again, first);
    }
}

#[test]
fn atp_4_11_a_closed_stream_is_resumed_after_a_restart() {
    let mut router = Router::start("log: {durability: fsync}");
    let mut worker = agent(&router, "r");
    let mut client = Peer::client(router.atp());
    let frames = whole_task(&mut client, &mut worker, "r", "again");
    client.send(&submit("refused", &Submit { wait: false, ..task("nobody") }));
    let refusal = client.refused("refused");
    let before = router.verify();
    for _ in 0..2 {
        router.kill();
        router.restart();
        let mut client = Peer::client(router.atp());
        for after in 0..frames.len() {
            client.send(&resume("again", after as u64));
            assert_eq!(client.to_the_bill("again"), frames[after..]);
        }
        client.send(&submit("refused", &Submit { wait: false, ..task("nobody") }));
        assert_eq!(client.refused("refused"), refusal, "a refusal is remembered as well");
        let after = router.verify();
        assert!(after["position"].as_u64() > before["position"].as_u64(), "a new epoch");
    }
}

//! Order, gaps and fragments (rules 4-5 to 4-7): every order of arrival, what is missing, and what can't be.

use crate::{agent, last, partial, shared};
use atp_proto::content::{Ack, Submit};
use atp_proto::frame::kind;
use atp_proto::limits::{GAP_MESSAGES_MAX, MESSAGE_BYTES_MAX};
use atp_proto::reassembly::fragment;
use atp_proto::{Code, Flags, Frame};
use atp_tests::blackbox::peer::{Peer, submit, task};

/// Every order of `0..n`.
fn permutations(n: usize) -> Vec<Vec<usize>> {
    let Some(rest) = n.checked_sub(1) else { return vec![vec![]] };
    let shorter = permutations(rest);
    let insert = |at: usize| shorter.iter().map(move |p| [&p[..at], &[rest], &p[at..]].concat());
    (0..n).flat_map(insert).collect()
}

/// A submit in `n` fragments whose task names it.
fn in_fragments(stream: &str, agent: &str, n: usize) -> Vec<Frame> {
    let content = Submit { task: format!("the task of {stream}: {}", "x".repeat(20 * n)), ..task(agent) };
    let frame = submit(stream, &content);
    let size = frame.content.len().div_ceil(n);
    let fragments = fragment(frame, size);
    assert_eq!(fragments.len(), n);
    fragments
}

fn cancel(peer: &mut Peer, stream: &str) {
    peer.send(&Frame::raw(stream, 0, Flags::NONE, kind::TASK_CANCEL, "{}".into()));
    peer.to_the_bill(stream);
}

#[test]
fn atp_4_6_fragments_come_in_any_order_and_twice() {
    let router = shared();
    let mut worker = agent(&router, "a-4-6");
    let mut peer = Peer::client(router.atp());
    for n in 1..=4 {
        for (number, order) in permutations(n).into_iter().enumerate() {
            let stream = format!("perm-{n}-{number}");
            let fragments = in_fragments(&stream, "a-4-6", n);
            for (i, at) in order.iter().enumerate() {
                peer.send(&fragments[*at]);
                // Each but the last one again: a repetition of what waits changes nothing.
                if i + 1 < n {
                    peer.send(&fragments[*at]);
                }
            }
            let dispatch = worker.dispatched();
            assert!(dispatch.task.starts_with(&format!("the task of {stream}: ")), "{}", dispatch.task);
            worker.send(&last(dispatch.call_id, 1, 5));
            let frames = peer.to_the_bill(&stream);
            assert_eq!(crate::kinds(&frames).first(), Some(&kind::ACCEPTED));
        }
    }
}

#[test]
fn atp_4_6_fragments_that_contradict_are_eproto() {
    let router = shared();
    let part = |frag_seq: u32, more: bool, content: &'static str| {
        let (flags, of) = if more { (Flags::MORE, frag_seq) } else { (Flags::NONE, frag_seq) };
        let head = if of == 0 { kind::TASK_SUBMIT } else { "" };
        let flags = if of == 0 { flags.with(Flags::SYN) } else { flags };
        Frame { frag_seq, ..Frame::raw("", 1, flags, head, content.into()) }
    };
    let wrong = [
        ("two-lasts", vec![part(2, false, "a"), part(3, false, "b")]),
        ("past-the-last", vec![part(2, false, "a"), part(3, true, "b")]),
        ("changed", vec![part(1, true, "a"), part(1, true, "b")]),
        ("changed-flags", vec![part(1, true, "a"), part(1, false, "a")]),
    ];
    let mut peer = Peer::client(router.atp());
    for (stream, parts) in wrong {
        for frame in parts {
            peer.send(&Frame { stream_id: stream.into(), ..frame });
        }
        let error = peer.refused(stream);
        assert_eq!((error.code, error.judged), (Code::Proto, false), "{stream}: {error}");
        // Nothing was accepted: the stream is as good as new.
        peer.send(&submit(stream, &task("nobody")));
        peer.expect(kind::ACCEPTED);
        cancel(&mut peer, stream);
    }
}

#[test]
fn atp_4_6_n_bytes_are_a_message_and_one_more_is_elimit() {
    let router = shared();
    let sized = |stream: &str, bytes: usize| {
        let empty = serde_json::to_vec(&Submit { task: String::new(), ..task("nobody") }).unwrap().len();
        let frame = submit(stream, &Submit { task: "x".repeat(bytes - empty), ..task("nobody") });
        assert_eq!(frame.content.len(), bytes);
        fragment(frame, 200_000)
    };
    let mut peer = Peer::client(router.atp());
    for frame in sized("bytes-n", MESSAGE_BYTES_MAX) {
        peer.send(&frame);
    }
    peer.expect(kind::ACCEPTED);
    cancel(&mut peer, "bytes-n");
    for frame in sized("bytes-n1", MESSAGE_BYTES_MAX + 1) {
        peer.send(&frame);
    }
    let error = peer.refused("bytes-n1");
    assert_eq!((error.code, error.judged), (Code::Limit, false), "{error}");
}

#[test]
fn atp_4_7_what_is_missing_is_asked_for_and_then_given_up() {
    let router = shared();
    let mut peer = Peer::client(router.atp());
    let mut fragments = in_fragments("missing", "nobody", 4);
    let late = fragments.remove(2);
    let early = fragments.remove(0);
    for frame in &fragments {
        peer.send(frame);
    }
    let ack: Ack = peer.expect(kind::ACK).read().unwrap();
    assert_eq!(ack.msg_seq, 0, "nothing of it is acknowledged");
    let open = &ack.open[0];
    assert_eq!((open.msg_seq, open.frag, open.missing.as_slice()), (1, 2, &[(0, 0), (2, 2)][..]));
    peer.send(&early);
    peer.send(&late);
    peer.expect(kind::ACCEPTED);
    cancel(&mut peer, "missing");

    let fragments = in_fragments("given-up", "nobody", 3);
    peer.send(&fragments[0]);
    peer.send(&fragments[2]);
    let mut asked = 0;
    let error = loop {
        let frame = peer.frame();
        match &*frame.kind {
            kind::ACK if &*frame.stream_id == "given-up" => {
                let ack: Ack = frame.read().unwrap();
                assert_eq!(ack.open[0].missing, [(1, 1)]);
                asked += 1;
            }
            kind::ERROR => break frame.read::<atp_proto::WireError>().unwrap(),
            _ => {}
        }
    };
    assert_eq!((error.code, error.judged, asked), (Code::SeqRetry, false, 5));
    for frame in &fragments {
        peer.send(frame);
    }
    peer.expect(kind::ACCEPTED);
    cancel(&mut peer, "given-up");
}

#[test]
fn atp_4_5_an_agents_messages_reach_the_client_in_order() {
    let router = shared();
    let mut worker = agent(&router, "a-4-5");
    let mut peer = Peer::client(router.atp());
    for (number, order) in permutations(4).into_iter().enumerate() {
        let stream = format!("order-{number}");
        peer.send(&submit(&stream, &task("a-4-5")));
        let call = worker.dispatched().call_id;
        let messages = [partial(call, 1, "a", 1), partial(call, 2, "b", 2), partial(call, 3, "c", 3), last(call, 4, 4)];
        for at in &order {
            worker.send(&messages[*at]);
        }
        for at in &order {
            worker.send(&messages[*at]);
        }
        let frames = peer.to_the_bill(&stream);
        let numbers: Vec<u64> = frames.iter().map(|f| f.msg_seq).collect();
        assert_eq!(numbers, (1..=7).collect::<Vec<_>>(), "{order:?}");
        let answer: atp_proto::content::Final = frames[5].read().unwrap();
        assert_eq!(answer.result.text, "abcend", "{order:?}");
        assert_eq!(crate::bill(&frames).settled.tokens.0, 14);
    }
}

#[test]
fn atp_4_5_n_messages_wait_behind_a_gap_and_one_more_is_elimit() {
    let router = shared();
    let mut peer = Peer::client(router.atp());
    let ahead = |stream: &'static str, seq: u64| Frame::raw(stream, seq, Flags::NONE, "later.type", "{}".into());
    let most = 1 + GAP_MESSAGES_MAX as u64;
    for seq in 2..=most {
        peer.send(&ahead("gap-n", seq));
    }
    peer.send(&submit("gap-n", &task("nobody")));
    peer.expect(kind::ACCEPTED);
    cancel(&mut peer, "gap-n");
    for seq in 2..=most + 1 {
        peer.send(&ahead("gap-n1", seq));
    }
    assert_eq!(peer.refused("gap-n1").code, Code::Limit);
}

//! How a connection opens and stays (rules 4-1 and 4-9).

use crate::{dial, shared};
use atp_proto::content::{HelloAck, Role};
use atp_proto::frame::kind;
use atp_proto::limits::{FRAGMENT_BYTES, FRAME_BYTES_MAX, MESSAGE_BYTES_MAX};
use atp_proto::{Code, Flags, Frame};
use atp_tests::blackbox::peer::{Peer, hello, submit, task};
use atp_tests::blackbox::process::Router;
use std::collections::BTreeSet;

#[test]
fn atp_4_1_the_lower_minor_version_is_spoken() {
    let router = shared();
    let mut sessions = BTreeSet::new();
    for (minor_max, minor) in [(0, 0), (1, 1), (7, 1)] {
        let mut peer = dial(router.atp());
        peer.send(&hello(Role::Client, minor_max));
        let frame = peer.frame();
        assert!(frame.flags.has(Flags::SYN.with(Flags::ACK)) && frame.stream_id.is_empty(), "{frame:?}");
        let ack: HelloAck = frame.read().unwrap();
        assert_eq!((ack.minor, ack.heartbeat_ms), (minor, 5_000));
        let limits = ack.limits;
        let bytes = (limits.frame_bytes, limits.fragment_bytes, limits.message_bytes);
        assert_eq!(bytes, (FRAME_BYTES_MAX as u64, FRAGMENT_BYTES as u64, MESSAGE_BYTES_MAX as u64));
        assert_eq!(limits.streams, crate::STREAMS as u64);
        assert!(sessions.insert(ack.session_id), "a session id is never used again");
    }
}

#[test]
fn atp_4_1_a_connection_opens_with_hello_and_says_it_once() {
    let router = shared();
    let submit = submit("h-4-1", &task("nobody"));
    let no_syn = Frame { flags: Flags::CTRL, ..hello(Role::Client, 1) };
    let on_a_stream = Frame { stream_id: "s".into(), ..hello(Role::Client, 1) };
    let bad = |content: &'static str| Frame::raw("", 0, Flags::SYN, kind::HELLO, content.into());
    let wrong = [submit, no_syn, on_a_stream, Frame::heartbeat(false), bad("{}"), bad("["), bad(r#"{"role":"king"}"#)];
    for frame in wrong.into_iter().chain([hello(Role::Router, 1)]) {
        let mut peer = dial(router.atp());
        peer.send(&frame);
        let error = peer.closed();
        assert!(error.code == Code::Proto && error.message.contains("hello"), "{frame:?}: {error}");
    }
    let mut peer = Peer::client(router.atp());
    peer.send(&hello(Role::Client, 1));
    assert_eq!(peer.closed().code, Code::Proto);
}

#[test]
fn atp_4_1_what_only_agents_say_is_not_taken_from_a_client() {
    let router = shared();
    let mut peer = Peer::client(router.atp());
    peer.send(&Frame::raw("x-4-1", 1, Flags::NONE, kind::RESULT_FINAL, "{}".into()));
    assert_eq!(peer.refused("x-4-1").code, Code::Proto);
    peer.send(&Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &crate::capabilities("a-4-1")));
    assert_eq!(peer.closed().code, Code::Proto);
}

#[test]
fn atp_4_9_heartbeats_are_sent_and_answered_and_silence_is_loss() {
    let router = Router::start("log: {durability: async}\nlimits: {heartbeat: 300ms}");
    let (mut peer, ack) = Peer::hello(router.atp(), Role::Client).unwrap();
    assert_eq!(ack.heartbeat_ms, 300);
    peer.beats = false;
    peer.send(&Frame::heartbeat(false));
    let (mut asked, mut answered) = (0, 0);
    while asked < 3 || answered < 1 {
        let frame = peer.frame();
        assert!(frame.flags.has(Flags::HB) && frame.stream_id.is_empty(), "{frame:?}");
        if frame.flags.has(Flags::ACK) {
            answered += 1;
        } else {
            asked += 1;
            peer.send(&Frame::heartbeat(true));
        }
    }
    // Nothing more is said: the router hangs up.
    loop {
        match peer.try_next(atp_tests::blackbox::PATIENCE) {
            Ok(Some(frame)) => assert!(frame.flags.has(Flags::HB) || &*frame.kind == kind::ERROR, "{frame:?}"),
            Ok(None) => break,
            Err(error) => panic!("not closed: {error}"),
        }
    }
}

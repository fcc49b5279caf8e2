//! Rules between routers: two of them share a log in Kafka, and a third one is nothing but frames. What happens to streams when
//! routers are killed (ATP-13-5) is tested in `tests/peers`.

use crate::fleet::Fleet;
use crate::shared;
use atp_core::placement::Placement;
use atp_proto::content::{Capabilities, PeerChallenge, PeerHello, PeerProof, Role, RouteUpdate};
use atp_proto::frame::kind;
use atp_proto::limits::FRAGMENT_BYTES;
use atp_proto::{Code, Flags, Frame, Hop, StreamId, TenantId, WireError};
use atp_tests::blackbox::peer::{Peer, capabilities, submit, task};
use atp_tests::blackbox::process::http_text;
use atp_tests::blackbox::{PATIENCE, wait_for};
use sha2::{Digest, Sha256};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const SHARDS: u32 = 8;
/// Of the fleet's configuration.
const KEY: &str = "of-the-routers-of-one-fleet-in-tests";
const NONCE: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// Two routers for the tests that change nothing about them. Peers that are written by hand answer heartbeats only while they
/// wait, so these are as rare as in life.
fn two() -> Arc<Fleet> {
    static SHARED: Mutex<Weak<Fleet>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let mut fleet = Fleet::start(1, SHARDS, 0);
        for n in 0..2 {
            fleet.change(n, "limits: {heartbeat: 300ms}\n", "");
            fleet.launch(n);
        }
        fleet.each_has_its_part(&[0, 1]);
        let fleet = Arc::new(fleet);
        *shared = Arc::downgrade(&fleet);
        fleet
    })
}

/// HMAC-SHA256 in hex over texts, each behind its length.
fn proof(key: &str, whose: &str, hello: &PeerHello, answers: (&str, &str)) -> String {
    let (purpose, tenant) = hello.tenant.as_ref().map_or(("link", ""), |tenant| ("client", tenant.as_str()));
    let mut text = Vec::new();
    for part in ["atp peer 1", whose, &hello.router, &hello.nonce, answers.0, answers.1, purpose, tenant] {
        text.extend((part.len() as u64).to_be_bytes());
        text.extend(part.as_bytes());
    }
    let mut block = [0; 64];
    block[..key.len()].copy_from_slice(key.as_bytes());
    let hash = |pad: u8, text: &[u8]| Sha256::new().chain_update(block.map(|b| b ^ pad)).chain_update(text).finalize();
    hash(0x5c, &hash(0x36, &text)).iter().map(|b| format!("{b:02x}")).collect()
}

/// Says hello as router `from`; what the router at the other end answers.
fn challenged(fleet: &Fleet, from: &str, tenant: Option<&str>) -> (Peer, PeerHello, Frame) {
    let mut peer = Peer::dial(fleet.routers[0].atp()).expect("the router listens");
    let tenant = tenant.map(TenantId::new);
    let hello = PeerHello { minor_max: 1, role: Role::Router, router: from.into(), nonce: NONCE.into(), tenant };
    peer.send(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello));
    let answer = peer.frame();
    (peer, hello, answer)
}

/// A connection to the first router that has proved the key.
fn linked(fleet: &Fleet, tenant: Option<&str>) -> Peer {
    let (mut peer, hello, answer) = challenged(fleet, "r9", tenant);
    let challenge: PeerChallenge = answer.read().expect("a challenge");
    let answers = (&*challenge.router, &*challenge.nonce);
    assert_eq!((answers.0, challenge.proof), ("r1", proof(KEY, "answers", &hello, answers)));
    let proof = PeerProof { proof: proof(KEY, "dials", &hello, answers) };
    peer.send(&Frame::json("", 0, Flags::NONE, kind::PEER_PROOF, &proof));
    let ack = peer.frame();
    assert!(&*ack.kind == kind::HELLO && ack.flags.has(Flags::SYN.with(Flags::ACK)), "{ack:?}");
    peer
}

/// A stream whose shard that router owns.
fn stream_of(fleet: &Fleet, router: usize, name: &str) -> String {
    let (placement, owned) = (Placement::new(SHARDS, 0), fleet.owned(router));
    let is_there =
        |id: &String| owned.contains(&placement.shard_of(&TenantId::new("default"), &StreamId::new(id)).into());
    (0..).map(|n| format!("{name}-{n}")).find(is_there).expect("one of many")
}

#[test]
fn atp_13_1_each_router_links_to_each_other_one() {
    let fleet = two();
    for router in &fleet.routers[..2] {
        wait_for("the link to the other one", || {
            let (_, text) = http_text(router.http_addr(), "GET", "/metrics", PATIENCE).ok()?;
            text.lines().any(|line| line == "atp_peers_linked 1").then_some(())
        });
    }
}

#[test]
fn atp_13_2_a_router_that_cannot_prove_the_key_is_served_nothing() {
    let fleet = two();
    let (mut other_key, hello, answer) = challenged(&fleet, "r9", None);
    let challenge: PeerChallenge = answer.read().expect("a challenge");
    let answers = (&*challenge.router, &*challenge.nonce);
    let wrong = PeerProof { proof: proof("another-key-that-is-long-enough-too", "dials", &hello, answers) };
    other_key.send(&Frame::json("", 0, Flags::NONE, kind::PEER_PROOF, &wrong));
    assert_eq!(other_key.closed().code, Code::Auth);
    let (_, _, own_name) = challenged(&fleet, "r1", None);
    assert_eq!(own_name.read::<WireError>().expect("a refusal").code, Code::Auth);
    let (mut early, ..) = challenged(&fleet, "r9", Some("default"));
    early.send(&submit("early-13-2", &task("nobody")));
    assert_eq!(early.closed().code, Code::Auth, "nothing comes before the proof");
    drop(linked(&fleet, None));
}

#[test]
fn atp_13_2_without_a_key_there_are_no_other_routers() {
    let router = shared();
    let mut peer = Peer::dial(router.atp()).expect("the router listens");
    let hello = PeerHello { minor_max: 1, role: Role::Router, router: "r9".into(), nonce: NONCE.into(), tenant: None };
    peer.send(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello));
    assert_eq!(peer.closed().code, Code::Proto);
}

#[test]
fn atp_13_3_a_handle_has_one_live_incarnation_in_the_fleet() {
    let fleet = two();
    let mut first = Peer::agent(fleet.routers[0].atp(), &capabilities("one-place"));
    (0..2).for_each(|n| fleet.routers[n].has_agent("one-place"));
    let other = Capabilities { incarnation: "other".into(), ..capabilities("one-place") };
    assert_eq!(Peer::agent(fleet.routers[1].atp(), &other).closed().code, Code::Sec);
    let _again = Peer::agent(fleet.routers[1].atp(), &capabilities("one-place"));
    assert_eq!(first.closed().code, Code::AgentDown, "it is where it connected last");
}

#[test]
fn atp_13_4_frames_go_one_router_on_and_no_further() {
    let fleet = two();
    let (here, there) = (stream_of(&fleet, 0, "h-13-4"), stream_of(&fleet, 1, "t-13-4"));
    let mut client = Peer::client(fleet.routers[0].atp());
    let with_ttl = |stream: &str, ttl: u32| {
        let hop = Hop { ttl: Some(ttl), ..Hop::default() };
        Frame { hop: Some(Box::new(hop)), ..submit(stream, &task("nobody")) }
    };
    client.send(&with_ttl(&there, 0));
    let error = client.frame();
    assert_eq!((&*error.kind, error.flags.has(Flags::RST)), (kind::ERROR, false), "{error:?}");
    assert!(error.read::<WireError>().expect("an error").message.contains("ttl"));
    client.send(&with_ttl(&there, 1));
    assert_eq!(*client.expect(kind::ACCEPTED).stream_id, *there);
    // What a router has forwarded stays where it came.
    let mut router = linked(&fleet, Some("default"));
    let far = stream_of(&fleet, 1, "f-13-4");
    router.send(&submit(&far, &task("nobody")));
    let refused = router.refused(&far);
    assert_eq!((refused.code, refused.judged), (Code::Draining, false));
    router.send(&submit(&here, &task("nobody")));
    assert_eq!(*router.expect(kind::ACCEPTED).stream_id, *here);
}

#[test]
fn atp_13_6_a_router_says_which_agents_are_connected_to_it() {
    let fleet = two();
    let mut link = linked(&fleet, None);
    let mut until = |what: &dyn Fn(&RouteUpdate) -> bool| loop {
        let frame = link.expect(kind::ROUTE_UPDATE);
        assert_eq!((&*frame.stream_id, frame.msg_seq), ("link", 1));
        let update: RouteUpdate = frame.read().expect("an update");
        assert_eq!(update.router_id, "r1");
        if what(&update) {
            break;
        }
    };
    let names = |update: &RouteUpdate| {
        let mut routes = update.agents.iter();
        routes.any(|route| route.agent_prefix.as_str() == "comes-and-goes" && route.incarnation == "first")
    };
    until(&|update| !names(update));
    let agent = Peer::agent(fleet.routers[0].atp(), &capabilities("comes-and-goes"));
    until(&names);
    drop(agent);
    until(&|update| !names(update));
}

#[test]
fn atp_13_7_a_link_ends_by_what_is_no_message_or_too_long_for_one() {
    let fleet = two();
    let say = |content: Vec<u8>| Frame::raw("link", 1, Flags::NONE, kind::PEER_SAY, content.into());
    let mut garbage = linked(&fleet, None);
    garbage.send(&say(vec![0xff; 9]));
    assert_eq!(garbage.closed().code, Code::Proto);
    let mut long = linked(&fleet, None);
    let parts = 33_554_432 / FRAGMENT_BYTES + 1;
    for part in 0..parts {
        let frame = Frame { frag_seq: part as u32, flags: Flags::MORE, ..say(vec![0; FRAGMENT_BYTES]) };
        if long.try_send(&frame).is_err() {
            break;
        }
    }
    assert_eq!(long.closed().code, Code::Limit);
}

#[test]
fn atp_13_8_a_router_behind_a_silent_wire_is_named_until_it_is_linked_again() {
    let fleet = Fleet::start(1, SHARDS, 2);
    let parts = fleet.each_has_its_part(&[0, 1]);
    let missing = || fleet.routers[0].http("GET", "/v1/streams").1["missing"].clone();
    wait_for("an answer of both", || missing().is_null().then_some(()));
    fleet.wires[1].be_silent(true);
    wait_for("the silence to be noticed", || {
        let missing = missing();
        (missing[0]["router"] == "r2" && missing[0]["shards"].as_array()?.len() == parts[&1]).then_some(())
    });
    assert_eq!(fleet.routers[0].http("POST", "/v1/verify").0, 503, "a proof of a part is none");
    fleet.wires[1].be_silent(false);
    wait_for("the link to be made again", || missing().is_null().then_some(()));
    assert_eq!(fleet.shared_by(&[0, 1]), parts, "no shard has moved");
    fleet.routers[0].verify();
}

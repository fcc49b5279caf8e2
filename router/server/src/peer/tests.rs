//! Routers in one process, each with a log of its own, that are told where shards are: what one is asked, another serves.

#[path = "../../tests/support/mod.rs"]
mod support;

use super::link;
use crate::config::Config;
use crate::shards::{Here, Place, Site};
use crate::{PeerKey, Router};
use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{AgentName, CallId, Code, Cost, Flags, Frame, TenantId, Tokens, UsdMicros, WireError, pb};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use support::{Peer, agent, config, http, submit};
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

const KEY: &str = "a key that is shared by all routers";

fn configured(dir: &Path, id: &str, key: &str) -> Config {
    let mut config = config(dir);
    config.settings.router_id = id.into();
    config.peer_key = PeerKey::new(key);
    config.limits.heartbeat_ms = 500;
    config
}

async fn start(id: &str) -> (TempDir, Router) {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(configured(dir.path(), id, KEY)).await.expect("starts");
    (dir, router)
}

fn site(router: &Router, id: &str) -> Arc<Site> {
    let incarnation = router.shared().incarnation.clone();
    let (atp, http) = (router.atp_addr().to_string(), router.http_addr().to_string());
    Arc::new(Site { router: id.into(), incarnation, atp, http })
}

/// From now on all shards of `router` are there; returns those that were here.
fn give(router: &Router, to: &Arc<Site>) -> Vec<(u32, Here)> {
    let shards = router.shards();
    let here = shards.all_here();
    (0..shards.placement().shards()).for_each(|shard| shards.set(shard, Place::At(to.clone())));
    here
}

/// `router` dials `to`, until the guard is dropped.
fn dial(router: &Router, to: &Arc<Site>) -> DropGuard {
    let stop = CancellationToken::new();
    tokio::spawn(link::dial(router.shared().clone(), to.clone(), stop.clone()));
    stop.drop_guard()
}

async fn call_of(agent: &mut Peer) -> CallId {
    agent.expect(kind::DISPATCH).await.read::<Dispatch>().expect("a dispatch").call_id
}

fn cost(out: u64) -> Cost {
    Cost { in_tokens: Tokens(5), out_tokens: Tokens(out), usd_micros: UsdMicros(5 + out) }
}

fn partial(call: CallId, seq: u64, text: &str) -> Frame {
    let cost = cost(seq);
    let content = AgentPartial { text: Some(text.into()), cost, ..AgentPartial::default() };
    Frame::json(call.to_string(), seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

fn last(call: CallId, seq: u64) -> Frame {
    let content = AgentFinal { text: Some(" end".into()), cost: cost(9), ..AgentFinal::default() };
    Frame::json(call.to_string(), seq, Flags::FIN, kind::RESULT_FINAL, &content)
}

/// The numbered frames of a stream up to its bill: each once, in order.
async fn to_the_bill(client: &mut Peer, mut seq: u64) -> Final {
    let mut result = None;
    loop {
        let frame = client.next().await.expect("open");
        if frame.msg_seq == 0 {
            assert!(!frame.flags.has(Flags::RST), "{}", String::from_utf8_lossy(&frame.content));
            continue;
        }
        seq += 1;
        assert_eq!(frame.msg_seq, seq, "{}", &*frame.kind);
        match &*frame.kind {
            kind::RESULT_FINAL => result = Some(frame.read::<Final>().expect("a final")),
            kind::BILL => return result.expect("before the bill"),
            _ => {}
        }
    }
}

/// ATP-4-16: who has no shard sends a client that follows to one who has; the others it serves by forwarding.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_sent_away_from_who_has_no_shard() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let there = site(&r2, "r2");
    let hello = |role| Hello { minor_max: 1, role, token: None, redirect: true };
    let asks = async |role| {
        let mut peer = Peer::new(&r1);
        peer.send(Frame::json("", 0, Flags::SYN, kind::HELLO, &hello(role))).await;
        // Frames may stand behind the hello.
        peer.send(submit("s0", "talker")).await;
        let answer = peer.next().await.expect("an answer");
        (peer, answer)
    };
    let (_peer, answer) = asks(Role::Client).await;
    assert_eq!(&*answer.kind, kind::HELLO, "its own shards run here");

    let mut here = give(&r1, &there);
    let (mut peer, answer) = asks(Role::Client).await;
    assert!(answer.flags.has(Flags::FIN) && answer.stream_id.is_empty(), "{}", answer.kind);
    let sent: Redirect = answer.read().expect("a redirect");
    assert_eq!(&*answer.kind, kind::REDIRECT);
    assert_eq!(sent.url, format!("atp://{}", r2.atp_addr()));
    assert!(peer.next().await.is_none(), "closed behind it");
    Peer::hello(&r1, Role::Client).await;
    let (_peer, answer) = asks(Role::Agent).await;
    assert_eq!(&*answer.kind, kind::HELLO, "agents stay");

    let (shard, last) = here.pop().expect("one of them");
    r1.shards().set(shard, Place::Here(last));
    let (_peer, answer) = asks(Role::Client).await;
    assert_eq!(&*answer.kind, kind::HELLO, "one shard is enough to stay");
    (0..r1.shards().placement().shards()).for_each(|shard| r1.shards().set(shard, Place::Unknown));
    let (_peer, answer) = asks(Role::Client).await;
    assert_eq!(&*answer.kind, kind::HELLO, "nobody is known to be better");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_is_served_by_the_owner_of_its_shard() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let there = site(&r2, "r2");
    give(&r1, &there);
    let mut talker = agent(&r2, "talker").await;
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    let accepted = client.expect(kind::ACCEPTED).await;
    assert_eq!((&*accepted.stream_id, accepted.msg_seq), ("s1", 1));
    let call = call_of(&mut talker).await;
    talker.send(partial(call, 1, "one")).await;
    client.expect(kind::RESULT_PARTIAL).await;
    // Another connection of the same tenant follows it from its beginning.
    let (mut watcher, _) = Peer::hello(&r1, Role::Client).await;
    let resume = Resume { token: None, after: 0 };
    watcher.send(Frame::json("s1", 0, Flags::SYN, kind::RESUME, &resume)).await;
    assert_eq!(watcher.expect(kind::ACCEPTED).await.msg_seq, 0);
    talker.send(last(call, 2)).await;
    assert_eq!(to_the_bill(&mut client, 2).await.state, TaskState::Done);
    assert_eq!(to_the_bill(&mut watcher, 0).await.state, TaskState::Done);
    // Refusals of the owner come back too.
    client.send(submit("s1 ", "talker")).await;
    assert!(client.refused().await.message.contains("stream_id"));
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_of_one_router_serves_the_shards_of_another() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let _link = dial(&r2, &site(&r1, "r1"));
    let (mut client, _) = Peer::hello(&r2, Role::Client).await;
    // It waits for the agent, which comes to the other router.
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let mut talker = agent(&r1, "talker").await;
    let call = call_of(&mut talker).await;
    talker.send(partial(call, 1, "one")).await;
    talker.send(last(call, 2)).await;
    let result = to_the_bill(&mut client, 1).await;
    assert_eq!((result.state, &*result.result.text), (TaskState::Done, "one end"));
    // It goes; the shards hear of it, and the task waits for it again.
    drop(talker);
    client.send(submit("s2", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let mut talker = agent(&r2, "talker").await;
    let call = call_of(&mut talker).await;
    talker.send(last(call, 1)).await;
    assert_eq!(to_the_bill(&mut client, 1).await.state, TaskState::Done);
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_when_its_owner_comes_back_elsewhere() {
    let ((_a, r1), (b, r2)) = (start("r1").await, start("r2").await);
    give(&r1, &site(&r2, "r2"));
    let link = dial(&r2, &site(&r1, "r1"));
    let mut talker = agent(&r1, "talker").await;
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = call_of(&mut talker).await;
    talker.send(partial(call, 1, "one")).await;
    client.expect(kind::RESULT_PARTIAL).await;
    drop(link);
    r2.stop().await.expect("seals");
    // A submit while nobody owns the shard waits.
    client.send(submit("s2", "talker")).await;
    let r2 = Router::start(configured(b.path(), "r2", KEY)).await.expect("starts again");
    let _link = dial(&r2, &site(&r1, "r1"));
    give(&r1, &site(&r2, "r2"));
    // The new owner asks the agent to go on.
    let mut second = None;
    let mut went_on = false;
    while !went_on || second.is_none() {
        let frame = talker.expect(kind::DISPATCH).await.read::<Dispatch>().expect("a dispatch");
        if frame.call_id == call {
            went_on = frame.go_on;
        } else {
            second = Some(frame.call_id);
        }
    }
    talker.send(last(call, 2)).await;
    talker.send(last(second.expect("dispatched"), 1)).await;
    let mut seqs = std::collections::BTreeMap::from([("s1".to_owned(), 2), ("s2".to_owned(), 0)]);
    let mut bills = 0;
    while bills < 2 {
        let frame = client.next().await.expect("open");
        if frame.msg_seq > 0 {
            let seq = seqs.get_mut(&*frame.stream_id).expect("one of the two");
            *seq += 1;
            assert_eq!(frame.msg_seq, *seq, "{} {}", &*frame.stream_id, &*frame.kind);
        } else {
            panic!("{} of {} is no news to the client", &*frame.kind, &*frame.stream_id);
        }
        bills += usize::from(&*frame.kind == kind::BILL);
    }
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atp_13_4_at_ttl_0_a_frame_goes_no_further() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let here = give(&r1, &site(&r2, "r2"));
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    let with_ttl = |stream: &str, ttl: u32| Frame {
        hop: Some(Box::new(pb::Hop { ttl: Some(ttl), ..pb::Hop::default() })),
        ..submit(stream, "nobody")
    };
    for _ in 0..3 {
        client.send(with_ttl("s1", 0)).await;
    }
    let error = client.expect(kind::ERROR).await;
    assert!(!error.flags.has(Flags::RST) && error.read::<WireError>().expect("an error").message.contains("ttl"));
    client.send(with_ttl("s2", 1)).await;
    assert_eq!(&*client.expect(kind::ACCEPTED).await.stream_id, "s2", "one error a second at most");
    drop(client);
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    // At its owner the frame has arrived, whatever its ttl.
    for (shard, here) in here {
        r1.shards().set(shard, Place::Here(here));
    }
    client.send(with_ttl("s3", 0)).await;
    assert_eq!(&*client.expect(kind::ACCEPTED).await.stream_id, "s3");
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_router_answers_for_all_shards_and_names_who_does_not() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let there = site(&r2, "r2");
    let here = give(&r1, &there);
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    client.send(submit("s1", "nobody")).await;
    client.expect(kind::ACCEPTED).await;
    let (status, problem) = http(&r1, "GET /v1/streams").await;
    assert_eq!((status, &problem["code"]), (503, &"EDRAINING".into()), "there is no link yet: {problem}");
    let link = dial(&r1, &there);
    let row = loop {
        let (status, body) = http(&r1, "GET /v1/streams").await;
        if status == 200 {
            break body["streams"][0].clone();
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(row["stream_id"], "s1");
    assert_eq!(http(&r1, "GET /v1/streams/s1/bill").await.1["stream_id"], "s1");
    assert_eq!(http(&r1, "GET /v1/accounts/default").await.0, 200);
    assert_eq!(http(&r1, "GET /v1/agents").await.1["agents"].as_array().map(Vec::len), Some(0));
    assert_eq!(http(&r1, "DELETE /v1/streams/s1").await.0, 202);
    to_the_bill(&mut client, 1).await;
    // Of a router that is gone its shards are named, and what others have is shown.
    drop(link);
    r2.stop().await.expect("seals");
    let (shard, back) = here.into_iter().next().expect("one of many");
    r1.shards().set(shard, Place::Here(back));
    let (status, body) = http(&r1, "GET /v1/accounts").await;
    assert_eq!((status, &body["missing"][0]["router"]), (200, &"r2".into()));
    assert_eq!(http(&r1, "POST /v1/verify").await.0, 503, "a proof of a part is none");
    r1.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atp_13_3_a_handle_has_one_live_incarnation_in_the_fleet() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let _links = (dial(&r1, &site(&r2, "r2")), dial(&r2, &site(&r1, "r1")));
    let mut first = agent(&r1, "talker").await;
    let name = AgentName::new("talker");
    while !r2.shared().peers.is_far(&name) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Another process under that name is refused while the first one answers.
    let (mut other, _) = Peer::hello(&r2, Role::Agent).await;
    let capabilities =
        Capabilities { agent: name.clone(), incarnation: "i2".into(), max_parallel: 1, ..Capabilities::default() };
    other.send(Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities)).await;
    assert_eq!(other.refused().await.code, Code::Sec);
    // The same process at another router has come from the first one.
    let mut again = agent(&r2, "talker").await;
    assert_eq!(first.refused().await.code, Code::AgentDown);
    let (mut client, _) = Peer::hello(&r1, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = call_of(&mut again).await;
    again.send(last(call, 1)).await;
    assert_eq!(to_the_bill(&mut client, 1).await.state, TaskState::Done);
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atp_8_11_what_an_agent_says_at_one_router_counts_when_it_comes_back_to_another() {
    let ((_a, r1), (_b, r2)) = (start("r1").await, start("r2").await);
    let _links = (dial(&r1, &site(&r2, "r2")), dial(&r2, &site(&r1, "r1")));
    let say = |status| {
        let content = AgentStatus { status, ..AgentStatus::default() };
        Frame::json("", 0, Flags::NONE, kind::STATUS, &content)
    };
    let stands = async |wanted: &str| {
        let seen = async {
            while http(&r2, "GET /v1/agents").await.1["agents"][0]["status"] != *wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), seen).await.expect(wanted);
    };
    let mut first = agent(&r2, "talker").await;
    first.send(say(Status::Busy)).await;
    stands("BUSY").await;
    let mut second = agent(&r1, "talker").await;
    assert_eq!(first.refused().await.code, Code::AgentDown);
    second.send(say(Status::Pause)).await;
    stands("PAUSE").await;
    drop(second);
    stands("GONE").await;
    // It is the same process, and says nothing new.
    let mut third = agent(&r2, "talker").await;
    stands("PAUSE").await;
    let (mut client, _) = Peer::hello(&r2, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    third.send(say(Status::Ready)).await;
    let call = call_of(&mut third).await;
    third.send(last(call, 1)).await;
    assert_eq!(to_the_bill(&mut client, 1).await.state, TaskState::Done);
    r1.stop().await.expect("seals");
    r2.stop().await.expect("seals");
}

#[tokio::test]
async fn atp_13_2_routers_without_the_key_are_refused() {
    let (_a, r1) = start("r1").await;
    let hello = |router: &str, nonce: String| {
        let tenant = Some(TenantId::new("default"));
        let hello = PeerHello { minor_max: 1, role: Role::Router, router: router.into(), nonce, tenant };
        Frame::json("", 0, Flags::SYN, kind::HELLO, &hello)
    };
    let mut liar = Peer::new(&r1);
    liar.send(hello("r9", super::proof::nonce())).await;
    let challenge: PeerChallenge = liar.expect(kind::PEER_CHALLENGE).await.read().expect("a challenge");
    assert_eq!(challenge.router, "r1");
    // Its own proof, sent back.
    let proof = PeerProof { proof: challenge.proof };
    liar.send(Frame::json("", 0, Flags::NONE, kind::PEER_PROOF, &proof)).await;
    assert_eq!(liar.refused().await.code, Code::Auth);
    let mut own = Peer::new(&r1);
    own.send(hello("r1", super::proof::nonce())).await;
    assert_eq!(own.refused().await.code, Code::Auth);
    let mut early = Peer::new(&r1);
    early.send(hello("r9", super::proof::nonce())).await;
    early.send(submit("s", "a")).await;
    early.expect(kind::PEER_CHALLENGE).await;
    assert_eq!(early.refused().await.code, Code::Auth, "nothing is served before the proof");
    // With another key the one that dials refuses first.
    let dir = tempfile::tempdir().expect("a directory");
    let other = Router::start(configured(dir.path(), "r2", &KEY.to_uppercase())).await.expect("starts");
    let refused = super::connect(other.shared(), &site(&r1, "r1"), None).await.map(drop);
    assert_eq!(refused.map_err(|e| e.code), Err(Code::Auth));
    let taken = super::connect(r1.shared(), &site(&r1, "r2"), None).await.map(drop);
    assert_eq!(taken.map_err(|e| e.code), Err(Code::Auth), "another router answers there");
    other.stop().await.expect("seals");
    r1.stop().await.expect("seals");
}

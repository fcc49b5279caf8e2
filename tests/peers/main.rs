//! Three routers share one log in Kafka, and nothing is where it is asked for: a client at the first, its agent at the second, the
//! shards of its streams at the third. Real processes, real servers.

#[path = "../fleet/fleet.rs"]
#[allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]
mod fleet;

use atp_core::placement::Placement;
use atp_proto::content::{AgentFinal, AgentPartial, Bill, Capabilities, Dispatch, ListedCall};
use atp_proto::frame::kind;
use atp_proto::{CallId, Cost, Flags, Frame, StreamId, TenantId, Tokens, UsdMicros};
use atp_tests::blackbox::peer::{Peer, capabilities, submit, task};
use atp_tests::blackbox::{atp, wait_for};
use fleet::Fleet;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const SHARDS: u32 = 16;
/// With one more as many as an agent's window holds at first.
const STREAMS: usize = 3;

fn agent_of(name: &str) -> Capabilities {
    Capabilities { max_parallel: STREAMS as u32, ..capabilities(name) }
}

fn cost(out_tokens: u64) -> Cost {
    Cost { in_tokens: Tokens(100), out_tokens: Tokens(out_tokens), usd_micros: UsdMicros(100 + 4 * out_tokens) }
}

fn partial(call: CallId) -> Frame {
    let content = AgentPartial { text: Some("half".into()), cost: cost(5), ..AgentPartial::default() };
    Frame::json(call.to_string(), 1, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

fn last(call: CallId) -> Frame {
    let content = AgentFinal { text: Some(" and half".into()), cost: cost(10), ..AgentFinal::default() };
    Frame::json(call.to_string(), 2, Flags::FIN, kind::RESULT_FINAL, &content)
}

/// Three routers that own some shards each. Peers that are written by hand don't answer while the test waits for something else,
/// so heartbeats are as rare as in life.
fn fleet() -> Fleet {
    let mut fleet = Fleet::start(1, SHARDS, 0);
    for n in 0..3 {
        fleet.change(n, "limits: {heartbeat: 300ms}\n", "");
        fleet.launch(n);
    }
    fleet.each_has_its_part(&[0, 1, 2]);
    fleet
}

/// Ids of streams whose shards one router owns, each in another shard as far as there are so many.
fn streams_of(fleet: &Fleet, router: usize) -> Vec<String> {
    let placement = Placement::new(SHARDS, 0);
    let owned: Vec<u64> = fleet.owned(router).into_iter().collect();
    let mut ids = Vec::new();
    for n in 0.. {
        let id = format!("far-{n}");
        let shard = u64::from(placement.shard_of(&TenantId::new("default"), &StreamId::new(&id)));
        let next = ids.len() % owned.len();
        if owned[next] == shard {
            ids.push(id);
        }
        if ids.len() == STREAMS {
            break;
        }
    }
    ids
}

/// Takes the next numbered frame of any of these streams: each comes once, in its order.
fn next_numbered(client: &mut Peer, seqs: &mut BTreeMap<String, u64>) -> Frame {
    loop {
        let frame = client.frame();
        let Some(seq) = seqs.get_mut(&*frame.stream_id).filter(|_| frame.msg_seq > 0) else {
            assert!(!frame.flags.has(Flags::RST), "{}", String::from_utf8_lossy(&frame.content));
            assert_ne!(&*frame.kind, kind::ACCEPTED, "the client has resumed nothing");
            continue;
        };
        *seq += 1;
        assert_eq!(frame.msg_seq, *seq, "{} of {}", &*frame.kind, &*frame.stream_id);
        return frame;
    }
}

#[test]
fn atp_13_5_streams_of_a_router_that_is_killed_go_on_at_others_without_a_gap() {
    let mut fleet = fleet();
    let mut agent = Peer::agent(fleet.routers[1].atp(), &agent_of("half-way"));
    (0..3).for_each(|n| fleet.routers[n].has_agent("half-way"));
    let mut client = Peer::client(fleet.routers[0].atp());
    let streams = streams_of(&fleet, 2);
    let mut seqs: BTreeMap<String, u64> = streams.iter().map(|id| (id.clone(), 0)).collect();
    streams.iter().for_each(|id| client.send(&submit(id, &task("half-way"))));
    let mut calls = BTreeSet::new();
    while calls.len() < STREAMS {
        let call = agent.dispatched().call_id;
        if calls.insert(call) {
            agent.send(&partial(call));
        }
    }
    while seqs.values().any(|seq| *seq < 2) {
        next_numbered(&mut client, &mut seqs);
    }
    // Each router shows all of it, and stops none of it.
    for n in 0..3 {
        let rows = fleet.routers[n].http("GET", "/v1/streams").1;
        assert_eq!(rows["missing"], Value::Null, "{rows}");
        let shown = rows["streams"].as_array().expect("rows").iter().filter(|row| row["state"] == "running").count();
        assert_eq!(shown, STREAMS, "by r{}: {rows}", n + 1);
    }

    fleet.routers[2].kill();
    // New work for its shards waits until they have an owner.
    let late = format!("late-{}", streams[0]);
    seqs.insert(late.clone(), 0);
    client.send(&submit(&late, &task("half-way")));
    // Whoever takes a shard asks the agent about its calls; then they end.
    let mut asked = BTreeSet::new();
    while asked.len() <= STREAMS {
        let dispatch: Dispatch = agent.dispatched();
        if asked.insert(dispatch.call_id) {
            if dispatch.go_on {
                assert!(calls.contains(&dispatch.call_id));
            } else {
                assert!(calls.insert(dispatch.call_id), "a call is dispatched once");
                agent.send(&partial(dispatch.call_id));
            }
            agent.send(&last(dispatch.call_id));
        }
    }
    let mut bills = Vec::new();
    while bills.len() <= STREAMS {
        let frame = next_numbered(&mut client, &mut seqs);
        if &*frame.kind == kind::BILL {
            bills.push(frame.read::<Bill>().expect("a bill"));
        }
    }
    let true_bill = cost(10).usd_micros;
    assert!(bills.iter().all(|bill| bill.settled.usd_micros == true_bill), "{bills:#?}");

    fleet.shared_by(&[0, 1]);
    for n in 0..2 {
        let report = fleet.routers[n].settled();
        assert_eq!(report["shards"], SHARDS);
        let bill = atp::run_json(&["--url", &fleet.routers[n].url(), "bill", &streams[0]]);
        assert_eq!(bill["stream_id"], *streams[0]);
    }
}

#[test]
fn atp_13_5_an_agent_that_loses_its_router_serves_all_shards_from_another_one() {
    let mut fleet = fleet();
    let mut agent = Peer::agent(fleet.routers[2].atp(), &agent_of("mover"));
    (0..3).for_each(|n| fleet.routers[n].has_agent("mover"));
    // One stream of a shard of each of the routers that stay, and the agent's router is killed.
    let mut client = Peer::client(fleet.routers[0].atp());
    let streams = [streams_of(&fleet, 0)[0].clone(), streams_of(&fleet, 1)[0].clone()];
    let mut seqs: BTreeMap<String, u64> = streams.iter().map(|id| (id.clone(), 0)).collect();
    streams.iter().for_each(|id| client.send(&submit(id, &task("mover"))));
    let calls: Vec<Dispatch> = streams.iter().map(|_| agent.dispatched()).collect();
    fleet.routers[2].kill();
    agent.ended();
    for n in 0..2 {
        wait_for("the agent to be gone", || {
            let rows = fleet.routers[n].http("GET", "/v1/agents").1;
            rows["agents"].as_array()?.iter().find(|row| row["name"] == "mover" && row["status"] == "GONE").map(drop)
        });
    }
    let listed = |call: &Dispatch| {
        let (call_id, shard, epoch) = (call.call_id, call.shard, call.epoch);
        ListedCall { call_id, shard, epoch, msg_seq: 0, cost: Cost::default(), done: false }
    };
    let capabilities = Capabilities { calls: calls.iter().map(listed).collect(), ..agent_of("mover") };
    let mut agent = Peer::agent(fleet.routers[1].atp(), &capabilities);
    let mut ended = BTreeSet::new();
    while ended.len() < calls.len() {
        let dispatch = agent.try_dispatched(Duration::from_secs(30)).expect("it is asked to go on");
        let known = calls.iter().any(|call| call.call_id == dispatch.call_id);
        assert!(dispatch.go_on && known, "{dispatch:?}");
        if ended.insert(dispatch.call_id) {
            agent.send(&partial(dispatch.call_id));
            agent.send(&last(dispatch.call_id));
        }
    }
    let mut bills = 0;
    while bills < streams.len() {
        bills += usize::from(&*next_numbered(&mut client, &mut seqs).kind == kind::BILL);
    }
    fleet.shared_by(&[0, 1]);
    fleet.routers[0].settled();
}

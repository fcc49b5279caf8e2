//! A router with several shards is one router to its clients, agents and operator.

mod support;

use atp_core::placement::Placement;
use atp_proto::Cost;
use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Code, Flags, Frame, StreamId, TenantId, Tokens, UsdMicros, WireError};
use atp_router::{Config, Router, StartError};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use support::{Peer, agent, config, http, submit};

const SHARDS: u32 = 5;

fn many(dir: &Path) -> Config {
    Config { shards: Some(SHARDS), ..config(dir) }
}

fn shard_of(stream: &str) -> u32 {
    Placement::new(SHARDS, 0).shard_of(&TenantId::new("default"), &StreamId::new(stream))
}

/// Enough ids that every shard has two.
fn ids() -> Vec<String> {
    let mut in_shard = BTreeMap::<u32, u32>::new();
    let all = (0..).map(|n| format!("s{n}"));
    let two = all.filter(|id| {
        let n = in_shard.entry(shard_of(id)).or_default();
        *n += 1;
        *n <= 2
    });
    two.take(2 * SHARDS as usize).collect()
}

fn last(text: &str) -> AgentFinal {
    let cost = Cost { in_tokens: Tokens(10), out_tokens: Tokens(5), usd_micros: UsdMicros(15) };
    AgentFinal { text: Some(text.into()), cost, ..AgentFinal::default() }
}

/// Answers a dispatch by the name of its call.
async fn answer(agent: &mut Peer) -> (String, u32) {
    let dispatch = agent.expect(kind::DISPATCH).await;
    let shard = dispatch.read::<Dispatch>().expect("a dispatch").shard;
    let call = dispatch.stream_id.to_string();
    agent.send(Frame::json(call.as_str(), 1, Flags::FIN, kind::RESULT_FINAL, &last(&call))).await;
    (call, shard)
}

/// The bills of so many streams, whatever comes between.
async fn bills(client: &mut Peer, n: usize) -> BTreeMap<String, Bill> {
    let mut bills = BTreeMap::new();
    while bills.len() < n {
        let frame = client.next().await.expect("open");
        if &*frame.kind == kind::BILL {
            bills.insert(frame.stream_id.to_string(), frame.read().expect("a bill"));
        }
    }
    bills
}

#[tokio::test]
async fn one_connection_has_streams_in_every_shard_and_views_show_them_together() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(many(dir.path())).await.expect("starts");
    let mut greeter = agent(&router, "greeter").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    let ids = ids();
    for id in &ids {
        client.send(submit(id, "greeter")).await;
    }
    let mut shards = BTreeSet::new();
    for _ in &ids {
        shards.insert(answer(&mut greeter).await.1);
    }
    assert_eq!(shards, (0..SHARDS).collect(), "each dispatch names its shard");
    let bills = bills(&mut client, ids.len()).await;
    assert!(bills.values().all(|bill| bill.state == TaskState::Done && bill.settled.usd_micros.0 == 15), "{bills:?}");

    let (_, report) = http(&router, "POST /v1/verify").await;
    assert_eq!((&report["ok"], &report["shards"]), (&true.into(), &SHARDS.into()), "{report}");
    assert_eq!((&report["streams"], &report["accounts"]), (&ids.len().into(), &1.into()), "{report}");
    let (_, fleet) = http(&router, "GET /v1/fleet").await;
    assert_eq!(fleet["router"]["position"], report["position"], "{fleet}");
    assert_eq!(fleet["router"]["state_hash"], report["state_hash"]);
    let rows = fleet["streams"].as_array().expect("rows");
    assert_eq!(rows.len(), ids.len());
    let agents = fleet["agents"].as_array().expect("rows");
    assert_eq!((agents.len(), &agents[0]["in_flight"]), (1, &0.into()), "{agents:?}");
    assert_eq!(agents[0]["spent_usd_micros"], 15 * ids.len(), "{agents:?}");
    let accounts = fleet["accounts"].as_array().expect("rows");
    assert_eq!(accounts.len(), 1, "{accounts:?}");
    assert_eq!(accounts[0]["settled"]["usd_micros"], 15 * ids.len());
    assert_eq!(accounts[0]["held"]["usd_micros"], 0);
    assert_eq!(accounts[0]["remaining"]["usd_micros"], 100_000_000 - 15 * ids.len() as u64);
    let (_, ready) = http(&router, "GET /readyz").await;
    let owned: Vec<u32> = (0..SHARDS).collect();
    let all = json!({ "count": SHARDS, "serving": SHARDS, "owned": owned, "nowhere": [] });
    assert_eq!(ready["shards"], all, "{ready}");
    let one = http(&router, &format!("GET /v1/streams/{}", ids[3])).await.1;
    router.stop().await.expect("seals");

    // The number stands in the log.
    let router = Router::start(config(dir.path())).await.expect("starts again");
    assert_eq!(http(&router, &format!("GET /v1/streams/{}", ids[3])).await.1, one, "read back from its shard");
    let (_, report) = http(&router, "POST /v1/verify").await;
    assert_eq!((&report["ok"], &report["shards"]), (&true.into(), &SHARDS.into()), "{report}");
    router.stop().await.expect("seals");
    let other = Config { shards: Some(SHARDS + 1), ..config(dir.path()) };
    let Err(StartError::Config(problems)) = Router::start(other).await else { panic!("another number is refused") };
    assert_eq!(problems[0].field, "shards.count");
    assert!(problems[0].message.contains("made with 5"), "{problems:?}");
}

/// An agent, and a client with an open stream in each of three shards: of the ids, each of another shard, the first three.
async fn three_open(router: &Router) -> (Peer, Peer, Vec<String>) {
    let greeter = agent(router, "greeter").await;
    let (mut client, _) = Peer::hello(router, Role::Client).await;
    let mut ids = ids();
    ids.sort_by_key(|id| shard_of(id));
    ids.dedup_by_key(|id| shard_of(id));
    for id in &ids[..3] {
        client.send(submit(id, "greeter")).await;
        client.expect(kind::ACCEPTED).await;
    }
    (greeter, client, ids)
}

#[tokio::test]
async fn a_connection_s_streams_are_counted_over_all_shards() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = many(dir.path());
    config.limits.streams_per_connection = 3;
    let router = Router::start(config).await.expect("starts");
    let (mut greeter, mut client, ids) = three_open(&router).await;
    client.send(submit(&ids[3], "greeter")).await;
    let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
    assert_eq!((refused.code, refused.limit, refused.used), (Code::Limit, Some(3), Some(3)), "{refused}");
    answer(&mut greeter).await;
    bills(&mut client, 1).await;
    client.send(submit(&ids[4], "greeter")).await;
    while &*client.next().await.expect("open").stream_id != ids[4].as_str() {}
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn a_router_s_open_streams_are_counted_over_all_shards() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = many(dir.path());
    config.settings.limits.streams_open_max = 3;
    let router = Router::start(config.clone()).await.expect("starts");
    let (mut greeter, mut client, ids) = three_open(&router).await;
    let refused = async |router: &Router, id: &str| {
        let (mut client, _) = Peer::hello(router, Role::Client).await;
        client.send(submit(id, "greeter")).await;
        let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
        assert_eq!((refused.code, refused.limit, refused.used), (Code::Limit, Some(3), Some(3)), "{refused}");
    };
    refused(&router, &ids[3]).await;
    // One ends, another begins.
    answer(&mut greeter).await;
    bills(&mut client, 1).await;
    client.send(submit(&ids[4], "greeter")).await;
    while &*client.next().await.expect("open").stream_id != ids[4].as_str() {}
    refused(&router, &ids[3]).await;
    router.stop().await.expect("seals");

    // Those that a restart finds count too.
    let router = Router::start(config).await.expect("starts again");
    refused(&router, &ids[3]).await;
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn what_an_agent_says_after_a_restart_finds_the_shard_that_its_list_names() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(many(dir.path())).await.expect("starts");
    let mut greeter = agent(&router, "greeter").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    let id = ids().into_iter().find(|id| shard_of(id) != 0).expect("one");
    client.send(submit(&id, "greeter")).await;
    client.expect(kind::ACCEPTED).await;
    let dispatch = greeter.expect(kind::DISPATCH).await;
    let Dispatch { shard, epoch, call_id, .. } = dispatch.read().expect("a dispatch");
    assert_eq!(shard, shard_of(&id));
    router.stop().await.expect("seals");

    let router = Router::start(config(dir.path())).await.expect("starts again");
    let (mut greeter, _) = Peer::hello(&router, Role::Agent).await;
    let cost = last("").cost;
    let capabilities = Capabilities {
        agent: AgentName::new("greeter"),
        incarnation: "i1".into(),
        max_parallel: 8,
        calls: vec![ListedCall { call_id, shard, epoch, msg_seq: 1, cost, done: true }],
        ..Capabilities::default()
    };
    greeter.send(Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities)).await;
    greeter.send(Frame::json(&*dispatch.stream_id, 1, Flags::FIN, kind::RESULT_FINAL, &last("late"))).await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(Frame::json(&*id, 0, Flags::SYN, kind::RESUME, &Resume { after: 0, ..Resume::default() })).await;
    assert_eq!(bills(&mut client, 1).await[&id].settled.usd_micros.0, 15);
    router.stop().await.expect("seals");
}

//! One suite for every state store: what a router may rely on, and what others may read.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::projection::StreamRow;
use atp_core::view::AgentView;
use atp_proto::content::{OpenMessage, TaskState, WindowView};
use atp_proto::{AgentName, Qos, StreamId, TenantId, Tokens, UsdMicros};
use atp_router::store::{
    Batch, Beat, Fields, Found, Lease, MemoryStore, RedisConfig, RedisStore, Snapshot, StateStore, StoreError, Turn,
    Watermark,
};
use atp_tests::blackbox::redis::Redis;
use std::time::Duration;

const NOW: u64 = 1_790_000_000_000;

fn row(stream: &str, next_msg_seq: u64) -> StreamRow {
    let left = WindowView { max_parallel: None, max_tokens: Some(Tokens(7)), max_usd_micros: Some(UsdMicros(9)) };
    StreamRow {
        tenant: TenantId::new("acme"),
        stream: StreamId::new(stream),
        state: TaskState::Running,
        qos: Qos::Gold,
        next_msg_seq,
        window: WindowView { max_parallel: Some(4), ..left },
        left,
        missing: vec![(2, OpenMessage { msg_seq: 3, frag: 1, missing: vec![(1, 1)] })],
        findings_hash: "ab".into(),
        last_at: NOW,
    }
}

fn agent(name: &str) -> AgentView {
    let json = serde_json::json!({
        "name": AgentName::new(name), "host": "h", "incarnation": "i1", "adapter": "scripted", "models": [],
        "status": "PAUSE", "reason": "gpu_oom", "healthy": true, "breaker": "closed", "aimd": 4, "in_flight": 2,
        "window": {"router": {}, "agent": {}, "effective": {"max_parallel": 3}}, "spent_usd_micros": 0,
    });
    serde_json::from_value(json).unwrap()
}

fn batch(position: u64, streams: Vec<StreamRow>) -> Batch {
    Batch {
        log: "0a0b".into(),
        shard: 0,
        position,
        epoch: 1,
        since_ms: NOW,
        checkpoint: 0,
        router: "r1".into(),
        at_ms: NOW,
        ttl: Duration::from_secs(60),
        ended_ttl: Duration::from_secs(60),
        streams,
        agents: vec![],
    }
}

fn beat(id: &str) -> Beat {
    Beat {
        router: id.into(),
        incarnation: "i1".into(),
        atp: "127.0.0.1:7443".into(),
        http: "127.0.0.1:7080".into(),
        shards: vec![0],
        since_ms: NOW,
        at_ms: NOW,
        ttl: Duration::from_secs(60),
    }
}

fn find<'a>(rows: &'a [Fields], field: &str, value: &str) -> Option<&'a Fields> {
    rows.iter().find(|row| row[field] == value)
}

async fn read<S: StateStore>(store: &mut S) -> Snapshot {
    store.beat(&beat("r1")).await.unwrap();
    store.read().await.unwrap()
}

/// Every field of a row is there, under its name.
async fn rows_are_read_as_they_were_written<S: StateStore>(store: &mut S) {
    let written = Batch { agents: vec![agent("a")], checkpoint: 5, ..batch(10, vec![row("s1", 2), row("s2", 1)]) };
    assert_eq!(store.write(&written).await, Ok(None));
    let all = read(store).await;
    assert_eq!((all.routers.len(), all.shards.len(), all.agents.len(), all.streams.len()), (1, 1, 1, 2));
    let stream = find(&all.streams, "stream", "s1").unwrap();
    let expected = [
        ("tenant", "acme"),
        ("stream", "s1"),
        ("shard", "0"),
        ("position", "10"),
        ("owner", "r1"),
        ("state", "running"),
        ("qos", "gold"),
        ("next_msg_seq", "2"),
        ("window", r#"{"max_parallel":4,"max_tokens":7,"max_usd_micros":9}"#),
        ("calls_left", ""),
        ("budget_left_tokens", "7"),
        ("budget_left_usd_micros", "9"),
        ("missing", r#"[{"frag":1,"lane":2,"missing":[[1,1]],"msg_seq":3}]"#),
        ("consensus_hash", "ab"),
        ("last_event_at", "2026-09-21T14:13:20.000Z"),
        ("heartbeat_at", "2026-09-21T14:13:20.000Z"),
    ];
    assert_eq!(*stream, expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Fields>());
    let agent = &all.agents[0];
    let shown = ["name", "status", "reason", "window", "in_flight", "breaker", "router"].map(|f| agent[f].as_str());
    assert_eq!(shown, ["a", "PAUSE", "gpu_oom", r#"{"max_parallel":3}"#, "2", "closed", "r1"]);
    let shard = ["shard", "log", "position", "epoch", "checkpoint", "owner"].map(|f| all.shards[0][f].as_str());
    assert_eq!(shard, ["0", "0a0b", "10", "1", "5", "r1"]);
    let router = ["id", "incarnation", "atp", "http", "shards"].map(|f| all.routers[0][f].as_str());
    assert_eq!(router, ["r1", "i1", "127.0.0.1:7443", "127.0.0.1:7080", "0"]);
}

async fn the_watermark_only_rises<S: StateStore>(store: &mut S) {
    assert_eq!(store.watermark(0).await, Ok(None));
    assert_eq!(store.write(&batch(10, vec![row("s1", 2)])).await, Ok(None));
    // The same again, because its answer was lost.
    assert_eq!(store.write(&batch(10, vec![row("s1", 2)])).await, Ok(Some(10)));
    // A new owner, and the old one's last words after that.
    let newer = Batch { router: "r2".into(), epoch: 11, ..batch(12, vec![row("s1", 5)]) };
    assert_eq!(store.write(&newer).await, Ok(Some(10)));
    let stale = StoreError::Stale { position: 12, ours: 11, router: "r2".into() };
    assert_eq!(store.write(&batch(11, vec![row("s1", 3), row("s9", 1)])).await, Err(stale));
    let all = read(store).await;
    assert_eq!(all.streams.len(), 1, "nothing of a refused batch is written");
    assert_eq!((all.streams[0]["next_msg_seq"].as_str(), all.streams[0]["owner"].as_str()), ("5", "r2"));
    let known = Watermark { log: "0a0b".into(), position: 12, router: "r2".into() };
    assert_eq!(store.watermark(0).await, Ok(Some(known)));
    assert_eq!(store.watermark(1).await, Ok(None), "each shard has its own");
    let other = Batch { shard: 1, ..batch(3, vec![row("s1", 1)]) };
    assert_eq!(store.write(&other).await, Ok(None));
    // Numbers that a float could confuse with their neighbours.
    let large = 1 << 52;
    assert_eq!(store.write(&batch(large + 1, vec![])).await, Ok(Some(12)));
    let stale = StoreError::Stale { position: large + 1, ours: large, router: "r1".into() };
    assert_eq!(store.write(&batch(large, vec![])).await, Err(stale));
}

async fn another_log_is_refused<S: StateStore>(store: &mut S) {
    assert_eq!(store.write(&batch(10, vec![row("s1", 2)])).await, Ok(None));
    let foreign = Batch { log: "ffff".into(), ..batch(99, vec![row("s1", 9)]) };
    let refused = StoreError::OtherLog { log: "0a0b".into(), ours: "ffff".into(), router: "r1".into() };
    assert_eq!(store.write(&foreign).await, Err(refused));
    assert_eq!(read(store).await.streams[0]["next_msg_seq"], "2");
}

async fn what_is_not_renewed_is_forgotten<S: StateStore>(store: &mut S) {
    let brief = Duration::from_millis(50);
    store.beat(&Beat { ttl: brief, ..beat("gone") }).await.unwrap();
    let old = Batch { ttl: brief, agents: vec![agent("old")], ..batch(1, vec![row("old", 1)]) };
    store.write(&old).await.unwrap();
    let ended = StreamRow { state: TaskState::Done, ..row("ended", 1) };
    store.write(&Batch { ended_ttl: brief, ..batch(1, vec![ended.clone()]) }).await.unwrap();
    let at_once = StreamRow { stream: StreamId::new("s0"), ..ended };
    store.write(&batch(1, vec![row("s0", 1)])).await.unwrap();
    store.write(&Batch { ended_ttl: Duration::ZERO, ..batch(1, vec![at_once]) }).await.unwrap();
    assert!(find(&read(store).await.streams, "stream", "s0").is_none());
    store.write(&Batch { agents: vec![agent("new")], ..batch(2, vec![row("new", 1)]) }).await.unwrap();
    let all = loop {
        let all = read(store).await;
        if all.streams.len() == 1 && all.agents.len() == 1 && all.routers.len() == 1 {
            break all;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!((all.streams[0]["stream"].as_str(), all.agents[0]["name"].as_str()), ("new", "new"));
    assert_eq!(all.routers[0]["id"], "r1");
    assert!(store.watermark(0).await.unwrap().is_some(), "a watermark stays");
}

async fn a_page_of_rows_is_one_write<S: StateStore>(store: &mut S) {
    let streams: Vec<StreamRow> = (0..2_000).map(|n| row(&format!("s{n}"), n)).collect();
    let agents: Vec<AgentView> = (0..1_000).map(|n| agent(&format!("a{n}"))).collect();
    store.write(&Batch { agents, ..batch(1, streams) }).await.unwrap();
    let all = read(store).await;
    assert_eq!((all.streams.len(), all.agents.len()), (2_000, 1_000));
}

const LONG: Duration = Duration::from_secs(60);

/// The turn of router r1 or r2, run 1 of it, which wants and follows these of three shards.
async fn turn<S: StateStore>(store: &mut S, holder: &str, wanted: &[u32], followed: &[(u32, u64)]) -> Found {
    turn_for(store, holder, wanted, followed, LONG).await
}

async fn turn_for<S: StateStore>(
    store: &mut S,
    holder: &str,
    wanted: &[u32],
    followed: &[(u32, u64)],
    ttl: Duration,
) -> Found {
    let (wanted, followed) = (wanted.iter().copied().collect(), followed.iter().copied().collect());
    let router = holder.split(' ').next().unwrap();
    let (wanted, followed) = (&wanted, &followed);
    store.turn(&Turn { router, holder, wanted, followed, shards: 3, at_ms: 5, ttl }).await.unwrap()
}

fn leases(found: &Found) -> Vec<&str> {
    let text = |lease| match lease {
        &Lease::Lapsed => "",
        Lease::Free => "free",
        Lease::Of(holder) => holder,
    };
    found.shards.iter().map(|seen| text(&seen.lease)).collect()
}

async fn one_holds_a_lease<S: StateStore>(store: &mut S) {
    assert_eq!(leases(&turn(store, "r1 1", &[0], &[]).await), ["r1 1", "", ""]);
    assert_eq!(leases(&turn(store, "r1 1", &[0], &[]).await), ["r1 1", "", ""], "again, because the answer was lost");
    assert_eq!(leases(&turn(store, "r2 1", &[0, 1], &[]).await), ["r1 1", "r2 1", ""], "each shard has its own");
    store.release(&[0], "r2 1", None).await.unwrap();
    assert_eq!(leases(&turn(store, "r2 1", &[], &[]).await), ["r1 1", "r2 1", ""], "nobody gives back another's");
    store.release(&[0, 2], "r1 1", None).await.unwrap();
    store.release(&[0, 2], "r1 1", None).await.unwrap();
    assert_eq!(leases(&turn(store, "r2 1", &[], &[]).await), ["free", "r2 1", ""], "given back, not lapsed");
    assert_eq!(leases(&turn(store, "r2 1", &[0], &[]).await), ["r2 1", "r2 1", ""]);
    store.release(&[0, 1], "r2 1", Some(("r1 1", LONG))).await.unwrap();
    assert_eq!(leases(&turn(store, "r2 1", &[0, 1], &[]).await), ["r1 1", "r1 1", ""], "the heir's");
    turn_for(store, "r1 1", &[0, 1], &[], Duration::from_millis(50)).await;
    while leases(&turn(store, "r2 1", &[0], &[]).await) != ["r2 1", "", ""] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn a_router_lives_for_a_lease<S: StateStore>(store: &mut S) {
    let alive = |found: &Found| found.alive.values().cloned().collect::<Vec<_>>();
    assert_eq!(alive(&turn(store, "r1 1", &[], &[]).await), ["r1 1"]);
    assert_eq!(alive(&turn(store, "r2 1", &[], &[]).await), ["r1 1", "r2 1"]);
    let other = turn(store, "r1 2", &[0], &[(1, 7)]).await;
    assert_eq!((alive(&other), leases(&other)), (vec!["r1 1".into(), "r2 1".into()], vec!["", "", ""]), "one run each");
    assert_eq!(other.shards[1].standby, None);
    store.leave("r1", "r1 2").await.unwrap();
    store.leave("r1", "r1 1").await.unwrap();
    let found = turn_for(store, "r1 2", &[0], &[(1, 7)], Duration::from_millis(50)).await;
    assert_eq!((alive(&found), leases(&found)), (vec!["r1 2".into(), "r2 1".into()], vec!["r1 2", "", ""]));
    assert_eq!(found.shards[1].standby, Some(("r1".into(), 7)));
    while alive(&turn(store, "r2 1", &[], &[]).await) != ["r2 1"] {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let found = turn(store, "r2 1", &[], &[]).await;
    assert_eq!((leases(&found), &found.shards[1].standby), (vec!["", "", ""], &None), "all of it lapses");
}

async fn a_turn_sees_who_shows_a_shard_and_who_is_drained<S: StateStore>(store: &mut S) {
    assert_eq!(store.write(&Batch { since_ms: 1_000, ..batch(9, Vec::new()) }).await, Ok(None));
    store.drain("r2", Some("1")).await.unwrap();
    let found = turn(store, "r1 1", &[], &[]).await;
    assert_eq!(found.shards[0].watermark, store.watermark(0).await.unwrap());
    assert_eq!(
        (found.shards[0].epoch, &*found.shards[0].since),
        (batch(9, Vec::new()).epoch, "1970-01-01T00:00:01.000Z")
    );
    assert_eq!((&found.shards[1].watermark, found.shards[1].epoch), (&None, 0));
    assert_eq!(found.drained, [("r2".into(), "1".into())].into());
    store.drain("r2", None).await.unwrap();
    store.drain("r2", None).await.unwrap();
    assert!(turn(store, "r1 1", &[], &[]).await.drained.is_empty());
}

macro_rules! suite {
    ($($name:ident),+ $(,)?) => {
        mod memory {
            $(#[tokio::test]
            async fn $name() {
                super::$name(&mut super::MemoryStore::new()).await;
            })+
        }
        mod redis {
            $(#[tokio::test]
            async fn $name() {
                let redis = super::Redis::start();
                let config = super::RedisConfig::new(&redis.url(), "test").unwrap();
                super::$name(&mut super::RedisStore::new(&config).unwrap()).await;
            })+
        }
    };
}

suite!(
    rows_are_read_as_they_were_written,
    the_watermark_only_rises,
    another_log_is_refused,
    what_is_not_renewed_is_forgotten,
    a_page_of_rows_is_one_write,
    one_holds_a_lease,
    a_router_lives_for_a_lease,
    a_turn_sees_who_shows_a_shard_and_who_is_drained,
);

fn away(result: Result<Option<u64>, StoreError>) -> String {
    match result {
        Err(StoreError::Away(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn redis_comes_back_on_a_new_connection() {
    let mut redis = Redis::start();
    let mut store = RedisStore::new(&RedisConfig::new(&redis.url(), "test").unwrap()).unwrap();
    store.write(&batch(10, vec![row("s1", 2)])).await.unwrap();
    redis.kill();
    assert!(!away(store.write(&batch(11, vec![])).await).is_empty());
    redis.restart();
    // What was written is gone, and the answer says so.
    assert_eq!(store.write(&batch(11, vec![])).await, Ok(None));
    redis.stop();
    assert_eq!(away(store.write(&batch(12, vec![])).await), "no answer within 2 s");
    redis.go_on();
    // The one that wasn't answered may have been written meanwhile: once more is the same.
    let before = store.write(&batch(12, vec![])).await.unwrap();
    assert!(matches!(before, Some(11 | 12)), "{before:?}");
}

#[tokio::test]
async fn a_wrong_password_is_named_and_never_shown() {
    let redis = Redis::start_with_password("right-secret");
    let with = |who: &str| format!("redis://{who}@{}/", redis.address());
    let wrong = RedisConfig::new(&with(":wrong-secret"), "test").unwrap();
    let why = away(RedisStore::new(&wrong).unwrap().write(&batch(1, vec![])).await);
    assert!(why.contains("refuses the user or password"), "{why}");
    let shown = format!("{wrong:?} {why} {:?}", RedisConfig::new("redis://u:wrong-secret@[/", "test"));
    assert!(!shown.contains("secret"), "{shown}");
    // An ACL user with no more than docs/operator.md gives it.
    let acl = ["ACL", "SETUSER", "atp", "on", ">pw", "~{atp*", "+@read", "+@write", "+@connection", "+@scripting"];
    assert_eq!(redis.ask(&[&acl[..], &["+@transaction"]].concat()), "OK");
    let mut store = RedisStore::new(&RedisConfig::new(&with("atp:pw"), "atp").unwrap()).unwrap();
    store.beat(&beat("r1")).await.unwrap();
    store.write(&batch(1, vec![row("s1", 1)])).await.unwrap();
    assert_eq!((read(&mut store).await.streams.len(), store.watermark(0).await.unwrap().is_some()), (1, true));
    let other = RedisConfig::new(&with("atp:pw"), "other").unwrap();
    let why = away(RedisStore::new(&other).unwrap().write(&batch(1, vec![])).await);
    assert!(why.contains("NOPERM") || why.contains("may not"), "{why}");
}

#[tokio::test]
async fn all_keys_of_a_shard_share_a_slot() {
    let redis = Redis::start();
    let mut store = RedisStore::new(&RedisConfig::new(&redis.url(), "p").unwrap()).unwrap();
    store.beat(&beat("r1")).await.unwrap();
    store.write(&Batch { agents: vec![agent("a")], ..batch(1, vec![row("s1", 1)]) }).await.unwrap();
    let keys = redis.ask(&["KEYS", "*"]);
    let mut keys: Vec<&str> = keys.as_array().unwrap().iter().map(|k| k.as_str().unwrap()).collect();
    keys.sort_unstable();
    let expected = [
        "{p:0}:agent:a",
        "{p:0}:agents",
        "{p:0}:shard",
        "{p:0}:stream:acme:s1",
        "{p:0}:streams",
        "{p}:router:r1",
        "{p}:routers",
        "{p}:shards",
    ];
    assert_eq!(keys, expected);
    let lives = |key: &str| redis.ask(&["PTTL", key]).as_i64().unwrap();
    assert_eq!(lives("{p:0}:shard"), -1, "a watermark outlives every router");
    assert!(["{p:0}:agent:a", "{p:0}:stream:acme:s1", "{p}:router:r1"].iter().all(|key| lives(key) > 0));
}

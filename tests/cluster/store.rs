//! The state store fails in every way while tasks run: each task ends, the bill is the ledger, and what the store shows is
//! whole again afterwards. And a log that has lost what the store saw acknowledged isn't served.

use atp_core::clock::rfc3339;
use atp_core::placement::{Placement, SHARDS};
use atp_proto::content::Submit;
use atp_proto::{AgentName, StreamId, TenantId};
use atp_tests::blackbox::history::{billed, true_bill};
use atp_tests::blackbox::load::{self, Told};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::redis::{Redis, Wire};
use atp_tests::blackbox::{atp, wait_for};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const CLIENTS: u64 = 6;
/// Positions of the log that pass while the store is away.
const PROGRESS: u64 = 50;
/// The store shows a stream for a minute after its end.
const RECENT_MS: u64 = 40_000;

const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 6
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: 15ms, repeat: 6, text: \"word \", out_tokens: 5}]
    final: {text: end, in_tokens: 80}
";

fn config(url: &str) -> String {
    format!("accounts: {{default: {{usd: 1000, per: total}}}}\nstore: {{kind: redis, redis: {{url: '{url}'}}}}")
}

fn while_tasks_run(router: &Router, fault: impl FnOnce()) -> Vec<Told> {
    let task = |n: u64| {
        let fanout = n.is_multiple_of(5).then_some(2);
        Submit { task: format!("task {n}"), fanout, ..Submit::default() }
    };
    load::during(&[router.atp()], CLIENTS, task, fault)
}

fn readyz(router: &Router) -> Value {
    let (status, ready) = router.http("GET", "/readyz");
    assert_eq!((status, &ready["ready"]), (200, &json!(true)), "a router is ready without its store: {ready}");
    ready
}

fn position(router: &Router) -> u64 {
    readyz(router)["durable"].as_u64().expect("a position")
}

fn progress(router: &Router) {
    let before = position(router);
    wait_for("tasks to go on", || (position(router) > before + PROGRESS).then_some(()));
}

fn waits_for(router: &Router, store: &str) {
    wait_for(store, || readyz(router)["store"].as_str()?.starts_with(store).then_some(()));
}

/// Tasks go on while the store is away.
fn goes_on_without(router: &Router) {
    waits_for(router, "away since ");
    progress(router);
}

/// Streams that have ended so lately that the store can't have forgotten them.
fn recent(router: &Router) -> BTreeSet<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
    let since = rfc3339(u64::try_from(now).expect("a time") - RECENT_MS);
    let (_, page) = router.http("GET", "/v1/streams");
    let rows = page["streams"].as_array().expect("rows");
    let late = rows.iter().filter(|row| row["last_event_at"].as_str().is_some_and(|at| at > since.as_str()));
    late.map(|row| row["stream_id"].as_str().expect("an id").to_owned()).collect()
}

/// What Redis says of a stream that has ended is what its client was told.
fn shows(redis: &Redis, told: &Told) -> Option<()> {
    let shard = placement().shard_of(&TenantId::new("default"), &StreamId::new(&told.stream));
    let row = redis.hash(&format!("{{atp:{shard}}}:stream:default:{}", told.stream));
    let bill = told.bill();
    let left = bill.remaining.usd_micros.map(|usd| usd.to_string()).unwrap_or_default();
    let expected = json!({
        "state": told.answer().state.as_str(), "owner": "r1", "shard": shard.to_string(), "qos": "silver", "calls_left": row["calls_left"],
        "next_msg_seq": (told.frames.len() + 1).to_string(), "budget_left_usd_micros": left,
    });
    let same = expected.as_object()?.iter().all(|(field, value)| row[field] == *value);
    same.then_some(())
}

fn placement() -> Placement {
    Placement::new(SHARDS, 0)
}

fn shard_keys() -> Vec<String> {
    (0..SHARDS).map(|shard| format!("{{atp:{shard}}}:shard")).collect()
}

/// How far the shards were shown, added up.
fn watermarks(redis: &Redis) -> Option<u64> {
    shard_keys().iter().map(|key| redis.hash(key)["position"].as_str()?.parse::<u64>().ok()).sum()
}

/// `atp store show`, without asking a router.
fn shown(router: &Router) -> Value {
    let config = router.dir().join("atp.yaml");
    atp::run_json(&["store", "show", "--config", config.to_str().expect("text")])
}

/// Nothing was lost or paid twice, and the store has it all.
fn check(router: &Router, redis: &Redis, agents: &[Scripted], told: &[Told]) {
    router.settled();
    let bills: Vec<_> = told.iter().map(Told::bill).collect();
    let truth = true_bill(agents.iter().map(Scripted::meter));
    let calls = billed(&bills);
    for (id, charged) in &truth {
        let actual = calls[id].actual;
        assert_eq!(actual.usd_micros.0, charged.usd_micros, "{id}");
    }
    assert_eq!(calls.values().filter(|c| c.actual.usd_micros.0 > 0).count(), truth.len());
    println!("{} tasks, {} calls", told.len(), truth.len());
    let recent = recent(router);
    assert!(!recent.is_empty());
    for told in told.iter().filter(|t| recent.contains(&t.stream)) {
        wait_for(&format!("stream {} in Redis", told.stream), || shows(redis, told));
    }
    wait_for("the watermarks", || (watermarks(redis)? == position(router)).then_some(()));
    let shard = redis.hash(&format!("{{atp:{}}}:shard", SHARDS - 1));
    assert_eq!((&shard["owner"], &shard["epoch"]), (&json!("r1"), &json!("1")));
    for agent in ["steady-0", "steady-1"] {
        let home = placement().home_of_agent(&AgentName::new(agent));
        wait_for(agent, || (redis.hash(&format!("{{atp:{home}}}:agent:{agent}"))["in_flight"] == "0").then_some(()));
    }
    assert_eq!(redis.hash("{atp}:router:r1")["atp"], router.atp().to_string());
    let shown = shown(router);
    assert!(shown["streams"].as_array().is_some_and(|rows| !rows.is_empty()));
    assert_eq!((&shown["routers"][0]["id"], &shown["shards"][0]["owner"]), (&json!("r1"), &json!("r1")));
    assert_eq!(shown["agents"].as_array().map(Vec::len), Some(2));
}

fn survives(redis: &mut Redis, url: &str, fault: impl FnOnce(&Router, &mut Redis)) {
    let router = Router::start(&config(url));
    let agents = ["steady-0", "steady-1"].map(|name| Scripted::start(router.dir(), name, router.atp(), SCRIPT));
    waits_for(&router, "ok");
    let told = while_tasks_run(&router, || {
        progress(&router);
        fault(&router, redis);
        progress(&router);
    });
    waits_for(&router, "ok");
    check(&router, redis, &agents, &told);
    assert!(!router.stderr().contains("panicked"), "{}", router.stderr());
}

#[test]
fn redis_is_flushed() {
    let mut redis = Redis::start();
    let url = redis.url();
    survives(&mut redis, &url, |router, redis| {
        for _ in 0..3 {
            assert_eq!(redis.ask(&["FLUSHALL"]), "OK");
            progress(router);
        }
    });
}

#[test]
fn redis_is_killed_and_comes_back_empty() {
    let mut redis = Redis::start();
    let url = redis.url();
    survives(&mut redis, &url, |router, redis| {
        redis.kill();
        goes_on_without(router);
        redis.restart();
    });
}

#[test]
fn redis_stops_and_goes_on() {
    let mut redis = Redis::start();
    let url = redis.url();
    survives(&mut redis, &url, |router, redis| {
        redis.stop();
        goes_on_without(router);
        redis.go_on();
        waits_for(router, "ok");
        // Its own way to be slow: no command is run meanwhile.
        assert_eq!(redis.ask(&["CLIENT", "PAUSE", "4000", "ALL"]), "OK");
        goes_on_without(router);
    });
}

#[test]
fn what_redis_says_is_lost() {
    let mut redis = Redis::start();
    let wire = Wire::to(redis.address());
    survives(&mut redis, &wire.url(), |router, redis| {
        wire.deaf(true);
        goes_on_without(router);
        // What it wrote without hearing so is there, and harmless when it comes again.
        assert!(redis.hash("{atp:0}:shard")["position"].is_string());
        wire.deaf(false);
    });
}

#[test]
fn a_failover_loses_what_was_written() {
    let mut redis = Redis::start();
    let url = redis.url();
    survives(&mut redis, &url, |router, redis| {
        // A replica that hadn't heard the last writes takes over: the watermark goes back, rows are missing.
        let keys = shard_keys();
        wait_for("each shard in Redis", || watermarks(redis));
        let positions: Vec<Value> = keys.iter().map(|key| redis.hash(key)["position"].clone()).collect();
        progress(router);
        for (shard, (key, old)) in keys.iter().zip(positions).enumerate() {
            let gone = redis.ask(&["ZRANGE", &format!("{{atp:{shard}}}:streams"), "0", "-1"]);
            for stream in gone.as_array().expect("a list") {
                let stream = format!("{{atp:{shard}}}:stream:{}", stream.as_str().unwrap_or_default());
                let _ = redis.ask(&["DEL", &stream]);
            }
            let _ = redis.ask(&["HSET", key, "position", old.as_str().expect("a position")]);
        }
    });
}

#[test]
fn a_wrong_password_stops_nothing() {
    let redis = Redis::start_with_password("right");
    let router = Router::start(&config(&redis.url().replace("right", "wrong-secret")));
    let agent = Scripted::start(router.dir(), "steady-0", router.atp(), SCRIPT);
    let told = while_tasks_run(&router, || goes_on_without(&router));
    let store = readyz(&router)["store"].to_string();
    assert!(store.contains("refuses the user or password"), "{store}");
    router.settled();
    assert!(!told.is_empty() && !true_bill([agent.meter()]).is_empty());
    assert!(!format!("{store}{}", router.stderr()).contains("secret"), "{}", router.stderr());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

/// What a start says that is refused.
fn refusal(router: &Router) -> String {
    let config = router.dir().join("atp.yaml");
    let output = atp::command(&["router", "--config"]).arg(config).output().expect("the binary under test starts");
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_old_copy_and_another_log_are_not_served() {
    let redis = Redis::start();
    let mut router = Router::start(&config(&redis.url()));
    let mut agent = Scripted::start(router.dir(), "steady-0", router.atp(), SCRIPT);
    let (data, old) = (router.dir().join("data"), router.dir().join("old"));
    let run = |router: &Router| while_tasks_run(router, || progress(router));
    run(&router);
    router.kill();
    copy(&data, &old);
    // The log goes on, a restart on it is no fault.
    router.restart();
    let told = run(&router);
    let last = position(&router);
    wait_for("the watermark", || (watermarks(&redis)? >= last).then_some(()));
    router.kill();

    let new = router.dir().join("new");
    std::fs::rename(&data, &new).expect("a directory");
    copy(&old, &data);
    let why = refusal(&router);
    assert!(why.contains("ELOG") && why.contains("the log here ends at"), "{why}");
    assert!(why.contains("--pattern '{atp:*}:shard'"), "{why}");
    std::fs::remove_dir_all(&data).expect("a directory");
    let why = refusal(&router);
    assert!(why.contains("ELOG") && why.contains("the log here is another one"), "{why}");

    // The volume is restored: everything that was acknowledged is there.
    let _ = std::fs::remove_dir_all(&data);
    std::fs::rename(&new, &data).expect("a directory");
    router.restart();
    for told in &told {
        let (status, row) = router.http("GET", &format!("/v1/streams/{}", told.stream));
        assert_eq!((status, &row["bill"]["settled"]), (200, &json!(told.bill().settled)), "{}", told.stream);
    }
    router.kill();

    // Given up in so many words: the old copy is served, and shown from then on. The agent has known a later owner.
    std::fs::remove_dir_all(&data).expect("a directory");
    copy(&old, &data);
    let keys = shard_keys();
    let delete: Vec<&str> = std::iter::once("DEL").chain(keys.iter().map(String::as_str)).collect();
    assert_eq!(redis.ask(&delete), i64::from(SHARDS));
    router.restart();
    agent.kill();
    agent.restart();
    waits_for(&router, "ok");
    run(&router);
    router.settled();
}

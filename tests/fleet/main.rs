//! Several routers that share one log in Kafka, with Redis for the leases: each owns a part of the shards, and the others take
//! over what one loses. Real processes, real servers; every task ends in one answer, and the bill is true.

mod course;
mod fleet;
mod ownership;

use atp_proto::content::Submit;
use atp_tests::blackbox::crowd::{Crowd, Seen};
use atp_tests::blackbox::history::records;
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::verdict::bills_as_charged;
use atp_tests::blackbox::{atp, wait_for};
use course::Course;
use fleet::{Fleet, LEASE, ROUTERS};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

const ALL: [usize; ROUTERS] = [0, 1, 2];
/// Between two words of an agent.
const SCRIPT_WAIT: Duration = Duration::from_millis(30);
const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 8
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: 30ms, repeat: 8, text: \"word \", out_tokens: 5}]
    final: {text: \"end\", in_tokens: 80}
";
/// The agent that knows only the router which is killed first.
const LOYAL: &str = "loyal";

/// The same run in two sizes.
struct Size {
    per_second: u32,
    at_least: Duration,
    /// In each another router is killed, stopped, stood still.
    rounds: usize,
    /// For how long at least each fault and each return is left alone.
    calm: Duration,
}

impl Size {
    fn of_this_run() -> Self {
        let seconds = Duration::from_secs;
        // A debug build of three routers, four agents and all clients can't carry more on two cores.
        let per_second = if cfg!(debug_assertions) { 10 } else { 30 };
        match std::env::var_os("ATP_TEST_ALL") {
            Some(_) => Self { per_second, at_least: seconds(60), rounds: ROUTERS, calm: seconds(4) },
            None => Self { per_second, at_least: seconds(0), rounds: 1, calm: seconds(1) },
        }
    }

    /// Lets some tasks go by, with whatever owners there are.
    fn work(&self, fleet: &Fleet) {
        let frames = |fleet: &Fleet| fleet.wires.iter().map(Relay::frames).sum::<u64>();
        let (before, begun) = (frames(fleet), Instant::now());
        let done = || frames(fleet) > before + 300 && begun.elapsed() >= self.calm;
        wait_for("work to go on", || done().then_some(()));
    }
}

/// One router after the other is lost in each way.
fn routers_go(fleet: &mut Fleet, course: &mut Course, size: &Size) {
    for (signal, end) in [("SIGKILL", Router::kill as fn(&mut Router)), ("SIGTERM", Router::stop)] {
        let mut without: Vec<u128> = Vec::new();
        for gone in (0..size.rounds).map(|round| round % ROUTERS) {
            let rest: Vec<usize> = ALL.into_iter().filter(|n| *n != gone).collect();
            let begun = Instant::now();
            course.now(format!("r{}: {signal}", gone + 1));
            end(&mut fleet.routers[gone]);
            fleet.shared_by(&rest);
            without.push(begun.elapsed().as_millis());
            size.work(fleet);
            course.now(format!("r{}: starts again after {signal}", gone + 1));
            fleet.launch(gone);
            fleet.each_has_its_part(&ALL);
            size.work(fleet);
        }
        without.sort_unstable();
        println!("{signal}: its shards are served elsewhere after {without:?} ms");
    }
    // SIGSTOP past the lease: others own its shards; it finds out shard by shard, and lives.
    for still in (1..=size.rounds).map(|round| round % ROUTERS) {
        let rest: Vec<usize> = ALL.into_iter().filter(|n| *n != still).collect();
        course.now(format!("r{}: stands still past its lease", still + 1));
        fleet.routers[still].signal("STOP");
        fleet.shared_by(&rest);
        size.work(fleet);
        course.now(format!("r{}: goes on", still + 1));
        fleet.routers[still].signal("CONT");
        fleet.each_has_its_part(&ALL);
        assert!(fleet.routers[still].stderr().contains("owned here no longer"), "{}", fleet.routers[still].stderr());
        size.work(fleet);
    }
}

/// All of them at once: nobody is left who could own a shard.
fn all_go(fleet: &mut Fleet, course: &mut Course, size: &Size) {
    course.now("all routers: SIGKILL at once");
    ALL.into_iter().for_each(|n| fleet.routers[n].kill());
    course.now("all routers start again");
    ALL.into_iter().for_each(|n| fleet.routers[n].launch());
    wait_for("all routers to serve", || ALL.into_iter().all(|n| fleet.routers[n].is_ready()).then_some(()));
    fleet.each_has_its_part(&ALL);
    size.work(fleet);
}

/// Servers go that all routers share.
fn servers_go(fleet: &mut Fleet, course: &mut Course, size: &Size) {
    let before = fleet.shared_by(&ALL);
    course.now("Redis is flushed");
    let _ = fleet.redis.ask(&["FLUSHALL"]);
    size.work(fleet);
    assert_eq!(fleet.shared_by(&ALL), before, "the owners go on");
    course.now("one of three brokers: SIGKILL");
    fleet.brokers.kill(2);
    size.work(fleet);
    course.now("the broker starts again");
    fleet.brokers.revive(2);
    size.work(fleet);
    fleet.shared_by(&ALL);
}

/// What the log, its owners, the agents' meters and the clients say about the same tasks.
fn agree(fleet: &Fleet, seen: &[Seen], meters: &[&Path]) {
    let report = fleet.routers[0].settled();
    assert_eq!(report["shards"], fleet.shards, "{report:#}");
    let log = fleet.routers[0].log();
    let verified = atp::run_json(&["verify", "--log", &log]);
    assert_eq!(verified["ok"], true, "{verified:#}");
    let mut dispatches: BTreeMap<String, u32> = BTreeMap::new();
    for (call, times) in fleet.wires.iter().flat_map(Relay::dispatches) {
        *dispatches.entry(call).or_default() += times;
    }
    let again: Vec<_> = dispatches.iter().filter(|(_, times)| **times > 1).collect();
    assert!(again.is_empty(), "calls that were dispatched again: {again:?}");

    // Each task once: in the log as for its client.
    let (mut accepts, mut closes) = (BTreeMap::<String, u32>::new(), BTreeMap::<String, u32>::new());
    for record in records(&log) {
        let stream = || record["stream_id"].as_str().expect("of a stream").to_owned();
        match record["kind"].as_str() {
            Some("accept") => *accepts.entry(stream()).or_default() += 1,
            Some("close") => *closes.entry(stream()).or_default() += 1,
            _ => {}
        }
    }
    let once: BTreeMap<String, u32> = seen.iter().map(|seen| (seen.stream.clone(), 1)).collect();
    assert_eq!(once.len(), seen.len(), "each client has a stream of its own");
    assert_eq!((&accepts, &closes), (&once, &once), "accepted and closed once, each of them");

    let charged = bills_as_charged(seen.iter().map(|seen| &seen.bill), meters);
    let account = fleet.routers[1].http("GET", "/v1/accounts/default").1;
    assert_eq!(account["accounts"][0]["settled"]["usd_micros"], charged, "{account:#}");
    println!(
        "{} tasks, each with one answer; {} calls dispatched once each; verify is clean; true bill = ledger = {charged} \
         micro-USD",
        seen.len(),
        dispatches.len()
    );
}

#[test]
fn three_routers_share_the_work_and_any_of_them_may_go() {
    let size = Size::of_this_run();
    let mut fleet = Fleet::start(3, 64, ROUTERS);
    println!("shards of each router: {:?}", fleet.each_has_its_part(&ALL));
    let native = fleet.addresses();
    let http: Vec<SocketAddr> = fleet.routers.iter().map(Router::http_addr).collect();
    let dir = tempfile::tempdir().expect("a directory");
    let mut agents: Vec<Scripted> = (0..ROUTERS)
        .map(|n| {
            // Not all of them know the same router first.
            let mut routers = native.clone();
            routers.rotate_left(n);
            Scripted::start_at(dir.path(), &format!("steady-{n}"), &routers, SCRIPT)
        })
        .collect();
    agents.push(Scripted::start(dir.path(), LOYAL, native[0], SCRIPT));
    for router in &fleet.routers {
        (0..ROUTERS).for_each(|n| router.has_agent(&format!("steady-{n}")));
        router.has_agent(LOYAL);
    }

    let crowd = Crowd { native: &native, http: &http, per_second: size.per_second, at_least: size.at_least };
    let task = |n: u64| Submit { task: format!("task {n}"), ..Submit::default() };
    let mut course = Course::default();
    let begun = Instant::now();
    let seen = crowd.during(task, || {
        size.work(&fleet);
        routers_go(&mut fleet, &mut course, &size);
        servers_go(&mut fleet, &mut course, &size);
        all_go(&mut fleet, &mut course, &size);
    });
    println!(
        "{} streams a second for {} s, by a {} build; a lease lives {} ms",
        size.per_second,
        begun.elapsed().as_secs(),
        if cfg!(debug_assertions) { "debug" } else { "release" },
        LEASE.as_millis()
    );
    course.print_pauses(&seen, SCRIPT_WAIT, LOYAL);
    let meters: Vec<&Path> = agents.iter().map(Scripted::meter).collect();
    agree(&fleet, &seen, &meters);
}

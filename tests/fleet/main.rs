//! Several routers that share one log in Kafka, with Redis for the leases: each owns a part of the shards, and the others take
//! over what one loses. Real processes, real servers; every task ends in one answer, and the bill is true.

mod fleet;
mod ownership;

use atp_proto::content::{CallState, Source, Submit, TaskState};
use atp_tests::blackbox::history::{billed, true_bill};
use atp_tests::blackbox::load::{self, Told};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::{atp, wait_for};
use fleet::{Fleet, ROUTERS};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const CLIENTS: u64 = 12;

const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 8
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: {mean: 30ms, sd: 10ms}, repeat: 8, text: \"word \", out_tokens: 5}]
    final: {text: \"end\", in_tokens: 80}
";

/// Puts a load through a fleet while `faults` happen to it, and checks what came of it.
fn through(mut fleet: Fleet, faults: impl FnOnce(&mut Fleet)) {
    let addresses = fleet.addresses();
    let dir = tempfile::tempdir().expect("a directory");
    let agents: Vec<Scripted> = (0..ROUTERS)
        .map(|n| {
            // Not all of them know the same router first.
            let mut routers = addresses.clone();
            routers.rotate_left(n);
            Scripted::start_at(dir.path(), &format!("steady-{n}"), &routers, SCRIPT)
        })
        .collect();
    (0..ROUTERS).for_each(|n| fleet.routers[n].has_agent(&format!("steady-{n}")));
    let task = |n: u64| Submit { task: format!("task {n}"), ..Submit::default() };
    let told = load::during(&addresses, CLIENTS, task, || faults(&mut fleet));

    let mut took: Vec<Duration> = told.iter().map(|told| told.took).collect();
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100].as_millis();
    println!("{} tasks; from submit to bill p50 {} ms, p99 {} ms, max {} ms", took.len(), at(50), at(99), at(100));
    let log = fleet.routers[0].log();
    let verified = wait_for("every call to be settled", || {
        Some(atp::run_json(&["verify", "--log", &log])).filter(|report| report["open_reservations"] == 0)
    });
    assert_eq!(verified["ok"], true, "{verified:#}");
    let mut dispatches: BTreeMap<String, u32> = BTreeMap::new();
    for (call, times) in fleet.wires.iter().flat_map(Relay::dispatches) {
        *dispatches.entry(call).or_default() += times;
    }
    let again: Vec<_> = dispatches.iter().filter(|(_, times)| **times > 1).collect();
    assert!(again.is_empty(), "calls that were dispatched again: {again:?}");
    for told in &told {
        let answer = told.answer();
        assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}", told.stream);
    }
    let bills: Vec<_> = told.iter().map(Told::bill).collect();
    let (truth, calls) = (true_bill(agents.iter().map(Scripted::meter)), billed(&bills));
    for (id, truth) in &truth {
        assert!(truth.lines <= 9, "{id} was called twice: {truth:?}");
        let call = calls.get(id).unwrap_or_else(|| panic!("{id} was charged and stands in no bill"));
        assert_eq!(call.state, CallState::Settled, "{id}");
        let exact = call.source == Some(Source::Reported);
        let billed = call.actual.usd_micros.0;
        assert!(if exact { billed == truth.usd_micros } else { billed >= truth.usd_micros }, "{call:?} {truth:?}");
    }
}

/// Time for some tasks, with whatever owners there are.
fn work(fleet: &Fleet) {
    let frames = |fleet: &Fleet| fleet.wires.iter().map(Relay::frames).sum::<u64>();
    let before = frames(fleet);
    wait_for("work to go on", || (frames(fleet) > before + 300).then_some(()));
}

#[test]
fn three_routers_share_the_work_and_any_of_them_may_go() {
    const ALL: [usize; ROUTERS] = [0, 1, 2];
    let fleet = Fleet::start(3, 64, ROUTERS);
    println!("shards of each router: {:?}", fleet.each_has_its_part(&ALL));
    through(fleet, |fleet| {
        let rounds = if std::env::var_os("ATP_TEST_ALL").is_some() { 10 } else { 1 };
        for (signal, end) in [("SIGKILL", Router::kill as fn(&mut Router)), ("SIGTERM", Router::stop)] {
            let mut pauses: Vec<u128> = Vec::new();
            for round in 0..rounds {
                work(fleet);
                let gone = round % ROUTERS;
                let rest: Vec<usize> = ALL.into_iter().filter(|n| *n != gone).collect();
                let begun = Instant::now();
                end(&mut fleet.routers[gone]);
                fleet.shared_by(&rest);
                pauses.push(begun.elapsed().as_millis());
                fleet.launch(gone);
                fleet.each_has_its_part(&ALL);
            }
            pauses.sort_unstable();
            println!("{signal}: its shards are served elsewhere after {pauses:?} ms");
        }
        work(fleet);

        // SIGSTOP past the lease: others own its shards; it finds out shard by shard, and lives.
        fleet.routers[1].signal("STOP");
        fleet.shared_by(&[0, 2]);
        work(fleet);
        fleet.routers[1].signal("CONT");
        fleet.each_has_its_part(&ALL);
        assert!(fleet.routers[1].stderr().contains("owned here no longer"), "{}", fleet.routers[1].stderr());
        work(fleet);

        // Redis is flushed: whoever owns a shard goes on.
        let before = fleet.shared_by(&ALL);
        let _ = fleet.redis.ask(&["FLUSHALL"]);
        work(fleet);
        assert_eq!(fleet.shared_by(&ALL), before, "the owners go on");

        // One of three brokers is killed.
        fleet.brokers.kill(2);
        work(fleet);
        fleet.brokers.revive(2);
        work(fleet);
        fleet.shared_by(&ALL);
    });
}

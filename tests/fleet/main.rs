//! Several routers that share one log in Kafka, with Redis for the leases: one owns the shard, the others take over when it is
//! killed, stands still or hands over. Real processes, real servers; every task ends in one answer, and the bill is true.

use atp_proto::content::{Submit, TaskState};
use atp_tests::blackbox::kafka::Brokers;
use atp_tests::blackbox::load;
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::redis::Redis;
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::{atp, verdict, wait_for};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

const ROUTERS: usize = 3;
const CLIENTS: u64 = 12;
const LEASE: Duration = Duration::from_secs(1);

const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 8
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: {mean: 30ms, sd: 10ms}, repeat: 8, text: \"word \", out_tokens: 5}]
    final: {text: \"end\", in_tokens: 80}
";

struct Fleet {
    routers: Vec<Router>,
    /// Each router is known by a wire of its own, also to those who are sent to it.
    wires: Vec<Relay>,
    redis: Redis,
    brokers: Brokers,
}

impl Fleet {
    fn start() -> Self {
        let (redis, brokers) = (Redis::start(), Brokers::start(3));
        let log = brokers.log();
        let (mut routers, mut wires) = (Vec::new(), Vec::new());
        for n in 1..=ROUTERS {
            let mut router = Router::prepare("");
            let wire = Relay::to(router.atp());
            router.configure(&format!(
                "router: {{id: r{n}, advertise: \"{}\"}}
{log}
store: {{kind: redis, redis: {{url: \"{}\"}}}}
peers: {{key: of-the-routers-of-one-fleet-in-tests}}
shards: {{lease: {}ms}}
limits: {{heartbeat: 300ms}}
accounts: {{default: {{usd: 1000, per: total}}}}
tasks: {{retries: 4, deadline: 170s, agent_timeout: 100s}}",
                wire.address(),
                redis.url(),
                LEASE.as_millis(),
            ));
            router.launch();
            routers.push(router);
            wires.push(wire);
        }
        let fleet = Self { routers, wires, redis, brokers };
        fleet.owner();
        fleet
    }

    /// The one that serves.
    fn owner(&self) -> usize {
        wait_for("a router to serve", || self.routers.iter().position(Router::is_ready))
    }

    fn addresses(&self) -> Vec<SocketAddr> {
        self.wires.iter().map(Relay::address).collect()
    }
}

/// Puts a load through a fleet while `faults` happen to it, and checks what came of it.
fn through(mut fleet: Fleet, faults: impl FnOnce(&mut Fleet)) {
    let addresses = fleet.addresses();
    let dir = tempfile::tempdir().expect("a directory");
    let agents: Vec<Scripted> = (0..2)
        .map(|n| {
            // Not all of them know the same router first.
            let mut routers = addresses.clone();
            routers.rotate_left(n);
            Scripted::start_at(dir.path(), &format!("steady-{n}"), &routers, SCRIPT)
        })
        .collect();
    let owner = fleet.owner();
    fleet.routers[owner].has_agent("steady-0");
    let task = |n: u64| Submit { task: format!("task {n}"), ..Submit::default() };
    let told = load::during(&addresses, CLIENTS, task, || faults(&mut fleet));

    let owner = fleet.owner();
    let mut took: Vec<Duration> = told.iter().map(|told| told.took).collect();
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100].as_millis();
    println!("{} tasks; from submit to bill p50 {} ms, p99 {} ms, max {} ms", took.len(), at(50), at(99), at(100));
    for told in &told {
        let answer = told.answer();
        assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}", told.stream);
    }
    let meters: Vec<_> = agents.iter().map(Scripted::meter).collect();
    verdict::agree(&fleet.routers[owner], &fleet.wires, &meters, &told, 9);
    verdict::billed_as_charged(&told, &meters);
    let verified = atp::run_json(&["verify", "--log", &fleet.routers[owner].log()]);
    assert_eq!(verified["ok"], true, "{verified:#}");
}

/// Time for some tasks, with whatever owner there is.
fn work(fleet: &Fleet) {
    let frames = |fleet: &Fleet| fleet.wires.iter().map(Relay::frames).sum::<u64>();
    let before = frames(fleet);
    wait_for("work to go on", || (frames(fleet) > before + 300).then_some(()));
}

#[test]
fn one_of_three_routers_serves_and_the_next_takes_over() {
    through(Fleet::start(), |fleet| {
        // Who stands by shows its own figures, not the owner's.
        let owner = fleet.owner();
        let standby = (owner + 1) % ROUTERS;
        assert_eq!(fleet.routers[standby].http("GET", "/metrics").0, 200);
        assert_eq!(fleet.routers[standby].http("GET", "/v1/fleet").0, 307);
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../ops/docker/atp-ready");
        let port = fleet.routers[standby].http_addr().port().to_string();
        let said = std::process::Command::new(script).arg(port).output().expect("bash");
        assert!(said.status.success(), "who stands by does its part: {said:?}");
        let rounds = if std::env::var_os("ATP_TEST_ALL").is_some() { 10 } else { 1 };
        // SIGKILL: the lease has to lapse. SIGTERM: handed over at once.
        for (signal, end) in [("SIGKILL", Router::kill as fn(&mut Router)), ("SIGTERM", Router::stop)] {
            let mut pauses: Vec<u128> = Vec::new();
            for _ in 0..rounds {
                work(fleet);
                let owner = fleet.owner();
                let begun = Instant::now();
                end(&mut fleet.routers[owner]);
                let next = fleet.owner();
                pauses.push(begun.elapsed().as_millis());
                assert_ne!(next, owner);
                fleet.routers[owner].launch();
            }
            pauses.sort_unstable();
            println!("{signal}: another one serves after {pauses:?} ms");
        }
        work(fleet);

        // SIGSTOP past the lease: another one owns the shard, and the old owner finds out and ends.
        let owner = fleet.owner();
        fleet.routers[owner].signal("STOP");
        wait_for("another router to serve", || {
            fleet.routers.iter().enumerate().find(|(n, r)| *n != owner && r.is_ready()).map(|_| ())
        });
        work(fleet);
        fleet.routers[owner].signal("CONT");
        assert_eq!(fleet.routers[owner].ended(), Some(1), "fenced: it says so by its exit code");
        assert!(fleet.routers[owner].stderr().contains("another"), "{}", fleet.routers[owner].stderr());
        fleet.routers[owner].launch();

        // Redis is flushed: whoever owns the shard goes on.
        let owner = fleet.owner();
        let _ = fleet.redis.ask(&["FLUSHALL"]);
        work(fleet);
        assert!(fleet.routers[owner].is_ready(), "the owner goes on");

        // One of three brokers is killed.
        fleet.brokers.kill(2);
        work(fleet);
        fleet.brokers.revive(2);
        work(fleet);
    });
}

//! What goes wrong around a router that lives on: it stands still, its agents do, a wire goes silent, descriptors run out, the
//! wall clock jumps. Each time every task ends, and the bill is what the provider charged.

use atp_proto::content::{Role, Submit, TaskState};
use atp_tests::blackbox::load::{self, Told};
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::{PATIENCE, verdict, wait_for};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::slice;
use std::time::Duration;

/// Three silent heartbeats are 0.9 s.
const CONFIG: &str = "limits: {heartbeat: 300ms}
accounts: {default: {usd: 1000, per: day}}
tasks: {deadline: 170s, agent_timeout: 100s}";
/// Long enough for everybody to think that a connection is lost.
const STILL: Duration = Duration::from_secs(3);
const CLIENTS: u64 = 6;

const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 6
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: {mean: 40ms, sd: 10ms}, repeat: 20, text: \"word \", out_tokens: 5}]
    final: {text: \"end\", in_tokens: 80}
";

/// A router, its one agent behind a wire, and a load that goes through while `fault` happens to them.
fn through(mut router: Router, tasks: u64, fault: impl FnOnce(&mut Router, &Relay, &Scripted) + Send) {
    let relay = Relay::to(router.atp());
    let agent = Scripted::start(router.dir(), "steady", relay.address(), SCRIPT);
    router.has_agent("steady");
    let atp = router.atp();
    let told: Vec<Told> = std::thread::scope(|scope| {
        let load = scope
            .spawn(|| load::run(atp, CLIENTS, tasks, |n| Submit { task: format!("task {n}"), ..Submit::default() }));
        // Calls are under way.
        relay.wait_for(relay.frames() + 60, || false);
        fault(&mut router, &relay, &agent);
        load.join().expect("the load")
    });

    verdict::agree(&router, slice::from_ref(&relay), &[agent.meter()], &told, 21);
    for told in &told {
        let answer = told.answer();
        assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}", told.stream);
    }
    verdict::billed_as_charged(&told, &[agent.meter()]);
}

fn misses_agent(router: &Router) {
    wait_for("the router to miss the agent", || {
        let (_, answer) = router.http("GET", "/v1/agents");
        answer["agents"].as_array()?.iter().all(|row| row["status"] == "GONE").then_some(())
    });
}

#[test]
fn a_router_that_stands_still_loses_nothing() {
    through(Router::start(CONFIG), 40, |router, _, _| {
        router.signal("STOP");
        std::thread::park_timeout(STILL);
        router.signal("CONT");
    });
}

#[test]
fn an_agent_that_stands_still_goes_on_with_its_calls() {
    through(Router::start(CONFIG), 40, |router, _, agent| {
        agent.signal("STOP");
        misses_agent(router);
        agent.signal("CONT");
        router.has_agent("steady");
    });
}

#[test]
fn an_agent_that_finds_no_router_tries_on_until_one_is_there() {
    let mut router = Router::prepare(CONFIG);
    let mut agent = Scripted::start(router.dir(), "early", router.atp(), SCRIPT);
    let said = |agent: &Scripted| agent.stderr().matches("no router takes this agent yet").count();
    wait_for("the agent to say it more than once", || (said(&agent) > 2).then_some(()));
    router.restart();
    router.has_agent("early");
    agent.kill();
}

#[test]
fn a_wire_that_goes_silent_is_noticed_by_both_ends() {
    through(Router::start(CONFIG), 40, |router, relay, _| {
        relay.be_silent(true);
        misses_agent(router);
        relay.be_silent(false);
        router.has_agent("steady");
    });
}

#[test]
fn a_reload_under_load_disturbs_nothing() {
    through(Router::start(CONFIG), 40, |router, _, _| {
        for _ in 0..20 {
            router.signal("HUP");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    });
}

#[test]
fn a_crowd_leaves_the_log_its_files() {
    let mut router = Router::prepare("");
    // 256 are the router's own; of 44 a quarter is HTTP's.
    router.restart_under(&["prlimit", "--nofile=300:300"]).expect("serves");
    assert!(router.stderr().contains("limits.connections: 33 native and 11 HTTP"), "{}", router.stderr());
    let _agent = Scripted::start(router.dir(), "steady", router.atp(), SCRIPT);
    router.has_agent("steady");
    let mut client = Peer::client(router.atp());
    let crowd: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(router.atp()).expect("a connection")).collect();
    client.send(&submit("inside", &task("steady")));
    assert_eq!(client.to_the_bill("inside").len(), 24, "accepted, 20 chunks, the lane's end, the answer, the bill");
    drop(crowd);
    wait_for("a place", || Peer::hello(router.atp(), Role::Client).ok());
    router.settled();
}

#[test]
fn a_head_that_never_ends_does_not_hold_the_http_port() {
    let router = Router::start("limits: {http_connections: 2}");
    let slow: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut io = TcpStream::connect(router.http_addr()).expect("the router listens");
            io.write_all(b"GET /readyz HTTP/1.1\r\nx-slow: ").expect("open");
            io
        })
        .collect();
    for mut io in slow {
        io.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut said = Vec::new();
        io.read_to_end(&mut said).expect("the router closes");
    }
    assert_eq!(router.http("GET", "/readyz").0, 200);
}

/// `libfaketime.so.1` where packages lay it.
fn faketime() -> PathBuf {
    let libraries = std::fs::read_dir("/usr/lib").expect("libraries").flatten().map(|e| e.path());
    let found = libraries.chain([PathBuf::from("/usr/lib")]).map(|dir| dir.join("faketime/libfaketime.so.1"));
    found.into_iter().find(|path| path.exists()).expect("install libfaketime (Debian, Ubuntu: apt install libfaketime)")
}

/// The wall clock of a process that was started under `faketime` jumps to so many seconds from the true time.
fn jump(file: &Path, seconds: i64) {
    std::fs::write(file, format!("{seconds:+}\n")).expect("a file");
}

fn under_faketime() -> (Router, PathBuf) {
    let mut router = Router::start(CONFIG);
    let file = router.dir().join("faketime");
    jump(&file, 0);
    router.kill();
    for (name, value) in [
        ("LD_PRELOAD", faketime()),
        ("FAKETIME_TIMESTAMP_FILE", file.clone()),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
    ] {
        router.set_env(name, value);
    }
    router.restart();
    (router, file)
}

fn clock_ahead_ms(router: &Router) -> i64 {
    router.http("GET", "/readyz").1["wall_clock_minus_logged_ms"].as_i64().expect("a difference")
}

#[test]
fn a_wall_clock_that_jumps_ends_no_task_and_moves_no_window() {
    let (router, file) = under_faketime();
    through(router, 60, |router, relay, _| {
        for (seconds, sign) in [(-7_200, -1), (86_400, 1)] {
            jump(&file, seconds);
            relay.wait_for(relay.frames() + 20, || false);
            wait_for("the difference to show", || {
                (clock_ahead_ms(router).signum() == sign && clock_ahead_ms(router).abs() > 3_600_000).then_some(())
            });
        }
        let (_, accounts) = router.http("GET", "/v1/accounts");
        let windows: Vec<_> = accounts["accounts"].as_array().expect("accounts").iter().map(|a| &a["window"]).collect();
        assert!(windows.windows(2).all(|pair| pair[0] == pair[1]), "{accounts:#}");
        jump(&file, 0);
    });
}

#[test]
fn a_restart_with_a_clock_behind_the_log_keeps_the_logs_time() {
    let (mut router, file) = under_faketime();
    let agent = Scripted::start(router.dir(), "steady", router.atp(), SCRIPT);
    router.has_agent("steady");
    let told = load::follow(router.atp(), "before", &task("steady"));
    router.kill();
    jump(&file, -3 * 86_400);
    router.restart();
    router.has_agent("steady");
    assert!(clock_ahead_ms(&router) < -2 * 86_400_000, "the log's time stands");
    let after = load::follow(router.atp(), "after", &task("steady"));
    assert_eq!(after.answer().state, TaskState::Done);
    // The day that it was spent on is still the day: what was settled counts.
    let (_, accounts) = router.http("GET", "/v1/accounts");
    let both = told.bill().settled.usd_micros.0 + after.bill().settled.usd_micros.0;
    assert_eq!(accounts["accounts"][0]["settled"]["usd_micros"], both, "{accounts:#}");
    router.settled();
    drop(agent);
}

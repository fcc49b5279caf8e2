//! A disk that another fills at random moments: a small tmpfs of the test's own under the router's data. New tasks are
//! refused and nothing else is: what runs is settled, the router lives, and goes on when there is room again.

use atp_proto::content::{CallState, Source, Submit};
use atp_proto::{Code, WireError};
use atp_tests::blackbox::history::{billed, true_bill};
use atp_tests::blackbox::load::{self, Told};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::verdict::replays;
use atp_tests::blackbox::{seed, wait_for};
use atp_tests::simulation::rng::Rng;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Current segment and spare together are within the last 4 MiB: a disk that is filled to the last byte stops the calls.
const SEGMENT: u64 = 2 * MIB;
/// Room for all that the load writes; the filler takes the rest.
const DISK: u64 = 256 * MIB;
const CLIENTS: u64 = 12;
const CONFIG: &str = "limits: {segment_bytes: 2097152}
accounts: {default: {usd: 1000, per: total}}
tasks: {retries: 2, deadline: 170s}";

/// Costs more than it says, so that its grants have to grow while it runs.
fn chatty() -> String {
    // Small enough for a final in one fragment.
    let text = "word ".repeat(25);
    format!(
        "models: [{{id: chatty, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}}]
max_parallel: 6
estimate: {{mode: declared, in_tokens: 80, out_tokens: 40}}
calls:
  - chunks: [{{after: {{mean: 25ms, sd: 10ms}}, repeat: 40, text: \"{text}\", out_tokens: 5}}]
    final: {{text: \"end\", in_tokens: 80}}
"
    )
}

const BRIEF: &str = "models: [{id: brief, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 6
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: {mean: 25ms, sd: 10ms}, repeat: 8, text: \"word \", out_tokens: 5}]
    final: {text: \"end\", in_tokens: 80}
";

const NESTED: &str = "ATP_TEST_OWN_MOUNTS";

/// Runs the test of this name in a mount namespace of its own: what it mounts is gone with it, however it ends, and nobody
/// else sees it.
fn with_own_mounts(test: &str, body: fn()) {
    if std::env::var_os(NESTED).is_some() {
        return body();
    }
    let may = |args: &[&str]| Command::new("unshare").args(args).arg("true").output().is_ok_and(|o| o.status.success());
    let ways: [&[&str]; 2] = [&["--mount"], &["--map-root-user", "--mount"]];
    let way = ways.into_iter().find(|way| may(way)).expect(
        "no mount namespace: install `unshare` (util-linux), and run this as root or where users may make namespaces",
    );
    let exe = std::env::current_exe().expect("a test has a path");
    let mut command = Command::new("unshare");
    command.args(way).arg(exe).args(["--exact", test, "--nocapture"]).env(NESTED, "1");
    let output = command.output().expect("unshare was there just now");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{test} failed in its namespace: {}", output.status);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{test} didn't run in its namespace");
}

/// A mounted tmpfs and the file that fills it.
struct Disk {
    dir: PathBuf,
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl Disk {
    fn mount(dir: &Path) -> Self {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).expect("a directory");
        let options = format!("size={DISK}");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir).output();
        let output = output.expect("`mount` (util-linux) is installed");
        assert!(output.status.success(), "no tmpfs can be mounted: {}", said(&output));
        let disk = Self { dir: dir.into() };
        assert!(disk.free() <= DISK, "{} is not the small disk", dir.display());
        disk
    }

    fn free(&self) -> u64 {
        let output = Command::new("stat").args(["-f", "-c", "%a %S"]).arg(&self.dir).output();
        let text = said(&output.expect("`stat` (coreutils) is installed"));
        let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<u64>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(blocks), Some(bytes)) => blocks * bytes,
            _ => panic!("stat -f says: {text}"),
        }
    }

    fn filler(&self) -> PathBuf {
        self.dir.join("filler")
    }

    /// Takes all but `leave` bytes, whoever else writes.
    fn fill(&self, leave: u64) {
        let mut file = File::create(self.filler()).expect("a name on the disk");
        let zeros = vec![0; MIB as usize];
        loop {
            let mut over = self.free().saturating_sub(leave);
            if over == 0 {
                return;
            }
            while over > 0 {
                match file.write(&zeros[..over.min(MIB) as usize]) {
                    Ok(n) if n > 0 => over -= n as u64,
                    Ok(_) => return,
                    Err(e) if e.kind() == std::io::ErrorKind::StorageFull => return,
                    Err(e) => panic!("{}: {e}", self.filler().display()),
                }
            }
        }
    }

    fn give_back(&self) {
        std::fs::remove_file(self.filler()).expect("it was filled");
    }

    /// A log that has just been opened grows without a spare for a moment; only then can a full disk stop it at once.
    fn has_a_spare(&self) {
        wait_for("a zero-filled segment", || {
            let files = std::fs::read_dir(self.dir.join("log")).ok()?.filter_map(Result::ok);
            let newest = files.map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "log")).max()?;
            newest.metadata().ok().filter(|m| m.len() >= SEGMENT)
        });
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The router may still have files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.dir).status();
    }
}

fn refused_for_room(error: &WireError) {
    assert_eq!((error.code, error.judged), (Code::Log, false), "{error:?}");
    assert!(error.retry_after_ms.is_some() && error.message.contains("nearly full"), "{error:?}");
}

fn ready(router: &Router, wanted: bool) {
    let status = if wanted { 200 } else { 503 };
    wait_for(&format!("/readyz to say {status}"), || (router.http("GET", "/readyz").0 == status).then_some(()));
}

/// Calls that run, as the shard counts them.
fn in_flight(router: &Router) -> u64 {
    let (_, answer) = router.http("GET", "/v1/agents");
    let rows = answer["agents"].as_array().expect("rows");
    rows.iter().map(|row| row["in_flight"].as_u64().expect("a count")).sum()
}

#[test]
fn what_runs_is_settled_whenever_the_disk_fills() {
    with_own_mounts("disk::what_runs_is_settled_whenever_the_disk_fills", fill_and_free);
}

fn fill_and_free() {
    let rounds = if std::env::var_os("ATP_TEST_ALL").is_some() { 24 } else { 6 };
    let mut rng = Rng::new(seed(4));
    let mut router = Router::start(CONFIG);
    router.kill();
    let disk = Disk::mount(&router.dir().join("data"));
    router.restart();
    let (atp, relay) = (router.atp(), Relay::to(router.atp()));
    let scripts = [("chatty-0", chatty()), ("chatty-1", chatty()), ("brief", BRIEF.to_owned())];
    let agents = scripts.map(|(name, script)| Scripted::start(router.dir(), name, relay.address(), &script));
    ["chatty-0", "chatty-1", "brief"].iter().for_each(|name| router.has_agent(name));

    let (over, next, refusals) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let client = || {
        let mut all: Vec<Told> = Vec::new();
        while !over.load(Ordering::Relaxed) {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let task = Submit { task: format!("task {n}"), fanout: (n % 4 == 0).then_some(2), ..Submit::default() };
            loop {
                // Nothing was judged, so the same task comes again under the same key.
                let told = load::follow(atp, &format!("key-{n}"), &task);
                let Some(error) = &told.refused else {
                    all.push(told);
                    break;
                };
                refused_for_room(error);
                refusals.fetch_add(1, Ordering::Relaxed);
                std::thread::park_timeout(Duration::from_millis(50));
            }
        }
        all
    };
    let mut met = 0;
    let told: Vec<Told> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        let mut extra = Vec::new();
        for round in 0..rounds {
            disk.has_a_spare();
            relay.wait_for(relay.frames() + rng.range(20, 600), || false);
            // To the last byte in every second round, else somewhere below the mark of two segments.
            let leave = if round % 2 == 0 { 0 } else { rng.below(2 * SEGMENT - MIB / 2) };
            disk.fill(leave);
            met += in_flight(&router);
            ready(&router, false);
            let (key, task) = (format!("extra-{round}"), Submit { task: "more".into(), ..Submit::default() });
            let refused = load::follow(atp, &key, &task).refused.expect("the disk is full");
            refused_for_room(&refused);
            if leave == 0 {
                wait_for("the last mark", || router.stderr().contains("running calls are told to stop").then_some(()));
            }
            wait_for("the running calls to end", || (in_flight(&router) == 0).then_some(()));
            router.verify();
            println!("round {round}: {leave} bytes left free, {} in the end", disk.free());
            let dies = rng.below(3) == 0;
            if dies {
                router.kill();
            }
            disk.give_back();
            if dies {
                router.restart();
            }
            ready(&router, true);
            let told = load::follow(atp, &key, &task);
            assert!(told.refused.is_none(), "there is room again: {:?}", told.refused);
            extra.push(told);
        }
        over.store(true, Ordering::Relaxed);
        extra.extend(clients.into_iter().flat_map(|client| client.join().expect("a client")));
        extra
    });

    let refusals = refusals.into_inner();
    let stopped = |t: &&Told| t.answer().error.is_some_and(|e| e.code == Code::Log);
    let stopped = told.iter().filter(stopped).count();
    let n = told.len();
    println!("{n} tasks, {refusals} refusals, {met} calls ran when the disk was filled, {stopped} tasks were stopped");
    assert!(
        met >= rounds && stopped > 0,
        "calls ran when the disk was filled, and were stopped where it was to the last"
    );
    router.settled();
    let bills: Vec<_> = told.iter().map(Told::bill).collect();
    let truth = true_bill(agents.iter().map(Scripted::meter));
    for (id, call) in billed(&bills) {
        match call.state {
            CallState::Void => assert!(!truth.contains_key(&id), "{id} is void and was called"),
            CallState::Settled => {
                assert_eq!(call.source, Some(Source::Reported), "{id}: {call:?}");
                // One that was stopped before its first chunk cost nothing.
                let charged = truth.get(&id).map_or(0, |t| t.usd_micros);
                assert_eq!(call.actual.usd_micros.0, charged, "{id}: billed as charged");
            }
            other => panic!("{id} is {other:?} on a bill"),
        }
    }
    replays(&router);
    router.kill();
    router.restart();
    router.settled();
    let (_, row) = router.http("GET", &format!("/v1/streams/{}", told[0].stream));
    assert_eq!(row["bill"]["settled"], serde_json::json!(told[0].bill().settled), "a bill stands after a restart");
}

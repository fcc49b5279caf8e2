//! What the logs of the corpus tell: small plays with real routers and agents, one for each corner of the record format.

use atp_proto::content::{AgentFinal, Capabilities, EstimateDeclaration, EstimateFigures, ModelInfo, Submit};
use atp_proto::frame::{Meta, kind};
use atp_proto::{AgentName, Amount, Cost, Flags, Frame, Limit, Tokens, UsdMicros};
use atp_tests::blackbox::history::records;
use atp_tests::blackbox::load::follow;
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::{atp, wait_for};
use std::io::Write;

/// Ends with a router that is down; what it left is the log.
pub(crate) type Play = fn() -> Router;

pub(crate) const PLAYS: [(&str, Play); 9] = [
    ("plain", plain),
    ("fan-out", fan_out),
    ("tools", tools),
    ("refusals", refusals),
    ("windows", windows),
    ("late", late),
    ("later", later),
    ("crash", crash),
    ("checkpoint", checkpoint),
];

const CONFIG: &str = "accounts: {default: {usd: 100, per: total}}\nshards: {count: 4}\n";

/// Two chunks and a final: 100 tokens in, 25 out.
const WRITER: &str = "models: [{id: m1, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
estimate: {mode: declared, in_tokens: 100, out_tokens: 30}
calls:
  - chunks: [{after: 5ms, repeat: 2, text: \"word \", out_tokens: 10}]
    final: {text: \"end\", in_tokens: 100, out_tokens: 5, confidence: 0.8}
";

fn agent(router: &Router, name: &str, yaml: &str) -> Scripted {
    let agent = Scripted::start(router.dir(), name, router.atp(), yaml);
    router.has_agent(name);
    agent
}

fn by(names: &[&str]) -> Submit {
    let agents = names.iter().map(|name| AgentName::new(name)).collect();
    Submit { task: "review".into(), agents, ..Submit::default() }
}

/// One task, one agent, one bill; sealed by a stop.
fn plain() -> Router {
    let mut router = Router::start(CONFIG);
    let _agent = agent(&router, "writer", WRITER);
    follow(router.atp(), "plain", &by(&["writer"])).bill();
    router.settled();
    router.stop();
    router
}

/// Two agents that agree on one finding; one refuses first, so that a lane is void and another one replaces it.
fn fan_out() -> Router {
    let mut router = Router::start(&format!("{CONFIG}tasks: {{retries: 2}}\n"));
    let finding = r#"{claim: "unwrap on user input", file: src/lib.rs, line: 3, severity: high}"#;
    let other = r#"{claim: "no test", file: src/lib.rs, line: 9, severity: low}"#;
    let script = |first: &str, findings: &str| {
        format!(
            "models: [{{id: m1, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}}]
estimate: {{mode: declared, in_tokens: 50, out_tokens: 20}}
calls:
{first}  - chunks: [{{after: 5ms, text: \"I see \", out_tokens: 10}}]
    final: {{text: \"two\", findings: [{findings}], in_tokens: 50, confidence: 0.9}}
"
        )
    };
    let _one = agent(&router, "one", &script("", finding));
    let refusal = "  - refuse: {code: EWINDOW_AGENT, retry_after: 50ms}\n";
    let _two = agent(&router, "two", &script(refusal, &format!("{finding}, {other}")));
    let task = Submit { fanout: Some(2), ..Submit { task: "review".into(), ..Submit::default() } };
    follow(router.atp(), "fan-out", &task).bill();
    router.settled();
    router.stop();
    router
}

/// A tool that the router lends, one of the agent's own, and one that is refused.
fn tools() -> Router {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("notes.txt"), "what the file says").unwrap();
    let mut router = Router::start(&format!(
        "accounts: {{default: {{usd: 100, per: total, tools: [fs.read, search]}}}}\n\
         tools: {{fs_read: {{root: {}, usd: 0.00007}}}}\n",
        root.path().display()
    ));
    let script = "models: [{id: m1, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
tools: [search]
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks:
      - {text: \"read {result} \", out_tokens: 5, tool: {name: fs.read, args: {path: notes.txt}}}
      - {text: \"found {result} \", out_tokens: 5, tool: {name: search, args: {q: x}, budget: {tokens: 10, usd_micros: 50}}}
      - {text: \"not {result} \", out_tokens: 5, tool: {name: shell, args: {cmd: ls}}}
    final: {text: \"end\", in_tokens: 80}
";
    let _agent = agent(&router, "handy", script);
    let mut client = Peer::client(router.atp());
    let permissions = ["fs.read", "search"].map(str::to_owned).to_vec();
    let meta = Meta { tool_permissions: permissions, ..Meta::default() };
    client.send(&Frame { meta: Some(Box::new(meta)), ..submit("with-tools", &by(&["handy"])) });
    client.to_the_bill("with-tools");
    router.settled();
    router.stop();
    router
}

/// More than the account has; no agent and no patience; a deadline in vain; the same key with another task.
fn refusals() -> Router {
    let mut router = Router::start("accounts: {default: {usd: 0.002, per: total}}\nshards: {count: 4}\n");
    let _agent = agent(&router, "writer", WRITER);
    let _dear = agent(&router, "dear", &WRITER.replace("out_tokens: 30", "out_tokens: 3000"));
    follow(router.atp(), "first", &by(&["writer"])).bill();
    let budget = Limit { usd_micros: Some(UsdMicros(2)), tokens: None };
    let refused = [
        ("tiny", Submit { budget, ..by(&["writer"]) }),
        ("nobody", Submit { wait: false, ..by(&["stranger"]) }),
        ("first", by(&["stranger"])),
    ];
    for (key, task) in refused {
        assert!(follow(router.atp(), key, &task).refused.is_some(), "{key}");
    }
    // Elsewhere than at the account's home that is known only after it was accepted.
    let dear = follow(router.atp(), "dear", &by(&["dear"]));
    assert!(dear.refused.is_some() || dear.answer().error.is_some());
    let late = Submit { deadline_ms: Some(300), ..by(&["stranger"]) };
    let _ = follow(router.atp(), "in-vain", &late);
    router.settled();
    router.stop();
    router
}

/// Windows of a minute that turn, another limit, a pace and leave to go faster, an agent that underestimates until its tier
/// falls, one that says PAUSE, one that is drained.
fn windows() -> Router {
    let config = |usd: &str| {
        format!(
            "accounts: {{default: {{usd: {usd}, per: minute, pacing: {{mode: observe}}, max_parallel: 4}}}}\nshards: {{count: 4}}\n"
        )
    };
    let mut router = Router::start(&config("1"));
    // Each answer costs far more than those before it.
    let growing = (1..=12).map(|n| 20 * 4_u64.pow(n) / 3_u64.pow(n)).map(|tokens| {
        format!("  - {{chunks: [{{after: 15ms, repeat: 8, text: \"word \", out_tokens: {tokens}}}], final: {{in_tokens: 10}}}}\n")
    });
    let low = format!(
        "models: [{{id: m1, in_usd_per_mtok: 0.50, out_usd_per_mtok: 1.00}}]
reach: {{tokens: 700, usd_micros: 700}}
estimate: {{mode: declared, in_tokens: 10, out_tokens: 5}}
calls:
{}",
        growing.collect::<String>()
    );
    let _low = agent(&router, "low", &low);
    let pausing = format!("{WRITER}status: [{{at: 50ms, status: PAUSE, retry_after: 60s, reason: quota}}]\n");
    let _pausing = agent(&router, "pausing", &pausing);
    for n in 0..12 {
        follow(router.atp(), &format!("low-{n}"), &by(&["low"])).bill();
    }
    let url = router.url();
    let command = |args: &[&str]| {
        let args: Vec<&str> = [&["--url", url.as_str()], args].concat();
        let output = atp::run(&args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    command(&["accounts", "faster", "default", "--usd", "0.01", "--for", "2h", "--by", "ada"]);
    command(&["drain", "agent", "pausing"]);
    router.settled();
    router.stop();
    router.configure(&config("2"));
    router.restart();
    router.has_agent("low");
    let windows = || records(&router.log()).iter().filter(|r| r["kind"] == "window").count();
    let first = windows();
    let mut n = 0;
    wait_for("the next minute", || {
        n += 1;
        follow(router.atp(), &format!("turn-{n}"), &by(&["low"])).bill();
        std::thread::park_timeout(std::time::Duration::from_secs(10));
        (windows() > first).then_some(())
    });
    router.settled();
    router.stop();
    router
}

/// An agent that ends a call long after the router gave it up: expired, then adjusted.
fn late() -> Router {
    ends_behind("settle", "adjust")
}

/// The same when the money that was lent for it has gone back: the account's home counts the difference.
fn later() -> Router {
    ends_behind("share_back", "share_late")
}

/// The agent ends its call when the log has the one kind of record, which must lead to the other.
fn ends_behind(cause: &str, effect: &str) -> Router {
    let mut router = Router::start(&format!("{CONFIG}tasks: {{agent_timeout: 500ms, retries: 0}}\n"));
    let figures = EstimateFigures { in_tokens: Tokens(100), out_tokens: Tokens(100), ..EstimateFigures::default() };
    let model = ModelInfo {
        id: "m1".into(),
        in_usd_micros_per_mtok: Some(1_000_000),
        out_usd_micros_per_mtok: Some(4_000_000),
        context_tokens: None,
    };
    let capabilities = Capabilities {
        agent: AgentName::new("late"),
        adapter: "test".into(),
        incarnation: "only".into(),
        max_parallel: 2,
        models: vec![model],
        estimate: Some(EstimateDeclaration { figures, ..EstimateDeclaration::default() }),
        reach: Amount::new(10, 40),
        ..Capabilities::default()
    };
    let mut agent = Peer::agent(router.atp(), &capabilities);
    router.has_agent("late");
    let mut client = Peer::client(router.atp());
    client.send(&submit("late", &task("late")));
    let call = agent.dispatched().call_id;
    client.to_the_bill("late");
    let kinds = |kind: &str| records(&router.log()).iter().any(|r| r["kind"] == kind);
    wait_for(cause, || kinds(cause).then_some(()));
    let cost = Cost { in_tokens: Tokens(10), out_tokens: Tokens(15), usd_micros: UsdMicros(70) };
    let end = AgentFinal { text: Some("at last".into()), cost, ..AgentFinal::default() };
    agent.send(&Frame::json(call.to_string(), 1, Flags::FIN, kind::RESULT_FINAL, &end));
    wait_for(effect, || kinds(effect).then_some(()));
    router.settled();
    router.stop();
    router
}

/// Killed in the middle of calls: one goes on under the next owner, one is lost with its agent, one is running when the router
/// is killed for good, in the middle of a write.
fn crash() -> Router {
    let mut router = Router::start(CONFIG);
    let slow =
        WRITER.replace("repeat: 2", "repeat: 12").replace("5ms", "50ms").replace("out_tokens: 30", "out_tokens: 150");
    let _lives = agent(&router, "lives", &slow);
    let mut dies = agent(&router, "dies", &slow.replace("estimate", "effects: external\nestimate"));
    let atp = router.atp();
    std::thread::scope(|scope| {
        let tasks = ["lives", "dies"].map(|name| scope.spawn(move || follow(atp, name, &by(&[name]))));
        let chunks = |router: &Router| records(&router.log()).iter().filter(|r| r["kind"] == "frame").count();
        wait_for("chunks", || (chunks(&router) > 6).then_some(()));
        router.kill();
        dies.kill();
        router.restart();
        dies.restart();
        for task in tasks {
            task.join().unwrap().bill();
        }
        router.settled();
        let before = chunks(&router);
        let mut client = Peer::client(atp);
        client.send(&submit("cut", &by(&["lives"])));
        wait_for("chunks", || (chunks(&router) > before + 3).then_some(()));
        router.kill();
    });
    // What a power cut leaves of a write: a header, and a body that never came.
    let log = router.dir().join("data/log");
    let mut segments: Vec<_> = std::fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.retain(|path| path.extension().is_some_and(|e| e == "log") && !super::corpus::used(path).is_empty());
    let last = segments.into_iter().max().unwrap();
    let end = super::corpus::used(&last).len().next_multiple_of(4096);
    let mut bytes = std::fs::read(&last).unwrap();
    bytes.truncate(end);
    let mut file = std::fs::File::create(&last).unwrap();
    file.write_all(&bytes).unwrap();
    file.write_all(b"ATPB\x01 and then the power went").unwrap();
    router
}

/// A segment is full, so a checkpoint follows; tasks before it and behind it, one open across it.
fn checkpoint() -> Router {
    let mut router = Router::start(&format!("{CONFIG}limits: {{segment_bytes: 1048576}}\n"));
    let _agent = agent(&router, "writer", WRITER);
    follow(router.atp(), "before", &by(&["writer"])).bill();
    let mut client = Peer::client(router.atp());
    client.send(&submit("open", &by(&["stranger"])));
    client.expect(kind::ACCEPTED);
    for n in 0..16 {
        let task = Submit { task: "x".repeat(60_000), ..by(&["writer"]) };
        follow(router.atp(), &format!("large-{n}"), &task).bill();
    }
    wait_for("a checkpoint", || records(&router.log()).iter().any(|r| r["kind"] == "checkpoint").then_some(()));
    follow(router.atp(), "behind", &by(&["writer"])).bill();
    router.settled();
    router.kill();
    router
}

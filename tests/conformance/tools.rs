//! Tools (rules 9-1 to 9-6): leave, results, refusals that can be read in the log, and money.

use crate::{bill, capabilities, last};
use atp_proto::content::{Capabilities, Submit, ToolRequest, ToolResult};
use atp_proto::frame::{Meta, kind};
use atp_proto::{CallId, Code, Flags, Frame, WireError};
use atp_tests::blackbox::atp;
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::Router;
use serde_json::{Value, json};

/// A router that lends `fs.read` at 70 micro-USD a request, and an agent that asks for it and has a tool of its own.
fn house(name: &str) -> (Router, Peer, Peer, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path();
    std::fs::create_dir(root.join("root")).expect("a directory");
    std::fs::write(root.join("root/notes.txt"), "what the file says").expect("a file");
    std::fs::write(root.join("secret"), "secret").expect("a file");
    let yaml = format!(
        "log: {{durability: async}}\naccounts: {{default: {{usd: 100, tools: [fs.read, search]}}}}\n\
         tools: {{fs_read: {{root: {}, usd: 0.00007}}}}",
        root.join("root").display()
    );
    let router = Router::start(&yaml);
    let able =
        Capabilities { tools: vec!["search".into()], tool_permissions: vec!["fs.read".into()], ..capabilities(name) };
    let agent = Peer::agent(router.atp(), &able);
    router.has_agent(name);
    let client = Peer::client(router.atp());
    (router, agent, client, dir)
}

fn submit_with(stream: &str, task: &Submit, tools: &[&str]) -> Frame {
    let mut frame = submit(stream, task);
    let tool_permissions = tools.iter().map(|t| (*t).to_owned()).collect();
    frame.meta = Some(Box::new(Meta { tool_permissions, ..Meta::default() }));
    frame
}

fn request(call: CallId, seq: u64, tool: &str, args: Value) -> Frame {
    let content = ToolRequest { tool: tool.into(), args, ..ToolRequest::default() };
    Frame::json(call.to_string(), seq, Flags::NONE, kind::TOOL_REQUEST, &content)
}

fn result(agent: &mut Peer) -> ToolResult {
    let frame = agent.expect(kind::TOOL_RESULT);
    assert!(frame.msg_seq > 1, "numbered behind the dispatch: {frame:?}");
    frame.read().expect("a result")
}

#[test]
fn atp_9_1_a_lent_tool_is_run_answered_and_billed() {
    let (router, mut agent, mut client, _dir) = house("t-9-1");
    client.send(&submit_with("s", &task("t-9-1"), &["fs.read", "search"]));
    let dispatch = agent.dispatched();
    assert_eq!(dispatch.tools, ["fs.read", "search"]);
    let call = dispatch.call_id;
    agent.send(&request(call, 1, "fs.read", json!({"path": "notes.txt"})));
    let answer = result(&mut agent);
    assert_eq!((answer.request, answer.ok, answer.cost.usd_micros.0), (1, true, 70));
    assert_eq!(answer.data["text"], "what the file says");
    agent.send(&request(call, 2, "search", Value::Null));
    let answer = result(&mut agent);
    assert!(answer.ok && answer.own, "{answer:?}");
    agent.send(&last(call, 3, 5));
    let bill = bill(&client.to_the_bill("s"));
    assert_eq!(bill.settled.usd_micros.0, 10 + 4 * 5 + 70);
    let tools = &bill.calls[0].tool_cost_breakdown;
    assert_eq!((tools[0].tool.as_str(), tools[0].usd_micros.0, tools[0].allowed), ("fs.read", 70, 1));
    router.settled();
}

#[test]
fn atp_9_2_what_is_refused_is_told_and_stands_in_the_log() {
    let (router, mut agent, mut client, _dir) = house("t-9-2");
    client.send(&submit_with("s", &task("t-9-2"), &["fs.read"]));
    let call = agent.dispatched().call_id;
    for (seq, tool, path) in [(1, "shell", "x"), (2, "search", "x"), (3, "fs.read", "../secret")] {
        agent.send(&request(call, seq, tool, json!({"path": path})));
        let answer = result(&mut agent);
        let error = answer.error.expect("a reason");
        assert_eq!((answer.ok, answer.request, error.code), (false, seq, Code::Sec), "{error}");
        assert_eq!(error.scope, Some(format!("tool:{tool}")));
    }
    agent.send(&last(call, 4, 5));
    client.to_the_bill("s");
    router.settled();
    let replayed = atp::run(&["replay", "--log", &router.log(), "--stream", "s", "--json"]);
    let text = String::from_utf8(replayed.stdout).expect("JSON lines");
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line"));
    let audit: Vec<Value> = lines.filter(|line| line["kind"] == "tool").map(|line| line["record"].clone()).collect();
    let said = |n: usize, key: &str| audit[n][key].as_str().unwrap_or_default().to_owned();
    let words: Vec<(String, String)> = (0..audit.len()).map(|n| (said(n, "tool"), said(n, "verdict"))).collect();
    let expected = [("shell", "refused"), ("search", "refused"), ("fs.read", "allowed"), ("fs.read", "done")];
    assert_eq!(words, expected.map(|(a, b)| (a.to_owned(), b.to_owned())), "{audit:#?}");
    assert_eq!(audit[0]["error"]["code"], "ESEC");
    assert_eq!((&audit[3]["ok"], &audit[3]["error"]["code"]), (&json!(false), &json!("ESEC")));
}

#[test]
fn atp_9_3_a_task_beyond_its_account_is_refused() {
    let (_router, mut agent, mut client, _dir) = house("t-9-3");
    client.send(&submit_with("much", &task("t-9-3"), &["fs.read", "shell"]));
    let error: WireError = client.expect(kind::ERROR).read().expect("an error");
    assert_eq!((error.code, error.scope.as_deref()), (Code::Sec, Some("tenant:default")), "{error}");
    assert!(error.message.contains("shell"), "{error}");
    // The same SYN again is the same refusal; without the tool it is another task.
    client.send(&submit_with("much", &task("t-9-3"), &["fs.read", "shell"]));
    assert_eq!(client.expect(kind::ERROR).read::<WireError>().expect("an error"), error);
    client.send(&submit_with("less", &task("t-9-3"), &["fs.read"]));
    let call = agent.dispatched().call_id;
    agent.send(&last(call, 1, 5));
    client.to_the_bill("less");
}

#[test]
fn atp_9_4_an_answer_that_was_lost_is_given_again() {
    let (router, mut agent, mut client, _dir) = house("t-9-4");
    client.send(&submit_with("s", &task("t-9-4"), &["fs.read"]));
    let call = agent.dispatched().call_id;
    let ask = request(call, 1, "fs.read", json!({"path": "notes.txt"}));
    agent.send(&ask);
    let first = result(&mut agent);
    agent.send(&ask);
    let second = result(&mut agent);
    assert_eq!(first, second);
    agent.send(&last(call, 2, 5));
    assert_eq!(bill(&client.to_the_bill("s")).settled.usd_micros.0, 10 + 4 * 5 + 70, "paid once");
    router.settled();
}

#[test]
fn atp_9_4_a_request_survives_the_router() {
    let (mut router, mut agent, mut client, _dir) = house("t-9-5");
    client.send(&submit_with("s", &task("t-9-5"), &["fs.read"]));
    let first = agent.dispatched();
    let call = first.call_id;
    let ask = request(call, 1, "fs.read", json!({"path": "notes.txt"}));
    agent.send(&ask);
    result(&mut agent);
    router.kill();
    router.restart();
    let mut back = Capabilities { tool_permissions: vec!["fs.read".into()], ..capabilities("t-9-5") };
    back.calls.push(atp_proto::content::ListedCall {
        call_id: call,
        shard: first.shard,
        epoch: first.epoch,
        msg_seq: 1,
        cost: atp_proto::Cost::default(),
        done: false,
    });
    let mut agent = Peer::agent(router.atp(), &back);
    assert!(agent.dispatched().go_on);
    agent.send(&ask);
    assert!(result(&mut agent).ok);
    agent.send(&last(call, 2, 5));
    router.settled();
    let (_, now) = router.http("GET", "/v1/streams/s/bill");
    assert_eq!(now["settled"]["usd_micros"], 10 + 4 * 5 + 70);
}

/// The scripted adapter in the router's own process, and the command line: what an operator tries first.
#[test]
fn atp_9_1_a_script_reads_a_file_for_a_task() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("notes.txt"), "read by the router").expect("a file");
    let script = "name: s-9-1\ntools: [search]\nestimate: {out_tokens: 50, usd: 0.001}\ncalls:\n- chunks:\n  - {text: \"{result} \", out_tokens: 1, tool: {name: fs.read, args: {path: notes.txt}}}\n\
                  \u{20}\u{20}- {text: \"{result} \", out_tokens: 2, usd_micros: 9, tool: {name: search, budget: {usd_micros: 9}}}\n\
                  \u{20}\u{20}- {text: \"{result}\", tool: {name: fs.read, args: {path: /etc/hostname}}}\n";
    let path = dir.path().join("script.yaml");
    std::fs::write(&path, script).expect("a file");
    let (root, path) = (dir.path().display(), path.display());
    let router = Router::start(&format!(
        "log: {{durability: async}}\naccounts: {{default: {{usd: 100, tools: [fs.read, search]}}}}\n\
         tools: {{fs_read: {{root: {root}, usd: 0.00007}}}}\nagents: [{{kind: scripted, script: {path}}}]\n"
    ));
    router.has_agent("s-9-1");
    let url = format!("atp://{}", router.atp());
    let done = atp::run_json(&["--url", &url, "submit", "t", "--agents", "s-9-1", "--tools", "fs.read,search"]);
    assert_eq!(done["result"]["text"], "read by the router own ESEC", "{done:#}");
    let tools = &done["bill"]["calls"][0]["tool_cost_breakdown"];
    assert_eq!((&tools[0]["tool"], &tools[0]["usd_micros"]), (&json!("fs.read"), &json!(140)), "{done:#}");
    assert_eq!((&tools[1]["tool"], &tools[1]["usd_micros"]), (&json!("search"), &json!(9)), "{done:#}");
    assert_eq!(done["bill"]["settled"]["usd_micros"], 149);
}

//! SIGKILL at random instants of a load: first the router, then its agents. Nothing that was acknowledged is lost, nothing is
//! called twice, and what an agent lived through ends with its answer.

use atp_proto::content::{CallState, Effects, Resume, Source, Submit, TaskState};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Code, Flags, Frame, WireError};
use atp_tests::blackbox::history::{billed, true_bill};
use atp_tests::blackbox::kafka::Brokers;
use atp_tests::blackbox::load::{self, Told};
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::{Asked, Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::{PATIENCE, seed, verdict};
use atp_tests::simulation::rng::Rng;
use serde_json::{Value, json};
use std::path::Path;
use std::slice;

const CLIENTS: u64 = 12;
const CHUNKS: u64 = 8;
/// Frames between two kills: a moment after the start at least, several calls at most.
const FRAMES_MAX: u64 = 150;

/// Eight chunks of 5 tokens, then a final with the prompt's: 9 lines on the meter.
fn script(effects: Effects) -> String {
    let effects = if effects == Effects::External { "external" } else { "none" };
    format!(
        "models: [{{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}}]
max_parallel: 6
effects: {effects}
estimate: {{mode: declared, in_tokens: 100, out_tokens: 100}}
calls:
  - chunks: [{{after: {{mean: 25ms, sd: 10ms}}, repeat: {CHUNKS}, text: \"word \", out_tokens: 5}}]
    final: {{text: \"end\", in_tokens: 80}}
"
    )
}

fn resume(stream: &str) -> Frame {
    Frame::json(stream, 0, Flags::SYN, kind::RESUME, &Resume { token: None, after: 0 })
}

fn meters(agents: &[Scripted]) -> Vec<&Path> {
    agents.iter().map(Scripted::meter).collect()
}

const CONFIG: &str = "accounts: {default: {usd: 1000, per: total}}\ntasks: {retries: 8, deadline: 170s}";

#[test]
fn a_router_is_killed_at_fifty_instants() {
    killed(50, "");
}

#[test]
fn a_router_with_its_log_in_kafka_is_killed_at_fifteen_instants() {
    killed(15, &Brokers::start(1).log());
}

/// `log`: what the configuration says of the log.
fn killed(kills: u32, log: &str) {
    let mut rng = Rng::new(seed(u64::from(kills)));
    let mut router = Router::start(&format!("{CONFIG}\n{log}"));
    let (atp, relay) = (router.atp(), Relay::to(router.atp()));
    let names = ["steady-0", "steady-1", "steady-2"];
    let agents = names.map(|name| Scripted::start(router.dir(), name, relay.address(), &script(Effects::None)));
    let task = |n: u64| {
        let fanout = n.is_multiple_of(5).then_some(2);
        Submit { task: format!("task {n}"), fanout, ..Submit::default() }
    };
    let told = load::during(&[atp], CLIENTS, task, || {
        for kill in 0..kills {
            let frames = relay.frames() + if kill % 10 == 0 { 0 } else { rng.below(FRAMES_MAX) };
            relay.wait_for(frames, || false);
            router.kill();
            router.restart();
        }
    });

    verdict::agree(&router, slice::from_ref(&relay), &meters(&agents), &told, CHUNKS + 1);
    let torn: u32 = told.iter().map(|t| t.broken_after_accept).sum();
    println!("{kills} kills, {torn} connections broken behind an acknowledgement");
    assert!(torn >= kills, "the kills met tasks in flight");
    for told in &told {
        let answer = told.answer();
        assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}", told.stream);
    }
    verdict::billed_as_charged(&told, &meters(&agents));
}

#[test]
fn agents_are_killed_at_random_instants() {
    const KILLS: u32 = 15;
    let mut rng = Rng::new(seed(15));
    let router = Router::start(CONFIG);
    let relay = Relay::to(router.atp());
    let plans = [("mortal-0", Effects::None), ("mortal-1", Effects::None), ("outside", Effects::External)];
    let mut agents =
        plans.map(|(name, effects)| Scripted::start(router.dir(), name, relay.address(), &script(effects)));
    plans.iter().for_each(|(name, _)| router.has_agent(name));
    let task = |n: u64| {
        let name = plans[n as usize % plans.len()].0;
        Submit { task: format!("task {n}"), agents: vec![AgentName::new(name)], ..Submit::default() }
    };
    let told = load::during(&[router.atp()], CLIENTS, task, || {
        for kill in 0..KILLS {
            relay.wait_for(relay.frames() + rng.range(20, FRAMES_MAX), || false);
            // Each of them in turn first, so that every kind of agent is met.
            let at = if (kill as usize) < plans.len() { kill as usize } else { rng.index(plans.len()) };
            agents[at].kill();
            agents[at].restart();
        }
    });

    verdict::agree(&router, slice::from_ref(&relay), &meters(&agents), &told, CHUNKS + 1);
    let truth = true_bill(agents.iter().map(Scripted::meter));
    let mut unknown = 0;
    for told in &told {
        let (answer, bill) = (told.answer(), told.bill());
        let lost = bill.calls.iter().filter(|c| c.source == Some(Source::UnknownAtHold)).count();
        unknown += lost;
        // A task names one agent.
        if lost > 0 && bill.calls.iter().all(|call| call.agent.as_str() == "outside") {
            // It may have happened: never again, and the client is told so.
            assert_eq!(answer.error.as_ref().map(|e| e.code), Some(Code::OutcomeUnknown), "{answer:?}");
            let void = |id| bill.calls.iter().any(|c| c.call_id == id && c.state == CallState::Void);
            assert!(bill.calls.iter().all(|c| c.retry_of.is_none_or(void)), "{bill:?}");
        } else {
            assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}: {bill:?}", told.stream);
        }
    }
    println!("{KILLS} kills of agents, {unknown} outcomes unknown");
    assert!(unknown > 0, "the kills met calls in flight");
    let bills: Vec<_> = told.iter().map(Told::bill).collect();
    for (id, call) in billed(&bills) {
        let truth = truth.get(&id).copied().unwrap_or_default();
        match (call.state, call.source) {
            (CallState::Void, _) => assert_eq!(truth.lines, 0, "{id} is void and was called"),
            (CallState::Settled, Some(Source::Reported)) => {
                assert_eq!(call.actual.usd_micros.0, truth.usd_micros, "{id}: billed as charged");
            }
            (CallState::Settled, Some(Source::UnknownAtHold)) => {
                assert!(call.actual.usd_micros.0 >= truth.usd_micros, "{id}: hold and reach cover what was charged");
            }
            other => panic!("{id} ended as {other:?}"),
        }
    }
}

#[test]
fn a_router_whose_shard_was_taken_over_ends_and_says_by_whom() {
    let log = Brokers::start(1).log();
    let mut first = Router::start(&format!("router: {{id: first}}\n{CONFIG}\n{log}"));
    let second = Router::start(&format!("router: {{id: second}}\n{CONFIG}\n{log}"));
    assert_eq!(first.ended(), Some(1));
    let words = first.stderr();
    assert!(words.contains("router second (incarnation ") && words.contains("has taken over shard "), "{words}");
    let report = second.verify();
    assert_eq!(report["log"], atp_tests::blackbox::atp::run_json(&["verify", "--log", &second.log()])["log"]);
    // Started again it is the one that takes over.
    first.restart();
    first.verify();
}

/// Without leases nobody knows of a successor but by the log.
#[test]
fn a_router_that_stood_still_denies_nothing_that_its_successor_accepted() {
    let log = Brokers::start(1).log();
    let mut first = Router::start(&format!("router: {{id: first}}\n{CONFIG}\n{log}"));
    let mut client = Peer::client(first.atp());
    client.send(&resume("nobody"));
    assert_eq!(client.refused("nobody").code, Code::ResumeGone, "while nobody else owns anything");
    assert_eq!(first.http("GET", "/v1/streams/nobody").0, 404);

    first.signal("STOP");
    let second = Router::start(&format!("router: {{id: second}}\n{CONFIG}\n{log}"));
    let _agent = Scripted::start(second.dir(), "steady", second.atp(), &script(Effects::None));
    second.has_agent("steady");
    let mut other = Peer::client(second.atp());
    let streams: Vec<String> = (0..16).map(|n| format!("stream-{n}")).collect();
    for stream in &streams {
        other.send(&submit(stream, &task("steady")));
        other.to_the_bill(stream);
    }
    // It reads these before anything else when it goes on.
    let ask = |path: &str| Asked::at(first.http_addr(), "GET", path, PATIENCE).expect("it listens");
    let ready = ask("/readyz");
    let rows: Vec<Asked> = streams.iter().map(|stream| ask(&format!("/v1/streams/{stream}"))).collect();
    streams.iter().for_each(|stream| client.send(&resume(stream)));
    first.signal("CONT");
    if let Ok((_, body)) = ready.text() {
        let body: Value = serde_json::from_str(&body).expect("a document");
        assert_eq!((&body["ready"], &body["shards"]["owned"]), (&false.into(), &json!([])), "{body}");
    }
    for row in rows {
        // It may end before it answers.
        if let Ok((status, body)) = row.text() {
            assert_ne!(status, 404, "{body}");
        }
    }
    while let Ok(Some(frame)) = client.try_next(PATIENCE) {
        let gone = frame.read::<WireError>().is_ok_and(|error| error.code == Code::ResumeGone);
        assert!(!gone, "{} was accepted: {frame:?}", frame.stream_id);
    }
    assert_eq!(first.ended(), Some(1));
    second.verify();
}

#[test]
fn each_of_three_brokers_is_killed_once() {
    let brokers = Brokers::start(3);
    let router = Router::start(&format!("{CONFIG}\n{}", brokers.log()));
    let (atp, relay) = (router.atp(), Relay::to(router.atp()));
    let names = ["steady-0", "steady-1", "steady-2"];
    let agents = names.map(|name| Scripted::start(router.dir(), name, relay.address(), &script(Effects::None)));
    names.iter().for_each(|name| router.has_agent(name));
    let task = |n: u64| Submit { task: format!("task {n}"), ..Submit::default() };
    let told = load::during(&[atp], CLIENTS, task, || {
        // With one of three away the log goes on, and with the next one once the first is back.
        for broker in 1..=3 {
            for there in [false, true] {
                if there {
                    brokers.revive(broker);
                } else {
                    brokers.kill(broker);
                }
                relay.wait_for(relay.frames() + 4 * FRAMES_MAX, || false);
            }
        }
    });
    verdict::agree(&router, slice::from_ref(&relay), &meters(&agents), &told, CHUNKS + 1);
    let ready = router.http("GET", "/readyz").1;
    assert_eq!(ready["durability"], "replicated", "{ready:#}");
    for told in &told {
        assert_eq!(told.answer().state, TaskState::Done, "{}", told.stream);
        assert_eq!(told.broken_after_accept, 0, "{}: the router went on", told.stream);
    }
}

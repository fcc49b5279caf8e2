//! Accounts over time and escalation, seen from the wire: the step that the money allows, the rule in the bill, the pace.

use crate::{agent, bill, capabilities, cost, last};
use atp_proto::content::{AgentFinal, Capabilities, ModelInfo};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame};
use atp_tests::blackbox::atp;
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::Router;

/// An agent with a model at 1 and 4 USD per million tokens, and one at a tenth of that.
fn with_two_models(name: &str) -> Capabilities {
    let model = |id: &str, part: u64| ModelInfo {
        id: id.into(),
        in_usd_micros_per_mtok: Some(1_000_000 / part),
        out_usd_micros_per_mtok: Some(4_000_000 / part),
        context_tokens: None,
    };
    Capabilities { models: vec![model("big-opus-1", 1), model("small-haiku-1", 10)], ..capabilities(name) }
}

#[test]
fn a_budget_that_binds_walks_down_the_ladder() {
    let router = Router::start(
        "log: {durability: async}\n\
         accounts: {default: {usd: 0.001, per: month, on_limit: [downgrade, queue, refuse], ladder: [opus, haiku], pacing: {mode: observe}}}",
    );
    let mut agent = Peer::agent(router.atp(), &with_two_models("m-ladder"));
    router.has_agent("m-ladder");
    let mut client = Peer::client(router.atp());
    client.send(&submit("s1", &task("m-ladder")));
    let first = agent.dispatched();
    assert_eq!(first.model.as_deref(), Some("big-opus-1"));
    // What the first one holds leaves too little for another of its kind.
    client.send(&submit("s2", &task("m-ladder")));
    let second = agent.dispatched();
    assert_eq!(second.model.as_deref(), Some("small-haiku-1"));
    agent.send(&last(second.call_id, 1, 5));
    let bill_of_second = bill(&client.to_the_bill("s2"));
    let rule = &bill_of_second.calls[0].rule;
    assert!(rule.contains("downgrade: small-haiku-1 for big-opus-1"), "{rule}");
    agent.send(&last(first.call_id, 1, 5));
    let bill_of_first = bill(&client.to_the_bill("s1"));
    assert!(!bill_of_first.calls[0].rule.contains("downgrade"), "{:?}", bill_of_first.calls[0]);

    let (status, accounts) = router.http("GET", "/v1/accounts");
    assert_eq!(status, 200);
    let row = &accounts["accounts"][0];
    assert_eq!((row["account"].as_str(), row["per"].as_str()), (Some("default"), Some("month")));
    assert_eq!(row["pace"]["mode"], "observe", "{row}");
    assert_eq!(row["held"]["usd_micros"], 0);
    let used = bill_of_first.settled.usd_micros.0 + bill_of_second.settled.usd_micros.0;
    assert_eq!(row["remaining"]["usd_micros"], 1_000 - used, "{row}");
    assert!(row["reset_at"].is_string(), "{row}");
    router.settled();
}

#[test]
fn an_operator_lets_an_account_go_faster_and_the_log_says_who() {
    let mut router = Router::start(
        "log: {durability: async}\n\
         accounts: {default: {usd: 10, per: month, pacing: {mode: enforce}}}",
    );
    let (_, fleet) = router.http("GET", "/v1/fleet");
    let url = format!("http://{}", fleet["router"]["http"].as_str().expect("an address"));
    let word = ["accounts", "faster", "default", "--usd", "2.5", "--for", "2h", "--by", "ada"];
    let rows = atp::run_json(&[&["--url", &url], &word[..]].concat());
    let faster = &rows["accounts"][0]["pace"]["faster"];
    assert_eq!((&faster["more"]["usd_micros"], &faster["by"]), (&2_500_000.into(), &"ada".into()), "{rows}");
    // It outlives the router.
    router.kill();
    router.restart();
    let (_, accounts) = router.http("GET", "/v1/accounts");
    assert_eq!(&accounts["accounts"][0]["pace"]["faster"], faster, "{accounts}");
}

#[test]
fn a_weak_answer_is_escalated_once_and_the_bill_says_so() {
    let router = Router::start(
        "log: {durability: async}\n\
         policy: {policies: [{escalation: {on: [low_conf], to: m-strong}}]}",
    );
    let mut weak = agent(&router, "m-weak");
    let mut strong = agent(&router, "m-strong");
    let mut client = Peer::client(router.atp());
    client.send(&submit("s", &task("m-weak")));
    let unsure = |seq: u64, call: atp_proto::CallId| {
        let content = AgentFinal {
            text: Some("perhaps".into()),
            confidence_ppm: Some(200_000),
            cost: cost(5),
            ..AgentFinal::default()
        };
        Frame::json(call.to_string(), seq, Flags::FIN, kind::RESULT_FINAL, &content)
    };
    let call = weak.dispatched().call_id;
    weak.send(&unsure(1, call));
    let call = strong.dispatched().call_id;
    // It isn't sure either; nobody is asked twice.
    strong.send(&unsure(1, call));
    let bill = bill(&client.to_the_bill("s"));
    assert_eq!(bill.calls.len(), 2);
    assert_eq!(bill.calls[1].agent.as_str(), "m-strong");
    let rule = &bill.calls[1].rule;
    assert!(rule.starts_with("escalation after lane 1: low_conf"), "{rule}");
    router.settled();
}

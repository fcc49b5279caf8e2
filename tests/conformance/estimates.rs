//! Estimates (rules 7-1 to 7-6): an agent is asked before a slot is asked for, what fails is never zero, what was learned counts.

use crate::{agent, bill, capabilities, cost, kinds, last, shared, whole_task};
use atp_proto::content::{EstimateMode, EstimateRequest};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Code, Flags, Frame, Tokens, UsdMicros};
use atp_tests::blackbox::peer::{Peer, submit, task};
use atp_tests::blackbox::process::Router;

fn asks_first(router: &Router, name: &str, task_type: &str) -> Peer {
    let mut c = capabilities(name);
    c.skills = vec![task_type.into()];
    c.estimate.as_mut().expect("the test's agents declare one").mode = EstimateMode::Preflight;
    let agent = Peer::agent(router.atp(), &c);
    router.has_agent(name);
    agent
}

fn figures(on: &str, text: &'static str) -> Frame {
    Frame::raw(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, text.into())
}

#[test]
fn atp_7_3_a_preflight_stands_in_the_reserve() {
    let router = shared();
    let mut worker = asks_first(&router, "a-7-3", "type-7-3");
    let mut client = Peer::client(router.atp());
    client.send(&submit("p-7-3", &task("a-7-3")));
    let asked = worker.expect(kind::ESTIMATE);
    let request: EstimateRequest = asked.read().expect("a question");
    assert_eq!(&*asked.stream_id, format!("{}.e", request.call_id));
    assert!(asked.flags.has(Flags::SYN) && asked.msg_seq == 1 && !request.task.is_empty(), "{asked:?}");
    worker.send(&figures(
        &asked.stream_id,
        r#"{"in_tokens":150,"out_tokens":"50","usd":0.000700,"variance":{"usd":1e-8}}"#,
    ));
    let call = worker.dispatched().call_id;
    assert_eq!(call, request.call_id);
    worker.send(&last(call, 1, 15));
    let bill = bill(&client.to_the_bill("p-7-3"));
    let [of_call] = &bill.calls[..] else { panic!("one call") };
    let e = &of_call.estimate;
    assert_eq!((e.source.as_str(), e.tokens, e.usd_micros), ("preflight", Tokens(200), UsdMicros(700)));
    // Variance 10^-8 USD^2 is 10^4 micro-USD^2: one deviation is 100.
    assert_eq!((e.sd_usd_micros, of_call.k_ppm), (UsdMicros(100), 1_000_000));
    assert!(of_call.rule.contains("named; price: preflight, k 1"), "{}", of_call.rule);
}

#[test]
fn atp_7_4_who_gives_no_number_is_skipped() {
    // Its own router: an agent of another test would match too.
    let router = Router::start("log: {durability: async}\n");
    let mut broken = asks_first(&router, "a-7-4", "type-7-4");
    let mut other = asks_first(&router, "b-7-4", "type-7-4");
    let mut client = Peer::client(router.atp());
    let mut any = submit("p-7-4", &atp_proto::content::Submit { agents: Vec::new(), ..task("x") });
    any.meta.get_or_insert_default().task_type = "type-7-4".into();
    client.send(&any);
    // Even scores: the names decide.
    let asked = broken.expect(kind::ESTIMATE);
    broken.send(&figures(&asked.stream_id, r#"{"in_tokens":NaN,"out_tokens":1}"#));
    let asked = other.expect(kind::ESTIMATE);
    other.send(&figures(&asked.stream_id, r#"{"in_tokens":100,"out_tokens":40}"#));
    let call = other.dispatched().call_id;
    other.send(&last(call, 1, 15));
    let frames = client.to_the_bill("p-7-4");
    assert_eq!(bill(&frames).calls[0].agent, AgentName::new("b-7-4"));
}

#[test]
fn atp_7_4_a_named_agent_without_estimate_is_not_called() {
    let router = shared();
    let mut broken = asks_first(&router, "a-7-5", "type-7-5");
    let mut client = Peer::client(router.atp());
    let impatient = atp_proto::content::Submit { wait: false, ..task("a-7-5") };
    client.send(&submit("p-7-5", &impatient));
    let asked = broken.expect(kind::ESTIMATE);
    let error = r#"{"code":"EAGENTDOWN","message":"no model is loaded"}"#;
    broken.send(&Frame::raw(&*asked.stream_id, 1, Flags::RST, kind::ERROR, error.into()));
    let frames = client.to_the_bill("p-7-5");
    let last = frames.iter().find(|f| &*f.kind == kind::RESULT_FINAL).unwrap_or_else(|| panic!("{:?}", kinds(&frames)));
    let last: atp_proto::content::Final = last.read().expect("a final");
    let error = last.error.expect("it failed");
    assert!(error.code == Code::AgentDown && error.message.contains("a-7-5"), "{error}");
    assert!(bill(&frames).calls.is_empty());
}

#[test]
fn atp_7_5_three_runs_are_a_statistic() {
    let router = shared();
    let mut worker = agent(&router, "a-7-6");
    let mut client = Peer::client(router.atp());
    for n in 1..=4 {
        let frames = whole_task(&mut client, &mut worker, "a-7-6", &format!("p-7-6.{n}"));
        let bill = bill(&frames);
        let e = &bill.calls[0].estimate;
        if n < 4 {
            assert_eq!((e.source.as_str(), e.samples), ("declared", 0), "run {n}");
        } else {
            let real = cost(15);
            assert_eq!(
                (e.source.as_str(), e.samples, e.tokens, e.usd_micros),
                ("statistics", 3, Tokens(25), real.usd_micros)
            );
            assert_eq!((e.sd_tokens, e.sd_usd_micros), (Tokens(0), UsdMicros(0)));
            assert!(bill.calls[0].rule.contains("price: statistics of 3 runs, k 1"), "{}", bill.calls[0].rule);
        }
    }
}

//! Scripts played without a router, in virtual time: what is emitted, what is billed, what each fault does.

use super::*;
use atp_proto::content::UsageSource;
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Frame, Tokens};
use atp_sdk::Offline;
use std::path::Path;

const EXAMPLE: &str = r#"
name: reviewer.script
task_types: [code_review]
models: [{id: m1, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 8
stop: close
reach: {tokens: 20, usd_micros: 800}
effects: none
idempotent_for: 0s
estimate: {mode: preflight, in_tokens: 100, out_tokens: 500, usd: 0.10, variance: {tokens: 250000, usd_micros: 400000000}, confidence: 0.9}
calls:
  - chunks: [{after: 10ms, text: "first ", out_tokens: 20, usd_micros: 800}, {after: 10ms, repeat: 30, out_tokens: 20, usd_micros: 800}]
    final: {after: 5ms, text: "done", findings: [], confidence: 0.9, in_tokens: 100}
  - refuse: {code: EWINDOW_AGENT, retry_after: 2s}
  - fault: crash
status: [{at: 3s, status: PAUSE, retry_after: 5s}, {at: 8s, status: READY}]
seed: 7
"#;

fn dispatch(key: &str, grant: Amount) -> Dispatch {
    let json = format!(
        r#"{{"call_id":"{}","shard":0,"epoch":1,"upstream_key":"{key}","grant":{{}},"deadline_ms":60000}}"#,
        CallId([1; 10])
    );
    Dispatch { grant, ..serde_json::from_str(&json).unwrap() }
}

const PLENTY: Amount = Amount::new(1_000_000, 1_000_000_000);

struct Played {
    outcome: Outcome,
    partials: Vec<Frame>,
}

async fn play(handler: &Arc<dyn Handler>, dispatch: Dispatch) -> Played {
    let (call, router) = Offline::call(dispatch);
    let outcome = handler.call(call).await;
    Played { outcome, partials: router.frames() }
}

fn made(yaml: &str) -> (Capabilities, Arc<dyn Handler>) {
    handler(Script::parse(yaml).unwrap(), Arc::new(|| {})).unwrap()
}

fn with_bill(yaml: &str, path: &Path) -> Arc<dyn Handler> {
    made(&format!("{yaml}meter: {}\n", path.display())).1
}

fn bill(path: &Path) -> Vec<Charge> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn billed(path: &Path) -> (u64, u64, u64) {
    bill(path).iter().fold((0, 0, 0), |t, c| (t.0 + c.in_tokens, t.1 + c.out_tokens, t.2 + c.usd_micros))
}

fn totals(played: &Played) -> Vec<u64> {
    played.partials.iter().map(|f| f.read::<AgentPartial>().unwrap().cost.usd_micros.0).collect()
}

fn end(played: &Played) -> &AgentFinal {
    match &played.outcome {
        Outcome::Final(end) => end,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_documented_script_is_played_as_it_says() {
    let (capabilities, handler) = made(EXAMPLE);
    assert_eq!((capabilities.agent.as_str(), capabilities.max_parallel), ("reviewer.script", 8));
    assert_eq!(capabilities.reach, Amount::new(20, 800));
    assert_eq!(capabilities.models[0].out_usd_micros_per_mtok, Some(4_000_000));
    let figures = capabilities.estimate.unwrap().figures;
    assert_eq!((figures.usd_micros, figures.confidence_ppm), (Some(UsdMicros(100_000)), Some(900_000)));
    assert_eq!((figures.variance.tokens, figures.variance.usd_micros), (250_000, 400_000_000));

    let begun = tokio::time::Instant::now();
    let played = play(&handler, dispatch("k", PLENTY)).await;
    assert_eq!(begun.elapsed(), Duration::from_millis(31 * 10 + 5));
    assert_eq!(totals(&played), (1..=31).map(|n| n * 800).collect::<Vec<_>>());
    let last = end(&played);
    // 100 prompt tokens at 1 USD per million, and 31 chunks at their own amount.
    assert_eq!(last.cost, Cost { in_tokens: Tokens(100), out_tokens: Tokens(620), usd_micros: UsdMicros(24_900) });
    assert_eq!((last.text.as_deref(), last.confidence_ppm), (Some("done"), Some(900_000)));
    assert_eq!((last.finish, last.usage_source), (Finish::Complete, UsageSource::Reported));

    let Outcome::Error(refusal) = play(&handler, dispatch("k2", PLENTY)).await.outcome else { panic!() };
    assert_eq!((refusal.code, refusal.retry_after_ms), (Code::WindowAgent, Some(2000)));
    assert_eq!(refusal.proof, Some(Proof::NotCalled));
}

#[test]
fn errors_name_line_field_and_fix() {
    for (yaml, line, words) in [
        ("name: a\ncalls:\n  - chnks: []\n", 3, "chnks"),
        ("name: a b\ncalls: [{final: {}}]\n", 1, "A-Z"),
        ("name: a\ncalls: []\n", 2, "at least one call"),
        ("name: a\nmax_parallel: 0\ncalls: [{final: {}}]\n", 2, "at least one call"),
        ("name: a\ncalls:\n  - final: {}\n  - {}\n", 4, "calls[1]"),
        ("name: a\ncalls:\n  - refuse: {code: EWINDOW_AGENT}\n    fault: crash\n", 3, "calls[0].refuse"),
        ("name: a\ncalls:\n  - refuse: {code: ENOPE}\n", 3, "ENOPE"),
        ("name: a\ncalls:\n  - chunks: [{repeat: 0}]\n", 3, "calls[0].chunks[0].repeat"),
        ("name: a\ncalls:\n  - chunks: [{out_tokens: -1}]\n", 3, "negative"),
        ("name: a\ncalls:\n  - chunks: [{after: 10}]\n", 3, "10ms"),
        ("name: a\ncalls:\n  - final: {confidence: 1.1}\n", 3, "0 to 1"),
        ("name: a\ncalls:\n  - final: {confidence: .nan}\n", 3, "0 to 1"),
        ("name: a\ncalls:\n  - fault: explode\n", 3, "crash"),
        ("name: a\nestimate: {usd: -1}\ncalls: [{final: {}}]\n", 2, "negative"),
        ("name: a\nestimate: {usd: 1e3}\ncalls: [{final: {}}]\n", 2, "decimal"),
        ("name: a\nstop: never\ncalls: [{final: {}}]\n", 2, "close"),
    ] {
        let error = Script::parse(yaml).unwrap_err();
        assert!(error.to_string().contains(words), "{yaml}: {error}");
        assert_eq!(error.place.map(|(line, _)| line), Some(line), "{yaml}: {error:?}");
    }
    let early = "name: a\ncalls: [{final: {}}]\nstatus: [{at: 2s, status: BUSY}, {at: 1s, status: READY}]\n";
    assert_eq!(Script::parse(early).unwrap_err().field, "status[1].at");
}

#[tokio::test(start_paused = true)]
async fn missing_amounts_are_priced_on_the_total_and_rounded_up_once() {
    let yaml =
        "name: a\nmodels: [{id: m, out_usd_per_mtok: 0.30}]\ncalls:\n  - chunks: [{repeat: 10, tokens_out: 1}]\n";
    let (capabilities, handler) = made(yaml);
    // A tenth of it each would be 10 micro-USD; the total of 10 tokens is 3.
    let played = play(&handler, dispatch("k", PLENTY)).await;
    assert_eq!(totals(&played), [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]);
    assert_eq!(capabilities.reach, Amount::new(1, 1));
}

#[tokio::test(start_paused = true)]
async fn the_bill_has_a_flushed_line_per_charge_and_ends_at_the_grant() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bill.jsonl");
    let yaml = "name: a\ncalls:\n  - chunks: [{text: x, out_tokens: 10, usd_micros: 7, repeat: 100}, {text: free}]\n";
    let handler = with_bill(yaml, &path);
    let played = play(&handler, dispatch("k", Amount::new(35, 1000))).await;
    assert_eq!((end(&played).finish, end(&played).cost.out_tokens), (Finish::Grant, Tokens(40)));
    let lines = bill(&path);
    assert_eq!(lines.len(), 4);
    assert_eq!((lines[0].upstream_key.as_str(), lines[0].out_tokens, lines[0].usd_micros), ("k", 10, 7));
    assert_eq!(lines[0].call_id, CallId([1; 10]).to_string());
    assert!(lines[0].at_ms > 1_600_000_000_000);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_stopped_is_billed_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let chunks =
        "calls:\n  - chunks: [{after: 1s, out_tokens: 10, usd_micros: 7, repeat: 10}]\n    final: {in_tokens: 5}\n";
    for (stop, expected) in [("close", 40), ("kill", 40), ("none", 100), ("limit", 100)] {
        let path = dir.path().join(stop);
        let handler = with_bill(&format!("name: a\nstop: {stop}\n{chunks}"), &path);
        let played = play(&handler, dispatch("k", Amount::new(35, 1000))).await;
        assert_eq!((end(&played).finish, end(&played).cost.out_tokens), (Finish::Grant, Tokens(expected)), "{stop}");
        assert_eq!(billed(&path).1, expected, "{stop}");
    }
    let (capabilities, handler) = made(&format!("name: a\nstop: limit\n{chunks}"));
    assert_eq!(capabilities.worst_case, Some(Amount::new(105, 70)));
    // The provider's own limit cuts in the middle of a chunk.
    let limited = Dispatch { max_output_tokens: Some(25), ..dispatch("k", PLENTY) };
    let played = play(&handler, limited).await;
    let cost = Cost { in_tokens: Tokens(5), out_tokens: Tokens(25), usd_micros: UsdMicros(18) };
    assert_eq!((end(&played).finish, end(&played).cost), (Finish::Grant, cost));
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_says_what_it_cost() {
    let (_, handler) = made("name: a\ncalls:\n  - chunks: [{after: 1s, out_tokens: 10, repeat: 10}]\n");
    let (call, router) = Offline::call(dispatch("k", PLENTY));
    let playing = tokio::spawn(async move { handler.call(call).await });
    tokio::time::sleep(Duration::from_millis(2500)).await;
    router.cancel();
    let Outcome::Final(last) = playing.await.unwrap() else { panic!() };
    assert_eq!((last.finish, last.cost.out_tokens), (Finish::Cancelled, Tokens(20)));
}

#[tokio::test(start_paused = true)]
async fn a_known_upstream_key_is_answered_again_and_billed_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bill.jsonl");
    let yaml = "name: a\nidempotent_for: 60s\ncalls:\n  - chunks: [{text: x, out_tokens: 10, usd_micros: 7, repeat: 3}]\n    final: {text: end}\n  - final: {text: other, usd_micros: 1}\n";
    let handler = with_bill(yaml, &path);
    let first = play(&handler, dispatch("k", PLENTY)).await;
    let second = play(&handler, dispatch("k", PLENTY)).await;
    assert_eq!(end(&second).text.as_deref(), Some("xxxend"));
    assert_eq!(end(&second).cost, end(&first).cost);
    assert!(second.partials.is_empty());
    assert_eq!(billed(&path), (0, 30, 21));
    // A provider outlives the agent: a new process finds the key in the bill, plays again and adds nothing.
    let handler = with_bill(yaml, &path);
    play(&handler, dispatch("k", PLENTY)).await;
    assert_eq!(billed(&path), (0, 30, 21));
    play(&handler, dispatch("k2", PLENTY)).await;
    assert_eq!(billed(&path), (0, 30, 22));
}

#[tokio::test(start_paused = true)]
async fn each_fault_does_its_harm() {
    let call = |fault: &str| {
        format!(
            "name: a\ncalls:\n  - chunks: [{{text: x, out_tokens: 10, usd_micros: 8, repeat: 4}}]\n    final: {{}}\n    fault: {fault}\n"
        )
    };
    let dir = tempfile::tempdir().unwrap();
    let run = async |fault: &str| {
        let path = dir.path().join(fault);
        let played = play(&with_bill(&call(fault), &path), dispatch("k", PLENTY)).await;
        (played, billed(&path).2)
    };
    let (late, bill) = run("late_usage").await;
    assert_eq!((totals(&late), end(&late).cost.usd_micros.0, bill), (vec![0; 4], 32, 32));
    let (hidden, bill) = run("hidden_tokens").await;
    assert_eq!((totals(&hidden), end(&hidden).cost.usd_micros.0, bill), (vec![8, 16, 24, 32], 64, 64));
    let (falling, bill) = run("falling_total").await;
    assert_eq!((totals(&falling), end(&falling).cost.usd_micros.0, bill), (vec![8, 8, 24, 16], 32, 32));
    let (garbage, _) = run("garbage").await;
    assert!(garbage.partials[4].read::<AgentPartial>().is_err());
    let (hang, bill) = run("hang").await;
    assert_eq!((hang.outcome, bill), (Outcome::Vanish, 32));

    let (crashed, crash) = std::sync::mpsc::channel();
    let on_crash: OnCrash = Arc::new(move || crashed.send(()).unwrap());
    let handler = handler(Script::parse(&call("crash")).unwrap(), on_crash).unwrap().1;
    let (call, router) = Offline::call(dispatch("k", PLENTY));
    let playing = tokio::spawn(async move { handler.call(call).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(crash.try_recv().is_ok() && !playing.is_finished());
    assert!(router.frames().iter().all(|frame| &*frame.kind == kind::RESULT_PARTIAL));

    let (capabilities, handler) = made("name: a\nestimate: {out_tokens: 5}\ncalls: [{fault: bad_estimate}]\n");
    let json = String::from_utf8(handler.capabilities_json(&capabilities).unwrap()).unwrap();
    assert!(json.contains(r#""in_tokens":NaN"#) && json.starts_with(r#"{"agent":"a""#), "{json}");
}

#[tokio::test]
async fn preflight_answers_with_the_scripts_figures_or_with_no_number() {
    let asked = || EstimateRequest {
        call_id: atp_proto::CallId([7; 10]),
        task: "t".into(),
        inputs: Vec::new(),
        model: None,
        task_type: String::new(),
    };
    let (capabilities, handler) = made("name: a\nestimate: {mode: preflight, out_tokens: 5}\ncalls: [{final: {}}]\n");
    assert_eq!(capabilities.estimate.unwrap().mode, EstimateMode::Preflight);
    assert_eq!(handler.estimate(asked()).await, Estimated::Declared);
    let bad = "name: a\nestimate: {mode: preflight, out_tokens: 5}\ncalls: [{fault: bad_estimate}]\n";
    let (capabilities, handler) = made(bad);
    assert!(handler.capabilities_json(&capabilities).is_none(), "only the answer is broken");
    let Estimated::Raw(json) = handler.estimate(asked()).await else { panic!("not raw") };
    assert!(String::from_utf8(json).unwrap().contains("NaN"));
}

#[tokio::test(start_paused = true)]
async fn one_seed_plays_the_same_each_time() {
    let yaml = |seed: u64| {
        format!(
            "name: a\nseed: {seed}\ncalls:\n  - chunks: [{{after: {{mean: 10ms, sd: 3ms}}, out_tokens: {{mean: 50, sd: 10}}, usd_micros: {{mean: 100, sd: 30}}, repeat: 20}}]\n"
        )
    };
    let run = async |seed| {
        let begun = tokio::time::Instant::now();
        let played = play(&made(&yaml(seed)).1, dispatch("k", PLENTY)).await;
        (totals(&played), begun.elapsed())
    };
    assert_eq!(run(1).await, run(1).await);
    assert_ne!(run(1).await.0, run(2).await.0);
}

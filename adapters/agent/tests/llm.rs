//! The loop that all LLM adapters share, against a provider that plays a script: streaming, the grant, stopping, and what
//! each failure proves. The wire format is OpenAI's; the others differ only in what `golden` shows.

#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests

mod support;

use atp_agent::llm::{Llm, LlmConfig, Prices};
use atp_agent::{anthropic, gemini, ollama, openai};
use atp_proto::content::{Finish, Proof, UsageSource};
use atp_proto::{Amount, Code, Cost, Tokens, UsdMicros};
use serde_json::json;
use support::provider::{OK, Provider, Step};
use support::{Ended, PATIENCE, Router, WIDE, dispatch};
use tokio::sync::oneshot;

fn text(text: &str) -> Vec<u8> {
    format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {"content": text}}]})).into_bytes()
}

fn finish(reason: &str) -> Vec<u8> {
    format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})).into_bytes()
}

fn usage(usage: &str) -> Vec<u8> {
    format!("data: {{\"choices\":[],\"usage\":{usage}}}\n\ndata: [DONE]\n\n").into_bytes()
}

fn agent(url: &str) -> Llm {
    let prices = Some(Prices { in_usd_micros_per_mtok: 1_000_000, out_usd_micros_per_mtok: 4_000_000 });
    openai::handler(LlmConfig { base_url: Some(url.to_owned()), prices, ..LlmConfig::new("m") }).unwrap()
}

async fn play(steps: Vec<Step>) -> Ended {
    let provider = Provider::plays(steps).await;
    Router::of(agent(&provider.url)).await.run(&dispatch("Say hi", WIDE)).await
}

fn answer(parts: &[Vec<u8>]) -> Vec<Step> {
    let mut steps = vec![Step::Head(OK)];
    steps.extend(parts.iter().cloned().map(Step::Send));
    steps.push(Step::End);
    steps
}

#[tokio::test]
async fn each_chunk_leaves_at_once_with_its_running_cost() {
    let (go_on, gate) = oneshot::channel();
    let provider = Provider::plays(vec![
        Step::Head(OK),
        Step::Send(text("one")),
        Step::Gate(gate),
        Step::Send(text(" two")),
        Step::Send(finish("stop")),
        Step::Send(usage(r#"{"prompt_tokens":200,"completion_tokens":2}"#)),
        Step::End,
    ])
    .await;
    let mut router = Router::of(agent(&provider.url)).await;
    router.dispatch(&dispatch("Say hi", WIDE)).await;
    // The provider holds the rest back until this has arrived: nothing waits for the whole answer.
    let first = router.partial().await;
    assert_eq!(first.text.as_deref(), Some("one"));
    assert!(first.cost.in_tokens > Tokens(0) && first.cost.usd_micros > UsdMicros(0), "{:?}", first.cost);
    go_on.send(()).unwrap();
    let ended = router.end().await;
    assert_eq!(ended.text(), " two");
    let last = ended.expect_final();
    assert_eq!(last.cost, Cost { in_tokens: Tokens(200), out_tokens: Tokens(2), usd_micros: UsdMicros(208) });
    assert_eq!((last.usage_source, last.finish), (UsageSource::Reported, Finish::Complete));
}

#[tokio::test]
async fn at_the_grant_the_connection_is_closed() {
    let grant = Amount::new(600, u64::MAX);
    let provider = Provider::plays(vec![Step::Head(OK), Step::Forever(text(" word"))]).await;
    let ended = Router::of(agent(&provider.url)).await.run(&dispatch("Go on for ever", grant)).await;
    let last = ended.expect_final();
    assert_eq!((last.finish, last.usage_source), (Finish::Grant, UsageSource::Counted));
    assert!(last.cost.amount().unwrap().tokens > Tokens(600), "it stops at the grant, not before");
    assert_eq!(last.cost.out_tokens.0, ended.text().matches("word").count() as u64);
    let (_, closed) = provider.played().await;
    assert!(closed);
}

#[tokio::test]
async fn the_grant_of_usd_counts_as_well() {
    let provider = Provider::plays(vec![Step::Head(OK), Step::Forever(text(" word"))]).await;
    let ended = Router::of(agent(&provider.url)).await.run(&dispatch("Go on", Amount::new(u64::MAX, 1000))).await;
    assert_eq!(ended.expect_final().finish, Finish::Grant);
    assert!(ended.expect_final().cost.usd_micros > UsdMicros(1000));
}

#[tokio::test]
async fn a_grant_that_grows_in_time_is_used() {
    let mut steps = vec![Step::Head(OK)];
    let (go_on, gate) = oneshot::channel();
    steps.extend((0..100).map(|_| Step::Send(text(" word"))));
    steps.push(Step::Gate(gate));
    steps.extend((0..400).map(|_| Step::Send(text(" word"))));
    steps.extend([
        Step::Send(finish("stop")),
        Step::Send(usage(r#"{"prompt_tokens":150,"completion_tokens":500}"#)),
        Step::End,
    ]);
    let provider = Provider::plays(steps).await;
    let mut router = Router::of(agent(&provider.url)).await;
    router.dispatch(&dispatch("Say much", Amount::new(400, u64::MAX))).await;
    let mut words = 0;
    while words < 100 {
        words += router.partial().await.text.unwrap().matches("word").count();
    }
    router.grant(Amount::new(5000, u64::MAX)).await;
    // The grant must have been read before the rest comes; an answered heartbeat behind it shows that.
    router.send(&atp_proto::Frame::heartbeat(false)).await;
    loop {
        let frame = router.frame().await;
        if frame.flags.has(atp_proto::Flags::HB) {
            break;
        }
    }
    go_on.send(()).unwrap();
    let ended = router.end().await;
    let last = ended.expect_final();
    assert_eq!((last.finish, last.cost.out_tokens), (Finish::Complete, Tokens(500)));
}

#[tokio::test]
async fn a_grant_below_the_prompt_calls_nobody() {
    let ended =
        Router::of(agent("http://127.0.0.1:9/v1")).await.run(&dispatch("Say hi", Amount::new(20, 1_000_000))).await;
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof), (Code::Budget, Some(Proof::NotCalled)));
    assert!(error.message.starts_with("grant: 20 tokens"), "{}", error.message);
}

#[tokio::test]
async fn cancelling_in_the_middle_closes_the_connection() {
    let provider = Provider::plays(vec![Step::Head(OK), Step::Send(text("one")), Step::UntilClosed]).await;
    let mut router = Router::of(agent(&provider.url)).await;
    router.dispatch(&dispatch("Say hi", WIDE)).await;
    router.partial().await;
    router.cancel().await;
    let ended = router.end().await;
    let last = ended.expect_final();
    assert_eq!((last.finish, last.usage_source), (Finish::Cancelled, UsageSource::Counted));
    assert!(last.cost.in_tokens > Tokens(0) && last.cost.out_tokens >= Tokens(1));
    assert!(provider.played().await.1);
}

#[tokio::test]
async fn cancelling_before_the_first_byte_closes_the_connection() {
    let provider = Provider::plays(vec![Step::UntilClosed]).await;
    let mut router = Router::of(agent(&provider.url)).await;
    router.dispatch(&dispatch("Say hi", WIDE)).await;
    router.cancel().await;
    assert_eq!(router.end().await.expect_final().finish, Finish::Cancelled);
}

#[tokio::test]
async fn the_deadline_ends_a_call_with_what_it_cost() {
    let provider = Provider::plays(vec![Step::Head(OK), Step::Send(text("one")), Step::UntilClosed]).await;
    let mut task = dispatch("Say hi", WIDE);
    task.deadline_ms = 300;
    let ended = Router::of(agent(&provider.url)).await.run(&task).await;
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof), (Code::Timeout, None));
    assert!(error.cost.unwrap().in_tokens > Tokens(0));
}

#[tokio::test]
async fn refusals_say_when_to_come_back() {
    let body = br#"{"error":{"message":"slow down","type":"rate_limit_error","code":null}}"#.to_vec();
    let limited =
        play(vec![Step::Head("429 Too Many Requests\r\nretry-after: 7"), Step::Send(body.clone()), Step::End]).await;
    let error = limited.expect_error();
    assert_eq!((error.code, error.retry_after_ms, error.proof), (Code::WindowAgent, Some(7000), Some(Proof::Rejected)));
    assert!(error.message.contains("429 Too Many Requests: slow down"), "{}", error.message);
    let broken = play(vec![Step::Head("500 Internal Server Error"), Step::Send(b"<html>".to_vec()), Step::End]).await;
    let error = broken.expect_error();
    assert_eq!((error.code, error.proof, error.cost), (Code::WindowAgent, None, None));
    let key = play(vec![Step::Head("401 Unauthorized"), Step::Send(body), Step::End]).await;
    assert_eq!((key.expect_error().code, key.expect_error().proof), (Code::Auth, Some(Proof::Rejected)));
    let long = br#"{"error":{"code":400,"message":"too large","type":"exceed_context_size_error"}}"#.to_vec();
    let long = play(vec![Step::Head("400 Bad Request"), Step::Send(long), Step::End]).await;
    assert_eq!((long.expect_error().code, long.expect_error().proof), (Code::Limit, Some(Proof::Rejected)));
}

#[tokio::test]
async fn an_error_without_end_is_read_only_so_far() {
    let ended = play(vec![Step::Head("503 Service Unavailable"), Step::Forever(vec![b'x'; 4096])]).await;
    assert_eq!(ended.expect_error().code, Code::WindowAgent);
    assert!(ended.expect_error().message.len() < 1000);
}

#[tokio::test]
async fn a_port_where_nobody_listens_was_not_called() {
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let ended = Router::of(agent(&format!("http://{port}/v1"))).await.run(&dispatch("Say hi", WIDE)).await;
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof), (Code::AgentDown, Some(Proof::NotCalled)));
    assert!(error.message.contains("not reachable"), "{}", error.message);
}

/// Neither a proof nor a cost: the router settles it at hold and reach.
fn unknown(ended: &Ended) -> &str {
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof, error.cost), (Code::AgentDown, None, None), "{}", error.message);
    &error.message
}

#[tokio::test]
async fn what_breaks_in_the_middle_proves_nothing() {
    let reset = play(vec![Step::Head(OK), Step::Send(text("one")), Step::Reset]).await;
    assert!(unknown(&reset).contains("connection failed"));
    assert_eq!(reset.text(), "one", "what came was passed on");
    let nothing = play(vec![Step::Reset]).await;
    unknown(&nothing);
    let short = play(answer(&[text("one")])).await;
    assert!(unknown(&short).contains("ended before it was whole"));
    let garbage = play(answer(&[text("one"), b"data: {\"choices\": oops}\n\n".to_vec()])).await;
    assert!(unknown(&garbage).contains("an event is no JSON"), "{}", unknown(&garbage));
    let other = play(answer(&[b"<html>hello</html>".to_vec()])).await;
    assert!(unknown(&other).contains("base_url"));
    let wrong = play(answer(&[b"data: [1]\n\n".to_vec()])).await;
    assert!(unknown(&wrong).contains("no JSON object"));
    let failed = play(answer(&[text("one"), b"data: {\"error\":{\"message\":\"overloaded\"}}\n\n".to_vec()])).await;
    assert!(unknown(&failed).contains("overloaded"));
    let binary = play(answer(&[vec![0xff; 5000]])).await;
    unknown(&binary);
}

#[tokio::test]
async fn a_stream_without_any_event_is_bounded() {
    let ended = play(vec![Step::Head(OK), Step::Forever(vec![b'x'; 65536])]).await;
    assert!(unknown(&ended).contains("too long"));
    let comments = play(vec![Step::Head(OK), Step::Forever(b":ping\n".repeat(10_000))]).await;
    assert!(unknown(&comments).contains("more than 16777216 bytes"));
}

#[tokio::test]
async fn a_usage_that_cannot_be_true_is_replaced_by_our_count() {
    for nonsense in [
        r#"{"prompt_tokens":-5,"completion_tokens":2}"#,
        r#"{"prompt_tokens":5,"completion_tokens":1.5}"#,
        r#"{"prompt_tokens":5,"completion_tokens":"many"}"#,
        r#"{"prompt_tokens":NaN,"completion_tokens":NaN}"#,
        r#"{"prompt_tokens":1e300,"completion_tokens":18446744073709551615}"#,
        "null",
        "{}",
    ] {
        let ended = play(answer(&[text("one"), text(" two"), finish("stop"), usage(nonsense)])).await;
        let last = ended.expect_final();
        assert_eq!((last.usage_source, last.finish), (UsageSource::Counted, Finish::Complete), "{nonsense}");
        assert!(last.cost.in_tokens > Tokens(0) && last.cost.out_tokens >= Tokens(2), "{nonsense}: {:?}", last.cost);
        assert!(last.cost.usd_micros < UsdMicros(100_000));
        assert_eq!(ended.text(), "one two");
    }
}

#[tokio::test]
async fn an_answer_cut_by_the_budgets_limit_says_so() {
    let parts = [text("one"), finish("length"), usage(r#"{"prompt_tokens":9,"completion_tokens":1}"#)];
    let by_router = play(answer(&parts)).await;
    assert_eq!(by_router.expect_final().finish, Finish::Grant);
    let provider = Provider::plays(answer(&parts)).await;
    let config = LlmConfig { base_url: Some(provider.url.clone()), output_tokens_max: Some(16), ..LlmConfig::new("m") };
    let ended = Router::of(openai::handler(config).unwrap()).await.run(&dispatch("Say hi", WIDE)).await;
    assert_eq!(ended.expect_final().finish, Finish::Complete, "its own setting cut it, not the budget");
    assert_eq!(provider.played().await.0.body["max_tokens"], 16);
}

#[tokio::test]
async fn hidden_tokens_count_and_are_not_shown() {
    let think = format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {"reasoning_content": "hmm "}}]}));
    let provider = Provider::plays(vec![Step::Head(OK), Step::Forever(think.into_bytes())]).await;
    let ended = Router::of(agent(&provider.url)).await.run(&dispatch("Think", Amount::new(400, u64::MAX))).await;
    assert_eq!(ended.expect_final().finish, Finish::Grant);
    assert!(ended.expect_final().cost.out_tokens > Tokens(10));
    assert_eq!(ended.text(), "");
}

#[tokio::test]
async fn every_provider_takes_its_own_errors_and_failures() {
    type Make = fn(LlmConfig) -> Result<Llm, atp_agent::llm::ConfigProblem>;
    let run = |make: Make, steps: Vec<Step>| async move {
        let provider = Provider::plays(steps).await;
        let config = LlmConfig { base_url: Some(provider.url.clone()), ..LlmConfig::new("m") };
        tokio::time::timeout(PATIENCE, Router::of(make(config).unwrap()).await.run(&dispatch("Say hi", WIDE)))
            .await
            .unwrap()
    };
    let refused =
        |head: &'static str, body: &str| vec![Step::Head(head), Step::Send(body.as_bytes().to_vec()), Step::End];
    let streamed = |body: &str| vec![Step::Head(OK), Step::Send(body.as_bytes().to_vec()), Step::End];

    let body = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    let ended = run(anthropic::handler, refused("529 Overloaded", body)).await;
    assert_eq!((ended.expect_error().code, ended.expect_error().proof), (Code::WindowAgent, None));
    assert!(ended.expect_error().message.ends_with("Overloaded"));
    let ended = run(anthropic::handler, streamed(&format!("event: error\ndata: {body}\n\n"))).await;
    assert!(unknown(&ended).contains("overloaded_error: Overloaded"));

    let body = r#"{"error":{"code":429,"message":"Quota","status":"RESOURCE_EXHAUSTED","details":[{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"3.5s"}]}}"#;
    let ended = run(gemini::handler, refused("429 Too Many Requests", body)).await;
    assert_eq!((ended.expect_error().code, ended.expect_error().retry_after_ms), (Code::WindowAgent, Some(3500)));
    let ended = run(gemini::handler, streamed("data: {\"promptFeedback\":{\"blockReason\":\"SAFETY\"}}\n\n")).await;
    assert!(unknown(&ended).contains("SAFETY"));

    let ended = run(ollama::handler, refused("404 Not Found", r#"{"error":"model 'm' not found"}"#)).await;
    assert_eq!((ended.expect_error().code, ended.expect_error().proof), (Code::AgentDown, Some(Proof::Rejected)));
    assert!(ended.expect_error().message.ends_with("model 'm' not found"));
    let ended = run(ollama::handler, streamed("{\"error\":\"out of memory\"}\n")).await;
    assert!(unknown(&ended).contains("out of memory"));
}

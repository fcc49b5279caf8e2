//! The `openai` adapter against a real language model behind `ops/local-llm.sh`: real tokens, real timing, real usage.
//! The model's words are nobody's promise, so nothing here looks at them.

#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests

mod support;

use atp_agent::llm::{Llm, LlmConfig, Prices};
use atp_agent::openai;
use atp_proto::content::{Dispatch, Finish, InputText, Proof, UsageSource};
use atp_proto::{Amount, Code, Tokens};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use support::{Router, WIDE, dispatch};

struct Model {
    url: String,
    name: String,
}

/// Starts it once for this process, or takes the one that runs; it ends by itself after its last owner.
fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../ops/local-llm.sh");
        let output =
            Command::new(&script).args(["start", "--owner", &std::process::id().to_string()]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} failed: {said}", script.display());
        let lines = String::from_utf8(output.stdout).unwrap();
        let value = |name: &str| lines.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
        Model { url: value("ATP_LOCAL_LLM_URL="), name: value("ATP_LOCAL_LLM_MODEL=") }
    })
}

fn agent() -> Llm {
    let prices = Some(Prices { in_usd_micros_per_mtok: 100_000, out_usd_micros_per_mtok: 400_000 });
    let config = LlmConfig { base_url: Some(model().url.clone()), prices, ..LlmConfig::new(&model().name) };
    openai::handler(config).unwrap()
}

fn review(grant: Amount, output_tokens_max: u64) -> Dispatch {
    let text = include_str!("../../../ops/demo/src/schedule.rs").to_owned();
    Dispatch {
        inputs: vec![InputText { name: "src/schedule.rs".into(), content_type: "text/x-rust".into(), text }],
        max_output_tokens: Some(output_tokens_max),
        ..dispatch("Review this file. Explain each function in detail, one after the other.", grant)
    }
}

#[tokio::test]
async fn an_answer_streams_and_ends_with_its_reported_usage() {
    let ended = Router::of(agent()).await.run(&review(WIDE, 24)).await;
    let last = ended.expect_final();
    assert_eq!(last.usage_source, UsageSource::Reported);
    assert!(ended.partials.len() > 1, "it came in {} parts", ended.partials.len());
    assert!(!ended.text().is_empty());
    assert!(last.cost.out_tokens <= Tokens(24) && last.cost.out_tokens > Tokens(0), "{:?}", last.cost);
    assert_eq!(
        last.cost.usd_micros.0,
        (last.cost.in_tokens.0 * 100_000 + last.cost.out_tokens.0 * 400_000).div_ceil(1_000_000)
    );
}

#[tokio::test]
async fn the_grant_cuts_the_answer_within_reach() {
    // What the prompt has by our count, and what it really has by the model's.
    let whole = Router::of(agent()).await.run(&review(WIDE, 2)).await;
    let (counted, prompt) = (whole.partials[0].cost.in_tokens, whole.expect_final().cost.in_tokens);
    let grant = Amount::new(counted.0 + 24, u64::MAX);
    let ended = Router::of(agent()).await.run(&review(grant, 3000)).await;
    let last = ended.expect_final();
    assert_eq!((last.finish, last.usage_source), (Finish::Grant, UsageSource::Counted));
    let spent = last.cost.amount().unwrap().tokens;
    assert!(spent > grant.tokens && spent.0 <= grant.tokens.0 + 64, "spent {spent} of {}", grant.tokens);
    assert!(counted >= prompt && counted.0 <= prompt.0 * 2, "our count guards: {counted} of really {prompt}");
}

#[tokio::test]
async fn cancelling_ends_the_answer_and_frees_the_model() {
    let mut router = Router::of(agent()).await;
    router.dispatch(&review(WIDE, 3000)).await;
    router.partial().await;
    router.cancel().await;
    let ended = router.end().await;
    assert_eq!(ended.expect_final().finish, Finish::Cancelled);
    assert!(ended.expect_final().cost.in_tokens > Tokens(0));
    // All of the model's slots answer again, so the cancelled call holds none.
    let (mut a, mut b) = (Router::of(agent()).await, Router::of(agent()).await);
    let task = dispatch("Say yes", WIDE);
    let (a, b) = tokio::join!(a.run(&task), b.run(&task));
    assert_eq!(
        (a.expect_final().usage_source, b.expect_final().usage_source),
        (UsageSource::Reported, UsageSource::Reported)
    );
}

#[tokio::test]
async fn a_prompt_that_is_too_long_is_refused_with_proof() {
    let ended = Router::of(agent()).await.run(&dispatch(&"word ".repeat(10_000), WIDE)).await;
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof), (Code::Limit, Some(Proof::Rejected)), "{}", error.message);
}

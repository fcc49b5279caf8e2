//! Each provider's wire format: the request that leaves and the frames that its recorded answer becomes, the same
//! wherever the answer's bytes are cut. The expected documents lie beside the recorded streams.

#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests

mod support;

use atp_agent::llm::{ConfigProblem, Llm, LlmConfig, Prices};
use atp_agent::{anthropic, gemini, ollama, openai};
use atp_proto::content::{Dispatch, InputText};
use serde_json::{Value, json};
use std::path::PathBuf;
use support::provider::Provider;
use support::{Router, WIDE, dispatch};

fn fixture(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn task() -> Dispatch {
    let text = "for i in 0..n {\n}\n".to_owned();
    Dispatch {
        inputs: vec![InputText { name: "src/lib.rs".into(), content_type: "text/x-rust".into(), text }],
        ..dispatch("Review this", WIDE)
    }
}

type Make = fn(LlmConfig) -> Result<Llm, ConfigProblem>;

async fn golden(name: &str, model: &str, make: Make) {
    let stream = fixture(&format!("{name}/stream.txt"));
    let request: Value = serde_json::from_str(&fixture(&format!("{name}/request.json"))).unwrap();
    let frames: Value = serde_json::from_str(&fixture(&format!("{name}/frames.json"))).unwrap();
    for piece in [1, 7, 100, stream.len()] {
        let provider = Provider::answers(stream.as_bytes(), piece).await;
        let config = LlmConfig {
            base_url: Some(provider.url.clone()),
            api_key: Some("test-key".into()),
            prices: Some(Prices { in_usd_micros_per_mtok: 150_000, out_usd_micros_per_mtok: 600_000 }),
            ..LlmConfig::new(model)
        };
        let ended = Router::of(make(config).unwrap()).await.run(&task()).await;
        let (sent, _) = provider.played().await;
        let headers: serde_json::Map<_, _> = sent
            .headers
            .into_iter()
            .filter(|(name, _)| request["headers"].get(name).is_some())
            .map(|(name, value)| (name, Value::String(value)))
            .collect();
        assert_eq!(json!({"line": sent.line, "headers": headers, "body": sent.body}), request, "{name}");
        let last = ended.expect_final();
        assert_eq!(json!({"text": ended.text(), "final": last}), frames, "{name} in pieces of {piece}");
        let costs: Vec<_> = ended.partials.iter().map(|partial| partial.cost).collect();
        assert!(costs[0].in_tokens > atp_proto::Tokens(0), "the first partial includes the prompt");
        assert!(costs.windows(2).all(|pair| pair[1] == pair[1].max(pair[0])), "a running total fell: {costs:?}");
    }
}

#[tokio::test]
async fn openai_chat_completions() {
    golden("openai", "gpt-4o-mini", openai::handler).await;
}

#[tokio::test]
async fn anthropic_messages() {
    golden("anthropic", "claude-sonnet-4-5", anthropic::handler).await;
}

#[tokio::test]
async fn gemini_stream_generate_content() {
    golden("gemini", "gemini-2.5-flash", gemini::handler).await;
}

#[tokio::test]
async fn ollama_chat() {
    golden("ollama", "llama3.2", ollama::handler).await;
}

//! OpenAI's chat completions, streaming with usage: OpenAI itself and whatever speaks its API (llama.cpp, vLLM, ...).

use crate::http::ErrorBody;
use crate::llm::{ConfigProblem, Delta, Garbage, Llm, LlmConfig, Prompt, Provider, Request, count, object};
use crate::sse::{Event, Framing};
use serde_json::{Value, json};

pub const BASE_URL: &str = "https://api.openai.com/v1";

/// # Errors
/// Names the setting that can't be used.
pub fn handler(config: LlmConfig) -> Result<Llm, ConfigProblem> {
    let base = config.base_url.clone().unwrap_or_else(|| BASE_URL.to_owned());
    let provider = Openai { key: config.api_key.clone(), official: base.starts_with("https://api.openai.com/") };
    Llm::new(Box::new(provider), BASE_URL, config)
}

struct Openai {
    key: Option<String>,
    /// OpenAI's own newer models refuse `max_tokens`; older servers know nothing else.
    official: bool,
}

impl Provider for Openai {
    fn name(&self) -> &'static str {
        "openai"
    }
    fn framing(&self) -> Framing {
        Framing::Sse
    }
    fn reach_tokens(&self) -> u64 {
        64
    }

    fn request(&self, prompt: &Prompt, model: &str, output_tokens_max: u64) -> Request {
        let limit = if self.official { "max_completion_tokens" } else { "max_tokens" };
        let body = json!({
            "model": model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            "stream": true,
            "stream_options": {"include_usage": true},
            limit: output_tokens_max,
        });
        let headers = self.key.iter().map(|key| ("authorization", format!("Bearer {key}"))).collect();
        Request { path: "chat/completions".to_owned(), headers, body }
    }

    fn event(&self, event: &Event, out: &mut Vec<Delta>) -> Result<(), Garbage> {
        if event.data.trim() == "[DONE]" {
            out.push(Delta::End);
            return Ok(());
        }
        let chunk = object(&event.data)?;
        if !chunk["error"].is_null() {
            out.push(Delta::Failed(error_text(&chunk["error"]).unwrap_or_else(|| "no reason given".to_owned())));
            return Ok(());
        }
        if !chunk["choices"].is_array() && chunk["usage"].is_null() {
            return Err(Garbage("a chunk has neither choices nor usage".to_owned()));
        }
        let choice = &chunk["choices"][0];
        let delta = &choice["delta"];
        for hidden in ["reasoning_content", "reasoning"] {
            if let Some(text) = delta[hidden].as_str() {
                out.push(Delta::Hidden(text.to_owned()));
            }
        }
        for visible in ["content", "refusal"] {
            if let Some(text) = delta[visible].as_str().filter(|text| !text.is_empty()) {
                out.push(Delta::Text(text.to_owned()));
            }
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            out.push(Delta::Finished { at_limit: reason == "length" });
        }
        let usage = &chunk["usage"];
        if usage.is_object() {
            let in_tokens = count(usage, "prompt_tokens", out);
            let out_tokens = count(usage, "completion_tokens", out);
            out.push(Delta::Usage { in_tokens, out_tokens });
        }
        Ok(())
    }

    fn error_body(&self, body: &[u8]) -> ErrorBody {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let error = &body["error"];
        let kind = error["code"].as_str().or(error["type"].as_str()).unwrap_or_default();
        ErrorBody {
            message: error_text(error),
            retry_after: None,
            too_long: kind == "context_length_exceeded" || error["type"] == "exceed_context_size_error",
        }
    }
}

fn error_text(error: &Value) -> Option<String> {
    error["message"].as_str().or(error.as_str()).map(str::to_owned)
}

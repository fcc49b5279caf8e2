//! Anthropic's messages API, streaming: the prompt's tokens come first, the output's total with the last delta.

use crate::http::ErrorBody;
use crate::llm::{ConfigProblem, Delta, Garbage, Llm, LlmConfig, Prompt, Provider, Request, count, object};
use crate::sse::{Event, Framing};
use serde_json::{Value, json};

pub const BASE_URL: &str = "https://api.anthropic.com/v1";
const VERSION: &str = "2023-06-01";

/// # Errors
/// Names the setting that can't be used.
pub fn handler(config: LlmConfig) -> Result<Llm, ConfigProblem> {
    Llm::new(Box::new(Anthropic { key: config.api_key.clone() }), BASE_URL, config)
}

struct Anthropic {
    key: Option<String>,
}

impl Provider for Anthropic {
    fn name(&self) -> &'static str {
        "anthropic"
    }
    fn framing(&self) -> Framing {
        Framing::Sse
    }
    /// A delta holds several tokens here.
    fn reach_tokens(&self) -> u64 {
        128
    }

    fn request(&self, prompt: &Prompt, model: &str, output_tokens_max: u64) -> Request {
        let body = json!({
            "model": model,
            "max_tokens": output_tokens_max,
            "system": prompt.system,
            "messages": [{"role": "user", "content": prompt.user}],
            "stream": true,
        });
        let mut headers = vec![("anthropic-version", VERSION.to_owned())];
        headers.extend(self.key.iter().map(|key| ("x-api-key", key.clone())));
        Request { path: "messages".to_owned(), headers, body }
    }

    fn event(&self, event: &Event, out: &mut Vec<Delta>) -> Result<(), Garbage> {
        let data = object(&event.data)?;
        match data["type"].as_str().unwrap_or_default() {
            "message_start" => usage(&data["message"]["usage"], out),
            "content_block_start" => content(&data["content_block"], out),
            "content_block_delta" => content(&data["delta"], out),
            "message_delta" => {
                if let Some(reason) = data["delta"]["stop_reason"].as_str() {
                    out.push(Delta::Finished { at_limit: reason == "max_tokens" });
                }
                usage(&data["usage"], out);
            }
            "message_stop" => out.push(Delta::End),
            "error" => {
                let error = &data["error"];
                let text = |key: &str| error[key].as_str().unwrap_or("no reason given").to_owned();
                out.push(Delta::Failed(format!("{}: {}", text("type"), text("message"))));
            }
            "" => return Err(Garbage("an event has no type".to_owned())),
            // `ping`, `content_block_stop`, and what later versions add: the API asks its clients to ignore them.
            _ => {}
        }
        Ok(())
    }

    fn error_body(&self, body: &[u8]) -> ErrorBody {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        let message = body["error"]["message"].as_str().map(str::to_owned);
        let too_long = body["error"]["type"] == "request_too_large"
            || message.as_ref().is_some_and(|m| m.starts_with("prompt is too long"));
        ErrorBody { message, retry_after: None, too_long }
    }
}

fn content(block: &Value, out: &mut Vec<Delta>) {
    if let Some(text) = block["text"].as_str().filter(|text| !text.is_empty()) {
        out.push(Delta::Text(text.to_owned()));
    }
    for hidden in ["thinking", "partial_json"] {
        if let Some(text) = block[hidden].as_str() {
            out.push(Delta::Hidden(text.to_owned()));
        }
    }
}

/// What was read from or written to a cache stands beside `input_tokens` and is input as well.
fn usage(usage: &Value, out: &mut Vec<Delta>) {
    if !usage.is_object() {
        return;
    }
    let fresh = count(usage, "input_tokens", out);
    let cached =
        ["cache_creation_input_tokens", "cache_read_input_tokens"].map(|field| count(usage, field, out).unwrap_or(0));
    let out_tokens = count(usage, "output_tokens", out);
    out.push(Delta::Usage { in_tokens: fresh.map(|n| n + cached[0] + cached[1]), out_tokens });
}

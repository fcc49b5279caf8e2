//! Google's Gemini API, `streamGenerateContent` as server-sent events: each chunk carries the usage so far.

use crate::http::ErrorBody;
use crate::llm::{ConfigProblem, Delta, Garbage, Llm, LlmConfig, Prompt, Provider, Request, count, object};
use crate::sse::{Event, Framing};
use serde_json::{Value, json};
use std::time::Duration;

pub const BASE_URL: &str = "https://generativelanguage.googleapis.com/v1beta";

/// # Errors
/// Names the setting that can't be used.
pub fn handler(config: LlmConfig) -> Result<Llm, ConfigProblem> {
    Llm::new(Box::new(Gemini { key: config.api_key.clone() }), BASE_URL, config)
}

struct Gemini {
    key: Option<String>,
}

impl Provider for Gemini {
    fn name(&self) -> &'static str {
        "gemini"
    }
    fn framing(&self) -> Framing {
        Framing::Sse
    }
    /// Chunks are large, and thoughts show only in the usage of the next one.
    fn reach_tokens(&self) -> u64 {
        512
    }

    fn request(&self, prompt: &Prompt, model: &str, output_tokens_max: u64) -> Request {
        let body = json!({
            "systemInstruction": {"parts": [{"text": prompt.system}]},
            "contents": [{"role": "user", "parts": [{"text": prompt.user}]}],
            "generationConfig": {"maxOutputTokens": output_tokens_max},
        });
        // The key goes into a header: a URL ends up in logs.
        let headers = self.key.iter().map(|key| ("x-goog-api-key", key.clone())).collect();
        let model = model.trim_start_matches("models/");
        Request { path: format!("models/{model}:streamGenerateContent?alt=sse"), headers, body }
    }

    fn event(&self, event: &Event, out: &mut Vec<Delta>) -> Result<(), Garbage> {
        let chunk = object(&event.data)?;
        if let Some(error) = chunk["error"]["message"].as_str() {
            out.push(Delta::Failed(error.to_owned()));
            return Ok(());
        }
        let usage = &chunk["usageMetadata"];
        if !chunk["candidates"].is_array() && !usage.is_object() && chunk["promptFeedback"].is_null() {
            return Err(Garbage("a chunk has neither candidates nor usageMetadata".to_owned()));
        }
        let candidate = &chunk["candidates"][0];
        for part in candidate["content"]["parts"].as_array().map(Vec::as_slice).unwrap_or_default() {
            if let Some(text) = part["text"].as_str().filter(|text| !text.is_empty()) {
                let hidden = part["thought"] == true;
                out.push(if hidden { Delta::Hidden(text.to_owned()) } else { Delta::Text(text.to_owned()) });
            }
        }
        if usage.is_object() {
            let prompt = count(usage, "promptTokenCount", out);
            let tools = count(usage, "toolUsePromptTokenCount", out).unwrap_or(0);
            let answer = count(usage, "candidatesTokenCount", out);
            let thoughts = count(usage, "thoughtsTokenCount", out);
            // Until the first token one of the two is missing; both missing is no report of output.
            let out_tokens =
                (answer.is_some() || thoughts.is_some()).then(|| answer.unwrap_or(0) + thoughts.unwrap_or(0));
            out.push(Delta::Usage { in_tokens: prompt.map(|n| n + tools), out_tokens });
        }
        if let Some(reason) = candidate["finishReason"].as_str() {
            out.push(Delta::Finished { at_limit: reason == "MAX_TOKENS" });
        } else if let Some(reason) = chunk["promptFeedback"]["blockReason"].as_str() {
            out.push(Delta::Failed(format!("the prompt was blocked: {reason}")));
        }
        Ok(())
    }

    fn error_body(&self, body: &[u8]) -> ErrorBody {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        // Without `alt=sse` in effect errors come as a list of one.
        let error = if body.is_array() { &body[0]["error"] } else { &body["error"] };
        let details = error["details"].as_array().map(Vec::as_slice).unwrap_or_default();
        let delay = details.iter().find_map(|d| d["retryDelay"].as_str());
        let seconds = delay.and_then(|d| d.strip_suffix('s')).and_then(|d| d.parse::<f64>().ok());
        let message = error["message"].as_str().map(str::to_owned);
        let too_long = message.as_ref().is_some_and(|m| m.contains("exceeds the maximum number of tokens"));
        ErrorBody { message, retry_after: seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()), too_long }
    }
}

//! Ollama's `/api/chat`: one JSON document per line, the counts on the last one.

use crate::http::ErrorBody;
use crate::llm::{ConfigProblem, Delta, Garbage, Llm, LlmConfig, Prompt, Provider, Request, count, object};
use crate::sse::{Event, Framing};
use serde_json::{Value, json};

pub const BASE_URL: &str = "http://127.0.0.1:11434";

/// # Errors
/// Names the setting that can't be used.
pub fn handler(config: LlmConfig) -> Result<Llm, ConfigProblem> {
    Llm::new(Box::new(Ollama { key: config.api_key.clone() }), BASE_URL, config)
}

struct Ollama {
    key: Option<String>,
}

impl Provider for Ollama {
    fn name(&self) -> &'static str {
        "ollama"
    }
    fn framing(&self) -> Framing {
        Framing::Lines
    }
    fn reach_tokens(&self) -> u64 {
        64
    }

    fn request(&self, prompt: &Prompt, model: &str, output_tokens_max: u64) -> Request {
        let body = json!({
            "model": model,
            "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
            "stream": true,
            "options": {"num_predict": output_tokens_max},
        });
        let headers = self.key.iter().map(|key| ("authorization", format!("Bearer {key}"))).collect();
        Request { path: "api/chat".to_owned(), headers, body }
    }

    fn event(&self, event: &Event, out: &mut Vec<Delta>) -> Result<(), Garbage> {
        let line = object(&event.data)?;
        if let Some(error) = line["error"].as_str() {
            out.push(Delta::Failed(error.to_owned()));
            return Ok(());
        }
        if !line["message"].is_object() && !line["done"].is_boolean() {
            return Err(Garbage("a line has neither message nor done".to_owned()));
        }
        if let Some(thinking) = line["message"]["thinking"].as_str() {
            out.push(Delta::Hidden(thinking.to_owned()));
        }
        if let Some(text) = line["message"]["content"].as_str().filter(|text| !text.is_empty()) {
            out.push(Delta::Text(text.to_owned()));
        }
        if line["done"] == true {
            let in_tokens = count(&line, "prompt_eval_count", out);
            let out_tokens = count(&line, "eval_count", out);
            out.push(Delta::Usage { in_tokens, out_tokens });
            out.push(Delta::Finished { at_limit: line["done_reason"] == "length" });
            out.push(Delta::End);
        }
        Ok(())
    }

    fn error_body(&self, body: &[u8]) -> ErrorBody {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        ErrorBody { message: body["error"].as_str().map(str::to_owned), ..ErrorBody::default() }
    }
}

//! Which language models the demo can ask: keys in the environment, an Ollama on its port, a local server. Asks none of them
//! for an answer; that is the agents' work.

use crate::api::probe;
use crate::failure::{Exit, Failure};
use crate::screen::Screen;
use atp_agent::config::{AgentConfig, Kind, Prices, Secret, Usd};
use atp_proto::UsdMicros;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tokio::process::Command;

/// Output of one call that the demo waits for.
const OUTPUT_TOKENS_MAX: u64 = 1500;
/// A small model on two cores makes about 60 tokens a second.
const LOCAL_OUTPUT_TOKENS_MAX: u64 = 400;

const OPENAI_MODEL: &str = "gpt-4o-mini";
const ANTHROPIC_MODEL: &str = "claude-haiku-4-5";
const GEMINI_MODEL: &str = "gemini-2.5-flash";
const OLLAMA_URL: &str = "http://127.0.0.1:11434";

/// The server that `--local-llm` started.
#[derive(Debug)]
pub(crate) struct Local {
    script: PathBuf,
}

impl Local {
    /// Stops the server unless somebody else uses it too.
    pub(crate) async fn stop(self) {
        let owner = std::process::id().to_string();
        let status = Command::new("bash").arg(&self.script).args(["stop", "--owner", &owner]).status().await;
        if !status.is_ok_and(|s| s.success()) {
            tracing::warn!("the local model couldn't be stopped; it ends by itself soon after this process");
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

/// An agent for each model that is there. With `local_llm` one is set up first; `started` is what to stop.
pub(crate) async fn find(
    screen: Screen,
    local_llm: bool,
    started: &mut Option<Local>,
) -> Result<Vec<AgentConfig>, Failure> {
    let mut found = Vec::new();
    let keyed = [
        ("OPENAI_API_KEY", Kind::Openai, "reviewer.openai", OPENAI_MODEL),
        ("ANTHROPIC_API_KEY", Kind::Anthropic, "reviewer.anthropic", ANTHROPIC_MODEL),
        ("GEMINI_API_KEY", Kind::Gemini, "reviewer.gemini", GEMINI_MODEL),
    ];
    for (name, kind, handle, model) in keyed {
        if let Some(key) = variable(name) {
            found.push(AgentConfig { api_key: Some(Secret(key)), ..agent(kind, handle, model, OUTPUT_TOKENS_MAX) });
        }
    }
    if let Some(tags) = probe(&format!("{OLLAMA_URL}/api/tags")).await
        && let Some(model) = tags["models"][0]["name"].as_str()
    {
        let config = agent(Kind::Ollama, "reviewer.ollama", model, LOCAL_OUTPUT_TOKENS_MAX);
        found.push(AgentConfig { base_url: Some(OLLAMA_URL.into()), prices: Some(local_prices()), ..config });
    }
    if local_llm {
        let (url, model) = start_local(screen, started).await?;
        found.push(local(url, &model));
    } else if let Some(url) = variable("ATP_LOCAL_LLM_URL") {
        let model = match variable("ATP_LOCAL_LLM_MODEL") {
            Some(model) => model,
            None => first_model(&url).await?,
        };
        found.push(local(url, &model));
    }
    Ok(found)
}

fn agent(kind: Kind, name: &str, model: &str, output_tokens_max: u64) -> AgentConfig {
    AgentConfig {
        model: Some(model.into()),
        output_tokens_max: Some(output_tokens_max),
        ..AgentConfig::new(kind, name)
    }
}

fn local(url: String, model: &str) -> AgentConfig {
    let config = agent(Kind::Openai, "reviewer.local", model, LOCAL_OUTPUT_TOKENS_MAX);
    AgentConfig { base_url: Some(url), prices: Some(local_prices()), ..config }
}

/// A model at home costs current and time; the demo says 0.10 and 0.40 USD per million tokens, so that its bill is real
/// arithmetic on real counts.
fn local_prices() -> Prices {
    Prices { in_usd_per_mtok: Usd(UsdMicros(100_000)), out_usd_per_mtok: Usd(UsdMicros(400_000)) }
}

async fn first_model(url: &str) -> Result<String, Failure> {
    let models = probe(&format!("{}/models", url.trim_end_matches('/'))).await.unwrap_or_default();
    let name = models["data"][0]["id"].as_str().map(str::to_owned);
    name.ok_or_else(|| {
        Failure::usage(format!("ATP_LOCAL_LLM_URL: {url}/models names no model; set ATP_LOCAL_LLM_MODEL"))
    })
}

async fn start_local(screen: Screen, started: &mut Option<Local>) -> Result<(String, String), Failure> {
    let places = [Path::new(env!("CARGO_MANIFEST_DIR")).join("local-llm.sh"), PathBuf::from("ops/local-llm.sh")];
    let script = places.iter().find(|p| p.is_file()).cloned().ok_or_else(|| {
        Failure::usage(
            "--local-llm: ops/local-llm.sh isn't here; run in a checkout of the project, or set ATP_LOCAL_LLM_URL",
        )
    })?;
    screen.progress("setting up a small language model on this machine (ops/local-llm.sh)");
    let owner = std::process::id().to_string();
    *started = Some(Local { script: script.clone() });
    // Its messages go to stderr as they are: what it downloads, how much, and to where.
    let output = Command::new("bash")
        .arg(&script)
        .args(["start", "--owner", &owner])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| Failure::new(Exit::Task, format!("--local-llm: bash: {e}")))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned);
    match (output.status.success(), value("ATP_LOCAL_LLM_URL"), value("ATP_LOCAL_LLM_MODEL")) {
        (true, Some(url), Some(model)) => Ok((url, model)),
        _ => Err(Failure::new(Exit::Task, "--local-llm: the model didn't start; what is missing stands above")),
    }
}

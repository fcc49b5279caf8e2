//! `atp demo`: router, real agents and a client in one process, every hop over the framed protocol, one real task from
//! submit to bill. Nothing recorded or invented is shown as an answer.

mod model;
mod source;

use crate::api::Api;
use crate::cli::{self, Global};
use crate::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::look::verify_text;
use crate::router::memory_dialer;
use crate::screen::{Paint, Screen};
use crate::submit::{End, follow, interrupt, summary};
use atp_agent::config::{AgentConfig, Kind, Span};
use atp_proto::AgentName;
use atp_proto::content::{Submit, TaskState};
use atp_router::{Config, Router};
use atp_sdk::{AgentHandle, AgentOptions, Client, ClientOptions, SubmitRequest, serve};
use serde_json::{Value, json};
use source::Source;
use std::path::Path;
use std::time::Duration;

const REVIEW: &str = "Review this Rust code. Name each defect with file, line and what is wrong.";
const READ: &str = "Review this text. Say what is wrong or unclear, and where.";

pub(crate) async fn run(screen: Screen, args: &cli::Demo) -> Outcome {
    let source = source::find(args.path.as_deref(), args.file.as_deref())?;
    let mut local = None;
    let models = tokio::select! {
        models = model::find(screen, args.local_llm, &mut local) => models,
        () = interrupt() => Err(Failure::interrupted()),
    };
    let outcome = match models {
        Ok(models) => with_models(screen, args, &source, models).await,
        Err(failure) => Err(failure),
    };
    // Stopped however the demo ended.
    if let Some(local) = local {
        local.stop().await;
    }
    outcome
}

async fn with_models(screen: Screen, args: &cli::Demo, source: &Source, models: Vec<AgentConfig>) -> Outcome {
    let directory = tempfile::Builder::new().prefix("atp-demo-").tempdir();
    let directory = directory.map_err(|e| Failure::new(Exit::Task, format!("temporary directory: {e}")))?;
    if models.is_empty() {
        if source.tools.is_none() {
            return Err(Failure::new(Exit::Task, "--file needs a language model: none was found; add --local-llm"));
        }
        screen.progress(
            "no language model found (no OPENAI_API_KEY, ANTHROPIC_API_KEY, GEMINI_API_KEY, ATP_LOCAL_LLM_URL, no Ollama): going on with the tools; --local-llm sets up a small one",
        );
    }
    let mut configs =
        source.tools.as_deref().map(|crate_dir| tools(crate_dir, source, directory.path())).unwrap_or_default();
    configs.extend(models);
    let outcome = reviewed(screen, args, source, configs, directory.path()).await;
    if args.keep {
        let kept = directory.keep();
        screen.progress(&format!("kept: {}   (atp replay --log local:{})", kept.display(), kept.display()));
    }
    outcome
}

/// The tools that look at a crate: a linter and its tests, each a program run by the `command` adapter.
fn tools(crate_dir: &Path, source: &Source, data: &Path) -> Vec<AgentConfig> {
    let tool = |name: &str, words: &[&str]| {
        let mut argv: Vec<String> = std::iter::once("cargo").chain(words.iter().copied()).map(str::to_owned).collect();
        if source.is_default {
            // The demo's own crate leaves nothing behind in the checkout, and the two don't wait for each other.
            argv.extend(["--target-dir".into(), data.join(name).display().to_string()]);
        }
        AgentConfig {
            cwd: Some(crate_dir.to_owned()),
            argv,
            task_types: vec!["code_review".into()],
            timeout: Some(Span(source.deadline)),
            ..AgentConfig::new(Kind::Command, name)
        }
    };
    vec![
        tool("reviewer.clippy", &["clippy", "--quiet", "--all-targets", "--message-format=json"]),
        tool("reviewer.tests", &["test", "--quiet", "--no-fail-fast"]),
    ]
}

/// Starts the router and the agents, submits, shows, stops.
async fn reviewed(
    screen: Screen,
    args: &cli::Demo,
    source: &Source,
    configs: Vec<AgentConfig>,
    data: &Path,
) -> Outcome {
    let router = Router::start(configuration(source, data)).await;
    let router = router.map_err(|e| Failure::new(Exit::Task, format!("router: {e}")))?;
    screen.progress(&format!(
        "router r1 in this process: atp://{} and http://{}, log in {}",
        router.atp_addr(),
        router.http_addr(),
        data.display()
    ));
    let shown = async {
        let agents = start(screen, &router, configs).await?;
        let names: Vec<AgentName> = agents.iter().map(|(name, _)| name.clone()).collect();
        let end = submit(screen, args, source, &router, names).await?;
        for (_, agent) in &agents {
            agent.shutdown().await;
        }
        show(screen, &router, &end).await
    }
    .await;
    router.stop().await.map_err(|e| Failure::new(Exit::Task, format!("router: {e}")))?;
    shown
}

/// Free loopback ports, so that a router which runs already is left alone; the rest as by default.
fn configuration(source: &Source, data: &Path) -> Config {
    let mut config = Config::default();
    config.listen.atp.set_port(0);
    config.listen.http.set_port(0);
    config.data_dir = data.to_owned();
    let ms = u64::try_from(source.deadline.as_millis()).unwrap_or(u64::MAX);
    config.settings.deadline_ms = ms;
    config.settings.agent_timeout_ms = ms;
    config
}

async fn start(
    screen: Screen,
    router: &Router,
    configs: Vec<AgentConfig>,
) -> Result<Vec<(AgentName, AgentHandle)>, Failure> {
    let mut agents = Vec::new();
    for config in configs {
        let what = match config.kind {
            Kind::Command => config.argv.join(" "),
            kind => format!("{kind} {}", config.model.as_deref().unwrap_or_default()),
        };
        let (capabilities, handler) =
            atp_agent::build(config).map_err(|e| Failure::new(Exit::Task, format!("agent: {e}")))?;
        let name = capabilities.agent.clone();
        let agent = serve(memory_dialer(router), capabilities, handler, AgentOptions::default());
        let connected = tokio::time::timeout(Duration::from_secs(10), agent.connected()).await;
        connected
            .map_err(|_| Failure::new(Exit::Task, format!("agent {name}: not connected after 10 s")))?
            .map_err(|e| connect::failure(&e))?;
        screen.progress(&format!("agent {name}: {what}"));
        agents.push((name, agent));
    }
    Ok(agents)
}

async fn submit(
    screen: Screen,
    args: &cli::Demo,
    source: &Source,
    router: &Router,
    agents: Vec<AgentName>,
) -> Result<End, Failure> {
    let default = if source.tools.is_some() { REVIEW } else { READ };
    let mut request = SubmitRequest::of(Submit {
        task: args.task.clone().unwrap_or_else(|| default.into()),
        inputs: source.inputs.clone(),
        agents,
        strategy: Some("union".into()),
        ..Submit::default()
    });
    // The tools take reviews only; a text is any task.
    if source.tools.is_some() {
        request = request.task_type("code_review");
    }
    request = request.budget_usd_micros(args.budget_usd.0).deadline(source.deadline);
    screen.progress(&format!(
        "task: {} ({}, budget {} USD)\n",
        request.submit.task,
        source.what,
        atp_proto::money::show_usd(args.budget_usd)
    ));
    let client =
        Client::connect(memory_dialer(router), ClientOptions::default()).await.map_err(|e| connect::failure(&e))?;
    let stream = client.submit(request).await.map_err(|e| connect::failure(&e))?;
    let end = follow(screen, stream, false).await?;
    client.close().await;
    Ok(end)
}

/// Result, bill, and what the log says of it.
async fn show(screen: Screen, router: &Router, end: &End) -> Outcome {
    let global =
        Global { url: vec![format!("http://{}", router.http_addr())], token: None, json: screen.json, log_level: None };
    let verified: Value = Api::new(&global)?.post("/v1/verify").await?;
    if screen.json {
        screen.document(&json!({"stream_id": end.stream_id, "state": end.final_.state, "result": end.final_.result,
            "consensus": end.final_.consensus, "bill": end.bill, "error": end.final_.error, "verify": verified}))?;
    } else {
        screen.line(&summary(screen, end))?;
        screen.line(&format!(
            "\nverify: the log, folded again, against the live state\n{}",
            verify_text(screen, &verified)
        ))?;
        screen.line(&format!("\n{}\n{}", screen.paint(Paint::Bold, "next"), NEXT))?;
    }
    if verified["ok"] != json!(true) {
        return Err(Failure::silent(Exit::Difference));
    }
    if end.final_.state == TaskState::Done { Ok(()) } else { Err(Failure::silent(Exit::Task)) }
}

const NEXT: &str = "  atp demo --keep                          keep the log, then: atp replay --log local:DIR
  atp demo --path DIR --budget-usd 0.25    your own Rust workspace
  atp router                               a router that stays; agents and tasks from other terminals:
  atp agent command --name tests -- cargo test
  atp submit --agents tests \"Run the tests\"
  atp ps, atp bill STREAM, atp verify      kill the router in between (kill -9), start it again, and look";

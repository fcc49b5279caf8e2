//! `atp agent KIND`: one adapter, until a signal, at whichever router takes it. The adapter does the work; this starts and ends it.

use crate::cli::{self, AgentKind, Global};
use crate::connect;
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;
use crate::submit::interrupt;
use atp_agent::config::{AgentConfig, ConfigError, Kind, Prices, Secret, Span, Usd};
use atp_sdk::{AgentHandle, AgentOptions, Error, serve};
use serde_json::json;
use std::time::Duration;

/// How often an agent that no router has taken yet says so.
const SAY_AGAIN: Duration = Duration::from_secs(5);

pub(crate) async fn run(global: &Global, screen: Screen, args: &cli::Agent) -> Outcome {
    // A faulty flag shows before a router is asked.
    let (capabilities, handler) = atp_agent::build(config(args)?).map_err(|e| of_config(&e))?;
    let (name, adapter) = (capabilities.agent.clone(), capabilities.adapter.clone());
    let dialer = connect::dialer(global)?;
    let options = AgentOptions { token: global.token.clone(), ..AgentOptions::default() };
    let address = dialer.to_string();
    let agent = serve(dialer, capabilities, handler, options);
    tokio::select! {
        connected = first_connection(&agent) => connected?,
        () = interrupt() => return Err(Failure::interrupted()),
    }
    if screen.json {
        screen.document(
            &json!({"agent": name, "adapter": adapter, "router": address, "incarnation": agent.incarnation()}),
        )?;
    } else {
        screen.line(&format!("agent {name} ({adapter}) serves at {address}"))?;
    }
    tokio::select! {
        () = agent.ended() => {}
        () = interrupt() => {
            screen.progress("ending: running calls have a moment; a second signal stops at once");
            tokio::select! {
                () = agent.shutdown() => return Ok(()),
                () = interrupt() => return Err(Failure::interrupted()),
            }
        }
    }
    Err(agent.last_error().map_or_else(|| Failure::new(Exit::Task, "the agent has ended"), |e| connect::failure(&e)))
}

/// Waits for a router that takes the agent, however long none is there or all only wait for their turn, and says meanwhile why not.
///
/// # Errors
/// The agent has ended: its credential is refused, or its handle is another one's.
async fn first_connection(agent: &AgentHandle) -> Result<(), Failure> {
    loop {
        match tokio::time::timeout(SAY_AGAIN, agent.connected()).await {
            Ok(connected) => return connected.map_err(|e| connect::failure(&e)),
            Err(_) => {
                let why = agent.last_error().unwrap_or_else(|| Error::Unreachable("no answer".into()));
                tracing::warn!(%why, "no router takes this agent yet; trying on");
            }
        }
    }
}

fn of_config(error: &ConfigError) -> Failure {
    let place = error.place.map(|(line, column)| format!("line {line}, column {column}: ")).unwrap_or_default();
    Failure::usage(format!("{place}{error}"))
}

pub(crate) const fn kind(kind: AgentKind) -> Kind {
    match kind {
        AgentKind::Openai => Kind::Openai,
        AgentKind::Anthropic => Kind::Anthropic,
        AgentKind::Gemini => Kind::Gemini,
        AgentKind::Ollama => Kind::Ollama,
        AgentKind::Command => Kind::Command,
        AgentKind::Scripted => Kind::Scripted,
    }
}

/// Where a provider's key is looked for.
pub(crate) const fn key_variable(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Openai => Some("OPENAI_API_KEY"),
        Kind::Anthropic => Some("ANTHROPIC_API_KEY"),
        Kind::Gemini => Some("GEMINI_API_KEY"),
        Kind::Ollama | Kind::Command | Kind::Scripted => None,
    }
}

fn config(args: &cli::Agent) -> Result<AgentConfig, Failure> {
    let kind = kind(args.kind);
    let variable = args.api_key_env.as_deref().or(key_variable(kind));
    let key = variable.and_then(|v| std::env::var(v).ok()).filter(|k| !k.is_empty());
    if let (Some(variable), None) = (&args.api_key_env, &key) {
        return Err(Failure::usage(format!("--api-key-env: `{variable}` is not set; export it or name another")));
    }
    let prices = args.in_usd_per_mtok.zip(args.out_usd_per_mtok);
    Ok(AgentConfig {
        model: args.model.clone(),
        base_url: args.base_url.clone(),
        api_key: key.map(Secret),
        max_parallel: args.max_parallel,
        task_types: args.task_types.clone(),
        prices: prices.map(|(i, o)| Prices { in_usd_per_mtok: Usd(i), out_usd_per_mtok: Usd(o) }),
        output_tokens_max: args.output_tokens_max,
        cwd: args.cwd.clone(),
        argv: args.argv.clone(),
        timeout: args.timeout.map(|ms| Span(Duration::from_millis(ms))),
        output_bytes_max: args.output_bytes_max,
        script: args.script.clone(),
        ..AgentConfig::new(kind, args.name.clone().unwrap_or_default())
    })
}

//! `atp router`: the daemon's process: configuration, signals, the adapters that live inside. The router itself is a library.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::{Screen, escape};
use atp_agent::config::{AgentConfig, Secret};
use atp_router::config::{AgentEntry, Problem};
use atp_router::{Config, Router, StartError};
use atp_sdk::{AgentHandle, AgentOptions, BoxedIo, Dialer, serve};
use serde_json::json;
use std::path::Path;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub(crate) async fn run(screen: Screen, args: &cli::Router) -> Outcome {
    // Heard from the first moment on: a signal during recovery isn't lost.
    let mut term = listen(SignalKind::terminate())?;
    let mut int = listen(SignalKind::interrupt())?;
    let mut hup = listen(SignalKind::hangup())?;
    let config = match &args.config {
        Some(path) => load(path)?,
        None => Config::default(),
    };
    let (id, data) = (config.settings.router_id.clone(), config.data_dir.clone());
    let entries = config.agents.clone();
    let embedded = entries.iter().map(agent_config).collect::<Result<Vec<_>, _>>()?;
    let router = tokio::select! {
        router = Router::start(config) => router.map_err(|e| start_failure(&e))?,
        _ = term.recv() => return Ok(()),
        _ = int.recv() => return Err(Failure::interrupted()),
    };
    let agents = start_agents(&router, embedded)?;
    if screen.json {
        screen
            .document(&json!({"router": id, "atp": router.atp_addr(), "http": router.http_addr(), "data_dir": data}))?;
    } else {
        screen.line(&format!(
            "router {id} serves atp://{} and http://{}, data in {}",
            router.atp_addr(),
            router.http_addr(),
            data.display()
        ))?;
    }
    loop {
        tokio::select! {
            _ = hup.recv() => reload(&router, args.config.as_deref()).await,
            _ = term.recv() => break,
            _ = int.recv() => break,
            ended = router.wait() => return ended.map_err(|e| Failure::new(Exit::Task, format!("the router stopped: {e}"))),
        }
    }
    let ends = async {
        if router.hands_over() {
            screen.progress("handing over: other routers go on with what runs; a second signal stops at once");
            router.hand_over().await;
        } else {
            screen.progress("draining: running streams end, new ones are refused; a second signal stops at once");
            router.drain().await;
        }
    };
    tokio::select! {
        () = ends => {}
        _ = term.recv() => {}
        _ = int.recv() => {}
        ended = router.wait() => return ended.map_err(|e| Failure::new(Exit::Task, format!("the router stopped: {e}"))),
    }
    let farewell = async {
        for agent in &agents {
            agent.shutdown().await;
        }
    };
    // Their calls have ended by now, or nobody wants to wait.
    let _ = tokio::time::timeout(Duration::from_secs(1), farewell).await;
    router.stop().await.map_err(|e| Failure::new(Exit::Task, format!("the router stopped: {e}")))
}

fn listen(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|e| Failure::new(Exit::Task, format!("signals: {e}")))
}

pub(crate) fn load(path: &Path) -> Result<Config, Failure> {
    atp_router::config::load(path).map_err(|problems| Failure::usage(listed(path, &problems)))
}

/// `FILE:LINE:COLUMN: field: what; fix`, a problem per line.
pub(crate) fn listed(path: &Path, problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("{}:{p}", path.display())).collect::<Vec<_>>().join("\n")
}

fn start_failure(error: &StartError) -> Failure {
    match error {
        StartError::Config(_) | StartError::Listen { .. } => Failure::usage(error),
        StartError::Log(_)
        | StartError::Kafka(_)
        | StartError::Fold { .. }
        | StartError::Store(_)
        | StartError::Stopped(_) => Failure::new(Exit::Task, error),
    }
}

/// A configuration with an error changes nothing.
async fn reload(router: &Router, path: Option<&Path>) {
    let Some(path) = path else {
        tracing::warn!("SIGHUP: there is no --config to read again");
        return;
    };
    let reloaded = match atp_router::config::load(path) {
        Ok(config) => router.reload(config).await,
        Err(problems) => Err(problems),
    };
    match reloaded {
        Ok(()) => tracing::info!("configuration reloaded from {}", path.display()),
        Err(problems) => tracing::error!("configuration kept as it was:\n{}", escape(&listed(path, &problems))),
    }
}

/// A dialer whose connections are made in memory, for clients and agents in this process.
pub(crate) fn memory_dialer(router: &Router) -> Dialer {
    let door = router.memory_door();
    Dialer::new(move || {
        let connection: BoxedIo = Box::new(door());
        async move { Ok(connection) }
    })
}

fn start_agents(router: &Router, configs: Vec<AgentConfig>) -> Result<Vec<AgentHandle>, Failure> {
    let mut agents = Vec::new();
    for config in configs {
        let (capabilities, handler) = atp_agent::build(config).map_err(|e| Failure::usage(format!("agents: {e}")))?;
        agents.push(serve(memory_dialer(router), capabilities, handler, AgentOptions::default()));
    }
    Ok(agents)
}

/// An entry of `agents:` as the flags of `atp agent`; a provider's key may come from the environment.
fn agent_config(entry: &AgentEntry) -> Result<AgentConfig, Failure> {
    let wrong = |why: String| Failure::usage(format!("{}:{}: agents: {why}", entry.line, entry.column));
    let mut config: AgentConfig =
        serde_json::from_value(entry.fields.clone().into()).map_err(|e| wrong(e.to_string()))?;
    if config.api_key.is_none() {
        let variable = crate::agent::key_variable(config.kind).and_then(|v| std::env::var(v).ok());
        config.api_key = variable.filter(|k| !k.is_empty()).map(Secret);
    }
    Ok(config)
}

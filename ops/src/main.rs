//! `atp`, the one binary: parses the command line, puts the parts together and turns outcomes into exit codes.
//! Holds no state of its own and decides nothing about streams or money.

mod agent;
mod api;
mod check;
mod cli;
mod connect;
mod demo;
mod failure;
mod finding;
mod follow;
mod log;
mod look;
mod replay;
mod router;
mod rows;
mod screen;
mod store;
mod submit;
mod watch;

use clap::{CommandFactory, Parser};
use cli::{Cli, Command};
use failure::{Exit, Failure, Outcome};
use screen::Screen;
use std::process::ExitCode;

/// A router makes and drops millions of small frames a second; the system's allocator is a tenth of its work.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // clap exits with 2 for wrong usage and 0 for --help, as people expect.
    let cli = Cli::parse();
    let screen = Screen::of_process(cli.global.json);
    log_to_stderr(&cli);
    // Every HTTP client of the process takes it from here; a second one would be refused, and there is none.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let outcome = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(cli, screen));
            // A blocked stdin or a slow disk mustn't keep a finished command.
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            outcome
        }
        Err(error) => Err(Failure::new(Exit::Task, format!("cannot start: {error}"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit, text }) => {
            if !text.is_empty() {
                eprintln!("atp: {}", screen::escape(&text));
            }
            ExitCode::from(exit as u8)
        }
    }
}

async fn run(cli: Cli, screen: Screen) -> Outcome {
    let global = &cli.global;
    match cli.command {
        Command::Demo(args) => demo::run(screen, &args).await,
        Command::Submit(args) => submit::run(global, screen, &args).await,
        Command::Watch(args) => watch::run(global, screen, &args).await,
        Command::Cancel(args) => watch::cancel(global, screen, &args).await,
        Command::Verify(cli::Verify { log: Some(log) }) => look::verify_log(screen, &log),
        Command::Verify(_) => look::verify(global, screen).await,
        Command::Replay(args) => replay::run(screen, &args),
        Command::Agent(args) => agent::run(global, screen, &args).await,
        Command::Bench(args) => bench(screen, &args),
        Command::Router(args) => router::run(screen, &args).await,
        Command::Store(cli::Store::Show(args)) => store::show(screen, &args).await,
        Command::Check(args) => check::run(screen, &args),
        Command::Log(cli::Log::Init(args)) => log::init(screen, &args).await,
        Command::Log(cli::Log::Prune(args)) => log::prune(screen, &args),
        Command::Ps => look::ps(global, screen).await,
        Command::Agents => look::agents(global, screen).await,
        Command::AgentStatus(args) => look::agent_status(global, screen, &args).await,
        Command::Drain(cli::Drain::Agent(args)) => look::drain_agent(global, screen, &args).await,
        Command::Drain(cli::Drain::Router(args)) => look::drain_router(global, screen, &args).await,
        Command::Shards => look::shards(global, screen).await,
        Command::Accounts(args) => look::accounts(global, screen, &args).await,
        Command::Bill(args) => look::bill(global, screen, &args).await,
        Command::Completion { shell } => completion(shell),
        Command::Version => version(screen),
    }
}

/// The flags are the bench's own; `--json` may stand before them too.
fn bench(screen: Screen, args: &cli::Bench) -> Outcome {
    let json = (screen.json && !args.args.iter().any(|a| a == "--json")).then(|| "--json".to_owned());
    let words = std::iter::once("atp bench".to_owned()).chain(args.args.iter().cloned()).chain(json);
    let parsed = atp_bench::BenchArgs::parse_from(words);
    atp_bench::run(parsed).map_err(Failure::from)
}

/// To a buffer first: the generator panics when its reader has gone.
fn completion(shell: clap_complete::Shell) -> Outcome {
    use std::io::Write;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "atp", &mut script);
    Ok(std::io::stdout().lock().write_all(&script)?)
}

fn version(screen: Screen) -> Outcome {
    let (version, protocol) = (env!("CARGO_PKG_VERSION"), "1.1");
    if screen.json {
        return Ok(screen.document(&serde_json::json!({"version": version, "protocol": protocol}))?);
    }
    Ok(screen.line(&format!("atp {version} (ATP {protocol})"))?)
}

fn log_to_stderr(cli: &Cli) {
    let daemon = matches!(cli.command, Command::Router(_) | Command::Agent(_));
    let level = cli.global.log_level.map_or(if daemon { "info" } else { "warn" }, cli::LogLevel::as_str);
    // Dependencies speak up only when they warn: their debug logs can carry prompts and keys.
    let filter = tracing_subscriber::EnvFilter::new(format!(
        "warn,atp={level},atp_proto={level},atp_core={level},atp_router={level},atp_sdk={level},atp_agent={level},atp_bench={level}"
    ));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second subscriber can't be set; there is none before this one.
    let _ = log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init();
}

//! The command line as people type it: every command, flag, default and example. Decides nothing; parsing is all it does.

use atp_proto::{Qos, UsdMicros};
use atp_router::log::Source;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

#[derive(Debug, Parser)]
#[command(
    name = "atp",
    version,
    about = "ATP Router: agents, budgets and a ledger behind one protocol",
    after_help = "Examples:\n  atp demo --local-llm                     watch one real task from submit to bill\n  atp router                               a router on loopback with a local log\n  atp agent command --name tests -- cargo test\n  atp submit --agents tests \"Run the tests\" --budget-usd 0.05\n  atp ps\n\nExit codes: 0 done, 1 the task failed, was refused or is provisional, 2 wrong usage, 3 router not reachable,\n4 not authorised, 5 a check found a difference, 130 interrupted."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// The router: `http://HOST:PORT`, or `atp://HOST:PORT` for commands that speak the native protocol; of several, with
    /// commas between, the first that answers, and the next one when it is lost
    #[arg(
        long,
        global = true,
        env = "ATP_URL",
        default_value = "http://127.0.0.1:7080",
        value_name = "URL",
        value_delimiter = ','
    )]
    pub(crate) url: Vec<String>,
    /// Credential for the router
    #[arg(long, global = true, env = "ATP_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// One JSON document on stdout (one per line for streams) and nothing else
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What is logged to stderr [default: info for `router` and `agent`, else warn]
    #[arg(long, global = true, value_enum, value_name = "L")]
    pub(crate) log_level: Option<LogLevel>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Router, real agents and a client in one process: one real task, its findings, its bill
    Demo(Demo),
    /// Run the daemon. SIGTERM drains, a second one stops; SIGHUP reloads the configuration
    Router(Router),
    /// Run one adapter against a router
    Agent(Agent),
    /// Submit a task, print what comes, then the result and the bill
    Submit(Submit),
    /// Streams: a live table on a terminal, one table otherwise
    Ps,
    /// Follow one stream from any point, or everything that runs
    #[command(visible_alias = "attach")]
    Watch(Watch),
    /// Who is connected: status, window, calls in flight, spend
    Agents,
    /// One agent
    AgentStatus(AgentName),
    /// Which router owns which shard, who stands by, how far it is behind
    #[command(after_help = "Examples:\n  atp shards\n  atp shards --json | jq '.shards[] | select(.owner == null)'")]
    Shards,
    /// Send nothing new to an agent, or let a router own nothing; what runs goes on
    #[command(subcommand)]
    Drain(Drain),
    /// Budgets: limit, settled, held, what is left, pace
    Accounts(Accounts),
    /// Each call of a stream: estimate, guard, grant, actual, source, price, rule
    Bill(Bill),
    /// Fold the log and compare it with the live state, or (with --log) with what the log itself recorded
    Verify(Verify),
    /// Print a log's records, or rebuild the state from it
    Replay(Replay),
    /// The log itself
    #[command(subcommand)]
    Log(Log),
    /// What the state store has, also while no router runs
    #[command(subcommand)]
    Store(Store),
    /// Ask a stream to stop
    Cancel(StreamName),
    /// Validate a configuration offline
    Check(Check),
    /// Measure
    #[command(disable_help_flag = true)]
    Bench(Bench),
    /// Completions for a shell, on stdout
    #[command(after_help = "Examples:\n  atp completion bash > ~/.local/share/bash-completion/completions/atp")]
    Completion { shell: clap_complete::Shell },
    /// Version of program, protocol and log format
    Version,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp demo                                 review the small crate in ops/demo\n  atp demo --local-llm                     the same, with a small language model on this machine\n  atp demo --path ../my-workspace --budget-usd 0.25\n  atp demo --file notes.txt --task \"What is missing?\""
)]
pub(crate) struct Demo {
    /// What to ask [default: a code review]
    #[arg(long, value_name = "T")]
    pub(crate) task: Option<String>,
    /// A Rust workspace to review instead of ops/demo
    #[arg(long, value_name = "DIR", conflicts_with = "file")]
    pub(crate) path: Option<PathBuf>,
    /// A text to review; only language models look at it
    #[arg(long, value_name = "F")]
    pub(crate) file: Option<PathBuf>,
    /// What the whole task may cost
    #[arg(long, value_name = "N", value_parser = usd, default_value = "0.50")]
    pub(crate) budget_usd: UsdMicros,
    /// Set up a small real language model on loopback (ops/local-llm.sh) and stop it afterwards
    #[arg(long)]
    pub(crate) local_llm: bool,
    /// Keep the data directory and print where it is
    #[arg(long)]
    pub(crate) keep: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp router                               defaults: loopback, ./atp-data\n  atp router --config atp.yaml\n  kill -HUP PID                            reload; a configuration with an error changes nothing"
)]
pub(crate) struct Router {
    /// Configuration file; every key has a default
    #[arg(long, env = "ATP_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Store {
    /// Routers, shards, agents and streams as the store has them
    #[command(after_help = "Examples:\n  atp store show --config atp.yaml\n  atp store show --config atp.yaml --json")]
    Show(StoreShow),
}

#[derive(Debug, Args)]
pub(crate) struct StoreShow {
    /// The configuration file that names the store
    #[arg(long, env = "ATP_CONFIG", value_name = "FILE")]
    pub(crate) config: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AgentKind {
    Openai,
    Anthropic,
    Gemini,
    Ollama,
    Command,
    Scripted,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp agent openai --name writer.gpt --model gpt-4o-mini          key from OPENAI_API_KEY\n  atp agent openai --name local --model smollm2 --base-url http://127.0.0.1:8080/v1\n  atp agent ollama --name writer.llama --model llama3.2\n  atp agent command --name reviewer.clippy --task-type code_review --cwd . -- cargo clippy --message-format=json\n  atp agent scripted --name reviewer.script --script script.yaml\n\nThe router is --url: http://127.0.0.1:7080 (asked where its native port is) or atp://127.0.0.1:7443."
)]
pub(crate) struct Agent {
    /// Which adapter
    #[arg(value_enum, value_name = "KIND")]
    pub(crate) kind: AgentKind,
    /// The agent's handle: 1 to 64 of A-Za-z0-9._- (`scripted`: the script's name without it)
    #[arg(long, value_name = "H", required_unless_present = "script")]
    pub(crate) name: Option<String>,
    /// Model to ask
    #[arg(long, value_name = "M")]
    pub(crate) model: Option<String>,
    /// Where the provider's API is
    #[arg(long, value_name = "URL")]
    pub(crate) base_url: Option<String>,
    /// Environment variable that holds the provider's key [default: the provider's own, e.g. OPENAI_API_KEY]
    #[arg(long, value_name = "VAR")]
    pub(crate) api_key_env: Option<String>,
    /// Calls at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) max_parallel: Option<u32>,
    /// A task type it takes (may be repeated) [default: any]
    #[arg(long = "task-type", value_name = "T", value_delimiter = ',')]
    pub(crate) task_types: Vec<String>,
    /// USD per million prompt tokens, for a model that the price book lacks
    #[arg(long, value_name = "USD", value_parser = usd, requires = "out_usd_per_mtok")]
    pub(crate) in_usd_per_mtok: Option<UsdMicros>,
    /// USD per million completion tokens
    #[arg(long, value_name = "USD", value_parser = usd, requires = "in_usd_per_mtok")]
    pub(crate) out_usd_per_mtok: Option<UsdMicros>,
    /// Never asks a model for more output than this
    #[arg(long, value_name = "N")]
    pub(crate) output_tokens_max: Option<u64>,
    /// Longest a call may take, e.g. 60s
    #[arg(long, value_name = "D", value_parser = duration)]
    pub(crate) timeout: Option<u64>,
    /// `command`: where the program runs
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<PathBuf>,
    /// `command`: more output than this ends the program
    #[arg(long, value_name = "N")]
    pub(crate) output_bytes_max: Option<u64>,
    /// `scripted`: the script
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// `command`: the program and its arguments
    #[arg(last = true, value_name = "PROGRAM")]
    pub(crate) argv: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp submit --task-type code_review --budget-usd 0.25 \"Review src/lib.rs\"\n  git diff | atp submit - --fanout 2 --strategy union --sarif review.sarif\n  atp submit --file task.md --input src/lib.rs --key pr-17 --json\n  atp submit --detach \"A long one\" && atp ps"
)]
pub(crate) struct Submit {
    /// The task, or `-` for stdin
    #[arg(value_name = "TEXT", required_unless_present = "file")]
    pub(crate) text: Option<String>,
    /// The task is in this file
    #[arg(long, value_name = "F", conflicts_with = "text")]
    pub(crate) file: Option<PathBuf>,
    /// A text that goes with the task (may be repeated)
    #[arg(long = "input", value_name = "F")]
    pub(crate) inputs: Vec<PathBuf>,
    /// What it may cost, e.g. 0.50
    #[arg(long, value_name = "N", value_parser = usd)]
    pub(crate) budget_usd: Option<UsdMicros>,
    /// What it may take, prompts and completions together
    #[arg(long, value_name = "N")]
    pub(crate) budget_tokens: Option<u64>,
    /// gold, silver or bronze
    #[arg(long, value_name = "Q", value_parser = qos, default_value = "silver")]
    pub(crate) qos: Qos,
    /// Only agents that take this type
    #[arg(long, value_name = "T")]
    pub(crate) task_type: Option<String>,
    /// Tools that its agents may use; the account must have them
    #[arg(long, value_name = "a,b", value_delimiter = ',')]
    pub(crate) tools: Vec<String>,
    /// These agents, a call each
    #[arg(long, value_name = "a,b", value_delimiter = ',', conflicts_with = "fanout")]
    pub(crate) agents: Vec<String>,
    /// The best N agents that match
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) fanout: Option<u32>,
    /// How many answers become one
    #[arg(long, value_name = "S", value_parser = ["union"])]
    pub(crate) strategy: Option<String>,
    /// When it must have ended, e.g. 90s
    #[arg(long, value_name = "D", value_parser = duration)]
    pub(crate) deadline: Option<u64>,
    /// Idempotency key: the same work is done once, however often it is submitted
    #[arg(long, value_name = "K")]
    pub(crate) key: Option<String>,
    /// Refused at once instead of queued
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Print the stream id once it is accepted, and leave
    #[arg(long)]
    pub(crate) detach: bool,
    /// With --json: each frame on a line before the result
    #[arg(long)]
    pub(crate) stream: bool,
    /// Write the findings as SARIF 2.1
    #[arg(long, value_name = "OUT")]
    pub(crate) sarif: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp watch                                everything that runs\n  atp watch k-6f1d2a.1 --from 12           what follows message 12, then on to the end\n  atp watch k-6f1d2a.1 --json | jq .payload.type"
)]
pub(crate) struct Watch {
    /// The stream; without it everything that runs
    #[arg(value_name = "STREAM", value_parser = id)]
    pub(crate) stream: Option<String>,
    /// After this message; 0 is from the beginning
    #[arg(long, value_name = "N", default_value_t = 0, requires = "stream")]
    pub(crate) from: u64,
}

#[derive(Debug, Args)]
pub(crate) struct AgentName {
    /// The agent's handle
    #[arg(value_name = "NAME", value_parser = id)]
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct Accounts {
    #[command(subcommand)]
    pub(crate) word: Option<AccountsWord>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AccountsWord {
    /// Let a paced account go faster for a while; who answers for it is logged
    #[command(after_help = "Examples:\n  atp accounts faster acme --usd 5 --for 2h --by ada@example.org")]
    Faster(Faster),
}

#[derive(Debug, Args)]
pub(crate) struct Faster {
    /// The account
    #[arg(value_name = "ACCOUNT", value_parser = id)]
    pub(crate) account: String,
    /// So much above the pace, in USD
    #[arg(long, value_name = "USD", value_parser = usd, required_unless_present = "tokens")]
    pub(crate) usd: Option<UsdMicros>,
    /// So many tokens above the pace
    #[arg(long, value_name = "N")]
    pub(crate) tokens: Option<u64>,
    /// For how long, e.g. 2h
    #[arg(long = "for", value_name = "D", value_parser = duration)]
    pub(crate) for_ms: u64,
    /// Who answers for it
    #[arg(long, value_name = "NAME")]
    pub(crate) by: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Drain {
    /// Nothing new for this agent until `--undo`
    #[command(
        after_help = "Examples:\n  atp drain agent reviewer.gemini\n  atp drain agent reviewer.gemini --undo   as the agent says itself again"
    )]
    Agent(DrainAgent),
    /// Hand all shards of a router to the others; it owns nothing until `--undo` or its next start
    #[command(
        after_help = "Examples:\n  atp drain router r2 && atp shards         it still serves clients and agents, by the others' shards\n  atp drain router r2 --undo"
    )]
    Router(DrainRouter),
}

#[derive(Debug, Args)]
pub(crate) struct DrainRouter {
    /// The router's `router.id`
    #[arg(value_name = "ID", value_parser = id)]
    pub(crate) id: String,
    /// Take it back
    #[arg(long)]
    pub(crate) undo: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DrainAgent {
    /// The agent's handle
    #[arg(value_name = "NAME", value_parser = id)]
    pub(crate) name: String,
    /// Take it back
    #[arg(long)]
    pub(crate) undo: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StreamName {
    /// The stream
    #[arg(value_name = "STREAM", value_parser = id)]
    pub(crate) stream: String,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp bill k-6f1d2a.1\n  atp bill --account default --since 2h\n  atp bill --account default --since 2026-11-01T00:00:00Z --json"
)]
pub(crate) struct Bill {
    /// The stream
    #[arg(value_name = "STREAM", value_parser = id, required_unless_present = "account", conflicts_with = "account")]
    pub(crate) stream: Option<String>,
    /// All streams of an account
    #[arg(long, value_name = "A")]
    pub(crate) account: Option<String>,
    /// Streams that began since then: RFC 3339 or a duration back from now
    #[arg(long, value_name = "T", requires = "account")]
    pub(crate) since: Option<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp verify                               the running router's log against its state\n  atp verify --log local:./atp-data/log    offline, also beside a running router\n  atp verify --log config:atp.yaml         the log that a configuration names\n\nExit code 5: something differs."
)]
pub(crate) struct Verify {
    /// Check the log itself, without a router: `local:DIR`, `kafka://HOST:PORT/TOPIC`, or `config:FILE`
    #[arg(long, value_name = "SRC", value_parser = log_source)]
    pub(crate) log: Option<Source>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  atp replay --log local:./atp-data/log --stream k-6f1d2a.1\n  atp replay --log local:./atp-data/log --shard 7 --from 100 --until 200 --json\n  atp replay --log local:./atp-data/log --state\n  atp replay --log local:./atp-data/log --shard 7 --state --until 200   the state as it was then\n  atp replay --log kafka://127.0.0.1:9092/atp.frames --from 100"
)]
pub(crate) struct Replay {
    /// `local:DIR`, `kafka://HOST:PORT/TOPIC`, or `config:FILE` for the log that a configuration names
    #[arg(long, value_name = "SRC", value_parser = log_source)]
    pub(crate) log: Source,
    /// Only this shard, from 0 [default: all, one after the other]
    #[arg(long, value_name = "N")]
    pub(crate) shard: Option<u32>,
    /// Only records of this stream
    #[arg(long, value_name = "S", value_parser = id)]
    pub(crate) stream: Option<String>,
    /// First position, from 1; with several shards for one of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) from: u64,
    /// Last position; with --state: fold up to here
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) until: Option<u64>,
    /// Rebuild the state, and print its hash and accounts instead of records
    #[arg(long, conflicts_with_all = ["stream", "from"])]
    pub(crate) state: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Log {
    /// Make the Kafka topic and the log in it, each only where there is none, and check what is there
    #[command(
        after_help = "Examples:\n  atp log init --config atp.yaml            log.kind: kafka; safe to run again\n  atp log init --config atp.yaml --json\n\nA local log begins by itself at the router's first start."
    )]
    Init(LogInit),
    /// Remove the log's old part: what lies before each shard's two newest checkpoints and before every stream that is open or
    /// may be resumed
    #[command(
        after_help = "Examples:\n  atp log prune --log local:./atp-data/log --dry-run     what would go; also beside a running router\n  atp log prune --log local:./atp-data/log               stop the router first\n  atp log prune --log config:atp.yaml --keep 90d         nothing of the last 90 days goes\n  atp log prune --log kafka://127.0.0.1:9092/atp.frames  beside the running routers\n\nWhat went can't be shown, replayed or verified any more; back it up first if somebody may ask for it.\nExit code 5: the log is damaged, and nothing was removed."
    )]
    Prune(LogPrune),
}

#[derive(Debug, Args)]
pub(crate) struct LogPrune {
    /// `local:DIR`, `kafka://HOST:PORT/TOPIC`, or `config:FILE` for the log that a configuration names
    #[arg(long, value_name = "SRC", value_parser = log_source)]
    pub(crate) log: Source,
    /// Keep what is younger
    #[arg(long, value_name = "D", value_parser = duration)]
    pub(crate) keep: Option<u64>,
    /// Show what would go, and remove nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogInit {
    /// The router's configuration file
    #[arg(long, env = "ATP_CONFIG", value_name = "FILE")]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  atp check atp.yaml\n\nExit code 5: it has a problem.")]
pub(crate) struct Check {
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// A scenario and its flags; `atp bench --help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "SCENARIO")]
    pub(crate) args: Vec<String>,
}

fn usd(text: &str) -> Result<UsdMicros, String> {
    atp_proto::money::parse_usd(text)
}

fn qos(text: &str) -> Result<Qos, String> {
    match text {
        "gold" => Ok(Qos::Gold),
        "silver" => Ok(Qos::Silver),
        "bronze" => Ok(Qos::Bronze),
        _ => Err("write gold, silver or bronze".into()),
    }
}

fn id(text: &str) -> Result<String, String> {
    if atp_proto::id::is_id(text) { Ok(text.into()) } else { Err("write 1 to 64 of A-Za-z0-9._-".into()) }
}

fn log_source(text: &str) -> Result<Source, String> {
    match text.strip_prefix("config:") {
        Some(file) => {
            let config = atp_router::config::load(file.as_ref());
            config
                .map_err(|problems| problems.iter().map(|p| format!("{file}:{p}")).collect::<Vec<_>>().join("\n"))?
                .source()
        }
        None => text.parse(),
    }
}

/// `500ms`, `30s`, `5m`, `2h`, `7d` in milliseconds.
pub(crate) fn duration(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a duration like 500ms, 30s, 5m, 2h or 7d");
    let end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(end);
    let unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(unit).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("500ms"), Ok(500));
        assert_eq!(duration("7d"), Ok(604_800_000));
        for bad in ["", "5", "s", "-1s", "1.5s", "1w", "99999999999999999999s", "18446744073709551615d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let parse = |args: &[&str]| Cli::try_parse_from(args).map_err(|e| e.to_string());
        for (args, word) in [
            (vec!["atp", "submit", "x", "--budget-usd", "NaN"], "--budget-usd"),
            (vec!["atp", "submit", "x", "--budget-usd=-1"], "--budget-usd"),
            (vec!["atp", "submit", "x", "--qos", "platinum"], "--qos"),
            (vec!["atp", "submit", "x", "--fanout", "65"], "--fanout"),
            (vec!["atp", "submit", "x", "--fanout", "0"], "--fanout"),
            (vec!["atp", "submit", "x", "--agents", "a", "--fanout", "2"], "--fanout"),
            (vec!["atp", "watch", "no good"], "STREAM"),
            (vec!["atp", "replay", "--log", "nowhere"], "--log"),
            (vec!["atp", "submit"], "TEXT"),
        ] {
            let error = parse(&args).expect_err("refused");
            assert!(error.contains(word), "{args:?}: {error}");
        }
        assert!(parse(&["atp", "submit", "x", "--fanout", "64"]).is_ok());
        assert!(parse(&["atp", "attach", "k-1.1"]).is_ok());
    }
}

//! The router under measurement: a child process of this same binary with a configuration per line and a data directory
//! that goes when it goes, or one that runs already.

use crate::args::{BenchArgs, Line};
use crate::process::{self, Usage};
use anyhow::Context;
use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// The most calls that a router lets one agent have at once.
pub(crate) const CALLS_PER_AGENT: usize = 4096;

const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A router to measure. Dropped, a child is killed and its log is gone.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pid: Option<u32>,
    child: Option<Own>,
}

/// A router that was started here.
struct Own {
    process: Child,
    http: SocketAddr,
    dir: TempDir,
}

/// A router of a fleet, and what the fleet shares.
pub(crate) struct Shared<'a> {
    /// From 1.
    pub(crate) id: u64,
    /// No other run's name: of the topic and of the store's keys.
    pub(crate) run: &'a str,
    /// `host:port`, with commas between several.
    pub(crate) kafka: &'a str,
    pub(crate) redis: &'a str,
    pub(crate) single_broker: bool,
}

impl Shared<'_> {
    fn config(&self) -> String {
        let Self { id, run, kafka, redis, single_broker } = self;
        let brokers: Vec<String> = kafka.split(',').map(|broker| format!("{broker:?}")).collect();
        format!(
            "router: {{id: bench-{id}}}\n\
             log: {{kind: kafka, kafka: {{brokers: [{}], topic: bench.{run}, single_broker: {single_broker}}}}}\n\
             store: {{kind: redis, redis: {{url: {redis:?}, prefix: bench.{run}}}}}\n\
             peers: {{key: bench-{run}-of-routers-that-know-each-other}}\n\
             shards: {{lease: 2s}}\n",
            brokers.join(", ")
        )
    }
}

/// A segment of the log as routers have it by default.
const SEGMENT_BYTES: u64 = 64 << 20;

impl Target {
    /// Starts a router for `line`, or takes the one that the flags name.
    pub(crate) async fn start(args: &BenchArgs, line: Line) -> anyhow::Result<Self> {
        if let Some(address) = args.router {
            return Ok(Self { address, pid: args.pid, child: None });
        }
        Self::start_with(args, line, SEGMENT_BYTES).await
    }

    /// Starts a router for `line` whose log has segments of this size.
    pub(crate) async fn start_with(args: &BenchArgs, line: Line, segment_bytes: u64) -> anyhow::Result<Self> {
        let log = format!("log: {{kind: local, durability: {}}}\n", line.durability());
        Self::start_on(args, line, segment_bytes, &log).await
    }

    /// Starts one of the routers that share a log and a store.
    pub(crate) async fn start_shared(args: &BenchArgs, shared: &Shared<'_>) -> anyhow::Result<Self> {
        Self::start_on(args, Line::Durable, SEGMENT_BYTES, &shared.config()).await
    }

    async fn start_on(args: &BenchArgs, line: Line, segment_bytes: u64, log: &str) -> anyhow::Result<Self> {
        let dir = match &args.dir {
            Some(dir) => tempfile::tempdir_in(dir).with_context(|| format!("--dir {}", dir.display()))?,
            None => tempfile::tempdir()?,
        };
        let (atp, http) = (free_address()?, free_address()?);
        let data = dir.path().join("data").display().to_string();
        std::fs::write(dir.path().join("atp.yaml"), config(line, atp, http, &data, segment_bytes, log))?;
        let process = spawn(&dir)?;
        let mut own = Own { process, http, dir };
        own.ready(Duration::from_millis(20)).await?;
        Ok(Self { address: atp, pid: own.process.id(), child: Some(own) })
    }

    /// Kills the process and starts it again on its log: from the start of the process to its readiness.
    pub(crate) async fn restart(&mut self) -> anyhow::Result<Duration> {
        let own = self.child.as_mut().context("only a router that was started here is started again")?;
        own.process.kill().await?;
        let started = Instant::now();
        own.process = spawn(&own.dir)?;
        own.ready(Duration::from_millis(2)).await?;
        self.pid = own.process.id();
        Ok(started.elapsed())
    }

    /// How many routers own shards, as this one sees it.
    pub(crate) async fn owners(&self) -> anyhow::Result<usize> {
        let own = self.child.as_ref().context("only a router that was started here shows its shards")?;
        let body = timeout(Duration::from_secs(10), get(own.http, "/v1/shards")).await??;
        let view: serde_json::Value = serde_json::from_slice(&body).context("/v1/shards")?;
        let shards = view["shards"].as_array().context("/v1/shards has no shards")?;
        let owners: BTreeSet<&str> = shards.iter().filter_map(|shard| shard["owner"].as_str()).collect();
        Ok(owners.len())
    }

    /// Bytes of its log, without what a segment has room for.
    pub(crate) fn log_bytes(&self) -> anyhow::Result<u64> {
        let own = self.child.as_ref().context("only a router that was started here shows its log")?;
        let mut bytes = 0;
        for entry in std::fs::read_dir(own.dir.path().join("data/log"))? {
            bytes += used(&entry?.path())?;
        }
        Ok(bytes)
    }

    /// What its process has used; `None` for a router elsewhere.
    pub(crate) fn usage(&self) -> anyhow::Result<Option<Usage>> {
        self.pid.map(process::usage).transpose()
    }

    /// Kills a child and removes its log; a router that ran before stays.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        let Some(Own { mut process, dir, .. }) = self.child else { return Ok(()) };
        process.kill().await?;
        // A log of gigabytes: not on a thread that drives sockets.
        tokio::task::spawn_blocking(move || dir.close()).await??;
        Ok(())
    }
}

impl Own {
    /// Waits until it serves; asks every so often.
    async fn ready(&mut self, every: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        while !is_ready(self.http).await {
            if let Some(status) = self.process.try_wait()? {
                anyhow::bail!("the router ended with {status} instead of serving");
            }
            anyhow::ensure!(started.elapsed() < START_TIMEOUT, "the router isn't ready after {START_TIMEOUT:?}");
            sleep(every).await;
        }
        Ok(())
    }
}

fn spawn(dir: &TempDir) -> anyhow::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--log-level", "warn", "router", "--config"])
        .arg(dir.path().join("atp.yaml"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("starting a router")
}

/// Bytes of a segment up to its last block: behind it are zeros.
fn used(segment: &Path) -> anyhow::Result<u64> {
    const STEP: u64 = 1 << 20;
    let file = std::fs::File::open(segment)?;
    let mut end = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(STEP)?];
    while end > 0 {
        let from = end.saturating_sub(STEP);
        let part = &mut bytes[..usize::try_from(end - from)?];
        file.read_exact_at(part, from)?;
        if let Some(last) = part.iter().rposition(|byte| *byte != 0) {
            return Ok(from + last as u64 + 1);
        }
        end = from;
    }
    Ok(0)
}

/// Wide limits that are checked on every slice, or none at all.
fn config(line: Line, atp: SocketAddr, http: SocketAddr, data_dir: &str, segment_bytes: u64, log: &str) -> String {
    // A window always has a limit, so without limits it is one that nothing reaches; an account may have none.
    let (window, account) = if line.has_limits() {
        ("max_tokens: 1000000000000, max_usd: 1000000.00", "{usd: 10000000.00, tokens: 10000000000000, per: day}")
    } else {
        ("max_tokens: 1000000000000000, max_usd: 1000000000.00", "{per: day}")
    };
    format!(
        "listen: {{atp: \"{atp}\", http: \"{http}\"}}\n\
         data_dir: {data_dir:?}\n\
         {log}\
         windows:\n  stream: {{max_parallel: 8, {window}}}\n  agent: {{max_parallel: {CALLS_PER_AGENT}, {window}}}\n\
         limits: {{aimd_base: {CALLS_PER_AGENT}, aimd_cap: {CALLS_PER_AGENT}, burst: 100000, cool_off_percent: 1000000, segment_bytes: {segment_bytes}}}\n\
         accounts:\n  default: {account}\n"
    )
}

fn free_address() -> anyhow::Result<SocketAddr> {
    // Free now; nothing else on a loopback asks for it in the next moment.
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The body of an answer.
async fn get(http: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(http).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let body = answer.windows(4).position(|four| four == b"\r\n\r\n").context("no HTTP answer")? + 4;
    Ok(answer.split_off(body))
}

async fn is_ready(http: SocketAddr) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(http).await.ok()?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").await.ok()?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.ok()?;
        status.ends_with(b" 200").then_some(())
    };
    timeout(Duration::from_secs(1), ask).await.ok().flatten().is_some()
}

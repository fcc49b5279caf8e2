//! The router under measurement: a child process of this same binary with a configuration per line and a data directory
//! that goes when it goes, or one that runs already.

use crate::args::{BenchArgs, Line};
use crate::process::{self, Usage};
use anyhow::Context;
use std::net::{SocketAddr, TcpListener};
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

/// The most calls that a router lets one agent have at once.
pub(crate) const CALLS_PER_AGENT: usize = 4096;

const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A router to measure. Dropped, a child is killed and its log is gone.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pid: Option<u32>,
    child: Option<(Child, TempDir)>,
}

impl Target {
    /// Starts a router for `line`, or takes the one that the flags name.
    pub(crate) async fn start(args: &BenchArgs, line: Line) -> anyhow::Result<Self> {
        if let Some(address) = args.router {
            return Ok(Self { address, pid: args.pid, child: None });
        }
        let dir = match &args.dir {
            Some(dir) => tempfile::tempdir_in(dir).with_context(|| format!("--dir {}", dir.display()))?,
            None => tempfile::tempdir()?,
        };
        let (atp, http) = (free_address()?, free_address()?);
        let file = dir.path().join("atp.yaml");
        std::fs::write(&file, config(line, atp, http, &dir.path().join("data").display().to_string()))?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--log-level", "warn", "router", "--config"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting a router")?;
        let started = Instant::now();
        while !is_ready(http).await {
            if let Some(status) = child.try_wait()? {
                anyhow::bail!("the router ended with {status} instead of serving");
            }
            anyhow::ensure!(started.elapsed() < START_TIMEOUT, "the router isn't ready after {START_TIMEOUT:?}");
            sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { address: atp, pid: child.id(), child: Some((child, dir)) })
    }

    /// What its process has used; `None` for a router elsewhere.
    pub(crate) fn usage(&self) -> anyhow::Result<Option<Usage>> {
        self.pid.map(process::usage).transpose()
    }

    /// Kills a child and removes its log; a router that ran before stays.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        let Some((mut child, dir)) = self.child else { return Ok(()) };
        child.kill().await?;
        // A log of gigabytes: not on a thread that drives sockets.
        tokio::task::spawn_blocking(move || dir.close()).await??;
        Ok(())
    }
}

/// Wide limits that are checked on every slice, or none at all.
fn config(line: Line, atp: SocketAddr, http: SocketAddr, data_dir: &str) -> String {
    // A window always has a limit, so without limits it is one that nothing reaches; an account may have none.
    let (window, account) = if line.has_limits() {
        ("max_tokens: 1000000000000, max_usd: 1000000.00", "{usd: 10000000.00, tokens: 10000000000000, per: day}")
    } else {
        ("max_tokens: 1000000000000000, max_usd: 1000000000.00", "{per: day}")
    };
    format!(
        "listen: {{atp: \"{atp}\", http: \"{http}\"}}\n\
         data_dir: {data_dir:?}\n\
         log: {{kind: local, durability: {}}}\n\
         windows:\n  stream: {{max_parallel: 8, {window}}}\n  agent: {{max_parallel: {CALLS_PER_AGENT}, {window}}}\n\
         limits: {{aimd_base: {CALLS_PER_AGENT}, aimd_cap: {CALLS_PER_AGENT}, burst: 100000, cool_off_percent: 1000000}}\n\
         accounts:\n  default: {account}\n",
        line.durability()
    )
}

fn free_address() -> anyhow::Result<SocketAddr> {
    // Free now; nothing else on a loopback asks for it in the next moment.
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
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

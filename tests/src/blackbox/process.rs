//! The router and its agents as child processes: started, killed without warning, started again on the same directory and
//! ports. Asks the router over HTTP as anybody could.

use super::{atp, wait_for};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// A running router with a directory of its own.
pub struct Router {
    dir: tempfile::TempDir,
    child: Option<Child>,
    atp: SocketAddr,
    http: SocketAddr,
    /// Of the process, beside this one's.
    env: Vec<(&'static str, PathBuf)>,
}

impl Router {
    /// Starts a router; `yaml` is what its configuration says beside `listen` and `data_dir`.
    ///
    /// # Panics
    /// When it doesn't serve.
    #[must_use]
    pub fn start(yaml: &str) -> Self {
        let mut router = Self::prepare(yaml);
        router.restart();
        router
    }

    /// A router that doesn't run yet: a log may be laid into `data/log` of its directory first.
    ///
    /// # Panics
    /// When its configuration can't be written.
    #[must_use]
    pub fn prepare(yaml: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let router = Self { dir, child: None, atp: free_address(), http: free_address(), env: Vec::new() };
        router.configure(yaml);
        router
    }

    /// What it reads at its next start.
    ///
    /// # Panics
    /// When that can't be written.
    pub fn configure(&self, yaml: &str) {
        let mut text = format!("listen: {{atp: {}, http: {}}}\n", self.atp, self.http);
        let _ = writeln!(text, "data_dir: {}\n{yaml}", self.dir.path().join("data").display());
        std::fs::write(self.config(), text).expect("a configuration");
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("atp.yaml")
    }

    /// Starts it again on what is there.
    ///
    /// # Panics
    /// When it doesn't serve; its own words are in the message.
    pub fn restart(&mut self) {
        if let Err(said) = self.restart_under(&[]) {
            panic!("the router doesn't serve: {said}\n{}", self.stderr());
        }
    }

    /// Starts it again by a command that runs the command line behind it, in the same process in the end.
    ///
    /// # Errors
    /// It doesn't serve; what it said instead.
    ///
    /// # Panics
    /// When it runs already, or can't be started.
    pub fn restart_under(&mut self, wrapper: &[&str]) -> Result<(), String> {
        assert!(self.child.is_none(), "it runs");
        let err = std::fs::File::create(self.dir.path().join("stderr")).expect("a file");
        let config = self.config();
        let mut child = atp::command_under(wrapper, &["router", "--json", "--config"])
            .arg(&config)
            .envs(self.env.iter().map(|(name, value)| (*name, value)))
            .stdout(Stdio::piped())
            .stderr(err)
            .spawn()
            .expect("the binary under test starts");
        let out = child.stdout.take().expect("piped");
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).expect("its standard output");
        self.child = Some(child);
        let served = serde_json::from_str::<Value>(&line).is_ok_and(|v| v["atp"] == self.atp.to_string());
        if served { Ok(()) } else { Err(line) }
    }

    /// Its process.
    ///
    /// # Panics
    /// When it doesn't run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// True once somebody else has killed it; then it may be started again.
    ///
    /// # Panics
    /// When it has ended in another way.
    pub fn was_killed(&mut self) -> bool {
        let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().expect("a child")) else {
            return false;
        };
        assert_eq!(status.signal(), Some(9), "the router ended by itself: {status}\n{}", self.stderr());
        self.child = None;
        true
    }

    /// Starts it without waiting until it serves: it may have to wait for its turn.
    ///
    /// # Panics
    /// When it doesn't start.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let err = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("stderr"));
        let mut command = atp::command(&["router", "--json", "--config"]);
        command.arg(self.config()).stdout(Stdio::null()).stderr(err.expect("a file"));
        self.child = Some(command.spawn().expect("the binary under test starts"));
    }

    /// Whether it serves; one that doesn't answer doesn't.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        http_at(self.http, "GET", "/readyz", LOOK).is_ok_and(|(status, _)| status == 200)
    }

    /// SIGKILL: nothing of the process runs any more when this returns.
    ///
    /// # Panics
    /// When it had ended by itself.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let ended = child.try_wait().expect("a child");
        assert!(ended.is_none(), "the router ended by itself: {ended:?}\n{}", self.stderr());
        child.kill().expect("a child");
        child.wait().expect("a child");
    }

    /// Waits until the process has ended by itself; its exit code.
    ///
    /// # Panics
    /// When it goes on.
    pub fn ended(&mut self) -> Option<i32> {
        let child = self.child.as_mut().expect("it runs");
        let status = wait_for("the router's end", || child.try_wait().expect("a child"));
        self.child = None;
        status.code()
    }

    /// Sends a signal by its name: STOP, CONT, HUP.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn signal(&self, name: &str) {
        signal(self.child.as_ref(), name);
    }

    /// From the next start on.
    pub fn set_env(&mut self, name: &'static str, value: PathBuf) {
        self.env.push((name, value));
    }

    /// Where its HTTP port is.
    #[must_use]
    pub fn http_addr(&self) -> SocketAddr {
        self.http
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Panics
    /// When it doesn't end well.
    pub fn stop(&mut self) {
        let mut child = self.child.take().expect("it runs");
        signal(Some(&child), "TERM");
        let status = child.wait().expect("a child");
        assert!(status.success(), "{status}\n{}", self.stderr());
    }

    /// What the process wrote to its standard error since the last start.
    #[must_use]
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    #[must_use]
    pub fn atp(&self) -> SocketAddr {
        self.atp
    }

    /// Of its HTTP port, for commands.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.http)
    }

    /// A directory for what belongs to this router's test: scripts, meters.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its log, wherever its configuration puts it.
    #[must_use]
    pub fn log(&self) -> String {
        format!("config:{}", self.config().display())
    }

    /// One HTTP request; status and document.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn http(&self, method: &str, path: &str) -> (u16, Value) {
        http_at(self.http, method, path, super::PATIENCE).expect("the router answers")
    }

    /// Folds the log and compares it with the live state.
    ///
    /// # Panics
    /// When they differ.
    pub fn verify(&self) -> Value {
        let (status, report) = self.http("POST", "/v1/verify");
        assert_eq!((status, &report["ok"]), (200, &Value::Bool(true)), "{report:#}");
        assert_eq!(report["differences"], serde_json::json!([]), "{report:#}");
        report
    }

    /// Waits until no money is held, then verifies.
    ///
    /// # Panics
    /// When money stays held, or the log and the live state differ.
    pub fn settled(&self) -> Value {
        wait_for("every call to be settled", || {
            Some(self.http("POST", "/v1/verify").1).filter(|report| report["open_reservations"] == 0)
        });
        self.verify()
    }

    /// Waits until an agent is connected.
    ///
    /// # Panics
    /// When it isn't in time.
    pub fn has_agent(&self, name: &str) {
        wait_for(&format!("agent {name}"), || {
            let (_, answer) = self.http("GET", "/v1/agents");
            let rows = answer["agents"].as_array()?.clone();
            rows.iter().find(|row| row["name"] == name && row["status"] != "GONE").map(|_| ())
        });
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the router's last words:\n{}", self.stderr());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One HTTP request; status and document.
///
/// # Errors
/// Nobody listens, nothing came for `patience`, or it isn't HTTP.
pub fn http_at(router: SocketAddr, method: &str, path: &str, patience: Duration) -> io::Result<(u16, Value)> {
    let (status, body) = http_text(router, method, path, patience)?;
    Ok((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
}

/// The same with the body as it came.
///
/// # Errors
/// As `http_at`.
pub fn http_text(router: SocketAddr, method: &str, path: &str, patience: Duration) -> io::Result<(u16, String)> {
    Asked::at(router, method, path, patience)?.text()
}

/// An HTTP request that is written, whether or not somebody reads it yet.
pub struct Asked(TcpStream);

impl Asked {
    /// # Errors
    /// Nobody listens.
    pub fn at(router: SocketAddr, method: &str, path: &str, patience: Duration) -> io::Result<Self> {
        let mut io = TcpStream::connect(router)?;
        io.set_read_timeout(Some(patience))?;
        write!(io, "{method} {path} HTTP/1.0\r\nhost: {router}\r\ncontent-length: 0\r\n\r\n")?;
        Ok(Self(io))
    }

    /// Status and body.
    ///
    /// # Errors
    /// Nothing came for `patience`, or it isn't HTTP.
    pub fn text(mut self) -> io::Result<(u16, String)> {
        let mut text = String::new();
        self.0.read_to_string(&mut text)?;
        let parts = text.split_once("\r\n\r\n");
        let status = parts.and_then(|(head, _)| head.split(' ').nth(1)?.parse().ok());
        let (Some((_, body)), Some(status)) = (parts, status) else { return Err(io::ErrorKind::InvalidData.into()) };
        Ok((status, body.to_owned()))
    }
}

/// A port below the range that outgoing connections take theirs from, so that it is still free after a kill, and so that a
/// client which dials a router that is away never meets itself.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 11_000).expect("below 11000");
    for _ in 0..11_000 {
        let port = 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed) % 11_000) % 11_000;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
    panic!("no free port between 20000 and 31000");
}

/// `atp agent scripted` as a child process.
pub struct Scripted {
    child: Option<Child>,
    script: PathBuf,
    meter: PathBuf,
    url: String,
    err: PathBuf,
}

impl Scripted {
    /// Starts an agent that plays `yaml` (without `name` and `meter`) against the address, which may be a relay's.
    ///
    /// # Panics
    /// When it doesn't start.
    #[must_use]
    pub fn start(dir: &Path, name: &str, router: SocketAddr, yaml: &str) -> Self {
        Self::start_at(dir, name, &[router], yaml)
    }

    /// As `start`, with several routers to go to.
    ///
    /// # Panics
    /// As `start`.
    #[must_use]
    pub fn start_at(dir: &Path, name: &str, routers: &[SocketAddr], yaml: &str) -> Self {
        let file = |ending: &str| dir.join(format!("{name}.{ending}"));
        let (script, meter) = (file("yaml"), file("meter.jsonl"));
        let text = format!("name: {name}\nmeter: {}\n{yaml}", meter.display());
        std::fs::write(&script, text).expect("a script");
        let url = routers.iter().map(|router| format!("atp://{router}")).collect::<Vec<_>>().join(",");
        let mut agent = Self { child: None, script, meter, url, err: file("stderr") };
        agent.restart();
        agent
    }

    /// Starts a new process of the same agent.
    ///
    /// # Panics
    /// When it doesn't start.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let err = std::fs::OpenOptions::new().create(true).append(true).open(&self.err).expect("a file");
        let child = atp::command(&["agent", "scripted", "--url", &self.url, "--script"])
            .arg(&self.script)
            .stdout(Stdio::null())
            .stderr(err)
            .spawn()
            .expect("the binary under test starts");
        self.child = Some(child);
    }

    /// SIGKILL.
    ///
    /// # Panics
    /// When it had ended by itself.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        let ended = child.try_wait().expect("a child");
        assert!(ended.is_none(), "the agent ended by itself: {ended:?}\n{}", self.stderr());
        child.kill().expect("a child");
        child.wait().expect("a child");
    }

    /// Sends a signal by its name.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn signal(&self, name: &str) {
        signal(self.child.as_ref(), name);
    }

    /// What its processes wrote to their standard error.
    #[must_use]
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Where its provider's charges stand.
    #[must_use]
    pub fn meter(&self) -> &Path {
        &self.meter
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("an agent's words:\n{}", self.stderr());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn signal(child: Option<&Child>, name: &str) {
    let pid = child.expect("it runs").id().to_string();
    let sent = Command::new("kill").args(["-s", name, &pid]).status().expect("`kill` is there");
    assert!(sent.success(), "{name} reaches {pid}");
}

/// How long a look at a condition on the wire lasts.
pub const LOOK: Duration = Duration::from_millis(500);

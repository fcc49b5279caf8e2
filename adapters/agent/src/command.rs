//! Runs a program in a directory: the task on its stdin, its stdout as the answer, findings recognised in it. Time and
//! output are bounded, and the whole process group dies with the call. It never goes through a shell.

use crate::llm::{ConfigProblem, prompt};
use atp_canonicalizer::{Format, Recognised, recognise};
use atp_proto::content::{
    AgentError, AgentFinal, Capabilities, Effects, EstimateDeclaration, EstimateFigures, EstimateMode, Finish,
    ModelInfo, Proof, Stop, UsageSource,
};
use atp_proto::{Amount, Code, Cost, UsdMicros};
use atp_sdk::{BoxFuture, Call, Handler, Meter, Outcome, StopReason, Verdict};
use rustix::process::{Pid, Signal, kill_process_group};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command as Process};
use tokio::time::{Instant, sleep_until, timeout};

/// Bytes of stdout that are kept where the configuration names none.
pub const OUTPUT_BYTES: usize = 1024 * 1024;
/// The most that may be kept.
pub const OUTPUT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Bytes of stderr's end that a failure shows.
const STDERR_BYTES: usize = 4 * 1024;
/// From SIGTERM to SIGKILL; a call has 5 s to end in all.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long stdout may stay open behind the end of the program, held by a child that it left.
const PIPE_GRACE: Duration = Duration::from_secs(1);

/// What the `command` adapter is made of.
#[derive(Clone, Debug)]
pub struct CommandConfig {
    /// The program and its arguments.
    pub argv: Vec<String>,
    pub cwd: PathBuf,
    /// Longest run; the call's own deadline counts as well.
    pub timeout: Duration,
    /// 1 to `OUTPUT_BYTES_MAX`.
    pub output_bytes_max: usize,
    /// `External` unless the operator knows that the program only answers: its unknown outcome is then tried again.
    pub effects: Effects,
    /// What one run costs, whatever it does.
    pub usd_micros_per_run: u64,
}

impl CommandConfig {
    #[must_use]
    pub fn new(argv: Vec<String>, cwd: impl Into<PathBuf>) -> Self {
        Self {
            argv,
            cwd: cwd.into(),
            timeout: Duration::from_secs(600),
            output_bytes_max: OUTPUT_BYTES,
            effects: Effects::External,
            usd_micros_per_run: 0,
        }
    }
}

/// The handler of one program.
#[derive(Debug)]
pub struct Command {
    config: CommandConfig,
    program: String,
    cost: Cost,
}

/// # Errors
/// Names the setting that can't be used.
pub fn handler(config: CommandConfig) -> Result<Command, ConfigProblem> {
    let problem = |field, problem: String| Err(ConfigProblem { field, problem });
    let Some(program) = config.argv.first().filter(|program| !program.is_empty()).cloned() else {
        return problem("argv", "is empty; give the program and its arguments, like [cargo, clippy]".to_owned());
    };
    if let Some(n) = config.argv.iter().position(|arg| arg.contains('\0')) {
        return problem("argv", format!("argument {n} has a zero byte, which no program can be given"));
    }
    if !config.cwd.is_dir() {
        return problem("cwd", format!("`{}` is no directory; give one that exists", config.cwd.display()));
    }
    if config.timeout.is_zero() {
        return problem("timeout", "is 0; allow the program some time, like 5m".to_owned());
    }
    if !(1..=OUTPUT_BYTES_MAX).contains(&config.output_bytes_max) {
        return problem("output_bytes_max", format!("{} is not in 1 to {OUTPUT_BYTES_MAX}", config.output_bytes_max));
    }
    let cost = Cost { usd_micros: UsdMicros(config.usd_micros_per_run), ..Cost::default() };
    Ok(Command { config, program, cost })
}

impl Command {
    /// States what the money path needs to know of this adapter; name, host, skills and parallelism are the caller's.
    pub fn describe(&self, capabilities: &mut Capabilities) {
        let run = Amount { usd_micros: self.cost.usd_micros, ..Amount::ZERO };
        let id = self.program.rsplit('/').next().unwrap_or(&self.program).to_owned();
        capabilities.adapter = "command".to_owned();
        // A declared price of zero: a program has no tokens, and an unknown price would be the dearest known.
        capabilities.models = vec![ModelInfo {
            id,
            in_usd_micros_per_mtok: Some(0),
            out_usd_micros_per_mtok: Some(0),
            context_tokens: None,
        }];
        capabilities.stop = Stop::Kill;
        capabilities.effects = self.config.effects;
        capabilities.reach = Amount::ZERO;
        capabilities.worst_case = Some(run);
        capabilities.estimate = Some(EstimateDeclaration {
            mode: EstimateMode::Declared,
            figures: EstimateFigures { usd_micros: Some(self.cost.usd_micros), ..EstimateFigures::default() },
        });
    }

    async fn run(&self, call: Call) -> Outcome {
        let Call { dispatch, meter } = call;
        if !meter.fits(self.cost) {
            let message =
                format!("grant: {} micro-USD don't cover one run; raise the budget", meter.grant().usd_micros);
            return self.not_called(Code::Budget, message);
        }
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(error) => {
                return self.not_called(Code::AgentDown, format!("argv: `{}` can't be started: {error}", self.program));
            }
        };
        let mut group = Group::of(&child);
        let mut stdin = child.stdin.take();
        let input = prompt(&dispatch).user;
        // A program needn't read its input; a closed pipe is no failure.
        let feed = async {
            if let Some(mut stdin) = stdin.take() {
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            std::future::pending::<StopReason>().await
        };
        let mut stderr = Tail::default();
        let mut output = Output { bytes_max: self.config.output_bytes_max, ..Output::default() };
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let (stop, ()) = tokio::join!(output.read(out, &meter, self.cost), stderr.read(err));
            stop
        };
        let until = Instant::now() + self.config.timeout;
        let stop = tokio::select! {
            biased;
            reason = meter.stopped() => Some(reason),
            () = sleep_until(until) => Some(StopReason::Deadline),
            ended = ended(&mut child, work) => ended,
            reason = feed => Some(reason),
        };
        if let Some(reason) = stop {
            group.end(&mut child).await;
            return self.stopped(reason, output);
        }
        let status = child.wait().await;
        group.kill();
        match status {
            Ok(status) => self.conclude(status, output, &stderr),
            Err(error) => self.failed(Code::AgentDown, format!("`{}` can't be waited for: {error}", self.program)),
        }
    }

    fn spawn(&self) -> std::io::Result<Child> {
        Process::new(&self.program)
            .args(&self.config.argv[1..])
            .current_dir(&self.config.cwd)
            // The agent's credential for the router is no business of the program's.
            .env_remove("ATP_TOKEN")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    fn conclude(&self, status: ExitStatus, output: Output, stderr: &Tail) -> Outcome {
        let found = output.findings();
        let has_findings = found.as_ref().is_some_and(|found| !found.findings.is_empty());
        // Linters and test runners end with an error because they found something: that is their answer.
        if !status.success() && !has_findings {
            let said = stderr.text();
            let said = if said.trim().is_empty() { output.end() } else { said };
            return self.failed(
                Code::AgentDown,
                format!("`{}` ended with {status}: {}", self.config.argv.join(" "), said.trim()),
            );
        }
        Outcome::Final(AgentFinal {
            text: output.rest(found.as_ref(), &self.program),
            findings: found.filter(|_| has_findings).map(|found| found.values()),
            cost: self.cost,
            usage_source: UsageSource::Reported,
            finish: Finish::Complete,
            confidence_ppm: None,
        })
    }

    fn stopped(&self, reason: StopReason, output: Output) -> Outcome {
        let finish = match reason {
            StopReason::Cancelled => Finish::Cancelled,
            StopReason::Grant => Finish::Grant,
            StopReason::Deadline => {
                return self.failed(Code::Timeout, format!("`{}` was killed: it ran longer than it may", self.program));
            }
            StopReason::Backlog => {
                return self.failed(
                    Code::Limit,
                    format!("`{}` was killed: the router takes its output too slowly", self.program),
                );
            }
        };
        let text = output.rest(None, &self.program);
        Outcome::Final(AgentFinal { text, cost: self.cost, finish, ..AgentFinal::default() })
    }

    /// It ran, so it costs what a run costs.
    fn failed(&self, code: Code, message: String) -> Outcome {
        Outcome::Error(AgentError { code, message, retry_after_ms: None, cost: Some(self.cost), proof: None })
    }

    fn not_called(&self, code: Code, message: String) -> Outcome {
        Outcome::Error(AgentError { code, message, retry_after_ms: None, cost: None, proof: Some(Proof::NotCalled) })
    }
}

impl Handler for Command {
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
        Box::pin(self.run(call))
    }
}

/// Waits until the program has ended and its output is read. A child that it left may hold the pipes open for ever: then
/// what came is all there is.
async fn ended(child: &mut Child, work: impl Future<Output = Option<StopReason>>) -> Option<StopReason> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        stop = &mut work => if stop.is_some() { return stop },
        _ = child.wait() => return timeout(PIPE_GRACE, work).await.unwrap_or(None),
    }
    // It closed its output and goes on.
    let _ = child.wait().await;
    None
}

/// The program's process group: killed when the call's future is dropped, so that nothing outlives its call.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw))
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            // The group may be gone already: that is what is wanted.
            let _ = kill_process_group(group, signal);
        }
    }

    /// Asks, waits a little, then makes sure.
    async fn end(&mut self, child: &mut Child) {
        self.signal(Signal::TERM);
        let _ = timeout(TERM_GRACE, child.wait()).await;
        self.kill();
        let _ = child.wait().await;
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// stdout: kept up to its bound, sent on as it comes unless it looks like a document.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    bytes_max: usize,
    /// Bytes that were sent as partials.
    sent: usize,
    dropped: u64,
    /// It began like JSON: a reader wants its findings, not its text.
    is_document: Option<bool>,
}

impl Output {
    async fn read(&mut self, from: Option<impl AsyncRead + Unpin>, meter: &Meter, cost: Cost) -> Option<StopReason> {
        let mut from = from?;
        let mut piece = vec![0; 16 * 1024];
        loop {
            let n = match from.read(&mut piece).await {
                Ok(0) | Err(_) => return None,
                Ok(n) => n,
            };
            // What is over the bound is read and dropped: a full pipe would hang the program.
            let kept = n.min(self.bytes_max - self.bytes.len());
            self.bytes.extend_from_slice(&piece[..kept]);
            self.dropped += (n - kept) as u64;
            if self.is_document.is_none() {
                let first = self.bytes.iter().find(|byte| !byte.is_ascii_whitespace());
                self.is_document = first.map(|byte| matches!(byte, b'{' | b'['));
            }
            if self.is_document == Some(false) {
                meter.room().await;
                if let Some(text) = self.whole_characters()
                    && let Verdict::Stop(reason) = meter.emit(Some(&text), None, cost)
                {
                    return Some(reason);
                }
            }
        }
    }

    /// What is unsent, up to the last character that is whole.
    fn whole_characters(&mut self) -> Option<String> {
        let unsent = &self.bytes[self.sent..];
        let whole = match std::str::from_utf8(unsent) {
            Ok(_) => unsent.len(),
            // Without an error length the end is only cut off; with one it will never be UTF-8.
            Err(error) => error.error_len().map_or(error.valid_up_to(), |_| unsent.len()),
        };
        let text = String::from_utf8_lossy(&unsent[..whole]).into_owned();
        self.sent += whole;
        (!text.is_empty()).then_some(text)
    }

    fn findings(&self) -> Option<Recognised> {
        recognise(&String::from_utf8_lossy(&self.bytes))
    }

    /// What the final still has to say: text that wasn't sent, or a line about the document in its place.
    fn rest(&self, found: Option<&Recognised>, program: &str) -> Option<String> {
        let mut rest = match found {
            Some(found) if self.is_document == Some(true) => summary(found, program),
            _ => String::from_utf8_lossy(&self.bytes[self.sent..]).into_owned(),
        };
        if self.dropped > 0 {
            let before = if rest.is_empty() { self.bytes.last().copied() } else { rest.bytes().last() };
            let newline = if before.is_none_or(|byte| byte == b'\n') { "" } else { "\n" };
            let (kept, dropped) = (self.bytes.len(), self.dropped);
            rest = format!("{rest}{newline}[output cut: {kept} bytes kept, {dropped} more were dropped]\n");
        }
        (!rest.is_empty()).then_some(rest)
    }

    fn end(&self) -> String {
        String::from_utf8_lossy(&self.bytes[self.bytes.len().saturating_sub(STDERR_BYTES)..]).into_owned()
    }
}

fn summary(found: &Recognised, program: &str) -> String {
    let form = match found.format {
        Format::Json => "JSON findings",
        Format::Sarif => "SARIF",
        Format::CargoMessages => "Cargo messages",
        Format::CargoTest => "test output",
    };
    let mut text = format!("{} findings in the {form} of {program}\n", found.findings.len());
    if found.left_out > 0 {
        text.push_str(&format!("{} more findings were left out\n", found.left_out));
    }
    for refused in &found.refused {
        text.push_str(&format!("not taken: {refused}\n"));
    }
    text
}

/// The last bytes of stderr.
#[derive(Default)]
struct Tail {
    bytes: Vec<u8>,
    cut: bool,
}

impl Tail {
    async fn read(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut piece = vec![0; 4096];
        while let Ok(n @ 1..) = from.read(&mut piece).await {
            self.bytes.extend_from_slice(&piece[..n]);
            if self.bytes.len() > STDERR_BYTES {
                self.cut = true;
                self.bytes.drain(..self.bytes.len() - STDERR_BYTES);
            }
        }
    }

    fn text(&self) -> String {
        let dots = if self.cut { "..." } else { "" };
        format!("{dots}{}", String::from_utf8_lossy(&self.bytes))
    }
}

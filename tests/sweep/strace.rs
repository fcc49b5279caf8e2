//! `strace` as the killer: it counts the calls of a process that others can see, and kills it before the n-th of one of them.
//! A count is kept for each thread; the router runs with one worker, so each call is made by one thread or two.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Calls that write, sync, rename, send or remove: between them nothing can be seen of a process that dies.
pub(crate) const CALLS: [&str; 14] = [
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "fdatasync",
    "fsync",
    "ftruncate",
    "rename",
    "renameat2",
    "unlink",
    "unlinkat",
    "sendto",
    "sendmsg",
    "shutdown",
];

/// One worker, so that who comes first at a call is who makes it.
pub(crate) const ALONE: [&str; 2] = ["env", "TOKIO_WORKER_THREADS=1"];

/// Says what is missing.
pub(crate) fn is_there() -> Result<(), String> {
    let traced = Command::new("strace").args(["-f", "-o", "/dev/null", "true"]).output();
    match traced {
        Err(e) => Err(format!("`strace` doesn't start ({e}); install it (Debian, Ubuntu: apt install strace)")),
        Ok(output) if !output.status.success() => {
            Err(format!("`strace` may not trace here: {}", String::from_utf8_lossy(&output.stderr)))
        }
        Ok(_) => Ok(()),
    }
}

/// What has strace kill at the n-th call. Before a lost write the log is slow: what leaves too early then leaves for sure.
fn kill_at(call: &str, n: u64) -> Vec<String> {
    let mut flags = vec!["-e".into(), format!("trace={call},fdatasync")];
    flags.extend(["-e".into(), format!("inject={call}:signal=KILL:when={n}")]);
    if call == "pwrite64" {
        flags.extend(["-e".into(), "inject=fdatasync:delay_exit=3000".into()]);
    }
    flags
}

/// A command before the router's own that has it killed at a call from its start on.
pub(crate) fn wrapper(call: &str, n: u64) -> Vec<String> {
    let strace = ["strace", "-f", "-D", "-qq", "-o", "/dev/null"].map(str::to_owned);
    ALONE.map(str::to_owned).into_iter().chain(strace).chain(kill_at(call, n)).collect()
}

/// A command before the router's own that writes its calls into a file.
pub(crate) fn counter(file: &Path) -> Vec<String> {
    let strace = ["strace", "-f", "-D", "-qq", "-o"].map(str::to_owned);
    let what = [file.display().to_string(), "-e".into(), format!("trace={}", CALLS.join(","))];
    ALONE.map(str::to_owned).into_iter().chain(strace).chain(what).collect()
}

/// A tracer at work on a running process; it ends with it, or here.
pub(crate) struct Attached(Child);

impl Attached {
    /// Kills the process at the n-th call from now on.
    pub(crate) fn killing(pid: u32, call: &str, n: u64) -> Self {
        let flags = kill_at(call, n);
        let flags: Vec<&str> = ["-o", "/dev/null"].into_iter().chain(flags.iter().map(String::as_str)).collect();
        Self::to(pid, &flags)
    }

    /// Writes the process's calls into a file.
    pub(crate) fn counting(pid: u32, file: &Path) -> Self {
        let (file, set) = (file.display().to_string(), format!("trace={}", CALLS.join(",")));
        Self::to(pid, &["-o", &file, "-e", &set])
    }

    fn to(pid: u32, args: &[&str]) -> Self {
        let mut child = Command::new("strace")
            .args(["-f", "-p", &pid.to_string()])
            .args(args)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("`strace` was there just now");
        let mut said = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        said.read_line(&mut line).expect("its standard error");
        assert!(line.contains("attached"), "strace can't attach: {line}");
        // What else it says is read, so that it never waits for a reader.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        Self(child)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// True once a process is dead. Its tracer may still wait for one of its threads, and would for ever.
pub(crate) fn is_dead(pid: u32) -> bool {
    status(pid, "State:").is_none_or(|state| state.starts_with('Z'))
}

/// Ends whatever still traces a process: a dead one can then be waited for, a live one goes on in peace.
pub(crate) fn let_go(pid: u32) {
    while let Some(tracer) = status(pid, "TracerPid:").filter(|tracer| tracer != "0") {
        // strace holds other signals back.
        let _ = Command::new("kill").args(["-KILL", &tracer]).stderr(Stdio::null()).status();
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn status(pid: u32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned())
}

/// Of each call the most that one thread made of it.
pub(crate) fn counts(file: &Path) -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let mut threads: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(thread), Some(rest)) = (words.next(), words.next()) else { continue };
        if let Some((call, _)) = rest.split_once('(') {
            *threads.entry((thread, call)).or_default() += 1;
        }
    }
    let mut most: BTreeMap<String, u64> = BTreeMap::new();
    for ((_, call), n) in threads {
        let count = most.entry(call.into()).or_default();
        *count = n.max(*count);
    }
    most
}

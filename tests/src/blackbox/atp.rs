//! Where the binary under test is: built once per test process by the cargo that runs the tests, same profile, same target
//! directory. Never uses a binary that it didn't build.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// The `atp` binary.
///
/// # Panics
/// When it can't be built.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(build)
}

fn build() -> PathBuf {
    // target/[TRIPLE/]PROFILE/deps/TEST, or a binary of the tests beside `deps`
    let test = std::env::current_exe().expect("a test has a path");
    let mut profile = test.parent().expect("tests lie in target/PROFILE/deps");
    if profile.ends_with("deps") {
        profile = profile.parent().expect("tests lie in target/PROFILE/deps");
    }
    let target = profile.parent().expect("tests lie in target/PROFILE/deps");
    let name = match profile.file_name().and_then(|n| n.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // What the outer cargo says of this package would have build scripts run again, here and in the next outer cargo.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    let output = command
        .args(["build", "--package", "atp", "--message-format", "json-render-diagnostics", "--profile", name])
        .arg("--target-dir")
        .arg(target)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "the binary under test can't be built: cargo build -p atp failed");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut built = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).filter_map(|message| {
        let is_atp = message["reason"] == "compiler-artifact" && message["target"]["name"] == "atp";
        message["executable"].as_str().filter(|_| is_atp).map(PathBuf::from)
    });
    built.next_back().expect("cargo names the executable of package atp")
}

/// Runs a command of the binary to its end.
///
/// # Panics
/// When it can't be started.
pub fn run(args: &[&str]) -> Output {
    command(args).output().expect("the binary under test starts")
}

/// Runs a command with `--json` and reads its one document.
///
/// # Panics
/// When it fails or says anything else.
pub fn run_json(args: &[&str]) -> Value {
    let output = command(args).arg("--json").output().expect("the binary under test starts");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "atp {args:?}: {}\n{out}{err}", output.status);
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("atp {args:?} says no JSON document: {e}\n{out}"))
}

/// The binary, without what the caller's environment would tell it.
#[must_use]
pub fn command(args: &[&str]) -> Command {
    command_under(&[], args)
}

/// The same by a command that runs the command line behind it: `env`, `strace`, ...
#[must_use]
pub fn command_under(wrapper: &[&str], args: &[&str]) -> Command {
    let mut command = match wrapper.split_first() {
        None => Command::new(path()),
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(path());
            command
        }
    };
    command.args(args).stdin(Stdio::null());
    for name in ["ATP_URL", "ATP_TOKEN", "ATP_CONFIG", "RUST_LOG"] {
        command.env_remove(name);
    }
    command
}

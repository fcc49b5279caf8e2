//! `chart`: renders the Helm chart with the real `helm`, with its defaults and every file of `ops/helm/atp/ci`, and checks what a
//! cluster would only find out later: names that lead somewhere, files and variables that the configuration refers to, a
//! configuration that `atp check` takes. `--compose` has Compose's own library read `ops/compose.yaml` too.

mod rendered;

use atp_tests::blackbox::atp;
use clap::Parser;
use rendered::Rendered;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};

/// Check the Helm chart
#[derive(Parser)]
struct Args {
    /// The `helm` to render with
    #[arg(long)]
    helm: PathBuf,
    /// A program that reads a compose file and fails on a bad one
    #[arg(long)]
    compose: Option<PathBuf>,
}

const RELEASE: &str = "prod";
const NAMESPACE: &str = "agents";
/// The oldest that the chart is for.
const KUBERNETES: &str = "1.29.0";

/// Values that must be refused, and what the refusal names.
const REFUSED: [(&str, &str); 5] = [
    ("replicaCount: 3", "replicaCount"),
    ("replicaCounts: 3", "replicaCounts"),
    ("config: \"listen: {atp: 127.0.0.1:1}\"", "listen is written by the chart"),
    ("config: \"log: [\"", "config"),
    ("{secret: {A: b}, secretEnv: {A: {secret: s, key: k}}}", "secretEnv: A"),
];

fn main() -> ExitCode {
    let args = Args::parse();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let chart = root.join("ops/helm/atp");
    let mut complaints = Vec::new();
    let mut files: Vec<Option<PathBuf>> = vec![None];
    let listed = std::fs::read_dir(chart.join("ci")).expect("ops/helm/atp/ci");
    files.extend(listed.map(|entry| Some(entry.expect("an entry").path())));
    files.sort();
    for values in &files {
        let name = values.as_ref().and_then(|v| v.file_name()).map_or("the defaults".into(), |n| n.to_string_lossy());
        let found = of_values(&args.helm, &chart, values.as_deref());
        println!("{name}: {}", if found.is_empty() { "good" } else { "BAD" });
        complaints.extend(found.into_iter().map(|what| format!("{name}: {what}")));
    }
    for (values, names) in REFUSED {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), values).expect("a file");
        let output = helm(&args.helm, &["template", RELEASE], &chart, Some(file.path()));
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() || !said.contains(names) {
            complaints.push(format!("`{values}` isn't refused by name of {names}: {said}"));
        }
    }
    if let Some(compose) = args.compose {
        let output =
            Command::new(compose).arg("compose.yaml").current_dir(root.join("ops")).output().expect("it starts");
        if !output.status.success() {
            complaints.push(format!("compose.yaml: {}", String::from_utf8_lossy(&output.stderr)));
        }
        println!("compose.yaml: read");
    }
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn helm(helm: &Path, command: &[&str], chart: &Path, values: Option<&Path>) -> Output {
    let mut run = Command::new(helm);
    run.args(command).arg(chart).args(["--namespace", NAMESPACE, "--kube-version", KUBERNETES]);
    // Nothing of who runs this.
    run.env_clear().env("HOME", "/nonexistent");
    if let Some(values) = values {
        run.arg("--values").arg(values);
    }
    run.output().expect("helm starts")
}

/// What is wrong with the chart under these values.
fn of_values(program: &Path, chart: &Path, values: Option<&Path>) -> Vec<String> {
    let linted = helm(program, &["lint", "--strict"], chart, values);
    if !linted.status.success() {
        return vec![String::from_utf8_lossy(&linted.stdout).into_owned()];
    }
    let output = helm(program, &["template", RELEASE], chart, values);
    if !output.status.success() {
        return vec![String::from_utf8_lossy(&output.stderr).into_owned()];
    }
    let rendered = match Rendered::read(&String::from_utf8_lossy(&output.stdout)) {
        Ok(rendered) => rendered,
        Err(what) => return vec![what],
    };
    let mut complaints = rendered.names();
    complaints.extend(rendered.pods());
    complaints.extend(rendered.doors());
    complaints.extend(checked(&rendered));
    complaints
}

/// What `atp check` says of the rendered configuration, in the environment and with the files of the router's container.
fn checked(rendered: &Rendered) -> Vec<String> {
    let dir = tempfile::tempdir().expect("a directory");
    let mut text = rendered.config().to_owned();
    for (at, names) in rendered.secret_directories() {
        let here = dir.path().join(at.trim_start_matches('/'));
        std::fs::create_dir_all(&here).expect("a directory");
        names.iter().for_each(|name| std::fs::write(here.join(name), "").expect("a file"));
        text = text.replace(&format!("{at}/"), &format!("{}/", here.display()));
    }
    let file = dir.path().join("atp.yaml");
    std::fs::write(&file, text).expect("a file");
    let mut command = atp::command(&["check", "--json"]);
    let output = command.arg(&file).envs(rendered.environment()).output().expect("atp starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let Some(problems) = report["problems"].as_array() else {
        return vec![format!("atp check: {}", String::from_utf8_lossy(&output.stderr))];
    };
    // The image has it; who tests may have built without.
    let without = |p: &serde_json::Value| p["message"] == "this build has neither TLS nor SCRAM to Kafka";
    problems.iter().filter(|p| !without(p)).map(|p| format!("atp check: {p}")).collect()
}

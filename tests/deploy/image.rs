//! `ops/docker`: the image is built from what is here, with the versions of `.env`, and doesn't run as root.

use crate::{assert_none, env_file, read, root};

#[test]
fn the_image_is_built_from_this_checkout() {
    let text = read("ops/docker/Dockerfile").replace("\\\n", " ");
    let versions = read("ops/.env");
    let mut complaints = Vec::new();
    for line in text.lines() {
        if let Some((name, value)) = line.strip_prefix("ARG ").and_then(|a| a.split_once('='))
            && env_file(&versions).get(name) != Some(&value)
        {
            complaints.push(format!("ARG {name}={value}: ops/.env says otherwise"));
        }
        let sources = line.strip_prefix("COPY ").filter(|l| !l.contains("--from=")).unwrap_or_default();
        let words: Vec<&str> = sources.split_whitespace().filter(|w| !w.starts_with("--")).collect();
        for source in words.iter().take(words.len().saturating_sub(1)) {
            if !root().join(source).exists() {
                complaints.push(format!("COPY {source}: doesn't exist"));
            }
        }
        if line.contains("cargo build") && !line.contains("--locked") {
            complaints.push("cargo build without --locked".into());
        }
    }
    let user = text.lines().filter_map(|l| l.strip_prefix("USER ")).next_back().unwrap_or("root");
    if user.starts_with("root") || user.starts_with('0') {
        complaints.push(format!("runs as {user}"));
    }
    // What the build reads isn't left out of its context.
    for left_out in read("ops/docker/Dockerfile.dockerignore").lines().filter(|l| !l.starts_with('#')) {
        if root().join(left_out).join("Cargo.toml").exists() {
            complaints.push(format!(".dockerignore leaves out {left_out}, a package of the workspace"));
        }
    }
    assert_none("ops/docker/Dockerfile", &complaints);
    let (name, minimum) = (env_file(&versions)["RUST_VERSION"], read("Cargo.toml"));
    let minimum =
        minimum.lines().find_map(|l| l.strip_prefix("rust-version = ")).expect("rust-version").trim_matches('"');
    let number = |v: &str| v.split('.').map(|n| n.parse::<u32>().expect("a number")).collect::<Vec<_>>();
    assert!(number(name) >= number(minimum), "RUST_VERSION={name} is older than {minimum}");
}

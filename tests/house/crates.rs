//! Rules on packages: arrows between ours, what pure ones may reach, licences, sources, one major of the big ones.

use crate::{assert_none, licence, metadata};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// All direct dependencies between our packages. Another one fails; each needs a line in ARCHITECTURE.md first.
const ARROWS: [(&str, &[&str]); 9] = [
    ("atp-proto", &[]),
    ("atp-canonicalizer", &[]),
    ("atp-core", &["atp-proto", "atp-canonicalizer"]),
    ("atp-router", &["atp-proto", "atp-core", "atp-canonicalizer"]),
    ("atp-sdk", &["atp-proto"]),
    ("atp-agent", &["atp-proto", "atp-sdk", "atp-canonicalizer"]),
    ("atp-bench", &["atp-proto", "atp-core", "atp-sdk"]),
    ("atp", &["atp-proto", "atp-core", "atp-router", "atp-sdk", "atp-agent", "atp-canonicalizer", "atp-bench"]),
    (
        "atp-tests",
        &["atp-proto", "atp-core", "atp-router", "atp-sdk", "atp-agent", "atp-canonicalizer", "atp-bench", "atp"],
    ),
];

/// Packages without clock, socket, random source, thread or I/O.
const PURE: [&str; 3] = ["atp-proto", "atp-canonicalizer", "atp-core"];

/// What a pure package can't reach, however far.
const IMPURE: [&str; 12] = [
    "tokio",
    "tokio-util",
    "mio",
    "socket2",
    "hyper",
    "reqwest",
    "axum",
    "rand",
    "getrandom",
    "uuid",
    "rayon",
    "chrono",
];

/// One major version of each of these, or types of one don't fit the other.
const SINGLE: [&str; 14] = [
    "axum",
    "bytes",
    "clap",
    "futures-util",
    "http",
    "hyper",
    "metrics",
    "prost",
    "reqwest",
    "rustls",
    "serde",
    "serde_json",
    "tokio",
    "tracing",
];

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

#[test]
fn arrows_between_packages_are_the_listed_ones() {
    let metadata = metadata();
    let ours: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let mut complaints = Vec::new();
    let mut seen = BTreeSet::new();
    for package in list(&metadata["packages"]).iter().filter(|p| p["source"].is_null()) {
        let name = text(package, "name");
        seen.insert(name);
        let Some(allowed) = ours.get(name) else {
            complaints.push(format!("{name}: a package that ARROWS doesn't know"));
            continue;
        };
        // Development dependencies are for tests only and never reach the binary.
        for dependency in list(&package["dependencies"]).iter().filter(|d| d["kind"].is_null()) {
            let to = text(dependency, "name");
            if ours.contains_key(to) && !allowed.contains(&to) {
                complaints.push(format!("{name} -> {to}: forbidden"));
            }
        }
    }
    complaints.extend(ours.keys().filter(|n| !seen.contains(*n)).map(|n| format!("{n}: isn't in the workspace")));
    assert_none("dependency arrows", &complaints);
}

#[test]
fn nothing_depends_on_the_tests() {
    let metadata = metadata();
    let complaints: Vec<String> = list(&metadata["packages"])
        .iter()
        .filter(|p| list(&p["dependencies"]).iter().any(|d| text(d, "name") == "atp-tests"))
        .map(|p| format!("{} depends on atp-tests", text(p, "name")))
        .collect();
    assert_none("tests are at the end of every arrow", &complaints);
}

#[test]
fn pure_packages_reach_nothing_impure() {
    let metadata = metadata();
    let names: BTreeMap<&str, &str> =
        list(&metadata["packages"]).iter().map(|p| (text(p, "id"), text(p, "name"))).collect();
    let nodes: BTreeMap<&str, &Value> =
        list(&metadata["resolve"]["nodes"]).iter().map(|n| (text(n, "id"), n)).collect();
    let mut complaints = Vec::new();
    for pure in PURE {
        let start = names.iter().find(|(_, name)| **name == pure).map(|(id, _)| *id).unwrap();
        let (mut open, mut seen) = (vec![start], BTreeSet::from([start]));
        while let Some(id) = open.pop() {
            for dependency in list(&nodes[id]["deps"]) {
                let normal = list(&dependency["dep_kinds"]).iter().any(|k| k["kind"].is_null());
                let to = text(dependency, "pkg");
                if normal && seen.insert(to) {
                    open.push(to);
                }
            }
        }
        let reached = seen.iter().map(|id| names[id]).filter(|name| IMPURE.contains(name));
        complaints.extend(reached.map(|name| format!("{pure} reaches {name}")));
    }
    assert_none("pure packages", &complaints);
}

#[test]
fn licences_and_sources_are_listed() {
    let metadata = metadata();
    // Only what is resolved for this platform is linked.
    let linked: BTreeSet<&str> = list(&metadata["resolve"]["nodes"]).iter().map(|n| text(n, "id")).collect();
    let mut complaints = Vec::new();
    for package in list(&metadata["packages"]).iter().filter(|p| linked.contains(text(p, "id"))) {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        if !licence::is_allowed(licence) {
            complaints.push(format!("{name} {}: licence `{licence}`", text(package, "version")));
        }
        match package["source"].as_str() {
            None | Some(CRATES_IO) => {}
            Some(source) => complaints.push(format!("{name}: comes from {source}")),
        }
    }
    assert_none("licences and sources", &complaints);
}

#[test]
fn big_crates_have_one_major() {
    let metadata = metadata();
    let linked: BTreeSet<&str> = list(&metadata["resolve"]["nodes"]).iter().map(|n| text(n, "id")).collect();
    let mut majors: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for package in list(&metadata["packages"]).iter().filter(|p| linked.contains(text(p, "id"))) {
        let (name, version) = (text(package, "name"), text(package, "version"));
        if SINGLE.contains(&name) {
            // Below 1.0 the minor is what a major is later.
            let parts: Vec<&str> = version.split('.').collect();
            let major = if parts[0] == "0" { format!("0.{}", parts[1]) } else { parts[0].to_owned() };
            majors.entry(name).or_default().insert(major);
        }
    }
    let complaints: Vec<String> =
        majors.iter().filter(|(_, m)| m.len() > 1).map(|(name, m)| format!("{name}: {m:?}")).collect();
    assert_none("one major each", &complaints);
}

//! Logs that earlier versions wrote, each read again, to the same figures, and written on.

use crate::pack::{pack, unpack};
use crate::play::{PLAYS, Play};
use crate::stranger;
use atp_proto::AgentName;
use atp_proto::content::Submit;
use atp_tests::blackbox::atp;
use atp_tests::blackbox::history::records;
use atp_tests::blackbox::load::follow;
use atp_tests::blackbox::process::{Router, Scripted};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The format of blocks that this version writes.
const FORMAT: &str = "2";

pub(crate) fn home() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/log-corpus"))
}

/// A file's bytes without the zeros at its end.
pub(crate) fn used(path: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    bytes
}

fn paths(dir: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// What a log says of itself, by the commands that anybody would ask.
fn figures(dir: &Path) -> Value {
    let log = format!("local:{}", dir.display());
    let state = atp::run_json(&["replay", "--log", &log, "--state"]);
    let verify = atp::run_json(&["verify", "--log", &log]);
    assert_eq!((&verify["ok"], &verify["state_hash"]), (&json!(true), &state["state_hash"]), "{verify:#}");
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    for record in records(&log) {
        *kinds.entry(record["kind"].as_str().unwrap().into()).or_default() += 1;
    }
    json!({"state": state, "open_reservations": verify["open_reservations"], "kinds": kinds})
}

/// Adds what isn't there yet.
fn write(name: &str, play: Play) {
    let target = home().join(FORMAT).join(name);
    if target.exists() {
        return;
    }
    let router = play();
    let log = router.dir().join("data/log");
    let part = target.with_extension("part");
    std::fs::create_dir_all(&part).unwrap();
    for path in paths(&log).iter().filter(|p| p.extension().is_some_and(|e| e == "log")) {
        let bytes = used(path);
        if !bytes.is_empty() {
            let file = part.join(path.file_name().unwrap()).with_extension("log.packed");
            std::fs::write(file, pack(&bytes)).unwrap();
        }
    }
    let mut text = serde_json::to_string_pretty(&figures(&log)).unwrap();
    text.push('\n');
    std::fs::write(part.join("expected.json"), text).unwrap();
    std::fs::rename(part, target).unwrap();
}

/// Lays a log of the corpus into a directory.
pub(crate) fn lay(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for path in paths(from).iter().filter(|p| p.extension().is_some_and(|e| e == "packed")) {
        let bytes = unpack(&std::fs::read(path).unwrap());
        std::fs::write(to.join(path.file_stem().unwrap()), bytes).unwrap();
    }
}

/// The state of each shard of a log, up to these positions or to its end: position and hash.
fn states(log: &str, until: Option<&[(u64, Value)]>) -> Vec<(u64, Value)> {
    let shards = atp::run_json(&["verify", "--log", log])["shards"].as_u64().unwrap();
    let state = |shard: usize| {
        let upto = until.map(|until| until[shard].0.to_string());
        let mut args = vec!["replay", "--log", log, "--state", "--shard"];
        let number = shard.to_string();
        args.push(&number);
        args.extend(upto.iter().flat_map(|upto| ["--until", upto]));
        let state = atp::run_json(&args);
        (state["position"].as_u64().unwrap(), state["state_hash"].clone())
    };
    (0..usize::try_from(shards).unwrap()).map(state).collect()
}

/// Another owner goes on with it: what stood there stands, and a new task is done.
fn goes_on(from: &Path, expected: &Value) {
    let mut router = Router::prepare("accounts: {default: {usd: 1000, per: total}}\n");
    lay(from, &router.dir().join("data/log"));
    let before = states(&router.log(), None);
    router.restart();
    let script = "calls: [{final: {text: \"end\", in_tokens: 1, out_tokens: 1}}]\n";
    let _agent = Scripted::start(router.dir(), "newcomer", router.atp(), script);
    let task = Submit { task: "one more".into(), agents: vec![AgentName::new("newcomer")], ..Submit::default() };
    let told = follow(router.atp(), "one-more", &task);
    assert_eq!(told.answer().error, None);
    let report = router.verify();
    let position = &expected["state"]["position"];
    assert!(report["position"].as_u64() > position.as_u64(), "{report}");
    assert_eq!(states(&router.log(), Some(&before)), before, "what stood there before");
}

#[test]
fn the_corpus_of_each_format_is_read_and_written_on() {
    if std::env::var_os("ATP_WRITE_CORPUS").is_some() {
        PLAYS.into_iter().for_each(|(name, play)| write(name, play));
    }
    let page = stranger::Page::read();
    let mut kinds = BTreeSet::new();
    for format in paths(&home()) {
        for log in paths(&format) {
            let name = log.file_name().unwrap().to_string_lossy().into_owned();
            println!("{}", log.display());
            let expected: Value =
                serde_json::from_str(&std::fs::read_to_string(log.join("expected.json")).unwrap()).unwrap();
            let dir = tempfile::tempdir().unwrap();
            lay(&log, dir.path());
            assert_eq!(figures(dir.path()), expected, "{name}");
            stranger::check(&page, dir.path(), &expected);
            goes_on(&log, &expected);
            kinds.extend(expected["kinds"].as_object().unwrap().keys().cloned());
        }
    }
    // The corpus has a log for every kind of record that this version knows.
    let known: BTreeSet<String> = page.kinds().into_iter().collect();
    assert_eq!(kinds, known, "kinds in the corpus, kinds of the page");
    let names = |dir: &Path| paths(dir).iter().map(|p| p.file_name().unwrap().to_string_lossy().into()).collect();
    let there: BTreeSet<String> = names(&home().join(FORMAT));
    let missing: Vec<&str> = PLAYS.iter().map(|(name, _)| *name).filter(|name| !there.contains(*name)).collect();
    assert_eq!(missing, [""; 0], "ATP_WRITE_CORPUS=1 plays and adds them");
}

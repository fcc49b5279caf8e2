//! `docs/backup.md`: a log that is copied newest file first while its router writes is a log, and a router goes on with it.

use atp_proto::content::Submit;
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::{atp, load, wait_for};
use std::path::{Path, PathBuf};

const CLIENTS: u64 = 4;
const COPIES: usize = 5;
const SCRIPT: &str = "models: [{id: steady, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 8
estimate: {mode: declared, in_tokens: 100, out_tokens: 100}
calls:
  - chunks: [{after: 1ms, repeat: 20, text: \"LINE\", out_tokens: 1}]
    final: {text: \"end\", in_tokens: 80}
";

/// Segments, the newest first.
fn segments(log: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(log).expect("a directory").map(|entry| entry.expect("an entry").path());
    let mut found: Vec<PathBuf> = found.filter(|path| path.extension().is_some_and(|e| e == "log")).collect();
    found.sort_by(|a, b| b.cmp(a));
    found
}

#[test]
fn a_log_copied_while_it_grows_newest_file_first_is_served() {
    let mut router = Router::start("limits: {segment_bytes: 1048576}\naccounts: {default: {usd: 1000, per: total}}");
    let script = SCRIPT.replace("LINE", &"words ".repeat(80));
    let _agent = Scripted::start(router.dir(), "steady-0", router.atp(), &script);
    router.has_agent("steady-0");
    let log = router.dir().join("data/log");
    let task = |n: u64| Submit { task: format!("task {n}"), ..Submit::default() };
    let copies: Vec<PathBuf> = (0..COPIES).map(|n| router.dir().join(format!("copy-{n}"))).collect();
    let _told = load::during(&[router.atp()], CLIENTS, task, || {
        for copy in &copies {
            std::fs::create_dir(copy).expect("a directory");
            for file in segments(&log) {
                let name = file.file_name().expect("a name");
                std::fs::copy(&file, copy.join(name)).expect("a copy");
                // It grows by a segment at least while it is copied, so that the order matters.
                if copy == &copies[0] && file == segments(&log)[0] {
                    let before = segments(&log).len();
                    wait_for("another segment", || (segments(&log).len() > before).then_some(()));
                }
            }
        }
    });
    router.settled();
    for copy in &copies {
        let source = format!("local:{}", copy.display());
        // The newest file may have been read while it was written: then it is to be copied again, and `verify` has to say so.
        let clean = atp::run(&["verify", "--log", &source]).status.success();
        assert!(clean || copy != &copies[0], "{source}");
    }
    router.kill();
    std::fs::remove_dir_all(&log).expect("a directory");
    std::fs::rename(&copies[0], &log).expect("a directory");
    router.restart();
    router.verify();
}

#[test]
fn a_log_is_looked_at_beside_its_router_and_pruned_without_it() {
    let mut router = Router::start("accounts: {default: {usd: 1000, per: total}}\nshards: {count: 4}");
    let _agent = Scripted::start(router.dir(), "steady", router.atp(), SCRIPT);
    router.has_agent("steady");
    load::follow(router.atp(), "one", &Submit { task: "one".into(), ..Submit::default() }).bill();
    let source = format!("local:{}", router.dir().join("data").display());
    let prune = |more: &[&str]| {
        let output = atp::run(&[&["log", "prune", "--log", &source], more].concat());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, shown, _) = prune(&["--dry-run", "--json"]);
    let plan: serde_json::Value = serde_json::from_str(&shown).expect("one JSON document");
    assert_eq!((code, &plan["pruned"], &plan["entries"]), (Some(0), &false.into(), &0.into()), "{plan}");
    let shards = plan["shards"].as_array().expect("a row for each shard");
    assert!(shards.len() == 4 && shards.iter().all(|shard| shard["held_by"] == "no_checkpoint"), "{plan}");
    assert!(shards.iter().any(|shard| shard["oldest_stream"]["position"] == 2), "{plan}");
    let (code, shown, why) = prune(&["--keep", "7d"]);
    assert!(code == Some(1) && shown.is_empty() && why.contains("stop it first"), "{code:?} {why}");
    router.stop();
    let (code, shown, _) = prune(&["--keep", "7d"]);
    assert!(code == Some(0) && shown.contains("nothing to prune") && shown.contains("no two checkpoints"), "{shown}");
    assert_eq!(prune(&["--keep", "a week"]).0, Some(2));
    router.restart();
    router.verify();
    router.stop();
    std::fs::remove_file(router.dir().join("data/log/0000000001.log")).expect("a segment");
    let (code, _, why) = prune(&["--dry-run"]);
    assert!(code == Some(5) && why.contains("ELOG") && why.contains("were deleted"), "{code:?} {why}");
}

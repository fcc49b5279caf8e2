//! `atp replay` on a log of the corpus: all of it, a range, one stream, the state at a position, and what it can't show.

use crate::corpus::{home, lay};
use atp_tests::blackbox::atp;
use atp_tests::blackbox::history::state_hash;
use serde_json::Value;

struct Log {
    _dir: tempfile::TempDir,
    source: String,
}

impl Log {
    fn of(name: &str) -> Self {
        Self::at("1", name)
    }

    fn at(format: &str, name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // A data directory stands for the log in it.
        lay(&home().join(format).join(name), &dir.path().join("log"));
        let source = format!("local:{}", dir.path().display());
        Self { _dir: dir, source }
    }

    fn lines(&self, flags: &[&str]) -> Vec<Value> {
        let output = atp::run(&[&["replay", "--log", &self.source, "--json"], flags].concat());
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Exit code and words of a refusal.
    fn refused(&self, flags: &[&str]) -> (i32, String) {
        let output = atp::run(&[&["replay", "--log", &self.source], flags].concat());
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    }
}

#[test]
fn a_range_and_a_stream_are_parts_of_the_whole() {
    let log = Log::of("crash");
    let all = log.lines(&[]);
    let position = |line: &Value| line["position"].as_u64().unwrap();
    assert_eq!((position(&all[0]), position(&all[all.len() - 1])), (1, 28));
    let range = log.lines(&["--from", "5", "--until", "9"]);
    let expected: Vec<&Value> = all.iter().filter(|line| (5..=9).contains(&position(line))).collect();
    assert_eq!(range.iter().collect::<Vec<_>>(), expected);
    assert_eq!(log.lines(&["--from", "28"]).len(), all.iter().filter(|line| position(line) == 28).count());

    let stream = all.iter().find_map(|line| line["stream_id"].as_str()).unwrap();
    let expected: Vec<&Value> = all.iter().filter(|line| line["stream_id"] == stream).collect();
    assert_eq!(log.lines(&["--stream", stream]).iter().collect::<Vec<_>>(), expected);
    let both = log.lines(&["--stream", stream, "--from", "5", "--until", "9"]);
    assert!(!both.is_empty() && both.len() < range.len() && both.iter().all(|line| line["stream_id"] == stream));

    // Every line has the shape that scripts may rely on; a frame shows what was received.
    for line in &all {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["at", "kind", "position", "record", "shard", "stream_id"]);
    }
    let frame = all.iter().find(|line| line["kind"] == "frame").unwrap();
    assert_eq!(frame["record"]["frames"][0]["payload"]["type"], "task.submit", "{frame}");
}

#[test]
fn the_state_is_rebuilt_at_each_position() {
    let log = Log::of("crash");
    let hashes: Vec<Value> = (1..=28).map(|position| state_hash(&log.source, position)).collect();
    assert!(hashes.windows(2).all(|pair| pair[0] != pair[1]), "each entry changes the hash");
    let whole = atp::run_json(&["replay", "--log", &log.source, "--state"]);
    assert_eq!((&whole["state_hash"], &whole["position"]), (&hashes[27], &Value::from(28)));
    let text = atp::run(&["replay", "--log", &log.source, "--state", "--until", "3"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("position 3") && text.contains(hashes[2].as_str().unwrap()), "{text}");
}

#[test]
fn of_several_shards_all_are_shown_one_behind_the_other_or_one_alone() {
    let log = Log::at("2", "plain");
    let all = log.lines(&[]);
    let mut alone = Vec::new();
    for shard in 0..4 {
        let lines = log.lines(&["--shard", &shard.to_string()]);
        assert!(lines.iter().all(|line| line["shard"] == shard && line["position"].as_u64() > Some(0)));
        alone.extend(lines);
    }
    assert_eq!(all, alone);
    let close = all.iter().find(|line| line["kind"] == "close").unwrap();
    let (shard, position) = (close["shard"].to_string(), close["position"].to_string());
    let range = log.lines(&["--shard", &shard, "--from", &position, "--until", &position]);
    assert!(!range.is_empty() && range.iter().all(|line| line["position"] == close["position"]));
    let stream = close["stream_id"].as_str().unwrap();
    assert!(log.lines(&["--stream", stream]).iter().all(|line| line["shard"] == close["shard"]));

    let state = |flags: &[&str]| {
        let flags = [&["replay", "--log", &log.source, "--state"], flags].concat();
        atp::run_json(&flags)
    };
    let each: Vec<Value> = ["0", "1", "2", "3"].map(|shard| state(&["--shard", shard])).into();
    let whole = state(&[]);
    for sum in ["position", "records", "streams"] {
        assert_eq!(whole[sum], each.iter().map(|one| one[sum].as_u64().unwrap()).sum::<u64>(), "{sum}");
    }
    assert!(each.iter().all(|one| one["state_hash"] != whole["state_hash"]));
    assert_eq!(whole["accounts"].as_array().unwrap().len(), 1, "an account is one row, wherever its money is");

    for (flags, words) in [
        (&["--from", "2"][..], "--from: the log has 4 shards, each with its own positions; add --shard N"),
        (&["--state", "--until", "2"], "--until: the log has 4 shards"),
        (&["--shard", "4"], "--shard: 4 is none of the log's 4 shards"),
    ] {
        let (code, said) = log.refused(flags);
        assert!(code == 2 && said.contains(words), "{flags:?}: exit {code}: {said}");
    }
}

#[test]
fn what_it_cannot_show_is_named() {
    let log = Log::of("crash");
    for (flags, exit, words) in [
        (&["--from", "9", "--until", "5"][..], 2, "--until: 5 lies before --from 9"),
        (&["--from", "29"], 2, "--from: 29 lies behind the log's last position, 28"),
        (&["--until", "29"], 2, "--until: 29 lies behind the log's last position, 28"),
        (&["--state", "--until", "29"], 2, "--until: 29 lies behind the log's last position, 28"),
        (&["--stream", "stranger"], 1, "--stream: the log has no record of stream `stranger`"),
        (&["--from", "0"], 2, "--from"),
        (&["--state", "--stream", "a"], 2, "--stream"),
    ] {
        let (code, said) = log.refused(flags);
        assert!(code == exit && said.contains(words), "{flags:?}: exit {code}: {said}");
    }
    let nowhere = Log { source: format!("{}/nowhere", log.source), ..log };
    let (code, said) = nowhere.refused(&[]);
    assert!(code == 2 && said.contains("--log") && said.contains("nowhere"), "exit {code}: {said}");
}

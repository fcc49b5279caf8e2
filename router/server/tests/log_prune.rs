//! A pruned local log is the same ledger: the same state, with open calls and lent money, whatever step the prune died at; what
//! somebody else removed is missed.
#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests

mod log_support;
mod prune_support;
mod support;

use atp_core::state::State;
use atp_router::log::prune::{Plan, Wish, plan, prune, prune_on};
use atp_router::log::{Disk, Durability, LocalLog, LogError, Options, Source, offline};
use atp_router::verify::offline_verify;
use atp_router::{Config, Router};
use log_support::{Dying, add_all, copy, segment, segments};
use prune_support::{Book, DAY, HOUR, WISH, story};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;

fn options(dir: &Path, shards: u32) -> Options {
    Options { segment_bytes: 64 << 10, durability: Durability::Async, shards, ..Options::new(dir) }
}

/// The story in a local log that is closed.
fn told(dir: &Path, shards: u32) -> Vec<State> {
    told_in(options(dir, shards))
}

fn told_in(options: Options) -> Vec<State> {
    let shards = options.shards;
    let log = LocalLog::open(options).unwrap().0;
    let log_id = log.log_id();
    let mut write = |shard, position, entry, begins| add_all(&log.shard(shard), vec![(position, entry, begins)]);
    let mut book = Book::new(log_id, shards, &mut write);
    story(&mut book);
    let states = book.states;
    log.close().unwrap();
    states
}

fn hashes(states: &[State]) -> Vec<(u64, String)> {
    states.iter().map(|state| (state.position(), state.hash())).collect()
}

fn recovered(dir: &Path) -> Vec<(u64, String)> {
    let all = offline::recover_all(&Source::local(dir)).unwrap();
    all.iter().map(|(state, _)| (state.position(), state.hash())).collect()
}

fn folded(dir: &Path, shards: u32) -> Vec<(u64, String)> {
    let fold = |shard| offline::fold_from_start(&Source::local(dir).shard(shard), None).unwrap().0;
    hashes(&(0..shards).map(fold).collect::<Vec<_>>())
}

/// As it was, by every way to read it.
fn is_whole(dir: &Path, due: &[(u64, String)]) {
    assert_eq!(recovered(dir), due);
    assert_eq!(folded(dir, u32::try_from(due.len()).unwrap()), due);
    let report = offline_verify(&Source::local(dir)).unwrap();
    assert!(report.ok, "{report:?}");
    assert_eq!(report.position, due.iter().map(|(position, _)| position).sum::<u64>());
}

#[test]
fn what_is_left_is_the_same_ledger() {
    for shards in [1, 64] {
        let dir = tempfile::tempdir().unwrap();
        let due = hashes(&told(dir.path(), shards));
        let source = Source::local(dir.path());
        let before = segments(dir.path()).len();
        is_whole(dir.path(), &due);

        let shown = plan(&source, WISH).unwrap();
        assert!(!shown.pruned && shown.segments > 0 && shown.entries > 0 && shown.bytes > 0, "{shown:?}");
        assert_eq!(segments(dir.path()).len(), before, "a plan removes nothing");
        let done = prune(&source, WISH).unwrap();
        assert_eq!(done, Plan { pruned: true, ..shown.clone() });
        // A start, which a prune begins with, adds a segment with the last block.
        assert_eq!(segments(dir.path()).len() as u64, before as u64 + 1 - done.segments);
        is_whole(dir.path(), &due);

        let report = offline_verify(&source).unwrap();
        let pruned: Vec<u64> = report.pruned.iter().map(|one| one.checkpoint).collect();
        let kept: Vec<u64> = done.shards.iter().map(|one| one.checkpoints[1]).collect();
        assert_eq!(pruned, kept, "verify begins with the older checkpoint that is kept, and says so");
        for one in &done.shards {
            let beginning = source.shard(one.shard).beginning().unwrap().unwrap();
            assert_eq!((beginning.position, beginning.pruned_ms), (one.first + one.entries, WISH.now_ms));
            let first = source.shard(one.shard).entries(1).unwrap().next().unwrap().unwrap().0;
            assert_eq!(first, beginning.position, "what is left is read from its beginning");
        }
        let told = source.beginning().unwrap().unwrap().told();
        assert!(told.contains("pruned by `atp log prune` at 1970-"), "{told}");

        let again = prune(&source, WISH).unwrap();
        assert!(!again.pruned && again.segments == 0, "{again:?}");
        is_whole(dir.path(), &due);
    }
}

#[test]
fn each_shard_says_what_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    told(dir.path(), 2);
    let shown = plan(&Source::local(dir.path()), WISH).unwrap();
    for (shard, name) in shown.shards.iter().zip(["open-0", "open-1"]) {
        let oldest = shard.oldest_stream.as_ref().unwrap();
        assert_eq!(oldest.stream_id, name, "what ended a day ago holds nothing");
        assert_eq!((shard.held_by, shard.safe), ("stream", oldest.position));
        assert!(shard.safe < shard.checkpoints[1] && shard.checkpoints[1] < shard.checkpoints[0]);
        assert!(shard.first == 1 && shard.entries < shard.safe);
    }
    // Nothing younger than this goes, and all of it is.
    let keep = Wish { keep_from_ms: Some(HOUR), ..WISH };
    let shown = plan(&Source::local(dir.path()), keep).unwrap();
    assert!(shown.shards.iter().all(|shard| shard.held_by == "age" && shard.young == Some(shard.safe)), "{shown:?}");
    assert!(shown.entries < plan(&Source::local(dir.path()), WISH).unwrap().entries);
    let all = Wish { keep_from_ms: Some(0), ..WISH };
    assert_eq!(prune(&Source::local(dir.path()), all).unwrap().segments, 0);
}

#[test]
fn a_log_without_two_checkpoints_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let log = LocalLog::open(options(dir.path(), 1)).unwrap().0;
    let log_id = log.log_id();
    let mut write = |shard, position, entry, begins| add_all(&log.shard(shard), vec![(position, entry, begins)]);
    let mut book = Book::new(log_id, 1, &mut write);
    book.fill(0, 60, DAY);
    book.checkpoint(0);
    book.fill(0, 60, DAY);
    let due = hashes(&book.states);
    log.close().unwrap();
    let done = prune(&Source::local(dir.path()), WISH).unwrap();
    assert_eq!((done.segments, done.shards[0].held_by), (0, "no_checkpoint"));
    is_whole(dir.path(), &due);
}

#[test]
fn a_router_holds_its_log() {
    let dir = tempfile::tempdir().unwrap();
    told(dir.path(), 1);
    let _log = LocalLog::open(options(dir.path(), 1)).unwrap().0;
    assert!(matches!(prune(&Source::local(dir.path()), WISH), Err(LogError::InUse { .. })));
    assert!(plan(&Source::local(dir.path()), WISH).unwrap().segments > 0, "looking needs no lock");
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(prune(&Source::local(empty.path()), WISH), Err(LogError::NoLog { .. })));
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "nothing was made");
}

#[test]
fn a_prune_that_dies_at_any_step_leaves_a_log_that_starts() {
    for shards in [1, 4] {
        let told_dir = tempfile::tempdir().unwrap();
        let due = hashes(&told(told_dir.path(), shards));
        let positions: Vec<u64> = due.iter().map(|(position, _)| *position).collect();
        let mut steps = 0;
        loop {
            let dir = tempfile::tempdir().unwrap();
            copy(told_dir.path(), dir.path());
            let disk: Arc<dyn Disk> = Arc::new(Dying { left: AtomicI64::new(steps) });
            let done = prune_on(dir.path(), WISH, &disk);
            is_whole(dir.path(), &due);
            // As a router starts.
            let (log, found) = LocalLog::open(options(dir.path(), shards)).unwrap();
            assert_eq!(found.positions, positions, "{steps} steps: {:?}", found.report);
            drop(log);
            prune(&Source::local(dir.path()), WISH).unwrap();
            is_whole(dir.path(), &due);
            if done.is_ok() {
                break;
            }
            steps += 1;
        }
        assert!(steps > 10, "{steps}");
    }
}

#[test]
fn what_somebody_else_removes_is_missed() {
    let first = tempfile::tempdir().unwrap();
    told(first.path(), 3);
    let refused = |dir: &Path| {
        let error = LocalLog::open(options(dir, 3)).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("ELOG: "), "{error}");
        assert_eq!(offline::recover_all(&Source::local(dir)).map(|_| ()).unwrap_err().to_string(), error);
        assert!(offline_verify(&Source::local(dir)).unwrap_err().starts_with("ELOG: "));
        error
    };
    let dir = tempfile::tempdir().unwrap();
    copy(first.path(), dir.path());
    std::fs::remove_file(segment(dir.path(), 1)).unwrap();
    assert!(refused(dir.path()).contains("acknowledged records were deleted"));

    prune(&Source::local(first.path()), WISH).unwrap();
    copy(first.path(), dir.path());
    // `copy` takes all that is called `*.log`, as the page about back-ups says, and with it what was noted.
    LocalLog::open(options(dir.path(), 3)).unwrap();
    let kept = segments(dir.path());
    let kept = kept.iter().find(|path| !path.ends_with("pruned.log")).unwrap();
    std::fs::remove_file(kept).unwrap();
    assert!(refused(dir.path()).contains("since it was pruned"));
    copy(first.path(), dir.path());
    std::fs::remove_file(dir.path().join("pruned.log")).unwrap();
    assert!(refused(dir.path()).contains("pruned.log"));
    // The note of one log says nothing of another, whether that one begins earlier or later.
    for segment_bytes in [16 << 10, 64 << 10, 256 << 10] {
        let other = tempfile::tempdir().unwrap();
        told_in(Options { segment_bytes, ..options(other.path(), 3) });
        assert!(prune(&Source::local(other.path()), WISH).unwrap().pruned, "{segment_bytes}");
        std::fs::copy(other.path().join("pruned.log"), dir.path().join("pruned.log")).unwrap();
        let said = refused(dir.path());
        assert!(said.contains("is of log"), "{said}");
    }
}

#[tokio::test]
async fn a_router_starts_on_a_pruned_log_and_goes_on() {
    for shards in [1, 64] {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        told(&log, shards);
        prune(&Source::local(&log), WISH).unwrap();
        let config = || Config { durability: atp_router::config::Durability::Async, ..support::config(dir.path()) };
        for _ in 0..2 {
            let router = Router::start(config()).await.unwrap();
            let (status, report) = support::http(&router, "POST /v1/verify").await;
            assert_eq!((status, &report["ok"]), (200, &serde_json::json!(true)), "{report}");
            assert_eq!(report["pruned"].as_array().unwrap().len(), shards as usize);
            router.stop().await.unwrap();
        }
        let report = offline_verify(&Source::local(&log)).unwrap();
        assert!(report.ok && report.pruned.len() == shards as usize, "{report:?}");
    }
}

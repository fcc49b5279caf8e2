//! The `command` adapter with real programs: what they say, what they find, and that nothing of them outlives its call.

#![allow(clippy::unwrap_used)] // clippy takes only marked functions for tests

mod support;

use atp_agent::command::{CommandConfig, OUTPUT_BYTES_MAX, handler};
use atp_proto::content::{Finish, Proof, UsageSource};
use atp_proto::{Amount, Code, UsdMicros};
use std::path::Path;
use std::time::{Duration, Instant};
use support::{Ended, PATIENCE, Router, WIDE, dispatch};

fn shell(script: &str) -> CommandConfig {
    CommandConfig::new(["sh", "-c", script].map(str::to_owned).to_vec(), ".")
}

async fn run(config: CommandConfig) -> Ended {
    Router::of(handler(config).unwrap()).await.run(&dispatch("the task", WIDE)).await
}

#[tokio::test]
async fn the_task_comes_in_and_the_output_goes_out() {
    let ended = run(CommandConfig::new(vec!["cat".into()], ".")).await;
    assert_eq!(ended.text(), "the task");
    let last = ended.expect_final();
    assert_eq!(
        (last.finish, last.usage_source, last.cost.usd_micros),
        (Finish::Complete, UsageSource::Reported, UsdMicros(0))
    );
    assert_eq!(last.findings, None);
}

#[tokio::test]
async fn a_program_that_ignores_its_input_is_fine() {
    let mut task = dispatch(&"x".repeat(200_000), WIDE);
    task.max_output_tokens = None;
    let ended = Router::of(handler(shell("echo done")).unwrap()).await.run(&task).await;
    assert_eq!(ended.text(), "done\n");
}

#[tokio::test]
async fn a_linter_that_fails_because_it_found_something_has_succeeded() {
    let sarif = r#"{"version":"2.1.0","runs":[{"results":[{"ruleId":"r1","level":"error","message":{"text":"bad"},
        "locations":[{"physicalLocation":{"artifactLocation":{"uri":"a.rs"},"region":{"startLine":3}}}]}]}]}"#;
    let ended = run(shell(&format!("echo '{sarif}'; exit 4"))).await;
    let last = ended.expect_final();
    let found = last.findings.as_ref().unwrap();
    assert_eq!((&found[0]["type"], &found[0]["file"], &found[0]["span"]), (&"r1".into(), &"a.rs".into(), &"3".into()));
    assert_eq!(ended.text(), "1 findings in the SARIF of sh\n");
}

#[tokio::test]
async fn a_failure_shows_the_end_of_stderr_and_costs_what_a_run_costs() {
    let config =
        CommandConfig { usd_micros_per_run: 70, ..shell("echo out; echo first >&2; echo 'no such lint' >&2; exit 3") };
    let ended = run(config).await;
    let error = ended.expect_error();
    assert_eq!((error.code, error.proof), (Code::AgentDown, None));
    assert_eq!(error.cost.unwrap().usd_micros, UsdMicros(70));
    assert!(error.message.contains("exit status: 3: first\nno such lint"), "{}", error.message);
}

#[tokio::test]
async fn json_that_is_no_findings_is_the_answer_as_it_is() {
    let ended = run(shell(r#"printf '{"a":1}'"#)).await;
    assert_eq!(ended.text(), r#"{"a":1}"#);
    assert_eq!(ended.expect_final().findings, None);
}

#[tokio::test]
async fn what_cannot_start_or_be_paid_was_not_called() {
    let missing = run(CommandConfig::new(vec!["no-such-program-here".into()], ".")).await;
    assert_eq!((missing.expect_error().code, missing.expect_error().proof), (Code::AgentDown, Some(Proof::NotCalled)));
    assert!(missing.expect_error().message.starts_with("argv: `no-such-program-here`"));
    let costs = |grant: u64| async move {
        let config = CommandConfig { usd_micros_per_run: 100, ..shell("echo x") };
        Router::of(handler(config).unwrap()).await.run(&dispatch("t", Amount::new(0, grant))).await
    };
    assert_eq!(costs(100).await.expect_final().cost.usd_micros, UsdMicros(100));
    let refused = costs(99).await;
    assert_eq!((refused.expect_error().code, refused.expect_error().proof), (Code::Budget, Some(Proof::NotCalled)));
}

/// Waits until no such process runs any more; a zombie that nobody has asked for counts as ended.
async fn wait_until_gone(pid: &str) {
    let until = Instant::now() + PATIENCE;
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        assert!(Instant::now() < until, "process {pid} outlived its call");
        tokio::task::yield_now().await;
    }
}

/// A call runs a script whose first line is a process id; after a cancel that process is gone.
async fn cancelled_is_gone(script: &str) {
    let mut router = Router::of(handler(shell(script)).unwrap()).await;
    router.dispatch(&dispatch("t", WIDE)).await;
    let pid = router.partial().await.text.unwrap();
    router.cancel().await;
    assert_eq!(router.end().await.expect_final().finish, Finish::Cancelled);
    wait_until_gone(pid.trim()).await;
}

#[tokio::test]
async fn cancelling_kills_the_whole_group() {
    cancelled_is_gone("sleep 1000 & echo $!; wait").await;
}

#[tokio::test]
async fn a_program_that_ignores_sigterm_is_killed() {
    cancelled_is_gone("trap '' TERM; echo $$; while :; do sleep 1; done").await;
}

#[tokio::test]
async fn a_call_that_is_dropped_leaves_no_process() {
    let mut router = Router::of(handler(shell("sleep 1000 & echo $!; wait")).unwrap()).await;
    router.dispatch(&dispatch("t", WIDE)).await;
    let pid = router.partial().await.text.unwrap();
    drop(router);
    wait_until_gone(pid.trim()).await;
}

#[tokio::test]
async fn time_is_bounded() {
    let config = CommandConfig { timeout: Duration::from_millis(200), ..shell("echo $$; exec sleep 1000") };
    let ended = run(config).await;
    assert_eq!((ended.expect_error().code, ended.expect_error().proof), (Code::Timeout, None));
    wait_until_gone(ended.text().trim()).await;
    let mut task = dispatch("t", WIDE);
    task.deadline_ms = 200;
    let ended = Router::of(handler(shell("exec sleep 1000")).unwrap()).await.run(&task).await;
    assert_eq!(ended.expect_error().code, Code::Timeout);
}

#[tokio::test]
async fn a_child_left_behind_does_not_hold_the_call() {
    let ended = run(shell("sleep 1000 & echo $!")).await;
    assert_eq!(ended.expect_final().finish, Finish::Complete);
    wait_until_gone(ended.text().trim()).await;
}

#[tokio::test]
async fn output_is_bounded_and_the_cut_is_said() {
    let of = |n: usize| async move {
        run(CommandConfig { output_bytes_max: 1000, ..shell(&format!("head -c {n} /dev/zero | tr '\\0' x")) })
            .await
            .text()
    };
    assert_eq!(of(1000).await, "x".repeat(1000));
    assert_eq!(of(1001).await, format!("{}\n[output cut: 1000 bytes kept, 1 more were dropped]\n", "x".repeat(1000)));
    let much = run(shell("head -c 20000000 /dev/zero | tr '\\0' y")).await.text();
    assert!(much.ends_with("[output cut: 1048576 bytes kept, 18951424 more were dropped]\n"));
}

#[tokio::test]
async fn characters_are_never_split_and_bytes_that_are_none_do_no_harm() {
    let ended = run(shell("printf 'gr\\303'; printf '\\274n\\n'; printf 'a\\377b'")).await;
    assert_eq!(ended.text(), "grün\na\u{fffd}b");
}

#[test]
fn settings_that_cannot_work_are_named() {
    let field = |config: CommandConfig| handler(config).map(|_| ()).map_err(|e| e.field);
    assert_eq!(field(shell("true")), Ok(()));
    assert_eq!(field(CommandConfig::new(vec![], ".")), Err("argv"));
    assert_eq!(field(CommandConfig::new(vec!["a".into(), "b\0".into()], ".")), Err("argv"));
    assert_eq!(field(CommandConfig::new(vec!["a".into()], "no/such/folder")), Err("cwd"));
    assert_eq!(field(CommandConfig { timeout: Duration::ZERO, ..shell("true") }), Err("timeout"));
    let bytes = |n: usize| field(CommandConfig { output_bytes_max: n, ..shell("true") });
    assert_eq!((bytes(0), bytes(1)), (Err("output_bytes_max"), Ok(())));
    assert_eq!((bytes(OUTPUT_BYTES_MAX), bytes(OUTPUT_BYTES_MAX + 1)), (Ok(()), Err("output_bytes_max")));
}

/// The demo's own tools on the demo's own crate.
#[tokio::test]
async fn cargo_finds_the_defects_of_the_demo() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ops/demo");
    let target = tempfile::tempdir().unwrap();
    let cargo = |args: &[&str]| {
        let mut argv: Vec<String> = [&["cargo"], args].concat().iter().map(|arg| (*arg).to_owned()).collect();
        argv.push(format!("--target-dir={}", target.path().display()));
        CommandConfig::new(argv, &demo)
    };
    let clippy = run(cargo(&["clippy", "--quiet", "--all-targets", "--message-format=json"])).await;
    let found = clippy.expect_final().findings.as_ref().unwrap();
    assert!(found.len() >= 5 && found.iter().all(|f| f["type"].as_str().unwrap().starts_with("clippy::")), "{found:?}");
    let tests = run(cargo(&["test", "--quiet", "--no-fail-fast"])).await;
    let found = tests.expect_final().findings.as_ref().unwrap();
    assert!(found.len() >= 2);
    assert!(found.iter().all(|f| f["type"] == "test_failure" && f["file"] != "" && f["span"] != ""), "{found:?}");
    assert!(tests.text().contains("test result: FAILED"));
}

//! What an operator does to a running router and sees of it: reload, cancel over HTTP, metrics, and how it ends when its log
//! fails or its disk is really full.

#[path = "log_support/mod.rs"]
mod log_support;
mod support;

use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Code, Flags, Frame, Limit, TenantId, Tokens, UsdMicros, WireError};
use atp_router::Router;
use atp_router::log::{Disk, RealDisk};
use log_support::Faulty;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;
use support::{Peer, agent, config, http, submit};
use tokio::time::Instant;

/// Asks again until it is so; the deadline is far.
async fn until(what: &str, mut asked: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !asked().await {
        assert!(Instant::now() < end, "no {what} within a minute");
        tokio::task::yield_now().await;
    }
}

async fn ended(router: &Router) -> String {
    let waited = tokio::time::timeout(Duration::from_secs(60), router.wait()).await;
    waited.expect("it ends within a minute").expect_err("it doesn't end well")
}

fn limit(usd_micros: u64) -> Limit {
    Limit { tokens: None, usd_micros: Some(UsdMicros(usd_micros)) }
}

#[tokio::test]
async fn a_reload_changes_an_account_and_a_bad_one_changes_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = config(dir.path());
    let account = atp_core::settings::AccountSettings {
        limit: limit(1),
        per: atp_core::settings::Per::Total,
        ..Default::default()
    };
    config.settings.accounts.insert(TenantId::new("default"), account.clone());
    let router = Router::start(config.clone()).await.expect("starts");
    let mut greeter = agent(&router, "greeter").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    // Where the account is at home; elsewhere the refusal comes once its home has been asked.
    let ids = support::ids_at(3, |placement| placement.home_of("default"));
    client.send(submit(&ids[0], "greeter")).await;
    let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
    assert_eq!(refused.code, Code::Budget, "one micro-dollar buys nothing: {refused}");

    // What needs a restart is named, and nothing of the same configuration is taken.
    let mut bad = config.clone();
    bad.settings
        .accounts
        .insert(TenantId::new("default"), atp_core::settings::AccountSettings { limit: limit(50_000_000), ..account });
    let good = bad.clone();
    bad.limits.agents += 1;
    bad.data_dir = dir.path().join("elsewhere");
    let problems = router.reload(bad).await.expect_err("two keys are fixed");
    let fields: Vec<_> = problems.iter().map(|p| p.field.as_str()).collect();
    assert_eq!(fields, ["data_dir", "limits"]);
    assert!(problems.iter().all(|p| p.fix.contains("restart")), "{problems:?}");
    client.send(submit(&ids[1], "greeter")).await;
    let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
    assert_eq!(refused.code, Code::Budget, "the old limit stands: {refused}");

    router.reload(good).await.expect("an account may change");
    client.send(submit(&ids[2], "greeter")).await;
    client.expect(kind::ACCEPTED).await;
    greeter.expect(kind::DISPATCH).await;
    let (_, accounts) = http(&router, "GET /v1/accounts/default").await;
    assert_eq!(accounts["accounts"][0]["limit"]["usd_micros"], 50_000_000, "{accounts}");
    let (_, report) = http(&router, "POST /v1/verify").await;
    assert_eq!(report["ok"], true, "{report}");
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn delete_over_http_stops_the_call_and_the_bill_comes() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let mut talker = agent(&router, "talker").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = talker.expect(kind::DISPATCH).await.stream_id.to_string();

    assert_eq!(http(&router, "DELETE /v1/streams/nope").await.0, 404);
    assert_eq!(http(&router, "DELETE /v1/streams/s%201").await.0, 400);
    assert_eq!(http(&router, "DELETE /v1/streams/s1").await.0, 202);
    let cancel = talker.expect(kind::AGENT_CANCEL).await;
    assert_eq!(*cancel.stream_id, *call);
    let cost = atp_proto::Cost { in_tokens: Tokens(10), out_tokens: Tokens(2), usd_micros: UsdMicros(12) };
    let last = AgentFinal { text: Some("half".into()), cost, ..AgentFinal::default() };
    talker.send(Frame::json(call.as_str(), 1, Flags::FIN, kind::RESULT_FINAL, &last)).await;
    let bill: Bill = loop {
        let frame = client.next().await.expect("open");
        if &*frame.kind == kind::BILL {
            break frame.read().expect("a bill");
        }
    };
    assert_eq!((bill.state, bill.settled.usd_micros), (TaskState::Cancelled, UsdMicros(12)));
    assert_eq!(http(&router, "DELETE /v1/streams/s1").await.0, 202, "a stream that has ended: nothing is to do");
    assert_eq!(http(&router, "GET /v1/streams/s1").await.1["state"], "cancelled");
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn an_agent_s_status_is_a_metric() {
    let dir = tempfile::tempdir().expect("a directory");
    let router = Router::start(config(dir.path())).await.expect("starts");
    let shows = async |status: &str, value: u8| {
        let wanted = format!("atp_agent_status{{agent=\"moody\",status=\"{status}\"}} {value}");
        until(&wanted, async || http(&router, "GET /metrics").await.1.as_str().is_some_and(|t| t.contains(&wanted)))
            .await;
    };
    let mut moody = agent(&router, "moody").await;
    shows("READY", 1).await;
    let pause = AgentStatus { status: Status::Pause, ..AgentStatus::default() };
    moody.send(Frame::json("", 0, Flags::NONE, kind::STATUS, &pause)).await;
    shows("PAUSE", 1).await;
    shows("READY", 0).await;
    drop(moody);
    shows("GONE", 1).await;
    shows("PAUSE", 0).await;
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn an_agent_s_tier_and_an_account_s_pace_are_metrics() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = config(dir.path());
    let account = atp_core::settings::AccountSettings {
        limit: limit(1_000_000),
        per: atp_core::settings::Per::Month,
        pacing: Some(atp_core::pacing::Mode::Observe),
        ..Default::default()
    };
    config.settings.accounts.insert(TenantId::new("default"), account);
    let router = Router::start(config).await.expect("starts");
    let shows = async |wanted: &str| {
        until(wanted, async || http(&router, "GET /metrics").await.1.as_str().is_some_and(|t| t.contains(wanted)))
            .await;
    };
    let mut hasty = agent(&router, "hasty").await;
    shows("atp_agent_qos_tier{agent=\"hasty\"} 1").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    let mut out = 1_500;
    // Each shard learns of its own runs.
    for (n, id) in (1..).zip(support::ids_at(10, |placement| placement.home_of_agent(&AgentName::new("hasty")))) {
        client.send(submit(&id, "hasty")).await;
        let call: Dispatch = hasty.expect(kind::DISPATCH).await.read().expect("a dispatch");
        // Each answer is longer than the mean of those before it, by more than 20 %; the last costs twice the account.
        let usd_micros = UsdMicros(if n < 10 { 0 } else { 2_000_000 });
        let cost = atp_proto::Cost { in_tokens: Tokens(70), out_tokens: Tokens(out), usd_micros };
        let last = AgentFinal { cost, ..AgentFinal::default() };
        hasty.send(Frame::json(call.call_id.to_string(), 1, Flags::FIN, kind::RESULT_FINAL, &last)).await;
        while &*client.next().await.expect("open").kind != kind::BILL {}
        out = out * 13 / 10;
    }
    shows("atp_agent_qos_tier{agent=\"hasty\"} 2").await;
    shows("atp_account_ahead_of_pace{account=\"default\"} 1").await;
    shows("atp_budget_limit_usd_micros{account=\"default\"} 1000000").await;
    shows("atp_reach_breaches_total{agent=\"hasty\"} ").await;
    let word = r#"{"usd_micros": 5000000, "for_ms": 3600000, "by": "ada"}"#;
    let (status, told) = support::http_body(&router, "POST /v1/accounts/default/faster", word).await;
    assert_eq!(status, 200, "{told}");
    shows("atp_account_ahead_of_pace{account=\"default\"} 0").await;
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn a_failed_sync_ends_the_router_with_the_reason() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Arc::new(Faulty::default());
    let mut fsync = config(dir.path());
    fsync.durability = atp_router::config::Durability::Fsync;
    let router = Router::start_on(fsync, disk.clone()).await.expect("starts");
    let _greeter = agent(&router, "greeter").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    disk.sync_fails.store(true, Ordering::SeqCst);
    // A seal may have met the failure before this is read.
    client.try_send(submit("s1", "greeter")).await;
    // Nothing is acknowledged; the connection closes, and may say before that another one is needed.
    if let Some(frame) = client.next().await {
        let error: WireError = frame.read().expect("an error");
        assert_eq!((error.code, error.judged), (Code::Draining, false), "{error}");
        assert!(client.next().await.is_none());
    }
    let why = ended(&router).await;
    // The spare segment may still be in the making, and meet it first.
    let what = ["sync", "fill with zeros"];
    assert!(why.contains("the log failed") && what.iter().any(|what| why.contains(what)), "{why}");
    assert_eq!(ended(&router).await, why, "whoever asks later is told the same");
    let (status, ready) = http(&router, "GET /readyz").await;
    assert_eq!((status, &ready["ready"]), (503, &false.into()), "{ready}");
    assert_eq!(router.stop().await.expect_err("not sealed"), why);
}

/// A disk with so many bytes; behind them every write is refused as on a full one, and free space says so or lies.
struct Small {
    left: AtomicI64,
    honest: AtomicBool,
}

impl Disk for Small {
    fn write(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let grows = (offset + bytes.len() as u64).saturating_sub(file.metadata()?.len());
        let grows = i64::try_from(grows).expect("small");
        if grows > 0 && self.left.fetch_sub(grows, Ordering::SeqCst) < grows {
            self.left.fetch_add(grows, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(28));
        }
        RealDisk.write(file, bytes, offset)
    }
    fn free(&self, dir: &Path) -> io::Result<u64> {
        match self.honest.load(Ordering::SeqCst) {
            true => Ok(u64::try_from(self.left.load(Ordering::SeqCst)).unwrap_or(0)),
            false => RealDisk.free(dir),
        }
    }
}

#[tokio::test]
async fn a_disk_that_is_really_full_stops_the_router_and_a_restart_has_all_that_was_acknowledged() {
    let dir = tempfile::tempdir().expect("a directory");
    // Quotas make free space lie: there is no warning, only a write that fails.
    let disk = Arc::new(Small { left: AtomicI64::new(5 << 20), honest: AtomicBool::new(false) });
    let router = Router::start_on(config(dir.path()), disk).await.expect("starts");
    let mut talker = agent(&router, "talker").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = talker.expect(kind::DISPATCH).await.stream_id.to_string();
    let text = "x".repeat(30_000);
    let speaks = tokio::spawn(async move {
        for seq in 1.. {
            let part = AgentPartial { text: Some(text.clone()), ..AgentPartial::default() };
            let frame = Frame::json(call.as_str(), seq, Flags::NONE, kind::RESULT_PARTIAL, &part);
            if !talker.try_send(frame).await {
                return;
            }
        }
    });
    let mut heard = 1;
    while let Some(frame) = client.next().await {
        heard = heard.max(frame.msg_seq);
    }
    let why = ended(&router).await;
    assert!(why.contains("the log failed") && why.contains("No space left"), "{why}");
    assert_eq!(router.stop().await.expect_err("not sealed"), why);
    speaks.await.expect("the agent ends too");
    assert!(heard > 10, "{heard}");

    let router = Router::start(config(dir.path())).await.expect("starts again");
    let (_, report) = http(&router, "POST /v1/verify").await;
    assert_eq!((&report["ok"], &report["open_reservations"]), (&true.into(), &1.into()), "{report}");
    // Whatever was said to the client is said again.
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(Frame::json("s1", 0, Flags::SYN, kind::RESUME, &Resume { after: 0, ..Resume::default() })).await;
    let mut again = 0;
    while again < heard {
        let frame = client.next().await.expect("open");
        if frame.msg_seq > 0 {
            again = frame.msg_seq;
        }
    }
    router.stop().await.expect("seals");
}

#[tokio::test]
async fn a_disk_that_says_it_fills_refuses_new_tasks_and_lets_the_running_one_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = Arc::new(Small { left: AtomicI64::new(64 << 20), honest: AtomicBool::new(true) });
    let mut config = config(dir.path());
    config.limits.segment_bytes = 8 << 20;
    let router = Router::start_on(config, disk.clone()).await.expect("starts");
    let spare = dir.path().join("log/0000000002.log");
    until("a spare segment", async || spare.metadata().is_ok_and(|m| m.len() == 8 << 20)).await;
    let mut talker = agent(&router, "talker").await;
    let (mut client, _) = Peer::hello(&router, Role::Client).await;
    client.send(submit("s1", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    let call = talker.expect(kind::DISPATCH).await.stream_id.to_string();
    disk.left.store(0, Ordering::SeqCst);
    until("warning", async || http(&router, "GET /readyz").await.0 == 503).await;
    let shows = async |wanted: &str| http(&router, "GET /metrics").await.1.as_str().is_some_and(|t| t.contains(wanted));
    until("a level above 0", async || shows("atp_log_room_level 1").await).await;
    until("all shards are served", async || shows("atp_shards_serving 64").await && shows("atp_shards 64").await).await;

    client.send(submit("s2", "talker")).await;
    let refused: WireError = client.expect(kind::ERROR).await.read().expect("an error");
    assert_eq!((refused.code, refused.judged), (Code::Log, false), "{refused}");
    let last = AgentFinal { text: Some("done".into()), ..AgentFinal::default() };
    talker.send(Frame::json(call.as_str(), 1, Flags::FIN, kind::RESULT_FINAL, &last)).await;
    let bill = loop {
        let frame = client.next().await.expect("open");
        if &*frame.kind == kind::BILL {
            break frame.read::<Bill>().expect("a bill");
        }
    };
    assert_eq!(bill.state, TaskState::Done);
    disk.left.store(64 << 20, Ordering::SeqCst);
    until("room again", async || http(&router, "GET /readyz").await.0 == 200).await;
    client.send(submit("s2", "talker")).await;
    client.expect(kind::ACCEPTED).await;
    router.stop().await.expect("seals");
}

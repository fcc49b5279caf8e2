//! What a handler sees of its meter, without any connection.
#![allow(clippy::unwrap_used)]

use atp_proto::content::{AgentError, AgentFinal, AgentPartial, Dispatch, Finish, Proof, UsageSource};
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Code, Cost, Tokens, UsdMicros};
use atp_sdk::{Offline, Outcome, StopReason, UNACKED_BYTES_MAX, Verdict};
use bytes::Bytes;

fn cost(out_tokens: u64, usd_micros: u64) -> Cost {
    Cost { in_tokens: Tokens(0), out_tokens: Tokens(out_tokens), usd_micros: UsdMicros(usd_micros) }
}

fn dispatch() -> Dispatch {
    let json = format!(
        r#"{{"call_id":"{}","shard":0,"epoch":1,"upstream_key":"k","grant":{{"tokens":10,"usd_micros":100}},"deadline_ms":1000}}"#,
        CallId([1; 10])
    );
    serde_json::from_str(&json).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_grant_holds_in_both_dimensions_at_n_and_n_plus_1() {
    let (call, _router) = Offline::call(dispatch());
    assert_eq!(call.meter.emit(None, None, cost(10, 100)), Verdict::Go);
    assert!(call.meter.fits(cost(10, 100)) && !call.meter.fits(cost(11, 1)) && !call.meter.fits(cost(1, 101)));
    assert_eq!(call.meter.emit(None, None, cost(11, 100)), Verdict::Stop(StopReason::Grant));
    let (call, router) = Offline::call(dispatch());
    assert_eq!(call.meter.emit(None, None, cost(10, 101)), Verdict::Stop(StopReason::Grant));
    router.grant(Amount::new(10, 101), true);
    assert!(call.meter.is_last_grant());
    assert_eq!(call.meter.verdict(), Verdict::Go);
    let over = Cost { in_tokens: Tokens(u64::MAX), out_tokens: Tokens(1), usd_micros: UsdMicros(0) };
    assert_eq!(call.meter.emit(None, None, over), Verdict::Stop(StopReason::Grant));
}

#[tokio::test(start_paused = true)]
async fn an_older_grant_that_comes_late_or_twice_takes_nothing_back() {
    let (call, router) = Offline::call(dispatch());
    router.grant(Amount::new(20, 300), true);
    for late in [Amount::new(15, 200), Amount::new(20, 299), Amount::new(19, 300)] {
        router.grant(late, false);
        assert_eq!((call.meter.grant(), call.meter.is_last_grant()), (Amount::new(20, 300), true));
    }
    router.grant(Amount::new(20, 301), false);
    assert_eq!((call.meter.grant(), call.meter.is_last_grant()), (Amount::new(20, 301), false));
}

#[tokio::test(start_paused = true)]
async fn a_total_never_falls() {
    let (call, router) = Offline::call(dispatch());
    for total in [5, 3, 7] {
        call.meter.emit(Some("x"), None, cost(total, 0));
    }
    router.conclude(Outcome::Final(AgentFinal { cost: cost(6, 0), ..AgentFinal::default() }));
    let frames = router.frames();
    let totals: Vec<u64> = frames[..3].iter().map(|f| f.read::<AgentPartial>().unwrap().cost.out_tokens.0).collect();
    assert_eq!(totals, [5, 5, 7]);
    assert_eq!(frames[3].read::<AgentFinal>().unwrap().cost, cost(7, 0));
}

#[tokio::test(start_paused = true)]
async fn a_report_may_undercut_what_was_counted() {
    let (call, router) = Offline::call(dispatch());
    call.meter.emit_counted(Some("x"), None, cost(9, 0));
    router.conclude(Outcome::Final(AgentFinal { cost: cost(6, 0), ..AgentFinal::default() }));
    let frames = router.frames();
    assert_eq!(frames[0].read::<AgentPartial>().unwrap().usage_source, UsageSource::Counted);
    assert_eq!(frames[1].read::<AgentFinal>().unwrap().cost, cost(6, 0));
}

#[tokio::test(start_paused = true)]
async fn the_backlog_is_bounded_and_stops_the_call() {
    let chunk = |n: usize| Bytes::from(vec![b' '; n]);
    let (call, router) = Offline::call(dispatch());
    // The frame around a content is counted once it is kept.
    assert_eq!(call.meter.emit_unchecked(chunk(UNACKED_BYTES_MAX)), Verdict::Go);
    assert_eq!(call.meter.emit_unchecked(chunk(1)), Verdict::Stop(StopReason::Backlog));
    assert_eq!(call.meter.stopped().await, StopReason::Backlog);
    router.conclude(Outcome::Final(AgentFinal { finish: Finish::Cancelled, ..AgentFinal::default() }));
    let last = router.frames().pop().unwrap();
    assert_eq!((&*last.kind, last.msg_seq), (kind::RESULT_FINAL, 2));

    let (call, _router) = Offline::call(dispatch());
    assert_eq!(call.meter.emit_unchecked(chunk(UNACKED_BYTES_MAX + 1)), Verdict::Stop(StopReason::Backlog));
}

#[tokio::test(start_paused = true)]
async fn an_acknowledgement_makes_room() {
    let (call, router) = Offline::call(dispatch());
    for _ in 0..2 {
        call.meter.emit_unchecked(Bytes::from(vec![b' '; 1024 * 1024]));
    }
    let room = call.meter.room();
    tokio::pin!(room);
    assert!(futures_util::FutureExt::now_or_never(room.as_mut()).is_none());
    assert!(!router.frames().is_empty());
    room.await;
}

#[tokio::test(start_paused = true)]
async fn proof_of_no_effect_does_not_survive_a_cost() {
    let refused = AgentError {
        code: Code::WindowAgent,
        message: String::new(),
        retry_after_ms: None,
        cost: None,
        proof: Some(Proof::NotCalled),
    };
    let (_call, router) = Offline::call(dispatch());
    router.conclude(Outcome::Error(refused.clone()));
    assert_eq!(router.frames()[0].read::<AgentError>().unwrap(), refused);
    let (call, router) = Offline::call(dispatch());
    call.meter.emit(Some("x"), None, cost(1, 0));
    router.conclude(Outcome::Error(refused));
    assert_eq!(router.frames()[1].read::<AgentError>().unwrap().proof, None);
}

#[tokio::test(start_paused = true)]
async fn a_call_without_events_stops_at_its_deadline() {
    let (call, _router) = Offline::call(dispatch());
    assert_eq!(call.meter.time_left().as_millis(), 1000);
    assert_eq!(call.meter.stopped().await, StopReason::Deadline);
    assert_eq!(call.meter.verdict(), Verdict::Stop(StopReason::Deadline));
    let (call, router) = Offline::call(dispatch());
    router.cancel();
    assert_eq!(call.meter.stopped().await, StopReason::Cancelled);
}

//! What must hold when it is over, whoever was killed: histories of clients, the wire, the providers' meters and the router's log
//! against each other.

use super::history::{billed, records, state, true_bill, true_sum};
use super::load::Told;
use super::process::Router;
use super::relay::Relay;
use super::wait_for;
use atp_proto::content::{Bill, CallState, Source};
use std::collections::BTreeMap;
use std::path::Path;

/// Log and live state agree; no call was dispatched twice over these wires or charged more than the `lines` of its script; whatever a client was
/// told stands.
///
/// # Panics
/// When one of these doesn't hold.
pub fn agree(router: &Router, wires: &[Relay], meters: &[&Path], told: &[Told], lines: u64) {
    router.settled();
    replays(router);

    let mut dispatches: BTreeMap<String, u32> = BTreeMap::new();
    for (call, times) in wires.iter().flat_map(Relay::dispatches) {
        *dispatches.entry(call).or_default() += times;
    }
    let again: Vec<_> = dispatches.iter().filter(|(_, times)| **times > 1).collect();
    assert!(again.is_empty(), "calls that were dispatched again: {again:?}");
    let truth = true_bill(meters.iter().copied());
    for (id, truth) in &truth {
        assert!(truth.lines <= lines, "{id} was called twice: {truth:?}");
    }
    for told in told.iter().filter(|told| told.refused.is_none()) {
        let (status, row) = router.http("GET", &format!("/v1/streams/{}", told.stream));
        assert_eq!(status, 200, "{} was acknowledged and is unknown", told.stream);
        assert_eq!(row["bill"]["settled"], serde_json::json!(told.bill().settled), "{}", told.stream);
    }
    let intents = records(&router.log()).iter().filter(|r| r["kind"] == "intent").count();
    println!("{} tasks, {intents} intents, {} dispatches, {} calls charged", told.len(), dispatches.len(), truth.len());
    assert!(intents >= dispatches.len(), "each dispatch has an intent");
}

/// The log, replayed, is the live state. Shards may still give each other's money back meanwhile: both are looked at until they
/// are at the same position.
///
/// # Panics
/// When they differ, or never rest.
pub fn replays(router: &Router) {
    let (live, replayed) = wait_for("log and live state at one position", || {
        let live = router.verify();
        let replayed = state(&router.log());
        (live["position"] == replayed["position"]).then_some((live, replayed))
    });
    assert_eq!(replayed["state_hash"], live["state_hash"], "replay and live state at {}", live["position"]);
}

/// Where every agent lived, each call on each bill is known to the micro-dollar, or proven to have had no effect; and nothing was
/// charged that stands on no bill.
///
/// # Panics
/// When one of these doesn't hold.
pub fn billed_as_charged(told: &[Told], meters: &[&Path]) {
    let bills: Vec<_> = told.iter().filter(|told| told.refused.is_none()).map(Told::bill).collect();
    bills_as_charged(&bills, meters);
}

/// As `billed_as_charged`; returns what all calls cost in micro-USD.
///
/// # Panics
/// As `billed_as_charged`.
pub fn bills_as_charged<'a>(bills: impl IntoIterator<Item = &'a Bill>, meters: &[&Path]) -> u64 {
    let truth = true_bill(meters.iter().copied());
    let calls = billed(bills);
    for (id, call) in &calls {
        match call.state {
            CallState::Void => assert!(!truth.contains_key(id), "{id} is void and was called"),
            CallState::Settled => {
                assert_eq!(call.source, Some(Source::Reported), "{id}: {call:?}");
                assert_eq!(call.actual.usd_micros.0, truth[id].usd_micros, "{id}: billed as charged");
            }
            other => panic!("{id} is {other:?} on a bill whose task has ended"),
        }
    }
    assert!(truth.keys().all(|id| calls.contains_key(id)), "a call that was charged stands in no bill");
    true_sum(&truth)
}

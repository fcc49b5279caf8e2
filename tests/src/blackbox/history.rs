//! What is left when it is over: the providers' true bill, the router's records, and what the two say about each other.

use super::atp;
use atp_proto::content::{Bill, BillCall};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// A line of a scripted agent's meter.
#[derive(Clone, Debug, Deserialize)]
pub struct Charge {
    pub call_id: String,
    pub in_tokens: u64,
    pub out_tokens: u64,
    pub usd_micros: u64,
}

/// What providers charged for one call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Truth {
    pub lines: u64,
    pub tokens: u64,
    pub usd_micros: u64,
}

/// The true bill by call, out of the meters' files; a line that a kill cut off isn't one.
///
/// # Panics
/// When a whole line isn't a charge.
#[must_use]
pub fn true_bill<'a>(meters: impl IntoIterator<Item = &'a Path>) -> BTreeMap<String, Truth> {
    let mut calls: BTreeMap<String, Truth> = BTreeMap::new();
    for meter in meters {
        let text = std::fs::read_to_string(meter).unwrap_or_default();
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let charge: Charge =
                serde_json::from_str(line).unwrap_or_else(|e| panic!("{}: {e}: {line}", meter.display()));
            let call = calls.entry(charge.call_id).or_default();
            call.lines += 1;
            call.tokens += charge.in_tokens + charge.out_tokens;
            call.usd_micros += charge.usd_micros;
        }
    }
    calls
}

/// Sum of the true bill in micro-USD.
#[must_use]
pub fn true_sum(calls: &BTreeMap<String, Truth>) -> u64 {
    calls.values().map(|truth| truth.usd_micros).sum()
}

/// The calls of many bills by id.
///
/// # Panics
/// When a call stands in two bills.
#[must_use]
pub fn billed<'a>(bills: impl IntoIterator<Item = &'a Bill>) -> BTreeMap<String, BillCall> {
    let mut calls = BTreeMap::new();
    for call in bills.into_iter().flat_map(|bill| &bill.calls) {
        let twice = calls.insert(call.call_id.to_string(), call.clone());
        assert!(twice.is_none(), "call {} stands in two bills", call.call_id);
    }
    calls
}

/// The records of a log by `atp replay --json`: kind, stream and record of each.
///
/// # Panics
/// When the log can't be read.
#[must_use]
pub fn records(log: &str) -> Vec<Value> {
    let output = atp::run(&["replay", "--log", log, "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// What `atp replay --state` rebuilds: all shards at the log's end.
#[must_use]
pub fn state(log: &str) -> Value {
    atp::run_json(&["replay", "--log", log, "--state"])
}

/// The hash of the state at a position of a log of one shard, by `atp replay --state`.
#[must_use]
pub fn state_hash(log: &str, position: u64) -> Value {
    let position = position.to_string();
    atp::run_json(&["replay", "--log", log, "--state", "--until", &position])["state_hash"].clone()
}

//! The provider's bill against the ledger: P <= S + R + K x reach for every call (so for every sum of calls), no
//! effect of what was voided or denied, and no outcome called unknown that was there to be known.

use super::ledger::{Pair, Phase, cost, fits, minus, plus};
use super::{Check, call_of};
use crate::simulation::process::Process;
use atp_core::record::{Entry, Key, Record, SourcePb};
use atp_proto::{Amount, CallId, Cost};

fn pair(a: Amount) -> Pair {
    [a.tokens.0.into(), a.usd_micros.0.into()]
}
pub(super) fn true_pair(c: Cost) -> Pair {
    [i128::from(c.in_tokens.0) + i128::from(c.out_tokens.0), c.usd_micros.0.into()]
}

/// The provider was called.
pub fn called(check: &mut Check, id: &CallId) {
    let call = call_of(&check.shards, id);
    let running = call.is_some_and(|c| c.intent.is_some());
    check.verdict.expect(running, "dispatch => durable Reserve and Intent", || format!("{id} took effect without"));
    let void = call.is_some_and(|c| c.phase == Phase::Void);
    check.verdict.expect(!void, "void => no effect ever", || format!("{id} took effect after its Void"));
    let denied = check.stream_of_call(id).is_some_and(|s| s.denied.is_some());
    check.verdict.expect(!denied, "deny => no effect ever", || format!("{id} took effect after a Deny"));
}

/// The provider billed more.
pub fn billed(check: &mut Check, id: &CallId) {
    let (Some(call), Some(known)) = (call_of(&check.shards, id), check.provider.calls.get(id)) else { return };
    let booked = match call.phase {
        Phase::Reserved | Phase::Running => plus(minus(call.hold, call.tools), call.reach),
        Phase::Settled => minus(call.actual, call.tools),
        Phase::Void => [0, 0],
    };
    let bound = plus(booked, pair(known.excess));
    let bill = true_pair(known.billed);
    check.verdict.expect(fits(bill, bound), "P <= S + R + K x reach", || {
        format!(
            "{id} is billed {bill:?}, {:?} at {booked:?} (hold {:?}, reach {:?})",
            call.phase, call.hold, call.reach
        )
    });
}

/// A durable entry ends calls: compare with the truth.
pub fn entry(position: u64, entry: &Entry, check: &mut Check, processes: &[Process], now_ms: u64) {
    for record in entry.records.iter().filter_map(|r| r.record.as_ref()) {
        match record {
            Record::Settle(r) => {
                let id = r.key.call(r.lane);
                billed(check, &id);
                if r.source() == SourcePb::Reported {
                    exact(check, &id, cost(&r.actual));
                }
                if matches!(r.source(), SourcePb::UnknownAtHold | SourcePb::Expired) {
                    was_knowable(check, &r.key, r.lane, processes, now_ms, position);
                }
            }
            Record::Adjust(r) => {
                let id = r.key.call(r.lane);
                billed(check, &id);
                exact(check, &id, cost(&r.actual));
            }
            Record::Void(r) => {
                let id = r.key.call(r.lane);
                let effects = check.provider.effects(&id);
                check.verdict.expect(effects == 0, "void => no effect ever", || {
                    format!("{id} was voided at {position} ({}), but the provider was called", r.proof().name())
                });
            }
            Record::Deny(r) => {
                let stream = check.ledgers().find_map(|ledger| ledger.streams.get(&r.key));
                let effects: u32 = stream.map_or(0, |s| s.calls.iter().map(|c| check.provider.effects(&c.id)).sum());
                check
                    .verdict
                    .expect(effects == 0, "deny => no effect ever", || format!("denied at {position} after an effect"));
            }
            _ => {}
        }
    }
}

/// Where usage was reported the bill is the true one, to the micro-dollar.
fn exact(check: &mut Check, id: &CallId, actual: Pair) {
    let Some(known) = check.provider.calls.get(id) else { return };
    let Some(reported) = known.reported else { return };
    let tools = call_of(&check.shards, id).map_or([0, 0], |c| c.tools);
    let off = minus(minus(actual, tools), true_pair(reported));
    check.verdict.expect(off == [0, 0], "reported usage is billed exactly", || {
        format!("{id} settled at {actual:?}, the agent reported {reported:?}")
    });
}

/// A call whose agent lives, is connected and knows it is never settled unknown.
fn was_knowable(check: &mut Check, key: &Key, lane: u32, processes: &[Process], now_ms: u64, position: u64) {
    let id = key.call(lane);
    let Some(call) = call_of(&check.shards, &id) else { return };
    let Some(process) = processes.iter().find(|p| p.plan.name.as_str() == call.agent) else { return };
    let same = call.intent.as_ref().is_some_and(|(incarnation, _)| *incarnation == process.incarnation());
    let there = process.alive && process.conn.is_some() && now_ms >= process.connected_at + check.patience_ms;
    // `ended_at`: it ended in time with a cost or a proof.
    let knows = process.calls.get(&id).is_some_and(|c| {
        c.ended_at.is_some_and(|at| now_ms >= at + check.patience_ms) || !c.done && !c.hung && now_ms < c.deadline_at
    });
    check.verdict.expect(!(same && there && knows), "a call that ended in time is never settled unknown", || {
        format!("{id} settled unknown at {position}, but {} ({}) has it", call.agent, process.incarnation())
    });
}

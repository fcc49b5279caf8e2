//! Money between shards: an account's home lends, others spend and give back. What schedules of faults do to it is the simulation's.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fan_out;
mod fleet;
mod pressure;

use atp_core::message::{Input, Machine};
use atp_core::record::Record;
use atp_core::settings::Per;
use atp_proto::AgentName;
use atp_proto::content::*;
use fleet::*;

const HOUR_MS: u64 = 3_600_000;

#[test]
fn a_task_away_from_home_spends_a_share_that_comes_back() {
    let mut fleet = Fleet::new(settings(100_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let id = fleet.stream_on(away).next().unwrap();
    fleet.submit(&id, true);
    assert_eq!(fleet.calls.len(), 1, "{:?}", fleet.to_client);
    let (limit, _, held, _) = fleet.account(away);
    assert!(held == 10 && limit > 10, "a share with some to spare: {held} of {limit}");
    assert_eq!(fleet.account(home), (100_000, 0, 0, limit));
    fleet.finish_all(9);
    assert_eq!(fleet.final_of(&id).unwrap().state, TaskState::Done);
    fleet.wait(15_000);
    assert_eq!(fleet.account(home), (100_000, 9, 0, 0), "idle shares go back");
    assert_eq!((fleet.records(away, "share_out"), fleet.records(away, "share_back")), (2, 2));
    assert!(fleet.shards[away as usize].state().holding().values().all(|line| line.out.is_empty()));
}

#[test]
fn who_can_t_be_paid_is_told_so_before_it_is_accepted_wherever_it_is() {
    let mut fleet = Fleet::new(settings(25, None));
    let (home, away, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    for shard in [away, other] {
        let id = fleet.stream_on(shard).next().unwrap();
        fleet.submit(&id, true);
    }
    assert_eq!(fleet.calls.len(), 2);
    fleet.finish_all(10);
    // 5 are left: a call is estimated at 10.
    for (n, wait) in [(1, true), (2, false), (3, true)] {
        let id = fleet.stream_on(fleet.away(n)).nth(1).unwrap();
        fleet.submit(&id, wait);
        fleet.wait(1_500);
        let error = fleet.refusal_of(&id).unwrap_or_else(|| panic!("shard {n}: {:?}", fleet.final_of(&id)));
        assert_eq!((error.code.as_str(), error.limit), ("EBUDGET", Some(25)), "{error}");
    }
    assert_eq!(fleet.account(home).1, 20);
}

#[test]
fn idle_shares_are_found_for_whoever_needs_them() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (away, other) = (fleet.away(1), fleet.away(2));
    // All of the money is lent out, bit by bit, and idle.
    for id in fleet.stream_on(away).take(60).collect::<Vec<_>>() {
        fleet.submit(&id, true);
    }
    fleet.finish_all(1);
    assert_eq!(fleet.runs, 60);
    for wait in [true, false] {
        let ids: Vec<String> = fleet.stream_on(other).skip(if wait { 0 } else { 40 }).take(40).collect();
        for id in &ids {
            fleet.submit(id, wait);
        }
        fleet.wait(1_000);
        assert!(ids.iter().all(|id| fleet.refusal_of(id).is_none()), "wait: {wait}");
        assert_eq!(fleet.calls.len(), 40);
        fleet.finish_all(1);
        assert!(ids.iter().all(|id| fleet.final_of(id).is_some_and(|f| f.state == TaskState::Done)));
    }
    fleet.wait(15_000);
    assert_eq!(fleet.account(fleet.home()), (1_000, 140, 0, 0));
}

#[test]
fn every_cent_can_be_spent_and_none_twice() {
    let mut fleet = Fleet::new(settings(500, None));
    let ids: Vec<String> = (0..SHARDS).flat_map(|n| fleet.stream_on(n).take(25).collect::<Vec<_>>()).collect();
    for id in &ids {
        fleet.submit(id, true);
    }
    for _ in 0..30 {
        fleet.wait(300);
        fleet.finish_all(10);
    }
    fleet.wait(61_000);
    assert_eq!(fleet.runs, 50, "500 buy 50 calls at 10");
    let done = ids.iter().filter(|id| fleet.final_of(id).is_some_and(|f| f.state == TaskState::Done)).count();
    assert_eq!(done, 50);
    assert_eq!(fleet.account(fleet.home()), (500, 500, 0, 0));
}

#[test]
fn a_shard_that_is_cut_off_spends_what_it_holds_and_no_more() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let ids: Vec<String> = fleet.stream_on(away).take(200).collect();
    fleet.submit(&ids[0], true);
    let (limit, ..) = fleet.account(away);
    fleet.cut.extend([(home, away), (away, home)]);
    ids[1..].iter().for_each(|id| fleet.submit(id, true));
    fleet.wait(2_000);
    // A running call keeps a quarter of its estimate free for its next slice.
    let bought = fleet.calls.len() as u64;
    assert!(bought <= limit / 10 && bought >= limit / 13, "{bought} of {limit}");
    assert_eq!(fleet.account(home).3, limit, "no time-out frees them");
    fleet.cut.clear();
    fleet.wait(3_000);
    assert!(fleet.calls.len() > 75, "{}", fleet.calls.len());
}

#[test]
fn calls_that_run_on_are_lent_to_together_and_keep_no_new_task_waiting() {
    const CALLS: usize = 30;
    let mut fleet = Fleet::new(settings(10_000_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let ids: Vec<String> = fleet.stream_on(away).take(CALLS + 1).collect();
    let (last, ids) = ids.split_last().unwrap();
    ids.iter().for_each(|id| fleet.submit(id, true));
    assert_eq!(fleet.calls.len(), CALLS);
    let calls: Vec<String> = fleet.calls.keys().cloned().collect();
    // Each asks for slices until nothing is left of the shares, and then at a time when the home hears nothing.
    fleet.cut.extend([(home, away), (away, home)]);
    let mut cost = 12;
    calls.iter().for_each(|call| fleet.say(call, cost));
    while fleet.account(away).2 + 2 < fleet.account(away).0 {
        cost += 2;
        calls.iter().for_each(|call| fleet.say(call, cost));
        assert!(cost < 1_000, "{:?}", fleet.account(away));
    }
    fleet.submit(last, true);
    assert_eq!(fleet.calls.len(), CALLS, "running calls come first");
    fleet.cut.clear();
    let before = fleet.records(home, "share");
    fleet.wait(2_500);
    let shares = fleet.records(home, "share") - before;
    assert!(shares <= 4, "all that wait are one wish: {shares} shares");
    assert_eq!(fleet.calls.len(), CALLS + 1, "the new task found money");
    // They go on, for as much again, out of what there was to spare.
    let (before, slices) = (fleet.records(home, "share"), fleet.records(away, "extend"));
    for _ in 0..40 {
        cost += 2;
        calls.iter().for_each(|call| fleet.say(call, cost));
    }
    let (shares, slices) = (fleet.records(home, "share") - before, fleet.records(away, "extend") - slices);
    assert!(slices >= CALLS && shares <= slices / 4, "{shares} shares for {slices} slices");
}

#[test]
fn a_running_call_of_one_shard_goes_before_new_ones_of_all_others() {
    let mut fleet = Fleet::new(settings(2_000, None));
    let (home, away, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    let ids: Vec<String> = fleet.stream_on(other).take(14).collect();
    let (first, rest) = ids.split_at(9);
    first.iter().for_each(|id| fleet.submit(id, true));
    assert_eq!((fleet.calls.len(), fleet.records(home, "share")), (9, 2), "one share for nearly all");
    let runs_on = fleet.first_call_on(away);
    // It takes what there is, in slices of 80 or more, and waits for more.
    let cost = fleet.run_on(&runs_on);
    rest.iter().for_each(|id| fleet.submit(id, true));
    fleet.stream_on(home).take(5).for_each(|id| fleet.submit(&id, true));
    fleet.wait(3_000);
    let (held, runs) = (fleet.account(away).2, fleet.calls.len());
    let calls = fleet.others(&runs_on);
    for (n, call) in calls.iter().enumerate() {
        fleet.finish(call, 4, Finish::Complete);
        if fleet.account(away).2 >= held + 80 {
            break;
        }
        assert_eq!(fleet.calls.len(), runs - n - 1, "a new call began with what a running one waits for");
        fleet.wait(200);
    }
    assert!(fleet.account(away).2 >= held + 80, "it has its slice, however many shares it came in");
    fleet.finish(&runs_on, cost, Finish::Complete);
    for _ in 0..5 {
        fleet.wait(1_000);
        fleet.finish_all(4);
    }
    assert_eq!(fleet.runs, 20, "{:?}", fleet.account(home));
}

#[test]
fn a_running_call_goes_before_new_ones_until_its_slice_is_whole() {
    let mut fleet = Fleet::new(settings(200, None));
    let (home, away, other, third) = (fleet.home(), fleet.away(1), fleet.away(2), fleet.away(3));
    // A share for each of these calls.
    for id in fleet.stream_on(other).take(6).collect::<Vec<_>>() {
        fleet.submit(&id, true);
        fleet.wait(300);
    }
    let runs_on = fleet.first_call_on(away);
    fleet.run_on(&runs_on);
    fleet.stream_on(third).take(5).for_each(|id| fleet.submit(&id, true));
    fleet.wait(3_000);
    // All of them come back in one breath.
    let begun = fleet.account(third).0;
    fleet.cut.insert((other, home));
    fleet.finish_others(&runs_on, 1);
    let out = fleet.records(other, "share_out");
    assert!(out >= 5, "{out} of {} shares were idle", fleet.records(other, "share_in"));
    fleet.cut.clear();
    fleet.wait(1_100);
    assert_eq!(fleet.account(third).0, begun, "nothing is lent for new calls");
    assert_eq!(fleet.account(away).2, 200 - 6, "all that is left");
}

#[test]
fn a_call_that_waits_in_a_full_window_keeps_nothing_of_the_next_one_waiting() {
    for n in [0, 1] {
        let mut tight = settings(40, None);
        tight.accounts.values_mut().for_each(|account| account.per = Per::Hour);
        let mut fleet = Fleet::new(tight);
        let (away, other) = (fleet.away(n), fleet.away(2));
        let to_the_end = HOUR_MS - fleet.now.wall_ms % HOUR_MS;
        fleet.wait(to_the_end - 10_000);
        let ids: Vec<String> = fleet.stream_on(away).take(2).collect();
        fleet.submit(&ids[0], true);
        let old = fleet.calls.keys().next().unwrap().clone();
        for cost in 10..45 {
            fleet.say(&old, cost);
        }
        let slices = fleet.records(away, "extend");
        assert!(fleet.account(away).2 == 40, "all of the window: {:?}", fleet.account(away));
        fleet.wait(15_000);
        assert!(fleet.calls.contains_key(&old), "it still runs");
        // In the next window calls begin, in this shard and another one, and get slices.
        fleet.submit(&ids[1], true);
        fleet.submit(&fleet.stream_on(other).next().unwrap(), true);
        fleet.wait(500);
        assert_eq!(fleet.calls.len(), 3, "{n}");
        let new = fleet.calls.iter().find(|(call, shard)| **shard == away && **call != old).unwrap().0.clone();
        (8..=12).for_each(|cost| fleet.say(&new, cost));
        assert!(fleet.records(away, "extend") > slices, "{n}");
    }
}

#[test]
fn what_running_calls_have_a_claim_on_does_not_go_to_and_fro() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (home, away) = (fleet.home(), fleet.away(2));
    let id = fleet.stream_on(fleet.away(1)).next().unwrap();
    fleet.submit(&id, true);
    // More than there is money for; what is left of it some are entitled to that run.
    fleet.stream_on(away).take(200).for_each(|id| fleet.submit(&id, true));
    let runs = fleet.calls.len();
    assert!(runs > 70, "{runs}");
    let before = fleet.records(home, "share");
    fleet.wait(10_000);
    let (shares, backs) = (fleet.records(home, "share") - before, fleet.records(away, "share_out"));
    assert!(shares <= 10 && backs <= 40, "{shares} shares, {backs} given back");
    assert!(fleet.calls.len() >= runs);
    for _ in 0..40 {
        fleet.finish_all(5);
        fleet.wait(1_000);
    }
    assert_eq!(fleet.runs, 200, "{:?}", fleet.account(home));
}

#[test]
fn a_call_that_waits_for_a_slice_gets_it_however_late_the_money_is_back() {
    let mut fleet = Fleet::new(settings(1_000, None));
    let (home, away) = (fleet.home(), fleet.away(1));
    let call = fleet.first_call_on(away);
    // The rest of the money is used elsewhere.
    for id in fleet.stream_on(fleet.away(2)) {
        let before = fleet.calls.len();
        fleet.submit(&id, true);
        if fleet.calls.len() == before {
            break;
        }
    }
    let mut cost = 0;
    while fleet.account(away).0 > fleet.account(away).2 || fleet.account(home).0 > fleet.account(home).3 {
        cost += 2;
        fleet.say(&call, cost);
        fleet.wait(300);
        assert!(cost < 1_000, "{:?} {:?}", fleet.account(away), fleet.account(home));
    }
    while cost < fleet.account(away).0 {
        cost += 2;
        fleet.say(&call, cost);
    }
    let before = fleet.records(away, "extend");
    // Nobody says anything for so long that its home has forgotten who asked.
    fleet.wait(8_000);
    assert_eq!(fleet.records(away, "extend"), before, "there is no money");
    fleet.cut.extend([(home, away), (away, home)]);
    fleet.finish_others(&call, 1);
    fleet.wait(8_000);
    fleet.cut.clear();
    fleet.wait(2_000);
    assert!(fleet.records(away, "extend") > before, "{:?} {:?}", fleet.account(away), fleet.account(home));
}

#[test]
fn owners_die_between_any_two_messages() {
    for n in 0..12 {
        let mut fleet = Fleet::new(settings(1_000, None));
        let (home, away) = (fleet.home(), fleet.away(1));
        let ids: Vec<String> = fleet.stream_on(away).take(6).collect();
        for (i, id) in ids.iter().enumerate() {
            match n % 3 {
                0 => fleet.cut.insert((home, away)),
                1 => fleet.cut.insert((away, home)),
                _ => false,
            };
            fleet.submit(id, true);
            if (n / 3) % 2 == 0 {
                fleet.restart(if i % 2 == 0 { home } else { away });
            } else {
                fleet.restart(if i % 2 == 0 { away } else { home });
            }
            fleet.cut.clear();
            // A new owner asks its agents; this one has nothing to say.
            fleet.to_agent.clear();
            fleet.wait(1_500);
        }
        fleet.finish_all(7);
        fleet.wait(90_000);
        let (limit, settled, held, lent) = fleet.account(home);
        assert_eq!((limit, held, lent), (1_000, 0, 0), "run {n}");
        let away_settled: u64 = fleet.account(away).1;
        assert_eq!(away_settled, 0);
        assert!(settled >= 7 * fleet.runs, "run {n}: {settled} of {} calls", fleet.runs);
    }
}

#[test]
fn calls_at_once_are_counted_over_all_shards() {
    let mut fleet = Fleet::new(settings(100_000, Some(5)));
    let ids: Vec<String> = (0..SHARDS).flat_map(|n| fleet.stream_on(n).take(5).collect::<Vec<_>>()).collect();
    for id in &ids {
        fleet.submit(id, true);
    }
    let mut most = 0;
    for _ in 0..200 {
        fleet.wait(300);
        most = most.max(fleet.calls.len());
        fleet.finish_all(1);
    }
    assert!(most <= 5, "{most} at once");
    assert_eq!(fleet.runs, 20);
}

#[test]
fn what_one_shard_learns_of_an_agent_all_know() {
    let mut fleet = Fleet::new(settings(100_000, None));
    for n in 0..3 {
        let id = fleet.stream_on(fleet.away(n)).next().unwrap();
        fleet.submit(&id, true);
        fleet.finish_all(4);
    }
    fleet.teach();
    let last = fleet.away(3);
    let id = fleet.stream_on(last).next().unwrap();
    fleet.submit(&id, true);
    let reserved = fleet.logs[last as usize].iter().flat_map(|e| &e.records).find_map(|r| match &r.record {
        Some(Record::Reserve(r)) => Some(r.calls[0].clone()),
        _ => None,
    });
    let call = reserved.expect("it was reserved");
    assert_eq!((call.source.as_str(), call.samples, call.mean.usd_micros), ("statistics", 3, 4));
}

#[test]
fn an_agent_s_home_lowers_its_tier_and_writes_down_who_is_drained() {
    let mut fleet = Fleet::new(settings(1_000_000, None));
    let home = fleet.settings.placement.home_of_agent(&AgentName::new("a"));
    for n in 0..12 {
        let id = fleet.stream_on(n % SHARDS).nth(n as usize).unwrap();
        fleet.submit(&id, true);
        fleet.finish_all(100);
    }
    fleet.teach();
    fleet.teach();
    let tiers: Vec<usize> = (0..SHARDS).map(|n| fleet.records(n, "tier")).collect();
    assert_eq!((tiers.iter().sum::<usize>(), tiers[home as usize]), (1, 1), "{tiers:?}");
    let agent = AgentName::new("a");
    fleet.shards[home as usize].handle(fleet.now, Input::DrainAgent { id: 1, agent, drained: true });
    fleet.run();
    assert_eq!((0..SHARDS).map(|n| fleet.records(n, "agent")).sum::<usize>(), 1, "its home writes it down");
    for n in 0..SHARDS {
        let id = fleet.stream_on(n).nth(50).unwrap();
        fleet.submit(&id, false);
        let error = fleet.refusal_of(&id).expect("nobody takes it");
        assert_eq!(error.code.as_str(), "EAGENTDOWN", "shard {n}: {error}");
    }
}

//! The lanes of one task and money between shards: none is dropped for what the home has, and nobody waits for a part of one.

use crate::fleet::*;
use atp_proto::content::*;
use atp_proto::{AgentName, Qos};

/// Agents at 0, 200, 700 and 850 a call, each with so many at once, beside the one at 10.
fn agents(usd_micros: u64, max_parallel: Option<u32>, slots: u32) -> Fleet {
    let mut fleet = Fleet::new(settings(usd_micros, max_parallel));
    for (name, usd_micros) in [("free", 0), ("mid", 200), ("dear", 700), ("dearer", 850)] {
        fleet.connect(name, usd_micros, slots);
    }
    fleet
}

/// 1,000, of which running calls of the home hold 10 each.
fn scarce(max_parallel: Option<u32>, running: usize) -> Fleet {
    let mut fleet = agents(1_000, max_parallel, 200);
    let home = fleet.home();
    (0..running).for_each(|n| submit(&mut fleet, Qos::Silver, home, n, &["a"]));
    assert_eq!(fleet.calls.len(), running);
    fleet
}

/// The shard's n-th stream, a lane for each of these agents.
fn submit(fleet: &mut Fleet, qos: Qos, shard: u32, nth: usize, agents: &[&str]) {
    let id = fleet.stream_on(shard).nth(nth).unwrap();
    fleet.submit_this(qos, &id, &task(agents));
}

fn task(agents: &[&str]) -> Submit {
    let agents = agents.iter().copied().map(AgentName::new).collect();
    Submit { task: "t".into(), agents, deadline_ms: Some(60_000), ..Submit::default() }
}

#[test]
fn no_lane_is_dropped_for_money_that_the_home_has() {
    for (limit, runs) in [(1_000_000, 2), (720, 2), (699, 1)] {
        for n in 0..SHARDS {
            // The first lane costs no money, so that what is lent for it has none to spare.
            let mut fleet = agents(limit, None, 200);
            let shard = fleet.away(n);
            submit(&mut fleet, Qos::Silver, shard, 0, &["free", "dear"]);
            fleet.wait(3_000);
            assert_eq!(fleet.calls.len(), runs, "shard {n} of {limit}");
        }
    }
}

#[test]
fn no_lane_is_dropped_for_calls_that_the_home_may_lend() {
    for (most, runs) in [(1, 1), (2, 2), (8, 2)] {
        let mut fleet = agents(1_000_000, Some(most), 200);
        let shard = fleet.away(1);
        submit(&mut fleet, Qos::Silver, shard, 0, &["free", "dear"]);
        fleet.wait(3_000);
        assert_eq!(fleet.calls.len(), runs, "max_parallel {most}");
    }
}

#[test]
fn all_lanes_find_the_last_of_the_money() {
    // A part of it is in their own shard, or idle in a third one. The first call costs 1.
    for n in [1, 2] {
        let mut fleet = agents(704, None, 200);
        let (at, before) = (fleet.away(1), fleet.away(n));
        submit(&mut fleet, Qos::Silver, before, 1, &["free"]);
        fleet.finish_all(0);
        submit(&mut fleet, Qos::Silver, at, 0, &["free", "dear"]);
        fleet.wait(3_000);
        assert_eq!(fleet.calls.len(), 2, "{n}: {:?} {:?}", fleet.account(at), fleet.account(before));
    }
    // It is in use until they have waited for long.
    let mut fleet = agents(704, None, 200);
    let (at, other) = (fleet.away(1), fleet.away(2));
    submit(&mut fleet, Qos::Silver, other, 0, &["dear"]);
    submit(&mut fleet, Qos::Silver, at, 0, &["dear", "free"]);
    fleet.wait(6_000);
    assert_eq!(fleet.calls.len(), 1, "it waits");
    fleet.finish_all(0);
    fleet.wait(3_000);
    assert_eq!(fleet.calls.len(), 2, "{:?}", fleet.account(at));
}

#[test]
fn a_fan_out_that_there_is_no_money_for_keeps_nobody_waiting_and_begins_in_its_turn() {
    for n in [1, 2] {
        let mut fleet = agents(1_000, None, 1);
        let (home, at, other) = (fleet.home(), fleet.away(n), fleet.away(3));
        // The call that begins in the next second.
        let begins = |fleet: &mut Fleet, nth: usize, shard: u32, agents: &[&str]| {
            let before = fleet.calls.clone();
            submit(fleet, Qos::Silver, shard, nth, agents);
            fleet.wait(1_000);
            fleet.calls.keys().find(|call| !before.contains_key(*call)).cloned()
        };
        let busy = begins(&mut fleet, 0, home, &["free"]).expect("it begins");
        begins(&mut fleet, 0, other, &["dear"]).expect("it begins");
        // Both of its agents are busy, and there is money for one.
        let recalls = fleet.recalls;
        assert_eq!(begins(&mut fleet, 0, at, &["free", "dear"]), None);
        fleet.wait(3_900);
        assert_eq!(fleet.recalls, recalls + 1, "others may need what is idle");
        fleet.wait(100);
        assert_eq!(fleet.recalls, recalls + 2, "after 5 s more may be idle");
        assert_eq!(begins(&mut fleet, 1, home, &["free"]), None);
        for (nth, shard) in [(2, home), (1, other), (3, home), (2, other)] {
            let call = begins(&mut fleet, nth, shard, &["a"]).expect("there is money for it");
            fleet.finish(&call, 10, Finish::Complete);
        }
        // What the home said of its money is long ago when the one slot is free again, and no word comes of it now.
        fleet.wait(500);
        fleet.cut.extend([(home, at), (at, home)]);
        fleet.finish(&busy, 0, Finish::Complete);
        let shards: Vec<u32> = fleet.calls.values().copied().collect();
        assert!(shards.contains(&at) && !shards.contains(&home), "{n}: {shards:?}");
    }
}

#[test]
fn a_fan_out_begins_with_what_there_is_while_idle_shares_are_wanted_back() {
    for (first, most) in [("a", None), ("free", None), ("a", Some(100)), ("free", Some(100))] {
        let mut fleet = scarce(most, 50);
        let (at, other) = (fleet.away(1), fleet.away(2));
        // Far more than is free: its home looks for it again and again.
        submit(&mut fleet, Qos::Bronze, other, 0, &["dearer"]);
        fleet.wait(1_000);
        for (nth, runs) in [(0, 51), (1, 53)] {
            submit(&mut fleet, Qos::Silver, at, nth, &[first, "dear"]);
            fleet.wait(1_500);
            assert_eq!(fleet.calls.len(), runs, "{first} {most:?}");
            submit(&mut fleet, Qos::Silver, at, nth + 2, &["a"]);
            fleet.wait(1_500);
        }
        assert!(fleet.records(at, "share_in") < 20, "{}", fleet.records(at, "share_in"));
    }
}

#[test]
fn a_fan_out_looks_for_more_beside_what_running_calls_have_a_claim_on() {
    let mut fleet = scarce(None, 50);
    let (at, other) = (fleet.away(1), fleet.away(2));
    let call = fleet.first_call_on(at);
    submit(&mut fleet, Qos::Bronze, other, 0, &["dearer"]);
    fleet.wait(1_000);
    for n in 1..20 {
        fleet.say(&call, 10 + 7 * n as u64);
        submit(&mut fleet, Qos::Silver, at, n, &["free", "dear"]);
        fleet.wait(300);
    }
    let shares = fleet.records(at, "share_in");
    assert!(shares < 60 && fleet.calls.len() > 60, "{shares} shares for {} calls", fleet.calls.len());
}

#[test]
fn the_second_lane_of_a_bronze_fan_out_does_not_go_before_silver() {
    for n in [0, 2] {
        let mut fleet = scarce(None, 20);
        let (at, waits) = (fleet.away(1), fleet.away(n));
        submit(&mut fleet, Qos::Silver, waits, 30, &["dearer"]);
        fleet.wait(1_000);
        for nth in 0..3 {
            submit(&mut fleet, Qos::Bronze, at, nth, &["free", "dear"]);
            fleet.wait(1_000);
        }
        assert!(fleet.account(at).2 < 700, "{:?}", fleet.account(at));
    }
}

#[test]
fn a_fan_out_gives_its_slot_back_for_money_once() {
    let mut fleet = agents(2_000, None, 1);
    let (home, at, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    submit(&mut fleet, Qos::Silver, home, 0, &["free"]);
    let mut busy = fleet.calls.keys().next().unwrap().clone();
    submit(&mut fleet, Qos::Silver, other, 0, &["dear"]);
    submit(&mut fleet, Qos::Silver, home, 1, &["free", "dear"]);
    for (nth, takes) in [(0, at), (1, home)] {
        submit(&mut fleet, Qos::Silver, at, nth, &["free"]);
        fleet.wait(6_300);
        // It has found all of its money; now somebody takes that, and then there is a slot.
        submit(&mut fleet, Qos::Silver, other, nth + 1, &["dearer"]);
        assert_eq!(fleet.calls.len(), 3);
        let before = fleet.calls.clone();
        fleet.cut.extend([(home, at), (at, home)]);
        fleet.finish(&busy, 0, Finish::Complete);
        fleet.cut.clear();
        let (call, shard) = fleet.calls.iter().find(|(call, _)| !before.contains_key(*call)).expect("a call begins");
        assert_eq!(*shard, takes);
        busy = call.clone();
        let dearer = fleet.calls.keys().find(|call| fleet.agent_of[*call].as_str() == "dearer").unwrap().clone();
        fleet.finish(&dearer, 0, Finish::Complete);
        fleet.wait(1_000);
    }
}

#[test]
fn no_money_for_a_second_lane_is_no_answer_to_anybody_else() {
    let mut fleet = agents(1_000, None, 1);
    let (home, at, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    submit(&mut fleet, Qos::Silver, home, 0, &["free"]);
    submit(&mut fleet, Qos::Silver, other, 0, &["dear"]);
    for nth in 0..3 {
        submit(&mut fleet, Qos::Silver, at, nth, &["free", "dear"]);
    }
    for n in 3..6 {
        // They have just been told that there is no more.
        fleet.wait(1_000);
        let id = fleet.stream_on(at).nth(n).unwrap();
        fleet.submit_this(Qos::Silver, &id, &Submit { wait: false, ..task(&["mid"]) });
        assert_eq!((fleet.calls.len(), fleet.refusal_of(&id)), (3, None));
        let call = fleet.calls.keys().find(|call| fleet.agent_of[*call].as_str() == "mid").unwrap().clone();
        fleet.finish(&call, 1, Finish::Complete);
    }
}

#[test]
fn a_fan_out_waits_for_the_calls_of_its_first_lane_only() {
    let mut fleet = agents(1_000_000, Some(4), 200);
    let (home, at) = (fleet.home(), fleet.away(1));
    submit(&mut fleet, Qos::Silver, at, 0, &["free"]);
    fleet.finish_all(0);
    (0..3).for_each(|nth| submit(&mut fleet, Qos::Silver, home, nth, &["a"]));
    // Its shard holds the fourth call, and no money.
    submit(&mut fleet, Qos::Silver, at, 1, &["mid", "dear", "dearer", "a"]);
    fleet.wait(1_000);
    assert_eq!(fleet.calls.len(), 4, "{:?}", fleet.account(at));
}

#[test]
fn each_fan_out_of_a_shard_finds_its_own_money() {
    let mut fleet = scarce(None, 20);
    let (home, at, other) = (fleet.home(), fleet.away(1), fleet.away(2));
    fleet.first_call_on(other);
    // Somebody doesn't say what is idle there. What the first one looks for isn't found; the others ask behind it.
    fleet.cut.insert((other, home));
    submit(&mut fleet, Qos::Bronze, at, 0, &["free", "dearer"]);
    (1..9).for_each(|nth| submit(&mut fleet, Qos::Gold, at, nth, &["free", "mid"]));
    fleet.wait(2_000);
    // What is left of 1,000 running calls have a claim on.
    let of = |name: &str| fleet.calls.keys().filter(|call| fleet.agent_of[*call].as_str() == name).count();
    assert_eq!((of("free"), of("mid"), of("dearer")), (10, 2, 0), "{:?}", fleet.account(home));
}

#[test]
fn who_can_t_be_paid_keeps_no_lane_of_a_higher_tier() {
    let mut fleet = scarce(None, 40);
    let (at, other) = (fleet.away(1), fleet.away(2));
    submit(&mut fleet, Qos::Bronze, other, 0, &["dearer"]);
    fleet.wait(1_000);
    for nth in 0..2 {
        submit(&mut fleet, Qos::Gold, at, nth, &["free", "mid"]);
        fleet.wait(1_000);
        assert_eq!(fleet.calls.len(), 42 + 2 * nth, "{:?} {:?}", fleet.account(fleet.home()), fleet.account(at));
    }
}

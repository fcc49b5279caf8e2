//! Who is shed and who gives way while gold waits (ATP-10-7 to 12-10).

use crate::house::{House, call, hurried, patient, settings};
use atp_core::settings::Settings;
use atp_proto::content::{Finish, Submit, TaskState};
use atp_proto::{Code, Limit, Qos, Tokens};

const GOLD: Qos = Qos::Gold;
const SILVER: Qos = Qos::Silver;
const BRONZE: Qos = Qos::Bronze;

fn any() -> Submit {
    patient(60_000)
}

/// An account with so many tokens, and one agent with slots for all.
fn short_of_money(tokens: u64) -> House {
    let mut settings = settings();
    settings.default_account.limit = Limit { tokens: Some(Tokens(tokens)), usd_micros: None };
    let mut house = House::new(settings);
    house.agent("a", 100, 99, false);
    house
}

/// Two agents, of which `a` has so many slots.
fn short_of_slots(slots: usize) -> House {
    let mut house = House::new(settings());
    house.agent("a", 10, slots, false);
    house.agent("b", 10, 99, false);
    house
}

fn preempted(house: &House, stream: &str) -> Option<u64> {
    let (at, error) = house.ended_with(stream)?;
    assert_eq!((error.code, error.scope), (Code::Preempt, Some(format!("stream:{stream}"))), "{stream}");
    assert_eq!(error.retry_after_ms, Some(1_000));
    Some(at)
}

#[test]
fn atp_10_8_the_oldest_bronze_gives_way_then_silver_and_gold_never() {
    let mut house = short_of_slots(4);
    for (stream, qos) in [("g0", GOLD), ("s0", SILVER), ("b1", BRONZE), ("b2", BRONZE)] {
        house.submit(1, stream, qos, &["a"], any());
    }
    house.until(100);
    for gold in ["g1", "g2", "g3", "g4"] {
        house.submit(1, gold, GOLD, &["a"], any());
    }
    house.until(2_099);
    assert_eq!(house.asked_to_stop, [], "limits.preempt_after is 2 s");
    house.until(2_100);
    // Each of the four that wait asks for one; there are three.
    assert_eq!(house.asked_to_stop, [call("b1", 1), call("b2", 1), call("s0", 1)]);
    assert_eq!(house.dispatched.len(), 4, "a request to stop frees nothing");
    house.until(2_500);
    house.end(call("b1", 1), 3, Finish::Cancelled);
    assert_eq!(preempted(&house, "b1"), Some(2_500));
    assert_eq!(house.dispatched.last(), Some(&call("g1", 1)), "its slot is gold's");
    house.end(call("b2", 1), 10, Finish::Complete);
    assert_eq!(house.answer("b2").unwrap().state, TaskState::Done, "it had come to its end");
    house.until(20_000);
    assert_eq!(preempted(&house, "s0"), Some(7_100), "the answer needn't wait for a call that won't stop");
    let golds = [call("g0", 1), call("g1", 1), call("g2", 1)];
    assert!(golds.iter().all(|c| !house.asked_to_stop.contains(c)), "{:?}", house.asked_to_stop);
}

#[test]
fn atp_10_8_one_task_at_a_time_gives_way_to_a_gold_one() {
    let mut house = short_of_money(250);
    house.submit(1, "b1", BRONZE, &["a"], any());
    house.submit(1, "b2", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], any());
    house.until(4_900);
    assert!(house.asked_to_stop.iter().all(|c| *c == call("b1", 1)), "{:?}", house.asked_to_stop);
    house.end(call("b1", 1), 10, Finish::Cancelled);
    assert_eq!(house.dispatched.last(), Some(&call("gold", 1)));
    house.until(30_000);
    assert!(!house.asked_to_stop.contains(&call("b2", 1)));
}

#[test]
fn atp_10_10_money_that_comes_back_is_golds_first() {
    let mut house = short_of_money(150);
    for (stream, qos) in [("first", GOLD), ("b", BRONZE), ("s", SILVER), ("g1", GOLD), ("g2", GOLD)] {
        house.submit(1, stream, qos, &["a"], any());
    }
    let order = ["first", "g1", "g2", "s", "b"].map(|stream| call(stream, 1));
    for (n, next) in order.into_iter().enumerate() {
        assert_eq!(house.dispatched[n], next);
        // Behind three runs the estimate is what they cost, and there is room for both that are left.
        assert_eq!(house.dispatched.len(), if n < 3 { n + 1 } else { 5 });
        house.end(next, 1, Finish::Complete);
    }
}

#[test]
fn atp_10_8_the_next_one_is_asked_when_the_first_does_not_stop() {
    let mut house = short_of_slots(2);
    house.submit(1, "b1", BRONZE, &["a"], any());
    house.submit(1, "b2", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], any());
    house.until(6_999);
    assert!(!house.asked_to_stop.contains(&call("b2", 1)), "5 s to end the call");
    house.until(8_000);
    assert!(house.asked_to_stop.contains(&call("b2", 1)));
}

#[test]
fn atp_10_7_new_bronze_is_shed_while_gold_waits_and_no_longer() {
    let mut house = short_of_slots(1);
    house.submit(1, "b0", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], any());
    house.until(1_999);
    house.submit(1, "before", BRONZE, &["a"], any());
    assert!(house.ended_with("before").is_none());
    house.until(2_000);
    house.submit(1, "b", BRONZE, &["a"], any());
    let (at, error) = house.ended_with("b").expect("refused");
    let facts = (at, error.code, error.scope.as_deref(), error.judged, error.retry_after_ms);
    assert_eq!(facts, (2_000, Code::Window, Some("qos:bronze"), false, Some(2_000)), "{error}");
    house.submit(1, "s", SILVER, &["a"], any());
    assert!(house.ended_with("s").is_none(), "silver is shed only once it has to give way");
    house.submit(1, "else", BRONZE, &["b"], any());
    house.submit(1, "any", BRONZE, &[], any());
    assert!(house.dispatched.ends_with(&[call("else", 1), call("any", 1)]), "nobody waits for that agent");
    // It doesn't stop: gold waits on.
    house.until(4_500);
    house.submit(1, "b", BRONZE, &["a"], any());
    assert_eq!(house.count("b"), 2);
    house.end(call("b0", 1), 1, Finish::Cancelled);
    assert_eq!(house.dispatched.last(), Some(&call("gold", 1)));
    house.until(5_999);
    house.submit(1, "b", BRONZE, &["a"], any());
    assert_eq!(house.count("b"), 3, "2 s after gold was last seen to wait");
    house.until(6_000);
    house.submit(1, "b", BRONZE, &["a"], any());
    assert_eq!(house.count("b"), 3, "nothing was judged: the same SYN is admitted now");
}

#[test]
fn atp_10_7_silver_is_shed_from_when_it_gives_way() {
    let mut house = short_of_slots(1);
    house.submit(1, "s0", SILVER, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], any());
    house.until(4_500);
    house.submit(1, "s", SILVER, &["a"], any());
    let (_, error) = house.ended_with("s").expect("refused");
    assert_eq!((error.scope.as_deref(), error.retry_after_ms), (Some("qos:silver"), Some(1_500)));
    house.submit(1, "g", GOLD, &["a"], any());
    assert!(house.ended_with("g").is_none());
}

#[test]
fn atp_10_7_what_another_account_lacks_sheds_nobody() {
    let mut settings = Settings { accounts: settings().accounts, ..settings() };
    settings.default_account.limit = Limit { tokens: Some(Tokens(100)), usd_micros: None };
    let mut house = House::new(settings);
    house.agent("a", 100, 99, false);
    house.submit(1, "b0", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], any());
    house.submit(1, "absent", GOLD, &["nobody"], any());
    house.until(3_000);
    house.submit(1, "b", BRONZE, &["a"], any());
    assert_eq!(house.ended_with("b").expect("refused").1.scope.as_deref(), Some("qos:bronze"));
    house.tenant = "other";
    house.submit(2, "b2", BRONZE, &["a"], any());
    house.submit(2, "b3", BRONZE, &["nobody"], any());
    assert!(house.ended_with("b2").is_none() && house.ended_with("b3").is_none());
}

#[test]
fn atp_10_9_gold_that_will_not_wait_presses_on_nobody() {
    let mut house = short_of_slots(1);
    house.submit(1, "b0", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["a"], hurried());
    house.until(10_000);
    assert_eq!(house.ended_with("gold").expect("refused").1.code, Code::Window);
    assert_eq!(house.asked_to_stop, []);
}

#[test]
fn atp_10_9_a_gold_task_for_an_agent_that_is_away_presses_on_nobody() {
    let mut house = short_of_slots(1);
    house.submit(1, "b0", BRONZE, &["a"], any());
    house.submit(1, "gold", GOLD, &["nobody"], any());
    house.until(10_000);
    house.submit(1, "b", BRONZE, &["a"], any());
    assert!(house.ended_with("b").is_none());
    assert_eq!(house.asked_to_stop, []);
}

//! Windows through the shard on a virtual clock (ATP-10): who is told what, and in which millisecond.

use crate::house::{House, call, hurried, patient, settings, window};
use atp_core::message::{Input, Machine};
use atp_proto::content::{Finish, Resume, Submit, WindowView};
use atp_proto::frame::{Flags, kind};
use atp_proto::{Code, ConnId, Frame, Limit, Qos, Tokens, UsdMicros};

const S: Qos = Qos::Silver;

fn calls(n: u32, tokens: u64) -> WindowView {
    window(Some(n), tokens)
}

/// A stream of so many lanes of so many tokens each, opened at 0 over connection 1.
fn opened(lanes: usize, tokens: u64) -> House {
    let mut house = House::new(settings());
    let names: Vec<String> = (1..=lanes).map(|n| format!("a{n}")).collect();
    names.iter().for_each(|name| house.agent(name, tokens, 4, false));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    house.submit(1, "s", S, &names, Submit::default());
    house
}

fn resume(stream: &str) -> Frame {
    Frame::json(stream, 0, Flags::SYN, kind::RESUME, &Resume { token: None, after: 0 })
}

#[test]
fn atp_10_2_a_fifth_goes_out_at_once_and_half_a_second_apart() {
    let mut house = opened(5, 100);
    house.until(1_500);
    // `accepted` said 100 calls and 1,000 tokens at 0.
    let mut expected = vec![(500, calls(95, 500))];
    assert_eq!(house.windows(1, "stream:s"), expected);
    house.end(call("s", 1), 0, Finish::Complete);
    expected.push((1_500, calls(96, 600)));
    assert_eq!(house.windows(1, "stream:s"), expected, "100 of 500 are 20 %");
    house.until(1_501);
    house.end(call("s", 2), 0, Finish::Complete);
    house.until(1_600);
    house.end(call("s", 3), 0, Finish::Complete);
    house.until(1_999);
    assert_eq!(house.windows(1, "stream:s"), expected, "a third more, but the last one is 499 ms old");
    house.until(5_000);
    expected.push((2_000, calls(98, 800)));
    assert_eq!(house.windows(1, "stream:s"), expected);
}

#[test]
fn atp_10_2_the_first_move_of_an_old_stream_is_told_at_once() {
    let mut house = House::new(settings());
    house.submit(1, "s", S, &["late"], Submit::default());
    house.until(3_000);
    assert_eq!(house.windows(1, "stream:s"), []);
    house.agent("late", 200, 1, false);
    assert_eq!(house.windows(1, "stream:s"), [(3_000, calls(99, 800))]);
}

#[test]
fn atp_10_3_small_steps_add_up_and_are_told_every_half_second() {
    let mut house = opened(10, 50);
    let mut expected = vec![(500, calls(90, 500))];
    let mut lane = 0;
    let mut step = |house: &mut House, at: u64, less: u64| {
        house.until(at);
        lane += 1;
        house.end(call("s", lane), 50 - less, Finish::Complete);
    };
    step(&mut house, 2_000, 40);
    step(&mut house, 2_100, 40);
    assert_eq!(house.windows(1, "stream:s"), expected, "540, 580: 16 %");
    step(&mut house, 2_200, 20);
    expected.push((2_200, calls(93, 600)));
    assert_eq!(house.windows(1, "stream:s"), expected, "together they are 20 %");
    // From here on it moves by less than 20 % of what was told.
    step(&mut house, 2_300, 40);
    step(&mut house, 2_750, 40);
    step(&mut house, 2_900, 40);
    step(&mut house, 3_350, 10);
    house.until(10_000);
    // Each 500 ms after the first change that wasn't told.
    expected.extend([(2_800, calls(95, 680)), (3_400, calls(97, 730))]);
    assert_eq!(house.windows(1, "stream:s"), expected);
}

#[test]
fn atp_10_2_a_fall_to_zero_waits_for_nothing() {
    let mut house = House::new(settings());
    house.agent("grows", 400, 1, true);
    house.submit(1, "s", S, &["grows"], Submit::default());
    house.until(600);
    assert_eq!(house.windows(1, "stream:s"), [(500, calls(99, 600))]);
    house.chunk(call("s", 1), 399);
    let zero = (600, calls(99, 0));
    assert_eq!(house.windows(1, "stream:s").last(), Some(&zero), "100 ms after the last one");
    house.until(650);
    house.end(call("s", 1), 900, Finish::Complete);
    house.until(9_000);
    assert_eq!(house.windows(1, "stream:s").last(), Some(&zero), "it has ended: nothing is told of it any more");
    assert_eq!(house.shard.poll_timeout().filter(|at| *at < 30_000), None, "and nothing looks at it");
}

#[test]
fn atp_10_1_an_accounts_window_goes_to_each_connection_once() {
    let mut house = House::new(settings());
    house.agent("a", 100, 9, false);
    house.submit(1, "s1", S, &["a"], Submit::default());
    house.submit(1, "s2", S, &["a"], Submit::default());
    house.until(100);
    house.submit(2, "s3", S, &["a"], Submit::default());
    house.until(700);
    let of = |house: &House, conn| house.windows(conn, "tenant:default");
    // Who begins to follow hears it at once; what moved since is 3 %.
    let tokens = |n| window(None, n);
    assert_eq!(of(&house, 1), [(0, tokens(10_000)), (500, tokens(9_700))]);
    assert_eq!(of(&house, 2), [(100, tokens(9_800)), (500, tokens(9_700))]);
    let on_connection = house.told.iter().filter(|(_, _, f)| &*f.kind == kind::WINDOW_UPDATE && f.stream_id.is_empty());
    assert_eq!(on_connection.count(), 4, "on stream \"\"");
    house.end(call("s3", 1), 100, Finish::Complete);
    house.end(call("s1", 1), 0, Finish::Complete);
    house.until(9_000);
    assert_eq!(of(&house, 2).len(), 2, "it follows nothing any more");
    assert_eq!(of(&house, 1).last(), Some(&(1_200, tokens(9_800))));
}

#[test]
fn atp_10_1_a_new_window_and_new_settings_move_an_account() {
    let mut house = House::new(settings());
    house.agent("a", 900, 9, false);
    for n in 0..5 {
        house.submit(1, &format!("s{n}"), S, &["a"], Submit::default());
    }
    house.until(39_999);
    let last = |house: &House| house.windows(1, "tenant:default").last().copied();
    assert_eq!(last(&house), Some((500, window(None, 5_500))));
    house.until(40_000);
    assert_eq!(last(&house), Some((40_000, window(None, 10_000))), "another minute");
    let mut other = settings();
    other.default_account.max_parallel = Some(5);
    house.until(41_000);
    house.set(other);
    assert_eq!(last(&house), Some((41_000, window(Some(0), 10_000))), "five are in flight");
}

#[test]
fn atp_10_4_who_follows_later_is_told_what_it_is_now() {
    let mut house = opened(5, 100);
    house.until(1_000);
    house.client(2, resume("s"));
    assert_eq!(house.windows(2, "stream:s"), [(1_000, calls(95, 500))]);
    assert_eq!(house.windows(2, "tenant:default"), [(1_000, window(None, 9_500))]);
    assert_eq!(house.windows(1, "stream:s").len(), 1, "the other one knows");
    house.input(Input::ConnGone { conn: ConnId(1) });
    house.input(Input::ConnGone { conn: ConnId(2) });
    house.end(call("s", 1), 0, Finish::Complete);
    house.restart();
    house.until(2_000);
    house.client(3, resume("s"));
    assert_eq!(house.windows(3, "stream:s"), [(2_000, calls(96, 600))], "from the log alone");
    house.until(2_100);
    house.client(1, resume("s"));
    house.client(1, resume("s"));
    assert_eq!(house.windows(1, "stream:s")[1..], [(2_100, calls(96, 600)); 2]);
    house.until(9_000);
    assert_eq!(house.windows(3, "stream:s").len(), 1, "nothing has moved since");
}

#[test]
fn atp_10_5_absent_is_no_limit_and_zero_is_none() {
    let mut settings = settings();
    settings.default_account.max_parallel = Some(1);
    settings.stream_window.max_parallel = None;
    let mut house = House::new(settings);
    house.agent("a", 1_000, 4, false);
    house.submit(1, "s", S, &["a"], Submit::default());
    house.until(1_000);
    let frames = house.told.iter().filter(|(_, _, f)| &*f.kind == kind::WINDOW_UPDATE);
    let said: Vec<&str> = frames.map(|(_, _, f)| std::str::from_utf8(&f.content).unwrap()).collect();
    assert_eq!(
        said,
        [
            r#"{"scope":"tenant:default","window":{"max_parallel":1,"max_tokens":10000}}"#,
            r#"{"scope":"stream:s","window":{"max_tokens":0}}"#,
            r#"{"scope":"tenant:default","window":{"max_parallel":0,"max_tokens":9000}}"#,
        ]
    );
    assert_eq!(house.windows(1, "stream:s")[0].0, 0, "a fall to zero, with what accepted it");
}

#[test]
fn atp_10_6_a_full_account_is_named_with_what_is_used() {
    let tokens = Limit { tokens: Some(Tokens(150)), usd_micros: None };
    let both = Limit { usd_micros: Some(UsdMicros(1_000)), ..tokens };
    for limit in [tokens, both] {
        let mut settings = settings();
        settings.default_account.limit = limit;
        let mut house = House::new(settings);
        house.agent("a", 100, 4, false);
        house.submit(1, "first", S, &["a"], Submit::default());
        house.submit(1, "hurried", S, &["a"], hurried());
        house.submit(1, "waits", S, &["a"], patient(3_000));
        house.until(4_000);
        let (at, error) = house.error("hurried");
        assert_eq!(
            (at, error.code, error.judged, error.scope.as_deref()),
            (0, Code::Window, true, Some("tenant:default"))
        );
        assert_eq!((error.used, error.limit, error.retry_after_ms), (Some(100), Some(150), Some(1_000)), "{error}");
        let (at, late) = house.error("waits");
        assert_eq!((at, late.code, late.scope.as_deref()), (3_000, Code::Window, Some("tenant:default")), "{late}");
        assert_eq!((late.used, late.limit, late.retry_after_ms), (Some(100), Some(150), Some(1_000)), "{late}");
    }
}

#[test]
fn atp_10_6_an_account_runs_n_calls_and_not_one_more() {
    let mut settings = settings();
    settings.default_account.max_parallel = Some(2);
    let mut house = House::new(settings);
    house.agent("a", 10, 9, false);
    house.submit(1, "s1", S, &["a"], hurried());
    house.submit(1, "s2", S, &["a"], hurried());
    house.submit(1, "s3", S, &["a"], hurried());
    house.submit(1, "s4", S, &["a"], Submit::default());
    assert_eq!(house.dispatched, [call("s1", 1), call("s2", 1)]);
    let (_, error) = house.error("s3");
    assert_eq!((error.code, error.scope.as_deref()), (Code::Window, Some("tenant:default")), "{error}");
    assert_eq!((error.used, error.limit, error.retry_after_ms), (Some(2), Some(2), Some(1_000)), "{error}");
    // What can never be paid is told so, however many calls are in flight.
    let broke = Submit { budget: Limit { tokens: Some(Tokens(9)), usd_micros: None }, ..Submit::default() };
    house.submit(1, "broke", S, &["a"], broke);
    assert_eq!(house.error("broke").1.code, Code::Budget);
    house.until(1_500);
    house.end(call("s1", 1), 10, Finish::Complete);
    assert_eq!(house.dispatched.last(), Some(&call("s4", 1)), "it waited for its turn");
}

#[test]
fn atp_10_6_a_busy_agent_is_named_at_once_and_at_the_deadline() {
    let mut house = House::new(settings());
    house.agent("a", 10, 1, false);
    house.submit(1, "first", S, &["a"], Submit::default());
    house.submit(1, "hurried", S, &["a"], hurried());
    house.submit(1, "waits", S, &["a"], patient(2_500));
    house.until(3_000);
    for (stream, when) in [("hurried", 0), ("waits", 2_500)] {
        let (at, error) = house.error(stream);
        assert_eq!((at, error.code, error.scope.as_deref()), (when, Code::Window, Some("agent:a")), "{error}");
        assert_eq!((error.used, error.limit, error.retry_after_ms), (Some(1), Some(1), Some(1_000)), "{error}");
    }
}

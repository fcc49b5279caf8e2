//! Where a handle counts that several routers speak of.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use atp_core::message::FromAgent;
use atp_core::whereabouts::{News, Whereabouts, Word};
use atp_proto::content::{AgentRoute, AgentStatus, Capabilities, RouteUpdate};
use atp_proto::{AgentName, Code};
use std::sync::Arc;

/// Far from the beginning of the clock.
const NOW: u64 = 1_000_000;

fn a() -> AgentName {
    AgentName::new("a")
}

fn up(incarnation: &str, status: Option<AgentStatus>) -> FromAgent {
    let capabilities = Capabilities { agent: a(), incarnation: incarnation.into(), ..Capabilities::default() };
    FromAgent::Up { agent: a(), capabilities: Arc::new(capabilities), status, drained: false }
}

fn down() -> FromAgent {
    FromAgent::Down { agent: a(), incarnation: "p1".into() }
}

fn status() -> FromAgent {
    FromAgent::Status { agent: a(), status: AgentStatus::default() }
}

fn route(incarnation: &str, connected_ms: u64, heard_ms: u64) -> AgentRoute {
    AgentRoute { agent_prefix: a(), incarnation: incarnation.into(), connected_ms, heard_ms }
}

fn says(w: &mut Whereabouts, router: &str, routes: &[AgentRoute], here: &[AgentRoute], now_ms: u64) -> News {
    let update = RouteUpdate { router_id: router.into(), agents: routes.to_vec() };
    w.update(router, &update, here, now_ms)
}

fn at(w: &Whereabouts) -> Option<String> {
    w.of(&a()).map(|far| far.router.to_string())
}

#[test]
fn only_the_router_that_it_came_to_last_speaks_for_it() {
    let mut w = Whereabouts::new("r1");
    assert!(matches!(w.hears("r2", &status(), None, NOW), Word::Void), "nobody said that it is there");
    assert!(matches!(w.hears("r2", &up("p1", None), None, NOW), Word::Counts));
    assert!(
        matches!(w.hears("r3", &up("p1", Some(AgentStatus::default())), None, NOW + 1), Word::Status { incarnation, .. } if &*incarnation == "p1")
    );
    // What the former router said last comes late.
    for late in [status(), down()] {
        assert!(matches!(w.hears("r2", &late, None, NOW + 2), Word::Void), "{late:?}");
    }
    assert_eq!(at(&w).as_deref(), Some("r3"));
    assert!(matches!(w.hears("r3", &status(), None, NOW + 2), Word::Status { .. }));
    // What it says of a call is the call's, whoever passes it on.
    let sent = FromAgent::Sent { agent: a(), call: atp_proto::CallId([7; 10]), epoch: 1 };
    assert!(matches!(w.hears("r2", &sent, None, NOW + 2), Word::Counts));
    assert!(matches!(w.hears("r3", &down(), None, NOW + 3), Word::Counts));
    assert_eq!(at(&w), None);
}

#[test]
fn another_process_does_not_get_a_handle_that_answers_here() {
    let mut w = Whereabouts::new("r1");
    assert!(matches!(w.hears("r2", &up("p2", None), Some("p1"), NOW), Word::Void));
    assert_eq!(at(&w), None);
    assert!(matches!(w.hears("r2", &up("p1", None), Some("p1"), NOW), Word::Counts), "the same one has moved");
    assert_eq!(at(&w).as_deref(), Some("r2"));
}

#[test]
fn atp_13_3_another_process_gets_a_handle_when_the_first_was_silent_for_15_s() {
    let mut w = Whereabouts::new("r1");
    says(&mut w, "r2", &[route("p1", 60_000, 1_000)], &[], NOW);
    for (after, may) in [(0, false), (13_999, false), (14_000, true)] {
        let answer = w.may_connect(&a(), "p2", NOW + after);
        assert_eq!(answer.is_ok(), may, "{after} ms");
        assert!(w.may_connect(&a(), "p1", NOW + after).is_ok(), "the same process may always move");
        if let Err(error) = answer {
            assert_eq!((error.code, error.scope.as_deref()), (Code::Sec, Some("agent:a")));
            assert!(error.message.contains("router r2"), "{error}");
        }
    }
    // It is heard again, and counts anew.
    says(&mut w, "r2", &[route("p1", 74_000, 0)], &[], NOW + 14_000);
    assert!(w.may_connect(&a(), "p2", NOW + 14_000).is_err());
}

#[test]
fn atp_13_3_the_same_process_is_where_it_connected_last() {
    for (here_ms, there_ms, leaves) in [(500, 400, true), (400, 500, false), (500, 500, false)] {
        let mut w = Whereabouts::new("r1");
        let news = says(&mut w, "r2", &[route("p1", there_ms, 0)], &[route("p1", here_ms, 0)], NOW);
        assert_eq!(news.elsewhere.len(), usize::from(leaves), "{here_ms} and {there_ms}");
        assert_eq!(at(&w).is_some(), leaves);
        if leaves {
            assert_eq!(news.elsewhere[0].1.code, Code::AgentDown);
        }
    }
    // Two routers that say the same agree on one of them.
    let mut w = Whereabouts::new("r2");
    assert_eq!(says(&mut w, "r1", &[route("p1", 500, 0)], &[route("p1", 500, 0)], NOW).elsewhere.len(), 1);
}

#[test]
fn atp_13_3_of_two_processes_the_first_that_answers_keeps_the_handle() {
    // Connected and unheard for so long: here, there; whether the one here must go.
    for ((here, silent), (there, dumb), leaves) in [
        ((9_000, 0), (1_000, 0), false),
        ((60_000, 14_999), (1_000, 0), false),
        ((60_000, 15_000), (1_000, 0), true),
        ((1_000, 0), (9_000, 0), true),
        ((1_000, 0), (60_000, 14_999), true),
        ((1_000, 0), (60_000, 15_000), false),
    ] {
        let mut w = Whereabouts::new("r1");
        let news = says(&mut w, "r2", &[route("p2", there, dumb)], &[route("p1", here, silent)], NOW);
        assert_eq!(news.elsewhere.len(), usize::from(leaves), "{here} {silent}, {there} {dumb}");
        assert!(news.elsewhere.iter().all(|(_, error)| error.code == Code::Sec));
    }
}

#[test]
fn an_update_says_who_has_come_and_who_is_gone() {
    let mut w = Whereabouts::new("r1");
    let come = says(&mut w, "r2", &[route("p1", 100, 0)], &[], NOW).come;
    assert_eq!(come, [a()]);
    assert!(says(&mut w, "r2", &[route("p1", 5_100, 0)], &[], NOW + 5_000).come.is_empty(), "known already");
    // Another router speaks of an older connection; then of a newer one.
    assert!(says(&mut w, "r3", &[route("p1", 6_000, 0)], &[], NOW + 5_000).come.is_empty());
    assert_eq!(at(&w).as_deref(), Some("r2"));
    assert_eq!(says(&mut w, "r3", &[route("p1", 10, 0)], &[], NOW + 5_000).come, [a()]);
    assert_eq!(at(&w).as_deref(), Some("r3"));
    // The former one doesn't name it any more, and is lost.
    assert!(says(&mut w, "r2", &[], &[], NOW + 6_000).gone.is_empty() && w.lost("r2").is_empty());
    assert_eq!(says(&mut w, "r3", &[], &[], NOW + 6_000).gone, [(a(), "p1".to_owned())]);
    says(&mut w, "r3", &[route("p2", 0, 0)], &[], NOW + 7_000);
    assert_eq!(w.lost("r3"), [(a(), "p2".to_owned())]);
    w.hears("r3", &up("p2", None), None, NOW);
    w.is_here(&a());
    assert_eq!((at(&w), w.agents().count()), (None, 0));
}

#[test]
fn who_connected_before_this_router_began_is_ordered_too() {
    let mut w = Whereabouts::new("r1");
    says(&mut w, "r2", &[route("p1", 90_000, 20_000)], &[], 5);
    assert_eq!(w.of(&a()).unwrap().unheard_ms(5), 20_000);
    assert_eq!(says(&mut w, "r3", &[route("p1", 80_000, 0)], &[], 5).come, [a()]);
    assert_eq!(at(&w).as_deref(), Some("r3"));
}

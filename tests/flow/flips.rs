//! An agent that says something else of itself each second while tasks stream through it, and a steady one beside it.

use crate::alone;
use crate::sender::{self, Planned};
use crate::worker::Worker;
use atp_proto::content::{AgentStatus, CallState, Status, Submit, TaskState};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Flags, Frame, Qos};
use atp_tests::blackbox::history::billed;
use atp_tests::blackbox::process::Router;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const TURN: Duration = Duration::from_secs(1);
const TURNS: [(Status, &str); 4] =
    [(Status::Ready, "READY"), (Status::Pause, "PAUSE"), (Status::Busy, "BUSY"), (Status::Draining, "DRAINING")];
const ROUNDS: usize = 3;
/// What was on its way to the log when an agent said PAUSE or DRAINING may leave for this long (ATP-8-9).
const GRACE: Duration = Duration::from_millis(250);
const TASKS: u32 = 360;

/// Says a status and works through its second. Once the router shows that it knows of a PAUSE or DRAINING, and the grace has
/// passed since, a heartbeat is sent: what arrives behind its answer wasn't in the socket before. True if it was answered.
fn turn(router: &Router, worker: &mut Worker, (status, name): (Status, &str)) -> bool {
    let said = AgentStatus { status, reason: Some("flip".into()), ..AgentStatus::default() };
    worker.peer.send(&Frame::json("", 0, Flags::NONE, kind::STATUS, &said));
    let stops = matches!(status, Status::Pause | Status::Draining);
    let end = Instant::now() + TURN;
    let (mut known, mut marked, mut shut) = (None, false, None);
    while Instant::now() < end {
        if stops && known.is_none() {
            let (_, row) = router.http("GET", "/v1/agents/flips");
            known = (row["agents"][0]["status"] == name).then(Instant::now);
        }
        if !marked && known.is_some_and(|at| at.elapsed() > GRACE) {
            worker.peer.send(&Frame::heartbeat(false));
            marked = true;
        }
        if let Some(frame) = worker.step(Duration::from_millis(20))
            && frame.flags.has(Flags::HB)
        {
            match frame.flags.has(Flags::ACK) {
                true if marked => shut = shut.or(Some(worker.seen.len())),
                true => {}
                false => worker.peer.send(&Frame::heartbeat(true)),
            }
        }
        assert!(shut.is_none_or(|n| n == worker.seen.len()), "dispatched behind the grace of {name}");
    }
    shut.is_some()
}

#[test]
fn an_agent_that_flips_each_second_loses_no_task() {
    let _alone = alone();
    let router = Router::start("log: {durability: async}\naccounts: {default: {usd: 1000, per: total}}");
    let over = AtomicBool::new(false);
    let service = Duration::from_millis(60);
    let (flips, steady, told) = std::thread::scope(|scope| {
        let flips = scope.spawn(|| {
            let mut worker = Worker::new(router.atp(), "flips", 4, service);
            // Its heartbeats are the marks.
            worker.peer.beats = false;
            let shut = (0..ROUNDS).flat_map(|_| TURNS).filter(|t| turn(&router, &mut worker, *t)).count();
            while !over.load(Ordering::Relaxed) || !worker.is_idle() {
                turn(&router, &mut worker, TURNS[0]);
            }
            (worker, shut)
        });
        let steady = scope.spawn(|| {
            let mut worker = Worker::new(router.atp(), "steady", 2, service);
            while !over.load(Ordering::Relaxed) || !worker.is_idle() {
                worker.step(Duration::from_millis(100));
            }
            worker
        });
        ["flips", "steady"].iter().for_each(|name| router.has_agent(name));
        let plan = (0..TASKS).map(|n| Planned {
            at: TURN * (ROUNDS * TURNS.len()) as u32 * n / TASKS,
            name: format!("t-{n}"),
            qos: Qos::Silver,
            // Two thirds go to whoever is free, the others wait for the one that flips.
            content: Submit {
                task: format!("t-{n}"),
                agents: if n % 3 == 0 { vec![AgentName::new("flips")] } else { Vec::new() },
                ..Submit::default()
            },
        });
        let told = sender::run(router.atp(), Instant::now(), plan.collect());
        router.settled();
        over.store(true, Ordering::Relaxed);
        (flips.join().expect("the agent that flips"), steady.join().expect("the steady agent"), told)
    });
    let (flips, shut) = flips;
    println!("{} calls on the one that flips, {} on the steady one", flips.seen.len(), steady.seen.len());
    assert!(shut > 0, "nothing was seen of the router behind a grace");
    assert!(flips.seen.len() > TASKS as usize / 3 && !steady.seen.is_empty(), "both had work");

    for (name, told) in &told {
        assert!(told.refused.is_none(), "{name}: {:?}", told.refused);
        let answer = told.answer.as_ref().expect("an answer");
        assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{name}");
        let bill = told.bill.as_ref().expect("a bill");
        let settled = bill.calls.iter().filter(|c| c.state == CallState::Settled).count();
        let void = bill.calls.iter().filter(|c| c.state == CallState::Void).count();
        assert_eq!((settled, void), (1, bill.calls.len() - 1), "{name}: {bill:?}");
    }
    assert_eq!(told.len(), TASKS as usize);
    let calls = billed(told.values().filter_map(|t| t.bill.as_ref()));
    let ours: BTreeMap<String, u64> = calls
        .iter()
        .filter(|(_, c)| c.state == CallState::Settled)
        .map(|(id, c)| (id.clone(), c.actual.usd_micros.0))
        .collect();
    let theirs: BTreeMap<String, u64> =
        flips.billed.iter().chain(&steady.billed).map(|(id, cost)| (id.to_string(), cost.usd_micros.0)).collect();
    assert_eq!(ours, theirs, "what the agents billed is what is billed");
}

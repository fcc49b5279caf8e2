//! The run that is swept: a few tasks of every kind, two agents that live through it, and a router that is killed at one point
//! of it. What is left is judged.

use crate::strace::{self, Attached};
use atp_proto::content::{Submit, TaskState};
use atp_proto::{AgentName, Code, Limit, UsdMicros};
use atp_tests::blackbox::load::{Told, follow};
use atp_tests::blackbox::process::{Router, Scripted};
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::verdict;
use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::str::FromStr;
use std::time::Duration;

/// Where the router is killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) phase: Phase,
    pub(crate) call: String,
    /// From 1.
    pub(crate) n: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Counted from the first task on.
    Serving,
    /// Counted from the start of the process, on the log of a router that was killed in the middle of it all.
    Starting,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = if self.phase == Phase::Serving { "serving" } else { "starting" };
        write!(f, "{phase}:{}:{}", self.call, self.n)
    }
}

impl FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` isn't like serving:pwrite64:17 or starting:fsync:2");
        let mut parts = text.split(':');
        let phase = match parts.next() {
            Some("serving") => Phase::Serving,
            Some("starting") => Phase::Starting,
            _ => return Err(wrong()),
        };
        let call = parts.next().filter(|call| strace::CALLS.contains(call)).ok_or_else(wrong)?.to_owned();
        let n = parts.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0).ok_or_else(wrong)?;
        Ok(Self { phase, call, n })
    }
}

const CONFIG: &str = "accounts: {default: {usd: 1000, per: total}}
tasks: {retries: 8, deadline: 170s}
limits: {segment_bytes: 1048576}
";

/// Costs more than it says, so that its grant grows while it runs.
const SCRIPT: &str = "models: [{id: m1, in_usd_per_mtok: 1.00, out_usd_per_mtok: 4.00}]
max_parallel: 4
estimate: {mode: declared, in_tokens: 100, out_tokens: 20}
calls:
  - chunks: [{after: 5ms, repeat: 6, text: \"word \", out_tokens: 30}]
    final: {text: \"end\", in_tokens: 80}
";
/// Lines that one call leaves on its provider's meter: its chunks and its final.
const LINES: u64 = 7;
/// Frames on the agents' wire after which a run is in the middle.
const MIDDLE: u64 = 24;

/// The task that can't be paid.
const POOR: usize = 3;

fn tasks() -> Vec<Submit> {
    let task = |n: u32| Submit { task: format!("task {n}"), ..Submit::default() };
    let one = |n: u32, name: &str| Submit { agents: vec![AgentName::new(name)], ..task(n) };
    let poor = Limit { usd_micros: Some(UsdMicros(1)), tokens: None };
    vec![
        one(0, "one"),
        one(1, "two"),
        Submit { fanout: Some(2), ..task(2) },
        Submit { budget: poor, ..task(3) },
        task(4),
    ]
}

/// What a run is for.
pub(crate) enum Aim<'a> {
    Kill(&'a Point),
    /// Nobody is killed there: the calls of this phase are counted.
    Count(Phase),
}

/// Plays once; true: the router was killed at the point. With [`Aim::Count`] the counts.
///
/// # Panics
/// When what is left doesn't hold.
pub(crate) fn run(aim: &Aim<'_>) -> (bool, BTreeMap<String, u64>) {
    let mut router = Router::prepare(CONFIG);
    router.restart_under(&strace::ALONE).expect("the router serves");
    let file = router.dir().join("calls");
    let relay = Relay::to(router.atp());
    let agents = ["one", "two"].map(|name| Scripted::start(router.dir(), name, relay.address(), SCRIPT));
    ["one", "two"].iter().for_each(|name| router.has_agent(name));
    let tracer = match aim {
        Aim::Kill(Point { phase: Phase::Serving, call, n }) => Some(Attached::killing(router.pid(), call, *n)),
        Aim::Count(Phase::Serving) => Some(Attached::counting(router.pid(), &file)),
        Aim::Kill(_) | Aim::Count(Phase::Starting) => None,
    };
    let starting = match aim {
        Aim::Kill(Point { phase: Phase::Starting, call, n }) => Some(strace::wrapper(call, *n)),
        Aim::Count(Phase::Starting) => Some(strace::counter(&file)),
        Aim::Kill(_) | Aim::Count(Phase::Serving) => None,
    };
    let atp = router.atp();
    let mut killed = false;
    let told: Vec<Told> = std::thread::scope(|scope| {
        // Two at a time: what is written at once differs little from run to run.
        let client = |first: usize| {
            let mine = tasks().into_iter().enumerate().skip(first).step_by(2);
            mine.map(|(n, task)| (n, follow(atp, &format!("key-{n}"), &task))).collect::<BTreeMap<_, _>>()
        };
        let clients: Vec<_> = (0..2).map(|first| scope.spawn(move || client(first))).collect();
        if let Some(wrapper) = starting {
            let over = || clients.iter().all(std::thread::ScopedJoinHandle::is_finished);
            relay.wait_for(relay.frames() + MIDDLE, over);
            router.kill();
            let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
            if router.restart_under(&wrapper).is_err() {
                while !fell(&mut router) {
                    std::thread::park_timeout(Duration::from_millis(2));
                }
                killed = true;
                router.restart_under(&strace::ALONE).expect("the router serves");
            }
        }
        while !clients.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            if fell(&mut router) {
                killed = true;
                router.restart_under(&strace::ALONE).expect("the router serves");
            }
            std::thread::park_timeout(Duration::from_millis(2));
        }
        let told: BTreeMap<_, _> = clients.into_iter().flat_map(|client| client.join().expect("a client")).collect();
        told.into_values().collect()
    });
    drop(tracer);
    strace::let_go(router.pid());
    // A kill that was on its way when the tracer was let go may still come.
    while let Err(panic) = catch_unwind(AssertUnwindSafe(|| judge(&router, &relay, &agents, &told))) {
        let late = (0..500).any(|_| {
            std::thread::park_timeout(Duration::from_millis(2));
            fell(&mut router)
        });
        if !late {
            resume_unwind(panic);
        }
        killed = true;
        router.restart_under(&strace::ALONE).expect("the router serves");
    }
    (killed, strace::counts(&file))
}

/// True once the router was killed.
fn fell(router: &mut Router) -> bool {
    if strace::is_dead(router.pid()) {
        strace::let_go(router.pid());
    }
    router.was_killed()
}

fn judge(router: &Router, relay: &Relay, agents: &[Scripted], told: &[Told]) {
    let meters: Vec<_> = agents.iter().map(Scripted::meter).collect();
    verdict::agree(router, std::slice::from_ref(relay), &meters, told, LINES);
    verdict::billed_as_charged(told, &meters);
    for (n, told) in told.iter().enumerate() {
        let (state, code) = match &told.refused {
            Some(error) => (TaskState::Refused, Some(error.code)),
            None => (told.answer().state, told.answer().error.map(|error| error.code)),
        };
        let allowed = match (n, state) {
            // It waits for agents that are away, and learns its price when they are back.
            (POOR, TaskState::Refused | TaskState::Failed) => code == Some(Code::Budget),
            (POOR, _) => false,
            (_, TaskState::Done) => code.is_none(),
            // While the router is away nobody extends a grant: its agent ends the call there.
            (_, TaskState::Provisional) => code == Some(Code::Budget),
            _ => false,
        };
        assert!(allowed, "task {n} ended {state:?} {code:?}");
    }
}

//! The rules of `docs/protocol.md` over TCP against the real binary. Each test's name carries the number of its rule.
//! Most tests share one router process; a test that needs its own settings starts its own.

mod agents;
mod duplicates;
mod estimates;
#[path = "../fleet/fleet.rs"]
#[allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]
mod fleet;
mod flow;
mod fragments;
mod frames;
mod money;
mod peers;
mod refusals;
mod sessions;
mod streams;
mod tools;
mod windows;

use atp_proto::content::{AgentFinal, AgentPartial, Bill};
use atp_proto::frame::kind;
use atp_proto::{CallId, Cost, Flags, Frame, Tokens, UsdMicros};
use atp_tests::blackbox::peer::{Peer, capabilities, submit, task};
use atp_tests::blackbox::process::Router;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Open streams of one connection, in the shared router.
const STREAMS: usize = 40;

/// The shared router; it ends with the last test that uses it.
fn shared() -> Arc<Router> {
    static SHARED: Mutex<Weak<Router>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let yaml = "log: {durability: async}\naccounts: {default: {usd: 1000000, per: total}}\n";
        let router = Arc::new(Router::start(&format!("{yaml}limits: {{streams_per_connection: {STREAMS}}}")));
        *shared = Arc::downgrade(&router);
        router
    })
}

/// An agent that is ready for dispatches.
fn agent(router: &Router, name: &str) -> Peer {
    let agent = Peer::agent(router.atp(), &capabilities(name));
    router.has_agent(name);
    agent
}

/// 10 tokens in, `out` out, at the model's price.
fn cost(out: u64) -> Cost {
    Cost { in_tokens: Tokens(10), out_tokens: Tokens(out), usd_micros: UsdMicros(10 + 4 * out) }
}

fn partial(call: CallId, seq: u64, text: &str, out: u64) -> Frame {
    let content = AgentPartial { text: Some(text.into()), cost: cost(out), ..AgentPartial::default() };
    Frame::json(call.to_string(), seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

fn last(call: CallId, seq: u64, out: u64) -> Frame {
    let content = AgentFinal { text: Some("end".into()), cost: cost(out), ..AgentFinal::default() };
    Frame::json(call.to_string(), seq, Flags::FIN, kind::RESULT_FINAL, &content)
}

/// Plays one task of `stream` to its end and returns the numbered frames that the client saw.
fn whole_task(client: &mut Peer, agent: &mut Peer, name: &str, stream: &str) -> Vec<Frame> {
    client.send(&submit(stream, &task(name)));
    let call = agent.dispatched().call_id;
    agent.send(&partial(call, 1, "one ", 5));
    agent.send(&partial(call, 2, "two ", 10));
    agent.send(&last(call, 3, 15));
    client.to_the_bill(stream)
}

fn bill(frames: &[Frame]) -> Bill {
    frames.last().expect("a bill").read().expect("a bill")
}

fn kinds(frames: &[Frame]) -> Vec<&str> {
    frames.iter().map(|f| &*f.kind).collect()
}

/// A router's address, for tests that speak before they say hello.
fn dial(address: SocketAddr) -> Peer {
    Peer::dial(address).expect("the router listens")
}

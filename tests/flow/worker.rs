//! The provider's side: an agent that takes each call it is sent, works on it for a while and bills it. It keeps the order in
//! which dispatches came, how many calls ran at once, and its own sum. It never decides anything for the router.

use atp_proto::content::{AgentCancel, AgentFinal, Capabilities, Dispatch};
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Cost, Flags, Frame, Tokens, UsdMicros};
use atp_tests::blackbox::peer::{Peer, capabilities};
use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A call that an agent was given.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) task: String,
    pub(crate) at: Instant,
}

/// 10 tokens in and 15 out, at 1 and 4 USD per million.
pub(crate) const BILL: Cost = Cost { in_tokens: Tokens(10), out_tokens: Tokens(15), usd_micros: UsdMicros(70) };

pub(crate) struct Worker {
    pub(crate) peer: Peer,
    service: Duration,
    due: BTreeSet<(Instant, CallId)>,
    /// Calls in the order in which they came.
    pub(crate) seen: Vec<Seen>,
    /// What it has billed by call.
    pub(crate) billed: BTreeMap<CallId, Cost>,
    pub(crate) most_at_once: usize,
    /// Calls that it was asked to stop.
    pub(crate) cut: u32,
}

impl Worker {
    pub(crate) fn new(router: SocketAddr, name: &str, slots: u32, service: Duration) -> Self {
        let peer = Peer::agent(router, &Capabilities { max_parallel: slots, ..capabilities(name) });
        let (due, seen, billed) = (BTreeSet::new(), Vec::new(), BTreeMap::new());
        Self { peer, service, due, seen, billed, most_at_once: 0, cut: 0 }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.due.is_empty()
    }

    /// Ends what is due, then waits for one frame, at most until the next call is due or `patience` is over. A dispatch is
    /// worked on; any other frame is returned.
    pub(crate) fn step(&mut self, patience: Duration) -> Option<Frame> {
        let now = Instant::now();
        while let Some((due, call)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, call));
            self.finish(call);
        }
        let next = self.due.first().map_or(patience, |(due, _)| (*due - now).min(patience));
        let frame = match self.peer.try_next(next.max(Duration::from_millis(1))) {
            Ok(frame) => frame.expect("the router doesn't close"),
            Err(e) if e.kind() == ErrorKind::TimedOut => return None,
            Err(e) => panic!("the router's connection: {e}"),
        };
        if &*frame.kind == kind::AGENT_CANCEL {
            let cancel: AgentCancel = frame.read().expect("a cancel");
            if let Some(running) = self.due.iter().find(|(_, call)| *call == cancel.call_id).copied() {
                self.due.remove(&running);
                self.cut += 1;
                self.finish(cancel.call_id);
            }
            return None;
        }
        if &*frame.kind != kind::DISPATCH {
            return Some(frame);
        }
        let dispatch: Dispatch = frame.read().expect("a dispatch");
        let (call, at) = (dispatch.call_id, Instant::now());
        assert!(!dispatch.go_on, "the router has lost no call");
        let cost = Amount::new(BILL.in_tokens.0 + BILL.out_tokens.0, BILL.usd_micros.0);
        assert!(cost.fits(dispatch.grant), "it works within what it was granted: {dispatch:?}");
        self.seen.push(Seen { task: dispatch.task, at });
        self.due.insert((at + self.service, call));
        self.most_at_once = self.most_at_once.max(self.due.len());
        None
    }

    fn finish(&mut self, call: CallId) {
        let content = AgentFinal { text: Some("end".into()), cost: BILL, ..AgentFinal::default() };
        self.peer.send(&Frame::json(call.to_string(), 1, Flags::FIN, kind::RESULT_FINAL, &content));
        let twice = self.billed.insert(call, BILL);
        assert!(twice.is_none(), "{call} was dispatched twice");
    }
}

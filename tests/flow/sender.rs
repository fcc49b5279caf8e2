//! The clients' side: sends tasks at their times, whatever became of earlier ones, and keeps what it was told about each.

use atp_proto::content::{Bill, Final, Submit};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame, Qos, WireError};
use atp_tests::blackbox::PATIENCE;
use atp_tests::blackbox::peer::{Peer, submit};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// One task and when it is sent, counted from the start.
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) name: String,
    pub(crate) qos: Qos,
    pub(crate) content: Submit,
}

/// What a client was told about one task.
pub(crate) struct Told {
    pub(crate) sent: Instant,
    pub(crate) qos: Qos,
    pub(crate) answer: Option<Final>,
    pub(crate) bill: Option<Bill>,
    /// The refusal, where there was no acceptance.
    pub(crate) refused: Option<WireError>,
}

/// Sends a plan over one connection and follows every task to its end. The plan is in order of time.
///
/// # Panics
/// When a task is answered twice, or one isn't answered at all.
pub(crate) fn run(router: SocketAddr, begin: Instant, plan: Vec<Planned>) -> BTreeMap<String, Told> {
    let mut peer = Peer::client(router);
    let mut told: BTreeMap<String, Told> = BTreeMap::new();
    let mut plan = plan.into_iter().peekable();
    let (mut open, mut heard) = (0_usize, Instant::now());
    while open > 0 || plan.peek().is_some() {
        while let Some(next) = plan.next_if(|next| begin + next.at <= Instant::now()) {
            let frame = Frame { qos: next.qos as u32, ..submit(&next.name, &next.content) };
            let new = Told { sent: Instant::now(), qos: next.qos, answer: None, bill: None, refused: None };
            peer.send(&frame);
            told.insert(next.name, new);
            open += 1;
        }
        let now = Instant::now();
        let wait = plan.peek().map_or(Duration::from_secs(1), |next| (begin + next.at).saturating_duration_since(now));
        match peer.try_next(wait.max(Duration::from_millis(1))) {
            Ok(frame) => {
                let frame = frame.expect("the router doesn't close");
                heard = Instant::now();
                if let Some(task) = told.get_mut(&*frame.stream_id) {
                    open -= usize::from(task.hears(&frame));
                }
            }
            Err(e) if e.kind() == ErrorKind::TimedOut => {
                assert!(plan.peek().is_some() || heard.elapsed() < PATIENCE, "{open} tasks without an end");
            }
            Err(e) => panic!("the router's connection: {e}"),
        }
    }
    told
}

impl Told {
    /// True when this was the last word.
    fn hears(&mut self, frame: &Frame) -> bool {
        match &*frame.kind {
            kind::RESULT_FINAL => {
                let before = self.answer.replace(frame.read().expect("a final"));
                assert!(before.is_none(), "{} is answered twice", frame.stream_id);
                false
            }
            kind::BILL => {
                let before = self.bill.replace(frame.read().expect("a bill"));
                assert!(before.is_none(), "{} is billed twice", frame.stream_id);
                true
            }
            kind::ERROR if frame.flags.has(Flags::RST) => {
                assert!(self.answer.is_none(), "{} was answered and is refused", frame.stream_id);
                let before = self.refused.replace(frame.read().expect("an error"));
                assert!(before.is_none(), "{} is refused twice", frame.stream_id);
                true
            }
            _ => false,
        }
    }
}

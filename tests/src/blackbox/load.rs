//! A client of the load: works through its tasks by idempotency key, over as many connections as it takes, and keeps what it
//! was told. It believes nothing twice: a number that comes again has to bring the same message.

use super::PATIENCE;
use super::peer::{Peer, submit_by_key};
use atp_proto::content::{Bill, Final, Submit};
use atp_proto::frame::kind;
use atp_proto::{Code, Frame};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a client was told about one task.
#[derive(Clone, Debug)]
pub struct Told {
    pub stream: String,
    pub frames: BTreeMap<u64, Frame>,
    /// Connections on which `control.accepted` was read and that then broke.
    pub broken_after_accept: u32,
    /// The refusal, where there was no acceptance.
    pub refused: Option<atp_proto::WireError>,
    /// When it began to ask, and when it read each numbered message of its stream.
    pub heard: Vec<Instant>,
}

impl Told {
    pub(super) fn new(stream: &str, begun: Instant) -> Self {
        Self {
            stream: stream.into(),
            frames: BTreeMap::new(),
            broken_after_accept: 0,
            refused: None,
            heard: vec![begun],
        }
    }

    /// Takes in a message of the stream; one without a number says nothing that lasts.
    ///
    /// # Panics
    /// When its number came with another message before.
    pub(super) fn take(&mut self, frame: &Frame) {
        if frame.msg_seq > 0 {
            self.heard.push(Instant::now());
            let before = self.frames.entry(frame.msg_seq).or_insert_with(|| frame.clone());
            assert_eq!(before, frame, "{}: message {} came again as another one", self.stream, frame.msg_seq);
        }
    }

    /// From the first dial to the last message.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.heard[self.heard.len() - 1] - self.heard[0]
    }

    fn frame<T: serde::de::DeserializeOwned>(&self, kind: &str) -> T {
        let found = self.frames.values().filter(|f| &*f.kind == kind).collect::<Vec<_>>();
        assert_eq!(found.len(), 1, "{}: one {kind}, not {}", self.stream, found.len());
        found[0].read().expect("the content of its type")
    }

    /// # Panics
    /// When there isn't exactly one.
    #[must_use]
    pub fn answer(&self) -> Final {
        self.frame(kind::RESULT_FINAL)
    }

    /// # Panics
    /// When there isn't exactly one.
    pub fn bill(&self) -> Bill {
        self.frame(kind::BILL)
    }

    fn is_whole(&self) -> bool {
        let last = self.frames.last_key_value();
        self.refused.is_some() || last.is_some_and(|(n, f)| &*f.kind == kind::BILL && *n == self.frames.len() as u64)
    }
}

/// Submits one task and follows it to its bill, whatever happens to the connections.
///
/// # Panics
/// When there is no end within three times `PATIENCE`, or something is told in two ways.
#[must_use]
pub fn follow(router: SocketAddr, key: &str, content: &Submit) -> Told {
    follow_any(&[router], key, content)
}

/// As `follow`, at whichever of these routers serves; who says no is asked again after the others.
///
/// # Panics
/// As `follow`.
#[must_use]
pub fn follow_any(routers: &[SocketAddr], key: &str, content: &Submit) -> Told {
    let syn = submit_by_key(key, 1, content);
    let mut told = Told::new(&syn.stream_id, Instant::now());
    let end = Instant::now() + 3 * PATIENCE;
    for router in routers.iter().cycle() {
        if told.is_whole() {
            break;
        }
        assert!(Instant::now() < end, "no end of {key}: {:?}", told.frames.keys());
        if session(*router, &syn, &mut told).is_err() {
            told.broken_after_accept += u32::from(!told.frames.is_empty());
            // The router is away: a moment before it is dialled again.
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
    told
}

fn session(router: SocketAddr, syn: &Frame, told: &mut Told) -> io::Result<()> {
    let mut peer = Peer::impatient(router)?;
    peer.try_send(syn)?;
    while !told.is_whole() {
        let frame = peer.try_next(PATIENCE)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if *frame.stream_id != *told.stream {
            continue;
        }
        if &*frame.kind == kind::ERROR {
            let error: atp_proto::WireError = frame.read().map_err(io::Error::other)?;
            if error.code == Code::Draining && !error.judged {
                // Its shard has no owner just now: nothing was decided, the same may come again.
                return Err(io::ErrorKind::Interrupted.into());
            }
            assert!(told.frames.is_empty(), "{} was accepted and is refused now: {error}", told.stream);
            told.refused = Some(error);
        } else {
            told.take(&frame);
        }
    }
    Ok(())
}

/// Ends a load, also when a fault's own expectation fails.
pub(super) struct Over<'a>(pub(super) &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `clients` threads while `fault` lasts, at whichever of the routers serves; each takes `task(n)` for the next n.
///
/// # Panics
/// As `follow`, and as `fault`.
pub fn during(
    routers: &[SocketAddr],
    clients: u64,
    task: impl Fn(u64) -> Submit + Sync,
    fault: impl FnOnce(),
) -> Vec<Told> {
    let (over, next) = (AtomicBool::new(false), AtomicU64::new(0));
    let one = || {
        let mut all = Vec::new();
        while !over.load(Ordering::Relaxed) {
            let n = next.fetch_add(1, Ordering::Relaxed);
            all.push(follow_any(routers, &format!("key-{n}"), &task(n)));
        }
        all
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..clients).map(|_| scope.spawn(one)).collect();
        let ends = Over(&over);
        fault();
        drop(ends);
        running.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    })
}

/// Runs `clients` threads; each takes `task(n)` for the next n until `tasks` are done.
///
/// # Panics
/// As `follow`.
pub fn run(router: SocketAddr, clients: u64, tasks: u64, task: impl Fn(u64) -> Submit + Sync) -> Vec<Told> {
    let next = AtomicU64::new(0);
    let one = || {
        let mut all = Vec::new();
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= tasks {
                return all;
            }
            all.push(follow(router, &format!("key-{n}"), &task(n)));
        }
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..clients).map(|_| scope.spawn(one)).collect();
        running.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    })
}

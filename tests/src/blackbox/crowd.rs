//! A load that comes at a fixed rate, whether it can be served or not: half of its clients by the SDK, a quarter by frames written
//! by hand, a quarter hangs up when its task is accepted and asks any router for the answer by HTTP.

use super::PATIENCE;
use super::load::{Over, Told, follow_any};
use super::peer::{Peer, submit_by_key};
use super::process::{LOOK, http_at};
use atp_proto::WireError;
use atp_proto::content::{Bill, Submit, TaskState};
use atp_proto::frame::kind;
use atp_sdk::{Client, ClientOptions, Dialer, Retry, SubmitRequest};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Connections by the SDK; each carries many streams.
const CLIENTS: u64 = 6;
/// Between two questions by HTTP.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How a client is told about its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Sdk,
    Frames,
    Http,
}

/// A task as its client saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub by: By,
    pub stream: String,
    /// `Done` without an error, or the client would have ended the test.
    pub bill: Bill,
    /// When it wanted to be told, and each time it was.
    pub heard: Vec<Instant>,
}

impl Seen {
    /// The longest time in which it was told nothing, and when that began.
    #[must_use]
    pub fn longest_silence(&self) -> (Instant, Duration) {
        let silences = self.heard.windows(2).map(|two| (two[0], two[1] - two[0]));
        silences.max_by_key(|(_, length)| *length).unwrap_or((self.heard[0], Duration::ZERO))
    }
}

/// Where the routers are, and how many clients come.
pub struct Crowd<'a> {
    pub native: &'a [SocketAddr],
    pub http: &'a [SocketAddr],
    pub per_second: u32,
    /// Clients come for so long, and as long as the faults last.
    pub at_least: Duration,
}

impl Crowd<'_> {
    /// Sends a client with `task(n)` at each tick, until `faults` is over; then waits for all answers.
    ///
    /// # Panics
    /// When a task doesn't end `Done`, or within three times `PATIENCE`; when something is told in two ways; and as `faults`.
    #[must_use]
    pub fn during(&self, task: impl Fn(u64) -> Submit + Sync, faults: impl FnOnce()) -> Vec<Seen> {
        let runtime = Runtime::new().expect("threads");
        let clients: Vec<Client> = (0..CLIENTS).map(|n| runtime.block_on(self.sdk(n))).collect();
        let over = AtomicBool::new(false);
        let (task, clients, runtime, over) = (&task, &clients, &runtime, &over);
        std::thread::scope(|scope| {
            let come = scope.spawn(move || {
                let begun = Instant::now();
                let (mut by_sdk, mut others) = (Vec::new(), Vec::new());
                for n in 0.. {
                    let due = begun + Duration::from_secs(n) / self.per_second;
                    while let Some(wait) = due.checked_duration_since(Instant::now()).filter(|wait| !wait.is_zero()) {
                        super::pause(wait);
                    }
                    if over.load(Ordering::Relaxed) && begun.elapsed() >= self.at_least {
                        break;
                    }
                    let (key, content) = (format!("key-{n}"), task(n));
                    match n % 4 {
                        0 | 2 => {
                            let client = clients[(n / 2 % CLIENTS) as usize].clone();
                            by_sdk.push(runtime.spawn(by_the_sdk(client, key, content)));
                        }
                        1 => others.push(scope.spawn(move || self.by_frames(n, &key, &content))),
                        _ => others.push(scope.spawn(move || self.by_http(n, &key, &content))),
                    }
                }
                let by_sdk = by_sdk.into_iter().map(|task| runtime.block_on(task).expect("a client"));
                let mut seen: Vec<Seen> = by_sdk.collect();
                seen.extend(others.into_iter().map(|client| client.join().expect("a client")));
                seen
            });
            let ends = Over(over);
            faults();
            drop(ends);
            come.join().expect("the clients")
        })
    }

    /// The routers, another one first for each `n`.
    fn from(routers: &[SocketAddr], n: u64) -> Vec<SocketAddr> {
        let mut routers = routers.to_vec();
        let first = n as usize % routers.len();
        routers.rotate_left(first);
        routers
    }

    async fn sdk(&self, n: u64) -> Client {
        let routers = Self::from(self.native, n);
        let dialer = Dialer::any(routers.iter().map(|router| Dialer::tcp(router.to_string())));
        Client::connect(dialer, ClientOptions::default()).await.expect("a router serves")
    }

    fn by_frames(&self, n: u64, key: &str, content: &Submit) -> Seen {
        of_told(By::Frames, &follow_any(&Self::from(self.native, n), key, content))
    }

    fn by_http(&self, n: u64, key: &str, content: &Submit) -> Seen {
        let (mut heard, end) = (vec![Instant::now()], Instant::now() + 3 * PATIENCE);
        let mut routers = Self::from(self.native, n).into_iter().cycle();
        let stream = loop {
            assert!(Instant::now() < end, "{key} isn't accepted");
            match accepted(routers.next().expect("one of them"), key, content) {
                Ok(stream) => break stream,
                Err(_) => super::pause(ASK_AGAIN),
            }
        };
        heard.push(Instant::now());
        let mut routers = Self::from(self.http, n).into_iter().cycle();
        loop {
            assert!(Instant::now() < end, "no end of {key}, which is {stream}");
            let path = format!("/v1/streams/{stream}");
            if let Ok((status, row)) = http_at(routers.next().expect("one"), "GET", &path, 2 * LOOK) {
                assert_ne!(status, 404, "{stream} was accepted and is unknown: {row}");
                let state = serde_json::from_value::<TaskState>(row["state"].clone()).ok();
                if status == 200 {
                    heard.push(Instant::now());
                }
                if let Some(state) = state.filter(|_| status == 200 && row["result"].is_object()) {
                    assert_eq!(state, TaskState::Done, "{row}");
                    let bill = serde_json::from_value(row["bill"].clone()).expect("a bill");
                    return Seen { by: By::Http, stream, bill, heard };
                }
            }
            super::pause(ASK_AGAIN);
        }
    }
}

/// Submits, and hangs up as soon as the task is accepted.
fn accepted(router: SocketAddr, key: &str, content: &Submit) -> io::Result<String> {
    let syn = submit_by_key(key, 1, content);
    let mut peer = Peer::impatient(router)?;
    peer.try_send(&syn)?;
    loop {
        let frame = peer.try_next(PATIENCE)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if frame.stream_id == syn.stream_id {
            if &*frame.kind == kind::ERROR {
                let error: WireError = frame.read().map_err(io::Error::other)?;
                assert!(!error.judged, "{key} is refused: {error}");
                return Err(io::ErrorKind::Interrupted.into());
            }
            if &*frame.kind == kind::ACCEPTED {
                return Ok(frame.stream_id.to_string());
            }
        }
    }
}

async fn by_the_sdk(client: Client, key: String, content: Submit) -> Seen {
    let begun = Instant::now();
    let follow = async {
        let request = SubmitRequest::of(content).key(&key).retry(Retry::default());
        let mut stream = client.submit(request).await.unwrap_or_else(|e| panic!("{key}: {e}"));
        let mut told = Told::new(stream.id().as_str(), begun);
        while let Some(frame) = stream.next_frame().await {
            told.take(&frame.unwrap_or_else(|e| panic!("{key}: {e}")));
        }
        of_told(By::Sdk, &told)
    };
    tokio::time::timeout(3 * PATIENCE, follow).await.unwrap_or_else(|_| panic!("no end of {key}"))
}

fn of_told(by: By, told: &Told) -> Seen {
    assert_eq!(told.refused, None, "{}", told.stream);
    let answer = told.answer();
    assert_eq!((answer.state, &answer.error), (TaskState::Done, &None), "{}", told.stream);
    Seen { by, stream: told.stream.clone(), bill: told.bill(), heard: told.heard.clone() }
}

//! The clients' end: opens streams and counts what comes back, chunk by chunk, in order. It reads a frame in full only
//! when a stream ends.

use crate::agent;
use crate::link::Link;
use crate::peek::Peek;
use atp_proto::content::{Role, Submit};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// A router takes 1024 on one connection; the bench stays below.
pub(crate) const STREAMS_PER_CONNECTION: usize = 1000;
/// Longer than any run, so that no deadline ends a stream.
const DEADLINE_MS: u64 = 24 * 3600 * 1000;

const FLOW_TIMEOUT: Duration = Duration::from_secs(30);

/// What all clients of a run have received.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) accepted: AtomicU64,
    pub(crate) partials: AtomicU64,
    /// Bytes of the partials' JSON documents.
    pub(crate) bytes: AtomicU64,
    /// Streams that have had a partial.
    pub(crate) flowing: AtomicU64,
    /// Streams that ended, whatever the reason.
    pub(crate) ended: AtomicU64,
    /// Numbered frames that weren't the next one of their stream.
    pub(crate) disordered: AtomicU64,
    /// Why the first stream ended.
    why: Mutex<Option<String>>,
}

impl Received {
    /// Why the first stream ended, if one did.
    pub(crate) fn why(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until so many streams have had a partial.
    ///
    /// # Errors
    /// One ended before, or they don't within 30 s.
    pub(crate) async fn flows(&self, streams: u64) -> anyhow::Result<()> {
        let started = Instant::now();
        while self.flowing.load(Relaxed) < streams {
            anyhow::ensure!(
                started.elapsed() < FLOW_TIMEOUT && self.ended.load(Relaxed) == 0,
                "{} of {streams} streams flow, {} were accepted, {} ended; first end: {}",
                self.flowing.load(Relaxed),
                self.accepted.load(Relaxed),
                self.ended.load(Relaxed),
                self.why().unwrap_or_else(|| "none".into())
            );
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

/// The SYN of one stream for agent `agent`.
pub(crate) fn submit(stream_id: &str, agent: u64, deadline_ms: Option<u64>) -> Frame {
    let submit = Submit {
        task: "Say what you find in the change.".into(),
        agents: vec![agent::name(agent)],
        deadline_ms: Some(deadline_ms.unwrap_or(DEADLINE_MS)),
        ..Submit::default()
    };
    Frame::json(stream_id, 1, Flags::SYN, kind::TASK_SUBMIT, &submit)
}

/// A prefix for stream ids that no other run of any bench uses.
pub(crate) fn run_id() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("b{:x}-{:x}", std::process::id(), since.as_nanos())
}

/// The id of a stream of this bench. What stands before a `.` says which shard has a stream, so there is none: they spread.
pub(crate) fn stream_id(prefix: &str, number: impl std::fmt::Display) -> String {
    format!("{prefix}-{number}")
}

/// The number at the end of a stream id of this bench: `run-17` is 17.
pub(crate) fn number(stream_id: &[u8]) -> Option<usize> {
    let digits = stream_id.rsplit(|b| *b == b'-').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Opens `streams` streams for agent `agent` on one connection and counts until the connection is lost.
pub(crate) async fn run(
    address: SocketAddr,
    prefix: String,
    streams: usize,
    agent: u64,
    received: Arc<Received>,
) -> anyhow::Result<()> {
    let mut link = Link::open(address, Role::Client).await?;
    for n in 0..streams {
        link.push(&submit(&stream_id(&prefix, n), agent, None));
    }
    let mut last = vec![0_u64; streams];
    let mut flowing = vec![false; streams];
    loop {
        link.turn(None).await?;
        let (mut partials, mut bytes) = (0, 0);
        link.take(|_, frame| {
            let Some(n) = number(frame.stream_id).filter(|n| *n < streams) else { return Ok(()) };
            if frame.msg_seq > 0 {
                if frame.msg_seq != last[n] + 1 {
                    received.disordered.fetch_add(1, Relaxed);
                }
                last[n] = frame.msg_seq;
            }
            if frame.kind == kind::RESULT_PARTIAL.as_bytes() {
                (partials, bytes) = (partials + 1, bytes + frame.content.len() as u64);
                if !std::mem::replace(&mut flowing[n], true) {
                    received.flowing.fetch_add(1, Relaxed);
                }
            } else {
                other(&received, frame);
            }
            Ok(())
        })?;
        received.partials.fetch_add(partials, Relaxed);
        received.bytes.fetch_add(bytes, Relaxed);
    }
}

fn other(received: &Received, frame: Peek<'_>) {
    if frame.kind == kind::ACCEPTED.as_bytes() {
        received.accepted.fetch_add(1, Relaxed);
    }
    let why = || Some(String::from_utf8_lossy(frame.content).chars().take(400).collect());
    if frame.kind == kind::RESULT_FINAL.as_bytes() || frame.kind == kind::ERROR.as_bytes() {
        let mut first = received.why.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = why();
        }
    }
    if Flags(frame.flags).has(Flags::FIN) || Flags(frame.flags).has(Flags::RST) {
        received.ended.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::{Conduct, Sent};
    use crate::fake;
    use std::time::Duration;

    #[tokio::test]
    async fn chunks_are_counted_in_order_through_windows_and_grants() {
        let address = fake::router().await;
        let (sent, received) = (Arc::new(Sent::default()), Arc::new(Received::default()));
        let conduct = Conduct::Stream { chunk_bytes: 1024, chunks: u64::MAX };
        let _agent = tokio::spawn(agent::run(address, 3, conduct, Arc::clone(&sent)));
        fake::agent_is_there(address).await;
        let _client = tokio::spawn(run(address, run_id(), 5, 3, Arc::clone(&received)));
        let enough = async {
            // More than windows and first grants allow: acknowledgements and larger grants were heeded.
            while received.partials.load(Relaxed) < 5000 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), enough).await.expect("chunks flow");
        let count = |n: &AtomicU64| n.load(Relaxed);
        assert_eq!((count(&received.accepted), count(&received.flowing), count(&sent.calls)), (5, 5, 5));
        assert_eq!((count(&received.ended), count(&received.disordered)), (0, 0));
        assert!(count(&received.bytes) >= 5000 * 1024 && count(&sent.chunks) >= count(&received.partials));
        assert!(count(&sent.grant_waits) > 0);
    }

    #[test]
    fn streams_are_numbered() {
        assert_eq!(
            (number(stream_id("b1-2-0", 17).as_bytes()), number(b"17"), number(b"a-b"), number(b"")),
            (Some(17), Some(17), None, None)
        );
    }
}

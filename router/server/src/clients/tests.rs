//! A connection that takes less than its streams make still sees each of them in order, from memory or from the log.

use super::*;
use crate::inbox::{Taking, inbox};
use crate::outbox::{Writer, outbox};
use atp_proto::Qos;
use atp_proto::codec;
use atp_proto::content::{TaskState, WindowView};
use bytes::BytesMut;
use std::time::Duration;
use tokio::io::{AsyncReadExt, DuplexStream};
use tokio_util::sync::CancellationToken;

const CONN: ConnId = ConnId(1);
const BYTES: usize = 64 << 10;

struct Slow {
    clients: Clients,
    taking: Taking,
    writer: Option<Writer>,
}

impl Slow {
    fn new() -> Self {
        let (inbox, taking) = inbox(1 << 20);
        let mut clients = Clients::new(1, inbox, Source::local(""), TaskTracker::new());
        let (outbox, writer) = outbox(CancellationToken::new());
        let bounds = Arc::new(Bounds::new(16, Arc::default(), None));
        clients.open(CONN, TenantId::new("default"), outbox, bounds);
        Self { clients, taking, writer: Some(writer) }
    }

    fn chunks(&mut self, stream: &str, seqs: std::ops::RangeInclusive<u64>) {
        for seq in seqs {
            let frame = Frame::raw(stream, seq, Flags::NONE, kind::RESULT_PARTIAL, vec![b'x'; BYTES].into());
            self.clients.send(CONN, frame);
        }
        self.clients.flush();
    }

    /// Bytes that wait here.
    fn waiting(&self) -> usize {
        self.clients.list[&CONN].bounds.all_bytes.load(Ordering::Relaxed)
    }

    fn accepted(&mut self, stream: &str) {
        let frame = Frame::raw(stream, 0, Flags::SYN.with(Flags::ACK), kind::ACCEPTED, "{}".into());
        self.clients.send(CONN, frame);
    }

    /// The peer begins to read.
    fn wake(&mut self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(1 << 20);
        tokio::spawn(self.writer.take().expect("once").run(near, Duration::from_secs(5)));
        far
    }

    /// Waits until the outbox has room, as the shard's task is told.
    async fn room(&mut self) -> Vec<(StreamId, u64)> {
        let mut batch = Vec::new();
        self.taking.take(&mut batch, 1).await;
        assert!(matches!(batch[0].1, ToShard::Room { conn: CONN }));
        let inputs = self.clients.room(CONN);
        self.clients.flush();
        let asked = inputs.into_iter().map(|input| match input {
            Input::Client { received, .. } => {
                let resume: Resume = received.frame.read().expect("a resume");
                (StreamId::new(&received.frame.stream_id), resume.after)
            }
            other => panic!("{other:?}"),
        });
        asked.collect()
    }
}

/// Numbers of the frames of a stream, as they arrive, up to `last`.
async fn read(mut far: DuplexStream, stream: &'static str, last: u64) -> Vec<u64> {
    let (mut bytes, mut seqs) = (BytesMut::new(), Vec::new());
    while seqs.last() != Some(&last) {
        far.read_buf(&mut bytes).await.expect("open");
        while let Some(received) = codec::decode(&mut bytes).expect("whole frames") {
            if &*received.frame.stream_id == stream && received.frame.msg_seq > 0 {
                seqs.push(received.frame.msg_seq);
            }
        }
    }
    seqs
}

#[tokio::test]
async fn what_the_outbox_refuses_waits_in_memory_in_order() {
    let mut slow = Slow::new();
    // 20 MiB: more than an outbox, less than what waits.
    slow.chunks("a", 1..=320);
    assert!(slow.clients.list[&CONN].lagging.is_empty());
    let reading = tokio::spawn(read(slow.wake(), "a", 330));
    slow.chunks("a", 321..=330);
    while slow.waiting() > 0 {
        assert_eq!(slow.room().await, []);
    }
    assert_eq!(reading.await.expect("read"), (1..=330).collect::<Vec<_>>());
}

#[tokio::test]
async fn no_frame_overtakes_a_stream_that_lags() {
    let mut slow = Slow::new();
    slow.chunks("a", 1..=1000);
    let after = slow.clients.list[&CONN].lagging["a"].after;
    assert!(after < 1000, "more waits than may");
    assert_eq!(slow.waiting(), 0, "its memory is given back");
    slow.chunks("a", 1001..=1001);

    let reading = tokio::spawn(read(slow.wake(), "a", 1003));
    assert_eq!(slow.room().await, [(StreamId::new("a"), after)], "the shard is asked to go on behind the last");
    // Decided before the shard was asked, released after: the log has it.
    slow.chunks("a", 1002..=1002);
    slow.accepted("a");
    slow.chunks("a", after + 1..=after + 3);
    slow.chunks("a", 1003..=1003);
    let seqs = reading.await.expect("read");
    assert_eq!(seqs, (1..=after + 3).chain([1003]).collect::<Vec<_>>());
}

#[tokio::test]
async fn streams_that_attach_to_one_take_one_place_together() {
    let mut slow = Slow::new();
    let places = |slow: &Slow| slow.clients.list[&CONN].streams.keys().map(ToString::to_string).collect::<Vec<_>>();
    for try_no in 2..=4 {
        let id = format!("k-1.{try_no}");
        let client = slow.clients.list.get_mut(&CONN).expect("open");
        assert!(client.bounds.open(&id).is_ok() && client.streams.insert(StreamId::new(&id), 0).is_none());
        let attached = Accepted {
            stream_id: "k-1.1".into(),
            state: TaskState::Running,
            qos: Qos::Silver,
            window: WindowView::default(),
            resume_token: None,
        };
        slow.clients.send(CONN, Frame::json(id, 0, Flags::SYN.with(Flags::ACK), kind::ACCEPTED, &attached));
        assert_eq!(places(&slow), ["k-1.1"]);
    }
    slow.clients.send(CONN, Frame::raw("k-1.1", 9, Flags::FIN, kind::BILL, "{}".into()));
    assert!(places(&slow).is_empty());
    assert_eq!(slow.clients.list[&CONN].bounds.streams.load(Ordering::Relaxed), 0);
}

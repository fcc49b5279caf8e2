//! What waits to be written to one connection: bounded in bytes, written in one go per batch.
//! It never blocks the one who sends: a full outbox refuses, and says when there is room again.

use crate::metric::FrameCounts;
use atp_proto::codec::{self, Received};
use atp_proto::limits::{FRAGMENT_BYTES, UNSENT_BYTES_MAX, UNSENT_FULL_MS};
use atp_proto::reassembly::fragment;
use atp_proto::{Code, Flags, Frame, WireError};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Batches that may wait; a batch is one drain of a state machine.
const BATCHES_MAX: usize = 4096;
/// Encoded bytes that are handed to the socket at once.
const WRITE_BYTES: usize = 256 * 1024;

enum Out {
    One(Frame),
    Many(Vec<Frame>),
    /// Their bodies go on as they were received.
    Forward(Vec<Received>),
    Close(Option<Box<WireError>>),
}

/// The sending half; clones share the bound.
#[derive(Clone)]
pub(crate) struct Outbox {
    queue: mpsc::Sender<Out>,
    gauge: Arc<Gauge>,
}

struct Gauge {
    unsent: AtomicUsize,
    /// Milliseconds since `origin` plus one when a frame was first refused; 0: there is room.
    full_since: AtomicU64,
    origin: Instant,
    room: Notify,
    closed: CancellationToken,
}

/// The writing half.
pub(crate) struct Writer {
    queue: mpsc::Receiver<Out>,
    gauge: Arc<Gauge>,
}

/// What a frame weighs while it waits, about its encoded size. A heartbeat weighs nothing: batches bound those.
pub(crate) fn weight(frame: &Frame) -> usize {
    if frame.flags.has(Flags::HB) { 0 } else { 96 + frame.content.len() + frame.stream_id.len() }
}

/// A new outbox; `closed` is cancelled when nothing more will be written.
pub(crate) fn outbox(closed: CancellationToken) -> (Outbox, Writer) {
    let (sender, queue) = mpsc::channel(BATCHES_MAX);
    let gauge = Arc::new(Gauge {
        unsent: AtomicUsize::new(0),
        full_since: AtomicU64::new(0),
        origin: Instant::now(),
        room: Notify::new(),
        closed,
    });
    (Outbox { queue: sender, gauge: gauge.clone() }, Writer { queue, gauge })
}

impl Outbox {
    /// Queues the frames from the front as long as there is room; what stays in `frames` wasn't taken. Returns the weight
    /// of what left `frames`. Several shards may send at once.
    pub(crate) fn send(&self, frames: &mut VecDeque<Frame>) -> usize {
        if self.is_closed() {
            return frames.drain(..).map(|f| weight(&f)).sum();
        }
        if frames.is_empty() {
            return 0;
        }
        let Ok(permit) = self.queue.try_reserve() else {
            if self.queue.is_closed() {
                return frames.drain(..).map(|f| weight(&f)).sum();
            }
            self.gauge.mark_full();
            return 0;
        };
        let (taken, bytes) = self.gauge.take_room(frames, weight);
        match taken {
            0 => {}
            1 => permit.send(Out::One(frames.pop_front().expect("one was taken"))),
            taken => permit.send(Out::Many(frames.drain(..taken).collect())),
        }
        if !frames.is_empty() {
            self.gauge.mark_full();
        }
        bytes
    }

    /// As `send`, for frames of somebody else: their bodies stay as they are.
    pub(crate) fn forward(&self, frames: &mut VecDeque<Received>) {
        if self.is_closed() {
            return frames.clear();
        }
        let Ok(permit) = self.queue.try_reserve() else {
            if !self.queue.is_closed() {
                return self.gauge.mark_full();
            }
            return frames.clear();
        };
        let (taken, _) = self.gauge.take_room(frames, |received| weight(&received.frame));
        if taken > 0 {
            permit.send(Out::Forward(frames.drain(..taken).collect()));
        }
        if !frames.is_empty() {
            self.gauge.mark_full();
        }
    }

    /// Queues one frame; false: there is no room.
    pub(crate) fn send_one(&self, frame: Frame) -> bool {
        let mut frames = VecDeque::from([frame]);
        self.send(&mut frames);
        frames.is_empty()
    }

    /// Writes what waits, then the error if there is one, then closes. A full outbox is closed at once.
    pub(crate) fn close(&self, error: Option<WireError>) {
        if self.queue.try_send(Out::Close(error.map(Box::new))).is_err() {
            self.gauge.closed.cancel();
        }
    }

    /// True when at least half of the bytes are free.
    pub(crate) fn has_room(&self) -> bool {
        self.gauge.unsent.load(Ordering::Acquire) <= UNSENT_BYTES_MAX / 2
            && self.gauge.full_since.load(Ordering::Acquire) == 0
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.gauge.closed.is_cancelled()
    }

    /// Waits until `has_room`, or the connection is closed.
    pub(crate) async fn room(&self) {
        loop {
            let room = self.gauge.room.notified();
            if self.has_room() || self.is_closed() {
                return;
            }
            tokio::select! {
                () = room => {}
                () = self.gauge.closed.cancelled() => return,
            }
        }
    }
}

impl Gauge {
    /// Takes the room that the first of these frames need: how many, and their weight. It is the writer's to give back.
    fn take_room<T>(&self, frames: &VecDeque<T>, weight: impl Fn(&T) -> usize) -> (usize, usize) {
        let mut unsent = self.unsent.load(Ordering::Acquire);
        loop {
            let mut room = UNSENT_BYTES_MAX.saturating_sub(unsent);
            let (mut taken, mut bytes) = (0, 0);
            for frame in frames {
                let weight = weight(frame);
                // A message larger than the whole outbox goes in alone.
                if weight > room && room < UNSENT_BYTES_MAX {
                    break;
                }
                (room, taken, bytes) = (room.saturating_sub(weight), taken + 1, bytes + weight);
            }
            match self.unsent.compare_exchange_weak(unsent, unsent + bytes, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return (taken, bytes),
                Err(now) => unsent = now,
            }
        }
    }

    fn mark_full(&self) {
        let now = 1 + u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        let _ = self.full_since.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
        // All may have been written meanwhile, and nothing written later would say that there is room.
        if self.unsent.load(Ordering::SeqCst) == 0 {
            self.full_since.store(0, Ordering::SeqCst);
            self.room.notify_waiters();
        }
    }

    fn written(&self, bytes: usize) {
        let before = self.unsent.fetch_sub(bytes, Ordering::SeqCst);
        if before - bytes <= UNSENT_BYTES_MAX / 2 {
            let was_full = self.full_since.load(Ordering::SeqCst) != 0;
            if was_full {
                self.full_since.store(0, Ordering::Release);
            }
            if was_full || before > UNSENT_BYTES_MAX / 2 {
                self.room.notify_waiters();
            }
        }
    }

    /// Resolves when the outbox has been full for too long.
    async fn stuck(&self) {
        loop {
            let since = self.full_since.load(Ordering::Acquire);
            let wait = match since {
                0 => UNSENT_FULL_MS,
                since => {
                    let full =
                        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_sub(since - 1);
                    if full >= UNSENT_FULL_MS {
                        return;
                    }
                    UNSENT_FULL_MS - full
                }
            };
            // A writer that stands still may become full at any time: look again at least every second.
            tokio::time::sleep(Duration::from_millis(wait.min(1000))).await;
        }
    }
}

/// Why the writer ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It was asked to close, or nobody can send any more.
    Closed,
    /// The peer took nothing for too long.
    Stuck,
    Gone(io::ErrorKind),
}

impl Writer {
    /// Writes until it is told to close. Sends a heartbeat every `heartbeat`.
    pub(crate) async fn run(mut self, mut io: impl AsyncWrite + Unpin, heartbeat: Duration) -> Ended {
        let closed = self.gauge.closed.clone();
        let ended = self.write_all(&mut io, heartbeat).await;
        if ended == Ended::Stuck {
            // Best effort: the peer's window is closed, so this is for the one that wakes up just now.
            let error = WireError::new(Code::Limit, "unsent bytes: the connection took nothing for 10 s while 8 MiB waited; resume its streams on a new one")
                .used(self.gauge.unsent.load(Ordering::Acquire) as u64, UNSENT_BYTES_MAX as u64);
            let mut bytes = BytesMut::new();
            codec::encode(&connection_error(error), &mut bytes);
            let _ = tokio::time::timeout(Duration::from_millis(100), io.write_all(&bytes)).await;
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), io.shutdown()).await;
        closed.cancel();
        self.gauge.room.notify_waiters();
        ended
    }

    async fn write_all(&mut self, io: &mut (impl AsyncWrite + Unpin), heartbeat: Duration) -> Ended {
        let mut counts = FrameCounts::new("out");
        let mut bytes = BytesMut::with_capacity(4096);
        let mut batch = Vec::with_capacity(16);
        let mut beat = tokio::time::interval_at(Instant::now() + heartbeat, heartbeat);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let closed = self.gauge.closed.clone();
        let closed = closed.cancelled();
        tokio::pin!(closed);
        loop {
            tokio::select! {
                biased;
                () = &mut closed => return Ended::Closed,
                n = self.queue.recv_many(&mut batch, 64) => if n == 0 { return Ended::Closed },
                _ = beat.tick() => batch.push(Out::One(Frame::heartbeat(false))),
            }
            let mut weighed = 0;
            let mut close = false;
            for out in batch.drain(..) {
                let (one, many) = match out {
                    Out::One(frame) => (Some(frame), Vec::new()),
                    Out::Many(frames) => (None, frames),
                    Out::Forward(frames) => {
                        for Received { frame, body } in frames {
                            weighed += weight(&frame);
                            counts.count(&frame.kind);
                            codec::encode_received(frame.hop.as_deref(), &body, &mut bytes);
                            if bytes.len() >= WRITE_BYTES
                                && let Err(ended) = self.flush(io, &mut bytes, &mut weighed).await
                            {
                                return ended;
                            }
                        }
                        continue;
                    }
                    Out::Close(error) => {
                        close = true;
                        (error.map(|e| connection_error(*e)), Vec::new())
                    }
                };
                for frame in one.into_iter().chain(many) {
                    // The last error was never weighed in.
                    weighed += if close { 0 } else { weight(&frame) };
                    counts.count(&frame.kind);
                    if frame.content.len() <= FRAGMENT_BYTES {
                        codec::encode(&frame, &mut bytes);
                    } else {
                        fragment(frame, FRAGMENT_BYTES).iter().for_each(|part| codec::encode(part, &mut bytes));
                    }
                    if bytes.len() >= WRITE_BYTES
                        && let Err(ended) = self.flush(io, &mut bytes, &mut weighed).await
                    {
                        return ended;
                    }
                }
                if close {
                    break;
                }
            }
            counts.flush();
            if let Err(ended) = self.flush(io, &mut bytes, &mut weighed).await {
                return ended;
            }
            if close {
                return Ended::Closed;
            }
            if bytes.capacity() > 2 * WRITE_BYTES {
                bytes = BytesMut::with_capacity(4096);
            }
        }
    }

    async fn flush(
        &self,
        io: &mut (impl AsyncWrite + Unpin),
        bytes: &mut BytesMut,
        weighed: &mut usize,
    ) -> Result<(), Ended> {
        tokio::select! {
            biased;
            written = io.write_all(bytes) => written.map_err(|e| Ended::Gone(e.kind()))?,
            () = self.gauge.stuck() => return Err(Ended::Stuck),
            () = self.gauge.closed.cancelled() => return Err(Ended::Closed),
        }
        bytes.clear();
        self.gauge.written(std::mem::take(weighed));
        Ok(())
    }
}

/// `RST control.error` on stream "": the connection is closed behind it.
pub(crate) fn connection_error(error: WireError) -> Frame {
    let error = error.fatal(atp_proto::code::Fatal::Connection);
    Frame::json("", 0, Flags::RST, atp_proto::frame::kind::ERROR, &error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::frame::kind;

    fn frame(bytes: usize) -> Frame {
        Frame::raw("s", 1, Flags::NONE, kind::RESULT_PARTIAL, vec![b'x'; bytes].into())
    }

    #[tokio::test(start_paused = true)]
    async fn n_unsent_bytes_fit_and_one_more_does_not() {
        let (outbox, _writer) = outbox(CancellationToken::new());
        let overhead = weight(&frame(0));
        assert!(outbox.send_one(frame(UNSENT_BYTES_MAX - 2 * overhead - 1)));
        assert!(outbox.send_one(frame(1)), "byte n fits");
        assert!(!outbox.send_one(frame(0)), "byte n + 1 doesn't");
        assert!(outbox.send_one(Frame::heartbeat(true)), "a heartbeat weighs nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_closed_after_ten_seconds() {
        let closed = CancellationToken::new();
        let (outbox, writer) = outbox(closed.clone());
        let (near, far) = tokio::io::duplex(1024);
        let begun = Instant::now();
        let writing = tokio::spawn(writer.run(near, Duration::from_secs(5)));
        while outbox.send_one(frame(64 * 1024)) {}
        assert_eq!(writing.await.expect("ends"), Ended::Stuck);
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(UNSENT_FULL_MS), "{took:?}");
        assert!(took < Duration::from_millis(UNSENT_FULL_MS + 3000), "{took:?}");
        assert!(closed.is_cancelled());
        drop(far);
    }

    #[tokio::test]
    async fn room_comes_back_when_the_peer_reads() {
        let (outbox, writer) = outbox(CancellationToken::new());
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(writer.run(near, Duration::from_secs(5)));
        let mut sent = 0;
        while outbox.send_one(frame(64 * 1024)) {
            sent += 1;
        }
        assert!(!outbox.has_room());
        let reading = tokio::spawn(async move {
            let mut bytes = BytesMut::new();
            let mut frames = 0;
            while frames < sent {
                use tokio::io::AsyncReadExt;
                far.read_buf(&mut bytes).await.expect("open");
                while let Some(received) = codec::decode(&mut bytes).expect("whole frames") {
                    frames += usize::from(!received.frame.flags.has(Flags::HB));
                }
            }
            far
        });
        outbox.room().await;
        assert!(outbox.send_one(frame(1)));
        reading.await.expect("all arrived");
    }
}

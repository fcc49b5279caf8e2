//! The client's connection: one loop that owns every open stream, mends gaps and losses by `control.resume`, and hands
//! messages to their readers. It never waits for a reader.

use super::ClientOptions;
use crate::dial::Dialer;
use crate::error::Error;
use crate::fragment::{Joined, Joiner, split};
use crate::pipe::Pipe;
use crate::wire::{Pulse, Turn, Wire, open};
use atp_proto::code::{Code, Fatal, WireError};
use atp_proto::content::{Accepted, HelloAck, Resume, Role, TaskCancel};
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame, StreamId};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

/// A gap that stays open is asked for again after this long.
const MEND_AGAIN: Duration = Duration::from_secs(5);
/// The wait before a stream is asked for again that couldn't be served now, if the router names none.
const LATER: Duration = Duration::from_millis(500);
/// How often that may happen in a row.
const LATER_MAX: u32 = 20;

pub(crate) type Answer = oneshot::Sender<Result<Accepted, Error>>;

/// What handles ask of the loop.
#[derive(Debug)]
pub(crate) enum Command {
    /// `syn` submits; without one the stream is continued behind `after`.
    Open {
        id: StreamId,
        syn: Option<Box<Frame>>,
        after: u64,
        pipe: Arc<Pipe>,
        answer: Answer,
        owner: u64,
    },
    Cancel {
        id: StreamId,
        reason: Option<String>,
        done: oneshot::Sender<Result<(), Error>>,
    },
    Close {
        done: oneshot::Sender<()>,
    },
}

/// What readers tell the loop without waiting. Bounded by the number of streams.
#[derive(Debug, Default)]
pub(crate) struct LineShared {
    owners: AtomicU64,
    notes: Mutex<Notes>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Notes {
    gone: Vec<u64>,
    caught_up: Vec<u64>,
    error: Option<Error>,
}

impl LineShared {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn next_owner(&self) -> u64 {
        self.owners.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn let_go(&self, owner: u64) {
        self.notes().gone.push(owner);
        self.wake.notify_one();
    }

    pub(crate) fn caught_up(&self, owner: u64) {
        self.notes().caught_up.push(owner);
        self.wake.notify_one();
    }

    /// Why the loop ended.
    pub(crate) fn error(&self) -> Error {
        self.notes().error.clone().unwrap_or(Error::Closed)
    }
}

pub(crate) struct Line {
    dialer: Dialer,
    options: ClientOptions,
    inbox: mpsc::Receiver<Command>,
    shared: Arc<LineShared>,
    streams: HashMap<StreamId, Stream>,
    owners: HashMap<u64, StreamId>,
    /// Answers that wait until all is written.
    on_flush: Vec<oneshot::Sender<Result<(), Error>>>,
    later: Vec<(Instant, StreamId)>,
    fragment_bytes: usize,
}

struct Stream {
    owner: Option<u64>,
    pipe: Arc<Pipe>,
    /// The submit, until it is answered.
    syn: Option<Box<Frame>>,
    syn_sent: u32,
    answer: Option<Answer>,
    /// All messages up to this one are with the reader.
    delivered: u64,
    joiner: Joiner,
    mending: Option<Instant>,
    later: u32,
    cancel: Option<TaskCancel>,
    /// Opened only to cancel: told when the cancel is on its way.
    cancelled: Option<oneshot::Sender<Result<(), Error>>>,
}

/// Why a connection ended.
enum Gone {
    Lost(Error),
    Closed(Option<oneshot::Sender<()>>),
}

impl Line {
    pub(crate) fn new(
        dialer: Dialer,
        options: ClientOptions,
        inbox: mpsc::Receiver<Command>,
        shared: Arc<LineShared>,
    ) -> Self {
        Self {
            dialer,
            options,
            inbox,
            shared,
            streams: HashMap::new(),
            owners: HashMap::new(),
            on_flush: Vec::new(),
            later: Vec::new(),
            fragment_bytes: atp_proto::limits::FRAGMENT_BYTES,
        }
    }

    pub(crate) async fn run(mut self, wire: Wire, hello: HelloAck) {
        let mut next = Some((wire, hello));
        let mut attempt = 0;
        let mut up_last = Instant::now();
        let error = loop {
            let error = if let Some((wire, hello)) = next.take() {
                let begun = Instant::now();
                let gone = self.connection(wire, hello).await;
                up_last = Instant::now();
                if begun.elapsed() >= Duration::from_secs(5) {
                    attempt = 0;
                }
                match gone {
                    Gone::Lost(error) => error,
                    Gone::Closed(done) => {
                        self.end(&Error::Closed);
                        if let Some(done) = done {
                            let _ = done.send(());
                        }
                        return;
                    }
                }
            } else {
                let token = self.options.token.clone();
                match open(&self.dialer, Role::Client, token.as_deref(), self.options.connect_timeout).await {
                    Ok(opened) => {
                        next = Some(opened);
                        continue;
                    }
                    Err(error) => error,
                }
            };
            tracing::debug!(%error, "no connection");
            let given_up = self.options.reconnect.give_up.is_some_and(|after| up_last.elapsed() >= after);
            if matches!(error, Error::Auth(_)) || given_up || self.inbox.is_closed() && self.inbox.is_empty() {
                break error;
            }
            tokio::time::sleep(self.options.reconnect.wait(attempt)).await;
            attempt += 1;
        };
        self.end(&error);
    }

    /// Tells everybody, those too who asked while it ended.
    fn end(&mut self, error: &Error) {
        self.shared.notes().error = Some(error.clone());
        self.inbox.close();
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Open { answer, .. } => drop(answer.send(Err(error.clone()))),
                Command::Cancel { done, .. } => drop(done.send(Err(error.clone()))),
                Command::Close { done } => drop(done.send(())),
            }
        }
        for (_, stream) in self.streams.drain() {
            stream.end(Some(error.clone()));
        }
        for done in self.on_flush.drain(..) {
            let _ = done.send(Err(error.clone()));
        }
    }

    async fn connection(&mut self, mut wire: Wire, hello: HelloAck) -> Gone {
        self.fragment_bytes = usize::try_from(hello.limits.fragment_bytes).unwrap_or(usize::MAX).max(1);
        let mut pulse = Pulse::new(hello.heartbeat_ms);
        let timer = tokio::time::sleep_until(pulse.due());
        tokio::pin!(timer);
        self.later.clear();
        for (id, stream) in &mut self.streams {
            stream.open(id, &mut wire, self.fragment_bytes);
        }
        loop {
            self.take_notes(&mut wire);
            if wire.is_flushed() {
                for done in self.on_flush.drain(..) {
                    let _ = done.send(Ok(()));
                }
            }
            let now = Instant::now();
            if now >= pulse.due() && !pulse.beat(&mut wire) {
                return Gone::Lost(Error::Unreachable("three heartbeat intervals of silence".to_owned()));
            }
            self.ask_later(now, &mut wire);
            let due = self.later.iter().map(|(at, _)| *at).min().map_or(pulse.due(), |at| at.min(pulse.due()));
            if timer.deadline() != due {
                timer.as_mut().reset(due);
            }
            tokio::select! {
                biased;
                turn = wire.turn(true) => match turn {
                    Ok(Turn::Read) => {
                        pulse.heard();
                        if let Err(error) = self.take_frames(&mut wire) {
                            return Gone::Lost(error);
                        }
                    }
                    Ok(Turn::Wrote) => {}
                    Ok(Turn::Closed) => return Gone::Lost(Error::Unreachable("closed by the router".to_owned())),
                    Err(e) => return Gone::Lost(Error::Unreachable(e.to_string())),
                },
                () = self.shared.wake.notified() => {}
                command = self.inbox.recv(), if wire.has_room() => {
                    self.take_notes(&mut wire);
                    match command {
                        Some(Command::Close { done }) => {
                            wire.close().await;
                            return Gone::Closed(Some(done));
                        }
                        Some(command) => self.command(command, &mut wire),
                        None => {
                            wire.close().await;
                            return Gone::Closed(None);
                        }
                    }
                }
                () = &mut timer => {}
            }
        }
    }

    fn take_notes(&mut self, wire: &mut Wire) {
        let (gone, caught_up) = {
            let mut notes = self.shared.notes();
            if notes.gone.is_empty() && notes.caught_up.is_empty() {
                return;
            }
            (std::mem::take(&mut notes.gone), std::mem::take(&mut notes.caught_up))
        };
        for owner in caught_up {
            if let Some((id, stream)) = self.owners.get(&owner).and_then(|id| self.streams.get_key_value(id)) {
                wire.push(&resume(id, stream.delivered));
            }
        }
        for owner in gone {
            if let Some(id) = self.owners.remove(&owner) {
                self.streams.remove(&id);
            }
        }
    }

    fn command(&mut self, command: Command, wire: &mut Wire) {
        match command {
            Command::Open { id, syn, after, pipe, answer, owner } => {
                if self.streams.contains_key(&id) {
                    let why = format!("stream_id: `{id}` is open on this client already; read that stream");
                    let _ = answer.send(Err(Error::Request(why)));
                    return;
                }
                let mut stream = Stream::new(pipe, after);
                (stream.owner, stream.syn, stream.answer) = (Some(owner), syn, Some(answer));
                stream.open(&id, wire, self.fragment_bytes);
                self.owners.insert(owner, id.clone());
                self.streams.insert(id, stream);
            }
            Command::Cancel { id, reason, done } => {
                let cancel = TaskCancel { reason };
                if let Some(stream) = self.streams.get_mut(&id) {
                    wire.push(&Frame::json(id.as_str(), 0, Flags::NONE, kind::TASK_CANCEL, &cancel));
                    stream.cancel = Some(cancel);
                    self.on_flush.push(done);
                    return;
                }
                let mut stream = Stream::new(Arc::new(Pipe::default()), 0);
                (stream.cancel, stream.cancelled) = (Some(cancel), Some(done));
                wire.push(&resume(&id, 0));
                self.streams.insert(id, stream);
            }
            Command::Close { done } => drop(done.send(())),
        }
    }

    fn ask_later(&mut self, now: Instant, wire: &mut Wire) {
        let streams = &self.streams;
        self.later.retain(|(at, id)| {
            if let (true, Some(stream)) = (*at <= now, streams.get(id)) {
                wire.push(&resume(id, stream.delivered));
            }
            *at > now
        });
    }

    fn take_frames(&mut self, wire: &mut Wire) -> Result<(), Error> {
        while let Some(frame) = wire.take().map_err(|e| Error::Protocol(e.to_string()))? {
            if !frame.stream_id.is_empty() {
                self.stream_frame(frame, wire)?;
                continue;
            }
            if frame.flags.has(Flags::HB) && !frame.flags.has(Flags::ACK) {
                wire.push(&Frame::heartbeat(true));
            }
            if &*frame.kind == kind::ERROR {
                let error: WireError = frame.read().map_err(|e| Error::Protocol(e.message))?;
                if error.fatal == Fatal::Connection {
                    return Err(Error::of_connection(error));
                }
                tracing::warn!(%error, "the router says");
            }
            if &*frame.kind == kind::WINDOW_UPDATE {
                // The account's: of interest to each of its streams that has been accepted.
                for stream in self.streams.values().filter(|s| s.delivered > 0 && s.cancelled.is_none()) {
                    stream.pipe.push(frame.clone());
                }
            }
        }
        Ok(())
    }

    fn stream_frame(&mut self, frame: Frame, wire: &mut Wire) -> Result<(), Error> {
        let Some(stream) = self.streams.get_mut(&*frame.stream_id) else { return Ok(()) };
        if &*frame.kind == kind::ERROR && frame.flags.has(Flags::RST) {
            let error = frame.read().map_err(|e: WireError| Error::Protocol(e.message))?;
            self.refused(&frame.stream_id, error);
            return Ok(());
        }
        if frame.msg_seq != 0 && frame.msg_seq != stream.delivered + 1 {
            // Behind: a duplicate. Ahead: what lies between is asked for, and all of it comes again.
            if frame.msg_seq > stream.delivered && !stream.pipe.is_lagging() {
                stream.mend(&frame.stream_id, wire);
            }
            return Ok(());
        }
        let frame = match stream.joiner.add(frame) {
            Joined::Whole(frame) => frame,
            Joined::More => return Ok(()),
            Joined::Broken => return Err(Error::Protocol("a fragment is missing".to_owned())),
        };
        if &*frame.kind == kind::ACCEPTED {
            return self.accepted(frame, wire);
        }
        stream.mending = None;
        let (msg_seq, fin) = (frame.msg_seq, frame.flags.has(Flags::FIN));
        let id = fin.then(|| frame.stream_id.clone());
        if stream.cancelled.is_none() && !stream.pipe.push(frame) {
            return Ok(());
        }
        stream.delivered = stream.delivered.max(msg_seq);
        if let Some(id) = id {
            self.remove(&id, None);
        }
        Ok(())
    }

    fn accepted(&mut self, frame: Frame, wire: &mut Wire) -> Result<(), Error> {
        let accepted: Accepted = frame.read().map_err(|e| Error::Protocol(e.message))?;
        let Some((id, mut stream)) = self.streams.remove_entry(&*frame.stream_id) else { return Ok(()) };
        stream.later = 0;
        let named = StreamId::new(&accepted.stream_id);
        let attached = named != id;
        if attached && self.streams.contains_key(&named) {
            let why = format!("idempotency_key: its stream `{named}` is open on this client already; read that stream");
            stream.refuse(Error::Request(why));
            return Ok(());
        }
        let repeated = stream.syn.take().is_some() && (stream.syn_sent > 1 || accepted.state.is_closed());
        if attached {
            stream.delivered = 0;
        } else if frame.msg_seq == stream.delivered + 1 && stream.pipe.push(frame) {
            stream.delivered += 1;
        }
        if attached || repeated {
            wire.push(&resume(&named, stream.delivered));
        }
        if let Some(cancel) = &stream.cancel {
            wire.push(&Frame::json(named.as_str(), 0, Flags::NONE, kind::TASK_CANCEL, cancel));
        }
        if let Some(done) = stream.cancelled.take() {
            self.on_flush.push(done);
            return Ok(());
        }
        if let Some(owner) = stream.owner {
            self.owners.insert(owner, named.clone());
        }
        if let Some(answer) = stream.answer.take() {
            let _ = answer.send(Ok(accepted));
        }
        self.streams.insert(named, stream);
        Ok(())
    }

    /// `RST control.error`: a refusal, or the end of an accepted stream, or "not now".
    fn refused(&mut self, id: &str, error: WireError) {
        let Some((key, _)) = self.streams.get_key_value(id) else { return };
        let key = key.clone();
        let now_not = !error.judged && matches!(error.code, Code::Log | Code::Draining | Code::Limit);
        if let Some(stream) = self.streams.get_mut(id).filter(|s| s.syn.is_none() && now_not && s.later < LATER_MAX) {
            stream.later += 1;
            let wait = error.retry_after_ms.map_or(LATER, Duration::from_millis);
            self.later.push((Instant::now() + wait, key));
            return;
        }
        self.remove(id, Some(Error::Refused(error)));
    }

    fn remove(&mut self, id: &str, error: Option<Error>) {
        if let Some(stream) = self.streams.remove(id) {
            if let Some(owner) = stream.owner {
                self.owners.remove(&owner);
            }
            stream.end(error);
        }
    }
}

impl Stream {
    fn new(pipe: Arc<Pipe>, after: u64) -> Self {
        Self {
            owner: None,
            pipe,
            syn: None,
            syn_sent: 0,
            answer: None,
            delivered: after,
            joiner: Joiner::default(),
            mending: None,
            later: 0,
            cancel: None,
            cancelled: None,
        }
    }

    /// Opens or continues the stream on a new connection.
    fn open(&mut self, id: &StreamId, wire: &mut Wire, fragment_bytes: usize) {
        self.joiner.clear();
        self.mending = None;
        match &self.syn {
            Some(syn) => {
                self.syn_sent += 1;
                split(Frame::clone(syn), fragment_bytes, |part| wire.push(part));
            }
            None => wire.push(&resume(id, self.delivered)),
        }
    }

    fn mend(&mut self, id: &str, wire: &mut Wire) {
        if self.mending.is_some_and(|since| since.elapsed() < MEND_AGAIN) {
            return;
        }
        self.mending = Some(Instant::now());
        self.joiner.clear();
        wire.push(&resume_text(id, self.delivered));
    }

    fn refuse(self, error: Error) {
        self.end(Some(error));
    }

    fn end(self, error: Option<Error>) {
        if let Some(answer) = self.answer {
            let _ = answer.send(Err(error.clone().unwrap_or(Error::Closed)));
        }
        if let Some(done) = self.cancelled {
            let _ = done.send(error.clone().map_or(Ok(()), Err));
        }
        self.pipe.end(error);
    }
}

fn resume(id: &StreamId, after: u64) -> Frame {
    resume_text(id.as_str(), after)
}

fn resume_text(id: &str, after: u64) -> Frame {
    Frame::json(id, 0, Flags::SYN, kind::RESUME, &Resume { token: None, after })
}

//! One stream as its reader sees it: each message once, in order of msg_seq, whatever happens to connections.

use super::LineHandle;
use crate::error::Error;
use crate::pipe::{Found, Pipe};
use atp_proto::content::{Accepted, AgentText, Bill, Final, Partial, WindowUpdate};
use atp_proto::frame::kind;
use atp_proto::{Frame, StreamId};
use std::collections::VecDeque;
use std::sync::Arc;

/// A stream's messages. Dropping it stops listening; the task goes on.
#[derive(Debug)]
pub struct TaskStream {
    accepted: Accepted,
    pipe: Arc<Pipe>,
    frames: VecDeque<Frame>,
    guard: OpenGuard,
    ended: bool,
}

/// One message of the router.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub frame: Frame,
    pub kind: EventKind,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    Accepted(Accepted),
    Partial(Partial),
    Final(Box<Final>),
    /// Always last.
    Bill(Box<Bill>),
    Log,
    /// What the stream (`stream:ID`) or its account (`tenant:NAME`) may still use.
    Window(WindowUpdate),
    /// A payload type that this version doesn't read.
    Other,
}

/// A stream read to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskOutcome {
    pub stream_id: StreamId,
    pub accepted: Accepted,
    pub final_: Final,
    pub bill: Bill,
    /// The partials' texts, joined per lane, in order of their first word.
    pub texts: Vec<AgentText>,
}

/// Lets go of the stream when it is dropped.
#[derive(Debug)]
pub(crate) struct OpenGuard {
    id: StreamId,
    owner: u64,
    line: LineHandle,
}

impl OpenGuard {
    pub(crate) fn new(id: StreamId, line: LineHandle) -> Self {
        let owner = line.shared.next_owner();
        Self { id, owner, line }
    }

    pub(crate) fn owner(&self) -> u64 {
        self.owner
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.line.shared.let_go(self.owner);
    }
}

impl TaskStream {
    pub(crate) fn new(accepted: Accepted, pipe: Arc<Pipe>, mut guard: OpenGuard) -> Self {
        guard.id = StreamId::new(&accepted.stream_id);
        Self { accepted, pipe, frames: VecDeque::new(), guard, ended: false }
    }

    /// The stream's id; under a used key the one that the router named.
    #[must_use]
    pub fn id(&self) -> &StreamId {
        &self.guard.id
    }

    /// The answer to the submit or to the watch.
    #[must_use]
    pub fn accepted(&self) -> &Accepted {
        &self.accepted
    }

    /// Asks the router to stop the task; go on reading until the bill.
    ///
    /// # Errors
    /// When the client is closed.
    pub async fn cancel(&self) -> Result<(), Error> {
        self.guard.line.cancel(self.guard.id.clone(), None).await
    }

    /// The next message with its content read; `None` after the bill.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        let frame = match self.next_frame().await? {
            Ok(frame) => frame,
            Err(error) => return Some(Err(error)),
        };
        let kind = read_kind(&frame);
        Some(kind.map(|kind| Event { frame, kind }))
    }

    /// The next message with its content unread: for relays and measurements.
    pub async fn next_frame(&mut self) -> Option<Result<Frame, Error>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Some(Ok(frame));
            }
            if self.ended {
                return None;
            }
            match self.pipe.take().await {
                Found::Frames(frames) => self.frames = frames,
                Found::Lagged => self.guard.line.shared.caught_up(self.guard.owner),
                Found::End(end) => {
                    self.ended = true;
                    return end.map(Err);
                }
            }
        }
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// What ended the stream without a bill.
    pub async fn finish(mut self) -> Result<TaskOutcome, Error> {
        let mut texts: Vec<AgentText> = Vec::new();
        let mut final_ = None;
        while let Some(event) = self.next().await {
            match event?.kind {
                EventKind::Partial(partial) => collect(&mut texts, partial),
                EventKind::Final(end) => final_ = Some(*end),
                EventKind::Bill(bill) => {
                    let final_ = final_.ok_or_else(|| Error::Protocol("a bill came without a final".to_owned()))?;
                    let (stream_id, accepted) = (self.guard.id.clone(), self.accepted.clone());
                    return Ok(TaskOutcome { stream_id, accepted, final_, bill: *bill, texts });
                }
                EventKind::Accepted(_) | EventKind::Log | EventKind::Window(_) | EventKind::Other => {}
            }
        }
        Err(Error::Protocol("the stream ended without a bill".to_owned()))
    }
}

fn read_kind(frame: &Frame) -> Result<EventKind, Error> {
    let read = match &*frame.kind {
        kind::RESULT_PARTIAL => frame.read().map(EventKind::Partial),
        kind::RESULT_FINAL => frame.read().map(EventKind::Final),
        kind::BILL => frame.read().map(EventKind::Bill),
        kind::ACCEPTED => frame.read().map(EventKind::Accepted),
        kind::AGENT_LOG => Ok(EventKind::Log),
        kind::WINDOW_UPDATE => frame.read().map(EventKind::Window),
        _ => Ok(EventKind::Other),
    };
    read.map_err(|e| Error::Protocol(e.message))
}

fn collect(texts: &mut Vec<AgentText>, partial: Partial) {
    let Some(text) = partial.text else { return };
    match texts.iter_mut().find(|lane| lane.call_id == partial.call_id) {
        Some(lane) => lane.text.push_str(&text),
        None => texts.push(AgentText { agent: partial.agent, call_id: partial.call_id, text }),
    }
}

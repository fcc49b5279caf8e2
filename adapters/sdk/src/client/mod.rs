//! The client's side: one connection that many streams share, which comes back by itself.

mod line;
pub(crate) mod stream;
pub(crate) mod submit;

use crate::backoff::Backoff;
use crate::dial::Dialer;
use crate::error::Error;
use crate::pipe::Pipe;
use crate::wire::open;
use atp_proto::code::{Code, WireError};
use atp_proto::content::{Accepted, Role};
use atp_proto::{Frame, StreamId};
use line::{Command, Line, LineShared};
use std::sync::Arc;
use std::time::Duration;
use stream::TaskStream;
use submit::{Retry, SubmitRequest};
use tokio::sync::{mpsc, oneshot};

/// Commands that wait for the connection's loop.
const COMMANDS_MAX: usize = 64;

/// Settings of a client's connection.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    pub token: Option<String>,
    /// After a loss; the first connection is tried once at each router.
    pub reconnect: Backoff,
    /// Dial and hello.
    pub connect_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self { token: None, reconnect: Backoff::default(), connect_timeout: Duration::from_secs(5) }
    }
}

/// A client of one router. Clones share the connection; it closes when the last clone and stream are gone.
#[derive(Clone, Debug)]
pub struct Client {
    line: LineHandle,
}

#[derive(Clone, Debug)]
pub(crate) struct LineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<LineShared>,
}

impl Client {
    /// Connects and says hello, once at each router until one takes it; later losses are mended by `options.reconnect`. Needs a running tokio runtime.
    ///
    /// # Errors
    /// `Unreachable`, `Auth`, `Refused` (the router is full or draining), `Protocol`.
    pub async fn connect(dialer: Dialer, options: ClientOptions) -> Result<Self, Error> {
        let mut left = dialer.routers();
        let (wire, hello) = loop {
            left = left.saturating_sub(1);
            match open(&dialer, Role::Client, options.token.as_deref(), options.connect_timeout).await {
                Ok(opened) => break opened,
                Err(error) if left == 0 || matches!(error, Error::Auth(_)) => return Err(error),
                Err(_) => {}
            }
        };
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(LineShared::default());
        tokio::spawn(Line::new(dialer, options, inbox, Arc::clone(&shared)).run(wire, hello));
        Ok(Self { line: LineHandle { commands, shared } })
    }

    /// Submits a task and waits for the router's word on it. A lost connection is mended underneath: the same SYN goes out
    /// again until it is answered.
    ///
    /// # Errors
    /// `Refused` with code, scope and retry-after; `Request` for what can't be sent; `Unreachable` once reconnecting gave up.
    pub async fn submit(&self, mut request: SubmitRequest) -> Result<TaskStream, Error> {
        let mut attempt = 0;
        loop {
            let id = request.resolve_stream_id()?;
            let error = match self.open(id.clone(), Some(request.frame(&id)), 0).await {
                Ok(stream) => return Ok(stream),
                Err(Error::Refused(error)) => error,
                Err(error) => return Err(error),
            };
            let retry = request.retry.as_ref().and_then(|retry| retry_wait(retry, attempt, &error));
            let Some(wait) = retry else { return Err(Error::Refused(error)) };
            attempt += 1;
            tokio::time::sleep(wait).await;
            if error.judged {
                request = request.next_try();
            }
        }
    }

    /// Follows a stream of this tenant from behind msg_seq `after`; it spends no token and changes nothing.
    ///
    /// # Errors
    /// `Refused` when there is no such stream or the log no longer has it.
    pub async fn watch(&self, stream: StreamId, after: u64) -> Result<TaskStream, Error> {
        self.open(stream, None, after).await
    }

    /// Asks the router to stop the task of a stream; resolves when the request is on its way. The stream ends by itself, with
    /// its bill.
    ///
    /// # Errors
    /// `Refused` when there is no such stream.
    pub async fn cancel(&self, stream: StreamId) -> Result<(), Error> {
        self.line.cancel(stream, None).await
    }

    /// Closes the connection once what waits is written; streams that are open end with `Closed`.
    pub async fn close(self) {
        let (done, closed) = oneshot::channel();
        if self.line.commands.send(Command::Close { done }).await.is_ok() {
            let _ = closed.await;
        }
    }

    async fn open(&self, id: StreamId, syn: Option<Frame>, after: u64) -> Result<TaskStream, Error> {
        let pipe = Arc::new(Pipe::default());
        let (answer, answered) = oneshot::channel();
        // Made first, so that an abandoned wait lets go of the stream.
        let guard = stream::OpenGuard::new(id.clone(), self.line.clone());
        let command =
            Command::Open { id, syn: syn.map(Box::new), after, pipe: Arc::clone(&pipe), answer, owner: guard.owner() };
        self.line.send(command).await?;
        let accepted: Accepted = answered.await.map_err(|_| self.line.shared.error())??;
        Ok(TaskStream::new(accepted, pipe, guard))
    }
}

impl LineHandle {
    async fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).await.map_err(|_| self.shared.error())
    }

    pub(crate) async fn cancel(&self, stream: StreamId, reason: Option<String>) -> Result<(), Error> {
        let (done, sent) = oneshot::channel();
        self.send(Command::Cancel { id: stream, reason, done }).await?;
        sent.await.map_err(|_| self.shared.error())?
    }
}

/// How long to wait before the same work is tried again; `None`: the refusal stands.
fn retry_wait(retry: &Retry, attempt: u32, error: &WireError) -> Option<Duration> {
    let passes = match error.code {
        Code::Log | Code::Draining | Code::Window | Code::AgentDown | Code::WindowAgent | Code::Preempt => true,
        // Rates say when to come again; sizes don't.
        Code::Limit | Code::Budget => error.retry_after_ms.is_some(),
        Code::Proto
        | Code::Auth
        | Code::Sec
        | Code::SeqRetry
        | Code::Timeout
        | Code::Consensus
        | Code::Idempotency
        | Code::ResumeGone
        | Code::OutcomeUnknown => false,
    };
    let wait = error.retry_after_ms.map_or_else(|| Backoff::default().wait(attempt), Duration::from_millis);
    (passes && attempt < retry.attempts && wait <= retry.wait_max).then_some(wait)
}

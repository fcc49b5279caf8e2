//! The agent's connection: one loop that takes dispatches, answers heartbeats and writes what calls have to say; it
//! reconnects for ever. Calls run beside it and don't notice a lost connection.

use super::call::CallState;
use super::estimate::Estimates;
use super::meter::Meter;
use super::table::{Admit, Table};
use super::{AgentOptions, Call, Handler, Outcome, StopReason};
use crate::dial::Dialer;
use crate::error::Error;
use crate::fragment::{Joined, Joiner};
use crate::wire::{Pulse, Turn, Wire, open};
use atp_proto::code::{Fatal, WireError};
use atp_proto::content::{
    Ack, AgentCancel, AgentError, AgentStatus, BudgetUpdate, Capabilities, Dispatch, Proof, Role, Status, ToolResult,
    UsageSource, estimated_call,
};
use atp_proto::frame::kind;
use atp_proto::{CallId, Code, Cost, Flags, Frame, limits};
use futures_util::FutureExt;
use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tracing::{debug, info, warn};

/// Unacknowledged bytes that all producers which can wait share.
const ROOM_BYTES_ALL: usize = 16 * 1024 * 1024;
const ROOM_BYTES_MIN: usize = 64 * 1024;
/// A connection that lived this long starts the backoff anew.
const STEADY: Duration = Duration::from_secs(5);

/// What handles, calls and the session share.
#[derive(Debug)]
pub(crate) struct Shared {
    incarnation: String,
    wake: Notify,
    running: AtomicUsize,
    state: Mutex<State>,
    phase: watch::Sender<Phase>,
}

#[derive(Debug, Default)]
struct State {
    unsent: Vec<Arc<CallState>>,
    /// Answers to `agent.estimate`: whoever lost them asks again.
    replies: Vec<Frame>,
    status: Option<AgentStatus>,
    status_new: bool,
    drain: bool,
    drop: bool,
    error: Option<Error>,
    session: Option<AbortHandle>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Away,
    Up,
    Ended,
}

impl Shared {
    pub(crate) fn new(incarnation: String) -> Self {
        let (phase, _) = watch::channel(Phase::Away);
        let state = Mutex::new(State::default());
        Self { incarnation, wake: Notify::new(), running: AtomicUsize::new(0), state, phase }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, session: AbortHandle) {
        self.state().session = Some(session);
    }

    pub(crate) fn has_unsent(&self, call: Arc<CallState>) {
        self.state().unsent.push(call);
        self.wake.notify_one();
    }

    pub(crate) fn reply(&self, frame: Frame) {
        self.state().replies.push(frame);
        self.wake.notify_one();
    }

    /// What one call may have unacknowledged before a producer that can wait does so.
    pub(crate) fn room_of_call(&self) -> usize {
        (ROOM_BYTES_ALL / self.running.load(Ordering::Relaxed).max(1)).max(ROOM_BYTES_MIN)
    }

    pub(crate) fn set_status(&self, status: AgentStatus) {
        let mut state = self.state();
        (state.status, state.status_new) = (Some(status), true);
        drop(state);
        self.wake.notify_one();
    }

    pub(crate) fn drain(&self) {
        self.state().drain = true;
        self.set_status(AgentStatus { status: Status::Draining, ..AgentStatus::default() });
    }

    pub(crate) fn drop_connection(&self) {
        self.state().drop = true;
        self.wake.notify_one();
    }

    pub(crate) fn kill(&self) {
        if let Some(session) = &self.state().session {
            session.abort();
        }
    }

    pub(crate) fn incarnation(&self) -> &str {
        &self.incarnation
    }

    pub(crate) fn last_error(&self) -> Option<Error> {
        self.state().error.clone()
    }

    pub(crate) async fn connected(&self) -> Result<(), Error> {
        let mut phase = self.phase.subscribe();
        let now = phase.wait_for(|phase| *phase != Phase::Away).await.map(|phase| *phase);
        if now.is_ok_and(|phase| phase == Phase::Up) { Ok(()) } else { Err(self.last_error().unwrap_or(Error::Closed)) }
    }

    pub(crate) async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        // An error would mean that the sender is gone, and this holds it.
        let _ = phase.wait_for(|phase| *phase == Phase::Ended).await;
    }
}

pub(crate) struct Session {
    dialer: Dialer,
    capabilities: Capabilities,
    handler: Arc<dyn Handler>,
    options: AgentOptions,
    shared: Arc<Shared>,
    table: Table,
    /// Handlers at work; dropping it ends them.
    tasks: JoinSet<()>,
    /// Calls with something to send on the present connection.
    unsent: VecDeque<Arc<CallState>>,
    joiners: HashMap<CallId, Joiner>,
    estimates: Estimates,
    drain_until: Option<Instant>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.phase.send_replace(Phase::Ended);
    }
}

/// Why a connection ended.
enum Gone {
    Lost(Error),
    Drained,
}

impl Session {
    pub(crate) fn new(
        dialer: Dialer,
        capabilities: Capabilities,
        handler: Arc<dyn Handler>,
        options: AgentOptions,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            dialer,
            capabilities,
            handler,
            options,
            shared,
            table: Table::default(),
            tasks: JoinSet::new(),
            unsent: VecDeque::new(),
            joiners: HashMap::new(),
            estimates: Estimates::default(),
            drain_until: None,
        }
    }

    /// Connects, serves, reconnects: until it is drained, refused for its credential, or has given up.
    pub(crate) async fn run(mut self) {
        let mut attempt = 0;
        let mut up_last = Instant::now();
        loop {
            let token = self.options.token.clone();
            let error = match open(&self.dialer, Role::Agent, token.as_deref(), self.options.connect_timeout).await {
                Ok((wire, hello)) => {
                    let begun = Instant::now();
                    let gone = self.connection(wire, hello.heartbeat_ms).await;
                    self.shared.phase.send_replace(Phase::Away);
                    up_last = Instant::now();
                    if begun.elapsed() >= STEADY {
                        attempt = 0;
                    }
                    match gone {
                        Gone::Drained => return,
                        Gone::Lost(error) => error,
                    }
                }
                Err(error) => error,
            };
            debug!(agent = %self.capabilities.agent, %error, "no connection");
            let fatal = matches!(error, Error::Auth(_))
                || self.options.reconnect.give_up.is_some_and(|after| up_last.elapsed() >= after);
            self.shared.state().error = Some(error);
            if fatal || self.is_drained() {
                return;
            }
            let wait = self.options.reconnect.wait(attempt);
            attempt += 1;
            tokio::time::sleep(wait).await;
        }
    }

    /// True when a drain was asked for and there is nothing left to wait for.
    fn is_drained(&mut self) -> bool {
        if !self.shared.state().drain {
            return false;
        }
        let until = *self.drain_until.get_or_insert_with(|| Instant::now() + self.options.shutdown_grace);
        self.table.is_empty() || Instant::now() >= until
    }

    /// Serves one connection until it is gone. Nothing of the connection before is left: the call list is exact.
    async fn connection(&mut self, mut wire: Wire, heartbeat_ms: u64) -> Gone {
        self.greet(&mut wire);
        let mut pulse = Pulse::new(heartbeat_ms);
        let timer = tokio::time::sleep_until(pulse.due());
        tokio::pin!(timer);
        let mut up = false;
        loop {
            self.fill(&mut wire);
            if !up && wire.is_flushed() {
                up = true;
                self.shared.phase.send_replace(Phase::Up);
                info!(agent = %self.capabilities.agent, router = %self.dialer, "connected");
            }
            if std::mem::take(&mut self.shared.state().drop) {
                return Gone::Lost(Error::Unreachable("the connection was dropped on purpose".to_owned()));
            }
            if self.is_drained() && self.unsent.is_empty() {
                wire.close().await;
                return Gone::Drained;
            }
            if Instant::now() >= pulse.due() && !pulse.beat(&mut wire) {
                return Gone::Lost(Error::Unreachable("three heartbeat intervals of silence".to_owned()));
            }
            let due = self.drain_until.map_or(pulse.due(), |until| until.min(pulse.due()));
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
                // One round of the scheduler lets the calls that are ready add to the same write.
                () = self.shared.wake.notified() => tokio::task::yield_now().await,
                () = &mut timer => {}
            }
        }
    }

    /// Capabilities with the call list, the status, and all that isn't acknowledged.
    fn greet(&mut self, wire: &mut Wire) {
        self.joiners.clear();
        self.estimates.clear();
        self.unsent.clear();
        let capabilities = Capabilities { calls: self.table.list(), ..self.capabilities.clone() };
        let frame = match self.handler.capabilities_json(&capabilities) {
            Some(json) => Frame::raw("", 0, Flags::NONE, kind::CAPABILITIES, json.into()),
            None => Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities),
        };
        wire.push(&frame);
        {
            let mut state = self.shared.state();
            state.unsent.clear();
            state.replies.clear();
            state.drop = false;
            state.status_new = state.status.is_some();
        }
        // After the list was cleared: what a call adds meanwhile finds itself listed or lists itself again.
        self.unsent.extend(self.table.calls().filter(|call| call.unsend()).cloned());
    }

    /// Moves what calls have to say into the write buffer, each call in its turn.
    fn fill(&mut self, wire: &mut Wire) {
        {
            let mut state = self.shared.state();
            self.unsent.extend(state.unsent.drain(..));
            state.replies.drain(..).for_each(|reply| wire.push(&reply));
            if std::mem::take(&mut state.status_new)
                && let Some(status) = &state.status
            {
                wire.push(&Frame::json("", 0, Flags::NONE, kind::STATUS, status));
            }
        }
        while wire.has_room() {
            let Some(call) = self.unsent.pop_front() else { return };
            let all = call.send(|bytes| {
                wire.push_encoded(bytes);
                wire.has_room()
            });
            if !all {
                self.unsent.push_back(call);
            }
        }
    }

    fn take_frames(&mut self, wire: &mut Wire) -> Result<(), Error> {
        while let Some(frame) = wire.take().map_err(|e| Error::Protocol(e.to_string()))? {
            if frame.stream_id.is_empty() {
                self.own_frame(&frame, wire)?;
            } else if let Some(call) = CallId::parse(&frame.stream_id) {
                self.call_frame(call, frame, wire)?;
            } else if let Some(call) = estimated_call(&frame.stream_id) {
                self.estimates.frame(call, frame, &self.capabilities, &self.handler, &self.shared)?;
            }
        }
        Ok(())
    }

    fn own_frame(&self, frame: &Frame, wire: &mut Wire) -> Result<(), Error> {
        if frame.flags.has(Flags::HB) && !frame.flags.has(Flags::ACK) {
            wire.push(&Frame::heartbeat(true));
        }
        if &*frame.kind == kind::ERROR {
            let error: WireError = frame.read().map_err(|e| Error::Protocol(e.message))?;
            warn!(agent = %self.capabilities.agent, %error, "the router says");
            if error.fatal == Fatal::Connection {
                return Err(Error::of_connection(error));
            }
            self.shared.state().error = Some(Error::Refused(error));
        }
        Ok(())
    }

    fn call_frame(&mut self, call: CallId, frame: Frame, wire: &mut Wire) -> Result<(), Error> {
        let frame = if frame.flags.has(Flags::MORE) || frame.frag_seq > 0 {
            if self.joiners.len() >= limits::STREAMS_MAX && !self.joiners.contains_key(&call) {
                return Err(Error::Protocol("too many fragmented dispatches at once".to_owned()));
            }
            match self.joiners.entry(call).or_default().add(frame) {
                Joined::Whole(frame) => {
                    self.joiners.remove(&call);
                    frame
                }
                Joined::More => return Ok(()),
                // On an ordered stream that is a broken peer; the next connection begins anew.
                Joined::Broken => return Err(Error::Protocol(format!("a fragment of call {call} is missing"))),
            }
        } else {
            frame
        };
        let bad = |e: WireError| Error::Protocol(e.message);
        match &*frame.kind {
            kind::DISPATCH => match frame.read::<Dispatch>() {
                Ok(dispatch) if dispatch.call_id == call => self.dispatch(dispatch, wire),
                Ok(_) => refuse(wire, call, Code::Proto, "call_id: is not the stream's id", None),
                Err(error) => refuse(wire, call, Code::Proto, &error.message, None),
            },
            kind::BUDGET_UPDATE => {
                let update: BudgetUpdate = frame.read().map_err(bad)?;
                if let Some(state) = self.table.ordered(call, update.shard, update.epoch) {
                    state.set_grant(update.grant, update.last);
                }
            }
            kind::AGENT_CANCEL => {
                let cancel: AgentCancel = frame.read().map_err(bad)?;
                if let Some(state) = self.table.ordered(call, cancel.shard, cancel.epoch) {
                    state.stop(StopReason::Cancelled);
                }
            }
            kind::TOOL_RESULT => {
                let result: ToolResult = frame.read().map_err(bad)?;
                if let Some(state) = self.table.running(call) {
                    state.answer(result);
                }
            }
            kind::ACK => {
                let ack: Ack = frame.read().map_err(bad)?;
                self.table.acknowledge(call, ack.msg_seq);
                if !ack.open.is_empty() {
                    self.send_again(call);
                }
            }
            // The router wants no more of this stream: nothing that is kept has a reader.
            kind::ERROR => self.table.acknowledge(call, u64::MAX),
            _ => {}
        }
        Ok(())
    }

    fn send_again(&mut self, call: CallId) {
        if let Some(state) = self.table.calls().find(|state| state.id == call)
            && state.unsend()
        {
            self.unsent.push_back(Arc::clone(state));
        }
    }

    fn dispatch(&mut self, dispatch: Dispatch, wire: &mut Wire) {
        let call = dispatch.call_id;
        while self.tasks.try_join_next().is_some() {}
        match self.table.admit(&dispatch, &self.shared) {
            Admit::New(state) => {
                if self.shared.state().drain {
                    return refuse(wire, call, Code::Draining, "the agent is draining", None);
                }
                let most = self.capabilities.max_parallel as usize;
                if self.shared.running.load(Ordering::Relaxed) >= most {
                    let message = format!("max_parallel: {most} calls are running");
                    return refuse(wire, call, Code::WindowAgent, &message, Some(100));
                }
                self.start(dispatch, state);
            }
            Admit::Known(state) => {
                if state.unsend() {
                    self.unsent.push_back(state);
                }
            }
            Admit::Stale => refuse(wire, call, Code::AgentDown, "epoch: a later owner of the shard was here", None),
            Admit::Unknown => refuse(wire, call, Code::AgentDown, "this incarnation never got the call", None),
            Admit::Ignore => {}
        }
    }

    fn start(&mut self, dispatch: Dispatch, state: Arc<CallState>) {
        self.table.insert(Arc::clone(&state));
        self.shared.running.fetch_add(1, Ordering::Relaxed);
        let running = Running(Arc::clone(&self.shared));
        let handler = Arc::clone(&self.handler);
        let grace = self.options.end_grace;
        self.tasks.spawn(async move {
            let call = Call { dispatch, meter: Meter { call: Arc::clone(&state) } };
            let too_late = async {
                state.stopped().await;
                tokio::time::sleep(grace).await;
            };
            let outcome = tokio::select! {
                biased;
                outcome = AssertUnwindSafe(async { handler.call(call).await }).catch_unwind() => {
                    outcome.unwrap_or_else(|_| failed(Code::AgentDown, "the handler panicked"))
                }
                () = too_late => failed(Code::Timeout, "the call didn't end when it was asked to"),
            };
            drop(running);
            conclude(&state, outcome);
        });
    }
}

/// Counts a call as running until it is dropped, also when its task is aborted.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

fn failed(code: Code, message: &str) -> Outcome {
    Outcome::Error(AgentError { code, message: message.to_owned(), retry_after_ms: None, cost: None, proof: None })
}

/// Says the last word of a call, with a cost that never falls behind what the meter saw.
pub(super) fn conclude(state: &Arc<CallState>, outcome: Outcome) {
    match outcome {
        Outcome::Final(mut end) => {
            state.say(Flags::FIN, kind::RESULT_FINAL, end.cost, end.usage_source, |total| {
                end.cost = total;
                json(&end)
            });
        }
        Outcome::Error(mut error) => {
            state.say(Flags::RST, kind::ERROR, error.cost.unwrap_or_default(), UsageSource::Counted, |total| {
                error.cost = error.cost.map(|_| total);
                // What was emitted disproves it.
                error.proof = error.proof.filter(|_| total == Cost::default());
                json(&error)
            });
        }
        Outcome::Vanish => state.vanish(),
    }
}

fn json<T: serde::Serialize>(value: &T) -> bytes::Bytes {
    serde_json::to_vec(value).expect("content types serialize: they hold no maps with other keys").into()
}

/// Says no before anything was called. Not kept: if it is lost, the call list says the same.
fn refuse(wire: &mut Wire, call: CallId, code: Code, message: &str, retry_after_ms: Option<u64>) {
    let error =
        AgentError { code, message: message.to_owned(), retry_after_ms, cost: None, proof: Some(Proof::NotCalled) };
    wire.push(&Frame::json(call.to_string(), 1, Flags::RST, kind::ERROR, &error));
}

//! The agent's side: what a handler sees of a call, and `serve`, which keeps an agent connected. It never decides what a
//! call may spend: the router's grant does.
//!
//! ```no_run
//! use atp_proto::content::{AgentFinal, Capabilities, Finish};
//! use atp_proto::{AgentName, Cost, Tokens};
//! use atp_sdk::{AgentOptions, BoxFuture, Call, Dialer, Handler, Outcome, Verdict, serve};
//! use std::sync::Arc;
//!
//! struct Echo;
//!
//! impl Handler for Echo {
//!     fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
//!         Box::pin(async move {
//!             let mut cost = Cost::default();
//!             for word in call.dispatch.task.split_inclusive(' ') {
//!                 cost.out_tokens = Tokens(cost.out_tokens.0 + 1);
//!                 if let Verdict::Stop(_) = call.meter.emit(Some(word), None, cost) {
//!                     return Outcome::Final(AgentFinal { cost, finish: Finish::Grant, ..AgentFinal::default() });
//!                 }
//!             }
//!             Outcome::Final(AgentFinal { cost, ..AgentFinal::default() })
//!         })
//!     }
//! }
//!
//! # async fn example() -> Result<(), atp_sdk::Error> {
//! let capabilities = Capabilities { agent: AgentName::new("echo"), max_parallel: 4, ..Capabilities::default() };
//! let agent = serve(Dialer::tcp("127.0.0.1:7443"), capabilities, Arc::new(Echo), AgentOptions::default());
//! agent.connected().await?;
//! # Ok(()) }
//! ```

pub(crate) mod call;
mod estimate;
pub mod meter;
pub mod offline;
mod session;
mod table;
pub mod tool;

use crate::backoff::Backoff;
use crate::dial::Dialer;
use crate::error::Error;
use atp_proto::content::{
    AgentError, AgentFinal, AgentStatus, Capabilities, Dispatch, EstimateFigures, EstimateRequest,
};
use futures_util::future::BoxFuture;
use meter::Meter;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of one call that may wait for the router's acknowledgement; more stops the call.
pub const UNACKED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Unacknowledged bytes of one call above which [`Meter::room`] makes a producer wait.
pub const ROOM_BYTES_MAX: usize = 1024 * 1024;

/// Does the work of an agent.
pub trait Handler: Send + Sync + 'static {
    /// Runs one call to its end. It spends through `call.meter` and stops when that says so. Dropped if it hasn't ended
    /// 5 s after it was asked to stop; its outcome is unknown then.
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome>;

    /// Says what a call would cost, for `control.capabilities` with `estimate.mode: preflight`. The router waits 2 s; dropped
    /// then.
    fn estimate(&self, _request: EstimateRequest) -> BoxFuture<'_, Estimated> {
        Box::pin(std::future::ready(Estimated::Declared))
    }

    /// Told once, before the first call.
    fn started(&self, _agent: AgentHandle) {}

    /// The JSON text of `control.capabilities`, where it can't be the usual one (a test's faults).
    fn capabilities_json(&self, _capabilities: &Capabilities) -> Option<Vec<u8>> {
        None
    }
}

/// The answer to `agent.estimate`.
#[derive(Clone, Debug, PartialEq)]
pub enum Estimated {
    /// The figures that the capabilities declare; an error where they have none.
    Declared,
    Figures(EstimateFigures),
    /// No estimate can be given: the router asks another agent.
    Failed(AgentError),
    /// The JSON text of `agent.estimate.result`, where it can't be the usual one (a test's faults).
    Raw(Vec<u8>),
}

/// One dispatched call.
#[derive(Debug)]
pub struct Call {
    pub dispatch: Dispatch,
    pub meter: Meter,
}

/// How a call ended. The SDK raises `cost` to what the meter saw: running totals never fall.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// `text` is what the partials had not.
    Final(AgentFinal),
    /// With `proof` it cost nothing; with `cost` it is settled at that; with neither at hold + reach.
    Error(AgentError),
    /// Say nothing more of this call: faults.
    Vanish,
}

/// What a handler may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Go,
    Stop(StopReason),
}

/// Why a call has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// More is spent than granted: end with `finish: grant`.
    Grant,
    /// Asked to stop: end with `finish: cancelled` within 5 s.
    Cancelled,
    /// The call's own deadline has passed.
    Deadline,
    /// Too much is unacknowledged; what was emitted last wasn't kept.
    Backlog,
}

/// Settings of an agent's connection.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    pub token: Option<String>,
    pub reconnect: Backoff,
    /// Dial and hello.
    pub connect_timeout: Duration,
    /// How long a call may go on after it was asked to stop.
    pub end_grace: Duration,
    /// How long `shutdown` waits for running calls and acknowledgements.
    pub shutdown_grace: Duration,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            token: None,
            reconnect: Backoff::forever(),
            connect_timeout: Duration::from_secs(5),
            end_grace: Duration::from_secs(5),
            shutdown_grace: Duration::from_secs(5),
        }
    }
}

/// A running agent. Cloning is cheap; dropping it doesn't stop the agent.
#[derive(Clone, Debug)]
pub struct AgentHandle {
    shared: Arc<session::Shared>,
}

/// Connects and serves until `shutdown`: takes dispatches, reconnects, lists its calls and sends again what wasn't
/// acknowledged. An empty `incarnation` is made here. Needs a running tokio runtime.
pub fn serve(
    dialer: Dialer,
    mut capabilities: Capabilities,
    handler: Arc<dyn Handler>,
    options: AgentOptions,
) -> AgentHandle {
    if capabilities.incarnation.is_empty() {
        capabilities.incarnation = uuid::Uuid::new_v4().simple().to_string();
    }
    capabilities.max_parallel = capabilities.max_parallel.max(1);
    let shared = Arc::new(session::Shared::new(capabilities.incarnation.clone()));
    let handle = AgentHandle { shared: Arc::clone(&shared) };
    handler.started(handle.clone());
    let session = session::Session::new(dialer, capabilities, handler, options, Arc::clone(&shared));
    shared.begin(tokio::spawn(session.run()).abort_handle());
    handle
}

impl AgentHandle {
    /// States the agent's status; the latest is stated again after a reconnect.
    pub fn status(&self, status: AgentStatus) {
        self.shared.set_status(status);
    }

    /// Resolves when the capabilities are on a connection's way.
    ///
    /// # Errors
    /// `Auth` when the credential is refused, `Closed` when the agent has ended: then no connection will come.
    pub async fn connected(&self) -> Result<(), Error> {
        self.shared.connected().await
    }

    /// Why the last attempt failed or the last connection was lost.
    #[must_use]
    pub fn last_error(&self) -> Option<Error> {
        self.shared.last_error()
    }

    #[must_use]
    pub fn incarnation(&self) -> &str {
        self.shared.incarnation()
    }

    /// Takes no more calls, waits a while for running ones and their acknowledgement, and closes the connection.
    pub async fn shutdown(&self) {
        self.shared.drain();
        self.shared.ended().await;
    }

    /// Resolves when the agent has ended.
    pub async fn ended(&self) {
        self.shared.ended().await;
    }

    /// Ends everything without a word, as if the process had died: faults and tests.
    pub fn kill(&self) {
        self.shared.kill();
    }

    /// Closes the connection without a word; the agent reconnects: faults and tests.
    pub fn drop_connection(&self) {
        self.shared.drop_connection();
    }
}

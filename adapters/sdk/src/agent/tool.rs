//! `Meter::tool`: an agent asks, and waits for the one answer. A request outlives a lost connection: it is said again until it
//! is answered. Runs no tool.

use super::StopReason;
use super::meter::Meter;
use atp_proto::code::WireError;
use atp_proto::content::{ToolRequest, ToolResult};
use atp_proto::{Amount, Code};
use serde_json::Value;
use std::time::Duration;
use tokio::sync::oneshot;

/// A request that isn't answered is said again: the answer may have been lost between routers.
const AGAIN: Duration = Duration::from_secs(30);

/// An allowed request.
#[derive(Clone, Debug, PartialEq)]
pub enum ToolAnswer {
    /// The router ran its tool: what it brought, and what was booked for it beside the call's grant.
    Data { data: Value, cost: Amount },
    /// Leave is given: the agent runs its own tool and reports its cost in the running total.
    Own,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ToolError {
    /// Refused (ESEC, EBUDGET, ...), or the tool failed. The call may go on without it.
    #[error("{0}")]
    Refused(WireError),
    /// The call has to end; the answer isn't waited for.
    #[error("the call has to end: {0:?}")]
    Stopped(StopReason),
}

/// A request that waits for its answer, as it is said again.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) bytes: bytes::Bytes,
    pub(super) answer: oneshot::Sender<ToolResult>,
}

impl Meter {
    /// Asks for a tool and waits for the answer, over lost connections too. Tools of the router cost nothing of the grant.
    ///
    /// # Errors
    /// Refused or failed, or the call was stopped meanwhile.
    pub async fn tool(&self, tool: &str, args: Value) -> Result<ToolAnswer, ToolError> {
        self.ask(ToolRequest { tool: tool.to_owned(), args, ..ToolRequest::default() }).await
    }

    /// Asks for leave to run a tool of the agent's own that will cost at most `budget`.
    ///
    /// # Errors
    /// As `tool`.
    pub async fn own_tool(&self, tool: &str, args: Value, budget: Amount) -> Result<ToolAnswer, ToolError> {
        self.ask(ToolRequest { tool: tool.to_owned(), args, budget }).await
    }

    /// Says what a run of an own tool has cost. It is part of the running total that the next `emit` states, and its bill
    /// shows how much of that total it is.
    pub fn own_tool_spent(&self, tool: &str, more: Amount) {
        self.call.own_tool_spent(tool, more);
    }

    async fn ask(&self, request: ToolRequest) -> Result<ToolAnswer, ToolError> {
        let mut answer = self.call.ask(&request).map_err(ToolError::Stopped)?;
        let result = loop {
            tokio::select! {
                biased;
                result = &mut answer => break result.map_err(|_| ToolError::Stopped(StopReason::Cancelled))?,
                reason = self.call.stopped() => return Err(ToolError::Stopped(reason)),
                () = tokio::time::sleep(AGAIN) => self.call.say_again(),
            }
        };
        match result {
            ToolResult { ok: true, own: true, .. } => Ok(ToolAnswer::Own),
            ToolResult { ok: true, data, cost, .. } => Ok(ToolAnswer::Data { data, cost }),
            ToolResult { error, .. } => {
                let unsaid = || WireError::new(Code::OutcomeUnknown, "the router doesn't say why");
                Err(ToolError::Refused(error.unwrap_or_else(unsaid)))
            }
        }
    }
}

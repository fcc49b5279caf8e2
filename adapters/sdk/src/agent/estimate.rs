//! Answers to `agent.estimate`, each on a stream of its own. Nothing is kept for a lost connection: who asked asks again, or
//! asks somebody else.

use super::session::Shared;
use super::{Estimated, Handler};
use crate::error::Error;
use crate::fragment::{Joined, Joiner};
use atp_proto::content::{AgentError, Capabilities, EstimateRequest, estimate_stream};
use atp_proto::frame::kind;
use atp_proto::{CallId, Code, Flags, Frame};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Questions at once; more are refused.
pub(crate) const ASKED_MAX: usize = 256;
/// The router waits no longer.
const ANSWER: Duration = Duration::from_secs(2);

/// The questions of one connection.
#[derive(Default)]
pub(crate) struct Estimates {
    joiners: HashMap<CallId, Joiner>,
    tasks: JoinSet<()>,
}

impl Estimates {
    pub(crate) fn clear(&mut self) {
        self.joiners.clear();
        self.tasks.abort_all();
    }

    /// Takes a frame of a question's stream.
    pub(crate) fn frame(
        &mut self,
        call: CallId,
        frame: Frame,
        capabilities: &Capabilities,
        handler: &Arc<dyn Handler>,
        shared: &Arc<Shared>,
    ) -> Result<(), Error> {
        while self.tasks.try_join_next().is_some() {}
        let frame = if frame.flags.has(Flags::MORE) || frame.frag_seq > 0 {
            if self.joiners.len() >= ASKED_MAX && !self.joiners.contains_key(&call) {
                return Err(Error::Protocol("too many fragmented questions at once".to_owned()));
            }
            match self.joiners.entry(call).or_default().add(frame) {
                Joined::Whole(frame) => frame,
                Joined::More => return Ok(()),
                Joined::Broken => return Err(Error::Protocol(format!("a fragment of {call}.e is missing"))),
            }
        } else {
            frame
        };
        self.joiners.remove(&call);
        if &*frame.kind != kind::ESTIMATE {
            return Ok(());
        }
        let request: EstimateRequest = match frame.read() {
            Ok(request) => request,
            Err(error) => {
                shared.reply(answer(call, capabilities, Estimated::Failed(failed(error.code, &error.message))));
                return Ok(());
            }
        };
        if self.tasks.len() >= ASKED_MAX {
            let message = format!("{ASKED_MAX} estimates are being made");
            shared.reply(answer(call, capabilities, Estimated::Failed(failed(Code::WindowAgent, &message))));
            return Ok(());
        }
        let (handler, shared, capabilities) = (Arc::clone(handler), Arc::clone(shared), capabilities.clone());
        self.tasks.spawn(async move {
            let estimated = tokio::time::timeout(ANSWER, handler.estimate(request)).await;
            let estimated =
                estimated.unwrap_or_else(|_| Estimated::Failed(failed(Code::Timeout, "no estimate in 2 s")));
            shared.reply(answer(call, &capabilities, estimated));
        });
        Ok(())
    }
}

fn failed(code: Code, message: &str) -> AgentError {
    AgentError { code, message: message.to_owned(), retry_after_ms: None, cost: None, proof: None }
}

/// `FIN agent.estimate.result` or `RST control.error`.
fn answer(call: CallId, capabilities: &Capabilities, estimated: Estimated) -> Frame {
    let on = estimate_stream(call);
    let refuse = |error: &AgentError| Frame::json(on.as_str(), 1, Flags::RST, kind::ERROR, error);
    match (estimated, &capabilities.estimate) {
        (Estimated::Declared, Some(declared)) => {
            Frame::json(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, &declared.figures)
        }
        (Estimated::Declared, None) => refuse(&failed(Code::AgentDown, "this agent declares no estimate")),
        (Estimated::Figures(figures), _) => Frame::json(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, &figures),
        (Estimated::Raw(json), _) => Frame::raw(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, json.into()),
        (Estimated::Failed(error), _) => refuse(&error),
    }
}

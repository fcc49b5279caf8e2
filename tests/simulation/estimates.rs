//! How a simulated agent answers `agent.estimate`: mostly with figures, sometimes not at all, with an error or with no number.

use crate::simulation::plan::AgentPlan;
use crate::simulation::rng::Rng;
use atp_proto::content::{AgentError, EstimateFigures, EstimateRequest, Variance};
use atp_proto::frame::{Flags, kind};
use atp_proto::{Code, Frame, Tokens};
use bytes::Bytes;

/// The answer to a frame on a preflight's stream, if there is one.
pub fn answer(rng: &mut Rng, plan: &AgentPlan, frame: &Frame) -> Option<Frame> {
    let on = frame.stream_id.clone();
    if &*frame.kind != kind::ESTIMATE {
        return None;
    }
    let request: EstimateRequest = frame.read().expect("the router's own question");
    let typical = plan.chunk_max * plan.chunks_max / 2 + 1;
    match rng.below(10) {
        0 => None,
        1 => Some(Frame::raw(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, Bytes::from_static(b"{\"out_tokens\":NaN}"))),
        2 => {
            let error = AgentError {
                code: Code::AgentDown,
                message: format!("nothing is known of {}", request.call_id),
                retry_after_ms: None,
                cost: None,
                proof: None,
            };
            Some(Frame::json(on, 1, Flags::RST, kind::ERROR, &error))
        }
        _ => {
            let figures = EstimateFigures {
                in_tokens: Tokens(rng.range(1, 20)),
                out_tokens: Tokens(rng.range(1, 2 * typical)),
                variance: Variance { tokens: 100, usd_micros: 0 },
                ..EstimateFigures::default()
            };
            Some(Frame::json(on, 1, Flags::FIN, kind::ESTIMATE_RESULT, &figures))
        }
    }
}

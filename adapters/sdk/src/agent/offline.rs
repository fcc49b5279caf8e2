//! A call without a router: what a handler emits is read back here. For tests of handlers, where the grant, the cancel and
//! the deadline come from the test.

use super::call::CallState;
use super::meter::Meter;
use super::session::{Shared, conclude};
use super::{Call, Outcome, StopReason};
use atp_proto::content::Dispatch;
use atp_proto::{Amount, Frame, codec};
use bytes::BytesMut;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The router's side of an offline call.
#[derive(Debug)]
pub struct Offline {
    call: Arc<CallState>,
}

impl Offline {
    /// A call of this dispatch, and what stands in for the router.
    #[must_use]
    pub fn call(dispatch: Dispatch) -> (Call, Self) {
        let deadline = Instant::now() + Duration::from_millis(dispatch.deadline_ms.min(u64::from(u32::MAX)));
        let shared = Arc::new(Shared::new(String::new()));
        let call = Arc::new(CallState::new(&dispatch, deadline, shared));
        (Call { dispatch, meter: Meter { call: Arc::clone(&call) } }, Self { call })
    }

    /// States the whole grant.
    pub fn grant(&self, grant: Amount, last: bool) {
        self.call.set_grant(grant, last);
    }

    /// Asks the call to stop.
    pub fn cancel(&self) {
        self.call.stop(StopReason::Cancelled);
    }

    /// Says the call's last word, as `serve` does with what a handler returns.
    pub fn conclude(&self, outcome: Outcome) {
        conclude(&self.call, outcome);
    }

    /// What was emitted since the last time, fragments apart; it counts as acknowledged.
    #[must_use]
    pub fn frames(&self) -> Vec<Frame> {
        let mut bytes = BytesMut::new();
        self.call.send(|frames| {
            bytes.extend_from_slice(frames);
            true
        });
        let mut frames = Vec::new();
        while let Ok(Some(received)) = codec::decode(&mut bytes) {
            frames.push(received.frame);
        }
        self.call.acknowledge(frames.last().map_or(0, |frame| frame.msg_seq));
        frames
    }
}

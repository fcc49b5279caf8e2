//! What a handler spends through: the running total, the grant, and the partials on their way. Never waits, never sends
//! a total that fell.

use super::call::CallState;
use super::{StopReason, Verdict};
use atp_proto::content::UsageSource;
use atp_proto::frame::kind;
use atp_proto::{Amount, Cost, Flags};
use bytes::Bytes;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// The meter of one call.
#[derive(Clone, Debug)]
pub struct Meter {
    pub(crate) call: Arc<CallState>,
}

#[derive(Serialize)]
struct Partial<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    findings: Option<Vec<serde_json::Value>>,
    cost: Cost,
    #[serde(skip_serializing_if = "is_reported")]
    usage_source: UsageSource,
}

fn is_reported(source: &UsageSource) -> bool {
    *source == UsageSource::Reported
}

impl Meter {
    /// Sends one `agent.result.partial` and says whether the call may go on. `cost_total` is the running total of the
    /// call, its prompt included; a lower one than before is held at the highest. Doesn't wait: the frame is kept until
    /// the router acknowledges it.
    pub fn emit(&self, text: Option<&str>, findings: Option<Vec<serde_json::Value>>, cost_total: Cost) -> Verdict {
        self.partial(text, findings, cost_total, UsageSource::Reported)
    }

    /// The same where the adapter counted itself, because the provider reports only at its end. A final whose usage is
    /// reported may then be lower.
    pub fn emit_counted(
        &self,
        text: Option<&str>,
        findings: Option<Vec<serde_json::Value>>,
        cost_total: Cost,
    ) -> Verdict {
        self.partial(text, findings, cost_total, UsageSource::Counted)
    }

    fn partial(
        &self,
        text: Option<&str>,
        findings: Option<Vec<serde_json::Value>>,
        cost_total: Cost,
        usage_source: UsageSource,
    ) -> Verdict {
        self.call.say(Flags::NONE, kind::RESULT_PARTIAL, cost_total, usage_source, |cost| {
            let mut json = Vec::with_capacity(96 + text.map_or(0, |text| text.len() + text.len() / 16));
            let partial = Partial { text, findings, cost, usage_source };
            serde_json::to_writer(&mut json, &partial).expect("a Vec takes all bytes");
            json.into()
        })
    }

    /// Sends `content` as a partial just as it is, whatever it says: faults and tests of the wire.
    pub fn emit_unchecked(&self, content: Bytes) -> Verdict {
        self.call.say(Flags::NONE, kind::RESULT_PARTIAL, Cost::default(), UsageSource::Reported, |_| content)
    }

    /// The whole of what this call may spend, as stated last.
    #[must_use]
    pub fn grant(&self) -> Amount {
        self.call.grant()
    }

    /// True when the router said that the grant won't grow any more.
    #[must_use]
    pub fn is_last_grant(&self) -> bool {
        self.call.is_last()
    }

    /// The highest total so far.
    #[must_use]
    pub fn total(&self) -> Cost {
        self.call.total()
    }

    /// True when a total of this much would still be within the grant.
    #[must_use]
    pub fn fits(&self, cost_total: Cost) -> bool {
        cost_total.amount().is_ok_and(|spent| spent.fits(self.call.grant()))
    }

    /// What `emit` would say now.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.call.verdict()
    }

    /// Resolves when the call has to end whatever its grant: cancelled, out of time, or over its backlog.
    pub async fn stopped(&self) -> StopReason {
        self.call.stopped().await
    }

    /// Resolves when little of this call is unacknowledged. For a producer that may wait, like a script or a file; one
    /// that reads from a provider must not.
    pub async fn room(&self) {
        self.call.room().await;
    }

    /// Time until the call's deadline, by this process's monotonic clock.
    #[must_use]
    pub fn time_left(&self) -> Duration {
        self.call.deadline.saturating_duration_since(tokio::time::Instant::now())
    }
}

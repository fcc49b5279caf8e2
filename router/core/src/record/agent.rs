//! How an agent stands: its own last word and the operator's. Written when either changes, so that a new owner treats the
//! agent as the old one did. No money: the state's hash leaves it out.

use atp_proto::AgentName;
use atp_proto::content::{AgentStatus, Status, WindowView};
use atp_proto::{Tokens, UsdMicros};
use prost::Message;

/// An earliest time that moves by less says nothing new.
const MOVED_MS: u64 = 1_000;

/// An agent's or an operator's word on how the agent stands: all of it, as it is from here on.
#[derive(Clone, PartialEq, Message)]
pub struct AgentRecord {
    #[prost(string, tag = "1")]
    pub agent: String,
    /// Whose word the status is; another process of the same handle begins anew.
    #[prost(string, tag = "2")]
    pub incarnation: String,
    /// READY, BUSY, PAUSE, DRAINING; empty: never said.
    #[prost(string, tag = "3")]
    pub status: String,
    /// Its own words for its status.
    #[prost(string, optional, tag = "4")]
    pub reason: Option<String>,
    /// True where it suggests a window, whose absent components have no limit.
    #[prost(bool, tag = "5")]
    pub suggests: bool,
    /// Of the window that it suggests: calls at once.
    #[prost(uint32, optional, tag = "6")]
    pub max_parallel: Option<u32>,
    /// Of that window: tokens.
    #[prost(uint64, optional, tag = "7")]
    pub max_tokens: Option<u64>,
    /// Of that window: micro-USD.
    #[prost(uint64, optional, tag = "8")]
    pub max_usd_micros: Option<u64>,
    /// Logged time before which a pause isn't over, Unix milliseconds.
    #[prost(uint64, optional, tag = "9")]
    pub until_ms: Option<u64>,
    /// An operator wants nothing new sent to it, whatever it says itself.
    #[prost(bool, tag = "10")]
    pub drained: bool,
}

impl AgentRecord {
    #[must_use]
    pub fn new(agent: &AgentName, incarnation: &str, status: &AgentStatus, drained: bool, logged_ms: u64) -> Self {
        let window = status.suggested_window.unwrap_or_default();
        Self {
            agent: agent.as_str().into(),
            incarnation: incarnation.into(),
            status: status.status.as_str().into(),
            reason: status.reason.clone(),
            suggests: status.suggested_window.is_some(),
            max_parallel: window.max_parallel,
            max_tokens: window.max_tokens.map(|t| t.0),
            max_usd_micros: window.max_usd_micros.map(|u| u.0),
            until_ms: status.retry_after_ms.map(|ms| logged_ms.saturating_add(ms)),
            drained,
        }
    }

    /// READY where nothing was ever said.
    #[must_use]
    pub fn status(&self) -> Status {
        let all = [Status::Busy, Status::Pause, Status::Draining];
        all.into_iter().find(|s| s.as_str() == self.status).unwrap_or_default()
    }

    #[must_use]
    pub fn suggested(&self) -> Option<WindowView> {
        self.suggests.then(|| WindowView {
            max_parallel: self.max_parallel,
            max_tokens: self.max_tokens.map(Tokens),
            max_usd_micros: self.max_usd_micros.map(UsdMicros),
        })
    }

    /// The agent's word as it would say it at this logged time.
    #[must_use]
    pub fn said(&self, logged_ms: u64) -> AgentStatus {
        AgentStatus {
            status: self.status(),
            reason: self.reason.clone(),
            suggested_window: self.suggested(),
            retry_after_ms: self.until_ms.map(|until| until.saturating_sub(logged_ms)),
        }
    }

    /// True where nothing of it needs to be written again. Of an agent that is ready and limits nothing it doesn't matter
    /// which process says so.
    #[must_use]
    pub fn says_the_same(&self, old: &Self) -> bool {
        let plain = |r: &Self| r.status() == Status::Ready && !r.suggests;
        let near = match (self.until_ms, old.until_ms) {
            (Some(a), Some(b)) => a.abs_diff(b) < MOVED_MS,
            (a, b) => a == b,
        };
        let facts = |r: &Self| (r.status(), r.reason.clone(), r.suggested(), r.drained);
        facts(self) == facts(old) && near && (plain(self) || self.incarnation == old.incarnation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_the_log_and_is_written_once() {
        let name = AgentName::new("a");
        let window = WindowView { max_parallel: Some(0), ..WindowView::default() };
        let pause = AgentStatus {
            status: Status::Pause,
            reason: Some("gpu_oom".into()),
            suggested_window: Some(window),
            retry_after_ms: Some(5_000),
        };
        let record = AgentRecord::new(&name, "i1", &pause, false, 1_000);
        let back = AgentRecord::decode(record.encode_to_vec().as_slice()).expect("its own bytes");
        assert_eq!(back.said(1_000), pause);
        assert_eq!((back.said(4_000).retry_after_ms, back.said(9_000).retry_after_ms), (Some(2_000), Some(0)));
        let again = |ms| AgentRecord::new(&name, "i1", &pause, false, ms).says_the_same(&record);
        assert_eq!((again(1_999), again(2_000)), (true, false), "it asks for another second");
        assert!(!AgentRecord::new(&name, "i2", &pause, false, 1_000).says_the_same(&record));
        let ready = AgentRecord::new(&name, "i1", &AgentStatus::default(), false, 0);
        assert!(ready.says_the_same(&AgentRecord::default()), "never said is ready");
        assert!(!AgentRecord { drained: true, ..ready.clone() }.says_the_same(&ready));
    }
}

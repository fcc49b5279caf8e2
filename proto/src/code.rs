//! Codes of section 5: what a peer is told. Errors inside the program are other types.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! codes {
    ($($name:ident = $text:literal, $http:literal;)*) => {
        /// A wire code; names are the protocol's.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Code { $(#[serde(rename = $text)] $name),* }

        impl Code {
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The name on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// The HTTP status that says the same.
            #[must_use]
            pub const fn http_status(self) -> u16 {
                match self { $(Self::$name => $http),* }
            }

            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)* _ => None }
            }
        }
    };
}

codes! {
    Proto = "EPROTO", 400;
    Auth = "EAUTH", 401;
    Sec = "ESEC", 403;
    SeqRetry = "ESEQ_RETRY", 400;
    Window = "EWINDOW", 429;
    Budget = "EBUDGET", 429;
    WindowAgent = "EWINDOW_AGENT", 429;
    Draining = "EDRAINING", 503;
    Timeout = "ETIMEOUT", 504;
    AgentDown = "EAGENTDOWN", 503;
    Preempt = "EPREEMPT", 503;
    Consensus = "ECONSENSUS", 502;
    Idempotency = "EIDEMPOTENCY", 409;
    ResumeGone = "ERESUME_GONE", 410;
    OutcomeUnknown = "EOUTCOME_UNKNOWN", 502;
    Limit = "ELIMIT", 413;
    Log = "ELOG", 503;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What dies with an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fatal {
    Connection,
    #[default]
    Stream,
    None,
}

/// The content of `control.error`: code, scope, what was used of which limit, and when to come back (ATP-5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct WireError {
    pub code: Code,
    #[serde(default)]
    pub message: String,
    /// `tenant:acme`, `stream:ID`, `agent:reviewer.gemini`, `tool:search_api`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub limit: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub used: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub retry_after_ms: Option<u64>,
    /// RFC 3339, UTC. Boxed: errors stay below the size that `Result` carries cheaply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_at: Option<Box<str>>,
    #[serde(default)]
    pub fatal: Fatal,
    /// False: nothing was accepted or judged, the same frame may come again and be admitted then.
    #[serde(default = "yes")]
    pub judged: bool,
}

fn yes() -> bool {
    true
}

impl WireError {
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            scope: None,
            limit: None,
            used: None,
            retry_after_ms: None,
            reset_at: None,
            fatal: Fatal::Stream,
            judged: !matches!(code, Code::Proto | Code::Auth | Code::Limit | Code::Log | Code::SeqRetry),
        }
    }

    /// EPROTO, the commonest.
    #[must_use]
    pub fn proto(message: impl Into<String>) -> Self {
        Self::new(Code::Proto, message)
    }

    #[must_use]
    pub fn scope(mut self, scope: impl Into<String>) -> Self {
        self.scope = Some(scope.into());
        self
    }

    #[must_use]
    pub fn used(mut self, used: u64, limit: u64) -> Self {
        (self.used, self.limit) = (Some(used), Some(limit));
        self
    }

    #[must_use]
    pub fn retry_after_ms(mut self, ms: u64) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }

    #[must_use]
    pub fn fatal(mut self, fatal: Fatal) -> Self {
        self.fatal = fatal;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for code in Code::ALL {
            assert_eq!(Code::parse(code.as_str()), Some(*code));
            assert_eq!(serde_json::to_string(code).ok(), Some(format!("\"{code}\"")));
        }
        assert_eq!(Code::parse("EWHAT"), None);
    }
}

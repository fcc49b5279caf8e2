//! What can go wrong for a user of this package. Codes of the wire stay inside `Refused`.

use atp_proto::{Code, WireError};

/// Why a connection or a stream didn't do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The router judged and said no, or it ended the stream with an error: code, scope, retry-after.
    #[error("refused: {0}")]
    Refused(WireError),
    /// No connection could be made in the time allowed.
    #[error("router not reachable: {0}")]
    Unreachable(String),
    /// The credential isn't accepted.
    #[error("not authorised: {0}")]
    Auth(WireError),
    /// The peer sent what this version doesn't understand.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The request can't be sent as it is; the text names the field and the fix.
    #[error("request: {0}")]
    Request(String),
    /// The client was closed.
    #[error("the client is closed")]
    Closed,
}

impl Error {
    /// EAUTH and ESEC on the connection itself are about the credential.
    pub(crate) fn of_connection(error: WireError) -> Self {
        match error.code {
            Code::Auth | Code::Sec => Self::Auth(error),
            _ => Self::Refused(error),
        }
    }

    /// The wire's own words, where it spoke.
    #[must_use]
    pub fn wire(&self) -> Option<&WireError> {
        match self {
            Self::Refused(error) | Self::Auth(error) => Some(error),
            Self::Unreachable(_) | Self::Protocol(_) | Self::Request(_) | Self::Closed => None,
        }
    }
}

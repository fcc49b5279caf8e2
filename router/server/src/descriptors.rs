//! How many connections a process may serve with the files that it may have open, so that none of them takes the last one from
//! the log.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors that no connection gets: segments and their spares, readers of the log, the listeners, the runtime.
const RESERVED: u64 = 256;

/// Native and HTTP connections at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Connections {
    pub(crate) native: usize,
    pub(crate) http: usize,
}

impl Connections {
    /// What was asked for, as far as the process may: its own limit is raised to what the system allows.
    pub(crate) fn within_limits(asked: Self) -> Self {
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current != limit.maximum {
            let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
            if setrlimit(Resource::Nofile, raised).is_ok() {
                limit = raised;
            }
        }
        let Some(files) = limit.current else { return asked };
        let bounded = asked.bounded(files);
        if bounded != asked {
            tracing::warn!(
                files,
                "limits.connections: {} native and {} HTTP connections at once, since this process may have no more files \
                 open; raise its limit (`ulimit -n`, systemd: LimitNOFILE)",
                bounded.native,
                bounded.http
            );
        }
        bounded
    }

    fn bounded(self, files: u64) -> Self {
        let room = usize::try_from(files.saturating_sub(RESERVED).max(2)).unwrap_or(usize::MAX);
        // Both have a place, and commands get through where clients are many.
        let http = self.http.min((room / 4).max(1));
        Self { native: self.native.min(room - http), http }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_room_for_the_log() {
        let asked = Connections { native: 10_000, http: 1_024 };
        assert_eq!(asked.bounded(11_280), asked);
        assert_eq!(asked.bounded(11_279), Connections { native: 9_999, http: 1_024 });
        assert_eq!(asked.bounded(1_024), Connections { native: 576, http: 192 });
        assert_eq!(asked.bounded(10), Connections { native: 1, http: 1 });
    }
}

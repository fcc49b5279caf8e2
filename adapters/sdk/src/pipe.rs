//! Frames on their way from the connection's loop to the reader of one stream. Bounded in bytes: beyond that the reader
//! lags, frames are let go, and the stream is continued from the log once the reader has caught up.

use crate::error::Error;
use atp_proto::Frame;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Bytes of content that one stream's reader may be behind.
pub(crate) const LAG_BYTES_MAX: usize = 4 * 1024 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Pipe {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Frames were let go since the reader fell behind.
    lagging: bool,
    /// The end: `None` inside means that the stream ended well.
    end: Option<Option<Error>>,
    waker: Option<Waker>,
}

/// What the reader finds.
pub(crate) enum Found {
    Frames(VecDeque<Frame>),
    /// Everything is read and more was let go: ask for it.
    Lagged,
    End(Option<Error>),
}

impl Pipe {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when the reader is too far behind: the frame is let go.
    pub(crate) fn push(&self, frame: Frame) -> bool {
        let mut state = self.state();
        if state.lagging || state.bytes >= LAG_BYTES_MAX {
            state.lagging = true;
            return false;
        }
        state.bytes += frame.content.len() + 64;
        state.frames.push_back(frame);
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    pub(crate) fn is_lagging(&self) -> bool {
        self.state().lagging
    }

    pub(crate) fn end(&self, error: Option<Error>) {
        let mut state = self.state();
        state.end.get_or_insert(error);
        state.lagging = false;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    /// All that came, at once.
    pub(crate) async fn take(&self) -> Found {
        poll_fn(|cx| {
            let mut state = self.state();
            if !state.frames.is_empty() {
                state.bytes = 0;
                return Poll::Ready(Found::Frames(std::mem::take(&mut state.frames)));
            }
            if std::mem::take(&mut state.lagging) {
                return Poll::Ready(Found::Lagged);
            }
            if let Some(end) = &state.end {
                return Poll::Ready(Found::End(end.clone()));
            }
            state.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

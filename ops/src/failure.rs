//! How a command ends when it doesn't end well: an exit code and a sentence. Never prints.

use std::fmt;

/// The exit codes that scripts rely on, besides 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The task failed, was refused or ended provisional.
    Task = 1,
    Usage = 2,
    Unreachable = 3,
    Unauthorised = 4,
    /// A check found a difference.
    Difference = 5,
    Interrupted = 130,
}

#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// Empty when the command has said it already.
    pub(crate) text: String,
}

impl Failure {
    pub(crate) fn new(exit: Exit, text: impl fmt::Display) -> Self {
        Self { exit, text: text.to_string() }
    }
    pub(crate) fn usage(text: impl fmt::Display) -> Self {
        Self::new(Exit::Usage, text)
    }
    /// Nothing more to say.
    pub(crate) fn silent(exit: Exit) -> Self {
        Self { exit, text: String::new() }
    }
    pub(crate) fn interrupted() -> Self {
        Self::silent(Exit::Interrupted)
    }
}

/// A fault that no code names: what was done stays undone, so it counts as failed.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Task, format!("{error:#}"))
    }
}

/// Stdout is gone (`atp ps | head`): nobody is left to tell.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self::silent(Exit::Task)
        } else {
            Self::new(Exit::Task, format!("stdout: {error}"))
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        if error.io_error_kind() == Some(std::io::ErrorKind::BrokenPipe) {
            return Self::silent(Exit::Task);
        }
        Self::new(Exit::Task, format!("JSON: {error}"))
    }
}

pub(crate) type Outcome = Result<(), Failure>;

//! Findings: what agents report, read from the formats they use, merged by `union`, written as SARIF.
//! Pure: no I/O, no clock, no random order. The same findings in any order give the same result, byte for byte.

mod cargo;
mod finding;
mod merge;
mod read;
mod sarif;

pub use finding::{Evidence, Finding, Refused, Severity, Span, limits};
pub use merge::{Source, merge, union};
pub use read::{Format, Recognised, fenced, recognise};
pub use sarif::to_sarif;

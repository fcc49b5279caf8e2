//! The log's format: the page that describes it, a reader made from the page alone, and logs of each version that every later
//! one must read.

#![allow(clippy::unwrap_used, reason = "a test that can't read its files has nothing else to say")]

mod corpus;
mod pack;
mod page;
mod play;
mod replay;
mod source;
mod stranger;

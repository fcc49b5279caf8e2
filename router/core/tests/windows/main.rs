//! Windows and pressure through the shard on a virtual clock (ATP-10): who is told what, who gives way, in which millisecond.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod house;
mod pressure;
mod told;

//! Talk to an ATP router: submit tasks and read their streams ([`Client`]), or be an agent that serves calls ([`serve`]).
//! Connections come from a [`Dialer`], so the same code runs over TCP and over an in-memory stream. It never decides about
//! money: an agent meters what it spends and stops at its grant; reserving and settling is the router's.
//!
//! ```no_run
//! use atp_sdk::{Client, ClientOptions, Dialer, EventKind, SubmitRequest};
//!
//! # async fn example() -> Result<(), atp_sdk::Error> {
//! let client = Client::connect(Dialer::tcp("127.0.0.1:7443"), ClientOptions::default()).await?;
//! let request = SubmitRequest::new("Review the diff").input("diff", "--- a\n+++ b\n").key("pr-17").budget_usd_micros(500_000);
//! let mut stream = client.submit(request).await?;
//! while let Some(event) = stream.next().await {
//!     if let EventKind::Partial(partial) = event?.kind {
//!         print!("{}", partial.text.unwrap_or_default());
//!     }
//! }
//! # Ok(()) }
//! ```

pub mod agent;
mod backoff;
pub mod client;
mod dial;
mod error;
mod fragment;
mod pipe;
mod wire;

pub use agent::meter::Meter;
pub use agent::offline::Offline;
pub use agent::tool::{ToolAnswer, ToolError};
pub use agent::{
    AgentHandle, AgentOptions, Call, Estimated, Handler, Outcome, ROOM_BYTES_MAX, StopReason, UNACKED_BYTES_MAX,
    Verdict, serve,
};
pub use backoff::Backoff;
pub use client::stream::{Event, EventKind, TaskOutcome, TaskStream};
pub use client::submit::{Retry, SubmitRequest};
pub use client::{Client, ClientOptions};
pub use dial::{BoxedIo, Dialer, Endpoint, Io, parse_url};
pub use error::Error;

pub use futures_util::future::BoxFuture;

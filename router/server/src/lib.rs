//! The router's shell: sockets, tasks, the log and the HTTP surface around the core. Decides nothing about streams or money.

mod agent_task;
mod catch_up;
mod clients;
pub mod config;
mod connection;
mod descriptors;
mod http;
mod identity;
mod inbox;
mod listen;
pub mod log;
mod metric;
mod outbox;
mod router;
mod shard_task;
pub mod store;
mod time;
pub mod tool;
pub mod verify;

pub use config::Config;
pub use identity::{Anonymous, DEFAULT_TENANT};
pub use router::{Router, StartError};

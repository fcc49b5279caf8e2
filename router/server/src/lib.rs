//! The router's shell: sockets, tasks, the log and the HTTP surface around the core. Decides nothing about streams or money.

#[cfg(test)]
extern crate self as atp_router;

mod agent_task;
mod awake;
mod call_routes;
mod catch_up;
mod clients;
pub mod config;
mod connection;
mod denials;
mod descriptors;
mod http;
mod identity;
mod inbox;
mod lessons;
mod listen;
pub mod log;
mod metric;
mod opening;
mod outbox;
mod ownership;
mod peer;
mod router;
mod running;
mod shard_task;
mod shards;
pub mod store;
mod time;
pub mod tool;
pub mod verify;
mod views;

pub use config::Config;
pub use identity::{Anonymous, DEFAULT_TENANT};
pub use ownership::{RouterRow, ShardRow};
pub use peer::PeerKey;
pub use router::{Router, StartError};
pub use views::accounts_of;

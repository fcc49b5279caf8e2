//! What a router decides: streams, money, agents' slots. Pure: no socket, clock, random source, thread or I/O.

pub mod account;
pub mod agent;
pub mod clock;
pub mod escrow;
pub mod estimate;
pub mod ladder;
pub mod message;
pub mod pacing;
pub mod placement;
pub mod policy;
pub mod price;
pub mod projection;
pub mod record;
pub mod registry;
pub mod replay;
pub mod said;
pub mod score;
pub mod settings;
pub mod shard;
pub mod state;
pub mod statistics;
pub mod stream;
pub mod tier;
pub mod tool;
pub mod view;
pub mod window;

//! What a router decides: streams, money, agents' slots. Pure: no socket, clock, random source, thread or I/O.

pub mod clock;
pub mod message;
pub mod price;
pub mod record;
pub mod settings;
pub mod view;

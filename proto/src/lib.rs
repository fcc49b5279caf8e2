//! What travels on an ATP wire: frames, limits, ids, money, codes and the content of every payload type.
//! Pure: no socket, no clock, no random source, no thread.

pub mod code;
pub mod codec;
pub mod content;
pub mod frame;
pub mod id;
pub mod json;
mod lenient;
pub mod limits;
pub mod money;
pub mod reassembly;
mod wire;

/// The protobuf messages of `proto/atp.proto`, as generated.
pub mod pb {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    include!(concat!(env!("OUT_DIR"), "/atp.v1.rs"));
}

pub use code::{Code, WireError};
pub use frame::{Flags, Frame, Hop, Qos, Text};
pub use id::{AgentName, CallId, ConnId, StreamId, TenantId};
pub use money::{Amount, Cost, Limit, Tokens, UsdMicros};

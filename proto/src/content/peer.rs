//! Contents between routers of one fleet: who they are, the proof of their key, and which agents are where.

use super::session::Role;
use crate::id::{AgentName, TenantId};
use serde::{Deserialize, Serialize};

/// What a router's `SYN control.hello` says beside the role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerHello {
    #[serde(default)]
    pub minor_max: u32,
    pub role: Role,
    /// Its `router.id`.
    pub router: String,
    /// Of this connection alone: 64 hex digits.
    pub nonce: String,
    /// The connection carries the frames of one client of this tenant; absent: it is the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<TenantId>,
}

/// `peer.challenge`: the answer to a router's hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerChallenge {
    pub router: String,
    /// As in the hello.
    pub nonce: String,
    /// The answering router's proof, in hex.
    pub proof: String,
}

/// `peer.proof`: the proof of the router that dialled, in hex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerProof {
    pub proof: String,
}

/// `control.route_update`: the agents that are connected to one router, all of them. The latest counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteUpdate {
    pub router_id: String,
    #[serde(default)]
    pub agents: Vec<AgentRoute>,
}

/// One agent at that router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentRoute {
    /// Its whole handle.
    pub agent_prefix: AgentName,
    pub incarnation: String,
    /// Since when it is connected there, in milliseconds before this update.
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub connected_ms: u64,
    /// When it was last heard, in milliseconds before this update.
    #[serde(deserialize_with = "crate::lenient::lenient")]
    pub heard_ms: u64,
}

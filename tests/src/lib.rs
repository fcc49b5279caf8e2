//! What the tests share. The simulation needs the pure crates only; all that needs sockets stands behind `blackbox`.

#[path = "../simulation/mod.rs"]
pub mod simulation;

#[cfg(feature = "blackbox")]
pub mod blackbox;

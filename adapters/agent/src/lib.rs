//! Agents: one adapter per provider API, a program runner and a scripted agent. Each is a `Handler` of the SDK; none of
//! them decides about money, and the router never links them.

mod adapter;
pub mod anthropic;
pub mod command;
pub mod config;
pub mod gemini;
mod http;
pub mod llm;
mod meter;
pub mod ollama;
pub mod openai;
pub mod scripted;
mod sse;
mod tokens;

pub use adapter::build;
pub use config::{AgentConfig, ConfigError, Kind};

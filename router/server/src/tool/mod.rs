//! The tools that the router runs for its agents: a file within a root, a page of a listed host. Each run is bounded in time
//! and size and runs beside the shard. Decides no permission and no price: the shard has.

mod fs;
mod http;

pub use http::Prefix;

use crate::inbox::{Inbox, ToShard};
use atp_core::message::{Input, ToolDone};
use atp_proto::{CallId, Code, WireError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

/// The names under which agents ask for them.
pub const FS_READ: &str = "fs.read";
pub const HTTP_GET: &str = "http.get";
/// Bytes that one run may bring.
pub const BYTES_MAX: usize = 1024 * 1024;
/// One run, from the moment when it begins.
const RUN: Duration = Duration::from_secs(10);
/// A run that had no place for so long is told so.
const PLACE: Duration = Duration::from_secs(20);
/// Runs at once; more wait for a place.
const AT_ONCE: usize = 32;

/// Which tools there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolConfig {
    /// What `fs.read` may see; absent: there is no such tool.
    pub fs_root: Option<PathBuf>,
    /// What `http.get` may ask; empty: there is no such tool.
    pub http_allow: Vec<Prefix>,
}

/// Runs tools and tells the shard that asked what came of them. Clones share the places.
#[derive(Clone)]
pub(crate) struct Tools {
    kit: Arc<Kit>,
    places: Arc<Semaphore>,
    tasks: TaskTracker,
}

struct Kit {
    config: ToolConfig,
    client: Result<reqwest::Client, String>,
}

impl Tools {
    pub(crate) fn new(config: ToolConfig, tasks: TaskTracker) -> Self {
        let client = match config.http_allow.is_empty() {
            true => Err("http.get isn't configured".to_owned()),
            false => http::client(),
        };
        Self { kit: Arc::new(Kit { config, client }), places: Arc::new(Semaphore::new(AT_ONCE)), tasks }
    }

    /// Begins one run; its end comes to the inbox as `Input::ToolDone`.
    pub(crate) fn run(&self, inbox: Inbox, call: CallId, attempt: u32, request: u64, tool: Arc<str>, args: Value) {
        let (kit, places) = (self.kit.clone(), self.places.clone());
        self.tasks.spawn(async move {
            let outcome = match tokio::time::timeout(PLACE, places.acquire_owned()).await {
                Ok(Ok(place)) => {
                    let ran = tokio::time::timeout(RUN, kit.run(&tool, args)).await;
                    drop(place);
                    ran.unwrap_or_else(|_| {
                        Err(WireError::new(Code::Timeout, format!("{tool} took longer than {} s", RUN.as_secs())))
                    })
                }
                Ok(Err(_)) | Err(_) => {
                    Err(WireError::new(Code::Window, "the router runs too many tools now; ask again")
                        .retry_after_ms(1_000))
                }
            };
            let weight = outcome.as_ref().map_or(256, |data| 256 + data.to_string().len());
            let done = Box::new(ToolDone { call, attempt, request, outcome });
            // Nobody is left to be told if this fails.
            let _ = inbox.send(weight, ToShard::Input(Box::new(Input::ToolDone(done)))).await;
        });
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FsArgs {
    path: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HttpArgs {
    url: String,
}

impl Kit {
    async fn run(&self, tool: &str, args: Value) -> Result<Value, WireError> {
        match (tool, &self.config.fs_root) {
            (FS_READ, Some(root)) => {
                let FsArgs { path } = read_args(args)?;
                let root = root.clone();
                let read = tokio::task::spawn_blocking(move || fs::read(&root, &path, BYTES_MAX)).await;
                read.unwrap_or_else(|e| Err(WireError::new(Code::AgentDown, format!("fs.read broke: {e}"))))
            }
            (HTTP_GET, _) if !self.config.http_allow.is_empty() => {
                let HttpArgs { url } = read_args(args)?;
                let client = self.client.as_ref().map_err(|why| WireError::new(Code::AgentDown, why.clone()))?;
                http::get(client, &self.config.http_allow, &url, BYTES_MAX).await
            }
            _ => Err(WireError::new(Code::Sec, format!("this router doesn't run {tool}"))),
        }
    }
}

fn read_args<T: serde::de::DeserializeOwned>(args: Value) -> Result<T, WireError> {
    serde_json::from_value(args).map_err(|e| WireError::proto(format!("args: {e}")))
}

/// What was read, as text where it is UTF-8.
fn content(bytes: Vec<u8>) -> Value {
    use base64::Engine;
    let n = bytes.len();
    match String::from_utf8(bytes) {
        Ok(text) => json!({"bytes": n, "text": text}),
        Err(e) => {
            let base64 = base64::engine::general_purpose::STANDARD.encode(e.as_bytes());
            json!({"bytes": n, "base64": base64})
        }
    }
}

fn too_large(n: u64, max: usize) -> WireError {
    WireError::new(Code::Limit, format!("longer than {max} bytes, the most that one request brings"))
        .used(n, max as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read_and_wrong_ones_named() {
        let error = read_args::<FsArgs>(json!({"file": "a"})).err().unwrap();
        assert!(error.code == Code::Proto && error.message.contains("file"), "{error}");
        assert!(read_args::<FsArgs>(json!({})).err().unwrap().message.contains("path"));
        assert!(read_args::<HttpArgs>(json!({"url": 5})).is_err());
        assert_eq!(read_args::<FsArgs>(json!({"path": "a"})).ok().unwrap().path, "a");
    }

    #[test]
    fn what_is_no_text_is_base64() {
        assert_eq!(content(b"ab\n".to_vec()), json!({"bytes": 3, "text": "ab\n"}));
        assert_eq!(content(vec![0xff, 0x00]), json!({"bytes": 2, "base64": "/wA="}));
    }
}

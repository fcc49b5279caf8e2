//! The router's HTTP API as the commands use it, and how its errors become exit codes. Speaks no native protocol.

use crate::cli::Global;
use crate::failure::{Exit, Failure};
use atp_core::view::{AccountView, AgentView, StreamView};
use atp_proto::content::{Bill, TaskState};
use atp_router::{RouterRow, ShardRow};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;

/// A router seen over HTTP; of several the first that can be reached.
#[derive(Debug)]
pub(crate) struct Api {
    bases: Vec<String>,
    token: Option<String>,
    client: reqwest::Client,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Streams {
    pub(crate) streams: Vec<StreamView>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Agents {
    pub(crate) agents: Vec<AgentView>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Accounts {
    pub(crate) position: u64,
    pub(crate) accounts: Vec<AccountView>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Shards {
    pub(crate) shards: Vec<ShardRow>,
    pub(crate) routers: Vec<RouterRow>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Routers {
    pub(crate) routers: Vec<RouterRow>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RouterFacts {
    /// Where the native protocol is served.
    pub(crate) atp: String,
}

/// The part of `fleet` that names the router.
#[derive(Debug, Deserialize)]
pub(crate) struct Fleet {
    pub(crate) router: RouterFacts,
}

impl Api {
    /// # Errors
    /// Usage: a URL isn't an HTTP one.
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        let mut bases = Vec::new();
        for url in &global.url {
            let base = url.trim_end_matches('/');
            let Some(host) = base.strip_prefix("http://") else {
                return Err(Failure::usage(format!(
                    "--url: `{url}` is not an http:// URL; this command asks the router's HTTP port, e.g. \
                     http://127.0.0.1:7080"
                )));
            };
            if host.is_empty() || host.contains(['/', ' ', '@']) {
                return Err(Failure::usage(format!("--url: `{url}` is not of the form http://HOST:PORT")));
            }
            bases.push(base.to_owned());
        }
        Ok(Self { bases, token: global.token.clone(), client: plain_client()? })
    }

    pub(crate) async fn fetch<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::GET, path, None).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::POST, path, None).await
    }

    pub(crate) async fn post_json<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, Failure> {
        self.ask(Method::POST, path, Some(body)).await
    }

    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::DELETE, path, None).await
    }

    pub(crate) async fn bill(&self, stream: &str) -> Result<Bill, Failure> {
        self.fetch(&format!("/v1/streams/{stream}/bill")).await
    }

    /// All streams, page by page.
    pub(crate) async fn streams(&self, query: &str) -> Result<Streams, Failure> {
        let mut all = Streams { streams: Vec::new() };
        let mut cursor: Option<String> = None;
        loop {
            let at = cursor.as_deref().map(|c| format!("&cursor={c}")).unwrap_or_default();
            let mut page: Value = self.fetch(&format!("/v1/streams?{query}{at}")).await?;
            let next = ["next_cursor", "cursor", "next"].iter().find_map(|k| page[*k].as_str().map(str::to_owned));
            let rows: Streams = serde_json::from_value(page.take())?;
            // A page that brings nothing new ends the list, whatever its cursor says.
            let more = !rows.streams.is_empty() && next.is_some() && next != cursor;
            all.streams.extend(rows.streams);
            if !more {
                return Ok(all);
            }
            cursor = next;
        }
    }

    /// Where the router says that its native protocol is.
    pub(crate) async fn native(&self) -> Result<String, Failure> {
        let fleet: Fleet = self.fetch("/v1/fleet").await?;
        Ok(fleet.router.atp)
    }

    /// A stream's state; `None` when the router knows no such stream.
    pub(crate) async fn state(&self, stream: &str) -> Result<Option<TaskState>, Failure> {
        #[derive(Deserialize)]
        struct Head {
            state: TaskState,
        }
        let (status, body) = self.send(Method::GET, &format!("/v1/streams/{stream}"), None).await?;
        if status == 404 {
            return Ok(None);
        }
        Ok(Some(read::<Head>(status, &body)?.state))
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Option<&Value>) -> Result<T, Failure> {
        let (status, body) = self.send(method, path, body).await?;
        read(status, &body)
    }

    /// A router that can't be connected to has heard nothing: the next one is asked.
    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Vec<u8>), Failure> {
        let mut failed = Vec::new();
        for base in &self.bases {
            let mut request = self.client.request(method.clone(), format!("{base}{path}"));
            if let Some(token) = &self.token {
                request = request.bearer_auth(token);
            }
            if let Some(body) = body {
                request = request.json(body);
            }
            let unreachable = |e: &reqwest::Error| format!("no router answers at {base}: {}", root_cause(e));
            match request.send().await {
                Ok(response) => {
                    let status = response.status().as_u16();
                    let bytes = response.bytes().await.map_err(|e| Failure::new(Exit::Unreachable, unreachable(&e)))?;
                    return Ok((status, bytes.to_vec()));
                }
                Err(e) if e.is_connect() => failed.push(unreachable(&e)),
                Err(e) => return Err(Failure::new(Exit::Unreachable, unreachable(&e))),
            }
        }
        Err(Failure::new(Exit::Unreachable, failed.join("; ")))
    }
}

fn read<T: DeserializeOwned>(status: u16, body: &[u8]) -> Result<T, Failure> {
    if (200..300).contains(&status) {
        let wrong = |e| Failure::new(Exit::Unreachable, format!("--url: this doesn't answer like an ATP router: {e}"));
        return serde_json::from_slice(body).map_err(wrong);
    }
    Err(refused(status, body))
}

/// A client for plain HTTP that reads no certificate store and no proxy setting.
fn plain_client() -> Result<reqwest::Client, Failure> {
    reqwest::Client::builder()
        .no_proxy()
        .tls_certs_only([])
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(120))
        .build()
        .map_err(|e| Failure::new(Exit::Unreachable, format!("HTTP client: {}", root_cause(&e))))
}

/// A small GET of some other local service, for a look whether it is there.
pub(crate) async fn probe(url: &str) -> Option<Value> {
    let client = plain_client().ok()?;
    let response = client.get(url).timeout(Duration::from_millis(800)).send().await.ok()?;
    response.json().await.ok()
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// `application/problem+json` as a failure: code, scope and what to do.
fn refused(status: u16, body: &[u8]) -> Failure {
    let problem: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    let text = |key: &str| problem[key].as_str().filter(|t| !t.is_empty());
    let exit = if matches!(status, 401 | 403) { Exit::Unauthorised } else { Exit::Task };
    let what = text("detail").or_else(|| text("title")).unwrap_or("no reason given");
    let code = text("code").map_or_else(|| format!("HTTP {status}"), str::to_owned);
    let scope = text("scope").map(|s| format!(" ({s})")).unwrap_or_default();
    let after = problem["retry_after_ms"].as_u64().map(|ms| format!("; retry after {ms} ms")).unwrap_or_default();
    Failure::new(exit, format!("{code}{scope}: {what}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_name_code_and_scope() {
        let body = br#"{"code":"EBUDGET","scope":"tenant:acme","detail":"spent","retry_after_ms":5}"#;
        let failure = refused(429, body);
        assert_eq!(failure.text, "EBUDGET (tenant:acme): spent; retry after 5 ms");
        assert_eq!(failure.exit, Exit::Task);
        assert_eq!(refused(401, b"").exit, Exit::Unauthorised);
        assert_eq!(refused(500, b"<html>").text, "HTTP 500: no reason given");
    }
}

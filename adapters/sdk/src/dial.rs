//! Where a connection comes from: TCP, or whatever a closure makes. Knows the URL forms, never asks HTTP itself.

use futures_util::future::BoxFuture;
use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long one of several routers may take to be reached, and to answer the hello, before the next is tried.
pub(crate) const EACH: Duration = Duration::from_secs(2);

/// Any ordered byte stream in both directions.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// One connection's bytes.
pub type BoxedIo = Box<dyn Io>;

type Dial = dyn Fn() -> BoxFuture<'static, io::Result<BoxedIo>> + Send + Sync;

/// Makes connections, again after each loss.
#[derive(Clone)]
pub struct Dialer {
    dial: Arc<Dial>,
    name: Arc<str>,
    routers: usize,
}

impl Dialer {
    /// Dials `host:port`, without delay for small frames.
    #[must_use]
    pub fn tcp(address: impl Into<String>) -> Self {
        let address: Arc<str> = address.into().into();
        let name = Arc::clone(&address);
        let dial = move || -> BoxFuture<'static, io::Result<BoxedIo>> {
            let address = Arc::clone(&address);
            Box::pin(async move {
                let stream = TcpStream::connect(&*address).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream) as BoxedIo)
            })
        };
        Self { dial: Arc::new(dial), name, routers: 1 }
    }

    /// Dials with a closure: an in-memory stream, a proxy, a test.
    #[must_use]
    pub fn new<F, R>(dial: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = io::Result<BoxedIo>> + Send + 'static,
    {
        Self { dial: Arc::new(move || Box::pin(dial())), name: "in-memory".into(), routers: 1 }
    }

    /// As errors and logs call it.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Dials one of several routers, each by its own dialer: the first one first, after a loss the one behind it, in a
    /// circle. One that isn't reached within 2 s, or doesn't answer the hello within 2 s, is passed over. Without any it dials nothing.
    #[must_use]
    pub fn any(of: impl IntoIterator<Item = Self>) -> Self {
        let of: Arc<[Self]> = of.into_iter().collect();
        let name = of.iter().map(|dialer| &*dialer.name).collect::<Vec<_>>().join(", ").into();
        let (routers, next) = (of.len(), Arc::new(AtomicUsize::new(0)));
        let dial = move || -> BoxFuture<'static, io::Result<BoxedIo>> {
            let (of, next) = (Arc::clone(&of), Arc::clone(&next));
            Box::pin(async move {
                let mut failed = Vec::new();
                for _ in 0..of.len() {
                    let one = &of[next.fetch_add(1, Ordering::Relaxed) % of.len()];
                    match timeout(EACH, one.dial()).await {
                        Ok(Ok(io)) => return Ok(io),
                        Ok(Err(e)) => failed.push(format!("{one}: {e}")),
                        Err(_) => failed.push(format!("{one}: not reached within {} s", EACH.as_secs())),
                    }
                }
                let why = if failed.is_empty() { "no router is named".to_owned() } else { failed.join("; ") };
                Err(io::Error::other(why))
            })
        };
        Self { dial: Arc::new(dial), name, routers }
    }

    /// How many routers it knows.
    pub(crate) const fn routers(&self) -> usize {
        self.routers
    }

    /// One attempt.
    ///
    /// # Errors
    /// What the transport says.
    pub async fn dial(&self) -> io::Result<BoxedIo> {
        (self.dial)().await
    }
}

impl fmt::Display for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dialer({})", self.name)
    }
}

/// What a router's URL stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `host:port` of the native protocol.
    Atp(String),
    /// An HTTP base URL without a trailing slash: its `GET /v1/fleet` names the native address in `router.atp`.
    Http(String),
}

/// Reads `atp://host[:port]` (port 7443 if absent) and `http://host[:port]`.
///
/// # Errors
/// Names what is wrong and which forms are taken.
pub fn parse_url(url: &str) -> Result<Endpoint, String> {
    let forms = "use atp://HOST:PORT or http://HOST:PORT";
    let Some((scheme, rest)) = url.trim().split_once("://") else {
        return Err(format!("url: `{url}` has no scheme; {forms}"));
    };
    match scheme {
        "atp" => {
            let authority = rest.strip_suffix('/').unwrap_or(rest);
            authority_with_port(authority).map(Endpoint::Atp).map_err(|why| format!("url: `{url}` {why}; {forms}"))
        }
        "http" => {
            let base = rest.trim_end_matches('/');
            if base.is_empty() || base.starts_with(['/', ':', '?']) {
                return Err(format!("url: `{url}` names no host; {forms}"));
            }
            Ok(Endpoint::Http(format!("http://{base}")))
        }
        "atps" | "https" | "ws" | "wss" => Err(format!("url: `{scheme}://` is not in this version; {forms}")),
        _ => Err(format!("url: scheme `{scheme}` is unknown; {forms}")),
    }
}

fn authority_with_port(authority: &str) -> Result<String, &'static str> {
    if authority.contains(['/', '?', '#', '@']) {
        return Err("has more than a host and a port");
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, "7443"),
    };
    if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
        return Err("needs brackets around an IPv6 address");
    }
    if host.is_empty() {
        return Err("names no host");
    }
    if port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err("needs a port from 1 to 65535");
    }
    Ok(format!("{host}:{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_forms() {
        let atp = |s: &str| Ok(Endpoint::Atp(s.to_owned()));
        assert_eq!(parse_url("atp://127.0.0.1:7443"), atp("127.0.0.1:7443"));
        assert_eq!(parse_url("atp://router/"), atp("router:7443"));
        assert_eq!(parse_url("atp://[::1]:99"), atp("[::1]:99"));
        assert_eq!(parse_url("atp://[::1]"), atp("[::1]:7443"));
        assert_eq!(parse_url("http://localhost:7080/"), Ok(Endpoint::Http("http://localhost:7080".to_owned())));
        for bad in [
            "localhost",
            "atp://",
            "atp://:1",
            "atp://h:0",
            "atp://h:65536",
            "atp://::1",
            "atp://h:1/x",
            "http://",
            "ftp://h",
        ] {
            let error = parse_url(bad).unwrap_err();
            assert!(error.starts_with("url: ") && error.contains("atp://HOST:PORT"), "{bad}: {error}");
        }
        for later in ["atps://h:1", "ws://h/v1/ws", "wss://h", "https://h"] {
            assert!(parse_url(later).unwrap_err().contains("not in this version"), "{later}");
        }
    }
}

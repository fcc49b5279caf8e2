//! `http.get`: one page of a listed place. Names that lead to this machine or its networks are refused, redirects are
//! followed only to listed places, and no credential of the router goes along.

use super::{content, too_large};
use atp_proto::{Code, WireError};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, LOCATION};
use reqwest::{Client, Url};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a URL.
const URL_MAX: usize = 2048;
const REDIRECTS_MAX: usize = 5;

/// A listed place: scheme, host and port, and where its paths begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(Url);

impl Prefix {
    /// Reads `https://host:port/path/`, or `host` alone, which is `https://host/`.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}/") };
        let url = Url::parse(&whole).map_err(|e| format!("`{text}` is no URL ({e})"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return Err(format!("`{text}` is no http:// or https:// URL with a host"));
        }
        if has_user(&url) || url.query().is_some() || url.fragment().is_some() || text.contains('*') {
            return Err(format!("`{text}` has a user, query, fragment or `*`"));
        }
        Ok(Self(url))
    }

    fn covers(&self, url: &Url) -> bool {
        let place = |u: &Url| (u.scheme().to_owned(), u.host_str().map(str::to_owned), u.port_or_known_default());
        let (path, from) = (url.path(), self.0.path());
        // `/v1` covers `/v1` and `/v1/x`, never `/v10`.
        let below =
            path.strip_prefix(from).is_some_and(|rest| from.ends_with('/') || rest.is_empty() || rest.starts_with('/'));
        place(&self.0) == place(url) && below && !has_user(url)
    }
}

fn has_user(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// A client without proxies, cookies and redirects of its own, that connects to public addresses only.
pub(super) fn client() -> Result<Client, String> {
    // Another part of the process may have installed one already; any will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .dns_resolver(Arc::new(PublicOnly))
        .connect_timeout(Duration::from_secs(5))
        .pool_max_idle_per_host(0)
        .user_agent(concat!("atp-router/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| format!("no HTTP client can be made: {e}"))
}

/// Resolves names to addresses that everybody may reach. An address that the operator lists needs no resolving.
struct PublicOnly;

impl Resolve for PublicOnly {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let public: Vec<SocketAddr> = found.into_iter().filter(|a| is_public(a.ip())).collect();
            if public.is_empty() {
                return Err(NOT_PUBLIC.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

const NOT_PUBLIC: &str = "its name leads to no public address; an operator who wants that lists the IP address itself";

/// False for this host, private and shared networks, link-local (where clouds keep their credentials), and whatever is no
/// single host.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => is_public_v6(ip),
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let shared = a == 100 && (64..128).contains(&b);
    let protocols = (a, b, c) == (192, 0, 0);
    let benchmarks = a == 198 && (b == 18 || b == 19);
    !(a == 0 || a >= 224 || ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_documentation())
        && !(shared || protocols || benchmarks)
}

fn is_public_v6(ip: Ipv6Addr) -> bool {
    let s = ip.segments();
    let last = Ipv4Addr::from((u32::from(s[6]) << 16) | u32::from(s[7]));
    if let Some(v4) = ip.to_ipv4_mapped() {
        return is_public_v4(v4);
    }
    match s {
        // An IPv4 address inside: NAT64 and 6to4.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => is_public_v4(last),
        [0x2002, high, low, ..] => is_public_v4(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))),
        [0x2001, 0 | 0xdb8, ..] => false,
        // Global unicast is 2000::/3.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

/// Gets `url`, at most `max` bytes of it.
///
/// # Errors
/// EPROTO: no URL. ESEC: it isn't listed, redirects to what isn't, or leads into a private network. ELIMIT: it is longer.
/// EAGENTDOWN: the host doesn't answer.
pub(super) async fn get(client: &Client, allow: &[Prefix], url: &str, max: usize) -> Result<Value, WireError> {
    if url.len() > URL_MAX {
        return Err(WireError::proto(format!("args.url: at most {URL_MAX} bytes")));
    }
    let mut url = Url::parse(url).map_err(|e| WireError::proto(format!("args.url: no URL ({e})")))?;
    listed(allow, &url, "isn't on the operator's list (tools.http_get.allow)")?;
    for _ in 0..=REDIRECTS_MAX {
        let answer = client.get(url.clone()).send().await.map_err(|e| failed(&url, &e))?;
        let to = answer.headers().get(LOCATION).filter(|_| answer.status().is_redirection());
        if let Some(to) = to {
            let next = to.to_str().ok().and_then(|to| url.join(to).ok());
            url = next.ok_or_else(|| WireError::new(Code::AgentDown, "the host redirects to no URL"))?;
            listed(allow, &url, "is where the host redirects to, and isn't on the operator's list")?;
            continue;
        }
        return body(answer, &url, max).await;
    }
    Err(WireError::new(Code::AgentDown, format!("the host redirects more than {REDIRECTS_MAX} times")))
}

fn listed(allow: &[Prefix], url: &Url, why: &str) -> Result<(), WireError> {
    match allow.iter().any(|prefix| prefix.covers(url)) {
        true => Ok(()),
        false => Err(WireError::new(Code::Sec, format!("args.url: {} {why}", shown(url)))),
    }
}

async fn body(mut answer: reqwest::Response, url: &Url, max: usize) -> Result<Value, WireError> {
    let status = answer.status().as_u16();
    let content_type = answer.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let declared = answer.content_length().unwrap_or(0);
    if declared > max as u64 {
        return Err(too_large(declared, max));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|e| failed(url, &e))? {
        if bytes.len() + chunk.len() > max {
            return Err(too_large((bytes.len() + chunk.len()) as u64, max));
        }
        bytes.extend_from_slice(&chunk);
    }
    let mut data = content(bytes);
    data["status"] = status.into();
    data["url"] = shown(url).into();
    data["content_type"] = content_type.into();
    Ok(data)
}

/// An error with its causes and without the URL's query, which may hold a key.
fn failed(url: &Url, error: &reqwest::Error) -> WireError {
    let mut text = format!("{} doesn't answer", shown(url));
    let mut cause = std::error::Error::source(error);
    let mut code = Code::AgentDown;
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if inner_text == NOT_PUBLIC {
            code = Code::Sec;
        }
        text = format!("{text}: {inner_text}");
        cause = inner.source();
    }
    WireError::new(code, text)
}

fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only where there is no host, and then there is no user either.
    let _ = (url.set_username(""), url.set_password(None));
    url.to_string().chars().take(200).collect()
}

#[cfg(test)]
mod tests;

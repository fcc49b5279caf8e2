//! The HTTP side of provider calls: the client, what its failures prove, and `Retry-After`. Knows no provider.

use crate::llm::ConfigProblem;
use atp_proto::Code;
use atp_proto::content::{AgentError, Proof};
use reqwest::header::HeaderMap;
use reqwest::{Client, Response, StatusCode, Url};
use std::time::{Duration, SystemTime};

/// Bytes of an error's body that are read.
const ERROR_BYTES_MAX: usize = 64 * 1024;
/// What a refused caller waits when the provider names no time.
const RETRY_AFTER_DEFAULT: Duration = Duration::from_secs(1);
/// A provider that names more is asked again after this.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// A base URL: `http` or `https`, no query; paths are appended to it.
pub(crate) fn base_url(text: &str) -> Result<Url, ConfigProblem> {
    let problem = |what: String| ConfigProblem { field: "base_url", problem: what };
    let url = Url::parse(text)
        .map_err(|e| problem(format!("`{text}` is no URL ({e}); give one like https://api.openai.com/v1")))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(problem(format!("`{text}` is not an http:// or https:// URL with a host")));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(problem(format!(
            "`{text}` has a query or fragment; the adapter appends its own path, so give the part before it"
        )));
    }
    Ok(url)
}

/// `base` with `path` behind it, whether or not `base` ends with a slash.
pub(crate) fn join(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    url.set_path(&format!("{}/{path}", base.path().trim_end_matches('/')));
    url.set_query((!query.is_empty()).then_some(query));
    url
}

/// A client that goes straight to where it is told: no redirects, and no proxy for a server on loopback.
pub(crate) fn client(base: &Url, connect_timeout: Duration) -> Result<Client, ConfigProblem> {
    // Another part of the process may have installed one already; any will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = Client::builder()
        .connect_timeout(connect_timeout)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("atp-agent/", env!("CARGO_PKG_VERSION")));
    if base.host_str().is_some_and(|host| host == "localhost" || host == "[::1]" || host.starts_with("127.")) {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|e| ConfigProblem { field: "base_url", problem: format!("no HTTP client can be made: {e}") })
}

/// What a request without an answer proves: a connection that was never made carried nothing.
pub(crate) fn unsent(error: &reqwest::Error) -> AgentError {
    let proof = error.is_connect().then_some(Proof::NotCalled);
    AgentError {
        code: Code::AgentDown,
        message: describe(error),
        retry_after_ms: Some(RETRY_AFTER_DEFAULT.as_millis() as u64),
        cost: None,
        proof,
    }
}

/// An error with its causes and without the URL, which may hold a key.
pub(crate) fn describe(error: &reqwest::Error) -> String {
    let mut text = if error.is_connect() {
        "the provider is not reachable".to_owned()
    } else {
        "the provider's connection failed".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}

/// What a provider says about an error in its body.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ErrorBody {
    pub(crate) message: Option<String>,
    pub(crate) retry_after: Option<Duration>,
    /// The request is larger than the model takes.
    pub(crate) too_long: bool,
}

/// An answer that isn't 2xx. A 4xx comes before any output and is proof; a 5xx proves nothing.
pub(crate) fn refusal(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    read: impl Fn(&[u8]) -> ErrorBody,
) -> AgentError {
    let said = read(body);
    let code = match status.as_u16() {
        401 | 403 => Code::Auth,
        413 => Code::Limit,
        _ if said.too_long && status.is_client_error() => Code::Limit,
        408 => Code::Timeout,
        429 => Code::WindowAgent,
        404 => Code::AgentDown,
        400..=499 => Code::Proto,
        500..=599 => Code::WindowAgent,
        _ => Code::AgentDown,
    };
    let fallback = || String::from_utf8_lossy(&body[..body.len().min(300)]).into_owned();
    let message = format!("the provider answered {status}: {}", said.message.clone().unwrap_or_else(fallback));
    let again = retry_after(headers).or(said.retry_after);
    let again = if code == Code::WindowAgent { again.or(Some(RETRY_AFTER_DEFAULT)) } else { again };
    AgentError {
        code,
        message,
        retry_after_ms: again.map(|d| d.min(RETRY_AFTER_MAX).as_millis() as u64),
        cost: None,
        proof: status.is_client_error().then_some(Proof::Rejected),
    }
}

/// `retry-after-ms`, else `Retry-After` in seconds (also decimals) or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).map(str::trim);
    let duration = |text: &str, unit: f64| {
        let n: f64 = text.parse().ok()?;
        Duration::try_from_secs_f64(n * unit).ok()
    };
    if let Some(found) = text("retry-after-ms").and_then(|t| duration(t, 0.001)) {
        return Some(found);
    }
    let text = text("retry-after")?;
    duration(text, 1.0).or_else(|| {
        let at = httpdate::parse_http_date(text).ok()?;
        Some(at.duration_since(SystemTime::now()).unwrap_or_default())
    })
}

/// The first bytes of an error's body; what can't be read is left out.
pub(crate) async fn error_body(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = ERROR_BYTES_MAX - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == ERROR_BYTES_MAX {
            break;
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn retry_after_is_read_in_all_its_forms() {
        assert_eq!(retry_after(&headers("retry-after", "7")), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(&headers("retry-after", "0.5")), Some(Duration::from_millis(500)));
        assert_eq!(retry_after(&headers("retry-after-ms", "250")), Some(Duration::from_millis(250)));
        assert_eq!(retry_after(&headers("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")), Some(Duration::ZERO));
        for bad in ["soon", "-1", "NaN", "inf", "1e400"] {
            assert_eq!(retry_after(&headers("retry-after", bad)), None, "{bad}");
        }
    }

    #[test]
    fn a_4xx_is_proof_and_a_5xx_is_none() {
        let of = |status: u16, body: &str| {
            let read = |body: &[u8]| ErrorBody { too_long: body.starts_with(b"long"), ..ErrorBody::default() };
            let error = refusal(StatusCode::from_u16(status).unwrap(), &HeaderMap::new(), body.as_bytes(), read);
            (error.code, error.proof, error.retry_after_ms)
        };
        let rejected = Some(Proof::Rejected);
        assert_eq!(of(429, ""), (Code::WindowAgent, rejected, Some(1000)));
        assert_eq!(of(401, ""), (Code::Auth, rejected, None));
        assert_eq!(of(400, ""), (Code::Proto, rejected, None));
        assert_eq!(of(400, "long"), (Code::Limit, rejected, None));
        assert_eq!(of(404, ""), (Code::AgentDown, rejected, None));
        assert_eq!(of(500, ""), (Code::WindowAgent, None, Some(1000)));
        assert_eq!(of(529, ""), (Code::WindowAgent, None, Some(1000)));
        assert_eq!(of(302, ""), (Code::AgentDown, None, None));
    }

    #[test]
    fn paths_are_appended_to_the_base() {
        for base in ["http://h/v1", "http://h/v1/"] {
            assert_eq!(join(&base_url(base).unwrap(), "chat?alt=sse").as_str(), "http://h/v1/chat?alt=sse");
        }
        assert_eq!(join(&base_url("http://h").unwrap(), "api/chat").as_str(), "http://h/api/chat");
        for bad in ["", "h", "ftp://h", "http://h/?q=1", "http://h/#x", "file:///x"] {
            assert_eq!(base_url(bad).unwrap_err().field, "base_url", "{bad}");
        }
    }
}

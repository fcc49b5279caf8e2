//! The list, the addresses behind a name, and a host on loopback that redirects and exaggerates.

use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

fn covers(prefix: &str, url: &str) -> bool {
    Prefix::parse(prefix).unwrap().covers(&Url::parse(url).unwrap())
}

#[test]
fn the_list_is_scheme_host_port_and_path() {
    assert!(covers("docs.rs", "https://docs.rs/serde?x=1"));
    assert!(covers("https://a.test/v1", "https://a.test:443/v1/x") && covers("https://a.test/v1", "https://a.test/v1"));
    assert!(covers("http://127.0.0.1:8080/", "http://127.0.0.1:8080/x"));
    for (prefix, url) in [
        ("docs.rs", "http://docs.rs/"),
        ("docs.rs", "https://docs.rs:8443/"),
        ("docs.rs", "https://docs.rs.evil.test/"),
        ("docs.rs", "https://evil.test/docs.rs"),
        ("docs.rs", "https://docs.rs@evil.test/"),
        ("docs.rs", "https://user@docs.rs/"),
        ("https://a.test/v1", "https://a.test/v10"),
        ("https://a.test/v1/", "https://a.test/v1/../admin"),
        ("https://a.test/v1/", "https://a.test/v1/%2e%2e/admin"),
        ("https://a.test/v1/", "https://a.test/v1"),
        ("https://a.test", "file:///etc/passwd"),
    ] {
        assert!(!covers(prefix, url), "{prefix} {url}");
    }
    for wrong in ["", "ftp://a.test/", "https://u@a.test/", "https://a.test/?q", "*.a.test", "https://"] {
        assert!(Prefix::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn only_public_addresses_are_connected_to() {
    for public in
        ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "2606:4700::1", "64:ff9b::101:101"]
    {
        assert!(is_public(public.parse().unwrap()), "{public}");
    }
    for private in [
        "127.0.0.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.0.8",
        "198.18.0.1",
        "203.0.113.5",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:db8::1",
        "fec0::1",
    ] {
        assert!(!is_public(private.parse().unwrap()), "{private}");
    }
}

/// Serves each connection the same bytes; its address.
async fn host(answer: String) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut io, _)) = listener.accept().await {
            let _ = io.read(&mut [0; 4096]).await;
            let _ = io.write_all(answer.as_bytes()).await;
        }
    });
    address
}

fn page(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn ask(allow: &[String], url: &str, max: usize) -> Result<Value, WireError> {
    let allow: Vec<Prefix> = allow.iter().map(|a| Prefix::parse(a).unwrap()).collect();
    get(&client().unwrap(), &allow, url, max).await
}

#[tokio::test]
async fn n_bytes_are_brought_and_one_more_is_refused() {
    let base = format!("http://{}/", host(page("hello")).await);
    let data = ask(std::slice::from_ref(&base), &base, 5).await.unwrap();
    assert_eq!((data["text"].as_str(), data["status"].as_u64()), (Some("hello"), Some(200)));
    assert_eq!(ask(std::slice::from_ref(&base), &base, 4).await.unwrap_err().code, Code::Limit);
    // Without a length it is told while it comes.
    let base = format!("http://{}/", host("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello".into()).await);
    assert_eq!(ask(std::slice::from_ref(&base), &base, 5).await.unwrap()["bytes"], 5);
    assert_eq!(ask(std::slice::from_ref(&base), &base, 4).await.unwrap_err().code, Code::Limit);
}

#[tokio::test]
async fn a_redirect_goes_to_listed_places_only() {
    let end = format!("http://{}/", host(page("end")).await);
    let from = format!(
        "http://{}/",
        host(format!("HTTP/1.1 302 Found\r\nlocation: {end}\r\ncontent-length: 0\r\n\r\n")).await
    );
    let data = ask(&[from.clone(), end.clone()], &from, 100).await.unwrap();
    assert_eq!((data["text"].as_str(), data["url"].as_str()), (Some("end"), Some(end.as_str())));
    let error = ask(std::slice::from_ref(&from), &from, 100).await.unwrap_err();
    assert!(error.code == Code::Sec && error.message.contains("redirects"), "{error}");
    let round = "HTTP/1.1 302 Found\r\nlocation: /again\r\ncontent-length: 0\r\n\r\n".to_owned();
    let round = format!("http://{}/", host(round).await);
    assert_eq!(ask(std::slice::from_ref(&round), &round, 100).await.unwrap_err().code, Code::AgentDown);
}

#[tokio::test]
async fn a_name_that_leads_to_this_machine_is_refused() {
    let address = host(page("inside")).await;
    let by_name = format!("http://localhost:{}/", address.port());
    let error = ask(std::slice::from_ref(&by_name), &by_name, 100).await.unwrap_err();
    assert!(error.code == Code::Sec && error.message.contains("IP"), "{error}");
    let error = ask(&["docs.rs".into()], &format!("http://{address}/"), 100).await.unwrap_err();
    assert_eq!(error.code, Code::Sec);
    assert_eq!(ask(&["docs.rs".into()], "no url", 100).await.unwrap_err().code, Code::Proto);
    let long = format!("https://docs.rs/{}", "x".repeat(URL_MAX));
    assert_eq!(ask(&["docs.rs".into()], &long, 100).await.unwrap_err().code, Code::Proto);
}

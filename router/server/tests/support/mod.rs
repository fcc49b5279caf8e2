//! What the tests of a whole router share: a small configuration, peers written by hand over in-memory connections, HTTP.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]

use atp_core::placement::{Placement, SHARDS};
use atp_proto::codec::{decode, encode};
use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, Flags, Frame, StreamId, TenantId, WireError};
use atp_router::{Config, Router};
use bytes::BytesMut;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

pub fn config(dir: &Path) -> Config {
    let mut config =
        Config { data_dir: dir.into(), durability: atp_router::config::Durability::Async, ..Config::default() };
    config.listen.atp.set_port(0);
    config.listen.http.set_port(0);
    config.limits.segment_bytes = 1 << 20;
    config
}

/// A peer that is nothing but frames.
pub struct Peer {
    pub io: DuplexStream,
    bytes: BytesMut,
}

impl Peer {
    pub fn new(router: &Router) -> Self {
        Self { io: router.connect_memory(), bytes: BytesMut::new() }
    }

    pub async fn send(&mut self, frame: Frame) {
        assert!(self.try_send(frame).await, "the router reads");
    }

    /// False: the router has closed.
    pub async fn try_send(&mut self, frame: Frame) -> bool {
        let mut bytes = BytesMut::new();
        encode(&frame, &mut bytes);
        self.io.write_all(&bytes).await.is_ok()
    }

    /// The next frame that is no heartbeat, no ack and no window; `None`: closed.
    pub async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(received) = decode(&mut self.bytes).expect("the router sends whole frames") {
                let frame = received.frame;
                if !frame.flags.has(Flags::HB) && !matches!(&*frame.kind, kind::ACK | kind::WINDOW_UPDATE) {
                    return Some(frame);
                }
                continue;
            }
            let read = tokio::time::timeout(Duration::from_secs(60), self.io.read_buf(&mut self.bytes)).await;
            if read.expect("an answer within a minute").unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn expect(&mut self, wanted: &str) -> Frame {
        let frame = self.next().await.expect("open");
        assert_eq!(&*frame.kind, wanted, "{}", String::from_utf8_lossy(&frame.content));
        frame
    }

    pub async fn hello(router: &Router, role: Role) -> (Self, HelloAck) {
        let mut peer = Self::new(router);
        peer.send(Frame::json(
            "",
            0,
            Flags::SYN,
            kind::HELLO,
            &Hello { minor_max: 9, role, token: None, redirect: false },
        ))
        .await;
        let ack = peer.expect(kind::HELLO).await.read().expect("a hello");
        (peer, ack)
    }

    /// The error that the router closes the connection with.
    pub async fn refused(&mut self) -> WireError {
        let error = self.expect(kind::ERROR).await.read::<WireError>().expect("an error");
        assert_eq!(error.fatal, atp_proto::code::Fatal::Connection);
        assert!(self.next().await.is_none(), "closed behind the error");
        error
    }
}

pub fn submit(stream: &str, agent: &str) -> Frame {
    let content = Submit { task: "Say hello".into(), agents: vec![AgentName::new(agent)], ..Submit::default() };
    Frame::json(stream, 1, Flags::SYN, kind::TASK_SUBMIT, &content)
}

/// The first `n` stream ids of the shard that `home` picks, in a log with the usual number of shards.
pub fn ids_at(n: usize, home: impl Fn(&Placement) -> u32) -> Vec<String> {
    let placement = Placement::new(SHARDS, 0);
    let ids = (1..).map(|n| format!("s{n}"));
    let here = |id: &String| placement.shard_of(&TenantId::new("default"), &StreamId::new(id)) == home(&placement);
    ids.filter(here).take(n).collect()
}

pub async fn agent(router: &Router, name: &str) -> Peer {
    let (mut agent, _) = Peer::hello(router, Role::Agent).await;
    let capabilities = Capabilities {
        agent: AgentName::new(name),
        incarnation: "i1".into(),
        models: vec![ModelInfo {
            id: "m".into(),
            in_usd_micros_per_mtok: Some(1_000_000),
            out_usd_micros_per_mtok: Some(1_000_000),
            context_tokens: None,
        }],
        max_parallel: 8,
        reach: Amount::new(20, 100),
        ..Capabilities::default()
    };
    agent.send(Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities)).await;
    agent
}

pub async fn http(router: &Router, request: &str) -> (u16, serde_json::Value) {
    http_body(router, request, "").await
}

/// With a JSON body.
pub async fn http_body(router: &Router, request: &str, body: &str) -> (u16, serde_json::Value) {
    let mut io = tokio::net::TcpStream::connect(router.http_addr()).await.expect("HTTP listens");
    let (kind, length) = ("content-type: application/json", body.len());
    let head = format!("host: localhost\r\nconnection: close\r\n{kind}\r\ncontent-length: {length}");
    let text = format!("{request} HTTP/1.1\r\n{head}\r\n\r\n{body}");
    io.write_all(text.as_bytes()).await.expect("HTTP reads");
    let mut answer = String::new();
    io.read_to_string(&mut answer).await.expect("HTTP answers");
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (status, serde_json::from_str(body).unwrap_or_else(|_| body.into()))
}

//! A router of one connection and a provider that plays a script, both in this process.
// Each test file uses its own part of this, and clippy takes only marked functions for tests.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod provider;

use atp_proto::content::{
    Ack, AgentCancel, AgentError, AgentFinal, AgentPartial, BudgetUpdate, Capabilities, Dispatch, HelloAck, HelloLimits,
};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, CallId, Flags, Frame, codec, limits};
use atp_sdk::{AgentHandle, AgentOptions, BoxedIo, Dialer, Handler, serve};
use bytes::BytesMut;
use serde::Serialize;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::timeout;

/// The longest time that anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub struct Router {
    io: DuplexStream,
    bytes: BytesMut,
    agent: AgentHandle,
    call: CallId,
}

/// How a call ended, and what came before.
#[derive(Debug)]
pub struct Ended {
    pub partials: Vec<AgentPartial>,
    pub end: Result<AgentFinal, AgentError>,
}

impl Ended {
    pub fn text(&self) -> String {
        let last = self.end.as_ref().ok().and_then(|end| end.text.clone());
        self.partials.iter().filter_map(|p| p.text.clone()).chain(last).collect()
    }
    pub fn expect_final(&self) -> &AgentFinal {
        self.end.as_ref().expect("a final")
    }
    pub fn expect_error(&self) -> &AgentError {
        self.end.as_ref().expect_err("an error")
    }
}

pub fn dispatch(task: &str, grant: Amount) -> Dispatch {
    Dispatch {
        call_id: CallId([7; 10]),
        shard: 0,
        epoch: 1,
        upstream_key: "up-1".into(),
        task: task.into(),
        inputs: Vec::new(),
        model: None,
        task_type: String::new(),
        tools: Vec::new(),
        grant,
        max_output_tokens: Some(256),
        deadline_ms: PATIENCE.as_millis() as u64,
        go_on: false,
    }
}

pub const WIDE: Amount = Amount::new(1_000_000, 1_000_000);

impl Router {
    /// Serves `handler` over an in-memory stream and does the hello.
    pub async fn of(handler: impl Handler) -> Self {
        let (io, far) = tokio::io::duplex(1 << 20);
        let far = Arc::new(Mutex::new(Some(far)));
        let dialer = Dialer::new(move || {
            let far = far.lock().unwrap().take();
            async move { far.map(|io| Box::new(io) as BoxedIo).ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into()) }
        });
        let capabilities = Capabilities { agent: AgentName::new("a"), max_parallel: 4, ..Capabilities::default() };
        let agent = serve(dialer, capabilities, Arc::new(handler), AgentOptions::default());
        let mut router = Self { io, bytes: BytesMut::new(), agent, call: CallId([7; 10]) };
        assert_eq!(&*router.frame().await.kind, kind::HELLO);
        let ack = HelloAck {
            minor: 1,
            session_id: "s-1".into(),
            limits: HelloLimits {
                frame_bytes: limits::FRAME_BYTES_MAX as u64,
                fragment_bytes: limits::FRAGMENT_BYTES as u64,
                message_bytes: limits::MESSAGE_BYTES_MAX as u64,
                streams: limits::STREAMS_MAX as u64,
            },
            heartbeat_ms: 3_600_000,
        };
        router.send(&Frame::json("", 0, Flags::SYN.with(Flags::ACK), kind::HELLO, &ack)).await;
        assert_eq!(&*router.frame().await.kind, kind::CAPABILITIES);
        router
    }

    pub async fn frame(&mut self) -> Frame {
        let next = async {
            loop {
                if let Some(received) = codec::decode(&mut self.bytes).expect("the agent sends whole frames") {
                    return received.frame;
                }
                assert_ne!(self.io.read_buf(&mut self.bytes).await.unwrap(), 0, "the agent closed the connection");
            }
        };
        let frame = timeout(PATIENCE, next).await.expect("a frame in time");
        if frame.msg_seq > 0 {
            let ack = Ack { msg_seq: frame.msg_seq, open: Vec::new() };
            self.send(&Frame::json(frame.stream_id.clone(), 0, Flags::NONE, kind::ACK, &ack)).await;
        }
        frame
    }

    pub async fn send(&mut self, frame: &Frame) {
        let mut out = BytesMut::new();
        codec::encode(frame, &mut out);
        self.io.write_all(&out).await.unwrap();
    }

    async fn tell<T: Serialize>(&mut self, kind: &'static str, content: &T) {
        self.send(&Frame::json(self.call.to_string(), 0, Flags::NONE, kind, content)).await;
    }

    pub async fn dispatch(&mut self, dispatch: &Dispatch) {
        self.call = dispatch.call_id;
        self.send(&Frame::json(self.call.to_string(), 1, Flags::SYN, kind::DISPATCH, dispatch)).await;
    }

    pub async fn grant(&mut self, grant: Amount) {
        let update = BudgetUpdate { call_id: self.call, shard: 0, epoch: 1, grant, last: false };
        self.tell(kind::BUDGET_UPDATE, &update).await;
    }

    pub async fn cancel(&mut self) {
        let cancel = AgentCancel { call_id: self.call, shard: 0, epoch: 1, reason: "test".into() };
        self.tell(kind::AGENT_CANCEL, &cancel).await;
    }

    /// The next partial; a call that has ended instead is a failure of the test.
    pub async fn partial(&mut self) -> AgentPartial {
        let frame = self.frame().await;
        assert_eq!(&*frame.kind, kind::RESULT_PARTIAL, "{}", String::from_utf8_lossy(&frame.content));
        frame.read().unwrap()
    }

    pub async fn end(&mut self) -> Ended {
        let mut partials = Vec::new();
        loop {
            let frame = self.frame().await;
            match &*frame.kind {
                kind::RESULT_PARTIAL => partials.push(frame.read().unwrap()),
                kind::RESULT_FINAL => return Ended { partials, end: Ok(frame.read().unwrap()) },
                kind::ERROR => return Ended { partials, end: Err(frame.read().unwrap()) },
                other => panic!("unexpected {other}"),
            }
        }
    }

    /// One call from its dispatch to its end.
    pub async fn run(&mut self, dispatch: &Dispatch) -> Ended {
        self.dispatch(dispatch).await;
        self.end().await
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.agent.kill();
    }
}

//! A router's end of in-memory connections, speaking frames by hand. It decides nothing: each test says what is sent.
#![allow(dead_code, unreachable_pub)]

use atp_proto::code::WireError;
use atp_proto::content::*;
use atp_proto::frame::kind;
use atp_proto::{Amount, CallId, Flags, Frame, codec};
use atp_sdk::{BoxedIo, Dialer};
use bytes::BytesMut;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

/// Takes what a dialer dials.
pub struct Listener(mpsc::UnboundedReceiver<DuplexStream>);

pub fn listen() -> (Dialer, Listener) {
    let (send, receive) = mpsc::unbounded_channel();
    let dialer = Dialer::new(move || {
        let send = send.clone();
        async move {
            let (near, far) = duplex(64 * 1024);
            send.send(far).map_err(|_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused))?;
            Ok(Box::new(near) as BoxedIo)
        }
    });
    (dialer, Listener(receive))
}

impl Listener {
    /// The next connection, greeted.
    pub async fn accept(&mut self) -> Peer {
        let mut peer = self.accept_silent().await;
        let hello = peer.expect(kind::HELLO).await;
        assert!(hello.flags.has(Flags::SYN) && hello.stream_id.is_empty());
        greet(&mut peer).await;
        peer
    }

    pub async fn accept_silent(&mut self) -> Peer {
        let io = tokio::time::timeout(Duration::from_secs(60), self.0.recv()).await.expect("dialled in time");
        Peer { io: io.expect("the dialer lives"), buffer: BytesMut::new() }
    }

    /// The next agent's connection and its capabilities.
    pub async fn accept_agent(&mut self) -> (Peer, Capabilities) {
        let mut peer = self.accept().await;
        let capabilities = peer.expect(kind::CAPABILITIES).await.read().unwrap();
        (peer, capabilities)
    }
}

/// The router's answer to a hello.
pub async fn greet(peer: &mut Peer) {
    let limits = HelloLimits { frame_bytes: 262_144, fragment_bytes: 1000, message_bytes: 1 << 24, streams: 1024 };
    let answer = HelloAck { minor: 1, session_id: "s-1".into(), limits, heartbeat_ms: 1000 };
    peer.send(&Frame::json("", 0, Flags::SYN.with(Flags::ACK), kind::HELLO, &answer)).await;
}

pub struct Peer {
    io: DuplexStream,
    buffer: BytesMut,
}

impl Peer {
    pub async fn send(&mut self, frame: &Frame) {
        let mut bytes = BytesMut::new();
        codec::encode(frame, &mut bytes);
        self.io.write_all(&bytes).await.unwrap();
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) {
        self.io.write_all(bytes).await.unwrap();
    }

    /// The next frame of any kind; `None` when the other side has closed.
    pub async fn any(&mut self) -> Option<Frame> {
        loop {
            if let Some(received) = codec::decode(&mut self.buffer).unwrap() {
                return Some(received.frame);
            }
            match tokio::time::timeout(Duration::from_secs(60), self.io.read_buf(&mut self.buffer)).await {
                Ok(Ok(n)) if n > 0 => {}
                Ok(_) => return None,
                Err(_) => panic!("nothing came"),
            }
        }
    }

    /// The next frame that isn't a heartbeat; those are answered.
    pub async fn frame(&mut self) -> Frame {
        loop {
            let frame = self.any().await.expect("the connection is open");
            if !frame.flags.has(Flags::HB) {
                return frame;
            }
            self.send(&Frame::heartbeat(true)).await;
        }
    }

    pub async fn expect(&mut self, kind: &str) -> Frame {
        let frame = self.frame().await;
        assert_eq!(&*frame.kind, kind, "{frame:?}");
        frame
    }

    /// Everything that comes within a second of virtual time, heartbeats left out.
    pub async fn rest(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        while let Ok(Some(frame)) = tokio::time::timeout(Duration::from_secs(1), self.any()).await {
            if !frame.flags.has(Flags::HB) {
                frames.push(frame);
            }
        }
        frames
    }

    // ---- to an agent ------------------------------------------------------------------------------------------------

    pub async fn dispatch(&mut self, dispatch: &Dispatch) {
        self.send(&Frame::json(dispatch.call_id.to_string(), 1, Flags::SYN, kind::DISPATCH, dispatch)).await;
    }

    pub async fn budget(&mut self, call: CallId, epoch: u64, grant: Amount) {
        let update = BudgetUpdate { call_id: call, shard: 0, epoch, grant, last: false };
        self.send(&Frame::json(call.to_string(), 0, Flags::NONE, kind::BUDGET_UPDATE, &update)).await;
    }

    pub async fn cancel_call(&mut self, call: CallId, epoch: u64) {
        let cancel = AgentCancel { call_id: call, shard: 0, epoch, reason: "test".into() };
        self.send(&Frame::json(call.to_string(), 2, Flags::NONE, kind::AGENT_CANCEL, &cancel)).await;
    }

    pub async fn ack(&mut self, call: CallId, msg_seq: u64) {
        let ack = Ack { msg_seq, open: Vec::new() };
        self.send(&Frame::json(call.to_string(), 0, Flags::NONE, kind::ACK, &ack)).await;
    }

    // ---- to a client ------------------------------------------------------------------------------------------------

    pub async fn accepted(&mut self, stream: &str, msg_seq: u64, named: &str) {
        self.send(&accepted(stream, msg_seq, named, TaskState::Running)).await;
    }

    pub async fn partial(&mut self, stream: &str, msg_seq: u64, text: &str) {
        self.send(&partial(stream, msg_seq, text)).await;
    }

    pub async fn finish(&mut self, stream: &str, msg_seq: u64) {
        self.send(&final_(stream, msg_seq, "all")).await;
        self.send(&bill(stream, msg_seq + 1)).await;
    }

    pub async fn refuse(&mut self, stream: &str, error: WireError) {
        self.send(&Frame::json(stream, 0, Flags::RST, kind::ERROR, &error)).await;
    }
}

pub fn call_id(n: u8) -> CallId {
    CallId([n; 10])
}

pub fn dispatch(n: u8, epoch: u64) -> Dispatch {
    Dispatch {
        call_id: call_id(n),
        shard: 0,
        epoch,
        upstream_key: format!("key-{n}"),
        task: "task".into(),
        inputs: Vec::new(),
        model: None,
        task_type: String::new(),
        tools: Vec::new(),
        grant: Amount::new(100, 1000),
        max_output_tokens: None,
        deadline_ms: 60_000,
        go_on: false,
    }
}

pub fn accepted(stream: &str, msg_seq: u64, named: &str, state: TaskState) -> Frame {
    let content = Accepted {
        stream_id: named.into(),
        state,
        qos: atp_proto::Qos::Silver,
        window: WindowView::default(),
        resume_token: None,
    };
    Frame::json(stream, msg_seq, Flags::SYN.with(Flags::ACK), kind::ACCEPTED, &content)
}

pub fn partial(stream: &str, msg_seq: u64, text: &str) -> Frame {
    let content = Partial {
        call_id: call_id(1),
        agent: atp_proto::AgentName::new("a"),
        text: Some(text.into()),
        findings: None,
        cost: atp_proto::Cost::default(),
        ended: None,
    };
    Frame::json(stream, msg_seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
}

pub fn final_(stream: &str, msg_seq: u64, text: &str) -> Frame {
    let result = TaskResult { text: text.into(), ..TaskResult::default() };
    let content = Final { state: TaskState::Done, result, consensus: Consensus::default(), error: None };
    Frame::json(stream, msg_seq, Flags::NONE, kind::RESULT_FINAL, &content)
}

pub fn bill(stream: &str, msg_seq: u64) -> Frame {
    let content = serde_json::json!({
        "stream_id": stream, "account": "default", "state": "done", "limit": {},
        "settled": {}, "held": {}, "remaining": {}, "calls": [],
    });
    Frame::json(stream, msg_seq, Flags::FIN, kind::BILL, &content)
}

//! A stand-in for the router in this crate's tests: passes frames between one agent and clients, acknowledges in batches
//! and grants in slices. No money, no log, no order of its own.

use atp_proto::content::{
    Accepted, AgentPartial, BudgetUpdate, Capabilities, Consensus, Dispatch, Final, Hello, HelloAck, HelloLimits,
    Partial, Role, Submit, TaskResult, TaskState, WindowView,
};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, CallId, Code, Flags, Frame, Qos, StreamId, TenantId, WireError, codec};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

const GRANT: Amount = Amount::new(20_000, 80_000);

type Out = UnboundedSender<Frame>;

#[derive(Default)]
struct State {
    agents: HashMap<AgentName, Out>,
    /// By call id: who gets the answer, how far it is, and what is granted.
    calls: HashMap<String, Call>,
}

struct Call {
    stream: String,
    agent: AgentName,
    client: Out,
    sent: u64,
    grant: u64,
}

pub(crate) async fn router() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let state = Arc::new(Mutex::new(State::default()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, Arc::clone(&state)));
        }
    });
    address
}

/// Resolves when an agent has said its capabilities: a hello of role `router` is answered then.
pub(crate) async fn agent_is_there(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.expect("the fake listens");
    let mut out = BytesMut::new();
    let hello = Hello { minor_max: 1, role: Role::Router, token: None, redirect: false };
    codec::encode(&Frame::json("", 0, Flags::SYN, kind::HELLO, &hello), &mut out);
    stream.write_all(&out).await.expect("the fake reads");
    let answer = tokio::time::timeout(Duration::from_secs(20), stream.read_u8()).await;
    answer.expect("an agent comes").expect("the fake answers");
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    let (mut read, mut write) = stream.into_split();
    let (out, mut frames) = unbounded_channel::<Frame>();
    tokio::spawn(async move {
        let mut bytes = BytesMut::new();
        while let Some(frame) = frames.recv().await {
            codec::encode(&frame, &mut bytes);
            while let Ok(frame) = frames.try_recv() {
                codec::encode(&frame, &mut bytes);
            }
            if write.write_all_buf(&mut bytes).await.is_err() {
                return;
            }
        }
    });
    let mut bytes = BytesMut::new();
    while read.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {
        while let Some(received) = codec::decode(&mut bytes).expect("the ends send valid frames") {
            let frame = received.frame;
            if frame.kind.as_bytes() == kind::HELLO.as_bytes() {
                let hello: Hello = frame.read().expect("hello");
                while hello.role == Role::Router && state.lock().expect("whole").agents.is_empty() {
                    tokio::task::yield_now().await;
                }
            }
            answer(&mut state.lock().expect("whole"), &out, &frame);
        }
    }
}

fn answer(state: &mut State, out: &Out, frame: &Frame) {
    let reply = |frame: Frame| out.send(frame).unwrap_or_default();
    match &*frame.kind {
        kind::HELLO => {
            let limits = HelloLimits { frame_bytes: 1, fragment_bytes: 1, message_bytes: 1, streams: 1 };
            let ack = HelloAck { minor: 1, session_id: "s-1".into(), limits, heartbeat_ms: 5000 };
            reply(Frame::json("", 0, Flags::SYN.with(Flags::ACK), kind::HELLO, &ack));
        }
        kind::CAPABILITIES => {
            let capabilities: Capabilities = frame.read().expect("capabilities");
            state.agents.insert(capabilities.agent, out.clone());
        }
        kind::TASK_SUBMIT => submit(state, out, frame),
        kind::RESULT_PARTIAL => partial(state, frame),
        kind::RESULT_FINAL => {
            let call = state.calls.get_mut(&*frame.stream_id).expect("a call");
            let (result, consensus) = (TaskResult::default(), Consensus::default());
            let done = Final { state: TaskState::Done, result, consensus, error: None };
            let to_client = |frame| call.client.send(frame).unwrap_or_default();
            to_client(Frame::json(call.stream.as_str(), call.sent + 1, Flags::NONE, kind::RESULT_FINAL, &done));
            let bill = Bytes::from_static(b"{}");
            to_client(Frame::raw(call.stream.as_str(), call.sent + 2, Flags::FIN, kind::BILL, bill));
        }
        _ => {}
    }
}

fn submit(state: &mut State, out: &Out, frame: &Frame) {
    let task: Submit = frame.read().expect("a submit");
    let (stream, agent) = (frame.stream_id.to_string(), task.agents[0].clone());
    let Some(to_agent) = state.agents.get(&agent) else {
        let error = WireError::new(Code::AgentDown, "not here");
        return out.send(Frame::json(stream, 1, Flags::RST, kind::ERROR, &error)).unwrap_or_default();
    };
    let window = WindowView::default();
    let accepted =
        Accepted { stream_id: stream.clone(), state: TaskState::Running, qos: Qos::Silver, window, resume_token: None };
    let flags = Flags::SYN.with(Flags::ACK);
    out.send(Frame::json(stream.as_str(), 1, flags, kind::ACCEPTED, &accepted)).unwrap_or_default();
    let call_id = CallId::of(&TenantId::new("default"), &StreamId::new(&stream), 1);
    let dispatch = Dispatch {
        call_id,
        shard: 0,
        epoch: 1,
        upstream_key: "k".into(),
        task: task.task,
        inputs: Vec::new(),
        model: None,
        task_type: String::new(),
        tools: Vec::new(),
        grant: GRANT,
        max_output_tokens: None,
        deadline_ms: 1000,
        go_on: false,
    };
    let call = Call { stream, agent, client: out.clone(), sent: 1, grant: 1 };
    state.calls.insert(call_id.to_string(), call);
    to_agent.send(Frame::json(call_id.to_string(), 1, Flags::SYN, kind::DISPATCH, &dispatch)).unwrap_or_default();
}

fn partial(state: &mut State, frame: &Frame) {
    let call_id = CallId::parse(&frame.stream_id).expect("a call id");
    let call = state.calls.get_mut(&*frame.stream_id).expect("a call");
    let partial: AgentPartial = frame.read().expect("a partial");
    call.sent += 1;
    let spent = partial.cost.amount().expect("small");
    let content = Partial {
        call_id,
        agent: call.agent.clone(),
        text: partial.text,
        findings: None,
        cost: partial.cost,
        ended: None,
    };
    let frame_out = Frame::json(call.stream.as_str(), call.sent, Flags::NONE, kind::RESULT_PARTIAL, &content);
    call.client.send(frame_out).unwrap_or_default();
    let to_agent = &state.agents[&call.agent];
    if frame.msg_seq.is_multiple_of(16) {
        let ack = serde_json::json!({"msg_seq": frame.msg_seq});
        to_agent.send(Frame::json(&*frame.stream_id, 0, Flags::NONE, kind::ACK, &ack)).unwrap_or_default();
    }
    // Late on purpose: only when no further chunk fits.
    let grant = Amount::new(GRANT.tokens.0 * call.grant, GRANT.usd_micros.0 * call.grant);
    let next = Amount::new(spent.tokens.0 + 256, spent.usd_micros.0 + 1024);
    let next = next.max(Amount::new(0, partial.cost.in_tokens.0 + 4 * (partial.cost.out_tokens.0 + 256)));
    if !next.fits(grant) {
        call.grant += 1;
        let grant = Amount::new(GRANT.tokens.0 * call.grant, GRANT.usd_micros.0 * call.grant);
        let update = BudgetUpdate { call_id, shard: 0, epoch: 1, grant, last: false };
        to_agent.send(Frame::json(&*frame.stream_id, 0, Flags::NONE, kind::BUDGET_UPDATE, &update)).unwrap_or_default();
    }
}

//! The agent's side against a router that speaks frames by hand, in virtual time.
#![allow(clippy::unwrap_used)]

mod fake;

use atp_proto::content::{
    AgentError, AgentFinal, AgentPartial, AgentStatus, Capabilities, Dispatch, Finish, Proof, Status,
};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, Code, Cost, Flags, Frame, Tokens, UsdMicros};
use atp_sdk::{AgentHandle, AgentOptions, BoxFuture, Call, Handler, Outcome, StopReason, Verdict, serve};
use fake::{Listener, Peer, call_id, dispatch, listen};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

fn cost(out_tokens: u64) -> Cost {
    Cost { in_tokens: Tokens(0), out_tokens: Tokens(out_tokens), usd_micros: UsdMicros(out_tokens * 10) }
}

/// Emits ten tokens each time the test says so, until it is told to stop or has made `chunks` of them.
#[derive(Default)]
struct Stepper {
    step: Notify,
    chunks: u64,
    begun: AtomicUsize,
    deaf: bool,
}

impl Handler for Stepper {
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            for n in 1..=self.chunks {
                let stopped = async {
                    if self.deaf {
                        std::future::pending::<()>().await;
                    }
                    call.meter.stopped().await
                };
                tokio::select! {
                    () = self.step.notified() => {}
                    reason = stopped => return end(reason, call.meter.total()),
                }
                if let Verdict::Stop(reason) = call.meter.emit(Some("ten "), None, cost(n * 10)) {
                    return end(reason, call.meter.total());
                }
            }
            Outcome::Final(AgentFinal { cost: call.meter.total(), ..AgentFinal::default() })
        })
    }
}

fn end(reason: StopReason, cost: Cost) -> Outcome {
    let finish = if reason == StopReason::Grant { Finish::Grant } else { Finish::Cancelled };
    Outcome::Final(AgentFinal { cost, finish, ..AgentFinal::default() })
}

fn start(handler: Stepper) -> (AgentHandle, Arc<Stepper>, Listener) {
    let (dialer, listener) = listen();
    let handler = Arc::new(handler);
    let capabilities = Capabilities { agent: AgentName::new("a"), max_parallel: 2, ..Capabilities::default() };
    let agent = serve(dialer, capabilities, Arc::clone(&handler) as Arc<dyn Handler>, AgentOptions::default());
    (agent, handler, listener)
}

fn steps(chunks: u64) -> Stepper {
    Stepper { chunks, ..Stepper::default() }
}

async fn end_of(peer: &mut Peer) -> (u64, AgentFinal) {
    let frame = peer.expect(kind::RESULT_FINAL).await;
    assert!(frame.flags.has(Flags::FIN));
    (frame.msg_seq, frame.read().unwrap())
}

async fn refusal(peer: &mut Peer) -> AgentError {
    let frame = peer.expect(kind::ERROR).await;
    assert!(frame.flags.has(Flags::RST));
    frame.read().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_call_streams_and_is_forgotten_when_its_end_is_acknowledged() {
    let (agent, handler, mut listener) = start(steps(2));
    let (mut peer, capabilities) = listener.accept_agent().await;
    agent.connected().await.unwrap();
    assert_eq!(capabilities.incarnation, agent.incarnation());
    peer.dispatch(&dispatch(1, 5)).await;
    for n in 1..=2 {
        handler.step.notify_one();
        let frame = peer.expect(kind::RESULT_PARTIAL).await;
        assert_eq!((frame.msg_seq, &*frame.stream_id), (n, &*call_id(1).to_string()));
        assert_eq!(frame.read::<AgentPartial>().unwrap().cost, cost(n * 10));
    }
    let (msg_seq, last) = end_of(&mut peer).await;
    assert_eq!((msg_seq, last.finish, last.cost), (3, Finish::Complete, cost(20)));
    peer.ack(call_id(1), 3).await;
    // A late duplicate of the dispatch is neither run nor answered.
    peer.dispatch(&dispatch(1, 5)).await;
    assert_eq!(peer.rest().await, vec![]);
    assert_eq!(handler.begun.load(Ordering::SeqCst), 1);
    drop(peer);
    let (_, capabilities) = listener.accept_agent().await;
    assert!(capabilities.calls.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_is_mended_with_the_call_list_and_the_same_frames() {
    let (_agent, handler, mut listener) = start(steps(3));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 5)).await;
    handler.step.notify_one();
    let first = peer.expect(kind::RESULT_PARTIAL).await;
    peer.ack(call_id(1), 1).await;
    handler.step.notify_one();
    let second = peer.expect(kind::RESULT_PARTIAL).await;
    drop(peer);
    // The call goes on without a connection.
    handler.step.notify_one();
    let (mut peer, capabilities) = listener.accept_agent().await;
    let listed = &capabilities.calls[0];
    assert_eq!((listed.call_id, listed.shard, listed.epoch), (call_id(1), 0, 5));
    assert_eq!((listed.msg_seq, listed.done, listed.cost), (4, true, cost(30)));
    let again = peer.expect(kind::RESULT_PARTIAL).await;
    assert_eq!(again, second);
    assert_ne!(again, first);
    assert_eq!(peer.expect(kind::RESULT_PARTIAL).await.msg_seq, 3);
    assert_eq!(end_of(&mut peer).await.0, 4);
    // Asked to go on by a new owner it says all of that once more, and runs nothing.
    peer.dispatch(&Dispatch { go_on: true, ..dispatch(1, 6) }).await;
    let again: Vec<u64> = peer.rest().await.iter().map(|frame| frame.msg_seq).collect();
    assert_eq!(again, vec![2, 3, 4]);
    assert_eq!(handler.begun.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_never_came_is_disowned() {
    let (_agent, handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&Dispatch { go_on: true, ..dispatch(1, 5) }).await;
    assert_eq!(refusal(&mut peer).await.proof, Some(Proof::NotCalled));
    assert_eq!(handler.begun.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn the_highest_epoch_of_a_shard_is_a_fence() {
    let (_agent, handler, mut listener) = start(steps(9));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 5)).await;
    peer.dispatch(&Dispatch { go_on: true, ..dispatch(1, 7) }).await;
    // Orders and dispatches of the owner before are refused; so is the grant that it states.
    peer.cancel_call(call_id(1), 5).await;
    peer.budget(call_id(1), 6, Amount::new(1, 1)).await;
    peer.dispatch(&dispatch(2, 6)).await;
    assert_eq!(refusal(&mut peer).await.proof, Some(Proof::NotCalled));
    handler.step.notify_one();
    peer.expect(kind::RESULT_PARTIAL).await;
    handler.step.notify_one();
    assert_eq!(peer.expect(kind::RESULT_PARTIAL).await.msg_seq, 2);
    // Another shard has a fence of its own.
    peer.dispatch(&Dispatch { shard: 1, ..dispatch(3, 1) }).await;
    peer.cancel_call(call_id(1), 7).await;
    assert_eq!(end_of(&mut peer).await.1.finish, Finish::Cancelled);
    assert_eq!(handler.begun.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_grant_unless_it_grows() {
    let (_agent, handler, mut listener) = start(steps(30));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    for _ in 0..9 {
        handler.step.notify_one();
        peer.expect(kind::RESULT_PARTIAL).await;
    }
    peer.budget(call_id(1), 1, Amount::new(120, 9999)).await;
    peer.send(&Frame::heartbeat(false)).await;
    while !peer.any().await.unwrap().flags.has(Flags::ACK) {}
    for total in 10..=13 {
        handler.step.notify_one();
        assert_eq!(peer.expect(kind::RESULT_PARTIAL).await.msg_seq, total);
    }
    // 130 tokens of 120: over by one chunk.
    let (_, last) = end_of(&mut peer).await;
    assert_eq!((last.finish, last.cost), (Finish::Grant, cost(130)));
}

#[tokio::test(start_paused = true)]
async fn a_deaf_handler_is_dropped_and_its_cost_left_unknown() {
    let (_agent, _handler, mut listener) = start(Stepper { deaf: true, ..steps(1) });
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    peer.cancel_call(call_id(1), 1).await;
    let error = refusal(&mut peer).await;
    assert_eq!((error.code, error.cost, error.proof), (Code::Timeout, None, None));
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_own_deadline() {
    let (_agent, _handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    let begun = tokio::time::Instant::now();
    peer.dispatch(&Dispatch { deadline_ms: 2500, ..dispatch(1, 1) }).await;
    loop {
        let frame = peer.any().await.unwrap();
        if &*frame.kind == kind::RESULT_FINAL {
            break;
        }
        peer.send(&Frame::heartbeat(true)).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(2500));
}

#[tokio::test(start_paused = true)]
async fn no_more_calls_than_max_parallel() {
    let (_agent, handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    for n in 1..=3 {
        peer.dispatch(&dispatch(n, 1)).await;
    }
    let error = refusal(&mut peer).await;
    assert_eq!((error.code, error.proof), (Code::WindowAgent, Some(Proof::NotCalled)));
    assert!(error.retry_after_ms.is_some());
    handler.step.notify_waiters();
    assert_eq!(handler.begun.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn heartbeats_are_answered_and_silence_is_a_loss() {
    let (_agent, _handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    peer.send(&Frame::heartbeat(false)).await;
    let answer = peer.any().await.unwrap();
    assert!(answer.flags.has(Flags::HB) && answer.flags.has(Flags::ACK));
    // From here on nothing is said: two heartbeats come, then the connection is given up and another one dialled.
    let (_again, _) = listener.accept_agent().await;
    let mut heartbeats = 0;
    while let Some(frame) = peer.any().await {
        heartbeats += usize::from(frame.flags.has(Flags::HB));
    }
    assert!((2..=3).contains(&heartbeats), "{heartbeats}");
}

#[tokio::test(start_paused = true)]
async fn a_message_of_many_fragments_is_one_dispatch() {
    let (_agent, handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    let large = Dispatch { task: "x".repeat(5000), ..dispatch(1, 1) };
    let frame = Frame::json(large.call_id.to_string(), 1, Flags::SYN, kind::DISPATCH, &large);
    for part in atp_proto::reassembly::fragment(frame, 1000) {
        peer.send(&part).await;
    }
    handler.step.notify_one();
    peer.expect(kind::RESULT_PARTIAL).await;
}

#[tokio::test(start_paused = true)]
async fn a_bad_dispatch_is_refused_by_its_field() {
    let (_agent, _handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    let id = call_id(1).to_string();
    peer.send(&Frame::raw(id, 1, Flags::SYN, kind::DISPATCH, r#"{"shard":0}"#.into())).await;
    let error = refusal(&mut peer).await;
    assert_eq!((error.code, error.proof), (Code::Proto, Some(Proof::NotCalled)));
    assert!(error.message.contains("call_id"), "{}", error.message);
}

#[tokio::test(start_paused = true)]
async fn the_latest_status_is_stated_again() {
    let (agent, _handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    agent.status(AgentStatus { status: Status::Busy, ..AgentStatus::default() });
    peer.expect(kind::STATUS).await;
    agent.drop_connection();
    let (mut peer, _) = listener.accept_agent().await;
    let status: AgentStatus = peer.expect(kind::STATUS).await.read().unwrap();
    assert_eq!(status.status, Status::Busy);
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_running_calls_and_their_acknowledgement() {
    let (agent, handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    peer.send(&Frame::heartbeat(false)).await;
    while !peer.any().await.unwrap().flags.has(Flags::ACK) {}
    let ended = tokio::spawn(async move { agent.shutdown().await });
    let status: AgentStatus = peer.expect(kind::STATUS).await.read().unwrap();
    assert_eq!(status.status, Status::Draining);
    peer.dispatch(&dispatch(2, 1)).await;
    assert_eq!(refusal(&mut peer).await.code, Code::Draining);
    handler.step.notify_one();
    peer.expect(kind::RESULT_PARTIAL).await;
    let (msg_seq, _) = end_of(&mut peer).await;
    assert!(!ended.is_finished());
    peer.ack(call_id(1), msg_seq).await;
    ended.await.unwrap();
    assert!(peer.rest().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refused_credential_ends_the_agent() {
    let (agent, _handler, mut listener) = start(steps(1));
    let mut peer = listener.accept_silent().await;
    peer.expect(kind::HELLO).await;
    let error = atp_proto::WireError::new(Code::Auth, "token: unknown");
    peer.send(&Frame::json("", 0, Flags::RST, kind::ERROR, &error)).await;
    assert!(matches!(agent.connected().await, Err(atp_sdk::Error::Auth(_))));
    agent.ended().await;
}

#[tokio::test(start_paused = true)]
async fn a_killed_agent_says_nothing_more() {
    let (agent, _handler, mut listener) = start(steps(1));
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    agent.kill();
    agent.ended().await;
    assert!(peer.rest().await.is_empty());
}

//! An agent that asks for tools, against a router that speaks frames by hand, in virtual time.
#![allow(clippy::unwrap_used)]

mod fake;

use atp_proto::code::WireError;
use atp_proto::content::{AgentFinal, Capabilities, ToolRequest, ToolResult};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, Code, Cost, Flags, Frame, UsdMicros};
use atp_sdk::{AgentOptions, BoxFuture, Call, Handler, Outcome, ToolAnswer, ToolError, serve};
use fake::{Listener, Peer, call_id, dispatch, listen};
use serde_json::{Value, json};
use std::sync::Arc;

/// Asks for `fs.read` and says what came of it.
struct Reader;

impl Handler for Reader {
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
        Box::pin(async move {
            let text = match call.meter.tool("fs.read", json!({"path": "a"})).await {
                Ok(ToolAnswer::Data { data, cost }) => format!("{} for {}", data["text"], cost.usd_micros),
                Ok(ToolAnswer::Own) => {
                    call.meter.own_tool_spent("fs.read", Amount::new(0, 3));
                    "own".to_owned()
                }
                Err(ToolError::Refused(error)) => error.code.to_string(),
                Err(ToolError::Stopped(reason)) => format!("{reason:?}"),
            };
            Outcome::Final(AgentFinal { text: Some(text), cost: Cost::default(), ..AgentFinal::default() })
        })
    }
}

fn start() -> Listener {
    let (dialer, listener) = listen();
    let capabilities = Capabilities { agent: AgentName::new("a"), ..Capabilities::default() };
    serve(dialer, capabilities, Arc::new(Reader), AgentOptions::default());
    listener
}

async fn asked(peer: &mut Peer) -> Frame {
    let frame = peer.expect(kind::TOOL_REQUEST).await;
    let request: ToolRequest = frame.read().unwrap();
    assert_eq!((request.tool.as_str(), &request.args), ("fs.read", &json!({"path": "a"})));
    frame
}

async fn answer(peer: &mut Peer, result: &ToolResult) {
    peer.send(&Frame::json(call_id(1).to_string(), 2, Flags::NONE, kind::TOOL_RESULT, result)).await;
}

fn yes(text: &str) -> ToolResult {
    let cost = Amount { usd_micros: UsdMicros(7), ..Amount::ZERO };
    ToolResult { request: 1, ok: true, data: json!({"text": text}), cost, ..ToolResult::default() }
}

async fn said(peer: &mut Peer) -> Frame {
    peer.expect(kind::RESULT_FINAL).await
}

fn text(frame: &Frame) -> String {
    frame.read::<AgentFinal>().unwrap().text.unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_answer_comes_to_who_asked_and_once() {
    let (mut peer, _) = start().accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    assert_eq!(asked(&mut peer).await.msg_seq, 1);
    answer(&mut peer, &ToolResult { request: 9, ..yes("of another request") }).await;
    answer(&mut peer, &yes("x")).await;
    answer(&mut peer, &yes("a second time")).await;
    let last = said(&mut peer).await;
    assert_eq!((text(&last), last.msg_seq), ("\"x\" for 7".to_owned(), 2));
    assert!(last.extra.is_none());
}

#[tokio::test(start_paused = true)]
async fn refusals_and_leave_are_told_apart() {
    let no = ToolResult { request: 1, error: Some(WireError::new(Code::Sec, "no")), ..ToolResult::default() };
    let own = ToolResult { request: 1, ok: true, own: true, data: Value::Null, ..ToolResult::default() };
    for (result, expected) in
        [(no, "ESEC"), (ToolResult { request: 1, ..ToolResult::default() }, "EOUTCOME_UNKNOWN"), (own, "own")]
    {
        let (mut peer, _) = start().accept_agent().await;
        peer.dispatch(&dispatch(1, 1)).await;
        asked(&mut peer).await;
        answer(&mut peer, &result).await;
        let last = said(&mut peer).await;
        assert_eq!(text(&last), expected);
        let told = last.extra.map(|e| (e.tool_cost_breakdown[0].tool.clone(), e.tool_cost_breakdown[0].usd_micros));
        assert_eq!(told, result.own.then(|| ("fs.read".to_owned(), 3)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_is_said_again() {
    let mut listener = start();
    let (mut peer, _) = listener.accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    let first = asked(&mut peer).await;
    peer.ack(call_id(1), 1).await;
    drop(peer);
    // Acknowledged and not answered: the next connection hears it again.
    let (mut peer, _) = listener.accept_agent().await;
    assert_eq!(asked(&mut peer).await, first);
    peer.ack(call_id(1), 1).await;
    // And so does this one, if the answer doesn't come.
    assert_eq!(asked(&mut peer).await, first);
    answer(&mut peer, &yes("x")).await;
    assert_eq!(said(&mut peer).await.msg_seq, 2);
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_the_wait() {
    let (mut peer, _) = start().accept_agent().await;
    peer.dispatch(&dispatch(1, 1)).await;
    asked(&mut peer).await;
    peer.cancel_call(call_id(1), 1).await;
    assert_eq!(text(&said(&mut peer).await), "Cancelled");
}

//! The client's side against a router that speaks frames by hand, in virtual time.
#![allow(clippy::unwrap_used)]

mod fake;

use atp_proto::code::Fatal;
use atp_proto::content::{Hello, Redirect, Resume, Submit, TaskState};
use atp_proto::frame::kind;
use atp_proto::id::stream_of_key;
use atp_proto::{Code, Flags, Frame, StreamId, WireError};
use atp_sdk::{Backoff, Client, ClientOptions, Dialer, Error, EventKind, Retry, SubmitRequest, TaskStream};
use fake::{Listener, Peer, accepted, bill, final_, listen, partial};
use std::time::Duration;
use tokio::task::JoinHandle;

async fn start() -> (Client, Listener, Peer) {
    let (dialer, mut listener) = listen();
    let connecting = tokio::spawn(Client::connect(dialer, ClientOptions::default()));
    let peer = listener.accept().await;
    (connecting.await.unwrap().unwrap(), listener, peer)
}

fn submit(client: &Client, request: SubmitRequest) -> JoinHandle<Result<TaskStream, Error>> {
    let client = client.clone();
    tokio::spawn(async move { client.submit(request).await })
}

fn on(id: &str) -> SubmitRequest {
    SubmitRequest::new("task").stream_id(StreamId::new(id))
}

/// A stream `s` that is accepted.
async fn running(client: &Client, peer: &mut Peer) -> TaskStream {
    let submitting = submit(client, on("s"));
    peer.expect(kind::TASK_SUBMIT).await;
    peer.accepted("s", 1, "s").await;
    submitting.await.unwrap().unwrap()
}

async fn texts(mut stream: TaskStream) -> Vec<String> {
    let mut texts = Vec::new();
    while let Some(event) = stream.next().await {
        match event.unwrap().kind {
            EventKind::Partial(partial) => texts.push(partial.text.unwrap()),
            EventKind::Final(end) => texts.push(end.result.text),
            EventKind::Bill(_) => texts.push("bill".into()),
            EventKind::Accepted(_) => texts.push("accepted".into()),
            EventKind::Log | EventKind::Window(_) | EventKind::Other => {}
        }
    }
    texts
}

fn after(frame: &Frame) -> u64 {
    assert!(frame.flags.has(Flags::SYN) && frame.msg_seq == 0);
    frame.read::<Resume>().unwrap().after
}

#[tokio::test(start_paused = true)]
async fn a_task_from_submit_to_bill() {
    let (client, _listener, mut peer) = start().await;
    let submitting = submit(&client, on("s"));
    let syn = peer.expect(kind::TASK_SUBMIT).await;
    assert_eq!((syn.msg_seq, &*syn.stream_id, syn.flags), (1, "s", Flags::SYN));
    assert_eq!(syn.read::<Submit>().unwrap().task, "task");
    peer.accepted("s", 1, "s").await;
    let stream = submitting.await.unwrap().unwrap();
    assert_eq!(stream.accepted().state, TaskState::Running);
    peer.partial("s", 2, "a").await;
    peer.partial("s", 3, "b").await;
    peer.finish("s", 4).await;
    let outcome = stream.finish().await.unwrap();
    assert_eq!((outcome.final_.result.text.as_str(), outcome.texts[0].text.as_str()), ("all", "ab"));
    assert_eq!(outcome.bill.account, "default");
}

#[tokio::test(start_paused = true)]
async fn a_refusal_carries_the_words_of_the_router() {
    let (client, _listener, mut peer) = start().await;
    let submitting = submit(&client, on("s"));
    peer.expect(kind::TASK_SUBMIT).await;
    let error = WireError::new(Code::Budget, "spent").scope("tenant:default").used(7, 5).retry_after_ms(99);
    peer.refuse("s", error.clone()).await;
    assert_eq!(submitting.await.unwrap().unwrap_err(), Error::Refused(error));
}

#[tokio::test(start_paused = true)]
async fn what_was_not_judged_comes_again_unchanged_and_a_judged_refusal_under_the_next_try() {
    let (client, _listener, mut peer) = start().await;
    let submitting = submit(&client, SubmitRequest::new("task").key("k").retry(Retry::default()));
    let first = peer.expect(kind::TASK_SUBMIT).await;
    assert_eq!(&*first.stream_id, stream_of_key("k", 1).as_str());
    peer.refuse(&first.stream_id, WireError::new(Code::Log, "full")).await;
    let second = peer.expect(kind::TASK_SUBMIT).await;
    assert_eq!(second, first);
    let asked = tokio::time::Instant::now();
    peer.refuse(&second.stream_id, WireError::new(Code::Window, "full").retry_after_ms(700)).await;
    let third = peer.expect(kind::TASK_SUBMIT).await;
    assert!(asked.elapsed() >= Duration::from_millis(700));
    assert_eq!(&*third.stream_id, stream_of_key("k", 2).as_str());
    assert_eq!(third.content, first.content);
    // A wait that is longer than allowed is the caller's to judge.
    peer.refuse(&third.stream_id, WireError::new(Code::Window, "full").retry_after_ms(30_001)).await;
    assert!(matches!(submitting.await.unwrap(), Err(Error::Refused(e)) if e.code == Code::Window));
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_submit_goes_out_again_after_a_loss() {
    let (client, mut listener, mut peer) = start().await;
    let submitting = submit(&client, SubmitRequest::new("task").key("k"));
    let first = peer.expect(kind::TASK_SUBMIT).await;
    drop(peer);
    let mut peer = listener.accept().await;
    assert_eq!(peer.expect(kind::TASK_SUBMIT).await, first);
    let id = first.stream_id.clone();
    peer.accepted(&id, 1, &id).await;
    // It may have run before: what followed is asked for.
    assert_eq!(after(&peer.expect(kind::RESUME).await), 1);
    peer.send(&accepted(&id, 0, &id, TaskState::Running)).await;
    peer.partial(&id, 2, "a").await;
    peer.finish(&id, 3).await;
    assert_eq!(texts(submitting.await.unwrap().unwrap()).await, ["accepted", "a", "all", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn a_running_stream_is_continued_after_a_loss_each_message_once() {
    let (client, mut listener, mut peer) = start().await;
    let mut stream = running(&client, &mut peer).await;
    peer.partial("s", 2, "a").await;
    for _ in 0..2 {
        stream.next().await.unwrap().unwrap();
    }
    drop(peer);
    let mut peer = listener.accept().await;
    let resume = peer.expect(kind::RESUME).await;
    assert_eq!((after(&resume), &*resume.stream_id), (2, "s"));
    peer.accepted("s", 0, "s").await;
    for (seq, text) in [(1, "old"), (2, "a"), (3, "b"), (3, "b"), (4, "c")] {
        peer.partial("s", seq, text).await;
    }
    peer.finish("s", 5).await;
    assert_eq!(texts(stream).await, ["b", "c", "all", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn a_gap_is_mended_by_a_resume() {
    let (client, _listener, mut peer) = start().await;
    let stream = running(&client, &mut peer).await;
    peer.partial("s", 2, "a").await;
    peer.partial("s", 4, "c").await;
    peer.partial("s", 5, "d").await;
    assert_eq!(after(&peer.expect(kind::RESUME).await), 2);
    for (seq, text) in [(3, "b"), (4, "c"), (5, "d")] {
        peer.partial("s", seq, text).await;
    }
    peer.finish("s", 6).await;
    assert_eq!(texts(stream).await, ["accepted", "a", "b", "c", "d", "all", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn a_used_key_attaches_to_its_stream_and_a_loss_never_repeats_the_own_submit() {
    let (client, mut listener, mut peer) = start().await;
    let submitting = submit(&client, SubmitRequest::new("task").key("k").next_try());
    let syn = peer.expect(kind::TASK_SUBMIT).await;
    let first = stream_of_key("k", 1);
    peer.accepted(&syn.stream_id, 1, first.as_str()).await;
    let stream = submitting.await.unwrap().unwrap();
    assert_eq!(stream.id(), &first);
    let resume = peer.expect(kind::RESUME).await;
    assert_eq!((after(&resume), &*resume.stream_id), (0, first.as_str()));
    peer.accepted(first.as_str(), 1, first.as_str()).await;
    drop(peer);
    // The router keeps no attachment (ATP-4-14): the own id's submit might be refused now.
    let mut peer = listener.accept().await;
    let resume = peer.expect(kind::RESUME).await;
    assert_eq!((after(&resume), &*resume.stream_id), (1, first.as_str()));
    peer.accepted(first.as_str(), 0, first.as_str()).await;
    peer.finish(first.as_str(), 2).await;
    assert_eq!(texts(stream).await, ["accepted", "all", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn watching_and_cancelling_need_no_submit() {
    let (client, _listener, mut peer) = start().await;
    let watching = tokio::spawn({
        let client = client.clone();
        async move { client.watch(StreamId::new("w"), 3).await }
    });
    assert_eq!(after(&peer.expect(kind::RESUME).await), 3);
    peer.accepted("w", 0, "w").await;
    let watched = watching.await.unwrap().unwrap();
    peer.partial("w", 4, "d").await;
    peer.finish("w", 5).await;
    assert_eq!(texts(watched).await, ["d", "all", "bill"]);

    let cancelling = tokio::spawn(async move { client.cancel(StreamId::new("c")).await });
    peer.expect(kind::RESUME).await;
    peer.accepted("c", 0, "c").await;
    let cancel = peer.expect(kind::TASK_CANCEL).await;
    assert_eq!((cancel.msg_seq, &*cancel.stream_id), (0, "c"));
    cancelling.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn cancelling_what_is_not_there_is_refused() {
    let (client, _listener, mut peer) = start().await;
    let cancelling = tokio::spawn(async move { client.cancel(StreamId::new("c")).await });
    peer.expect(kind::RESUME).await;
    peer.refuse("c", WireError::new(Code::ResumeGone, "no such stream")).await;
    assert!(matches!(cancelling.await.unwrap(), Err(Error::Refused(e)) if e.code == Code::ResumeGone));
}

#[tokio::test(start_paused = true)]
async fn a_cancel_outlives_the_connection() {
    let (client, mut listener, mut peer) = start().await;
    let stream = running(&client, &mut peer).await;
    stream.cancel().await.unwrap();
    peer.expect(kind::TASK_CANCEL).await;
    drop(peer);
    let mut peer = listener.accept().await;
    peer.expect(kind::RESUME).await;
    peer.accepted("s", 0, "s").await;
    peer.expect(kind::TASK_CANCEL).await;
}

#[tokio::test(start_paused = true)]
async fn large_messages_travel_in_fragments_both_ways() {
    let (client, _listener, mut peer) = start().await;
    let submitting = submit(&client, on("s").input("diff", "d".repeat(2500)));
    let mut parts = vec![peer.frame().await];
    while parts.last().unwrap().flags.has(Flags::MORE) {
        parts.push(peer.frame().await);
    }
    assert!(parts.len() >= 3 && parts.iter().all(|part| part.content.len() <= 1000));
    peer.accepted("s", 1, "s").await;
    let stream = submitting.await.unwrap().unwrap();
    let text = "t".repeat(3000);
    for part in atp_proto::reassembly::fragment(final_("s", 2, &text), 1000) {
        peer.send(&part).await;
    }
    peer.send(&bill("s", 3)).await;
    assert_eq!(stream.finish().await.unwrap().final_.result.text, text);
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_lags_is_continued_from_the_log() {
    let (client, _listener, mut peer) = start().await;
    let mut stream = running(&client, &mut peer).await;
    let text = "x".repeat(100_000);
    for seq in 2..60 {
        peer.partial("s", seq, &text).await;
    }
    let mut read = 0;
    while read < 20 {
        read = stream.next().await.unwrap().unwrap().frame.msg_seq;
    }
    let reading = tokio::spawn(texts(stream));
    let behind = after(&peer.expect(kind::RESUME).await);
    assert!((30..59).contains(&behind), "{behind}");
    for seq in behind + 1..60 {
        peer.send(&partial("s", seq, "y")).await;
    }
    peer.finish("s", 60).await;
    let texts = reading.await.unwrap();
    assert_eq!(texts.len() as u64, 59 - 20 + 2);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_cannot_be_served_now_is_asked_for_later() {
    let (client, mut listener, mut peer) = start().await;
    let stream = running(&client, &mut peer).await;
    drop(peer);
    let mut peer = listener.accept().await;
    peer.expect(kind::RESUME).await;
    peer.refuse("s", WireError::new(Code::Log, "not yet").retry_after_ms(300)).await;
    assert_eq!(after(&peer.expect(kind::RESUME).await), 1);
    peer.accepted("s", 0, "s").await;
    peer.finish("s", 2).await;
    assert_eq!(texts(stream).await, ["accepted", "all", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_stream_can_be_opened_again() {
    let (client, _listener, mut peer) = start().await;
    let stream = running(&client, &mut peer).await;
    assert!(matches!(submit(&client, on("s")).await.unwrap(), Err(Error::Request(why)) if why.contains("stream_id")));
    drop(stream);
    running(&client, &mut peer).await;
}

#[tokio::test(start_paused = true)]
async fn nobody_there_and_wrong_credentials() {
    let (dialer, listener) = listen();
    drop(listener);
    let error = Client::connect(dialer, ClientOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)));

    let (dialer, mut listener) = listen();
    let connecting = tokio::spawn(Client::connect(dialer, ClientOptions::default()));
    let mut peer = listener.accept_silent().await;
    peer.expect(kind::HELLO).await;
    let no = WireError::new(Code::Auth, "token: revoked");
    peer.send(&Frame::json("", 0, Flags::RST, kind::ERROR, &no)).await;
    assert_eq!(connecting.await.unwrap().unwrap_err(), Error::Auth(no));

    // A router that never answers.
    let (dialer, mut listener) = listen();
    let connecting = tokio::spawn(Client::connect(dialer, ClientOptions::default()));
    let _peer = listener.accept_silent().await;
    assert!(matches!(connecting.await.unwrap().unwrap_err(), Error::Unreachable(_)));
}

#[tokio::test(start_paused = true)]
async fn reconnecting_gives_up_in_the_end() {
    let (dialer, mut listener) = listen();
    let reconnect = Backoff { give_up: Some(Duration::from_secs(10)), ..Backoff::default() };
    let options = ClientOptions { reconnect, ..ClientOptions::default() };
    let connecting = tokio::spawn(Client::connect(dialer, options));
    let mut peer = listener.accept().await;
    let client = connecting.await.unwrap().unwrap();
    let mut stream = running(&client, &mut peer).await;
    stream.next().await.unwrap().unwrap();
    drop((peer, listener));
    assert!(matches!(stream.next().await, Some(Err(Error::Unreachable(_)))));
    assert!(matches!(client.submit(on("t")).await, Err(Error::Unreachable(_))));
}

#[tokio::test(start_paused = true)]
async fn closing_ends_what_is_open() {
    let (client, _listener, mut peer) = start().await;
    let stream = running(&client, &mut peer).await;
    let reading = tokio::spawn(stream.finish());
    client.close().await;
    assert_eq!(reading.await.unwrap().unwrap_err(), Error::Closed);
    assert!(peer.any().await.is_none());
}

/// Of several routers the next one is asked when a connection is lost, refused or can't be had.
#[tokio::test(start_paused = true)]
async fn several_routers_take_turns_and_the_stream_goes_on() {
    let ((a, mut at_a), (b, mut at_b)) = (listen(), listen());
    let nowhere = Dialer::new(|| async { Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)) });
    let silent = Dialer::new(std::future::pending);
    let connecting = tokio::spawn(Client::connect(Dialer::any([nowhere, silent, a, b]), ClientOptions::default()));
    // The first one that is reached says no.
    let mut peer = at_a.accept_silent().await;
    peer.expect(kind::HELLO).await;
    let no = WireError { fatal: Fatal::Connection, ..WireError::new(Code::Draining, "this router is stopping") };
    peer.send(&Frame::json("", 0, Flags::RST, kind::ERROR, &no)).await;
    let mut peer = at_b.accept().await;
    let client = connecting.await.unwrap().unwrap();
    let stream = running(&client, &mut peer).await;
    peer.send(&partial("s", 2, "one")).await;
    let reading = tokio::spawn(texts(stream));
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(peer);
    // In a circle: nobody, silence, one that is reached and says nothing, and then the one that answers. Message 2 was read;
    // what follows is asked for.
    let _hangs = at_a.accept_silent().await;
    let begun = tokio::time::Instant::now();
    let mut peer = at_b.accept().await;
    assert!(begun.elapsed() <= Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(after(&peer.expect(kind::RESUME).await), 2);
    peer.send(&final_("s", 3, "two")).await;
    peer.send(&bill("s", 4)).await;
    assert_eq!(reading.await.unwrap(), ["accepted", "one", "two", "bill"]);
}

#[tokio::test(start_paused = true)]
async fn without_any_router_the_error_names_each() {
    let nowhere = || Dialer::tcp("127.0.0.1:1");
    let error = Client::connect(Dialer::any([nowhere(), nowhere()]), ClientOptions::default()).await.unwrap_err();
    assert_eq!(error.to_string().matches("127.0.0.1:1: ").count(), 2, "{error}");
    let error = Client::connect(Dialer::any([]), ClientOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
}

async fn redirect(peer: &mut Peer, url: &str) {
    let hello = peer.expect(kind::HELLO).await.read::<Hello>().unwrap();
    assert!(hello.redirect, "who doesn't say so isn't sent elsewhere");
    let content = Redirect { url: url.into(), shard: 7 };
    peer.send(&Frame::json("", 0, Flags::FIN, kind::REDIRECT, &content)).await;
}

/// ATP-4-16.
#[tokio::test]
async fn a_client_goes_to_where_a_router_sends_it() {
    let there = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("atp://{}", there.local_addr().unwrap());
    let (dialer, mut listener) = listen();
    let connecting = tokio::spawn(Client::connect(dialer, ClientOptions::default()));
    redirect(&mut listener.accept_silent().await, &url).await;
    // What comes there is handed on to a router that speaks frames by hand.
    let (elsewhere, mut served) = listen();
    let mut dialled = there.accept().await.unwrap().0;
    let mut near = elsewhere.dial().await.unwrap();
    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut dialled, &mut near).await });
    let mut peer = served.accept().await;
    let client = connecting.await.unwrap().unwrap();
    running(&client, &mut peer).await;
}

/// ATP-4-16: an address that leads nowhere from here, or none at all.
#[tokio::test]
async fn a_client_that_is_sent_nowhere_asks_to_be_forwarded() {
    for url in ["atp://127.0.0.1:1", "https://router.example", ""] {
        let (dialer, mut listener) = listen();
        let connecting = tokio::spawn(Client::connect(dialer, ClientOptions::default()));
        redirect(&mut listener.accept_silent().await, url).await;
        let mut peer = listener.accept_silent().await;
        let hello = peer.expect(kind::HELLO).await.read::<Hello>().unwrap();
        assert!(!hello.redirect, "{url}");
        fake::greet(&mut peer).await;
        let client = connecting.await.unwrap().unwrap();
        running(&client, &mut peer).await;
    }
}

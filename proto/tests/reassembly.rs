//! Any order in, whole messages in order out; and every bound at n and n+1.

mod any;

use atp_proto::codec::Received;
use atp_proto::content::OpenMessage;
use atp_proto::limits::{
    FRAGMENT_OVERHEAD, FRAGMENTS_MAX, GAP_BYTES_MAX, GAP_MESSAGES_MAX, MESSAGE_BYTES_MAX, MISSING_RANGES_MAX,
};
use atp_proto::reassembly::{Fed, Inbound, Message, fragment};
use atp_proto::{Code, Flags, Frame, WireError};
use bytes::Bytes;
use proptest::prelude::*;

fn message(msg_seq: u64, content: impl Into<Bytes>) -> Frame {
    Frame::raw("s", msg_seq, Flags::FIN, "agent.log", content.into())
}

fn piece(msg_seq: u64, frag_seq: u32, more: bool, content: impl Into<Bytes>) -> Frame {
    let flags = if more { Flags::MORE } else { Flags::NONE };
    Frame { frag_seq, flags, ..Frame::raw("s", msg_seq, Flags::NONE, "agent.log", content.into()) }
}

fn feed(inbound: &mut Inbound, frame: Frame) -> Result<Fed, WireError> {
    inbound.feed(Received::from_frame(frame))
}

/// Feeds everything and returns what came out.
fn deliver(inbound: &mut Inbound, frames: impl IntoIterator<Item = Frame>) -> Vec<Message> {
    let mut out = Vec::new();
    for frame in frames {
        if let Fed::Ready(message) = feed(inbound, frame).expect("every frame is taken") {
            out.push(message);
            out.extend(std::iter::from_fn(|| inbound.next_ready()));
        }
    }
    out
}

fn code_of(result: Result<Fed, WireError>) -> Code {
    result.expect_err("is refused").code
}

/// All orders of 0..n.
fn permutations(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![]];
    for i in 0..n {
        all = all
            .into_iter()
            .flat_map(|p: Vec<usize>| (0..=p.len()).map(move |at| [&p[..at], &[i], &p[at..]].concat()))
            .collect();
    }
    all
}

#[test]
fn atp_4_6_every_order_of_a_few_fragments_yields_the_same() {
    // Three messages: fragments 3, 1 (empty), 2.
    let messages = [message(1, "abcdef"), message(2, ""), message(3, "gh")];
    let sizes = [2, 1, 1];
    let frames: Vec<Frame> = messages.iter().zip(sizes).flat_map(|(m, n)| fragment(m.clone(), n)).collect();
    assert_eq!(frames.len(), 6);
    for order in permutations(frames.len()) {
        let mut inbound = Inbound::default();
        let out = deliver(&mut inbound, order.iter().map(|i| frames[*i].clone()));
        assert_eq!(out.iter().map(|m| m.frame.clone()).collect::<Vec<_>>(), messages, "{order:?}");
        assert_eq!(out.iter().map(|m| m.bodies.as_slice().len()).collect::<Vec<_>>(), [3, 1, 2]);
        assert!(inbound.is_idle() && inbound.next_expected() == 4 && inbound.missing().is_empty());
    }
}

proptest! {
    /// Shuffled, with duplicates before and after: the same messages once, bodies as sent, and what is missing at any
    /// time is exactly what the rest of the frames brings.
    #[test]
    fn atp_4_8_duplicates_are_harmless(
        contents in prop::collection::vec(any::bytes(40), 1..12),
        size in 1..20usize,
        after in prop_oneof![Just(0u64), any::<u32>().prop_map(u64::from)],
        seed in prop::collection::vec(any::<prop::sample::Index>(), 120),
    ) {
        let messages: Vec<Frame> =
            contents.into_iter().zip(after + 1..).map(|(content, seq)| message(seq, content)).collect();
        let sent: Vec<Frame> = messages.iter().flat_map(|m| fragment(m.clone(), size)).collect();
        let mut frames: Vec<Frame> = sent.clone();
        frames.extend(seed.iter().take(20).map(|i| sent[i.index(sent.len())].clone()));
        for (i, at) in seed.iter().enumerate() {
            let n = frames.len();
            frames.swap(i % n, at.index(n));
        }
        let mut inbound = Inbound::after(after);
        let mut out = Vec::new();
        for (n, frame) in frames.iter().enumerate() {
            let seq = frame.msg_seq;
            let delivered = seq < inbound.next_expected();
            match feed(&mut inbound, frame.clone()).unwrap() {
                Fed::Ready(message) => {
                    out.push(message);
                    out.extend(std::iter::from_fn(|| inbound.next_ready()));
                }
                Fed::Duplicate(duplicate) => {
                    prop_assert!(delivered && duplicate == seq && !frame.flags.has(Flags::MORE));
                }
                Fed::Waiting => prop_assert!(!delivered || frame.flags.has(Flags::MORE)),
            }
            let here = &frames[..=n];
            for open in inbound.missing() {
                let is_here = |f: &Frame| here.iter().any(|h| (h.msg_seq, h.frag_seq) == (f.msg_seq, f.frag_seq));
                for lost in sent.iter().filter(|f| f.msg_seq == open.msg_seq) {
                    let asked = open.missing.is_empty()
                        || open.missing.iter().any(|(from, to)| (*from..=*to).contains(&lost.frag_seq));
                    prop_assert!(!(asked && is_here(lost)), "{:?} asks for what is here", open);
                }
            }
        }
        prop_assert_eq!(out.iter().map(|m| m.frame.clone()).collect::<Vec<_>>(), messages);
        let bodies: Vec<Bytes> = out.into_iter().flat_map(|m| m.bodies.into_vec()).collect();
        prop_assert_eq!(bodies, sent.into_iter().map(|f| Received::from_frame(f).body).collect::<Vec<_>>());
        prop_assert!(inbound.is_idle() && inbound.waiting_bytes() == 0);
    }

    /// Anything at all: no panic, the bounds hold, delivery is in order, and a refusal changes nothing.
    #[test]
    fn atp_4_5_nothing_breaks_the_bounds(frames in prop::collection::vec(
        (0..70u64, 0..6u32, any::<bool>(), any::bytes(3)), 0..60)) {
        let mut inbound = Inbound::default();
        let mut last = 0;
        for (seq, frag, more, content) in frames {
            let mut frame = piece(seq, frag, more, content);
            if seq == 0 {
                frame = message(0, "");
            }
            let before = (inbound.next_expected(), inbound.missing(), inbound.waiting_bytes());
            match feed(&mut inbound, frame) {
                Ok(Fed::Ready(message)) if message.frame.msg_seq > 0 => {
                    prop_assert_eq!(message.frame.msg_seq, last + 1);
                    last += 1;
                    while let Some(message) = inbound.next_ready() {
                        prop_assert_eq!(message.frame.msg_seq, last + 1);
                        last += 1;
                    }
                }
                Ok(_) => {}
                Err(_) => prop_assert_eq!(before, (inbound.next_expected(), inbound.missing(), inbound.waiting_bytes())),
            }
            prop_assert_eq!(inbound.next_expected(), last + 1);
            prop_assert!(inbound.missing().len() <= GAP_MESSAGES_MAX + 1);
        }
    }

    #[test]
    fn atp_4_6_a_split_message_is_whole_again(frame in any::frame(), size in 0..50usize) {
        let frame = Frame { msg_seq: 1, frag_seq: 0, flags: Flags(frame.flags.0 & !(Flags::MORE.0 | Flags::CTRL.0)), ..frame };
        let frames = fragment(frame.clone(), size);
        prop_assert!(frames.iter().all(|f| f.content.len() <= size.max(1)));
        let out = deliver(&mut Inbound::default(), frames);
        prop_assert_eq!(out.into_iter().map(|m| m.frame).collect::<Vec<_>>(), vec![frame]);
    }
}

#[test]
fn atp_4_6_contradicting_fragments_are_refused() {
    let cases: [(&str, Vec<Frame>, Frame); 8] = [
        ("two lasts, the second later", vec![piece(1, 1, false, "b")], piece(1, 2, false, "c")),
        ("two lasts, the second earlier", vec![piece(1, 2, false, "b")], piece(1, 1, false, "c")),
        ("a fragment past the last", vec![piece(1, 1, false, "b")], piece(1, 2, true, "c")),
        ("a last before what is here", vec![piece(1, 2, true, "b")], piece(1, 1, false, "c")),
        ("changed content", vec![piece(1, 1, true, "b")], piece(1, 1, true, "c")),
        ("changed MORE", vec![piece(1, 1, true, "b")], piece(1, 1, false, "b")),
        ("a whole message for fragment 0", vec![piece(1, 0, true, "b")], piece(1, 0, false, "b")),
        ("changed type", vec![piece(2, 0, false, "b")], Frame { kind: "other".into(), ..piece(2, 0, false, "b") }),
    ];
    for (name, before, bad) in cases {
        let mut inbound = Inbound::default();
        assert!(deliver(&mut inbound, before).is_empty(), "{name}");
        assert_eq!(code_of(feed(&mut inbound, bad)), Code::Proto, "{name}");
    }
    // Another connection's repetition: only what makes the message is compared.
    let mut inbound = Inbound::default();
    assert!(deliver(&mut inbound, [piece(2, 0, false, "b")]).is_empty());
    let again = Frame { session_id: "s-2".into(), ..piece(2, 0, false, "b") };
    assert_eq!(feed(&mut inbound, again), Ok(Fed::Waiting));
}

#[test]
fn atp_4_5_a_gap_holds_so_many_messages() {
    let mut inbound = Inbound::after(10);
    let last = 11 + GAP_MESSAGES_MAX as u64;
    for seq in 12..=last {
        assert_eq!(feed(&mut inbound, message(seq, "x")), Ok(Fed::Waiting));
    }
    assert_eq!(code_of(feed(&mut inbound, message(last + 1, "x"))), Code::Limit);
    assert_eq!(inbound.missing(), [OpenMessage { msg_seq: 11, frag: 0, missing: vec![] }]);
    let out = deliver(&mut inbound, [message(11, "x")]);
    assert_eq!(out.len(), GAP_MESSAGES_MAX + 1);
    assert!(inbound.is_idle());
    assert_eq!(deliver(&mut inbound, [message(last + 1, "x")]).len(), 1);
}

#[test]
fn atp_4_5_a_gap_holds_so_many_bytes_and_what_fills_it_is_always_taken() {
    let content = |n: usize| Bytes::from(vec![b'x'; n]);
    let charge = |f: &Frame| Received::from_frame(f.clone()).body.len() + FRAGMENT_OVERHEAD;
    let mut inbound = Inbound::default();
    let large = message(2, content(MESSAGE_BYTES_MAX));
    let small = |n: usize| message(4, content(n));
    let room = GAP_BYTES_MAX - charge(&large) - charge(&small(200_000)) + 200_000;
    assert_eq!(feed(&mut inbound, large.clone()), Ok(Fed::Waiting));
    assert_eq!(code_of(feed(&mut inbound, small(room + 1))), Code::Limit);
    assert_eq!(feed(&mut inbound, small(room)), Ok(Fed::Waiting));
    assert_eq!(inbound.waiting_bytes(), GAP_BYTES_MAX);
    // Message 3 was named as missing: no room for it now is nobody's fault, it stays missing.
    assert_eq!(feed(&mut inbound, message(3, "y")), Ok(Fed::Waiting));
    assert!(inbound.missing().contains(&OpenMessage { msg_seq: 3, frag: 0, missing: vec![] }));
    assert_eq!(code_of(feed(&mut inbound, message(5, "y"))), Code::Limit);
    // Message 1 fills the gap that everything waits for, in fragments and full size.
    let first = message(1, content(MESSAGE_BYTES_MAX));
    let out = deliver(&mut inbound, fragment(first.clone(), 65536));
    assert_eq!(out.iter().map(|m| m.frame.msg_seq).collect::<Vec<_>>(), [1, 2]);
    assert!(out[0].frame == first && out[1].frame == large);
    assert_eq!(deliver(&mut inbound, [message(3, "y")]).len(), 2);
    assert_eq!(inbound.waiting_bytes(), 0);
}

#[test]
fn atp_4_6_a_message_has_at_most_so_many_bytes_and_fragments() {
    let content = Bytes::from(vec![b'x'; MESSAGE_BYTES_MAX]);
    let mut inbound = Inbound::default();
    assert!(deliver(&mut inbound, [piece(1, 0, true, content.clone())]).is_empty());
    assert_eq!(code_of(feed(&mut inbound, piece(1, 1, false, "x"))), Code::Limit);
    assert_eq!(deliver(&mut inbound, [piece(1, 1, false, "")]).len(), 1);
    let longer = Bytes::from(vec![b'x'; MESSAGE_BYTES_MAX + 1]);
    assert_eq!(code_of(feed(&mut inbound, message(2, longer))), Code::Limit);
    assert_eq!(deliver(&mut inbound, [message(2, content)]).len(), 1);

    assert_eq!(code_of(feed(&mut inbound, piece(3, FRAGMENTS_MAX, true, "x"))), Code::Limit);
    let frames = fragment(message(3, vec![b'x'; FRAGMENTS_MAX as usize]), 1);
    let out = deliver(&mut inbound, frames.into_iter().rev());
    assert_eq!(out[0].bodies.as_slice().len(), FRAGMENTS_MAX as usize);
}

#[test]
fn atp_4_7_what_is_missing_is_named() {
    let mut inbound = Inbound::after(4);
    let named = |i: &Inbound| i.missing().into_iter().map(|o| (o.msg_seq, o.frag, o.missing)).collect::<Vec<_>>();
    assert!(deliver(&mut inbound, [piece(5, 0, true, "a"), piece(5, 1, true, "b")]).is_empty());
    assert_eq!(named(&inbound), []); // What comes next isn't missing yet.
    assert!(deliver(&mut inbound, [piece(5, 4, true, "e"), piece(5, 6, true, "g")]).is_empty());
    assert_eq!(named(&inbound), [(5, 4, vec![(2, 3), (5, 5)])]);
    assert!(deliver(&mut inbound, [piece(8, 1, false, "b")]).is_empty());
    assert_eq!(
        named(&inbound),
        [(5, 4, vec![(2, 3), (5, 5), (7, u32::MAX)]), (6, 0, vec![]), (7, 0, vec![]), (8, 1, vec![(0, 0)])]
    );
    // The list is bounded, lowest first.
    let mut inbound = Inbound::default();
    assert!(deliver(&mut inbound, (0..1000).map(|n| piece(1, 2 * n + 1, true, "x"))).is_empty());
    let open = &inbound.missing()[0];
    assert_eq!((open.frag, open.missing.len(), open.missing[0]), (1000, MISSING_RANGES_MAX, (0, 0)));
}

#[test]
fn atp_4_8_a_delivered_message_is_a_duplicate_once() {
    let mut inbound = Inbound::after(5000);
    assert_eq!(feed(&mut inbound, message(5000, "x")), Ok(Fed::Duplicate(5000)));
    assert_eq!(feed(&mut inbound, message(1, "x")), Ok(Fed::Duplicate(1)));
    assert_eq!(feed(&mut inbound, piece(7, 0, true, "x")), Ok(Fed::Waiting));
    assert_eq!(feed(&mut inbound, piece(7, 1, false, "x")), Ok(Fed::Duplicate(7)));
    assert!(matches!(feed(&mut inbound, message(0, "x")), Ok(Fed::Ready(_))));
}

#[test]
fn what_a_sender_gave_up_is_skipped() {
    let mut inbound = Inbound::default();
    assert!(
        deliver(&mut inbound, [piece(2, 0, true, "x"), message(4, "x"), message(5, "y"), message(7, "z")]).is_empty()
    );
    inbound.skip_to(3);
    assert_eq!(std::iter::from_fn(|| inbound.next_ready()).map(|m| m.frame.msg_seq).collect::<Vec<_>>(), [4, 5]);
    inbound.skip_to(2);
    assert_eq!(inbound.next_expected(), 6);
    inbound.skip_to(9);
    assert!(inbound.is_idle() && inbound.waiting_bytes() == 0 && inbound.next_expected() == 10);
    let mut end = Inbound::after(u64::MAX - 1);
    assert_eq!(code_of(feed(&mut end, message(u64::MAX, "x"))), Code::Limit);
}

//! Large messages as fragments and back, for an ordered byte stream: a fragment out of order is a gap, not held.

use atp_proto::limits::MESSAGE_BYTES_MAX;
use atp_proto::reassembly::fragment;
use atp_proto::{Flags, Frame};
use bytes::BytesMut;

/// Calls `each` with the frame, or with its fragments when the content is longer than `fragment_bytes`.
pub(crate) fn split(frame: Frame, fragment_bytes: usize, mut each: impl FnMut(&Frame)) {
    if frame.content.len() <= fragment_bytes {
        return each(&frame);
    }
    for part in &fragment(frame, fragment_bytes) {
        each(part);
    }
}

/// Puts the fragments of one stream together.
#[derive(Default)]
pub(crate) struct Joiner {
    open: Option<(Frame, BytesMut)>,
}

/// What a frame did.
#[derive(Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "made and taken apart at once, once per message")]
pub(crate) enum Joined {
    /// A whole message.
    Whole(Frame),
    More,
    /// A fragment is missing or the message is too long: what was collected is dropped.
    Broken,
}

impl Joiner {
    pub(crate) fn clear(&mut self) {
        self.open = None;
    }

    pub(crate) fn add(&mut self, frame: Frame) -> Joined {
        let more = frame.flags.has(Flags::MORE);
        if frame.frag_seq == 0 {
            self.open = None;
            if !more {
                return Joined::Whole(frame);
            }
            let content = BytesMut::from(&frame.content[..]);
            self.open = Some((Frame { content: bytes::Bytes::new(), ..frame }, content));
            return Joined::More;
        }
        let Some((mut first, mut content)) = self.open.take() else { return Joined::Broken };
        if first.msg_seq != frame.msg_seq
            || first.frag_seq + 1 != frame.frag_seq
            || content.len() + frame.content.len() > MESSAGE_BYTES_MAX
        {
            return Joined::Broken;
        }
        content.extend_from_slice(&frame.content);
        first.frag_seq = frame.frag_seq;
        if more {
            self.open = Some((first, content));
            return Joined::More;
        }
        let flags = Flags(first.flags.0 & !Flags::MORE.0);
        Joined::Whole(Frame { content: content.freeze(), flags, frag_seq: 0, ..first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn message(len: usize) -> Frame {
        let content: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        Frame::raw("s", 1, Flags::SYN, "task.submit", Bytes::from(content))
    }

    fn parts(frame: Frame, size: usize) -> Vec<Frame> {
        let mut parts = Vec::new();
        split(frame, size, |part| parts.push(part.clone()));
        parts
    }

    #[test]
    fn splits_at_the_limit_and_one_past_it() {
        assert_eq!(parts(message(100), 100), vec![message(100)]);
        let two = parts(message(101), 100);
        assert_eq!(two.len(), 2);
        assert!(two[0].flags.has(Flags::MORE) && !two[1].flags.has(Flags::MORE));
        assert!(two[1].kind.is_empty() && two[1].content.len() == 1);
    }

    #[test]
    fn joins_what_was_split() {
        for len in [0, 1, 99, 100, 101, 1000] {
            let mut joiner = Joiner::default();
            let mut whole = None;
            for part in parts(message(len), 100) {
                match joiner.add(part) {
                    Joined::Whole(frame) => whole = Some(frame),
                    Joined::More => {}
                    Joined::Broken => panic!("broken"),
                }
            }
            assert_eq!(whole, Some(message(len)));
        }
    }

    #[test]
    fn a_missing_fragment_is_seen() {
        let parts = parts(message(350), 100);
        let mut joiner = Joiner::default();
        assert_eq!(joiner.add(parts[0].clone()), Joined::More);
        assert_eq!(joiner.add(parts[2].clone()), Joined::Broken);
        assert_eq!(joiner.add(parts[1].clone()), Joined::Broken);
    }

    #[test]
    fn a_message_is_bounded() {
        let mut joiner = Joiner::default();
        let big = Bytes::from(vec![0; MESSAGE_BYTES_MAX]);
        let first = Frame { flags: Flags::MORE, content: big, ..message(0) };
        assert_eq!(joiner.add(first.clone()), Joined::More);
        let last = |n: usize| Frame { frag_seq: 1, content: Bytes::from(vec![0; n]), flags: Flags::NONE, ..message(0) };
        assert!(matches!(joiner.add(last(0)), Joined::Whole(_)));
        assert_eq!(joiner.add(first), Joined::More);
        assert_eq!(joiner.add(last(1)), Joined::Broken);
    }
}

//! Writes the chunks of a running call: the same bytes as the codec's, patched instead of built anew.
//! Money isn't its business: the caller says what the running cost is.

use atp_proto::content::AgentPartial;
use atp_proto::frame::kind;
use atp_proto::{Cost, Flags, Frame, Tokens, codec};
use bytes::BytesMut;

const WORDS: &str = "the reviewer reads the change and says what it found there, why that matters and how to mend it. ";

/// The encoded `agent.result.partial` of one call with the places that change from chunk to chunk.
pub(crate) struct Chunks {
    stream_id: String,
    content_bytes: usize,
    frame: Vec<u8>,
    seq: Place,
    out_tokens: Place,
}

#[derive(Clone, Copy, Default)]
struct Place {
    at: usize,
    width: usize,
}

impl Chunks {
    /// Chunks whose JSON document has `content_bytes` bytes.
    pub(crate) fn new(stream_id: &str, content_bytes: usize) -> Self {
        let (seq, out_tokens) = Default::default();
        Self { stream_id: stream_id.to_owned(), content_bytes, frame: Vec::new(), seq, out_tokens }
    }

    /// Appends chunk number `msg_seq` with the running total `in_tokens`, `out_tokens`.
    pub(crate) fn write(&mut self, out: &mut BytesMut, msg_seq: u64, in_tokens: u64, out_tokens: u64) {
        if self.seq.width != varint_width(msg_seq) || self.out_tokens.width != decimal_width(out_tokens) {
            self.build(msg_seq, in_tokens, out_tokens);
        }
        let mut rest = msg_seq;
        for i in 0..self.seq.width {
            let more = if i + 1 < self.seq.width { 128 } else { 0 };
            self.frame[self.seq.at + i] = (rest & 127) as u8 | more;
            rest >>= 7;
        }
        let mut rest = out_tokens;
        for i in (0..self.out_tokens.width).rev() {
            self.frame[self.out_tokens.at + i] = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        out.extend_from_slice(&self.frame);
    }

    fn build(&mut self, msg_seq: u64, in_tokens: u64, out_tokens: u64) {
        let cost = Cost { in_tokens: Tokens(in_tokens), out_tokens: Tokens(out_tokens), ..Cost::default() };
        let partial = |text: String| {
            let content = AgentPartial { text: Some(text), cost, ..AgentPartial::default() };
            Frame::json(self.stream_id.as_str(), msg_seq, Flags::NONE, kind::RESULT_PARTIAL, &content)
        };
        let empty = partial(String::new()).content.len();
        let text = WORDS.chars().cycle().take(self.content_bytes.saturating_sub(empty)).collect();
        let mut bytes = BytesMut::new();
        codec::encode(&partial(text), &mut bytes);
        self.frame = bytes.to_vec();
        // The sequence number stands behind the stream id, with the tag of field 4 between them.
        let id = find(&self.frame, self.stream_id.as_bytes());
        self.seq = Place { at: id + self.stream_id.len() + 1, width: varint_width(msg_seq) };
        let key = b"\"out_tokens\":";
        self.out_tokens = Place { at: find(&self.frame, key) + key.len(), width: decimal_width(out_tokens) };
    }
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|w| w == what).expect("the frame was built with it")
}

fn varint_width(n: u64) -> usize {
    (64 - n.max(1).leading_zeros() as usize).div_ceil(7)
}

fn decimal_width(n: u64) -> usize {
    n.checked_ilog10().map_or(1, |d| d as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_the_codecs_own_frames() {
        let mut chunks = Chunks::new("c-00112233445566778899", 1024);
        let mut out = BytesMut::new();
        for (seq, tokens) in
            [(1, 9), (2, 10), (127, 99), (128, 100), (129, 250), (16_384, 4_096_000), (16_385, 4_096_256)]
        {
            chunks.write(&mut out, seq, 200, tokens);
            let frame = codec::decode(&mut out).expect("valid").expect("whole").frame;
            assert_eq!((&*frame.stream_id, frame.msg_seq), ("c-00112233445566778899", seq));
            assert_eq!((&*frame.kind, frame.content.len()), (kind::RESULT_PARTIAL, 1024));
            let partial: AgentPartial = frame.read().expect("a partial");
            assert_eq!((partial.cost.in_tokens, partial.cost.out_tokens), (Tokens(200), Tokens(tokens)));
        }
        assert!(out.is_empty());
    }
}

//! Restores one direction of one stream: frames in any order go in, whole messages in order of msg_seq come out (ATP-4).
//! Bounded in messages, fragments and bytes. It never waits, never looks at a clock and never reads a content.

use crate::code::{Code, WireError};
use crate::codec::{Received, decode_body};
use crate::content::OpenMessage;
use crate::frame::{Flags, Frame};
use crate::limits::{
    FRAGMENT_OVERHEAD, FRAGMENTS_MAX, GAP_BYTES_MAX, GAP_MESSAGES_MAX, MESSAGE_BYTES_MAX, MISSING_RANGES_MAX,
};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;

/// Bytes that one message may be charged for: its content, and a modest head for each fragment.
const MESSAGE_CHARGE_MAX: usize = MESSAGE_BYTES_MAX + FRAGMENTS_MAX as usize * FRAGMENT_OVERHEAD;

/// A whole message.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Everything but the content is fragment 0's; the content is joined, MORE is gone and `frag_seq` is 0.
    pub frame: Frame,
    /// The bodies as they were received, in order of `frag_seq`: what is logged.
    pub bodies: Bodies,
}

/// The bodies of a message's fragments; one needs no list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bodies {
    One(Bytes),
    Many(Vec<Bytes>),
}

impl Bodies {
    #[must_use]
    pub fn as_slice(&self) -> &[Bytes] {
        match self {
            Self::One(body) => std::slice::from_ref(body),
            Self::Many(bodies) => bodies,
        }
    }

    /// As a log entry holds them.
    #[must_use]
    pub fn into_vec(self) -> Vec<Bytes> {
        match self {
            Self::One(body) => vec![body],
            Self::Many(bodies) => bodies,
        }
    }
}

impl From<Received> for Message {
    fn from(received: Received) -> Self {
        Self { frame: received.frame, bodies: Bodies::One(received.body) }
    }
}

/// What became of a frame that was fed.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "the large one is the common one, and a box would be an allocation a message"
)]
pub enum Fed {
    /// The next message. Others may have waited for it: call `next_ready` until it has none.
    Ready(Message),
    /// Nothing to deliver: it waits for something that isn't here, or it was here already.
    Waiting,
    /// The whole of a message that was delivered before: answer again what was answered, execute nothing.
    Duplicate(u64),
}

/// The receiver of one direction of a stream. Idle it is two words; what waits is allocated apart.
#[derive(Clone, Debug)]
pub struct Inbound {
    next: u64,
    waiting: Option<Box<Waiting>>,
}

#[derive(Clone, Debug, Default)]
struct Waiting {
    /// By msg_seq; never empty while the box exists.
    open: BTreeMap<u64, Open>,
    /// Charged for everything in `open`.
    bytes: usize,
}

/// A message of which at least one fragment is here.
#[derive(Clone, Debug, Default)]
struct Open {
    fragments: BTreeMap<u32, Received>,
    /// Of the fragment without MORE.
    last: Option<u32>,
    content_bytes: usize,
    /// Charged for all its fragments, heads included.
    bytes: usize,
}

impl Default for Inbound {
    fn default() -> Self {
        Self::after(0)
    }
}

impl Inbound {
    /// A receiver whose next message is the one after `msg_seq`: 0 for a new stream, the last logged one after recovery.
    #[must_use]
    pub const fn after(msg_seq: u64) -> Self {
        Self { next: msg_seq.saturating_add(1), waiting: None }
    }

    /// The msg_seq that is delivered next; all below it were delivered.
    #[must_use]
    pub const fn next_expected(&self) -> u64 {
        self.next
    }

    /// True when nothing waits: no gap is known.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.waiting.is_none()
    }

    /// Bytes charged for what waits.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.waiting.as_ref().map_or(0, |w| w.bytes)
    }

    /// Takes a frame. An unnumbered one (msg_seq 0) passes through.
    ///
    /// # Errors
    /// EPROTO where fragments contradict each other, ELIMIT beyond a bound; nothing has changed then, and the stream is
    /// to be reset.
    pub fn feed(&mut self, received: Received) -> Result<Fed, WireError> {
        let (seq, more) = (received.frame.msg_seq, received.frame.flags.has(Flags::MORE));
        if seq == 0 {
            return Ok(Fed::Ready(received.into()));
        }
        if seq < self.next {
            // Only the last fragment is answered: one answer per repeated message.
            return Ok(if more { Fed::Waiting } else { Fed::Duplicate(seq) });
        }
        let whole = received.frame.frag_seq == 0 && !more;
        if whole && seq == self.next && self.waiting.as_ref().is_none_or(|w| !w.open.contains_key(&seq)) {
            within(received.frame.content.len())?;
            self.advance(seq)?;
            return Ok(Fed::Ready(received.into()));
        }
        self.hold(seq, received)?;
        Ok(self.next_ready().map_or(Fed::Waiting, Fed::Ready))
    }

    /// The next message, if it is whole and waited for the one delivered last.
    pub fn next_ready(&mut self) -> Option<Message> {
        let waiting = self.waiting.as_mut()?;
        let open = waiting.open.get(&self.next)?;
        if !open.is_whole() {
            return None;
        }
        let open = waiting.open.remove(&self.next)?;
        waiting.bytes -= open.charge();
        if waiting.open.is_empty() {
            self.waiting = None;
        }
        self.next += 1;
        Some(open.join())
    }

    /// Gives up on everything up to `msg_seq`: the sender has said that it doesn't have it any more. What waits behind it
    /// comes out of `next_ready`.
    pub fn skip_to(&mut self, msg_seq: u64) {
        self.next = self.next.max(msg_seq.saturating_add(1));
        if let Some(waiting) = &mut self.waiting {
            waiting.open = waiting.open.split_off(&self.next);
            waiting.bytes = waiting.open.values().map(Open::charge).sum();
            if waiting.open.is_empty() {
                self.waiting = None;
            }
        }
    }

    /// What `control.ack` asks for again, lowest first and bounded: whole messages that others wait for (no ranges), and
    /// missing fragments. Where the last fragment isn't known although later messages are here, the range is open to
    /// `u32::MAX`.
    #[must_use]
    pub fn missing(&self) -> Vec<OpenMessage> {
        let mut list = Vec::new();
        let mut ranges_left = MISSING_RANGES_MAX;
        let Some(waiting) = &self.waiting else { return list };
        let Some(highest) = waiting.open.last_key_value().map(|(seq, _)| *seq) else { return list };
        for msg_seq in self.next..=highest {
            let Some(open) = waiting.open.get(&msg_seq) else {
                list.push(OpenMessage { msg_seq, frag: 0, missing: Vec::new() });
                continue;
            };
            let missing = open.missing(msg_seq < highest, ranges_left);
            ranges_left -= missing.len();
            if !missing.is_empty() {
                let frag = u32::try_from(open.fragments.len()).expect("at most FRAGMENTS_MAX fragments");
                list.push(OpenMessage { msg_seq, frag, missing });
            }
            if ranges_left == 0 {
                break;
            }
        }
        list
    }

    fn advance(&mut self, seq: u64) -> Result<(), WireError> {
        let end = || WireError::new(Code::Limit, format!("msg_seq: {seq} is the end of the range, open a new stream"));
        self.next = seq.checked_add(1).ok_or_else(end)?;
        Ok(())
    }

    fn hold(&mut self, seq: u64, received: Received) -> Result<(), WireError> {
        if seq == u64::MAX || seq - self.next > GAP_MESSAGES_MAX as u64 {
            let message = format!("msg_seq: {seq} is too far ahead, {} is awaited", self.next);
            return Err(WireError::new(Code::Limit, message).used(seq - self.next, GAP_MESSAGES_MAX as u64));
        }
        let frag_seq = received.frame.frag_seq;
        let charge = charge(&received);
        let waiting = self.waiting.as_deref();
        let open = waiting.and_then(|w| w.open.get(&seq));
        if let Some(open) = open {
            open.check(&received)?;
            if open.fragments.contains_key(&frag_seq) {
                return Ok(());
            }
        }
        if frag_seq >= FRAGMENTS_MAX {
            let message =
                format!("frag_seq: {frag_seq}; a message has at most {FRAGMENTS_MAX} fragments, make them larger");
            return Err(WireError::new(Code::Limit, message).used(u64::from(frag_seq) + 1, u64::from(FRAGMENTS_MAX)));
        }
        within(open.map_or(0, |o| o.content_bytes) + received.frame.content.len())?;
        // The message that all others wait for is always taken: only its end empties the buffers. It has its own bound.
        let bytes = waiting.map_or(0, |w| w.bytes) + charge;
        if seq != self.next && bytes > GAP_BYTES_MAX {
            let asked_for = waiting.is_some_and(|w| w.open.last_key_value().is_some_and(|(highest, _)| seq < *highest))
                || open.is_some_and(|o| o.fragments.last_key_value().is_some_and(|(highest, _)| frag_seq < *highest));
            if asked_for {
                // It was named as missing, so it isn't the sender's fault; it stays missing until there is room.
                return Ok(());
            }
            let message = format!("{bytes} bytes wait for message {}; at most {GAP_BYTES_MAX} may", self.next);
            return Err(WireError::new(Code::Limit, message).used(bytes as u64, GAP_BYTES_MAX as u64));
        }
        let message_bytes = open.map_or(0, |o| o.bytes) + charge;
        if message_bytes > MESSAGE_CHARGE_MAX {
            let message =
                format!("message {seq} takes {message_bytes} bytes with its heads; at most {MESSAGE_CHARGE_MAX}");
            return Err(WireError::new(Code::Limit, message).used(message_bytes as u64, MESSAGE_CHARGE_MAX as u64));
        }
        let received = own(received)?;
        let waiting = self.waiting.get_or_insert_default();
        waiting.bytes += charge;
        let open = waiting.open.entry(seq).or_default();
        open.bytes += charge;
        open.content_bytes += received.frame.content.len();
        if !received.frame.flags.has(Flags::MORE) {
            open.last = Some(frag_seq);
        }
        open.fragments.insert(frag_seq, received);
        Ok(())
    }
}

impl Open {
    fn is_whole(&self) -> bool {
        self.last.is_some_and(|last| self.fragments.len() == last as usize + 1)
    }

    fn charge(&self) -> usize {
        self.bytes
    }

    /// Refuses a fragment that contradicts those that are here.
    fn check(&self, received: &Received) -> Result<(), WireError> {
        let frame = &received.frame;
        let (seq, frag) = (frame.msg_seq, frame.frag_seq);
        let bad = |what: &str| Err(WireError::proto(format!("frag_seq: {frag} of message {seq} {what}")));
        let more = frame.flags.has(Flags::MORE);
        match self.last {
            Some(last) if frag > last => return bad("comes after the last fragment"),
            Some(last) if !more && frag != last => return bad("is a second last fragment"),
            _ => {}
        }
        if !more && self.fragments.last_key_value().is_some_and(|(highest, _)| frag < *highest) {
            return bad("ends the message before fragments that are here");
        }
        // Only what makes the message: a repetition over another connection has another session_id and traceparent.
        match self.fragments.get(&frag).map(|held| &held.frame) {
            Some(held)
                if held.flags != frame.flags
                    || held.content != frame.content
                    || (frag == 0 && (held.kind != frame.kind || held.content_type != frame.content_type)) =>
            {
                bad("was sent before with other content")
            }
            _ => Ok(()),
        }
    }

    /// At most `limit` inclusive ranges that are missing; `ended`: later messages are here, so the tail is missing too.
    fn missing(&self, ended: bool, limit: usize) -> Vec<(u32, u32)> {
        let mut ranges = Vec::new();
        let mut from = 0;
        for frag in self.fragments.keys() {
            if *frag > from {
                ranges.push((from, frag - 1));
            }
            from = frag + 1;
        }
        match self.last {
            None if ended => ranges.push((from, u32::MAX)),
            _ => {}
        }
        ranges.truncate(limit);
        ranges
    }

    fn join(self) -> Message {
        let mut fragments = self.fragments.into_values();
        let first = fragments.next().expect("a whole message has fragment 0");
        if fragments.len() == 0 {
            return first.into();
        }
        let mut content = BytesMut::with_capacity(self.content_bytes);
        let mut bodies = Vec::with_capacity(fragments.len() + 1);
        content.extend_from_slice(&first.frame.content);
        bodies.push(first.body);
        for fragment in fragments {
            content.extend_from_slice(&fragment.frame.content);
            bodies.push(fragment.body);
        }
        let flags = Flags(first.frame.flags.0 & !Flags::MORE.0);
        Message { frame: Frame { flags, content: content.freeze(), ..first.frame }, bodies: Bodies::Many(bodies) }
    }
}

fn charge(received: &Received) -> usize {
    received.body.len() + FRAGMENT_OVERHEAD
}

fn within(content_bytes: usize) -> Result<(), WireError> {
    if content_bytes <= MESSAGE_BYTES_MAX {
        return Ok(());
    }
    let message = format!("message of {content_bytes} bytes; at most {MESSAGE_BYTES_MAX} are taken");
    Err(WireError::new(Code::Limit, message).used(content_bytes as u64, MESSAGE_BYTES_MAX as u64))
}

/// What waits owns its bytes: a slice would keep the whole read buffer of its connection alive.
fn own(received: Received) -> Result<Received, WireError> {
    let body = Bytes::copy_from_slice(&received.body);
    let frame = Frame { hop: received.frame.hop, ..decode_body(body.clone())? };
    Ok(Received { frame, body })
}

/// Splits a message for sending: every fragment but the last has MORE, and what describes the message stands in fragment 0
/// only. `fragment_bytes` 0 reads as 1; a message that fits, or is empty, stays as it is.
#[must_use]
pub fn fragment(frame: Frame, fragment_bytes: usize) -> Vec<Frame> {
    let size = fragment_bytes.max(1);
    if frame.content.len() <= size {
        return vec![frame];
    }
    let content = frame.content.clone();
    let last = content.len().div_ceil(size) - 1;
    let rest = Frame {
        session_id: frame.session_id.clone(),
        stream_id: frame.stream_id.clone(),
        msg_seq: frame.msg_seq,
        ..Frame::default()
    };
    let mut frames = Vec::with_capacity(last + 1);
    let mut first = Some(frame);
    for n in 0..=last {
        let piece = content.slice(n * size..content.len().min((n + 1) * size));
        let base = first.take().unwrap_or_else(|| rest.clone());
        let flags = if n == last { base.flags } else { base.flags.with(Flags::MORE) };
        let frag_seq = u32::try_from(n).expect("fewer than 2^32 fragments");
        frames.push(Frame { frag_seq, flags, content: piece, ..base });
    }
    frames
}

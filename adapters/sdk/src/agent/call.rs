//! One call inside the agent: its grant, its running total, and the frames that the router hasn't acknowledged yet.
//! Holds no socket: the session copies from here what it sends.

use super::session::Shared;
use super::tool::Waiting;
use super::{ROOM_BYTES_MAX, StopReason, UNACKED_BYTES_MAX, Verdict};
use crate::fragment;
use atp_proto::content::{Dispatch, ListedCall, ToolRequest, ToolResult, UsageSource};
use atp_proto::frame::{Extra, kind};
use atp_proto::pb::ToolCost;
use atp_proto::{Amount, CallId, Cost, Flags, Frame, Text, codec, limits};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

/// Shared by the handler's meter and the session.
#[derive(Debug)]
pub(crate) struct CallState {
    pub(crate) id: CallId,
    stream: Text,
    pub(crate) deadline: Instant,
    pub(crate) shared: Arc<Shared>,
    inner: Mutex<Inner>,
    /// Something changed that a waiter may care for: a stop, an acknowledgement.
    changed: Notify,
}

#[derive(Debug)]
struct Inner {
    shard: u32,
    epoch: u64,
    grant: Amount,
    last: bool,
    /// The highest total so far, counted or reported: what the grant is compared with.
    total: Cost,
    /// The highest that a provider reported: no final falls behind it.
    reported: Cost,
    /// The msg_seq that the next frame gets.
    next_seq: u64,
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// How many of `kept`, from the front, are on the present connection's way.
    sent: usize,
    /// In the session's list of calls with something to send.
    listed: bool,
    stop: Option<StopReason>,
    /// msg_seq of the FIN or RST.
    end: Option<u64>,
    /// The handler vanished or the router forgot the call: nothing is sent any more.
    silent: bool,
    arena: BytesMut,
    /// Tool requests without an answer, by msg_seq.
    tools: BTreeMap<u64, Waiting>,
    /// What the agent's own tools have cost, and whether the router was told.
    own_tools: BTreeMap<String, Amount>,
    own_told: bool,
}

#[derive(Debug)]
struct Kept {
    msg_seq: u64,
    /// Encoded frames, length prefixes included: all fragments of one message.
    bytes: Bytes,
}

impl CallState {
    pub(crate) fn new(dispatch: &Dispatch, deadline: Instant, shared: Arc<Shared>) -> Self {
        let inner = Inner {
            shard: dispatch.shard,
            epoch: dispatch.epoch,
            grant: dispatch.grant,
            last: false,
            total: Cost::default(),
            reported: Cost::default(),
            next_seq: 1,
            kept: VecDeque::new(),
            kept_bytes: 0,
            sent: 0,
            listed: false,
            stop: None,
            end: None,
            silent: false,
            arena: BytesMut::new(),
            tools: BTreeMap::new(),
            own_tools: BTreeMap::new(),
            own_told: true,
        };
        Self {
            id: dispatch.call_id,
            stream: Text::from(dispatch.call_id.to_string()),
            deadline,
            shared,
            inner: Mutex::new(inner),
            changed: Notify::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- for the meter ----------------------------------------------------------------------------------------------

    /// Keeps one message and tells the session. `end` frames are kept whatever the backlog.
    pub(crate) fn say(
        self: &Arc<Self>,
        flags: Flags,
        kind: &'static str,
        cost: Cost,
        source: UsageSource,
        content: impl FnOnce(Cost) -> Bytes,
    ) -> Verdict {
        let is_end = flags.has(Flags::FIN) || flags.has(Flags::RST);
        let mut inner = self.inner();
        inner.total = inner.total.max(cost);
        if source == UsageSource::Reported {
            inner.reported = inner.reported.max(cost);
        }
        if inner.silent || inner.end.is_some() {
            return Verdict::Stop(inner.stop.unwrap_or(StopReason::Cancelled));
        }
        if inner.stop == Some(StopReason::Backlog) && !is_end {
            return Verdict::Stop(StopReason::Backlog);
        }
        // A report at the end may undercut what was counted on the way.
        let stated = if is_end && source == UsageSource::Reported { inner.reported } else { inner.total };
        let content = content(stated);
        if !is_end && inner.kept_bytes + content.len() > UNACKED_BYTES_MAX {
            inner.stop = Some(StopReason::Backlog);
            self.changed.notify_waiters();
            return Verdict::Stop(StopReason::Backlog);
        }
        let (msg_seq, _) = self.keep(&mut inner, flags, kind, content);
        if is_end {
            // Whoever still waits for a tool waits in vain.
            inner.tools.clear();
            (inner.end, inner.arena) = (Some(msg_seq), BytesMut::new());
        }
        let listed = std::mem::replace(&mut inner.listed, true);
        let verdict = inner.verdict(self.deadline);
        drop(inner);
        if !listed {
            self.shared.has_unsent(Arc::clone(self));
        }
        verdict
    }

    /// Encodes a message behind those that aren't acknowledged.
    fn keep(&self, inner: &mut Inner, flags: Flags, kind: &'static str, content: Bytes) -> (u64, Bytes) {
        let msg_seq = inner.next_seq;
        inner.next_seq += 1;
        let mut frame = Frame::raw(self.stream.clone(), msg_seq, flags, kind, content);
        if !inner.own_told && matches!(kind, kind::RESULT_PARTIAL | kind::RESULT_FINAL) {
            inner.own_told = true;
            let each = inner.own_tools.iter();
            let tool_cost_breakdown = each.map(|(tool, spent)| ToolCost {
                tool: tool.clone(),
                tokens: spent.tokens.0,
                usd_micros: spent.usd_micros.0,
            });
            frame.extra =
                Some(Box::new(Extra { tool_cost_breakdown: tool_cost_breakdown.collect(), ..Extra::default() }));
        }
        let arena = &mut inner.arena;
        fragment::split(frame, limits::FRAGMENT_BYTES, |part| codec::encode(part, arena));
        let bytes = arena.split().freeze();
        inner.kept_bytes += bytes.len();
        inner.kept.push_back(Kept { msg_seq, bytes: bytes.clone() });
        (msg_seq, bytes)
    }

    /// Keeps a tool request until it is answered.
    ///
    /// # Errors
    /// Why the call can't ask any more.
    pub(crate) fn ask(self: &Arc<Self>, request: &ToolRequest) -> Result<oneshot::Receiver<ToolResult>, StopReason> {
        let (answer, answered) = oneshot::channel();
        let mut inner = self.inner();
        if let Some(reason) = inner.stop {
            return Err(reason);
        }
        if inner.silent || inner.end.is_some() {
            return Err(StopReason::Cancelled);
        }
        let content = Bytes::from(serde_json::to_vec(request).expect("requests serialize: their maps have text keys"));
        if inner.kept_bytes + content.len() > UNACKED_BYTES_MAX {
            inner.stop = Some(StopReason::Backlog);
            self.changed.notify_waiters();
            return Err(StopReason::Backlog);
        }
        let (msg_seq, bytes) = self.keep(&mut inner, Flags::NONE, kind::TOOL_REQUEST, content);
        inner.tools.insert(msg_seq, Waiting { bytes, answer });
        let listed = std::mem::replace(&mut inner.listed, true);
        drop(inner);
        if !listed {
            self.shared.has_unsent(Arc::clone(self));
        }
        Ok(answered)
    }

    /// Sends again what isn't acknowledged or answered.
    pub(crate) fn say_again(self: &Arc<Self>) {
        let listed = self.inner().listed;
        if self.unsend() && !listed {
            self.shared.has_unsent(Arc::clone(self));
        }
    }

    /// Adds to what an own tool has cost; the next message says so.
    pub(crate) fn own_tool_spent(&self, tool: &str, more: Amount) {
        let mut inner = self.inner();
        let spent = inner.own_tools.entry(tool.to_owned()).or_default();
        *spent = spent.add(more).unwrap_or(*spent);
        inner.own_told = false;
    }

    /// The answer to a request; a second one has nobody who waits.
    pub(crate) fn answer(&self, result: ToolResult) {
        let waiting = self.inner().tools.remove(&result.request);
        if let Some(waiting) = waiting {
            // Whoever asked may have been stopped meanwhile.
            let _ = waiting.answer.send(result);
        }
    }

    pub(crate) fn grant(&self) -> Amount {
        self.inner().grant
    }

    pub(crate) fn total(&self) -> Cost {
        self.inner().total
    }

    pub(crate) fn is_last(&self) -> bool {
        self.inner().last
    }

    pub(crate) fn verdict(&self) -> Verdict {
        self.inner().verdict(self.deadline)
    }

    /// Cancelled, out of time or over its backlog; the grant isn't asked.
    pub(crate) fn stop_reason(&self) -> Option<StopReason> {
        let inner = self.inner();
        inner.stop.or_else(|| (Instant::now() >= self.deadline).then_some(StopReason::Deadline))
    }

    /// Resolves when `stop_reason` has one.
    pub(crate) async fn stopped(&self) -> StopReason {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(reason) = self.stop_reason() {
                return reason;
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(self.deadline) => {}
            }
        }
    }

    /// Resolves when a producer that can wait should go on.
    pub(crate) async fn room(&self) {
        loop {
            let bound = self.shared.room_of_call().min(ROOM_BYTES_MAX);
            {
                let inner = self.inner();
                if inner.kept_bytes < bound || inner.stop.is_some() {
                    return;
                }
            }
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let inner = self.inner();
                if inner.kept_bytes < bound || inner.stop.is_some() {
                    return;
                }
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(self.deadline) => return,
            }
        }
    }

    // ---- for the session --------------------------------------------------------------------------------------------

    /// Copies what isn't sent yet while `take` has room; true when nothing is left.
    pub(crate) fn send(&self, mut take: impl FnMut(&[u8]) -> bool) -> bool {
        let mut inner = self.inner();
        while inner.sent < inner.kept.len() {
            let at = inner.sent;
            inner.sent += 1;
            if !take(&inner.kept[at].bytes) && inner.sent < inner.kept.len() {
                return false;
            }
        }
        inner.listed = false;
        true
    }

    /// All that isn't acknowledged counts as not sent; true when there is something.
    pub(crate) fn unsend(&self) -> bool {
        let mut inner = self.inner();
        let Inner { kept, kept_bytes, tools, .. } = &mut *inner;
        let first = kept.front().map_or(u64::MAX, |kept| kept.msg_seq);
        // A request that was acknowledged and not answered: its answer may have been lost.
        for (msg_seq, waiting) in tools.range(..first).rev() {
            *kept_bytes += waiting.bytes.len();
            kept.push_front(Kept { msg_seq: *msg_seq, bytes: waiting.bytes.clone() });
        }
        inner.sent = 0;
        inner.listed = !inner.kept.is_empty();
        inner.listed
    }

    /// Drops what the router has; true when that was the end of the call.
    pub(crate) fn acknowledge(&self, msg_seq: u64) -> bool {
        let mut inner = self.inner();
        while inner.kept.front().is_some_and(|kept| kept.msg_seq <= msg_seq) {
            if let Some(kept) = inner.kept.pop_front() {
                inner.kept_bytes -= kept.bytes.len();
                inner.sent = inner.sent.saturating_sub(1);
            }
        }
        // More than was ever said: the router has settled this call and wants to hear no more of it.
        let forgotten = msg_seq >= inner.next_seq;
        if forgotten && inner.end.is_none() {
            inner.silent = true;
            inner.stop.get_or_insert(StopReason::Cancelled);
        }
        let ended = forgotten || inner.end.is_some_and(|end| end <= msg_seq);
        drop(inner);
        self.changed.notify_waiters();
        ended
    }

    /// True when the message was for this epoch or a later one, which counts from now on.
    pub(crate) fn raise(&self, shard: u32, epoch: u64) -> bool {
        let mut inner = self.inner();
        if shard != inner.shard || epoch < inner.epoch {
            return false;
        }
        inner.epoch = epoch;
        true
    }

    /// A grant only grows: a lower one is an older word that came late or twice.
    pub(crate) fn set_grant(&self, grant: Amount, last: bool) {
        let mut inner = self.inner();
        if inner.grant.fits(grant) {
            (inner.grant, inner.last) = (grant, last);
        }
    }

    pub(crate) fn stop(&self, reason: StopReason) {
        self.inner().stop.get_or_insert(reason);
        self.changed.notify_waiters();
    }

    /// The handler is gone without an outcome: the call stays listed as running until the router forgets it.
    pub(crate) fn vanish(&self) {
        self.inner().silent = true;
    }

    pub(crate) fn listed(&self) -> ListedCall {
        let inner = self.inner();
        ListedCall {
            call_id: self.id,
            shard: inner.shard,
            epoch: inner.epoch,
            msg_seq: inner.next_seq - 1,
            cost: inner.total,
            done: inner.end.is_some(),
        }
    }
}

impl Inner {
    fn verdict(&self, deadline: Instant) -> Verdict {
        if let Some(reason) = self.stop {
            return Verdict::Stop(reason);
        }
        if !self.total.amount().is_ok_and(|spent| spent.fits(self.grant)) {
            return Verdict::Stop(StopReason::Grant);
        }
        if Instant::now() >= deadline { Verdict::Stop(StopReason::Deadline) } else { Verdict::Go }
    }
}

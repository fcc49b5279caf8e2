//! Each record's effect on the state, and the grammar that refuses it. No decision, no view.

use super::{Done, FORMAT, REMEMBERED_MS, RESULT_BYTES_MAX, RESULT_FINDINGS_MAX, State};
use crate::account::{AccountWindow, replace};
use crate::record::{
    Accept, Adjust, Close, CostPb, Deny, Epoch, Extend, FrameRecord, Genesis, Intent, Key, Reserve, Settle, SourcePb,
    Tier, Void, Window, WindowRef, hex,
};
use crate::said::Said;
use crate::statistics::{Lesson, Run};
use crate::stream::{Call, Phase, Stream};
use atp_proto::frame::kind;
use atp_proto::money::OutOfRange;
use atp_proto::{Amount, Cost, Frame, codec};
use bytes::{Bytes, BytesMut};

impl State {
    pub(super) fn genesis_first(&mut self, r: &Genesis) -> Done {
        if self.position != 0 || !self.genesis.log_id.is_empty() {
            return Err("stands behind the first entry".into());
        }
        if r.format > FORMAT {
            return Err(format!("format {} was written by a newer version; this one reads up to {FORMAT}", r.format));
        }
        self.genesis = r.clone();
        Ok(())
    }

    pub(super) fn epoch_begins(&mut self, r: &Epoch) -> Done {
        if r.log_id != self.genesis.log_id {
            return Err(format!("log id {} is not Genesis's {}", hex(&r.log_id), hex(&self.genesis.log_id)));
        }
        (self.epoch, self.shard) = (self.position + 1, r.shard);
        Ok(())
    }

    pub(super) fn window(&mut self, r: &Window) -> Done {
        let at_ms = self.logged_ms;
        let account = self.accounts.entry(r.account.clone()).or_default();
        let window = account.windows.entry(r.window.clone()).or_default();
        (window.limit, window.ends_ms) = (r.limit, r.ends_ms);
        (account.current, account.per) = (r.window.clone(), r.per.clone());
        let current = &account.current;
        account.windows.retain(|id, w| {
            id == current
                || !Amount::from(w.held).is_zero()
                || !Amount::from(w.lent).is_zero()
                || w.ends_ms.is_none_or(|ends| ends + REMEMBERED_MS >= at_ms)
        });
        Ok(())
    }

    pub(super) fn new_stream(&mut self, accept: Accept) -> Result<&mut Stream, String> {
        let ids = self.by_id.entry(accept.key.tenant.clone()).or_default();
        if ids.contains_key(&accept.key.stream) {
            return Err(format!("stream {} exists", accept.key.stream));
        }
        self.next_no += 1;
        let no = self.next_no;
        ids.insert(accept.key.stream.clone(), no);
        if !accept.idempotency_key.is_empty() {
            self.by_key.entry(accept.key.tenant.clone()).or_default().insert(accept.idempotency_key.clone(), no);
        }
        let stream = Stream {
            accept,
            accepted_at: self.logged_ms,
            last_at: self.logged_ms,
            from: self.position,
            ..Stream::default()
        };
        Ok(self.streams.entry(no).or_insert(stream))
    }

    pub(super) fn accept(&mut self, r: &Accept) -> Done {
        // The client's `control.accepted` is message 1 of its stream.
        self.new_stream(r.clone())?.out_seq = 1;
        Ok(())
    }

    pub(super) fn deny(&mut self, r: &Deny) -> Done {
        let at_ms = self.logged_ms;
        let accept = Accept {
            key: r.key.clone(),
            payload_hash: r.payload_hash.clone(),
            idempotency_key: r.idempotency_key.clone(),
            account: r.key.tenant.clone(),
            ..Accept::default()
        };
        let stream = self.new_stream(accept)?;
        stream.closed = "refused".into();
        stream.error = r.error.clone();
        stream.ended_at = at_ms;
        self.ended.push_back((at_ms, self.next_no));
        Ok(())
    }

    pub(super) fn open_stream(&mut self, key: &Key) -> Result<(u64, &mut Stream), String> {
        let no = self.stream_no(&key.tenant, &key.stream).ok_or_else(|| format!("no stream {}", key.stream))?;
        let stream = self.streams.get_mut(&no).ok_or_else(|| format!("no stream {}", key.stream))?;
        stream.last_at = self.logged_ms;
        Ok((no, stream))
    }

    pub(super) fn reserve(&mut self, r: &Reserve) -> Done {
        let (at, holds) = (self.logged_ms, &r.calls);
        let (no, stream) = self.open_stream(&r.key)?;
        if stream.is_closed() {
            return Err("behind Close".into());
        }
        stream.calls.reserve_exact(holds.len());
        for call in holds {
            if call.lane as usize != stream.calls.len() + 1 {
                return Err(format!("lane {} follows {}", call.lane, stream.calls.len()));
            }
            replace(&mut stream.held, Amount::ZERO, call.hold.into()).map_err(range)?;
            stream.calls.push(Call { reserve: call.clone(), hold: call.hold, reserved_at: at, ..Call::default() });
        }
        for call in holds {
            self.by_call.insert(r.key.call(call.lane), (no, call.lane));
            self.move_held(&call.windows, Amount::ZERO, call.hold.into())?;
            self.count_open(&call.windows, true)?;
        }
        Ok(())
    }

    pub(super) fn move_held(&mut self, windows: &[WindowRef], from: Amount, to: Amount) -> Done {
        for at in windows {
            match self.account_window(&at.account, &at.window) {
                Ok(window) => replace(&mut window.held, from, to).map_err(range)?,
                // A window that is long over is forgotten once nothing is held in it.
                Err(_) if from.is_zero() && to.is_zero() => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// A call begins or ends on the purses that it stands in.
    fn count_open(&mut self, windows: &[WindowRef], begins: bool) -> Done {
        for at in windows.iter().filter(|at| at.shared) {
            let window = self.account_window(&at.account, &at.window)?;
            let open = if begins { window.open.checked_add(1) } else { window.open.checked_sub(1) };
            window.open = open.ok_or_else(|| format!("window {} has no call open", at.window))?;
        }
        Ok(())
    }

    pub(super) fn account_window(&mut self, account: &str, window: &str) -> Result<&mut AccountWindow, String> {
        let found = self.accounts.get_mut(account).and_then(|a| a.windows.get_mut(window));
        found.ok_or_else(|| format!("no window {window} of account {account}"))
    }

    pub(super) fn intent(&mut self, r: &Intent) -> Done {
        let (at, epoch) = (self.logged_ms, self.epoch);
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        match (call.phase(), &call.intent) {
            (Phase::Reserved, None) => {}
            (Phase::Running, Some(old)) if old.upstream_key == r.upstream_key && old.idempotent_for_ms > 0 => {}
            _ => return Err(format!("lane {} can't be dispatched now", r.lane)),
        }
        call.set_phase(Phase::Running);
        call.intents += 1;
        if call.intents == 1 {
            call.first_intent_at = at;
        } else {
            // The upstream repeats its whole answer.
            (call.text, call.findings) = (String::new(), Vec::new());
            (call.findings_bytes, call.truncated) = (0, false);
        }
        if let Some(tools) = &mut call.tools {
            // Another process counts its messages anew; what the old one asked has nobody to be told.
            tools.asked = Vec::new();
        }
        call.intent = Some(Intent { key: Key::default(), ..r.clone() });
        (call.intent_at, call.intent_epoch, call.in_seq) = (at, epoch, 0);
        Ok(())
    }

    pub(super) fn extend(&mut self, r: &Extend) -> Done {
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        let (from, to) = (call.hold(), Amount::from(r.hold));
        if call.phase() != Phase::Running || !from.fits(to) {
            return Err(format!("lane {} can't be extended so", r.lane));
        }
        call.hold = r.hold;
        call.extends += 1;
        let windows = call.reserve.windows.clone();
        replace(&mut stream.held, from, to).map_err(range)?;
        self.move_held(&windows, from, to)
    }

    pub(super) fn settle(&mut self, r: &Settle) -> Done {
        let at = self.logged_ms;
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if call.phase() != Phase::Running {
            return Err(format!("lane {} isn't running", r.lane));
        }
        let hold = call.hold();
        let actual = Cost::from(r.actual).amount().map_err(range)?;
        call.set_phase(Phase::Settled);
        (call.actual, call.stated_usd_micros, call.source, call.settled_at) =
            (r.actual, r.stated_usd_micros, r.source, at);
        call.ended = r.ended.how.clone();
        call.confidence_ppm_plus_1 = r.confidence_ppm_plus_1;
        let (windows, agent) = (call.reserve.windows.clone(), call.reserve.agent.clone());
        replace(&mut stream.held, hold, Amount::ZERO).map_err(range)?;
        replace(&mut stream.settled, Amount::ZERO, actual).map_err(range)?;
        if r.ended.out_seq > 0 {
            told(stream, r.ended.out_seq)?;
        }
        self.move_held(&windows, hold, Amount::ZERO)?;
        for w in &windows {
            if let Ok(window) = self.account_window(&w.account, &w.window) {
                replace(&mut window.settled, Amount::ZERO, actual).map_err(range)?;
            }
        }
        self.count_open(&windows, false)?;
        let totals = self.agents.entry(agent.clone()).or_default();
        // A statistic, unlike the levels above: it may stop at the end of its range.
        totals.spent_usd_micros = totals.spent_usd_micros.saturating_add(actual.usd_micros.0);
        if matches!(r.source(), SourcePb::Reported | SourcePb::Counted) {
            let overshoot = actual.less(hold);
            totals.overshoot = Amount::from(totals.overshoot).max(overshoot).into();
            self.lesson = (self.genesis.shards > 1 && !overshoot.is_zero())
                .then(|| Box::new(Lesson { agent: agent.clone(), overshoot, ..Lesson::default() }));
        }
        let measured = matches!(r.source(), SourcePb::Reported | SourcePb::Counted);
        let complete = r.ended.how == "complete";
        // What was cut says nothing of the agent; what failed says nothing of what a call costs.
        if complete && measured || !matches!(r.ended.how.as_str(), "complete" | "grant" | "cancelled") {
            self.learn(&r.key, r.lane, Some(complete), complete);
        }
        Ok(())
    }

    /// An ended call enters the statistics: whether it had a result, and, where it was measured, its run.
    pub(super) fn learn(&mut self, key: &Key, lane: u32, accepted: Option<bool>, measured: bool) {
        let Some(no) = self.stream_no(&key.tenant, &key.stream) else { return };
        let Some(stream) = self.streams.get(&no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let reserve = &call.reserve;
        let run = Run {
            prompt_tokens: reserve.prompt_tokens,
            duration_ms: self.logged_ms.saturating_sub(call.intent_at),
            source: crate::estimate::Source::of(&reserve.source) as u32,
            ..Run::new(call.own_cost(), reserve.mean.into())
        };
        let row = (reserve.agent.as_str(), reserve.model.as_str(), stream.accept.task_type.as_str());
        let run = measured.then_some(run);
        self.statistics.record(row, self.logged_ms, accepted, run);
        if self.genesis.shards > 1 {
            let (agent, model, task_type) = (row.0.into(), row.1.into(), row.2.into());
            let overshoot = self.lesson.take().map_or(Amount::ZERO, |l| l.overshoot);
            let at_ms = self.logged_ms;
            let lesson = Lesson { agent, model, task_type, at_ms, accepted, run, overshoot, tier: None };
            self.lesson = Some(Box::new(lesson));
        }
    }

    pub(super) fn tier(&mut self, r: &Tier) -> Done {
        let tier = atp_proto::Qos::from_wire(r.tier).map_err(|e| e.message.to_string())?;
        self.statistics.agent_mut(&r.agent).standing.set(tier);
        if self.genesis.shards > 1 {
            let agent = r.agent.clone();
            self.lesson = Some(Box::new(Lesson { agent, tier: Some(tier), ..Lesson::default() }));
        }
        Ok(())
    }

    pub(super) fn void(&mut self, r: &Void) -> Done {
        let at = self.logged_ms;
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if !call.is_open() {
            return Err(format!("lane {} has ended", r.lane));
        }
        if call.intents > 1 {
            return Err(format!(
                "lane {} was dispatched {} times, one of them may have had its effect",
                r.lane, call.intents
            ));
        }
        let hold = call.hold();
        call.set_phase(Phase::Void);
        call.set_proof(r.proof());
        (call.settled_at, call.ended) = (at, r.ended.how.clone());
        let windows = call.reserve.windows.clone();
        replace(&mut stream.held, hold, Amount::ZERO).map_err(range)?;
        if r.ended.out_seq > 0 {
            told(stream, r.ended.out_seq)?;
        }
        self.move_held(&windows, hold, Amount::ZERO)?;
        self.count_open(&windows, false)
    }

    pub(super) fn adjust(&mut self, r: &Adjust) -> Done {
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if call.phase() != Phase::Settled {
            return Err(format!("lane {} isn't settled", r.lane));
        }
        if call.evidence.contains(&r.evidence) {
            return Err(format!("evidence {} counts once", r.evidence));
        }
        let from = Cost::from(call.actual).amount().map_err(range)?;
        let to = Cost::from(r.actual).amount().map_err(range)?;
        let guessed = matches!(call.source(), SourcePb::UnknownAtHold | SourcePb::Expired);
        call.actual = r.actual;
        call.source = r.source;
        call.evidence.push(r.evidence.clone());
        let (windows, agent) = (call.reserve.windows.clone(), call.reserve.agent.clone());
        replace(&mut stream.settled, from, to).map_err(range)?;
        for w in &windows {
            if w.shared {
                self.adjust_share(w, format!("{}:{}", r.key.call(r.lane), r.evidence), from, to)?;
                continue;
            }
            // A window that is long over may be forgotten.
            if let Ok(window) = self.account_window(&w.account, &w.window) {
                replace(&mut window.settled, from, to).map_err(range)?;
            }
        }
        let totals = self.agents.entry(agent).or_default();
        let spent = totals.spent_usd_micros.saturating_sub(from.usd_micros.0);
        totals.spent_usd_micros = spent.saturating_add(to.usd_micros.0);
        // The call is known now: its Settle measured nothing.
        if guessed && r.complete {
            self.learn(&r.key, r.lane, None, true);
        }
        Ok(())
    }

    pub(super) fn close(&mut self, r: &Close) -> Done {
        let at = self.logged_ms;
        let (no, stream) = self.open_stream(&r.key)?;
        if stream.is_closed() {
            return Err("a second Close".into());
        }
        told(stream, r.out_seq)?;
        told(stream, r.out_seq + 1)?;
        (stream.closed, stream.code) = (r.state.clone(), r.code.clone());
        (stream.result_hash, stream.ended_at) = (r.result_hash.clone(), at);
        // Duplicates get the answer from the log; what only a running task needs goes.
        stream.submit = Bytes::new();
        for call in &mut stream.calls {
            call.text = String::new();
            call.findings = Vec::new();
            call.findings_bytes = 0;
            if let Some(tools) = &mut call.tools {
                tools.asked.retain(|_| call.phase == Phase::Running as i32);
            }
        }
        self.ended.push_back((at, no));
        Ok(())
    }

    pub(super) fn frame(&mut self, r: &FrameRecord, said: Option<Said>) -> Done {
        let (_, stream) = self.open_stream(&r.key)?;
        if r.lane == 0 {
            if r.cancel {
                stream.cancel = true;
            } else if stream.submit.is_empty() && !stream.is_closed() {
                // A copy: a slice would keep the connection's whole read buffer.
                stream.submit = Bytes::copy_from_slice(&join(&r.bodies)?);
                stream.tool_permissions = permissions(&r.bodies);
            }
            return Ok(());
        }
        if r.out_seq > 0 {
            told(stream, r.out_seq)?;
        }
        let closed = stream.is_closed();
        let kept = stream.calls.iter().map(Call::kept_bytes).sum::<usize>();
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if r.msg_seq != call.in_seq + 1 {
            return Err(format!("message {} of lane {} follows {}", r.msg_seq, r.lane, call.in_seq));
        }
        call.in_seq = r.msg_seq;
        if let Some(booked) = r.booked {
            let before = Cost::from(call.booked).amount().map_err(range)?;
            let now = Cost::from(booked).amount().map_err(range)?;
            call.largest_chunk = Amount::from(call.largest_chunk).max(now.less(before)).into();
            call.booked = booked;
        }
        let Some(said) = said.filter(|_| call.is_open()) else { return Ok(()) };
        if said.reported {
            call.reported = Cost::from(call.reported).max(said.cost).into();
        }
        if closed {
            return Ok(());
        }
        let mut bytes = RESULT_BYTES_MAX.saturating_sub(kept);
        if let Some(text) = said.text() {
            let cut = floor_char_boundary(text, bytes);
            call.truncated |= cut < text.len();
            bytes -= cut;
            call.text.push_str(&text[..cut]);
        }
        let room = RESULT_FINDINGS_MAX.saturating_sub(call.findings.len());
        for finding in said.findings() {
            if call.findings.len() < room && finding.len() <= bytes {
                bytes -= finding.len();
                call.findings_bytes += finding.len() as u64;
                call.findings.push(finding);
            } else {
                call.truncated = true;
            }
        }
        Ok(())
    }
}

pub(super) fn range(_: OutOfRange) -> String {
    "amount out of range".into()
}

fn told(stream: &mut Stream, out_seq: u64) -> Done {
    if out_seq != stream.out_seq + 1 {
        return Err(format!("client message {out_seq} follows {}", stream.out_seq));
    }
    stream.out_seq = out_seq;
    Ok(())
}

/// The content of a message from the bodies of its fragments.
pub(crate) fn join(bodies: &[Bytes]) -> Result<Bytes, String> {
    let mut whole = BytesMut::new();
    for body in bodies {
        let frame = codec::decode_body(body.clone()).map_err(|e| e.to_string())?;
        if bodies.len() == 1 {
            return Ok(frame.content);
        }
        whole.extend_from_slice(&frame.content);
    }
    Ok(whole.freeze())
}

/// The tools that a submit asks leave for.
fn permissions(bodies: &[Bytes]) -> Vec<String> {
    let first = bodies.first().and_then(|body| codec::decode_body(body.clone()).ok());
    first.and_then(|frame| frame.meta).map_or_else(Vec::new, |meta| meta.tool_permissions)
}

/// What an agent's logged message adds to its lane.
pub(crate) fn read_said(frame: &FrameRecord) -> Option<Said> {
    if frame.unreadable {
        return None;
    }
    let first = codec::decode_body(frame.bodies.first()?.clone()).ok()?;
    let last = match &*first.kind {
        kind::RESULT_PARTIAL => false,
        kind::RESULT_FINAL => true,
        _ => return None,
    };
    let content = if frame.bodies.len() == 1 { first.content.clone() } else { join(&frame.bodies).ok()? };
    Said::read(&Frame { content, ..first }, last).ok()
}

/// The largest char boundary at or below `at`.
fn floor_char_boundary(text: &str, at: usize) -> usize {
    if at >= text.len() {
        return text.len();
    }
    (0..=at).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0)
}

/// A cost of nothing, for calls that had none.
pub const NO_COST: CostPb = CostPb { in_tokens: 0, out_tokens: 0, usd_micros: 0 };

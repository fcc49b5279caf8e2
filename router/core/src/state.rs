//! The fold: what a log says, and nothing else. Live shard, recovery, verify and replay share it, so that replay calls no
//! decision: every number that a decision used stands in its record. A record out of its grammar is corruption.

use crate::account::{Account, AccountWindow, replace};
use crate::record::{
    Accept, Adjust, AmountPb, AnyRecord, Checkpoint, Close, CostPb, Deny, Entry, Epoch, Extend, FrameRecord, Genesis,
    Intent, Key, Record, Reserve, Settle, SourcePb, Void, Window, hex,
};
use crate::stream::{Call, Phase, Stream};
use crate::view::{AccountView, VerifyView};
use atp_proto::content::{AgentFinal, AgentPartial, UsageSource};
use atp_proto::money::OutOfRange;
use atp_proto::{Amount, CallId, Cost, Limit, codec};
use bytes::{Bytes, BytesMut};
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};

/// Version of this fold and of its checkpoints.
pub const FOLD_VERSION: u32 = 1;
/// Version of the record format that Genesis names.
pub const FORMAT: u32 = 1;
/// Ids and keys are remembered for this long after a stream's end (ATP-4), in logged time.
pub const REMEMBERED_MS: u64 = 24 * 3_600_000;
/// Bytes of one lane's text in the result; more is cut there and marked, the partials had it all.
pub const RESULT_TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Findings of one lane in the result.
pub const RESULT_FINDINGS_MAX: usize = 4096;
/// Bytes of a checkpoint's piece.
const PIECE_BYTES: usize = 1024 * 1024;

/// The log can't be what this program wrote: stop, say where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("log corrupt at position {position}: {message}")]
pub struct Corrupt {
    pub position: u64,
    pub message: String,
}

/// What an agent's message adds to its lane; given along where the caller has parsed it already.
#[derive(Clone, Debug, Default)]
pub struct Output {
    pub text: Option<String>,
    pub findings: Vec<String>,
    pub reported: bool,
    pub cost: Cost,
}

/// What the log remembers of an agent across its incarnations.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct AgentTotals {
    #[prost(uint64, tag = "1")]
    pub spent_usd_micros: u64,
    /// The largest overshoot of a grant; it raises the declared reach.
    #[prost(message, required, tag = "2")]
    pub overshoot: AmountPb,
}

/// The state of one shard up to a position.
#[derive(Clone, Default)]
pub struct State {
    position: u64,
    epoch: u64,
    logged_ms: u64,
    genesis: Genesis,
    pub(crate) accounts: BTreeMap<String, Account>,
    pub(crate) streams: BTreeMap<u64, Stream>,
    pub(crate) agents: BTreeMap<String, AgentTotals>,
    next_no: u64,
    by_id: BTreeMap<String, BTreeMap<String, u64>>,
    by_key: BTreeMap<String, BTreeMap<String, u64>>,
    by_call: BTreeMap<CallId, (u64, u32)>,
    ended: VecDeque<(u64, u64)>,
}

/// A checkpoint's content: the state without its indexes.
#[derive(Clone, PartialEq, Message)]
struct Image {
    #[prost(uint64, tag = "1")]
    logged_ms: u64,
    #[prost(message, required, tag = "2")]
    genesis: Genesis,
    #[prost(btree_map = "string, message", tag = "3")]
    accounts: BTreeMap<String, Account>,
    #[prost(btree_map = "uint64, message", tag = "4")]
    streams: BTreeMap<u64, Stream>,
    #[prost(btree_map = "string, message", tag = "5")]
    agents: BTreeMap<String, AgentTotals>,
    #[prost(uint64, tag = "6")]
    next_no: u64,
}

type Done = Result<(), String>;

impl State {
    /// Position of the last entry.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position
    }
    /// Position of the newest Epoch.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
    /// Logged time of the last entry, Unix milliseconds.
    #[must_use]
    pub fn logged_ms(&self) -> u64 {
        self.logged_ms
    }
    /// 16 bytes from Genesis; empty for a new log.
    #[must_use]
    pub fn log_id(&self) -> &Bytes {
        &self.genesis.log_id
    }
    #[must_use]
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }
    /// The stream of a tenant by id.
    #[must_use]
    pub fn stream_no(&self, tenant: &str, stream: &str) -> Option<u64> {
        self.by_id.get(tenant)?.get(stream).copied()
    }
    /// The newest stream that was accepted under an idempotency key.
    #[must_use]
    pub fn stream_of_key(&self, tenant: &str, key: &str) -> Option<u64> {
        self.by_key.get(tenant)?.get(key).copied()
    }
    #[must_use]
    pub fn stream(&self, no: u64) -> Option<&Stream> {
        self.streams.get(&no)
    }
    /// Every stream that is remembered, oldest first.
    pub fn streams(&self) -> impl Iterator<Item = (u64, &Stream)> {
        self.streams.iter().map(|(no, s)| (*no, s))
    }
    #[must_use]
    pub fn call(&self, id: &CallId) -> Option<(u64, u32)> {
        self.by_call.get(id).copied()
    }
    #[must_use]
    pub fn agent_totals(&self, agent: &str) -> AgentTotals {
        self.agents.get(agent).copied().unwrap_or_default()
    }

    /// Folds one entry.
    ///
    /// # Errors
    /// `Corrupt` when the position or a record doesn't follow from what came before; the state is then useless.
    pub fn apply(&mut self, position: u64, entry: &Entry) -> Result<(), Corrupt> {
        let corrupt = |message: String| Corrupt { position, message };
        if position != self.position + 1 {
            return Err(corrupt(format!("follows position {}", self.position)));
        }
        self.begin(entry.at_ms).map_err(corrupt)?;
        for AnyRecord { record } in &entry.records {
            let Some(record) = record else {
                return Err(corrupt("record kind written by a newer version".into()));
            };
            let output = match record {
                Record::Frame(frame) if frame.lane > 0 => read_output(frame),
                _ => None,
            };
            self.apply_record(record, output).map_err(|e| corrupt(format!("{}: {e}", record.kind())))?;
        }
        self.end();
        Ok(())
    }

    /// Begins an entry at a logged time.
    pub(crate) fn begin(&mut self, at_ms: u64) -> Done {
        if at_ms < self.logged_ms {
            return Err(format!("logged time goes back from {} to {at_ms}", self.logged_ms));
        }
        self.logged_ms = at_ms;
        Ok(())
    }

    /// Ends an entry: it has the next position. Forgets what ended long ago.
    pub(crate) fn end(&mut self) {
        self.position += 1;
        while let Some(&(ended_at, no)) = self.ended.front() {
            if ended_at + REMEMBERED_MS >= self.logged_ms {
                break;
            }
            self.ended.pop_front();
            if self.streams.get(&no).is_some_and(Stream::has_open_calls) {
                self.ended.push_back((self.logged_ms, no));
            } else {
                self.forget(no);
            }
        }
    }

    fn forget(&mut self, no: u64) {
        let Some(stream) = self.streams.remove(&no) else { return };
        let key = &stream.accept.key;
        if let Some(ids) = self.by_id.get_mut(&key.tenant) {
            ids.remove(&key.stream);
        }
        if let Some(keys) = self.by_key.get_mut(&key.tenant)
            && keys.get(&stream.accept.idempotency_key) == Some(&no)
        {
            keys.remove(&stream.accept.idempotency_key);
        }
        for call in &stream.calls {
            self.by_call.remove(&key.call(call.reserve.lane));
        }
    }

    /// Folds one record of the entry that was begun.
    pub(crate) fn apply_record(&mut self, record: &Record, output: Option<Output>) -> Done {
        match record {
            Record::Genesis(r) => self.genesis_first(r),
            Record::Epoch(r) => self.epoch_begins(r),
            Record::Window(r) => self.window(r),
            Record::Accept(r) => self.accept(r),
            Record::Deny(r) => self.deny(r),
            Record::Reserve(r) => self.reserve(r),
            Record::Intent(r) => self.intent(r),
            Record::Extend(r) => self.extend(r),
            Record::Settle(r) => self.settle(r),
            Record::Void(r) => self.void(r),
            Record::Adjust(r) => self.adjust(r),
            Record::Close(r) => self.close(r),
            Record::Frame(r) => self.frame(r, output),
            Record::Checkpoint(_) => Ok(()),
        }
    }

    fn genesis_first(&mut self, r: &Genesis) -> Done {
        if self.position != 0 || !self.genesis.log_id.is_empty() {
            return Err("stands behind the first entry".into());
        }
        if r.format > FORMAT {
            return Err(format!("format {} was written by a newer version; this one reads up to {FORMAT}", r.format));
        }
        self.genesis = r.clone();
        Ok(())
    }

    fn epoch_begins(&mut self, r: &Epoch) -> Done {
        if r.log_id != self.genesis.log_id {
            return Err(format!("log id {} is not Genesis's {}", hex(&r.log_id), hex(&self.genesis.log_id)));
        }
        self.epoch = self.position + 1;
        Ok(())
    }

    fn window(&mut self, r: &Window) -> Done {
        let at_ms = self.logged_ms;
        let account = self.accounts.entry(r.account.clone()).or_default();
        let window = account.windows.entry(r.window.clone()).or_default();
        (window.limit, window.ends_ms) = (r.limit, r.ends_ms);
        (account.current, account.per) = (r.window.clone(), r.per.clone());
        let current = &account.current;
        account.windows.retain(|id, w| {
            id == current
                || !Amount::from(w.held).is_zero()
                || w.ends_ms.is_none_or(|ends| ends + REMEMBERED_MS >= at_ms)
        });
        Ok(())
    }

    fn new_stream(&mut self, accept: Accept) -> Result<&mut Stream, String> {
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

    fn accept(&mut self, r: &Accept) -> Done {
        // The client's `control.accepted` is message 1 of its stream.
        self.new_stream(r.clone())?.out_seq = 1;
        Ok(())
    }

    fn deny(&mut self, r: &Deny) -> Done {
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

    fn open_stream(&mut self, key: &Key) -> Result<(u64, &mut Stream), String> {
        let no = self.stream_no(&key.tenant, &key.stream).ok_or_else(|| format!("no stream {}", key.stream))?;
        let stream = self.streams.get_mut(&no).ok_or_else(|| format!("no stream {}", key.stream))?;
        stream.last_at = self.logged_ms;
        Ok((no, stream))
    }

    fn reserve(&mut self, r: &Reserve) -> Done {
        let (at, holds) = (self.logged_ms, &r.calls);
        let (no, stream) = self.open_stream(&r.key)?;
        if stream.is_closed() {
            return Err("behind Close".into());
        }
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
        }
        Ok(())
    }

    fn move_held(&mut self, windows: &[crate::record::WindowRef], from: Amount, to: Amount) -> Done {
        for at in windows {
            let window = self.account_window(&at.account, &at.window)?;
            replace(&mut window.held, from, to).map_err(range)?;
        }
        Ok(())
    }

    fn account_window(&mut self, account: &str, window: &str) -> Result<&mut AccountWindow, String> {
        let found = self.accounts.get_mut(account).and_then(|a| a.windows.get_mut(window));
        found.ok_or_else(|| format!("no window {window} of account {account}"))
    }

    fn intent(&mut self, r: &Intent) -> Done {
        let (at, epoch) = (self.logged_ms, self.epoch);
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        match (call.phase(), &call.intent) {
            (Phase::Reserved, None) => {}
            (Phase::Running, Some(old)) if old.upstream_key == r.upstream_key && old.idempotent_for_ms > 0 => {}
            _ => return Err(format!("lane {} can't be dispatched now", r.lane)),
        }
        call.set_phase(Phase::Running);
        call.intent = Some(Intent { key: Key::default(), ..r.clone() });
        (call.intent_at, call.intent_epoch, call.in_seq) = (at, epoch, 0);
        Ok(())
    }

    fn extend(&mut self, r: &Extend) -> Done {
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

    fn settle(&mut self, r: &Settle) -> Done {
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
        let (windows, agent) = (call.reserve.windows.clone(), call.reserve.agent.clone());
        replace(&mut stream.held, hold, Amount::ZERO).map_err(range)?;
        replace(&mut stream.settled, Amount::ZERO, actual).map_err(range)?;
        if r.ended.out_seq > 0 {
            told(stream, r.ended.out_seq)?;
        }
        for w in &windows {
            let window = self.account_window(&w.account, &w.window)?;
            replace(&mut window.held, hold, Amount::ZERO).map_err(range)?;
            replace(&mut window.settled, Amount::ZERO, actual).map_err(range)?;
        }
        let totals = self.agents.entry(agent).or_default();
        totals.spent_usd_micros =
            totals.spent_usd_micros.checked_add(actual.usd_micros.0).ok_or("amount out of range")?;
        if matches!(r.source(), SourcePb::Reported | SourcePb::Counted) {
            totals.overshoot = Amount::from(totals.overshoot).max(actual.less(hold)).into();
        }
        Ok(())
    }

    fn void(&mut self, r: &Void) -> Done {
        let at = self.logged_ms;
        let (_, stream) = self.open_stream(&r.key)?;
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if !call.is_open() {
            return Err(format!("lane {} has ended", r.lane));
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
        self.move_held(&windows, hold, Amount::ZERO)
    }

    fn adjust(&mut self, r: &Adjust) -> Done {
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
        call.actual = r.actual;
        call.set_source(SourcePb::Reported);
        call.evidence.push(r.evidence.clone());
        let (windows, agent) = (call.reserve.windows.clone(), call.reserve.agent.clone());
        replace(&mut stream.settled, from, to).map_err(range)?;
        for w in &windows {
            // A window that is long over may be forgotten.
            if let Ok(window) = self.account_window(&w.account, &w.window) {
                replace(&mut window.settled, from, to).map_err(range)?;
            }
        }
        let totals = self.agents.entry(agent).or_default();
        let spent = totals.spent_usd_micros.checked_sub(from.usd_micros.0).and_then(|s| s.checked_add(to.usd_micros.0));
        totals.spent_usd_micros = spent.ok_or("amount out of range")?;
        Ok(())
    }

    fn close(&mut self, r: &Close) -> Done {
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
        }
        self.ended.push_back((at, no));
        Ok(())
    }

    fn frame(&mut self, r: &FrameRecord, output: Option<Output>) -> Done {
        let (_, stream) = self.open_stream(&r.key)?;
        if r.lane == 0 {
            if r.cancel {
                stream.cancel = true;
            } else if stream.submit.is_empty() && !stream.is_closed() {
                stream.submit = join(&r.bodies)?;
            }
            return Ok(());
        }
        if r.out_seq > 0 {
            told(stream, r.out_seq)?;
        }
        let closed = stream.is_closed();
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
        let Some(output) = output else { return Ok(()) };
        if output.reported {
            call.reported = Cost::from(call.reported).max(output.cost).into();
        }
        if closed || !call.is_open() {
            return Ok(());
        }
        if let Some(text) = output.text {
            let room = RESULT_TEXT_BYTES_MAX.saturating_sub(call.text.len());
            let cut = floor_char_boundary(&text, room);
            call.truncated |= cut < text.len();
            call.text.push_str(&text[..cut]);
        }
        let room = RESULT_FINDINGS_MAX.saturating_sub(call.findings.len());
        call.truncated |= output.findings.len() > room;
        call.findings.extend(output.findings.into_iter().take(room));
        Ok(())
    }

    // ---- hash, views, checkpoints -----------------------------------------------------------------------------------

    /// SHA-256 over money and keys at this position, the fold's version in front.
    #[must_use]
    pub fn hash(&self) -> String {
        format!("v{FOLD_VERSION}:{}", hex(&self.digest()))
    }

    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let number = |hash: &mut Sha256, n: u64| hash.update(n.to_be_bytes());
        let text = |hash: &mut Sha256, t: &[u8]| {
            hash.update((t.len() as u64).to_be_bytes());
            hash.update(t);
        };
        number(&mut hash, self.position);
        number(&mut hash, self.epoch);
        text(&mut hash, &self.genesis.log_id);
        for (name, account) in &self.accounts {
            text(&mut hash, name.as_bytes());
            text(&mut hash, account.current.as_bytes());
            for (id, w) in &account.windows {
                text(&mut hash, id.as_bytes());
                text(&mut hash, &w.limit.encode_to_vec());
                for n in [w.settled.tokens, w.settled.usd_micros, w.held.tokens, w.held.usd_micros] {
                    number(&mut hash, n);
                }
            }
        }
        for (no, s) in &self.streams {
            number(&mut hash, *no);
            text(&mut hash, &s.accept.encode_to_vec());
            text(&mut hash, s.closed.as_bytes());
            text(&mut hash, s.code.as_bytes());
            text(&mut hash, &s.result_hash);
            text(&mut hash, &s.error);
            for n in [
                s.out_seq,
                u64::from(s.cancel),
                s.settled.tokens,
                s.settled.usd_micros,
                s.held.tokens,
                s.held.usd_micros,
            ] {
                number(&mut hash, n);
            }
            for c in &s.calls {
                text(&mut hash, &c.reserve.encode_to_vec());
                text(&mut hash, &c.intent.as_ref().map(Message::encode_to_vec).unwrap_or_default());
                text(&mut hash, c.ended.as_bytes());
                for money in [&c.actual, &c.booked, &c.reported] {
                    text(&mut hash, &money.encode_to_vec());
                }
                for n in
                    [c.hold.tokens, c.hold.usd_micros, c.in_seq, c.phase as u64, c.source as u64, u64::from(c.extends)]
                {
                    number(&mut hash, n);
                }
                c.evidence.iter().for_each(|e| text(&mut hash, e.as_bytes()));
            }
        }
        hash.finalize().into()
    }

    /// Rows of `accounts`: every window that is current or holds money.
    #[must_use]
    pub fn account_views(&self) -> Vec<AccountView> {
        let mut rows = Vec::new();
        for (name, account) in &self.accounts {
            for (id, w) in &account.windows {
                let level = w.level();
                if *id == account.current || !level.held.is_zero() {
                    rows.push(AccountView {
                        account: name.clone(),
                        per: account.per.clone(),
                        window_id: id.clone(),
                        reset_at: w.ends_ms.map(crate::clock::rfc3339),
                        limit: level.limit,
                        settled: level.settled,
                        held: level.held,
                        remaining: remaining(&level),
                    });
                }
            }
        }
        rows
    }

    /// Figures and hash, for `verify` and `replay --state`.
    #[must_use]
    pub fn verify_view(&self) -> VerifyView {
        VerifyView {
            position: self.position,
            epoch: self.epoch,
            state_hash: self.hash(),
            streams: self.streams.len() as u64,
            open_reservations: self.streams.values().flat_map(|s| &s.calls).filter(|c| c.is_open()).count() as u64,
            accounts: self.account_views(),
        }
    }

    /// The fold up to this position as records, in pieces.
    #[must_use]
    pub fn to_checkpoint(&self, shard: u32) -> Vec<Checkpoint> {
        let image = Image {
            logged_ms: self.logged_ms,
            genesis: self.genesis.clone(),
            accounts: self.accounts.clone(),
            streams: self.streams.clone(),
            agents: self.agents.clone(),
            next_no: self.next_no,
        };
        let data = Bytes::from(image.encode_to_vec());
        let pieces = data.len().div_ceil(PIECE_BYTES).max(1);
        let hash = Bytes::copy_from_slice(&self.digest());
        (0..pieces)
            .map(|i| Checkpoint {
                log_id: self.genesis.log_id.clone(),
                shard,
                position: self.position,
                epoch: self.epoch,
                fold_version: FOLD_VERSION,
                hash: hash.clone(),
                piece: i as u32,
                pieces: pieces as u32,
                data: data.slice(i * PIECE_BYTES..data.len().min((i + 1) * PIECE_BYTES)),
            })
            .collect()
    }

    /// Rebuilds the fold from all pieces of one checkpoint, in order.
    ///
    /// # Errors
    /// `Corrupt` when pieces don't belong together, or the hash differs.
    pub fn from_checkpoint(pieces: &[Checkpoint]) -> Result<Self, Corrupt> {
        let corrupt = |position, message: &str| Corrupt { position, message: format!("checkpoint: {message}") };
        let first = pieces.first().ok_or_else(|| corrupt(0, "no piece"))?;
        let whole = pieces.len() == first.pieces as usize
            && pieces
                .iter()
                .zip(0..)
                .all(|(p, i)| p.piece == i && p.position == first.position && p.hash == first.hash);
        if !whole {
            return Err(corrupt(first.position, "pieces don't belong together"));
        }
        if first.fold_version > FOLD_VERSION {
            return Err(corrupt(first.position, "written by a newer version"));
        }
        let mut data = BytesMut::new();
        pieces.iter().for_each(|p| data.extend_from_slice(&p.data));
        let image = Image::decode(data.freeze()).map_err(|e| corrupt(first.position, &e.to_string()))?;
        let mut state = Self {
            position: first.position,
            epoch: first.epoch,
            logged_ms: image.logged_ms,
            genesis: image.genesis,
            accounts: image.accounts,
            streams: image.streams,
            agents: image.agents,
            next_no: image.next_no,
            ..Self::default()
        };
        state.index();
        if state.digest()[..] != first.hash[..] {
            return Err(corrupt(first.position, "its hash is not its content's"));
        }
        Ok(state)
    }

    fn index(&mut self) {
        let mut ended = Vec::new();
        for (&no, stream) in &self.streams {
            let key = &stream.accept.key;
            self.by_id.entry(key.tenant.clone()).or_default().insert(key.stream.clone(), no);
            if !stream.accept.idempotency_key.is_empty() {
                self.by_key.entry(key.tenant.clone()).or_default().insert(stream.accept.idempotency_key.clone(), no);
            }
            for call in &stream.calls {
                self.by_call.insert(key.call(call.reserve.lane), (no, call.reserve.lane));
            }
            if stream.is_closed() {
                ended.push((stream.ended_at, no));
            }
        }
        ended.sort_unstable();
        self.ended = ended.into();
    }
}

/// What a level leaves, absent where it has no limit.
#[must_use]
pub fn remaining(level: &crate::account::Level) -> Limit {
    let free = level.free();
    Limit {
        tokens: level.limit.tokens.map(|_| free.tokens),
        usd_micros: level.limit.usd_micros.map(|_| free.usd_micros),
    }
}

fn range(_: OutOfRange) -> String {
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

/// What an agent's logged message adds to its lane.
fn read_output(frame: &FrameRecord) -> Option<Output> {
    let content = join(&frame.bodies).ok()?;
    let kind = codec::decode_body(frame.bodies.first()?.clone()).ok()?.kind;
    match &*kind {
        atp_proto::frame::kind::RESULT_PARTIAL => {
            serde_json::from_slice::<AgentPartial>(&content).ok().map(Output::from)
        }
        atp_proto::frame::kind::RESULT_FINAL => serde_json::from_slice::<AgentFinal>(&content).ok().map(Output::from),
        _ => None,
    }
}

fn findings_text(findings: Option<Vec<serde_json::Value>>) -> Vec<String> {
    findings.unwrap_or_default().iter().map(ToString::to_string).collect()
}

impl From<AgentPartial> for Output {
    fn from(p: AgentPartial) -> Self {
        let reported = p.usage_source == UsageSource::Reported;
        Self { text: p.text, findings: findings_text(p.findings), reported, cost: p.cost }
    }
}

impl From<AgentFinal> for Output {
    fn from(f: AgentFinal) -> Self {
        let reported = f.usage_source == UsageSource::Reported;
        Self { text: f.text, findings: findings_text(f.findings), reported, cost: f.cost }
    }
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

//! A ledger of its own, folded from durable records only: S + R + amount within the limit at every Reserve and Extend,
//! in every level and both dimensions. Shares no code with the core's.

use super::Verdict;
use super::grammar;
use super::turn::Turns;
use atp_core::placement::Placement;
use atp_core::record::{
    AgentRecord, AmountPb, AnyRecord, CostPb, Entry, Key, Late, LimitPb, Record, ReserveCall, Shared, SourcePb,
    ToolVerdict,
};
use atp_proto::{CallId, Qos};
use std::collections::{BTreeMap, BTreeSet};

/// Tokens and micro-USD, wide enough never to overflow.
pub type Pair = [i128; 2];

#[must_use]
pub fn amount(a: &AmountPb) -> Pair {
    [a.tokens.into(), a.usd_micros.into()]
}
#[must_use]
pub fn cost(c: &CostPb) -> Pair {
    [i128::from(c.in_tokens) + i128::from(c.out_tokens), c.usd_micros.into()]
}
#[must_use]
pub fn plus(a: Pair, b: Pair) -> Pair {
    [a[0] + b[0], a[1] + b[1]]
}
#[must_use]
pub fn minus(a: Pair, b: Pair) -> Pair {
    [a[0] - b[0], a[1] - b[1]]
}
#[must_use]
pub fn larger(a: Pair, b: Pair) -> Pair {
    [a[0].max(b[0]), a[1].max(b[1])]
}
#[must_use]
pub fn fits(a: Pair, b: Pair) -> bool {
    a[0] <= b[0] && a[1] <= b[1]
}
fn limit(l: &LimitPb) -> Pair {
    let or_none = |v: Option<u64>| v.map_or(i128::MAX / 4, i128::from);
    [or_none(l.tokens), or_none(l.usd_micros)]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Reserved,
    Running,
    Settled,
    Void,
}

/// A call as the durable log tells it.
#[derive(Clone, Debug)]
pub struct Call {
    pub id: CallId,
    pub lane: u32,
    pub retry_of: u32,
    /// It was bought by an escalation.
    pub step: bool,
    pub agent: String,
    pub windows: Vec<(String, String)>,
    pub guarded: Pair,
    pub hold: Pair,
    pub reach: Pair,
    pub phase: Phase,
    pub actual: Pair,
    pub booked: Pair,
    /// The largest step of `booked`.
    pub chunk: Pair,
    pub source: Option<SourcePb>,
    /// Incarnation and upstream key of the newest Intent.
    pub intent: Option<(String, String)>,
    pub dedupes: bool,
    /// How often it was dispatched: more than once only where the upstream dedupes.
    pub intents: u32,
    pub reserved_at: u64,
    pub deadline_ms: u64,
    /// Messages of the newest incarnation that are durable.
    pub in_seq: u64,
    pub evidence: BTreeSet<String>,
    /// What mediated tools cost: in the hold, never in the agent's grant.
    pub tools: Pair,
}

/// A stream as the durable log tells it.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    /// Its place in the order of acceptance, from 1.
    pub no: u64,
    pub limit: Pair,
    pub settled: Pair,
    pub held: Pair,
    pub calls: Vec<Call>,
    pub accepted: bool,
    /// `control.error` of a Deny.
    pub denied: Option<bytes::Bytes>,
    /// Content of the final and of the bill.
    pub closed: Option<(bytes::Bytes, bytes::Bytes)>,
    pub out_seq: u64,
    pub client_seq: u64,
    pub cancelled: bool,
    pub purchases: u32,
    /// No model below this one.
    pub floor: String,
    pub max_parallel: Option<u32>,
    pub qos: u32,
}

impl Stream {
    #[must_use]
    pub fn call(&self, lane: u32) -> Option<&Call> {
        self.calls.iter().find(|c| c.lane == lane)
    }
    pub fn call_mut(&mut self, lane: u32) -> Option<&mut Call> {
        self.calls.iter_mut().find(|c| c.lane == lane)
    }
}

#[derive(Clone, Debug, Default)]
pub struct Window {
    pub limit: Pair,
    pub ends_ms: Option<u64>,
    pub settled: Pair,
    pub held: Pair,
    /// What other shards may spend of it.
    pub lent: Pair,
    /// The highest that the limit ever was.
    pub limit_max: Pair,
}

/// How often what is rare happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    pub denials: u64,
    pub retries: u64,
    pub repeats: u64,
    pub extends: u64,
    /// Extends of a call whose window had rolled.
    pub extends_behind: u64,
    pub adjusts: u64,
    pub checkpoints: u64,
    pub cancels: u64,
    pub preempted: u64,
    /// Mediated tools that were allowed.
    pub tools: u64,
    /// Calls whose estimate the agent gave when it was asked.
    pub preflights: u64,
    /// Calls whose estimate is of earlier runs.
    pub learned: u64,
    /// Steps down a ladder, and steps of an escalation.
    pub downgrades: u64,
    pub escalations: u64,
}

impl Seen {
    pub fn add(&mut self, o: &Self) {
        self.denials += o.denials;
        self.retries += o.retries;
        self.repeats += o.repeats;
        self.extends += o.extends;
        self.extends_behind += o.extends_behind;
        self.adjusts += o.adjusts;
        self.checkpoints += o.checkpoints;
        self.cancels += o.cancels;
        self.preempted += o.preempted;
        self.tools += o.tools;
        self.preflights += o.preflights;
        self.learned += o.learned;
        self.downgrades += o.downgrades;
        self.escalations += o.escalations;
    }
}

#[derive(Debug, Default)]
pub struct Ledger {
    pub seen: Seen,
    pub position: u64,
    pub at_ms: u64,
    pub epoch: u64,
    pub log_id: bytes::Bytes,
    pub streams: BTreeMap<Key, Stream>,
    pub by_call: BTreeMap<CallId, (Key, u32)>,
    pub windows: BTreeMap<(String, String), Window>,
    pub(super) current: BTreeMap<String, String>,
    /// This shard.
    pub no: u32,
    pub(super) placement: Placement,
    /// Shares that aren't back, by (true: lent, false: held), the other shard and number.
    pub open_shares: BTreeMap<(bool, u32, u64), Shared>,
    pub(super) numbers: BTreeMap<(bool, u32), u64>,
    /// Adjusts whose share was gone, ever and as long as their home may not know.
    pub lates: BTreeMap<String, Late>,
    pub lates_open: BTreeSet<String>,
    /// As home: evidence of such Adjusts.
    pub counted: BTreeSet<String>,
    /// Open calls of each account.
    pub open: BTreeMap<String, u32>,
    pub turns: Turns,
    accepted: u64,
    /// How each agent stood, by handle, in order.
    pub standings: BTreeMap<String, Vec<AgentRecord>>,
}

impl Ledger {
    #[must_use]
    pub fn of(no: u32, placement: Placement) -> Self {
        Self { no, placement, ..Self::default() }
    }
    #[must_use]
    pub fn call(&self, id: &CallId) -> Option<&Call> {
        let (key, lane) = self.by_call.get(id)?;
        self.streams.get(key)?.call(*lane)
    }
    #[must_use]
    pub fn stream(&self, tenant: &str, stream: &str) -> Option<&Stream> {
        self.streams.get(&Key { tenant: tenant.into(), stream: stream.into() })
    }
    /// How an agent stands.
    #[must_use]
    pub fn standing(&self, agent: &str) -> Option<&AgentRecord> {
        self.standings.get(agent)?.last()
    }
    /// Calls that hold money.
    pub fn open_calls(&self) -> impl Iterator<Item = &Call> {
        self.streams.values().flat_map(|s| &s.calls).filter(|c| matches!(c.phase, Phase::Reserved | Phase::Running))
    }

    /// Calls that count in an account's window.
    pub fn calls_in(&self, at: &(String, String)) -> impl Iterator<Item = &Call> {
        self.streams.values().flat_map(|s| &s.calls).filter(move |c| c.windows.contains(at))
    }

    pub fn apply(&mut self, position: u64, entry: &Entry, verdict: &mut Verdict) {
        verdict.expect(position == self.position + 1, "one order without a hole", || {
            format!("entry {position} follows {}", self.position)
        });
        // Who takes a log over writes its Epoch before it has read what time it is there.
        let takes_over = matches!(&entry.records[..], [AnyRecord { record: Some(Record::Epoch(_)) }]);
        let at_ms = if takes_over { entry.at_ms.max(self.at_ms) } else { entry.at_ms };
        verdict.expect(at_ms >= self.at_ms, "logged time never goes back", || {
            format!("{} follows {} at {position}", entry.at_ms, self.at_ms)
        });
        (self.position, self.at_ms) = (position, at_ms);
        for any in &entry.records {
            let Some(record) = &any.record else {
                return verdict.fail("replay halts nowhere", || format!("empty record at {position}"));
            };
            if let Err(text) = grammar::record(self, record) {
                return verdict.fail("grammar per key", || format!("{} at {position}: {text}", record.kind()));
            }
            self.fold(record, verdict);
        }
    }

    fn fold(&mut self, record: &Record, verdict: &mut Verdict) {
        match record {
            Record::Genesis(r) => self.log_id = r.log_id.clone(),
            Record::Epoch(_) => {
                self.epoch = self.position;
                self.turns.forget();
            }
            Record::Window(r) => {
                let window = self.windows.entry((r.account.clone(), r.window.clone())).or_default();
                (window.limit, window.ends_ms) = (limit(&r.limit), r.ends_ms);
                window.limit_max = larger(window.limit_max, window.limit);
                self.current.insert(r.account.clone(), r.window.clone());
            }
            Record::Accept(r) => {
                self.accepted += 1;
                let stream = self.streams.entry(r.key.clone()).or_default();
                stream.no = self.accepted;
                (stream.accepted, stream.limit, stream.out_seq) = (true, limit(&r.limit), 1);
                (stream.max_parallel, stream.qos) = (r.max_parallel, r.qos);
                stream.floor = r.floor.clone();
            }
            Record::Deny(r) => {
                self.seen.denials += 1;
                self.streams.entry(r.key.clone()).or_default().denied = Some(r.error.clone());
            }
            Record::Reserve(r) => {
                for call in &r.calls {
                    self.seen.retries += u64::from(call.retry_of > 0);
                    self.seen.preflights += u64::from(call.source == "preflight");
                    self.seen.learned += u64::from(call.source == "statistics");
                    self.seen.escalations += u64::from(call.rule.starts_with("escalation"));
                    let down = call.rule.contains("downgrade: ");
                    self.seen.downgrades += u64::from(down);
                    let floor = self.streams.get(&r.key).is_some_and(|s| s.floor == "middle");
                    let below = down && floor && call.model.contains("cheap");
                    verdict
                        .expect(!below, "no step goes below a floor", || format!("{} ran {}", call.agent, call.model));
                    self.reserve(&r.key, call, verdict);
                }
                if let Some(stream) = self.streams.get_mut(&r.key) {
                    stream.purchases += 1;
                }
            }
            Record::Intent(r) => {
                self.seen.repeats += u64::from(self.call_mut(&r.key, r.lane).is_some_and(|c| c.intents > 0));
                if let Some(call) = self.call_mut(&r.key, r.lane) {
                    call.phase = Phase::Running;
                    call.intent = Some((r.incarnation.clone(), r.upstream_key.clone()));
                    call.reach = amount(&r.reach);
                    call.dedupes = r.idempotent_for_ms > 0;
                    call.in_seq = 0;
                    call.intents += 1;
                }
                self.begins_anew(&r.key, r.lane);
            }
            Record::Extend(r) => self.extend(&r.key, r.lane, amount(&r.hold), verdict),
            Record::Settle(r) => {
                let source = r.source();
                if let Some(call) = self.call_mut(&r.key, r.lane) {
                    let worst = larger(plus(call.booked, call.tools), plus(call.hold, call.reach));
                    if matches!(source, SourcePb::UnknownAtHold | SourcePb::Expired) {
                        verdict.expect(cost(&r.actual) == worst, "unknown settles at hold + reach", || {
                            format!("{} settled at {:?}, hold + reach is {worst:?}", call.id, cost(&r.actual))
                        });
                    }
                    call.source = Some(source);
                }
                self.end(&r.key, r.lane, Phase::Settled, cost(&r.actual));
                self.told(&r.key, r.ended.out_seq);
            }
            Record::Void(r) => {
                self.end(&r.key, r.lane, Phase::Void, [0, 0]);
                self.told(&r.key, r.ended.out_seq);
            }
            Record::Adjust(r) => {
                let to = cost(&r.actual);
                self.seen.adjusts += 1;
                let Some(call) = self.call_mut(&r.key, r.lane) else { return };
                let (from, windows) = (call.actual, call.windows.clone());
                call.actual = to;
                call.evidence.insert(r.evidence.clone());
                if let Some(stream) = self.streams.get_mut(&r.key) {
                    stream.settled = plus(stream.settled, minus(to, from));
                }
                let evidence = format!("{}:{}", r.key.call(r.lane), r.evidence);
                for at in windows {
                    self.adjusted(at, evidence.clone(), from, to);
                }
            }
            Record::Close(r) => {
                self.told(&r.key, r.out_seq + 1);
                self.seen.preempted += u64::from(r.code == "EPREEMPT");
                if let Some(stream) = self.streams.get_mut(&r.key) {
                    if r.code == "EPREEMPT" && stream.qos == Qos::Gold as u32 {
                        verdict.fail("gold never gives way", || format!("{} is gold", r.key.stream));
                    }
                    stream.closed = Some((r.result.clone(), r.bill.clone()));
                }
            }
            Record::Frame(r) => {
                self.told(&r.key, r.out_seq);
                let Some(stream) = self.streams.get_mut(&r.key) else {
                    // The submit's own frame may stand in front of its Accept.
                    self.streams.entry(r.key.clone()).or_default().client_seq = r.msg_seq;
                    return;
                };
                self.seen.cancels += u64::from(r.cancel);
                if r.lane == 0 {
                    stream.client_seq = stream.client_seq.max(r.msg_seq);
                    stream.cancelled |= r.cancel;
                } else if let Some(call) = stream.call_mut(r.lane) {
                    call.in_seq = call.in_seq.max(r.msg_seq);
                    if let Some(booked) = &r.booked {
                        let now = cost(booked);
                        call.chunk = larger(call.chunk, minus(now, call.booked));
                        call.booked = now;
                        self.look_for_shortage(&r.key, r.lane);
                    }
                }
            }
            Record::Tool(r) if r.verdict() == ToolVerdict::Allowed => {
                let cost = amount(&r.cost);
                self.seen.tools += 1;
                let Some(call) = self.call_mut(&r.key, r.lane) else { return };
                call.tools = plus(call.tools, cost);
                let to = plus(call.hold, cost);
                self.grow(&r.key, r.lane, to, verdict);
            }
            Record::Tool(_) => {}
            Record::Share(r) => self.share(r, verdict),
            Record::ShareIn(r) => self.share_in(r, verdict),
            Record::ShareOut(r) => self.share_out(r, verdict),
            Record::ShareBack(r) => self.share_back(r, verdict),
            Record::ShareLate(r) => self.share_late(r, verdict),
            Record::Faster(_) => {}
            Record::Checkpoint(_) => self.seen.checkpoints += 1,
            // No money moves with it.
            Record::Tier(_) => {}
            Record::Agent(r) => {
                self.standings.entry(r.agent.clone()).or_default().push(r.clone());
            }
        }
    }

    fn call_mut(&mut self, key: &Key, lane: u32) -> Option<&mut Call> {
        self.streams.get_mut(key)?.call_mut(lane)
    }

    fn told(&mut self, key: &Key, out_seq: u64) {
        if let Some(stream) = self.streams.get_mut(key) {
            stream.out_seq = stream.out_seq.max(out_seq);
        }
    }

    fn reserve(&mut self, key: &Key, r: &ReserveCall, verdict: &mut Verdict) {
        let hold = amount(&r.hold);
        let id = key.call(r.lane);
        let windows: Vec<_> = r.windows.iter().map(|w| (w.account.clone(), w.window.clone())).collect();
        for w in &r.windows {
            let home = self.is_home(&w.account);
            verdict.expect(home != w.shared, "only the home spends without a share", || format!("{id} in {w:?}"));
            *self.open.entry(w.account.clone()).or_default() += 1;
        }
        verdict.expect(!windows.is_empty(), "a hold stands in every level", || format!("{id} names no account"));
        for at in &windows {
            verdict.expect(self.current.get(&at.0) == Some(&at.1), "a rolled window is closed for Reserve", || {
                format!("{id} reserved in {at:?}, current is {:?}", self.current.get(&at.0))
            });
            let window = self.windows.entry(at.clone()).or_default();
            let ended = window.ends_ms.is_some_and(|ends| self.at_ms >= ends);
            verdict.expect(!ended, "a rolled window is closed for Reserve", || {
                format!("{id} reserved in {at:?} after its end")
            });
            within("window", window.settled, plus(window.held, window.lent), hold, window.limit, id, verdict);
            window.held = plus(window.held, hold);
        }
        let at_ms = self.at_ms;
        let Some(stream) = self.streams.get_mut(key) else { return };
        within("stream", stream.settled, stream.held, hold, stream.limit, id, verdict);
        stream.held = plus(stream.held, hold);
        stream.calls.push(Call {
            id,
            lane: r.lane,
            retry_of: r.retry_of,
            step: r.rule.starts_with("escalation"),
            agent: r.agent.clone(),
            windows,
            guarded: amount(&r.guarded),
            hold,
            reach: [0, 0],
            phase: Phase::Reserved,
            actual: [0, 0],
            booked: [0, 0],
            chunk: [0, 0],
            source: None,
            intent: None,
            dedupes: false,
            intents: 0,
            reserved_at: at_ms,
            deadline_ms: r.deadline_ms,
            in_seq: 0,
            evidence: BTreeSet::new(),
            tools: [0, 0],
        });
        self.by_call.insert(id, (key.clone(), r.lane));
    }

    fn extend(&mut self, key: &Key, lane: u32, to: Pair, verdict: &mut Verdict) {
        self.seen.extends += 1;
        self.grow(key, lane, to, verdict);
        self.takes_its_turn(key, lane, verdict);
    }

    fn grow(&mut self, key: &Key, lane: u32, to: Pair, verdict: &mut Verdict) {
        let Some(call) = self.call_mut(key, lane) else { return };
        let (id, from, windows) = (call.id, call.hold, call.windows.clone());
        let more = minus(to, from);
        verdict.expect(more[0] >= 0 && more[1] >= 0, "a hold only grows", || format!("{id} from {from:?} to {to:?}"));
        call.hold = to;
        let behind = windows.iter().any(|(account, window)| self.current.get(account) != Some(window));
        self.seen.extends_behind += u64::from(behind);
        for at in windows {
            let window = self.windows.entry(at).or_default();
            within("window", window.settled, plus(window.held, window.lent), more, window.limit, id, verdict);
            window.held = plus(window.held, more);
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        within("stream", stream.settled, stream.held, more, stream.limit, id, verdict);
        stream.held = plus(stream.held, more);
    }

    fn end(&mut self, key: &Key, lane: u32, phase: Phase, actual: Pair) {
        let Some(call) = self.call_mut(key, lane) else { return };
        let (hold, windows) = (call.hold, call.windows.clone());
        (call.phase, call.actual) = (phase, actual);
        for at in windows {
            *self.open.entry(at.0.clone()).or_default() -= 1;
            let window = self.windows.entry(at).or_default();
            window.held = minus(window.held, hold);
            window.settled = plus(window.settled, actual);
        }
        let Some(stream) = self.streams.get_mut(key) else { return };
        stream.held = minus(stream.held, hold);
        stream.settled = plus(stream.settled, actual);
        self.look_for_shortage(key, lane);
    }
}

fn within(level: &str, settled: Pair, held: Pair, more: Pair, limit: Pair, id: CallId, verdict: &mut Verdict) {
    for (i, dimension) in ["tokens", "micro-USD"].iter().enumerate() {
        // What adds nothing in a dimension can't overspend it.
        verdict.expect(more[i] == 0 || settled[i] + held[i] + more[i] <= limit[i], "S + R + amount <= L", || {
            format!(
                "{id}, {level}, {dimension}: {} settled + {} held + {} > {}",
                settled[i], held[i], more[i], limit[i]
            )
        });
    }
}

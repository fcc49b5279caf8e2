//! A call's money while it runs and when it ends: slices, settlement, void, adjust, and what is booked for which tokens.

use super::lane::COUNTED_UP_PPM;
use super::{Shard, Timer};
use crate::estimate::CALL_AMOUNT_MAX;
use crate::message::{LogRoom, Metric, Outcome, ToAgent};
use crate::price::Price;
use crate::record::{Adjust, Ended, Extend, ProofPb, Record, Settle, SourcePb, Tier, Void};
use crate::said::Said;
use crate::statistics::{Learned, Statistics, day_of};
use crate::stream::{Call, Phase};
use atp_proto::content::BudgetUpdate;
use atp_proto::frame::{Flags, kind};
use atp_proto::{AgentName, Amount, CallId, Code, Cost, Frame, Tokens, UsdMicros};
use std::sync::Arc;

impl Shard {
    /// Extends a running call's hold when what is left of its grant is below one slice; oldest call first.
    pub(super) fn extend(&mut self, no: u64, lane: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Running) else { return };
        let stopping = self.live.get(&no).is_none_or(|l| l.stopping.is_some());
        if stopping || !call.intent.as_ref().is_some_and(|i| i.slices) {
            if let Some(book) = self.books.get_mut(&stream.accept.account) {
                book.starved.remove(&(no, lane));
            }
            return;
        }
        let (hold, guarded) = (call.hold(), Amount::from(call.reserve.guarded));
        let Ok(spent) = call.booked().amount().and_then(|spent| with_margin(call, spent)) else { return };
        let (left, chunk) = (call.grant().less(spent), Amount::from(call.largest_chunk));
        let tools = call.tool_cost();
        let slice = |guarded: u64, chunk: u64| guarded.div_ceil(4).max(chunk.saturating_mul(4));
        let slice =
            Amount::new(slice(guarded.tokens.0, chunk.tokens.0), slice(guarded.usd_micros.0, chunk.usd_micros.0));
        let wanted = Amount::new(
            if left.tokens < slice.tokens { slice.tokens.0 } else { 0 },
            if left.usd_micros < slice.usd_micros { slice.usd_micros.0 } else { 0 },
        );
        let at = (no, lane);
        // What the task's own budget has no room for is nobody else's to wait for.
        let useful = wanted.min(stream.level().free());
        if useful.is_zero() {
            if let Some(book) = self.books.get_mut(&stream.accept.account) {
                book.starved.remove(&at);
            }
            return;
        }
        let account = stream.accept.account.clone();
        let levels = self.levels(stream, &call.reserve.windows);
        let purse = call.reserve.windows.iter().find(|w| w.shared).map(|w| w.window.clone());
        let shared = purse.is_some() || self.has_lent(&account);
        let (key, id, counting) = (stream.accept.key.clone(), stream.call_id(lane), margin_ppm(call));
        let window = call.reserve.windows.first().map_or_else(String::new, |w| w.window.clone());
        let older = self.books.get(&account).is_some_and(|b| b.starves(&window, Some(at)));
        let free = levels.iter().map(crate::account::Level::free).reduce(Amount::min).unwrap_or_default();
        let blocked = older || self.room > LogRoom::Enough;
        let given = if blocked { Amount::ZERO } else { useful.min(free) };
        let book = self.books.entry(account.clone()).or_default();
        let lacks = useful.less(given);
        match lacks.is_zero() {
            true => book.starved.remove(&at),
            false => book.starved.insert(at, (window, lacks)),
        };
        if !lacks.is_zero() {
            self.starved_again_later(&account);
            if !blocked {
                self.seeks(&account, purse.as_deref().unwrap_or_default(), self.place(no), lacks);
            }
        }
        let Ok(total) = hold.add(given) else { return };
        if given.is_zero() {
            return;
        }
        self.record(Record::Extend(Extend { key, lane, hold: total.into() }));
        self.note_short(no, lane);
        // No more will come where nobody else holds what could come back.
        let last = !wanted.fits(given)
            && !shared
            && levels.iter().any(|l| l.held == hold && !wanted.less(given).fits(l.free().less(given)));
        let update = BudgetUpdate {
            call_id: id,
            shard: self.settings.shard,
            epoch: self.epoch,
            grant: within_margin(total.less(tools), counting),
            last,
        };
        self.pass(id, Frame::json(id.to_string(), 0, Flags::NONE, kind::BUDGET_UPDATE, &update));
    }
    /// Proof that the newest dispatch had no effect. It says nothing of an earlier one with the same upstream key: such a call
    /// is tried again while its upstream dedupes, else its outcome is unknown.
    pub(super) fn disproved(&mut self, no: u64, lane: u32, proof: ProofPb, how: &str) {
        match self.state.stream(no).and_then(|s| s.call(lane)).is_some_and(|c| c.intents > 1) {
            true => self.lost(no, lane),
            false => self.void(no, lane, proof, how),
        }
    }

    pub(super) fn void(&mut self, no: u64, lane: u32, proof: ProofPb, how: &str) {
        let Some(stream) = self.state.stream(no) else { return };
        let told = stream.call(lane).is_some_and(|c| c.intent.is_some());
        let (key, id) = (stream.accept.key.clone(), stream.call_id(lane));
        let agent = stream.call(lane).map_or_else(|| AgentName::new(""), Call::agent);
        let out_seq = if told { self.next_out(no) } else { 0 };
        let stream_id = key.stream.clone();
        let ended = Ended { how: how.into(), out_seq };
        self.record(Record::Void(Void { key, lane, proof: proof as i32, ended }));
        if out_seq > 0 {
            let frame = Said::default().to_client(&stream_id, out_seq, id, &agent, Cost::default(), Some(how));
            self.tell(no, frame);
        }
        self.ended(no, lane, id, &agent);
    }

    pub(super) fn settle_unknown(&mut self, no: u64, lane: u32, source: SourcePb, how: &str) {
        self.settle_at_worst(no, lane, source, how, &Said::default());
    }

    /// Settles at hold + reach (its tools stand in the hold): what a lost call may have cost. `said` is the last it let be known.
    pub(super) fn settle_at_worst(&mut self, no: u64, lane: u32, source: SourcePb, how: &str, said: &Said) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)).filter(|c| c.phase() == Phase::Running)
        else {
            return;
        };
        let reach = call.intent.as_ref().map(|i| Amount::from(i.reach)).unwrap_or_default();
        let (booked, worst) = (call.booked(), call.grant().add(reach).unwrap_or(call.grant()));
        let actual = Cost {
            in_tokens: booked.in_tokens,
            out_tokens: booked.out_tokens.max(worst.tokens.less(booked.in_tokens)),
            usd_micros: booked.usd_micros.max(worst.usd_micros),
        };
        self.settle(no, lane, actual, 0, source, how, 0, said);
    }

    #[allow(clippy::too_many_arguments, reason = "one Settle record, field by field")]
    pub(super) fn settle(
        &mut self,
        no: u64,
        lane: u32,
        actual: Cost,
        stated: u64,
        source: SourcePb,
        how: &str,
        confidence: u32,
        said: &Said,
    ) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane) else { return };
        let (key, id, agent) = (stream.accept.key.clone(), stream.call_id(lane), call.agent());
        let actual = call.with_tools(actual);
        let reach = call.intent.as_ref().map(|i| Amount::from(i.reach)).unwrap_or_default();
        let worst = call.hold().add(reach).unwrap_or(call.hold());
        let breach = actual.amount().is_ok_and(|actual| !actual.fits(worst)).then(|| Metric::Breach {
            agent: agent.clone(),
            usd_micros: actual.usd_micros.less(worst.usd_micros).0,
            tokens: actual.amount().unwrap_or_default().tokens.less(worst.tokens).0,
        });
        let metric = Metric::Settled {
            account: stream.tenant(),
            agent: agent.clone(),
            model: call.reserve.model.as_str().into(),
            usd_micros: actual.usd_micros.0,
            in_tokens: actual.in_tokens.0,
            out_tokens: actual.out_tokens.0,
            estimated_usd_micros: call.reserve.mean.usd_micros,
            duration_ms: self.clock.logged_ms().saturating_sub(call.intent_at),
        };
        let out_seq = self.next_out(no);
        let stream_id = key.stream.clone();
        self.record(Record::Settle(Settle {
            key,
            lane,
            actual: actual.into(),
            stated_usd_micros: stated,
            source: source as i32,
            ended: Ended { how: how.into(), out_seq },
            confidence_ppm_plus_1: confidence,
        }));
        self.judge_tier(&agent);
        self.metric(metric);
        if let Some(breach) = breach {
            self.metric(breach);
        }
        if out_seq > 0 {
            self.tell(no, said.to_client(&stream_id, out_seq, id, &agent, actual, Some(how)));
        }
        self.ended(no, lane, id, &agent);
    }

    /// The call's hold is back: its slot, its account, its stream.
    pub(super) fn ended(&mut self, no: u64, lane: u32, id: CallId, agent: &AgentName) {
        if let Some(live) = self.calls.get(&id) {
            let outcome = self.outcome(no, lane, live.congested);
            self.flies(id, false);
            let message = ToAgent::Ended { shard: self.settings.shard, epoch: self.epoch, call: id, outcome };
            self.tell_agent(agent, message);
        } else {
            self.give_back(agent, id);
        }
        if let Some(live) = self.calls.remove(&id) {
            self.timers.remove(&(live.due, Timer::Call(id)));
        }
        self.note_short(no, lane);
        let account = self.state.stream(no).map(|s| s.accept.account.clone()).unwrap_or_default();
        // First the next lane of the same task, in the same entry; then whoever waits.
        self.advance(no);
        self.money_returned(&account);
        self.account_metric(&account);
    }

    /// What the end of a call says of its agent.
    fn outcome(&self, no: u64, lane: u32, congested: bool) -> Outcome {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return Outcome::Unknown };
        let latency_ms = self.clock.logged_ms().saturating_sub(call.intent_at);
        match (call.ended.as_str(), call.phase()) {
            ("complete" | "grant", _) => {
                let actual = Cost::from(call.actual).amount().unwrap_or_default();
                let over_ppm = over_ppm(actual, call.reserve.guarded.into());
                Outcome::Done { latency_ms, over_ppm, congested }
            }
            ("cancelled", _) => Outcome::Unknown,
            (code, phase) => match Code::parse(code) {
                Some(Code::WindowAgent | Code::Draining) => {
                    let until = self.seats.get(&call.agent()).map_or(0, |s| s.skip_until);
                    Outcome::Refused { retry_after_ms: until.saturating_sub(self.now_ms) }
                }
                Some(Code::Auth) => Outcome::Failed,
                // The dispatch never left, or the provider found fault with what it was asked.
                _ if phase == Phase::Void && call.proof() != ProofPb::NotCalled => Outcome::Unknown,
                Some(_) | None => Outcome::Failed,
            },
        }
    }

    /// A later and better figure for a settled call: once.
    pub(super) fn adjust(&mut self, no: u64, lane: u32, actual: Cost, source: SourcePb, complete: bool) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(call) = stream.call(lane).filter(|c| c.phase() == Phase::Settled) else { return };
        let evidence = "final".to_owned();
        // A call that was settled by its own final has had its say.
        let guessed = matches!(call.source(), SourcePb::UnknownAtHold | SourcePb::Expired);
        if !guessed || call.evidence.contains(&evidence) {
            return;
        }
        let key = stream.accept.key.clone();
        let account = stream.accept.account.clone();
        let actual = call.with_tools(actual);
        let (actual, source) = (actual.into(), source as i32);
        let agent = call.agent();
        let late = format!("{}:{evidence}", key.call(lane));
        self.record(Record::Adjust(Adjust { key, lane, evidence, actual, source, complete }));
        self.tell_late(&late);
        self.judge_tier(&agent);
        self.money_returned(&account);
    }

    /// What is known of agents: by this shard, or by all of this router.
    pub(super) fn statistics(&self) -> &Statistics {
        self.learned.as_deref().unwrap_or_else(|| self.state.statistics())
    }

    /// Other shards of this router have learned something too. An agent's home judges by it.
    pub(super) fn learned(&mut self, statistics: Arc<Statistics>) {
        let ours: Vec<AgentName> = statistics.agents().map(|(name, _)| AgentName::new(name)).collect();
        self.learned = Some(statistics);
        ours.iter().for_each(|agent| self.judge_tier(agent));
    }

    /// Repeated underestimation lowers an agent's QoS tier; good estimates raise it again. Its home shard judges.
    fn judge_tier(&mut self, agent: &AgentName) {
        if !self.is_home_of_agent(agent) {
            return;
        }
        let today = day_of(self.clock.logged_ms());
        let Some(standing) = self.statistics().agent(agent.as_str()).map(Learned::standing) else { return };
        let Some(tier) = standing.due(today) else { return };
        if self.tier(agent) == tier {
            // It stands in the log, and isn't known to all yet.
            return;
        }
        let errors = standing.errors(today);
        let name = agent.as_str().into();
        let tier = tier as u32;
        self.record(Record::Tier(Tier { agent: name, tier, runs: errors.runs, under_ppm: errors.under_ppm }));
        self.tier_metric(agent);
    }

    pub(super) fn tier_metric(&mut self, agent: &AgentName) {
        if self.is_home_of_agent(agent) {
            let tier = self.tier(agent);
            self.metric(Metric::AgentTier { agent: agent.clone(), tier });
        }
    }

    pub(super) fn account_metric(&mut self, account: &str) {
        let home = self.is_home(account);
        let found = self.state.accounts.get(account).and_then(|found| found.windows.get(&found.current));
        // Shares that are all given back leave nothing behind.
        let Some(window) = found.cloned().or_else(|| (!home).then(|| self.purse_now(account).0)) else { return };
        let level = window.level();
        // What a holder may spend of its shares is left of the account too, where that has a limit.
        let limited = level.limit.usd_micros.is_some() && self.shown_window(account).limit.usd_micros.is_some();
        let remaining = limited.then(|| level.free().usd_micros.0);
        let ahead = self.pace(account).map(|(_, pace)| pace.is_ahead(self.clock.logged_ms()));
        if ahead == Some(true) {
            self.pace_timer(account);
        }
        let account = atp_proto::TenantId::new(account);
        self.metric(Metric::Account {
            account,
            held_usd_micros: window.held.usd_micros,
            remaining_usd_micros: remaining,
            limit_usd_micros: level.limit.usd_micros.map(|usd| usd.0),
            ahead_of_pace: ahead,
        });
    }
}

/// How far an actual lies above its guarded estimate, in the dimension where that is more. Without an estimate in a
/// dimension nothing is above it.
fn over_ppm(actual: Amount, guarded: Amount) -> u64 {
    let over = |actual: u64, guarded: u64| {
        let above = u128::from(actual.saturating_sub(guarded)) * 1_000_000;
        above.checked_div(u128::from(guarded)).map_or(0, |ppm| u64::try_from(ppm).unwrap_or(u64::MAX))
    };
    over(actual.tokens.0, guarded.tokens.0).max(over(actual.usd_micros.0, guarded.usd_micros.0))
}

/// The price of the tokens at the Reserve's price version, rounded up once; never less than what the agent says.
pub(super) fn priced(call: &Call, tokens: Cost) -> UsdMicros {
    let price =
        Price { in_usd_micros_per_mtok: call.reserve.in_price, out_usd_micros_per_mtok: call.reserve.out_price };
    let own = price.cost(tokens.in_tokens, tokens.out_tokens).unwrap_or(UsdMicros(CALL_AMOUNT_MAX));
    own.max(tokens.usd_micros).min(UsdMicros(CALL_AMOUNT_MAX))
}

/// The running total that is booked for a chunk: totals never fall.
pub(super) fn booked(call: &Call, stated: Cost) -> Cost {
    let total = call.booked().max(stated);
    Cost { usd_micros: priced(call, total), ..total }
}

fn margin_ppm(call: &Call) -> u64 {
    call.intent.as_ref().map_or(0, |i| i.margin_ppm)
}

fn within_margin(amount: Amount, margin_ppm: u64) -> Amount {
    let unlimited = |whole: bool, part| if whole { u64::MAX } else { part };
    Amount::new(
        unlimited(amount.tokens == Tokens::MAX, amount.tokens.within_margin(margin_ppm).0),
        unlimited(amount.usd_micros == UsdMicros::MAX, amount.usd_micros.within_margin(margin_ppm).0),
    )
}

/// What an agent is told that it may spend of an amount: less where it counts, for what is booked on top of its count.
pub(super) fn told(call: &Call, amount: Amount) -> Amount {
    within_margin(amount, margin_ppm(call))
}

/// What a count stands for.
pub(super) fn with_margin(call: &Call, counted: Amount) -> Result<Amount, atp_proto::money::OutOfRange> {
    let up = 1_000_000 + margin_ppm(call);
    Ok(Amount { tokens: counted.tokens.scale_ppm_up(up)?, usd_micros: counted.usd_micros.scale_ppm_up(up)? })
}

/// The end of a call whose provider reported usage.
pub(super) fn reported(call: &Call, stated: Cost) -> Cost {
    let total = Cost::from(call.reported).max(stated);
    Cost { usd_micros: priced(call, total), ..total }
}

/// The end of a call whose usage was counted: booked up until a report adjusts it.
pub(super) fn counted_up(call: &Call, stated: Cost) -> Cost {
    let most = |n: u64| n.min(CALL_AMOUNT_MAX);
    let up = 1_000_000 + call.intent.as_ref().map_or(COUNTED_UP_PPM, |i| i.counted_up_ppm);
    let total = booked(call, stated);
    Cost {
        in_tokens: Tokens(most(total.in_tokens.scale_ppm_up(up).unwrap_or(total.in_tokens).0)),
        out_tokens: Tokens(most(total.out_tokens.scale_ppm_up(up).unwrap_or(total.out_tokens).0)),
        usd_micros: UsdMicros(most(total.usd_micros.scale_ppm_up(up).unwrap_or(total.usd_micros).0)),
    }
}

//! Slots, and the one entry that holds the money of all lanes when the first slot is there.
//! Slot first, then money; Extend goes before Reserve.

use super::choice::{Request, price_rule};
use super::lane::LiveCall;
use super::offer::{Fit, Offer, stream_qos};
use super::preflight::Estimates;
use super::{Shard, Timer};
use crate::message::{LogRoom, Metric, ToAgent};
use crate::record::{Record, Reserve, ReserveCall};
use crate::stream::Phase;
use atp_proto::{AgentName, Amount, CallId, WireError};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Agents that are asked for the slot of a single lane; the first one wins.
const ASKED_MAX: usize = 3;
/// A slot of an agent that isn't the best is kept this long for one of a better rank, in milliseconds.
const CHOICE_MS: u64 = 2;

/// What a stream asks slots for before it has bought anything.
pub(super) struct Bid {
    offers: Vec<Offer>,
    /// True: one lane, several agents asked for it.
    either: bool,
    /// True: there was money for all lanes when they were asked.
    whole: bool,
    /// The best slot so far, while one of a better rank may still come: which offer, of which process.
    lent: Option<(usize, Arc<str>, Arc<str>)>,
}

impl Shard {
    pub(super) fn is_asking(&self, no: u64) -> bool {
        self.live.get(&no).is_some_and(|l| l.stopping.is_none())
            && self
                .state
                .stream(no)
                .is_some_and(|s| s.calls.is_empty() || s.calls.iter().any(|c| c.phase() == Phase::Reserved))
    }

    /// The repeat: lanes that are owed, then slots that are missing.
    pub(super) fn ask_again(&mut self, no: u64) {
        let Some(live) = self.live.get(&no) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        if stream.calls.is_empty()
            && !live.wants.wait
            && let Some(asked) = live.bid.as_ref().and_then(|bid| bid.offers.first())
        {
            // It had its chance: whoever won't wait is told so.
            let error = self.slot_error(&asked.agent);
            self.withdraw_loudly(no, None);
            return self.close_refused(no, error);
        }
        if live.ask_at <= self.now_ms {
            self.press(no);
            self.advance(no);
            self.ask(no);
        }
    }

    /// Asks for what the stream still needs: slots for a first purchase, or for lanes that are reserved.
    pub(super) fn ask(&mut self, no: u64) {
        if self.live.get(&no).is_none_or(|l| l.stopping.is_some()) {
            return;
        }
        let Some(stream) = self.state.stream(no) else { return };
        if stream.calls.is_empty() {
            match self.offers_of(no) {
                Some(offers) if !offers.is_empty() => self.bid(no, offers),
                Some(_) | None => {
                    // It waits for an agent, not for money.
                    self.leave_books(no);
                    self.ask_later(no);
                }
            }
            return;
        }
        let reserved = stream.calls.iter().filter(|c| c.phase() == Phase::Reserved);
        let wanted: Vec<(AgentName, CallId, Amount)> =
            reserved.map(|c| (c.agent(), stream.call_id(c.reserve.lane), c.hold())).collect();
        let repeat = !wanted.is_empty() || self.owes(stream);
        for (agent, call, amount) in wanted {
            self.want(no, &agent, call, amount, u64::MAX);
        }
        if repeat {
            self.ask_later(no);
        }
    }

    pub(super) fn want(&mut self, no: u64, agent: &AgentName, call: CallId, amount: Amount, lasts_ms: u64) {
        if self.seats.get(agent).is_some_and(|s| s.up && s.skip_until <= self.now_ms) {
            self.want_slot(no, agent, call, amount, lasts_ms);
        }
    }

    pub(super) fn give_back(&mut self, agent: &AgentName, call: CallId) {
        let message = ToAgent::Back { shard: self.settings.shard, epoch: self.epoch, call };
        self.tell_agent(agent, message);
    }

    /// Wants slots for a first purchase, if the money looks as if it were there.
    pub(super) fn bid(&mut self, no: u64, mut offers: Vec<Offer>) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(live) = self.live.get(&no) else { return };
        let (fanout, named) = (live.wants.fanout, !live.wants.agents.is_empty());
        let (tenant, level) = (stream.accept.account.clone(), stream.level());
        let ids: Vec<CallId> = (1..=fanout as u32).map(|lane| stream.call_id(lane)).collect();
        let wait = live.wants.wait && self.on_limit(&tenant).queue;
        self.take_preflights(no, named, &mut offers);
        // The ladder and every refusal look at all the money that there is.
        let lanes = if fanout == 1 && !named { 1 } else { fanout }.min(offers.len());
        if self.settings.placement.shards() > 1 && lanes > 0 {
            if let Fit::Wait(need) = self.fit(&tenant, no, &level, 0, &offers[..1])
                && self.seeks(&tenant, "", self.place(no), need)
            {
                self.wait_for_money(no, need);
                return self.ask_later(no);
            }
            if lanes > 1
                && let Some(more) = self.more_of(&tenant, no, &level, &offers[..lanes])
                && self.looks(&tenant, no, &more)
            {
                self.leave_books(no);
                return self.ask_later(no);
            }
        }
        let floor = self.state.stream(no).map_or_else(String::new, |s| s.accept.floor.clone());
        offers = self.stepped(&tenant, no, &level, named, &floor, offers);
        if !named
            && !offers.is_empty()
            && let Err(error) = self.drop_unaffordable(&tenant, no, &level, &mut offers)
        {
            return self.close_refused(no, error);
        }
        let either = fanout == 1 && !named;
        if !self.in_time(no, either, &mut offers) {
            // Nobody would be done in time: it waits for a faster agent, in no queue.
            self.withdraw_loudly(no, None);
            self.leave_books(no);
            return self.ask_later(no);
        }
        match self.preflights(no, fanout, either, &mut offers) {
            Estimates::Ready => {}
            Estimates::Awaited => return self.ask_later(no),
            Estimates::Nobody if wait => {
                self.leave_books(no);
                return self.ask_later(no);
            }
            Estimates::Nobody => {
                let error = self.no_estimate(no);
                return self.close_refused(no, error);
            }
        }
        let lanes = lanes.min(offers.len());
        let whole = match self.fit(&tenant, no, &level, 0, &offers[..lanes]) {
            Fit::Lanes(holds) => {
                self.leave_books(no);
                holds.len() == lanes
            }
            Fit::Wait(need) if wait => {
                self.wait_for_money(no, need);
                self.ask_later(no);
                return;
            }
            Fit::Wait(need) => {
                let error = self.window_error(&tenant, need);
                return self.close_refused(no, error);
            }
            Fit::Never(error) => return self.close_refused(no, error),
        };
        self.withdraw(no);
        offers.truncate(if either { ASKED_MAX } else { fanout });
        for (i, offer) in offers.iter().enumerate() {
            let call = ids[if either { 0 } else { i }];
            self.bids.insert(call, no);
            self.want(no, &offer.agent, call, offer.estimate.guarded, self.lasts_ms(no, offer));
        }
        if let Some(live) = self.live.get_mut(&no) {
            live.bid = Some(Bid { offers, either, whole, lent: None });
        }
        self.ask_later(no);
    }

    /// Drops offers of a single lane whose calls would begin too late; false where all are too late.
    fn in_time(&self, no: u64, either: bool, offers: &mut Vec<Offer>) -> bool {
        let found = offers.is_empty() || offers.iter().any(|offer| self.lasts_ms(no, offer) > 0);
        if either {
            offers.retain(|offer| self.lasts_ms(no, offer) > 0);
        }
        found
    }

    /// Forgets what was asked for a first purchase. Slots that nobody asks for again lapse.
    pub(super) fn withdraw(&mut self, no: u64) {
        let Some(bid) = self.live.get_mut(&no).and_then(|l| l.bid.take()) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        let ids: Vec<CallId> = (1..=bid.offers.len() as u32).map(|lane| stream.call_id(lane)).collect();
        ids.iter().for_each(|id| {
            self.bids.remove(id);
        });
    }

    pub(super) fn withdraw_loudly(&mut self, no: u64, keep: Option<&AgentName>) {
        let Some(live) = self.live.get(&no) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        let Some(bid) = &live.bid else { return };
        let asked: Vec<(AgentName, CallId)> = bid
            .offers
            .iter()
            .enumerate()
            .map(|(i, o)| (o.agent.clone(), stream.call_id(if bid.either { 1 } else { i as u32 + 1 })))
            .filter(|(agent, call)| Some(agent) != keep && self.state.call(call).is_none_or(|_| bid.either))
            .collect();
        for (agent, call) in asked {
            self.give_back(&agent, call);
        }
        self.withdraw(no);
    }

    /// True while a slot that this process of the agent lent may be used.
    fn may_begin(&self, agent: &AgentName, incarnation: &Arc<str>) -> bool {
        let passes = self.settings.flow.gold_passes_pause;
        self.seats.get(agent).is_some_and(|s| s.up && s.incarnation == *incarnation && s.may_begin(passes))
    }

    pub(super) fn slot_lent(
        &mut self,
        agent: AgentName,
        incarnation: &Arc<str>,
        call: CallId,
        epoch: u64,
        keeper: Arc<str>,
    ) {
        if epoch != self.epoch {
            return;
        }
        let here = self.may_begin(&agent, incarnation);
        if let Some((no, lane)) = self.state.call(&call) {
            let reserved = self.state.stream(no).and_then(|s| s.call(lane));
            let ours = reserved.is_some_and(|c| c.reserve.agent == agent.as_str());
            let first = reserved.is_some_and(|c| c.phase() == Phase::Reserved);
            let young = reserved.is_some_and(|c| c.is_young(self.clock.logged_ms()));
            let again = young && self.calls.get(&call).is_some_and(|c| c.wants_slot);
            let stopping = self.live.get(&no).is_none_or(|l| l.stopping.is_some());
            match ours && here && (first || again) && !stopping && self.room == LogRoom::Enough {
                true => self.intend(no, lane, &agent, keeper),
                // A repeat of a slot that is in use already is not given back.
                false if ours && self.calls.get(&call).is_some_and(|c| c.in_flight) => {}
                false => self.give_back(&agent, call),
            }
            return;
        }
        let no = self.bids.get(&call).copied().filter(|_| here && self.room == LogRoom::Enough);
        match no {
            Some(no) if self.a_better_one_may_lend(no, &agent, incarnation, &keeper) => {}
            Some(no) => self.purchase(no, &agent, call, keeper),
            None => self.give_back(&agent, call),
        }
    }

    /// Several agents were asked for one lane: a slot of one that isn't the best waits a moment for those before it in rank
    /// that have room, so that the score decides and not who answers first.
    fn a_better_one_may_lend(&mut self, no: u64, agent: &AgentName, incarnation: &Arc<str>, keeper: &Arc<str>) -> bool {
        let Some(bid) = self.live.get(&no).and_then(|l| l.bid.as_ref()).filter(|b| b.either) else { return false };
        let Some(at) = bid.offers.iter().position(|o| o.agent == *agent) else { return false };
        let has_room = |o: &Offer| {
            self.seats.get(&o.agent).is_some_and(|s| s.up && s.takes_work())
                && self.in_flight(&o.agent) < self.seat_window(&o.agent)
        };
        if !bid.offers[..at].iter().any(has_room) {
            return false;
        }
        let Some(bid) = self.live.get_mut(&no).and_then(|l| l.bid.as_mut()) else { return false };
        match &mut bid.lent {
            Some(best) if best.0 <= at => {}
            Some(best) => *best = (at, incarnation.clone(), keeper.clone()),
            None => {
                bid.lent = Some((at, incarnation.clone(), keeper.clone()));
                self.timer(self.now_ms + CHOICE_MS, Timer::Choice(no));
            }
        }
        true
    }

    /// Nobody better lent a slot in time.
    pub(super) fn choose(&mut self, no: u64) {
        let Some(bid) = self.live.get_mut(&no).and_then(|l| l.bid.as_mut()) else { return };
        let Some((at, incarnation, keeper)) = bid.lent.take() else { return };
        let Some(agent) = bid.offers.get(at).map(|o| o.agent.clone()) else { return };
        let Some(call) = self.state.stream(no).map(|s| s.call_id(1)) else { return };
        if self.may_begin(&agent, &incarnation) && self.room == LogRoom::Enough {
            self.purchase(no, &agent, call, keeper);
        }
    }

    /// The first slot of a task is here: one Reserve for all its lanes, and the Intent of this one.
    pub(super) fn purchase(&mut self, no: u64, agent: &AgentName, call: CallId, keeper: Arc<str>) {
        let Some(stream) = self.state.stream(no) else { return };
        let (tenant, level) = (stream.accept.account.clone(), stream.level());
        let Some((live, bid)) = self.live.get(&no).and_then(|l| Some((l, l.bid.as_ref()?))) else {
            return self.give_back(agent, call);
        };
        let Some(at) = bid.offers.iter().position(|o| o.agent == *agent) else { return self.give_back(agent, call) };
        let (either, whole) = (bid.either, bid.whole && live.wants.wait && !live.turned_back);
        let offers: Vec<Offer> = if either { vec![bid.offers[at].clone()] } else { bid.offers.clone() };
        let fit = self.fit(&tenant, no, &level, 0, &offers);
        // No lane is dropped for money that was here when the slots were asked for and may be found again. Once for a task: it loses
        // its turn.
        if whole
            && let Some(more) = self.more_of(&tenant, no, &level, &offers)
            && self.looks(&tenant, no, &more)
        {
            if let Some(live) = self.live.get_mut(&no) {
                live.turned_back = true;
            }
            self.withdraw_loudly(no, None);
            return self.ask_later(no);
        }
        let holds = match fit {
            Fit::Lanes(holds) => holds,
            Fit::Wait(need) => {
                let wait = self.live.get(&no).is_some_and(|l| l.wants.wait) && self.on_limit(&tenant).queue;
                let wait = wait || self.seeks(&tenant, "", self.place(no), need);
                self.withdraw_loudly(no, None);
                if !wait {
                    let error = self.window_error(&tenant, need);
                    return self.close_refused(no, error);
                }
                self.wait_for_money(no, need);
                self.ask_later(no);
                return;
            }
            Fit::Never(error) => {
                self.withdraw_loudly(no, None);
                return self.close_refused(no, error);
            }
        };
        let lane = if either { 1 } else { at as u32 + 1 };
        let left_out: Vec<String> = offers[holds.len()..]
            .iter()
            .map(|o| format!("agent {} was left out: the budget had no room for it", o.agent))
            .collect();
        for offer in &offers[holds.len()..] {
            let id = self
                .state
                .stream(no)
                .map(|s| s.call_id(offers.iter().position(|o| o.agent == offer.agent).map_or(1, |i| i as u32 + 1)));
            if let Some(id) = id {
                self.give_back(&offer.agent.clone(), id);
            }
        }
        self.reserve(no, &offers[..holds.len()], &holds, 0);
        self.withdraw_loudly(no, Some(agent));
        self.leave_books(no);
        if let Some(live) = self.live.get_mut(&no) {
            live.left_out.extend(left_out);
        }
        if (lane as usize) <= holds.len() {
            self.intend(no, lane, agent, keeper);
        }
        self.ask(no);
    }

    /// Reserves lanes in one record; `retry_of` is the lane that a single one replaces, or 0.
    pub(super) fn reserve(&mut self, no: u64, offers: &[Offer], holds: &[Amount], retry_of: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(live) = self.live.get(&no) else { return };
        let (key, first) = (stream.accept.key.clone(), stream.calls.len() as u32 + 1);
        let task_type = stream.accept.task_type.clone();
        let prompt_tokens = live.wants.prompt_tokens;
        let qos = stream_qos(stream);
        let deadline_ms = self.settings.agent_timeout_ms.min(live.deadline_at.saturating_sub(self.now_ms)).max(1);
        let (_, reference, window) = self.window_now(&key.tenant);
        if let Some(window) = window {
            self.record(Record::Window(window));
            self.roll_timer(&key.tenant);
        }
        let calls = (first..).zip(offers.iter().zip(holds)).map(|(lane, (offer, hold))| {
            let e = &offer.estimate;
            ReserveCall {
                lane,
                retry_of,
                agent: offer.agent.as_str().into(),
                model: e.model.clone(),
                mean: e.mean.into(),
                sd: e.sd.into(),
                source: e.source.as_str().into(),
                samples: e.samples,
                k_ppm: qos.k_ppm(),
                guarded: e.guarded.into(),
                hold: (*hold).into(),
                windows: vec![reference.clone()],
                deadline_ms,
                price_version: e.price_version.to_string(),
                in_price: e.price.in_usd_micros_per_mtok,
                out_price: e.price.out_usd_micros_per_mtok,
                rule: format!("{}; {}", offer.why, price_rule(e, qos.k_ppm())),
                prompt_tokens,
                overage_ppm: self.overage_ppm(offer, &task_type),
            }
        });
        let calls: Vec<ReserveCall> = calls.collect();
        let lanes: Vec<u32> = calls.iter().map(|c| c.lane).collect();
        let account = key.tenant.clone();
        self.record(Record::Reserve(Reserve { key, calls }));
        lanes.into_iter().for_each(|lane| self.note_short(no, lane));
        self.metric(Metric::Admission { outcome: "reserved", code: "" });
        self.account_metric(&account);
    }

    /// A lane that failed is replaced: another Reserve in the same entry. False where it has to wait for agent or money.
    pub(super) fn reserve_retry(&mut self, no: u64, failed: u32) -> Result<bool, WireError> {
        if self.room > LogRoom::Enough {
            return Ok(false);
        }
        let Some(stream) = self.state.stream(no) else { return Ok(false) };
        let Some(live) = self.live.get(&no) else { return Ok(false) };
        let Some(old) = stream.call(failed) else { return Ok(false) };
        let (tenant, level, old_agent) = (stream.accept.account.clone(), stream.level(), old.agent());
        let open = stream.calls.iter().filter(|c| c.is_open()).count() as u32;
        let used: BTreeSet<AgentName> = stream.calls.iter().map(crate::stream::Call::agent).collect();
        let wants = &live.wants;
        let request = Request::of(&stream.accept, wants);
        let offers = if wants.agents.is_empty() {
            let mut offers = self.offers(wants, &request).unwrap_or_default();
            // Somebody else first, then the same again.
            offers.sort_by_key(|o| used.contains(&o.agent));
            offers
        } else {
            self.offer(&old_agent, &request, "named").into_iter().collect()
        };
        let Some(mut offer) = offers.into_iter().next() else { return Ok(false) };
        // Nobody is asked again: the money goes on to the next lane in this very entry.
        self.take_preflight(no, &mut offer);
        offer.why = format!("retry of lane {failed} after {}; {}", old.ended, offer.why);
        let floor = stream.accept.floor.as_str();
        let stepped = self.stepped(&tenant, no, &level, true, floor, vec![offer]);
        let Some(offer) = stepped.into_iter().next() else { return Ok(false) };
        match self.fit(&tenant, no, &level, open, std::slice::from_ref(&offer)) {
            Fit::Lanes(holds) => {
                self.reserve(no, &[offer], &holds, failed);
                Ok(true)
            }
            Fit::Wait(need) => {
                self.seeks(&tenant, "", self.place(no), need);
                Ok(false)
            }
            Fit::Never(error) => Err(error),
        }
    }

    /// The memory of a call that the log knows, for a new owner.
    pub(super) fn adopt(&mut self, no: u64, lane: u32) -> Option<AgentName> {
        let call = self.state.stream(no)?.call(lane)?;
        let id = self.state.stream(no)?.call_id(lane);
        let agent = call.agent();
        self.note_short(no, lane);
        let call = self.state.stream(no)?.call(lane)?;
        if call.phase() == Phase::Running {
            let live = LiveCall::adopted(no, lane, call, self.now_ms);
            let due = live.lost_at.unwrap_or(live.expires_at);
            self.calls.insert(id, live);
            self.call_timer(id, due);
            self.flies(id, true);
        }
        Some(agent)
    }
}

//! Choice and permission: which agents, whether the money is there, and the one entry that holds it for all lanes.
//! Slot first, then money; Extend goes before Reserve.

use super::lane::LiveCall;
use super::{Shard, Timer};
use crate::account::{AccountWindow, Level, window_at};
use crate::estimate::{Estimate, estimate};
use crate::message::{LogRoom, Metric, ToAgent};
use crate::record::{Record, Reserve, ReserveCall, Window, WindowRef};
use crate::settings::{AccountSettings, WindowSettings};
use crate::stream::{Phase, Stream};
use atp_proto::content::{Capabilities, Stop, Submit};
use atp_proto::{AgentName, Amount, CallId, Code, Qos, TenantId, WireError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Agents that are asked for the slot of a single lane; the first one wins.
const ASKED_MAX: usize = 3;
/// Waiting tasks that are woken when money comes back.
const WOKEN_MAX: usize = 16;

/// What a stream asks slots for before it has bought anything.
pub(super) struct Bid {
    offers: Vec<Offer>,
    /// True: one lane, several agents asked for it.
    either: bool,
}

/// One agent that could run a lane.
#[derive(Clone)]
pub(super) struct Offer {
    pub(super) agent: AgentName,
    capabilities: Arc<Capabilities>,
    estimate: Estimate,
    rule: String,
}

/// Who waits for an account's money.
#[derive(Default)]
pub(super) struct Book {
    /// Running calls that wait for a slice, oldest first.
    pub(super) starved: BTreeSet<(u64, u32)>,
    /// Tasks that had a slot and no money, and what they need.
    waiting: BTreeMap<u64, Amount>,
    /// Running calls whose hold is below their guarded estimate, and by how much.
    short: BTreeMap<(u64, u32), Amount>,
    roll_at: u64,
}

/// What the money says to a list of offers.
enum Fit {
    /// The first n, each with its hold.
    Lanes(Vec<Amount>),
    /// Not now: so much is needed.
    Wait(Amount),
    /// Never in this window.
    Never(WireError),
}

impl Shard {
    // ---- accounts ---------------------------------------------------------------------------------------------------

    fn account_settings(&self, tenant: &str) -> AccountSettings {
        self.settings.accounts.get(tenant).copied().unwrap_or(self.settings.default_account)
    }

    /// The account's window at this time, and the record that begins it where the log doesn't have it.
    fn window_now(&self, tenant: &str) -> (AccountWindow, WindowRef, Option<Window>) {
        let settings = self.account_settings(tenant);
        let (mut id, mut ends_ms) = window_at(settings.per, self.clock.logged_ms());
        let account = self.state.accounts.get(tenant);
        if let Some(account) = account
            && account.per == settings.per.as_str()
            && account.current > id
        {
            // A window never begins again, whatever the clock says.
            id = account.current.clone();
            ends_ms = account.windows.get(&id).and_then(|w| w.ends_ms);
        }
        let known = account.and_then(|a| a.windows.get(&id));
        let limit = settings.limit.into();
        let current = account.is_some_and(|a| a.current == id && a.per == settings.per.as_str());
        let record = (!current || known.is_none_or(|w| w.limit != limit)).then(|| Window {
            account: tenant.into(),
            window: id.clone(),
            limit,
            ends_ms,
            per: settings.per.as_str().into(),
        });
        let window = AccountWindow { limit, ends_ms, ..known.cloned().unwrap_or_default() };
        (window, WindowRef { account: tenant.into(), window: id }, record)
    }

    pub(super) fn roll_timer(&mut self, account: &str) {
        let (window, ..) = self.window_now(account);
        if let Some(ends) = window.ends_ms {
            let at = self.now_ms + ends.saturating_sub(self.clock.logged_ms()).max(1);
            let book = self.books.entry(account.into()).or_default();
            if book.roll_at <= self.now_ms || at < book.roll_at {
                book.roll_at = at;
                self.timer(at, Timer::Roll(account.into()));
            }
        }
    }

    /// An account's window has ended: the next one begins, and who waited for money is asked again.
    pub(super) fn rolled(&mut self, account: &str) {
        if let (_, _, Some(window)) = self.window_now(account)
            && self.room == LogRoom::Enough
        {
            self.record(Record::Window(window));
        }
        self.money_returned(account);
        self.roll_timer(account);
    }

    /// The levels of a call of this stream: its account's window in which it was reserved, and the stream.
    pub(super) fn levels(&self, stream: &Stream, windows: &[WindowRef]) -> Vec<Level> {
        let window =
            |w: &WindowRef| self.state.accounts.get(&w.account)?.windows.get(&w.window).map(AccountWindow::level);
        windows.iter().filter_map(window).chain([stream.level()]).collect()
    }

    /// Gives money that came back: first to running calls, oldest first, then to waiting tasks.
    pub(super) fn money_returned(&mut self, account: &str) {
        let Some(book) = self.books.get(account) else { return };
        for (no, lane) in book.starved.iter().copied().collect::<Vec<_>>() {
            self.extend(no, lane);
        }
        let Some(book) = self.books.get(account) else { return };
        if book.starved.is_empty() {
            let woken: Vec<u64> = book.waiting.keys().copied().take(WOKEN_MAX).collect();
            woken.into_iter().for_each(|no| self.ask(no));
        }
    }

    /// Keeps the account's list of calls whose hold is below their estimate true.
    pub(super) fn note_short(&mut self, no: u64, lane: u32) {
        let Some(call) = self.state.stream(no).and_then(|s| s.call(lane)) else { return };
        let short = Amount::from(call.reserve.guarded).less(call.hold());
        let open = call.is_open();
        let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone()) else { return };
        if open && !short.is_zero() {
            self.books.entry(account).or_default().short.insert((no, lane), short);
        } else if let Some(book) = self.books.get_mut(&account) {
            book.short.remove(&(no, lane));
            if !open {
                book.starved.remove(&(no, lane));
            }
        }
    }

    pub(super) fn leave_books(&mut self, no: u64) {
        if let Some(account) = self.state.stream(no).map(|s| s.accept.account.clone())
            && let Some(book) = self.books.get_mut(&account)
        {
            book.waiting.remove(&no);
        }
    }

    // ---- choice -----------------------------------------------------------------------------------------------------

    fn offer(&self, agent: &AgentName, prompt: u64, qos: Qos, window: &WindowSettings, rule: String) -> Option<Offer> {
        let seat = self.seats.get(agent).filter(|s| s.up)?;
        let found = estimate(&seat.capabilities, prompt, qos, &self.settings.prices, window);
        let estimate = found.ok().flatten()?;
        Some(Offer { agent: agent.clone(), capabilities: seat.capabilities.clone(), estimate, rule })
    }

    /// The agents of a task in order of rank: the named ones (all of them must be here), or those that match.
    fn offers(&self, wants: &super::client::Wants, task_type: &str, qos: Qos) -> Result<Vec<Offer>, AgentName> {
        let window = self.settings.stream_window;
        if !wants.agents.is_empty() {
            let named = |a: &AgentName| {
                self.offer(a, wants.prompt_tokens, qos, &window, "named".into()).ok_or_else(|| a.clone())
            };
            return wants.agents.iter().map(named).collect();
        }
        let matches =
            |c: &Capabilities| task_type.is_empty() || c.skills.is_empty() || c.skills.iter().any(|s| s == task_type);
        let here = self.seats.iter().filter(|(_, s)| s.up && s.skip_until <= self.now_ms && matches(&s.capabilities));
        let mut offers: Vec<Offer> =
            here.filter_map(|(name, _)| self.offer(name, wants.prompt_tokens, qos, &window, String::new())).collect();
        // Cheapest first; ties: fewer tokens, then name (the order of the map).
        offers.sort_by_key(|o| (o.estimate.guarded.usd_micros, o.estimate.guarded.tokens));
        for (rank, offer) in offers.iter_mut().enumerate() {
            offer.rule = format!("match: rank {} by cost", rank + 1);
        }
        Ok(offers)
    }

    /// Judges a task before it is accepted: EBUDGET where waiting can't help, EWINDOW and EAGENTDOWN for who won't wait.
    pub(super) fn judge(&self, tenant: &TenantId, submit: &Submit, qos: Qos, task_type: &str) -> Result<(), WireError> {
        let wants = super::client::Wants::read(submit);
        let limit = submit.budget.min(self.settings.stream_window.limit);
        let offers = match self.offers(&wants, task_type, qos) {
            Ok(offers) if !offers.is_empty() => offers,
            Ok(_) if submit.wait => return Ok(()),
            Ok(_) => {
                return Err(WireError::new(Code::AgentDown, "no connected agent matches; connect one, or wait for it"));
            }
            Err(_) if submit.wait => return Ok(()),
            Err(agent) => {
                let message = format!("agent {agent} isn't connected");
                return Err(WireError::new(Code::AgentDown, message).scope(format!("agent:{agent}")));
            }
        };
        let stream = Level { limit, ..Level::default() };
        match self.fit(tenant.as_str(), u64::MAX, &stream, 0, &offers[..1]) {
            Fit::Never(error) => Err(error),
            Fit::Wait(need) if !submit.wait => Err(self.window_error(tenant.as_str(), need)),
            Fit::Wait(_) | Fit::Lanes(_) => {
                let busy = |o: &Offer| self.in_flight(&o.agent) >= self.seat_window(&o.agent);
                match !submit.wait && offers.iter().all(busy) {
                    false => Ok(()),
                    true => {
                        let agent = &offers[0].agent;
                        let (used, limit) = (self.in_flight(agent), self.seat_window(agent));
                        let error = WireError::new(Code::Window, "every agent that matches is busy")
                            .used(used.into(), limit.into());
                        Err(error.scope(format!("agent:{agent}")).retry_after_ms(1_000))
                    }
                }
            }
        }
    }

    pub(super) fn in_flight(&self, agent: &AgentName) -> u32 {
        self.in_flight.get(agent).copied().unwrap_or(0)
    }

    fn seat_window(&self, agent: &AgentName) -> u32 {
        let own = self.seats.get(agent).map_or(0, |s| s.capabilities.max_parallel);
        own.min(self.settings.agent_window.max_parallel.unwrap_or(u32::MAX))
    }

    // ---- permission -------------------------------------------------------------------------------------------------

    /// Whether the money holds these offers, lowest ranked dropped until the rest fits. `no` is the asking stream: those
    /// that wait longer keep their claim.
    fn fit(&self, tenant: &str, no: u64, stream: &Level, open_lanes: u32, offers: &[Offer]) -> Fit {
        let (window, reference, _) = self.window_now(tenant);
        let account = window.level();
        let left = account.left().min(stream.left());
        let mut free = account.free();
        let book = self.books.get(tenant);
        for claim in book.into_iter().flat_map(|b| b.waiting.range(..no).map(|(_, need)| need).chain(b.short.values()))
        {
            free = free.less(*claim);
        }
        let free = free.min(stream.free());
        let starved = book.is_some_and(|b| !b.starved.is_empty());
        let room =
            self.settings.stream_window.max_parallel.map_or(usize::MAX, |m| m.saturating_sub(open_lanes) as usize);
        let (mut holds, mut used) = (Vec::new(), Amount::ZERO);
        for offer in offers.iter().take(room) {
            let e = &offer.estimate;
            let rest = left.less(used);
            let need = e.guarded.min(rest);
            let never = !e.mean.fits(rest)
                || !first_grant_suffices(offer, need)
                || (offer.capabilities.stop == Stop::None && need != e.guarded);
            let sum = used.add(need);
            let fits = !starved && sum.is_ok_and(|sum| sum.fits(free));
            if never || !fits {
                return match holds.is_empty() {
                    false => Fit::Lanes(holds),
                    true if never => Fit::Never(self.budget_error(&account, &window, &reference, stream, e)),
                    true => Fit::Wait(need),
                };
            }
            used = sum.unwrap_or(used);
            holds.push(need);
        }
        match holds.is_empty() {
            true => Fit::Wait(Amount::ZERO),
            false => Fit::Lanes(holds),
        }
    }

    fn budget_error(
        &self,
        account: &Level,
        window: &AccountWindow,
        reference: &WindowRef,
        stream: &Level,
        e: &Estimate,
    ) -> WireError {
        let binding =
            if e.guarded.min(account.left()) == e.guarded && !e.mean.fits(stream.left()) { stream } else { account };
        let of_stream = std::ptr::eq(binding, stream);
        let usd = !e.mean.usd_micros.le(&binding.left().usd_micros) || e.mean.tokens <= binding.left().tokens;
        let (what, mean, used, limit) = if usd {
            ("micro-USD", e.mean.usd_micros.0, binding.settled.usd_micros.0, binding.limit.amount().usd_micros.0)
        } else {
            ("tokens", e.mean.tokens.0, binding.settled.tokens.0, binding.limit.amount().tokens.0)
        };
        let message = format!("the call is estimated at {mean} {what}, more than the budget has left; raise it");
        let mut error = WireError::new(Code::Budget, message).used(used, limit);
        if of_stream {
            return error.scope("stream:budget");
        }
        error.reset_at = window.ends_ms.map(|at| crate::clock::rfc3339(at).into());
        error.scope(format!("tenant:{}", reference.account))
    }

    fn window_error(&self, tenant: &str, need: Amount) -> WireError {
        let (window, reference, _) = self.window_now(tenant);
        let level = window.level();
        let used = level.settled.add(level.held).unwrap_or(level.held);
        let message = format!(
            "{} micro-USD and {} tokens are needed now and not free; wait, or lower the budget",
            need.usd_micros, need.tokens
        );
        let error = WireError::new(Code::Window, message).used(used.usd_micros.0, level.limit.amount().usd_micros.0);
        error.scope(format!("tenant:{}", reference.account)).retry_after_ms(1_000)
    }

    // ---- slots ------------------------------------------------------------------------------------------------------

    pub(super) fn is_asking(&self, no: u64) -> bool {
        self.live.get(&no).is_some_and(|l| l.stopping.is_none())
            && self
                .state
                .stream(no)
                .is_some_and(|s| s.calls.is_empty() || s.calls.iter().any(|c| c.phase() == Phase::Reserved))
    }

    /// The repeat: lanes that are owed, then slots that are missing.
    pub(super) fn ask_again(&mut self, no: u64) {
        if self.live.get(&no).is_some_and(|l| l.ask_at <= self.now_ms) {
            self.advance(no);
            self.ask(no);
        }
    }

    /// Asks for what the stream still needs: slots for a first purchase, or for lanes that are reserved.
    pub(super) fn ask(&mut self, no: u64) {
        let Some(live) = self.live.get(&no).filter(|l| l.stopping.is_none()) else { return };
        let Some(stream) = self.state.stream(no) else { return };
        if stream.calls.is_empty() {
            let offers = self.offers(&live.wants, &stream.accept.task_type, stream_qos(stream));
            match offers {
                Ok(offers) if !offers.is_empty() => self.bid(no, offers),
                Ok(_) | Err(_) => self.ask_later(no),
            }
            return;
        }
        let reserved = stream.calls.iter().filter(|c| c.phase() == Phase::Reserved);
        let wanted: Vec<(AgentName, CallId)> = reserved.map(|c| (c.agent(), stream.call_id(c.reserve.lane))).collect();
        let repeat = !wanted.is_empty() || self.owes(stream);
        for (agent, call) in wanted {
            self.want(&agent, call);
        }
        if repeat {
            self.ask_later(no);
        }
    }

    fn want(&mut self, agent: &AgentName, call: CallId) {
        if self.seats.get(agent).is_some_and(|s| s.up && s.skip_until <= self.now_ms) {
            let message = ToAgent::Want { shard: self.settings.shard, epoch: self.epoch, call };
            self.to_agent(agent, message);
        }
    }

    pub(super) fn give_back(&mut self, agent: &AgentName, call: CallId) {
        let message = ToAgent::Back { shard: self.settings.shard, epoch: self.epoch, call };
        self.to_agent(agent, message);
    }

    /// Wants slots for a first purchase, if the money looks as if it were there.
    fn bid(&mut self, no: u64, mut offers: Vec<Offer>) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(live) = self.live.get(&no) else { return };
        let (fanout, named) = (live.wants.fanout, !live.wants.agents.is_empty());
        let (tenant, level) = (stream.accept.account.clone(), stream.level());
        let ids: Vec<CallId> = (1..=fanout as u32).map(|lane| stream.call_id(lane)).collect();
        match self.fit(&tenant, no, &level, 0, &offers[..1]) {
            Fit::Lanes(_) => {}
            Fit::Wait(need) => {
                self.books.entry(tenant).or_default().waiting.insert(no, need);
                self.ask_later(no);
                return;
            }
            Fit::Never(error) => return self.close_refused(no, error),
        }
        self.withdraw(no);
        let either = fanout == 1 && !named;
        offers.truncate(if either { ASKED_MAX } else { fanout });
        for (i, offer) in offers.iter().enumerate() {
            let call = ids[if either { 0 } else { i }];
            self.bids.insert(call, no);
            self.want(&offer.agent, call);
        }
        if let Some(live) = self.live.get_mut(&no) {
            live.bid = Some(Bid { offers, either });
        }
        self.ask_later(no);
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

    fn withdraw_loudly(&mut self, no: u64, keep: Option<&AgentName>) {
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

    pub(super) fn slot_lent(&mut self, agent: AgentName, incarnation: Arc<str>, call: CallId, epoch: u64) {
        if epoch != self.epoch {
            return;
        }
        let here = self.seats.get(&agent).is_some_and(|s| s.up && s.incarnation == incarnation);
        if let Some((no, lane)) = self.state.call(&call) {
            let reserved = self.state.stream(no).and_then(|s| s.call(lane));
            let ours = reserved.is_some_and(|c| c.reserve.agent == agent.as_str());
            let first = reserved.is_some_and(|c| c.phase() == Phase::Reserved);
            let again = self.calls.get(&call).is_some_and(|c| c.wants_slot);
            let stopping = self.live.get(&no).is_some_and(|l| l.stopping.is_some());
            match ours && here && (first || again) && !stopping && self.room == LogRoom::Enough {
                true => self.intend(no, lane, &agent),
                // A repeat of a slot that is in use already is not given back.
                false if ours && self.calls.get(&call).is_some_and(|c| c.in_flight) => {}
                false => self.give_back(&agent, call),
            }
            return;
        }
        let no = self.bids.get(&call).copied().filter(|_| here && self.room == LogRoom::Enough);
        match no {
            Some(no) => self.purchase(no, &agent, call),
            None => self.give_back(&agent, call),
        }
    }

    /// The first slot of a task is here: one Reserve for all its lanes, and the Intent of this one.
    fn purchase(&mut self, no: u64, agent: &AgentName, call: CallId) {
        let Some(stream) = self.state.stream(no) else { return };
        let (tenant, level) = (stream.accept.account.clone(), stream.level());
        let Some(bid) = self.live.get(&no).and_then(|l| l.bid.as_ref()) else { return self.give_back(agent, call) };
        let Some(at) = bid.offers.iter().position(|o| o.agent == *agent) else { return self.give_back(agent, call) };
        let offers: Vec<Offer> = if bid.either { vec![bid.offers[at].clone()] } else { bid.offers.clone() };
        let holds = match self.fit(&tenant, no, &level, 0, &offers) {
            Fit::Lanes(holds) => holds,
            Fit::Wait(need) => {
                self.withdraw_loudly(no, None);
                self.books.entry(tenant).or_default().waiting.insert(no, need);
                self.ask_later(no);
                return;
            }
            Fit::Never(error) => {
                self.withdraw_loudly(no, None);
                return self.close_refused(no, error);
            }
        };
        let lane = if bid.either { 1 } else { at as u32 + 1 };
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
            self.intend(no, lane, agent);
        }
        self.ask(no);
    }

    /// Reserves lanes in one record; `retry_of` is the lane that a single one replaces, or 0.
    fn reserve(&mut self, no: u64, offers: &[Offer], holds: &[Amount], retry_of: u32) {
        let Some(stream) = self.state.stream(no) else { return };
        let Some(live) = self.live.get(&no) else { return };
        let (key, first) = (stream.accept.key.clone(), stream.calls.len() as u32 + 1);
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
                source: e.source.into(),
                samples: 0,
                k_ppm: qos.k_ppm(),
                guarded: e.guarded.into(),
                hold: (*hold).into(),
                windows: vec![reference.clone()],
                deadline_ms,
                price_version: e.price_version.to_string(),
                in_price: e.price.in_usd_micros_per_mtok,
                out_price: e.price.out_usd_micros_per_mtok,
                rule: offer.rule.clone(),
            }
        });
        let calls: Vec<ReserveCall> = calls.collect();
        let lanes: Vec<u32> = calls.iter().map(|c| c.lane).collect();
        self.record(Record::Reserve(Reserve { key, calls }));
        lanes.into_iter().for_each(|lane| self.note_short(no, lane));
        self.metric(Metric::Admission { outcome: "reserved", code: "" });
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
        let Ok(mut offers) = self.offers(&live.wants, &stream.accept.task_type, stream_qos(stream)) else {
            // A named agent is away; another named one may be replaced all the same.
            return Ok(false);
        };
        if live.wants.agents.is_empty() {
            // Somebody else first, then the same again.
            offers.sort_by_key(|o| used.contains(&o.agent));
        } else {
            offers.retain(|o| o.agent == old_agent);
        }
        let Some(mut offer) = offers.into_iter().next() else { return Ok(false) };
        offer.rule = format!("retry of lane {failed} after {}", old.ended);
        match self.fit(&tenant, no, &level, open, std::slice::from_ref(&offer)) {
            Fit::Lanes(holds) => {
                self.reserve(no, &[offer], &holds, failed);
                Ok(true)
            }
            Fit::Wait(_) => Ok(false),
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

/// The first grant covers the prompt plus one slice.
fn first_grant_suffices(offer: &Offer, need: Amount) -> bool {
    let e = &offer.estimate;
    let slice = |guarded: u64, input: u64| guarded.div_ceil(4).min(guarded.saturating_sub(input));
    let least = Amount::new(
        e.input.tokens.0.saturating_add(slice(e.guarded.tokens.0, e.input.tokens.0)),
        e.input.usd_micros.0.saturating_add(slice(e.guarded.usd_micros.0, e.input.usd_micros.0)),
    );
    least.fits(need)
}

pub(super) fn stream_qos(stream: &Stream) -> Qos {
    Qos::from_wire(stream.accept.qos).unwrap_or_default()
}

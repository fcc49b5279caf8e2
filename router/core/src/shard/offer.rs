//! Offers and permission: what agents would run a task for, and whether the money is there.

use super::Shard;
use super::choice::Request;
use super::looks::More;
use crate::account::{AccountWindow, Level};
use crate::estimate::Estimate;
use crate::policy::Rule;
use crate::record::WindowRef;
use crate::stream::Stream;
use atp_proto::content::{Capabilities, Stop, Submit};
use atp_proto::{AgentName, Amount, Code, Limit, Qos, TenantId, Tokens, WireError};
use std::sync::Arc;

/// One agent that could run a lane.
#[derive(Clone)]
pub(super) struct Offer {
    pub(super) agent: AgentName,
    pub(super) capabilities: Arc<Capabilities>,
    pub(super) estimate: Estimate,
    /// Why this agent: the first half of the bill's rule.
    pub(super) why: String,
}
/// What the money says to a list of offers.
pub(super) enum Fit {
    /// The first n, each with its hold.
    Lanes(Vec<Amount>),
    /// Not now: so much is needed.
    Wait(Amount),
    /// Never in this window.
    Never(WireError),
}

/// Why a task isn't accepted.
pub(super) struct Refusal {
    pub(super) error: Box<WireError>,
    /// So much money isn't free now.
    pub(super) short: Option<Amount>,
    /// It is no refusal if nothing more is known: the task waits.
    pub(super) waits: bool,
}

impl Refusal {
    pub(super) fn of(error: WireError) -> Self {
        Self { error: Box::new(error), short: None, waits: false }
    }
}

impl Shard {
    /// The agents of a task in order of rank: the named ones (all of them must be here), or those that match.
    pub(super) fn offers(&self, wants: &super::client::Wants, request: &Request<'_>) -> Result<Vec<Offer>, AgentName> {
        if wants.agents.is_empty() {
            return Ok(self.ranked(request));
        }
        let named = |a: &AgentName| self.offer(a, request, "named").ok_or_else(|| a.clone());
        wants.agents.iter().map(named).collect()
    }

    /// The agents of an open task in order of rank; `None` where a named one isn't here.
    pub(super) fn offers_of(&self, no: u64) -> Option<Vec<Offer>> {
        let (stream, live) = (self.state.stream(no)?, self.live.get(&no)?);
        self.offers(&live.wants, &Request::of(&stream.accept, &live.wants)).ok()
    }

    /// Judges a task before it is accepted: EBUDGET where waiting can't help, EWINDOW and EAGENTDOWN for who won't wait.
    pub(super) fn judge(
        &self,
        tenant: &TenantId,
        submit: &Submit,
        wants: &super::client::Wants,
        request: &Request<'_>,
        rule: Option<&Rule>,
    ) -> Result<(), Refusal> {
        let budget = submit.budget.min(rule.map_or(Limit::NONE, |r| r.budget));
        let limit = budget.min(self.settings.stream_window.limit);
        let waits = submit.wait && self.on_limit(tenant.as_str()).queue;
        let mut offers = match self.offers(wants, request) {
            Ok(offers) if !offers.is_empty() => offers,
            Ok(_) if submit.wait => return Ok(()),
            Ok(_) => {
                let filters = self.filters(request);
                let why = if filters.is_empty() { String::new() } else { format!(" ({filters})") };
                let message = format!("no connected agent matches{why}; connect one, or wait for it");
                return Err(Refusal::of(WireError::new(Code::AgentDown, message)));
            }
            Err(_) if submit.wait => return Ok(()),
            Err(agent) => {
                let message = format!("agent {agent} isn't connected");
                let error = WireError::new(Code::AgentDown, message);
                return Err(Refusal::of(error.scope(format!("agent:{agent}"))));
            }
        };
        let stream = Level { limit, ..Level::default() };
        let floor = rule.and_then(|r| r.floor.as_deref()).unwrap_or_default();
        offers = self.stepped(tenant.as_str(), u64::MAX, &stream, !wants.agents.is_empty(), floor, offers);
        if wants.agents.is_empty() {
            self.drop_unaffordable(tenant.as_str(), u64::MAX, &stream, &mut offers).map_err(Refusal::of)?;
        }
        match self.fit(tenant.as_str(), u64::MAX, &stream, 0, &offers[..1]) {
            Fit::Never(error) => Err(Refusal::of(error)),
            // Whether it can ever be paid is known at the account's home.
            Fit::Wait(need) if !waits || !self.is_home(tenant.as_str()) => {
                Err(Refusal { short: Some(need), waits, ..Refusal::of(self.window_error(tenant.as_str(), need)) })
            }
            Fit::Wait(_) | Fit::Lanes(_) => {
                let busy = |o: &Offer| self.in_flight(&o.agent) >= self.seat_window(&o.agent);
                match !submit.wait && offers.iter().all(busy) {
                    false => Ok(()),
                    true => Err(Refusal::of(self.slot_error(&offers[0].agent))),
                }
            }
        }
    }

    /// Drops offers that this window can never pay.
    ///
    /// # Errors
    /// EBUDGET of the best one where all are such.
    pub(super) fn drop_unaffordable(
        &self,
        tenant: &str,
        no: u64,
        stream: &Level,
        offers: &mut Vec<Offer>,
    ) -> Result<(), WireError> {
        let mut refused = None;
        offers.retain(|offer| match self.fit(tenant, no, stream, 0, std::slice::from_ref(offer)) {
            Fit::Never(error) => {
                refused.get_or_insert(error);
                false
            }
            Fit::Wait(_) | Fit::Lanes(_) => true,
        });
        match refused {
            Some(error) if offers.is_empty() => Err(error),
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn in_flight(&self, agent: &AgentName) -> u32 {
        self.in_flight.get(agent).copied().unwrap_or(0)
    }

    pub(super) fn seat_window(&self, agent: &AgentName) -> u32 {
        self.seats.get(agent).map_or(0, super::seat::Seat::window)
    }

    // ---- permission -------------------------------------------------------------------------------------------------

    /// Whether the money holds these offers, lowest ranked dropped until the rest fits. `no` is the asking stream: those
    /// that wait longer keep their claim.
    pub(super) fn fit(&self, tenant: &str, no: u64, stream: &Level, open_lanes: u32, offers: &[Offer]) -> Fit {
        let (_, reference, _) = self.window_now(tenant);
        let window = self.shown_window(tenant);
        let account = window.level();
        let (left, free) = self.money(tenant, no, stream);
        // Running calls go first; an account ahead of its pace begins nothing.
        let held_back = self.runs_short(tenant) || self.is_held_back(tenant);
        let in_stream = self.settings.stream_window.max_parallel.map(|most| most.saturating_sub(open_lanes));
        let rooms = [in_stream, self.calls_room(tenant)].into_iter().flatten();
        let room = rooms.min().map_or(usize::MAX, |room| room as usize);
        // A call needs a window to be reserved in, also one that costs nothing.
        let least = if self.has_window(tenant) { Amount::ZERO } else { Amount::new(1, 0) };
        let (mut holds, mut used) = (Vec::new(), Amount::ZERO);
        for (n, offer) in offers.iter().enumerate() {
            let need = lane_need(offer, left.less(used)).map(|need| need.max(least));
            let sum = need.and_then(|need| used.add(need).ok());
            match (need, sum.filter(|sum| n < room && !held_back && sum.fits(free))) {
                (Some(need), Some(sum)) => {
                    used = sum;
                    holds.push(need);
                }
                _ if !holds.is_empty() => return Fit::Lanes(holds),
                (Some(need), None) => return Fit::Wait(need),
                // What only the next window can pay waits for it, and claims nothing of this one.
                (None, _) if self.next_window_pays(tenant, &window, stream, offer) => return Fit::Wait(Amount::ZERO),
                (None, _) => {
                    return Fit::Never(self.budget_error(&account, &window, &reference, stream, &offer.estimate));
                }
            }
        }
        match holds.is_empty() {
            true => Fit::Wait(Amount::ZERO),
            false => Fit::Lanes(holds),
        }
    }

    /// What these lanes lack beside what is here, where some of them may begin and more of them can be paid and run.
    pub(super) fn more_of(&self, tenant: &str, no: u64, stream: &Level, offers: &[Offer]) -> Option<More> {
        let begin = match self.fit(tenant, no, stream, 0, offers) {
            Fit::Lanes(holds) if holds.len() < offers.len() => holds.len(),
            Fit::Lanes(_) | Fit::Wait(_) | Fit::Never(_) => return None,
        };
        let most = [self.settings.stream_window.max_parallel, self.account_settings(tenant).max_parallel];
        let may_run = most.into_iter().flatten().min().map_or(usize::MAX, |most| most as usize);
        let (left, free) = self.money(tenant, no, stream);
        let (mut all, mut lanes) = (Amount::ZERO, 0);
        for offer in offers.iter().take(may_run) {
            let Some(need) = lane_need(offer, left.less(all)) else { break };
            (all, lanes) = (all.add(need).ok()?, lanes + 1);
        }
        let calls = self.calls_room(tenant).map_or(0, |room| (lanes as u32).saturating_sub(room));
        (lanes > begin).then_some(More { need: all.less(free), calls })
    }

    pub(super) fn budget_error(
        &self,
        account: &Level,
        window: &AccountWindow,
        reference: &WindowRef,
        stream: &Level,
        e: &Estimate,
    ) -> WireError {
        // An account that has all that the call may cost isn't what it is too dear for.
        let binding = if e.guarded.fits(account.left()) { stream } else { account };
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

    /// True where `queue` is among the account's steps and a fresh window of it would pay the call.
    fn next_window_pays(&self, tenant: &str, window: &AccountWindow, stream: &Level, offer: &Offer) -> bool {
        let queues = self.account_settings(tenant).on_limit.is_some_and(|o| o.queue);
        let fresh = Level { limit: window.limit.into(), ..Level::default() }.left().min(stream.left());
        queues && window.ends_ms.is_some() && lane_need(offer, fresh).is_some()
    }

    /// EWINDOW for money that isn't free now: the level and dimension that bind, and when to come back.
    pub(super) fn window_error(&self, tenant: &str, need: Amount) -> WireError {
        let (_, reference, _) = self.window_now(tenant);
        let window = self.shown_window(tenant);
        let level = window.level();
        let (open, most) = (self.books.get(tenant).map_or(0, |b| b.open.len()), self.calls_max(tenant));
        if let Some(most) = most.filter(|most| open >= *most as usize) {
            // Here and at other shards.
            let most = self.account_settings(tenant).max_parallel.unwrap_or(most);
            let open = open.max(most as usize);
            let error =
                WireError::new(Code::Window, format!("the account has {open} calls in flight, as many as it may"));
            let error = error.used(open as u64, most.into()).retry_after_ms(1_000);
            return error.scope(format!("tenant:{}", reference.account));
        }
        let used = level.settled.add(level.held).unwrap_or(level.held);
        let message = format!(
            "{} micro-USD and {} tokens are needed now and not free; wait, or lower the budget",
            need.usd_micros, need.tokens
        );
        let (used, limit) = match need.usd_micros <= level.free().usd_micros && level.limit.tokens.is_some() {
            true => (used.tokens.0, level.limit.amount().tokens.0),
            false => (used.usd_micros.0, level.limit.amount().usd_micros.0),
        };
        let now = self.clock.logged_ms();
        let held_back = self.pace(tenant).filter(|_| self.is_held_back(tenant)).map(|(_, p)| p.resumes_ms(now));
        let held_back = held_back.or(Some(self.home_resumes_ms(tenant)).filter(|at| *at > now));
        let retry = held_back.map_or(1_000, |at| at.saturating_sub(now).max(1_000));
        let mut error = WireError::new(Code::Window, message).used(used, limit);
        error.reset_at = window.ends_ms.map(|at| crate::clock::rfc3339(at).into());
        error.scope(format!("tenant:{}", reference.account)).retry_after_ms(retry)
    }

    /// EWINDOW for who found no slot: the agent that comes first, and how much of its window is used.
    pub(super) fn slot_error(&self, agent: &AgentName) -> WireError {
        let (used, limit) = (self.in_flight(agent), self.seat_window(agent));
        let error = WireError::new(Code::Window, "every agent that matches is busy").used(used.into(), limit.into());
        error.scope(format!("agent:{agent}")).retry_after_ms(1_000)
    }

    /// What keeps an open task from beginning; `None` where no agent could run it.
    pub(super) fn obstacle(&self, no: u64) -> Option<WireError> {
        let stream = self.state.stream(no)?;
        let offers = self.offers_of(no)?;
        let first = offers.first()?;
        let tenant = &stream.accept.account;
        Some(match self.fit(tenant, no, &stream.level(), 0, std::slice::from_ref(first)) {
            Fit::Wait(need) => self.window_error(tenant, need),
            Fit::Never(error) => error,
            Fit::Lanes(_) => self.slot_error(&first.agent),
        })
    }
}

/// What a call holds where so much is left; `None`: it can't begin on that. The first grant covers the prompt plus one slice, and
/// all of it where the agent can't be stopped.
fn lane_need(offer: &Offer, left: Amount) -> Option<Amount> {
    let e = &offer.estimate;
    let need = e.guarded.min(left);
    let suffices = first_grant(offer).fits(need) && (offer.capabilities.stop != Stop::None || need == e.guarded);
    (e.mean.fits(left) && suffices).then_some(need)
}

/// The least hold that a call can begin with.
pub(super) fn first_grant(offer: &Offer) -> Amount {
    let e = &offer.estimate;
    let slice = |guarded: u64, input: u64| guarded.div_ceil(4).min(guarded.saturating_sub(input));
    // An agent that counts is told less than its hold; the prompt has to fit in that too.
    let up = 1_000_000 + offer.capabilities.counted_up_ppm.map_or(0, u64::from).min(1_000_000);
    let least = |guarded: u64, input: u64| {
        let told = Tokens(input).scale_ppm_up(up).map_or(u64::MAX, |t| t.0);
        input.saturating_add(slice(guarded, input)).max(told)
    };
    Amount::new(least(e.guarded.tokens.0, e.input.tokens.0), least(e.guarded.usd_micros.0, e.input.usd_micros.0))
}

pub(super) fn stream_qos(stream: &Stream) -> Qos {
    Qos::from_wire(stream.accept.qos).unwrap_or_default()
}

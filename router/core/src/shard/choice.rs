//! Who could run a task, in which order, and why: filters with named reasons, the estimate of each, the score. It decides
//! nothing about money and asks nobody for a slot.

use super::Shard;
use super::client::Wants;
use super::offer::Offer;
use super::seat::Seat;
use super::tool::{Needs, barrier};
use crate::estimate::{Ask, Estimate, estimate, overage};
use crate::policy::Weights;
use crate::record::Accept;
use crate::score::{Candidate, Measured, Task, Terms, ahead, terms};
use crate::statistics::{Row, day_of};
use atp_proto::content::{EstimateFigures, Status};
use atp_proto::{AgentName, Qos};
use std::collections::BTreeMap;
use std::fmt;

/// What a task is, as far as the choice of agents looks at it.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) task: Task<'a>,
    pub(super) prompt_tokens: u64,
    pub(super) qos: Qos,
    pub(super) needs: &'a Needs,
}

impl<'a> Request<'a> {
    pub(super) fn of(accept: &'a Accept, wants: &'a Wants) -> Self {
        let task = Task { task_type: &accept.task_type, languages: &accept.languages, category: &accept.category };
        let qos = Qos::from_wire(accept.qos).unwrap_or_default();
        Self { task, prompt_tokens: wants.prompt_tokens, qos, needs: &wants.needs }
    }
}

/// Why an agent isn't asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    Gone,
    /// PAUSE or DRAINING.
    Status(Status),
    /// It refused with a time until when to leave it alone.
    Resting,
    /// It lists task types, and not this one.
    Capability,
    /// Its capabilities leave out the task's QoS.
    Qos,
    /// Its estimates were too low too often, and others match.
    Tier(Qos),
    /// It lacks a tool or a security group that the task asks for.
    Security,
    /// Prompt and answer don't fit into its model.
    Context,
    /// Its estimate failed, or it can't be called under a budget.
    Estimate,
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("not connected"),
            Self::Status(status) => write!(f, "status {}", status.as_str()),
            Self::Resting => f.write_str("asked to be left alone"),
            Self::Capability => f.write_str("task type not listed"),
            Self::Qos => f.write_str("QoS not listed"),
            Self::Tier(tier) => write!(f, "tier {}", tier.as_str()),
            Self::Security => f.write_str("tools or security groups"),
            Self::Context => f.write_str("context too small"),
            Self::Estimate => f.write_str("estimate failed"),
        }
    }
}

impl Shard {
    /// The estimate of a call of this agent, whatever its status; `preflight` is its own answer about this task.
    pub(super) fn estimate_of(
        &self,
        agent: &AgentName,
        request: &Request<'_>,
        preflight: Option<&EstimateFigures>,
    ) -> Option<Estimate> {
        let seat = self.seats.get(agent).filter(|s| s.up)?;
        let model = seat.capabilities.models.first().map_or("", |m| m.id.as_str());
        let row = self.learned_row(agent.as_str(), model, request.task.task_type);
        let ask = Ask {
            prompt_tokens: request.prompt_tokens,
            qos: request.qos,
            category: request.task.category,
            preflight,
            learned: row.and_then(Row::figures),
            registered: self.settings.registry.cost(agent.as_str(), model),
        };
        estimate(&seat.capabilities, &ask, &self.settings.prices, &self.settings.stream_window).ok().flatten()
    }

    /// An offer of one agent by name.
    pub(super) fn offer(&self, agent: &AgentName, request: &Request<'_>, rule: &str) -> Option<Offer> {
        let capabilities = self.seats.get(agent)?.capabilities.clone();
        if barrier(&capabilities, request.needs).is_some() {
            return None;
        }
        let estimate = self.estimate_of(agent, request, None)?;
        Some(Offer { agent: agent.clone(), capabilities, estimate, why: rule.into() })
    }

    fn filtered(&self, agent: &AgentName, seat: &Seat, request: &Request<'_>) -> Result<Estimate, Filter> {
        let (c, task_type) = (&seat.capabilities, request.task.task_type);
        if !seat.up {
            return Err(Filter::Gone);
        }
        if seat.drained {
            return Err(Filter::Status(Status::Draining));
        }
        if !seat.may_begin(request.qos == Qos::Gold && self.settings.flow.gold_passes_pause) {
            return Err(Filter::Status(seat.status.status));
        }
        if seat.skip_until > self.now_ms {
            return Err(Filter::Resting);
        }
        if !task_type.is_empty() && !c.skills.is_empty() && c.skills.iter().all(|s| s != task_type) {
            return Err(Filter::Capability);
        }
        if !c.qos.is_empty() && !c.qos.contains(&request.qos) {
            return Err(Filter::Qos);
        }
        if barrier(c, request.needs).is_some() {
            return Err(Filter::Security);
        }
        let estimate = self.estimate_of(agent, request, None).ok_or(Filter::Estimate)?;
        let size = c.models.first().and_then(|m| m.context_tokens);
        if size.is_some_and(|size| estimate.mean.tokens.0 > size) {
            return Err(Filter::Context);
        }
        Ok(estimate)
    }

    pub(super) fn tier(&self, agent: &AgentName) -> Qos {
        // Its home knows before all others.
        let known = if self.is_home_of_agent(agent) { self.state.statistics() } else { self.statistics() };
        known.agent(agent.as_str()).map_or(Qos::Gold, |l| l.standing().tier())
    }

    /// Each known agent with its estimate, or why it isn't asked.
    fn judged(&self, request: &Request<'_>) -> Vec<(AgentName, Result<Estimate, Filter>)> {
        let mut judged: Vec<(AgentName, Result<Estimate, Filter>)> =
            self.seats.iter().map(|(name, seat)| (name.clone(), self.filtered(name, seat, request))).collect();
        let trusted = |name: &AgentName| self.tier(name) <= request.qos;
        if judged.iter().any(|(name, found)| found.is_ok() && trusted(name)) {
            for (name, found) in judged.iter_mut().filter(|(name, found)| found.is_ok() && !trusted(name)) {
                *found = Err(Filter::Tier(self.tier(name)));
            }
        }
        judged
    }

    /// Why each agent isn't asked, in a line; for who waits in vain.
    pub(super) fn filters(&self, request: &Request<'_>) -> String {
        let lines: Vec<String> = self
            .judged(request)
            .into_iter()
            .filter_map(|(name, found)| found.err().map(|filter| format!("{name}: {filter}")))
            .take(8)
            .collect();
        lines.join(", ")
    }

    fn measured(&self, agent: &AgentName, model: &str, task_type: &str) -> Measured {
        let today = day_of(self.clock.logged_ms());
        let Some(row) = self.learned_row(agent.as_str(), model, task_type) else {
            return Measured::default();
        };
        let (errors, (accepted, decided)) = (row.errors(today), row.results(today));
        Measured {
            decided,
            accepted,
            latency_ms: row.figures().map(|f| f.latency_ms),
            runs: errors.runs,
            mape_ppm: errors.mape_ppm,
            under_ppm: errors.under_ppm,
        }
    }

    /// What is known of a row: by all shards, or by this one where that is ahead of them.
    fn learned_row(&self, agent: &str, model: &str, task_type: &str) -> Option<&Row> {
        let own = self.state.statistics().row(agent, model, task_type);
        let of_all = self.statistics().row(agent, model, task_type);
        own.into_iter().chain(of_all).max_by_key(|row| row.count)
    }

    /// The p95 overage factor of estimates like this one: what its call may still need beside its hold.
    pub(super) fn overage_ppm(&self, offer: &Offer, task_type: &str) -> u64 {
        let today = day_of(self.clock.logged_ms());
        let row = self.learned_row(offer.agent.as_str(), &offer.estimate.model, task_type);
        row.map_or(1_000_000, |r| r.overage_ppm(offer.estimate.source as u32, today))
    }

    /// For how long a slot is of use to the stream's call on this agent: until twice what such calls take before the deadline,
    /// so that no slot is spent on what will be cut off. With half of its time left a task is always tried (ATP-8-13).
    pub(super) fn lasts_ms(&self, no: u64, offer: &Offer) -> u64 {
        let (Some(stream), Some(live)) = (self.state.stream(no), self.live.get(&no)) else { return 0 };
        let task_type = &stream.accept.task_type;
        let row = self.learned_row(offer.agent.as_str(), &offer.estimate.model, task_type);
        let takes = row.and_then(Row::figures).map_or(0, |f| f.latency_ms.saturating_mul(2));
        let left = live.deadline_at.saturating_sub(self.now_ms);
        left.saturating_sub(takes.min(stream.accept.deadline_ms / 2))
    }

    /// What an estimate counts in comparisons: its guarded micro-USD and the surcharge of an agent that cools off.
    fn effective_cost(&self, agent: &AgentName, estimate: &Estimate) -> u64 {
        let surcharge = self.seats.get(agent).map_or(0, |s| s.flow.surcharge_ppm);
        overage(estimate.guarded.usd_micros.0, 1_000_000 + u64::from(surcharge))
    }

    /// Terms and effective cost of each.
    fn scored(&self, task: &Task<'_>, found: &[(AgentName, Estimate)]) -> Vec<(Terms, u64)> {
        let costs: Vec<u64> = found.iter().map(|(agent, e)| self.effective_cost(agent, e)).collect();
        let candidates: Vec<Candidate<'_>> = found
            .iter()
            .zip(&costs)
            .filter_map(|((agent, e), cost)| {
                Some(Candidate {
                    capabilities: &self.seats.get(agent)?.capabilities,
                    cost_usd_micros: *cost,
                    need_tokens: e.mean.tokens.0,
                    measured: self.measured(agent, &e.model, task.task_type),
                })
            })
            .collect();
        terms(task, &candidates).into_iter().zip(costs).collect()
    }

    fn weights(&self) -> Weights {
        self.settings.policy.weights
    }

    /// The agents that match, in order of rank: those that can begin now, then by score; ties: lower effective cost, name.
    pub(super) fn ranked(&self, request: &Request<'_>) -> Vec<Offer> {
        let found: Vec<(AgentName, Estimate)> =
            self.judged(request).into_iter().filter_map(|(name, found)| Some((name, found.ok()?))).collect();
        let weights = self.weights();
        let scored = self.scored(&request.task, &found);
        let full = |agent: &AgentName| self.in_flight(agent) >= self.seat_window(agent);
        let mut ranks: Vec<_> = found
            .into_iter()
            .zip(scored)
            .map(|((agent, estimate), (terms, cost))| {
                (full(&agent), terms.score(&weights), cost, agent, estimate, terms)
            })
            .collect();
        // Stable: the names are in order.
        ranks.sort_by_key(|(full, score, cost, ..)| (*full, std::cmp::Reverse(*score), *cost));
        let n = ranks.len();
        let why: Vec<String> = (0..n)
            .map(|i| {
                let (_, score, _, _, _, terms) = &ranks[i];
                let why = match ranks.get(i + 1) {
                    None if n == 1 => "the only one that matches".into(),
                    None => "the last that matches".into(),
                    Some((true, next, _, other, ..)) if next > score => format!("{other} is full"),
                    Some((_, _, _, other, _, next)) => lead(&ahead(&weights, terms, next), other),
                };
                format!("score {score}, rank {} of {n}: {why}", i + 1)
            })
            .collect();
        ranks
            .into_iter()
            .zip(why)
            .filter_map(|((_, _, _, agent, estimate, _), why)| {
                let capabilities = self.seats.get(&agent)?.capabilities.clone();
                Some(Offer { agent, capabilities, estimate, why })
            })
            .collect()
    }

    /// The scores of the connected agents for a task that names nothing.
    pub(super) fn scores(&self) -> BTreeMap<AgentName, u64> {
        let needs = Needs::default();
        let request = Request { task: Task::default(), prompt_tokens: 0, qos: Qos::default(), needs: &needs };
        let up = self.seats.keys().filter_map(|a| Some((a.clone(), self.estimate_of(a, &request, None)?)));
        let found: Vec<(AgentName, Estimate)> = up.collect();
        let scored = self.scored(&request.task, &found);
        found.into_iter().zip(scored).map(|((agent, _), (terms, _))| (agent, terms.score(&self.weights()))).collect()
    }
}

/// What puts an agent before the next one.
fn lead(terms: &[(&'static str, u64)], other: &AgentName) -> String {
    if terms.is_empty() {
        return format!("even with {other}, by cost and name");
    }
    let terms: Vec<String> = terms.iter().map(|(name, lead)| format!("{name} +{lead}")).collect();
    format!("{} before {other}", terms.join(", "))
}

/// Why a call has this price: source, runs, k.
pub(super) fn price_rule(e: &Estimate, k_ppm: u64) -> String {
    let k = match k_ppm {
        2_000_000 => "2",
        1_000_000 => "1",
        _ => "0.5",
    };
    match e.samples {
        0 => format!("price: {}, k {k}", e.source.as_str()),
        n => format!("price: {} of {n} runs, k {k}", e.source.as_str()),
    }
}

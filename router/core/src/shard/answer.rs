//! Answers to queries: rows of `ps`, `agents`, `accounts`, one stream, its bill, and the figures of `verify`.

use super::Shard;
use super::closing::qos;
use crate::clock::rfc3339;
use crate::message::{Answer, Effect, Query, StreamAnswer};
use crate::record::{Faster, Record};
use crate::statistics::{RUNS_MIN, Row, day_of};
use crate::stream::Stream;
use crate::view::{AccountView, AgentView, AgentWindows, StreamView};
use crate::window::effective;
use atp_proto::content::{Status, WindowView};
use atp_proto::{AgentName, Amount, StreamId, TenantId, UsdMicros};
use std::collections::{BTreeMap, BTreeSet};

/// The reason of an agent that an operator drained.
const DRAINED: &str = "drained by an operator";

impl Shard {
    pub(super) fn query(&mut self, id: u64, query: Query) {
        let answer = match query {
            Query::Streams { tenant } => {
                let of_tenant = self.state.streams().filter(|(_, s)| s.accept.key.tenant == tenant.as_str());
                Answer::Streams(of_tenant.map(|(_, s)| view(s)).collect())
            }
            Query::Stream { tenant, stream } => Answer::Stream(self.find(&tenant, &stream).map(|s| {
                Box::new(StreamAnswer { view: view(s), bill: self.bill(s, false), result: None, from: s.from })
            })),
            Query::Bill { tenant, stream } => Answer::Bill(self.find(&tenant, &stream).map(|s| self.bill(s, false))),
            Query::Accounts => Answer::Accounts { position: self.state.position(), accounts: self.accounts() },
            Query::Agents => Answer::Agents(self.agents()),
            Query::Projection { all, agents, max } => Answer::Projection(Box::new(self.projection(all, agents, max))),
            Query::Verify => Answer::Verify(Box::new(self.state.verify_view())),
        };
        self.effect(Effect::Answer { id, answer });
    }

    /// An operator's word on an agent, answered by the agent's row.
    pub(super) fn drain_and_answer(&mut self, id: u64, agent: AgentName, drained: bool) {
        let known = self.drain_agent(&agent, drained);
        let rows = if known { vec![self.agent(agent, &self.scores())] } else { Vec::new() };
        self.effect(Effect::Answer { id, answer: Answer::Agents(rows) });
    }

    /// Who answers for it stands in the log beside what was allowed.
    pub(super) fn go_faster(&mut self, id: u64, account: &TenantId, more: Amount, for_ms: u64, by: String) {
        let mut accounts = Vec::new();
        if self.pace_view(account.as_str()).is_some() {
            let until_ms = self.clock.logged_ms().saturating_add(for_ms);
            let account = account.to_string();
            self.record(Record::Faster(Faster { account: account.clone(), more: more.into(), until_ms, by }));
            self.account_metric(&account);
            accounts = self.accounts();
            accounts.retain(|row| row.account == account);
        }
        let position = self.state.position();
        self.effect(Effect::Answer { id, answer: Answer::Accounts { position, accounts } });
    }

    fn find(&self, tenant: &TenantId, stream: &StreamId) -> Option<&Stream> {
        self.state.stream(self.state.stream_no(tenant.as_str(), stream.as_str())?)
    }

    /// Windows that are current or hold money; the current one with its pace.
    fn accounts(&self) -> Vec<AccountView> {
        let mut rows = self.state.account_views();
        for row in &mut rows {
            let current = self.state.accounts.get(&row.account).is_some_and(|a| a.current == row.window_id);
            row.pace = self.pace_view(&row.account).filter(|_| current);
        }
        rows
    }

    /// Agents that are or were connected, and those that the log knows.
    fn agents(&self) -> Vec<AgentView> {
        let scores = self.scores();
        self.agent_names().into_iter().map(|name| self.agent(name, &scores)).collect()
    }

    pub(super) fn agent_names(&self) -> BTreeSet<AgentName> {
        let known = self.state.agents.keys().chain(self.state.standings.keys()).map(|name| AgentName::new(name));
        known.chain(self.seats.keys().cloned()).collect()
    }

    fn agent(&self, name: AgentName, scores: &BTreeMap<AgentName, u64>) -> AgentView {
        let today = day_of(self.clock.logged_ms());
        let learned = self.statistics().agent(name.as_str());
        let errors = learned.map(|l| l.errors(today)).filter(|e| e.runs >= RUNS_MIN);
        AgentView {
            mape_7d_ppm: errors.map(|e| e.mape_ppm),
            under_rate_7d_ppm: errors.map(|e| e.under_ppm),
            p95_overage_ppm: learned.and_then(|l| l.overage_ppm(today)),
            statistics: learned.map_or_else(Vec::new, |l| l.rows().filter_map(Row::view).collect()),
            score_ppm: scores.get(&name).copied(),
            ..self.agent_now(name)
        }
    }

    /// How an agent stands, without what was learned of it.
    pub(super) fn agent_now(&self, name: AgentName) -> AgentView {
        let seat = self.seats.get(&name);
        let router = WindowView {
            max_parallel: self.settings.agent_window.max_parallel,
            max_tokens: self.settings.agent_window.limit.tokens,
            max_usd_micros: self.settings.agent_window.limit.usd_micros,
        };
        let standing = self.state.standing(name.as_str());
        let drained = standing.is_some_and(|s| s.drained);
        let suggested = seat.and_then(|s| s.status.suggested_window).unwrap_or_default();
        let calls = |max_parallel| WindowView { max_parallel, ..WindowView::default() };
        let own = effective(calls(seat.map(|s| s.capabilities.max_parallel)), suggested);
        let earned = calls(seat.map(|s| s.flow.window));
        let here = seat.filter(|s| s.up);
        let status = match here {
            None => "GONE",
            Some(_) if drained => Status::Draining.as_str(),
            Some(seat) => seat.status.status.as_str(),
        };
        let reason = if drained { Some(DRAINED.into()) } else { seat.and_then(|s| s.status.reason.clone()) };
        let retry_at = standing.filter(|s| s.status() == Status::Pause).and_then(|s| s.until_ms).map(rfc3339);
        let flow = seat.map(|s| s.flow).unwrap_or_default();
        AgentView {
            host: seat.map_or_else(String::new, |s| s.capabilities.host.clone()),
            incarnation: seat.map_or_else(String::new, |s| s.incarnation.to_string()),
            adapter: seat.map_or_else(String::new, |s| s.capabilities.adapter.clone()),
            models: seat.map_or_else(Vec::new, |s| s.capabilities.models.iter().map(|m| m.id.clone()).collect()),
            status: status.into(),
            reason,
            retry_at: here.and(retry_at),
            drained,
            healthy: here.is_some() && flow.healthy,
            breaker: flow.breaker.as_str().into(),
            aimd: flow.aimd,
            surcharge_ppm: flow.surcharge_ppm,
            window: AgentWindows { router, agent: own, effective: effective(effective(router, own), earned) },
            in_flight: self.in_flight(&name),
            mape_7d_ppm: None,
            under_rate_7d_ppm: None,
            p95_overage_ppm: None,
            statistics: Vec::new(),
            score_ppm: None,
            qos_tier: self.tier(&name),
            spent_usd_micros: UsdMicros(self.state.agent_totals(name.as_str()).spent_usd_micros),
            last_heartbeat_at: None,
            name,
        }
    }
}

fn view(s: &Stream) -> StreamView {
    let mut agents: Vec<AgentName> = s.calls.iter().map(crate::stream::Call::agent).collect();
    agents.sort_unstable();
    agents.dedup();
    StreamView {
        stream_id: s.accept.key.stream.clone(),
        account: s.accept.account.clone(),
        state: s.state(),
        qos: qos(s),
        task_type: s.accept.task_type.clone(),
        agents,
        spent_usd_micros: s.level().settled.usd_micros,
        budget_usd_micros: s.limit().usd_micros,
        started_at: rfc3339(s.accepted_at),
        last_event_at: rfc3339(s.last_at),
    }
}

//! Answers to queries: rows of `ps`, `agents`, `accounts`, one stream, its bill, and the figures of `verify`.

use super::Shard;
use super::closing::qos;
use crate::clock::rfc3339;
use crate::message::{Answer, Effect, Query, StreamAnswer};
use crate::statistics::{RUNS_MIN, day_of};
use crate::stream::Stream;
use crate::view::{AgentView, AgentWindows, StreamView};
use atp_proto::content::WindowView;
use atp_proto::{AgentName, StreamId, TenantId, UsdMicros};
use std::collections::{BTreeMap, BTreeSet};

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
            Query::Accounts => {
                Answer::Accounts { position: self.state.position(), accounts: self.state.account_views() }
            }
            Query::Agents => Answer::Agents(self.agents()),
            Query::Verify => Answer::Verify(Box::new(self.state.verify_view())),
        };
        self.effect(Effect::Answer { id, answer });
    }

    fn find(&self, tenant: &TenantId, stream: &StreamId) -> Option<&Stream> {
        self.state.stream(self.state.stream_no(tenant.as_str(), stream.as_str())?)
    }

    /// Agents that are or were connected, and those that the log knows.
    fn agents(&self) -> Vec<AgentView> {
        let known = self.state.agents.keys().map(|name| AgentName::new(name));
        let names: BTreeSet<AgentName> = known.chain(self.seats.keys().cloned()).collect();
        let scores: BTreeMap<AgentName, u64> = self.scores().into_iter().collect();
        names.into_iter().map(|name| self.agent(name, &scores)).collect()
    }

    fn agent(&self, name: AgentName, scores: &BTreeMap<AgentName, u64>) -> AgentView {
        let today = day_of(self.clock.logged_ms());
        let learned = self.state.statistics().agent(name.as_str());
        let errors = learned.map(|l| l.errors(today)).filter(|e| e.runs >= RUNS_MIN);
        let seat = self.seats.get(&name);
        let router = WindowView {
            max_parallel: self.settings.agent_window.max_parallel,
            max_tokens: self.settings.agent_window.limit.tokens,
            max_usd_micros: self.settings.agent_window.limit.usd_micros,
        };
        let own = seat
            .map(|s| WindowView { max_parallel: Some(s.capabilities.max_parallel), ..WindowView::default() })
            .unwrap_or_default();
        let least = |a: Option<u32>, b: Option<u32>| a.into_iter().chain(b).min();
        let effective = WindowView { max_parallel: least(router.max_parallel, own.max_parallel), ..router };
        AgentView {
            host: seat.map_or_else(String::new, |s| s.capabilities.host.clone()),
            incarnation: seat.map_or_else(String::new, |s| s.incarnation.to_string()),
            adapter: seat.map_or_else(String::new, |s| s.capabilities.adapter.clone()),
            models: seat.map_or_else(Vec::new, |s| s.capabilities.models.iter().map(|m| m.id.clone()).collect()),
            status: seat.filter(|s| s.up).map_or("GONE", |s| s.status.status.as_str()).into(),
            reason: seat.and_then(|s| s.status.reason.clone()),
            window: AgentWindows { router, agent: own, effective },
            in_flight: self.in_flight(&name),
            mape_7d_ppm: errors.map(|e| e.mape_ppm),
            under_rate_7d_ppm: errors.map(|e| e.under_ppm),
            p95_overage_ppm: learned.and_then(|l| l.overage_ppm(today)),
            score_ppm: scores.get(&name).copied(),
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

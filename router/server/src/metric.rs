//! Names and labels of `/metrics`, in one place. Labels are bounded: no stream ids, payload types from a fixed list.

use atp_core::agent::breaker::BreakerState;
use atp_core::message::{Flow, LogRoom, Metric};
use atp_core::placement::Placement;
use atp_proto::frame::kind;
use atp_proto::{AgentName, Qos, TenantId};
use metrics::{Counter, Gauge, counter, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// The status of an agent that isn't connected.
pub(crate) const GONE: &str = "GONE";

/// Installs the process's recorder at the first call; later calls return the same one.
pub(crate) fn install() -> PrometheusHandle {
    HANDLE
        .get_or_init(|| {
            let seconds =
                [1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0];
            let recorder = PrometheusBuilder::new()
                .set_buckets(&seconds)
                .and_then(|b| {
                    let name = metrics_exporter_prometheus::Matcher::Full("atp_estimate_error_ratio".into());
                    b.set_buckets_for_metric(name, &[0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0])
                })
                .expect("the bucket lists aren't empty")
                .build_recorder();
            let handle = recorder.handle();
            // Another recorder of the embedding program stays; `/metrics` is empty then.
            let _ = metrics::set_global_recorder(recorder);
            let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            gauge!("process_start_time_seconds").set(began.as_secs_f64());
            handle
        })
        .clone()
}

const TYPES: [&str; 26] = [
    kind::TASK_SUBMIT,
    kind::TASK_ANSWER,
    kind::TASK_CANCEL,
    kind::RESULT_PARTIAL,
    kind::RESULT_PROVISIONAL,
    kind::RESULT_FINAL,
    kind::AGENT_LOG,
    kind::ESTIMATE,
    kind::ESTIMATE_RESULT,
    kind::DISPATCH,
    kind::AGENT_CANCEL,
    kind::HELLO,
    kind::REDIRECT,
    kind::CAPABILITIES,
    kind::ACCEPTED,
    kind::RESUME,
    kind::BILL,
    kind::STATUS,
    kind::WINDOW_UPDATE,
    kind::BUDGET_UPDATE,
    kind::ACK,
    kind::ERROR,
    kind::TOOL_REQUEST,
    kind::TOOL_RESULT,
    "none",
    "other",
];

/// Frames of one connection and direction, counted without a lock and added up once per batch.
pub(crate) struct FrameCounts {
    counters: [Option<Counter>; TYPES.len()],
    counts: [u32; TYPES.len()],
    direction: &'static str,
}

impl FrameCounts {
    pub(crate) fn new(direction: &'static str) -> Self {
        Self { counters: [const { None }; TYPES.len()], counts: [0; TYPES.len()], direction }
    }

    pub(crate) fn count(&mut self, kind_of_frame: &str) {
        // The frame that comes a million times is looked for first.
        let at = match kind_of_frame {
            kind::RESULT_PARTIAL => 3,
            "" => TYPES.len() - 2,
            other => TYPES.iter().position(|t| *t == other).unwrap_or(TYPES.len() - 1),
        };
        self.counts[at] += 1;
    }

    pub(crate) fn flush(&mut self) {
        for (at, count) in self.counts.iter_mut().enumerate() {
            if *count > 0 {
                let counter = self.counters[at].get_or_insert_with(
                    || counter!("atp_frames_total", "direction" => self.direction, "type" => TYPES[at]),
                );
                counter.increment(u64::from(*count));
                *count = 0;
            }
        }
    }
}

/// A frame, message or task that was let go, by reason.
pub(crate) fn dropped(reason: &'static str) {
    counter!("atp_dropped_total", "reason" => reason).increment(1);
}

/// One of an agent's statuses is 1, the others are 0; and the calls that wait for a slot of it. Handles are bounded by
/// `limits.agents`.
#[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature
/// Another router that couldn't prove the key.
pub(crate) fn peer_refused() {
    counter!("atp_peer_refused_total").increment(1);
}

/// Routers that this one is linked to.
pub(crate) fn peers(linked: usize) {
    gauge!("atp_peers_linked").set(linked as f64);
}

pub(crate) fn agent(agent: &AgentName, status: &'static str, waiting: usize) {
    const ALL: [&str; 5] = ["READY", "BUSY", "PAUSE", "DRAINING", GONE];
    for one in ALL {
        let value = if one == status { 1.0 } else { 0.0 };
        gauge!("atp_agent_status", "agent" => agent.to_string(), "status" => one).set(value);
    }
    gauge!("atp_agent_waiting_calls", "agent" => agent.to_string()).set(waiting as f64);
}

/// How many shards this router owns and serves, of how many that the log has (0: not known yet), and how much room the log has: 0 enough, 1 low (new work is refused),
/// 2 nearly none (running calls are told to stop).
#[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature
pub(crate) fn health(serving: usize, shards: u32, room: LogRoom) {
    gauge!("atp_shards_serving").set(serving as f64);
    gauge!("atp_shards").set(f64::from(shards));
    gauge!("atp_log_room_level").set(f64::from(room as u8));
}

/// How much an agent is given: its effective window, what its results have earned, its breaker (one of the states is 1).
pub(crate) fn agent_flow(agent: &AgentName, flow: &Flow) {
    let name = agent.to_string();
    gauge!("atp_agent_window_calls", "agent" => name.clone()).set(f64::from(flow.window));
    gauge!("atp_agent_aimd_calls", "agent" => name.clone()).set(f64::from(flow.aimd));
    gauge!("atp_agent_surcharge_ppm", "agent" => name.clone()).set(f64::from(flow.surcharge_ppm));
    gauge!("atp_agent_healthy", "agent" => name.clone()).set(if flow.healthy { 1.0 } else { 0.0 });
    for one in [BreakerState::Closed, BreakerState::Open, BreakerState::HalfOpen] {
        let value = if one == flow.breaker { 1.0 } else { 0.0 };
        gauge!("atp_agent_breaker", "agent" => name.clone(), "state" => one.as_str()).set(value);
    }
}

/// What one shard adds to a gauge that is the sum over all of them; nothing any more when it is dropped.
pub(crate) struct Part {
    gauge: Gauge,
    value: f64,
}

impl Part {
    pub(crate) fn of(gauge: Gauge) -> Self {
        Self { gauge, value: 0.0 }
    }

    #[allow(clippy::float_cmp)] // whole numbers, compared with what was set
    pub(crate) fn set(&mut self, value: f64) {
        if value != self.value {
            self.gauge.increment(value - self.value);
            self.value = value;
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.gauge.decrement(self.value);
    }
}

/// One shard's parts of the gauges that its facts set. What isn't a sum its home shard says.
pub(crate) struct Facts {
    shard: u32,
    placement: Placement,
    streams_open: BTreeMap<Qos, Part>,
    calls_in_flight: BTreeMap<AgentName, Part>,
    held: BTreeMap<TenantId, Part>,
    remaining: BTreeMap<TenantId, Part>,
}

impl Facts {
    pub(crate) fn of(shard: u32, placement: Placement) -> Self {
        Self {
            shard,
            placement,
            streams_open: BTreeMap::new(),
            calls_in_flight: BTreeMap::new(),
            held: BTreeMap::new(),
            remaining: BTreeMap::new(),
        }
    }

    #[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature; money never comes back from here
    pub(crate) fn record(&mut self, metric: Metric) {
        match metric {
            Metric::StreamsOpen { qos, n } => {
                let part = || Part::of(gauge!("atp_streams_open", "qos" => qos.as_str()));
                self.streams_open.entry(qos).or_insert_with(part).set(n as f64);
            }
            Metric::CallsInFlight { agent, n } => {
                let part = || Part::of(gauge!("atp_calls_in_flight", "agent" => agent.to_string()));
                self.calls_in_flight.entry(agent.clone()).or_insert_with(part).set(n as f64);
            }
            Metric::AgentTier { agent, tier } if self.placement.home_of_agent(&agent) == self.shard => {
                gauge!("atp_agent_qos_tier", "agent" => agent.to_string()).set(f64::from(tier as u32));
            }
            Metric::Account { account, held_usd_micros, remaining_usd_micros, limit_usd_micros, ahead_of_pace } => {
                let name = account.to_string();
                let part = || Part::of(gauge!("atp_reserved_usd_micros", "account" => name.clone()));
                self.held.entry(account.clone()).or_insert_with(part).set(held_usd_micros as f64);
                if let Some(remaining) = remaining_usd_micros {
                    let part = || Part::of(gauge!("atp_budget_remaining_usd_micros", "account" => name.clone()));
                    self.remaining.entry(account.clone()).or_insert_with(part).set(remaining as f64);
                }
                if self.placement.home_of(&name) != self.shard {
                    return;
                }
                if let Some(limit) = limit_usd_micros {
                    gauge!("atp_budget_limit_usd_micros", "account" => name.clone()).set(limit as f64);
                }
                if let Some(ahead) = ahead_of_pace {
                    gauge!("atp_account_ahead_of_pace", "account" => name).set(if ahead { 1.0 } else { 0.0 });
                }
            }
            other => record(other),
        }
    }
}

#[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature; money never comes back from here
fn record(metric: Metric) {
    match metric {
        Metric::Admission { outcome, code } => {
            counter!("atp_admission_total", "outcome" => outcome, "code" => code).increment(1);
        }
        Metric::Settled {
            account,
            agent,
            model,
            usd_micros,
            in_tokens,
            out_tokens,
            estimated_usd_micros,
            duration_ms,
        } => {
            let (account, agent, model) = (account.to_string(), agent.to_string(), model.to_string());
            counter!("atp_settled_usd_micros_total", "account" => account, "agent" => agent, "model" => model.clone())
                .increment(usd_micros);
            if estimated_usd_micros > 0 {
                histogram!("atp_estimate_error_ratio").record(usd_micros as f64 / estimated_usd_micros as f64);
            }
            for (kind, tokens) in [("input", in_tokens), ("output", out_tokens)] {
                let labels = [("gen_ai_token_type", kind.to_owned()), ("gen_ai_request_model", model.clone())];
                histogram!("gen_ai_client_token_usage", &labels).record(tokens as f64);
            }
            histogram!("gen_ai_client_operation_duration_seconds", "gen_ai_request_model" => model)
                .record(duration_ms as f64 / 1000.0);
        }
        Metric::FirstToken { agent: _, model, ms } => {
            histogram!("gen_ai_server_time_to_first_token_seconds", "gen_ai_request_model" => model.to_string())
                .record(ms as f64 / 1000.0);
        }
        Metric::Breach { agent, usd_micros, tokens } => {
            tracing::warn!(%agent, usd_micros, tokens, "a call cost more than its grant and its agent's reach");
            counter!("atp_reach_breaches_total", "agent" => agent.to_string()).increment(1);
        }
        Metric::Redelivered => counter!("atp_redelivered_total").increment(1),
        Metric::Dropped { reason } => dropped(reason),
        Metric::Tool { tool, outcome } => {
            counter!("atp_tool_calls_total", "tool" => tool.to_string(), "outcome" => outcome).increment(1);
        }
        Metric::StreamsOpen { .. }
        | Metric::CallsInFlight { .. }
        | Metric::AgentTier { .. }
        | Metric::Account { .. } => {}
    }
}

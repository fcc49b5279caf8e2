//! The task that shows the shards to the state store: asks each what has changed, at most ten times a second, and writes it, one
//! after the other. When the store fails it waits and then shows everything; the shards remember meanwhile what has changed.

use super::{Batch, Beat, StateStore, StoreError};
use crate::agent_task::Agents;
use crate::inbox::Inbox;
use crate::shards::Shards;
use crate::time::Clocks;
use atp_core::clock::rfc3339;
use atp_core::message::{Answer, Query};
use atp_core::projection::Projection;
use atp_core::record::hex;
use atp_core::view::AgentView;
use atp_proto::AgentName;
use metrics::{counter, gauge, histogram};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between two writes of what has changed.
const EVERY: Duration = Duration::from_millis(100);
/// Between two signs of life, and before a store that failed is tried again.
const BEAT: Duration = Duration::from_secs(1);
/// Rows of streams in one write.
const PAGE: usize = 256;
/// How long a row outlives its router, and how often all are written again: what the store lost by itself comes back.
const ROW_TTL: Duration = Duration::from_secs(300);
const RENEW: Duration = Duration::from_secs(100);
/// How long a router's own entry outlives it.
const ROUTER_TTL: Duration = Duration::from_secs(15);

/// Whose shards are shown.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) router: Arc<str>,
    pub(crate) incarnation: String,
    pub(crate) atp: String,
    pub(crate) http: String,
}

/// How the store is, for `/readyz`.
#[derive(Clone, Debug, Default)]
pub(crate) struct StoreHealth {
    /// Since when it hasn't taken anything, and why.
    pub(crate) away: Option<(u64, String)>,
    /// The last positions that it took, added up over the shards.
    pub(crate) position: u64,
}

impl std::fmt::Display for StoreHealth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.away {
            None if self.position == 0 => f.write_str("not reached yet"),
            None => f.write_str("ok"),
            Some((since, why)) => write!(f, "away since {}: {why}", rfc3339(*since)),
        }
    }
}

pub(crate) struct Projector<S> {
    store: S,
    shards: Shards,
    /// Who is connected here.
    here: Agents,
    identity: Identity,
    clocks: Clocks,
    since_ms: u64,
    /// How long a stream is seen after its end.
    ended_ttl: Duration,
    health: watch::Sender<StoreHealth>,
    /// By shard that runs here.
    shown: BTreeMap<u32, Shown>,
    /// How agents were shown last, each by its home shard.
    agents: BTreeMap<AgentName, AgentView>,
    beat_at: Instant,
    renew_at: Instant,
}

/// What the store has of one shard.
struct Shown {
    /// Everything is to be shown from the beginning.
    all: bool,
    /// The watermark that our last write left.
    wrote: Option<u64>,
    /// What was durable when it was asked last.
    asked: u64,
    /// When this owner of it began, Unix milliseconds.
    since_ms: u64,
}

impl Default for Shown {
    fn default() -> Self {
        Self { all: true, wrote: None, asked: 0, since_ms: 0 }
    }
}

impl<S: StateStore> Projector<S> {
    pub(crate) fn new(
        store: S,
        (shards, here): (Shards, Agents),
        identity: Identity,
        clocks: Clocks,
        ended_ttl: Duration,
        health: watch::Sender<StoreHealth>,
    ) -> Self {
        let now = Instant::now();
        Self {
            store,
            shards,
            here,
            identity,
            clocks,
            since_ms: clocks.now().wall_ms,
            ended_ttl,
            health,
            shown: BTreeMap::new(),
            agents: BTreeMap::new(),
            beat_at: now,
            renew_at: now + RENEW,
        }
    }

    /// Runs until it is stopped.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let show = async {
            loop {
                match self.turn().await {
                    Ok(()) => {
                        self.came_back();
                        tokio::time::sleep(EVERY).await;
                    }
                    Err(error) => {
                        self.failed(&error);
                        tokio::time::sleep(BEAT).await;
                    }
                }
            }
        };
        tokio::select! {
            () = show => {}
            () = stop.cancelled() => {}
        }
    }

    /// Writes all that has changed, shard by shard. One that the store refuses doesn't keep the others from being shown.
    async fn turn(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        let all_here = self.shards.all_here();
        let numbers: BTreeSet<u32> = all_here.iter().map(|(shard, _)| *shard).collect();
        self.shown.retain(|shard, _| numbers.contains(shard));
        let beat = self.beat_at <= now;
        if beat {
            let sign = self.sign(numbers.into_iter().collect());
            self.store.beat(&sign).await?;
            self.beat_at = now + BEAT;
        }
        if self.renew_at <= now {
            self.renew_at = now + RENEW;
            self.show_all();
        }
        let names = self.agents.keys().cloned().chain(self.here.names());
        let homes: BTreeSet<u32> = names.map(|name| self.shards.home_of_agent(&name)).collect();
        let mut refused = Ok(());
        for (shard, here) in all_here {
            let durable = here.health.borrow().durable;
            let shown = self.shown.entry(shard).or_default();
            let all = shown.all;
            if !beat && !all && shown.asked == durable {
                continue;
            }
            shown.asked = durable;
            shown.since_ms = here.health.borrow().since_ms;
            match self.show_shard(shard, &here.inbox, beat, all || (beat && homes.contains(&shard))).await {
                Err(error @ StoreError::Away(_)) => return Err(error),
                Err(error) => {
                    self.shown.insert(shard, Shown::default());
                    refused = Err(error);
                }
                Ok(()) => {}
            }
        }
        refused
    }

    /// Everything is to be shown again.
    fn show_all(&mut self) {
        self.agents.clear();
        self.shown.values_mut().for_each(|shown| shown.all = true);
    }

    /// Writes what has changed in one shard, page by page.
    async fn show_shard(&mut self, shard: u32, inbox: &Inbox, beat: bool, mut agents: bool) -> Result<(), StoreError> {
        // A sign of life is written even if nothing has changed: it carries the watermark.
        let mut sign = beat;
        loop {
            let shown = self.shown.entry(shard).or_default();
            let query = Query::Projection { all: std::mem::take(&mut shown.all), agents, max: PAGE };
            // One that has ended has nothing to show.
            let Some(Answer::Projection(projection)) = inbox.ask(query).await else { return Ok(()) };
            let more = projection.more;
            if sign || agents || !projection.streams.is_empty() {
                self.show(*projection).await?;
            }
            (agents, sign) = (false, false);
            if !more {
                return Ok(());
            }
        }
    }

    fn sign(&self, shards: Vec<u32>) -> Beat {
        Beat {
            router: self.identity.router.clone(),
            incarnation: self.identity.incarnation.clone(),
            atp: self.identity.atp.clone(),
            http: self.identity.http.clone(),
            shards,
            since_ms: self.since_ms,
            at_ms: self.clocks.now().wall_ms,
            ttl: ROUTER_TTL,
        }
    }

    #[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature
    async fn show(&mut self, projection: Projection) -> Result<(), StoreError> {
        let shard = projection.shard;
        let mut agents = projection.agents.unwrap_or_default();
        // Each is shown by its home alone, with its calls of all shards.
        agents.retain(|agent| self.shards.home_of_agent(&agent.name) == shard);
        agents.iter_mut().for_each(|agent| agent.in_flight = self.here.slots_used(&agent.name));
        agents.retain(|agent| self.agents.get(&agent.name) != Some(agent));
        let batch = Batch {
            log: hex(&projection.log_id),
            shard: projection.shard,
            position: projection.position,
            epoch: projection.epoch,
            since_ms: self.shown.get(&shard).map_or(0, |shown| shown.since_ms),
            checkpoint: projection.checkpoint,
            router: self.identity.router.clone(),
            at_ms: self.clocks.now().wall_ms,
            ttl: ROW_TTL,
            ended_ttl: self.ended_ttl,
            streams: projection.streams,
            agents,
        };
        let begun = Instant::now();
        let before = self.store.write(&batch).await?;
        histogram!("atp_store_write_seconds").record(begun.elapsed().as_secs_f64());
        counter!("atp_store_rows_total").increment((batch.streams.len() + batch.agents.len()) as u64);
        let shown = self.shown.entry(shard).or_default();
        let wrote = shown.wrote.replace(batch.position);
        self.agents.extend(batch.agents.into_iter().map(|agent| (agent.name.clone(), agent)));
        if wrote.is_some() && wrote != before {
            tracing::warn!(shard, wrote, found = before, "store: it lost what was written; everything is shown again");
            counter!("atp_store_rebuilds_total").increment(1);
            self.show_all();
            self.shown.values_mut().for_each(|shown| shown.wrote = None);
        }
        let position = self.shown.values().filter_map(|shown| shown.wrote).sum();
        gauge!("atp_store_position").set(position as f64);
        self.health.send_modify(|h| h.position = position);
        Ok(())
    }

    fn failed(&mut self, error: &StoreError) {
        let outcome = match error {
            StoreError::Away(_) => "away",
            StoreError::Stale { .. } => "stale",
            StoreError::OtherLog { .. } => "other_log",
        };
        counter!("atp_store_errors_total", "outcome" => outcome).increment(1);
        gauge!("atp_store_up").set(0.0);
        if matches!(error, StoreError::Away(_)) {
            // What was written and what wasn't isn't known.
            self.show_all();
            self.shown.values_mut().for_each(|shown| shown.wrote = None);
        }
        let now = self.clocks.now().wall_ms;
        self.health.send_modify(|h| match &mut h.away {
            Some((_, why)) => *why = error.to_string(),
            None => {
                tracing::warn!("store: {error}; the router goes on without it");
                h.away = Some((now, error.to_string()));
            }
        });
    }

    fn came_back(&mut self) {
        gauge!("atp_store_up").set(1.0);
        self.health.send_if_modified(|h| {
            let away = h.away.take();
            if away.is_some() {
                tracing::info!("store: it is back, and has everything again");
            }
            away.is_some()
        });
    }
}

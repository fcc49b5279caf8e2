//! The task that shows the shard to the state store: asks what has changed, at most ten times a second, and writes it. When
//! the store fails it waits and then shows everything; the shard remembers meanwhile what has changed.

use super::{Batch, Beat, StateStore, StoreError};
use crate::inbox::Inbox;
use crate::time::Clocks;
use atp_core::clock::rfc3339;
use atp_core::message::{Answer, Query};
use atp_core::projection::Projection;
use atp_core::record::hex;
use atp_core::view::AgentView;
use metrics::{counter, gauge, histogram};
use std::collections::BTreeMap;
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

/// Whose shard is shown.
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
    /// The last position that it took.
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
    inbox: Inbox,
    identity: Identity,
    clocks: Clocks,
    since_ms: u64,
    /// How long a stream is seen after its end.
    ended_ttl: Duration,
    health: watch::Sender<StoreHealth>,
    /// Everything is to be shown from the beginning.
    all: bool,
    /// The watermark that our last write left.
    wrote: Option<u64>,
    /// How agents were shown last.
    agents: BTreeMap<String, AgentView>,
    beat_at: Instant,
    renew_at: Instant,
}

/// The shard has ended: there is nothing to show.
struct Ended;

impl<S: StateStore> Projector<S> {
    pub(crate) fn new(
        store: S,
        inbox: Inbox,
        identity: Identity,
        clocks: Clocks,
        ended_ttl: Duration,
        health: watch::Sender<StoreHealth>,
    ) -> Self {
        let now = Instant::now();
        Self {
            store,
            inbox,
            identity,
            clocks,
            since_ms: clocks.now().wall_ms,
            ended_ttl,
            health,
            all: true,
            wrote: None,
            agents: BTreeMap::new(),
            beat_at: now,
            renew_at: now + RENEW,
        }
    }

    /// Runs until it is stopped or the shard has ended.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let show = async {
            loop {
                match self.turn().await {
                    Ok(Ok(())) => {
                        self.came_back();
                        tokio::time::sleep(EVERY).await;
                    }
                    Ok(Err(error)) => {
                        self.failed(&error);
                        tokio::time::sleep(BEAT).await;
                    }
                    Err(Ended) => return,
                }
            }
        };
        tokio::select! {
            () = show => {}
            () = stop.cancelled() => {}
        }
    }

    /// Writes all that has changed, page by page.
    async fn turn(&mut self) -> Result<Result<(), StoreError>, Ended> {
        let now = Instant::now();
        let beat = self.beat_at <= now;
        if beat {
            let sign = self.sign();
            if let Err(error) = self.store.beat(&sign).await {
                return Ok(Err(error));
            }
            self.beat_at = now + BEAT;
        }
        if self.renew_at <= now {
            self.all = true;
        }
        let mut agents = beat || self.all;
        loop {
            if self.all {
                self.agents.clear();
                self.renew_at = now + RENEW;
            }
            let query = Query::Projection { all: std::mem::take(&mut self.all), agents, max: PAGE };
            let Some(Answer::Projection(projection)) = self.inbox.ask(query).await else { return Err(Ended) };
            let more = projection.more;
            // A sign of life is written even if nothing has changed: it carries the watermark.
            if (agents || !projection.streams.is_empty())
                && let Err(error) = self.show(*projection).await
            {
                return Ok(Err(error));
            }
            agents = false;
            if !more {
                return Ok(Ok(()));
            }
        }
    }

    fn sign(&self) -> Beat {
        Beat {
            router: self.identity.router.clone(),
            incarnation: self.identity.incarnation.clone(),
            atp: self.identity.atp.clone(),
            http: self.identity.http.clone(),
            shards: vec![0],
            since_ms: self.since_ms,
            at_ms: self.clocks.now().wall_ms,
            ttl: ROUTER_TTL,
        }
    }

    #[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature
    async fn show(&mut self, projection: Projection) -> Result<(), StoreError> {
        let mut agents = projection.agents.unwrap_or_default();
        agents.retain(|a| self.agents.get(a.name.as_str()) != Some(a));
        let batch = Batch {
            log: hex(&projection.log_id),
            shard: projection.shard,
            position: projection.position,
            epoch: projection.epoch,
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
        gauge!("atp_store_position").set(batch.position as f64);
        if self.wrote.is_some() && self.wrote != before {
            tracing::warn!(
                wrote = self.wrote,
                found = before,
                "store: it lost what was written; everything is shown again"
            );
            counter!("atp_store_rebuilds_total").increment(1);
            self.all = true;
        }
        self.wrote = Some(batch.position);
        self.agents.extend(batch.agents.into_iter().map(|a| (a.name.to_string(), a)));
        self.health.send_modify(|h| h.position = batch.position);
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
        // What was written and what wasn't isn't known.
        (self.all, self.wrote) = (true, None);
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

//! The store of a single router: the same rows, kept in this process and gone with it.

use super::keys::member;
use super::row::{self, Row};
use super::{Batch, Beat, Fields, READ_MAX, Snapshot, StateStore, StoreError, Watermark, admit};
use atp_core::projection::StreamRow;
use atp_core::view::AgentView;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Rows by name, each with its end. What a row was written with stands beside it once for all rows of a batch.
type Rows<T> = BTreeMap<String, (Instant, Arc<Batch>, T)>;

#[derive(Default)]
struct Shard {
    batch: Option<Arc<Batch>>,
    streams: Rows<StreamRow>,
    agents: Rows<AgentView>,
    /// When rows that have ended are looked for.
    prune_at: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub struct MemoryStore {
    shards: BTreeMap<u32, Shard>,
    routers: BTreeMap<String, (Instant, Beat)>,
    leases: BTreeMap<u32, (Instant, String)>,
}

impl MemoryStore {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

fn fields(row: Row) -> Fields {
    row.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn alive<T>(rows: &Rows<T>, now: Instant, as_row: impl Fn(&Batch, &T) -> Row) -> Vec<Fields> {
    let alive = rows.values().filter(|(ends, ..)| *ends > now).take(READ_MAX);
    alive.map(|(_, batch, one)| fields(as_row(batch, one))).collect()
}

impl StateStore for MemoryStore {
    async fn write(&mut self, batch: &Batch) -> Result<Option<u64>, StoreError> {
        let shard = self.shards.entry(batch.shard).or_default();
        let before = shard.batch.as_ref().map(|b| Watermark {
            log: b.log.clone(),
            position: b.position,
            router: b.router.to_string(),
        });
        let before = admit(batch, before.as_ref())?;
        let now = Instant::now();
        let ends = now + batch.ttl;
        let (log, router) = (batch.log.clone(), batch.router.clone());
        let head = Arc::new(Batch { log, router, streams: Vec::new(), agents: Vec::new(), ..*batch });
        for one in &batch.streams {
            let ttl = batch.ttl_of(one);
            if ttl.is_zero() {
                shard.streams.remove(&member(one));
            } else {
                shard.streams.insert(member(one), (now + ttl, head.clone(), one.clone()));
            }
        }
        for one in &batch.agents {
            shard.agents.insert(one.name.to_string(), (ends, head.clone(), one.clone()));
        }
        shard.batch = Some(head);
        if shard.prune_at.is_none_or(|at| at <= now) {
            shard.prune_at = Some(now + batch.ttl / 10);
            shard.streams.retain(|_, (ends, ..)| *ends > now);
            shard.agents.retain(|_, (ends, ..)| *ends > now);
        }
        Ok(before)
    }

    async fn beat(&mut self, beat: &Beat) -> Result<(), StoreError> {
        self.routers.insert(beat.router.to_string(), (Instant::now() + beat.ttl, beat.clone()));
        Ok(())
    }

    async fn watermark(&mut self, shard: u32) -> Result<Option<Watermark>, StoreError> {
        let batch = self.shards.get(&shard).and_then(|s| s.batch.as_ref());
        Ok(batch.map(|b| Watermark { log: b.log.clone(), position: b.position, router: b.router.to_string() }))
    }

    async fn lease(&mut self, shard: u32, holder: &str, ttl: Duration) -> Result<Option<String>, StoreError> {
        let now = Instant::now();
        if let Some((_, other)) = self.leases.get(&shard).filter(|(ends, of)| *ends > now && of != holder) {
            return Ok(Some(other.clone()));
        }
        self.leases.insert(shard, (now + ttl, holder.to_owned()));
        Ok(None)
    }

    async fn release(&mut self, shard: u32, holder: &str) -> Result<(), StoreError> {
        if self.leases.get(&shard).is_some_and(|(_, of)| of == holder) {
            self.leases.remove(&shard);
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<Snapshot, StoreError> {
        let now = Instant::now();
        let mut snapshot = Snapshot::default();
        let routers = self.routers.values().filter(|(ends, _)| *ends > now);
        snapshot.routers = routers.map(|(_, beat)| fields(row::router(beat))).collect();
        for shard in self.shards.values() {
            snapshot.shards.extend(shard.batch.iter().map(|b| fields(row::shard(b))));
            snapshot.streams.extend(alive(&shard.streams, now, row::stream));
            snapshot.agents.extend(alive(&shard.agents, now, row::agent));
        }
        Ok(snapshot)
    }
}

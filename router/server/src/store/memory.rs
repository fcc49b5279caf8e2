//! The store of a single router: the same rows, kept in this process and gone with it.

use super::keys::member;
use super::lease::GIVEN_BACK;
use super::row::{self, Row};
use super::{
    Batch, Beat, Fields, Found, Lease, READ_MAX, Seen, Snapshot, StateStore, StoreError, Turn, Watermark, admit,
};
use atp_core::clock::rfc3339;
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
    /// Of a shard its holder, or nobody if it was given back.
    leases: BTreeMap<u32, (Instant, Option<String>)>,
    alive: BTreeMap<String, (Instant, String)>,
    drained: BTreeMap<String, String>,
    standbys: BTreeMap<u32, (Instant, (String, u64))>,
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

fn watermark(batch: &Batch) -> Watermark {
    Watermark { log: batch.log.clone(), position: batch.position, router: batch.router.to_string() }
}

fn alive<T>(rows: &Rows<T>, now: Instant, as_row: impl Fn(&Batch, &T) -> Row) -> Vec<Fields> {
    let alive = rows.values().filter(|(ends, ..)| *ends > now).take(READ_MAX);
    alive.map(|(_, batch, one)| fields(as_row(batch, one))).collect()
}

impl StateStore for MemoryStore {
    async fn write(&mut self, batch: &Batch) -> Result<Option<u64>, StoreError> {
        let shard = self.shards.entry(batch.shard).or_default();
        let before = shard.batch.as_ref().map(|b| watermark(b));
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
        Ok(batch.map(|b| watermark(b)))
    }

    async fn turn(&mut self, turn: &Turn<'_>) -> Result<Found, StoreError> {
        let now = Instant::now();
        let ends = now + turn.ttl;
        self.leases.retain(|_, (ends, _)| *ends > now);
        self.alive.retain(|_, (ends, _)| *ends > now);
        self.standbys.retain(|_, (ends, _)| *ends > now);
        let mine = |holder: &str| holder == turn.holder;
        if self.alive.get(turn.router).is_none_or(|(_, of)| mine(of)) {
            self.alive.insert(turn.router.into(), (ends, turn.holder.into()));
            for shard in turn.wanted {
                if self.leases.get(shard).is_none_or(|(_, of)| of.as_deref().is_none_or(mine)) {
                    self.leases.insert(*shard, (ends, Some(turn.holder.into())));
                }
            }
            for (shard, position) in turn.followed {
                self.standbys.insert(*shard, (ends, (turn.router.into(), *position)));
            }
        }
        let seen = |shard| {
            let batch = self.shards.get(&shard).and_then(|s| s.batch.as_ref());
            Seen {
                lease: match self.leases.get(&shard) {
                    Some((_, Some(holder))) => Lease::Of(holder.clone()),
                    Some((_, None)) => Lease::Free,
                    None => Lease::Lapsed,
                },
                watermark: batch.map(|b| watermark(b)),
                epoch: batch.map_or(0, |b| b.epoch),
                since: batch.map(|b| rfc3339(b.since_ms)).unwrap_or_default(),
                standby: self.standbys.get(&shard).map(|(_, standby)| standby.clone()),
            }
        };
        Ok(Found {
            alive: self.alive.iter().map(|(router, (_, holder))| (router.clone(), holder.clone())).collect(),
            drained: self.drained.clone(),
            shards: (0..turn.shards).map(seen).collect(),
        })
    }

    async fn release(
        &mut self,
        shards: &[u32],
        holder: &str,
        heir: Option<(&str, Duration)>,
    ) -> Result<(), StoreError> {
        let (heir, ttl) = heir.map_or((None, GIVEN_BACK), |(heir, ttl)| (Some(heir.to_owned()), ttl));
        for shard in shards {
            if let Some(lease) = self.leases.get_mut(shard).filter(|(_, of)| of.as_deref() == Some(holder)) {
                *lease = (Instant::now() + ttl, heir.clone());
            }
        }
        Ok(())
    }

    async fn leave(&mut self, router: &str, holder: &str) -> Result<(), StoreError> {
        self.alive.retain(|name, (_, of)| name != router || of != holder);
        Ok(())
    }

    async fn drain(&mut self, router: &str, run: Option<&str>) -> Result<(), StoreError> {
        match run {
            Some(run) => self.drained.insert(router.into(), run.into()),
            None => self.drained.remove(router),
        };
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

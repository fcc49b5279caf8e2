//! Keeps states up with the logs of shards that others own: taking one of them begins with what is new.

use crate::log::Source;
use crate::log::offline::Follower;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two looks at all of them.
const EVERY: Duration = Duration::from_millis(500);

/// One shard's state, held by who reads or takes it.
#[derive(Default)]
pub(super) struct Slot {
    follower: Mutex<Option<Follower>>,
    /// 0: nothing was read yet.
    position: AtomicU64,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Follower>> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was read. Blocks while it is being read.
    pub(super) fn take(&self) -> Option<Follower> {
        self.lock().take()
    }

    /// Reads what is new. Blocks.
    fn catch_up(&self, source: Source) {
        let mut follower = self.lock();
        let read = match follower.take() {
            Some(mut follower) => follower.catch_up().map(|()| follower),
            None => Follower::read(source),
        };
        match read {
            Ok(read) => {
                self.position.store(read.position(), Ordering::Relaxed);
                *follower = Some(read);
            }
            // The brokers may be away; whoever takes the shard finds out what is wrong.
            Err(error) => tracing::debug!(%error, "can't follow a shard; trying again"),
        }
    }
}

/// The shards that are followed. Clones share them.
#[derive(Clone)]
pub(super) struct Following {
    log: Source,
    slots: Arc<Mutex<BTreeMap<u32, Arc<Slot>>>>,
}

impl Following {
    pub(super) fn new(log: Source) -> Self {
        Self { log, slots: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on these are followed and no others.
    pub(super) fn set(&self, shards: &BTreeSet<u32>) {
        let mut slots = self.lock();
        slots.retain(|shard, _| shards.contains(shard));
        for shard in shards {
            slots.entry(*shard).or_default();
        }
    }

    /// It isn't followed any more: who takes the shard goes on from here.
    pub(super) fn take(&self, shard: u32) -> Option<Arc<Slot>> {
        self.lock().remove(&shard)
    }

    /// Up to which position each has been read.
    pub(super) fn positions(&self) -> BTreeMap<u32, u64> {
        let read = |(shard, slot): (&u32, &Arc<Slot>)| (*shard, slot.position.load(Ordering::Relaxed));
        self.lock().iter().map(read).filter(|(_, position)| *position > 0).collect()
    }

    /// Reads on until `stop`.
    pub(super) async fn run(self, stop: CancellationToken) {
        loop {
            let all: Vec<(u32, Arc<Slot>)> = self.lock().iter().map(|(shard, slot)| (*shard, slot.clone())).collect();
            for (shard, slot) in all {
                let source = self.log.shard(shard);
                // One that panics is read anew.
                let _ = tokio::task::spawn_blocking(move || slot.catch_up(source)).await;
                if stop.is_cancelled() {
                    return;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

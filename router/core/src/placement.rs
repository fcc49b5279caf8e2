//! Which shard a stream, an account or an agent belongs to, and which router is the first to own a shard. Pure arithmetic over
//! names: the count and the seed stand in Genesis and never change. It knows nobody who is alive.

use atp_proto::{AgentName, StreamId, TenantId};
use hashring::HashRing;
use sha2::{Digest, Sha256};
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

/// Shards of a new log.
pub const SHARDS: u32 = 64;
/// The most that a log may have.
pub const SHARDS_MAX: u32 = 1024;
/// Points of one shard on the ring: at 64 shards the fullest has about a fifth more than its part.
const POINTS: u32 = 128;

/// Where things belong in one log. Clones share the ring.
#[derive(Clone, Debug)]
pub struct Placement {
    shards: u32,
    seed: u64,
    ring: Arc<HashRing<Point, Seeded>>,
}

impl Default for Placement {
    /// One shard.
    fn default() -> Self {
        Self::new(1, 0)
    }
}

impl PartialEq for Placement {
    fn eq(&self, other: &Self) -> bool {
        (self.shards, self.seed) == (other.shards, other.seed)
    }
}

impl Placement {
    /// Of a log with so many shards (at least one) and this seed.
    #[must_use]
    pub fn new(shards: u32, seed: u64) -> Self {
        let shards = shards.max(1);
        let mut ring = HashRing::with_hasher(Seeded(seed));
        if shards > 1 {
            ring.batch_add((0..shards).flat_map(|shard| (0..POINTS).map(move |n| Point { shard, n })).collect());
        }
        Self { shards, seed, ring: Arc::new(ring) }
    }

    #[must_use]
    pub const fn shards(&self) -> u32 {
        self.shards
    }

    /// Of a stream: what stands before the first `.` of its id counts, so that every try of a key meets the ones before it.
    #[must_use]
    pub fn shard_of(&self, tenant: &TenantId, stream: &StreamId) -> u32 {
        let prefix = stream.as_str().split('.').next().unwrap_or_default();
        self.on_ring(Key { kind: b's', parts: [tenant.as_str(), prefix] })
    }

    /// The shard that an account's money is split from.
    #[must_use]
    pub fn home_of(&self, account: &str) -> u32 {
        self.on_ring(Key { kind: b'a', parts: [account, ""] })
    }

    /// The shard that writes down how an agent stands.
    #[must_use]
    pub fn home_of_agent(&self, agent: &AgentName) -> u32 {
        self.on_ring(Key { kind: b'g', parts: [agent.as_str(), ""] })
    }

    /// Routers by how near they are to owning a shard, nearest first: the first that is alive owns it, the second stands by.
    /// A router that comes or goes moves only what it owns.
    #[must_use]
    pub fn rank<'a>(&self, shard: u32, routers: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
        let shard = shard.to_string();
        let weigh = |router: &'a str| (Seeded(self.seed).hash_one(Key { kind: b'r', parts: [&shard, router] }), router);
        let mut ranked: Vec<(u64, &str)> = routers.into_iter().map(weigh).collect();
        ranked.sort_unstable_by(|a, b| b.cmp(a));
        ranked.into_iter().map(|(_, router)| router).collect()
    }

    fn on_ring(&self, key: Key<'_>) -> u32 {
        self.ring.get(&key).map_or(0, |point| point.shard)
    }
}

/// What is hashed, as bytes that don't depend on the machine: a letter, then texts that end in 0.
struct Key<'a> {
    kind: u8,
    parts: [&'a str; 2],
}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&[self.kind]);
        for part in self.parts {
            state.write(part.as_bytes());
            state.write(&[0]);
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Point {
    shard: u32,
    n: u32,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(b"p");
        state.write(&self.shard.to_be_bytes());
        state.write(&self.n.to_be_bytes());
    }
}

/// The first 8 bytes of SHA-256 over the seed (big-endian) and what is written.
#[derive(Clone, Copy, Debug)]
struct Seeded(u64);

impl BuildHasher for Seeded {
    type Hasher = Sha;

    fn build_hasher(&self) -> Sha {
        Sha(Sha256::new_with_prefix(self.0.to_be_bytes()))
    }
}

struct Sha(Sha256);

impl Hasher for Sha {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest = self.0.clone().finalize();
        u64::from_be_bytes(digest[..8].try_into().expect("eight bytes of 32"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn stream(id: impl AsRef<str>) -> StreamId {
        StreamId::new(id.as_ref())
    }

    #[test]
    fn tries_of_a_key_share_a_shard() {
        let placement = Placement::new(64, 7);
        let tenant = TenantId::new("acme");
        let of = |id: &str| placement.shard_of(&tenant, &stream(id));
        assert_eq!(of("k-0123.1"), of("k-0123.2"));
        assert_eq!(of("k-0123.1"), of("k-0123"));
        let shards: std::collections::BTreeSet<u32> = (0..64).map(|n| of(&format!("k-{n}.1"))).collect();
        assert!(shards.len() > 30, "other keys are elsewhere: {shards:?}");
    }

    #[test]
    fn one_shard_has_everything() {
        let placement = Placement::default();
        assert_eq!(placement.shard_of(&TenantId::new("t"), &stream("s")), 0);
        assert_eq!((placement.home_of("t"), placement.home_of_agent(&AgentName::new("a"))), (0, 0));
    }

    #[test]
    fn streams_spread_evenly() {
        let placement = Placement::new(64, 1);
        let tenant = TenantId::new("t");
        let mut counts = BTreeMap::<u32, u32>::new();
        for n in 0..64_000 {
            *counts.entry(placement.shard_of(&tenant, &stream(format!("s{n}")))).or_default() += 1;
        }
        assert_eq!(counts.len(), 64);
        assert!(counts.values().all(|n| (650..1_400).contains(n)), "{counts:?}");
    }

    #[test]
    fn a_router_that_goes_moves_only_its_own_shards() {
        let placement = Placement::new(64, 3);
        let (all, rest) = (["r1", "r2", "r3"], ["r1", "r3"]);
        let mut owned = BTreeMap::<&str, u32>::new();
        for shard in 0..64 {
            let (before, after) = (placement.rank(shard, all), placement.rank(shard, rest));
            assert_eq!(before.len(), 3);
            *owned.entry(before[0]).or_default() += 1;
            let without: Vec<&str> = before.iter().copied().filter(|r| *r != "r2").collect();
            assert_eq!(without, after, "shard {shard}: the standby of r2's is the next owner");
        }
        assert!(owned.values().all(|n| (8..36).contains(n)), "{owned:?}");
    }
}

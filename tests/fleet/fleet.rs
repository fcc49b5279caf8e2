//! Three routers that share the shards of one log, and what their own words say about who owns what.

use atp_core::placement::Placement;
use atp_tests::blackbox::kafka::Brokers;
use atp_tests::blackbox::process::Router;
use atp_tests::blackbox::redis::Redis;
use atp_tests::blackbox::relay::Relay;
use atp_tests::blackbox::wait_for;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

pub(crate) const ROUTERS: usize = 3;
pub(crate) const LEASE: Duration = Duration::from_secs(1);

pub(crate) struct Fleet {
    pub(crate) routers: Vec<Router>,
    /// Each router is known by a wire of its own, also to those who are sent to it.
    pub(crate) wires: Vec<Relay>,
    pub(crate) redis: Redis,
    pub(crate) brokers: Brokers,
    pub(crate) shards: u32,
}

impl Fleet {
    /// All of them run; `launched` of them.
    pub(crate) fn start(brokers: u32, shards: u32, launched: usize) -> Self {
        let (redis, brokers) = (Redis::start(), Brokers::start(brokers));
        let log = brokers.log();
        let (mut routers, mut wires) = (Vec::new(), Vec::new());
        for n in 1..=ROUTERS {
            let router = Router::prepare("");
            let wire = Relay::to(router.atp());
            router.configure(&format!(
                "router: {{id: r{n}, advertise: \"{}\"}}
{log}
store: {{kind: redis, redis: {{url: \"{}\"}}}}
peers: {{key: of-the-routers-of-one-fleet-in-tests}}
shards: {{count: {shards}, lease: {}ms}}
limits: {{heartbeat: 300ms}}
accounts: {{default: {{usd: 1000, per: total}}}}
tasks: {{retries: 4, deadline: 170s, agent_timeout: 100s}}",
                wire.address(),
                redis.url(),
                LEASE.as_millis(),
            ));
            routers.push(router);
            wires.push(wire);
        }
        let mut fleet = Self { routers, wires, redis, brokers, shards };
        for n in 0..launched {
            fleet.launch(n);
        }
        fleet
    }

    /// Other words in the configuration that a router reads at its next start.
    pub(crate) fn change(&self, n: usize, from: &str, to: &str) {
        let file = self.routers[n].dir().join("atp.yaml");
        let text = std::fs::read_to_string(&file).expect("its configuration");
        assert!(text.contains(from), "{from} in {text}");
        std::fs::write(&file, text.replace(from, to)).expect("its configuration");
    }

    /// Starts one and waits until it serves clients.
    pub(crate) fn launch(&mut self, n: usize) {
        self.routers[n].launch();
        wait_for("a router to serve", || self.routers[n].is_ready().then_some(()));
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.wires.iter().map(Relay::address).collect()
    }

    /// What a router says that it owns and serves itself.
    pub(crate) fn owned(&self, n: usize) -> BTreeSet<u64> {
        let owned = self.routers[n].http("GET", "/readyz").1["shards"]["owned"].take();
        owned.as_array().expect("a list").iter().filter_map(Value::as_u64).collect()
    }

    /// How many shards each of these has, once they have all of them, and each in its own words what another one says of it.
    pub(crate) fn shared_by(&self, routers: &[usize]) -> BTreeMap<usize, usize> {
        wait_for("every shard to have one owner", || {
            let owned: BTreeMap<usize, BTreeSet<u64>> = routers.iter().map(|n| (*n, self.owned(*n))).collect();
            let all: BTreeSet<u64> = owned.values().flatten().copied().collect();
            let sum: usize = owned.values().map(BTreeSet::len).sum();
            let whole = all.len() == self.shards as usize && sum == all.len();
            let told = routers.iter().all(|n| {
                let fleet = self.routers[*n].http("GET", "/v1/shards").1;
                let rows = fleet["shards"].as_array().expect("rows");
                rows.iter().all(|row| {
                    let shard = row["shard"].as_u64().expect("a number");
                    owned.iter().any(|(n, owned)| row["owner"] == format!("r{}", n + 1) && owned.contains(&shard))
                })
            });
            (whole && told).then(|| owned.into_iter().map(|(n, owned)| (n, owned.len())).collect())
        })
    }

    /// The shards that rank a router first among these.
    pub(crate) fn part_of(&self, router: usize, routers: &[usize]) -> BTreeSet<u64> {
        let placement = Placement::new(self.shards, 0);
        let names: Vec<String> = routers.iter().map(|n| format!("r{}", n + 1)).collect();
        let is_first =
            |shard: &u32| placement.rank(*shard, names.iter().map(String::as_str))[0] == format!("r{}", router + 1);
        (0..self.shards).filter(is_first).map(u64::from).collect()
    }

    /// As `shared_by`, when each has what ranks it first.
    pub(crate) fn each_has_its_part(&self, routers: &[usize]) -> BTreeMap<usize, usize> {
        let parts: Vec<BTreeSet<u64>> = routers.iter().map(|n| self.part_of(*n, routers)).collect();
        assert!(parts.iter().all(|part| !part.is_empty()), "{parts:?}");
        wait_for("each router to have its part", || {
            routers.iter().zip(&parts).all(|(n, part)| self.owned(*n) == *part).then_some(())
        });
        self.shared_by(routers)
    }
}

/// For how long each shard had no owner, by the routers' own words, while something happened.
pub(crate) fn pauses(fleet: &Fleet, routers: &[usize], until: impl Fn() -> bool) -> Vec<Duration> {
    let begun = std::time::Instant::now();
    let mut seen: BTreeMap<u64, Duration> = BTreeMap::new();
    let mut gaps: BTreeMap<u64, Duration> = BTreeMap::new();
    let mut over = false;
    while !over {
        over = until();
        for shard in routers.iter().flat_map(|n| fleet.owned(*n)).collect::<BTreeSet<_>>() {
            let now = begun.elapsed();
            let gap = now - seen.insert(shard, now).unwrap_or(now);
            let longest = gaps.entry(shard).or_default();
            *longest = gap.max(*longest);
        }
    }
    let mut gaps: Vec<Duration> = gaps.into_values().collect();
    gaps.sort();
    gaps
}

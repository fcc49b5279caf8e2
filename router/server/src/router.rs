//! Puts a router together: log, state, shard tasks, agents, listeners; drains and stops it. Installs no signal handler.

use crate::agent_task::Agents;
use crate::awake::Awake;
#[cfg(feature = "kafka")]
use crate::config::LogPlace;
use crate::config::{Config, Problem};
use crate::connection::Shared;
use crate::descriptors::Connections;
use crate::inbox::ToShard;
use crate::listen::{self, Doors};
use crate::log::{self, Guarantee, LogError};
#[cfg(feature = "kafka")]
use crate::opening::SharedLog;
use crate::opening::{self, Opened, settings_of};
use crate::ownership::Handle;
#[cfg(feature = "kafka")]
use crate::ownership::{self, Ownership};
use crate::peer::{self, Peers};
use crate::running::Running;
use crate::shards::{Shards, Site, Sites};
#[cfg(feature = "kafka")]
use crate::store::StoreConfig;
use crate::store::{self, StoreHealth};
use crate::time::Clocks;
use crate::{http, metric};
use atp_core::placement::Placement;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Bytes that wait in one direction of an in-memory connection.
const MEMORY_BYTES: usize = 256 * 1024;

/// Why a router doesn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{}", show(.0))]
    Config(Vec<Problem>),
    #[error("listen.{name}: cannot listen on {address}: {source}; stop what uses it, or choose another address")]
    Listen { name: &'static str, address: SocketAddr, source: std::io::Error },
    #[error("data_dir: {0}")]
    Log(LogError),
    #[error("log.kafka: {0}")]
    Kafka(LogError),
    #[error("entry {position} of the log {log} can't be folded: {what}; restore the log from a copy")]
    Fold { log: String, position: u64, what: String },
    #[error("store: {0}")]
    Store(String),
    #[error("the log ended before the router served: {0}")]
    Stopped(String),
}

fn show(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// A running router. Dropping it ends its tasks without sealing the log; `stop` does it in order.
pub struct Router {
    atp: SocketAddr,
    http: SocketAddr,
    doors: Doors,
    shared: Arc<Shared>,
    store: watch::Receiver<StoreHealth>,
    settings: watch::Sender<Arc<Config>>,
    /// Cancelled when the shards' tasks are to end.
    stop_shards: CancellationToken,
    /// Cancelled when the listeners are to close.
    stop_listening: CancellationToken,
    ended: tokio::sync::Mutex<Option<oneshot::Receiver<Result<(), String>>>>,
    outcome: watch::Sender<Option<Result<(), String>>>,
    report: Vec<String>,
    /// Where several routers share the log.
    ownership: Option<Handle>,
    awake: Awake,
}

impl Router {
    /// Opens the log, rebuilds the state, takes ownership (a new epoch, durable) and listens. Returns when it serves; where
    /// several routers share the log it serves from then on what it comes to own.
    ///
    /// # Errors
    /// The configuration, an address that is in use, a log that can't be opened or read.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        Self::start_on(config, Arc::new(log::RealDisk)).await
    }

    /// As `start`, with the log on a disk of the caller's: how tests make it fail.
    ///
    /// # Errors
    /// As `start`.
    pub async fn start_on(config: Config, disk: Arc<dyn log::Disk>) -> Result<Self, StartError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(StartError::Config(problems));
        }
        let prometheus = metric::install();
        let (native, http) = (config.limits.connections, config.limits.http_connections);
        let connections = Connections::within_limits(Connections { native, http });
        // The addresses first: two routers started by mistake should not both touch the log.
        let atp = bind("atp", config.listen.atp).await?;
        let http = bind("http", config.listen.http).await?;
        let (atp_addr, http_addr) = (address(&atp, config.listen.atp), address(&http, config.listen.http));
        let me = site(&config, atp_addr, http_addr);

        let clocks = Clocks::start();
        let (all, name) = (config.clone(), me.incarnation.clone());
        let opened = tokio::task::spawn_blocking(move || Log::open(&all, disk, &name, clocks)).await;
        let log = opened.map_err(|e| StartError::Stopped(e.to_string()))??;
        let report = log.report().to_vec();
        for fact in &report {
            tracing::info!("log: {fact}");
        }
        let store = store::Opened::open(&config.store, log.id(), &log.ends()).await.map_err(StartError::Store)?;

        let tasks = TaskTracker::new();
        let shards = Shards::new(log.placement().clone());
        let settings = Arc::new(config.settings.clone());
        let peers = Peers::new(&settings.router_id, config.peer_key.clone());
        let agents = Agents::new(settings, shards.clone(), clocks, tasks.clone(), config.limits.agents, peers.clone());
        let (stop_shards, stop_listening) = (CancellationToken::new(), CancellationToken::new());
        let sites = watch::Sender::new(Sites::default());
        let shared = Arc::new(Shared {
            shards: shards.clone(),
            agents: agents.clone(),
            sites: sites.subscribe(),
            peers,
            anonymous: config.anonymous,
            incarnation: me.incarnation.clone(),
            heartbeat: Duration::from_millis(config.limits.heartbeat_ms),
            streams_max: config.limits.streams_per_connection,
            waiting_bytes: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: tasks.clone(),
        });
        let mut running = Running::new(&config, &shared, (log.guarantee(), log.is_own()), clocks, stop_shards.clone());
        let identity = store::Identity {
            router: config.settings.router_id.clone(),
            incarnation: me.incarnation.clone(),
            atp: me.atp.clone(),
            http: me.http.clone(),
        };
        let store = store.project((shards.clone(), agents), identity, clocks, stop_shards.clone(), &tasks);
        #[cfg(feature = "kafka")]
        let redis = match &config.store {
            StoreConfig::Redis(redis) => Some(redis.clone()),
            StoreConfig::Memory => None,
        };
        let awake = Awake::new(Duration::from_millis(config.limits.lease_ms));
        tasks.spawn(awake.clone().run(stop_shards.clone()));
        let settings = watch::Sender::new(Arc::new(config));
        let (told, ended) = oneshot::channel();
        let stopping = shared.stopping.clone();
        let ownership = match log {
            Log::Own(opened) => {
                opened.shards.into_iter().for_each(|one| running.start(one));
                tokio::spawn(async move {
                    let _ = told.send(running.end(stopping).await);
                });
                None
            }
            #[cfg(feature = "kafka")]
            Log::Shared(log) => {
                let redis = redis.expect("a log is shared by what the store says");
                let store = store::RedisStore::new(&redis).map_err(|e| StartError::Store(e.to_string()))?;
                let (config, stop) = (settings.subscribe(), stop_shards.clone());
                let begin = ownership::Begin { log, store, running, shards, sites, me, config, clocks, stop };
                let (mut ownership, handle) = Ownership::new(begin);
                if let Err(why) = ownership.begin().await {
                    stop_shards.cancel();
                    return Err(why);
                }
                tokio::spawn(async move {
                    let outcome = ownership.run().await;
                    stopping.cancel();
                    let _ = told.send(outcome);
                });
                Some(handle)
            }
        };
        let doors = Doors {
            shared: shared.clone(),
            next_conn: Arc::new(AtomicU64::new(1)),
            connections_max: connections.native,
        };
        let router = Self {
            atp: atp_addr,
            http: http_addr,
            doors,
            shared,
            store,
            settings,
            stop_shards,
            stop_listening,
            ended: tokio::sync::Mutex::new(Some(ended)),
            outcome: watch::Sender::new(None),
            report,
            ownership,
            awake,
        };
        if router.ownership.is_none() {
            router.serving().await?;
        }
        if router.shared.peers.has_key() {
            tasks.spawn(peer::link::keep(router.shared.clone()));
        }
        tasks.spawn(listen::native(atp, router.doors.clone(), router.stop_listening.clone()));
        let site = http::Site::new(&router, prometheus);
        tasks.spawn(listen::http(http, http::routes(site), router.stop_listening.clone(), connections.http));
        Ok(router)
    }

    /// Waits until the own Epoch of every shard is durable.
    async fn serving(&self) -> Result<(), StartError> {
        for (_, here) in self.shared.shards.all_here() {
            let mut health = here.health;
            match health.wait_for(|h| h.serving || h.failed.is_some()).await {
                Ok(h) if h.serving => {}
                Ok(h) => return Err(StartError::Stopped(h.failed.clone().unwrap_or_default())),
                Err(_) => return Err(StartError::Stopped("a shard's task is gone".into())),
            }
        }
        Ok(())
    }

    /// Where agents and clients connect.
    #[must_use]
    pub fn atp_addr(&self) -> SocketAddr {
        self.atp
    }

    #[must_use]
    pub fn http_addr(&self) -> SocketAddr {
        self.http
    }

    /// What opening the log found, a fact per line.
    #[must_use]
    pub fn report(&self) -> &[String] {
        &self.report
    }

    /// A framed connection in memory: the same code as behind TCP, counted as a loopback peer.
    #[must_use]
    pub fn connect_memory(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(MEMORY_BYTES);
        self.doors.serve_memory(far);
        near
    }

    /// A function that makes such connections for as long as it is kept.
    pub fn memory_door(&self) -> impl Fn() -> DuplexStream + Send + Sync + Clone + 'static {
        let doors = self.doors.clone();
        move || {
            let (near, far) = tokio::io::duplex(MEMORY_BYTES);
            doors.serve_memory(far);
            near
        }
    }

    /// True where other routers go on with what runs here: then `drain` is `hand_over`.
    #[must_use]
    pub fn hands_over(&self) -> bool {
        self.ownership.is_some()
    }

    /// Hands its shards to the other routers and returns when it owns none, or nobody is there to take them.
    pub async fn hand_over(&self) {
        if let Some(ownership) = &self.ownership {
            ownership.hand_over().await;
        }
    }

    /// Refuses new work with EDRAINING and returns when the running streams have ended.
    pub async fn drain(&self) {
        let mut waiting = Vec::new();
        let drain = |_| {
            let (over, none_open) = oneshot::channel();
            waiting.push(none_open);
            ToShard::Drain { over }
        };
        self.shared.shards.tell_all(drain).await;
        for none_open in waiting {
            // A shard that has stopped has none either.
            let _ = none_open.await;
        }
    }

    /// Takes what may change while it runs: accounts, windows, tasks, prices. Other keys must stay as they are.
    ///
    /// # Errors
    /// Names the keys that need a restart; the old configuration stays whole.
    pub async fn reload(&self, config: Config) -> Result<(), Vec<Problem>> {
        let mut problems = config.problems();
        problems.extend(self.settings.borrow().fixed_that_differ(&config));
        if !problems.is_empty() {
            return Err(problems);
        }
        let settings = config.settings.clone();
        self.settings.send_replace(Arc::new(config));
        let shards = &self.shared.shards;
        shards.tell_all(|shard| ToShard::Settings(settings_of(&settings, shard, shards.placement()))).await;
        self.shared.agents.set_settings(&Arc::new(settings)).await;
        Ok(())
    }

    /// Resolves when the router has ended by itself or was stopped.
    ///
    /// # Errors
    /// Why it ended: the log failed. The process should say so and exit.
    pub async fn wait(&self) -> Result<(), String> {
        let mut ended = self.ended.lock().await;
        if let Some(receiver) = ended.as_mut() {
            let outcome = receiver.await.unwrap_or_else(|_| Err("the shards' tasks ended early".into()));
            *ended = None;
            self.outcome.send_replace(Some(outcome));
        }
        self.outcome.borrow().clone().unwrap_or(Ok(()))
    }

    /// Closes the listeners and connections, writes what is decided, seals the log.
    ///
    /// # Errors
    /// The log failed before or while closing.
    pub async fn stop(&self) -> Result<(), String> {
        self.stop_listening.cancel();
        self.shared.stopping.cancel();
        self.stop_shards.cancel();
        let outcome = self.wait().await;
        self.shared.agents.close();
        self.shared.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.shared.tasks.wait()).await;
        outcome
    }

    #[cfg(test)]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
    pub(crate) fn shards(&self) -> Shards {
        self.shared.shards.clone()
    }
    pub(crate) fn agents(&self) -> Agents {
        self.shared.agents.clone()
    }
    pub(crate) fn incarnation(&self) -> String {
        self.shared.incarnation.clone()
    }
    pub(crate) fn ownership(&self) -> Option<Handle> {
        self.ownership.clone()
    }
    pub(crate) fn awake(&self) -> Awake {
        self.awake.clone()
    }
    pub(crate) fn store(&self) -> watch::Receiver<StoreHealth> {
        self.store.clone()
    }
    pub(crate) fn config(&self) -> watch::Receiver<Arc<Config>> {
        self.settings.subscribe()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop_listening.cancel();
        self.shared.stopping.cancel();
        self.stop_shards.cancel();
    }
}

/// A log that is open: this router's own, all of it, or shared with others.
enum Log {
    Own(Opened),
    #[cfg(feature = "kafka")]
    Shared(SharedLog),
}

impl Log {
    /// Blocks.
    fn open(config: &Config, disk: Arc<dyn log::Disk>, incarnation: &str, clocks: Clocks) -> Result<Self, StartError> {
        #[cfg(feature = "kafka")]
        if let (LogPlace::Kafka(place), StoreConfig::Redis(_)) = (&config.log, &config.store) {
            return opening::open_shared(config, place, clocks).map(Self::Shared);
        }
        opening::open(config, disk, incarnation, clocks).map(Self::Own)
    }

    const fn is_own(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    fn id(&self) -> &str {
        match self {
            Self::Own(log) => &log.log_id,
            #[cfg(feature = "kafka")]
            Self::Shared(log) => &log.id,
        }
    }

    fn placement(&self) -> &Placement {
        match self {
            Self::Own(log) => &log.placement,
            #[cfg(feature = "kafka")]
            Self::Shared(log) => &log.placement,
        }
    }

    fn guarantee(&self) -> Guarantee {
        match self {
            Self::Own(log) => log.guarantee,
            #[cfg(feature = "kafka")]
            Self::Shared(log) => log.guarantee,
        }
    }

    /// The end of each shard that is owned already.
    fn ends(&self) -> Vec<(u32, u64)> {
        match self {
            Self::Own(log) => log.shards.iter().map(|one| (one.number, one.position)).collect(),
            #[cfg(feature = "kafka")]
            Self::Shared(_) => Vec::new(),
        }
    }

    fn report(&self) -> &[String] {
        match self {
            Self::Own(log) => &log.report,
            #[cfg(feature = "kafka")]
            Self::Shared(_) => &[],
        }
    }
}

/// This router as others find it.
fn site(config: &Config, atp: SocketAddr, http: SocketAddr) -> Site {
    // HTTP is dialled at the same host.
    let host = config.advertise.as_ref().and_then(|place| Some(place.rsplit_once(':')?.0.to_owned()));
    Site {
        router: config.settings.router_id.to_string(),
        incarnation: uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(),
        atp: config.advertise.clone().unwrap_or_else(|| atp.to_string()),
        http: host.map_or_else(|| http.to_string(), |host| format!("{host}:{}", http.port())),
    }
}

async fn bind(name: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { name, address, source })
}

fn address(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

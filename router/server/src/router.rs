//! Puts a router together: log, state, shard tasks, agents, listeners; drains and stops it. Installs no signal handler.

use crate::agent_task::Agents;
use crate::config::{Config, Problem};
use crate::connection::Shared;
use crate::descriptors::Connections;
use crate::inbox::ToShard;
use crate::listen::{self, Doors};
use crate::log::{self, LogError};
use crate::opening::{self, Opened, settings_of};
use crate::running::Running;
use crate::shards::Shards;
use crate::standby;
use crate::store::{self, StoreHealth};
use crate::time::Clocks;
use crate::{http, metric};
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
    has_lease: bool,
}

impl Router {
    /// Waits for the lease where several routers share the log, then opens the log, rebuilds the state, takes ownership (a new epoch, durable) and listens. Returns when it serves.
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
    pub async fn start_on(mut config: Config, disk: Arc<dyn log::Disk>) -> Result<Self, StartError> {
        let problems = config.problems();
        if !problems.is_empty() {
            return Err(StartError::Config(problems));
        }
        let prometheus = metric::install();
        let (native, http) = (config.limits.connections, config.limits.http_connections);
        let connections = Connections::within_limits(Connections { native, http });
        let incarnation = uuid::Uuid::new_v4().simple().to_string()[..12].to_owned();
        let (lease, followers) = standby::wait(&mut config, &incarnation).await?.unzip();
        // The addresses first: two routers started by mistake should not both touch the log.
        let atp = bind("atp", config.listen.atp).await?;
        let http = bind("http", config.listen.http).await?;
        let (atp_addr, http_addr) = (address(&atp, config.listen.atp), address(&http, config.listen.http));
        let has_lease = lease.is_some();
        let give_back = CancellationToken::new();
        let given_up = give_back.clone().drop_guard();
        let keeping = lease.map(|lease| tokio::spawn(lease.keep(give_back)));

        let clocks = Clocks::start();
        let (all, name) = (config.clone(), incarnation.clone());
        let followers = followers.unwrap_or_default();
        let opened = tokio::task::spawn_blocking(move || opening::open(&all, disk, &name, clocks, followers)).await;
        let Opened { log_id, placement, guarantee, shards: opened, report } =
            opened.map_err(|e| StartError::Stopped(e.to_string()))??;
        for fact in &report {
            tracing::info!("log: {fact}");
        }
        let ends: Vec<(u32, u64)> = opened.iter().map(|one| (one.number, one.position)).collect();
        let store = store::Opened::open(&config.store, &log_id, &ends).await.map_err(StartError::Store)?;

        let tasks = TaskTracker::new();
        let shards = Shards::new(placement);
        let settings = Arc::new(config.settings.clone());
        let agents = Agents::new(settings, shards.clone(), clocks, tasks.clone(), config.limits.agents);
        let (stop_shards, stop_listening) = (CancellationToken::new(), CancellationToken::new());
        let shared = Arc::new(Shared {
            shards: shards.clone(),
            agents: agents.clone(),
            anonymous: config.anonymous,
            incarnation,
            heartbeat: Duration::from_millis(config.limits.heartbeat_ms),
            streams_max: config.limits.streams_per_connection,
            waiting_bytes: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: tasks.clone(),
        });
        let mut running = Running::new(&config, &shared, guarantee, clocks, stop_shards.clone());
        opened.into_iter().for_each(|one| running.start(one));
        let (told, ended) = oneshot::channel();
        let stopping = shared.stopping.clone();
        tokio::spawn(async move {
            let outcome = running.end(stopping).await;
            drop(given_up);
            if let Some(keeping) = keeping {
                let _ = keeping.await;
            }
            let _ = told.send(outcome);
        });

        let identity = store::Identity {
            router: config.settings.router_id.clone(),
            incarnation: shared.incarnation.clone(),
            atp: config.advertise.clone().unwrap_or_else(|| atp_addr.to_string()),
            http: http_addr.to_string(),
        };
        let store = store.project((shards, agents), identity, clocks, stop_shards.clone(), &tasks);
        let doors = Doors {
            shared: shared.clone(),
            next_conn: Arc::new(AtomicU64::new(1)),
            connections_max: connections.native,
        };
        let settings = watch::Sender::new(Arc::new(config));
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
            has_lease,
        };
        router.serving().await?;
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

    /// True where another router may take over: then `stop` is enough, running streams go on there.
    #[must_use]
    pub fn hands_over(&self) -> bool {
        self.has_lease
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

    pub(crate) fn shards(&self) -> Shards {
        self.shared.shards.clone()
    }
    pub(crate) fn agents(&self) -> Agents {
        self.shared.agents.clone()
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

pub(crate) async fn bind(name: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { name, address, source })
}

pub(crate) fn address(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

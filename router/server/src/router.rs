//! Puts a router together: log, state, shard task, agents, listeners; drains and stops it. Installs no signal handler.

use crate::agent_task::Agents;
use crate::config::{Config, LogPlace, Problem};
use crate::connection::Shared;
use crate::descriptors::Connections;
use crate::inbox::{Inbox, ToShard, inbox};
use crate::listen::{self, Doors};
use crate::log::offline::Follower;
use crate::log::{self, Guarantee, LocalLog, Log, LogError, Source};
use crate::shard_task::{Begin, Health, ShardTask};
use crate::standby;
use crate::store::{self, StoreHealth};
use crate::time::Clocks;
use crate::tool::Tools;
use crate::{http, metric};
use atp_core::record::{Genesis, hex};
use atp_core::shard::Shard;
use atp_core::state::{FORMAT, State};
use bytes::Bytes;
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
    health: watch::Receiver<Health>,
    store: watch::Receiver<StoreHealth>,
    settings: watch::Sender<Arc<Config>>,
    /// Cancelled when the shard's task is to end.
    stop_shard: CancellationToken,
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
        let (lease, follower) = standby::wait(&mut config, &incarnation).await?.unzip();
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
        let follower = follower.flatten();
        let opened = tokio::task::spawn_blocking(move || open(&all, disk, &name, clocks, follower)).await;
        let Opened { log, source, shard, position, guarantee, serving, report } =
            opened.map_err(|e| StartError::Stopped(e.to_string()))??;
        for fact in &report {
            tracing::info!("log: {fact}");
        }
        let log_id = hex(shard.state().log_id());
        let store = store::Opened::open(&config.store, &log_id, position).await.map_err(StartError::Store)?;
        let settings = Arc::new(config.settings.clone());

        let (inbox, taking) = inbox(config.limits.inbox_bytes);
        let tasks = TaskTracker::new();
        let agents = Agents::new(settings, inbox.clone(), clocks, tasks.clone(), config.limits.agents);
        let health = Health { guarantee, serving, durable: shard.state().position(), ..Health::default() };
        let (health_sender, health) = watch::channel(health);
        let (stop_shard, stop_listening) = (CancellationToken::new(), CancellationToken::new());
        let shared = Arc::new(Shared {
            inbox: inbox.clone(),
            agents: agents.clone(),
            anonymous: config.anonymous,
            incarnation,
            heartbeat: Duration::from_millis(config.limits.heartbeat_ms),
            streams_max: config.limits.streams_per_connection,
            stopping: CancellationToken::new(),
            tasks: tasks.clone(),
        });
        let task = ShardTask::new(Begin {
            shard,
            taking,
            inbox: inbox.clone(),
            log,
            agents: agents.clone(),
            clocks,
            source: source.clone(),
            health: health_sender,
            streams_max: config.limits.streams_per_connection,
            stop: stop_shard.clone(),
            tasks: tasks.clone(),
            tools: Tools::new(config.tools.clone(), inbox.clone(), tasks.clone()),
        });
        let (told, ended) = oneshot::channel();
        let stopping = shared.stopping.clone();
        tokio::spawn(async move {
            let outcome = task.run().await;
            // Nothing may be served by a router that can't write.
            stopping.cancel();
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
        let store = store.project(inbox, identity, clocks, stop_shard.clone(), &tasks);
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
            health,
            store,
            settings,
            stop_shard,
            stop_listening,
            ended: tokio::sync::Mutex::new(Some(ended)),
            outcome: watch::Sender::new(None),
            report,
            has_lease,
        };
        router.serving().await?;
        tasks.spawn(listen::native(atp, router.doors.clone(), router.stop_listening.clone()));
        let site = http::Site::new(&router, prometheus, source);
        tasks.spawn(listen::http(http, http::routes(site), router.stop_listening.clone(), connections.http));
        Ok(router)
    }

    /// Waits until the own Epoch is durable.
    async fn serving(&self) -> Result<(), StartError> {
        let mut health = self.health.clone();
        let served = health.wait_for(|h| h.serving || h.failed.is_some()).await;
        match served {
            Ok(h) if h.serving => Ok(()),
            Ok(h) => Err(StartError::Stopped(h.failed.clone().unwrap_or_default())),
            Err(_) => Err(StartError::Stopped("its task is gone".into())),
        }
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
        let (over, none_open) = oneshot::channel();
        if self.shared.inbox.send(64, ToShard::Drain { over }).await.is_ok() {
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
        let settings = Arc::new(config.settings.clone());
        self.settings.send_replace(Arc::new(config));
        let _ = self.shared.inbox.send(64, ToShard::Settings(settings)).await;
        Ok(())
    }

    /// Resolves when the router has ended by itself or was stopped.
    ///
    /// # Errors
    /// Why it ended: the log failed. The process should say so and exit.
    pub async fn wait(&self) -> Result<(), String> {
        let mut ended = self.ended.lock().await;
        if let Some(receiver) = ended.as_mut() {
            let outcome = receiver.await.unwrap_or_else(|_| Err("the shard's task ended early".into()));
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
        self.stop_shard.cancel();
        let outcome = self.wait().await;
        self.shared.agents.close();
        self.shared.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(5), self.shared.tasks.wait()).await;
        outcome
    }

    pub(crate) fn inbox(&self) -> Inbox {
        self.shared.inbox.clone()
    }
    pub(crate) fn agents(&self) -> Agents {
        self.shared.agents.clone()
    }
    pub(crate) fn health(&self) -> watch::Receiver<Health> {
        self.health.clone()
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
        self.stop_shard.cancel();
    }
}

pub(crate) async fn bind(name: &'static str, address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { name, address, source })
}

pub(crate) fn address(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

/// A log whose state is rebuilt, and the shard over it.
struct Opened {
    log: Box<dyn Log>,
    source: Source,
    shard: Shard,
    /// What was durable before this owner's first entry, or with it.
    position: u64,
    guarantee: Guarantee,
    /// The own Epoch is durable already.
    serving: bool,
    report: Vec<String>,
}

#[cfg_attr(not(feature = "kafka"), expect(unused_variables))]
fn open(
    config: &Config,
    disk: Arc<dyn log::Disk>,
    incarnation: &str,
    clocks: Clocks,
    follower: Option<Follower>,
) -> Result<Opened, StartError> {
    match &config.log {
        LogPlace::Local => open_local(config, disk, incarnation, clocks),
        #[cfg(feature = "kafka")]
        LogPlace::Kafka(place) => open_kafka(config, place, incarnation, clocks, follower),
        #[cfg(not(feature = "kafka"))]
        LogPlace::Kafka(_) => Err(StartError::Config(config.problems())),
    }
}

fn open_local(
    config: &Config,
    disk: Arc<dyn log::Disk>,
    incarnation: &str,
    clocks: Clocks,
) -> Result<Opened, StartError> {
    let dir = config.log_dir();
    let options = log::Options {
        segment_bytes: config.limits.segment_bytes,
        durability: config.durability,
        ..log::Options::new(&dir)
    };
    let (log, recovered) = LocalLog::open_on(options, disk).map_err(StartError::Log)?;
    let source = Source::local(dir);
    let last_position = recovered.positions[0];
    let state = if last_position == 0 {
        State::default()
    } else {
        let folded = log::offline::recover_state(&source).map_err(|error| match error {
            LogError::Entry { position, what, .. } => StartError::Fold { log: source.to_string(), position, what },
            error => StartError::Log(error),
        });
        folded?.0
    };
    let genesis = (state.position() == 0).then(|| Genesis {
        log_id: Bytes::copy_from_slice(&log.log_id()),
        format: FORMAT,
        shards: 1,
        hash_seed: 0,
    });
    let shard = Shard::recover(Arc::new(config.settings.clone()), state, clocks.now(), incarnation, genesis);
    let (position, guarantee) = (last_position, config.durability.into());
    Ok(Opened { log: Box::new(log), source, shard, position, guarantee, serving: false, report: recovered.report })
}

#[cfg(feature = "kafka")]
fn open_kafka(
    config: &Config,
    place: &crate::config::KafkaPlace,
    incarnation: &str,
    clocks: Clocks,
    follower: Option<Follower>,
) -> Result<Opened, StartError> {
    let options = config.kafka_options(place);
    let router = &config.settings.router_id;
    let now_ms = clocks.now().wall_ms;
    let opened = log::KafkaShards::open(&options, now_ms)
        .and_then(|shards| shards.take(0, router, incarnation, now_ms, follower));
    let log::Opened { log, source, state, guarantee, report } = opened.map_err(|error| match error {
        LogError::Entry { position, what, .. } => StartError::Fold { log: options.address.to_string(), position, what },
        error => StartError::Kafka(error),
    })?;
    let shard = Shard::recover_behind_epoch(Arc::new(config.settings.clone()), state, clocks.now());
    let position = shard.state().position();
    Ok(Opened { log: Box::new(log), source, shard, position, guarantee, serving: true, report })
}

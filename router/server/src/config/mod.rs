//! The configuration: one YAML file as typed values. `table` knows every key, `tree` reads the text.

mod accounts;
mod kafka;
mod peers;
mod policy;
mod read;
mod reference;
mod registry;
mod store;
mod table;
mod tools;
mod tree;

pub use read::{check, load, parse};
pub use reference::{policy_schema, reference, schema};

use crate::identity::Anonymous;
pub use crate::log::Durability;
use crate::log::{KafkaAddress, Source};
use crate::peer::PeerKey;
use crate::store::StoreConfig;
use crate::tool::ToolConfig;
#[cfg(feature = "kafka")]
use atp_core::placement::SHARDS;
use atp_core::settings::Settings;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// A configuration that can be started.
#[derive(Clone, Debug)]
pub struct Config {
    pub listen: Listen,
    /// What others are told to dial; empty: the address that is bound.
    pub advertise: Option<String>,
    pub data_dir: PathBuf,
    /// How many shards the log has; `None`: as it was made, and a new one the default.
    pub shards: Option<u32>,
    /// Of the local log.
    pub durability: Durability,
    pub log: LogPlace,
    pub store: StoreConfig,
    /// What routers of one log prove to each other; `None`: no other router is taken.
    pub peer_key: Option<PeerKey>,
    pub anonymous: Anonymous,
    /// What the core reads.
    pub settings: Settings,
    /// Adapters that the router's process starts itself.
    pub agents: Vec<AgentEntry>,
    pub tools: ToolConfig,
    pub limits: ShellLimits,
    pub log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    pub atp: SocketAddr,
    pub http: SocketAddr,
    /// Plain sockets off loopback are wanted in so many words.
    pub insecure: bool,
}

/// Where the log is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LogPlace {
    /// Below `data_dir`.
    #[default]
    Local,
    Kafka(KafkaPlace),
}

/// The log in Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KafkaPlace {
    pub address: KafkaAddress,
    /// One broker is wanted.
    pub single_broker: bool,
}

/// How the process's own log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// An entry of `agents:`: the flags of `atp agent KIND`, checked for name and form, as a JSON object for the adapters.
/// Amounts and durations are texts in it, as they were written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentEntry {
    pub line: u64,
    pub column: u64,
    pub fields: serde_json::Map<String, serde_json::Value>,
}

/// Bounds of the shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShellLimits {
    /// Bytes that may wait for the shard.
    pub inbox_bytes: u32,
    /// Native connections at once.
    pub connections: usize,
    pub http_connections: usize,
    pub streams_per_connection: usize,
    /// Agent handles.
    pub agents: usize,
    pub heartbeat_ms: u64,
    /// How long a shard's owner is believed to live, where several routers share a log.
    pub lease_ms: u64,
    /// Bytes of a segment of the log.
    pub segment_bytes: u64,
}

impl Default for ShellLimits {
    fn default() -> Self {
        Self {
            inbox_bytes: 64 * 1024 * 1024,
            connections: 10_000,
            http_connections: 1024,
            streams_per_connection: atp_proto::limits::STREAMS_MAX,
            agents: 1024,
            heartbeat_ms: atp_proto::limits::HEARTBEAT_MS,
            lease_ms: 5_000,
            segment_bytes: 64 * 1024 * 1024,
        }
    }
}

impl Default for Config {
    /// What an empty file says.
    fn default() -> Self {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self {
            listen: Listen {
                atp: SocketAddr::new(loopback, 7443),
                http: SocketAddr::new(loopback, 7080),
                insecure: false,
            },
            advertise: None,
            data_dir: "./atp-data".into(),
            shards: None,
            durability: Durability::Fsync,
            log: LogPlace::Local,
            store: StoreConfig::Memory,
            peer_key: None,
            anonymous: Anonymous::Loopback,
            settings: Settings::default(),
            agents: Vec::new(),
            tools: ToolConfig::default(),
            limits: ShellLimits::default(),
            log_format: LogFormat::Text,
        }
    }
}

/// What is wrong with a configuration, where, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    /// From 1; 0: nowhere in the text.
    pub line: u64,
    pub column: u64,
    pub field: String,
    pub message: String,
    pub fix: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        }
        write!(f, "{}: {}; {}", self.field, self.message, self.fix)
    }
}

impl Problem {
    pub(crate) fn nowhere(field: &str, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { line: 0, column: 0, field: field.into(), message: message.into(), fix: fix.into() }
    }
}

impl Config {
    /// The directory of the log.
    #[must_use]
    pub fn log_dir(&self) -> PathBuf {
        self.data_dir.join("log")
    }

    /// The log, to read.
    ///
    /// # Errors
    /// This build has no Kafka.
    pub fn source(&self) -> Result<Source, String> {
        match &self.log {
            LogPlace::Local => Ok(Source::local(self.log_dir())),
            LogPlace::Kafka(place) => Source::kafka(place.address.clone(), 0),
        }
    }

    /// How the Kafka log is opened, or made.
    #[cfg(feature = "kafka")]
    #[must_use]
    pub fn kafka_options(&self, place: &KafkaPlace) -> crate::log::KafkaOptions {
        crate::log::KafkaOptions {
            address: place.address.clone(),
            single_broker: place.single_broker,
            shards: self.shards.unwrap_or(SHARDS),
            exact: self.shards.is_some(),
            data_dir: self.data_dir.clone(),
            checkpoint_every: self.limits.segment_bytes,
        }
    }

    /// What forbids a start, whoever made this configuration.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (field, address) in [("listen.atp", self.listen.atp), ("listen.http", self.listen.http)] {
            if !address.ip().is_loopback() && !self.listen.insecure {
                let message = format!("{address} is not loopback, and this listener has no TLS");
                let fix = "use 127.0.0.1, or set listen.insecure: true if everybody on that network may read and speak";
                problems.push(Problem::nowhere(field, message, fix));
            }
        }
        if self.anonymous == Anonymous::Never {
            let fix = "use auth.anonymous: loopback; credentials come with a later version";
            problems.push(Problem::nowhere(
                "auth.anonymous",
                "`never` leaves nobody in, because this version keeps no tokens",
                fix,
            ));
        }
        if let LogPlace::Kafka(place) = &self.log {
            kafka::problems(place, &mut problems);
            let shares = matches!(self.store, StoreConfig::Redis(_));
            if shares && self.advertise.is_none() && self.listen.atp.ip().is_unspecified() {
                let message = "is empty, and others can't dial the address that is listened on";
                let fix = "write where the other routers' clients and agents reach this one: HOST:PORT";
                problems.push(Problem::nowhere("router.advertise", message, fix));
            }
            if shares && self.peer_key.is_none() {
                let message = "is missing: routers that share a log in Kafka and a Redis prove it to each other";
                let fix = "set peers: {key: \"${ATP_PEER_KEY}\"}, the same on all of them (openssl rand -hex 32)";
                problems.push(Problem::nowhere("peers.key", message, fix));
            }
        }
        problems
    }

    /// Keys that differ and that a running router can't change.
    pub(crate) fn fixed_that_differ(&self, new: &Self) -> Vec<Problem> {
        let pairs = [
            ("listen", self.listen != new.listen),
            ("router", self.settings.router_id != new.settings.router_id || self.advertise != new.advertise),
            ("data_dir", self.data_dir != new.data_dir),
            ("shards.count", self.shards != new.shards),
            ("log", self.durability != new.durability || self.log != new.log),
            ("store", self.store != new.store),
            ("peers", self.peer_key != new.peer_key),
            ("auth.anonymous", self.anonymous != new.anonymous),
            ("agents", self.agents != new.agents),
            ("tools", self.tools != new.tools),
            ("limits", self.limits != new.limits),
        ];
        let differ = pairs.into_iter().filter(|(_, differs)| *differs);
        differ
            .map(|(key, _)| {
                Problem::nowhere(key, "differs from the running router's", "restart the router to change it")
            })
            .collect()
    }
}

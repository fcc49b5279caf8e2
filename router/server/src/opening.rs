//! Opens the log that the configuration names, for all of its shards, and rebuilds the state of each. Writes nothing of its own:
//! each shard's task appends its Epoch.

use crate::config::{Config, LogPlace, Problem};
use crate::log::offline::Follower;
use crate::log::{self, Guarantee, LocalLog, Log, LogError, Source};
use crate::router::StartError;
use crate::time::Clocks;
use atp_core::placement::Placement;
use atp_core::record::{Genesis, hex};
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::{FORMAT, State};
use bytes::Bytes;
use std::sync::Arc;

/// A log whose states are rebuilt.
pub(crate) struct Opened {
    /// The log's id in hex.
    pub(crate) log_id: String,
    pub(crate) placement: Placement,
    pub(crate) guarantee: Guarantee,
    pub(crate) shards: Vec<OpenedShard>,
    /// What opening found, a fact per line.
    pub(crate) report: Vec<String>,
}

/// One shard that this router owns.
pub(crate) struct OpenedShard {
    pub(crate) number: u32,
    pub(crate) log: Box<dyn Log>,
    pub(crate) source: Source,
    pub(crate) shard: Shard,
    /// What was durable before this owner's first entry, or with it.
    pub(crate) position: u64,
    /// The own Epoch is durable already.
    pub(crate) serving: bool,
}

/// The settings as one shard reads them.
pub(crate) fn settings_of(settings: &Settings, shard: u32, placement: &Placement) -> Arc<Settings> {
    Arc::new(Settings { shard, placement: placement.clone(), ..settings.clone() })
}

/// Opens the log. `follower` has followed the log of shard 0 until now.
///
/// # Errors
/// It can't be opened, read or folded; the configuration asks for another number of shards.
#[cfg_attr(not(feature = "kafka"), expect(unused_variables))]
pub(crate) fn open(
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
    let open_one = |shard: u32| {
        let dir = if shard == 0 { config.log_dir() } else { config.log_dir().join(format!("shard-{shard}")) };
        let options = log::Options {
            dir: dir.clone(),
            segment_bytes: config.limits.segment_bytes,
            durability: config.durability,
        };
        let (log, recovered) = LocalLog::open_on(options, disk.clone()).map_err(StartError::Log)?;
        let source = Source::Local(dir);
        let state = if recovered.last_position == 0 { State::default() } else { state_of(&source)? };
        Ok::<_, StartError>((log, source, state, recovered))
    };
    let (log, source, state, recovered) = open_one(0)?;
    let log_id = log.log_id();
    let placement = match state.position() {
        0 => Placement::new(config.shards.unwrap_or(1), 0),
        _ => Placement::new(state.genesis().shards, state.genesis().hash_seed),
    };
    check_count(config, &placement)?;
    let report = recovered.report.clone();
    let mut opened = vec![(log, source, state, recovered)];
    for shard in 1..placement.shards() {
        opened.push(open_one(shard)?);
    }
    let shards = opened.into_iter().zip(0..).map(|((log, source, state, recovered), number)| {
        let genesis = (state.position() == 0).then(|| Genesis {
            log_id: Bytes::copy_from_slice(&log_id),
            format: FORMAT,
            shards: placement.shards(),
            hash_seed: 0,
        });
        let settings = settings_of(&config.settings, number, &placement);
        let shard = Shard::recover(settings, state, clocks.now(), incarnation, genesis);
        OpenedShard { number, log: Box::new(log), source, shard, position: recovered.last_position, serving: false }
    });
    let shards = shards.collect();
    Ok(Opened { log_id: hex(&log_id), placement, guarantee: config.durability.into(), shards, report })
}

/// The state that a shard's log stands for.
fn state_of(source: &Source) -> Result<State, StartError> {
    let folded = log::offline::recover_state(source).map_err(|error| match error {
        LogError::Entry { position, what } => StartError::Fold { log: source.to_string(), position, what },
        error => StartError::Log(error),
    });
    Ok(folded?.0)
}

/// The number of shards stands in the log, for ever.
fn check_count(config: &Config, placement: &Placement) -> Result<(), StartError> {
    let count = placement.shards();
    match config.shards {
        Some(asked) if asked != count => Err(StartError::Config(vec![Problem {
            line: 0,
            column: 0,
            field: "shards.count".into(),
            message: format!("is {asked}, and the log was made with {count}, which can't be changed"),
            fix: format!("leave it out, or write {count}"),
        }])),
        _ => Ok(()),
    }
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
    let opened = log::KafkaLog::open_behind(&options, router, incarnation, clocks.now().wall_ms, follower);
    let log::Opened { log, source, state, guarantee, report } = opened.map_err(|error| match error {
        LogError::Entry { position, what } => StartError::Fold { log: options.address.to_string(), position, what },
        error => StartError::Kafka(error),
    })?;
    let placement = Placement::new(state.genesis().shards, state.genesis().hash_seed);
    check_count(config, &placement)?;
    let settings = settings_of(&config.settings, 0, &placement);
    let shard = Shard::recover_behind_epoch(settings, state, clocks.now());
    let log_id = hex(shard.state().log_id());
    let position = shard.state().position();
    let shards = vec![OpenedShard { number: 0, log: Box::new(log), source, shard, position, serving: true }];
    Ok(Opened { log_id, placement, guarantee, shards, report })
}

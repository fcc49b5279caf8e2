//! Opens the log that the configuration names, for all of its shards, and rebuilds the state of each. Writes nothing of its own:
//! each shard's task appends its Epoch.

use crate::config::{Config, LogPlace, Problem};
use crate::log::{self, Guarantee, LocalLog, Log, LogError, Source};
use crate::router::StartError;
use crate::time::Clocks;
use atp_core::placement::{Placement, SHARDS};
use atp_core::record::{Genesis, hex};
use atp_core::settings::Settings;
use atp_core::shard::Shard;
use atp_core::state::{FORMAT, State};
use bytes::Bytes;
use std::sync::Arc;
#[cfg(feature = "kafka")]
use std::sync::atomic::{AtomicU32, Ordering};

/// Partitions that are taken and read at the same time.
#[cfg(feature = "kafka")]
const TAKEN_AT_ONCE: u32 = 8;

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

/// Opens the log.
///
/// # Errors
/// It can't be opened, read or folded; the configuration asks for another number of shards.
pub(crate) fn open(
    config: &Config,
    disk: Arc<dyn log::Disk>,
    incarnation: &str,
    clocks: Clocks,
) -> Result<Opened, StartError> {
    match &config.log {
        LogPlace::Local => open_local(config, disk, incarnation, clocks),
        #[cfg(feature = "kafka")]
        LogPlace::Kafka(place) => open_kafka(config, place, incarnation, clocks),
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
        shards: config.shards.unwrap_or(SHARDS),
        ..log::Options::new(&dir)
    };
    let (log, recovered) = LocalLog::open_on(options, disk).map_err(StartError::Log)?;
    let source = Source::local(dir);
    // A log that nobody has written to yet has no Genesis.
    let states = match recovered.positions.iter().all(|position| *position == 0) {
        true => vec![State::default(); recovered.positions.len()],
        false => recover_all(&source)?,
    };
    let seed = states.iter().find(|state| state.position() > 0).map_or(0, |state| state.genesis().hash_seed);
    let placement = Placement::new(log.shards(), seed);
    check_count(config, &placement)?;
    let log_id = log.log_id();
    let shards = (0..).zip(states).map(|(number, state)| {
        let genesis = (state.position() == 0).then(|| Genesis {
            log_id: Bytes::copy_from_slice(&log_id),
            format: FORMAT,
            shards: placement.shards(),
            hash_seed: seed,
        });
        let position = state.position();
        let settings = settings_of(&config.settings, number, &placement);
        let shard = Shard::recover(settings, state, clocks.now(), incarnation, genesis);
        let (log, source) = (Box::new(log.shard(number)), source.shard(number));
        OpenedShard { number, log, source, shard, position, serving: false }
    });
    let shards = shards.collect();
    let (guarantee, report) = (config.durability.into(), recovered.report);
    Ok(Opened { log_id: hex(&log_id), placement, guarantee, shards, report })
}

/// The states that the shards of a log stand for.
fn recover_all(source: &Source) -> Result<Vec<State>, StartError> {
    let all = log::offline::recover_all(source).map_err(|error| match error {
        LogError::Entry { position, what, .. } => StartError::Fold { log: source.to_string(), position, what },
        error => StartError::Log(error),
    });
    Ok(all?.into_iter().map(|(state, _)| state).collect())
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

/// A log in Kafka whose shards are owned one by one.
#[cfg(feature = "kafka")]
#[derive(Clone)]
pub(crate) struct SharedLog {
    pub(crate) kafka: log::KafkaShards,
    /// The log's id in hex.
    pub(crate) id: String,
    pub(crate) guarantee: Guarantee,
    pub(crate) placement: Placement,
}

/// Opens the log and owns none of its shards yet.
///
/// # Errors
/// It can't be opened; the configuration asks for another number of shards.
#[cfg(feature = "kafka")]
pub(crate) fn open_shared(
    config: &Config,
    place: &crate::config::KafkaPlace,
    clocks: Clocks,
) -> Result<SharedLog, StartError> {
    let options = config.kafka_options(place);
    let kafka = log::KafkaShards::open(&options, clocks.now().wall_ms).map_err(StartError::Kafka)?;
    let made = kafka.made();
    let guarantee = if made.replicated { Guarantee::Replicated } else { Guarantee::Single };
    let (id, placement) = (hex(&made.log_id), Placement::new(made.shards, made.hash_seed));
    Ok(SharedLog { kafka, id, guarantee, placement })
}

#[cfg(feature = "kafka")]
fn open_kafka(
    config: &Config,
    place: &crate::config::KafkaPlace,
    incarnation: &str,
    clocks: Clocks,
) -> Result<Opened, StartError> {
    let shared = open_shared(config, place, clocks)?;
    let SharedLog { kafka: log, id: log_id, guarantee, placement } = shared;
    let (address, count) = (place.address.to_string(), placement.shards());
    let failed = |error| match error {
        LogError::Entry { position, what, .. } => StartError::Fold { log: address.clone(), position, what },
        error => StartError::Kafka(error),
    };
    let take = |shard: u32| log.take(shard, &config.settings.router_id, incarnation, clocks.now().wall_ms, None);
    let next = AtomicU32::new(0);
    let worker = || {
        let mut taken = Vec::new();
        loop {
            let shard = next.fetch_add(1, Ordering::Relaxed);
            if shard >= count {
                return Ok(taken);
            }
            taken.push((shard, take(shard)?));
        }
    };
    let mut taken = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..TAKEN_AT_ONCE.min(count)).map(|_| scope.spawn(worker)).collect();
        let taken = workers.into_iter().map(|worker| worker.join().expect("it doesn't panic"));
        taken.collect::<Result<Vec<_>, LogError>>().map(|all| all.into_iter().flatten().collect::<Vec<_>>())
    })
    .map_err(failed)?;
    taken.sort_by_key(|(shard, _)| *shard);
    let mut report = Vec::new();
    let shards = taken.into_iter().map(|(number, one)| {
        let log::Opened { log, source, state, report: found, .. } = one;
        report.extend(found);
        let settings = settings_of(&config.settings, number, &placement);
        let shard = Shard::recover_behind_epoch(settings, state, clocks.now());
        let position = shard.state().position();
        OpenedShard { number, log: Box::new(log), source, shard, position, serving: true }
    });
    let shards = shards.collect();
    Ok(Opened { log_id, placement, guarantee, shards, report })
}

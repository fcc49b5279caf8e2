//! `atp log`: makes, checks and prunes a log, without a router.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::{Screen, Table};
use atp_router::config::LogPlace;
use atp_router::log::LogError;
use atp_router::log::prune::{self, Plan, ShardPlan, Wish};

pub(crate) async fn init(screen: Screen, args: &cli::LogInit) -> Outcome {
    let config = crate::router::load(&args.config)?;
    match &config.log {
        LogPlace::Local => {
            Err(Failure::usage("log.kind is local: such a log begins by itself at the router's first start"))
        }
        #[cfg(feature = "kafka")]
        LogPlace::Kafka(place) => kafka(screen, config.kafka_options(place)).await,
        #[cfg(not(feature = "kafka"))]
        LogPlace::Kafka(_) => Err(Failure::usage("log.kind: this build has no Kafka; use one with `--features kafka`")),
    }
}

pub(crate) fn prune(screen: Screen, args: &cli::LogPrune) -> Outcome {
    let now_ms = now_ms();
    let wish = Wish { keep_from_ms: args.keep.map(|keep| now_ms.saturating_sub(keep)), now_ms };
    let plan = if args.dry_run { prune::plan(&args.log, wish) } else { prune::prune(&args.log, wish) };
    let plan = plan.map_err(|error| match error {
        LogError::InUse { .. } => Failure::new(
            Exit::Task,
            format!("--log: a router has {} open; stop it first (SIGTERM), or look with --dry-run", args.log),
        ),
        LogError::Corrupt { .. } | LogError::NotThisLog { .. } | LogError::Entry { .. } | LogError::OtherLog { .. } => {
            Failure::new(Exit::Difference, format!("--log: {error}"))
        }
        LogError::NoLog { .. } => Failure::usage(format!("--log: {error}")),
        error => Failure::new(Exit::Task, format!("--log: {error}")),
    })?;
    if screen.json {
        return Ok(screen.document(&serde_json::to_value(&plan)?)?);
    }
    Ok(screen.line(&prune_text(screen, &plan, args.dry_run))?)
}

/// The plan for people: a row for each shard, and what it comes to.
fn prune_text(screen: Screen, plan: &Plan, dry_run: bool) -> String {
    let position = |position: Option<&u64>| position.map_or_else(|| "-".into(), u64::to_string);
    let mut table =
        Table::new(&["SHARD", "FIRST", "LAST", "CHECKPOINT", "BEFORE", "OLDEST STREAM", "SAFE", "HELD BY", "GO"]);
    for shard in plan.shards.iter().filter(|shard| shard.last > 0) {
        let stream = shard.oldest_stream.as_ref();
        table.row([
            shard.shard.to_string(),
            shard.first.to_string(),
            shard.last.to_string(),
            position(shard.checkpoints.first()),
            position(shard.checkpoints.get(1)),
            stream.map_or_else(|| "-".into(), |s| format!("{} at {}", s.stream_id, s.position)),
            shard.safe.to_string(),
            held_by(shard),
            shard.entries.to_string(),
        ]);
    }
    let what = match plan.segments {
        0 => format!("{} entries, {} bytes", plan.entries, plan.bytes),
        files => format!("{} entries, {} bytes in {files} segments", plan.entries, plan.bytes),
    };
    let verdict = match (plan.entries + plan.segments, plan.pruned, dry_run) {
        (0, ..) => "nothing to prune".to_owned(),
        (_, true, _) => format!("pruned: {what}"),
        _ => format!("would go: {what}; nothing was removed"),
    };
    format!("{}\n{}: {verdict}", table.render(screen).trim_end(), plan.log)
}

fn held_by(shard: &ShardPlan) -> String {
    match shard.held_by {
        "no_checkpoint" => "no two checkpoints".into(),
        other => other.into(),
    }
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(feature = "kafka")]
async fn kafka(screen: Screen, options: atp_router::log::KafkaOptions) -> Outcome {
    use atp_router::log::{Guarantee, init};
    let address = options.address.to_string();
    let now_ms = now_ms();
    let made = tokio::task::spawn_blocking(move || init(&options, now_ms)).await;
    let made = made.map_err(|e| Failure::new(Exit::Task, e))?;
    let made = made.map_err(|e| Failure::new(Exit::Task, format!("log.kafka: {e}")))?;
    let log_id = atp_core::record::hex(&made.log_id);
    let durability = if made.replicated { Guarantee::Replicated } else { Guarantee::Single }.as_str();
    if screen.json {
        return Ok(screen.document(&serde_json::json!({
            "log": address, "log_id": log_id, "shards": made.shards, "durability": durability,
            "topic_made": made.topic_made, "log_made": made.log_made,
        }))?);
    }
    let did = match (made.topic_made, made.log_made) {
        (true, _) => "topic and log made",
        (false, true) => "log made in the topic that was there",
        (false, false) => "nothing to do, the log is there",
    };
    Ok(screen.line(&format!("{address}: {did}\nlog {log_id}, {} shards, durability {durability}", made.shards))?)
}

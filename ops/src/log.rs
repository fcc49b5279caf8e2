//! `atp log`: makes and checks a log, without a router.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::screen::Screen;
use atp_router::config::LogPlace;

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

#[cfg(feature = "kafka")]
async fn kafka(screen: Screen, options: atp_router::log::KafkaOptions) -> Outcome {
    use atp_router::log::{Guarantee, init};
    let address = options.address.to_string();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
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

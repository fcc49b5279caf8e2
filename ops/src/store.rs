//! `atp store show`: what the state store has, read from it and not from a router, which may be gone. Changes nothing.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::router::load;
use crate::screen::{Screen, Table};
use atp_router::store::{Fields, RedisStore, StateStore, StoreConfig};

pub(crate) async fn show(screen: Screen, args: &cli::StoreShow) -> Outcome {
    let StoreConfig::Redis(redis) = load(&args.config)?.store else {
        let why = "store.kind is memory, which only its router can see; ask that: atp ps, atp agents";
        return Err(Failure::usage(why));
    };
    let away = |e| Failure::new(Exit::Unreachable, format!("store: {e}"));
    let all = RedisStore::new(&redis).map_err(away)?.read().await.map_err(away)?;
    if screen.json {
        return Ok(screen.document(&all)?);
    }
    let tables = [
        table(screen, &all.routers, &["id", "atp", "http", "shards", "version", "since", "last_seen_at"]),
        table(screen, &all.shards, &["shard", "owner", "position", "epoch", "checkpoint", "heartbeat_at", "log"]),
        table(screen, &all.agents, &["name", "router", "status", "breaker", "in_flight", "qos_tier", "heartbeat_at"]),
        table(
            screen,
            &all.streams,
            &["stream", "tenant", "owner", "state", "qos", "budget_left_usd_micros", "last_event_at"],
        ),
    ];
    Ok(screen.line(tables.join("\n").trim_end())?)
}

/// Headings are the names of the fields.
fn table(screen: Screen, rows: &[Fields], fields: &[&'static str; 7]) -> String {
    let mut table = Table::new(fields);
    for row in rows {
        table.row(fields.map(|field| row.get(field).cloned().unwrap_or_default()));
    }
    table.render(screen)
}

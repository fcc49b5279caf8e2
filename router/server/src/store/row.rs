//! Rows as field and value: the same names in every store. All fields are written each time; an empty one says nothing.

use super::{Batch, Beat};
use atp_core::clock::rfc3339;
use atp_core::projection::StreamRow;
use atp_core::view::AgentView;
use serde::Serialize;
use serde_json::json;

pub(super) type Row = Vec<(&'static str, String)>;

fn text(value: Option<impl ToString>) -> String {
    value.map(|v| v.to_string()).unwrap_or_default()
}

fn as_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

pub(super) fn shard(batch: &Batch) -> Row {
    vec![
        ("shard", batch.shard.to_string()),
        ("log", batch.log.clone()),
        ("position", batch.position.to_string()),
        ("epoch", batch.epoch.to_string()),
        ("checkpoint", text((batch.checkpoint > 0).then_some(batch.checkpoint))),
        ("owner", batch.router.to_string()),
        ("since", rfc3339(batch.since_ms)),
        ("heartbeat_at", rfc3339(batch.at_ms)),
    ]
}

pub(super) fn stream(batch: &Batch, row: &StreamRow) -> Row {
    let missing: Vec<_> = row
        .missing
        .iter()
        .map(|(lane, open)| json!({"lane": lane, "msg_seq": open.msg_seq, "frag": open.frag, "missing": open.missing}))
        .collect();
    vec![
        ("tenant", row.tenant.to_string()),
        ("stream", row.stream.to_string()),
        ("shard", batch.shard.to_string()),
        ("position", batch.position.to_string()),
        ("owner", batch.router.to_string()),
        ("state", row.state.as_str().into()),
        ("qos", row.qos.as_str().into()),
        ("next_msg_seq", row.next_msg_seq.to_string()),
        ("window", as_json(&row.window)),
        ("calls_left", text(row.left.max_parallel)),
        ("budget_left_tokens", text(row.left.max_tokens.map(|t| t.0))),
        ("budget_left_usd_micros", text(row.left.max_usd_micros.map(|u| u.0))),
        ("missing", if missing.is_empty() { String::new() } else { as_json(&missing) }),
        ("consensus_hash", row.findings_hash.clone()),
        ("last_event_at", rfc3339(row.last_at)),
        ("heartbeat_at", rfc3339(batch.at_ms)),
    ]
}

pub(super) fn agent(batch: &Batch, row: &AgentView) -> Row {
    vec![
        ("name", row.name.to_string()),
        ("shard", batch.shard.to_string()),
        ("position", batch.position.to_string()),
        ("router", batch.router.to_string()),
        ("host", row.host.clone()),
        ("incarnation", row.incarnation.clone()),
        ("adapter", row.adapter.clone()),
        ("status", row.status.clone()),
        ("reason", text(row.reason.as_ref())),
        ("retry_at", text(row.retry_at.as_ref())),
        ("drained", row.drained.to_string()),
        ("healthy", row.healthy.to_string()),
        ("breaker", row.breaker.clone()),
        ("window", as_json(&row.window.effective)),
        ("aimd", row.aimd.to_string()),
        ("surcharge_ppm", row.surcharge_ppm.to_string()),
        ("in_flight", row.in_flight.to_string()),
        ("qos_tier", row.qos_tier.as_str().into()),
        ("heartbeat_at", rfc3339(batch.at_ms)),
    ]
}

pub(super) fn router(beat: &Beat) -> Row {
    let shards: Vec<String> = beat.shards.iter().map(ToString::to_string).collect();
    vec![
        ("id", beat.router.to_string()),
        ("incarnation", beat.incarnation.clone()),
        ("atp", beat.atp.clone()),
        ("http", beat.http.clone()),
        ("version", env!("CARGO_PKG_VERSION").into()),
        ("shards", shards.join(",")),
        ("since", rfc3339(beat.since_ms)),
        ("last_seen_at", rfc3339(beat.at_ms)),
    ]
}

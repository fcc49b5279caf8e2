//! `GET /v1/shards`, and draining a router, over HTTP.

use super::{Fleet, RouterRow, ShardRow};
use crate::http::{Problem, Site, not_found};
use atp_core::clock::rfc3339;
use atp_proto::WireError;
use atp_proto::id::is_id;
use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;

/// All of them behind the credential.
pub(crate) fn routes() -> Router<Site> {
    Router::new()
        .route("/v1/shards", get(shards))
        .route("/v1/routers/{id}/drain", post(drain_router).delete(undrain_router))
}

async fn shards(State(site): State<Site>) -> Json<Arc<Fleet>> {
    Json(fleet(&site))
}

/// As it was seen last, but for what this router doesn't own any more, or can't be sure of; one that shares its log with nobody owns
/// all there is.
pub(crate) fn fleet(site: &Site) -> Arc<Fleet> {
    let (facts, owned) = (site.facts(), site.owned());
    let config = facts.config.borrow();
    let id = config.settings.router_id.to_string();
    if let Some(ownership) = &facts.ownership {
        let mut fleet = ownership.fleet();
        let is_wrong = |row: &ShardRow| row.owner.as_ref() == Some(&id) && !owned.contains(&row.shard);
        if fleet.shards.iter().any(is_wrong) {
            Arc::make_mut(&mut fleet).disown(is_wrong);
        }
        return fleet;
    }
    let mut rows: Vec<ShardRow> =
        (0..facts.shards.placement().shards()).map(|shard| ShardRow { shard, ..ShardRow::default() }).collect();
    for (shard, here) in facts.shards.all_here() {
        let health = here.health.borrow();
        rows[shard as usize] = ShardRow {
            shard,
            owner: owned.contains(&shard).then(|| id.clone()),
            epoch: health.epoch,
            position: health.durable,
            since: Some(rfc3339(health.since_ms)),
            ..ShardRow::default()
        };
    }
    let router = RouterRow {
        id,
        incarnation: facts.incarnation.clone(),
        atp: config.advertise.clone().unwrap_or_else(|| facts.atp.to_string()),
        http: facts.http.to_string(),
        shards: 0,
        drained: false,
    };
    let mut fleet = Fleet { shards: rows, routers: vec![router], complete: true };
    fleet.count();
    Arc::new(fleet)
}

/// Hands all shards of a router to the others; it owns nothing until the DELETE or its next start.
async fn drain_router(State(site): State<Site>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    drain(&site, id, true).await
}

async fn undrain_router(State(site): State<Site>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    drain(&site, id, false).await
}

async fn drain(site: &Site, id: String, drained: bool) -> Result<Json<Value>, Problem> {
    if !is_id(&id) {
        return Err(Problem::new(WireError::proto("router id: 1 to 64 of A-Za-z0-9._-"), None));
    }
    let Some(ownership) = &site.facts().ownership else {
        let message = "this router shares its log with no other, so nobody could go on; SIGTERM drains its streams";
        return Err(Problem::new(WireError::proto(message), None));
    };
    ownership.drain(&id, drained).await?;
    let fleet = ownership.fleet();
    let row = fleet.routers.iter().find(|row| row.id == id);
    let mut row = row.map(|row| json!(row)).ok_or_else(|| not_found(&id))?;
    row["drained"] = drained.into();
    Ok(Json(json!({ "routers": [row] })))
}

//! What this router knows of the fleet, for people and for `/readyz`.

use super::task::{Alive, Ownership};
use super::{Fleet, RouterRow, ShardRow};
use crate::shards::Place;
use atp_core::clock::rfc3339;
use metrics::gauge;
use std::sync::Arc;

impl Ownership {
    /// Publishes what is known.
    #[allow(clippy::cast_precision_loss)] // a gauge is a float by its nature
    pub(super) fn show(&mut self) {
        let (mut owned, mut lag_max) = (0_u32, 0);
        let followed = self.following.positions();
        let mut rows = Vec::with_capacity(self.known.len());
        for (shard, known) in (0..).zip(&self.known) {
            let mut row = ShardRow { shard, ..ShardRow::default() };
            let seen = &known.seen;
            row.position = seen.watermark.as_ref().map_or(0, |w| w.position);
            row.epoch = seen.epoch;
            match self.shards.place(shard) {
                Place::Here(here) => {
                    let health = here.health.borrow();
                    owned += 1;
                    row.owner = Some(self.me.router.clone());
                    (row.position, row.epoch) = (health.durable, health.epoch);
                    row.since = Some(rfc3339(health.since_ms));
                }
                Place::At(site) => {
                    let shown = seen.watermark.as_ref().is_some_and(|w| w.router == site.router);
                    row.since = Some(seen.since.clone()).filter(|since| shown && !since.is_empty());
                    row.owner = Some(site.router.clone());
                }
                Place::Unknown => {}
            }
            if let Some((router, position)) = seen.standby.as_ref().filter(|(r, _)| Some(r) != row.owner.as_ref()) {
                row.standby = Some(router.clone());
                row.lag = Some(row.position.saturating_sub(*position));
            }
            if let Some(position) = followed.get(&shard) {
                lag_max = row.position.saturating_sub(*position).max(lag_max);
            }
            rows.push(row);
        }
        gauge!("atp_shards_owned").set(f64::from(owned));
        gauge!("atp_standby_lag_entries").set(lag_max as f64);
        let routers = self.alive.values().map(|Alive { site, drained, .. }| RouterRow {
            id: site.router.clone(),
            incarnation: site.incarnation.clone(),
            atp: site.atp.clone(),
            http: site.http.clone(),
            shards: 0,
            drained: *drained || (*site == self.me && self.drained.is_some()),
        });
        let complete = self.fleet.borrow().complete || rows.iter().all(|row| row.owner.is_some());
        let mut fleet = Fleet { routers: routers.collect(), shards: rows, complete };
        fleet.count();
        self.fleet.send_if_modified(|shown| {
            let news = **shown != fleet;
            *shown = Arc::new(fleet);
            news
        });
    }
}

//! What operators and a state store want of a shard: questions, other settings, room for its log.

use super::{Around, Place};
use crate::simulation::plan;
use crate::simulation::sched::Sched;
use atp_core::message::{Input, LogRoom, Query};
use atp_proto::{StreamId, TenantId};
use std::sync::Arc;

impl Place {
    pub fn ask(&mut self, a: &mut Around<'_>, query: Query) {
        self.queries += 1;
        let id = self.queries;
        self.input(a, Input::Query { id, query });
    }

    pub fn random_query(s: &mut Sched, streams: &[(TenantId, StreamId)]) -> Query {
        let which = if streams.is_empty() { 0 } else { s.rng.below(7) };
        let (tenant, stream) = match streams.get(s.rng.index(streams.len())) {
            Some(known) => known.clone(),
            None => return Query::Verify,
        };
        match which {
            0 | 1 => Query::Verify,
            2 => Query::Accounts,
            3 => Query::Stream { tenant, stream },
            4 => Query::Bill { tenant, stream },
            5 => Query::Agents,
            _ => Query::Streams { tenant },
        }
    }

    /// Other limits, other steps at them, and accounts that weren't there. What runs goes on under its own windows.
    pub fn reload(&mut self, a: &mut Around<'_>, changed: &plan::Reload) {
        let mut settings = (*self.settings).clone();
        (settings.accounts, settings.default_account) = changed.accounts.clone();
        settings.retries = changed.retries;
        self.settings = Arc::new(settings);
        let Some(owner) = self.owners.last_mut().filter(|o| o.number == self.number && !o.paused) else { return };
        owner.shard.set_settings(self.settings.clone());
        self.drain(a, self.number);
    }

    pub fn room(&mut self, a: &mut Around<'_>) {
        let s = &mut *a.s;
        let room = if s.healed { LogRoom::Enough } else { s.rng.pick(&[LogRoom::Low, LogRoom::Last, LogRoom::Enough]) };
        self.input(a, Input::LogRoom(room));
    }
}

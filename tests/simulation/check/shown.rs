//! What a state store is shown is durable, and adds up: at the end the sum of all answers says what one whole answer says.

use super::{Check, OfShard};
use atp_core::projection::{Projection, StreamRow};
use std::collections::BTreeMap;

/// The rows that a store would hold now.
#[derive(Default)]
pub struct Shown {
    /// Whose changes are asked for.
    pub owner: u32,
    position: u64,
    rows: BTreeMap<(String, String), StreamRow>,
}

impl Shown {
    /// True at the first question to an owner: it shows everything.
    pub fn is_new(&mut self, owner: u32) -> bool {
        let new = self.owner != owner;
        if new {
            *self = Self { owner, ..Self::default() };
        }
        new
    }
}

impl Check {
    /// An answer without agents is the whole at the end.
    pub fn projected(&mut self, shard: u32, projection: &Projection, acked: u64) {
        let OfShard { ledger, shown, .. } = &mut self.shards[shard as usize];
        let at = projection.position;
        self.verdict.expect(at <= acked && at >= shown.position, "a projection is durable and only rises", || {
            format!("shows {at} after {}, {acked} is durable", shown.position)
        });
        shown.position = at;
        for row in &projection.streams {
            // What waits for a fragment is no change of its own, nor is what nobody is told of.
            let row = StreamRow { missing: Vec::new(), last_at: 0, ..row.clone() };
            let key = (row.tenant.to_string(), row.stream.to_string());
            if let Some(stream) = ledger.stream(&key.0, &key.1).filter(|_| at == ledger.position) {
                let free = |i: usize| (stream.limit[i] - stream.settled[i] - stream.held[i]).max(0);
                let left = [row.left.max_tokens.map(|t| t.0), row.left.max_usd_micros.map(|u| u.0)];
                let mine = [free(0), free(1)];
                let same = (0..2).all(|i| left[i].is_none_or(|n| i128::from(n) == mine[i]));
                self.verdict.expect(same || stream.denied.is_some(), "a projection says what the ledger says", || {
                    format!("{row:?}, the ledger leaves {mine:?}")
                });
            }
            if projection.agents.is_none() {
                let before = shown.rows.get(&key);
                self.verdict.expect(before == Some(&row), "a store that is shown changes has the whole", || {
                    format!("{before:?} was shown last, it stands at {row:?}")
                });
            }
            shown.rows.insert(key, row);
        }
    }
}

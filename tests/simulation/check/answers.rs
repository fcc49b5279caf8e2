//! Answers of queries: all they show is durable, and says what the checker's own ledger says.

use super::ledger::{Ledger, Pair};
use super::{Check, Verdict};
use atp_core::message::Answer;
use atp_core::state::State;
use atp_core::view::AccountView;
use atp_proto::Amount;

fn pair(a: Amount) -> Pair {
    [a.tokens.0.into(), a.usd_micros.0.into()]
}

impl Check {
    /// An answer leaves the shard; `acked` is the last position that it was told is durable.
    pub fn answered(&mut self, shard: u32, answer: &Answer, acked: u64) {
        let of = &mut self.shards[shard as usize];
        let ledger = &of.ledger;
        match answer {
            Answer::Verify(view) => {
                self.verdict.expect(view.position <= acked, "replies show durable state", || {
                    format!("verify shows {}, {acked} is durable", view.position)
                });
                of.fold.verify(view, &mut self.verdict);
                if view.position == ledger.position {
                    accounts(ledger, &view.accounts, &mut self.verdict);
                    let open = ledger.open_calls().count() as u64;
                    self.verdict.expect(open == view.open_reservations, "fold(log) = live state", || {
                        format!("{} open reservations, the log has {open}", view.open_reservations)
                    });
                }
            }
            Answer::Accounts { position, accounts } => {
                self.verdict.expect(*position <= acked, "replies show durable state", || {
                    format!("accounts show {position}, {acked} is durable")
                });
                if *position == ledger.position {
                    self::accounts(ledger, accounts, &mut self.verdict);
                }
            }
            Answer::Stream(Some(stream)) => {
                let shown = &stream.view;
                let known = ledger.stream(&shown.account, &shown.stream_id);
                self.verdict.expect(known.is_some(), "replies show durable state", || {
                    format!("{} isn't in the log", shown.stream_id)
                });
                if shown.state.is_closed() {
                    let over = known.is_some_and(|s| s.closed.is_some() || s.denied.is_some());
                    self.verdict.expect(over, "replies show durable state", || {
                        format!("{} isn't closed in the log", shown.stream_id)
                    });
                }
            }
            Answer::Bill(Some(bill)) => {
                let known = ledger.stream(&bill.account, &bill.stream_id);
                self.verdict.expect(known.is_some(), "replies show durable state", || {
                    format!("{} isn't in the log", bill.stream_id)
                });
                let calls = known.map_or(0, |s| s.calls.len());
                self.verdict.expect(bill.calls.len() <= calls, "replies show durable state", || {
                    format!("the bill of {} shows {} calls, the log has {calls}", bill.stream_id, bill.calls.len())
                });
            }
            Answer::Streams(rows) => {
                let unknown = rows.iter().find(|r| ledger.stream(&r.account, &r.stream_id).is_none());
                self.verdict.expect(unknown.is_none(), "replies show durable state", || {
                    format!("{unknown:?} isn't in the log")
                });
            }
            Answer::Projection(projection) => self.projected(shard, projection, acked),
            Answer::Stream(None) | Answer::Bill(None) | Answer::Agents(_) => {}
        }
    }
}

impl Check {
    /// The live state, where all of it is durable: what it says of its accounts is what the records say.
    pub fn live(&mut self, shard: u32, state: &State) {
        let ledger = &self.shards[shard as usize].ledger;
        // Of one who was replaced the entries count no more, however many they are.
        if state.position() == ledger.position && state.epoch() == ledger.epoch {
            accounts(ledger, &state.account_views(), &mut self.verdict);
        }
    }
}

fn accounts(ledger: &Ledger, rows: &[AccountView], verdict: &mut Verdict) {
    for row in rows {
        let Some(mine) = ledger.windows.get(&(row.account.clone(), row.window_id.clone())) else { continue };
        let (settled, held) = (pair(row.settled), pair(row.held));
        verdict.expect(mine.settled == settled && mine.held == held, "the ledger is the sum of its records", || {
            format!(
                "{} {}: live S {settled:?} R {held:?}, records say S {:?} R {:?}",
                row.account, row.window_id, mine.settled, mine.held
            )
        });
    }
}

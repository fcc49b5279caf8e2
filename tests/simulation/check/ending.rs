//! After healing: every client has an answer, nothing is held, the log replays to the live state.

use super::Check;
use crate::simulation::client::Task;

/// Nothing more will happen: what must have happened by now.
pub fn check(check: &mut Check, tasks: &[Task], now_ms: u64) {
    for task in tasks {
        check.verdict.expect(task.is_over(), "every client has an answer", || {
            format!("{} of client {} waits at {now_ms}: {:?}", task.stream, task.plan.client, task.state)
        });
    }
    let open = check
        .ledgers()
        .flat_map(|ledger| ledger.open_calls())
        .next()
        .map(|c| format!("{} of {} is {:?}", c.id, c.agent, c.phase));
    check.verdict.expect(open.is_none(), "after healing R returns to 0", || open.clone().unwrap_or_default());
    for ((account, window), w) in check.shards.iter().flat_map(|of| &of.ledger.windows) {
        check.verdict.expect(w.held == [0, 0], "after healing R returns to 0", || {
            format!("{account} {window} holds {:?}", w.held)
        });
    }
    for (key, stream) in check.shards.iter().flat_map(|of| &of.ledger.streams) {
        let over = stream.closed.is_some() || stream.denied.is_some() || !stream.accepted;
        check.verdict.expect(over, "every key reaches Close or Deny", || format!("{key:?} is open"));
    }
    for of in &mut check.shards {
        of.fold.all(&mut check.verdict);
    }
    check.balances();
}

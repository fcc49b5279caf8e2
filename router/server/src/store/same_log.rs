//! Before a router serves: a log that ends before what was shown of it has lost acknowledged records, and another log under
//! the same keys never had them. Both are refused; a store that is away says nothing, and nothing waits for it.

use super::{StateStore, StoreError, Watermark};
use std::time::Duration;
use tokio::time::Instant;

/// How long a start waits for the store.
const PATIENCE: Duration = Duration::from_secs(3);

/// Compares a log (its id in hex, and of each shard the position of its last entry) with what the store remembers of it.
///
/// # Errors
/// In which shard, and what differs; acknowledged records are gone.
pub(crate) async fn check<S: StateStore>(store: &mut S, log: &str, ends: &[(u32, u64)]) -> Result<(), (u32, String)> {
    let give_up = Instant::now() + PATIENCE;
    for (shard, end) in ends {
        let known = match tokio::time::timeout_at(give_up, store.watermark(*shard)).await {
            Ok(Ok(known)) => known,
            Ok(Err(StoreError::Away(why))) => return unheard(&why),
            Ok(Err(other)) => return Err((*shard, other.to_string())),
            Err(_) => return unheard("no answer"),
        };
        differs(known, log, *end).map_or(Ok(()), |what| Err((*shard, what)))?;
    }
    Ok(())
}

/// What is wrong with a shard's log that ends at `end`, if what was known of it says so.
pub(crate) fn differs(known: Option<Watermark>, log: &str, end: u64) -> Option<String> {
    let Watermark { log: other, position, router } = known?;
    if other != log {
        return Some(format!(
            "router {router} wrote log {other} up to position {position}; the log here is another one, {log}"
        ));
    }
    (position > end).then(|| {
        format!("router {router} has acknowledged position {position} of this log, and the log here ends at {end}")
    })
}

fn unheard(why: &str) -> Result<(), (u32, String)> {
    tracing::warn!("store: {why}; whether the log is the one that was last served can't be compared");
    Ok(())
}

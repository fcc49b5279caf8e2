//! Before a router serves: a log that ends before what was shown of it has lost acknowledged records, and another log under
//! the same keys never had them. Both are refused; a store that is away says nothing, and nothing waits for it.

use super::{StateStore, StoreError, Watermark};
use std::time::Duration;

/// How long a start waits for the store.
const PATIENCE: Duration = Duration::from_secs(3);

/// Compares a log (its id in hex and the position of its last entry) with what the store remembers of its shard.
///
/// # Errors
/// What differs; acknowledged records are gone.
pub(crate) async fn check<S: StateStore>(store: &mut S, shard: u32, log: &str, end: u64) -> Result<(), String> {
    let known = match tokio::time::timeout(PATIENCE, store.watermark(shard)).await {
        Ok(Ok(known)) => known,
        Ok(Err(StoreError::Away(why))) => return unheard(&why),
        Ok(Err(other)) => return Err(other.to_string()),
        Err(_) => return unheard("no answer"),
    };
    match known {
        Some(Watermark { log: other, position, router }) if other != log => Err(format!(
            "router {router} wrote log {other} up to position {position}; the log here is another one, {log}"
        )),
        Some(Watermark { position, router, .. }) if position > end => Err(format!(
            "router {router} has acknowledged position {position} of this log, and the log here ends at {end}"
        )),
        Some(_) | None => Ok(()),
    }
}

fn unheard(why: &str) -> Result<(), String> {
    tracing::warn!("store: {why}; whether the log is the one that was last served can't be compared");
    Ok(())
}

//! Asks another router what it owns, where its word in the store has lapsed: who answers may have lost only that.

use crate::shards::Site;
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// How long a router may take to say what it owns.
const PATIENCE: Duration = Duration::from_secs(1);
const ANSWER_BYTES_MAX: u64 = 64 * 1024;

/// The shards that it serves; `None`: it doesn't answer.
type Owned = Option<BTreeSet<u32>>;

/// Routers that were asked.
#[derive(Default)]
pub(super) struct Asking {
    under_way: JoinSet<(Arc<Site>, Owned)>,
    asked: Vec<Arc<Site>>,
    answers: Vec<(Arc<Site>, Instant, Owned)>,
}

impl Asking {
    /// Asks, unless it is being asked.
    pub(super) fn ask(&mut self, site: &Arc<Site>) {
        if self.asked.contains(site) {
            return;
        }
        self.asked.push(site.clone());
        let site = site.clone();
        self.under_way.spawn(async move {
            let owned = timeout(PATIENCE, read(&site)).await.ok().and_then(Result::ok).flatten();
            (site, owned)
        });
    }

    /// Waits for the next answer; for ever if nobody was asked.
    pub(super) async fn next(&mut self) {
        let Some(answer) = self.under_way.join_next().await else { return std::future::pending().await };
        let Ok((site, owned)) = answer else { return };
        self.asked.retain(|asked| *asked != site);
        self.answers.retain(|(of, ..)| *of != site);
        self.answers.push((site, Instant::now(), owned));
    }

    /// Whether a router still owns a shard; `None`: it was not asked within this time.
    pub(super) fn owns(&self, site: &Site, shard: u32, within: Duration) -> Option<bool> {
        let (_, at, owned) = self.answers.iter().find(|(of, ..)| **of == *site)?;
        (at.elapsed() < within).then(|| owned.as_ref().is_some_and(|owned| owned.contains(&shard)))
    }

    /// Old answers are forgotten.
    pub(super) fn forget(&mut self, after: Duration) {
        self.answers.retain(|(_, at, _)| at.elapsed() < after);
    }
}

/// Whether this very run of a router answers.
pub(super) async fn lives(site: &Site) -> bool {
    matches!(timeout(PATIENCE, read(site)).await, Ok(Ok(Some(_))))
}

/// What `/readyz` says, whatever its status.
async fn read(site: &Site) -> std::io::Result<Owned> {
    let mut io = TcpStream::connect(&site.http).await?;
    io.write_all(format!("GET /readyz HTTP/1.0\r\nhost: {}\r\n\r\n", site.http).as_bytes()).await?;
    let mut text = String::new();
    io.take(ANSWER_BYTES_MAX).read_to_string(&mut text).await?;
    Ok(owned(&text, site))
}

/// Another process may be at that address by now.
fn owned(answer: &str, site: &Site) -> Owned {
    let (_, body) = answer.split_once("\r\n\r\n")?;
    let body: Value = serde_json::from_str(body).ok()?;
    if body["router"]["incarnation"] != *site.incarnation {
        return None;
    }
    let owned = body["shards"]["owned"].as_array()?.iter();
    Some(owned.filter_map(|shard| u32::try_from(shard.as_u64()?).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_run_of_a_router_speaks_for_its_shards() {
        let site = Site { router: "r1".into(), incarnation: "i".into(), atp: "h:1".into(), http: "h:2".into() };
        let answer = |run| {
            format!("HTTP/1.0 503 x\r\n\r\n{{\"router\":{{\"incarnation\":\"{run}\"}},\"shards\":{{\"owned\":[1,7]}}}}")
        };
        assert_eq!(owned(&answer("i"), &site), Some([1, 7].into()));
        assert_eq!(owned(&answer("j"), &site), None);
        assert_eq!(owned("HTTP/1.0 200 OK\r\n\r\nhello", &site), None);
    }
}

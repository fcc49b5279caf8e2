//! The shards as this process sees them: the way to each one whose owner task runs here. They come and go one by one while the
//! process runs; what belongs to which is `Placement`'s to say.

use crate::inbox::{Inbox, ToShard};
use crate::log::Source;
use crate::shard_task::Health;
use atp_core::message::{Answer, Query};
use atp_core::placement::Placement;
use atp_proto::codec::Received;
use atp_proto::{AgentName, StreamId, TenantId};
use futures_util::future::join_all;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::watch;

/// A shard whose owner task runs here.
#[derive(Clone)]
pub(crate) struct Here {
    pub(crate) inbox: Inbox,
    /// Its log, to read.
    pub(crate) source: Source,
    pub(crate) health: watch::Receiver<Health>,
}

/// All shards of a log. Clones share the list.
#[derive(Clone)]
pub(crate) struct Shards(Arc<Inner>);

struct Inner {
    placement: Placement,
    places: Vec<RwLock<Option<Here>>>,
}

impl Shards {
    /// None of them runs here yet.
    pub(crate) fn new(placement: Placement) -> Self {
        let places = (0..placement.shards()).map(|_| RwLock::new(None)).collect();
        Self(Arc::new(Inner { placement, places }))
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.0.placement
    }

    /// From now on the shard is found here.
    pub(crate) fn open(&self, shard: u32, here: Here) {
        self.set(shard, Some(here));
    }

    pub(crate) fn close(&self, shard: u32) {
        self.set(shard, None);
    }

    fn set(&self, shard: u32, here: Option<Here>) {
        let place = self.0.places.get(shard as usize).expect("a shard of this log");
        *place.write().unwrap_or_else(PoisonError::into_inner) = here;
    }

    /// `None`: it doesn't run here.
    pub(crate) fn here(&self, shard: u32) -> Option<Here> {
        self.0.places.get(shard as usize)?.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The way into a shard; `None`: it doesn't run here.
    pub(crate) fn at(&self, shard: u32) -> Option<Inbox> {
        Some(self.here(shard)?.inbox)
    }

    /// Those that run here, by number.
    pub(crate) fn all_here(&self) -> Vec<(u32, Here)> {
        (0..self.0.placement.shards()).filter_map(|shard| Some((shard, self.here(shard)?))).collect()
    }

    pub(crate) fn of_stream(&self, tenant: &TenantId, stream: &StreamId) -> u32 {
        self.0.placement.shard_of(tenant, stream)
    }

    pub(crate) fn home_of_agent(&self, agent: &AgentName) -> u32 {
        self.0.placement.home_of_agent(agent)
    }

    /// Asks one shard; `None`: it doesn't run here, or has ended.
    pub(crate) async fn ask(&self, shard: u32, query: Query) -> Option<Answer> {
        self.at(shard)?.ask(query).await
    }

    /// Asks every shard that runs here, by number; `None`: one of them has ended.
    pub(crate) async fn ask_all(&self, query: &Query) -> Option<Vec<(u32, Answer)>> {
        let asked = self.all_here().into_iter().map(async |(shard, here)| {
            let answer = here.inbox.ask(query.clone()).await;
            Some((shard, answer?))
        });
        join_all(asked).await.into_iter().collect()
    }

    /// Tells every shard that runs here the same; one that has ended needs to hear nothing.
    pub(crate) async fn tell_all(&self, mut message: impl FnMut(u32) -> ToShard) {
        // At once where they have room, however many they are.
        tokio::task::unconstrained(async {
            for (shard, here) in self.all_here() {
                let _ = here.inbox.send(64, message(shard)).await;
            }
        })
        .await;
    }
}

/// Frames by shard, each shard's in the order in which they came; those of no shard are left out.
pub(crate) fn split(
    frames: Vec<Received>,
    shard_of: impl FnMut(&Received) -> Option<u32>,
) -> Vec<(u32, Vec<Received>)> {
    let shards: Vec<Option<u32>> = frames.iter().map(shard_of).collect();
    if let Some(Some(first)) = shards.first()
        && shards.iter().all(|shard| *shard == Some(*first))
    {
        return vec![(*first, frames)];
    }
    let mut groups: Vec<(u32, Vec<Received>)> = Vec::new();
    for (received, shard) in frames.into_iter().zip(shards) {
        let Some(shard) = shard else { continue };
        match groups.iter_mut().find(|(of, _)| *of == shard) {
            Some((_, group)) => group.push(received),
            None => groups.push((shard, vec![received])),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::codec::encode_body;
    use atp_proto::{Flags, Frame};

    fn frame(stream: &str, seq: u64) -> Received {
        let frame = Frame::raw(stream, seq, Flags::NONE, "x", "{}".into());
        let body = encode_body(&frame);
        Received { frame, body }
    }

    fn split_by_name(frames: Vec<Received>) -> Vec<(u32, String)> {
        let groups = split(frames, |r| r.frame.stream_id.parse().ok());
        let seqs = |frames: Vec<Received>| frames.iter().map(|r| r.frame.msg_seq.to_string()).collect();
        groups.into_iter().map(|(shard, frames)| (shard, seqs(frames))).collect()
    }

    #[test]
    fn frames_keep_their_order_in_each_shard() {
        let frames = || vec![frame("2", 1), frame("7", 2), frame("2", 3), frame("no", 4), frame("7", 5)];
        assert_eq!(split_by_name(frames()), [(2, "13".into()), (7, "25".into())]);
        assert_eq!(split_by_name(vec![frame("2", 1), frame("2", 2)]), [(2, "12".into())]);
        assert_eq!(split_by_name(vec![frame("no", 1)]), []);
        assert_eq!(split_by_name(Vec::new()), []);
    }
}

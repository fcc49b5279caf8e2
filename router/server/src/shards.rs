//! The shards as this process sees them: the way to each one whose owner task runs here, and the router that owns another. They
//! move one by one while the process runs; what belongs to which is `Placement`'s to say.

use crate::inbox::{Inbox, ToShard};
use crate::log::Source;
use crate::shard_task::Health;
use atp_core::placement::Placement;
use atp_proto::codec::Received;
use atp_proto::{AgentName, StreamId, TenantId};
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

/// Another router, as it is reached. As text, its words one after the other, it is a lease's holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    pub(crate) router: String,
    /// One run of its process.
    pub(crate) incarnation: String,
    /// HOST:PORT each.
    pub(crate) atp: String,
    pub(crate) http: String,
}

impl Site {
    pub(crate) fn text(&self) -> String {
        [&*self.router, &*self.incarnation, &*self.atp, &*self.http].join(" ")
    }

    #[cfg(any(feature = "kafka", test))]
    pub(crate) fn read(text: &str) -> Option<Self> {
        let mut parts = text.split(' ').map(str::to_owned);
        let site = Self { router: parts.next()?, incarnation: parts.next()?, atp: parts.next()?, http: parts.next()? };
        parts.next().is_none().then_some(site)
    }
}

/// The other routers that are alive.
pub(crate) type Sites = Arc<Vec<Arc<Site>>>;

/// Where a shard is.
#[derive(Clone, Default)]
pub(crate) enum Place {
    Here(Here),
    /// That router says that it owns it.
    #[cfg_attr(not(any(feature = "kafka", test)), expect(dead_code, reason = "without Kafka nobody else owns one"))]
    At(Arc<Site>),
    /// Nobody is known to own it.
    #[default]
    Unknown,
}

/// All shards of a log. Clones share the list.
#[derive(Clone)]
pub(crate) struct Shards(Arc<Inner>);

struct Inner {
    placement: Placement,
    places: Vec<RwLock<Place>>,
    /// Rises when a shard moves.
    moves: watch::Sender<u64>,
}

impl Shards {
    /// None of them runs here yet.
    pub(crate) fn new(placement: Placement) -> Self {
        let places = (0..placement.shards()).map(|_| RwLock::default()).collect();
        Self(Arc::new(Inner { placement, places, moves: watch::Sender::new(0) }))
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.0.placement
    }

    /// From now on the shard is there.
    pub(crate) fn set(&self, shard: u32, to: Place) {
        let place = self.0.places.get(shard as usize).expect("a shard of this log");
        let before = std::mem::replace(&mut *place.write().unwrap_or_else(PoisonError::into_inner), to.clone());
        match (before, to) {
            (Place::Unknown, Place::Unknown) => return,
            (Place::At(before), Place::At(to)) if before == to => return,
            _ => {}
        }
        self.0.moves.send_modify(|n| *n += 1);
    }

    /// Changes when a shard moves.
    pub(crate) fn moves(&self) -> watch::Receiver<u64> {
        self.0.moves.subscribe()
    }

    /// Of a shard that the log doesn't have: `Unknown`.
    pub(crate) fn place(&self, shard: u32) -> Place {
        let place = self.0.places.get(shard as usize);
        place.map(|place| place.read().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }

    /// `None`: it doesn't run here.
    pub(crate) fn here(&self, shard: u32) -> Option<Here> {
        match self.place(shard) {
            Place::Here(here) => Some(here),
            Place::At(_) | Place::Unknown => None,
        }
    }

    /// The way into a shard; `None`: it doesn't run here.
    pub(crate) fn at(&self, shard: u32) -> Option<Inbox> {
        Some(self.here(shard)?.inbox)
    }

    pub(crate) fn any_here(&self) -> bool {
        (0..self.0.placement.shards()).any(|shard| self.here(shard).is_some())
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
    fn a_site_reads_back_and_a_shard_is_where_it_was_put() {
        let site = Site { router: "r1".into(), incarnation: "i".into(), atp: "h:1".into(), http: "h:2".into() };
        assert_eq!(Site::read(&site.text()), Some(site.clone()));
        assert_eq!(Site::read("r1 i h:1"), None);
        assert_eq!(Site::read("r1 i h:1 h:2 more"), None);
        let shards = Shards::new(Placement::default());
        assert!(matches!(shards.place(0), Place::Unknown));
        shards.set(0, Place::At(Arc::new(site.clone())));
        assert!(matches!(shards.place(0), Place::At(at) if *at == site));
        assert!(shards.here(0).is_none() && shards.all_here().is_empty());
        assert!(matches!(shards.place(9), Place::Unknown));
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

//! The other routers of the fleet, as this one knows them: a link to each, who has linked here, and which agents are where.
//! Decides nothing about streams or money.

pub(crate) mod ask;
pub(crate) mod link;
mod proof;
pub(crate) mod relay;
pub(crate) mod say;

pub use proof::PeerKey;
pub(crate) use proof::{Answering, KEY_BYTES_MIN};

use crate::connection::Shared;
use crate::outbox::Outbox;
use crate::shards::Site;
use ask::Answers;
use atp_core::message::FromAgent;
use atp_core::whereabouts::{News, Whereabouts, Word};
use atp_proto::codec;
use atp_proto::content::{AgentRoute, PeerChallenge, RouteUpdate};
use atp_proto::frame::kind;
use atp_proto::limits::FIRST_FRAME_MS;
use atp_proto::{AgentName, Code, ConnId, Flags, Frame, TenantId, WireError};
use bytes::BytesMut;
use proof::Dialling;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

/// Clones share everything.
#[derive(Clone)]
pub(crate) struct Peers(Arc<Inner>);

struct Inner {
    own: String,
    key: Option<PeerKey>,
    known: Mutex<Known>,
    started: Instant,
    next: AtomicU64,
    /// Rises when an agent comes or goes here.
    agents: watch::Sender<u64>,
}

struct Known {
    /// By router: the link that was dialled here.
    links: BTreeMap<String, Link>,
    /// The links that others dialled.
    taken: BTreeMap<ConnId, Outbox>,
    far: Whereabouts,
    asked: BTreeMap<u64, oneshot::Sender<Answers>>,
}

struct Link {
    no: u64,
    outbox: Outbox,
}

impl Peers {
    /// Without a key there are no others.
    pub(crate) fn new(own: &str, key: Option<PeerKey>) -> Self {
        let known = Known {
            links: BTreeMap::new(),
            taken: BTreeMap::new(),
            far: Whereabouts::new(own),
            asked: BTreeMap::new(),
        };
        let (known, next, agents) = (Mutex::new(known), AtomicU64::new(1), watch::Sender::new(0));
        Self(Arc::new(Inner { own: own.into(), key, known, started: Instant::now(), next, agents }))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self) -> u64 {
        self.0.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn has_key(&self) -> bool {
        self.0.key.is_some()
    }

    /// What a router that dials is asked to prove.
    ///
    /// # Errors
    /// EPROTO: there is no key here. EAUTH: its hello can't be one of this fleet.
    pub(crate) fn challenge(&self, hello: &Frame) -> Result<(Answering, PeerChallenge), WireError> {
        let Some(key) = &self.0.key else {
            let message = "hello: role `router` isn't served here, peers.key is not set; use `client` or `agent`";
            return Err(WireError::proto(message));
        };
        Answering::new(key, &self.0.own, hello.read()?)
    }

    // ---- links ------------------------------------------------------------------------------------------------------

    fn up(&self, router: &str, outbox: Outbox) -> u64 {
        let no = self.number();
        self.known().links.insert(router.into(), Link { no, outbox });
        no
    }

    /// The link is gone; returns the agents that are unreachable with it.
    fn down(&self, router: &str, no: u64) -> Vec<(AgentName, String)> {
        let mut known = self.known();
        if known.links.get(router).is_none_or(|link| link.no != no) {
            return Vec::new();
        }
        known.links.remove(router);
        known.far.lost(router)
    }

    fn taken(&self, conn: ConnId, outbox: Outbox) {
        self.known().taken.insert(conn, outbox);
    }

    fn released(&self, conn: ConnId) {
        self.known().taken.remove(&conn);
    }

    /// The routers that this one is linked to.
    pub(crate) fn linked(&self) -> usize {
        self.known().links.len()
    }

    /// Says it to that router; false: it isn't linked, or its link is full.
    pub(crate) fn say(&self, router: &str, frame: Frame) -> bool {
        let link = self.known().links.get(router).map(|link| link.outbox.clone());
        link.is_some_and(|link| link.send_one(frame))
    }

    /// What an agent of this router says to every shard, those of other routers.
    pub(crate) fn tell_all(&self, message: &FromAgent) {
        let taken: Vec<Outbox> = self.known().taken.values().cloned().collect();
        if let Some((last, others)) = taken.split_last() {
            let frame = say::from_agent(None, message);
            others.iter().for_each(|link| say::or_close(link, frame.clone()));
            say::or_close(last, frame);
        }
    }

    async fn ask(&self, router: &str, ask: &ask::Ask, wait: Duration) -> Option<Answers> {
        let id = self.number();
        let (reply, answer) = oneshot::channel();
        self.known().asked.insert(id, reply);
        let answer = match self.say(router, say::ask(id, ask)) {
            true => tokio::time::timeout(wait, answer).await.ok().and_then(Result::ok),
            false => None,
        };
        self.known().asked.remove(&id);
        answer
    }

    fn answered(&self, id: u64, answers: Answers) {
        if let Some(reply) = self.known().asked.remove(&id) {
            // Whoever asked may have gone; that is no fault.
            let _ = reply.send(answers);
        }
    }

    // ---- agents -----------------------------------------------------------------------------------------------------

    /// The link to the router of an agent; `None`: it is here, or nowhere.
    pub(crate) fn link_of(&self, agent: &AgentName) -> Option<Outbox> {
        let known = self.known();
        let far = known.far.of(agent)?;
        known.links.get(&*far.router).map(|link| link.outbox.clone())
    }

    pub(crate) fn is_far(&self, agent: &AgentName) -> bool {
        self.known().far.of(agent).is_some()
    }

    /// Milliseconds since an agent of another router was heard there.
    pub(crate) fn unheard_ms(&self, agent: &AgentName) -> Option<u64> {
        self.known().far.of(agent).map(|far| far.unheard_ms(self.now_ms()))
    }

    pub(crate) fn far_agents(&self) -> Vec<AgentName> {
        self.known().far.agents().cloned().collect()
    }

    /// A handle has one live incarnation, in the whole fleet.
    ///
    /// # Errors
    /// ESEC: another one answers at another router.
    pub(crate) fn may_connect(&self, agent: &AgentName, incarnation: &str) -> Result<(), WireError> {
        self.known().far.may_connect(agent, incarnation, self.now_ms())
    }

    /// From now on the agent is here, whatever was said of it.
    pub(crate) fn is_here(&self, agent: &AgentName) {
        self.known().far.is_here(agent);
    }

    /// An agent came or went here.
    pub(crate) fn agents_changed(&self) {
        self.0.agents.send_modify(|n| *n += 1);
    }

    /// What that router says of an agent; `here`: the incarnation that is connected to this one.
    fn hears(&self, router: &str, message: &FromAgent, here: Option<&str>) -> Word {
        self.known().far.hears(router, message, here, self.now_ms())
    }

    /// All agents of another router; `here` are those of this one.
    fn update(&self, router: &str, update: &RouteUpdate, here: &[AgentRoute]) -> News {
        self.known().far.update(router, update, here, self.now_ms())
    }
}

/// A connection to another router that has proved itself, and what was read behind its hello.
type Dialled = (OwnedReadHalf, OwnedWriteHalf, BytesMut);

/// Connects to another router, as its link or for a client of `tenant`.
///
/// # Errors
/// It can't be reached in time, or one of the two doesn't believe the other.
async fn connect(shared: &Shared, site: &Site, tenant: Option<TenantId>) -> Result<Dialled, WireError> {
    let key = shared.peers.0.key.clone().ok_or_else(|| WireError::new(Code::Auth, "there is no peers.key"))?;
    let dialling = Dialling::new(key, &shared.peers.0.own, &site.router, tenant);
    let wait = Duration::from_millis(FIRST_FRAME_MS);
    let dialled = tokio::time::timeout(wait, shake(&dialling, &site.atp)).await;
    dialled.unwrap_or_else(|_| Err(WireError::new(Code::Timeout, "no answer in time")))
}

async fn shake(dialling: &Dialling, address: &str) -> Result<Dialled, WireError> {
    let lost = |e: std::io::Error| WireError::new(Code::AgentDown, e.to_string());
    let stream = TcpStream::connect(address).await.map_err(lost)?;
    let _ = stream.set_nodelay(true);
    let (mut reader, mut writer) = stream.into_split();
    let (mut read, mut written) = (BytesMut::new(), BytesMut::new());
    codec::encode(&Frame::json("", 0, Flags::SYN, kind::HELLO, dialling.hello()), &mut written);
    writer.write_all(&written).await.map_err(lost)?;
    let challenge = next(&mut reader, &mut read, kind::PEER_CHALLENGE).await?;
    let proof = dialling.answer(&challenge.read()?)?;
    written.clear();
    codec::encode(&Frame::json("", 0, Flags::NONE, kind::PEER_PROOF, &proof), &mut written);
    writer.write_all(&written).await.map_err(lost)?;
    next(&mut reader, &mut read, kind::HELLO).await?;
    Ok((reader, writer, read))
}

/// The next frame, which must be this one.
async fn next(reader: &mut OwnedReadHalf, read: &mut BytesMut, wanted: &str) -> Result<Frame, WireError> {
    loop {
        if let Some(received) = codec::decode(read)? {
            let frame = received.frame;
            return match &*frame.kind {
                kind if kind == wanted => Ok(frame),
                kind::ERROR => Err(frame.read()?),
                "" => continue,
                other => Err(WireError::proto(format!("{other} came where {wanted} is due"))),
            };
        }
        let n = reader.read_buf(read).await.map_err(|e| WireError::new(Code::AgentDown, e.to_string()))?;
        if n == 0 {
            return Err(WireError::new(Code::AgentDown, "the router closed the connection"));
        }
    }
}

#[cfg(test)]
mod tests;

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

/// An agent that was heard within this long keeps its handle.
const LIVE: Duration = Duration::from_secs(15);

/// Clones share everything.
#[derive(Clone)]
pub(crate) struct Peers(Arc<Inner>);

struct Inner {
    own: String,
    key: Option<PeerKey>,
    known: Mutex<Known>,
    next: AtomicU64,
    /// Rises when an agent comes or goes here.
    agents: watch::Sender<u64>,
}

#[derive(Default)]
struct Known {
    /// By router: the link that was dialled here.
    links: BTreeMap<String, Link>,
    /// The links that others dialled.
    taken: BTreeMap<ConnId, Outbox>,
    far: BTreeMap<AgentName, Far>,
    asked: BTreeMap<u64, oneshot::Sender<Answers>>,
}

struct Link {
    no: u64,
    outbox: Outbox,
}

/// An agent of another router.
struct Far {
    router: String,
    incarnation: String,
    since: Instant,
    heard: Instant,
}

/// What an update of another router's agents means here.
#[derive(Default)]
pub(crate) struct News {
    /// Agents that nobody here knew to be there.
    pub(crate) come: Vec<AgentName>,
    /// Agents that aren't there any more, and their incarnations.
    pub(crate) gone: Vec<(AgentName, String)>,
    /// Agents that must leave this router, because their connection there counts.
    pub(crate) elsewhere: Vec<(AgentName, WireError)>,
}

impl Known {
    fn forget(&mut self, which: impl Fn(&AgentName, &Far) -> bool) -> Vec<(AgentName, String)> {
        let (mut gone, mut stay) = (Vec::new(), BTreeMap::new());
        for (name, far) in std::mem::take(&mut self.far) {
            if which(&name, &far) {
                gone.push((name, far.incarnation));
            } else {
                stay.insert(name, far);
            }
        }
        self.far = stay;
        gone
    }
}

impl Peers {
    /// Without a key there are no others.
    pub(crate) fn new(own: &str, key: Option<PeerKey>) -> Self {
        let (known, next, agents) = (Mutex::default(), AtomicU64::new(1), watch::Sender::new(0));
        Self(Arc::new(Inner { own: own.into(), key, known, next, agents }))
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
        known.forget(|_, far| far.router == router)
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
        let far = known.far.get(agent)?;
        known.links.get(&far.router).map(|link| link.outbox.clone())
    }

    pub(crate) fn is_far(&self, agent: &AgentName) -> bool {
        self.known().far.contains_key(agent)
    }

    /// When an agent of another router was last heard there.
    pub(crate) fn heard(&self, agent: &AgentName) -> Option<Instant> {
        self.known().far.get(agent).map(|far| far.heard)
    }

    pub(crate) fn far_agents(&self) -> Vec<AgentName> {
        self.known().far.keys().cloned().collect()
    }

    /// A handle has one live incarnation, in the whole fleet.
    ///
    /// # Errors
    /// ESEC: another one answers at another router.
    pub(crate) fn may_connect(&self, agent: &AgentName, incarnation: &str) -> Result<(), WireError> {
        match self.known().far.get(agent) {
            Some(far) if far.incarnation != incarnation && far.heard.elapsed() < LIVE => {
                Err(taken_at(agent, &far.router))
            }
            _ => Ok(()),
        }
    }

    /// From now on the agent is here, whatever was said of it.
    pub(crate) fn is_here(&self, agent: &AgentName) {
        self.known().far.remove(agent);
    }

    /// An agent came or went here.
    pub(crate) fn agents_changed(&self) {
        self.0.agents.send_modify(|n| *n += 1);
    }

    /// Another router says that the agent has connected to it.
    fn is_at(&self, agent: &AgentName, router: &str, incarnation: &str) {
        let (router, incarnation, now) = (router.into(), incarnation.into(), Instant::now());
        self.known().far.insert(agent.clone(), Far { router, incarnation, since: now, heard: now });
    }

    /// The process of an agent, where that router is the one that speaks for it.
    fn spoken_for(&self, agent: &AgentName, router: &str) -> Option<String> {
        self.known().far.get(agent).filter(|far| far.router == router).map(|far| far.incarnation.clone())
    }

    /// That router's agent is gone, unless it has come to another one meanwhile.
    fn left(&self, agent: &AgentName, router: &str) -> bool {
        let mut known = self.known();
        let left = known.far.get(agent).is_some_and(|far| far.router == router);
        if left {
            known.far.remove(agent);
        }
        left
    }

    /// All agents of another router; `here` are those of this one.
    fn update(&self, router: &str, update: &RouteUpdate, here: &[AgentRoute]) -> News {
        let mut known = self.known();
        let now = Instant::now();
        let before = |ms: u64| now.checked_sub(Duration::from_millis(ms)).unwrap_or(now);
        let mut news = News::default();
        for route in &update.agents {
            let name = &route.agent_prefix;
            if let Some(own) = here.iter().find(|own| own.agent_prefix == *name) {
                if let Some(error) = yields(own, route, (&self.0.own, router)) {
                    news.elsewhere.push((name.clone(), error));
                } else {
                    continue;
                }
            }
            let (since, heard) = (before(route.connected_ms), before(route.heard_ms));
            match known.far.get_mut(name) {
                Some(far) if far.router == router && far.incarnation == route.incarnation => far.heard = heard,
                // What it says is older than what another one said.
                Some(far) if far.router != router && far.since >= since => {}
                _ => {
                    let (router, incarnation) = (router.into(), route.incarnation.clone());
                    known.far.insert(name.clone(), Far { router, incarnation, since, heard });
                    news.come.push(name.clone());
                }
            }
        }
        let named = |name: &AgentName| update.agents.iter().any(|route| route.agent_prefix == *name);
        news.gone = known.forget(|name, far| far.router == router && !named(name));
        news
    }
}

fn taken_at(agent: &AgentName, router: &str) -> WireError {
    let message = format!(
        "agent {agent} is connected to router {router} with another incarnation that answers; stop that one first"
    );
    WireError::new(Code::Sec, message).scope(format!("agent:{agent}"))
}

/// Of one handle at two routers: why the connection here must end, if it is this one. The same process is where it connected
/// last; of two the first that answers keeps the handle.
fn yields(own: &AgentRoute, other: &AgentRoute, routers: (&str, &str)) -> Option<WireError> {
    let younger = (own.connected_ms, routers.0) < (other.connected_ms, routers.1);
    let live = |route: &AgentRoute| Duration::from_millis(route.heard_ms) < LIVE;
    if own.incarnation == other.incarnation {
        let message = format!("replaced by a newer connection of this agent, to router {}", routers.1);
        return (!younger).then(|| WireError::new(Code::AgentDown, message));
    }
    let keeps = match younger {
        true => !live(other),
        false => live(own),
    };
    (!keeps).then(|| taken_at(&own.agent_prefix, routers.1))
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

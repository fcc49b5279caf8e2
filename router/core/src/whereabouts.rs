//! Which agents other routers speak for, as one router knows it from what they say (ATP-13-3). Of a handle one process counts in the
//! whole fleet: the same one where it connected last, of two the first that answers.

use crate::message::FromAgent;
use atp_proto::content::{AgentRoute, AgentStatus, RouteUpdate};
use atp_proto::{AgentName, Code, WireError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// An agent that was heard within this long keeps its handle, in milliseconds.
const LIVE_MS: u64 = 15_000;

/// The agents of other routers. Times are of the monotonic clock, in milliseconds.
#[derive(Clone, Debug)]
pub struct Whereabouts {
    /// This router.
    own: Arc<str>,
    far: BTreeMap<AgentName, Far>,
}

/// An agent of another router.
#[derive(Clone, Debug)]
pub struct Far {
    pub router: Arc<str>,
    pub incarnation: String,
    /// It may have come, and have been heard, before the clock began.
    since_ms: i64,
    heard_ms: i64,
}

/// What an update of another router's agents means here.
#[derive(Debug, Default)]
pub struct News {
    /// Agents that nobody here knew to be there.
    pub come: Vec<AgentName>,
    /// Agents that aren't there any more, and their incarnations.
    pub gone: Vec<(AgentName, String)>,
    /// Agents that must leave this router, because their connection there counts.
    pub elsewhere: Vec<(AgentName, WireError)>,
}

/// What another router's word of an agent means here.
#[derive(Debug)]
pub enum Word {
    /// It doesn't speak for the agent.
    Void,
    /// It is for the shards.
    Counts,
    /// It is for the shards, and for the agent's own machine here, should it come back.
    Status { agent: AgentName, incarnation: Arc<str>, status: AgentStatus },
}

fn at(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

impl Far {
    /// Milliseconds since it was heard.
    #[must_use]
    pub fn unheard_ms(&self, now_ms: u64) -> u64 {
        u64::try_from(at(now_ms).saturating_sub(self.heard_ms)).unwrap_or(0)
    }
}

impl Whereabouts {
    #[must_use]
    pub fn new(own: &str) -> Self {
        Self { own: own.into(), far: BTreeMap::new() }
    }

    /// The router that speaks for an agent; `None`: it is here, or nowhere.
    #[must_use]
    pub fn of(&self, agent: &AgentName) -> Option<&Far> {
        self.far.get(agent)
    }

    pub fn agents(&self) -> impl Iterator<Item = &AgentName> {
        self.far.keys()
    }

    /// A handle has one live incarnation, in the whole fleet.
    ///
    /// # Errors
    /// ESEC: another one answers at another router.
    pub fn may_connect(&self, agent: &AgentName, incarnation: &str, now_ms: u64) -> Result<(), WireError> {
        match self.far.get(agent) {
            Some(far) if far.incarnation != incarnation && far.unheard_ms(now_ms) < LIVE_MS => {
                Err(taken_at(agent, &far.router))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// From now on the agent is here, whatever was said of it.
    pub fn is_here(&mut self, agent: &AgentName) {
        self.far.remove(agent);
    }

    /// That router isn't linked any more; its agents are unreachable with it.
    pub fn lost(&mut self, router: &str) -> Vec<(AgentName, String)> {
        self.forget(|_, far| *far.router == *router)
    }

    /// Another router says something of an agent; `here`: the incarnation that is connected to this one.
    pub fn hears(&mut self, router: &str, message: &FromAgent, here: Option<&str>, now_ms: u64) -> Word {
        let counts = |counts| if counts { Word::Counts } else { Word::Void };
        let spoken_for = |agent| self.far.get(agent).filter(|far| *far.router == *router);
        match message {
            FromAgent::Up { agent, capabilities, status, .. } => {
                let incarnation = capabilities.incarnation.clone();
                // Another process under the same handle: the first one that answers keeps it.
                if here.is_some_and(|own| *own != incarnation) {
                    return Word::Void;
                }
                let word = match status.clone() {
                    Some(status) => {
                        Word::Status { agent: agent.clone(), incarnation: incarnation.as_str().into(), status }
                    }
                    None => Word::Counts,
                };
                let now = at(now_ms);
                let far = Far { router: router.into(), incarnation, since_ms: now, heard_ms: now };
                self.far.insert(agent.clone(), far);
                word
            }
            FromAgent::Status { agent, status } => spoken_for(agent).map_or(Word::Void, |far| Word::Status {
                agent: agent.clone(),
                incarnation: far.incarnation.as_str().into(),
                status: status.clone(),
            }),
            FromAgent::Flow { agent, .. } => counts(spoken_for(agent).is_some()),
            // Else it has come to another one meanwhile.
            FromAgent::Down { agent, .. } => {
                let left = spoken_for(agent).is_some();
                if left {
                    self.far.remove(agent);
                }
                counts(left)
            }
            FromAgent::Lent { .. } | FromAgent::Sent { .. } | FromAgent::Unsent { .. } | FromAgent::Frame { .. } => {
                Word::Counts
            }
        }
    }

    /// All agents of another router; `here` are those of this one.
    pub fn update(&mut self, router: &str, update: &RouteUpdate, here: &[AgentRoute], now_ms: u64) -> News {
        let mut news = News::default();
        for route in &update.agents {
            let name = &route.agent_prefix;
            if let Some(own) = here.iter().find(|own| own.agent_prefix == *name) {
                match yields(own, route, (&self.own, router)) {
                    Some(error) => news.elsewhere.push((name.clone(), error)),
                    None => continue,
                }
            }
            let before = |ms: u64| at(now_ms).saturating_sub(at(ms));
            let (since_ms, heard_ms) = (before(route.connected_ms), before(route.heard_ms));
            match self.far.get_mut(name) {
                Some(far) if *far.router == *router && far.incarnation == route.incarnation => far.heard_ms = heard_ms,
                // What it says is older than what another one said.
                Some(far) if *far.router != *router && far.since_ms >= since_ms => {}
                Some(_) | None => {
                    let (router, incarnation) = (router.into(), route.incarnation.clone());
                    self.far.insert(name.clone(), Far { router, incarnation, since_ms, heard_ms });
                    news.come.push(name.clone());
                }
            }
        }
        let named = |name: &AgentName| update.agents.iter().any(|route| route.agent_prefix == *name);
        news.gone = self.forget(|name, far| *far.router == *router && !named(name));
        news
    }

    fn forget(&mut self, which: impl Fn(&AgentName, &Far) -> bool) -> Vec<(AgentName, String)> {
        let gone: Vec<AgentName> =
            self.far.iter().filter(|(name, far)| which(name, far)).map(|(name, _)| name.clone()).collect();
        gone.into_iter().filter_map(|name| self.far.remove(&name).map(|far| (name, far.incarnation))).collect()
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
    let live = |route: &AgentRoute| route.heard_ms < LIVE_MS;
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

//! The link between two routers. Who dialled speaks for its shards: to agents, to other shards, and asks; who answered speaks for
//! its agents. Each router dials every other one, so all shards reach all agents.

use super::ask::{self, Ask};
use super::connect;
use super::say::{self, Assembly, Heard, Said};
use crate::agent_task::AgentMessage;
use crate::call_routes::Via;
use crate::connection::{Connection, Ended, Shared};
use crate::inbox::{self, ToShard};
use crate::metric;
use crate::outbox::{Outbox, outbox};
use crate::shards::Site;
use atp_core::message::FromAgent;
use atp_core::whereabouts::{News, Word};
use atp_proto::content::RouteUpdate;
use atp_proto::{AgentName, ConnId, WireError};
use bytes::BytesMut;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncRead;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::sync::{CancellationToken, DropGuard};

/// Between two attempts to dial a router.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(2);
/// Agents are announced when they change, and this often.
const ANNOUNCE: Duration = Duration::from_secs(5);

/// Keeps a link to each router that is alive, until this one stops.
pub(crate) async fn keep(shared: Arc<Shared>) {
    let mut sites = shared.sites.clone();
    let stopping = shared.stopping.clone();
    let mut links: BTreeMap<String, DropGuard> = BTreeMap::new();
    loop {
        let alive = sites.borrow_and_update().clone();
        links.retain(|text, _| alive.iter().any(|site| site.text() == *text));
        for site in alive.iter() {
            links.entry(site.text()).or_insert_with(|| {
                let stop = stopping.child_token();
                shared.tasks.spawn(dial(shared.clone(), site.clone(), stop.clone()));
                stop.drop_guard()
            });
        }
        tokio::select! {
            changed = sites.changed() => if changed.is_err() { return stopping.cancelled().await },
            () = stopping.cancelled() => return,
        }
    }
}

pub(super) async fn dial(shared: Arc<Shared>, site: Arc<Site>, stop: CancellationToken) {
    let mut pause = PAUSE_FIRST;
    let mut said = false;
    loop {
        let dialled = tokio::select! {
            dialled = connect(&shared, &site, None) => dialled,
            () = stop.cancelled() => return,
        };
        match dialled {
            Ok((reader, writer, read)) => {
                (pause, said) = (PAUSE_FIRST, false);
                tracing::info!(router = site.router, "linked");
                let ended = linked(&shared, &site, &stop, (reader, read), writer).await;
                tracing::info!(router = site.router, ?ended, "link lost");
            }
            Err(error) if !said => {
                said = true;
                tracing::warn!(router = site.router, address = site.atp, %error, "cannot link to this router; trying on");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => return,
        }
        pause = PAUSE_LAST.min(2 * pause);
    }
}

async fn linked(
    shared: &Arc<Shared>,
    site: &Site,
    stop: &CancellationToken,
    read: (OwnedReadHalf, BytesMut),
    writer: OwnedWriteHalf,
) -> Ended {
    let closed = stop.child_token();
    let (outbox, write) = outbox(closed.clone());
    let writing = shared.tasks.spawn(write.run(writer, shared.heartbeat));
    let mut connection = Connection::new(shared.clone(), ConnId(0), read, outbox.clone(), closed);
    let no = shared.peers.up(&site.router, outbox.clone());
    metric::peers(shared.peers.linked());
    let ended = hear(&mut connection, &Other::Answered(site.router.clone())).await;
    let gone = shared.peers.down(&site.router, no);
    metric::peers(shared.peers.linked());
    withdraw(shared, gone).await;
    outbox.close(None);
    drop((connection, outbox));
    let _ = writing.await;
    ended
}

/// Serves a link that another router has dialled.
pub(crate) async fn serve<R: AsyncRead + Unpin>(connection: &mut Connection<R>, router: &str) -> Ended {
    let (shared, outbox, conn) = (connection.shared().clone(), connection.outbox().clone(), connection.conn());
    tracing::debug!(router, "another router has linked");
    shared.peers.taken(conn, outbox.clone());
    let over = CancellationToken::new();
    let ends = over.clone().drop_guard();
    shared.tasks.spawn(announce(shared.clone(), outbox.clone(), over));
    let ended = hear(connection, &Other::Dialled(outbox)).await;
    drop(ends);
    shared.peers.released(conn);
    ended
}

/// The router at the other end: one that dialled speaks for its shards, one that answered for its agents.
enum Other {
    Dialled(Outbox),
    Answered(String),
}

async fn hear<R: AsyncRead + Unpin>(connection: &mut Connection<R>, other: &Other) -> Ended {
    let shared = connection.shared().clone();
    let mut assembly = Assembly::default();
    loop {
        let frames = match connection.next().await {
            Ok(frames) => frames,
            Err(ended) => return ended,
        };
        for received in frames {
            let taken = match assembly.take(received.frame) {
                Ok(None) => Ok(()),
                Ok(Some(heard)) => match other {
                    Other::Dialled(link) => of_shards(&shared, link, heard).await,
                    Other::Answered(router) => of_agents(&shared, router, heard).await,
                },
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                return error.into();
            }
        }
    }
}

/// Says which agents are here: when that changes, and every few seconds.
async fn announce(shared: Arc<Shared>, link: Outbox, over: CancellationToken) {
    let mut changes = shared.peers.0.agents.subscribe();
    loop {
        changes.mark_unchanged();
        let update = RouteUpdate { router_id: shared.peers.0.own.clone(), agents: shared.agents.here() };
        say::or_close(&link, say::route_update(&update));
        tokio::select! {
            () = over.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(ANNOUNCE) => {}
        }
    }
}

// ---- what shards of other routers say ---------------------------------------------------------------------------------

async fn of_shards(shared: &Arc<Shared>, link: &Outbox, heard: Heard) -> Result<(), WireError> {
    let Heard::Say(said) = heard else {
        metric::dropped("unknown_type");
        return Ok(());
    };
    match *said {
        Said::ToAgent(said) => {
            let name = AgentName::new(&said.agent);
            let message = said.message()?;
            match shared.agents.known(&name) {
                Some(agent) => {
                    let _ = agent.queue.send(AgentMessage::Shard(vec![message], Via::Link(link.clone()))).await;
                }
                // It has gone meanwhile; the next update says so.
                None => metric::dropped("agent_not_here"),
            }
        }
        Said::Escrow(said) => {
            let escrow = said.escrow.map(|message| ToShard::Escrow { from: said.from, message });
            let taken = shared.shards.at(said.to).zip(escrow).is_some_and(|(inbox, escrow)| inbox.offer(256, escrow));
            if !taken {
                metric::dropped("escrow");
            }
        }
        Said::Ask(said) => {
            let ask: Ask =
                serde_json::from_slice(&said.what).map_err(|e| WireError::proto(format!("peer.say: ask: {e}")))?;
            let (shared, link) = (shared.clone(), link.clone());
            shared.tasks.clone().spawn(async move {
                let answers = ask::here(&shared.shards, &ask).await;
                // One that has no room isn't waited for: whoever asks has a time limit.
                link.send_one(say::answer(said.id, &answers));
            });
        }
        Said::FromAgent(_) | Said::AgentFrames(_) | Said::Answer(_) => metric::dropped("unknown_type"),
    }
    Ok(())
}

// ---- what agents of other routers say ---------------------------------------------------------------------------------

async fn of_agents(shared: &Arc<Shared>, router: &str, heard: Heard) -> Result<(), WireError> {
    match heard {
        Heard::Routes(update) => {
            let news = shared.peers.update(router, &update, &shared.agents.here());
            take_news(shared, news).await;
        }
        Heard::Say(said) => match *said {
            Said::FromAgent(said) => from_agent(shared, router, said.shard, said.message()?).await,
            Said::AgentFrames(said) => {
                let shard = said.shard;
                let (agent, incarnation) = (AgentName::new(&said.agent), said.incarnation.as_str().into());
                let frames = said.frames()?;
                let weight = frames.iter().map(inbox::weight).sum();
                let taken = match shared.shards.at(shard) {
                    Some(inbox) => {
                        inbox.send(weight, ToShard::AgentFrames { agent, incarnation, frames }).await.is_ok()
                    }
                    None => false,
                };
                if !taken {
                    metric::dropped("shard_not_here");
                }
            }
            Said::Answer(said) => {
                let answers = serde_json::from_slice(&said.what)
                    .map_err(|e| WireError::proto(format!("peer.say: answer: {e}")))?;
                shared.peers.answered(said.id, answers);
            }
            Said::ToAgent(_) | Said::Escrow(_) | Said::Ask(_) => metric::dropped("unknown_type"),
        },
        Heard::Unknown => metric::dropped("unknown_type"),
    }
    Ok(())
}

async fn take_news(shared: &Shared, news: News) {
    for (agent, error) in news.elsewhere {
        if let Some(agent) = shared.agents.known(&agent) {
            let _ = agent.queue.send(AgentMessage::Elsewhere(error)).await;
        }
    }
    if !news.come.is_empty() {
        for (_, here) in shared.shards.all_here() {
            let _ = here.inbox.send(64 * news.come.len(), ToShard::Introduce(news.come.clone())).await;
        }
    }
    withdraw(shared, news.gone).await;
}

/// The shards hear that these agents are gone.
async fn withdraw(shared: &Shared, gone: Vec<(AgentName, String)>) {
    if gone.is_empty() {
        return;
    }
    let down = |(agent, incarnation): (AgentName, String)| FromAgent::Down { agent, incarnation: incarnation.into() };
    let down: Vec<FromAgent> = gone.into_iter().map(down).collect();
    for (_, here) in shared.shards.all_here() {
        let _ = here.inbox.send(256 * down.len(), ToShard::Agent(down.clone())).await;
    }
}

async fn from_agent(shared: &Shared, router: &str, shard: Option<u32>, message: FromAgent) {
    let here = match &message {
        FromAgent::Up { agent, .. } => shared.agents.here().into_iter().find(|own| own.agent_prefix == *agent),
        _ => None,
    };
    match shared.peers.hears(router, &message, here.as_ref().map(|own| &*own.incarnation)) {
        Word::Void => return,
        Word::Counts => {}
        // An agent that was here hears its own newest word, should it come back.
        Word::Status { agent, incarnation, status } => {
            if let Some(known) = shared.agents.known(&agent) {
                let _ = known.queue.send(AgentMessage::SaidElsewhere { incarnation, status }).await;
            }
        }
    }
    let to = match shard {
        Some(shard) => shared.shards.here(shard).into_iter().collect(),
        None => shared.shards.all_here().into_iter().map(|(_, here)| here).collect::<Vec<_>>(),
    };
    for here in to {
        let _ = here.inbox.send(256, ToShard::Agent(vec![message.clone()])).await;
    }
}

//! The agent's side of a connection: its capabilities and status go to its task, its calls' frames to their shards.

use super::admissible::{check_capabilities, is_known};
use super::{Connection, Ended, Introduced, Read};
use crate::agent_task::AgentMessage;
use crate::call_routes::Via;
use crate::inbox::{self, ToShard};
use crate::metric;
use crate::peer::say;
use crate::shards::split;
use atp_proto::codec::Received;
use atp_proto::content::{AgentStatus, Capabilities};
use atp_proto::frame::kind;
use atp_proto::{Code, Flags, Frame, WireError};
use std::time::Duration;
use tokio::io::AsyncRead;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A connection's own frames (status, capabilities) per second; more is a fault of the peer.
const OWN_FRAMES_PER_SECOND: u32 = 1000;

impl<R: AsyncRead + Unpin> Connection<R> {
    pub(super) async fn agent(&mut self) -> Ended {
        let mut connected: Option<Introduced> = None;
        let ended = self.agent_frames(&mut connected).await;
        if let Some(Introduced { handle, .. }) = connected {
            let _ = handle.queue.send(AgentMessage::Disconnected { conn: self.conn }).await;
        }
        ended
    }

    async fn agent_frames(&mut self, connected: &mut Option<Introduced>) -> Ended {
        let mut own = Vec::new();
        let mut second = Instant::now();
        let mut own_count = 0;
        loop {
            let mut frames = Vec::new();
            let decoded = self.frames(&mut frames, &mut own);
            if second.elapsed() >= Duration::from_secs(1) {
                (second, own_count) = (Instant::now(), 0);
            }
            for frame in own.drain(..) {
                own_count += 1;
                if own_count > OWN_FRAMES_PER_SECOND {
                    let message = format!("stream \"\": more than {OWN_FRAMES_PER_SECOND} frames in a second");
                    return WireError::new(Code::Limit, message)
                        .used(own_count.into(), OWN_FRAMES_PER_SECOND.into())
                        .into();
                }
                if let Err(ended) = self.own_of_agent(&frame, connected).await {
                    return ended;
                }
            }
            frames.retain(|r| self.is_for_agents(&r.frame));
            if !frames.is_empty() {
                let Some(agent) = connected else {
                    return WireError::proto(
                        "control.capabilities: an agent's first frame after hello, before any call's",
                    )
                    .into();
                };
                self.agent_to_shards(agent, frames).await;
            }
            if let Err(error) = decoded {
                return error.into();
            }
            if let Read::End(ended) = self.read().await {
                return ended;
            }
        }
    }

    /// Hands an agent's frames to the shards of their calls. What nobody here knows, or a shard that isn't here, doesn't get
    /// is asked for again by its shard, which learns from the agent's list what there is.
    async fn agent_to_shards(&self, agent: &Introduced, frames: Vec<Received>) {
        let groups: Vec<(u32, Via, Vec<Received>)> = {
            let routes = agent.handle.routes();
            let groups = split(frames, |r| {
                let shard = routes.shard_of(&r.frame.stream_id);
                if shard.is_none() {
                    metric::dropped("unknown_call");
                }
                shard
            });
            groups.into_iter().map(|(shard, frames)| (shard, routes.via(shard), frames)).collect()
        };
        for (shard, via, frames) in groups {
            let (name, incarnation) = (agent.name.clone(), agent.incarnation.clone());
            let taken = match (via, self.shared.shards.at(shard)) {
                (Via::Link(outbox), _) => {
                    // The agent waits, as it does for a shard that is here.
                    outbox.room().await;
                    outbox.send_one(say::agent_frames(shard, &name, &incarnation, &frames))
                }
                (Via::Here, Some(inbox)) => {
                    let weight = frames.iter().map(inbox::weight).sum();
                    let message = ToShard::AgentFrames { agent: name, incarnation, frames };
                    inbox.send(weight, message).await.is_ok()
                }
                (Via::Here, None) => false,
            };
            if !taken {
                metric::dropped("shard_not_here");
            }
        }
    }

    async fn own_of_agent(&self, frame: &Frame, connected: &mut Option<Introduced>) -> Result<(), Ended> {
        match &*frame.kind {
            "" => {
                if let Some(Introduced { handle, .. }) = connected {
                    let _ = handle.queue.send(AgentMessage::Alive { conn: self.conn }).await;
                }
                Ok(())
            }
            kind::CAPABILITIES => self.capabilities(frame, connected).await,
            kind::STATUS => {
                let status: AgentStatus = frame.read()?;
                let Some(Introduced { handle, .. }) = connected else {
                    return Err(WireError::proto("control.status: send control.capabilities first").into());
                };
                let _ = handle.queue.send(AgentMessage::Status { conn: self.conn, status }).await;
                Ok(())
            }
            kind::HELLO => Err(WireError::proto("control.hello: this connection has said hello already").into()),
            kind::ERROR if frame.flags.has(Flags::RST) => Err(Ended::Closed),
            known if is_known(known) => {
                Err(WireError::proto(format!("stream_id: {known} needs a stream; stream \"\" is the connection's own"))
                    .into())
            }
            _ => {
                metric::dropped("unknown_type");
                Ok(())
            }
        }
    }

    async fn capabilities(&self, frame: &Frame, connected: &mut Option<Introduced>) -> Result<(), Ended> {
        let capabilities: Box<Capabilities> = Box::new(frame.read()?);
        check_capabilities(&capabilities)?;
        let handle = match connected {
            Some(known) if known.name != capabilities.agent => {
                let message = format!(
                    "agent: this connection is `{}`; open another one for `{}`",
                    known.name, capabilities.agent
                );
                return Err(WireError::proto(message).into());
            }
            Some(known) if *known.incarnation != capabilities.incarnation => {
                return Err(WireError::proto("incarnation: it is new per start of the process, not per message").into());
            }
            Some(known) => known.handle.clone(),
            None => {
                self.shared.peers.may_connect(&capabilities.agent, &capabilities.incarnation)?;
                self.shared.agents.of(&capabilities.agent)?
            }
        };
        *connected = Some(Introduced {
            name: capabilities.agent.clone(),
            incarnation: capabilities.incarnation.as_str().into(),
            handle: handle.clone(),
        });
        let (up, told) = oneshot::channel();
        let outbox = self.outbox.clone();
        let message = AgentMessage::Connected { conn: self.conn, capabilities, outbox, up };
        if handle.queue.send(message).await.is_err() || told.await.is_err() {
            return Err(WireError::new(Code::Draining, "this router is stopping").into());
        }
        Ok(())
    }

    fn is_for_agents(&self, frame: &Frame) -> bool {
        match &*frame.kind {
            kind::RESULT_PARTIAL
            | kind::RESULT_FINAL
            | kind::TOOL_REQUEST
            | kind::ESTIMATE_RESULT
            | kind::AGENT_LOG
            | kind::ERROR
            | "" => true,
            _ => self.may_be_skipped(frame, "an agent"),
        }
    }
}

//! A client's side of a connection: frames go to the shards of their streams, or to the relay where those are elsewhere.

use super::admissible::is_known;
use super::{Connection, Ended, Read, not_here};
use crate::clients::Bounds;
use crate::inbox::{self, Inbox, ToShard};
use crate::metric;
use crate::peer::relay::{Far, Relay};
use crate::shards::{Place, split};
use atp_proto::codec::Received;
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame, StreamId, TenantId, WireError};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A client's connection and the shards that know of it: those of the streams it has spoken of.
struct Client {
    tenant: TenantId,
    bounds: Arc<Bounds>,
    shards: BTreeMap<u32, Inbox>,
    /// The way to shards of other routers; `None` where another router speaks for the client, or there are no others.
    relay: Option<mpsc::Sender<Far>>,
}

impl<R: AsyncRead + Unpin> Connection<R> {
    /// `direct`: the client itself is at the other end, not a router that speaks for it.
    pub(super) async fn client(&mut self, tenant: TenantId, direct: bool) -> Ended {
        let over = CancellationToken::new();
        let _ends = over.clone().drop_guard();
        let (sender, queue) = Relay::queue();
        let relay = Some(sender).filter(|_| direct && self.shared.peers.has_key());
        let (streams_max, waiting) = (self.shared.streams_max, self.shared.waiting_bytes.clone());
        let bounds = Arc::new(Bounds::new(streams_max, waiting, relay.clone()));
        if relay.is_some() {
            let (shared, outbox) = (self.shared.clone(), self.outbox.clone());
            let relay = Relay::new(shared, self.conn, tenant.clone(), outbox, bounds.clone(), queue);
            self.shared.tasks.spawn(relay.run(over));
        }
        let mut client = Client { tenant, bounds, shards: BTreeMap::new(), relay };
        let ended = self.client_frames(&mut client).await;
        for inbox in client.shards.into_values() {
            let _ = inbox.send(256, ToShard::Gone { conn: self.conn }).await;
        }
        ended
    }

    /// Hands frames to the shard of their streams, which is told first who speaks.
    async fn to_shard(&self, client: &mut Client, shard: u32, frames: Vec<Received>) -> Result<(), WireError> {
        let here = match self.shared.shards.place(shard) {
            Place::Here(here) if !here.inbox.is_closed() => here,
            Place::Here(_) | Place::At(_) | Place::Unknown => return self.elsewhere(client, shard, frames).await,
        };
        if client.shards.get(&shard).is_none_or(|known| !known.is(&here.inbox)) {
            let (tenant, outbox) = (client.tenant.clone(), self.outbox.clone());
            let opened = ToShard::Opened { conn: self.conn, tenant, outbox, bounds: client.bounds.clone() };
            here.inbox.send(256, opened).await.map_err(|_| not_here())?;
            client.shards.insert(shard, here.inbox.clone());
        }
        let weight = frames.iter().map(inbox::weight).sum();
        here.inbox.send(weight, ToShard::Frames { conn: self.conn, frames }).await.map_err(|_| not_here())
    }

    async fn elsewhere(&self, client: &Client, shard: u32, frames: Vec<Received>) -> Result<(), WireError> {
        if let Some(relay) = &client.relay {
            return relay.send(Far::Frames { shard, frames }).await.map_err(|_| not_here());
        }
        if !self.shared.peers.has_key() {
            return Err(not_here());
        }
        // Who sent it here looks where the shard is now.
        for received in frames.iter().filter(|r| !r.frame.flags.has(Flags::RST)) {
            metric::dropped("shard_not_here");
            self.outbox.send_one(Frame::json(&*received.frame.stream_id, 0, Flags::RST, kind::ERROR, &not_here()));
        }
        Ok(())
    }

    async fn client_frames(&mut self, client: &mut Client) -> Ended {
        let mut own = Vec::new();
        loop {
            let mut frames = Vec::new();
            let decoded = self.frames(&mut frames, &mut own);
            frames.retain(|r| self.is_for_clients(&r.frame));
            let shards = &self.shared.shards;
            let shard_of = |r: &Received| Some(shards.of_stream(&client.tenant, &StreamId::new(&r.frame.stream_id)));
            for (shard, frames) in split(frames, shard_of) {
                if let Err(error) = self.to_shard(client, shard, frames).await {
                    return error.into();
                }
            }
            if let Err(error) = decoded {
                return error.into();
            }
            for frame in own.drain(..) {
                match &*frame.kind {
                    "" => {}
                    kind::HELLO => {
                        return WireError::proto("control.hello: this connection has said hello already").into();
                    }
                    kind::CAPABILITIES | kind::STATUS => {
                        let message = format!("{}: only a connection with role `agent` sends this", &*frame.kind);
                        return WireError::proto(message).into();
                    }
                    kind::ERROR if frame.flags.has(Flags::RST) => return Ended::Closed,
                    known if is_known(known) => {
                        return WireError::proto(format!(
                            "stream_id: {known} needs a stream; stream \"\" is the connection's own"
                        ))
                        .into();
                    }
                    _ => metric::dropped("unknown_type"),
                }
            }
            if let Read::End(ended) = self.read().await {
                return ended;
            }
        }
    }

    /// True for what a client may send; what only agents or routers send is answered with RST EPROTO here.
    fn is_for_clients(&self, frame: &Frame) -> bool {
        match &*frame.kind {
            kind::TASK_SUBMIT | kind::TASK_CANCEL | kind::RESUME | kind::TASK_ANSWER | kind::ERROR | "" => true,
            _ => self.may_be_skipped(frame, "a client"),
        }
    }

    /// Of a type that `who` doesn't send: a known one is refused; an unknown one takes its place in the order if it has a
    /// number (true), the shard counts and skips it.
    pub(super) fn may_be_skipped(&self, frame: &Frame, who: &str) -> bool {
        if is_known(&frame.kind) {
            let message = format!("payload.type: {} isn't sent by {who} (this connection's role)", &*frame.kind);
            self.reset(&frame.stream_id, message);
            return false;
        }
        if frame.msg_seq == 0 {
            metric::dropped("unknown_type");
        }
        frame.msg_seq > 0
    }

    fn reset(&self, stream_id: &str, message: String) {
        let error = WireError::proto(message).scope(format!("stream:{stream_id}"));
        self.outbox.send_one(Frame::json(stream_id, 0, Flags::RST, kind::ERROR, &error));
    }
}

//! Frames of streams read from the log for one connection that missed them: one pass for all of its streams, in a thread
//! of its own, as fast as the client takes them. Decides nothing; the shard says from where and up to where.

use crate::clients::Bounds;
use crate::inbox::{Inbox, ToShard};
use crate::log::Source;
use crate::outbox::{Outbox, weight};
use atp_core::record::Entry;
use atp_core::replay::StreamReplay;
use atp_proto::{Code, ConnId, Frame, StreamId, TenantId, WireError};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Frames with `after < msg_seq <= upto` of a stream whose first entry is `from`.
#[derive(Debug)]
pub(crate) struct Replay {
    pub(crate) stream: StreamId,
    pub(crate) from: u64,
    pub(crate) after: u64,
    pub(crate) upto: u64,
}

/// Bytes that travel from the reading thread at once, about.
const BATCH_BYTES: usize = 256 << 10;

/// Sends what the replays ask for, then tells the shard that they are through.
pub(crate) async fn replay(
    conn: ConnId,
    tenant: TenantId,
    replays: Vec<Replay>,
    outbox: Outbox,
    bounds: Arc<Bounds>,
    inbox: Inbox,
    source: Source,
) {
    let turn = bounds.reader.acquire().await;
    let done: Vec<(StreamId, u64)> = replays.iter().map(|r| (r.stream.clone(), r.upto)).collect();
    let (frames, mut read) = mpsc::channel::<Vec<Frame>>(4);
    let of = tenant.clone();
    let reader = tokio::task::spawn_blocking(move || read_streams(&source, &of, &replays, &frames));
    while let Some(frames) = read.recv().await {
        let mut frames = VecDeque::from(frames);
        loop {
            outbox.send(&mut frames);
            if frames.is_empty() {
                break;
            }
            outbox.room().await;
        }
        if outbox.is_closed() {
            break;
        }
    }
    drop(read);
    match reader.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => outbox.close(Some(WireError::new(Code::Log, format!("replay: {error}")))),
        Err(_) => outbox.close(Some(WireError::new(Code::Log, "replay: reading the log ended early"))),
    }
    drop(turn);
    let _ = inbox.send(256, ToShard::Replayed { conn, tenant, done }).await;
}

fn read_streams(
    source: &Source,
    tenant: &TenantId,
    replays: &[Replay],
    to: &mpsc::Sender<Vec<Frame>>,
) -> Result<(), String> {
    let Some(from) = replays.iter().map(|r| r.from).min() else { return Ok(()) };
    let mut open: BTreeMap<&str, Vec<(u64, StreamReplay)>> = BTreeMap::new();
    for r in replays.iter().filter(|r| r.after < r.upto) {
        let replay = StreamReplay::new(tenant, &r.stream, r.after, r.upto);
        open.entry(r.stream.as_str()).or_default().push((r.upto, replay));
    }
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for item in source.entries(from + 1).map_err(|e| e.to_string())? {
        if open.is_empty() {
            break;
        }
        let (position, entry) = item.map_err(|e| e.to_string())?;
        let entry = Entry::decode(entry).map_err(|e| format!("entry {position}: {e}"))?;
        let keys = entry.records.iter().filter_map(|r| r.record.as_ref()?.key());
        let streams: BTreeSet<&str> =
            keys.filter(|key| key.tenant == tenant.as_str()).map(|key| key.stream.as_str()).collect();
        for stream in streams {
            let Some(replays) = open.get_mut(stream) else { continue };
            replays.retain_mut(|(upto, replay)| {
                let frames = replay.feed(position, &entry);
                let more = frames.last().is_none_or(|f| f.msg_seq < *upto);
                bytes += frames.iter().map(weight).sum::<usize>();
                batch.extend(frames);
                more
            });
            if replays.is_empty() {
                open.remove(stream);
            }
        }
        if bytes >= BATCH_BYTES {
            bytes = 0;
            if to.blocking_send(std::mem::take(&mut batch)).is_err() {
                return Ok(());
            }
        }
    }
    if !batch.is_empty() {
        // The connection is gone if this fails.
        let _ = to.blocking_send(batch);
    }
    Ok(())
}

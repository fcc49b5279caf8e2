//! A log in Kafka: of each partition its records up to an offset go. Owners may go on meanwhile.

use super::KafkaSource;
use super::pruned::{self, Note};
use crate::log::prune::{Plan, ShardPlan, Wish, logged_ms, same_state};
use crate::log::{LogError, LogId, Source, checkpoint, offline};
use atp_core::partition::Mark;
use atp_core::record::{Checkpoint, Entry, hex};
use bytes::Bytes;
use prost::Message as _;
use std::collections::VecDeque;

/// The two newest whole checkpoints that were read, the newest first: first position, and the place before.
#[derive(Default)]
struct Checkpoints {
    found: VecDeque<(u64, Mark)>,
    /// Pieces so far, the first one, and where it stands.
    begun: Option<(u32, Checkpoint, (u64, Mark))>,
}

impl Checkpoints {
    fn read(&mut self, position: u64, before: Option<Mark>, entry: &Bytes) {
        let begun = self.begun.take();
        let Some(piece) = checkpoint::piece(entry) else { return };
        let begun = match (begun, before) {
            (Some((n, first, at)), _) if piece.piece == n && checkpoint::belong(&first, &piece) => (n + 1, first, at),
            (_, Some(before)) if piece.piece == 0 && piece.position + 1 == position => (1, piece, (position, before)),
            _ => return,
        };
        if begun.0 == begun.1.pieces {
            self.found.push_front(begun.2);
            self.found.truncate(2);
        } else {
            self.begun = Some(begun);
        }
    }
}

pub(in crate::log) fn plan(source: &KafkaSource, wish: Wish) -> Result<Plan, LogError> {
    Ok(look(source, wish)?.0)
}

/// The plan, and what is to be noted of each shard of which something goes.
fn look(source: &KafkaSource, wish: Wish) -> Result<(Plan, Vec<Note>), LogError> {
    let count = source.shards()?;
    let log = source.address().to_string();
    let mut plan = Plan { log, pruned: false, bytes: 0, entries: 0, segments: 0, shards: Vec::new() };
    let mut notes = Vec::new();
    for shard in 0..count {
        notes.extend(one(&source.shard(shard), wish, &mut plan)?);
    }
    Ok((plan, notes))
}

fn one(source: &KafkaSource, wish: Wish, plan: &mut Plan) -> Result<Option<Note>, LogError> {
    let shard = source.number();
    let whole = Source::Kafka(source.clone());
    let (mut state, beginning) = offline::begin(&whole)?;
    let mut checkpoints = Checkpoints::default();
    let mut entries = source.entries(state.position() + 1, None)?;
    loop {
        // A place is only asked for behind a valid message, or where reading begins.
        let before = entries.mark();
        let Some(item) = entries.next() else { break };
        let (position, bytes) = item?;
        checkpoints.read(position, before, &bytes);
        let wrong = |what| LogError::Entry { shard, position, what };
        let entry = Entry::decode(bytes).map_err(|e| wrong(e.to_string()))?;
        state.apply(position, &entry).map_err(|corrupt| wrong(corrupt.message))?;
    }
    drop(entries);
    let first = beginning.map_or(u64::from(state.position() > 0), |b| b.position);
    let positions = checkpoints.found.iter().map(|(position, _)| *position).collect();
    let mut shard_plan = ShardPlan::new(shard, first, positions, &state);
    let Some((older, older_mark)) = checkpoints.found.get(1).copied() else {
        plan.shards.push(shard_plan);
        return Ok(None);
    };
    let folded = offline::fold_from(&whole, older, state.position())?;
    same_state(shard, older, &state, &folded)?;

    // What may go: how much it is, and where it ends.
    let (mut cut, mut bytes, mut count) = (None, 0, 0);
    if first < shard_plan.safe {
        let mut going = source.entries(first, Some(shard_plan.safe - 1))?;
        while let Some(item) = going.next() {
            let (position, entry) = item?;
            let length = entry.len() as u64;
            if let Some(from) = wish.keep_from_ms
                && logged_ms(shard, position, entry)? >= from
            {
                shard_plan.keep_from(position);
                break;
            }
            (cut, bytes, count) = (going.mark(), bytes + length, count + 1);
        }
    }
    shard_plan.entries = count;
    plan.entries += count;
    plan.bytes += bytes;
    plan.shards.push(shard_plan);
    let Some(before) = cut else { return Ok(None) };
    let genesis = state.genesis();
    Ok(Some(Note {
        shard,
        log_id: hex(&genesis.log_id),
        format: genesis.format,
        shards: genesis.shards,
        hash_seed: genesis.hash_seed,
        before,
        checkpoint: older_mark,
        pruned_ms: wish.now_ms,
    }))
}

/// The notes first, then the records.
pub(in crate::log) fn prune(source: &KafkaSource, wish: Wish) -> Result<Plan, LogError> {
    let (mut plan, notes) = look(source, wish)?;
    let Some(first) = notes.first() else { return Ok(plan) };
    let log_id = u128::from_str_radix(&first.log_id, 16).unwrap_or_default().to_be_bytes();
    pruned::write(source.address(), LogId::from(log_id), &notes)?;
    pruned::remove(source.address(), &notes)?;
    plan.pruned = true;
    Ok(plan)
}

//! A local log: whole segments go, each once no shard needs it.

use super::{Plan, ShardPlan, Wish, logged_ms, same_state};
use crate::log::checkpoint::{self, Found};
use crate::log::disk::Lock;
use crate::log::{Beginning, Disk, LogError, Reader, offline, pruned, recovery};
use std::collections::BTreeSet;
use std::path::Path;

/// Where the log is to begin.
pub(super) struct Cut {
    segment: u64,
    shards: Vec<Option<Beginning>>,
}

pub(super) fn plan(dir: &Path, wish: Wish) -> Result<(Plan, Option<Cut>), LogError> {
    let reader = Reader::open(dir)?;
    let count = reader.shards()?;
    let numbers: Vec<u32> = (0..count).collect();
    let found = checkpoint::newest_of(&reader, &numbers, 2)?;
    let newest: Vec<Option<Found>> = found.iter().map(|found| found.first().copied()).collect();
    let older: Vec<Option<Found>> = found.iter().map(|found| found.last().copied()).collect();
    let states = offline::fold_all(&reader, &newest)?;
    for (shard, ((state, _), (older, _))) in (0..).zip(states.iter().zip(&offline::fold_all(&reader, &older)?)) {
        same_state(shard, found[shard as usize].last().map_or(0, |found| found.position), state, older)?;
    }

    let firsts = firsts(&reader, 0)?.unwrap_or_else(|| vec![1; count as usize]);
    let mut shards = Vec::new();
    for (shard, (state, _)) in (0..).zip(&states) {
        let first = if state.position() == 0 { 0 } else { firsts[shard as usize] };
        let checkpoints = found[shard as usize].iter().map(|found| found.position).collect();
        shards.push(ShardPlan::new(shard, first, checkpoints, state));
    }
    if let Some(from_ms) = wish.keep_from_ms {
        keep_young(&reader, from_ms, &mut shards)?;
    }
    let mut plan =
        Plan { log: format!("local:{}", dir.display()), pruned: false, bytes: 0, entries: 0, segments: 0, shards };
    let cut = cut(&reader, &mut plan, wish.now_ms)?;
    Ok((plan, cut))
}

/// Each shard's first position in the segment of this index; `None` where it doesn't begin with a whole block.
fn firsts(reader: &Reader, index: usize) -> Result<Option<Vec<u64>>, LogError> {
    let head = reader.segment(reader.segments()[index])?.head(0)?;
    Ok(head.map(|(head, _)| head.runs.iter().map(|run| run.first).collect()))
}

/// Reads what might go, up to the first entry of each shard that is young.
fn keep_young(reader: &Reader, from_ms: u64, shards: &mut [ShardPlan]) -> Result<(), LogError> {
    let mut open: BTreeSet<u32> = shards.iter().filter(|s| s.first < s.safe).map(|s| s.shard).collect();
    if open.is_empty() {
        return Ok(());
    }
    for item in reader.all(shards.iter().map(|shard| shard.first).collect())? {
        let (number, position, entry) = item?;
        let shard = &mut shards[number as usize];
        if !open.contains(&number) {
            continue;
        }
        if position >= shard.safe {
            open.remove(&number);
        } else if logged_ms(number, position, entry)? >= from_ms {
            shard.keep_from(position);
            open.remove(&number);
        }
        if open.is_empty() {
            break;
        }
    }
    Ok(())
}

/// The last segment before which no shard needs anything, and what goes with those before it.
fn cut(reader: &Reader, plan: &mut Plan, now_ms: u64) -> Result<Option<Cut>, LogError> {
    for index in (1..reader.segments().len()).rev() {
        let Some(firsts) = firsts(reader, index)? else { continue };
        if firsts.iter().zip(&plan.shards).any(|(first, shard)| *first > shard.safe.max(1)) {
            continue;
        }
        for number in &reader.segments()[..index] {
            plan.bytes += reader.segment(*number)?.bytes()?;
            plan.segments += 1;
        }
        let mut shards = Vec::new();
        for (first, shard) in firsts.iter().zip(&mut plan.shards) {
            shard.entries = if shard.first == 0 { 0 } else { first.saturating_sub(shard.first) };
            plan.entries += shard.entries;
            let begun = shard.checkpoints.last().filter(|_| *first > 1);
            shards.push(begun.map(|at| Beginning { position: *first, checkpoint: *at, pruned_ms: now_ms }));
        }
        return Ok(Some(Cut { segment: reader.segments()[index], shards }));
    }
    Ok(None)
}

/// Under the writer's lock, and as a start begins: what stands is durable before anything is removed. Then the note, then the
/// segments.
pub(super) fn prune(dir: &Path, wish: Wish, disk: &dyn Disk) -> Result<Plan, LogError> {
    // Before the lock's file is made in a directory that holds no log.
    let log_id = Reader::open(dir)?.log_id()?.ok_or_else(|| LogError::NoLog { dir: dir.into() })?;
    let lock_path = dir.join("lock");
    let lock = Lock::take(&lock_path).map_err(LogError::io("lock", &lock_path))?;
    let Some(_lock) = lock else { return Err(LogError::InUse { dir: dir.into() }) };
    let shards = Reader::open(dir)?.shards()?;
    recovery::recover(dir, disk, log_id, shards)?;
    let (mut plan, cut) = plan(dir, wish)?;
    let Some(cut) = cut else { return Ok(plan) };
    let reader = Reader::open(dir)?;
    for number in reader.segments().iter().filter(|number| **number >= cut.segment) {
        let segment = reader.segment(*number)?;
        disk.sync(&segment.file).map_err(LogError::io("sync", &segment.path))?;
    }
    pruned::write(dir, disk, &pruned::note(&log_id, cut.segment, cut.shards))?;
    pruned::find(dir)?.finish(dir, disk)?;
    plan.pruned = true;
    Ok(plan)
}

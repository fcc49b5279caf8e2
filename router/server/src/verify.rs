//! Proof from the log: the fold up to a position against the live state, and offline against what the log itself records
//! (checkpoint hashes, bills of closed streams). Only reads.

use crate::log::offline;
use crate::log::{Beginning, Source};
use atp_core::clock::rfc3339;
use atp_core::record::{CostPb, Entry, Key, Record, hex};
use atp_core::state::{FOLD_VERSION, State};
use atp_core::view::{AccountView, VerifyView};
use atp_proto::content::{Bill, Final};
use atp_proto::{StreamId, TenantId};
use prost::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// The object of `atp verify`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub log: String,
    pub position: u64,
    pub records: u64,
    pub shards: u32,
    pub accounts: u64,
    pub streams: u64,
    pub open_reservations: u64,
    pub differences: Vec<Difference>,
    pub state_hash: String,
    pub ok: bool,
    /// Shards whose fold begins with a checkpoint, what is before having been pruned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pruned: Vec<Pruned>,
}

/// Where a pruned shard's fold begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    pub shard: u32,
    /// Position of the checkpoint's first piece.
    pub checkpoint: u64,
    /// RFC 3339.
    pub pruned_at: String,
}

/// One value that differs: as the log gives it, and as the live state (or the record that was compared) has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    pub account: String,
    pub field: String,
    pub log: Value,
    pub live: Value,
}

/// A shard as it stands, and its log.
pub struct Live {
    pub shard: u32,
    pub source: Source,
    pub view: Box<VerifyView>,
}

/// Folds the log of each shard up to its live state's position and compares account by account.
///
/// # Errors
/// The log can't be read up to there.
pub fn against_live(live: &[Live]) -> Result<Report, String> {
    let Some(first) = live.first() else { return Ok(report(String::new(), Vec::new())) };
    let upto = live.iter().map(|live| (live.shard, Some(live.view.position))).collect();
    let folded = fold(&first.source, begin(&first.source, &upto)?, &upto, |_, _, _, _| {})?;
    let found = live.iter().zip(folded).map(|(live, folded)| compare(&live.view, folded));
    Ok(report(first.source.to_string(), found.collect()))
}

fn compare(live: &VerifyView, folded: Folded) -> Found {
    let Folded { shard, state, records, beginning } = folded;
    let folded = state.verify_view();
    let mut differences = Vec::new();
    let mut differ = |account: &str, field: &str, log: Value, live: Value| {
        if log != live {
            differences.push(Difference { account: account.into(), field: field.into(), log, live });
        }
    };
    differ("", "state_hash", json!(folded.state_hash), json!(live.state_hash));
    differ("", "epoch", json!(folded.epoch), json!(live.epoch));
    differ("", "streams", json!(folded.streams), json!(live.streams));
    differ("", "open_reservations", json!(folded.open_reservations), json!(live.open_reservations));
    let rows = |view: &VerifyView| -> BTreeMap<(String, String), AccountView> {
        view.accounts.iter().map(|a| ((a.account.clone(), a.window_id.clone()), a.clone())).collect()
    };
    let (log_rows, live_rows) = (rows(&folded), rows(live));
    for key in log_rows.keys().chain(live_rows.keys().filter(|k| !log_rows.contains_key(*k))) {
        let fields = |row: Option<&AccountView>| match row {
            None => [Value::Null, Value::Null, Value::Null],
            Some(row) => [json!(row.limit), json!(row.settled), json!(row.held)],
        };
        let pairs = fields(log_rows.get(key)).into_iter().zip(fields(live_rows.get(key)));
        for (field, (log, live)) in ["limit", "settled", "held"].into_iter().zip(pairs) {
            differ(&format!("{}/{}", key.0, key.1), field, log, live);
        }
    }
    Found { shard, shards: state.genesis().shards, view: folded, records, differences, beginning }
}

/// Folds a whole log, all shards of it, and compares with what it records of itself: each checkpoint's hash, each bill's settled
/// amount.
///
/// # Errors
/// The log can't be read, or holds a record that can't be.
pub fn offline_verify(source: &Source) -> Result<Report, String> {
    let shards = source.shards().map_err(|e| e.to_string())?;
    let whole: BTreeMap<u32, Option<u64>> = (0..shards).map(|shard| (shard, None)).collect();
    let begun = begin(source, &whole)?;
    let hashes = checkpoint_hashes(source, &whole)?;
    let mut differences: BTreeMap<u32, Vec<Difference>> = BTreeMap::new();
    let mut settled: BTreeMap<Key, BTreeMap<u32, CostPb>> = BTreeMap::new();
    // What was settled before a pruned log begins, its checkpoint says.
    for (_, stream) in begun.values().flat_map(|folded| folded.state.streams()) {
        let calls = stream.calls.iter().map(|call| (call.reserve.lane, call.actual));
        settled.insert(stream.accept.key.clone(), calls.collect());
    }
    let folded = fold(source, begun, &whole, |shard, position, entry, state| {
        let differences = differences.entry(shard).or_default();
        if let Some(recorded) = hashes.get(&(shard, position)) {
            let log = state.hash();
            let live = format!("{FOLD_VERSION}:{recorded}");
            if !log.ends_with(recorded.as_str()) {
                differences.push(Difference {
                    account: String::new(),
                    field: format!("state_hash at {position}"),
                    log: json!(log),
                    live: json!(live),
                });
            }
        }
        for record in entry.records.iter().filter_map(|r| r.record.as_ref()) {
            match record {
                Record::Settle(r) => {
                    settled.entry(r.key.clone()).or_default().insert(r.lane, r.actual);
                }
                Record::Adjust(r) => {
                    settled.entry(r.key.clone()).or_default().insert(r.lane, r.actual);
                }
                Record::Close(r) => {
                    let calls = settled.get(&r.key);
                    let sum =
                        |part: fn(&CostPb) -> u64| calls.into_iter().flat_map(BTreeMap::values).map(part).sum::<u64>();
                    let log =
                        json!({ "tokens": sum(|c| c.in_tokens + c.out_tokens), "usd_micros": sum(|c| c.usd_micros) });
                    let live = serde_json::from_slice::<Bill>(&r.bill).map_or(Value::Null, |bill| json!(bill.settled));
                    if log != live {
                        let field = format!("bill of stream {}", r.key.stream);
                        differences.push(Difference { account: r.key.tenant.clone(), field, log, live });
                    }
                }
                _ => {}
            }
        }
    })?;
    let found = folded.into_iter().map(|Folded { shard, state, records, beginning }| Found {
        shard,
        shards,
        view: state.verify_view(),
        records,
        differences: differences.remove(&shard).unwrap_or_default(),
        beginning,
    });
    Ok(report(source.to_string(), found.collect()))
}

/// What was found in one shard.
struct Found {
    shard: u32,
    shards: u32,
    view: VerifyView,
    records: u64,
    differences: Vec<Difference>,
    beginning: Option<Beginning>,
}

/// All shards in one: the position is the number of entries.
fn report(log: String, found: Vec<Found>) -> Report {
    let accounts: BTreeSet<&str> =
        found.iter().flat_map(|f| &f.view.accounts).map(|account| account.account.as_str()).collect();
    let hashes: Vec<String> = found.iter().map(|f| f.view.state_hash.clone()).collect();
    let mut all = Report {
        log,
        position: found.iter().map(|f| f.view.position).sum(),
        records: found.iter().map(|f| f.records).sum(),
        shards: found.first().map_or(0, |f| f.shards),
        accounts: accounts.len() as u64,
        streams: found.iter().map(|f| f.view.streams).sum(),
        open_reservations: found.iter().map(|f| f.view.open_reservations).sum(),
        differences: Vec::new(),
        state_hash: offline::hash_of_all(&hashes),
        ok: false,
        pruned: Vec::new(),
    };
    let many = found.len() > 1;
    for one in found {
        all.pruned.extend(one.beginning.map(|begun| Pruned {
            shard: one.shard,
            checkpoint: begun.checkpoint,
            pruned_at: rfc3339(begun.pruned_ms),
        }));
        let named = one.differences.into_iter().map(|difference| match many {
            true => Difference { field: format!("shard {}: {}", one.shard, difference.field), ..difference },
            false => difference,
        });
        all.differences.extend(named);
    }
    all.ok = all.differences.is_empty();
    all
}

/// One shard's fold.
struct Folded {
    shard: u32,
    state: State,
    records: u64,
    beginning: Option<Beginning>,
}

/// What the folds of these shards begin with: nothing, so that no checkpoint is believed, but where the log was pruned.
fn begin(source: &Source, upto: &BTreeMap<u32, Option<u64>>) -> Result<BTreeMap<u32, Folded>, String> {
    let one = |shard: &u32| {
        let (state, beginning) = offline::begin(&source.shard(*shard)).map_err(|e| e.to_string())?;
        Ok((*shard, Folded { shard: *shard, state, records: 0, beginning }))
    };
    upto.keys().map(one).collect()
}

/// Folds these shards on: up to their positions, or to their ends.
fn fold(
    source: &Source,
    mut folded: BTreeMap<u32, Folded>,
    upto: &BTreeMap<u32, Option<u64>>,
    mut each: impl FnMut(u32, u64, &Entry, &State),
) -> Result<Vec<Folded>, String> {
    read(source, upto, |shard, position, entry| {
        let Some(Folded { state, records, .. }) = folded.get_mut(&shard) else { return Ok(()) };
        // Before the checkpoint that it begins with.
        if position <= state.position() {
            return Ok(());
        }
        *records += entry.records.len() as u64;
        state.apply(position, &entry).map_err(|e| e.to_string())?;
        each(shard, position, &entry, state);
        Ok(())
    })?;
    for (shard, upto) in upto {
        let ends = folded[shard].state.position();
        if upto.is_some_and(|upto| ends < upto) {
            return Err(format!("shard {shard} of the log ends at {ends}, and more was acknowledged"));
        }
    }
    Ok(folded.into_values().collect())
}

/// Reads what is there of these shards: a local log once for all of them.
fn read(
    source: &Source,
    upto: &BTreeMap<u32, Option<u64>>,
    mut each: impl FnMut(u32, u64, Entry) -> Result<(), String>,
) -> Result<(), String> {
    let mut one = |shard, position, bytes| {
        let wrong = |e: String| format!("entry {position} of shard {shard}: {e}");
        let entry = Entry::decode(bytes).map_err(|e| wrong(e.to_string()))?;
        each(shard, position, entry).map_err(wrong)
    };
    if let (Source::Local { .. }, 2..) = (source, upto.len()) {
        let shards = source.shards().map_err(|e| e.to_string())?;
        for item in source.all(vec![1; shards as usize]).map_err(|e| e.to_string())? {
            let (shard, position, bytes) = item.map_err(|e| e.to_string())?;
            if upto.get(&shard).is_some_and(|upto| upto.is_none_or(|upto| position <= upto)) {
                one(shard, position, bytes)?;
            }
        }
        return Ok(());
    }
    for (shard, upto) in upto {
        let source = source.shard(*shard);
        let entries = match upto {
            Some(upto) => source.entries_between(1, *upto),
            None => source.entries(1),
        };
        for item in entries.map_err(|e| e.to_string())? {
            let (position, bytes) = item.map_err(|e| e.to_string())?;
            one(*shard, position, bytes)?;
        }
    }
    Ok(())
}

/// By shard and position of the fold: the hash that a checkpoint recorded of it.
fn checkpoint_hashes(
    source: &Source,
    upto: &BTreeMap<u32, Option<u64>>,
) -> Result<BTreeMap<(u32, u64), String>, String> {
    let mut hashes = BTreeMap::new();
    read(source, upto, |shard, _, entry| {
        for record in entry.records {
            if let Some(Record::Checkpoint(r)) = record.record {
                // A fold of another version hashes otherwise.
                if r.piece == 0 && r.fold_version == FOLD_VERSION {
                    hashes.insert((shard, r.position), hex(&r.hash));
                }
            }
        }
        Ok(())
    })?;
    Ok(hashes)
}

/// The final of a closed stream, read behind the position where the stream begins.
pub(crate) fn read_final(
    source: &Source,
    tenant: &TenantId,
    stream: &StreamId,
    from: u64,
) -> Result<Option<Final>, String> {
    let key = Key::new(tenant, stream);
    for item in source.entries(from).map_err(|e| e.to_string())? {
        let (position, bytes) = item.map_err(|e| e.to_string())?;
        let entry = Entry::decode(bytes).map_err(|e| format!("entry {position}: {e}"))?;
        for record in entry.records {
            match record.record {
                Some(Record::Close(close)) if close.key == key => {
                    return serde_json::from_slice(&close.result)
                        .map(Some)
                        .map_err(|e| format!("entry {position}: result: {e}"));
                }
                Some(Record::Deny(deny)) if deny.key == key => return Ok(None),
                _ => {}
            }
        }
    }
    Ok(None)
}

//! `atp replay`: a log's records as lines, or the state that they add up to. Reads without a lock, writes nothing.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::rows;
use crate::screen::{Screen, escape};
use atp_core::clock::rfc3339;
use atp_core::placement::Placement;
use atp_core::record::{Entry, FrameRecord, Record};
use atp_core::state::State;
use atp_proto::codec::{Received, decode_body};
use atp_proto::json::View;
use atp_router::accounts_of;
use atp_router::log::offline::{self, hash_of_all};
use atp_router::log::{Beginning, LogError, Source};
use bytes::Bytes;
use prost::Message;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::ops::Range;

/// The entries `from..=until` of a shard with their positions.
fn entries(
    source: &Source,
    from: u64,
    until: Option<u64>,
) -> Result<impl Iterator<Item = Result<(u64, Entry), Failure>>, Failure> {
    let entries = source.entries(from).map_err(cannot_read)?;
    let entries = entries.take_while(move |item| match (item, until) {
        (Ok((position, _)), Some(until)) => *position <= until,
        _ => true,
    });
    Ok(entries.map(|item| {
        let (position, bytes) = item.map_err(damaged)?;
        Ok((position, decoded(position, bytes)?))
    }))
}

fn cannot_read(error: LogError) -> Failure {
    match error {
        LogError::NotThisLog { .. } => damaged(error),
        _ => Failure::usage(format!("--log: {error}")),
    }
}

fn damaged(error: LogError) -> Failure {
    Failure::new(Exit::Difference, format!("--log: {error}"))
}

fn decoded(position: u64, bytes: Bytes) -> Result<Entry, Failure> {
    let unreadable = |e| format!("--log: the entry at position {position} can't be read: {e}");
    Entry::decode(bytes).map_err(|e| Failure::new(Exit::Difference, unreadable(e)))
}

pub(crate) fn run(screen: Screen, args: &cli::Replay) -> Outcome {
    if let Some(until) = args.until.filter(|until| *until < args.from) {
        let what = format!("--until: {until} lies before --from {}; positions count from 1", args.from);
        return Err(Failure::usage(what));
    }
    let count = args.log.shards().map_err(cannot_read)?;
    let shards = match args.shard {
        Some(shard) if shard >= count => {
            return Err(Failure::usage(format!("--shard: {shard} is none of the log's {count} shards, from 0 on")));
        }
        Some(shard) => shard..shard + 1,
        None => 0..count,
    };
    let ranged = if args.until.is_some() { Some("--until") } else { (args.from > 1).then_some("--from") };
    if let (Some(flag), true) = (ranged, shards.len() > 1) {
        let what = format!("{flag}: the log has {count} shards, each with its own positions; add --shard N");
        return Err(Failure::usage(what));
    }
    if args.state { state(screen, args, shards) } else { records(screen, args, shards) }
}

/// A range that the shard doesn't reach is an error that says how far it goes.
fn reached(last: u64, wanted: u64, flag: &str) -> Outcome {
    if last >= wanted {
        return Ok(());
    }
    Err(Failure::usage(format!("{flag}: {wanted} lies behind the log's last position, {last}")))
}

fn state(screen: Screen, args: &cli::Replay, shards: Range<u32>) -> Outcome {
    let mut states: BTreeMap<u32, State> = BTreeMap::new();
    let mut begun: Vec<(u32, Beginning)> = Vec::new();
    for shard in shards.clone() {
        let (state, beginning) = offline::begin(&args.log.shard(shard)).map_err(cannot_read)?;
        if let (Some(until), Some(beginning)) = (args.until.filter(|until| *until < state.position()), beginning) {
            return Err(Failure::usage(format!("--until: {until} is gone: the log goes {}", beginning.told())));
        }
        begun.extend(beginning.map(|beginning| (shard, beginning)));
        states.insert(shard, state);
    }
    let from = |shard: u32| states.get(&shard).map_or(1, |state| state.position() + 1);
    let froms: Vec<u64> = shards.clone().map(from).collect();
    let mut records = 0u64;
    let mut apply = |shard: u32, position: u64, entry: &Entry| {
        records += entry.records.len() as u64;
        let applied = states.entry(shard).or_default().apply(position, entry);
        applied.map_err(|e| Failure::new(Exit::Difference, format!("shard {shard}: {e}")))
    };
    if shards.len() == 1 {
        for item in entries(&args.log.shard(shards.start), froms[0], args.until)? {
            let (position, entry) = item?;
            apply(shards.start, position, &entry)?;
            if args.until == Some(position) {
                break;
            }
        }
    } else {
        for item in args.log.all(froms).map_err(cannot_read)? {
            let (shard, position, bytes) = item.map_err(damaged)?;
            apply(shard, position, &decoded(position, bytes)?)?;
        }
    }
    let position = states.values().map(State::position).sum();
    reached(position, args.until.unwrap_or(0), "--until")?;
    let hash = hash_of_all(&states.values().map(State::hash).collect::<Vec<_>>());
    let views: Vec<_> = states.iter().map(|(shard, state)| (*shard, state.verify_view())).collect();
    let streams: u64 = views.iter().map(|(_, view)| view.streams).sum();
    let open: u64 = views.iter().map(|(_, view)| view.open_reservations).sum();
    let rows = views.into_iter().flat_map(|(shard, view)| view.accounts.into_iter().map(move |row| (shard, row)));
    let genesis = states.values().map(State::genesis).find(|genesis| genesis.shards > 0);
    let accounts = match genesis {
        Some(genesis) if shards.len() > 1 => accounts_of(rows, &Placement::new(genesis.shards, genesis.hash_seed)),
        _ => rows.map(|(_, row)| row).collect(),
    };
    tell_beginnings(&begun);
    if screen.json {
        return Ok(screen.document(&json!({"position": position, "records": records, "state_hash": hash,
            "streams": streams, "accounts": accounts}))?);
    }
    let of = if shards.len() > 1 { format!("{} shards, ", shards.len()) } else { String::new() };
    screen.line(&format!(
        "{of}position {position}, {records} records, {streams} streams, {open} open reservations\nstate {hash}\n"
    ))?;
    Ok(screen.line(rows::accounts(screen, &accounts).trim_end())?)
}

/// A note on stderr: the log isn't whole any more, and nothing is wrong with that.
fn tell_beginnings(begun: &[(u32, Beginning)]) {
    match begun {
        [] => {}
        [(shard, one)] => eprintln!("atp: --log: shard {shard} {}", one.told()),
        [(shard, one), ..] => eprintln!("atp: --log: {} shards were pruned; shard {shard} {}", begun.len(), one.told()),
    }
}

fn records(screen: Screen, args: &cli::Replay, shards: Range<u32>) -> Outcome {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let many = shards.len() > 1;
    let mut shown_any = false;
    for shard in shards {
        let source = args.log.shard(shard);
        if let Some(begun) = source.beginning().map_err(cannot_read)?.filter(|begun| args.from < begun.position) {
            eprintln!("atp: --log: shard {shard} begins at position {}: pruned by `atp log prune`", begun.position);
        }
        let mut last = args.from - 1;
        for item in entries(&source, args.from, args.until)? {
            let (position, entry) = item?;
            last = position;
            for record in &entry.records {
                let record = record.record.as_ref();
                let stream = record.and_then(Record::key).map(|key| key.stream.as_str());
                if args.stream.is_some() && args.stream.as_deref() != stream {
                    continue;
                }
                shown_any = true;
                let kind = record.map_or("unknown", Record::kind);
                let value = record.map_or(Value::Null, shown);
                let at = rfc3339(entry.at_ms);
                if screen.json {
                    let line = json!({"position": position, "shard": shard, "at": at, "kind": kind, "stream_id": stream, "record": value});
                    serde_json::to_writer(&mut out, &line)?;
                    out.write_all(b"\n")?;
                } else {
                    let stream = stream.unwrap_or("-");
                    let text = value.to_string();
                    let of = if many { format!("{shard:>4} ") } else { String::new() };
                    writeln!(out, "{of}{position:>8} {at} {kind:<10} {} {}", escape(stream), escape(&text))?;
                }
            }
            if args.until == Some(position) {
                break;
            }
        }
        if !many {
            out.flush()?;
            if last < args.from {
                let end = entries(&source, 1, None)?.last().transpose()?.map_or(0, |(position, _)| position);
                reached(end, args.from, "--from")?;
            }
            reached(last, args.until.unwrap_or(0), "--until")?;
        }
    }
    out.flush()?;
    match &args.stream {
        Some(stream) if !shown_any => Err(Failure::new(
            Exit::Task,
            format!("--stream: the log has no record of stream `{stream}` here; without --stream all are shown"),
        )),
        _ => Ok(()),
    }
}

/// A record's fields; a frame with its JSON view and the checksum of the logged body.
fn shown(record: &Record) -> Value {
    let mut value = record.to_json();
    if let Record::Frame(frame) = record {
        value["frames"] = Value::Array(frame_views(frame));
    }
    value
}

fn frame_views(record: &FrameRecord) -> Vec<Value> {
    let view = |body: &bytes::Bytes| match decode_body(body.clone()) {
        Ok(frame) => serde_json::to_value(View::with_checksum(&Received { frame, body: body.clone() })),
        Err(error) => Ok(json!({"error": error, "bytes": body.len()})),
    };
    record.bodies.iter().map(|body| view(body).unwrap_or(Value::Null)).collect()
}

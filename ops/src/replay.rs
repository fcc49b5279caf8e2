//! `atp replay`: a log's records as lines, or the state that they add up to. Reads without a lock, writes nothing.

use crate::cli;
use crate::failure::{Exit, Failure, Outcome};
use crate::rows;
use crate::screen::{Screen, escape};
use atp_core::clock::rfc3339;
use atp_core::record::{Entry, FrameRecord, Record};
use atp_core::state::State;
use atp_proto::codec::{Received, decode_body};
use atp_proto::json::View;
use atp_router::log::{LogError, Source};
use prost::Message;
use serde_json::{Value, json};
use std::io::{BufWriter, Write};

/// The entries `from..=until` of a log with their positions.
pub(crate) fn entries(
    source: &Source,
    from: u64,
    until: Option<u64>,
) -> Result<impl Iterator<Item = Result<(u64, Entry), Failure>>, Failure> {
    let entries = source.entries(from).map_err(|e| match e {
        LogError::NotThisLog { .. } => Failure::new(Exit::Difference, format!("--log: {e}")),
        _ => Failure::usage(format!("--log: {e}")),
    })?;
    let entries = entries.take_while(move |item| match (item, until) {
        (Ok((position, _)), Some(until)) => *position <= until,
        _ => true,
    });
    Ok(entries.map(|item| {
        let (position, bytes) = item.map_err(|e| Failure::new(Exit::Difference, format!("--log: {e}")))?;
        let entry = Entry::decode(bytes).map_err(|e| {
            Failure::new(Exit::Difference, format!("--log: the entry at position {position} can't be read: {e}"))
        })?;
        Ok((position, entry))
    }))
}

pub(crate) fn run(screen: Screen, args: &cli::Replay) -> Outcome {
    if let Some(until) = args.until.filter(|until| *until < args.from) {
        let what = format!("--until: {until} lies before --from {}; positions count from 1", args.from);
        return Err(Failure::usage(what));
    }
    if args.state { state(screen, args) } else { records(screen, args) }
}

/// A range that the log doesn't reach is an error that says how far it goes.
fn reached(last: u64, wanted: u64, flag: &str) -> Outcome {
    if last >= wanted {
        return Ok(());
    }
    Err(Failure::usage(format!("{flag}: {wanted} lies behind the log's last position, {last}")))
}

fn state(screen: Screen, args: &cli::Replay) -> Outcome {
    let (mut state, mut records) = (State::default(), 0u64);
    for item in entries(&args.log, 1, args.until)? {
        let (position, entry) = item?;
        records += entry.records.len() as u64;
        state.apply(position, &entry).map_err(|e| Failure::new(Exit::Difference, e))?;
        if args.until == Some(position) {
            break;
        }
    }
    reached(state.position(), args.until.unwrap_or(0), "--until")?;
    let view = state.verify_view();
    if screen.json {
        return Ok(screen
            .document(&json!({"position": view.position, "records": records, "state_hash": view.state_hash,
            "streams": view.streams, "accounts": view.accounts}))?);
    }
    screen.line(&format!(
        "position {}, {records} records, {} streams, {} open reservations\nstate {}\n",
        view.position, view.streams, view.open_reservations, view.state_hash
    ))?;
    Ok(screen.line(rows::accounts(screen, &view.accounts).trim_end())?)
}

fn records(screen: Screen, args: &cli::Replay) -> Outcome {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let (mut last, mut shown_any) = (args.from - 1, false);
    for item in entries(&args.log, args.from, args.until)? {
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
                // One shard until logs are split.
                let line = json!({"position": position, "shard": 0, "at": at, "kind": kind, "stream_id": stream, "record": value});
                serde_json::to_writer(&mut out, &line)?;
                out.write_all(b"\n")?;
            } else {
                let stream = stream.unwrap_or("-");
                let text = value.to_string();
                writeln!(out, "{position:>8} {at} {kind:<10} {} {}", escape(stream), escape(&text))?;
            }
        }
        if args.until == Some(position) {
            break;
        }
    }
    out.flush()?;
    if last < args.from {
        let end = entries(&args.log, 1, None)?.last().transpose()?.map_or(0, |(position, _)| position);
        reached(end, args.from, "--from")?;
    }
    reached(last, args.until.unwrap_or(0), "--until")?;
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

//! Texts for the reader of a trace, and the hash of a frame for its comparison. Decides nothing.

use atp_core::message::{FromAgent, Input, ToAgent};
use atp_core::record::Entry;
use atp_proto::{Flags, Frame};
use bytes::Bytes;
use prost::Message;
use std::hash::{Hash, Hasher};

#[must_use]
pub fn frame_hash(frame: &Frame) -> u64 {
    let mut hash = crate::simulation::sched::Fnv::default();
    hash.write(frame.stream_id.as_bytes());
    frame.msg_seq.hash(&mut hash);
    hash.write(&frame.content);
    hash.finish()
}

#[must_use]
pub fn show_frame(f: &Frame) -> String {
    let names: Vec<_> = Flags::NAMES.iter().filter(|(_, flag)| f.flags.has(*flag)).map(|(n, _)| *n).collect();
    format!(
        "{} #{}.{} {} {} {}",
        &*f.stream_id,
        f.msg_seq,
        f.frag_seq,
        names.join("|"),
        &*f.kind,
        String::from_utf8_lossy(&f.content)
    )
}

#[must_use]
pub fn show_input(input: &Input) -> String {
    match input {
        Input::Client { conn, received, .. } => format!("client {} {}", conn.0, &*received.frame.kind),
        Input::Agent(message) => show_from_agent(message),
        other => format!("{other:?}"),
    }
}

#[must_use]
pub fn show_to_agent(message: &ToAgent) -> String {
    match message {
        ToAgent::Dispatch { epoch, call, go_on, frame, .. } => {
            format!("Dispatch epoch {epoch} {call} go_on {go_on} {}", show_frame(frame))
        }
        ToAgent::Pass { epoch, incarnation, frame, .. } => {
            format!("Pass to {incarnation} epoch {epoch} {}", show_frame(frame))
        }
        other => format!("{other:?}"),
    }
}

#[must_use]
pub fn show_from_agent(message: &FromAgent) -> String {
    match message {
        FromAgent::Frame { agent, received, .. } => format!("{agent} {}", show_frame(&received.frame)),
        FromAgent::Up { agent, capabilities, status, drained } => {
            let said = status.as_ref().map(|s| s.status);
            format!("Up {agent} {} {said:?} drained {drained} {:?}", capabilities.incarnation, capabilities.calls)
        }
        other => format!("{other:?}"),
    }
}

/// The records of an entry, for a trace.
#[must_use]
pub fn show_entry(bytes: &Bytes) -> String {
    let Ok(entry) = Entry::decode(bytes.clone()) else { return "unreadable".into() };
    let records = entry.records.iter().filter_map(|r| r.record.as_ref());
    let shown: Vec<_> = records
        .map(|r| {
            let key = r.key().map_or("", |k| &k.stream);
            let text = if r.kind() == "checkpoint" { String::new() } else { r.to_json().to_string() };
            format!("{} {key} {text}", r.kind())
        })
        .collect();
    format!("at {} [{}]", entry.at_ms, shown.join(" ; "))
}

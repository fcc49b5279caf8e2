//! The grammar per key, and that what one input decides is one entry.

use super::Verdict;
use super::ledger::{Ledger, Phase, Stream};
use atp_core::record::{Entry, FrameRecord, Record, SourcePb};
use atp_proto::codec;
use atp_proto::frame::kind;

/// True when the record may follow what the ledger holds.
///
/// # Errors
/// What is out of order.
pub fn record(ledger: &Ledger, record: &Record) -> Result<(), String> {
    let err = |text: &str| Err(text.to_string());
    if let Record::Genesis(_) = record {
        return if ledger.position == 1 && ledger.log_id.is_empty() { Ok(()) } else { err("not at the beginning") };
    }
    if let Record::Epoch(r) = record {
        if r.log_id != ledger.log_id {
            return err("another log's id");
        }
        return if ledger.epoch < ledger.position { Ok(()) } else { err("two epochs in one entry") };
    }
    let Some(key) = record.key() else { return Ok(()) };
    let empty = Stream::default();
    let stream = ledger.streams.get(key).unwrap_or(&empty);
    let fresh = !stream.accepted && stream.denied.is_none();
    match record {
        Record::Accept(_) if !fresh => err("the key was judged already"),
        Record::Deny(_) if stream.denied.is_some() || stream.closed.is_some() => err("the key was judged already"),
        Record::Deny(_) if stream.calls.iter().any(|c| c.phase != Phase::Void) => err("a call of it had an effect"),
        Record::Accept(_) | Record::Deny(_) => Ok(()),
        Record::Frame(r) if r.lane == 0 => Ok(()),
        _ if !stream.accepted => err("the key isn't accepted"),
        _ if stream.denied.is_some() => err("the key was denied"),
        Record::Reserve(_) if stream.closed.is_some() => err("the key is closed"),
        Record::Reserve(r) => reserve(stream, r, ledger),
        Record::Close(_) if stream.closed.is_some() => err("the key is closed"),
        Record::Close(_) => Ok(()),
        _ => call(stream, record),
    }
}

fn reserve(stream: &Stream, r: &atp_core::record::Reserve, ledger: &Ledger) -> Result<(), String> {
    for new in &r.calls {
        if new.lane == 0 || stream.calls.iter().any(|c| c.lane >= new.lane) {
            return Err(format!("lane {} was used", new.lane));
        }
        if new.retry_of == 0 {
            // One purchase for all lanes of a fan-out; a step of an escalation begins when they have ended.
            let open = stream.calls.iter().any(|c| matches!(c.phase, Phase::Reserved | Phase::Running));
            let step = new.rule.starts_with("escalation after lane ") && r.calls.len() == 1;
            if step && !open {
                let again = stream.calls.iter().any(|c| c.step && c.agent == new.agent);
                match again {
                    true => return Err(format!("lane {} escalates to {} again", new.lane, new.agent)),
                    false => continue,
                }
            }
            if stream.calls.iter().any(|c| c.phase != Phase::Void || c.intent.is_some()) {
                return Err(format!("lane {} replaces none, but lanes were bought before", new.lane));
            }
        } else {
            let old = stream.call(new.retry_of).ok_or("replaces a lane that isn't there")?;
            let ended = matches!(old.phase, Phase::Settled | Phase::Void);
            let late = ledger.at_ms + 1_000 >= old.reserved_at + old.deadline_ms;
            if !ended && !late {
                return Err(format!("lane {} replaces lane {} while that runs", new.lane, new.retry_of));
            }
            if stream.calls.iter().any(|c| c.retry_of == new.retry_of) {
                return Err(format!("lane {} is replaced twice", new.retry_of));
            }
        }
        if new.deadline_ms == 0 {
            return Err("no deadline".into());
        }
    }
    Ok(())
}

fn call(stream: &Stream, record: &Record) -> Result<(), String> {
    let lane = match record {
        Record::Intent(r) => r.lane,
        Record::Extend(r) => r.lane,
        Record::Settle(r) => r.lane,
        Record::Void(r) => r.lane,
        Record::Adjust(r) => r.lane,
        Record::Frame(r) => r.lane,
        Record::Tool(r) => r.lane,
        _ => return Ok(()),
    };
    let call = stream.call(lane).ok_or_else(|| format!("lane {lane} was never reserved"))?;
    let allowed = match record {
        Record::Intent(r) => match &call.intent {
            None => call.phase == Phase::Reserved,
            Some((_, key)) => call.phase == Phase::Running && call.dedupes && *key == r.upstream_key,
        },
        Record::Extend(_) | Record::Settle(_) | Record::Tool(_) => call.phase == Phase::Running,
        Record::Void(_) => matches!(call.phase, Phase::Reserved | Phase::Running),
        Record::Adjust(r) => call.phase == Phase::Settled && !call.evidence.contains(&r.evidence),
        Record::Frame(r) => call.intent.is_some() && r.msg_seq == call.in_seq + 1,
        _ => true,
    };
    if allowed {
        Ok(())
    } else {
        Err(format!("lane {lane} is {:?}, intent {:?}, message {}", call.phase, call.intent, call.in_seq))
    }
}

/// The kind of payload that a logged message carries; `None` where it isn't readable.
#[must_use]
pub fn payload_kind(frame: &FrameRecord) -> Option<String> {
    codec::decode_body(frame.bodies.first()?.clone()).ok().map(|f| f.kind.to_string())
}

/// What belongs together stands in one entry.
pub fn whole(position: u64, entry: &Entry, verdict: &mut Verdict) {
    let records = || entry.records.iter().filter_map(|r| r.record.as_ref());
    let frame_of = |key: &atp_core::record::Key, lane: u32| {
        records().find_map(|r| match r {
            Record::Frame(f) if f.key == *key && f.lane == lane => Some(f),
            _ => None,
        })
    };
    for record in records() {
        match record {
            Record::Accept(r) => verdict.expect(frame_of(&r.key, 0).is_some(), "one decision is one entry", || {
                format!("Accept at {position} without its frame")
            }),
            Record::Settle(r) if matches!(r.source(), SourcePb::Reported | SourcePb::Counted) => {
                // Messages that waited behind a gap stand in the same entry, in front of the last one.
                let last = records().filter_map(|f| match f {
                    Record::Frame(f) if f.key == r.key && f.lane == r.lane => Some(f),
                    _ => None,
                });
                let ends =
                    last.last().and_then(payload_kind).is_some_and(|k| k == kind::RESULT_FINAL || k == kind::ERROR);
                verdict.expect(ends, "settled only by its own end", || {
                    format!("Settle of lane {} at {position} without the agent's final", r.lane)
                });
            }
            Record::Epoch(_) => {
                let first = records().find(|r| !matches!(r, Record::Genesis(_)));
                verdict.expect(matches!(first, Some(Record::Epoch(_))), "one writer per epoch", || {
                    format!("Epoch at {position} isn't the first of its entry")
                });
            }
            _ => {}
        }
    }
}

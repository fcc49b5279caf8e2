//! What clients see: per stream, frames without a gap, the same content under the same number for ever, nothing behind
//! the bill.

use super::Verdict;
use crate::simulation::sched::Fnv;
use atp_proto::frame::kind;
use atp_proto::{Flags, Frame};
use std::collections::BTreeMap;
use std::hash::Hasher;

#[derive(Debug, Default)]
pub struct Order {
    /// (tenant, stream) -> hash of each numbered message, from 1.
    told: BTreeMap<(String, String), Vec<u64>>,
    /// (connection, stream) -> last number that arrived there.
    at: BTreeMap<(usize, String), u64>,
    ended: BTreeMap<(String, String), u64>,
}

fn digest(frame: &Frame) -> u64 {
    let mut hash = Fnv::default();
    hash.write(frame.kind.as_bytes());
    hash.write(&frame.content);
    hash.finish()
}

impl Order {
    /// The client attached: what follows begins behind `after`.
    pub fn attached(&mut self, conn: usize, stream: &str, after: u64) {
        // Attached a second time, what was on its way still arrives.
        let last = self.at.entry((conn, stream.to_string())).or_insert(after);
        *last = after.max(*last);
    }

    /// A frame reached the client.
    pub fn arrived(&mut self, conn: usize, tenant: &str, frame: &Frame, verdict: &mut Verdict) {
        let n = frame.msg_seq;
        if n == 0 || frame.flags.has(Flags::RST) {
            return;
        }
        let stream = frame.stream_id.to_string();
        let last = self.at.entry((conn, stream.clone())).or_default();
        verdict.expect(n <= *last + 1, "per-stream order kept", || {
            format!("{stream}: message {n} ({}) follows {last} on connection {conn}", &*frame.kind)
        });
        *last = (*last).max(n);
        let key = (tenant.to_string(), stream);
        if let Some(end) = self.ended.get(&key) {
            verdict.expect(n <= *end, "the bill is last", || format!("{key:?}: message {n} behind the bill {end}"));
        }
        if &*frame.kind == kind::BILL {
            self.ended.insert(key.clone(), n);
        }
        // A token or a state may differ in what answers a repeated SYN; its number and kind don't.
        let hash = if &*frame.kind == kind::ACCEPTED { 1 } else { digest(frame) };
        let told = self.told.entry(key).or_default();
        let index = usize::try_from(n - 1).expect("a small number");
        if told.len() <= index {
            told.resize(index + 1, 0);
        }
        if told[index] == 0 {
            told[index] = hash;
        }
        verdict.expect(told[index] == hash, "the same number, the same content", || {
            format!("{} message {n} changed: now {}", &*frame.stream_id, String::from_utf8_lossy(&frame.content))
        });
    }
}

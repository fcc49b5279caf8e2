//! What the tests of `atp log prune` share: a ledger of any number of shards, written entry by entry, with a long past and calls
//! and lent money that are open at its end.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "only tests use it; what fails here fails the test")]

use atp_core::record::{
    Accept, AmountPb, Close, CostPb, Ended, Entry, Epoch, Faster, Genesis, Intent, Key, LimitPb, Record, Reserve,
    ReserveCall, Settle, Share, ShareIn, Shared, Window, WindowRef,
};
use atp_core::state::{FORMAT, State};
use atp_router::log::prune::Wish;
use bytes::Bytes;
use prost::Message;

pub const HOUR: u64 = 3_600_000;
pub const DAY: u64 = 24 * HOUR;
pub const WISH: Wish = Wish { keep_from_ms: None, now_ms: 3 * DAY };

/// Takes an entry: shard, position, bytes, and whether it is a checkpoint's first piece; durable when it returns.
pub type Write<'a> = dyn FnMut(u32, u64, Bytes, bool) + 'a;

/// The shards of a log as their owners have them.
pub struct Book<'a> {
    pub states: Vec<State>,
    now_ms: u64,
    write: &'a mut Write<'a>,
}

impl<'a> Book<'a> {
    /// Begins each shard.
    pub fn new(log_id: [u8; 16], shards: u32, write: &'a mut Write<'a>) -> Self {
        let mut book = Self { states: vec![State::default(); shards as usize], now_ms: 1_000, write };
        let log_id = Bytes::copy_from_slice(&log_id);
        for shard in 0..shards {
            let genesis = Genesis { log_id: log_id.clone(), format: FORMAT, shards, hash_seed: 0 };
            let epoch = Epoch { log_id: log_id.clone(), shard, owner: "r1".into(), incarnation: "i1".into() };
            book.put(shard, vec![Record::Genesis(genesis), Record::Epoch(epoch)]);
        }
        book
    }

    /// Goes on with shards that an owner has begun.
    pub fn go_on(states: Vec<State>, write: &'a mut Write<'a>) -> Self {
        Self { states, now_ms: 1_000, write }
    }

    pub fn put(&mut self, shard: u32, records: Vec<Record>) {
        let begins = matches!(&records[..], [Record::Checkpoint(piece)] if piece.piece == 0);
        let entry = Entry { at_ms: self.now_ms, records: records.into_iter().map(Into::into).collect() };
        let state = &mut self.states[shard as usize];
        let position = state.position() + 1;
        state.apply(position, &entry).unwrap();
        (self.write)(shard, position, entry.encode_to_vec().into(), begins);
    }

    /// Entries about nothing, until this time.
    pub fn fill(&mut self, shard: u32, count: u64, until_ms: u64) {
        self.now_ms = self.now_ms.max(until_ms);
        for n in 0..count {
            let faster = Faster { account: format!("a{}", n % 5), by: "x".repeat(50), ..Faster::default() };
            self.put(shard, vec![Record::Faster(faster)]);
        }
    }

    pub fn checkpoint(&mut self, shard: u32) {
        for piece in self.states[shard as usize].to_checkpoint(shard) {
            self.put(shard, vec![Record::Checkpoint(piece)]);
        }
    }
}

fn key(stream: &str) -> Key {
    Key { tenant: "default".into(), stream: stream.into() }
}

fn accept(stream: &str) -> Record {
    Record::Accept(Accept { key: key(stream), account: "acme".into(), deadline_ms: 60_000, ..Accept::default() })
}

/// Money for one call.
fn reserve(stream: &str, lane: u32, shared: bool) -> Record {
    let hold = AmountPb { tokens: 40, usd_micros: 400 };
    let window = WindowRef { account: "acme".into(), window: "total".into(), shared };
    let call = ReserveCall { lane, agent: "a1".into(), hold, windows: vec![window], ..ReserveCall::default() };
    Record::Reserve(Reserve { key: key(stream), calls: vec![call] })
}

fn intent(stream: &str, lane: u32) -> Record {
    Record::Intent(Intent { key: key(stream), lane, agent: "a1".into(), ..Intent::default() })
}

fn settle(stream: &str, lane: u32) -> Record {
    let actual = CostPb { in_tokens: 10, out_tokens: 5, usd_micros: 150 };
    let ended = Ended { how: "complete".into(), out_seq: 0 };
    Record::Settle(Settle { key: key(stream), lane, actual, ended, ..Settle::default() })
}

/// A Close whose bill says what its calls cost.
fn close(stream: &str, calls: u64) -> Record {
    let bill = format!(
        r#"{{"stream_id":"{stream}","account":"acme","state":"done","limit":{{}},"remaining":{{}},"calls":[],
            "settled":{{"tokens":{},"usd_micros":{}}},"held":{{"tokens":0,"usd_micros":0}}}}"#,
        15 * calls,
        150 * calls
    );
    let (state, result) = ("done".into(), Bytes::from_static(b"{}"));
    Record::Close(Close { key: key(stream), state, result, bill: bill.into(), out_seq: 2, ..Close::default() })
}

/// Two days: money is lent, tasks end; one a shard is open while two checkpoints are written, and settles one of its calls.
pub fn story(book: &mut Book<'_>) {
    let shards = u32::try_from(book.states.len()).unwrap();
    let limit = LimitPb { tokens: None, usd_micros: Some(1_000_000_000) };
    let (account, window, per) = (String::from("acme"), String::from("total"), String::from("total"));
    book.put(0, vec![Record::Window(Window { account, window, limit, ends_ms: None, per })]);
    for shard in 1..shards {
        let amount = AmountPb { tokens: 100_000, usd_micros: 100_000 };
        let (account, window, per) = ("acme".into(), "total".into(), "total".into());
        let of = Shared { account, window, per, ends_ms: None, current: true, amount, calls: None };
        book.put(0, vec![Record::Share(Share { holder: shard, no: 1, of: of.clone() })]);
        book.put(shard, vec![Record::ShareIn(ShareIn { home: 0, no: 1, of })]);
    }
    for shard in 0..shards {
        let (old, shared) = (format!("old-{shard}"), shard > 0);
        book.put(shard, vec![accept(&old), reserve(&old, 1, shared)]);
        book.put(shard, vec![intent(&old, 1)]);
        book.put(shard, vec![settle(&old, 1), close(&old, 1)]);
        book.fill(shard, if shards > 8 { 8 } else { 40 }, 0);
    }
    for shard in 0..shards {
        book.fill(shard, if shards > 8 { 8 } else { 40 }, 2 * DAY);
        let (open, shared) = (format!("open-{shard}"), shard > 0);
        book.put(shard, vec![accept(&open), reserve(&open, 1, shared)]);
        book.put(shard, vec![intent(&open, 1)]);
    }
    for shard in 0..shards {
        book.checkpoint(shard);
    }
    for shard in 0..shards {
        let (open, shared) = (format!("open-{shard}"), shard > 0);
        book.put(shard, vec![settle(&open, 1), reserve(&open, 2, shared)]);
        book.put(shard, vec![intent(&open, 2), reserve(&open, 3, shared)]);
        // Some end, with a call that was settled before what a prune leaves.
        if shard % 3 == 2 {
            book.put(shard, vec![settle(&open, 2), intent(&open, 3)]);
            book.put(shard, vec![settle(&open, 3), close(&open, 3)]);
        }
        book.checkpoint(shard);
        book.fill(shard, 3, 2 * DAY + HOUR);
    }
}

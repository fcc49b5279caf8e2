//! A reader of logs that was made from `docs/log-format.md` alone: its tables say what each field is, its text how blocks are
//! chained and how money moves. It uses no code of the product, so that the page is proven to be enough.

use crate::page;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Number, name and type of each field of each message; of an enumeration its values.
pub(crate) struct Page {
    messages: BTreeMap<String, BTreeMap<u64, (String, String)>>,
}

/// A decoded message: values by field name, in order.
type Message = BTreeMap<String, Vec<Field>>;

#[derive(Clone, Debug)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
    Message(Message),
}

impl Page {
    pub(crate) fn read() -> Self {
        let text = std::fs::read_to_string(page::path()).unwrap();
        let mut messages: BTreeMap<String, BTreeMap<u64, (String, String)>> = BTreeMap::new();
        let mut name = String::new();
        for line in text.lines() {
            if let Some(title) = line.strip_prefix("### ") {
                name = title.rsplit(": ").next().unwrap().into();
            } else if line.starts_with("## ") {
                name.clear();
            } else if let Some(row) = line.strip_prefix("| ").filter(|_| !name.is_empty()) {
                let cells: Vec<&str> = row.split(" | ").collect();
                if let Ok(number) = cells[0].parse() {
                    let (name_of_field, kind) = (cells[1].to_owned(), cells[2].to_owned());
                    messages.entry(name.clone()).or_default().insert(number, (name_of_field, kind));
                }
            }
        }
        Self { messages }
    }

    /// The names of the kinds of records.
    pub(crate) fn kinds(&self) -> Vec<String> {
        self.messages["AnyRecord"].values().map(|(name, _)| name.clone()).collect()
    }

    fn decode(&self, message: &str, mut bytes: &[u8]) -> Message {
        let mut found = Message::new();
        while !bytes.is_empty() {
            let tag = varint(&mut bytes);
            let known = self.messages.get(message).unwrap_or_else(|| panic!("the page has no {message}"));
            let (name, kind) = known.get(&(tag >> 3)).unwrap_or_else(|| panic!("{message} has no field {}", tag >> 3));
            let kind =
                ["repeated ", "optional ", "required "].iter().fold(kind.as_str(), |k, p| k.trim_start_matches(p));
            let value = match tag & 7 {
                0 => Field::Number(varint(&mut bytes)),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    let (value, rest) = bytes.split_at(length);
                    bytes = rest;
                    self.value(kind, value)
                }
                other => panic!("{message}.{name}: wire type {other}"),
            };
            let number = matches!(kind, "uint64" | "uint32" | "bool") || self.is_enumeration(kind);
            assert_eq!(matches!(value, Field::Number(_)), number, "{message}.{name} is {kind}");
            found.entry(name.clone()).or_default().push(value);
        }
        found
    }

    fn is_enumeration(&self, kind: &str) -> bool {
        // Fields are numbered from 1, values from 0.
        self.messages.get(kind).is_some_and(|fields| fields.contains_key(&0))
    }

    fn value(&self, kind: &str, bytes: &[u8]) -> Field {
        match kind {
            "string" => {
                assert!(std::str::from_utf8(bytes).is_ok(), "a string is UTF-8");
                Field::Bytes(bytes.into())
            }
            "bytes" => Field::Bytes(bytes.into()),
            map if map.starts_with("map<") => {
                let (_, of) = map.trim_end_matches('>').split_once(", ").unwrap();
                let mut entry = bytes;
                let mut value = Message::new();
                while !entry.is_empty() {
                    let tag = varint(&mut entry);
                    if tag & 7 == 0 {
                        varint(&mut entry);
                        continue;
                    }
                    let length = varint(&mut entry) as usize;
                    let (part, rest) = entry.split_at(length);
                    entry = rest;
                    if tag >> 3 == 2 {
                        value = self.decode(of, part);
                    }
                }
                Field::Message(value)
            }
            message => Field::Message(self.decode(message, bytes)),
        }
    }
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().expect("a whole number");
        *bytes = rest;
        value |= u64::from(byte & 127) << shift;
        if byte & 128 == 0 {
            return value;
        }
    }
    panic!("a number of more than 64 bits")
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1)))
    })
}

fn int(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

struct Block<'a> {
    header: &'a [u8],
    /// Shard, number of entries, position of the first.
    runs: Vec<(u64, u64, u64)>,
    entries: Vec<&'a [u8]>,
    extent: usize,
}

/// The whole block at an offset; checks nothing of its place in the chain.
fn block(bytes: &[u8], segment: u64, offset: usize) -> Option<Block<'_>> {
    let header = bytes.get(offset..offset + 80)?;
    let body = bytes.get(offset + 80..offset + 80 + int(header, 64, 4) as usize)?;
    let whole = (header.starts_with(b"ATPB\x01") || header.starts_with(b"ATPB\x02"))
        && u64::from(crc32c(&header[..76])) == int(header, 76, 4)
        && u64::from(crc32c(body)) == int(header, 68, 4)
        && (int(header, 24, 8), int(header, 32, 8)) == (segment, offset as u64);
    let (mut entries, mut rest) = (Vec::new(), body);
    let mut runs = vec![(0, int(header, 52, 4), int(header, 56, 8))];
    if whole && header[4] == 2 {
        runs.clear();
        let count = int(header, 72, 4) as usize;
        let (index, behind) = body.split_at(16 * count);
        runs.extend(index.chunks(16).map(|run| (int(run, 0, 4), int(run, 4, 4), int(run, 8, 8))));
        assert!(offset > 0 || runs.iter().map(|run| run.0).eq(0..int(header, 6, 2)), "every shard is due: {runs:?}");
        rest = behind;
        if count > 0 {
            assert_eq!(int(behind, 0, 4), u64::from(crc32c(index)));
            rest = &behind[4..];
        }
    }
    while whole && !rest.is_empty() {
        let length = int(rest, 0, 4) as usize;
        entries.push(&rest[4..4 + length]);
        rest = &rest[4 + length..];
    }
    whole.then(|| Block { header, runs, entries, extent: (80 + body.len()).next_multiple_of(4096) })
}

/// The entries of the log in a directory with their shards, in order.
fn entries(dir: &Path) -> Vec<(u64, Vec<u8>)> {
    let mut segments: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.sort();
    let (mut number, mut checksum, mut log_id, mut all) = (0, 0, Vec::new(), Vec::new());
    let mut due: BTreeMap<u64, u64> = BTreeMap::new();
    for path in segments {
        let segment: u64 = path.file_stem().unwrap().to_string_lossy().parse().unwrap();
        let (bytes, mut offset) = (std::fs::read(&path).unwrap(), 0);
        while let Some(Block { header, runs, entries, extent }) = block(&bytes, segment, offset) {
            offset += extent;
            if offset == extent && number > 0 && int(header, 40, 8) <= number {
                checksum = int(header, 76, 4);
                continue;
            }
            if number == 0 {
                log_id = header[8..24].to_vec();
            }
            assert_eq!((int(header, 40, 8), int(header, 48, 4)), (number + 1, checksum), "block {number} is followed");
            assert_eq!(
                (&header[8..24], int(header, 56, 8)),
                (&log_id[..], all.len() as u64 + 1),
                "block {}",
                number + 1
            );
            assert_eq!(int(header, 52, 4), entries.len() as u64);
            (number, checksum) = (number + 1, int(header, 76, 4));
            let mut entries = entries.into_iter();
            for (shard, count, first) in runs {
                assert_eq!(first, *due.get(&shard).unwrap_or(&1), "shard {shard} goes on");
                due.insert(shard, first + count);
                all.extend(entries.by_ref().take(count as usize).map(|entry| (shard, entry.to_vec())));
            }
            assert_eq!(entries.next(), None, "an entry of no shard");
        }
    }
    all
}

fn number(message: &Message, name: &str) -> u64 {
    match message.get(name).map(|values| &values[0]) {
        None => 0,
        Some(Field::Number(n)) => *n,
        Some(other) => panic!("{name} is {other:?}"),
    }
}

fn text(message: &Message, name: &str) -> String {
    match message.get(name).map(|values| &values[0]) {
        None => String::new(),
        Some(Field::Bytes(bytes)) => String::from_utf8(bytes.clone()).unwrap(),
        Some(other) => panic!("{name} is {other:?}"),
    }
}

fn parts<'a>(message: &'a Message, name: &str) -> impl Iterator<Item = &'a Message> {
    message.get(name).into_iter().flatten().map(|value| match value {
        Field::Message(part) => part,
        other => panic!("not a message: {other:?}"),
    })
}

fn part<'a>(message: &'a Message, name: &str) -> &'a Message {
    parts(message, name).next().unwrap_or_else(|| panic!("no {name} in {message:?}"))
}

/// Tokens and micro-USD.
type Money = (u64, u64);

/// One call's money, and where it stands.
#[derive(Default)]
struct Call {
    windows: Vec<(String, String)>,
    held: Money,
    settled: Money,
}

/// Reads the log, every field of every record by the page, and adds up the accounts by the page's rules.
pub(crate) fn check(page: &Page, dir: &Path, expected: &Value) {
    let mut calls: BTreeMap<(String, String, u64), Call> = BTreeMap::new();
    let mut kinds: BTreeMap<String, u64> = BTreeMap::new();
    let mut images: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut limits: BTreeSet<(String, String)> = BTreeSet::new();
    let entries = entries(dir);
    assert_eq!(entries.len() as u64, expected["state"]["position"], "entries");
    for (shard, entry) in &entries {
        let (entry, image) = (page.decode("Entry", entry), images.entry(*shard).or_default());
        for any in parts(&entry, "records") {
            let (kind, record) = any.iter().next().expect("a kind");
            let Field::Message(record) = &record[0] else { panic!("{kind} is no message") };
            *kinds.entry(kind.clone()).or_default() += 1;
            let key = |lane: u64| {
                let key = part(record, "key");
                (text(key, "tenant"), text(key, "stream"), lane)
            };
            let amount = |name: &str| {
                let part = part(record, name);
                let tokens = ["tokens", "in_tokens", "out_tokens"].iter().map(|n| number(part, n)).sum();
                (tokens, number(part, "usd_micros"))
            };
            let lane = number(record, "lane");
            match kind.as_str() {
                "window" => {
                    limits.insert((text(record, "account"), text(record, "window")));
                }
                "reserve" => {
                    for call in parts(record, "calls") {
                        let hold = part(call, "hold");
                        let held = (number(hold, "tokens"), number(hold, "usd_micros"));
                        let windows = parts(call, "windows").map(|w| (text(w, "account"), text(w, "window"))).collect();
                        calls.insert(key(number(call, "lane")), Call { windows, held, settled: (0, 0) });
                    }
                }
                "extend" => calls.get_mut(&key(lane)).unwrap().held = amount("hold"),
                "tool" if number(record, "verdict") == 0 => {
                    let (call, (tokens, usd)) = (calls.get_mut(&key(lane)).unwrap(), amount("cost"));
                    call.held = (call.held.0 + tokens, call.held.1 + usd);
                }
                "settle" | "adjust" => {
                    let call = calls.get_mut(&key(lane)).unwrap();
                    (call.held, call.settled) = ((0, 0), amount("actual"));
                }
                "void" => calls.get_mut(&key(lane)).unwrap().held = (0, 0),
                "checkpoint" => {
                    if let Some(Field::Bytes(data)) = record.get("data").map(|d| &d[0]) {
                        image.extend_from_slice(data);
                    }
                    if number(record, "piece") + 1 == number(record, "pieces") {
                        let image = page.decode("Image", &std::mem::take(image));
                        assert_eq!(part(&image, "genesis")["log_id"].len(), 1);
                    }
                }
                _ => {}
            }
        }
    }
    assert_eq!(serde_json::json!(kinds), expected["kinds"], "kinds");
    for row in expected["state"]["accounts"].as_array().unwrap() {
        let window = (row["account"].as_str().unwrap().to_owned(), row["window_id"].as_str().unwrap().to_owned());
        assert!(limits.contains(&window), "{window:?} began");
        let sum = |of: fn(&Call) -> Money| {
            let here = calls.values().filter(|call| call.windows.contains(&window)).map(of);
            here.fold((0, 0), |sum, money| (sum.0 + money.0, sum.1 + money.1))
        };
        let due = |name: &str| (row[name]["tokens"].as_u64().unwrap(), row[name]["usd_micros"].as_u64().unwrap());
        assert_eq!(sum(|call| call.settled), due("settled"), "settled in {window:?}");
        assert_eq!(sum(|call| call.held), due("held"), "held in {window:?}");
    }
}

//! The log in Kafka: a partition per shard, a message per entry, owners fenced by what stands in the log itself.
//!
//! A message's value is the entry as the local log holds it, its key the stream that the entry is about (none for entries of
//! no stream); the partition is named, never derived from the key. Its header `atp`, integers little-endian:
//!
//! ```text
//!        +0            +1      +2            +3      +8                +16             +24
//!   0    | version 1   | kind  | checkpoint  | 0     | epoch           | n             | log id, 16 bytes (kinds 1 and 2)
//! ```
//!
//! `kind`: 1 Genesis, the message at offset 0; 2 Epoch, a new owner; 3 entry. An owner's *epoch* here is the offset of its
//! own Epoch, which no two owners share; `n` counts its entries 1, 2, 3 ... Both are 0 for kinds 1 and 2. `checkpoint`: 1 for
//! the first piece of one, else 0. What has no such header isn't ours and counts nothing; a higher version halts the reader.
//!
//! Which messages count says `reading`, when one is durable says `owning`. A **position** is the count of valid messages, so
//! it is the same for every reader; agents are told the position of the owner's Epoch, which rises with each owner too.
//!
//! An owner writes its Epoch before it has read the log, so that nothing can come between; the time in that entry is the wall
//! clock's and counts only where it is later than what stands before it.

mod client;
mod header;
mod marks;
mod memory;
mod owning;
mod reading;
#[cfg(test)]
mod rules_test;
mod sender;
mod source;
mod topic;
mod writer;

pub use source::{KafkaEntries, KafkaSource};

use super::offline::{self, Follower};
use super::queue::Queue;
use super::status::{Events, Status};
use super::{Guarantee, KafkaAddress, Log, LogError, LogId, Source};
use atp_core::record::{Entry, Epoch, Genesis, Record, hex};
use atp_core::state::{FORMAT, State};
use futures_util::future::BoxFuture;
use header::Header;
use memory::{Memory, Reached};
use owning::Owner;
use prost::Message;
use sender::Sender;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::watch;
use writer::Writer;

/// How a Kafka log is opened.
#[derive(Clone, Debug)]
pub struct KafkaOptions {
    pub address: KafkaAddress,
    /// One broker, or one in-sync replica, is enough.
    pub single_broker: bool,
    /// For a log that is made: its number of partitions.
    pub shards: u32,
    /// The partition.
    pub shard: u32,
    /// Where this machine remembers its log.
    pub data_dir: PathBuf,
    /// A checkpoint is due after so many bytes of entries, or four times the last one.
    pub checkpoint_every: u64,
}

/// What [`init`] found and made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub log_id: LogId,
    pub shards: u32,
    pub topic_made: bool,
    /// False: the log was there already.
    pub log_made: bool,
    pub replicated: bool,
}

/// A log that its owner has read: the newest entry of `state` is the owner's Epoch.
pub struct Opened {
    pub log: KafkaLog,
    pub source: Source,
    pub state: State,
    pub guarantee: Guarantee,
    /// What was found, one fact per line.
    pub report: Vec<String>,
}

/// Makes the topic and the log in it, each only where there is none, and checks what is there. `now_ms`: Unix time. Blocks.
///
/// # Errors
/// `NotThisLog`: a topic that isn't this log's, or that could lose entries. `Kafka`: what the brokers refuse.
pub fn init(options: &KafkaOptions, now_ms: u64) -> Result<Made, LogError> {
    let mut memory = Memory::open(&options.data_dir)?;
    let source = KafkaSource::new(options.address.clone(), options.shard);
    let (made, _) = prepare(options, &source, &memory, now_ms)?;
    let reached = memory.reached(options.shard);
    memory.save(&made.log_id, &options.address.topic, options.shard, reached)?;
    Ok(made)
}

/// A log is made only where this machine remembers none: else what it remembers is gone.
fn prepare(
    options: &KafkaOptions,
    source: &KafkaSource,
    memory: &Memory,
    now_ms: u64,
) -> Result<(Made, u64), LogError> {
    let address = &options.address;
    let own = source.messages()?;
    let remembered = memory.log().map(|(id, topic)| (id.to_owned(), topic.to_owned()));
    let gone = |what: &str| {
        let (id, topic) = remembered.as_ref()?;
        let what = format!(
            "{what}, but {} remembers log {id} of topic {topic}, so acknowledged records are gone; restore the topic, \
             or set another data_dir to begin a new log",
            options.data_dir.display()
        );
        Some(address.refused(what))
    };
    let mut topic_made = false;
    let topic = match topic::look(address, &own)? {
        Some(topic) => topic,
        None => {
            gone("there is no such topic").map_or(Ok(()), Err)?;
            topic_made = topic::create(address, &own, options.shards, options.single_broker)?;
            topic::look(address, &own)?.ok_or_else(|| address.refused("it vanished as soon as it was made"))?
        }
    };
    let first = if options.shard == 0 { source.clone() } else { KafkaSource::new(address.clone(), 0) };
    let mut messages = first.messages()?;
    let (genesis, log_made) = match first.genesis(&mut messages)? {
        Some(genesis) => (genesis, false),
        None => {
            gone("it is empty").map_or(Ok(()), Err)?;
            // Settings first: nothing is written to a topic that can't keep it.
            check(address, &topic, options.shards, options.single_broker)?;
            let log_id = uuid::Uuid::new_v4().into_bytes();
            let genesis = Genesis {
                log_id: bytes::Bytes::copy_from_slice(&log_id),
                format: FORMAT,
                shards: options.shards,
                hash_seed: 0,
            };
            begin(address, 0, &genesis, log_id, now_ms)?;
            // Two may begin at once: the first message counts.
            let stands = first.genesis(&mut messages)?.ok_or_else(|| address.refused("its first message is gone"))?;
            let mine = stands.log_id == genesis.log_id;
            (stands, mine)
        }
    };
    let log_id = LogId::try_from(&genesis.log_id[..]).map_err(|_| address.refused("its Genesis has no log id"))?;
    if let Some((id, _)) = &remembered
        && *id != hex(&log_id)
    {
        let what = format!(
            "it holds log {}, but {} remembers log {id}: the topic was made anew or is another one; restore it, set \
             log.kafka.topic right, or set another data_dir to join this log",
            hex(&log_id),
            options.data_dir.display()
        );
        return Err(address.refused(what));
    }
    check(address, &topic, genesis.shards, options.single_broker)?;
    if genesis.shards != options.shards {
        let (has, wants) = (genesis.shards, options.shards);
        return Err(address.refused(format!("the log has {has} shards, shards.count is {wants}; set it to {has}")));
    }
    for shard in 1..genesis.shards {
        let partition = KafkaSource::new(address.clone(), shard);
        let mut messages = partition.messages()?;
        match partition.genesis(&mut messages)? {
            None => begin(address, partition.partition(), &genesis, log_id, now_ms)?,
            Some(other) if other.log_id == genesis.log_id => {}
            Some(_) => return Err(address.refused(format!("partition {shard} belongs to another log"))),
        }
    }
    let end = source.ends(&own)?;
    let reached = memory.reached(options.shard).end;
    if end < reached {
        let what = format!(
            "partition {} ends at offset {end}, but {} remembers {reached}: acknowledged records are gone; restore them",
            options.shard,
            options.data_dir.display()
        );
        return Err(address.refused(what));
    }
    let replicated = topic.is_replicated();
    Ok((Made { log_id, shards: genesis.shards, topic_made, log_made, replicated }, end))
}

fn check(address: &KafkaAddress, topic: &topic::Topic, shards: u32, single: bool) -> Result<(), LogError> {
    let problems = topic.problems(shards as usize, single);
    if problems.is_empty() { Ok(()) } else { Err(address.refused(problems.join("; "))) }
}

fn begin(address: &KafkaAddress, partition: i32, genesis: &Genesis, log_id: LogId, at_ms: u64) -> Result<(), LogError> {
    let entry = Entry { at_ms, records: vec![Record::Genesis(genesis.clone()).into()] };
    let sent = Sender::new(address, partition)?.send_one(&Header::Genesis { log_id }, &entry.encode_to_vec());
    let address = address.to_string();
    sent.map(|_| ()).map_err(|why| LogError::Kafka { doing: "begin a log in", address, why })
}

/// An open log: the exclusive right to append to a partition, for as long as no other owner has begun.
#[derive(Debug)]
pub struct KafkaLog {
    queue: Arc<Queue>,
    status: watch::Receiver<Status>,
    durable_at_open: u64,
    thread: Option<JoinHandle<()>>,
}

impl KafkaLog {
    /// Checks the topic (and makes log and topic where this machine knows of none), takes the shard by an Epoch, and only then
    /// reads: all that stands before it, from the newest whole checkpoint that is remembered. Blocks. `owner` and
    /// `incarnation`: who takes it; `now_ms`: Unix time.
    ///
    /// # Errors
    /// As [`init`]; `Entry` for an entry that can't be folded; `InUse` if another process has the data_dir.
    pub fn open(options: &KafkaOptions, owner: &str, incarnation: &str, now_ms: u64) -> Result<Opened, LogError> {
        Self::open_behind(options, owner, incarnation, now_ms, None)
    }

    /// As `open`; what `follower` has read isn't read again.
    ///
    /// # Errors
    /// As `open`.
    pub fn open_behind(
        options: &KafkaOptions,
        owner: &str,
        incarnation: &str,
        now_ms: u64,
        follower: Option<Follower>,
    ) -> Result<Opened, LogError> {
        let (address, shard) = (&options.address, options.shard);
        let mut memory = Memory::open(&options.data_dir)?;
        let source = KafkaSource::new(address.clone(), shard);
        let (made, end) = prepare(options, &source, &memory, now_ms)?;
        let log_id = made.log_id;
        let reached = Reached { end: end.max(memory.reached(shard).end), ..memory.reached(shard) };
        memory.save(&log_id, &address.topic, shard, reached)?;

        let follower = follower.filter(|f| f.is_of(&log_id));
        let source = match follower.as_ref().map(Follower::source) {
            Some(Source::Kafka(followed)) => followed.clone(),
            _ => source,
        };
        let sender = Sender::new(address, source.partition())?;
        let record = Epoch {
            log_id: bytes::Bytes::copy_from_slice(&log_id),
            shard,
            owner: owner.into(),
            incarnation: incarnation.into(),
        };
        let entry = Entry { at_ms: now_ms, records: vec![Record::Epoch(record).into()] };
        let taken = sender.send_one(&Header::Epoch { log_id }, &entry.encode_to_vec());
        let epoch = taken.map_err(|why| LogError::Kafka { doing: "take", address: address.to_string(), why })?;

        let mut report = Vec::new();
        if made.log_made {
            report.push(format!("log {} begun in {address}", hex(&log_id)));
        }
        let mut reached = reached;
        if let (Some(mark), None) = (reached.checkpoint, &follower)
            && !source.try_checkpoint(log_id, mark)?
        {
            report.push(format!("no checkpoint behind offset {}; reading from the beginning", mark.offset));
            reached.checkpoint = None;
        }
        let upto_epoch = Source::Kafka(source.upto(epoch + 1));
        let followed = follower.as_ref().map(Follower::position);
        let (state, read) = match follower {
            Some(follower) => follower.finish(&upto_epoch)?,
            None => offline::recover_state(&upto_epoch)?,
        };
        if state.epoch() != state.position() {
            return Err(
                address.refused(format!("the own Epoch at offset {epoch} isn't the last valid message before it"))
            );
        }
        report.push(format!(
            "shard {shard} taken at offset {epoch}; {} entries read{}",
            followed.map_or(read.entries, |position| state.position() - position),
            match (followed, read.checkpoint) {
                (Some(position), _) => format!(" behind {position}, up to which it was followed"),
                (None, Some(position)) => format!(" behind the checkpoint at {position}"),
                (None, None) => String::new(),
            }
        ));
        let queue = Arc::new(Queue::new(state.position() + 1));
        let (status_sender, status) = watch::channel(Status { durable: state.position(), ..Status::default() });
        let writer = Writer {
            queue: queue.clone(),
            status: status_sender,
            sender,
            owner: Owner::new(epoch),
            messages: source.messages()?,
            source: source.clone(),
            memory,
            reached,
            saved: Instant::now(),
            log_id,
            shard,
            epoch,
            epoch_position: state.position(),
            checkpoint_every: options.checkpoint_every,
            checkpoint_bytes: read.checkpoint_bytes,
            since_checkpoint: read.bytes,
            checkpoint: None,
        };
        let thread = std::thread::Builder::new().name("atp-log".into()).spawn(move || writer.run());
        let thread = thread.map_err(LogError::io("start a thread for", &options.data_dir))?;
        let log = Self { queue, status, durable_at_open: state.position(), thread: Some(thread) };
        let guarantee = if made.replicated { Guarantee::Replicated } else { Guarantee::Single };
        Ok(Opened { log, source: Source::Kafka(source), state, guarantee, report })
    }

    fn finish(&mut self) -> std::thread::Result<()> {
        self.queue.close();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl Log for KafkaLog {
    fn append(&self, entries: Vec<super::QueuedEntry>) -> BoxFuture<'_, Result<(), LogError>> {
        Box::pin(self.queue.put(entries))
    }

    fn events(&self) -> Events {
        Events::new(self.status.clone(), self.durable_at_open)
    }

    fn close(mut self: Box<Self>) -> Result<(), LogError> {
        if let Err(panic) = self.finish() {
            std::panic::resume_unwind(panic);
        }
        self.queue.stopped().map_or(Ok(()), |why| Err(LogError::Stopped(why)))
    }
}

impl Drop for KafkaLog {
    fn drop(&mut self) {
        // A panic was reported by the thread itself.
        let _ = self.finish();
    }
}

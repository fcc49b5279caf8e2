//! The log in Kafka: a partition per shard, a message per entry, owners fenced by what stands in the log itself. A router may
//! own some of the shards: [`KafkaShards`] is what they share, a [`KafkaLog`] each of them.
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
//! Which messages count, when one is durable and how a shard is taken says `atp_core::partition`. A **position** is the count of valid messages, so
//! it is the same for every reader; agents are told the position of the owner's Epoch, which rises with each owner too.
//!
//! An owner writes its Epoch before it has read the log, so that nothing can come between; the time in that entry is the wall
//! clock's and counts only where it is later than what stands before it.

mod client;
mod marks;
mod memory;
pub(super) mod prune;
mod pruned;
mod sender;
mod source;
mod start;
mod topic;
mod writer;

pub use source::{KafkaEntries, KafkaSource};

use super::offline::{self, Follower};
use super::queue::Queue;
use super::status::{Events, Status};
use super::{Guarantee, KafkaAddress, Log, LogError, LogId, Source};
use atp_core::partition::Claim;
use atp_core::record::{Entry, Epoch, Record, hex};
use atp_core::state::State;
use futures_util::future::BoxFuture;
use memory::Memory;
use prost::Message;
use sender::{Producing, Sender};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::watch;
use writer::Writer;

/// How a Kafka log is opened.
#[derive(Clone, Debug)]
pub struct KafkaOptions {
    pub address: KafkaAddress,
    /// One broker, or one in-sync replica, is enough.
    pub single_broker: bool,
    /// Of a log that is made: its number of partitions.
    pub shards: u32,
    /// One that is there must have that number.
    pub exact: bool,
    /// Where this machine remembers its log.
    pub data_dir: PathBuf,
    /// A checkpoint of a shard is due after so many bytes of its entries, or four times the last one.
    pub checkpoint_every: u64,
}

/// What [`init`] found and made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub log_id: LogId,
    pub shards: u32,
    pub hash_seed: u64,
    pub topic_made: bool,
    /// False: the log was there already.
    pub log_made: bool,
    pub replicated: bool,
}

/// A shard that its owner has read: the newest entry of `state` is the owner's Epoch.
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
/// As [`KafkaShards::open`].
pub fn init(options: &KafkaOptions, now_ms: u64) -> Result<Made, LogError> {
    Ok(KafkaShards::open(options, now_ms)?.made().clone())
}

/// A Kafka log that this router may own shards of: its right to use the data_dir, and one producer for all of them. Both end
/// with the last clone and the last log that was taken.
#[derive(Clone)]
pub struct KafkaShards(Arc<Shared>);

/// What the shards of a router share.
struct Shared {
    options: KafkaOptions,
    made: Made,
    source: KafkaSource,
    memory: Mutex<Memory>,
    /// Another one where this one is dead.
    producing: Mutex<Option<Arc<Producing>>>,
}

impl Shared {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn producing(&self) -> Result<Arc<Producing>, LogError> {
        let mut producing = self.producing.lock().unwrap_or_else(PoisonError::into_inner);
        match &*producing {
            Some(living) if !living.is_dead() => Ok(living.clone()),
            _ => Ok(producing.insert(Arc::new(Producing::new(&self.options.address)?)).clone()),
        }
    }
}

impl fmt::Debug for KafkaShards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shards of {}", self.0.options.address)
    }
}

impl KafkaShards {
    /// Checks the topic, and makes topic and log where there is none and this machine knows of none. Owns no shard yet.
    /// `now_ms`: Unix time. Blocks.
    ///
    /// # Errors
    /// `NotThisLog`: a topic that isn't this log's, or that could lose entries. `Kafka`: what the brokers refuse. `InUse`:
    /// another process has the data_dir.
    pub fn open(options: &KafkaOptions, now_ms: u64) -> Result<Self, LogError> {
        let mut memory = Memory::open(&options.data_dir)?;
        let source = KafkaSource::new(options.address.clone(), 0);
        let made = start::prepare(options, &source, &mut memory, now_ms)?;
        memory.set_log(&made.log_id, &options.address.topic);
        memory.save()?;
        let (memory, producing) = (Mutex::new(memory), Mutex::new(None));
        Ok(Self(Arc::new(Shared { options: options.clone(), made, source, memory, producing })))
    }

    /// What was found or made.
    #[must_use]
    pub fn made(&self) -> &Made {
        &self.0.made
    }

    /// Whether a shard has had an owner when the log was opened.
    #[must_use]
    pub fn was_owned(&self, shard: u32) -> bool {
        // Behind its Genesis.
        self.0.memory().reached(shard).end > 1
    }

    /// The log, to read; what is learned of where positions stand is shared with those who own shards.
    #[must_use]
    pub fn source(&self) -> Source {
        Source::Kafka(self.0.source.clone())
    }

    /// Takes a shard by an Epoch, and only then reads: all that stands before it, from the newest whole checkpoint that is
    /// remembered; what `follower` has read isn't read again. `owner` and `incarnation`: who takes it; `now_ms`: Unix time.
    /// Blocks; several shards may be taken at once.
    ///
    /// # Errors
    /// `NotThisLog`: acknowledged records are gone. `Kafka`. `Entry` for an entry that can't be folded.
    pub fn take(
        &self,
        shard: u32,
        owner: &str,
        incarnation: &str,
        now_ms: u64,
        follower: Option<Follower>,
    ) -> Result<Opened, LogError> {
        let shared = &self.0;
        let (address, made, log_id) = (&shared.options.address, &shared.made, shared.made.log_id);
        if shard >= made.shards {
            return Err(LogError::NoShard { shard, shards: made.shards });
        }
        let follower = follower.filter(|f| f.is_of(&log_id) && f.source().number() == shard);
        let source = match follower.as_ref().map(Follower::source) {
            Some(Source::Kafka(followed)) => followed.clone(),
            _ => shared.source.shard(shard),
        };
        let mut reached = shared.memory().reached(shard);
        let end = start::check_partition(&shared.options, &source, &log_id, reached)?;
        reached.end = end.max(reached.end);
        let claim = Claim::new(log_id, reached.end);

        let sender = Sender::new(shared.producing()?, source.partition());
        let record = Epoch {
            log_id: bytes::Bytes::copy_from_slice(&log_id),
            shard,
            owner: owner.into(),
            incarnation: incarnation.into(),
        };
        let entry = Entry { at_ms: now_ms, records: vec![Record::Epoch(record).into()] };
        let written = sender.send_one(&claim.header(), &entry.encode_to_vec());
        let offset = written.map_err(|why| LogError::Kafka { doing: "take", address: address.to_string(), why })?;
        let claimed = claim.written(offset).map_err(|why| address.refused(why.to_string()))?;
        let epoch = claimed.epoch();

        let mut report = Vec::new();
        // The first message behind its Genesis.
        if made.log_made && epoch == 1 && shard == 0 {
            report.push(format!("log {} begun in {address}", hex(&log_id)));
        }
        if let (Some(mark), None) = (reached.checkpoint, &follower)
            && !source.try_checkpoint(log_id, mark)?
        {
            report.push(format!("no checkpoint behind offset {}; reading from the beginning", mark.offset));
            reached.checkpoint = None;
        }
        let upto_epoch = Source::Kafka(source.upto(claimed.upto()));
        let followed = follower.as_ref().map(Follower::position);
        let (state, read) = match follower {
            Some(follower) => follower.finish(&upto_epoch)?,
            None => offline::recover_state(&upto_epoch)?,
        };
        let owner = claimed.serve(&state).map_err(|why| address.refused(why.to_string()))?;
        report.push(format!(
            "shard {shard} taken at offset {epoch}; {} entries read{}",
            followed.map_or(read.entries, |position| state.position() - position),
            match (followed, read.checkpoint) {
                (Some(position), _) => format!(" behind {position}, up to which it was followed"),
                (None, Some(position)) => format!(" behind the checkpoint at {position}"),
                (None, None) => String::new(),
            }
        ));
        let queue = Arc::new(Queue::new(vec![state.position() + 1]));
        let (status_sender, status) = watch::channel(Status { durable: state.position(), ..Status::default() });
        let writer = Writer {
            queue: queue.clone(),
            status: status_sender,
            sender,
            owner,
            source: source.clone(),
            shared: shared.clone(),
            reached,
            log_id,
            shard,
            epoch,
            epoch_position: state.position(),
            checkpoint_every: shared.options.checkpoint_every,
            checkpoint_bytes: read.checkpoint_bytes,
            since_checkpoint: read.bytes,
            checkpoint: None,
            missed: None,
        };
        let thread = std::thread::Builder::new().name(format!("atp-log-{shard}")).spawn(move || writer.run());
        let thread = thread.map_err(LogError::io("start a thread for", &shared.options.data_dir))?;
        let log = KafkaLog { queue, status, durable_at_open: state.position(), thread: Some(thread) };
        let guarantee = if made.replicated { Guarantee::Replicated } else { Guarantee::Single };
        Ok(Opened { log, source: Source::Kafka(source), state, guarantee, report })
    }
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
    fn finish(&mut self) -> std::thread::Result<()> {
        self.queue.close();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl Log for KafkaLog {
    fn append(&self, entries: Vec<super::QueuedEntry>) -> BoxFuture<'_, Result<(), LogError>> {
        Box::pin(self.queue.put(0, entries))
    }

    fn events(&self) -> Events {
        Events::new(self.status.clone(), self.durable_at_open)
    }

    fn look(&self) -> bool {
        self.queue.look();
        true
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

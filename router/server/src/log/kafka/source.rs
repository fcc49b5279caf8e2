//! A Kafka log to read: valid messages as entries with their positions. Writes nothing and needs no lock.

use super::client::{Messages, PATIENCE, Pool, Pooled};
use super::marks::Marks;
use super::pruned::{self, Note};
use crate::log::{Beginning, KafkaAddress, LogError, LogId, checkpoint};
use atp_core::partition::{Header, Mark, Parsed, Verdict, Walk};
use atp_core::record::{Entry, Genesis, Record};
use bytes::Bytes;
use prost::Message as _;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One partition of a topic. Clones, and the other shards of the same log, share what was learned of where positions stand, and
/// the clients.
#[derive(Clone)]
pub struct KafkaSource {
    address: Arc<KafkaAddress>,
    shard: u32,
    marks: Arc<Mutex<Marks>>,
    /// By shard.
    all_marks: Arc<Mutex<BTreeMap<u32, Arc<Mutex<Marks>>>>>,
    /// Of all shards, as they were read last.
    notes: Arc<Mutex<BTreeMap<u32, Note>>>,
    pool: Pool,
    /// Nothing is read from this offset on; `None`: the end at the time of reading.
    end: Option<u64>,
}

impl fmt::Debug for KafkaSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} shard {}", self.address, self.shard)
    }
}

impl KafkaSource {
    /// The partition of a shard. Connects when it is read.
    #[must_use]
    pub fn new(address: KafkaAddress, shard: u32) -> Self {
        let (address, marks) = (Arc::new(address), Arc::<Mutex<Marks>>::default());
        let all_marks = Arc::new(Mutex::new(BTreeMap::from([(shard, marks.clone())])));
        Self { address, shard, marks, all_marks, notes: Arc::default(), pool: Pool::default(), end: None }
    }

    /// The partition of another shard of the same log.
    #[must_use]
    pub fn shard(&self, shard: u32) -> Self {
        let mut all = self.all_marks.lock().unwrap_or_else(PoisonError::into_inner);
        let marks = all.entry(shard).or_default().clone();
        Self { shard, marks, end: None, ..self.clone() }
    }

    /// Which shard this is.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.shard
    }

    /// How many shards the log has: its Genesis says so.
    ///
    /// # Errors
    /// The brokers can't be reached, or this isn't the beginning of a log.
    pub fn shards(&self) -> Result<u32, LogError> {
        let first = self.shard(0);
        let mut messages = first.messages()?;
        Ok(first.stands(&mut messages)?.shards)
    }

    /// Where the log is.
    #[must_use]
    pub fn address(&self) -> &KafkaAddress {
        &self.address
    }

    /// The same partition as if it ended before this offset.
    pub(super) fn upto(&self, end: u64) -> Self {
        Self { end: Some(end), ..self.clone() }
    }

    pub(super) fn partition(&self) -> i32 {
        i32::try_from(self.shard).unwrap_or(i32::MAX)
    }

    /// A client to read it with.
    pub(super) fn messages(&self) -> Result<Pooled, LogError> {
        self.pool.take(&self.address, self.partition())
    }

    /// Its end, if it begins at the beginning or where it was pruned.
    pub(super) fn ends(&self, messages: &Messages) -> Result<u64, LogError> {
        Ok(self.bounds(messages)?.1)
    }

    /// What a prune has noted of its beginning, if it was pruned; and its end.
    fn bounds(&self, messages: &Messages) -> Result<(Option<Note>, u64), LogError> {
        let (low, high) = messages.ends(PATIENCE)?;
        let note = if low > 0 { Some(self.note(low)?) } else { None };
        Ok((note, high))
    }

    /// What a prune has noted of this partition, which begins at offset `low`.
    ///
    /// # Errors
    /// `NotThisLog` where nobody noted that it is to begin so late.
    pub(super) fn note(&self, low: u64) -> Result<Note, LogError> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let stands = |note: &&Note| note.begins() >= low;
        if let Some(note) = notes.get(&self.shard).filter(stands) {
            return Ok(note.clone());
        }
        *notes = pruned::read(&self.address)?;
        notes.get(&self.shard).filter(stands).cloned().ok_or_else(|| {
            let what = format!(
                "partition {} begins at offset {low}, and `atp log prune` didn't do that: acknowledged records were \
                 deleted; restore them from a copy",
                self.shard
            );
            self.address.refused(what)
        })
    }

    /// Where this shard begins since it was pruned.
    pub(in crate::log) fn beginning(&self) -> Result<Option<Beginning>, LogError> {
        let messages = self.messages()?;
        Ok(self.bounds(&messages)?.0.map(|note| note.beginning()))
    }

    /// The offset behind its last message.
    pub(crate) fn end(&self) -> Result<u64, LogError> {
        self.ends(&*self.messages()?)
    }

    /// True: nothing was ever written to it.
    pub(super) fn is_empty(&self) -> Result<bool, LogError> {
        Ok(self.ends(&*self.messages()?)? == 0)
    }

    /// The message at offset 0, also if it was pruned; `None`: there is no message.
    pub(super) fn genesis(&self, messages: &mut Messages) -> Result<Option<Genesis>, LogError> {
        let (note, end) = self.bounds(messages)?;
        if let Some(note) = note {
            return note.genesis(&self.address).map(Some);
        }
        messages.seek(0, end.min(1))?;
        let Some(first) = messages.next()? else { return Ok(None) };
        let log_id = match first.header {
            Parsed::Ours(Header::Genesis { log_id }) if first.offset == 0 => log_id,
            Parsed::Newer { version } => {
                return Err(self.address.refused(format!("a newer version wrote it (messages of version {version})")));
            }
            _ => return Err(self.address.refused("its first message is no log's beginning; choose another topic")),
        };
        let entry = Entry::decode(first.entry).map_err(|e| self.address.refused(format!("its first message: {e}")))?;
        match entry.records.into_iter().next().and_then(|any| any.record) {
            Some(Record::Genesis(genesis)) if genesis.log_id == log_id[..] => Ok(Some(genesis)),
            _ => Err(self.address.refused("its first message contradicts itself; restore the topic from a copy")),
        }
    }

    /// The Genesis of a log that must be there.
    pub(super) fn stands(&self, messages: &mut Messages) -> Result<Genesis, LogError> {
        self.genesis(messages)?.ok_or_else(|| self.address.refused("it is empty: no log is in it"))
    }

    /// The entries `from..=upto`, or to the end of the log; where the log was pruned, what is left of them. With `upto` it is an error if the log ends before.
    ///
    /// # Errors
    /// The brokers can't be reached, or this isn't the beginning of a log.
    pub fn entries(&self, from: u64, upto: Option<u64>) -> Result<KafkaEntries, LogError> {
        let mut messages = self.messages()?;
        let genesis = self.stands(&mut messages)?;
        let log_id = LogId::try_from(&genesis.log_id[..]).expect("compared with an id just now");
        let (note, end) = self.bounds(&messages)?;
        let end = self.end.map_or(end, |bound| bound.min(end));
        let begins = note.map(|note| note.before);
        let near = self.marks().before(from).into_iter().chain(begins).max_by_key(|mark| mark.position);
        let walk = match near {
            Some(mark) => Walk::behind(log_id, mark),
            None => Walk::from_start(log_id),
        };
        messages.seek(walk.next(), end)?;
        let marks = self.marks.clone();
        let done = upto.is_some_and(|upto| upto < from.max(1));
        let (address, shard) = (self.address.clone(), self.shard);
        Ok(KafkaEntries { address, shard, messages, walk, marks, from, upto, void: 0, done })
    }

    /// The first piece of the newest whole checkpoint that is known here, or to who pruned the log.
    ///
    /// # Errors
    /// The brokers can't be reached.
    pub fn newest_checkpoint(&self) -> Result<Option<u64>, LogError> {
        let note = match self.bounds(&*self.messages()?)? {
            (Some(note), _) => note.checkpoint,
            (None, _) => return Ok(self.marks().checkpoint().map(|mark| mark.position + 1)),
        };
        let mut marks = self.marks();
        if marks.checkpoint().is_none_or(|known| known.position < note.position) {
            marks.set_checkpoint(note);
        }
        Ok(marks.checkpoint().map(|mark| mark.position + 1))
    }

    /// Believes a place that was remembered if it holds what it should: a message of that number, and a whole checkpoint
    /// behind it.
    pub(super) fn try_checkpoint(&self, log_id: LogId, mark: Mark) -> Result<bool, LogError> {
        let mut messages = self.messages()?;
        let (note, end) = self.bounds(&messages)?;
        if note.is_some_and(|note| mark.offset < note.begins()) {
            return Ok(false);
        }
        messages.seek(mark.offset, end.min(mark.offset.saturating_add(1)))?;
        let header = messages.next()?.map(|message| message.header);
        let stands = match header {
            Some(Parsed::Ours(Header::Entry { epoch, n, .. })) => (Some(epoch), n) == (mark.epoch, mark.n),
            Some(Parsed::Ours(Header::Epoch { log_id: id })) => {
                (Some(mark.offset), 0, log_id) == (mark.epoch, mark.n, id)
            }
            _ => false,
        };
        if !stands {
            return Ok(false);
        }
        self.marks().set_checkpoint(mark);
        let first = checkpoint::whole(self.entries(mark.position + 1, None)?)?;
        let whole = first.is_some_and(|(first, _)| first.position == mark.position && first.log_id == log_id[..]);
        if !whole {
            *self.marks() = Marks::default();
        }
        Ok(whole)
    }

    pub(super) fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Entries with their positions, in order. An error is the last item.
pub struct KafkaEntries {
    address: Arc<KafkaAddress>,
    shard: u32,
    messages: Pooled,
    walk: Walk,
    marks: Arc<Mutex<Marks>>,
    from: u64,
    upto: Option<u64>,
    void: u64,
    done: bool,
}

impl KafkaEntries {
    /// The place behind the last entry that it gave; `None`: before the log's first.
    pub(super) fn mark(&self) -> Option<Mark> {
        (self.walk.next() > 0).then(|| self.walk.mark())
    }

    fn advance(&mut self) -> Result<Option<(u64, Bytes)>, LogError> {
        while let Some(message) = self.messages.next()? {
            let verdict = self.walk.take(message.offset, &message.header);
            match verdict.map_err(|halt| self.address.refused(halt.to_string()))? {
                Verdict::Void(_) => self.void += 1,
                Verdict::Valid { position } => {
                    self.marks.lock().unwrap_or_else(PoisonError::into_inner).offer(self.walk.mark());
                    if position >= self.from {
                        self.done = self.upto.is_some_and(|upto| position >= upto);
                        return Ok(Some((position, message.entry)));
                    }
                }
            }
        }
        self.upto.map_or(Ok(None), |position| Err(LogError::Missing { shard: self.shard, position }))
    }
}

impl Iterator for KafkaEntries {
    type Item = Result<(u64, Bytes), LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        if !matches!(item, Some(Ok(_))) {
            self.done = true;
        }
        item
    }
}

impl Drop for KafkaEntries {
    fn drop(&mut self) {
        if self.void > 0 {
            metrics::counter!("atp_log_void_messages_total").increment(self.void);
        }
    }
}

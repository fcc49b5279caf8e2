//! The thread of a shard's owner: hands a batch to the brokers, follows its reports by the owner's rule, says what is durable,
//! and looks for a successor when it has nothing to do. Any doubt ends the ownership of this shard, and of no other.

use super::Shared;
use super::client::Message;
use super::memory::Reached;
use super::sender::Sender;
use super::source::KafkaSource;
use crate::log::queue::{Queue, Waiting, Wake};
use crate::log::status::Status;
use crate::log::{LogError, LogId, checkpoint};
use atp_core::partition::{Header, Mark, Next, Owner, Parsed, StepDown};
use atp_core::record;
use bytes::Bytes;
use prost::Message as _;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How often an idle owner looks at the end of its partition, and a busy one remembers how far it came.
const LOOK: Duration = Duration::from_secs(1);
/// Entries that come meanwhile wait for it.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);
/// A partition that the brokers have not known for so long is gone; less, and one of them may only have been started anew.
const GONE: Duration = Duration::from_secs(10);

pub(super) struct Writer {
    pub(super) queue: Arc<Queue>,
    pub(super) status: watch::Sender<Status>,
    pub(super) sender: Sender,
    pub(super) owner: Owner,
    pub(super) source: KafkaSource,
    pub(super) shared: Arc<Shared>,
    pub(super) reached: Reached,
    pub(super) log_id: LogId,
    pub(super) shard: u32,
    /// Offset of the own Epoch, and its position.
    pub(super) epoch: u64,
    pub(super) epoch_position: u64,
    /// A checkpoint is due after so many bytes, or four times the last one.
    pub(super) checkpoint_every: u64,
    pub(super) checkpoint_bytes: u64,
    pub(super) since_checkpoint: u64,
    /// A checkpoint whose pieces aren't all durable: the place before it, and its last position.
    pub(super) checkpoint: Option<(Mark, u64)>,
    /// The brokers don't know the partition since then.
    pub(super) missed: Option<Instant>,
}

impl Writer {
    /// Until the log is closed or fails.
    pub(super) fn run(mut self) {
        if let Err(error) = self.work() {
            // What is still under way ends up behind the next owner's Epoch, or was never told to be durable.
            let error = Arc::new(error);
            self.queue.stop(&error);
            self.status.send_modify(|status| status.failed = Some(error));
        }
    }

    fn work(&mut self) -> Result<(), LogError> {
        self.checkpoint_if_due();
        let mut batch: Vec<Waiting> = Vec::new();
        loop {
            match self.queue.take(&mut batch, Instant::now() + LOOK) {
                Wake::Entries => {
                    self.commit(&batch)?;
                    batch.clear();
                    self.remember(LOOK);
                }
                Wake::Idle => self.look()?,
                Wake::Close => {
                    self.remember(Duration::ZERO);
                    return Ok(());
                }
            }
        }
    }

    /// Hands the batch over and waits for all of its reports.
    fn commit(&mut self, batch: &[Waiting]) -> Result<(), LogError> {
        let begun = Instant::now();
        let (first, first_n) = (self.position() + 1, self.owner.durable() + 1);
        let mut bytes = 0;
        for (index, Waiting { entry, checkpoint, .. }) in batch.iter().enumerate() {
            let header = self.owner.send(*checkpoint);
            let key = key(entry);
            let sent = self.sender.send(index, &header, key.as_deref(), entry);
            sent.map_err(|why| LogError::Unknown { shard: self.shard, position: first + index as u64, why })?;
            bytes += entry.len() as u64;
            self.since_checkpoint += entry.len() as u64;
        }
        metrics::histogram!("atp_log_batch_records").record(batch.len() as f64);
        metrics::histogram!("atp_log_batch_bytes").record(bytes as f64);
        let mut done = 0;
        while done < batch.len() {
            for (index, delivered) in self.sender.reports() {
                let position = first + index as u64;
                let before = self.mark();
                // An error means unknown, as a report without an offset does; only the operator is told the difference.
                let offset = delivered.as_ref().ok().copied().flatten();
                let followed = self.follow(|owner| owner.reported(first_n + index as u64, offset));
                followed.map_err(|error| match delivered {
                    Err(why) => LogError::Unknown { shard: self.shard, position, why },
                    Ok(_) => error,
                })?;
                self.durable(before, &batch[index].entry, batch[index].checkpoint);
                done += 1;
            }
            let position = self.position();
            self.status.send_if_modified(|status| {
                let news = status.durable != position;
                if news {
                    // What was written behind the own last message stands behind nobody else's Epoch.
                    (status.durable, status.alone) = (position, Some(begun));
                }
                news
            });
        }
        self.checkpoint_if_due();
        Ok(())
    }

    /// One more entry is durable; the place before it was `before`.
    fn durable(&mut self, before: Mark, entry: &Bytes, is_checkpoint: bool) {
        let mark = self.mark();
        self.source.marks().offer(mark);
        if is_checkpoint && let Some(piece) = checkpoint::piece(entry) {
            self.checkpoint_bytes = u64::from(piece.pieces) * entry.len() as u64;
            self.since_checkpoint = entry.len() as u64;
            self.checkpoint = Some((before, before.position + u64::from(piece.pieces)));
        }
        if let Some((place, last)) = self.checkpoint
            && mark.position >= last
        {
            self.checkpoint = None;
            self.reached.checkpoint = Some(place);
            self.source.marks().set_checkpoint(place);
        }
    }

    /// Reads what the owner's rule asks for, to the end.
    fn follow(&mut self, begin: impl FnOnce(&mut Owner) -> Result<Next, StepDown>) -> Result<(), LogError> {
        let begun = begin(&mut self.owner).map_err(|why| self.step_down(&why, None))?;
        let Next::Read { from, to } = begun else { return Ok(()) };
        let mut messages = self.source.messages()?;
        messages.seek(from, to)?;
        loop {
            let Some(message) = messages.next()? else {
                return Err(self.step_down(&StepDown::Missing { offset: to - 1 }, None));
            };
            let next = self.owner.read(message.offset, &message.header);
            metrics::counter!("atp_log_void_messages_total").increment(1);
            match next.map_err(|why| self.step_down(&why, Some(&message)))? {
                Next::Explained => return Ok(()),
                Next::Read { .. } => {}
            }
        }
    }

    fn step_down(&self, why: &StepDown, message: Option<&Message>) -> LogError {
        let shard = self.shard;
        match (why, message) {
            (
                StepDown::Fenced { offset },
                Some(Message { entry, header: Parsed::Ours(Header::Epoch { log_id }), .. }),
            ) if *log_id == self.log_id => LogError::Fenced { shard, offset: *offset, by: owner_of(entry) },
            _ => LogError::SteppedDown { shard, why: why.to_string() },
        }
    }

    /// Nothing is in flight: is there a successor, is the log still whole?
    fn look(&mut self) -> Result<(), LogError> {
        let begun = Instant::now();
        let end = match self.sender.ends(LOOK_PATIENCE) {
            Ok((0, end)) => end,
            Ok((low, end)) => match self.source.note(low) {
                Ok(_) => end,
                Err(gone @ LogError::NotThisLog { .. }) => return Err(gone),
                Err(error) => {
                    tracing::debug!("{error}");
                    return Ok(());
                }
            },
            Err(gone @ LogError::NotThisLog { .. }) => {
                let missed = *self.missed.get_or_insert_with(Instant::now);
                return if missed.elapsed() < GONE { Ok(()) } else { Err(gone) };
            }
            // The brokers may be away for a while; the next entry finds out whether they come back in time.
            Err(error) => {
                tracing::debug!("{error}");
                self.missed = None;
                return Ok(());
            }
        };
        self.missed = None;
        if end <= self.owner.last() {
            let what =
                format!("it ends at offset {end}, but offset {} was durable: records are gone", self.owner.last());
            return Err(self.source.address().refused(what));
        }
        self.follow(|owner| Ok(owner.looked(end)))?;
        self.status.send_modify(|status| status.alone = Some(begun));
        self.remember(LOOK);
        Ok(())
    }

    fn position(&self) -> u64 {
        self.epoch_position + self.owner.durable()
    }

    /// The place behind the last durable message of this owner.
    fn mark(&self) -> Mark {
        let n = self.owner.durable();
        Mark { offset: self.owner.own(), position: self.position(), epoch: Some(self.epoch), n }
    }

    fn checkpoint_if_due(&mut self) {
        if self.since_checkpoint >= self.checkpoint_every && self.since_checkpoint >= 4 * self.checkpoint_bytes {
            // Asked for once; the next comes when this one stands and as much lies behind it.
            self.since_checkpoint = 0;
            self.status.send_modify(|status| status.checkpoints_due += 1);
        }
    }

    /// The ledger doesn't rest on this: a disk that takes no more of it weakens the next start's checks and stops nothing.
    fn remember(&mut self, pause: Duration) {
        self.reached.end = self.owner.last() + 1;
        let mut memory = self.shared.memory();
        memory.set_reached(self.shard, self.reached);
        if let Err(error) = memory.save_every(pause) {
            tracing::warn!("how far the log reached is not remembered here: {error}");
        }
    }
}

/// The stream that an entry is about.
fn key(entry: &Bytes) -> Option<String> {
    let entry = record::Entry::decode(entry.clone()).ok()?;
    entry.records.iter().find_map(|any| any.record.as_ref()?.key()).map(|key| key.stream.clone())
}

/// Who wrote an Epoch, for people.
fn owner_of(entry: &Bytes) -> String {
    let entry = record::Entry::decode(entry.clone()).unwrap_or_default();
    let epoch = entry.records.into_iter().find_map(|any| match any.record {
        Some(record::Record::Epoch(epoch)) => Some(epoch),
        _ => None,
    });
    epoch.map_or_else(
        || "another router".into(),
        |epoch| format!("router {} (incarnation {})", epoch.owner, epoch.incarnation),
    )
}

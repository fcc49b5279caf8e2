//! Before a router owns anything: is the topic there, is it this log, are all of its records? It makes what isn't there, but only
//! where this machine remembers no log.

use super::memory::{Memory, Reached};
use super::sender::{Producing, Sender};
use super::{KafkaOptions, KafkaSource, Made, topic};
use crate::log::{KafkaAddress, LogError, LogId};
use atp_core::partition::Header;
use atp_core::record::{Entry, Genesis, Record, hex};
use atp_core::state::FORMAT;
use prost::Message;
use std::sync::Arc;

/// The log in the topic, made where there is none, with a Genesis in each of its partitions, whose ends are remembered.
/// `first`: of shard 0.
pub(super) fn prepare(
    options: &KafkaOptions,
    first: &KafkaSource,
    memory: &mut Memory,
    now_ms: u64,
) -> Result<Made, LogError> {
    let address = &options.address;
    let mut messages = first.messages()?;
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
    let topic = match topic::look(address, &messages)? {
        Some(topic) => topic,
        None => {
            gone("there is no such topic").map_or(Ok(()), Err)?;
            topic_made = topic::create(address, &messages, options.shards, options.single_broker)?;
            topic::look(address, &messages)?.ok_or_else(|| address.refused("it vanished as soon as it was made"))?
        }
    };
    let mut beginning = Beginning { address, by: None, now_ms };
    let (genesis, log_made) = match first.genesis(&mut messages)? {
        Some(genesis) => (genesis, false),
        None => {
            gone("it is empty").map_or(Ok(()), Err)?;
            // Settings first: nothing is written to a topic that can't keep it.
            check(address, &topic, options.shards, options.single_broker)?;
            let log_id = bytes::Bytes::copy_from_slice(uuid::Uuid::new_v4().as_bytes());
            let genesis = Genesis { log_id, format: FORMAT, shards: options.shards, hash_seed: 0 };
            beginning.write(0, &genesis)?;
            // Two may begin at once: the first message counts.
            let stands = first.genesis(&mut messages)?.ok_or_else(|| address.refused("its first message is gone"))?;
            let mine = stands.log_id == genesis.log_id;
            (stands, mine)
        }
    };
    let log_id = id_of(address, &genesis)?;
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
    if options.exact && genesis.shards != options.shards {
        let (has, wants) = (genesis.shards, options.shards);
        return Err(address.refused(format!("the log has {has} shards, shards.count is {wants}; set it to {has}")));
    }
    drop(messages);
    for shard in 0..genesis.shards {
        let partition = first.shard(shard);
        let mut reached = memory.reached(shard);
        if reached.end == 0 && partition.is_empty()? {
            beginning.write(partition.partition(), &genesis)?;
        }
        reached.end = check_partition(options, &partition, &log_id, reached)?;
        memory.set_reached(shard, reached);
    }
    let replicated = topic.is_replicated();
    let Genesis { shards, hash_seed, .. } = genesis;
    Ok(Made { log_id, shards, hash_seed, topic_made, log_made, replicated })
}

/// The end of a shard's partition, if it is this log's and has all that is remembered of it.
pub(super) fn check_partition(
    options: &KafkaOptions,
    source: &KafkaSource,
    log_id: &LogId,
    reached: Reached,
) -> Result<u64, LogError> {
    let address = &options.address;
    let mut messages = source.messages()?;
    let end = source.ends(&messages)?;
    let partition = source.partition();
    if end < reached.end {
        let what = format!(
            "partition {partition} ends at offset {end}, but {} remembers {}: acknowledged records are gone; restore them",
            options.data_dir.display(),
            reached.end
        );
        return Err(address.refused(what));
    }
    if source.stands(&mut messages)?.log_id != log_id[..] {
        let what = format!("partition {partition} doesn't begin with log {}; it is of another log", hex(log_id));
        return Err(address.refused(what));
    }
    Ok(end)
}

fn id_of(address: &KafkaAddress, genesis: &Genesis) -> Result<LogId, LogError> {
    LogId::try_from(&genesis.log_id[..]).map_err(|_| address.refused("its Genesis has no log id"))
}

fn check(address: &KafkaAddress, topic: &topic::Topic, shards: u32, single: bool) -> Result<(), LogError> {
    let problems = topic.problems(shards as usize, single);
    if problems.is_empty() { Ok(()) } else { Err(address.refused(problems.join("; "))) }
}

/// Writes the first messages of partitions.
struct Beginning<'a> {
    address: &'a KafkaAddress,
    /// Made when there is something to write.
    by: Option<Arc<Producing>>,
    now_ms: u64,
}

impl Beginning<'_> {
    fn write(&mut self, partition: i32, genesis: &Genesis) -> Result<(), LogError> {
        let log_id = id_of(self.address, genesis)?;
        let by = match &self.by {
            Some(by) => by.clone(),
            None => self.by.insert(Arc::new(Producing::new(self.address)?)).clone(),
        };
        let entry = Entry { at_ms: self.now_ms, records: vec![Record::Genesis(genesis.clone()).into()] };
        let sent = Sender::new(by, partition).send_one(&Header::Genesis { log_id }, &entry.encode_to_vec());
        let address = self.address.to_string();
        sent.map(|_| ()).map_err(|why| LogError::Kafka { doing: "begin a log in", address, why })
    }
}

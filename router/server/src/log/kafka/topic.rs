//! The topic of a log: made, looked at, and refused when its settings could lose what was acknowledged.

use super::client::{MESSAGE_BYTES, Messages, PATIENCE, Quiet};
use crate::log::{ENTRY_BYTES_MAX, KafkaAddress, LogError};
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::{Offset, TopicPartitionList};
use std::collections::BTreeMap;
use std::future::Future;
use std::time::{Duration, Instant};

/// Room for an entry with its key and headers in a batch of its own.
const MESSAGE_BYTES_SET: usize = ENTRY_BYTES_MAX + (1 << 20);
const _: () = assert!(MESSAGE_BYTES_SET > MESSAGE_BYTES, "what is made must be what is demanded");

/// What a topic is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Topic {
    pub(super) partitions: usize,
    /// The fewest replicas that a partition has.
    pub(super) replicas: usize,
    pub(super) settings: BTreeMap<String, String>,
}

/// The topic; `None`: there is none of this name.
pub(super) fn look(address: &KafkaAddress, messages: &Messages) -> Result<Option<Topic>, LogError> {
    let Some((partitions, replicas)) = shape(address, messages)? else { return Ok(None) };
    let admin = admin(address)?;
    let found = wait(async { admin.describe_configs(&[ResourceSpecifier::Topic(&address.topic)], &options()).await })?;
    // Ending its thread takes a while, and nobody needs to wait.
    std::thread::spawn(move || drop(admin));
    let entries = found.map_err(address.failed("read the settings of"))?;
    let mut settings = BTreeMap::new();
    for resource in entries {
        let resource = resource.map_err(|code| address.failed("read the settings of")(KafkaError::AdminOp(code)))?;
        settings.extend(resource.entries.into_iter().filter_map(|entry| Some((entry.name, entry.value?))));
    }
    Ok(Some(Topic { partitions, replicas, settings }))
}

/// Partitions and replicas; `None`: there is no such topic.
pub(super) fn shape(address: &KafkaAddress, messages: &Messages) -> Result<Option<(usize, usize)>, LogError> {
    let metadata = messages.consumer().fetch_metadata(Some(&address.topic), PATIENCE);
    let metadata = metadata.map_err(address.failed("look for"))?;
    let topic = metadata.topics().iter().find(|topic| topic.name() == address.topic);
    let Some(topic) = topic.filter(|topic| topic.error().is_none() && !topic.partitions().is_empty()) else {
        return Ok(None);
    };
    let replicas = topic.partitions().iter().map(|partition| partition.replicas().len()).min();
    Ok(Some((topic.partitions().len(), replicas.unwrap_or(0))))
}

/// Makes the topic with the settings that a log needs. `Ok(false)`: somebody else was first.
pub(super) fn create(
    address: &KafkaAddress,
    messages: &Messages,
    partitions: u32,
    single: bool,
) -> Result<bool, LogError> {
    let bytes = MESSAGE_BYTES_SET.to_string();
    let partitions = i32::try_from(partitions).unwrap_or(i32::MAX);
    let topic = kept(&address.topic, partitions, single)
        .set("cleanup.policy", "delete")
        .set("retention.ms", "-1")
        .set("retention.bytes", "-1")
        .set("max.message.bytes", &bytes);
    make(address, messages, &topic, partitions)
}

/// Makes the topic of a log's notes, of which the newest of a key is kept for ever. `Ok(false)`: somebody else was first.
pub(super) fn create_notes(address: &KafkaAddress, messages: &Messages, single: bool) -> Result<bool, LogError> {
    let topic = kept(&address.topic, 1, single).set("cleanup.policy", "compact");
    make(address, messages, &topic, 1)
}

/// A topic of which nothing acknowledged is lost with one broker.
fn kept(name: &str, partitions: i32, single: bool) -> NewTopic<'_> {
    let (replicas, in_sync) = if single { (1, "1") } else { (3, "2") };
    NewTopic::new(name, partitions, TopicReplication::Fixed(replicas))
        .set("unclean.leader.election.enable", "false")
        .set("min.insync.replicas", in_sync)
}

fn make(address: &KafkaAddress, messages: &Messages, topic: &NewTopic<'_>, partitions: i32) -> Result<bool, LogError> {
    let admin = admin(address)?;
    let made = wait(async { admin.create_topics([topic], &options()).await })?;
    let made = made.map_err(address.failed("make"))?;
    let fresh = match made.into_iter().next() {
        Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => false,
        Some(Err((_, RDKafkaErrorCode::InvalidReplicationFactor))) => {
            let why =
                "a log needs three brokers, and there are fewer: start them, or set log.kafka.single_broker: true";
            return Err(LogError::Kafka { doing: "make", address: address.to_string(), why: why.into() });
        }
        Some(Err((_, code))) => return Err(address.failed("make")(KafkaError::AdminOp(code))),
        Some(Ok(_)) | None => true,
    };
    // Known to the controller isn't known to every broker, and a partition needs a leader.
    let begun = Instant::now();
    for partition in 0..partitions {
        while let Err(error) = messages.watermarks(partition, PATIENCE) {
            if begun.elapsed() > PATIENCE {
                return Err(address.failed("look for, though it was just made,")(error));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(fresh)
}

/// Deletes what lies before these offsets, by partition.
pub(super) fn delete_records(address: &KafkaAddress, before: impl Iterator<Item = (i32, u64)>) -> Result<(), LogError> {
    let mut places = TopicPartitionList::new();
    for (partition, offset) in before {
        let offset = Offset::Offset(i64::try_from(offset).unwrap_or(i64::MAX));
        places.add_partition_offset(&address.topic, partition, offset).map_err(address.failed("prune"))?;
    }
    let admin = admin(address)?;
    let deleted = wait(async { admin.delete_records(&places, &options()).await })?;
    let deleted = deleted.map_err(address.failed("prune"))?;
    for element in deleted.elements() {
        element.error().map_err(address.failed("prune"))?;
    }
    Ok(())
}

impl Topic {
    /// True: an acknowledged entry is on two brokers at least.
    pub(super) fn is_replicated(&self) -> bool {
        self.number("min.insync.replicas").is_some_and(|n| n >= 2) && self.replicas >= 2
    }

    fn number(&self, name: &str) -> Option<i64> {
        self.settings.get(name)?.parse().ok()
    }

    /// What could lose acknowledged entries or refuse new ones, and how to set it right.
    pub(super) fn problems(&self, shards: usize, single_broker: bool) -> Vec<String> {
        let mut problems = Vec::new();
        let mut wants = |name: &str, wanted: &str, good: bool| {
            if !good {
                let found = self.settings.get(name).map_or("unknown", String::as_str);
                problems.push(format!("{name} is {found}; set it to {wanted}"));
            }
        };
        let is = |name: &str, value: &str| self.settings.get(name).is_some_and(|found| found == value);
        wants("cleanup.policy", "delete", is("cleanup.policy", "delete"));
        wants("retention.ms", "-1", is("retention.ms", "-1"));
        wants("retention.bytes", "-1", is("retention.bytes", "-1"));
        let unclean = "unclean.leader.election.enable";
        wants(unclean, "false", is(unclean, "false"));
        let bytes = self.number("max.message.bytes").is_some_and(|n| n >= MESSAGE_BYTES as i64);
        wants("max.message.bytes", &MESSAGE_BYTES_SET.to_string(), bytes);
        if !single_broker && !self.is_replicated() {
            let in_sync = self.settings.get("min.insync.replicas").map_or("unknown", String::as_str);
            problems.push(format!(
                "{} replicas, min.insync.replicas {in_sync}; three and 2 are needed, or log.kafka.single_broker: true \
                 if one broker is wanted",
                self.replicas
            ));
        }
        if self.partitions != shards {
            problems.push(format!(
                "{} partitions, and the log has {shards} shards; partitions can't be taken back: make another topic",
                self.partitions
            ));
        }
        problems
    }
}

fn admin(address: &KafkaAddress) -> Result<AdminClient<Quiet>, LogError> {
    use rdkafka::config::FromClientConfigAndContext;
    AdminClient::from_config_and_context(&address.client(), Quiet).map_err(address.failed("make a client of"))
}

fn options() -> AdminOptions {
    AdminOptions::new().request_timeout(Some(PATIENCE)).operation_timeout(Some(PATIENCE))
}

/// Runs a request to its end. For threads that may block.
fn wait<T>(request: impl Future<Output = T>) -> Result<T, LogError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    Ok(runtime.map_err(LogError::io("start a runtime beside", std::path::Path::new("the process")))?.block_on(request))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Topic {
        let settings = [
            ("cleanup.policy", "delete"),
            ("retention.ms", "-1"),
            ("retention.bytes", "-1"),
            ("max.message.bytes", "34603008"),
            ("unclean.leader.election.enable", "false"),
            ("min.insync.replicas", "2"),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Topic { partitions: 1, replicas: 3, settings: settings.into() }
    }

    #[test]
    fn each_setting_that_may_lose_entries_is_refused() {
        assert_eq!(good().problems(1, false), [""; 0]);
        for (name, value) in [
            ("cleanup.policy", "compact"),
            ("cleanup.policy", "compact,delete"),
            ("retention.ms", "604800000"),
            ("retention.bytes", "1"),
            ("max.message.bytes", "1048588"),
            ("unclean.leader.election.enable", "true"),
            ("min.insync.replicas", "1"),
        ] {
            let mut topic = good();
            topic.settings.insert(name.into(), value.into());
            let problems = topic.problems(1, false);
            assert!(problems.len() == 1 && problems[0].contains(name) && problems[0].contains(value), "{problems:?}");
            topic.settings.remove(name);
            assert_eq!(topic.problems(1, false).len(), 1, "{name} is unknown");
        }
    }

    #[test]
    fn one_broker_must_be_wanted_and_partitions_be_shards() {
        let mut topic = good();
        topic.replicas = 1;
        assert_eq!(topic.problems(1, false).len(), 1);
        assert_eq!(topic.problems(1, true), [""; 0]);
        assert!(!topic.is_replicated());
        topic.partitions = 2;
        assert!(topic.problems(1, true)[0].contains("2 partitions"));
    }
}

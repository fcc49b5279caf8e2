//! What the tests of the log in Kafka share: real brokers, a topic for each test, and messages by somebody else.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "only tests use it; what fails here fails the test")]

use atp_core::record::{Entry, Faster, Record};
use atp_router::log::{Event, Events, KafkaAddress, KafkaOptions, KafkaShards, Log, LogError, Opened};
use bytes::Bytes;
use prost::Message as _;
use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Offset, TopicPartitionList};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Starts the broker once for this process, or takes the one that runs; it ends by itself after its last owner.
pub fn brokers() -> &'static str {
    static BROKERS: OnceLock<String> = OnceLock::new();
    BROKERS.get_or_init(|| {
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/parts/kafka.sh");
        let output =
            Command::new(&script).args(["start", "--owner", &std::process::id().to_string()]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} failed: {said}", script.display());
        let lines = String::from_utf8(output.stdout).unwrap();
        lines.lines().find_map(|line| line.strip_prefix("ATP_KAFKA=")).unwrap().to_owned()
    })
}

/// A topic that no other test uses. It isn't made yet.
pub fn address() -> KafkaAddress {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let topic = format!("test.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    KafkaAddress { brokers: vec![brokers().into()], topic, ..KafkaAddress::default() }
}

pub fn options(address: &KafkaAddress, data_dir: &Path) -> KafkaOptions {
    KafkaOptions {
        address: address.clone(),
        single_broker: true,
        shards: 1,
        exact: true,
        data_dir: data_dir.into(),
        checkpoint_every: 64 << 10,
    }
}

pub fn open(address: &KafkaAddress, data_dir: &Path, owner: &str) -> Result<Opened, LogError> {
    KafkaShards::open(&options(address, data_dir), 1_000)?.take(0, owner, "i1", 1_000, None)
}

/// Why it isn't opened, which must be that the log isn't the one it was.
pub fn refused(address: &KafkaAddress, data_dir: &Path) -> String {
    match open(address, data_dir, "r1") {
        Err(error @ LogError::NotThisLog { .. }) => {
            let text = error.to_string();
            assert!(text.starts_with("ELOG: "), "{text}");
            text
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was opened"),
    }
}

/// An entry that every state takes; it says its number.
pub fn entry(n: u64, bytes: usize) -> Bytes {
    let record = Faster { account: format!("a{n}"), by: "x".repeat(bytes), ..Faster::default() };
    Entry { at_ms: 1_000, records: vec![Record::Faster(record).into()] }.encode_to_vec().into()
}

/// Waits for a condition; its deadline is far.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(90), "no {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Appends, and waits until all of it is durable or the log has failed. True: a checkpoint was asked for meanwhile.
pub fn try_add(log: &dyn Log, events: &mut Events, entries: Vec<(u64, Bytes, bool)>) -> Result<bool, LogError> {
    let last = entries.last().unwrap().0;
    block_on(log.append(entries))?;
    let (mut durable, mut asked) = (0, false);
    while durable < last {
        match until("news of the log", || events.try_next()) {
            Event::Durable { position } => durable = position,
            Event::Failed(why) => return Err(LogError::Stopped(why)),
            Event::NewSegment => asked = true,
            Event::Alone { .. } | Event::Room(_) => {}
        }
    }
    while let Some(event) = events.try_next() {
        asked |= matches!(event, Event::NewSegment);
    }
    Ok(asked)
}

/// The log's last word, without an append.
pub fn failure(events: &mut Events) -> Arc<LogError> {
    until("failure", || match events.try_next() {
        Some(Event::Failed(why)) => Some(why),
        _ => None,
    })
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn admin() -> (AdminClient<DefaultClientContext>, AdminOptions) {
    let admin = ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
    (admin, AdminOptions::new().operation_timeout(Some(Duration::from_secs(20))))
}

/// Makes a topic as an operator would who hasn't read the manual, but for what `settings` say.
pub fn make_topic(address: &KafkaAddress, partitions: i32, settings: &[(&str, &str)]) {
    let (admin, options) = admin();
    let mut topic = NewTopic::new(&address.topic, partitions, TopicReplication::Fixed(1));
    topic.config = settings.to_vec();
    block_on(admin.create_topics([&topic], &options)).unwrap()[0].as_ref().unwrap();
    until("topic", || (!leaders(&admin, address).is_empty()).then_some(()));
}

/// The leaders of a topic's partitions.
fn leaders(admin: &AdminClient<DefaultClientContext>, address: &KafkaAddress) -> Vec<i32> {
    let metadata = admin.inner().fetch_metadata(Some(&address.topic), Duration::from_secs(20)).unwrap();
    metadata.topics()[0].partitions().iter().map(|partition| partition.leader()).collect()
}

pub fn delete_topic(address: &KafkaAddress) {
    let (admin, options) = admin();
    block_on(admin.delete_topics(&[&address.topic], &options)).unwrap()[0].as_ref().unwrap();
    until("end of the topic", || leaders(&admin, address).is_empty().then_some(()));
}

pub fn delete_records(address: &KafkaAddress, partition: i32, before: i64) {
    let (admin, options) = admin();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&address.topic, partition, Offset::Offset(before)).unwrap();
    block_on(admin.delete_records(&list, &options)).unwrap();
}

pub fn add_partitions(address: &KafkaAddress, count: usize) {
    let (admin, options) = admin();
    block_on(admin.create_partitions(&[NewPartitions::new(&address.topic, count)], &options)).unwrap()[0]
        .as_ref()
        .unwrap();
}

/// A message's header as the log's page draws it.
pub fn header(kind: u8, epoch: u64, n: u64, log_id: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1, kind, 0, 0, 0, 0, 0, 0];
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(n.to_le_bytes());
    bytes.extend(log_id);
    bytes
}

/// A message by somebody else than the log's owner.
pub fn stranger(address: &KafkaAddress, header: Option<&[u8]>, entry: &[u8]) {
    stranger_at(address, 0, header, entry);
}

/// The same in any partition.
pub fn stranger_at(address: &KafkaAddress, partition: i32, header: Option<&[u8]>, entry: &[u8]) {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", brokers()).set("message.max.bytes", "40000000").create().unwrap();
    let mut record = BaseRecord::<[u8], [u8]>::to(&address.topic).partition(partition).payload(entry);
    if let Some(header) = header {
        record = record.headers(OwnedHeaders::new().insert(Header { key: "atp", value: Some(header) }));
    }
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.flush(Duration::from_secs(20)).unwrap();
}

//! Clients of the brokers: their settings, what they say, and messages read in order. Knows neither rule.

use crate::log::{ENTRY_BYTES_MAX, KafkaAddress, LogError};
use atp_core::partition::{self, Parsed};
use bytes::Bytes;
use rdkafka::client::{Client, ClientContext};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Headers, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A request that takes longer has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);
/// Reading without any progress for so long has failed. An election among the brokers takes less.
const STALLED: Duration = Duration::from_secs(30);
/// Between two questions where the brokers are not of one mind.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// For one of them.
const ASK_PATIENCE: Duration = Duration::from_secs(1);
/// The largest message: an entry with its key and headers.
pub(super) const MESSAGE_BYTES: usize = ENTRY_BYTES_MAX + (64 << 10);
const _: () = assert!(MESSAGE_BYTES < 100_000_000, "the client's and the brokers' limits of a request");

/// What librdkafka has to say goes to the process's own log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!("kafka: {facility}: {message}");
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!("kafka: {error}: {reason}");
    }
}
impl ConsumerContext for Quiet {}

impl KafkaAddress {
    pub(super) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.brokers.join(","))
            .set("client.id", "atp")
            // The default, 10 s, lets a dead broker be reported after 9 s instead of 5.
            .set("reconnect.backoff.max.ms", "500")
            .set("topic.metadata.refresh.interval.ms", "30000");
        if let Some(tls) = &self.tls {
            config.set("ssl.ca.location", tls.ca.as_deref().unwrap_or("probe"));
            if let Some((certificate, key)) = &tls.client {
                config.set("ssl.certificate.location", certificate).set("ssl.key.location", key);
            }
        }
        if let Some(sasl) = &self.sasl {
            config
                .set("sasl.mechanism", &sasl.mechanism)
                .set("sasl.username", &sasl.user)
                .set("sasl.password", &sasl.password);
        }
        let protocol = match (&self.tls, &self.sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        };
        config.set("security.protocol", protocol);
        config
    }

    pub(super) fn failed(&self, doing: &'static str) -> impl Fn(KafkaError) -> LogError {
        let address = self.to_string();
        move |error| LogError::Kafka { doing, address: address.clone(), why: why(&error) }
    }

    /// Acknowledged records are gone, or this is another log.
    pub(super) fn refused(&self, what: impl Into<String>) -> LogError {
        LogError::NotThisLog { address: self.to_string(), what: what.into() }
    }
}

/// The broker's or library's own words, without the wrapping.
pub(super) fn why(error: &KafkaError) -> String {
    error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| code.to_string())
}

/// A message as it was read.
pub(super) struct Message {
    pub(super) offset: u64,
    pub(super) header: Parsed,
    pub(super) entry: Bytes,
}

/// Messages of one partition, read in order between two offsets.
pub(super) struct Messages {
    address: KafkaAddress,
    partition: i32,
    consumer: BaseConsumer<Quiet>,
    next: u64,
    end: u64,
}

impl Messages {
    pub(super) fn new(address: &KafkaAddress, partition: i32) -> Result<Self, LogError> {
        let consumer = address
            .client()
            // No group is joined and nothing committed, but the library asks for a name.
            .set("group.id", "atp-reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", "read_uncommitted")
            .set("auto.offset.reset", "error")
            .set("check.crcs", "true")
            .set("fetch.wait.max.ms", "20")
            .set("fetch.error.backoff.ms", "100")
            .set("queued.max.messages.kbytes", "16384")
            .create_with_context(Quiet)
            .map_err(address.failed("make a client of"))?;
        Ok(Self { address: address.clone(), partition, consumer, next: 0, end: 0 })
    }

    /// The first offset that is kept, and the one behind the last. Waits while the partition has no leader.
    pub(super) fn ends(&self, patience: Duration) -> Result<(u64, u64), LogError> {
        ends(self.consumer.client(), &self.address, self.partition, patience)
    }

    pub(super) fn watermarks(&self, partition: i32, patience: Duration) -> Result<(i64, i64), KafkaError> {
        self.consumer.fetch_watermarks(&self.address.topic, partition, patience)
    }

    pub(super) const fn consumer(&self) -> &BaseConsumer<Quiet> {
        &self.consumer
    }

    /// Reads `from..end` next.
    pub(super) fn seek(&mut self, from: u64, end: u64) -> Result<(), LogError> {
        (self.next, self.end) = (from, end);
        if from >= end {
            return self.consumer.unassign().map_err(self.address.failed("read"));
        }
        let mut place = TopicPartitionList::new();
        let offset = Offset::Offset(i64::try_from(from).unwrap_or(i64::MAX));
        let assigned = place
            .add_partition_offset(&self.address.topic, self.partition, offset)
            .and_then(|()| self.consumer.assign(&place));
        assigned.map_err(self.address.failed("read"))
    }

    /// The next message; `None` at the end. Blocks until it is there.
    pub(super) fn next(&mut self) -> Result<Option<Message>, LogError> {
        if self.next >= self.end {
            return Ok(None);
        }
        let begun = Instant::now();
        loop {
            match self.consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => {
                    let offset = u64::try_from(message.offset()).unwrap_or(0);
                    if offset < self.next {
                        // Fetched before the last seek.
                        continue;
                    }
                    let header = message.headers().and_then(|headers| {
                        headers.iter().find(|header| header.key == partition::NAME).and_then(|header| header.value)
                    });
                    let header = Parsed::of(header);
                    let entry = message.payload().map(Bytes::copy_from_slice).unwrap_or_default();
                    self.next = offset + 1;
                    if self.next >= self.end {
                        // Else it would fetch on.
                        self.consumer.unassign().map_err(self.address.failed("read"))?;
                    }
                    return Ok((offset < self.end).then_some(Message { offset, header, entry }));
                }
                Some(Err(KafkaError::PartitionEOF(_))) | None if begun.elapsed() < STALLED => {}
                Some(Err(KafkaError::PartitionEOF(_))) | None => {
                    let what = format!("offset {} can't be read, though offset {} was there", self.next, self.end - 1);
                    return Err(LogError::Kafka { doing: "read", address: self.address.to_string(), why: what });
                }
                Some(Err(error)) => match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset) => {
                        let what = format!("offset {} is gone: acknowledged records were deleted", self.next);
                        return Err(self.address.refused(what));
                    }
                    // The library goes on by itself.
                    Some(
                        RDKafkaErrorCode::BrokerTransportFailure
                        | RDKafkaErrorCode::AllBrokersDown
                        | RDKafkaErrorCode::OperationTimedOut
                        | RDKafkaErrorCode::Resolve,
                    ) if begun.elapsed() < STALLED => {}
                    _ => return Err(self.address.failed("read")(error)),
                },
            }
        }
    }
}

/// The first offset that a partition keeps, and the one behind its last. Waits while it has no leader.
///
/// # Errors
/// `NotThisLog` where the brokers don't know it, and go on so while there is patience: one that has just started says so too of
/// what it hasn't heard of yet.
pub(super) fn ends<C: ClientContext>(
    client: &Client<C>,
    address: &KafkaAddress,
    partition: i32,
    patience: Duration,
) -> Result<(u64, u64), LogError> {
    let end = Instant::now() + patience;
    let (low, high) = loop {
        let left = end.saturating_duration_since(Instant::now());
        // The last question has its time too.
        match client.fetch_watermarks(&address.topic, partition, left.max(ASK_PATIENCE)) {
            Ok(ends) => break ends,
            Err(error) => match error.rdkafka_error_code() {
                // A new leader doesn't say how far it reaches before it knows what its followers have.
                Some(
                    RDKafkaErrorCode::NotLeaderForPartition
                    | RDKafkaErrorCode::LeaderNotAvailable
                    | RDKafkaErrorCode::OffsetNotAvailable,
                ) if !left.is_zero() => std::thread::sleep(ASK_AGAIN),
                Some(
                    RDKafkaErrorCode::UnknownTopicOrPartition
                    | RDKafkaErrorCode::UnknownTopic
                    | RDKafkaErrorCode::UnknownPartition,
                ) => {
                    if left.is_zero() {
                        let what = format!("there is no such topic, or it has no partition {partition}");
                        return Err(address.refused(what));
                    }
                    std::thread::sleep(ASK_AGAIN);
                }
                _ => return Err(address.failed("read the ends of")(error)),
            },
        }
    };
    let offset = |n: i64| u64::try_from(n).unwrap_or(0);
    Ok((offset(low), offset(high)))
}

/// Clients of one topic that nobody reads with: making and dropping one takes a tenth of a second.
#[derive(Clone, Default)]
pub(super) struct Pool(Arc<Mutex<Vec<Messages>>>);

/// Clients that are kept for the next reader.
const IDLE_MAX: usize = 2;

impl Pool {
    pub(super) fn take(&self, address: &KafkaAddress, partition: i32) -> Result<Pooled, LogError> {
        let idle = self.lock().pop();
        let mut messages = idle.map_or_else(|| Messages::new(address, partition), Ok)?;
        messages.partition = partition;
        Ok(Pooled { messages: Some(messages), pool: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Messages>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client that goes back to its pool.
pub(super) struct Pooled {
    messages: Option<Messages>,
    pool: Pool,
}

impl Deref for Pooled {
    type Target = Messages;

    fn deref(&self) -> &Messages {
        self.messages.as_ref().expect("there until it is dropped")
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Messages {
        self.messages.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        // One that can't be stopped isn't kept.
        if let Some(mut messages) = self.messages.take()
            && messages.seek(0, 0).is_ok()
            && self.pool.lock().len() < IDLE_MAX
        {
            self.pool.lock().push(messages);
        }
    }
}

#[cfg(all(test, feature = "kafka-tls"))]
mod tests {
    use super::*;
    use crate::log::{KafkaSasl, KafkaTls};

    #[test]
    fn this_build_has_tls_and_scram() {
        for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
            let sasl = KafkaSasl { mechanism: mechanism.into(), user: "u".into(), password: "p".into() };
            let address = KafkaAddress {
                brokers: vec!["127.0.0.1:1".into()],
                topic: "t".into(),
                tls: Some(KafkaTls::default()),
                sasl: Some(sasl),
            };
            assert!(Messages::new(&address, 0).is_ok(), "{mechanism}");
        }
    }
}

//! Messages to one partition, by one idempotent producer: handed over in order, and what became of each. It never tries again
//! by itself: an error means that a message may stand in the log or not.

use super::client::{MESSAGE_BYTES, PATIENCE, Quiet, why};
use super::header::{Header, NAME};
use crate::log::{KafkaAddress, LogError};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header as RecordHeader, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, PurgeConfig, ThreadedProducer};
use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::time::Duration;

/// How long the library tries to deliver. Longer than a session time-out and an election among the brokers.
const DELIVERY: Duration = Duration::from_secs(30);

/// What the brokers said of a message: its offset, `None` where they gave none, or why it is unknown.
pub(super) type Delivered = Result<Option<u64>, String>;

struct Reports(Channel<(usize, Delivered)>);

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        Quiet.log(level, facility, message);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, tag: usize) {
        let delivered = match result {
            Ok(message) => Ok(u64::try_from(message.offset()).ok()),
            Err((error, _)) => Err(why(error)),
        };
        // The receiver lives as long as the producer.
        let _ = self.0.send((tag, delivered));
    }
}

/// The producer of a partition's owner.
pub(super) struct Sender {
    topic: String,
    partition: i32,
    producer: ThreadedProducer<Reports>,
    reports: Receiver<(usize, Delivered)>,
}

impl Sender {
    pub(super) fn new(address: &KafkaAddress, partition: i32) -> Result<Self, LogError> {
        let (sender, reports) = channel();
        let producer: ThreadedProducer<Reports> = address
            .client()
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.timeout.ms", DELIVERY.as_millis().to_string())
            .set("message.max.bytes", MESSAGE_BYTES.to_string())
            // A topic that is gone is told sooner than by the delivery time-out.
            .set("topic.metadata.propagation.max.ms", "10000")
            .set("queue.buffering.max.ms", "0")
            .create_with_context(Reports(sender))
            .map_err(address.failed("make a producer of"))?;
        // Else its first message waits half a second for this.
        let known = producer.client().fetch_metadata(Some(&address.topic), PATIENCE);
        known.map_err(address.failed("look for"))?;
        Ok(Self { topic: address.topic.clone(), partition, producer, reports })
    }

    /// Hands a message over; its report comes under `tag`.
    pub(super) fn send(&self, tag: usize, header: &Header, key: Option<&str>, entry: &[u8]) -> Result<(), String> {
        let header = header.encode();
        let headers = OwnedHeaders::new_with_capacity(1).insert(RecordHeader { key: NAME, value: Some(&header) });
        let mut record = BaseRecord::<str, [u8], usize>::with_opaque_to(&self.topic, tag)
            .partition(self.partition)
            .payload(entry)
            .headers(headers);
        record.key = key;
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    record = back;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((error, _)) => return Err(why(&error)),
            }
        }
    }

    /// Waits for a report; gives all that there are.
    pub(super) fn reports(&self) -> Vec<(usize, Delivered)> {
        let first = self.reports.recv_timeout(DELIVERY);
        first.into_iter().chain(self.reports.try_iter()).collect()
    }

    /// One message and its offset.
    pub(super) fn send_one(&self, header: &Header, entry: &[u8]) -> Result<u64, String> {
        self.send(0, header, None, entry)?;
        loop {
            if let Some((_, delivered)) = self.reports().pop() {
                return delivered?.ok_or_else(|| "it was reported without an offset".into());
            }
        }
    }

    /// What still waits never leaves.
    pub(super) fn give_up(&self) {
        self.producer.purge(PurgeConfig::default().queue().inflight());
    }
}

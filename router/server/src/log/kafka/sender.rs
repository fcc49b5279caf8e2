//! Messages to a partition, by the one idempotent producer of a router: handed over in order, and what became of each. It never
//! tries again by itself: an error means that a message may stand in the log or not.

use super::client::{self, MESSAGE_BYTES, PATIENCE, Quiet, why};
use crate::log::{KafkaAddress, LogError};
use atp_core::partition::{Header, NAME};
use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header as RecordHeader, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender as Channel, channel};
use std::time::Duration;

/// How long the library tries to deliver. Longer than a session time-out and an election among the brokers.
const DELIVERY: Duration = Duration::from_secs(30);

/// What the brokers said of a message: its offset, `None` where they gave none, or why it is unknown.
pub(super) type Delivered = Result<Option<u64>, String>;

/// Where the report of a message goes.
struct Tag {
    reports: Channel<(usize, Delivered)>,
    index: usize,
}

struct Reports;

impl ClientContext for Reports {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        Quiet.log(level, facility, message);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<Tag>;

    fn delivery(&self, result: &DeliveryResult<'_>, tag: Box<Tag>) {
        let delivered = match result {
            Ok(message) => Ok(u64::try_from(message.offset()).ok()),
            Err((error, _)) => Err(why(error)),
        };
        // An owner that has stepped down asks for no report.
        let _ = tag.reports.send((tag.index, delivered));
    }
}

/// The producer of a router.
pub(super) struct Producing {
    address: KafkaAddress,
    producer: ThreadedProducer<Reports>,
}

impl Producing {
    pub(super) fn new(address: &KafkaAddress) -> Result<Self, LogError> {
        let producer: ThreadedProducer<Reports> = address
            .client()
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("message.timeout.ms", DELIVERY.as_millis().to_string())
            .set("message.max.bytes", MESSAGE_BYTES.to_string())
            // A topic that is gone is told sooner than by the delivery time-out.
            .set("topic.metadata.propagation.max.ms", "10000")
            .set("queue.buffering.max.ms", "0")
            .create_with_context(Reports)
            .map_err(address.failed("make a producer of"))?;
        // Else its first message waits half a second for this.
        let known = producer.client().fetch_metadata(Some(&address.topic), PATIENCE);
        known.map_err(address.failed("look for"))?;
        Ok(Self { address: address.clone(), producer })
    }

    /// It will never send anything again.
    pub(super) fn is_dead(&self) -> bool {
        self.producer.client().fatal_error().is_some()
    }
}

/// The messages of one partition's owner.
pub(super) struct Sender {
    by: Arc<Producing>,
    partition: i32,
    channel: Channel<(usize, Delivered)>,
    reports: Receiver<(usize, Delivered)>,
}

impl Sender {
    pub(super) fn new(by: Arc<Producing>, partition: i32) -> Self {
        let (channel, reports) = channel();
        Self { by, partition, channel, reports }
    }

    /// As of [`client::ends`].
    pub(super) fn ends(&self, patience: Duration) -> Result<(u64, u64), LogError> {
        client::ends(self.by.producer.client(), &self.by.address, self.partition, patience)
    }

    /// Hands a message over; its report comes under `index`.
    pub(super) fn send(&self, index: usize, header: &Header, key: Option<&str>, entry: &[u8]) -> Result<(), String> {
        let header = header.encode();
        let headers = OwnedHeaders::new_with_capacity(1).insert(RecordHeader { key: NAME, value: Some(&header) });
        let tag = Box::new(Tag { reports: self.channel.clone(), index });
        let mut record = BaseRecord::<str, [u8], Box<Tag>>::with_opaque_to(&self.by.address.topic, tag)
            .partition(self.partition)
            .payload(entry)
            .headers(headers);
        record.key = key;
        loop {
            match self.by.producer.send(record) {
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
        self.send_one_keyed(header, None, entry)
    }

    /// One message with a key, and its offset.
    pub(super) fn send_one_keyed(&self, header: &Header, key: Option<&str>, entry: &[u8]) -> Result<u64, String> {
        self.send(0, header, key, entry)?;
        loop {
            if let Some((_, delivered)) = self.reports().pop() {
                return delivered?.ok_or_else(|| "it was reported without an offset".into());
            }
        }
    }
}

//! A log to read, wherever it lies: entries with their positions, in order. Takes no lock and writes nothing.

#[cfg(feature = "kafka")]
use super::kafka::KafkaSource;
use super::{KafkaAddress, LogError, Reader};
use bytes::Bytes;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Entries with their positions. An error is the last item.
pub type Entries = Box<dyn Iterator<Item = Result<(u64, Bytes), LogError>> + Send>;

/// Where a log is read from; written as `local:DIR` or `kafka://HOST:PORT/TOPIC`.
#[derive(Clone, Debug)]
pub enum Source {
    /// The directory of the segments.
    Local(PathBuf),
    #[cfg(feature = "kafka")]
    Kafka(KafkaSource),
}

impl Source {
    /// A Kafka log's partition of this shard.
    ///
    /// # Errors
    /// This build has no Kafka.
    #[cfg_attr(not(feature = "kafka"), expect(unused_variables))]
    pub fn kafka(address: KafkaAddress, shard: u32) -> Result<Self, String> {
        #[cfg(feature = "kafka")]
        return Ok(Self::Kafka(KafkaSource::new(address, shard)));
        #[cfg(not(feature = "kafka"))]
        Err("this build has no Kafka; build it with `--features kafka`".into())
    }

    /// The entries from position `from` (0 and 1 are the beginning) to the end of the log.
    ///
    /// # Errors
    /// There is no log, or it can't be reached.
    pub fn entries(&self, from: u64) -> Result<Entries, LogError> {
        match self {
            Self::Local(dir) => Ok(Box::new(Reader::open(dir)?.entries(from))),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => Ok(Box::new(kafka.entries(from, None)?)),
        }
    }

    /// The entries `from..=upto`, which are known to be durable: it is an error if the log ends before.
    ///
    /// # Errors
    /// As `entries`.
    pub fn entries_between(&self, from: u64, upto: u64) -> Result<Entries, LogError> {
        match self {
            Self::Local(dir) => Ok(Box::new(Reader::open(dir)?.entries_between(from, upto))),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => Ok(Box::new(kafka.entries(from, Some(upto))?)),
        }
    }

    /// The position of the first piece of the newest whole checkpoint that can be found without reading the log.
    ///
    /// # Errors
    /// I/O, corruption on the way.
    pub fn newest_checkpoint(&self) -> Result<Option<u64>, LogError> {
        match self {
            Self::Local(dir) => Reader::open(dir)?.newest_checkpoint(),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => Ok(kafka.newest_checkpoint()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(dir) => write!(f, "local:{}", dir.display()),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.address().fmt(f),
        }
    }
}

impl FromStr for Source {
    type Err = String;

    /// For `local:` a data directory stands for the log in it.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("local:") {
            Some(dir) if !dir.is_empty() => {
                let inner = PathBuf::from(dir).join("log");
                Ok(Self::Local(if inner.is_dir() { inner } else { dir.into() }))
            }
            None if text.starts_with("kafka:") => Self::kafka(text.parse()?, 0),
            _ => Err("write local:DIR, the directory of the log's segments, or kafka://HOST:PORT/TOPIC".into()),
        }
    }
}

//! A log to read, wherever it lies: entries with their positions, in order. Takes no lock and writes nothing.

#[cfg(feature = "kafka")]
use super::kafka::KafkaSource;
use super::{Beginning, KafkaAddress, LogError, Reader};
use bytes::Bytes;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Entries with their positions. An error is the last item.
pub type Entries = Box<dyn Iterator<Item = Result<(u64, Bytes), LogError>> + Send>;

/// The entries of several shards: shard, position, bytes. Of each shard they come in order. An error is the last item.
pub type AllEntries = Box<dyn Iterator<Item = Result<(u32, u64, Bytes), LogError>> + Send>;

/// One shard of a log that is read. Written as `local:DIR` or `kafka://HOST:PORT/TOPIC`, which is the log; read from that it is
/// shard 0.
#[derive(Clone, Debug)]
pub enum Source {
    Local {
        /// The directory of the segments.
        dir: PathBuf,
        shard: u32,
    },
    #[cfg(feature = "kafka")]
    Kafka(KafkaSource),
}

impl Source {
    /// Shard 0 of the log in this directory.
    #[must_use]
    pub fn local(dir: impl Into<PathBuf>) -> Self {
        Self::Local { dir: dir.into(), shard: 0 }
    }

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

    /// The same log's shard `shard`.
    #[must_use]
    pub fn shard(&self, shard: u32) -> Self {
        match self {
            Self::Local { dir, .. } => Self::Local { dir: dir.clone(), shard },
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => Self::Kafka(kafka.shard(shard)),
        }
    }

    /// Which shard of the log this is.
    #[must_use]
    pub const fn number(&self) -> u32 {
        match self {
            Self::Local { shard, .. } => *shard,
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.number(),
        }
    }

    /// How many shards the log has.
    ///
    /// # Errors
    /// There is no log, or it can't be reached.
    pub fn shards(&self) -> Result<u32, LogError> {
        match self {
            Self::Local { dir, .. } => Reader::open(dir)?.shards(),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.shards(),
        }
    }

    /// Where this shard begins since the log was pruned; `None`: at its first entry.
    ///
    /// # Errors
    /// There is no log, or it can't be reached; `NotThisLog` where its beginning is gone and nobody pruned it.
    pub fn beginning(&self) -> Result<Option<Beginning>, LogError> {
        match self {
            Self::Local { dir, shard } => Ok(Reader::open(dir)?.shard(*shard).beginning()),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.beginning(),
        }
    }

    /// The entries from position `from` (0 and 1 are the beginning; of a pruned log what is left of it) to the end of the log.
    ///
    /// # Errors
    /// There is no log, or it can't be reached.
    pub fn entries(&self, from: u64) -> Result<Entries, LogError> {
        match self {
            Self::Local { dir, shard } => Ok(Box::new(Reader::open(dir)?.shard(*shard).entries(from))),
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
            Self::Local { dir, shard } => Ok(Box::new(Reader::open(dir)?.shard(*shard).entries_between(from, upto))),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => Ok(Box::new(kafka.entries(from, Some(upto))?)),
        }
    }

    /// The entries of all shards, of each from its position in `from` to its end: a local log is read once for all of them, in
    /// the order in which it was written; partitions one after the other. Whichever shard this is.
    ///
    /// # Errors
    /// As `entries`; `NoShard` where `from` has more shards than the log.
    pub fn all(&self, from: Vec<u64>) -> Result<AllEntries, LogError> {
        match self {
            Self::Local { dir, .. } => Ok(Box::new(Reader::open(dir)?.all(from)?)),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => {
                let kafka = kafka.clone();
                Ok(Box::new((0..).zip(from).flat_map(move |(shard, from)| {
                    let (entries, error) = match kafka.shard(shard).entries(from, None) {
                        Ok(entries) => (Some(entries), None),
                        Err(error) => (None, Some(Err(error))),
                    };
                    let entries = entries.into_iter().flatten();
                    error.into_iter().chain(entries.map(move |item| item.map(|(at, entry)| (shard, at, entry))))
                })))
            }
        }
    }

    /// A mark that changes with the log's end, where it can be had without reading.
    ///
    /// # Errors
    /// As `entries`.
    pub(super) fn end(&self) -> Result<Option<u64>, LogError> {
        match self {
            Self::Local { .. } => Ok(None),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.end().map(Some),
        }
    }

    /// The position of the first piece of the newest checkpoint that can be found without reading the log.
    ///
    /// # Errors
    /// I/O, corruption on the way.
    pub fn newest_checkpoint(&self) -> Result<Option<u64>, LogError> {
        match self {
            Self::Local { dir, shard } => Reader::open(dir)?.shard(*shard).newest_checkpoint(),
            #[cfg(feature = "kafka")]
            Self::Kafka(kafka) => kafka.newest_checkpoint(),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { dir, .. } => write!(f, "local:{}", dir.display()),
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
                Ok(Self::local(if inner.is_dir() { inner } else { dir.into() }))
            }
            None if text.starts_with("kafka:") => Self::kafka(text.parse()?, 0),
            _ => Err("write local:DIR, the directory of the log's segments, or kafka://HOST:PORT/TOPIC".into()),
        }
    }
}

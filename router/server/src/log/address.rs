//! Where a Kafka log is and how its brokers are reached: plain values, checked where they are read. Opens nothing.

use std::fmt;

/// Brokers and a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KafkaAddress {
    /// `host:port` of some of the brokers.
    pub brokers: Vec<String>,
    pub topic: String,
    pub tls: Option<KafkaTls>,
    pub sasl: Option<KafkaSasl>,
}

/// TLS to the brokers. Paths of PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KafkaTls {
    /// Who signs the brokers' certificates; `None`: the system's authorities.
    pub ca: Option<String>,
    /// Certificate and key of this client.
    pub client: Option<(String, String)>,
}

/// SCRAM credentials.
#[derive(Clone, PartialEq, Eq)]
pub struct KafkaSasl {
    /// `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    pub mechanism: String,
    pub user: String,
    pub password: String,
}

impl fmt::Debug for KafkaSasl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.mechanism, self.user)
    }
}

impl fmt::Display for KafkaAddress {
    /// `kafka://HOST:PORT,.../TOPIC`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kafka://{}/{}", self.brokers.join(","), self.topic)
    }
}

impl std::str::FromStr for KafkaAddress {
    type Err = String;

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Self, String> {
        let (brokers, topic) = text
            .strip_prefix("kafka://")
            .and_then(|rest| rest.split_once('/'))
            .ok_or("write kafka://HOST:PORT/TOPIC, with commas between several HOST:PORT")?;
        let brokers: Vec<String> = brokers.split(',').map(str::to_owned).collect();
        for broker in &brokers {
            check_broker(broker)?;
        }
        check_topic(topic)?;
        Ok(Self { brokers, topic: topic.into(), tls: None, sasl: None })
    }
}

/// # Errors
/// What is wrong with it, and how it is written.
pub fn check_broker(broker: &str) -> Result<(), String> {
    let port = broker.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse().ok());
    match port {
        Some(1_u16..) if !broker.contains([' ', '/', ',']) => Ok(()),
        _ => Err(format!("`{broker}` is no HOST:PORT like 127.0.0.1:9092")),
    }
}

/// # Errors
/// What is wrong with it, and how it is written.
pub fn check_topic(topic: &str) -> Result<(), String> {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match topic.len() {
        1..=249 if topic.chars().all(known) && !matches!(topic, "." | "..") => Ok(()),
        _ => Err(format!("`{topic}` is no topic: write 1 to 249 of A-Za-z0-9._-")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_reads_back() {
        for text in ["kafka://127.0.0.1:9092/atp.frames", "kafka://a:1,[::1]:65535/t"] {
            assert_eq!(text.parse::<KafkaAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_named() {
        for (text, word) in [
            ("127.0.0.1:9092/t", "kafka://"),
            ("kafka://127.0.0.1:9092", "TOPIC"),
            ("kafka:///t", "HOST:PORT"),
            ("kafka://a:0/t", "`a:0`"),
            ("kafka://a:1,/t", "``"),
            ("kafka://a:65536/t", "`a:65536`"),
            ("kafka://a:1/", "no topic"),
            ("kafka://a:1/x y", "`x y`"),
        ] {
            let error = text.parse::<KafkaAddress>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}

//! `log.kafka`: the brokers, the topic, and how the brokers know us.

use super::read::{Read, Walk};
use super::{Config, KafkaPlace, LogPlace, Problem};
use crate::log::{KafkaAddress, KafkaSasl, KafkaTls, check_broker, check_topic};

impl Walk<'_> {
    pub(super) fn kafka(&mut self, config: &mut Config) {
        if self.opt_text("log.kind").as_deref() != Some("kafka") {
            return;
        }
        let brokers = self.opt_texts("log.kafka.brokers").unwrap_or_default();
        let topic = self.opt_text("log.kafka.topic").unwrap_or_default();
        if brokers.is_empty() {
            let mark = self.mark("log.kind");
            self.problem(mark, "log.kafka.brokers", "is empty", "name some brokers like [127.0.0.1:9092]");
        }
        let wrong: Vec<String> = brokers.iter().filter_map(|broker| check_broker(broker).err()).collect();
        for message in wrong {
            let mark = self.mark("log.kafka.brokers");
            self.problem(mark, "log.kafka.brokers", message, "write HOST:PORT of each broker");
        }
        if let Err(message) = check_topic(&topic) {
            self.problem(self.mark("log.kafka.topic"), "log.kafka.topic", message, "leave it out, or choose another");
        }
        let single_broker = self.value("log.kafka.single_broker") == Some(Read::Bool(true));
        let (tls, sasl) = (self.kafka_tls(), self.kafka_sasl());
        let address = KafkaAddress { brokers, topic, tls, sasl };
        config.log = LogPlace::Kafka(KafkaPlace { address, single_broker });
    }

    fn kafka_tls(&mut self) -> Option<KafkaTls> {
        let text = |name: &str| self.opt_text(&format!("log.kafka.tls.{name}"));
        let (ca, certificate, key) = (text("ca"), text("cert"), text("key"));
        for (name, path) in [("ca", &ca), ("cert", &certificate), ("key", &key)] {
            if let Some(path) = path
                && let Err(error) = std::fs::File::open(path)
            {
                let field = format!("log.kafka.tls.{name}");
                let message = format!("cannot read {path}: {error}");
                self.problem(self.mark(&field), &field, message, "check the path and its permissions");
            }
        }
        let on = self.value("log.kafka.tls.on") == Some(Read::Bool(true));
        let any = ca.is_some() || certificate.is_some() || key.is_some();
        if any && !on {
            let mark = self.mark("log.kafka.tls");
            self.problem(mark, "log.kafka.tls.on", "isn't true, but other keys of it are set", "set on: true");
        }
        let client = match (certificate, key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                let mark = self.mark("log.kafka.tls");
                self.problem(mark, "log.kafka.tls.cert", "cert and key go together", "give both or none");
                None
            }
        };
        on.then_some(KafkaTls { ca, client })
    }

    fn kafka_sasl(&mut self) -> Option<KafkaSasl> {
        let text = |name: &str| self.opt_text(&format!("log.kafka.sasl.{name}"));
        let (user, password) = (text("user"), text("password"));
        let mechanism = text("mechanism").unwrap_or_default().to_ascii_uppercase();
        match (user, password) {
            (Some(user), Some(password)) => Some(KafkaSasl { mechanism, user, password }),
            (None, None) => None,
            _ => {
                let mark = self.mark("log.kafka.sasl");
                self.problem(mark, "log.kafka.sasl.user", "user and password go together", "give both or none");
                None
            }
        }
    }
}

/// What this build can't do.
pub(super) fn problems(place: &KafkaPlace, problems: &mut Vec<Problem>) {
    if cfg!(not(feature = "kafka")) {
        let fix = "use log.kind: local, or a build with `--features kafka`";
        problems.push(Problem::nowhere("log.kind", "this build has no Kafka", fix));
    }
    let secured = [("log.kafka.tls", place.address.tls.is_some()), ("log.kafka.sasl", place.address.sasl.is_some())];
    for (field, _) in secured.into_iter().filter(|(_, set)| *set && cfg!(not(feature = "kafka-tls"))) {
        let fix = "leave it out, or use a build with `--features kafka-tls`";
        problems.push(Problem::nowhere(field, "this build has neither TLS nor SCRAM to Kafka", fix));
    }
}

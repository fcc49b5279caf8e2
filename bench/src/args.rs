//! The flags of `atp bench`, with their bounds.

use clap::{Parser, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Load a router on loopback and measure it.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "atp bench",
    after_help = "Examples:\n  atp bench relay                          1 KiB chunks a second beside a bare relay\n  atp bench tasks --rates 500,2000 --seconds 5\n  atp bench idle --streams 20000\n  atp bench recover --frames 1000000 --streams 10000\n  atp bench fleet --kafka 127.0.0.1:9092 --single-broker --redis redis://127.0.0.1:6379\n  atp bench relay --json --plot relay.svg\n  atp bench budget                         finished answers and overshoot of four policies\n  atp bench budget --trace AzureLLMInferenceTrace_conv.csv --rows 5000 --plot budget.svg\n  atp bench budget --trace BurstGPT_1.csv --speed 20 --budgets 25,50"
)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, value_name = "SCENARIO")]
    pub scenario: Scenario,
    /// Settings of the router to measure
    #[arg(
        long,
        value_enum,
        conflicts_with = "router",
        value_delimiter = ',',
        value_name = "LINES",
        default_value = "off,on,durable"
    )]
    pub lines: Vec<Line>,
    /// Seconds of measuring per line (tasks: per line and rate)
    #[arg(long, value_name = "S", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub seconds: u64,
    /// The seconds of `relay` and `fleet` are split over this many rounds; each runs every line, so that noise hits all alike
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    pub rounds: u64,
    /// Streams at once [default: relay, fleet 256, idle 10000, recover 2000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub streams: Option<u64>,
    /// Connections of clients and as many of agents
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    pub connections: u64,
    /// Chunks in the log that is recovered
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1_000..=1_000_000))]
    pub frames: u64,
    /// Bytes of a chunk's JSON document
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..=65_536))]
    pub chunk_bytes: u64,
    /// Tasks a second, open loop
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_value = "500,1000,2000,4000", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub rates: Vec<u64>,
    /// Measure the router at this native address, as it is configured, instead of starting routers
    #[arg(long, value_name = "HOST:PORT")]
    pub router: Option<SocketAddr>,
    /// The process of `--router`, for CPU and memory
    #[arg(long, value_name = "PID", requires = "router")]
    pub pid: Option<u32>,
    /// Where the routers keep their logs while they are measured [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Arrivals to replay under `budget`: CSV of the Azure LLM inference traces or of BurstGPT [default: a generated sample]
    #[arg(long, value_name = "FILE.csv")]
    pub trace: Option<PathBuf>,
    /// Make another sample of this seed instead of the shipped one
    #[arg(long, value_name = "N", conflicts_with = "trace")]
    pub seed: Option<u64>,
    /// Answered rows of the trace that are read; the first tenth (20 at least) is history to estimate from
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(40..=100_000))]
    pub rows: u64,
    /// Budgets in percent of what the whole replay costs
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_value = "10,25,50,75,90", value_parser = clap::value_parser!(u64).range(1..=100))]
    pub budgets: Vec<u64>,
    /// Calls of one model that may run at once under `budget`
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub parallel: u64,
    /// Arrivals of the trace come so many times as fast
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub speed: u64,
    /// Brokers for the routers of `fleet`; each line leaves a topic `bench.*` there
    #[arg(long, value_name = "HOST:PORT,...", env = "ATP_KAFKA")]
    pub kafka: Option<String>,
    /// One broker is enough
    #[arg(long)]
    pub single_broker: bool,
    /// The store for the routers of `fleet`; each line leaves keys `bench.*` there, until they lapse
    #[arg(long, value_name = "URL", env = "ATP_REDIS_URL")]
    pub redis: Option<String>,
    /// `fleet` goes from one router to so many
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=8))]
    pub routers: u64,
    /// Write the figures as a plot
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// One JSON document on stdout and nothing else
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// 1 KiB chunks of long calls, from agents through the router to clients
    Relay,
    /// Whole small tasks of one call at fixed rates: latency from the intended start to the bill
    Tasks,
    /// Memory per stream that waits
    Idle,
    /// A killed router's start on a log with running streams: time and memory, with checkpoints and without
    Recover,
    /// 1, 2, 3 routers on one log in Kafka beside one on a local log: frames a second, CPU per frame
    Fleet,
    /// A trace of arrivals against one budget under four policies, in virtual time
    Budget,
    /// The bare relay that `relay` starts beside the router
    #[value(hide = true)]
    BareRelay,
}

/// What the measured router has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Line {
    /// Accounts and windows without limits; log `async`
    Off,
    /// Limits, so that reservations and slices are checked; log `async`
    On,
    /// Limits; log `fsync`
    Durable,
    /// Of the router at `--router`
    #[value(skip)]
    Own,
}

impl Line {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Off => "limits off",
            Self::On => "reservations on",
            Self::Durable => "durable",
            Self::Own => "as configured",
        }
    }

    pub(crate) const fn has_limits(self) -> bool {
        !matches!(self, Self::Off)
    }

    pub(crate) const fn durability(self) -> &'static str {
        match self {
            Self::Off | Self::On => "async",
            Self::Durable | Self::Own => "fsync",
        }
    }
}

impl BenchArgs {
    /// # Errors
    /// Names the flag that doesn't go with the others.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.lines.is_empty(), "--lines: name at least one of off, on, durable");
        anyhow::ensure!(!self.rates.is_empty(), "--rates: name at least one rate");
        anyhow::ensure!(!self.budgets.is_empty(), "--budgets: name at least one percentage");
        anyhow::ensure!(
            self.scenario != Scenario::Recover
                || (self.router.is_none() && self.plot.is_none() && self.streams() <= self.frames),
            "recover kills routers of its own (no --router), draws nothing (no --plot), and each stream has a frame (--streams up to --frames)"
        );
        anyhow::ensure!(
            self.scenario != Scenario::Fleet || self.router.is_none() && self.kafka.is_some() && self.redis.is_some(),
            "fleet starts routers of its own (no --router): name their brokers with --kafka and their store with --redis"
        );
        let per_connection = self.streams().div_ceil(self.connections);
        anyhow::ensure!(
            matches!(self.scenario, Scenario::Idle | Scenario::Recover)
                || per_connection <= crate::client::STREAMS_PER_CONNECTION as u64,
            "--streams: {per_connection} on each connection, at most {} go; give more --connections",
            crate::client::STREAMS_PER_CONNECTION
        );
        Ok(())
    }

    /// A router that runs already is measured once a round: as it is configured.
    pub(crate) fn lines(&self) -> &[Line] {
        if self.router.is_some() { &[Line::Own] } else { &self.lines }
    }

    pub(crate) fn streams(&self) -> u64 {
        self.streams.unwrap_or(match self.scenario {
            Scenario::Idle => 10_000,
            Scenario::Recover => 2_000,
            Scenario::Relay | Scenario::Tasks | Scenario::Fleet | Scenario::Budget | Scenario::BareRelay => 256,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<BenchArgs, clap::Error> {
        BenchArgs::try_parse_from(std::iter::once("atp bench").chain(args.iter().copied()))
    }

    #[test]
    fn bounds_are_kept() {
        assert!(parsed(&["relay", "--seconds", "600"]).is_ok() && parsed(&["relay", "--seconds", "601"]).is_err());
        assert!(parsed(&["relay", "--streams", "0"]).is_err());
        assert!(parsed(&["relay", "--pid", "1"]).is_err(), "a process without its router");
        let args = parsed(&["relay", "--streams", "1025", "--connections", "1"]).expect("parses");
        assert!(args.check().is_err());
        assert!(parsed(&["recover", "--router", "127.0.0.1:1"]).expect("parses").check().is_err());
        assert!(parsed(&["recover", "--frames", "1000", "--streams", "1001"]).expect("parses").check().is_err());
        let bare = parsed(&["fleet"]).expect("parses");
        let (kafka, redis) = (Some("127.0.0.1:1".to_owned()), Some("redis://127.0.0.1:1".to_owned()));
        assert!(BenchArgs { kafka: None, ..bare.clone() }.check().is_err(), "no brokers");
        assert!(BenchArgs { kafka, redis, ..bare }.check().is_ok());
        assert!(parsed(&["fleet", "--routers", "9"]).is_err());
        let args = parsed(&["relay", "--streams", "900", "--connections", "1"]).expect("parses");
        assert!(args.check().is_ok());
    }

    #[test]
    fn lists_are_split_at_commas() {
        let args = parsed(&["tasks", "--lines", "off,durable", "--rates", "1,20"]).expect("parses");
        assert_eq!((args.lines(), &args.rates[..]), (&[Line::Off, Line::Durable][..], &[1, 20][..]));
        let own = ["relay", "--router", "127.0.0.1:1"];
        assert_eq!(parsed(&own).expect("parses").lines(), [Line::Own]);
        assert!(parsed(&[&own[..], &["--lines", "off"]].concat()).is_err(), "it has settings of its own");
    }
}

//! Real brokers for black-box tests: `tests/parts/kafka.sh`, and the lines that let a router keep its log there.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

/// Brokers that run until the last process that asked for them has ended.
pub struct Brokers {
    addresses: String,
    count: u32,
}

impl Brokers {
    /// Starts one broker, or takes the one that runs; or three with a controller of their own, for this process alone.
    ///
    /// # Panics
    /// When they don't start.
    #[must_use]
    pub fn start(count: u32) -> Self {
        let owner = std::process::id().to_string();
        let lines = match count {
            1 => script(&["start", "--owner", &owner]),
            _ => script(&["start", "--brokers", &count.to_string(), "--set", &owner, "--owner", &owner]),
        };
        let addresses = lines.lines().find_map(|line| line.strip_prefix("ATP_KAFKA=")).expect("addresses");
        Self { addresses: addresses.into(), count }
    }

    /// The lines of a configuration whose log is a new topic here.
    #[must_use]
    pub fn log(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let topic = format!("run.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let single = self.count == 1;
        format!(
            "log: {{kind: kafka, kafka: {{brokers: [{}], topic: {topic}, single_broker: {single}}}}}",
            self.addresses.replace(',', ", ")
        )
    }

    /// SIGKILL for one of three, from 1.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn kill(&self, broker: u32) {
        script(&["kill", &broker.to_string(), "--set", &std::process::id().to_string()]);
    }

    /// Starts it again with its data, and waits until it serves.
    ///
    /// # Panics
    /// When it doesn't.
    pub fn revive(&self, broker: u32) {
        script(&["revive", &broker.to_string(), "--set", &std::process::id().to_string()]);
    }
}

fn script(args: &[&str]) -> String {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("parts/kafka.sh");
    let output = Command::new(&script).args(args).output().expect("a shell");
    assert!(output.status.success(), "{} {args:?}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

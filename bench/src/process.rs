//! CPU and memory of a process, as /proc has them (Linux). Only reads.

use anyhow::Context;
use std::fs;

/// Ticks per second of the CPU times in /proc; fixed by Linux for user space.
const TICKS: f64 = 100.0;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_seconds: f64,
    pub(crate) rss_bytes: u64,
    pub(crate) peak_rss_bytes: u64,
}

/// # Errors
/// When the process is gone or this isn't Linux.
pub(crate) fn usage(pid: u32) -> anyhow::Result<Usage> {
    let read = |file: &str| {
        let path = format!("/proc/{pid}/{file}");
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    parse(&read("stat")?, &read("status")?).with_context(|| format!("/proc/{pid} has another form than expected"))
}

fn parse(stat: &str, status: &str) -> Option<Usage> {
    // The name in parentheses may hold spaces; user and system time are fields 14 and 15, state is field 3.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let user: f64 = fields.nth(11)?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    let kib = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse::<u64>().ok()
    };
    Some(Usage {
        cpu_seconds: (user + system) / TICKS,
        rss_bytes: kib("VmRSS")? * 1024,
        peak_rss_bytes: kib("VmHWM")? * 1024,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read() {
        let stat = "42 (a b) c) S 1 42 42 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 3 0 1 1 1 1";
        let status = "Name:\ta\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n";
        let usage = parse(stat, status).expect("parses");
        assert_eq!((usage.rss_bytes, usage.peak_rss_bytes), (1_048_576, 2_097_152));
        assert!((usage.cpu_seconds - 3.0).abs() < 1e-9);
        assert!(parse("42 (a) S 1", status).is_none());
    }
}

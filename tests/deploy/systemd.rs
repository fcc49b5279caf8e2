//! `ops/systemd/atp.service`: commands that the binary has, and time enough for a router that drains.

use crate::read;
use atp_tests::blackbox::atp;

#[test]
fn the_unit_runs_commands_that_there_are() {
    let unit = read("ops/systemd/atp.service");
    let value = |key: &str| unit.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('=')).unwrap_or_default();
    for key in ["ExecStartPre", "ExecStart"] {
        let mut words = value(key).split_whitespace();
        assert_eq!(words.next(), Some("/usr/local/bin/atp"), "{key}");
        let command = words.next().expect("a command");
        let help = atp::run(&[command, "--help"]);
        assert!(help.status.success(), "{key}: atp {command}");
        let help = String::from_utf8_lossy(&help.stdout);
        words.filter(|w| w.starts_with("--")).for_each(|flag| assert!(help.contains(flag), "atp {command} {flag}"));
    }
    // Exit codes of a faulty configuration: the start's and the check's.
    assert_eq!(value("RestartPreventExitStatus"), "2 5");
    let deadline = read("docs/configuration.md");
    let deadline = deadline.lines().find(|l| l.starts_with("| `tasks.deadline`")).expect("documented");
    let seconds: u64 =
        deadline.split('`').nth(3).and_then(|d| d.strip_suffix('s')).and_then(|d| d.parse().ok()).expect("s");
    assert!(value("TimeoutStopSec").parse::<u64>().expect("seconds") > seconds, "running streams end first");
}

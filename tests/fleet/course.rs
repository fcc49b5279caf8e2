//! What happened when, and how long clients were told nothing meanwhile.

use atp_tests::blackbox::crowd::{By, Seen};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// The faults of a run in their order.
#[derive(Default)]
pub(crate) struct Course(Vec<(Instant, String)>);

impl Course {
    /// From now on this happens, until the next.
    pub(crate) fn now(&mut self, what: impl Into<String>) {
        self.0.push((Instant::now(), what.into()));
    }

    /// Prints the pause of each task: the longest time in which its client was told nothing, without `script`, which its agent may
    /// take between two words. It counts for what had begun last before it ended: that is what ended it or made it longer.
    pub(crate) fn print_pauses(&self, seen: &[Seen], script: Duration, elsewhere: &str) {
        println!(
            "pause of a client = the longest time in which it got no message of its task (from the moment it began to ask, \
             its dials included, to the bill; by HTTP: no answer about it), less the {} ms that the agent's script takes \
             between two words; ms",
            script.as_millis()
        );
        let mut rows: BTreeMap<(usize, String), Vec<Duration>> = BTreeMap::new();
        for seen in seen {
            let (since, length) = seen.longest_silence();
            let pause = length.saturating_sub(script);
            let begun = self.0.iter().rposition(|(at, _)| *at <= since + length);
            let what = begun.map_or("before all", |n| &*self.0[n].1);
            let by = match seen.by {
                By::Sdk => "by the SDK",
                By::Frames => "by frames",
                By::Http => "by HTTP",
            };
            // Who waits for this agent waits for its only router.
            let waits = seen.bill.calls.iter().any(|call| call.agent.as_str() == elsewhere);
            let mut note = |n: usize, name: &str| rows.entry((n, name.into())).or_default().push(pause);
            note(begun.map_or(0, |n| n + 1), what);
            note(usize::MAX - 1, by);
            note(usize::MAX, if waits { "all of the agent that knows one router" } else { "all of the other agents" });
        }
        println!("{:>6} {:>6} {:>6} {:>6}", "tasks", "p50", "p99", "max");
        for ((_, what), mut pauses) in rows {
            pauses.sort();
            let at = |percent: usize| pauses[(pauses.len() - 1) * percent / 100].as_millis();
            println!("{:>6} {:>6} {:>6} {:>6}  {what}", pauses.len(), at(50), at(99), at(100));
        }
    }
}

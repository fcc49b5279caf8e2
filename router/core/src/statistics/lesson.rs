//! What shards teach each other: the lesson of one record, and sums over several shards. Never part of a fold.

use super::{Day, RUNS_KEPT, Row, Run, Statistics, Sums};
use atp_proto::{Amount, Qos};
use std::collections::VecDeque;

/// What one record taught a shard, for those that didn't see it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Lesson {
    pub agent: String,
    pub model: String,
    pub task_type: String,
    /// Logged time.
    pub at_ms: u64,
    /// Whether the call had a result; `None`: that was decided before.
    pub accepted: Option<bool>,
    /// What was measured.
    pub run: Option<Run>,
    /// How far the call went over its hold.
    pub overshoot: Amount,
    /// The agent's new tier.
    pub tier: Option<Qos>,
}

impl Statistics {
    /// Takes what another shard has learned just now.
    pub fn learn(&mut self, lesson: &Lesson) {
        let row = (lesson.agent.as_str(), lesson.model.as_str(), lesson.task_type.as_str());
        if lesson.run.is_some() || lesson.accepted.is_some() {
            self.record(row, lesson.at_ms, lesson.accepted, lesson.run);
        }
        let learned = self.agent_mut(&lesson.agent);
        learned.overshoot = learned.overshoot.max(lesson.overshoot);
        if let Some(tier) = lesson.tier {
            learned.standing.set(tier);
        }
    }

    /// Takes all that another shard has learned so far; `tiers_of` names the agents whose tier is that shard's to say.
    pub fn merge(&mut self, other: &Self, tiers_of: impl Fn(&str) -> bool) {
        for (agent, theirs) in &other.agents {
            let ours = self.agent_mut(agent);
            for row in &theirs.rows {
                ours.row_mut(&row.model, &row.task_type).merge(row);
            }
            ours.standing.merge(&theirs.standing, tiers_of(agent));
            ours.overshoot = ours.overshoot.max(theirs.overshoot);
        }
    }
}

impl Row {
    /// Adds the runs of the same row of another shard: of both the newest are kept, by day.
    fn merge(&mut self, other: &Self) {
        let mut runs: Vec<Run> = self.runs.iter().chain(&other.runs).copied().collect();
        runs.sort_by_key(|run| run.day);
        let skipped = runs.len().saturating_sub(RUNS_KEPT);
        let count = self.count.saturating_add(other.count);
        (self.runs, self.sums) = (VecDeque::new(), Sums::default());
        runs.into_iter().skip(skipped).for_each(|run| self.run(run));
        self.count = count;
        self.last_ms = self.last_ms.max(other.last_ms);
        merge_days(&mut self.days, &other.days);
    }
}

/// Adds the sums of other days.
pub(crate) fn merge_days(days: &mut Vec<Day>, others: &[Day]) {
    for other in others {
        match days.iter_mut().find(|d| d.day == other.day) {
            Some(day) => day.add(other),
            None => days.push(*other),
        }
    }
    days.sort_unstable_by_key(|d| d.day);
}

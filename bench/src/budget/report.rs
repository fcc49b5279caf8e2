//! What the policies made of a budget: as a table, one JSON document, or a picture. Formats only.

use super::replay::{Outcome, REACH_USD_MICROS};
use crate::plot::{Curve, Picture, Points};
use crate::report::{cells, names, print, table};
use serde::Serialize;
use std::fmt::Write as _;

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) scenario: &'static str,
    pub(crate) version: &'static str,
    pub(crate) trace: String,
    /// Tasks that were replayed.
    pub(crate) tasks: usize,
    /// Rows before them, from which estimates were learnt.
    pub(crate) history: usize,
    /// Rows without an answer, left out.
    pub(crate) unanswered: u64,
    pub(crate) models: usize,
    /// Calls at once per model.
    pub(crate) parallel: u64,
    pub(crate) speed: u64,
    /// What all tasks cost.
    pub(crate) total_usd_micros: u64,
    /// What the worst case holds for an answer, in tokens.
    pub(crate) max_tokens: u64,
    /// What the flat policy holds per call.
    pub(crate) flat_usd_micros: u64,
    pub(crate) reach_usd_micros: u64,
    pub(crate) rows: Vec<Row>,
}

/// One policy under one budget.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) policy: &'static str,
    pub(crate) budget_percent: u64,
    pub(crate) budget_usd_micros: u64,
    pub(crate) finished: usize,
    pub(crate) cut: usize,
    pub(crate) refused: usize,
    /// The most that the budget pays in order of arrival, and finished as a share of it.
    pub(crate) in_order: usize,
    pub(crate) of_in_order: f64,
    /// The most that the budget pays at all (the cheapest answers of the trace), and finished as a share of it.
    pub(crate) cheapest: usize,
    pub(crate) of_cheapest: f64,
    pub(crate) billed_usd_micros: u64,
    pub(crate) wasted_usd_micros: u64,
    pub(crate) overshoot_usd_micros: u64,
    /// Reach of the calls that were in flight when money was given last: what the overshoot may be.
    pub(crate) bound_usd_micros: u64,
    /// From arrival to dispatch, of the calls that began.
    pub(crate) mean_wait_ms: u64,
    pub(crate) ended_ms: u64,
}

impl Row {
    /// `best`: the optimum by cheapness, and in order.
    pub(crate) fn new(
        policy: &'static str,
        budget_percent: u64,
        budget: u64,
        best: (usize, usize),
        outcome: Outcome,
    ) -> Self {
        let share = |of: usize| if of == 0 { 1.0 } else { outcome.finished as f64 / of as f64 };
        let began = (outcome.finished + outcome.cut) as u64;
        Self {
            policy,
            budget_percent,
            budget_usd_micros: budget,
            finished: outcome.finished,
            cut: outcome.cut,
            refused: outcome.refused,
            in_order: best.1,
            of_in_order: share(best.1),
            cheapest: best.0,
            of_cheapest: share(best.0),
            billed_usd_micros: outcome.billed,
            wasted_usd_micros: outcome.wasted,
            overshoot_usd_micros: outcome.billed.saturating_sub(budget),
            bound_usd_micros: outcome.in_flight * REACH_USD_MICROS,
            mean_wait_ms: outcome.waited_ms.checked_div(began).unwrap_or(0),
            ended_ms: outcome.ended_ms,
        }
    }
}

impl Report {
    /// # Errors
    /// When stdout is closed.
    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        print(self, json, Self::text)
    }

    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "budget: {}, {} tasks worth {} USD after {} of history, {} calls at once; virtual time\n\n",
            self.trace,
            self.tasks,
            usd(self.total_usd_micros),
            self.history,
            self.parallel
        );
        let head = names(&[
            "policy",
            "budget",
            "USD",
            "finished",
            "cut",
            "in order",
            "share",
            "cheapest",
            "share",
            "billed USD",
            "wasted USD",
            "over",
            "bound",
            "wait s",
        ]);
        let rows = self.rows.iter().map(|r| {
            cells([
                r.policy.to_owned(),
                format!("{} %", r.budget_percent),
                usd(r.budget_usd_micros),
                r.finished.to_string(),
                r.cut.to_string(),
                r.in_order.to_string(),
                format!("{:.3}", r.of_in_order),
                r.cheapest.to_string(),
                format!("{:.3}", r.of_cheapest),
                usd(r.billed_usd_micros),
                usd(r.wasted_usd_micros),
                r.overshoot_usd_micros.to_string(),
                r.bound_usd_micros.to_string(),
                format!("{:.1}", r.mean_wait_ms as f64 / 1000.0),
            ])
        });
        text.push_str(&table(&std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        let _ = write!(
            text,
            "\nin order: answers that the budget pays in order of arrival, lengths known; cheapest: the cheapest first\n\
             over: micro-USD billed above the budget; bound: reach ({}) of the calls in flight when money was given last\n\
             worst case: {} tokens an answer; flat: {} USD a call\n",
            self.reach_usd_micros,
            self.max_tokens,
            usd(self.flat_usd_micros)
        );
        if self.unanswered > 0 {
            let _ = writeln!(text, "{} rows without an answer were left out", self.unanswered);
        }
        text
    }

    /// Two curves over the budget: finished answers as a share of the optimum, and overshoot as a share of the budget.
    pub(crate) fn svg(&self) -> String {
        let mut policies: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !policies.contains(&row.policy) {
                policies.push(row.policy);
            }
        }
        let curve = |policy: &str, value: fn(&Row) -> f64| {
            let rows = self.rows.iter().filter(|r| r.policy == policy);
            rows.map(|r| (r.budget_percent as f64, value(r))).collect::<Points>()
        };
        let over = |r: &Row| r.overshoot_usd_micros as f64 * 100.0 / r.budget_usd_micros.max(1) as f64;
        let curves: Vec<Curve<'_>> = policies
            .iter()
            .map(|policy| (*policy, curve(policy, over), curve(policy, |r| r.of_in_order * 100.0)))
            .collect();
        let mut picture = Picture::default();
        picture.title("Finished, % of the optimum in order (solid); overshoot, % of the budget (dashed)");
        picture.curves(&curves);
        picture.finish()
    }
}

fn usd(micros: u64) -> String {
    format!("{}.{:04}", micros / 1_000_000, micros % 1_000_000 / 100)
}

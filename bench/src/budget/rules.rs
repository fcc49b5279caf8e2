//! The three plain policies: a number that each call holds from its start to its end, tasks in order of arrival. None of them
//! looks at a running answer; only the worst case keeps the budget for certain.

use super::replay::{Order, Policy, cost};
use super::trace::Task;
use std::collections::VecDeque;

/// What a call holds while it runs, in micro-USD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// Nothing: a call begins while less than the budget is charged, and is charged when it has ended.
    Nothing,
    /// Its prompt and an answer of so many tokens.
    WorstCase { max_tokens: u64 },
    /// The same amount for every call.
    Flat { usd_micros: u64 },
}

/// An account under one such rule.
pub(crate) struct Rule<'a> {
    hold: Hold,
    tasks: &'a [Task],
    limit: u64,
    settled: u64,
    held: u64,
    /// Calls of one model that may run at once, and those that do.
    parallel: usize,
    running: Vec<usize>,
    waiting: VecDeque<usize>,
    orders: VecDeque<Order>,
}

impl<'a> Rule<'a> {
    pub(crate) fn new(hold: Hold, tasks: &'a [Task], limit: u64, parallel: usize) -> Self {
        let models = tasks.iter().map(|task| task.model + 1).max().unwrap_or(0);
        let (waiting, orders) = Default::default();
        Self { hold, tasks, limit, settled: 0, held: 0, parallel, running: vec![0; models], waiting, orders }
    }

    fn need(&self, task: usize) -> u64 {
        match self.hold {
            Hold::Nothing => 0,
            Hold::WorstCase { max_tokens } => cost(self.tasks[task].in_tokens, max_tokens),
            Hold::Flat { usd_micros } => usd_micros,
        }
    }

    /// Begins what may begin, in order of arrival. A task that waits for money lets nobody pass; one that waits for its model
    /// does.
    fn advance(&mut self) {
        let mut passed = VecDeque::new();
        while let Some(task) = self.waiting.pop_front() {
            let (need, model) = (self.need(task), self.tasks[task].model);
            if self.settled >= self.limit || need > self.limit - self.settled {
                self.orders.push_back(Order::Refuse { task });
            } else if self.settled + self.held + need > self.limit {
                passed.push_back(task);
                break;
            } else if self.running[model] == self.parallel {
                passed.push_back(task);
            } else {
                self.held += need;
                self.running[model] += 1;
                let grant = matches!(self.hold, Hold::WorstCase { .. }).then_some(need);
                self.orders.push_back(Order::Start { task, grant });
            }
        }
        passed.append(&mut self.waiting);
        self.waiting = passed;
    }
}

impl Policy for Rule<'_> {
    fn submit(&mut self, _now_ms: u64, task: usize) {
        self.waiting.push_back(task);
        self.advance();
    }

    fn heard(&mut self, _now_ms: u64, _task: usize, _out_tokens: u64) {}

    fn ended(&mut self, _now_ms: u64, task: usize, out_tokens: u64, _whole: bool) {
        self.held -= self.need(task);
        self.settled += cost(self.tasks[task].in_tokens, out_tokens);
        self.running[self.tasks[task].model] -= 1;
        self.advance();
    }

    fn due(&self) -> Option<u64> {
        None
    }

    fn wake(&mut self, _now_ms: u64) {}

    fn order(&mut self) -> Option<Order> {
        self.orders.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::replay::{Outcome, replay};

    const fn task(at_ms: u64, out_tokens: u64) -> Task {
        Task { at_ms, in_tokens: 100, out_tokens, model: 0 }
    }

    /// 540, 780 and 1,020 micro-USD at once, 540 later; two slots.
    const TASKS: [Task; 4] = [task(0, 16), task(0, 32), task(0, 48), task(10_000, 16)];

    fn run(hold: Hold, limit: u64) -> Outcome {
        replay(&TASKS, &mut Rule::new(hold, &TASKS, limit, 2)).expect("ends")
    }

    #[test]
    fn check_then_charge_overshoots_by_what_runs() {
        let outcome = run(Hold::Nothing, 1_500);
        let expected = Outcome { finished: 3, refused: 1, billed: 2_340, in_flight: 2, waited_ms: 300, ..outcome };
        assert_eq!((outcome, outcome.ended_ms), (expected, 10_000));
        // A charge that meets the limit closes it, one below doesn't.
        assert_eq!((run(Hold::Nothing, 2_340).refused, run(Hold::Nothing, 2_341).refused), (1, 0));
    }

    #[test]
    fn the_worst_case_keeps_the_budget_and_leaves_much_of_it() {
        let hold = Hold::WorstCase { max_tokens: 48 };
        let outcome = run(hold, 1_500);
        assert_eq!((outcome.finished, outcome.refused, outcome.billed), (1, 3, 540));
        // 540 + 1,020 + 1,020 when the first has ended.
        assert_eq!((run(hold, 2_579).waited_ms, run(hold, 2_580).waited_ms), (620, 300));
        assert_eq!(run(hold, 2_580).billed, 2_340);
    }

    #[test]
    fn flat_finishes_more_and_overshoots() {
        let hold = Hold::Flat { usd_micros: 600 };
        let outcome = run(hold, 1_739);
        assert_eq!((outcome.finished, outcome.refused, outcome.billed), (2, 2, 1_320));
        let outcome = run(hold, 1_740);
        assert_eq!((outcome.finished, outcome.refused, outcome.billed, outcome.waited_ms), (3, 1, 2_340, 300));
    }

    #[test]
    fn a_model_without_a_free_slot_lets_others_pass() {
        let tasks = [task(0, 160), task(0, 160), Task { model: 1, ..task(0, 16) }];
        let outcome = replay(&tasks, &mut Rule::new(Hold::Nothing, &tasks, 100_000, 1)).expect("ends");
        // The second waits for the first, 300 + 9 x 320 ms; the third for nobody.
        assert_eq!((outcome.finished, outcome.waited_ms), (3, 3_180));
    }
}

//! One replay in virtual time: tasks arrive, answers grow chunk by chunk, providers bill what they made. It asks a policy
//! what may begin and what to stop, and counts; it holds no money and refuses nothing itself.

use super::trace::Task;
use anyhow::ensure;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Tokens of a chunk of an answer.
pub(crate) const CHUNK_TOKENS: u64 = 16;
/// From the dispatch to the first chunk.
const FIRST_MS: u64 = 300;
/// From chunk to chunk: 50 tokens a second.
const CHUNK_MS: u64 = 320;
/// micro-USD per token of a prompt and of an answer (3 and 15 USD per million).
pub(crate) const IN_USD_MICROS: u64 = 3;
pub(crate) const OUT_USD_MICROS: u64 = 15;
/// What a provider can still bill after its adapter has decided to stop: the chunk that passed the grant, and one that is
/// made while the adapter says so.
pub(crate) const REACH_TOKENS: u64 = 2 * CHUNK_TOKENS;
pub(crate) const REACH_USD_MICROS: u64 = REACH_TOKENS * OUT_USD_MICROS;

/// micro-USD of so many tokens.
pub(crate) const fn cost(in_tokens: u64, out_tokens: u64) -> u64 {
    in_tokens * IN_USD_MICROS + out_tokens * OUT_USD_MICROS
}

impl Task {
    pub(crate) const fn cost(&self) -> u64 {
        cost(self.in_tokens, self.out_tokens)
    }
}

/// What a policy wants done. Tasks are named by their index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The call begins. With a grant in micro-USD its agent stops once it has spent more.
    Start {
        task: usize,
        grant: Option<u64>,
    },
    /// The whole grant from now on.
    Grant {
        task: usize,
        grant: u64,
    },
    Stop {
        task: usize,
    },
    /// The task will never begin.
    Refuse {
        task: usize,
    },
}

/// Who decides about the money.
pub(crate) trait Policy {
    fn submit(&mut self, now_ms: u64, task: usize);
    /// A running answer has so many tokens by now.
    fn heard(&mut self, now_ms: u64, task: usize, out_tokens: u64);
    /// An answer has ended; `whole` or cut short.
    fn ended(&mut self, now_ms: u64, task: usize, out_tokens: u64, whole: bool);
    /// When it wants to be woken.
    fn due(&self) -> Option<u64>;
    fn wake(&mut self, now_ms: u64);
    /// The next thing to do; asked until there is none.
    fn order(&mut self) -> Option<Order>;
}

/// What became of a trace under one policy and budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Answers that came whole.
    pub(crate) finished: usize,
    /// Answers that were stopped at their grant.
    pub(crate) cut: usize,
    pub(crate) refused: usize,
    /// All that the providers billed, in micro-USD.
    pub(crate) billed: u64,
    /// What of it went into answers that were cut.
    pub(crate) wasted: u64,
    /// Calls in flight when money was given last.
    pub(crate) in_flight: u64,
    /// From arrival to dispatch, summed over the calls that began.
    pub(crate) waited_ms: u64,
    pub(crate) ended_ms: u64,
}

#[derive(Clone, Copy, Default)]
struct Answer {
    running: bool,
    resolved: bool,
    made: u64,
    grant: Option<u64>,
    stop: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Chunk(usize),
    Arrive(usize),
}

struct Replay<'a> {
    tasks: &'a [Task],
    answers: Vec<Answer>,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    running: u64,
    resolved: usize,
    outcome: Outcome,
}

/// Replays all tasks until each has its answer, is cut or refused.
///
/// # Errors
/// When the policy leaves tasks waiting that nothing will ever wake.
pub(crate) fn replay(tasks: &[Task], policy: &mut impl Policy) -> anyhow::Result<Outcome> {
    let events = tasks.iter().enumerate().map(|(i, task)| Reverse((task.at_ms, Event::Arrive(i)))).collect();
    let answers = vec![Answer::default(); tasks.len()];
    let mut replay = Replay { tasks, answers, events, running: 0, resolved: 0, outcome: Outcome::default() };
    while replay.resolved < tasks.len() {
        let event = replay.events.peek().map(|Reverse((at, _))| *at);
        let now = event.into_iter().chain(policy.due()).min();
        let left = tasks.len() - replay.resolved;
        ensure!(now.is_some(), "{left} tasks wait for something that never comes");
        let now = now.unwrap_or_default();
        if policy.due().is_some_and(|due| due <= now) {
            policy.wake(now);
        } else if let Some(Reverse((_, event))) = replay.events.pop() {
            match event {
                Event::Arrive(task) => policy.submit(now, task),
                Event::Chunk(task) => replay.chunk(now, task, policy),
            }
        }
        while let Some(order) = policy.order() {
            replay.carry_out(now, order);
        }
        replay.outcome.ended_ms = now;
    }
    Ok(replay.outcome)
}

impl Replay<'_> {
    fn carry_out(&mut self, now: u64, order: Order) {
        match order {
            Order::Start { task, grant } => {
                let answer = &mut self.answers[task];
                assert!(!answer.running && !answer.resolved, "task {task} begins twice");
                (answer.running, answer.grant) = (true, grant);
                self.running += 1;
                self.outcome.in_flight = self.running;
                self.outcome.waited_ms += now - self.tasks[task].at_ms;
                self.outcome.billed += cost(self.tasks[task].in_tokens, 0);
                self.events.push(Reverse((now + FIRST_MS, Event::Chunk(task))));
            }
            Order::Grant { task, grant } => {
                // A grant that grew in tokens only gave no money.
                if self.answers[task].grant.replace(grant).is_some_and(|before| before < grant) {
                    self.outcome.in_flight = self.running;
                }
            }
            Order::Stop { task } => self.answers[task].stop = true,
            Order::Refuse { task } => {
                assert!(!self.answers[task].running, "task {task} is refused while it runs");
                if !self.answers[task].resolved {
                    self.outcome.refused += 1;
                    self.resolve(task);
                }
            }
        }
    }

    fn resolve(&mut self, task: usize) {
        self.answers[task].resolved = true;
        self.resolved += 1;
    }

    /// Makes the next chunk; true when there is none after it.
    fn make(&mut self, task: usize) -> bool {
        let (of, answer) = (&self.tasks[task], &mut self.answers[task]);
        let chunk = CHUNK_TOKENS.min(of.out_tokens - answer.made);
        answer.made += chunk;
        self.outcome.billed += cost(0, chunk);
        answer.made == of.out_tokens
    }

    fn chunk(&mut self, now: u64, task: usize, policy: &mut impl Policy) {
        let whole = self.make(task);
        let Answer { made, grant, stop, .. } = self.answers[task];
        let spent = cost(self.tasks[task].in_tokens, made);
        let cut = stop || grant.is_some_and(|grant| spent > grant);
        if cut {
            // It stops; what its provider makes until it hears of that is billed too.
            self.make(task);
            self.outcome.cut += 1;
            self.outcome.wasted += cost(self.tasks[task].in_tokens, self.answers[task].made);
        } else if whole {
            self.outcome.finished += 1;
        } else {
            self.events.push(Reverse((now + CHUNK_MS, Event::Chunk(task))));
            return policy.heard(now, task, made);
        }
        self.answers[task].running = false;
        self.running -= 1;
        self.resolve(task);
        policy.ended(now, task, self.answers[task].made, !cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives every task the same grant at once.
    /// Grants every task the same, or (`Silent`) never says a word.
    enum Simple {
        Granting(Option<u64>, Vec<Order>),
        Silent,
    }

    impl Policy for Simple {
        fn submit(&mut self, _now_ms: u64, task: usize) {
            if let Self::Granting(grant, orders) = self {
                orders.push(Order::Start { task, grant: *grant });
            }
        }
        fn heard(&mut self, _now_ms: u64, _task: usize, _out_tokens: u64) {}
        fn ended(&mut self, _now_ms: u64, _task: usize, _out_tokens: u64, _whole: bool) {}
        fn due(&self) -> Option<u64> {
            None
        }
        fn wake(&mut self, _now_ms: u64) {}
        fn order(&mut self) -> Option<Order> {
            match self {
                Self::Granting(_, orders) => orders.pop(),
                Self::Silent => None,
            }
        }
    }

    #[test]
    fn an_answer_takes_its_time_and_costs_its_tokens() {
        let tasks = [Task { at_ms: 0, in_tokens: 100, out_tokens: 40, model: 0 }];
        let outcome = replay(&tasks, &mut Simple::Granting(None, Vec::new())).expect("ends");
        let expected = Outcome { finished: 1, billed: 900, in_flight: 1, ended_ms: 940, ..Outcome::default() };
        assert_eq!(outcome, expected);
    }

    #[test]
    fn a_call_exceeds_its_grant_by_its_reach_at_most() {
        let tasks = [Task { at_ms: 0, in_tokens: 100, out_tokens: 160, model: 0 }];
        // The second chunk is one token's price too many.
        let cut = |grant| replay(&tasks, &mut Simple::Granting(Some(grant), Vec::new())).expect("ends");
        assert_eq!((cut(540).billed, cut(540).cut, cut(540).finished), (540 + REACH_USD_MICROS, 1, 0));
        assert_eq!((cut(779).billed, cut(780).billed), (1_020, 1_260));
        assert_eq!((cut(2_700).billed, cut(2_700).finished), (2_700, 1));
    }

    #[test]
    fn a_policy_that_forgets_a_task_is_told() {
        let tasks = [Task { at_ms: 5, in_tokens: 1, out_tokens: 1, model: 0 }];
        assert!(replay(&tasks, &mut Simple::Silent).is_err());
    }
}

//! Fold of the durable log = live state, hash by hash; every live log replays; a checkpoint stands for what it covers.

use super::Verdict;
use atp_core::record::{Checkpoint, Entry, Record};
use atp_core::state::State;
use atp_core::view::VerifyView;
use std::collections::VecDeque;

/// The core's own fold over durable entries, brought up to a position only when asked.
#[derive(Default)]
pub struct Fold {
    state: State,
    ahead: VecDeque<Entry>,
}

impl Fold {
    pub fn push(&mut self, entry: Entry) {
        self.ahead.push_back(entry);
    }

    /// Folds up to `position`.
    pub fn upto(&mut self, position: u64, verdict: &mut Verdict) -> &State {
        while self.state.position() < position
            && let Some(entry) = self.ahead.pop_front()
        {
            let at = self.state.position() + 1;
            self.checkpoints(&entry, verdict);
            if let Err(e) = self.state.apply(at, &entry) {
                verdict.fail("replay halts nowhere", || e.to_string());
                break;
            }
        }
        &self.state
    }

    pub fn all(&mut self, verdict: &mut Verdict) -> &State {
        self.upto(u64::MAX, verdict)
    }

    fn checkpoints(&self, entry: &Entry, verdict: &mut Verdict) {
        for any in &entry.records {
            let Some(Record::Checkpoint(c)) = &any.record else { continue };
            if c.piece != 0 {
                continue;
            }
            verdict.expect(c.position == self.state.position(), "fold(log) = live state", || {
                format!("a checkpoint of {} stands behind {}", c.position, self.state.position())
            });
            let hash = self.state.hash();
            verdict.expect(hash.ends_with(&atp_core::record::hex(&c.hash)), "fold(log) = live state", || {
                format!(
                    "checkpoint of {}: its hash is {}, the log's {hash}",
                    c.position,
                    atp_core::record::hex(&c.hash)
                )
            });
        }
    }

    /// What a router has learned is what the log says, each run once, however it came by its state.
    pub fn statistics(&mut self, live: &State, verdict: &mut Verdict) {
        let log = self.upto(live.position(), verdict);
        if log.position() == live.position() {
            let (live, log) = (live.statistics(), log.statistics());
            verdict.expect(live == log, "statistics of fold(log) = live statistics", || {
                format!("live {live:?}, log {log:?}")
            });
        }
    }

    /// `Answer::Verify` against the log.
    pub fn verify(&mut self, view: &VerifyView, verdict: &mut Verdict) {
        if view.position < self.state.position() {
            return;
        }
        let state = self.upto(view.position, verdict);
        let mine = state.verify_view();
        verdict.expect(
            mine.state_hash == view.state_hash && mine.position == view.position,
            "fold(log) = live state",
            || format!("at {}: live {view:?}, log {mine:?}", view.position),
        );
    }
}

/// Recovery as the shell does it: newest whole checkpoint, then every later entry.
///
/// # Errors
/// Text of what halted.
pub fn recover(log: &[Entry], use_checkpoint: bool) -> Result<State, String> {
    let mut state = State::default();
    if use_checkpoint {
        for start in (0..log.len()).rev() {
            let Some(first) = piece(&log[start]).filter(|c| c.piece == 0) else { continue };
            let pieces: Vec<Checkpoint> =
                log[start..].iter().take(first.pieces as usize).filter_map(piece).cloned().collect();
            if pieces.len() == first.pieces as usize {
                state = State::from_checkpoint(&pieces).map_err(|e| e.to_string())?;
                break;
            }
        }
    }
    let from = state.position() as usize;
    for (index, entry) in log.iter().enumerate().skip(from) {
        state.apply(index as u64 + 1, entry).map_err(|e| e.to_string())?;
    }
    Ok(state)
}

fn piece(entry: &Entry) -> Option<&Checkpoint> {
    entry.records.iter().find_map(|r| match &r.record {
        Some(Record::Checkpoint(c)) => Some(c),
        _ => None,
    })
}

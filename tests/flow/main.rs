//! A router with more work than its agents can do, and with agents that come and go by their own word. One test at a time:
//! these measure how long things wait.

mod flat_out;
mod flips;
mod overload;
mod sender;
mod worker;

use std::sync::{Mutex, MutexGuard, PoisonError};

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

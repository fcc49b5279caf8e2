//! All calls of one agent process and the fence of epochs: what a frame of the router means here. Does no I/O.

use super::call::CallState;
use super::session::Shared;
use atp_proto::CallId;
use atp_proto::content::{Dispatch, ListedCall};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Ended calls that are still recognised when a late duplicate of their dispatch comes.
pub(crate) const ENDED_MAX: usize = 4096;
/// The longest time that a dispatch can give a call, so that clock arithmetic stays in range.
const DEADLINE_MAX: Duration = Duration::from_secs(366 * 86_400);

#[derive(Debug, Default)]
pub(crate) struct Table {
    calls: HashMap<CallId, Arc<CallState>>,
    epochs: HashMap<u32, u64>,
    ended: HashSet<CallId>,
    ended_order: VecDeque<CallId>,
}

/// What to do with a dispatch.
#[derive(Debug)]
pub(crate) enum Admit {
    /// Run it.
    New(Arc<CallState>),
    /// It runs or has ended here already; what isn't acknowledged is to be sent again.
    Known(Arc<CallState>),
    /// Never seen here: it can be refused with proof.
    Stale,
    /// Asked to go on with a call that this process never got: proof of no effect.
    Unknown,
    /// A late duplicate: no word can be true.
    Ignore,
}

impl Table {
    /// Raises the fence of the shard; false for an epoch below it.
    fn passes(&mut self, shard: u32, epoch: u64) -> bool {
        let highest = self.epochs.entry(shard).or_insert(epoch);
        *highest = epoch.max(*highest);
        *highest == epoch
    }

    pub(crate) fn admit(&mut self, dispatch: &Dispatch, shared: &Arc<Shared>) -> Admit {
        let passes = self.passes(dispatch.shard, dispatch.epoch);
        if let Some(call) = self.calls.get(&dispatch.call_id) {
            if !passes || !call.raise(dispatch.shard, dispatch.epoch) {
                return Admit::Ignore;
            }
            if dispatch.go_on {
                call.set_grant(dispatch.grant, false);
            }
            return Admit::Known(Arc::clone(call));
        }
        if self.ended.contains(&dispatch.call_id) {
            return Admit::Ignore;
        }
        if !passes {
            return Admit::Stale;
        }
        if dispatch.go_on {
            return Admit::Unknown;
        }
        let deadline = Instant::now() + Duration::from_millis(dispatch.deadline_ms).min(DEADLINE_MAX);
        Admit::New(Arc::new(CallState::new(dispatch, deadline, Arc::clone(shared))))
    }

    pub(crate) fn insert(&mut self, call: Arc<CallState>) {
        self.calls.insert(call.id, call);
    }

    /// The call that an order is for, if the order's epoch counts.
    pub(crate) fn ordered(&mut self, call: CallId, shard: u32, epoch: u64) -> Option<&Arc<CallState>> {
        if !self.passes(shard, epoch) {
            return None;
        }
        self.calls.get(&call).filter(|call| call.raise(shard, epoch))
    }

    /// All up to `msg_seq` is durable at the router. A call whose end that is, is forgotten.
    pub(crate) fn acknowledge(&mut self, call: CallId, msg_seq: u64) {
        if self.calls.get(&call).is_some_and(|state| state.acknowledge(msg_seq)) {
            self.calls.remove(&call);
            self.remember(call);
        }
    }

    fn remember(&mut self, call: CallId) {
        if self.ended.insert(call) {
            self.ended_order.push_back(call);
        }
        if self.ended_order.len() > ENDED_MAX
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
    }

    /// A call that is known here.
    pub(crate) fn running(&self, call: CallId) -> Option<&Arc<CallState>> {
        self.calls.get(&call)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    pub(crate) fn calls(&self) -> impl Iterator<Item = &Arc<CallState>> {
        self.calls.values()
    }

    /// The call list of the capabilities, in order of id.
    pub(crate) fn list(&self) -> Vec<ListedCall> {
        let mut list: Vec<_> = self.calls.values().map(|call| call.listed()).collect();
        list.sort_by_key(|call| call.call_id);
        list
    }
}

//! The way to the task that owns "which shards are here".

use super::Fleet;
use crate::http::{Problem, not_found};
use atp_proto::{Code, WireError};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Why a router can't be drained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotDrained {
    /// No such router lives.
    Unknown,
    /// The store, which tells it, is away.
    Away(String),
}

/// What is asked of the owner's task.
pub(super) enum Order {
    Drain {
        router: String,
        drained: bool,
        reply: oneshot::Sender<Result<(), NotDrained>>,
    },
    /// Hand everything over; the reply comes when nothing is owned here any more.
    HandOver {
        over: oneshot::Sender<()>,
    },
}

/// The way to the task of [`Ownership`].
#[derive(Clone)]
pub(crate) struct Handle {
    pub(super) orders: mpsc::Sender<Order>,
    pub(super) fleet: watch::Receiver<Arc<Fleet>>,
}

impl Handle {
    pub(crate) fn fleet(&self) -> Arc<Fleet> {
        self.fleet.borrow().clone()
    }

    /// Returns when this router owns nothing any more, or its task has ended.
    pub(crate) async fn hand_over(&self) {
        let (over, is_over) = oneshot::channel();
        if self.orders.send(Order::HandOver { over }).await.is_ok() {
            let _ = is_over.await;
        }
    }

    /// Tells a router to own nothing, or that it may again. It begins with that within a third of a lease.
    ///
    /// # Errors
    /// No such router lives, or the store, which tells it, is away.
    pub(crate) async fn drain(&self, router: &str, drained: bool) -> Result<(), Problem> {
        let (reply, answer) = oneshot::channel();
        let order = Order::Drain { router: router.into(), drained, reply };
        let told = match self.orders.send(order).await {
            Ok(()) => answer.await.ok(),
            Err(_) => None,
        };
        let stopping = NotDrained::Away("this router is stopping".into());
        told.unwrap_or(Err(stopping)).map_err(|error| match error {
            NotDrained::Unknown => not_found(router),
            NotDrained::Away(why) => {
                let message = format!("the store, which tells it the routers, is away: {why}");
                Problem::new(WireError::new(Code::Draining, message).retry_after_ms(1_000), None)
            }
        })
    }
}

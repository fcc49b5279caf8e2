//! Without Kafka a router shares its log with nobody, so there is no task to ask about it.

use super::Fleet;
use crate::http::Problem;
use std::sync::Arc;

/// None is ever made.
#[derive(Clone)]
pub(crate) enum Handle {}

impl Handle {
    pub(crate) fn fleet(&self) -> Arc<Fleet> {
        match *self {}
    }

    pub(crate) async fn hand_over(&self) {
        match *self {}
    }

    pub(crate) async fn drain(&self, _router: &str, _drained: bool) -> Result<(), Problem> {
        match *self {}
    }
}

//! A shard: owner of streams, money and the merge of answers.
use crate::clock::Now;
use crate::message::{Effect, Input, Machine};
use crate::record::Genesis;
use crate::settings::Settings;
use crate::state::State;
use std::sync::Arc;

pub struct Shard {
    state: State,
}

impl Shard {
    pub fn recover(
        _settings: Arc<Settings>,
        state: State,
        _now: Now,
        _incarnation: &str,
        _genesis: Option<Genesis>,
    ) -> Self {
        Self { state }
    }
    pub fn set_settings(&mut self, _settings: Arc<Settings>) {}
    pub fn state(&self) -> &State {
        &self.state
    }
}

impl Machine for Shard {
    type Input = Input;
    type Effect = Effect;
    fn handle(&mut self, _now: Now, _input: Input) {}
    fn poll_effect(&mut self) -> Option<Effect> {
        None
    }
    fn poll_timeout(&self) -> Option<u64> {
        None
    }
    fn handle_timeout(&mut self, _now: Now) {}
}

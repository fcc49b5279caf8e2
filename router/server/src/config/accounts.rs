//! The accounts of a configuration: limit, period, ladder, pacing. Checks what the table can't: which steps go together.

use super::Config;
use super::read::{Read, Walk};
use atp_core::ladder::{OnLimit, place};
use atp_core::pacing::Mode;
use atp_core::settings::{AccountSettings, Per};
use atp_proto::{Limit, TenantId, Tokens};

const STEPS: [&str; 3] = ["downgrade", "queue", "refuse"];

impl Walk<'_> {
    pub(super) fn read_accounts(&mut self, config: &mut Config) {
        for name in std::mem::take(&mut self.accounts) {
            let account = self.account(&name, config);
            if name == crate::identity::DEFAULT_TENANT {
                config.settings.default_account = account;
            } else {
                config.settings.accounts.insert(TenantId::new(&name), account);
            }
        }
    }

    fn account(&mut self, name: &str, config: &mut Config) -> AccountSettings {
        let path = |key: &str| format!("accounts.{name}.{key}");
        let per = match self.opt_text(&path("per")).as_deref() {
            Some("minute") => Per::Minute,
            Some("hour") => Per::Hour,
            Some("month") => Per::Month,
            Some("total") => Per::Total,
            _ => Per::Day,
        };
        let limit = Limit { tokens: self.whole(&path("tokens")).map(Tokens), usd_micros: self.usd(&path("usd")) };
        let max_parallel = self.whole(&path("max_parallel")).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        self.account_tools(name, config);
        let on_limit = self.on_limit(&path("on_limit"));
        let ladder = self.list(&path("ladder"));
        let floor = self.opt_text(&path("floor"));
        if on_limit.is_some_and(|o| o.downgrade) && ladder.is_empty() {
            let fix = "write ladder: [opus, sonnet, haiku], or leave `downgrade` out";
            self.problem(self.mark(&path("on_limit")), &path("on_limit"), "`downgrade` without a ladder", fix);
        }
        if floor.as_ref().is_some_and(|floor| place(&ladder, floor).is_none()) {
            let fix = format!("name a model of {}", path("ladder"));
            self.problem(self.mark(&path("floor")), &path("floor"), "is not in the ladder", fix);
        }
        let mode = self.opt_text(&path("pacing.mode"));
        let mode = Mode::ALL.into_iter().find(|(text, _)| Some(*text) == mode.as_deref()).map(|(_, mode)| mode);
        if mode.is_some() && per == Per::Total {
            let fix = "give it `per: day` or another period, or leave pacing out";
            let message = "an account that never resets has no pace";
            self.problem(self.mark(&path("pacing")), &path("pacing"), message, fix);
        }
        let known = self.opt_text(&path("pacing.reset_confidence")).as_deref() != Some("unknown");
        let weight = self.whole(&path("weight")).and_then(|n| u32::try_from(n).ok()).unwrap_or(1);
        AccountSettings { limit, per, max_parallel, on_limit, ladder, floor, pacing: mode.filter(|_| known), weight }
    }

    fn list(&self, path: &str) -> Vec<String> {
        match self.value(path) {
            Some(Read::Texts(texts)) => texts,
            _ => Vec::new(),
        }
    }

    fn on_limit(&mut self, path: &str) -> Option<OnLimit> {
        let steps = self.list(path);
        let places: Vec<Option<usize>> = steps.iter().map(|s| STEPS.iter().position(|known| known == s)).collect();
        let rising = places.windows(2).all(|pair| pair[0] < pair[1]);
        if places.iter().any(Option::is_none) || !rising {
            let fix = "write some of [downgrade, queue, refuse] in this order";
            self.problem(self.mark(path), path, "has an unknown step, or one out of order", fix);
        }
        let has = |step: &str| steps.iter().any(|s| s == step);
        (!steps.is_empty()).then(|| OnLimit { downgrade: has("downgrade"), queue: has("queue") })
    }
}

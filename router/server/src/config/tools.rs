//! `tools` and `accounts.*.tools` -> which tools the router lends, at what price, and who may use which.

use super::Config;
use super::read::Walk;
use crate::tool::{FS_READ, HTTP_GET, Prefix};
use atp_proto::id::is_id;
use atp_proto::{Amount, TenantId, UsdMicros};

impl Walk<'_> {
    pub(super) fn tools(&mut self, config: &mut Config) {
        config.tools.fs_root = self.opt_text("tools.fs_read.root").map(Into::into);
        for (i, text) in self.opt_texts("tools.http_get.allow").unwrap_or_default().iter().enumerate() {
            match Prefix::parse(text) {
                Ok(prefix) => config.tools.http_allow.push(prefix),
                Err(why) => {
                    let path = format!("tools.http_get.allow[{i}]");
                    let fix = "write https://host:port/path/, or a host alone";
                    self.problem(self.mark("tools.http_get.allow"), &path, why, fix);
                }
            }
        }
        let there = [
            (FS_READ, "tools.fs_read.usd", config.tools.fs_root.is_some()),
            (HTTP_GET, "tools.http_get.usd", !config.tools.http_allow.is_empty()),
        ];
        for (name, price, _) in there.into_iter().filter(|(_, _, there)| *there) {
            let usd_micros = self.usd(price).unwrap_or(UsdMicros::ZERO);
            config.settings.tools.mediated.insert(name.into(), Amount { usd_micros, ..Amount::ZERO });
        }
    }

    pub(super) fn account_tools(&mut self, name: &str, config: &mut Config) {
        let path = format!("accounts.{name}.tools");
        let Some(tools) = self.opt_texts(&path) else { return };
        if let Some(wrong) = tools.iter().find(|t| !is_id(t)) {
            let message = format!("`{wrong}` is no tool's name");
            self.problem(self.mark(&path), &path, message, "use names of 1 to 64 of A-Za-z0-9._-");
        }
        let tools = tools.into_iter().collect();
        if name == crate::identity::DEFAULT_TENANT {
            config.settings.tools.allowed_default = Some(tools);
        } else {
            config.settings.tools.allowed.insert(TenantId::new(name), tools);
        }
    }
}

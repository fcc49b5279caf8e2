//! `store`: which one, and where. Its URL may hold a password, so no problem repeats it.

use super::Config;
use super::read::Walk;
use crate::store::{RedisConfig, StoreConfig};
use atp_proto::id::is_id;

impl Walk<'_> {
    pub(super) fn store(&mut self, config: &mut Config) {
        let prefix = self.opt_text("store.redis.prefix").unwrap_or_default();
        if !is_id(&prefix) {
            let (path, fix) = ("store.redis.prefix", "use 1 to 64 of A-Za-z0-9._-");
            self.problem(self.mark(path), path, format!("`{prefix}` is no prefix"), fix);
        }
        let (path, fix) = ("store.redis.url", "write redis://[user:password@]host:port[/db], or rediss:// for TLS");
        let redis = self.opt_text(path).map(|url| RedisConfig::new(&url, &prefix));
        let wanted = self.opt_text("store.kind").as_deref() == Some("redis");
        match redis {
            Some(Err(why)) => self.problem(self.mark(path), path, format!("is no address of a Redis: {why}"), fix),
            Some(Ok(redis)) if wanted => config.store = StoreConfig::Redis(redis),
            None if wanted => self.problem(self.mark("store.kind"), path, "is missing", fix),
            Some(Ok(_)) | None => {}
        }
    }
}

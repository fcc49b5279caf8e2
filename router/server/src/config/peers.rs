//! `peers`: the key that routers of one log prove to each other. It is secret, so no problem repeats it.

use super::Config;
use super::read::Walk;
use crate::peer::{KEY_BYTES_MIN, PeerKey};

impl Walk<'_> {
    pub(super) fn peers(&mut self, config: &mut Config) {
        let path = "peers.key";
        let Some(text) = self.opt_text(path) else { return };
        match PeerKey::new(&text) {
            Some(key) => config.peer_key = Some(key),
            None => {
                let message = format!("is shorter than {KEY_BYTES_MIN} bytes");
                self.problem(
                    self.mark(path),
                    path,
                    message,
                    "write a random one into ATP_PEER_KEY: openssl rand -hex 32",
                );
            }
        }
    }
}

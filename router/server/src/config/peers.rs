//! `peers`: the key that routers of one log prove to each other, and a second one while it is changed. They are secret, so no
//! problem repeats them.

use super::Config;
use super::read::Walk;
use crate::peer::{KEY_BYTES_MIN, PeerKey};

const RANDOM: &str = "write a random one into ATP_PEER_KEY: openssl rand -hex 32";

impl Walk<'_> {
    pub(super) fn peers(&mut self, config: &mut Config) {
        let (key, also) = (self.peer_key("peers.key"), self.peer_key("peers.also"));
        config.peer_key = match (key, also) {
            (Some(key), Some(also)) => Some(key.or(&also)),
            (None, Some(_)) => {
                let fix = "set peers.key to the key that this router proves";
                self.problem(self.mark("peers.also"), "peers.also", "stands without peers.key", fix);
                None
            }
            (key, None) => key,
        };
    }

    fn peer_key(&mut self, path: &'static str) -> Option<PeerKey> {
        let text = self.opt_text(path)?;
        let key = PeerKey::new(&text);
        if key.is_none() {
            let message = format!("is shorter than {KEY_BYTES_MIN} bytes");
            self.problem(self.mark(path), path, message, RANDOM);
        }
        key
    }
}

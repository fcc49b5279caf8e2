//! What happens between routers, and what the shards at each hear of it.

use super::World;
use crate::simulation::keepers::between::{Between, News};
use atp_core::message::Input;

impl World {
    pub(super) fn between(&mut self, between: Between) {
        match between {
            Between::Moves { agent } if !self.s.healed => self.processes[agent].moves(&mut self.s),
            Between::Died { router } if !self.s.healed => self.each(|place, around| place.dies_with(around, router)),
            other => {
                let news = self.keepers.between(&mut self.s, &mut self.check, other);
                self.hear(news);
            }
        }
    }

    pub(super) fn hear(&mut self, news: News) {
        for (router, shard, message) in news.told {
            self.each(|place, around| {
                if shard.is_none_or(|shard| shard == place.no) {
                    place.hear(around, router, Input::Agent(message.clone()));
                }
            });
        }
        for (router, agent) in news.come {
            self.each(|place, around| place.introduce(around, router, agent));
        }
    }
}

//! Owners at several routers: each hears what reaches its own, and dies with it.

use super::{Around, Place};
use crate::simulation::net::Peer;
use crate::simulation::sched::Event;
use atp_core::message::Input;

impl Place {
    /// Where somebody may begin to own the shard: no router does that twice at once.
    pub(super) fn any_router(&self, a: &mut Around<'_>) -> Option<usize> {
        let owners: Vec<usize> = self.owners.iter().map(|o| o.router).collect();
        a.keepers.any_router(a.s, &owners)
    }

    /// For the owner at this router, whether or not it is the newest.
    pub fn hear(&mut self, a: &mut Around<'_>, router: usize, input: Input) {
        let here = self.owners.iter().rev().find(|o| o.router == router).map(|o| o.number);
        if let Some(number) = here {
            self.input_of(a, number, input);
        }
    }

    /// The owner at this router says who it is to an agent that has come.
    pub fn introduce(&mut self, a: &mut Around<'_>, router: usize, agent: usize) {
        if let Some(at) = self.owners.iter().rposition(|o| o.router == router) {
            self.introduce_owner(a, at, agent);
        }
    }

    /// The process of a router is gone, and who owned the shard there.
    pub fn dies_with(&mut self, a: &mut Around<'_>, router: usize) {
        if self.taking.take_if(|taking| taking.router == router).is_some() {
            let ms = a.s.rng.range(1, 500);
            a.s.after(ms, Event::Restart { shard: self.no });
        }
        let gone: Vec<u32> = self.owners.iter().filter(|o| o.router == router).map(|o| o.number).collect();
        gone.into_iter().for_each(|number| self.ends(a, number, true));
    }

    /// A whole process dies: the keepers that are in it, and the ways of their agents.
    pub(super) fn process_dies(&self, a: &mut Around<'_>, router: usize, others: bool) {
        for conn in 0..a.s.net.conns.len() {
            let is_there = matches!(a.s.net.conns[conn].peer, Peer::Agent { router: of, .. } if of == router);
            if is_there && a.s.net.conns[conn].router_open {
                a.s.router_dies(conn);
            }
        }
        if a.keepers.is_fleet() {
            return a.keepers.router_dies(a.s, a.check, router);
        }
        a.keepers.die(a.check, router);
        if others {
            a.s.after(0, Event::ProcessDies);
        }
    }
}

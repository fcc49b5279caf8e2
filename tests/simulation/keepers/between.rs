//! Several routers, as the server has them: each knows from the others which agents are where and reaches them over a link,
//! which may break; the same process counts where it connected last, of two the first that answers keeps its handle.

use super::Keepers;
use crate::simulation::check::Check;
use crate::simulation::net::Peer;
use crate::simulation::plan::{Plan, times};
use crate::simulation::process::Process;
use crate::simulation::rng::Rng;
use crate::simulation::sched::{Event, Sched};
use atp_core::message::{AgentInput, FromAgent, ToAgent};
use atp_core::whereabouts::{Whereabouts, Word};
use atp_proto::content::{AgentRoute, RouteUpdate};
use atp_proto::{AgentName, ConnId};

/// Agents are announced when they change, and this often.
const ANNOUNCE_MS: u64 = 5_000;

/// What happens between routers.
#[derive(Debug)]
pub enum Between {
    /// A keeper's word reaches a router: for one shard, or all that are there.
    Said {
        from: usize,
        to: usize,
        run: (u32, u32),
        shard: Option<u32>,
        message: Box<FromAgent>,
    },
    /// A router says which agents are there.
    Routes {
        from: usize,
        to: usize,
        run: (u32, u32),
        update: RouteUpdate,
    },
    Announce {
        router: usize,
        generation: u32,
    },
    /// A link breaks, for so long.
    Cut {
        pair: (usize, usize),
        ms: u64,
    },
    /// A router notices that it has no link to another one any more.
    Lost {
        at: usize,
        of: usize,
        link: u32,
    },
    Linked {
        pair: (usize, usize),
        link: u32,
    },
    /// The owners that a router had died with it.
    Died {
        router: usize,
    },
    Starts {
        router: usize,
        generation: u32,
    },
    /// An agent leaves its router for another one.
    Moves {
        agent: usize,
    },
}

/// What the shards at a router hear.
#[derive(Default)]
pub struct News {
    pub told: Vec<(usize, Option<u32>, FromAgent)>,
    /// Agents that they shall introduce themselves to.
    pub come: Vec<(usize, usize)>,
}

struct Here {
    conn: ConnId,
    incarnation: String,
    since: u64,
}

#[derive(Clone, Copy, Default)]
struct Link {
    up: bool,
    no: u32,
}

/// Where a keeper last heard a shard's newest owner: its epoch, its router, by which link.
type Way = Option<(u64, usize, u32)>;

pub(super) struct Fleet {
    routers: usize,
    up: Vec<bool>,
    /// By router.
    far: Vec<Whereabouts>,
    /// By keeper.
    here: Vec<Option<Here>>,
    pub(super) heard: Vec<u64>,
    /// By keeper and shard.
    ways: Vec<Way>,
    /// By the lower router and the higher one.
    links: Vec<Link>,
    pipe_at: Vec<u64>,
}

impl Fleet {
    pub(super) fn new(routers: usize, agents: usize, shards: usize) -> Self {
        Self {
            routers,
            up: vec![true; routers],
            far: (0..routers).map(whereabouts).collect(),
            here: (0..routers * agents).map(|_| None).collect(),
            heard: vec![0; routers * agents],
            ways: vec![None; routers * agents * shards],
            links: vec![Link { up: true, no: 0 }; routers * routers],
            pipe_at: vec![0; routers * routers],
        }
    }

    fn pair(&self, a: usize, b: usize) -> usize {
        a.min(b) * self.routers + a.max(b)
    }
}

fn name(router: usize) -> String {
    router.to_string()
}

fn whereabouts(router: usize) -> Whereabouts {
    Whereabouts::new(&name(router))
}

/// Of a fifth of the schedules several routers share the work. Agents connect to one after the other; links between routers break.
pub fn plan(rng: &mut Rng, plan: &mut Plan) {
    if plan.is_calm() || !rng.percent(20) {
        return;
    }
    plan.routers = rng.pick(&[2, 2, 3]) as usize;
    plan.faults.half_open_ms = rng.pick(&[0, 300, 3_000]);
    plan.faults.machines_live_percent = rng.pick(&[0, 50, 80]);
    if rng.percent(50) {
        // What a link carries is there and in order, or the link is gone.
        (plan.faults.loss_percent, plan.faults.duplicate_percent) = (0, 0);
    }
    if rng.percent(50) {
        // Agents that stay nowhere, while what they are sent is long on its way.
        (plan.faults.long_delay_percent, plan.faults.delay_max_ms) = (40, 1_500);
        let mut often = |most: u64| (0..rng.range(0, most)).map(|_| rng.range(1_000, 6_000)).collect();
        (plan.move_agent_at, plan.cut_link_at) = (often(30), often(12));
    } else {
        (plan.move_agent_at, plan.cut_link_at) = (times(rng, plan.heal_at, 3), times(rng, plan.heal_at, 3));
    }
}

/// What a plan has for the time between the first event and healing.
pub fn schedule(s: &mut Sched, plan: &Plan) {
    if plan.routers == 1 {
        return;
    }
    (0..plan.routers).for_each(|router| s.after(ANNOUNCE_MS, event(Between::Announce { router, generation: 0 })));
    for at in &plan.move_agent_at {
        let agent = s.rng.index(plan.agents.len());
        s.at(*at, event(Between::Moves { agent }));
    }
    for at in &plan.cut_link_at {
        let a = s.rng.index(plan.routers);
        let b = (a + 1 + s.rng.index(plan.routers - 1)) % plan.routers;
        let ms = s.rng.pick(&[100, 700, 1_500]);
        s.at(*at, event(Between::Cut { pair: (a, b), ms }));
    }
}

fn event(between: Between) -> Event {
    Event::Between(Box::new(between))
}

impl Process {
    /// It leaves its router for whichever it finds next; what was on its way down the old connection is not read any more.
    pub fn moves(&mut self, s: &mut Sched) {
        if let Some(conn) = self.conn.take_if(|_| self.alive) {
            s.say(|| format!("{} leaves its router", self.plan.name));
            s.peer_dies(conn);
            let ms = s.rng.range(0, 50);
            s.after(ms, Event::AgentConnect { agent: self.index, life: self.life });
        }
    }
}

impl Keepers {
    /// There are several routers.
    #[must_use]
    pub fn is_fleet(&self) -> bool {
        self.fleet.routers > 1
    }

    /// The run of a link; `None`: there is none now.
    pub(super) fn link(&self, from: usize, to: usize) -> Option<u32> {
        let link = self.fleet.links[self.fleet.pair(from, to)];
        link.up.then_some(link.no)
    }

    /// The keeper that a router takes an agent's messages to: its own, if it can't reach another.
    pub(super) fn where_is(&self, router: usize, agent: usize) -> usize {
        let keeper = self.at(router, agent);
        let far = self.far(router, agent).filter(|far| self.link(router, *far).is_some());
        far.map_or(keeper, |far| self.at(far, agent))
    }

    /// The other router that speaks for an agent.
    fn far(&self, router: usize, agent: usize) -> Option<usize> {
        self.fleet.far[router].of(&self.names[agent])?.router.parse().ok()
    }

    pub(super) fn note_way(&mut self, keeper: usize, message: &ToAgent, from: usize, link: u32) {
        let (shard, epoch) = message.of();
        let way = &mut self.fleet.ways[keeper * self.shards + shard as usize];
        if way.is_none_or(|(newest, ..)| epoch >= newest) {
            *way = Some((epoch, from, link));
        }
    }

    /// A router that runs and is none of these, for who begins to own a shard or for an agent. No chance where there is only one.
    pub fn any_router(&self, s: &mut Sched, but: &[usize]) -> Option<usize> {
        if !self.is_fleet() {
            return Some(0);
        }
        let may = |router: &usize| self.fleet.up[*router] && !but.contains(router);
        let routers: Vec<usize> = (0..self.fleet.routers).filter(may).collect();
        (!routers.is_empty()).then(|| s.rng.pick(&routers))
    }

    /// Whom an owner at this router introduces itself to.
    pub fn known_at(&self, router: usize) -> Vec<usize> {
        let known = |agent: &usize| {
            let keeper = self.at(router, *agent);
            !self.is_fleet() || self.machines[keeper].is_some() || self.far(router, *agent).is_some()
        };
        (0..self.names.len()).filter(known).collect()
    }

    /// Of one handle one incarnation, in the whole fleet, as far as this router knows.
    pub(super) fn may_connect(&self, s: &Sched, keeper: usize, incarnation: &str) -> bool {
        let (router, agent) = self.of(keeper);
        self.fleet.far[router].may_connect(&self.names[agent], incarnation, s.now_ms).is_ok()
    }

    // ---- from keepers to shards -------------------------------------------------------------------------------------

    /// To the router where a shard's newest owner was heard.
    pub(super) fn tell_owner(&mut self, s: &mut Sched, keeper: usize, shard: u32, message: FromAgent, repeated: bool) {
        let (from, _) = self.of(keeper);
        let way = self.fleet.ways[keeper * self.shards + shard as usize];
        let (to, link) = way.map_or((from, self.link(from, from)), |(_, to, link)| (to, Some(link)));
        if self.link(from, to) != link {
            return;
        }
        if !repeated || from == to {
            return self.push(s, from, to, Some(shard), message);
        }
        let run = (self.generation[to], link.unwrap_or_default());
        for _ in 0..s.copies() {
            let ms = s.delay();
            s.after(ms, event(Between::Said { from, to, run, shard: Some(shard), message: Box::new(message.clone()) }));
        }
    }

    /// To every shard, wherever it is.
    pub(super) fn tell_all(&mut self, s: &mut Sched, keeper: usize, message: &FromAgent) {
        let (from, agent) = self.of(keeper);
        // It left here, and is connected elsewhere.
        if matches!(message, FromAgent::Down { .. }) && self.far(from, agent).is_some() {
            return;
        }
        s.note(&keeper, || format!("keeper {keeper} tells all {message:?}"));
        for to in 0..self.fleet.routers {
            self.push(s, from, to, None, message.clone());
        }
    }

    fn push(&mut self, s: &mut Sched, from: usize, to: usize, shard: Option<u32>, message: FromAgent) {
        if let Some(link) = self.link(from, to) {
            let run = (self.generation[to], link);
            self.pipe(s, from, to, Between::Said { from, to, run, shard, message: Box::new(message) });
        }
    }

    /// What goes from one router to another keeps its order.
    fn pipe(&mut self, s: &mut Sched, from: usize, to: usize, between: Between) {
        let ms = s.delay();
        let last = &mut self.fleet.pipe_at[from * self.fleet.routers + to];
        *last = (*last).max(s.now_ms + ms);
        s.at(*last, event(between));
    }

    /// After each input of a machine: whether its agent came or went.
    pub(super) fn note_presence(&mut self, s: &mut Sched, keeper: usize) {
        let (router, agent) = self.of(keeper);
        let link = self.machines[keeper].as_ref().and_then(|machine| machine.link());
        if self.fleet.here[keeper].as_ref().map(|here| (here.conn, &*here.incarnation)) == link {
            return;
        }
        let here = link.map(|(conn, of)| Here { conn, incarnation: of.into(), since: s.now_ms });
        if here.is_some() {
            self.fleet.far[router].is_here(&self.names[agent]);
        }
        self.fleet.here[keeper] = here;
        (0..self.fleet.routers).for_each(|to| self.announce(s, router, to));
    }

    fn announce(&mut self, s: &mut Sched, from: usize, to: usize) {
        let Some(link) = self.link(from, to).filter(|_| from != to) else { return };
        let update = RouteUpdate { router_id: name(from), agents: self.routes(s, from) };
        let run = (self.generation[to], link);
        self.pipe(s, from, to, Between::Routes { from, to, run, update });
    }

    fn routes(&self, s: &Sched, router: usize) -> Vec<AgentRoute> {
        let of = |agent: usize| {
            let keeper = self.at(router, agent);
            let here = self.fleet.here[keeper].as_ref()?;
            let (connected_ms, heard_ms) = (s.now_ms - here.since, s.now_ms - self.fleet.heard[keeper]);
            let (agent_prefix, incarnation) = (self.names[agent].clone(), here.incarnation.clone());
            Some(AgentRoute { agent_prefix, incarnation, connected_ms, heard_ms })
        };
        (0..self.names.len()).filter_map(of).collect()
    }

    // ---- what happens -----------------------------------------------------------------------------------------------

    pub fn between(&mut self, s: &mut Sched, check: &mut Check, between: Between) -> News {
        let mut news = News::default();
        match between {
            Between::Said { from, to, run, shard, message }
                if self.arrives(from, to, run) && (from == to || self.hears(s, check, (from, to), &message)) =>
            {
                news.told.push((to, shard, *message));
            }
            Between::Routes { from, to, run, update } if self.arrives(from, to, run) => {
                self.update(s, check, (from, to), &update, &mut news);
            }
            Between::Announce { router, generation } if generation == self.generation[router] => {
                (0..self.fleet.routers).for_each(|to| self.announce(s, router, to));
                s.after(ANNOUNCE_MS, event(Between::Announce { router, generation }));
            }
            Between::Cut { pair: (a, b), ms } if !s.healed => {
                s.say(|| format!("the link between routers {a} and {b} breaks"));
                self.cut(s, a, b);
                let link = self.fleet.links[self.fleet.pair(a, b)].no;
                s.after(ms, event(Between::Linked { pair: (a, b), link }));
            }
            Between::Lost { at, of, link } => {
                let pair = self.fleet.pair(at, of);
                if self.fleet.links[pair].no == link {
                    self.forget(at, of, &mut news);
                }
            }
            Between::Linked { pair: (a, b), link }
                if self.fleet.links[self.fleet.pair(a, b)].no == link && self.fleet.up[a] && self.fleet.up[b] =>
            {
                self.links(s, a, b, &mut news);
            }
            Between::Starts { router, generation } if generation == self.generation[router] => {
                self.starts(s, router);
            }
            _ => {}
        }
        news
    }

    fn arrives(&self, from: usize, to: usize, (generation, link): (u32, u32)) -> bool {
        generation == self.generation[to] && self.link(from, to) == Some(link)
    }

    fn agent(&self, name: &AgentName) -> usize {
        self.names.iter().position(|known| known == name).expect("one of the plan's")
    }

    /// Whether a router believes what another one says of an agent.
    fn hears(&mut self, s: &mut Sched, check: &mut Check, pair: (usize, usize), message: &FromAgent) -> bool {
        let (from, to) = pair;
        let here = match message {
            FromAgent::Up { agent, .. } => self.fleet.here[self.at(to, self.agent(agent))].as_ref(),
            _ => None,
        };
        let here = here.map(|own| &*own.incarnation);
        match self.fleet.far[to].hears(&name(from), message, here, s.now_ms) {
            Word::Void => return false,
            Word::Counts => {}
            // A keeper that an agent had here hears what it says to another one.
            Word::Status { agent, incarnation, status } => {
                let keeper = self.at(to, self.agent(&agent));
                if self.machines[keeper].is_some() && self.fleet.here[keeper].is_none() {
                    check.statuses.said_elsewhere(keeper, &incarnation, &status, s.now_ms);
                    self.machine(s, check, keeper, AgentInput::SaidElsewhere { incarnation, status });
                }
            }
        }
        true
    }

    /// All agents of another router.
    fn update(&mut self, s: &mut Sched, check: &mut Check, pair: (usize, usize), said: &RouteUpdate, news: &mut News) {
        let (from, to) = pair;
        let own = self.routes(s, to);
        let means = self.fleet.far[to].update(&name(from), said, &own, s.now_ms);
        for (agent, _) in means.elsewhere {
            self.elsewhere(s, check, self.at(to, self.agent(&agent)));
        }
        news.come.extend(means.come.iter().map(|agent| (to, self.agent(agent))));
        gone(to, means.gone, news);
    }

    /// An agent is connected to another router, and that counts.
    fn elsewhere(&mut self, s: &mut Sched, check: &mut Check, keeper: usize) {
        let (of, agent) = self.of(keeper);
        for conn in 0..s.net.conns.len() {
            let is_its =
                matches!(s.net.conns[conn].peer, Peer::Agent { router, agent: a, .. } if (router, a) == (of, agent));
            if is_its && s.net.conns[conn].router_open {
                s.say(|| format!("router {of} closes {conn}: its agent is elsewhere"));
                s.router_closes(conn);
                self.disconnected(s, check, keeper, conn);
            }
        }
    }

    /// A router forgets the agents of another one.
    fn forget(&mut self, at: usize, of: usize, news: &mut News) {
        gone(at, self.fleet.far[at].lost(&name(of)), news);
    }

    // ---- links and routers ------------------------------------------------------------------------------------------

    /// The link between two routers is gone, and what was on its way; each notices by itself.
    fn cut(&mut self, s: &mut Sched, a: usize, b: usize) {
        let pair = self.fleet.pair(a, b);
        let link = &mut self.fleet.links[pair];
        (link.up, link.no) = (false, link.no + 1);
        let no = link.no;
        for (at, of) in [(a, b), (b, a)] {
            let ms = s.lag();
            s.after(ms, event(Between::Lost { at, of, link: no }));
        }
    }

    fn links(&mut self, s: &mut Sched, a: usize, b: usize, news: &mut News) {
        let pair = self.fleet.pair(a, b);
        let link = &mut self.fleet.links[pair];
        if link.up {
            return;
        }
        (link.up, link.no) = (true, link.no + 1);
        for (at, of) in [(a, b), (b, a)] {
            // Who didn't notice that the former one broke does now.
            self.forget(at, of, news);
            self.announce(s, at, of);
        }
    }

    /// The process of a router dies, and with it its keepers; not the agents.
    pub fn router_dies(&mut self, s: &mut Sched, check: &mut Check, router: usize) {
        self.die(check, router);
        self.fleet.up[router] = false;
        let keepers = self.at(router, 0)..self.at(router + 1, 0);
        self.fleet.ways[keepers.start * self.shards..keepers.end * self.shards].fill(None);
        self.fleet.here[keepers].fill_with(|| None);
        self.fleet.far[router] = whereabouts(router);
        for other in (0..self.fleet.routers).filter(|other| *other != router) {
            self.cut(s, router, other);
        }
        let ms = s.rng.range(100, 5_000);
        s.after(ms, event(Between::Starts { router, generation: self.generation[router] }));
        s.after(0, event(Between::Died { router }));
    }

    fn starts(&mut self, s: &mut Sched, router: usize) {
        if std::mem::replace(&mut self.fleet.up[router], true) {
            return;
        }
        let generation = self.generation[router];
        s.after(ANNOUNCE_MS, event(Between::Announce { router, generation }));
        for other in (0..self.fleet.routers).filter(|other| *other != router) {
            let link = self.fleet.links[self.fleet.pair(router, other)].no;
            let ms = s.rng.range(0, 200);
            s.after(ms, event(Between::Linked { pair: (router, other), link }));
        }
    }

    /// All routers run, and reach each other.
    pub fn heal(&mut self, s: &mut Sched) -> News {
        let mut news = News::default();
        for router in 0..self.fleet.routers {
            self.starts(s, router);
            (0..router).for_each(|other| self.links(s, router, other, &mut news));
        }
        news
    }
}

/// The shards at a router hear that these agents are gone.
fn gone(at: usize, agents: Vec<(AgentName, String)>, news: &mut News) {
    let down = |(agent, incarnation): (AgentName, String)| FromAgent::Down { agent, incarnation: incarnation.into() };
    news.told.extend(agents.into_iter().map(|gone| (at, None, down(gone))));
}

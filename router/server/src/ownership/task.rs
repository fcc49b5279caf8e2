//! The task that owns "which shards are here": a turn at the store each third of a lease, shards taken, run, given and lost.

use super::Fleet;
use super::asking::{Asking, lives};
use super::following::Following;
use super::handle::{Handle, NotDrained, Order};
use super::plan::{self, Facts, Last, Step};
use super::taking::{Taken, Taker};
use crate::config::{Config, Problem};
use crate::inbox::ToShard;
use crate::log::LogError;
use crate::opening::{SharedLog, settings_of};
use crate::router::StartError;
use crate::running::Running;
use crate::shards::{Place, Shards, Site, Sites};
use crate::store::{Found, Lease, RedisStore, Seen, StateStore, Turn, differs};
use crate::time::Clocks;
use metrics::counter;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// A lease is renewed, or asked for, so often within its time.
const TIMES: u32 = 3;
/// Between two turns while a shard is on its way from one router to another.
const QUICK: Duration = Duration::from_millis(100);
/// How long giving back may take; a lease lapses anyway.
const RELEASE: Duration = Duration::from_secs(1);
/// Shards that are taken and read at the same time, and that are on their way to others.
const AT_ONCE: usize = 8;
/// A router has been there for so many leases before it is handed anything.
const SETTLED: u32 = 2;

/// What the task needs to begin.
pub(crate) struct Begin {
    pub(crate) log: SharedLog,
    pub(crate) store: RedisStore,
    pub(crate) running: Running,
    pub(crate) shards: Shards,
    pub(crate) sites: watch::Sender<Sites>,
    pub(crate) me: Site,
    pub(crate) config: watch::Receiver<Arc<Config>>,
    pub(crate) clocks: Clocks,
    /// Ends all shards and this task.
    pub(crate) stop: CancellationToken,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Idle,
    BacksOff {
        until: Instant,
    },
    /// The lease is here; the log is being taken. True: another router gave it.
    Taken {
        given: bool,
    },
    Runs,
    /// It is being ended for this router.
    Gives(Arc<Site>),
    /// The lease is that router's, which is taking the log.
    Given(Arc<Site>, Instant),
}

/// What is known of a shard here.
pub(super) struct Known {
    state: State,
    /// Who owned it last, of those that were seen.
    last: Option<Arc<Site>>,
    /// Since when its lease is nobody's, and whether it was given back.
    loose: Option<(Instant, bool)>,
    pub(super) seen: Seen,
}

pub(super) struct Alive {
    pub(super) site: Arc<Site>,
    since: Instant,
    pub(super) drained: bool,
}

pub(crate) struct Ownership {
    log: SharedLog,
    store: RedisStore,
    running: Running,
    pub(super) shards: Shards,
    sites: watch::Sender<Sites>,
    pub(super) me: Arc<Site>,
    /// As its leases have it.
    holder: String,
    ttl: Duration,
    config: watch::Receiver<Arc<Config>>,
    clocks: Clocks,
    stop: CancellationToken,
    pub(super) known: Vec<Known>,
    /// By name; this router too, if it is one of them.
    pub(super) alive: BTreeMap<String, Alive>,
    asking: Asking,
    pub(super) following: Following,
    taking: JoinSet<(u32, Result<Taken, LogError>)>,
    at_once: Arc<Semaphore>,
    /// Leases to give back with the next turn.
    unused: Vec<u32>,
    orders: mpsc::Receiver<Order>,
    pub(super) fleet: watch::Sender<Arc<Fleet>>,
    /// Since when the store has answered.
    looking: Option<Instant>,
    /// Why the store gave no answer to the last turn.
    away: Option<String>,
    next_turn: Instant,
    /// Who waits until nothing is owned here, and since when that is wanted.
    leaving: Vec<oneshot::Sender<()>>,
    pub(super) drained: Option<Instant>,
    /// Shards that others are to give this router, and since when there are so many.
    expected: (usize, Instant),
}

impl Ownership {
    pub(crate) fn new(begin: Begin) -> (Self, Handle) {
        let Begin { log, store, running, shards, sites, me, config, clocks, stop } = begin;
        let (orders, taken) = mpsc::channel(16);
        let fleet = watch::Sender::new(Arc::new(Fleet::default()));
        let handle = Handle { orders, fleet: fleet.subscribe() };
        let known = |_| Known { state: State::Idle, last: None, loose: None, seen: Seen::default() };
        let (now, ttl) = (Instant::now(), Duration::from_millis(config.borrow().limits.lease_ms));
        let ownership = Self {
            known: (0..shards.placement().shards()).map(known).collect(),
            following: Following::new(log.kafka.source()),
            holder: me.text(),
            me: Arc::new(me),
            ttl,
            log,
            store,
            running,
            shards,
            sites,
            config,
            clocks,
            stop,
            alive: BTreeMap::new(),
            asking: Asking::default(),
            taking: JoinSet::new(),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            unused: Vec::new(),
            orders: taken,
            fleet,
            looking: None,
            away: None,
            next_turn: now,
            leaving: Vec::new(),
            drained: None,
            expected: (0, now),
        };
        (ownership, handle)
    }

    /// The first turn.
    ///
    /// # Errors
    /// Another router that answers has this one's id, or the store remembers another log. A former run of this router locks
    /// nobody out: it doesn't answer any more.
    pub(crate) async fn begin(&mut self) -> Result<(), StartError> {
        self.turn().await.map_err(StartError::Store)?;
        let namesake = self.alive.get(&self.me.router).map(|alive| alive.site.clone());
        match namesake.filter(|site| *site != self.me) {
            Some(other) if lives(&other).await => Err(StartError::Config(vec![same_id(&other)])),
            _ => Ok(()),
        }
    }

    /// Runs until it is stopped; then gives back what it holds.
    ///
    /// # Errors
    /// Acknowledged records are gone, or can't be read: nothing may be served.
    pub(crate) async fn run(mut self) -> Result<(), String> {
        let following = tokio::spawn(self.following.clone().run(self.stop.clone()));
        let outcome = self.serve().await;
        self.stop.cancel();
        while let Some((shard, ended)) = self.running.ended().await {
            if let Err(why) = ended {
                tracing::warn!(shard, why, "the shard ended");
            }
        }
        let _ = following.await;
        let held: Vec<u32> = self.held().into_iter().collect();
        let give_back = async {
            let _ = self.store.release(&held, &self.holder, None).await;
            let _ = self.store.leave(&self.me.router, &self.holder).await;
        };
        let _ = timeout(RELEASE, give_back).await;
        outcome
    }

    async fn serve(&mut self) -> Result<(), String> {
        let stop = self.stop.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                Some((shard, ended)) = self.running.ended() => self.ended(shard, ended).await,
                Some(taken) = self.taking.join_next() => {
                    let (shard, taken) = taken.map_err(|e| format!("taking a shard broke: {e}"))?;
                    self.taken(shard, taken).await?;
                }
                Some(order) = self.orders.recv() => self.order(order).await,
                () = self.asking.next() => self.next_turn = Instant::now(),
                () = sleep_until(self.next_turn) => self.turn().await?,
            }
            self.show();
        }
    }

    /// The shards whose leases are kept.
    fn held(&self) -> BTreeSet<u32> {
        let holds = |known: &Known| matches!(known.state, State::Taken { .. } | State::Runs | State::Gives(_));
        (0..).zip(&self.known).filter(|(_, known)| holds(known)).map(|(shard, _)| shard).collect()
    }

    async fn turn(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        if !self.unused.is_empty() {
            // Where that is lost they lapse.
            let unused = std::mem::take(&mut self.unused);
            let _ = timeout(self.ttl / TIMES, self.store.release(&unused, &self.holder, None)).await;
        }
        let mut held = self.held();
        match self.ask(&held).await {
            Err(why) => self.is_away(why),
            Ok(found) => {
                self.see(found)?;
                let wanted = self.plan();
                if !wanted.is_empty() {
                    held.extend(wanted.iter().map(|(shard, _)| *shard));
                    match self.ask(&held).await {
                        Err(why) => self.is_away(why),
                        Ok(found) => {
                            self.see(found)?;
                            wanted.into_iter().for_each(|(shard, given)| self.take(shard, given));
                        }
                    }
                }
            }
        }
        self.next_turn = begun + if self.is_quick() { QUICK } else { self.ttl / TIMES };
        self.left();
        self.show();
        Ok(())
    }

    /// Takes or keeps the leases of these shards.
    async fn ask(&mut self, wanted: &BTreeSet<u32>) -> Result<Found, String> {
        let followed = self.following.positions();
        let turn = Turn {
            router: &self.me.router,
            holder: &self.holder,
            wanted,
            followed: &followed,
            shards: self.shards.placement().shards(),
            at_ms: self.clocks.now().wall_ms,
            ttl: self.ttl,
        };
        match timeout(self.ttl / TIMES, self.store.turn(&turn)).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) => Err("no answer".into()),
        }
    }

    fn is_away(&mut self, why: String) {
        if self.away.is_none() {
            tracing::warn!(
                why,
                "no lease can be renewed; shards that run go on, and nobody begins to own one meanwhile"
            );
        }
        self.away = Some(why);
    }

    /// Takes in what the store says: who lives, who is where.
    fn see(&mut self, found: Found) -> Result<(), String> {
        let now = Instant::now();
        if self.away.take().is_some() {
            tracing::info!("the leases can be renewed again");
        }
        self.looking.get_or_insert(now);
        let mut alive = BTreeMap::new();
        for (router, text) in &found.alive {
            let Some(site) = Site::read(text) else { continue };
            let before = self.alive.remove(router).filter(|before| *before.site == site);
            let drained = found.drained.get(router) == Some(&site.incarnation);
            let is_new = before.is_none();
            let (site, since) = before.map_or_else(|| (Arc::new(site), now), |before| (before.site, before.since));
            if *site == *self.me {
                match (drained, self.drained) {
                    (true, None) => self.drained = Some(now),
                    (false, Some(_)) if self.leaving.is_empty() => self.drained = None,
                    _ => {}
                }
            } else if *router == self.me.router && is_new {
                tracing::warn!("{}; unless it has just ended, this router owns nothing while it lives", same_id(&site));
            }
            alive.insert(router.clone(), Alive { site, since, drained });
        }
        self.alive = alive;
        let others = self.alive.values().filter(|alive| *alive.site != *self.me).map(|alive| alive.site.clone());
        let others: Vec<Arc<Site>> = others.collect();
        self.sites.send_if_modified(|sites| {
            let news = **sites != others;
            *sites = Arc::new(others);
            news
        });
        for (shard, seen) in (0..).zip(found.shards) {
            if let Some(what) = differs(seen.watermark.clone(), &self.log.id, u64::MAX) {
                return Err(format!("ELOG: {what}; set another store.redis.prefix for another log"));
            }
            let known = &mut self.known[shard as usize];
            match &seen.lease {
                Lease::Of(text) => {
                    known.loose = None;
                    known.last = Site::read(text).map(|site| match &known.last {
                        Some(last) if **last == site => last.clone(),
                        _ => Arc::new(site),
                    });
                }
                loose => {
                    let free = *loose == Lease::Free;
                    if known.loose.is_none_or(|(_, was_free)| was_free != free) {
                        known.loose = Some((now, free));
                    }
                }
            }
            let owner_seen = |site: &Site| seen.watermark.as_ref().is_some_and(|w| w.router == site.router);
            match &known.state {
                State::Given(heir, at)
                    if owner_seen(heir) || at.elapsed() > SETTLED * self.ttl || known.loose.is_some() =>
                {
                    known.state = State::Idle;
                }
                State::BacksOff { until } if *until <= now => known.state = State::Idle,
                _ => {}
            }
            known.seen = seen;
            if matches!(known.state, State::Idle | State::BacksOff { .. } | State::Given(..)) {
                let is_there = |site: &&Arc<Site>| {
                    **site != self.me && self.alive.get(&site.router).is_some_and(|alive| alive.site == **site)
                };
                let place = known.last.as_ref().filter(is_there).cloned().map_or(Place::Unknown, Place::At);
                self.shards.set(shard, place);
            }
        }
        Ok(())
    }

    /// Gives what belongs to others, asks after owners that may be gone, sets what is followed; the shards to take, and whether each
    /// was left to this router.
    fn plan(&mut self) -> Vec<(u32, bool)> {
        let (now, looking) = (Instant::now(), self.looking.map(|since| since.elapsed()).unwrap_or_default());
        self.asking.forget(2 * self.ttl);
        let candidates: Vec<&str> =
            self.alive.iter().filter(|(_, alive)| self.may_own(alive)).map(|(r, _)| &**r).collect();
        // Who is to be given something has to know first that it is awaited.
        let gives = self.drained.is_none_or(|since| since.elapsed() >= self.ttl / TIMES);
        let mut under_way = self.known.iter().filter(|k| matches!(k.state, State::Gives(_) | State::Given(..))).count();
        let (mut wanted, mut followed, mut expected) = (Vec::new(), BTreeSet::new(), 0);
        let mut given = Vec::new();
        let is_known = self.alive.get(&self.me.router).is_some_and(|alive| alive.site == self.me);
        for (shard, known) in (0..).zip(&self.known) {
            let ranked = self.shards.placement().rank(shard, candidates.iter().copied());
            let rank = ranked.iter().position(|router| *router == self.me.router).filter(|_| is_known);
            let settled = |alive: &&Alive| {
                alive.site == self.me || self.drained.is_some() || alive.since.elapsed() >= SETTLED * self.ttl
            };
            let nearest = ranked.iter().filter_map(|router| self.alive.get(*router)).find(settled);
            let heir = nearest.map(|alive| &alive.site).filter(|site| **site != self.me);
            let lease = match (&known.seen.lease, known.loose) {
                (Lease::Of(holder), _) if *holder == self.holder => plan::Lease::Mine,
                (Lease::Of(_), _) => plan::Lease::Others,
                (_, Some((since, true))) => plan::Lease::Free { since: now - since },
                (_, loose) => plan::Lease::Lapsed { since: loose.map(|(since, _)| now - since).unwrap_or_default() },
            };
            let last = match &known.last {
                None if self.log.kafka.was_owned(shard) => Last::Unknown,
                None => Last::Nobody,
                Some(site) if *site == self.me => Last::Nobody,
                Some(site) => match self.asking.owns(site, shard, self.ttl) {
                    None => Last::Unasked,
                    Some(true) => Last::Owns,
                    Some(false) => Last::Gone,
                },
            };
            let state = match known.state {
                State::Idle => plan::State::Idle,
                State::BacksOff { .. } => plan::State::BacksOff,
                State::Runs => plan::State::Runs,
                State::Taken { .. } | State::Gives(_) | State::Given(..) => plan::State::Moves,
            };
            let rank = rank.and_then(|rank| u32::try_from(rank).ok());
            let facts = Facts { state, lease, ttl: self.ttl, rank, heir: heir.is_some() && gives, last, up: looking };
            match plan::step(&facts) {
                Step::Wait => {}
                Step::Ask => known.last.iter().for_each(|site| self.asking.ask(site)),
                Step::Take => wanted.push((shard, lease == plan::Lease::Mine)),
                Step::Give if under_way < AT_ONCE => {
                    under_way += 1;
                    given.extend(heir.map(|heir| (shard, heir.clone())));
                }
                Step::Give => {}
            }
            let is_here = matches!(known.state, State::Runs | State::Taken { .. } | State::Gives(_));
            if !is_here && rank.is_some_and(|rank| rank < 2) {
                followed.insert(shard);
            }
            let owner_leaves =
                || known.last.as_ref().and_then(|s| self.alive.get(&s.router)).is_some_and(|a| a.drained);
            if state == plan::State::Idle
                && rank == Some(0)
                && lease == plan::Lease::Others
                && (looking >= SETTLED * self.ttl || owner_leaves())
            {
                expected += 1;
            }
        }
        for (shard, heir) in given {
            self.known[shard as usize].state = State::Gives(heir);
            self.running.stop(shard);
        }
        self.following.set(&followed);
        if self.expected.0 != expected {
            self.expected = (expected, now);
        }
        wanted
    }

    fn may_own(&self, alive: &Alive) -> bool {
        !alive.drained && (alive.site != self.me || self.drained.is_none())
    }

    /// A shard is on its way, or due.
    fn is_quick(&self) -> bool {
        let (expected, since) = self.expected;
        let moves = |known: &Known| matches!(known.state, State::Gives(_) | State::Given(..));
        self.known.iter().any(moves) || (expected > 0 && since.elapsed() < SETTLED * self.ttl)
    }

    /// Takes a shard in the log, if its lease is here now.
    fn take(&mut self, shard: u32, given: bool) {
        let known = &mut self.known[shard as usize];
        if known.seen.lease != Lease::Of(self.holder.clone()) {
            return;
        }
        known.state = State::Taken { given };
        self.shards.set(shard, Place::Unknown);
        let (slot, at_once) = (self.following.take(shard), self.at_once.clone());
        let taker = Taker {
            log: self.log.clone(),
            shards: self.shards.clone(),
            config: self.config.borrow().clone(),
            clocks: self.clocks,
            incarnation: self.me.incarnation.clone(),
            shown: known.seen.watermark.clone(),
        };
        self.taking.spawn(async move {
            let _permit = at_once.acquire_owned().await;
            let taken = tokio::task::spawn_blocking(move || taker.take(shard, slot.as_deref())).await;
            let broke = |e: tokio::task::JoinError| LogError::SteppedDown { shard, why: e.to_string() };
            (shard, taken.map_err(broke).and_then(|taken| taken))
        });
    }

    /// # Errors
    /// The log can't be served by anybody: acknowledged records are gone, or contradict each other.
    async fn taken(&mut self, shard: u32, taken: Result<Taken, LogError>) -> Result<(), String> {
        match taken {
            Ok(Taken { opened, config, report }) => {
                for fact in report {
                    tracing::info!("log: {fact}");
                }
                let given = self.known[shard as usize].state == State::Taken { given: true };
                self.known[shard as usize].state = State::Runs;
                self.running.start(opened);
                counter!("atp_shard_moves_total", "reason" => if given { "received" } else { "taken" }).increment(1);
                let now = self.config.borrow().clone();
                if !Arc::ptr_eq(&now, &config)
                    && let Some(inbox) = self.shards.at(shard)
                {
                    let settings = settings_of(&now.settings, shard, self.shards.placement());
                    let _ = inbox.send(64, ToShard::Settings(settings)).await;
                }
                Ok(())
            }
            Err(error @ (LogError::NotThisLog { .. } | LogError::Entry { .. } | LogError::NoShard { .. })) => {
                Err(format!("shard {shard}: {error}"))
            }
            Err(error) => {
                tracing::warn!(shard, %error, "the shard can't be taken; trying again later");
                self.lost(shard);
                Ok(())
            }
        }
    }

    /// A shard's task has ended.
    async fn ended(&mut self, shard: u32, ended: Result<(), String>) {
        let state = self.known[shard as usize].state.clone();
        match (ended, state) {
            (Ok(()), State::Gives(heir)) => {
                self.shards.set(shard, Place::At(heir.clone()));
                let (given, text) = ([shard], heir.text());
                let give = self.store.release(&given, &self.holder, Some((&text, self.ttl)));
                // Where that is lost the lease lapses.
                let _ = timeout(RELEASE, give).await;
                counter!("atp_shard_moves_total", "reason" => "given").increment(1);
                let known = &mut self.known[shard as usize];
                (known.state, known.last) = (State::Given(heir.clone(), Instant::now()), Some(heir));
                // The next one.
                self.next_turn = self.next_turn.min(Instant::now() + QUICK);
            }
            (ended, _) => {
                if let Err(why) = ended {
                    tracing::warn!(shard, why, "the shard is owned here no longer");
                }
                counter!("atp_shard_moves_total", "reason" => "lost").increment(1);
                self.lost(shard);
            }
        }
    }

    /// It isn't owned here; for a while this router doesn't try to.
    fn lost(&mut self, shard: u32) {
        let until = Instant::now() + self.ttl + self.ttl.mul_f64(jitter());
        self.known[shard as usize].state = State::BacksOff { until };
        self.shards.set(shard, Place::Unknown);
        self.unused.push(shard);
        self.next_turn = self.next_turn.min(Instant::now() + QUICK);
    }

    async fn order(&mut self, order: Order) {
        match order {
            Order::Drain { router, drained, reply } => {
                let answer = self.drain(&router, drained).await;
                let _ = reply.send(answer);
            }
            Order::HandOver { over } => {
                self.leaving.push(over);
                self.drained.get_or_insert_with(Instant::now);
                let (router, run) = (self.me.router.clone(), self.me.incarnation.clone());
                let _ = timeout(RELEASE, self.store.drain(&router, Some(&run))).await;
            }
        }
        self.next_turn = Instant::now();
    }

    async fn drain(&mut self, router: &str, drained: bool) -> Result<(), NotDrained> {
        let run = self.alive.get(router).map(|alive| alive.site.incarnation.clone()).ok_or(NotDrained::Unknown)?;
        let run = drained.then_some(&*run);
        match timeout(RELEASE, self.store.drain(router, run)).await {
            Ok(told) => told.map_err(|e| NotDrained::Away(e.to_string())),
            Err(_) => Err(NotDrained::Away("no answer".into())),
        }
    }

    /// Tells who waits for it that nothing is owned here any more, or that nobody is there to own it.
    fn left(&mut self) {
        let alone = !self.alive.values().any(|alive| self.may_own(alive));
        if self.held().is_empty() || alone || self.away.is_some() {
            for over in self.leaving.drain(..) {
                let _ = over.send(());
            }
        }
    }
}

fn same_id(other: &Site) -> Problem {
    let message = format!("`{}` is the id of another run, at {}", other.router, other.http);
    Problem::nowhere("router.id", message, "give each router of a fleet an id of its own, or stop the other one")
}

/// 0 to 0.5, another one each time.
fn jitter() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 512.0
}

//! Virtual time, the queue of events, the trace. Owned by the world; actors get it to schedule what they do next.

use crate::simulation::keepers::between::Between;
use crate::simulation::net::Net;
use crate::simulation::partition::Sent;
use crate::simulation::plan::Faults;
use crate::simulation::rng::Rng;
use atp_core::clock::Now;
use atp_core::escrow::Escrow;
use atp_core::message::{FromAgent, ToAgent, ToolDone};
use atp_proto::{CallId, Frame};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::hash::{Hash, Hasher};

/// What happens at a moment.
#[derive(Debug)]
pub enum Event {
    /// A frame reaches the router on this connection.
    Up {
        conn: usize,
        seq: u64,
        frame: Box<Frame>,
    },
    /// A frame reaches the peer.
    Down {
        conn: usize,
        seq: u64,
        frame: Box<Frame>,
    },
    RouterLearnsGone {
        conn: usize,
    },
    PeerLearnsGone {
        conn: usize,
    },
    /// `from`: the router of who says it, by which link.
    ToMachine {
        keeper: usize,
        generation: u32,
        from: usize,
        link: u32,
        message: Box<ToAgent>,
    },
    ToShard {
        shard: u32,
        generation: u32,
        message: Box<FromAgent>,
    },
    Between(Box<Between>),
    /// What a shard says to another.
    Escrow {
        from: u32,
        to: u32,
        message: Box<Escrow>,
    },
    /// Messages reach the brokers of a partition.
    Arrive {
        shard: u32,
        sent: Vec<Sent>,
    },
    /// What brokers say of an owner's messages: which one, its offset if that is known.
    Reports {
        shard: u32,
        owner: u32,
        reports: Vec<(u64, Option<u64>)>,
    },
    Commit {
        shard: u32,
        owner: u32,
    },
    Unpause {
        shard: u32,
        owner: u32,
    },
    Replay {
        shard: u32,
        owner: u32,
        request: Box<Replay>,
    },
    /// A mediated tool has ended.
    ToolDone {
        shard: u32,
        owner: u32,
        done: Box<ToolDone>,
    },
    Crash {
        shard: u32,
    },
    /// The process of which a shard's owner died had all the others too.
    ProcessDies,
    /// A client's connection died with a shard: the other shards hear of it.
    ConnLost {
        conn: usize,
    },
    Restart {
        shard: u32,
    },
    TakeOver {
        shard: u32,
    },
    /// An owner that was replaced hears of it.
    StepDown {
        shard: u32,
        owner: u32,
    },
    /// Two shards don't hear each other for a while.
    Cut {
        pair: (u32, u32),
        ms: u64,
    },
    Connect {
        client: usize,
    },
    Start {
        task: usize,
    },
    Patience {
        task: usize,
        sends: u32,
    },
    CancelTask {
        task: usize,
    },
    AgentStart {
        agent: usize,
    },
    AgentConnect {
        agent: usize,
        life: u32,
    },
    AgentCrash {
        agent: usize,
    },
    Step {
        agent: usize,
        life: u32,
        call: CallId,
        step: u32,
    },
    AgentDeadline {
        agent: usize,
        life: u32,
        call: CallId,
    },
    Beat {
        agent: usize,
        life: u32,
    },
    AgentStatus {
        agent: usize,
    },
    BreakClient {
        client: usize,
    },
    BreakAgent {
        agent: usize,
    },
    Checkpoint,
    Query,
    LogRoom,
    /// The operator changes the accounts.
    Reload,
    WallJump {
        by_ms: i64,
    },
    Drain,
    Heal,
}

/// What `Effect::Replay` asks for.
#[derive(Debug)]
pub struct Replay {
    pub conn: atp_proto::ConnId,
    pub tenant: atp_proto::TenantId,
    pub stream: atp_proto::StreamId,
    pub from: u64,
    pub after: u64,
    pub upto: u64,
}

struct Scheduled {
    at: u64,
    seq: u64,
    event: Event,
}
impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

/// FNV-1a: the same on every machine and version, unlike the standard hasher.
#[derive(Clone, Copy, Debug)]
pub struct Fnv(pub u64);
impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}
impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.0 = (self.0 ^ u64::from_le_bytes(*word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(17);
        }
        for byte in rest {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// Time, chance, network and trace of one schedule.
pub struct Sched {
    pub rng: Rng,
    pub now_ms: u64,
    pub wall0_ms: u64,
    pub wall_skew_ms: i64,
    pub net: Net,
    pub faults: Faults,
    pub healed: bool,
    pub steps: u64,
    pub hash: Fnv,
    pub trace: Option<Vec<String>>,
    /// Until when two shards don't hear each other.
    cuts: BTreeMap<(u32, u32), u64>,
    /// When the last of what a shard said to another arrives.
    escrow_at: BTreeMap<(u32, u32), u64>,
    queue: BinaryHeap<Scheduled>,
    seq: u64,
}

impl Sched {
    #[must_use]
    pub fn new(rng: Rng, wall0_ms: u64, faults: Faults, trace: bool) -> Self {
        Self {
            rng,
            now_ms: 1_000,
            wall0_ms,
            wall_skew_ms: 0,
            net: Net::default(),
            faults,
            healed: false,
            steps: 0,
            hash: Fnv::default(),
            trace: trace.then(Vec::new),
            cuts: BTreeMap::new(),
            escrow_at: BTreeMap::new(),
            queue: BinaryHeap::new(),
            seq: 0,
        }
    }

    #[must_use]
    pub fn now(&self) -> Now {
        Now { mono_ms: self.now_ms, wall_ms: (self.wall0_ms + self.now_ms).saturating_add_signed(self.wall_skew_ms) }
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.seq += 1;
        self.queue.push(Scheduled { at: at.max(self.now_ms), seq: self.seq, event });
    }

    pub fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now_ms + ms, event);
    }

    #[must_use]
    pub fn next_at(&self) -> Option<u64> {
        self.queue.peek().map(|s| s.at)
    }

    pub fn pop(&mut self) -> Option<Event> {
        let next = self.queue.pop()?;
        self.now_ms = self.now_ms.max(next.at);
        Some(next.event)
    }

    /// A short delay, sometimes a long one.
    pub fn delay(&mut self) -> u64 {
        let long = self.faults.long_delay_percent;
        if !self.healed && self.rng.percent(long) {
            self.rng.range(0, self.faults.delay_max_ms)
        } else {
            self.rng.range(0, 5)
        }
    }

    /// How often a message that is said again until it is answered arrives: not at all, once or twice.
    pub fn copies(&mut self) -> u32 {
        match () {
            () if self.rng.percent(self.faults.loss_percent) => 0,
            () if self.rng.percent(self.faults.duplicate_percent) => 2,
            () => 1,
        }
    }

    /// Two shards don't hear each other for so long.
    pub fn cut_shards(&mut self, pair: (u32, u32), ms: u64) {
        let until = self.now_ms + ms;
        self.say(|| format!("shards {pair:?} don't hear each other until {until}"));
        self.cuts.insert(pair, until);
    }

    /// A shard says something to another: it may be lost, late, twice, out of order.
    pub fn send_escrow(&mut self, from: u32, to: u32, message: Escrow) {
        let cut = self.cuts.get(&(from.min(to), from.max(to))).is_some_and(|until| self.now_ms < *until);
        let copies = match () {
            () if self.healed => 1,
            () if cut => 0,
            () => self.copies(),
        };
        for _ in 0..copies {
            let ms = self.delay();
            let mut at = self.now_ms + ms;
            if self.healed {
                // One connection, and nothing breaks it.
                let last = self.escrow_at.entry((from, to)).or_default();
                at = at.max(*last);
                *last = at;
            }
            self.at(at, Event::Escrow { from, to, message: Box::new(message.clone()) });
        }
    }

    /// Folds a fact into the hash of the trace, and (traced) keeps its text.
    pub fn note(&mut self, fact: &impl Hash, text: impl FnOnce() -> String) {
        self.now_ms.hash(&mut self.hash);
        fact.hash(&mut self.hash);
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>7} {}", self.now_ms, text()));
        }
    }

    /// A line for the reader of a trace only.
    pub fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>7} {}", self.now_ms, text()));
        }
    }
}

//! Connections: two pipes each, in order like TCP. A break cuts each pipe behind a random prefix of what is on its way.
//! Never reorders within a pipe.

use crate::simulation::sched::{Event, Sched};
use atp_proto::{Frame, TenantId};

/// Who holds the far end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Client(usize),
    Agent { router: usize, agent: usize, life: u32 },
}

#[derive(Debug, Default)]
struct Pipe {
    sent: u64,
    delivered: u64,
    /// Frames from here on are lost.
    cut: Option<u64>,
    last_at: u64,
}

#[derive(Debug)]
pub struct Conn {
    pub peer: Peer,
    pub tenant: TenantId,
    up: Pipe,
    down: Pipe,
    pub router_open: bool,
    pub peer_open: bool,
    /// What the agent's capabilities said, once they were read.
    pub incarnation: Option<std::sync::Arc<str>>,
    pub opened_at: u64,
}

#[derive(Debug, Default)]
pub struct Net {
    pub conns: Vec<Conn>,
}

impl Sched {
    pub fn open(&mut self, peer: Peer, tenant: TenantId) -> usize {
        self.net.conns.push(Conn {
            peer,
            tenant,
            up: Pipe::default(),
            down: Pipe::default(),
            router_open: true,
            peer_open: true,
            incarnation: None,
            opened_at: self.now_ms,
        });
        self.net.conns.len() - 1
    }

    /// The peer sends to the router.
    pub fn send_up(&mut self, conn: usize, frame: Frame) {
        let delay = self.delay();
        let now = self.now_ms;
        let pipe = &mut self.net.conns[conn].up;
        if pipe.cut.is_some() {
            return;
        }
        let (seq, at) = (pipe.sent, pipe.last_at.max(now + delay));
        (pipe.sent, pipe.last_at) = (seq + 1, at);
        self.at(at, Event::Up { conn, seq, frame: Box::new(frame) });
    }

    /// The router sends to the peer.
    pub fn send_down(&mut self, conn: usize, frame: Frame) {
        let delay = self.delay();
        let now = self.now_ms;
        let pipe = &mut self.net.conns[conn].down;
        if pipe.cut.is_some() {
            return;
        }
        let (seq, at) = (pipe.sent, pipe.last_at.max(now + delay));
        (pipe.sent, pipe.last_at) = (seq + 1, at);
        self.at(at, Event::Down { conn, seq, frame: Box::new(frame) });
    }

    /// True when this frame of a pipe arrives; false when it was lost.
    pub fn arrives(&mut self, conn: usize, up: bool, seq: u64) -> bool {
        let conn = &mut self.net.conns[conn];
        let pipe = if up { &mut conn.up } else { &mut conn.down };
        if pipe.cut.is_some_and(|cut| seq >= cut) {
            return false;
        }
        pipe.delivered = seq + 1;
        true
    }

    /// The network breaks the connection: each side gets a prefix of what is on its way, then learns of it.
    pub fn break_conn(&mut self, conn: usize) {
        self.cut(conn, true, true);
        self.cut(conn, false, true);
    }

    /// The router's process is gone: nothing more is read; the peer still gets a prefix of what was sent.
    pub fn router_dies(&mut self, conn: usize) {
        self.net.conns[conn].router_open = false;
        let up = &mut self.net.conns[conn].up;
        up.cut = Some(up.delivered);
        self.cut(conn, false, true);
    }

    /// The peer's process is gone: the router still gets a prefix.
    pub fn peer_dies(&mut self, conn: usize) {
        self.net.conns[conn].peer_open = false;
        let down = &mut self.net.conns[conn].down;
        down.cut = Some(down.delivered);
        self.cut(conn, true, true);
    }

    /// The router closes: what it sent arrives first.
    pub fn router_closes(&mut self, conn: usize) {
        self.net.conns[conn].router_open = false;
        let up = &mut self.net.conns[conn].up;
        up.cut = Some(up.cut.unwrap_or(up.delivered));
        self.cut(conn, false, false);
    }

    /// How long it takes to notice that the other end is gone: a moment, or until nothing was heard for too long.
    pub fn lag(&mut self) -> u64 {
        let half_open = !self.healed && self.faults.half_open_ms > 0 && self.rng.percent(30);
        let most = if half_open { self.faults.half_open_ms } else { 20 };
        self.rng.range(0, most)
    }

    fn cut(&mut self, index: usize, up: bool, lossy: bool) {
        let lag = self.lag();
        let now = self.now_ms;
        let conn = &mut self.net.conns[index];
        let pipe = if up { &mut conn.up } else { &mut conn.down };
        if pipe.cut.is_some() {
            return;
        }
        let kept = if lossy { self.rng.below(pipe.sent - pipe.delivered + 1) } else { pipe.sent - pipe.delivered };
        pipe.cut = Some(pipe.delivered + kept);
        let at = if kept > 0 { pipe.last_at.max(now) } else { now } + lag;
        let event = if up { Event::RouterLearnsGone { conn: index } } else { Event::PeerLearnsGone { conn: index } };
        self.at(at, event);
    }
}

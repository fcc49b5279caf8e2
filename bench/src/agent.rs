//! The agents' end: serves calls at frame level, flat out or at once, within its grant like any agent. It keeps a bounded
//! number of chunks unacknowledged per call; nothing else slows it down.

use crate::chunk::Chunks;
use crate::link::Link;
use crate::peek::{self, Peek};
use atp_proto::content::{
    AgentFinal, BudgetUpdate, Capabilities, Dispatch, EstimateDeclaration, EstimateFigures, Finish, ModelInfo, Role,
};
use atp_proto::frame::kind;
use atp_proto::{AgentName, Amount, Cost, Flags, Frame, Tokens, codec};
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Chunks of one call that may be on their way: 64 KiB at the default size.
const UNACKED_MAX: u64 = 64;
/// A chunk of 1 KiB is about this many tokens.
const CHUNK_TOKENS: u64 = 256;
const PROMPT_TOKENS: u64 = 200;
const ANSWER_TOKENS: u64 = 50;
/// Micro-USD per token in and out: 1 and 4 USD per million.
const IN_PRICE: u64 = 1;
const OUT_PRICE: u64 = 4;

/// How an agent answers its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conduct {
    /// So many chunks of that many bytes, and then nothing.
    Stream { chunk_bytes: usize, chunks: u64 },
    /// A short final at once.
    Answer,
    /// Nothing.
    Hold,
}

/// What all agents of a run did.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub(crate) calls: AtomicU64,
    pub(crate) chunks: AtomicU64,
    /// Times that a call stood still until its grant grew.
    pub(crate) grant_waits: AtomicU64,
}

/// The handle of agent `n`.
pub(crate) fn name(n: u64) -> AgentName {
    AgentName::new(&format!("bench.a{n}"))
}

struct Running {
    id: Vec<u8>,
    chunks: Chunks,
    chunks_max: u64,
    seq: u64,
    acked: u64,
    grant: Amount,
    out_tokens: u64,
    /// No larger grant will come.
    last: bool,
    queued: bool,
}

/// Serves calls as agent `n` until the connection is lost.
pub(crate) async fn run(address: SocketAddr, n: u64, conduct: Conduct, sent: Arc<Sent>) -> anyhow::Result<()> {
    let mut link = Link::open(address, Role::Agent).await?;
    link.push(&Frame::json("", 0, Flags::NONE, kind::CAPABILITIES, &capabilities(n, conduct)));
    let mut agent = Agent { conduct, sent, calls: Vec::new(), by_id: HashMap::new(), ready: VecDeque::new() };
    let mut replies = Vec::new();
    loop {
        agent.fill(&mut link);
        link.turn(None).await?;
        link.take(|envelope, frame| agent.receive(envelope, frame, &mut replies))?;
        for reply in replies.drain(..) {
            link.push(&reply);
        }
    }
}

fn capabilities(n: u64, conduct: Conduct) -> Capabilities {
    let out_tokens = if conduct == Conduct::Answer { ANSWER_TOKENS } else { 400 * CHUNK_TOKENS };
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Capabilities {
        agent: name(n),
        host: "bench".into(),
        adapter: "bench".into(),
        models: vec![ModelInfo {
            id: "atp-bench-model".into(),
            in_usd_micros_per_mtok: Some(IN_PRICE * 1_000_000),
            out_usd_micros_per_mtok: Some(OUT_PRICE * 1_000_000),
            context_tokens: None,
        }],
        max_parallel: 100_000,
        estimate: Some(EstimateDeclaration {
            figures: EstimateFigures {
                in_tokens: Tokens(PROMPT_TOKENS),
                out_tokens: Tokens(out_tokens),
                ..EstimateFigures::default()
            },
            ..EstimateDeclaration::default()
        }),
        incarnation: format!("bench-{}-{}-{n}", std::process::id(), since.as_nanos()),
        reach: Amount::new(CHUNK_TOKENS, CHUNK_TOKENS * OUT_PRICE),
        ..Capabilities::default()
    }
}

struct Agent {
    conduct: Conduct,
    sent: Arc<Sent>,
    calls: Vec<Running>,
    by_id: HashMap<Vec<u8>, usize>,
    /// Calls that may send, in turn.
    ready: VecDeque<usize>,
}

impl Agent {
    /// One chunk of each call in turn while there is room.
    fn fill(&mut self, link: &mut Link) {
        let mut written = 0;
        while link.has_room() {
            let Some(index) = self.ready.pop_front() else { break };
            let call = &mut self.calls[index];
            call.queued = false;
            if call.seq - call.acked >= UNACKED_MAX || call.seq >= call.chunks_max {
                continue;
            }
            let out_tokens = call.out_tokens + CHUNK_TOKENS;
            if !amount(PROMPT_TOKENS, out_tokens).fits(call.grant) {
                if call.last {
                    link.push(&call.finish(Finish::Grant));
                } else {
                    self.sent.grant_waits.fetch_add(1, Relaxed);
                }
                continue;
            }
            (call.seq, call.out_tokens) = (call.seq + 1, out_tokens);
            call.chunks.write(&mut link.out, call.seq, PROMPT_TOKENS, out_tokens);
            written += 1;
            call.queued = true;
            self.ready.push_back(index);
        }
        self.sent.chunks.fetch_add(written, Relaxed);
    }

    fn receive(&mut self, envelope: &[u8], frame: Peek<'_>, replies: &mut Vec<Frame>) -> anyhow::Result<()> {
        if frame.kind == kind::ACK.as_bytes() {
            if let Some(index) = self.by_id.get(frame.stream_id).copied() {
                let acked = peek::number(frame.content, "msg_seq").unwrap_or(0);
                self.calls[index].acked = self.calls[index].acked.max(acked);
                self.resume(index);
            }
            return Ok(());
        }
        let frame = codec::decode_envelope(Bytes::copy_from_slice(envelope))?.frame;
        match &*frame.kind {
            kind::DISPATCH => self.dispatch(&frame.read()?, replies),
            kind::BUDGET_UPDATE => {
                let update: BudgetUpdate = frame.read()?;
                if let Some(index) = self.by_id.get(frame.stream_id.as_bytes()).copied() {
                    let call = &mut self.calls[index];
                    (call.grant, call.last) = (update.grant.max(call.grant), call.last || update.last);
                    self.resume(index);
                }
            }
            kind::AGENT_CANCEL => {
                if let Some(index) = self.by_id.get(frame.stream_id.as_bytes()).copied() {
                    replies.push(self.calls[index].finish(Finish::Cancelled));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn dispatch(&mut self, dispatch: &Dispatch, replies: &mut Vec<Frame>) {
        let id = dispatch.call_id.to_string();
        self.sent.calls.fetch_add(1, Relaxed);
        match self.conduct {
            Conduct::Answer => {
                let text = Some("Nothing to object to; the change does what it says and its test shows it.".to_owned());
                let cost = cost(PROMPT_TOKENS, ANSWER_TOKENS);
                let content = AgentFinal { text, cost, ..AgentFinal::default() };
                replies.push(Frame::json(id, 1, Flags::FIN, kind::RESULT_FINAL, &content));
            }
            Conduct::Hold => {}
            Conduct::Stream { chunk_bytes, chunks } if !self.by_id.contains_key(id.as_bytes()) => {
                let index = self.calls.len();
                self.by_id.insert(id.clone().into_bytes(), index);
                self.calls.push(Running {
                    chunks: Chunks::new(&id, chunk_bytes),
                    id: id.into_bytes(),
                    chunks_max: chunks,
                    seq: 0,
                    acked: 0,
                    grant: dispatch.grant,
                    out_tokens: 0,
                    last: false,
                    queued: false,
                });
                self.resume(index);
            }
            Conduct::Stream { .. } => {}
        }
    }

    fn resume(&mut self, index: usize) {
        if !std::mem::replace(&mut self.calls[index].queued, true) {
            self.ready.push_back(index);
        }
    }
}

impl Running {
    fn finish(&mut self, finish: Finish) -> Frame {
        self.seq += 1;
        // Never ready again.
        (self.grant, self.last) = (Amount::ZERO, false);
        let content = AgentFinal { cost: cost(PROMPT_TOKENS, self.out_tokens), finish, ..AgentFinal::default() };
        let id = String::from_utf8_lossy(&self.id).into_owned();
        Frame::json(id, self.seq, Flags::FIN, kind::RESULT_FINAL, &content)
    }
}

fn amount(in_tokens: u64, out_tokens: u64) -> Amount {
    Amount::new(in_tokens + out_tokens, in_tokens * IN_PRICE + out_tokens * OUT_PRICE)
}

fn cost(in_tokens: u64, out_tokens: u64) -> Cost {
    let usd_micros = amount(in_tokens, out_tokens).usd_micros;
    Cost { in_tokens: Tokens(in_tokens), out_tokens: Tokens(out_tokens), usd_micros }
}

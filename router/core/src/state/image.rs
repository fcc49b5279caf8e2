//! The state seen from outside: its hash, the rows of `accounts` and `verify`, and checkpoints.

use super::{AgentTotals, Corrupt, FOLD_VERSION, Holding, Lent, PIECE_BYTES, State};
use crate::account::{Account, Level};
use crate::record::{AgentRecord, Checkpoint, Genesis, Late, hex};
use crate::statistics::{LearnedImage, Statistics};
use crate::stream::Stream;
use crate::view::{AccountView, VerifyView};
use atp_proto::{Amount, Limit};
use bytes::{Bytes, BytesMut};
use prost::Message;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// A checkpoint's content: the state without its indexes.
#[derive(Clone, PartialEq, Message)]
struct Image {
    /// Logged time of the last entry, Unix ms.
    #[prost(uint64, tag = "1")]
    logged_ms: u64,
    /// As it was logged.
    #[prost(message, required, tag = "2")]
    genesis: Genesis,
    /// By name.
    #[prost(btree_map = "string, message", tag = "3")]
    accounts: BTreeMap<String, Account>,
    /// By number: the n-th Accept or Deny of the log has number n.
    #[prost(btree_map = "uint64, message", tag = "4")]
    streams: BTreeMap<u64, Stream>,
    /// By name.
    #[prost(btree_map = "string, message", tag = "5")]
    agents: BTreeMap<String, AgentTotals>,
    /// Accepts and Denies so far.
    #[prost(uint64, tag = "6")]
    next_no: u64,
    /// One for each agent.
    #[prost(message, repeated, tag = "20")]
    statistics: Vec<LearnedImage>,
    /// By the agent's name.
    #[prost(btree_map = "string, message", tag = "7")]
    standings: BTreeMap<String, AgentRecord>,
    /// As home, by holder.
    #[prost(btree_map = "uint32, message", tag = "8")]
    lent: BTreeMap<u32, Lent>,
    /// As holder, by home.
    #[prost(btree_map = "uint32, message", tag = "9")]
    holding: BTreeMap<u32, Holding>,
    /// By evidence.
    #[prost(btree_map = "string, message", tag = "10")]
    late: BTreeMap<String, Late>,
}
impl State {
    /// SHA-256 over money and keys at this position, the fold's version in front.
    #[must_use]
    pub fn hash(&self) -> String {
        format!("v{FOLD_VERSION}:{}", hex(&self.digest()))
    }

    fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let number = |hash: &mut Sha256, n: u64| hash.update(n.to_be_bytes());
        let text = |hash: &mut Sha256, t: &[u8]| {
            hash.update((t.len() as u64).to_be_bytes());
            hash.update(t);
        };
        number(&mut hash, self.position);
        number(&mut hash, self.epoch);
        text(&mut hash, &self.genesis.log_id);
        for (name, account) in &self.accounts {
            text(&mut hash, name.as_bytes());
            text(&mut hash, account.current.as_bytes());
            for (id, w) in &account.windows {
                text(&mut hash, id.as_bytes());
                text(&mut hash, &w.limit.encode_to_vec());
                for n in [w.settled.tokens, w.settled.usd_micros, w.held.tokens, w.held.usd_micros] {
                    number(&mut hash, n);
                }
                // A log of one shard hashes as it did before there were shares.
                if w.shares.is_empty() && w.late.is_empty() && Amount::from(w.lent).is_zero() {
                    continue;
                }
                text(&mut hash, &w.encode_to_vec());
            }
        }
        for (shard, line) in &self.lent {
            number(&mut hash, u64::from(*shard));
            text(&mut hash, &line.encode_to_vec());
        }
        for (shard, line) in &self.holding {
            number(&mut hash, u64::from(*shard));
            text(&mut hash, &line.encode_to_vec());
        }
        self.late.values().for_each(|late| text(&mut hash, &late.encode_to_vec()));
        for (no, s) in &self.streams {
            number(&mut hash, *no);
            text(&mut hash, &s.accept.encode_to_vec());
            text(&mut hash, s.closed.as_bytes());
            text(&mut hash, s.code.as_bytes());
            text(&mut hash, &s.result_hash);
            text(&mut hash, &s.error);
            for n in [
                s.out_seq,
                u64::from(s.cancel),
                s.settled.tokens,
                s.settled.usd_micros,
                s.held.tokens,
                s.held.usd_micros,
            ] {
                number(&mut hash, n);
            }
            for c in &s.calls {
                text(&mut hash, &c.reserve.encode_to_vec());
                text(&mut hash, &c.intent.as_ref().map(Message::encode_to_vec).unwrap_or_default());
                text(&mut hash, c.ended.as_bytes());
                if let Some(tools) = &c.tools {
                    text(&mut hash, &tools.encode_to_vec());
                }
                for money in [&c.actual, &c.booked, &c.reported] {
                    text(&mut hash, &money.encode_to_vec());
                }
                for n in
                    [c.hold.tokens, c.hold.usd_micros, c.in_seq, c.phase as u64, c.source as u64, u64::from(c.extends)]
                {
                    number(&mut hash, n);
                }
                c.evidence.iter().for_each(|e| text(&mut hash, e.as_bytes()));
            }
        }
        hash.finalize().into()
    }

    /// Rows of `accounts`: every window that is current or holds money.
    #[must_use]
    pub fn account_views(&self) -> Vec<AccountView> {
        let mut rows = Vec::new();
        for (name, account) in &self.accounts {
            for (id, w) in &account.windows {
                // What is lent is for others to show, as held or as settled.
                let level = Level { held: w.held.into(), ..w.level() };
                if *id == account.current || !w.level().held.is_zero() {
                    rows.push(AccountView {
                        account: name.clone(),
                        per: account.per.clone(),
                        window_id: id.clone(),
                        reset_at: w.ends_ms.map(crate::clock::rfc3339),
                        limit: level.limit,
                        settled: level.settled,
                        held: level.held,
                        remaining: remaining(&level),
                        lent: w.lent.into(),
                        of_shares: account.shared,
                        pace: None,
                    });
                }
            }
        }
        rows
    }

    /// Figures and hash, for `verify` and `replay --state`.
    #[must_use]
    pub fn verify_view(&self) -> VerifyView {
        VerifyView {
            position: self.position,
            epoch: self.epoch,
            state_hash: self.hash(),
            streams: self.streams.len() as u64,
            open_reservations: self.streams.values().flat_map(|s| &s.calls).filter(|c| c.is_open()).count() as u64,
            accounts: self.account_views(),
        }
    }

    /// The fold up to this position as records, in pieces.
    #[must_use]
    pub fn to_checkpoint(&self, shard: u32) -> Vec<Checkpoint> {
        let image = Image {
            logged_ms: self.logged_ms,
            genesis: self.genesis.clone(),
            accounts: self.accounts.clone(),
            streams: self.streams.clone(),
            agents: self.agents.clone(),
            next_no: self.next_no,
            statistics: self.statistics.to_image(),
            standings: self.standings.clone(),
            lent: self.lent.clone(),
            holding: self.holding.clone(),
            late: self.late.clone(),
        };
        let data = Bytes::from(image.encode_to_vec());
        let pieces = data.len().div_ceil(PIECE_BYTES).max(1);
        let hash = Bytes::copy_from_slice(&self.digest());
        (0..pieces)
            .map(|i| Checkpoint {
                log_id: self.genesis.log_id.clone(),
                shard,
                position: self.position,
                epoch: self.epoch,
                fold_version: FOLD_VERSION,
                hash: hash.clone(),
                piece: i as u32,
                pieces: pieces as u32,
                data: data.slice(i * PIECE_BYTES..data.len().min((i + 1) * PIECE_BYTES)),
            })
            .collect()
    }

    /// Rebuilds the fold from all pieces of one checkpoint, in order.
    ///
    /// # Errors
    /// `Corrupt` when pieces don't belong together, or the hash differs.
    pub fn from_checkpoint(pieces: &[Checkpoint]) -> Result<Self, Corrupt> {
        let corrupt = |position, message: &str| Corrupt { position, message: format!("checkpoint: {message}") };
        let first = pieces.first().ok_or_else(|| corrupt(0, "no piece"))?;
        let whole = pieces.len() == first.pieces as usize
            && pieces
                .iter()
                .zip(0..)
                .all(|(p, i)| p.piece == i && p.position == first.position && p.hash == first.hash);
        if !whole {
            return Err(corrupt(first.position, "pieces don't belong together"));
        }
        if first.fold_version > FOLD_VERSION {
            return Err(corrupt(first.position, "written by a newer version"));
        }
        let mut data = BytesMut::new();
        pieces.iter().for_each(|p| data.extend_from_slice(&p.data));
        let image = Image::decode(data.freeze()).map_err(|e| corrupt(first.position, &e.to_string()))?;
        let mut state = Self {
            position: first.position,
            epoch: first.epoch,
            logged_ms: image.logged_ms,
            genesis: image.genesis,
            accounts: image.accounts,
            streams: image.streams,
            agents: image.agents,
            next_no: image.next_no,
            statistics: Statistics::from_image(image.statistics),
            standings: image.standings,
            shard: first.shard,
            lent: image.lent,
            holding: image.holding,
            late: image.late,
            ..Self::default()
        };
        state.index();
        if state.digest()[..] != first.hash[..] {
            return Err(corrupt(first.position, "its hash is not its content's"));
        }
        Ok(state)
    }

    fn index(&mut self) {
        let mut ended = Vec::new();
        for (&no, stream) in &self.streams {
            let key = &stream.accept.key;
            self.by_id.entry(key.tenant.clone()).or_default().insert(key.stream.clone(), no);
            if !stream.accept.idempotency_key.is_empty() {
                self.by_key.entry(key.tenant.clone()).or_default().insert(stream.accept.idempotency_key.clone(), no);
            }
            for call in &stream.calls {
                self.by_call.insert(key.call(call.reserve.lane), (no, call.reserve.lane));
            }
            if stream.is_closed() {
                ended.push((stream.ended_at, no));
            }
        }
        ended.sort_unstable();
        self.ended = ended.into();
    }
}
/// What a level leaves, absent where it has no limit.
#[must_use]
pub fn remaining(level: &crate::account::Level) -> Limit {
    let free = level.free();
    Limit {
        tokens: level.limit.tokens.map(|_| free.tokens),
        usd_micros: level.limit.usd_micros.map(|_| free.usd_micros),
    }
}

//! A shard whose log is a partition: its owners hand batches to the brokers, follow their reports by the core's rule, and step
//! down in any doubt; who takes it writes an Epoch, reads what is before it, and serves. Brokers lose messages, find them later,
//! write them behind others or twice, and say what they like.

use super::{Around, Owner, Place};
use crate::simulation::partition::{Report, Sent, stray};
use crate::simulation::plan::LONG_LOST_MS;
use crate::simulation::sched::{Event, Sched};
use atp_core::message::Input;
use atp_core::partition::{Claim, Owner as Rule, Parsed};
use atp_core::record::{AnyRecord, Entry, Record};
use atp_core::shard::Shard;
use bytes::Bytes;
use prost::Message;
use std::collections::BTreeMap;

/// An idle owner looks for a successor within this long.
const LOOK_MS: u64 = 1_000;

/// Who has written an Epoch and waits for its offset.
pub(super) struct Taking {
    number: u32,
    pub(super) router: usize,
    claim: Claim,
}

/// What an owner handed over and has not heard of to the end. One at a time.
#[derive(Default)]
pub(super) struct Batch {
    /// The rule's number of its first message, and the order in which that was made.
    first_n: u64,
    first_nth: u64,
    len: u64,
    done: u64,
    /// By `nth`.
    reports: BTreeMap<u64, Option<u64>>,
}

impl Batch {
    pub(super) const fn is_over(&self) -> bool {
        self.done == self.len
    }
}

impl Place {
    // ---- an owner's entries -----------------------------------------------------------------------------------------

    /// Hands over the first `n` entries that wait.
    pub(super) fn hand_over(&mut self, s: &mut Sched, at: usize, n: usize) {
        let (no, owner) = (self.no, &mut self.owners[at]);
        let Some(rule) = &mut owner.rule else { return };
        let first_nth = owner.handed + 1;
        let (first_n, len) = (rule.durable() + 1, n.min(owner.pending.len()) as u64);
        owner.batch = Batch { first_n, first_nth, len, ..Batch::default() };
        let most = if s.healed { 3 } else { s.faults.commit_max_ms };
        let mut arrives = s.now_ms + s.rng.range(0, most);
        let mut together = Vec::new();
        for _ in 0..len {
            let Some(entry) = owner.pending.pop_front() else { break };
            owner.handed += 1;
            owner.written += 1;
            let (by, nth, header) = (owner.number, owner.handed, Parsed::Ours(rule.send(false)));
            let sent = |entry, copies, report| Sent { by, nth, header, entry, copies, report };
            match self.log.partition.as_deref_mut().and_then(|p| Mishap::of(s, &mut p.mishaps_left)) {
                None => together.push(sent(entry, 1, Report::Offset)),
                Some(Mishap::Lost) => together.push(sent(entry, 0, Report::Unknown)),
                Some(Mishap::Unknown) => together.push(sent(entry, 1, Report::Unknown)),
                Some(Mishap::Twice) => together.push(sent(entry, 2, Report::Offset)),
                Some(Mishap::FoundLater) => {
                    together.push(sent(Bytes::new(), 0, Report::Unknown));
                    let at = arrives + s.rng.range(0, LONG_LOST_MS);
                    s.at(at, arrive(no, vec![sent(entry, 1, Report::Silent)]));
                }
                Some(Mishap::Overtaken) => {
                    let at = arrives + s.rng.range(1, 20);
                    s.at(at, arrive(no, vec![sent(entry, 1, Report::Offset)]));
                }
            }
            if s.rng.percent(s.faults.commit_split_percent) {
                s.at(arrives, arrive(no, std::mem::take(&mut together)));
                arrives += s.rng.range(0, most);
            }
        }
        s.at(arrives, arrive(no, together));
        // Somebody may come between the messages of a batch.
        let left = self.log.partition.as_deref_mut().map(|p| &mut p.mishaps_left);
        if let Some(left) = left.filter(|left| len > 1 && **left > 0 && !s.healed && s.rng.percent(5)) {
            *left -= 1;
            let at = s.rng.range(s.now_ms, arrives);
            s.at(at, Event::TakeOver { shard: no });
        }
    }

    /// Messages reach the brokers.
    pub fn arrive(&mut self, a: &mut Around<'_>, sent: Vec<Sent>) {
        let mut reports: BTreeMap<u32, Vec<(u64, Option<u64>)>> = BTreeMap::new();
        for Sent { by, nth, header, entry, copies, report } in sent {
            let mut offset = None;
            for _ in 0..copies {
                self.strangers(a);
                offset = Some(self.append(a, (by, nth, header), &entry));
            }
            match report {
                Report::Offset => reports.entry(by).or_default().push((nth, offset)),
                Report::Unknown => reports.entry(by).or_default().push((nth, None)),
                Report::Silent => {}
            }
        }
        for (owner, reports) in reports {
            let long = !a.s.healed && !a.check.balance.calm && a.s.rng.percent(20);
            let most = if long { 1_500 } else { a.s.faults.commit_max_ms.min(3) };
            let ms = a.s.rng.range(0, most);
            a.s.after(ms, Event::Reports { shard: self.no, owner, reports });
        }
    }

    fn strangers(&mut self, a: &mut Around<'_>) {
        let Some(partition) = self.log.partition.as_deref_mut() else { return };
        if Mishap::of(a.s, &mut partition.mishaps_left).is_some() {
            let message = stray(&mut a.s.rng, partition.log_id());
            self.append(a, (0, 0, message), &Bytes::new());
        }
    }

    fn append(&mut self, a: &mut Around<'_>, (by, nth, header): (u32, u64, Parsed), entry: &Bytes) -> u64 {
        let Some(partition) = self.log.partition.as_deref_mut() else { return 0 };
        let (offset, counts) = partition.arrive(by, nth, header, &mut a.check.verdict);
        let no = self.no;
        a.s.note(&(offset, by), || format!("offset {offset} of shard {no}: o{by}/{nth} {header:?}, counts: {counts}"));
        if counts {
            self.log.counts(entry.clone());
            a.check.durable(no, self.log.len() as u64, entry, a.processes, a.s.now_ms);
        }
        if counts && nth == 0 {
            // Each of the others looks before long.
            for owner in self.owners.iter().filter(|o| o.number != by) {
                let ms = a.s.rng.range(0, LOOK_MS);
                a.s.after(ms, Event::StepDown { shard: no, owner: owner.number });
            }
        }
        offset
    }

    /// What brokers say of an owner's messages.
    pub fn reports(&mut self, a: &mut Around<'_>, number: u32, reports: Vec<(u64, Option<u64>)>) {
        if self.taking.as_ref().is_some_and(|taking| taking.number == number) {
            return self.taken(a, reports.first().and_then(|(_, offset)| *offset));
        }
        let Some(at) = self.index(number) else { return };
        self.owners[at].batch.reports.extend(reports);
        let over = self.follow(a, at);
        let owner = &mut self.owners[at];
        let position = owner.at + owner.rule.as_ref().map_or(0, Rule::durable) as usize;
        if position > owner.acked {
            owner.acked = position;
            self.input_of(a, number, Input::Durable { position: position as u64 });
        }
        if let Err(why) = over {
            return self.is_lost(a, number, &why);
        }
        if let Some(at) = self.index(number) {
            self.schedule_commit(a.s, at);
        }
    }

    /// As far as an owner's messages are reported: which of them are durable by its rule.
    fn follow(&mut self, a: &mut Around<'_>, at: usize) -> Result<(), String> {
        let Owner { number, rule: Some(rule), batch, .. } = &mut self.owners[at] else { return Ok(()) };
        let Some(partition) = self.log.partition.as_deref_mut() else { return Ok(()) };
        while let Some(offset) = batch.reports.remove(&(batch.first_nth + batch.done)) {
            partition.seen.unknown += u64::from(offset.is_none());
            let next = rule.reported(batch.first_n + batch.done, offset);
            partition.explain(rule, next).map_err(|why| why.to_string())?;
            batch.done += 1;
            let (durable, counted) = (rule.durable(), partition.counted(*number));
            a.check.verdict.expect(durable <= counted, "durable => it counts for every reader", || {
                format!("o{number} of shard {} takes {durable} entries for durable, {counted} count", self.no)
            });
        }
        Ok(())
    }

    /// An owner looks whether somebody has come behind it.
    pub(super) fn look(&mut self, a: &mut Around<'_>, number: u32) {
        let Some(at) = self.index(number) else { return };
        let owner = &mut self.owners[at];
        let (Some(rule), Some(partition)) = (&mut owner.rule, self.log.partition.as_deref_mut()) else { return };
        if !owner.batch.is_over() {
            return a.s.after(LOOK_MS, Event::StepDown { shard: self.no, owner: number });
        }
        let next = rule.looked(partition.end());
        if let Err(why) = partition.explain(rule, Ok(next)) {
            self.is_lost(a, number, &why.to_string());
        }
    }

    /// An owner steps down by its rule. Its process lives on, and tries again after a while.
    fn is_lost(&mut self, a: &mut Around<'_>, number: u32, why: &str) {
        a.s.say(|| format!("o{number} of shard {} steps down: {why}", self.no));
        self.owners.retain(|o| o.number != number);
        if let Some(partition) = &mut self.log.partition {
            partition.seen.stepped_down += 1;
        }
        if number == self.number {
            let others = a.check.shards.len() > 1;
            self.lose_clients(a.s, others);
            let ms = a.s.rng.range(1, 500);
            a.s.after(ms, Event::Restart { shard: self.no });
        }
    }

    // ---- who takes it -----------------------------------------------------------------------------------------------

    /// Somebody writes an Epoch. The owner that is there doesn't know.
    pub(super) fn claim(&mut self, a: &mut Around<'_>) {
        let Some(partition) = self.log.partition.as_deref().filter(|_| self.taking.is_none()) else { return };
        let log_id = partition.log_id();
        let Some(router) = self.any_router(a) else {
            return a.s.after(200, Event::Restart { shard: self.no });
        };
        if self.log.is_empty() {
            let record = Record::Genesis(self.genesis.clone());
            let genesis = Entry { at_ms: a.s.now().wall_ms, records: vec![AnyRecord { record: Some(record) }] };
            let header = Parsed::Ours(atp_core::partition::Header::Genesis { log_id });
            self.append(a, (0, 0, header), &genesis.encode_to_vec().into());
        }
        self.tried += 1;
        let (no, number) = (self.no, self.tried);
        let entry = self.epoch_of(number, a.s);
        a.s.note(&number, || format!("o{number} is about to take shard {no}"));
        let Some(partition) = self.log.partition.as_deref_mut() else { return };
        let claim = Claim::new(log_id, partition.end());
        let header = Parsed::Ours(claim.header());
        let sent = |copies, report| Sent { by: number, nth: 0, header, entry: entry.clone(), copies, report };
        let most = if a.s.healed { 3 } else { a.s.faults.commit_max_ms };
        let arrives = a.s.now_ms + a.s.rng.range(0, most);
        let first = match Mishap::of(a.s, &mut partition.mishaps_left) {
            None | Some(Mishap::Twice) => sent(1, Report::Offset),
            Some(Mishap::Lost) => sent(0, Report::Unknown),
            Some(Mishap::Unknown) => sent(1, Report::Unknown),
            Some(Mishap::FoundLater | Mishap::Overtaken) => {
                let at = arrives + a.s.rng.range(0, LONG_LOST_MS);
                a.s.at(at, arrive(no, vec![sent(1, Report::Silent)]));
                sent(0, Report::Unknown)
            }
        };
        self.taking = Some(Taking { number, router, claim });
        a.s.at(arrives, arrive(no, vec![first]));
    }

    /// The Epoch is reported: what stands before it is read and served. `None`: nobody knows where it stands.
    fn taken(&mut self, a: &mut Around<'_>, offset: Option<u64>) {
        let Some(Taking { number, router, claim }) = self.taking.take() else { return };
        let no = self.no;
        let Some(offset) = offset else {
            let ms = a.s.rng.range(1, 500);
            return a.s.after(ms, Event::Restart { shard: no });
        };
        let claimed = match claim.written(offset) {
            Ok(claimed) => claimed,
            Err(why) => return a.check.verdict.fail("what was written stands", || why.to_string()),
        };
        let Some(partition) = self.log.partition.as_deref() else { return };
        let end = partition.read(&mut a.s.rng, claimed.upto(), &mut a.check.verdict);
        let Some(state) = self.read(a, end).filter(|_| a.check.verdict.violation.is_none()) else { return };
        let rule = match claimed.serve(&state) {
            Ok(rule) => rule,
            Err(why) => return a.check.verdict.fail("who takes a shard reads its own Epoch last", || why.to_string()),
        };
        a.s.note(&number, || format!("o{number} has taken shard {no} at offset {offset}, position {end}"));
        if self.is_up() {
            a.check.escrow.seen.takeovers += 1;
            let others = a.check.shards.len() > 1;
            self.lose_clients(a.s, others);
        }
        self.number = number;
        let shard = Shard::recover_behind_epoch(self.settings.clone(), state, a.s.now());
        self.owners.push(Owner { rule: Some(rule), ..Owner::new(number, router, shard, end) });
        self.drain(a, number);
        self.tell_keepers(a, number);
        self.let_in(a);
    }
}

fn arrive(shard: u32, sent: Vec<Sent>) -> Event {
    Event::Arrive { shard, sent }
}

/// What becomes of a message that brokers should just have written.
#[derive(Clone, Copy)]
enum Mishap {
    Lost,
    Unknown,
    FoundLater,
    /// Later messages of the same owner stand before it.
    Overtaken,
    Twice,
}

impl Mishap {
    fn of(s: &mut Sched, left: &mut u32) -> Option<Self> {
        if s.healed || *left == 0 || !s.rng.ppm(s.faults.broker_ppm) {
            return None;
        }
        *left -= 1;
        let all = [Self::Lost, Self::Unknown, Self::Unknown, Self::FoundLater, Self::Overtaken, Self::Twice];
        Some(s.rng.pick(&all))
    }
}

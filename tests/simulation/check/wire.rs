//! What leaves the router against what is durable at that moment: ack => Accept, dispatch => Reserve and Intent,
//! answer => Close, refusal => Deny, grant => Extend.

use super::ledger::{Ledger, Phase, fits, minus};
use super::{Check, Verdict};
use atp_core::message::ToAgent;
use atp_core::record::AgentRecord;
use atp_proto::content::{Ack, AgentStatus, BudgetUpdate, Dispatch};
use atp_proto::frame::kind;
use atp_proto::{AgentName, CallId, Code, Flags, Frame, WireError};

#[derive(Debug, Default)]
pub struct Wire {
    /// The provider knew the upstream key of the call that was made last.
    pub repeats: bool,
    /// Refusals that were seen to be durable.
    pub refusals: u64,
}

impl Check {
    /// A frame goes out to a client of this tenant.
    pub fn to_client(&mut self, shard: u32, tenant: &str, frame: &Frame) {
        let ledger = &self.shards[shard as usize].ledger;
        let verdict = &mut self.verdict;
        let id = frame.stream_id.to_string();
        match &*frame.kind {
            kind::ACCEPTED => {
                let accepted: atp_proto::content::Accepted = match frame.read() {
                    Ok(accepted) => accepted,
                    Err(e) => return verdict.fail("ack => durable Accept", || e.to_string()),
                };
                let durable = ledger.stream(tenant, &accepted.stream_id).is_some_and(|s| s.accepted);
                verdict.expect(durable, "ack => durable Accept", || format!("{id} was accepted"));
            }
            kind::ACK => acked(ledger, tenant, &id, frame, verdict),
            kind::RESULT_FINAL | kind::BILL => {
                let closed = ledger.stream(tenant, &id).and_then(|s| s.closed.as_ref());
                let logged = closed.map(|(result, bill)| if &*frame.kind == kind::BILL { bill } else { result });
                verdict.expect(logged == Some(&frame.content), "answer => durable Close", || {
                    format!("{id}: {} left, the log has {logged:?}", &*frame.kind)
                });
            }
            kind::RESULT_PARTIAL | kind::RESULT_PROVISIONAL => {
                let durable = ledger.stream(tenant, &id).map_or(0, |s| s.out_seq);
                verdict.expect(frame.msg_seq <= durable, "a chunk is durable before it is seen", || {
                    format!("{id}: message {} left, {durable} is durable", frame.msg_seq)
                });
            }
            kind::ERROR if frame.flags.has(Flags::RST) => self.refused(shard, tenant, &id, frame),
            _ => {}
        }
    }

    fn refused(&mut self, shard: u32, tenant: &str, id: &str, frame: &Frame) {
        let Ok(error) = frame.read::<WireError>() else {
            return self.verdict.fail("refusal => durable Deny", || format!("{id}: unreadable"));
        };
        let judged = matches!(error.code, Code::Window | Code::Budget | Code::AgentDown | Code::Sec);
        if !error.judged || !judged {
            return;
        }
        self.wire.refusals += 1;
        let denied = self.ledger(shard).stream(tenant, id).and_then(|s| s.denied.as_ref());
        self.verdict.expect(denied.is_some(), "refusal => durable Deny", || format!("{id} was refused: {error}"));
    }

    /// A message goes out to an agent's keeper; `fenced`: from an owner that was replaced and doesn't know it yet.
    pub fn to_agent(&mut self, shard: u32, agent: &AgentName, message: &ToAgent, fenced: bool) {
        let ledger = &self.shards[shard as usize].ledger;
        let verdict = &mut self.verdict;
        match message {
            ToAgent::Dispatch { epoch, call, frame, .. } => {
                let known = ledger.call(call);
                let ready = known.is_some_and(|c| c.intent.is_some());
                verdict.expect(ready, "dispatch => durable Reserve and Intent", || format!("{call} leaves: {known:?}"));
                // A repeat may leave together with its call's end: the keeper and the provider's meter tell it from a new one.
                verdict.expect(
                    (*epoch < ledger.epoch) == fenced && *epoch <= ledger.epoch,
                    "one writer per epoch",
                    || format!("{call} leaves under epoch {epoch}, the log's is {}", ledger.epoch),
                );
                match frame.read::<Dispatch>() {
                    Ok(d) => granted(ledger, call, [d.grant.tokens.0.into(), d.grant.usd_micros.0.into()], verdict),
                    Err(e) => verdict.fail("dispatch => durable Reserve and Intent", || e.to_string()),
                }
            }
            ToAgent::Pass { call, frame, .. } if &*frame.kind == kind::BUDGET_UPDATE => {
                match frame.read::<BudgetUpdate>() {
                    Ok(u) => granted(ledger, call, [u.grant.tokens.0.into(), u.grant.usd_micros.0.into()], verdict),
                    Err(e) => verdict.fail("grant => durable Extend", || e.to_string()),
                }
            }
            // What an owner says that was replaced counts only where its keeper lets it pass.
            ToAgent::Pass { .. } | ToAgent::Ended { .. } if !fenced => self.to_keeper(message),
            ToAgent::Pass { .. } | ToAgent::Ended { .. } => {}
            ToAgent::Standing { incarnation, status, drained, .. } => {
                let same = |r: &AgentRecord| {
                    let same_word = |s: &AgentStatus| s.status == r.status() && *r.incarnation == **incarnation;
                    r.drained == *drained && status.as_ref().is_none_or(same_word)
                };
                // A later word may have become durable together with it.
                let known = ledger.standings.get(agent.as_str());
                verdict.expect(known.is_some_and(|all| all.iter().any(same)), "standing => durable record", || {
                    format!("{agent} is said to stand as {status:?}, drained {drained}; the log has {known:?}")
                });
            }
            ToAgent::Owner { .. } | ToAgent::Want { .. } | ToAgent::Back { .. } => {}
        }
    }

    /// A keeper lets a shard's word pass.
    pub fn to_keeper(&mut self, message: &ToAgent) {
        let (shard, _) = message.of();
        let ledger = &self.shards[shard as usize].ledger;
        let verdict = &mut self.verdict;
        match message {
            ToAgent::Pass { call, incarnation, frame, .. } if &*frame.kind == kind::ACK => {
                let Ok(ack) = frame.read::<Ack>() else { return };
                let known = ledger.call(call).filter(|c| !matches!(c.phase, Phase::Settled | Phase::Void));
                // An owner that stood still acknowledges what a process said that the call has left since.
                let known = known.filter(|c| c.intent.as_ref().is_some_and(|(of, _)| **of == **incarnation));
                let durable = known.map_or(u64::MAX, |c| c.in_seq);
                verdict.expect(ack.msg_seq <= durable, "ack => durable frame", || {
                    format!("{call}: message {} was acknowledged, {durable} is durable", ack.msg_seq)
                });
            }
            ToAgent::Ended { call, .. } => {
                let over = ledger.call(call).is_none_or(|c| matches!(c.phase, Phase::Settled | Phase::Void));
                verdict.expect(over, "slots are freed by durable ends", || {
                    format!("{call} ended, but it is open in the log")
                });
            }
            _ => {}
        }
    }
}

fn granted(ledger: &Ledger, call: &CallId, grant: [i128; 2], verdict: &mut Verdict) {
    let Some(known) = ledger.call(call) else { return };
    let open = matches!(known.phase, Phase::Reserved | Phase::Running);
    verdict.expect(!open || fits(grant, minus(known.hold, known.tools)), "grant => durable Extend", || {
        format!("{call} was granted {grant:?}, {:?} is held durably", known.hold)
    });
}

fn acked(ledger: &Ledger, tenant: &str, id: &str, frame: &Frame, verdict: &mut Verdict) {
    let Ok(ack) = frame.read::<Ack>() else { return };
    let stream = ledger.stream(tenant, id);
    let durable = stream.map_or(0, |s| if s.denied.is_some() { u64::MAX } else { s.client_seq });
    verdict.expect(ack.msg_seq <= durable, "ack => durable frame", || {
        format!("{id}: message {} was acknowledged, {durable} is durable", ack.msg_seq)
    });
}

//! Escalation: when the lanes of a task have ended and a trigger of its rule holds, one more lane to the next agent on the
//! rule's list, within the task's budget. The rule stands in the Accept and the step in the Reserve, so replay decides nothing.

use super::Shard;
use super::choice::Request;
use super::offer::Fit;
use crate::message::LogRoom;
use crate::policy::Trigger;
use crate::state::RESULT_FINDINGS_MAX;
use crate::stream::{Call, Stream};
use atp_canonicalizer::{Finding, Source, union};
use atp_proto::{AgentName, Code};
use std::collections::BTreeSet;

/// A final that is less sure of itself than this triggers `low_conf` ...
const CONFIDENT_PPM: u32 = 500_000;
/// ... and one that is surer than that but not than this triggers `ambiguity`.
const CLEAR_PPM: u32 = 700_000;
/// Agents that agree on less than this part of all their findings disagree.
const AGREED_PPM: u64 = 500_000;
/// How the rule of an escalated lane begins.
const MARK: &str = "escalation";

/// How one lane ended, as the triggers see it.
struct Ended<'a> {
    agent: &'a str,
    how: &'a str,
    confidence_ppm: Option<u32>,
    findings: Vec<serde_json::Value>,
}

impl Shard {
    /// Reserves the next step of a task whose lanes have all ended. False: there is none, or it can't begin now; an answer
    /// doesn't wait for an agent that isn't here or for money that isn't free.
    pub(super) fn escalate(&mut self, no: u64) -> bool {
        let Some(stream) = self.state.stream(no) else { return false };
        let room = (stream.calls.len() as u32) < self.settings.limits.lanes_max && self.room == LogRoom::Enough;
        if stream.accept.escalate_to.is_empty() || stream.calls.is_empty() || !room {
            return false;
        }
        let on: BTreeSet<Trigger> = stream.accept.escalate_on.iter().filter_map(|t| Trigger::parse(t)).collect();
        let (lane, lanes) = newest_round(stream);
        let Some(trigger) = triggered(&on, &lanes) else { return false };
        let asked = |name: &str| stream.calls.iter().any(|c| c.reserve.agent == name && is_step(c));
        let next: Vec<AgentName> =
            stream.accept.escalate_to.iter().filter(|name| !asked(name)).map(|name| AgentName::new(name)).collect();
        let rule = format!("{MARK} after lane {lane}: {}", trigger.as_str());
        next.into_iter().any(|agent| self.escalate_to(no, &agent, &rule))
    }

    fn escalate_to(&mut self, no: u64, agent: &AgentName, rule: &str) -> bool {
        let Some(stream) = self.state.stream(no) else { return false };
        let Some(live) = self.live.get(&no) else { return false };
        let (tenant, level) = (stream.accept.account.clone(), stream.level());
        let offer = self.offer(agent, &Request::of(&stream.accept, &live.wants), rule);
        let left_out = match offer {
            None => format!("{rule}: agent {agent} isn't connected"),
            Some(offer) => {
                let floor = stream.accept.floor.as_str();
                let offers = self.stepped(&tenant, no, &level, true, floor, vec![offer]);
                match self.fit(&tenant, no, &level, 0, &offers) {
                    Fit::Lanes(holds) => {
                        self.reserve(no, &offers, &holds, 0);
                        return true;
                    }
                    Fit::Wait(need) if self.seeks(&tenant, "", self.place(no), need) => {
                        self.ask_later(no);
                        return true;
                    }
                    Fit::Wait(_) => format!("{rule}: no free money for agent {agent}"),
                    Fit::Never(error) => format!("{rule}: agent {agent} was not asked: {error}"),
                }
            }
        };
        if let Some(live) = self.live.get_mut(&no).filter(|l| !l.left_out.contains(&left_out)) {
            live.left_out.push(left_out);
        }
        false
    }
}

fn is_step(call: &Call) -> bool {
    call.reserve.rule.starts_with(MARK)
}

/// The lane that a chain of retries began with.
fn root<'a>(stream: &'a Stream, call: &'a Call) -> &'a Call {
    let mut at = call;
    while let Some(before) = stream.call(at.reserve.retry_of) {
        at = before;
    }
    at
}

/// The last lane of each chain of the newest round: of the task's own lanes, or of the last step. And the newest of them.
fn newest_round(stream: &Stream) -> (u32, Vec<Ended<'_>>) {
    let step = stream.calls.iter().filter(|c| is_step(c)).map(|c| c.reserve.lane).max();
    let replaced = |lane: u32| stream.calls.iter().any(|c| c.reserve.retry_of == lane);
    let round: Vec<&Call> = stream
        .calls
        .iter()
        .filter(|c| !replaced(c.reserve.lane))
        .filter(|c| step.is_none_or(|step| root(stream, c).reserve.lane == step))
        .collect();
    (round.last().map_or(0, |c| c.reserve.lane), round.into_iter().map(ended).collect())
}

fn ended(c: &Call) -> Ended<'_> {
    Ended {
        agent: &c.reserve.agent,
        how: &c.ended,
        confidence_ppm: c.confidence_ppm_plus_1.checked_sub(1),
        findings: c.findings.iter().filter_map(|f| serde_json::from_str(f).ok()).collect(),
    }
}

/// The first trigger of `on` that holds for these lanes.
fn triggered(on: &BTreeSet<Trigger>, lanes: &[Ended<'_>]) -> Option<Trigger> {
    on.iter().copied().find(|trigger| holds(*trigger, lanes))
}

fn holds(trigger: Trigger, lanes: &[Ended<'_>]) -> bool {
    let ended_with = |code: Code| lanes.iter().any(|l| l.how == code.as_str());
    let whole = || lanes.iter().filter(|l| l.how == "complete");
    let confidence = |from: u32, to: u32| whole().any(|l| l.confidence_ppm.is_some_and(|c| from <= c && c < to));
    let kind = |names: &[&str]| findings(lanes).iter().any(|f| names.contains(&f.kind.as_str()));
    match trigger {
        Trigger::Timeout => ended_with(Code::Timeout),
        Trigger::AgentDown => ended_with(Code::AgentDown),
        Trigger::TestFail => kind(&["test_failure", "test_fail"]),
        Trigger::LowConf => confidence(0, CONFIDENT_PPM),
        Trigger::Ambiguity => confidence(CONFIDENT_PPM, CLEAR_PPM) || kind(&["ambiguity"]),
        Trigger::Disagreement => whole().count() > 1 && agreed_ppm(lanes).is_some_and(|ppm| ppm < AGREED_PPM),
        Trigger::WeakCitations => {
            let all = findings(lanes);
            let weak = all.iter().filter(|f| (f.file.is_empty() || f.span.is_none()) && f.evidence.is_empty()).count();
            2 * weak > all.len()
        }
    }
}

/// Findings of the lanes that ended well.
fn findings(lanes: &[Ended<'_>]) -> Vec<Finding> {
    let whole = lanes.iter().filter(|l| l.how == "complete");
    whole.flat_map(|l| &l.findings).filter_map(|f| Finding::read(f).ok()).collect()
}

/// Of all findings as the result merges them: the part that more than one lane reported, in ppm. `None`: nobody found anything.
fn agreed_ppm(lanes: &[Ended<'_>]) -> Option<u64> {
    let names: Vec<String> = (0..lanes.len()).map(|i| i.to_string()).collect();
    let whole = lanes.iter().zip(&names).filter(|(l, _)| l.how == "complete");
    let sources: Vec<Source<'_>> =
        whole.map(|(l, name)| Source { agent: l.agent, call_id: name, findings: &l.findings }).collect();
    let merged = union(&sources, RESULT_FINDINGS_MAX);
    let shared = merged.iter().filter(|f| f["provenance"].as_array().is_some_and(|p| p.len() > 1)).count();
    (shared as u64 * 1_000_000).checked_div(merged.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lane(how: &'static str, confidence_ppm: Option<u32>, findings: Vec<serde_json::Value>) -> Ended<'static> {
        Ended { agent: "a", how, confidence_ppm, findings }
    }

    fn finding(n: u64) -> serde_json::Value {
        json!({"type": "bug", "file": "a.rs", "span": n, "claim": format!("claim {n}"), "severity": "low"})
    }

    #[test]
    fn confidence_ends_where_it_says() {
        let at = |trigger, ppm| holds(trigger, &[lane("complete", ppm, Vec::new())]);
        assert!(at(Trigger::LowConf, Some(499_999)) && !at(Trigger::LowConf, Some(500_000)));
        assert!(!at(Trigger::LowConf, None), "who says nothing isn't unsure");
        assert!(at(Trigger::Ambiguity, Some(500_000)) && at(Trigger::Ambiguity, Some(699_999)));
        assert!(!at(Trigger::Ambiguity, Some(499_999)) && !at(Trigger::Ambiguity, Some(700_000)));
        assert!(!holds(Trigger::LowConf, &[lane("ETIMEOUT", Some(1), Vec::new())]));
    }

    #[test]
    fn codes_trigger_by_name() {
        let of = |how| triggered(&Trigger::ALL.into(), &[lane(how, None, Vec::new())]);
        assert_eq!(of("ETIMEOUT"), Some(Trigger::Timeout));
        assert_eq!(of("EAGENTDOWN"), Some(Trigger::AgentDown));
        assert_eq!((of("complete"), of("grant")), (None, None));
    }

    #[test]
    fn agents_disagree_below_half() {
        let two = |a: &[u64], b: &[u64]| {
            let found = |n: &[u64]| n.iter().map(|n| finding(*n)).collect();
            [lane("complete", None, found(a)), lane("complete", None, found(b))]
        };
        assert_eq!(agreed_ppm(&two(&[1, 2], &[1, 2])), Some(1_000_000));
        assert_eq!(agreed_ppm(&two(&[1, 20], &[1])), Some(500_000));
        assert!(!holds(Trigger::Disagreement, &two(&[1, 20], &[1])));
        assert_eq!(agreed_ppm(&two(&[1, 20], &[1, 40])), Some(333_333));
        assert!(holds(Trigger::Disagreement, &two(&[1, 20], &[1, 40])));
        assert!(!holds(Trigger::Disagreement, &two(&[], &[])), "nothing found is no disagreement");
        assert!(!holds(Trigger::Disagreement, &two(&[1], &[2])[..1]), "nobody disagrees alone");
    }

    #[test]
    fn weak_citations_are_more_than_half_without_place_and_evidence() {
        let bare = || json!({"type": "bug", "claim": "somewhere", "severity": "low"});
        let weak = |f| holds(Trigger::WeakCitations, &[lane("complete", None, f)]);
        assert!(weak(vec![bare()]) && weak(vec![bare(), bare(), finding(1)]));
        assert!(!weak(vec![bare(), finding(1)]) && !weak(Vec::new()));
        let test = json!({"type": "test_failure", "claim": "t failed", "severity": "high"});
        assert!(holds(Trigger::TestFail, &[lane("complete", None, vec![test])]));
    }
}

//! Many agents' findings become one list: exact duplicates are one finding with several sources. It never judges which
//! agent is right; agreement and quorum are another page.

use crate::finding::{Evidence, Finding, Severity, Span, cut, limits};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// What one call of one agent reported.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    pub agent: &'a str,
    pub call_id: &'a str,
    /// As the agent sent them; one that can't be read becomes a `malformed_finding`, so that nothing is lost silently.
    pub findings: &'a [Value],
}

/// The result's findings, with provenance `AGENT#CALL_ID`, gravest first, then by place. At most `max`; where more were
/// found, the last one says how many were left out.
#[must_use]
pub fn union(sources: &[Source<'_>], max: usize) -> Vec<Value> {
    let mut all = Vec::new();
    for source in sources {
        let provenance = format!("{}#{}", source.agent, source.call_id);
        for (n, value) in source.findings.iter().enumerate() {
            let finding = Finding::read(value).unwrap_or_else(|error| Finding {
                kind: "malformed_finding".to_owned(),
                claim: cut(
                    &format!("finding {} of {} was not taken: {error}", n + 1, source.agent),
                    limits::CLAIM_BYTES_MAX,
                ),
                severity: Severity::Info,
                ..Finding::default()
            });
            all.push((provenance.clone(), finding));
        }
    }
    let mut merged = merge(all);
    if merged.len() > max {
        let kept = max.saturating_sub(1);
        let left_out = merged.len() - kept;
        merged.truncate(kept);
        if max > 0 {
            merged.push(Finding {
                kind: "findings_left_out".to_owned(),
                claim: format!(
                    "{left_out} more findings are not shown here; the agents' partial results have all of them"
                ),
                severity: Severity::Info,
                ..Finding::default()
            });
        }
    }
    merged.iter().map(Finding::to_value).collect()
}

/// Merges findings that each come with a provenance. The order of the input makes no difference.
#[must_use]
pub fn merge(findings: impl IntoIterator<Item = (String, Finding)>) -> Vec<Finding> {
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    for (provenance, finding) in findings {
        let key = Key { file: finding.file, span: finding.span, kind: finding.kind, claim: finding.claim };
        let group = groups.entry(key).or_default();
        group.severity = Some(group.severity.map_or(finding.severity, |s| s.min(finding.severity)));
        group.confidence_ppm = group.confidence_ppm.max(finding.confidence_ppm);
        group.evidence.extend(finding.evidence);
        group.tests.extend(finding.tests);
        group.fixes.extend(finding.proposed_fix);
        group.provenance.insert(provenance);
    }
    let mut merged: Vec<Finding> = groups.into_iter().map(|(key, group)| group.into_finding(key)).collect();
    // Stable: within a severity the order stays that of the keys, by place.
    merged.sort_by_key(|finding| finding.severity);
    merged
}

/// Findings of the same type at the same place with the same claim are the same finding.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    file: String,
    span: Option<Span>,
    kind: String,
    claim: String,
}

impl Key {
    fn id(&self) -> String {
        let span = self.span.map(|s| s.to_string()).unwrap_or_default();
        let mut hash = Sha256::new();
        for part in [&self.kind, &self.file, &span, &self.claim] {
            // The length keeps ("ab", "c") and ("a", "bc") apart.
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        let digits: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("f-{digits}")
    }
}

/// Sets forget the order of arrival.
#[derive(Default)]
struct Group {
    severity: Option<Severity>,
    confidence_ppm: Option<u32>,
    evidence: BTreeSet<Evidence>,
    tests: BTreeSet<String>,
    fixes: BTreeSet<String>,
    provenance: BTreeSet<String>,
}

impl Group {
    fn into_finding(self, key: Key) -> Finding {
        Finding {
            id: key.id(),
            kind: key.kind,
            file: key.file,
            span: key.span,
            claim: key.claim,
            evidence: self.evidence.into_iter().take(limits::ENTRIES_MAX).collect(),
            // The longest says most; of two as long the set's order decides.
            proposed_fix: self.fixes.into_iter().rev().max_by_key(String::len),
            tests: self.tests.into_iter().take(limits::ENTRIES_MAX).collect(),
            severity: self.severity.unwrap_or_default(),
            confidence_ppm: self.confidence_ppm,
            provenance: self.provenance.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn duplicates_become_one_with_all_sources_and_the_highest_severity() {
        let a = [
            json!({"type": "bug", "file": "./a.rs", "span": 3, "claim": "off by  one", "severity": "low", "tests": ["t1"]}),
        ];
        let b = [
            json!({"type": "bug", "file": "a.rs", "span": "3-3", "claim": "off by one", "severity": "high", "tests": ["t2"],
                   "confidence": 0.5, "proposed_fix": "<=", "provenance": ["forged#1"]}),
            json!({"type": "bug", "file": "a.rs", "span": 4, "claim": "off by one", "severity": "critical"}),
        ];
        let sources =
            [Source { agent: "y", call_id: "c-2", findings: &a }, Source { agent: "x", call_id: "c-1", findings: &b }];
        let merged = union(&sources, 10);
        assert_eq!(merged.len(), 2);
        assert_eq!(merged[0]["span"], "4");
        assert_eq!(merged[1]["provenance"], json!(["x#c-1", "y#c-2"]));
        assert_eq!(merged[1]["severity"], "high");
        assert_eq!(merged[1]["tests"], json!(["t1", "t2"]));
        assert_eq!(merged[1]["proposed_fix"], "<=");
        assert_ne!(merged[0]["id"], merged[1]["id"]);
    }

    #[test]
    fn a_bad_finding_is_shown_as_one() {
        let bad = [json!({"type": "bug"}), json!(7)];
        let merged = union(&[Source { agent: "x", call_id: "c-1", findings: &bad }], 10);
        assert_eq!(merged.len(), 2);
        assert!(merged.iter().all(|f| f["type"] == "malformed_finding" && f["severity"] == "info"));
        assert!(merged[0]["claim"].as_str().unwrap().contains("`claim`: is missing"), "{merged:?}");
    }

    #[test]
    fn what_is_left_out_is_said() {
        let found: Vec<Value> = (1..=5).map(|n| json!({"type": "bug", "span": n, "claim": "x"})).collect();
        let of = |max| union(&[Source { agent: "x", call_id: "c-1", findings: &found }], max);
        assert_eq!(of(5).len(), 5);
        assert!(of(5).iter().all(|f| f["type"] == "bug"));
        assert_eq!(of(4).len(), 4);
        assert!(of(4)[3]["claim"].as_str().unwrap().starts_with("2 more findings"));
        assert!(of(0).is_empty());
    }

    fn any_finding() -> impl Strategy<Value = Value> {
        let severity = prop::sample::select(vec!["critical", "high", "medium", "low", "info", "wrong"]);
        (0..3_u32, 0..3_u32, severity, 0..3_u32, prop::option::of(0..=4_u32), prop::collection::vec(0..4_u32, 0..3)).prop_map(
            |(kind, file, severity, line, confidence, tests)| {
                json!({"type": format!("t{kind}"), "file": format!("f{file}"), "claim": "c", "severity": severity, "span": line,
                    "confidence": confidence.map(|c| f64::from(c) / 4.0), "tests": tests.iter().map(|t| format!("n{t}")).collect::<Vec<_>>(),
                    "proposed_fix": confidence.map(|c| format!("fix{c}"))})
            },
        )
    }

    proptest! {
        #[test]
        fn order_makes_no_difference(
            lists in prop::collection::vec(prop::collection::vec(any_finding(), 0..12), 1..5),
            seed in any::<u64>(), max in 0..20_usize,
        ) {
            let names: Vec<String> = (0..lists.len()).map(|n| format!("a{n}")).collect();
            let source = |n: usize| Source { agent: &names[n], call_id: "c-1", findings: &lists[n] };
            let forward: Vec<_> = (0..lists.len()).map(source).collect();
            let mut order: Vec<usize> = (0..lists.len()).collect();
            order.sort_by_key(|n| (seed >> (n * 7)) & 0x7f);
            let shuffled: Vec<_> = order.into_iter().map(source).collect();
            prop_assert_eq!(union(&forward, max), union(&shuffled, max));
        }

        #[test]
        fn order_within_an_answer_makes_no_difference(mut found in prop::collection::vec(any_finding(), 0..20), by in any::<u64>()) {
            // Malformed ones name their number, so only readable ones can be moved.
            found.retain(|f| Finding::read(f).is_ok());
            let before = union(&[Source { agent: "a", call_id: "c", findings: &found }], 100);
            let mut keyed: Vec<_> = found.into_iter().enumerate().collect();
            keyed.sort_by_key(|(n, _)| by.rotate_left(*n as u32 * 5) & 0xff);
            let moved: Vec<Value> = keyed.into_iter().map(|(_, f)| f).collect();
            prop_assert_eq!(before, union(&[Source { agent: "a", call_id: "c", findings: &moved }], 100));
        }

        #[test]
        fn merging_the_merged_changes_nothing(found in prop::collection::vec(any_finding(), 0..20)) {
            let read = found.iter().filter_map(|f| Finding::read(f).ok()).map(|f| ("a#1".to_owned(), f));
            let once = merge(read);
            prop_assert_eq!(&once, &merge(once.iter().cloned().map(|f| ("a#1".to_owned(), f))));
        }
    }
}

//! Findings of a result as people and SARIF readers see them. Findings come from agents: every field may be missing.

use crate::screen::{Paint, Screen, escape};
use serde_json::Value;

/// What a person wants to know of a finding.
struct Shown {
    severity: String,
    place: String,
    claim: String,
    kind: String,
    by: Vec<String>,
}

fn text(value: &Value, keys: &[&str]) -> String {
    keys.iter().find_map(|k| value[*k].as_str()).unwrap_or_default().to_owned()
}

fn provenance(finding: &Value) -> Vec<String> {
    let entries = finding["provenance"].as_array().map(Vec::as_slice).unwrap_or_default();
    entries.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn shown(finding: &Value) -> Shown {
    let file = text(finding, &["file"]);
    let span = text(finding, &["span"]);
    let place = if span.is_empty() { file } else { format!("{file}:{span}") };
    let severity = text(finding, &["severity"]);
    Shown {
        severity: if severity.is_empty() { "info".into() } else { severity },
        place,
        claim: text(finding, &["claim"]),
        kind: text(finding, &["type"]),
        by: provenance(finding),
    }
}

fn rank(severity: &str) -> usize {
    ["critical", "high", "medium", "low"].iter().position(|s| *s == severity).unwrap_or(4)
}

/// The findings, worst first, each with its place, claim and who reported it. Empty without findings.
pub(crate) fn render(screen: Screen, findings: &[Value]) -> String {
    let mut rows: Vec<Shown> = findings.iter().map(shown).collect();
    rows.sort_by(|a, b| (rank(&a.severity), &a.place).cmp(&(rank(&b.severity), &b.place)));
    let width = rows.iter().map(|r| r.severity.chars().count()).max().unwrap_or(0);
    let mut out = String::new();
    for row in rows {
        let paint = match rank(&row.severity) {
            0 | 1 => Paint::Red,
            2 => Paint::Yellow,
            _ => Paint::Dim,
        };
        let severity = screen.paint(paint, &escape(&format!("{:width$}", row.severity)));
        let place = screen.paint(Paint::Bold, &escape(&row.place));
        let claim = escape(row.claim.trim()).replace('\n', "\n    ");
        out.push_str(&format!("{severity}  {place}  {claim}\n"));
        let by = if row.by.is_empty() { String::new() } else { format!("by {}", row.by.join(", ")) };
        let facts = [row.kind, by].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join("  ");
        out.push_str(&format!("    {}\n", screen.paint(Paint::Dim, &escape(&facts))));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn worst_first_with_place_and_provenance() {
        let findings = [
            json!({"type": "style", "file": "a.rs", "span": "3", "claim": "meh", "severity": "low"}),
            json!({"type": "overflow", "file": "b.rs", "span": "45-80", "claim": "bad\x1b[2J", "severity": "high",
                "provenance": ["reviewer.clippy#2"]}),
        ];
        let text = render(Screen::default(), &findings);
        assert_eq!(
            text,
            "high  b.rs:45-80  bad\\u{1b}[2J\n    overflow  by reviewer.clippy#2\nlow   a.rs:3  meh\n    style\n"
        );
    }

    #[test]
    fn a_finding_may_lack_everything() {
        assert_eq!(render(Screen::default(), &[json!({}), json!(3)]).matches("info").count(), 2);
    }
}

//! Findings of a result as people and SARIF readers see them. Findings come from agents: every field may be missing.

use crate::screen::{Paint, Screen, escape};
use serde_json::{Value, json};

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

/// Start and end line of `45-80`, `72`, `[45, 80]` or `{"start": 45, "end": 80}`.
fn span(finding: &Value) -> Option<(u64, u64)> {
    let number = |v: &Value| v.as_u64().or_else(|| v.as_str().and_then(|t| t.trim().parse().ok()));
    let pair = |a: &Value, b: &Value| number(a).map(|a| (a, number(b).unwrap_or(a)));
    match &finding["span"] {
        Value::String(t) => {
            let (a, b) = t.split_once('-').unwrap_or((t, t));
            Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
        }
        Value::Array(items) => pair(items.first()?, items.get(1).unwrap_or(&Value::Null)),
        Value::Object(o) => {
            let at = |keys: [&str; 2]| keys.iter().find_map(|k| o.get(*k)).unwrap_or(&Value::Null).clone();
            pair(&at(["start", "start_line"]), &at(["end", "end_line"]))
        }
        _ => number(&finding["line"]).map(|l| (l, l)),
    }
}

/// Who reported it: `provenance[]` holds `agent#msg_seq`, or objects that name the agent.
fn provenance(finding: &Value) -> Vec<String> {
    let entries = finding["provenance"].as_array().map(Vec::as_slice).unwrap_or_default();
    entries
        .iter()
        .filter_map(|entry| match entry {
            Value::String(text) => Some(text.clone()),
            Value::Object(_) => {
                let seq = entry["msg_seq"].as_u64().map(|n| format!("#{n}")).unwrap_or_default();
                entry["agent"].as_str().map(|a| format!("{a}{seq}"))
            }
            _ => None,
        })
        .collect()
}

fn shown(finding: &Value) -> Shown {
    let file = text(finding, &["file", "path"]);
    let place = match span(finding) {
        Some((a, b)) if a != b => format!("{file}:{a}-{b}"),
        Some((a, _)) => format!("{file}:{a}"),
        None => file,
    };
    let severity = text(finding, &["severity"]);
    Shown {
        severity: if severity.is_empty() { "info".into() } else { severity },
        place,
        claim: text(finding, &["claim", "message", "title"]),
        kind: text(finding, &["type", "rule", "id"]),
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

/// The findings as SARIF 2.1.0.
pub(crate) fn sarif(findings: &[Value]) -> Value {
    let results: Vec<Value> = findings
        .iter()
        .map(|finding| {
            let row = shown(finding);
            let level = match rank(&row.severity) {
                0 | 1 => "error",
                2 => "warning",
                _ => "note",
            };
            let rule = if row.kind.is_empty() { "finding" } else { &row.kind };
            let mut result = json!({"ruleId": rule, "level": level, "message": {"text": row.claim},
                "properties": {"severity": row.severity, "provenance": row.by}});
            let file = text(finding, &["file", "path"]);
            if !file.is_empty() {
                let mut place = json!({"physicalLocation": {"artifactLocation": {"uri": file}}});
                if let Some((a, b)) = span(finding) {
                    place["physicalLocation"]["region"] = json!({"startLine": a.max(1), "endLine": b.max(a).max(1)});
                }
                result["locations"] = json!([place]);
            }
            result
        })
        .collect();
    json!({"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
        "runs": [{"tool": {"driver": {"name": "atp", "version": env!("CARGO_PKG_VERSION"), "rules": []}}, "results": results}]})
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn sarif_names_rule_place_and_level() {
        let sarif = sarif(&[json!({"type": "t", "file": "f", "span": {"start": 2, "end": 4}, "severity": "medium"})]);
        let result = &sarif["runs"][0]["results"][0];
        assert_eq!(result["level"], "warning");
        assert_eq!(result["locations"][0]["physicalLocation"]["region"], json!({"startLine": 2, "endLine": 4}));
        assert!(sarif_of_nothing()["runs"][0]["results"].as_array().is_some_and(Vec::is_empty));
    }

    fn sarif_of_nothing() -> Value {
        sarif(&[])
    }

    #[test]
    fn a_finding_may_lack_everything() {
        assert_eq!(render(Screen::default(), &[json!({}), json!(3)]).matches("info").count(), 2);
    }
}

//! Recognises what an agent's output is: JSON findings, SARIF, Cargo's messages, test output, or just text.
//! Text stays text: what is none of these yields nothing, never an invented finding.

use crate::finding::{Finding, Refused, limits};
use crate::{cargo, sarif};
use serde_json::Value;

/// The form in which findings were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A list of findings, or `{findings: [...]}`.
    Json,
    /// SARIF 2.1.
    Sarif,
    /// Lines of `cargo --message-format=json`.
    CargoMessages,
    /// What `cargo test` prints.
    CargoTest,
}

/// The findings of one output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recognised {
    pub format: Format,
    /// At most `limits::FINDINGS_MAX`, exact repeats removed.
    pub findings: Vec<Finding>,
    /// Entries that were not taken, and why.
    pub refused: Vec<Refused>,
    /// Findings above the bound.
    pub left_out: usize,
}

impl Recognised {
    pub(crate) fn new(format: Format) -> Self {
        Self { format, findings: Vec::new(), refused: Vec::new(), left_out: 0 }
    }

    pub(crate) fn push(&mut self, found: Result<Finding, Refused>) {
        if self.findings.len() + self.refused.len() >= limits::FINDINGS_MAX {
            self.left_out += 1;
            return;
        }
        match found {
            // Cargo reports a warning once per target that it builds.
            Ok(finding) if self.findings.contains(&finding) => {}
            Ok(finding) => self.findings.push(finding),
            Err(error) => self.refused.push(error),
        }
    }

    /// The findings as frames carry them.
    #[must_use]
    pub fn values(&self) -> Vec<Value> {
        self.findings.iter().map(Finding::to_value).collect()
    }
}

/// Reads a whole output; `None` when it is text.
#[must_use]
pub fn recognise(output: &str) -> Option<Recognised> {
    let trimmed = output.trim_start_matches('\u{feff}').trim();
    if trimmed.starts_with(['{', '['])
        && let Ok(document) = serde_json::from_str::<Value>(trimmed)
        && let Some(found) = document_findings(&document)
    {
        return Some(found);
    }
    cargo::messages(trimmed).or_else(|| cargo::tests(trimmed))
}

fn document_findings(document: &Value) -> Option<Recognised> {
    if document.get("runs").is_some_and(Value::is_array) {
        return Some(sarif::read(document));
    }
    let entries = match document {
        Value::Array(entries) if entries.iter().all(looks_like_a_finding) => entries,
        Value::Object(object) => object.get("findings")?.as_array()?,
        _ => return None,
    };
    let mut found = Recognised::new(Format::Json);
    for (n, entry) in entries.iter().enumerate() {
        found.push(Finding::read(entry).map_err(|e| Refused { field: format!("findings[{n}].{}", e.field), ..e }));
    }
    Some(found)
}

/// A bare list may be anything, so each of its entries must at least try to be a finding.
fn looks_like_a_finding(entry: &Value) -> bool {
    entry.get("claim").is_some() || entry.get("type").is_some() && entry.get("severity").is_some()
}

/// The findings of the last fenced block (three backticks and `json`) of an answer that holds any; `None` without.
#[must_use]
pub fn fenced(answer: &str) -> Option<Recognised> {
    let mut last = None;
    let mut block: Option<String> = None;
    for line in answer.lines() {
        let mark = line.trim();
        match &mut block {
            None if mark.eq_ignore_ascii_case("```json") || mark == "```sarif" => block = Some(String::new()),
            None => {}
            Some(text) if mark == "```" => {
                last = serde_json::from_str(text).ok().and_then(|document| document_findings(&document)).or(last);
                block = None;
            }
            Some(text) => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lists_and_objects_of_findings_are_recognised() {
        for text in [
            r#"[{"type":"bug","claim":"a"}]"#,
            r#" {"findings":[{"type":"bug","claim":"a"}],"note":1} "#,
            "\u{feff}[{\"type\":\"bug\",\"claim\":\"a\"}]",
        ] {
            let found = recognise(text).unwrap();
            assert_eq!((found.format, found.findings.len()), (Format::Json, 1), "{text}");
        }
        assert_eq!(recognise(r#"{"findings":[]}"#).unwrap().findings, []);
    }

    #[test]
    fn other_output_stays_text() {
        for text in ["", "all fine", "[1,2]", r#"{"a":1}"#, "[not json", r#"[{"name":"x"}]"#, "{", "test result: none"]
        {
            assert_eq!(recognise(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_not_taken_is_named() {
        let found = recognise(r#"{"findings":[{"type":"bug","claim":"a"},{"type":"bug"},3]}"#).unwrap();
        assert_eq!(found.findings.len(), 1);
        assert_eq!(found.refused[0].to_string(), "`findings[1].claim`: is missing; say in a sentence what is wrong");
        assert_eq!(found.refused[1].field, "findings[2].finding");
    }

    #[test]
    fn the_number_of_findings_is_bounded() {
        let of = |n: usize| {
            let list: Vec<_> = (0..n).map(|n| json!({"type": "bug", "claim": format!("c{n}")})).collect();
            let found = recognise(&json!(list).to_string()).unwrap();
            (found.findings.len(), found.left_out)
        };
        assert_eq!(of(limits::FINDINGS_MAX), (limits::FINDINGS_MAX, 0));
        assert_eq!(of(limits::FINDINGS_MAX + 1), (limits::FINDINGS_MAX, 1));
    }

    #[test]
    fn findings_come_out_of_a_fenced_block() {
        let answer = "Looks bad.\n```rust\nfn x() {}\n```\n```json\n[{\"type\":\"bug\",\"claim\":\"a\"}]\n```\nbye";
        assert_eq!(fenced(answer).unwrap().findings.len(), 1);
        for none in ["```json\n{\"a\":1}\n```", "```json\n[{\"type\":\"bug\",\"claim\":\"a\"}]", "no block"] {
            assert_eq!(fenced(none), None, "{none}");
        }
    }
}

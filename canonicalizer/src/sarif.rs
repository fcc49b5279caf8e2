//! SARIF 2.1.0, in and out: results of linters and scanners become findings, findings become a SARIF log.
//! Only what both sides can say is translated; suppressed and passing results are no findings.

use crate::finding::{Evidence, Finding, Refused, Severity, Span, cut, fold_space, limits, path};
use crate::read::{Format, Recognised};
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Reads all runs of a log.
pub(crate) fn read(log: &Value) -> Recognised {
    let mut found = Recognised::new(Format::Sarif);
    for (r, run) in list(&log["runs"]).iter().enumerate() {
        for (n, result) in list(&run["results"]).iter().enumerate() {
            let passed =
                result["kind"].as_str().is_some_and(|kind| kind != "fail" && kind != "open" && kind != "review");
            let suppressed =
                list(&result["suppressions"]).iter().any(|s| s["status"].as_str().is_none_or(|s| s == "accepted"));
            if !passed && !suppressed {
                found.push(
                    one(run, result).map_err(|e| Refused { field: format!("runs[{r}].results[{n}].{}", e.field), ..e }),
                );
            }
        }
    }
    found
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn one(run: &Value, result: &Value) -> Result<Finding, Refused> {
    let rule = rule(run, result);
    let kind = result["ruleId"].as_str().or(result["rule"]["id"].as_str()).or(rule["id"].as_str()).unwrap_or("sarif");
    let Some(claim) = message(result, rule).filter(|m| !m.is_empty()) else {
        return Err(Refused {
            field: "message.text".into(),
            problem: "is missing; each result says what it found".into(),
        });
    };
    let level = result["level"].as_str().or(rule["defaultConfiguration"]["level"].as_str()).unwrap_or("warning");
    let Some(severity) = security(rule).or_else(|| Severity::fold(level)) else {
        let problem = format!("`{}` is none of error, warning, note, none", cut(level, 40));
        return Err(Refused { field: "level".into(), problem });
    };
    let (file, span) = place(run, &result["locations"][0]).unwrap_or_default();
    let related = list(&result["relatedLocations"]).iter().take(limits::ENTRIES_MAX).filter_map(|location| {
        let (file, lines) = place(run, location)?;
        let kind = location["message"]["text"].as_str().unwrap_or("related");
        Some(Evidence { kind: cut(kind, limits::ENTRY_BYTES_MAX), file, lines })
    });
    Ok(Finding {
        kind: cut(kind, limits::TYPE_BYTES_MAX),
        file,
        span,
        claim: cut(&claim, limits::CLAIM_BYTES_MAX),
        evidence: related.collect(),
        proposed_fix: result["fixes"][0]["description"]["text"].as_str().map(|fix| cut(fix, limits::FIX_BYTES_MAX)),
        severity,
        ..Finding::default()
    })
}

/// A result names its rule by index or by id; the rule carries what the result leaves out.
fn rule<'a>(run: &'a Value, result: &Value) -> &'a Value {
    let rules = list(&run["tool"]["driver"]["rules"]);
    let index = result["ruleIndex"].as_u64().or(result["rule"]["index"].as_u64()).and_then(|n| usize::try_from(n).ok());
    let id = result["ruleId"].as_str().or(result["rule"]["id"].as_str());
    index
        .and_then(|n| rules.get(n))
        .or_else(|| rules.iter().find(|r| id.is_some() && r["id"].as_str() == id))
        .unwrap_or(&Value::Null)
}

fn message(result: &Value, rule: &Value) -> Option<String> {
    let message = &result["message"];
    let template = || rule["messageStrings"][message["id"].as_str()?]["text"].as_str();
    let mut text = message["text"].as_str().or(message["markdown"].as_str()).or_else(template)?.to_owned();
    for (n, argument) in list(&message["arguments"]).iter().enumerate().take(limits::ENTRIES_MAX) {
        text = text.replace(&format!("{{{n}}}"), argument.as_str().unwrap_or_default());
    }
    Some(fold_space(&text))
}

/// Scanners put a CVSS score beside the level, which knows no "critical".
fn security(rule: &Value) -> Option<Severity> {
    let score: f64 = rule["properties"]["security-severity"].as_str()?.parse().ok()?;
    Some(match score {
        s if s >= 9.0 => Severity::Critical,
        s if s >= 7.0 => Severity::High,
        s if s >= 4.0 => Severity::Medium,
        s if s > 0.0 => Severity::Low,
        _ => return None,
    })
}

fn place(run: &Value, location: &Value) -> Option<(String, Option<Span>)> {
    let physical = &location["physicalLocation"];
    let artifact = &physical["artifactLocation"];
    let by_index = || run["artifacts"][usize::try_from(artifact["index"].as_u64()?).ok()?]["location"]["uri"].as_str();
    let uri = artifact["uri"].as_str().or_else(by_index)?;
    let line = |key: &str| physical["region"][key].as_u64().and_then(|n| u32::try_from(n).ok());
    let span = line("startLine").and_then(|from| Span::lines(from, line("endLine").unwrap_or(from)));
    Some((cut(&path(&percent_decoded(uri)), limits::FILE_BYTES_MAX), span))
}

/// `a%20b.rs` -> `a b.rs`; what is no valid escape stays as it is.
fn percent_decoded(uri: &str) -> String {
    let bytes = uri.as_bytes();
    let digit = |at: usize| bytes.get(at).and_then(|b| (*b as char).to_digit(16));
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'%'
            && let (Some(high), Some(low)) = (digit(at + 1), digit(at + 2))
        {
            out.push((high * 16 + low) as u8);
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| uri.to_owned())
}

fn percent_encoded(file: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/-._~".contains(&b);
    file.bytes().map(|b| if plain(b) { (b as char).to_string() } else { format!("%{b:02X}") }).collect()
}

/// A SARIF 2.1.0 log of a result's findings. Entries that are no findings are left out.
#[must_use]
pub fn to_sarif(findings: &[Value], version: &str) -> Value {
    let readable: Vec<(&Value, Finding)> = findings.iter().filter_map(|v| Some((v, Finding::read(v).ok()?))).collect();
    let rules: BTreeSet<&str> = readable.iter().map(|(_, f)| f.kind.as_str()).collect();
    let results: Vec<Value> = readable.iter().map(|(value, finding)| result(value, finding)).collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": {"driver": {
                "name": "atp", "version": version,
                "rules": rules.iter().map(|id| json!({"id": id})).collect::<Vec<_>>(),
            }},
            "results": results,
        }],
    })
}

fn result(value: &Value, finding: &Finding) -> Value {
    let level = match finding.severity {
        Severity::Critical | Severity::High => "error",
        Severity::Medium => "warning",
        Severity::Low | Severity::Info => "note",
    };
    let mut properties = json!({"severity": finding.severity});
    for key in ["confidence", "provenance", "tests", "proposed_fix"] {
        if let Some(field) = value.get(key) {
            properties[key] = field.clone();
        }
    }
    let mut result = json!({
        "ruleId": finding.kind, "level": level, "message": {"text": finding.claim}, "properties": properties,
    });
    if !finding.id.is_empty() {
        result["partialFingerprints"] = json!({"atp/v1": finding.id});
    }
    if !finding.file.is_empty() {
        result["locations"] = json!([location(&finding.file, finding.span)]);
    }
    let related: Vec<Value> = finding
        .evidence
        .iter()
        .filter(|e| !e.file.is_empty())
        .map(|e| {
            let mut place = location(&e.file, e.lines);
            place["message"] = json!({"text": e.kind});
            place
        })
        .collect();
    if !related.is_empty() {
        result["relatedLocations"] = json!(related);
    }
    result
}

fn location(file: &str, span: Option<Span>) -> Value {
    let mut physical = json!({"artifactLocation": {"uri": percent_encoded(file)}});
    if let Some(span) = span {
        physical["region"] = json!({"startLine": span.from, "endLine": span.to});
    }
    json!({"physicalLocation": physical})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::recognise;

    const SCAN: &str = include_str!("../fixtures/scan.sarif");

    #[test]
    fn a_scanners_log_is_read() {
        let found = recognise(SCAN).unwrap();
        assert_eq!(found.format, Format::Sarif);
        let facts: Vec<_> = found
            .findings
            .iter()
            .map(|f| (f.kind.as_str(), f.file.as_str(), f.span.map(|s| s.to_string()).unwrap_or_default(), f.severity))
            .collect();
        assert_eq!(
            facts,
            [
                ("rust/path-injection", "src/my file.rs", "10-12".to_owned(), Severity::Critical),
                ("unused", "src/lib.rs", "3".to_owned(), Severity::Low),
                ("plain", "", String::new(), Severity::Medium),
            ]
        );
        assert_eq!(found.findings[0].claim, "This path depends on a user-provided value.");
        assert_eq!(found.findings[0].evidence[0].file, "src/main.rs");
        assert_eq!(found.findings[1].claim, "unused variable x");
        let refused: Vec<_> = found.refused.iter().map(|r| r.field.as_str()).collect();
        assert_eq!(refused, ["runs[0].results[5].message.text", "runs[0].results[6].level"]);
    }

    #[test]
    fn what_is_written_is_read_again() {
        let findings = vec![
            json!({"id": "f-1", "type": "bug", "file": "src/my file.rs", "span": "3-4", "claim": "a", "severity": "high",
                "evidence": [{"kind": "call", "file": "b.rs", "lines": "7"}], "provenance": ["x#c-1"]}),
            json!({"type": "style", "claim": "b", "severity": "medium"}),
        ];
        let log = to_sarif(&findings, "1.0");
        assert_eq!(log["runs"][0]["results"][0]["properties"]["provenance"], json!(["x#c-1"]));
        let again = read(&log);
        assert_eq!(again.findings.len(), 2);
        for (before, after) in findings.iter().zip(&again.findings) {
            let before = Finding::read(before).unwrap();
            assert_eq!(
                (&before.kind, &before.file, before.span, &before.claim, before.severity, &before.evidence),
                (&after.kind, &after.file, after.span, &after.claim, after.severity, &after.evidence)
            );
        }
    }

    #[test]
    fn escapes_are_undone_only_where_they_are_valid() {
        assert_eq!(percent_decoded("a%20b%2"), "a b%2");
        assert_eq!(percent_decoded("100%zz"), "100%zz");
        assert_eq!(percent_decoded("%ff"), "%ff");
        assert_eq!(percent_decoded(&percent_encoded("grün/a b.rs")), "grün/a b.rs");
    }
}

//! One finding: its fields, how loose input becomes one, and every bound on it. It never decides what is the same
//! finding (that is `merge`) and never reads a foreign format.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};
use std::fmt;

/// Bounds on one finding, in bytes of UTF-8 or in entries. Each is tested at n and n+1.
pub mod limits {
    pub const TYPE_BYTES_MAX: usize = 128;
    pub const FILE_BYTES_MAX: usize = 1024;
    pub const CLAIM_BYTES_MAX: usize = 4096;
    pub const FIX_BYTES_MAX: usize = 16 * 1024;
    pub const ENTRIES_MAX: usize = 32;
    pub const ENTRY_BYTES_MAX: usize = 512;
    /// Findings of one answer.
    pub const FINDINGS_MAX: usize = 1000;
}
use limits::{CLAIM_BYTES_MAX, ENTRIES_MAX, ENTRY_BYTES_MAX, FILE_BYTES_MAX, FIX_BYTES_MAX, TYPE_BYTES_MAX};

/// Why a finding was not taken: the field, what is wrong with it, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {problem}")]
pub struct Refused {
    pub field: String,
    pub problem: String,
}

fn refused<T>(field: &str, problem: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { field: field.to_owned(), problem: problem.into() })
}

/// From bad to harmless; the order is the order of results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Critical,
    High,
    #[default]
    Medium,
    Low,
    Info,
}

impl Severity {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::High => "high",
            Self::Medium => "medium",
            Self::Low => "low",
            Self::Info => "info",
        }
    }

    /// Folds the words that linters, scanners and models use into five steps.
    #[must_use]
    pub fn fold(word: &str) -> Option<Self> {
        Some(match word.trim().to_ascii_lowercase().as_str() {
            "critical" | "blocker" | "fatal" | "severe" => Self::Critical,
            "high" | "error" | "major" | "serious" => Self::High,
            "medium" | "warning" | "warn" | "moderate" | "normal" => Self::Medium,
            "low" | "minor" | "note" | "trivial" => Self::Low,
            "info" | "information" | "informational" | "none" | "hint" | "help" | "style" => Self::Info,
            _ => return None,
        })
    }
}

/// Lines from 1, both ends included. Written `72` or `45-80`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub from: u32,
    pub to: u32,
}

impl Span {
    #[must_use]
    pub const fn line(n: u32) -> Self {
        Self { from: n, to: n }
    }

    /// `None` for line 0 or an end before its start.
    #[must_use]
    pub const fn lines(from: u32, to: u32) -> Option<Self> {
        if from == 0 || to < from { None } else { Some(Self { from, to }) }
    }

    /// Reads `72`, `45-80`, `L45-L80`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let number = |s: &str| s.trim().trim_start_matches(['L', 'l']).parse().ok();
        match text.split_once('-') {
            Some((from, to)) => Self::lines(number(from)?, number(to)?),
            None => number(text).and_then(|n| Self::lines(n, n)),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.from == self.to { self.from.fmt(f) } else { write!(f, "{}-{}", self.from, self.to) }
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// What a claim rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Evidence {
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lines: Option<Span>,
}

/// One thing that an agent found. Unknown fields of its JSON are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct Finding {
    /// In results: a hash of type, file, span and claim.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Taxonomy key or the tool's own rule id: `clippy::len_zero`, `test_failure`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With `/`, relative where the source was; empty when the finding has no place.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub span: Option<Span>,
    pub claim: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub evidence: Vec<Evidence>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proposed_fix: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tests: Vec<String>,
    pub severity: Severity,
    /// 0..1 in ppm; JSON shows the decimal.
    #[serde(rename = "confidence", skip_serializing_if = "Option::is_none", serialize_with = "decimal")]
    pub confidence_ppm: Option<u32>,
    /// `AGENT#SOURCE`, only in results: what an agent says about itself here isn't believed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub provenance: Vec<String>,
}

fn decimal<S: Serializer>(ppm: &Option<u32>, s: S) -> Result<S::Ok, S::Error> {
    match ppm {
        Some(ppm) => s.serialize_f64(f64::from(*ppm) / 1e6),
        None => s.serialize_none(),
    }
}

impl TryFrom<Value> for Finding {
    type Error = Refused;
    fn try_from(value: Value) -> Result<Self, Refused> {
        Self::read(&value)
    }
}

impl Finding {
    /// Reads one JSON finding and normalises it: path, span, severity, white space of the claim.
    ///
    /// # Errors
    /// Names the first field that is missing, of a wrong type or over its bound.
    pub fn read(value: &Value) -> Result<Self, Refused> {
        let Some(object) = value.as_object() else {
            return refused("finding", format!("is {}; a finding is an object", sort_of(value)));
        };
        let claim = match text(object, "claim", CLAIM_BYTES_MAX)? {
            Some(claim) if !claim.trim().is_empty() => fold_space(&claim),
            _ => return refused("claim", "is missing; say in a sentence what is wrong"),
        };
        let kind = match text(object, "type", TYPE_BYTES_MAX)? {
            Some(kind) if !kind.trim().is_empty() => kind.trim().to_owned(),
            _ => return refused("type", "is missing; give a taxonomy key like `bug` or a rule id"),
        };
        let severity = match object.get("severity") {
            None | Some(Value::Null) => Severity::default(),
            Some(Value::String(word)) => match Severity::fold(word) {
                Some(severity) => severity,
                None => {
                    return refused(
                        "severity",
                        format!("`{}` is none of critical, high, medium, low, info", cut(word, 40)),
                    );
                }
            },
            Some(other) => {
                return refused("severity", format!("is {}; give critical, high, medium, low or info", sort_of(other)));
            }
        };
        Ok(Self {
            id: text(object, "id", TYPE_BYTES_MAX)?.unwrap_or_default(),
            kind,
            file: text(object, "file", FILE_BYTES_MAX)?.map(|f| path(&f)).unwrap_or_default(),
            span: span(object, "span", "span")?,
            claim,
            evidence: list(object, "evidence", evidence)?,
            proposed_fix: text(object, "proposed_fix", FIX_BYTES_MAX)?,
            tests: list(object, "tests", |value, field| match value {
                Value::String(name) => bounded(field, name, ENTRY_BYTES_MAX),
                other => refused(field, format!("is {}; give the name of a test", sort_of(other))),
            })?,
            severity,
            confidence_ppm: confidence(object.get("confidence"))?,
            provenance: Vec::new(),
        })
    }

    /// The finding as the JSON that frames and results carry.
    #[must_use]
    pub fn to_value(&self) -> Value {
        serde_json::to_value(self).expect("text, numbers and lists always have a JSON form")
    }
}

fn sort_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn bounded(field: &str, text: &str, bytes_max: usize) -> Result<String, Refused> {
    if text.len() > bytes_max {
        return refused(field, format!("has {} bytes; at most {bytes_max} are taken", text.len()));
    }
    Ok(text.to_owned())
}

fn text(object: &Map<String, Value>, field: &str, bytes_max: usize) -> Result<Option<String>, Refused> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => bounded(field, text, bytes_max).map(Some),
        Some(other) => refused(field, format!("is {}; give a text", sort_of(other))),
    }
}

fn span(object: &Map<String, Value>, key: &str, field: &str) -> Result<Option<Span>, Refused> {
    let found = match object.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => Span::parse(text),
        Some(Value::Number(n)) => n.as_u64().and_then(|n| u32::try_from(n).ok()).and_then(|n| Span::lines(n, n)),
        Some(_) => None,
    };
    match found {
        Some(span) => Ok(Some(span)),
        None => refused(field, "is not a line like 72 or a range like \"45-80\", counted from 1"),
    }
}

fn list<T>(
    object: &Map<String, Value>,
    field: &str,
    read: impl Fn(&Value, &str) -> Result<T, Refused>,
) -> Result<Vec<T>, Refused> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(entries)) if entries.len() > ENTRIES_MAX => {
            refused(field, format!("has {} entries; at most {ENTRIES_MAX} are taken", entries.len()))
        }
        Some(Value::Array(entries)) => {
            entries.iter().enumerate().map(|(n, entry)| read(entry, &format!("{field}[{n}]"))).collect()
        }
        Some(other) => refused(field, format!("is {}; give a list", sort_of(other))),
    }
}

fn evidence(value: &Value, field: &str) -> Result<Evidence, Refused> {
    // Models often write evidence as bare sentences; the sentence is then its kind.
    if let Value::String(sentence) = value {
        return Ok(Evidence { kind: bounded(field, sentence, ENTRY_BYTES_MAX)?, ..Evidence::default() });
    }
    let Some(object) = value.as_object() else {
        return refused(field, format!("is {}; give {{kind, file, lines}}", sort_of(value)));
    };
    let inner = |e: Refused| Refused { field: format!("{field}.{}", e.field), problem: e.problem };
    Ok(Evidence {
        kind: text(object, "kind", ENTRY_BYTES_MAX).map_err(inner)?.unwrap_or_default(),
        file: text(object, "file", FILE_BYTES_MAX).map_err(inner)?.map(|f| path(&f)).unwrap_or_default(),
        lines: span(object, "lines", &format!("{field}.lines"))?,
    })
}

fn confidence(value: Option<&Value>) -> Result<Option<u32>, Refused> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            // The cast can't lose anything: the product lies between 0 and 1,000,000.
            Some(ratio) if (0.0..=1.0).contains(&ratio) => Ok(Some((ratio * 1e6).round() as u32)),
            _ => refused("confidence", "is not a decimal from 0 to 1"),
        },
    }
}

/// The first `bytes_max` bytes of a text, ended with `...` where something was cut; never inside a character.
pub(crate) fn cut(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let mut end = bytes_max.saturating_sub(3);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...", &text[..end])
}

pub(crate) fn fold_space(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// One spelling per path: `/` between names, no `.`, no `name/..`, no `file://`.
pub(crate) fn path(text: &str) -> String {
    let text = text.trim().replace('\\', "/");
    let text = text.strip_prefix("file://").unwrap_or(&text);
    let mut names: Vec<&str> = Vec::new();
    for name in text.split('/') {
        match name {
            "" | "." => {}
            ".." if names.last().is_some_and(|last| *last != "..") => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    let root = if text.starts_with('/') { "/" } else { "" };
    format!("{root}{}", names.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_finding_is_normalised_and_unknown_fields_are_ignored() {
        let finding = Finding::read(&json!({
            "type": " bug ", "file": ".\\src\\a/../lib.rs", "span": "L45-L80", "claim": "off  by\n one", "severity": "ERROR",
            "confidence": 0.9, "evidence": ["line 45 says so", {"kind": "test", "file": "./t.rs", "lines": 3}], "mood": 7
        }))
        .unwrap();
        assert_eq!(
            finding.to_value(),
            json!({"type": "bug", "file": "src/lib.rs", "span": "45-80", "claim": "off by one", "severity": "high",
                "confidence": 0.9, "evidence": [{"kind": "line 45 says so"}, {"kind": "test", "file": "t.rs", "lines": "3"}]})
        );
        assert_eq!(serde_json::from_value::<Finding>(finding.to_value()).unwrap(), finding);
    }

    #[test]
    fn bad_fields_are_named() {
        let with = |field: &str, value: Value| {
            let mut finding = json!({"type": "bug", "claim": "x"});
            finding[field] = value;
            Finding::read(&finding).map_err(|e| e.field)
        };
        for (field, value, named) in [
            ("claim", json!(" "), "claim"),
            ("claim", json!(3), "claim"),
            ("type", json!(null), "type"),
            ("span", json!("0"), "span"),
            ("span", json!("9-8"), "span"),
            ("span", json!(-1), "span"),
            ("span", json!(4_294_967_296_u64), "span"),
            ("severity", json!("so-so"), "severity"),
            ("severity", json!(2), "severity"),
            ("confidence", json!(1.01), "confidence"),
            ("confidence", json!(-0.1), "confidence"),
            ("confidence", json!("NaN"), "confidence"),
            ("evidence", json!([{"lines": "x"}]), "evidence[0].lines"),
            ("evidence", json!([{"kind": 3}]), "evidence[0].kind"),
            ("evidence", json!("x"), "evidence"),
            ("tests", json!(["a", 1]), "tests[1]"),
        ] {
            assert_eq!(with(field, value.clone()), Err(named.to_owned()), "{field} = {value}");
        }
        assert_eq!(Finding::read(&json!([])).unwrap_err().field, "finding");
    }

    #[test]
    fn bounds_hold_at_n_and_not_at_n_plus_1() {
        let sized = |field: &str, n: usize| {
            let mut finding = json!({"type": "bug", "claim": "x"});
            finding[field] = json!("y".repeat(n));
            Finding::read(&finding).is_ok()
        };
        for (field, n) in [
            ("type", TYPE_BYTES_MAX),
            ("file", FILE_BYTES_MAX),
            ("claim", CLAIM_BYTES_MAX),
            ("proposed_fix", FIX_BYTES_MAX),
        ] {
            assert!(sized(field, n), "{field}");
            assert!(!sized(field, n + 1), "{field}");
        }
        let entries = |n: usize| Finding::read(&json!({"type": "bug", "claim": "x", "tests": vec!["t"; n]})).is_ok();
        assert!(entries(ENTRIES_MAX) && !entries(ENTRIES_MAX + 1));
        let entry =
            |n: usize| Finding::read(&json!({"type": "bug", "claim": "x", "evidence": ["e".repeat(n)]})).is_ok();
        assert!(entry(ENTRY_BYTES_MAX) && !entry(ENTRY_BYTES_MAX + 1));
    }

    #[test]
    fn paths_have_one_spelling() {
        for (text, one) in [
            ("src/lib.rs", "src/lib.rs"),
            ("./src//lib.rs", "src/lib.rs"),
            ("a/b/../c", "a/c"),
            ("../../x", "../../x"),
            ("file:///srv/x.rs", "/srv/x.rs"),
            ("src\\lib.rs", "src/lib.rs"),
            ("", ""),
        ] {
            assert_eq!(path(text), one);
        }
    }

    #[test]
    fn cutting_never_splits_a_character() {
        assert_eq!(cut("grün", 10), "grün");
        assert_eq!(cut("üüüü", 6), "ü...");
        assert_eq!(cut("abcdef", 2), "...");
    }
}

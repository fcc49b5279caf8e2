//! Cargo's two outputs: compiler and clippy messages as JSON lines, and what `cargo test` prints about failing tests.
//! A finding is made of what is printed there and of nothing else.

use crate::finding::{Evidence, Finding, Severity, Span, cut, fold_space, limits, path};
use crate::read::{Format, Recognised};
use serde_json::Value;
use std::collections::BTreeMap;

/// Reads `--message-format=json` lines; other lines between them are passed over. `None` without any message.
pub(crate) fn messages(output: &str) -> Option<Recognised> {
    let mut found = None;
    for line in output.lines().filter(|line| line.starts_with('{')) {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let Some(reason) = message["reason"].as_str() else { continue };
        let found = found.get_or_insert_with(|| Recognised::new(Format::CargoMessages));
        if reason == "compiler-message"
            && let Some(finding) = compiler_message(&message["message"])
        {
            found.push(Ok(finding));
        }
    }
    let mut found: Recognised = found?;
    // `cargo test --message-format=json` prints the tests' own output after its messages.
    for finding in tests(output).map(|t| t.findings).unwrap_or_default() {
        found.push(Ok(finding));
    }
    Some(found)
}

/// `None` for notes and for the summaries that have no place ("3 warnings emitted").
fn compiler_message(message: &Value) -> Option<Finding> {
    let severity = match message["level"].as_str()? {
        "warning" => Severity::Medium,
        "note" | "help" | "failure-note" => return None,
        _ => Severity::High,
    };
    let spans = message["spans"].as_array()?;
    let primary = spans.iter().find(|s| s["is_primary"] == true).or(spans.first())?;
    let children = message["children"].as_array().map(Vec::as_slice).unwrap_or_default();
    Some(Finding {
        kind: cut(message["code"]["code"].as_str().unwrap_or("rustc"), limits::TYPE_BYTES_MAX),
        file: cut(&path(primary["file_name"].as_str()?), limits::FILE_BYTES_MAX),
        span: lines(primary),
        claim: cut(&fold_space(message["message"].as_str()?), limits::CLAIM_BYTES_MAX),
        evidence: spans
            .iter()
            .filter(|s| s["is_primary"] != true)
            .take(limits::ENTRIES_MAX)
            .filter_map(other_place)
            .collect(),
        proposed_fix: children.iter().find_map(fix),
        severity,
        ..Finding::default()
    })
}

fn lines(span: &Value) -> Option<Span> {
    let line = |key: &str| span[key].as_u64().and_then(|n| u32::try_from(n).ok());
    Span::lines(line("line_start")?, line("line_end")?)
}

fn other_place(span: &Value) -> Option<Evidence> {
    Some(Evidence {
        kind: cut(span["label"].as_str().unwrap_or("place"), limits::ENTRY_BYTES_MAX),
        file: cut(&path(span["file_name"].as_str()?), limits::FILE_BYTES_MAX),
        lines: lines(span),
    })
}

/// A child's advice with the code that it suggests.
fn fix(child: &Value) -> Option<String> {
    let code: Vec<&str> =
        child["spans"].as_array()?.iter().filter_map(|s| s["suggested_replacement"].as_str()).collect();
    if code.is_empty() {
        return None;
    }
    let code = code.join(" ... ");
    let advice = child["message"].as_str().unwrap_or("replace it with");
    let text = if code.trim().is_empty() { advice.to_owned() } else { format!("{advice}: `{}`", code.trim()) };
    Some(cut(&text, limits::FIX_BYTES_MAX))
}

/// Reads libtest's output: one finding per failing test, at the line of the assertion. `None` when it isn't such output.
pub(crate) fn tests(output: &str) -> Option<Recognised> {
    let mut ran = false;
    // Name -> what its section said; a test may fail without any.
    let mut failed: BTreeMap<String, Option<Finding>> = BTreeMap::new();
    let mut lines = output.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("test result: ok.") || line.starts_with("test result: FAILED.") {
            ran = true;
        } else if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            failed.entry(name.trim_end_matches(" - should panic").to_owned()).or_default();
        } else if let Some(name) = section(line) {
            let mut body = Vec::new();
            while let Some(next) = lines.peek() {
                // The next section or the closing list of names ends this one.
                if section(next).is_some() || *next == "failures:" || next.starts_with("test result: ") {
                    break;
                }
                body.push(lines.next().unwrap_or_default());
            }
            let finding = assertion(name, &body);
            failed.insert(name.to_owned(), finding);
        }
    }
    if !ran {
        return None;
    }
    let mut found = Recognised::new(Format::CargoTest);
    for (name, finding) in failed {
        found.push(Ok(finding.unwrap_or_else(|| failing(&name, "", None, ""))));
    }
    Some(found)
}

fn section(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" ----")?.strip_suffix(" stdout")
}

/// The first panic of a failing test's own output; without one (it returned an error) the first line that it printed.
fn assertion(name: &str, body: &[&str]) -> Option<Finding> {
    for (n, line) in body.iter().enumerate() {
        let Some((_, said)) = line.strip_prefix("thread '").and_then(|l| l.split_once(" panicked at ")) else {
            continue;
        };
        // Until Rust 1.72 the message stood on the same line, quoted, before the place.
        let (before, place) = match said.strip_prefix('\'').and_then(|s| s.rsplit_once("', ")) {
            Some((message, place)) => (message, place),
            None => ("", said.trim_end_matches(':')),
        };
        let Some((file, line)) = file_and_line(place) else { continue };
        let message: Vec<&str> = std::iter::once(before)
            .chain(
                body[n + 1..]
                    .iter()
                    .copied()
                    .take_while(|l| !l.is_empty() && !l.starts_with("note: ") && *l != "stack backtrace:"),
            )
            .collect();
        return Some(failing(name, file, line, &message.join(" ")));
    }
    let said = body.iter().find(|l| !l.trim().is_empty())?;
    Some(failing(name, "", None, said))
}

/// `src/lib.rs:12:5` -> its file and line.
fn file_and_line(place: &str) -> Option<(&str, Option<Span>)> {
    let (rest, column) = place.rsplit_once(':')?;
    column.parse::<u32>().ok()?;
    let (file, line) = rest.rsplit_once(':')?;
    Some((file, Some(Span::parse(line)?)))
}

fn failing(name: &str, file: &str, span: Option<Span>, message: &str) -> Finding {
    let message = fold_space(message);
    let claim = if message.is_empty() { format!("test {name} fails") } else { format!("test {name} fails: {message}") };
    Finding {
        kind: "test_failure".to_owned(),
        file: cut(&path(file), limits::FILE_BYTES_MAX),
        span,
        claim: cut(&claim, limits::CLAIM_BYTES_MAX),
        tests: vec![cut(name, limits::ENTRY_BYTES_MAX)],
        severity: Severity::High,
        ..Finding::default()
    }
}

#[cfg(test)]
mod tests {
    use crate::read::{Format, recognise};
    use crate::{Severity, Span};

    const CLIPPY: &str = include_str!("../fixtures/clippy.jsonl");
    const TEST: &str = include_str!("../fixtures/cargo-test.txt");

    #[test]
    fn clippy_lines_become_findings() {
        let found = recognise(CLIPPY).unwrap();
        assert_eq!(found.format, Format::CargoMessages);
        assert_eq!(found.findings.len(), 8, "each warning once, though Cargo reports it per target");
        let len_zero = found.findings.iter().find(|f| f.kind == "clippy::len_zero").unwrap();
        assert_eq!((len_zero.file.as_str(), len_zero.span), ("src/invoice.rs", Some(Span::line(30))));
        assert_eq!((len_zero.claim.as_str(), len_zero.severity), ("length comparison to zero", Severity::Medium));
        assert_eq!(
            len_zero.proposed_fix.as_deref(),
            Some("using `is_empty` is clearer and more explicit: `lines.is_empty()`")
        );
    }

    #[test]
    fn failing_assertions_become_findings_with_file_and_line() {
        let found = recognise(TEST).unwrap();
        assert_eq!((found.format, found.findings.len()), (Format::CargoTest, 4));
        let rounding = &found.findings[0];
        assert_eq!((rounding.file.as_str(), rounding.span), ("src/invoice.rs", Some(Span::line(44))));
        assert_eq!(
            rounding.claim,
            "test invoice::tests::half_a_cent_is_rounded_up fails: assertion `left == right` failed left: 166 right: 167"
        );
        assert_eq!(rounding.tests, ["invoice::tests::half_a_cent_is_rounded_up"]);
        assert!(found.findings[1].claim.contains("a cent was lost in [333, 333, 333]"));
    }

    #[test]
    fn messages_and_tests_may_stand_in_one_output() {
        let found = recognise(&format!("{CLIPPY}\n{TEST}")).unwrap();
        assert_eq!((found.format, found.findings.len()), (Format::CargoMessages, 12));
    }

    #[test]
    fn passing_tests_are_no_finding_and_no_text() {
        let found = recognise("running 1 test\ntest a ... ok\n\ntest result: ok. 1 passed; 0 failed\n").unwrap();
        assert_eq!((found.format, found.findings.len()), (Format::CargoTest, 0));
    }

    #[test]
    fn old_panics_returned_errors_and_silent_failures_are_read() {
        let output = "test a ... FAILED\ntest b ... FAILED\ntest c - should panic ... FAILED\n\nfailures:\n\n---- a stdout ----\n\
            thread 'a' panicked at 'boom, really', tests/a.rs:7:9\nnote: run with\n\n---- b stdout ----\nError: \"no file\"\n\n\n\
            failures:\n    a\n    b\n\ntest result: FAILED. 0 passed; 3 failed";
        let found = recognise(output).unwrap().findings;
        assert_eq!(found[0].claim, "test a fails: boom, really");
        assert_eq!((found[0].file.as_str(), found[0].span), ("tests/a.rs", Some(Span::line(7))));
        assert_eq!((found[1].claim.as_str(), found[1].file.as_str()), ("test b fails: Error: \"no file\"", ""));
        assert_eq!(found[2].claim, "test c fails");
    }
}

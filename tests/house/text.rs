//! Rules on files: a heading on each source, a size that one can read, no words that mean "later", no path of one machine.

use crate::{assert_none, root};
use std::path::{Path, PathBuf};

/// A source file that is longer asks for a second noun.
const LINES_MAX: usize = 600;
/// The heading that says what a file owns is this long at most.
const HEADING_MAX: usize = 5;

/// Written in two halves, so that this file keeps its own rule.
const BANNED: [(&str, &str); 7] = [
    (concat!("TO", "DO"), "do it, or say in an issue what is left"),
    (concat!("FIX", "ME"), "fix it, or say in an issue what is left"),
    (concat!("todo", "!("), "finish it"),
    (concat!("unimplem", "ented!("), "finish it"),
    (concat!("#[ig", "nore"), "a test that doesn't run proves nothing"),
    (concat!("/wo", "rk/"), "a path of one machine"),
    (concat!("/ho", "me/"), "a path of one machine"),
];

/// Files of ours, but build output, data and the demo's crate (its defects are the point).
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                let skipped = matches!(name.as_str(), "target" | ".git" | "node_modules" | "__pycache__" | ".venv");
                if !skipped && !name.ends_with("-data") && path != root().join("ops/demo") {
                    open.push(path);
                }
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[test]
fn sources_open_with_what_they_own() {
    let mut complaints = Vec::new();
    for path in files().iter().filter(|p| has_extension(p, &["rs"])) {
        let text = std::fs::read_to_string(path).unwrap();
        // Formats and examples may follow behind an empty line of the heading.
        let heading = text.lines().take_while(|l| l.starts_with("//!") && *l != "//!").count();
        if heading == 0 || heading > HEADING_MAX {
            complaints.push(format!("{}: opens with {heading} lines of `//!`, not 1 to {HEADING_MAX}", shown(path)));
        }
    }
    assert_none("headings", &complaints);
}

#[test]
fn sources_are_short() {
    let mut complaints = Vec::new();
    for path in files().iter().filter(|p| has_extension(p, &["rs", "py", "sh"])) {
        let lines = std::fs::read_to_string(path).unwrap().lines().count();
        if lines > LINES_MAX {
            complaints.push(format!("{}: {lines} lines, more than {LINES_MAX}", shown(path)));
        }
    }
    assert_none("sizes", &complaints);
}

#[test]
fn nothing_is_left_for_later_and_nothing_names_a_machine() {
    let mut complaints = Vec::new();
    let kinds = ["rs", "py", "sh", "md", "toml", "yaml", "yml", "proto", "json", "patch"];
    for path in files().iter().filter(|p| has_extension(p, &kinds) || p.file_name().is_some_and(|n| n == "justfile")) {
        let Ok(text) = std::fs::read_to_string(path) else { continue };
        for (number, line) in text.lines().enumerate() {
            for (word, why) in BANNED.iter().filter(|(word, _)| line.contains(word)) {
                complaints.push(format!("{}:{}: `{word}`: {why}", shown(path), number + 1));
            }
        }
    }
    assert_none("words", &complaints);
}

#[test]
fn files_that_readers_expect_exist() {
    let expected = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE", "justfile", "deny.toml", ".ci/run"];
    let complaints: Vec<String> =
        expected.iter().filter(|f| !root().join(f).is_file()).map(|f| format!("{f} is missing")).collect();
    assert_none("files", &complaints);
}

#[test]
fn links_in_pages_lead_somewhere() {
    let mut complaints = Vec::new();
    for path in files().iter().filter(|p| has_extension(p, &["md"])) {
        let text = std::fs::read_to_string(path).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.contains(' ') {
                continue;
            }
            if !path.parent().unwrap().join(file).exists() {
                complaints.push(format!("{}: {target} doesn't exist", shown(path)));
            }
        }
    }
    assert_none("links", &complaints);
}

#[test]
fn each_row_of_the_fault_table_names_a_test_that_is_there() {
    let table = std::fs::read_to_string(root().join("tests/cluster/FAULTS.md")).unwrap();
    let rows: Vec<&str> = table.lines().filter(|l| l.starts_with("| ") && l.contains('`')).collect();
    assert!(rows.len() >= 50, "{} rows", rows.len());
    let sources: String =
        files().iter().filter(|f| has_extension(f, &["rs"])).map(|f| std::fs::read_to_string(f).unwrap()).collect();
    let mut complaints = Vec::new();
    for row in rows {
        let command = row.rsplit('`').nth(1).unwrap();
        let Some((_, filter)) = command.split_once("cargo test -p ") else { continue };
        let name = filter.rsplit(' ').next().unwrap().rsplit("::").find(|part| !part.is_empty()).unwrap();
        if !sources.contains(&format!("fn {name}")) && !sources.contains(&format!("mod {name};")) {
            complaints.push(format!("no test {name}: {command}"));
        }
    }
    assert_none("rows of the fault table", &complaints);
}

//! `docs/log-format.md`: its tables are written from the sources and must agree with them, as `docs/configuration.md` does with
//! the parser. `ATP_WRITE_DOCS=1` writes them.

use crate::source::{Declared, Form, declared, shown};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::PathBuf;

const PARTS: [(&str, &str); 2] = [("records", "Entry"), ("checkpoint", "Image")];

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

pub(crate) fn path() -> PathBuf {
    root().join("docs/log-format.md")
}

fn begin(part: &str) -> String {
    format!("<!-- {part}: generated from the sources -->\n")
}
const END: &str = "<!-- end -->\n";

#[test]
fn the_tables_of_the_page_are_those_of_the_sources() {
    let all = declared(&root().join("router/core/src"));
    let mut page = std::fs::read_to_string(path()).unwrap();
    let mut written = BTreeSet::new();
    for (part, first) in PARTS {
        let mut text = String::new();
        tables(&all, first, "", &mut written, &mut text);
        let (head, rest) = page.split_once(&begin(part)).expect("the part's beginning");
        let (_, tail) = rest.split_once(END).expect("the part's end");
        page = format!("{head}{}{text}{END}{tail}", begin(part));
    }
    if std::env::var_os("ATP_WRITE_DOCS").is_some() {
        std::fs::write(path(), &page).unwrap();
    }
    let found = std::fs::read_to_string(path()).unwrap();
    assert!(found == page, "docs/log-format.md is out of date: run this test with ATP_WRITE_DOCS=1");
}

/// One message and, behind it, those in it that weren't shown before.
fn tables(
    all: &BTreeMap<String, Declared>,
    name: &str,
    title: &str,
    written: &mut BTreeSet<String>,
    text: &mut String,
) {
    if !written.insert(name.into()) {
        return;
    }
    let declared = all.get(name).unwrap_or_else(|| panic!("no message {name} in the sources"));
    let title = if title.is_empty() { shown(name) } else { format!("{title}: {}", shown(name)) };
    let doc = if declared.doc.is_empty() { String::new() } else { format!("{}\n\n", declared.doc) };
    let oneof = declared.form == Form::Message && declared.fields.iter().any(|f| f.number == 0);
    let _ = write!(text, "\n### {title}\n\n{doc}");
    let mut fields = declared.fields.clone();
    fields.sort_by_key(|f| f.number);
    if oneof {
        text.push_str("Exactly one of these fields is there; each is a kind of record.\n\n");
        let of = fields[0].of.as_ref().expect("a oneof");
        fields = all[of].fields.clone();
        fields.sort_by_key(|f| f.number);
        text.push_str("| field | name | type | meaning |\n|---|---|---|---|\n");
        for f in &fields {
            let of = f.of.as_ref().expect("a kind's message");
            let doc = &all[of].doc;
            assert!(!doc.is_empty(), "{of} has no comment");
            let first = doc.split(". ").next().unwrap_or_default().trim_end_matches('.');
            let _ = writeln!(text, "| {} | {} | {} | {first} |", f.number, f.name, f.kind);
        }
        for f in &fields {
            let of = f.of.as_ref().expect("a kind's message");
            tables(all, of, &format!("{} {}", f.number, f.name), written, text);
        }
        return;
    }
    let undocumented: Vec<&str> = fields.iter().filter(|f| f.doc.is_empty()).map(|f| f.name.as_str()).collect();
    let enumeration = declared.form == Form::Enumeration;
    assert!(enumeration || undocumented.is_empty(), "{name}: {undocumented:?} have no comment that says what they are");
    text.push_str(if enumeration {
        "| value | name | meaning |\n|---|---|---|\n"
    } else {
        "| field | name | type | meaning |\n|---|---|---|---|\n"
    });
    for f in &fields {
        let kind = if enumeration { String::new() } else { format!(" {} |", f.kind) };
        let doc = f.doc.replace('|', "\\|");
        let _ = writeln!(text, "| {} | {} |{kind} {doc} |", f.number, f.name);
    }
    for of in fields.iter().filter_map(|f| f.of.as_ref()) {
        tables(all, of, "", written, text);
    }
}

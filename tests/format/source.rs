//! The messages of the log as the sources of the core declare them: numbers, types and what the comments say of each field.
//! Reads text, so that a field can't be added without a word on its meaning.

use std::collections::BTreeMap;
use std::path::Path;

/// One message with its fields, or one enumeration with its values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Declared {
    pub(crate) doc: String,
    pub(crate) fields: Vec<Field>,
    pub(crate) form: Form,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Form {
    #[default]
    Message,
    /// Exactly one of its fields is there.
    Oneof,
    Enumeration,
}

#[derive(Clone, Debug)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: String,
    /// As the page shows it: `uint64`, `repeated WindowRef`, `map<string, Account>`.
    pub(crate) kind: String,
    /// The message or enumeration in it.
    pub(crate) of: Option<String>,
    pub(crate) doc: String,
}

/// What these fields mean wherever they stand.
const SAME_EVERYWHERE: [(&str, &str); 9] = [
    ("key", "the stream it belongs to"),
    ("lane", "the call's number in its stream, from 1"),
    ("agent", "the agent's name"),
    ("account", "the account's name"),
    ("model", "the model's id"),
    ("tokens", "tokens, of prompt and answer together"),
    ("usd_micros", "millionths of a USD"),
    ("in_tokens", "tokens of the prompt"),
    ("out_tokens", "tokens of the answer"),
];

/// Every message, oneof and enumeration below a directory, by its name in the sources.
pub(crate) fn declared(dir: &Path) -> BTreeMap<String, Declared> {
    let mut found = BTreeMap::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                read(&std::fs::read_to_string(&path).unwrap(), &mut found);
            }
        }
    }
    found
}

fn read(text: &str, found: &mut BTreeMap<String, Declared>) {
    let (mut doc, mut attribute, mut form) = (String::new(), String::new(), None);
    let mut current: Option<(String, Declared)> = None;
    // An attribute of several lines is read like one of one.
    let text = text.replace("#[prost(\n", "#[prost(").replace(",\n        tags", ", tags").replace("\n    )]", ")]");
    for line in text.lines() {
        let word = line.trim();
        if line == "}" {
            if let Some((name, declared)) = current.take() {
                assert!(found.insert(name.clone(), declared).is_none(), "two messages are called {name}");
            }
        } else if let Some(said) = word.strip_prefix("///") {
            if !doc.is_empty() {
                doc.push(' ');
            }
            doc.push_str(said.trim());
            continue;
        } else if let Some(derived) = word.strip_prefix("#[derive(") {
            form = [("Message", Form::Message), ("Oneof", Form::Oneof), ("Enumeration", Form::Enumeration)]
                .into_iter()
                .find(|(name, _)| derived.split([' ', ',', ')', ':']).any(|d| d == *name))
                .map(|(_, form)| form);
            continue;
        } else if let Some(prost) = word.strip_prefix("#[prost(") {
            attribute = prost.trim_start().trim_end_matches(")]").into();
            continue;
        } else if word.starts_with("#[") {
            continue;
        } else if let Some((_, declared)) = &mut current {
            declared.fields.extend(field(word, &attribute, &doc, declared.form));
        } else if let Some(form) = form.take()
            && let Some(name) = word.split("struct ").nth(1).or(word.split("enum ").nth(1))
        {
            let name = name.trim_end_matches('{').trim().to_owned();
            current = Some((name, Declared { doc: doc.clone(), fields: Vec::new(), form }));
        }
        (doc, attribute) = (String::new(), String::new());
    }
}

fn field(line: &str, attribute: &str, doc: &str, form: Form) -> Option<Field> {
    let doc = doc.trim_end_matches('.').to_owned();
    let lower = |name: &str| {
        let mut text = String::new();
        for c in name.chars() {
            if c.is_uppercase() && !text.is_empty() {
                text.push('_');
            }
            text.extend(c.to_lowercase());
        }
        text
    };
    match form {
        Form::Enumeration => {
            let (name, number) = line.trim_end_matches(',').split_once(" = ")?;
            Some(Field { number: number.parse().ok()?, name: lower(name), kind: String::new(), of: None, doc })
        }
        Form::Oneof => {
            let (name, of) = line.trim_end_matches("),").split_once('(')?;
            let number = quoted(attribute, "tag")?.parse().ok()?;
            Some(Field { number, name: lower(name), kind: shown(of), of: Some(of.into()), doc })
        }
        Form::Message => {
            if let Some(oneof) = quoted(attribute, "oneof") {
                return Some(Field {
                    number: 0,
                    name: "record".into(),
                    kind: String::new(),
                    of: Some(oneof.into()),
                    doc,
                });
            }
            let number = quoted(attribute, "tag")?.parse().ok()?;
            let (name, rust) = line.trim_start_matches("pub ").trim_end_matches(',').split_once(": ")?;
            let (kind, of) = kind(attribute, rust);
            let same = || SAME_EVERYWHERE.iter().find(|(n, _)| *n == name).map(|(_, doc)| (*doc).to_owned());
            let doc = if doc.is_empty() { same().unwrap_or_default() } else { doc };
            Some(Field { number, name: name.into(), kind, of, doc })
        }
    }
}

/// `NAME = "VALUE"` in an attribute.
fn quoted<'a>(attribute: &'a str, name: &str) -> Option<&'a str> {
    attribute.split(&format!("{name} = \"")).nth(1)?.split('"').next()
}

/// The type as the page shows it, and the message in it.
fn kind(attribute: &str, rust: &str) -> (String, Option<String>) {
    let has = |word: &str| attribute.split(", ").any(|part| part == word);
    let last = rust.trim_end_matches('>').rsplit(['<', ' ', ':']).next().unwrap_or_default();
    if let Some(map) = quoted(attribute, "btree_map") {
        let (key, _) = map.split_once(", ").unwrap();
        return (format!("map<{key}, {}>", shown(last)), Some(last.into()));
    }
    let (name, of) = if let Some(of) = quoted(attribute, "enumeration") {
        let of = of.rsplit(':').next().unwrap_or(of);
        (shown(of), Some(of.to_owned()))
    } else if has("message") {
        (shown(last), Some(last.to_owned()))
    } else {
        (attribute.split([' ', ',']).next().unwrap_or_default().to_owned(), None)
    };
    let prefix = if has("repeated") {
        "repeated "
    } else if has("optional") {
        "optional "
    } else if has("required") {
        "required "
    } else {
        ""
    };
    (format!("{prefix}{name}"), of)
}

/// A message's name on the page: without what only tells it from another type of the sources.
pub(crate) fn shown(name: &str) -> String {
    name.trim_end_matches("Pb").to_owned()
}

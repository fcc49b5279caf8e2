//! The JSON Schema and the reference page of the configuration, both generated from the table.

use super::table::{KEYS, Key, Takes, parts};
use serde_json::{Value, json};
use std::fmt::Write;

/// JSON Schema (2020-12) of the configuration, pretty-printed: `docs/config.schema.json`.
#[must_use]
pub fn schema() -> String {
    let mut root = object();
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    root["title"] = json!("ATP Router configuration");
    for key in KEYS {
        let path: Vec<&str> = parts(key.path).collect();
        let mut at = &mut root;
        for (i, part) in path.iter().enumerate() {
            let last = i + 1 == path.len();
            let next = if last {
                leaf(key)
            } else if path[i + 1] == "[]" {
                json!({ "type": ["array", "null"] })
            } else {
                object()
            };
            let (holder, name) = match *part {
                "[]" => (at, "items"),
                "*" => (at, "additionalProperties"),
                name => (&mut at["properties"], name),
            };
            if last || !holder[name].is_object() {
                holder[name] = next;
            }
            at = &mut holder[name];
        }
    }
    let mut text = serde_json::to_string_pretty(&root).expect("a tree of JSON values");
    text.push('\n');
    text
}

/// JSON Schema (2020-12) of a policy file, pretty-printed: `docs/policy.schema.json`.
#[must_use]
pub fn policy_schema() -> String {
    let mut root = super::policy::schema();
    root["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    root["title"] = json!("ATP Router policy");
    let mut text = serde_json::to_string_pretty(&root).expect("a tree of JSON values");
    text.push('\n');
    text
}

fn object() -> Value {
    json!({ "type": ["object", "null"], "additionalProperties": false, "properties": {} })
}

fn leaf(key: &Key) -> Value {
    let mut leaf = match key.takes {
        Takes::Address => json!({ "type": "string" }),
        Takes::Text | Takes::Path => json!({ "type": ["string", "null"] }),
        Takes::Bool => json!({ "type": "boolean" }),
        Takes::Duration => json!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$|\\$\\{" }),
        Takes::Whole(from, to) if to < u64::MAX => {
            json!({ "type": ["integer", "string", "null"], "minimum": from, "maximum": to })
        }
        Takes::Whole(from, _) => json!({ "type": ["integer", "string", "null"], "minimum": from }),
        Takes::Usd => json!({ "type": ["number", "string", "null"], "minimum": 0 }),
        Takes::Choice(choices) => json!({ "enum": choices }),
        Takes::Texts => json!({ "type": ["array", "null"], "items": { "type": "string" } }),
        Takes::Anything => json!({}),
        Takes::Policy => json!({ "oneOf": [{ "type": ["string", "null"] }, super::policy::schema()] }),
    };
    let later = if key.later.is_some() { " (a later version)" } else { "" };
    leaf["description"] = json!(format!("{}{later}", key.about));
    if !key.default.is_empty() {
        leaf["default"] = json!(key.default);
    }
    leaf
}

/// The reference page: `docs/configuration.md`.
#[must_use]
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration\n\nGenerated from the table that the parser reads; `atp check FILE` names every mistake with line, column and fix.\n\
         One YAML file. Unknown keys are errors. `${ENV}` and `${ENV:-default}` are replaced in values. Every key has a default:\n\
         an empty file starts a single router on loopback. Durations: `500ms`, `30s`, `5m`, `2h`, `7d`. Amounts: decimals like `0.50`.\n\n\
         | key | takes | default | meaning |\n|---|---|---|---|\n",
    );
    for key in KEYS {
        let takes = match key.takes {
            Takes::Address => "address".into(),
            Takes::Bool => "true, false".into(),
            Takes::Text => "text".into(),
            Takes::Path => "path".into(),
            Takes::Duration => "duration".into(),
            Takes::Whole(from, u64::MAX) => format!("{from} or more"),
            Takes::Whole(from, to) => format!("{from} to {to}"),
            Takes::Usd => "USD".into(),
            Takes::Choice(choices) => choices.join(", "),
            Takes::Texts => "list of texts".into(),
            Takes::Anything => "anything".into(),
            Takes::Policy => "path or policy".into(),
        };
        let default = if key.default.is_empty() { String::new() } else { format!("`{}`", key.default) };
        let later = if key.later.is_some() { " *(a later version; setting it is an error now)*" } else { "" };
        let _ = writeln!(page, "| `{}` | {takes} | {default} | {}{later} |", key.path, key.about);
    }
    page
}

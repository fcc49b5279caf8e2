//! Policy text -> typed policy: a file of its own or inline under `policy`. Every key is in `schema` too. Matches no task.

use super::Problem;
use super::read::Walk;
use super::tree::{self, Kind, Mark, Node};
use atp_core::policy::Weights;
use atp_core::policy::{Condition, Escalation, Match, NumberField, PPM, Pick, Policy, Rule, Span, TextField, Trigger};
use atp_proto::id::is_id;
use atp_proto::money::{parse_usd, show_usd};
use atp_proto::{AgentName, Limit, Tokens, UsdMicros};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const TOP: [&str; 3] = ["weights", "policies", "tools_budget_caps"];
const RULE: [&str; 10] = [
    "match",
    "fanout",
    "escalation",
    "budget",
    "constraints",
    "floor",
    "gold_overrides_pause",
    "strategy",
    "arbiter_max_usd",
    "provisional",
];
const LATER: [&str; 2] = ["arbiter_max_usd", "provisional"];
const MATCH_FIX: &str = "write a number, a comparison in quotes like \">200\", or a range like \"50..200\"";

/// True when the top-level keys are those of a policy, so that `atp check` reads the file as one.
pub(super) fn is_policy(root: &Node) -> bool {
    matches!(&root.kind, Kind::Map(pairs) if !pairs.is_empty() && pairs.iter().all(|(name, ..)| TOP.contains(&name.as_str())))
}

impl Walk<'_> {
    /// Reads `policy`: a path, or the policy itself.
    pub(super) fn policy_key(&mut self, node: &Node, path: &str) -> Option<Policy> {
        if matches!(node.kind, Kind::Map(_)) {
            return Some(self.policy(node, path));
        }
        let file = self.text(node, path)?;
        let fix = "name a readable policy file, or write the policy here";
        self.of_file(node.mark, path, &file, fix, |walk, root| walk.policy(root, ""))
    }

    /// Reads another YAML file, named at `mark`; what is wrong in it is told with its own place.
    pub(super) fn of_file<T>(
        &mut self,
        mark: Mark,
        path: &str,
        file: &str,
        fix: &str,
        read: impl FnOnce(&mut Walk<'_>, &Node) -> T,
    ) -> Option<T> {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(e) => {
                self.problem(mark, path, format!("{file}: {e}"), fix);
                return None;
            }
        };
        let mut inner = Walk::new(self.env);
        let found =
            tree::parse(&text).map(|root| read(&mut inner, &root)).map_err(|problem| inner.problems.push(problem));
        for Problem { line, column, field, message, fix } in inner.problems {
            self.problem(mark, path, format!("{file}:{line}:{column}: {field}: {message}"), fix);
        }
        found.ok()
    }

    /// Reads a whole policy; what is wrong stands in `problems`.
    pub(super) fn policy(&mut self, root: &Node, base: &str) -> Policy {
        let mut policy = Policy::default();
        for (name, path, node) in self.entries(root, base, Some(&TOP)) {
            match name.as_str() {
                "weights" => policy.weights = self.weights(node, &path),
                "policies" => {
                    let rules = self.items(node, &path);
                    policy.rules = rules.into_iter().map(|(path, node)| self.rule(node, &path)).collect();
                }
                _ => {
                    for (tool, path, node) in self.entries(node, &path, None) {
                        let cap = self.amounts(node, &path);
                        policy.tools_budget_caps.insert(tool, cap);
                    }
                }
            }
        }
        policy
    }

    fn weights(&mut self, node: &Node, path: &str) -> Weights {
        let mut parts = Weights::default().parts();
        let before = self.problems.len();
        for (name, path, node) in self.entries(node, path, Some(&Weights::NAMES)) {
            let Some(text) = self.text(node, &path) else { continue };
            let read = parse_usd(&text).ok().and_then(|w| u32::try_from(w.0).ok()).filter(|w| *w <= PPM);
            match (read, Weights::NAMES.iter().position(|n| *n == name)) {
                (Some(weight), Some(at)) => parts[at] = weight,
                _ => self.problem(node.mark, &path, format!("`{text}` is no weight"), "write a decimal from 0 to 1"),
            }
        }
        let weights = Weights::from_parts(parts);
        if weights.sum() != u64::from(PPM) && self.problems.len() == before {
            let message = format!("the seven weights sum to {}, not to 1", show_usd(UsdMicros(weights.sum())));
            self.problem(node.mark, path, message, "a weight that is left out keeps its default; make the sum 1");
        }
        weights
    }

    fn rule(&mut self, node: &Node, path: &str) -> Rule {
        let mut rule = Rule::default();
        for (name, path, node) in self.entries(node, path, Some(&RULE)) {
            match name.as_str() {
                "match" => rule.when = self.conditions(node, &path),
                "fanout" => {
                    let picks = self.items(node, &path);
                    rule.fanout = picks.into_iter().filter_map(|(path, node)| self.pick(node, &path)).collect();
                }
                "escalation" => rule.escalation = self.escalation(node, &path),
                "budget" => rule.budget = self.amounts(node, &path),
                "constraints" => {
                    for (_, path, node) in self.entries(node, &path, Some(&["security_groups_any"])) {
                        rule.security_groups_any = self.texts(node, &path);
                    }
                }
                "floor" => rule.floor = self.text(node, &path).filter(|t| !t.is_empty()),
                "gold_overrides_pause" => match self.text(node, &path).as_deref() {
                    Some("true") => rule.gold_overrides_pause = true,
                    Some("false") | None => {}
                    Some(text) => {
                        let message = format!("`{text}` is neither true nor false");
                        self.problem(node.mark, &path, message, "write true or false");
                    }
                },
                "strategy" => {
                    if let Some(text) = self.text(node, &path).filter(|t| t != "union") {
                        let message = format!("this version has no strategy `{text}`");
                        self.problem(node.mark, &path, message, "use union, or leave it out");
                    }
                }
                _ => {
                    let fix = format!("leave `{}` out", LATER.iter().find(|l| **l == name).unwrap_or(&"it"));
                    self.problem(node.mark, &path, "this version can't do that yet", fix);
                }
            }
        }
        rule
    }

    fn conditions(&mut self, node: &Node, path: &str) -> Match {
        let names: Vec<&str> = TextField::ALL
            .iter()
            .map(|(name, _)| *name)
            .chain(NumberField::ALL.iter().map(|(name, _)| *name))
            .chain(["requires"])
            .collect();
        let mut conditions = Vec::new();
        for (name, path, node) in self.entries(node, path, Some(&names)) {
            let values = self.texts(node, &path);
            if values.is_empty() {
                continue;
            }
            let text = TextField::ALL.iter().find(|(n, _)| *n == name).map(|(_, field)| *field);
            let number = NumberField::ALL.iter().find(|(n, _)| *n == name).map(|(_, field)| *field);
            if let Some(field) = text {
                if let Some(bad) = values.iter().find(|v| v.starts_with(['<', '>'])) {
                    let message = format!("`{bad}` compares, but {name} is text");
                    self.problem(node.mark, &path, message, "write a value or a list of values");
                }
                let qos = ["gold", "silver", "bronze"];
                if field == TextField::Qos && values.iter().any(|v| !qos.contains(&v.as_str())) {
                    self.problem(node.mark, &path, "no such QoS", "use gold, silver or bronze");
                }
                conditions.push(Condition::OneOf(field, values));
            } else if let Some(field) = number {
                let mut spans = Vec::new();
                for value in values {
                    match Span::parse(&value) {
                        Some(span) => spans.push(span),
                        None => {
                            self.problem(node.mark, &path, format!("`{value}` is no comparison"), MATCH_FIX);
                        }
                    }
                }
                conditions.push(Condition::In(field, spans));
            } else {
                conditions.push(Condition::Requires(values));
            }
        }
        Match(conditions)
    }

    fn pick(&mut self, node: &Node, path: &str) -> Option<Pick> {
        if !matches!(node.kind, Kind::Map(_)) {
            return self.handle(node, path).map(Pick::Agent);
        }
        let (mut prefix, mut top) = (None, 1);
        for (name, path, node) in self.entries(node, path, Some(&["prefix", "top"])) {
            let Some(text) = self.text(node, &path) else { continue };
            if name == "prefix" {
                prefix = Some(text.strip_suffix('*').unwrap_or(&text).to_owned());
            } else {
                match text.parse().ok().filter(|n| (1..=32).contains(n)) {
                    Some(n) => top = n,
                    None => self.problem(
                        node.mark,
                        &path,
                        format!("`{text}` is out of range"),
                        "write a number from 1 to 32",
                    ),
                }
            }
        }
        if prefix.is_none() {
            self.problem(node.mark, &format!("{path}.prefix"), "is missing", "write {prefix: \"reviewer.*\", top: 2}");
        }
        prefix.map(|prefix| Pick::Prefix { prefix, top })
    }

    fn handle(&mut self, node: &Node, path: &str) -> Option<AgentName> {
        let text = self.text(node, path)?;
        if is_id(&text) {
            return Some(AgentName::new(&text));
        }
        self.problem(node.mark, path, format!("`{text}` is no handle"), "use 1 to 64 of A-Za-z0-9._-");
        None
    }

    fn escalation(&mut self, node: &Node, path: &str) -> Option<Escalation> {
        let (mut on, mut to) = (BTreeSet::new(), Vec::new());
        let before = self.problems.len();
        for (name, path, node) in self.entries(node, path, Some(&["on", "to"])) {
            if name == "on" {
                for text in self.texts(node, &path) {
                    match Trigger::parse(&text) {
                        Some(trigger) => {
                            on.insert(trigger);
                        }
                        None => {
                            let known: Vec<&str> = Trigger::ALL.iter().map(|t| t.as_str()).collect();
                            let fix = format!("use some of {}", known.join(", "));
                            self.problem(node.mark, &path, format!("`{text}` is no trigger"), fix);
                        }
                    }
                }
            } else if let Kind::List(_) = node.kind {
                let handles = self.items(node, &path);
                to = handles.into_iter().filter_map(|(path, node)| self.handle(node, &path)).collect();
            } else {
                to.extend(self.handle(node, &path));
            }
        }
        if self.problems.len() == before && (on.is_empty() || to.is_empty()) {
            let fix = "write escalation: {on: [low_conf], to: HANDLE}";
            self.problem(node.mark, path, "needs both `on` and `to`", fix);
        }
        Some(Escalation { on, to })
    }

    /// `{usd, tokens}`; what is left out has no limit.
    fn amounts(&mut self, node: &Node, path: &str) -> Limit {
        let mut limit = Limit::NONE;
        for (name, path, node) in self.entries(node, path, Some(&["usd", "tokens"])) {
            let Some(text) = self.text(node, &path) else { continue };
            if name == "usd" {
                match parse_usd(&text) {
                    Ok(usd) => limit.usd_micros = Some(usd),
                    Err(e) => self.problem(node.mark, &path, e, "write a decimal amount of USD like 0.50"),
                }
            } else {
                match text.replace('_', "").parse() {
                    Ok(tokens) => limit.tokens = Some(Tokens(tokens)),
                    Err(_) => {
                        let message = format!("`{text}` is no number of tokens");
                        self.problem(node.mark, &path, message, "write a whole number from 0");
                    }
                }
            }
        }
        limit
    }

    // ---- pieces of the tree -----------------------------------------------------------------------------------------

    /// The pairs of a map; with `known`, any other name is a problem.
    pub(super) fn entries<'n>(
        &mut self,
        node: &'n Node,
        path: &str,
        known: Option<&[&str]>,
    ) -> Vec<(String, String, &'n Node)> {
        if node.is_absent() {
            return Vec::new();
        }
        let Kind::Map(pairs) = &node.kind else {
            let field = if path.is_empty() { "the file" } else { path };
            let names = known.map_or_else(|| "names of your choice".into(), |k| format!("the keys {}", k.join(", ")));
            let message = format!("{} stands where a map belongs", node.what());
            self.problem(node.mark, field, message, format!("write a map with {names}"));
            return Vec::new();
        };
        let mut found = Vec::new();
        for (name, mark, value) in pairs {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match known {
                Some(known) if !known.contains(&name.as_str()) => self.unknown(*mark, &path, name, known),
                _ if value.is_absent() => {}
                _ => found.push((name.clone(), path, value)),
            }
        }
        found
    }

    fn items<'n>(&mut self, node: &'n Node, path: &str) -> Vec<(String, &'n Node)> {
        let Kind::List(items) = &node.kind else {
            self.problem(node.mark, path, format!("{} stands where a list belongs", node.what()), "write a list");
            return Vec::new();
        };
        items.iter().enumerate().map(|(i, item)| (format!("{path}[{i}]"), item)).collect()
    }

    /// A value, or a list of values.
    fn texts(&mut self, node: &Node, path: &str) -> Vec<String> {
        if !matches!(node.kind, Kind::List(_)) {
            return self.text(node, path).into_iter().collect();
        }
        let items = self.items(node, path);
        items.into_iter().filter_map(|(path, node)| self.text(node, &path)).collect()
    }

    /// A name that no table knows, with the nearest one that it might have meant.
    pub(super) fn unknown(&mut self, mark: Mark, path: &str, name: &str, known: &[&str]) {
        let near = known.iter().map(|k| (super::read::distance(name, k), *k)).min().filter(|(d, _)| *d <= 2);
        let fix = match near {
            Some((_, key)) => format!("did you mean `{key}`?"),
            None => format!("known here: {}", known.join(", ")),
        };
        self.problem(mark, path, "unknown key", fix);
    }
}

/// JSON Schema of a policy, as a file of its own or under `policy`.
pub(super) fn schema() -> Value {
    let object = |properties: Value| json!({"type": ["object", "null"], "additionalProperties": false, "properties": properties});
    let texts = json!({"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]});
    let number = json!({"type": ["integer", "string", "array"], "description": "200, \">200\", \">=200\", \"<200\", \"<=200\" or \"50..200\", or a list of these"});
    let amounts = object(json!({
        "usd": {"type": ["number", "string"], "minimum": 0},
        "tokens": {"type": ["integer", "string"], "minimum": 0}
    }));
    let defaults = Weights::NAMES.iter().zip(Weights::default().parts());
    let weights: serde_json::Map<String, Value> = defaults
        .map(|(name, ppm)| {
            let default = show_usd(UsdMicros(ppm.into()));
            ((*name).to_owned(), json!({"type": ["number", "string"], "minimum": 0, "maximum": 1, "default": default}))
        })
        .collect();
    let mut conditions: serde_json::Map<String, Value> =
        TextField::ALL.iter().map(|(name, _)| ((*name).to_owned(), texts.clone())).collect();
    conditions.extend(NumberField::ALL.iter().map(|(name, _)| ((*name).to_owned(), number.clone())));
    conditions.insert("requires".into(), texts.clone());
    let handle = json!({"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"});
    let prefix = object(json!({"prefix": {"type": "string"}, "top": {"type": "integer", "minimum": 1, "maximum": 32}}));
    let triggers: Vec<&str> = Trigger::ALL.iter().map(|t| t.as_str()).collect();
    let rule = object(json!({
        "match": object(Value::Object(conditions)),
        "fanout": {"type": "array", "items": {"oneOf": [handle.clone(), prefix]}},
        "escalation": object(json!({
            "on": {"type": "array", "items": {"enum": triggers}},
            "to": {"oneOf": [handle.clone(), {"type": "array", "items": handle}]}
        })),
        "budget": amounts.clone(),
        "constraints": object(json!({"security_groups_any": {"type": "array", "items": {"type": "string"}}})),
        "floor": {"type": "string", "description": "no ladder step below this model"},
        "gold_overrides_pause": {"type": "boolean", "default": false},
        "strategy": {"enum": ["union"]},
        "arbiter_max_usd": {"description": "(a later version)"},
        "provisional": {"description": "(a later version)"}
    }));
    object(json!({
        "weights": object(Value::Object(weights)),
        "policies": {"type": ["array", "null"], "items": rule},
        "tools_budget_caps": {"type": ["object", "null"], "additionalProperties": amounts}
    }))
}

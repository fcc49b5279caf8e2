//! Text -> typed configuration: walks the tree along the table, collects every problem, and only then builds the values.

use super::table::{DURATION_MS_MAX, KEYS, Key, Takes, parts};
use super::tree::{self, Kind, Mark, Node};
use super::{AgentEntry, Config, Durability, LogFormat, Problem};
use crate::identity::Anonymous;
use atp_core::policy::Policy;
use atp_core::price::PriceBook;
use atp_core::settings::WindowSettings;
use atp_proto::id::is_id;
use atp_proto::money::parse_usd;
use atp_proto::{Limit, Tokens, UsdMicros};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What stood behind a key, read as the table says.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Read {
    Bool(bool),
    Text(String),
    Ms(u64),
    Whole(u64),
    Usd(UsdMicros),
    Texts(Vec<String>),
    Anything,
}

/// Reads a configuration file.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path) -> Result<Config, Vec<Problem>> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        vec![Problem::nowhere("", format!("cannot read {}: {e}", path.display()), "check the path and its permissions")]
    })?;
    parse(&text, |name| std::env::var(name).ok())
}

/// All problems of a configuration, policy or registry text (told by its top-level keys); none: it can be used.
#[must_use]
pub fn check(text: &str) -> Vec<Problem> {
    let env = |name: &str| std::env::var(name).ok();
    match tree::parse(text) {
        Ok(root) if super::policy::is_policy(&root) => {
            let mut walk = Walk::new(&env);
            walk.policy(&root, "");
            walk.problems
        }
        Ok(root) if super::registry::is_registry(&root) => {
            let mut walk = Walk::new(&env);
            walk.registry(&root);
            walk.problems
        }
        _ => parse(text, env).err().unwrap_or_default(),
    }
}

/// Reads a configuration text; `env` looks up what `${NAME}` asks for.
///
/// # Errors
/// Everything that is wrong with it, in order of lines.
pub fn parse(text: &str, env: impl Fn(&str) -> Option<String>) -> Result<Config, Vec<Problem>> {
    let root = tree::parse(text).map_err(|p| vec![p])?;
    let mut walk = Walk::new(&env);
    walk.node(&root, "", "");
    let config = walk.build();
    let mut problems = walk.problems;
    // What forbids a start is said with its place.
    for problem in config.problems() {
        if problems.iter().all(|p| p.field != problem.field) {
            let mark = walk.marks.get(&problem.field).copied().unwrap_or_default();
            problems.push(Problem { line: mark.line, column: mark.column, ..problem });
        }
    }
    problems.sort_by_key(|p| (p.line, p.column));
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

pub(super) struct Walk<'a> {
    pub(super) env: &'a dyn Fn(&str) -> Option<String>,
    pub(super) problems: Vec<Problem>,
    /// By concrete path: `accounts.acme.usd`, `agents[0].kind`.
    values: BTreeMap<String, Read>,
    marks: BTreeMap<String, Mark>,
    pub(super) accounts: Vec<String>,
    policy: Option<Policy>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        let (problems, values, marks) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { env, problems, values, marks, accounts: Vec::new(), policy: None }
    }
}

impl Walk<'_> {
    pub(super) fn problem(&mut self, mark: Mark, field: &str, message: impl Into<String>, fix: impl Into<String>) {
        let (line, column) = (mark.line, mark.column);
        self.problems.push(Problem { line, column, field: field.into(), message: message.into(), fix: fix.into() });
    }

    /// `path` is the concrete path, `pattern` the one of the table.
    fn node(&mut self, node: &Node, path: &str, pattern: &str) {
        self.marks.insert(path.into(), node.mark);
        if let Some(key) = KEYS.iter().find(|k| k.path == pattern) {
            return self.leaf(node, path, key);
        }
        if node.is_absent() {
            return;
        }
        let list = format!("{pattern}[]");
        let is_list = KEYS.iter().any(|k| k.path.starts_with(&format!("{list}.")));
        match &node.kind {
            Kind::List(items) if is_list => {
                for (i, item) in items.iter().enumerate() {
                    self.node(item, &format!("{path}[{i}]"), &list);
                }
            }
            Kind::Map(pairs) if !is_list => {
                for (name, mark, value) in pairs {
                    self.pair(name, *mark, value, path, pattern);
                }
            }
            Kind::List(_) | Kind::Map(_) | Kind::Scalar { .. } => {
                let (found, wanted) = (node.what(), if is_list { "a list" } else { "a map" });
                let field = if path.is_empty() { "the file" } else { path };
                let example = children(pattern).join(", ");
                self.problem(
                    node.mark,
                    field,
                    format!("{found} stands where {wanted} belongs"),
                    format!("write {wanted} with the keys {example}"),
                );
            }
        }
    }

    fn pair(&mut self, name: &str, mark: Mark, value: &Node, path: &str, pattern: &str) {
        let join = |base: &str| if base.is_empty() { name.to_owned() } else { format!("{base}.{name}") };
        let concrete = join(path);
        let known = children(pattern);
        if known.contains(&name) {
            return self.node(value, &concrete, &join(pattern));
        }
        if known.contains(&"*") {
            if !is_id(name) {
                return self.problem(mark, &concrete, "is no name", "use 1 to 64 of A-Za-z0-9._-");
            }
            if pattern == "accounts" {
                self.accounts.push(name.to_owned());
            }
            return self.node(value, &concrete, &format!("{pattern}.*"));
        }
        self.unknown(mark, &concrete, name, &known);
    }

    fn leaf(&mut self, node: &Node, path: &str, key: &Key) {
        if node.is_absent() && key.takes != Takes::Texts {
            return;
        }
        if key.takes == Takes::Policy {
            self.policy = self.policy_key(node, path);
            return;
        }
        let before = self.problems.len();
        let read = self.read(node, path, key.takes);
        if self.problems.len() > before {
            return;
        }
        let Some(read) = read else { return };
        if let Some(fix) = key.later
            && read_default(key).as_ref() != Some(&read)
            && read != Read::Texts(Vec::new())
        {
            return self.problem(node.mark, path, "this version can't do that yet", fix);
        }
        self.values.insert(path.into(), read);
    }

    pub(super) fn read(&mut self, node: &Node, path: &str, takes: Takes) -> Option<Read> {
        if takes == Takes::Anything {
            return Some(Read::Anything);
        }
        if takes == Takes::Texts {
            let Kind::List(items) = &node.kind else {
                if node.is_absent() {
                    return Some(Read::Texts(Vec::new()));
                }
                self.problem(
                    node.mark,
                    path,
                    format!("{} stands where a list belongs", node.what()),
                    "write a list like [a, b]",
                );
                return None;
            };
            let texts = items.iter().enumerate().filter_map(|(i, item)| self.text(item, &format!("{path}[{i}]")));
            return Some(Read::Texts(texts.collect()));
        }
        let text = self.text(node, path)?;
        match scalar(&text, takes) {
            Ok(read) => Some(read),
            Err((message, fix)) => {
                self.problem(node.mark, path, message, fix);
                None
            }
        }
    }

    /// The text of a scalar with `${NAME}` and `${NAME:-default}` replaced.
    pub(super) fn text(&mut self, node: &Node, path: &str) -> Option<String> {
        let Kind::Scalar { text, .. } = &node.kind else {
            self.problem(node.mark, path, format!("{} stands where a value belongs", node.what()), "write one value");
            return None;
        };
        let (mut out, mut rest) = (String::with_capacity(text.len()), text.as_str());
        while let Some(at) = rest.find("${") {
            out.push_str(&rest[..at]);
            let Some(end) = rest[at..].find('}') else {
                self.problem(node.mark, path, "`${` without `}`", "write ${NAME} or ${NAME:-default}");
                return None;
            };
            let inside = &rest[at + 2..at + end];
            let (name, default) = inside.split_once(":-").map_or((inside, None), |(n, d)| (n, Some(d)));
            let found = (self.env)(name).filter(|v| default.is_none() || !v.is_empty());
            match found.as_deref().or(default) {
                Some(value) => out.push_str(value),
                None => {
                    self.problem(
                        node.mark,
                        path,
                        format!("environment variable {name} isn't set"),
                        format!("set it, or write ${{{name}:-default}}"),
                    );
                    return None;
                }
            }
            rest = &rest[at + end + 1..];
        }
        out.push_str(rest);
        Some(out)
    }

    pub(super) fn value(&self, path: &str) -> Option<Read> {
        if let Some(read) = self.values.get(path) {
            return Some(read.clone());
        }
        KEYS.iter().find(|k| k.path == path).and_then(read_default)
    }
    pub(super) fn opt_text(&self, path: &str) -> Option<String> {
        match self.value(path) {
            Some(Read::Text(text)) if !text.is_empty() => Some(text),
            _ => None,
        }
    }
    pub(super) fn whole(&self, path: &str) -> Option<u64> {
        match self.value(path) {
            Some(Read::Whole(n) | Read::Ms(n)) => Some(n),
            _ => None,
        }
    }
    pub(super) fn usd(&self, path: &str) -> Option<UsdMicros> {
        match self.value(path) {
            Some(Read::Usd(n)) => Some(n),
            _ => None,
        }
    }
    fn is(&self, path: &str, text: &str) -> bool {
        self.opt_text(path).as_deref() == Some(text)
    }
    fn size(&self, path: &str, default: usize) -> usize {
        self.whole(path).and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    }
    pub(super) fn mark(&self, path: &str) -> Mark {
        self.marks.get(path).copied().unwrap_or_default()
    }

    fn build(&mut self) -> Config {
        let mut config = Config::default();
        for (path, to) in [("listen.atp", &mut config.listen.atp), ("listen.http", &mut config.listen.http)] {
            if let Some(address) = self.opt_text(path).and_then(|t| t.parse().ok()) {
                *to = address;
            }
        }
        config.listen.insecure = self.value("listen.insecure") == Some(Read::Bool(true));
        config.advertise = self.opt_text("router.advertise");
        let is_place = |place: &String| {
            let port = place.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>()));
            port.is_some_and(|port| port.is_ok_and(|p| p > 0)) && !place.contains(['/', ' ', '@'])
        };
        if config.advertise.as_ref().is_some_and(|place| !is_place(place)) {
            let fix = "write what others dial: HOST:PORT";
            self.problem(self.mark("router.advertise"), "router.advertise", "is no address", fix);
        }
        if let Some(id) = self.opt_text("router.id") {
            if !is_id(&id) {
                self.problem(
                    self.mark("router.id"),
                    "router.id",
                    format!("`{id}` is no name"),
                    "use 1 to 64 of A-Za-z0-9._-",
                );
            }
            config.settings.router_id = id.as_str().into();
        }
        if let Some(dir) = self.opt_text("data_dir") {
            config.data_dir = dir.into();
        }
        if self.is("log.durability", "async") {
            config.durability = Durability::Async;
        }
        if self.is("auth.anonymous", "never") {
            config.anonymous = Anonymous::Never;
        }
        if self.is("telemetry.log", "json") {
            config.log_format = LogFormat::Json;
        }
        self.kafka(&mut config);
        self.store(&mut config);
        self.peers(&mut config);
        let windows = [
            ("windows.stream", &mut config.settings.stream_window),
            ("windows.agent", &mut config.settings.agent_window),
        ];
        for (path, window) in windows {
            *window = WindowSettings {
                max_parallel: self.whole(&format!("{path}.max_parallel")).and_then(|n| u32::try_from(n).ok()),
                limit: Limit {
                    tokens: self.whole(&format!("{path}.max_tokens")).map(Tokens),
                    usd_micros: self.usd(&format!("{path}.max_usd")),
                },
            };
        }
        self.read_accounts(&mut config);
        config.settings.deadline_ms = self.whole("tasks.deadline").unwrap_or(config.settings.deadline_ms);
        config.settings.agent_timeout_ms =
            self.whole("tasks.agent_timeout").unwrap_or(config.settings.agent_timeout_ms);
        if let Some(retries) = self.whole("tasks.retries").and_then(|n| u32::try_from(n).ok()) {
            config.settings.retries = retries;
        }
        if let Some(policy) = self.policy.take() {
            config.settings.policy = Arc::new(policy);
        }
        self.prices(&mut config);
        if let Some(file) = self.opt_text("registry") {
            let fix = "name a readable registry file";
            let mark = self.mark("registry");
            let registry = self.of_file(mark, "registry", &file, fix, |walk, root| walk.registry(root));
            config.settings.registry = Arc::new(registry.unwrap_or_default());
        }
        self.tools(&mut config);
        self.agents(&mut config);
        self.limits(&mut config);
        self.flow(&mut config);
        config
    }

    fn flow(&mut self, config: &mut Config) {
        let small = |walk: &Self, path: &str, default: u32| {
            walk.whole(path).and_then(|n| u32::try_from(n).ok()).unwrap_or(default)
        };
        let flow = &mut config.settings.flow;
        flow.aimd_base = small(self, "limits.aimd_base", flow.aimd_base);
        flow.aimd_cap = small(self, "limits.aimd_cap", flow.aimd_cap);
        flow.burst = small(self, "limits.burst", flow.burst);
        flow.latency_target_ms = self.whole("limits.latency_target").unwrap_or(flow.latency_target_ms);
        flow.cool_off_ppm = self.whole("limits.cool_off_percent").map_or(flow.cool_off_ppm, |n| n * 10_000);
        flow.gold_passes_pause = self.value("limits.gold_passes_pause") == Some(Read::Bool(true));
        if flow.aimd_base > flow.aimd_cap {
            let message = format!("{} is above limits.aimd_cap, {}", flow.aimd_base, flow.aimd_cap);
            let mark = self.mark("limits.aimd_base");
            self.problem(mark, "limits.aimd_base", message, "raise limits.aimd_cap too, or lower this one");
        }
    }

    pub(super) fn opt_texts(&self, path: &str) -> Option<Vec<String>> {
        match self.value(path) {
            Some(Read::Texts(texts)) => Some(texts),
            _ => None,
        }
    }

    fn prices(&mut self, config: &mut Config) {
        let Some(path) = self.opt_text("prices") else { return };
        let book = std::fs::read_to_string(&path).map_err(|e| e.to_string());
        match book.and_then(|text| PriceBook::parse(&text).map_err(|e| e.to_string())) {
            Ok(book) => {
                let mut prices = (*config.settings.prices).clone();
                prices.overlay(book);
                config.settings.prices = Arc::new(prices);
            }
            Err(e) => self.problem(
                self.mark("prices"),
                "prices",
                format!("{path}: {e}"),
                "give LiteLLM's price map or models.dev's JSON",
            ),
        }
    }

    fn agents(&mut self, config: &mut Config) {
        let mut names = Vec::new();
        for i in 0.. {
            let entry = format!("agents[{i}]");
            let Some(mark) = self.marks.get(&entry).copied() else { break };
            let prefix = format!("{entry}.");
            let mut fields = Map::new();
            for (path, read) in self.values.range(prefix.clone()..).take_while(|(p, _)| p.starts_with(&prefix)) {
                let value = match read {
                    Read::Bool(b) => Value::from(*b),
                    Read::Text(text) => Value::from(text.as_str()),
                    Read::Ms(ms) => Value::from(format!("{ms}ms")),
                    Read::Whole(n) => Value::from(*n),
                    Read::Usd(n) => Value::from(atp_proto::money::show_usd(*n)),
                    Read::Texts(texts) => Value::from(texts.clone()),
                    Read::Anything => continue,
                };
                let mut into = &mut fields;
                let names: Vec<&str> = path[prefix.len()..].split('.').collect();
                for name in &names[..names.len() - 1] {
                    let inner = into.entry(*name).or_insert_with(|| Value::Object(Map::new()));
                    into = inner.as_object_mut().expect("only maps stand under a name with parts behind it");
                }
                into.insert(names[names.len() - 1].into(), value);
            }
            let name = fields.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
            let said = |key: &str| self.marks.contains_key(&format!("{entry}.{key}"));
            let (kind_said, name_said) = (said("kind"), said("name"));
            if !kind_said {
                self.problem(
                    mark,
                    &format!("{entry}.kind"),
                    "is missing",
                    "name the adapter: openai, anthropic, gemini, ollama, command or scripted",
                );
            }
            if !name_said && fields.get("kind").and_then(Value::as_str) != Some("scripted") {
                self.problem(
                    mark,
                    &format!("{entry}.name"),
                    "is missing",
                    "give the agent a handle like reviewer.gemini",
                );
            } else if !name.is_empty() && !is_id(&name) {
                self.problem(
                    mark,
                    &format!("{entry}.name"),
                    format!("`{name}` is no handle"),
                    "use 1 to 64 of A-Za-z0-9._-",
                );
            } else if !name.is_empty() && names.contains(&name) {
                self.problem(
                    mark,
                    &format!("{entry}.name"),
                    format!("`{name}` stands here twice"),
                    "give each agent its own handle",
                );
            }
            names.push(name);
            config.agents.push(AgentEntry { line: mark.line, column: mark.column, fields });
        }
    }

    fn limits(&mut self, config: &mut Config) {
        let old = config.limits;
        let limits = &mut config.limits;
        limits.inbox_bytes =
            self.whole("limits.inbox_bytes").and_then(|n| u32::try_from(n).ok()).unwrap_or(old.inbox_bytes);
        limits.connections = self.size("limits.connections", old.connections);
        limits.http_connections = self.size("limits.http_connections", old.http_connections);
        limits.streams_per_connection = self.size("limits.streams_per_connection", old.streams_per_connection);
        limits.agents = self.size("limits.agents", old.agents);
        limits.heartbeat_ms = self.whole("limits.heartbeat").unwrap_or(old.heartbeat_ms);
        config.shards = self.whole("shards.count").and_then(|n| u32::try_from(n).ok());
        limits.lease_ms = self.whole("shards.lease").unwrap_or(old.lease_ms);
        limits.segment_bytes = self.whole("limits.segment_bytes").unwrap_or(old.segment_bytes);
        config.settings.limits.streams_open_max =
            self.size("limits.streams_open", config.settings.limits.streams_open_max);
        let preempt_after = config.settings.limits.preempt_after_ms;
        config.settings.limits.preempt_after_ms = self.whole("limits.preempt_after").unwrap_or(preempt_after);
        if !limits.segment_bytes.is_multiple_of(4096) {
            self.problem(
                self.mark("limits.segment_bytes"),
                "limits.segment_bytes",
                "is no multiple of 4096",
                "use 67108864",
            );
        }
        if !(100..=600_000).contains(&config.limits.heartbeat_ms) {
            self.problem(self.mark("limits.heartbeat"), "limits.heartbeat", "is out of range", "use 100ms to 10m");
        }
        if !(500..=600_000).contains(&config.limits.lease_ms) {
            self.problem(self.mark("shards.lease"), "shards.lease", "is out of range", "use 500ms to 10m");
        }
    }
}

fn read_default(key: &Key) -> Option<Read> {
    if key.default.is_empty() { None } else { scalar(key.default, key.takes).ok() }
}

/// Reads one value; the error is what is wrong and what to write.
fn scalar(text: &str, takes: Takes) -> Result<Read, (String, String)> {
    let bad = |message: String, fix: &str| Err((message, fix.to_owned()));
    match takes {
        Takes::Address => match text.parse::<std::net::SocketAddr>() {
            Ok(_) => Ok(Read::Text(text.into())),
            Err(_) => bad(
                format!("`{text}` is no address"),
                "write an IP address and a port like 127.0.0.1:7443 or [::1]:7443",
            ),
        },
        Takes::Bool => match text {
            "true" => Ok(Read::Bool(true)),
            "false" => Ok(Read::Bool(false)),
            _ => bad(format!("`{text}` is neither true nor false"), "write true or false"),
        },
        Takes::Text | Takes::Path if text.len() > 4096 => bad("longer than 4096 bytes".into(), "shorten it"),
        Takes::Text | Takes::Path => Ok(Read::Text(text.into())),
        Takes::Duration => match duration_ms(text) {
            Some(ms) => Ok(Read::Ms(ms)),
            None => bad(
                format!("`{text}` is no duration"),
                "write a whole number above 0 with a unit: 500ms, 30s, 5m, 2h or 7d",
            ),
        },
        Takes::Whole(from, to) => {
            let fix = if to == u64::MAX {
                format!("write a whole number from {from}")
            } else {
                format!("write a whole number from {from} to {to}")
            };
            let read = text.parse().ok().filter(|n| (from..=to).contains(n));
            read.map(Read::Whole).ok_or_else(|| (format!("`{text}` is out of range or no whole number"), fix))
        }
        Takes::Usd => parse_usd(text).map(Read::Usd).map_err(|e| (e, "write a decimal amount of USD like 0.50".into())),
        Takes::Choice(choices) if choices.contains(&text) => Ok(Read::Text(text.into())),
        Takes::Choice(choices) => bad(format!("`{text}` is unknown"), &format!("use one of {}", choices.join(", "))),
        Takes::Texts | Takes::Anything | Takes::Policy => Ok(Read::Anything),
    }
}

fn duration_ms(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let factor = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(factor).filter(|ms| (1..=DURATION_MS_MAX).contains(ms))
}

/// The names that may stand right below a pattern.
fn children(pattern: &str) -> Vec<&'static str> {
    let base: Vec<&str> = if pattern.is_empty() { Vec::new() } else { parts(pattern).collect() };
    let mut names = Vec::new();
    for key in KEYS {
        let path: Vec<&'static str> = parts(key.path).collect();
        if path.len() > base.len() && path[..base.len()] == base[..] && !names.contains(&path[base.len()]) {
            names.push(path[base.len()]);
        }
    }
    names
}

/// Edits between two names, for "did you mean".
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (corner + usize::from(x != *y)).min(above + 1).min(row[j] + 1);
            corner = above;
        }
    }
    row[b.len()]
}

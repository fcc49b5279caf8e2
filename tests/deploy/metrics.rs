//! Alert rules and the board ask for metrics and labels that the code registers; every alert has its line in the operator's page;
//! what Prometheus scrapes and Grafana reads is there.

use crate::{assert_none, read, root, texts, yaml};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const RULES: &str = "ops/prometheus/alerts.yaml";
const BOARD: &str = "ops/grafana/boards/atp.json";
/// Labels that Prometheus adds.
const ITS_LABELS: [&str; 3] = ["instance", "job", "le"];

fn sources(directory: &Path, text: &mut String) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text.push_str(&std::fs::read_to_string(&path).expect("a source"));
        }
    }
}

/// What the code registers: name -> kind, and every label.
fn registered() -> (BTreeMap<String, &'static str>, BTreeSet<String>) {
    let mut text = String::new();
    sources(&root().join("router/server/src"), &mut text);
    let quoted = |rest: &str| Some(rest.trim_start().strip_prefix('"')?.split_once('"')?.0.to_owned());
    let before = |part: &str| Some(part.trim_end().strip_suffix('"')?.rsplit_once('"')?.1.to_owned());
    let (mut names, mut labels) = (BTreeMap::new(), BTreeSet::new());
    for kind in ["counter", "gauge", "histogram"] {
        for call in text.split(&format!("{kind}!(")).skip(1) {
            names.extend(quoted(call).map(|name| (name, kind)));
            let arguments = call.split(';').next().unwrap_or_default();
            labels.extend(arguments.split("=>").filter_map(before));
        }
    }
    assert!(names.len() > 20 && labels.contains("agent"), "{names:?} {labels:?}");
    (names, labels)
}

/// Names of metrics in an expression, and names of labels in it.
fn asked(expression: &str) -> (Vec<&str>, Vec<&str>) {
    let words = |text: &'static str| text.split(' ');
    let mut metrics = Vec::new();
    let mut labels = Vec::new();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for word in expression.split(|c| !is_name(c)).filter(|w| w.contains('_')) {
        if ["atp_", "gen_ai_", "process_"].iter().any(|own| word.starts_with(own)) {
            metrics.push(word);
        } else if !words("histogram_quantile group_left group_right label_replace").any(|f| f == word) {
            labels.push(word);
        }
    }
    for keyword in ["by (", "on (", "without ("] {
        for rest in expression.split(keyword).skip(1) {
            labels.extend(rest.split(')').next().unwrap_or_default().split(',').map(str::trim));
        }
    }
    for rest in expression.split('{').skip(1) {
        let inside = rest.split('}').next().unwrap_or_default();
        labels.extend(inside.split(',').filter_map(|pair| pair.split(['=', '!']).next()).map(str::trim));
    }
    (metrics, labels)
}

fn check(at: &str, expression: &str, complaints: &mut Vec<String>) {
    let (names, labels) = registered();
    let (metrics, by) = asked(expression);
    if metrics.is_empty() && !expression.contains("up{") {
        complaints.push(format!("{at}: `{expression}` asks for no metric"));
    }
    for metric in metrics {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| metric.strip_suffix(end));
        let series = base.filter(|base| names.get(*base) == Some(&"histogram"));
        let plain = names.get(metric).is_some_and(|kind| *kind != "histogram");
        if series.is_none() && !plain {
            complaints.push(format!("{at}: the router has no series {metric}"));
        }
    }
    for label in by {
        if !labels.contains(label) && !ITS_LABELS.contains(&label) {
            complaints.push(format!("{at}: no metric has a label {label}"));
        }
    }
}

fn alerts() -> Vec<Value> {
    let rules = yaml(RULES);
    let groups = rules["groups"].as_array().expect("groups").clone();
    groups.into_iter().flat_map(|group| group["rules"].as_array().expect("rules").clone()).collect()
}

#[test]
fn alerts_ask_for_what_there_is_and_say_what_to_do() {
    let page = read("docs/alerts.md");
    let mut complaints = Vec::new();
    let alerts = alerts();
    for alert in &alerts {
        let name = alert["alert"].as_str().expect("a name");
        check(name, alert["expr"].as_str().expect("an expression"), &mut complaints);
        if !page.contains(&format!("| `{name}` |")) {
            complaints.push(format!("{name}: docs/alerts.md has no row for it"));
        }
        let severity = alert["labels"]["severity"].as_str().unwrap_or_default();
        if !["critical", "warning", "info"].contains(&severity) || alert["annotations"]["summary"].is_null() {
            complaints.push(format!("{name}: wants a severity (critical, warning, info) and a summary"));
        }
    }
    for row in page.lines().filter_map(|l| l.strip_prefix("| `Atp")) {
        let name = format!("Atp{}", row.split('`').next().unwrap_or_default());
        if !alerts.iter().any(|alert| alert["alert"] == *name) {
            complaints.push(format!("docs/alerts.md: {RULES} has no {name}"));
        }
    }
    assert_none(RULES, &complaints);
}

#[test]
fn the_board_asks_for_what_there_is() {
    let board: Value = serde_json::from_str(&read(BOARD)).expect("JSON");
    let source = yaml("ops/grafana/provisioning/datasources/prometheus.yaml");
    let mut complaints = Vec::new();
    let (mut ids, mut shown) = (BTreeSet::new(), 0);
    for panel in board["panels"].as_array().expect("panels") {
        let title = panel["title"].as_str().expect("a title");
        if !ids.insert(panel["id"].as_u64().expect("an id")) {
            complaints.push(format!("{title}: its id is another panel's"));
        }
        for target in panel["targets"].as_array().into_iter().flatten() {
            shown += 1;
            check(title, target["expr"].as_str().expect("an expression"), &mut complaints);
            if target["datasource"]["uid"] != source["datasources"][0]["uid"] {
                complaints.push(format!("{title}: its data source isn't provisioned"));
            }
        }
    }
    assert!(shown > 20, "{shown} expressions");
    assert_none(BOARD, &complaints);
}

#[test]
fn prometheus_and_grafana_find_their_files_and_targets() {
    let (compose, prometheus) = (read("ops/compose.yaml"), yaml("ops/prometheus/prometheus.yaml"));
    for file in texts(&prometheus["rule_files"]) {
        assert!(root().join("ops/prometheus").join(file).exists(), "{file}");
        assert!(compose.contains(&format!("./prometheus/{file}:/etc/prometheus/{file}:ro")), "{file} isn't mounted");
    }
    let jobs = prometheus["scrape_configs"].as_array().expect("jobs");
    let atp = jobs.iter().find(|job| job["job_name"] == "atp").expect("the routers");
    let targets = texts(&atp["static_configs"][0]["targets"]);
    assert_eq!(targets, ["r1:7080", "r2:7080", "r3:7080"]);
    assert!(read(RULES).contains("job=\"atp\""));
    let boards = yaml("ops/grafana/provisioning/dashboards/atp.yaml");
    let path = boards["providers"][0]["options"]["path"].as_str().expect("a path");
    assert!(compose.contains(&format!("./grafana/boards:{path}:ro")), "{path}");
    assert!(compose.contains(&format!("{path}/atp.json")), "the home board");
    let url = yaml("ops/grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]["url"].clone();
    assert_eq!(url, "http://prometheus:9090");
}

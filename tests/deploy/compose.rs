//! `ops/compose.yaml`: services, volumes and versions that exist, doors that stay on this machine, routers whose configuration,
//! proxy and place in the network agree.

use crate::{assert_none, entries, env_file, parse, read, root, texts, yaml};
use atp_tests::blackbox::atp;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

const FILE: &str = "ops/compose.yaml";
const ROUTERS: [&str; 3] = ["r1", "r2", "r3"];

/// The file as Compose sees it, with the variables of `.env` beside it; every one of them is used.
fn composed() -> Value {
    let (mut text, file) = (read(FILE), read("ops/.env"));
    let mut complaints = Vec::new();
    for (name, value) in env_file(&file) {
        let asked = format!("${{{name}}}");
        if !text.contains(&asked) {
            complaints.push(format!("ops/.env: nobody asks for {name}"));
        }
        text = text.replace(&asked, value);
    }
    if let Some((_, rest)) = text.split_once("${") {
        complaints.push(format!("{FILE}: ops/.env lacks ${{{}", rest.lines().next().unwrap_or_default()));
    }
    assert_none("variables", &complaints);
    parse(FILE, &text.replace("$$", "$"))
}

fn mounts(service: &Value) -> Vec<(&str, &str)> {
    texts(&service["volumes"]).into_iter().map(|m| m.split_once(':').expect("SOURCE:TARGET")).collect()
}

/// Where a name in the network leads: services without a namespace of another one, by name, host name and alias.
fn places(composed: &Value) -> BTreeMap<&str, &str> {
    let mut places = BTreeMap::new();
    for (name, service) in entries(&composed["services"]).filter(|(_, s)| s["network_mode"].is_null()) {
        let aliases = texts(&service["networks"]["default"]["aliases"]);
        places.extend(aliases.into_iter().chain([name]).map(|alias| (alias, name)));
    }
    places
}

#[test]
fn what_services_name_exists() {
    let composed = composed();
    let services: BTreeMap<&str, &Value> = entries(&composed["services"]).collect();
    let declared: BTreeSet<&str> = entries(&composed["volumes"]).map(|(name, _)| name).collect();
    let (mut complaints, mut used) = (Vec::new(), BTreeSet::new());
    for (name, service) in &services {
        for (other, need) in entries(&service["depends_on"]) {
            match services.get(other) {
                None => complaints.push(format!("{name}: depends_on {other}, which isn't a service")),
                Some(other_service)
                    if need["condition"] == "service_healthy" && other_service["healthcheck"].is_null() =>
                {
                    complaints.push(format!("{name}: waits for the health of {other}, which has no healthcheck"));
                }
                Some(_) => {}
            }
        }
        if let Some(other) = service["network_mode"].as_str().and_then(|mode| mode.strip_prefix("service:"))
            && (!services.contains_key(other) || service["depends_on"][other].is_null())
        {
            complaints.push(format!("{name}: network_mode of {other}, which isn't a service that it depends on"));
        }
        for (source, _) in mounts(service) {
            match source.strip_prefix("./") {
                Some(path) if !root().join("ops").join(path).exists() => {
                    complaints.push(format!("{name}: mounts {source}, which doesn't exist"));
                }
                Some(_) => {}
                None if !declared.contains(source) => complaints.push(format!("{name}: no volume {source}")),
                None => drop(used.insert(source)),
            }
        }
        if service["restart"].is_null() {
            complaints.push(format!("{name}: no restart policy"));
        }
    }
    complaints.extend(declared.difference(&used).map(|volume| format!("volume {volume}: nobody mounts it")));
    assert_none(FILE, &complaints);
}

#[test]
fn images_have_exact_tags_and_doors_stay_on_this_machine() {
    let composed = composed();
    let mut complaints = Vec::new();
    for (name, service) in entries(&composed["services"]) {
        let image = service["image"].as_str().unwrap_or_default();
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        let exact = tag.matches('.').count() >= 2 && tag.contains(|c: char| c.is_ascii_digit());
        let built = !service["build"].is_null() && image == "atp";
        if !exact && !built {
            complaints.push(format!("{name}: image `{image}` has no exact tag"));
        }
        for port in texts(&service["ports"]) {
            if !port.starts_with("127.0.0.1:") {
                complaints.push(format!("{name}: port {port} is open beyond this machine"));
            }
        }
    }
    assert_none(FILE, &complaints);
}

#[test]
fn each_router_s_configuration_is_good_and_fits_its_surroundings() {
    let composed = composed();
    let (services, places) = (&composed["services"], places(&composed));
    let proxy = read("ops/compose/haproxy.cfg");
    for router in ROUTERS {
        let service = &services[router];
        let id = service["environment"]["ATP_ROUTER"].as_str().expect("ATP_ROUTER");
        assert_eq!(id, router);
        let (source, path) = mounts(service).into_iter().find(|(_, at)| at.ends_with(".yaml:ro")).expect("its file");
        let command = texts(&service["command"]);
        assert_eq!(command, ["router", "--config", path.trim_end_matches(":ro")], "{router}");
        let file = format!("ops/{}", source.trim_start_matches("./"));
        let mut check = atp::command(&["check"]);
        let env = entries(&service["environment"]).filter_map(|(name, value)| Some((name, value.as_str()?)));
        let checked = check.arg(root().join(&file)).envs(env).output().expect("atp");
        assert!(checked.status.success(), "{file}: {}", String::from_utf8_lossy(&checked.stdout));

        let config = parse(&file, &read(&file).replace("${ATP_ROUTER}", id));
        assert_eq!(config["router"]["id"], id);
        let front = service["network_mode"].as_str().and_then(|mode| mode.strip_prefix("service:")).expect("a front");
        assert_eq!(services[front]["environment"]["ATP_ROUTER"], id, "{front} binds the router's name");
        assert_eq!(services[front]["hostname"], id, "{front} knows that name itself");
        let (host, port) = config["router"]["advertise"].as_str().and_then(|a| a.split_once(':')).expect("HOST:PORT");
        assert_eq!(places.get(host), Some(&front), "{host} leads to the router's proxy");
        // The others dial HTTP at the advertised host and the router's own port.
        for (key, outside) in [("atp", Some(port)), ("http", None)] {
            let address = config["listen"][key].as_str().expect("an address");
            let own = address.strip_prefix("127.0.0.1:").expect("loopback: there are no credentials yet");
            let (bind, server) =
                (format!("bind \"${{ATP_ROUTER}}:{}\"", outside.unwrap_or(own)), format!("server router {address}"));
            let section = proxy.split("\nlisten ").find(|s| s.starts_with(&format!("{key}\n"))).expect("a section");
            assert!(section.contains(&bind) && section.contains(&server), "haproxy.cfg: {key}: {bind}, {server}");
        }
        for broker in texts(&config["log"]["kafka"]["brokers"]) {
            let (host, _) = broker.split_once(':').expect("HOST:PORT");
            let advertised = services[host]["environment"]["KAFKA_ADVERTISED_LISTENERS"].as_str().unwrap_or_default();
            assert!(advertised.ends_with(&format!("//{broker}")), "{broker}: {advertised}");
        }
        let url = config["store"]["redis"]["url"].as_str().expect("a URL");
        let host = url.strip_prefix("redis://").and_then(|u| u.strip_suffix(":6379")).expect("redis://HOST:6379");
        assert!(places.contains_key(host), "{url}");
        let data = config["data_dir"].as_str().expect("a directory");
        assert!(
            mounts(service).iter().any(|(volume, at)| at == &data && *volume == id),
            "{data} is a volume of its own"
        );
    }
    for name in ["agent", "cli"] {
        let urls = services[name]["environment"]["ATP_URL"].as_str().expect("ATP_URL");
        let hosts: Vec<&str> = urls.split(',').map(|u| u.split("://").nth(1).expect("a URL")).collect();
        assert_eq!(hosts.iter().map(|h| h.split(':').next().expect("a host")).collect::<Vec<_>>(), ROUTERS, "{urls}");
    }
}

#[test]
fn brokers_form_one_quorum() {
    let composed = composed();
    let brokers: Vec<(&str, &Value)> =
        entries(&composed["services"]).filter(|(_, s)| !s["environment"]["KAFKA_NODE_ID"].is_null()).collect();
    let voters: Vec<String> =
        brokers.iter().map(|(name, s)| format!("{}@{name}:9093", s["environment"]["KAFKA_NODE_ID"])).collect();
    assert_eq!(voters.len(), 3);
    for (name, service) in &brokers {
        let env = &service["environment"];
        assert_eq!(env["KAFKA_CONTROLLER_QUORUM_VOTERS"], voters.join(","), "{name}");
        assert_eq!(service["hostname"], *name);
        let listeners = format!("BROKER://{name}:9092,CONTROLLER://{name}:9093");
        assert_eq!(env["KAFKA_LISTENERS"], listeners, "{name}");
        let data = env["KAFKA_LOG_DIRS"].as_str().expect("a directory");
        assert!(mounts(service).contains(&(name, data)), "{name}: {data} is a volume of its own");
        assert_eq!(
            (&env["KAFKA_MIN_INSYNC_REPLICAS"], &env["KAFKA_AUTO_CREATE_TOPICS_ENABLE"]),
            (&2.into(), &"false".into())
        );
    }
}

#[test]
fn the_agent_s_script_is_one() {
    let script = yaml("ops/compose/greeter.yaml");
    let text = read("ops/compose/greeter.yaml");
    let parsed = atp_agent::scripted::Script::parse(&text).unwrap_or_else(|e| panic!("greeter.yaml: {e}"));
    drop(parsed);
    assert_eq!(script["name"], "greeter");
}

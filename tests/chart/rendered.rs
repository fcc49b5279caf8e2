//! What `helm template` said, and what must hold between its documents.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub(crate) struct Rendered {
    documents: Vec<Value>,
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// `${NAME}` and `${NAME:-default}` in a configuration.
fn variables(config: &str) -> BTreeSet<&str> {
    let asked = config.split("${").skip(1).filter_map(|rest| rest.split_once('}'));
    asked.map(|(name, _)| name).filter(|name| !name.contains(":-")).collect()
}

impl Rendered {
    pub(crate) fn read(rendered: &str) -> Result<Self, String> {
        let parts = rendered.split("\n---\n").map(|part| part.trim_start_matches("---\n"));
        let parts = parts.filter(|part| part.lines().any(|line| !line.trim().is_empty() && !line.starts_with('#')));
        let parsed = parts.map(|part| serde_saphyr::from_str(part).map_err(|e| format!("no YAML: {e}\n{part}")));
        Ok(Self { documents: parsed.collect::<Result<_, String>>()? })
    }

    fn kinds(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.documents.iter().filter(move |d| d["kind"] == kind)
    }

    fn one(&self, kind: &str) -> &Value {
        self.kinds(kind).next().unwrap_or(&Value::Null)
    }

    fn set(&self) -> &Value {
        &self.one("StatefulSet")["spec"]
    }

    fn pod(&self) -> &Value {
        &self.set()["template"]["spec"]
    }

    fn router(&self) -> &Value {
        &self.pod()["containers"][0]
    }

    pub(crate) fn config(&self) -> &str {
        text(&self.one("ConfigMap")["data"]["atp.yaml"])
    }

    /// Of the router's container, with something in every variable.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let sample = |name: &str| match name {
            "POD_NAME" => "prod-atp-0".to_owned(),
            url if url.ends_with("_URL") => "rediss://atp:secret@redis.example:6380/0".to_owned(),
            key if key.ends_with("_KEY") => "of-32-bytes-at-least-as-it-has-to-be".to_owned(),
            _ => "secret".to_owned(),
        };
        let mut names: BTreeSet<&str> = list(&self.router()["env"]).iter().map(|e| text(&e["name"])).collect();
        for from in list(&self.router()["envFrom"]) {
            let secrets = self.kinds("Secret").filter(|s| s["metadata"]["name"] == from["secretRef"]["name"]);
            names.extend(
                secrets.flat_map(|s| s["stringData"].as_object()).flat_map(|data| data.keys().map(String::as_str)),
            );
        }
        names.into_iter().map(|name| (name.to_owned(), sample(name))).collect()
    }

    /// Directories of Secrets in the router's container, and the files in them that the configuration names.
    pub(crate) fn secret_directories(&self) -> Vec<(&str, Vec<&str>)> {
        let volumes = list(&self.pod()["volumes"]);
        let is_secret = |name: &Value| volumes.iter().any(|v| v["name"] == *name && !v["secret"].is_null());
        let mounts = list(&self.router()["volumeMounts"]).iter().filter(|m| is_secret(&m["name"]));
        mounts
            .map(|mount| {
                let at = text(&mount["mountPath"]);
                let files = self.config().split(at).skip(1).filter_map(|rest| rest.strip_prefix('/'));
                let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
                let named = files.map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or_default());
                (at, named.collect())
            })
            .collect()
    }

    /// Documents that a cluster takes apart, and that know each other.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let mut seen = BTreeSet::new();
        for document in &self.documents {
            let (kind, name) = (text(&document["kind"]), text(&document["metadata"]["name"]));
            if kind.is_empty() || name.is_empty() || text(&document["apiVersion"]).is_empty() {
                complaints.push(format!("a document without apiVersion, kind or name: {document}"));
            }
            if !seen.insert((kind, name)) {
                complaints.push(format!("{kind} {name} is there twice"));
            }
        }
        let labels = &self.set()["template"]["metadata"]["labels"];
        let selects = |selector: &Value| {
            let wanted = selector.as_object().is_some_and(|s| !s.is_empty());
            wanted && selector.as_object().into_iter().flatten().all(|(key, value)| labels[key] == *value)
        };
        let services = self.kinds("Service").map(|s| (s, &s["spec"]["selector"]));
        let others = ["PodDisruptionBudget", "NetworkPolicy"].into_iter().flat_map(|kind| self.kinds(kind));
        let others = others.map(|d| {
            let spec = &d["spec"];
            (
                d,
                if spec["selector"].is_null() {
                    &spec["podSelector"]["matchLabels"]
                } else {
                    &spec["selector"]["matchLabels"]
                },
            )
        });
        for (document, selector) in
            services.chain(others).chain([(self.one("StatefulSet"), &self.set()["selector"]["matchLabels"])])
        {
            if !selects(selector) {
                complaints.push(format!("{} {} selects other pods", document["kind"], document["metadata"]["name"]));
            }
        }
        let monitored = self.kinds("ServiceMonitor").all(|m| {
            let wanted = m["spec"]["selector"]["matchLabels"].as_object().cloned().unwrap_or_default();
            let port = &m["spec"]["endpoints"][0]["port"];
            self.kinds("Service").any(|s| {
                wanted.iter().all(|(k, v)| s["metadata"]["labels"][k] == *v)
                    && list(&s["spec"]["ports"]).iter().any(|p| p["name"] == *port)
            })
        });
        if !monitored {
            complaints.push("the ServiceMonitor finds no Service with its port".into());
        }
        let replicas = self.set()["replicas"].as_u64().unwrap_or_default();
        if (replicas > 1) != self.kinds("PodDisruptionBudget").next().is_some() {
            complaints.push(format!("{replicas} replicas and a PodDisruptionBudget don't fit"));
        }
        complaints
    }

    /// Mounts, volumes, variables, users and times of the pods.
    pub(crate) fn pods(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let pod = self.pod();
        let mut volumes: BTreeSet<&str> = list(&pod["volumes"]).iter().map(|v| text(&v["name"])).collect();
        volumes.extend(list(&self.set()["volumeClaimTemplates"]).iter().map(|v| text(&v["metadata"]["name"])));
        for volume in list(&pod["volumes"]).iter().filter(|v| !v["configMap"].is_null()) {
            if !self.kinds("ConfigMap").any(|c| c["metadata"]["name"] == volume["configMap"]["name"]) {
                complaints.push(format!("no ConfigMap {}", volume["configMap"]["name"]));
            }
        }
        let containers = list(&pod["containers"]).iter().chain(list(&pod["initContainers"]));
        for container in containers {
            let name = text(&container["name"]);
            for mount in list(&container["volumeMounts"]) {
                if !volumes.contains(text(&mount["name"])) {
                    complaints.push(format!("{name}: mounts {}, which is no volume", mount["name"]));
                }
                let file = &mount["subPath"];
                if !file.is_null() && self.one("ConfigMap")["data"][text(file)].is_null() {
                    complaints.push(format!("{name}: the ConfigMap has no {file}"));
                }
            }
            let context = &container["securityContext"];
            if context["runAsUser"].as_u64().is_none_or(|user| user == 0) || context["readOnlyRootFilesystem"] != true {
                complaints.push(format!("{name}: wants a user that isn't root, and a root file system to read"));
            }
            if text(&container["image"]).rsplit_once(':').is_none_or(|(_, tag)| tag.is_empty() || tag == "latest") {
                complaints.push(format!("{name}: {} has no exact tag", container["image"]));
            }
        }
        let there = self.environment();
        for variable in variables(self.config()) {
            if !there.contains_key(variable) {
                complaints.push(format!("the configuration asks for ${{{variable}}}, which the container hasn't"));
            }
        }
        for from in list(&self.router()["envFrom"]) {
            if !self.kinds("Secret").any(|s| s["metadata"]["name"] == from["secretRef"]["name"]) {
                complaints.push(format!("no Secret {}", from["secretRef"]["name"]));
            }
        }
        // What it names below /etc/atp has to be mounted.
        let directories = self.secret_directories();
        for rest in self.config().split("/etc/atp/").skip(1) {
            let path = format!("/etc/atp/{}", rest.split([',', '}', '"', '\n', ' ']).next().unwrap_or_default());
            if !directories.iter().any(|(at, _)| path.starts_with(&format!("{at}/"))) {
                complaints.push(format!("the configuration names {path}, which isn't mounted"));
            }
        }
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap_or_default();
        let before = text(&self.router()["lifecycle"]["preStop"]["exec"]["command"][1]).parse().unwrap_or(0);
        let shares = self.config().contains("kind: kafka");
        // Alone it drains for as long as a task may run (2 min unless said otherwise), then it seals its log.
        if grace < before + if shares { 10 } else { 130 } {
            complaints
                .push(format!("terminationGracePeriodSeconds: {grace} is too short behind {before} s of preStop"));
        }
        complaints
    }

    /// Ports and names under which others find a router.
    pub(crate) fn doors(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        let config: Value = match serde_saphyr::from_str(self.config()) {
            Ok(config) => config,
            Err(error) => return vec![format!("atp.yaml: {error}")],
        };
        let advertised = text(&config["router"]["advertise"]);
        let parts: Vec<&str> = advertised.split(['.', ':']).collect();
        let headless = self.kinds("Service").find(|s| s["spec"]["clusterIP"] == "None").unwrap_or(&Value::Null);
        let service = text(&headless["metadata"]["name"]);
        if parts != ["${POD_NAME}", service, crate::NAMESPACE, "svc", "7443"] || self.set()["serviceName"] != service {
            complaints.push(format!("{advertised} isn't the pod's name in {service}"));
        }
        if headless["spec"]["publishNotReadyAddresses"] != true {
            complaints.push(format!("{service}: hides who recovers"));
        }
        let proxy = text(&self.one("ConfigMap")["data"]["haproxy.cfg"]);
        for (key, port) in [("atp", 7443), ("http", 7080)] {
            let section = proxy.split("\nlisten ").find(|s| s.starts_with(&format!("{key}\n"))).unwrap_or_default();
            let server = format!("server router {}", text(&config["listen"][key]));
            if !section.contains(&format!("bind \"${{POD_IP}}:{port}\"")) || !section.contains(&server) {
                complaints.push(format!("haproxy.cfg: {key} wants port {port} and `{server}`"));
            }
            let serves =
                |s: &Value| list(&s["spec"]["ports"]).iter().any(|p| p["name"] == key && p["targetPort"] == port);
            if !self.kinds("Service").all(serves) {
                complaints.push(format!("a Service has no port {key} to {port}"));
            }
        }
        for probe in ["startupProbe", "livenessProbe"] {
            let get = &self.router()[probe]["httpGet"];
            if get["path"] != "/livez" || get["port"] != 7080 {
                complaints.push(format!("{probe}: {get}"));
            }
        }
        if self.router()["readinessProbe"]["exec"]["command"] != serde_json::json!(["atp-ready"]) {
            complaints.push("readinessProbe: not atp-ready".into());
        }
        complaints
    }
}

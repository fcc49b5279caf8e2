//! The configuration, black box: defaults, every kind of mistake with line, field and fix, and the generated pages.

use atp_core::registry::RunCost;
use atp_proto::{Limit, TenantId, Tokens, UsdMicros};
use atp_router::config::{Durability, Problem, check, parse, policy_schema, reference, schema};
use atp_router::{Anonymous, Config};

fn read(text: &str) -> Config {
    parse(text, |_| None).unwrap_or_else(|problems| panic!("{problems:?}"))
}

fn problems(text: &str) -> Vec<Problem> {
    let problems = parse(text, |_| None).err().unwrap_or_default();
    for problem in &problems {
        assert!(!problem.fix.is_empty(), "{problem:?} names no fix");
    }
    problems
}

/// The only problem of a text, as `line:column field`.
fn only(text: &str) -> String {
    let found = problems(text);
    assert_eq!(found.len(), 1, "{found:?}");
    format!("{}:{} {}", found[0].line, found[0].column, found[0].field)
}

#[test]
fn an_empty_file_is_the_default() {
    let (read, default) = (read(""), Config::default());
    assert_eq!(format!("{:?}", read.settings), format!("{:?}", default.settings));
    assert_eq!((read.listen, read.limits, &read.data_dir), (default.listen, default.limits, &default.data_dir));
    assert_eq!((read.durability, read.anonymous), (Durability::Fsync, Anonymous::Loopback));
    assert_eq!(problems("# only a comment\n"), []);
}

#[test]
fn the_example_of_the_documentation_is_read() {
    let config = read(
        "listen: {atp: 127.0.0.1:0, http: '127.0.0.1:0', insecure: false, tls: {cert: , key: , client_ca: }}\n\
         router: {id: r7, advertise: }\n\
         log: {kind: local, format: , durability: async}\n\
         store: {kind: memory, redis: {url: , prefix: atp}}\n\
         windows:\n  stream: {max_parallel: 2, max_tokens: 7, max_usd: 0.10}\n\
         accounts:\n  default: {usd: 1.5, per: hour}\n  acme: {usd: 20.00, tokens: 9, per: total}\n\
         tasks: {deadline: 2h, agent_timeout: 500ms, retries: 0}\n\
         agents:\n- {kind: openai, name: a.b, model: m, max_parallel: 3, prices: {in_usd_per_mtok: 0.15, out_usd_per_mtok: 1}}\n",
    );
    let limit = |tokens: Option<u64>, usd: u64| Limit { tokens: tokens.map(Tokens), usd_micros: Some(UsdMicros(usd)) };
    assert_eq!(&*config.settings.router_id, "r7");
    assert_eq!(config.durability, Durability::Async);
    assert_eq!(config.settings.stream_window.limit, limit(Some(7), 100_000));
    assert_eq!(config.settings.default_account.limit, limit(None, 1_500_000));
    assert_eq!(config.settings.accounts[&TenantId::new("acme")].limit, limit(Some(9), 20_000_000));
    assert_eq!(
        (config.settings.deadline_ms, config.settings.agent_timeout_ms, config.settings.retries),
        (7_200_000, 500, 0)
    );
    let agent = serde_json::Value::Object(config.agents[0].fields.clone());
    let expected = serde_json::json!({"kind": "openai", "name": "a.b", "model": "m", "max_parallel": 3,
        "prices": {"in_usd_per_mtok": "0.15", "out_usd_per_mtok": "1.00"}});
    assert_eq!(agent, expected);
}

#[test]
fn every_mistake_is_named_with_its_place() {
    assert_eq!(only("lisen: {atp: 127.0.0.1:1}"), "1:1 lisen");
    assert!(problems("lisen: {}")[0].fix.contains("`listen`"));
    assert_eq!(only("listen:\n  atp: localhost"), "2:8 listen.atp");
    assert_eq!(only("tasks:\n  deadline: 5 minutes"), "2:13 tasks.deadline");
    assert_eq!(only("tasks: {deadline: 0s}"), "1:19 tasks.deadline");
    assert_eq!(only("windows: {stream: {max_usd: -1}}"), "1:29 windows.stream.max_usd");
    assert_eq!(only("windows: {stream: {max_usd: .nan}}"), "1:29 windows.stream.max_usd");
    assert_eq!(only("windows: {stream: {max_usd: 1e3}}"), "1:29 windows.stream.max_usd");
    assert_eq!(only("log: [local]"), "1:6 log");
    assert_eq!(only("agents: {kind: openai}"), "1:9 agents");
    assert_eq!(only("agents: [{kind: gpt, name: a}]"), "1:17 agents[0].kind");
    assert_eq!(only("agents: [{kind: ollama, name: 'a b'}]"), "1:10 agents[0].name");
    assert_eq!(only("router: {id: 'a b'}"), "1:14 router.id");
    assert_eq!(only("router: {advertise: router.example}"), "1:21 router.advertise");
    assert_eq!(only("router: {advertise: 'http://r:7443'}"), "1:21 router.advertise");
    assert_eq!(only("router: {id: a}\nrouter: {id: b}"), "2:1 ");
    assert_eq!(only("accounts: {'a b': {usd: 1}}"), "1:12 accounts.a b");
    assert_eq!(only("prices: /no/such/file.json"), "1:9 prices");
    assert_eq!(only("listen:\n  atp: ${ADDRESS}"), "2:8 listen.atp");
    assert_eq!(only("data_dir: [a"), "1:11 ");
    assert_eq!(problems("a: 1\nb: 2\ntasks: {retries: x}").len(), 3, "all of them, not only the first");
}

#[test]
fn what_a_later_version_can_do_is_refused_not_ignored() {
    assert_eq!(only("listen: {tls: {cert: a.pem}}"), "1:22 listen.tls.cert");
    assert_eq!(only("shards: {count: 1025}"), "1:17 shards.count");
    assert_eq!(only("auth: {oidc: {issuer: x}}"), "1:23 auth.oidc.issuer");
    assert_eq!(only("auth: {tokens_file: t}"), "1:21 auth.tokens_file");
    assert_eq!(only("auth: {anonymous: never}"), "1:19 auth.anonymous");
    assert_eq!(
        problems("tools: {fs_read: {root: }, http_get: {allow: []}}\nshards: {count: 1, lease: 5s}\nauth: {hmac: }"),
        []
    );
}

#[test]
fn tools_have_a_price_a_place_and_users() {
    let config = read(
        "tools: {fs_read: {root: ., usd: 0.000007}, http_get: {allow: [docs.rs, 'http://127.0.0.1:1/x/']}}\n\
         accounts: {default: {usd: 1, tools: [search]}, acme: {usd: 1, tools: [fs.read, http.get]}}\n",
    );
    let tools = &config.settings.tools;
    let prices: Vec<(&str, u64)> = tools.mediated.iter().map(|(name, a)| (name.as_str(), a.usd_micros.0)).collect();
    assert_eq!(prices, [("fs.read", 7), ("http.get", 0)]);
    let (acme, other) = (TenantId::new("acme"), TenantId::new("other"));
    assert!(tools.allows(&acme, "fs.read") && !tools.allows(&acme, "search"));
    assert!(!tools.allows(&other, "fs.read") && tools.allows(&other, "search"));
    assert_eq!((config.tools.http_allow.len(), config.tools.fs_root.is_some()), (2, true));
    assert!(read("").settings.tools.mediated.is_empty());
    assert_eq!(only("tools: {http_get: {allow: ['ftp://x']}}"), "1:27 tools.http_get.allow[0]");
    assert_eq!(only("accounts: {a: {usd: 1, tools: ['a b']}}"), "1:31 accounts.a.tools");
}

#[test]
fn plain_sockets_off_loopback_are_asked_for_in_so_many_words() {
    assert_eq!(only("listen: {atp: 0.0.0.0:7443}"), "1:15 listen.atp");
    assert_eq!(problems("listen: {atp: 0.0.0.0:7443, insecure: true}"), []);
}

#[test]
fn ranges_end_where_they_say() {
    assert_eq!(problems("limits: {heartbeat: 100ms, connections: 1, segment_bytes: 1048576}"), []);
    assert_eq!(only("limits: {heartbeat: 99ms}"), "1:21 limits.heartbeat");
    assert_eq!(only("limits: {connections: 0}"), "1:23 limits.connections");
    assert_eq!(only("limits: {segment_bytes: 1048577}"), "1:25 limits.segment_bytes");
    assert_eq!(problems("windows: {agent: {max_parallel: 4096}}"), []);
    assert_eq!(only("windows: {agent: {max_parallel: 4097}}"), "1:33 windows.agent.max_parallel");
}

#[test]
fn the_environment_is_replaced_in_values() {
    let env = |name: &str| match name {
        "DIR" => Some("there".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    };
    let config =
        parse("data_dir: ${DIR}/x${NOPE:-y}${EMPTY:-z}\ntasks: {retries: '${NOPE:-2}'}", env).expect("all are set");
    assert_eq!((config.data_dir.to_str(), config.settings.retries), (Some("there/xyz"), 2));
    assert_eq!(check("data_dir: ${ATP_THIS_IS_NOT_SET}")[0].field, "data_dir");
}

#[test]
fn accounts_say_what_happens_at_their_limit() {
    let config = read(
        "accounts:\n  acme: {usd: 20, on_limit: [downgrade, queue, refuse], ladder: [opus, sonnet, haiku], floor: sonnet,\n\
         \x20   pacing: {mode: enforce}}\n  b: {pacing: {mode: warn, reset_confidence: unknown}}\n",
    );
    let acme = &config.settings.accounts[&TenantId::new("acme")];
    let steps = acme.on_limit.expect("it says so");
    assert_eq!((steps.downgrade, steps.queue, acme.ladder.len()), (true, true, 3));
    assert_eq!((acme.floor.as_deref(), acme.pacing), (Some("sonnet"), Some(atp_core::pacing::Mode::Enforce)));
    assert_eq!(config.settings.accounts[&TenantId::new("b")].pacing, None, "an unknown reset is not paced");
    assert_eq!(only("accounts: {a: {on_limit: [refuse, queue]}}"), "1:26 accounts.a.on_limit");
    assert_eq!(only("accounts: {a: {on_limit: [downgrade]}}"), "1:26 accounts.a.on_limit");
    assert_eq!(only("accounts: {a: {on_limit: [wait]}}"), "1:26 accounts.a.on_limit");
    assert_eq!(only("accounts: {a: {ladder: [x], floor: y}}"), "1:36 accounts.a.floor");
    assert_eq!(only("accounts: {a: {per: total, pacing: {mode: warn}}}"), "1:36 accounts.a.pacing");
    assert_eq!(only("accounts: {a: {pacing: {mode: fast}}}"), "1:31 accounts.a.pacing.mode");
}

const POLICY: &str = r#"
weights: {w_capability: 0.25, w_cost: 0.20}
policies:
  - match: {task_type: code_review, diff_loc: ">200", requires: [fs.read], languages: [rust, c]}
    fanout: [summarizer.local, {prefix: "reviewer.*", top: 2}]
    escalation: {on: [low_conf, disagreement], to: reviewer.big}
    constraints: {security_groups_any: [sandboxed-fs]}
    budget: {usd: 3.00, tokens: 1_200_000}
    floor: sonnet
  - gold_overrides_pause: true
tools_budget_caps: {search_api: {usd: 0.10}}
"#;

#[test]
fn a_policy_is_read_inline_and_from_its_file() {
    use atp_core::policy::{Pick, Policy, Trigger};
    let inline = format!("policy:\n{}", POLICY.replace('\n', "\n  "));
    let policy: Policy = (*read(&inline).settings.policy).clone();
    assert_eq!((policy.weights.capability, policy.weights.cost, policy.weights.safety), (250_000, 200_000, 50_000));
    let rule = &policy.rules[0];
    assert_eq!(rule.fanout[1], Pick::Prefix { prefix: "reviewer.".into(), top: 2 });
    assert_eq!(rule.budget, Limit { usd_micros: Some(UsdMicros(3_000_000)), tokens: Some(Tokens(1_200_000)) });
    let escalation = rule.escalation.as_ref().expect("it has one");
    assert_eq!(escalation.on.iter().copied().collect::<Vec<_>>(), [Trigger::Disagreement, Trigger::LowConf]);
    assert_eq!((escalation.to[0].as_str(), rule.floor.as_deref()), ("reviewer.big", Some("sonnet")));
    assert!(policy.rules[1].gold_overrides_pause && policy.rules[1].when.0.is_empty());
    assert_eq!(policy.tools_budget_caps["search_api"].usd_micros, Some(UsdMicros(100_000)));

    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("policy.yaml");
    std::fs::write(&file, POLICY).expect("written");
    assert_eq!(*read(&format!("policy: {}", file.display())).settings.policy, policy);
    std::fs::write(&file, "policies:\n  - match: {diff_loc: '~200'}").expect("written");
    let found = problems(&format!("data_dir: x\npolicy: {}", file.display()));
    assert_eq!((found.len(), found[0].line, found[0].field.as_str()), (1, 2, "policy"));
    assert!(found[0].message.contains(":2:23: policies[0].match.diff_loc: `~200`"), "{}", found[0].message);
    assert_eq!(only("policy: no/such/policy.yaml"), "1:9 policy");
    assert_eq!(read("policy:").settings.policy.rules, []);
}

#[test]
fn every_mistake_of_a_policy_is_named_with_its_place() {
    assert_eq!(check(POLICY), [], "check takes a policy file for what it is");
    let only = |text: &str| {
        let found = check(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(!found[0].fix.is_empty());
        format!("{}:{} {}", found[0].line, found[0].column, found[0].field)
    };
    assert_eq!(only("weights: {w_cost: 0.16}"), "1:10 weights");
    assert_eq!(only("weights: {w_cost: 1.1}"), "1:19 weights.w_cost");
    assert_eq!(only("weights: {w_costs: 0.15}"), "1:11 weights.w_costs");
    assert_eq!(only("policies: {match: }"), "1:11 policies");
    assert_eq!(only("policies:\n- match: {diff_lock: 1}"), "2:11 policies[0].match.diff_lock");
    assert_eq!(only("policies:\n- match: {task_type: '>3'}"), "2:22 policies[0].match.task_type");
    assert_eq!(only("policies:\n- match: {qos: iron}"), "2:16 policies[0].match.qos");
    assert_eq!(only("policies:\n- fanout: ['a b']"), "2:12 policies[0].fanout[0]");
    assert_eq!(only("policies:\n- fanout: [{top: 2}]"), "2:12 policies[0].fanout[0].prefix");
    assert_eq!(only("policies:\n- fanout: [{prefix: a, top: 33}]"), "2:29 policies[0].fanout[0].top");
    assert_eq!(only("policies:\n- escalation: {on: [boredom], to: a}"), "2:20 policies[0].escalation.on");
    assert_eq!(only("policies:\n- escalation: {on: [low_conf]}"), "2:15 policies[0].escalation");
    assert_eq!(only("policies:\n- provisional: {quorum_min: 1}"), "2:16 policies[0].provisional");
    assert_eq!(only("tools_budget_caps: {x: {usd: -1}}"), "1:30 tools_budget_caps.x.usd");
}

#[test]
fn aliases_are_bounded() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..9 {
        let row = vec![format!("*a{}", i - 1); 10].join(", ");
        text += &format!("a{i}: &a{i} [{row}]\n");
    }
    assert!(problems(&text).iter().any(|p| p.message.contains("more than")), "a bomb of aliases is refused");
}

/// The generated pages in `docs` are those of this table. `ATP_WRITE_DOCS=1` writes them.
#[test]
fn the_pages_agree_with_the_parser() {
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let pages =
        [("config.schema.json", schema()), ("policy.schema.json", policy_schema()), ("configuration.md", reference())];
    for (name, text) in pages {
        let path = docs.join(name);
        if std::env::var_os("ATP_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(&docs).expect("docs can be made");
            std::fs::write(&path, &text).expect("docs can be written");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "docs/{name} is out of date: run this test with ATP_WRITE_DOCS=1");
    }
}

#[test]
fn a_registry_is_a_catalogue_of_which_the_figures_of_runs_count() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("registry.yaml");
    let text = "version: '1.0'\ncapability_vocabulary: [domain_review]\nagents:\n  \
        fd-safety:\n    source: plug\n    models:\n      preferred: big\n      supported: [big, small]\n      \
        big: {mean: 1100, p50: 1000, p90: 1400, runs: 3, in_ppm: 850000}\n      small: {mean: 1100, preliminary: true}\n";
    std::fs::write(&file, text).unwrap();
    assert_eq!(check(text), []);
    let config = format!("registry: {}", file.display());
    let registry = parse(&config, |_| None).unwrap().settings.registry;
    let big = RunCost { mean: 1_100, p90: 1_400, runs: 3, preliminary: false, in_ppm: Some(850_000) };
    assert_eq!(registry.cost("fd-safety", "big"), Some(&big));
    assert_eq!(registry.cost("fd-safety", "small").map(RunCost::deviation), Some(550));
    assert_eq!(registry.cost("fd-safety", "supported"), None);

    let wrong = |figures: &str| {
        let text = format!("agents:\n  a:\n    models:\n      m: {figures}\n");
        std::fs::write(&file, &text).unwrap();
        let problem = parse(&config, |_| None).unwrap_err().remove(0);
        assert_eq!((problem.line, problem.field.as_str()), (1, "registry"));
        let own = check(&text).remove(0);
        assert!(problem.message.ends_with(&format!(":{}:{}: {}: {}", own.line, own.column, own.field, own.message)));
        (own.column, own.field, own.fix)
    };
    assert_eq!(wrong("{p90: 1}").1, "agents.a.models.m");
    assert_eq!(wrong("{mean: 1, p9O: 1}").2, "did you mean `p90`?");
    assert_eq!(wrong("{mean: 1000000000001}").0, 17);
    assert_eq!(wrong("{mean: 1, in_ppm: 1000001}").1, "agents.a.models.m.in_ppm");
    assert_eq!(check("agents: {a: {models: {m: {mean: 1000000000000, in_ppm: 1000000}}}}"), []);
}

#[test]
fn a_store_has_an_address_that_is_never_repeated() {
    let redis = "store: {kind: redis, redis: {url: 'redis://u:hunter2@127.0.0.1:1/2', prefix: a.b}}";
    let config = read(redis);
    let atp_router::store::StoreConfig::Redis(store) = &config.store else { panic!("{:?}", config.store) };
    assert_eq!(store.prefix, "a.b");
    assert!(!format!("{config:?}").contains("hunter2"));
    assert_eq!(read("store: {redis: {url: 'redis://h'}}").store, atp_router::store::StoreConfig::Memory);
    assert_eq!(only("store: {kind: redis}"), "1:15 store.redis.url");
    assert_eq!(only("store: {kind: redis, redis: {url: 'redis://h', prefix: 'a{b'}}"), "1:56 store.redis.prefix");
    assert_eq!(only("store: {kind: redis, redis: {url: 'http://u:hunter2@h'}}"), "1:35 store.redis.url");
    let shown = format!("{:?}", problems("store: {kind: redis, redis: {url: 'redis://u:hunter2@[h'}}"));
    assert!(shown.contains("store.redis.url") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn keys_of_routers_are_long_enough_and_never_repeated() {
    let long = "k".repeat(32);
    assert!(read(&format!("peers: {{key: {long}, also: {}}}", "l".repeat(32))).peer_key.is_some());
    assert_eq!(only("peers: {key: too-short}"), "1:14 peers.key");
    assert_eq!(only(&format!("peers: {{also: {long}}}")), "1:15 peers.also");
    let shown = format!("{:?}", problems(&format!("peers: {{key: {long}, also: hunter2}}")));
    assert!(shown.contains("peers.also") && !shown.contains("hunter2") && !shown.contains(&long), "{shown}");
}

#[cfg(feature = "kafka")]
#[test]
fn a_log_in_kafka_has_brokers_and_a_topic() {
    let text = "log: {kind: kafka, kafka: {brokers: [a:9092, 127.0.0.1:9093], single_broker: true}}";
    use atp_router::config::LogPlace;
    let LogPlace::Kafka(place) = read(text).log else { panic!("local") };
    assert_eq!(place.address.to_string(), "kafka://a:9092,127.0.0.1:9093/atp.frames");
    assert_eq!((place.single_broker, place.address.tls, place.address.sasl), (true, None, None));
    // Its keys alone don't move the log.
    assert_eq!(read("log: {kafka: {brokers: [a:9092]}}").log, LogPlace::Local);

    assert_eq!(only("log: {kind: kafka}"), "1:13 log.kafka.brokers");
    assert_eq!(only("log: {kind: kafka, kafka: {brokers: [a]}}"), "1:37 log.kafka.brokers");
    assert_eq!(only("log: {kind: kafka, kafka: {brokers: [a:1], topic: a b}}"), "1:51 log.kafka.topic");
    assert_eq!(only("log: {kind: kafka, kafka: {brokers: [a:1]}}\nshards: {count: 0}"), "2:17 shards.count");
}

#[cfg(feature = "kafka")]
#[test]
fn credentials_for_the_brokers_are_whole_and_never_shown() {
    let with = |more: &str| format!("log: {{kind: kafka, kafka: {{brokers: [a:1], {more}}}}}");
    let field = |more: &str| problems(&with(more))[0].field.clone();
    assert_eq!(field("tls: {ca: x.pem}"), "log.kafka.tls.on");
    assert_eq!(field("tls: {on: true, cert: x.pem}"), "log.kafka.tls.cert");
    assert!(problems(&with("tls: {on: true, ca: /no/such.pem}")).iter().any(|p| p.message.contains("/no/such.pem")));
    assert_eq!(field("sasl: {user: x}"), "log.kafka.sasl.user");
    assert_eq!(field("sasl: {mechanism: plain}"), "log.kafka.sasl.mechanism");
    let whole = with("tls: {on: true}, sasl: {user: ada, password: hush-hush}");
    if cfg!(feature = "kafka-tls") {
        let config = read(&whole);
        assert!(!format!("{config:?}").contains("hush"), "{config:?}");
    } else {
        let fields: Vec<String> = problems(&whole).into_iter().map(|p| p.field).collect();
        assert_eq!(fields, ["log.kafka.tls", "log.kafka.sasl"]);
    }
}

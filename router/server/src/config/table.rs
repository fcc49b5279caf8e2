//! Every key of the configuration: kind, default, meaning. Parser, JSON Schema and reference page all read this table.

use atp_core::placement::SHARDS_MAX;

/// What may stand behind a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// `host:port` with an IP address.
    Address,
    Bool,
    Text,
    /// A file or directory; relative to the working directory.
    Path,
    /// `500ms`, `30s`, `5m`, `2h`, `7d`.
    Duration,
    /// A whole number in this range.
    Whole(u64, u64),
    /// A decimal amount of USD.
    Usd,
    Choice(&'static [&'static str]),
    Texts,
    /// Free text by free names.
    Anything,
    /// A path, or a policy.
    Policy,
}

/// One key. In `path`, `*` is a name that the operator chooses and `[]` an entry of a list.
pub(super) struct Key {
    pub(super) path: &'static str,
    pub(super) takes: Takes,
    /// As it would be written; empty: absent.
    pub(super) default: &'static str,
    pub(super) about: &'static str,
    /// Set: this version can't do it (only the default is taken); says what to do instead.
    pub(super) later: Option<&'static str>,
}

const fn key(path: &'static str, takes: Takes, default: &'static str, about: &'static str) -> Key {
    Key { path, takes, default, about, later: None }
}

const fn later(path: &'static str, takes: Takes, default: &'static str, about: &'static str, fix: &'static str) -> Key {
    Key { path, takes, default, about, later: Some(fix) }
}

const TLS: &str = "leave it out; this version has no TLS, put a TLS proxy in front or stay on loopback";
const TOKENS: &str = "leave it out; this version knows loopback peers only";

const MAX: u64 = u64::MAX;
/// Durations are kept in milliseconds; longer than ten years is a mistake.
pub(super) const DURATION_MS_MAX: u64 = 10 * 366 * 86_400_000;

#[rustfmt::skip]
pub(super) const KEYS: &[Key] = &[
    key("listen.atp", Takes::Address, "127.0.0.1:7443", "where agents and clients connect (native protocol); port 0 takes a free one"),
    key("listen.http", Takes::Address, "127.0.0.1:7080", "where the commands and `/metrics` are served"),
    key("listen.insecure", Takes::Bool, "false", "true: plain sockets off loopback, for everybody on that network to read"),
    later("listen.tls.cert", Takes::Path, "", "certificate chain, PEM", TLS),
    later("listen.tls.key", Takes::Path, "", "private key, PEM", TLS),
    later("listen.tls.client_ca", Takes::Path, "", "who signs client certificates, PEM", TLS),
    key("router.id", Takes::Text, "r1", "this router's name in records and views, 1 to 64 of `A-Za-z0-9._-`"),
    key("router.advertise", Takes::Text, "", "what others are told to dial; empty: the address that is bound"),
    key("data_dir", Takes::Path, "./atp-data", "the local log lies in `log` below it; of a log in Kafka, what this machine remembers"),
    key("log.kind", Takes::Choice(&["local", "kafka"]), "local", "where the log is: below `data_dir`, or in Kafka"),
    key("log.format", Takes::Whole(1, 1), "", "which record kinds may be written; empty: as the log began"),
    key("log.durability", Takes::Choice(&["fsync", "async"]), "fsync", "of the local log; async acknowledges before the disk has it: development only"),
    key("log.kafka.brokers", Takes::Texts, "", "`host:port` of some of them; the others are learned"),
    key("log.kafka.topic", Takes::Text, "atp.frames", "one partition per shard; `atp log init` makes it"),
    key("log.kafka.single_broker", Takes::Bool, "false", "true: one broker is wanted, an entry is durable with it alone"),
    key("log.kafka.tls.on", Takes::Bool, "false", "true: TLS to the brokers (needs a build with `kafka-tls`, as all of `tls` and `sasl`)"),
    key("log.kafka.tls.ca", Takes::Path, "", "who signs the brokers' certificates, PEM; empty: the system's authorities"),
    key("log.kafka.tls.cert", Takes::Path, "", "certificate chain of this client, PEM"),
    key("log.kafka.tls.key", Takes::Path, "", "its private key, PEM"),
    key("log.kafka.sasl.mechanism", Takes::Choice(&["scram-sha-256", "scram-sha-512"]), "scram-sha-512", "how the password is proved"),
    key("log.kafka.sasl.user", Takes::Text, "", "empty: no credentials"),
    key("log.kafka.sasl.password", Takes::Text, "", "better as `${ENV}`"),
    key("store.kind", Takes::Choice(&["memory", "redis"]), "memory", "where others can see what runs; it may be lost at any time"),
    key("store.redis.url", Takes::Text, "", "`redis://[user:password@]host:port[/db]`, `rediss://` for TLS; better as `${ENV}`"),
    key("store.redis.prefix", Takes::Text, "atp", "of every key, 1 to 64 of `A-Za-z0-9._-`; one for each log"),
    key("peers.key", Takes::Text, "", "secret that all routers of one log share, at least 32 bytes; better as `${ENV}`. Needed with `log.kind: kafka` and `store.kind: redis`"),
    key("peers.also", Takes::Text, "", "a second key that is taken too, while `peers.key` is changed one router at a time; at least 32 bytes"),
    key("shards.count", Takes::Whole(1, SHARDS_MAX as u64), "", "of a new log, absent: 64; then it stands in the log and can't be changed"),
    key("shards.lease", Takes::Duration, "5s", "how long a shard's owner is believed to live, where routers share a log in Kafka and a store in Redis"),
    key("auth.anonymous", Takes::Choice(&["never", "loopback"]), "loopback", "who may come without a credential"),
    later("auth.tokens_file", Takes::Path, "", "hashed tokens", TOKENS),
    later("auth.hmac", Takes::Anything, "", "keys of frame signatures by kid", TOKENS),
    later("auth.oidc.issuer", Takes::Text, "", "of JWTs", TOKENS),
    later("auth.oidc.audience", Takes::Text, "", "of JWTs", TOKENS),
    later("auth.oidc.jwks", Takes::Text, "", "where the issuer's keys are", TOKENS),
    later("auth.oidc.tenant_claim", Takes::Text, "", "which claim names the tenant", TOKENS),
    key("windows.stream.max_parallel", Takes::Whole(1, 4096), "8", "calls of one stream at once"),
    key("windows.stream.max_tokens", Takes::Whole(1, MAX), "200000", "tokens that one stream may spend"),
    key("windows.stream.max_usd", Takes::Usd, "5.00", "USD that one stream may spend"),
    key("windows.agent.max_parallel", Takes::Whole(1, 4096), "16", "calls of one agent at once"),
    key("windows.agent.max_tokens", Takes::Whole(1, MAX), "400000", "tokens outstanding at one agent"),
    key("windows.agent.max_usd", Takes::Usd, "10.00", "USD outstanding at one agent"),
    key("accounts.*.usd", Takes::Usd, "", "limit of a window; absent: none (account `default`, absent as a whole: 100.00)"),
    key("accounts.*.tokens", Takes::Whole(0, MAX), "", "limit of a window; absent: none (account `default`, absent as a whole: 50000000)"),
    key("accounts.*.per", Takes::Choice(&["minute", "hour", "day", "month", "total"]), "day", "calendar windows in UTC"),
    key("accounts.*.max_parallel", Takes::Whole(0, 1_000_000), "", "calls in flight at once; absent: no limit"),
    key("accounts.*.weight", Takes::Whole(1, 1000), "1", "its share of an agent's slots within a tier, beside other accounts that wait"),
    key("accounts.*.tools", Takes::Texts, "", "tools that tasks may name; absent: as account `default`, and there agents' own tools and none of the router's"),
    key("accounts.*.on_limit", Takes::Texts, "", "steps at the limit, some of [downgrade, queue, refuse] in this order; absent: no downgrade, wait for money that is held"),
    key("accounts.*.ladder", Takes::Texts, "", "models for `downgrade`, dearest first; a name is a whole id or a part of one (`sonnet`)"),
    key("accounts.*.floor", Takes::Text, "", "no step goes below this model of the ladder"),
    key("accounts.*.pacing.mode", Takes::Choice(&["observe", "warn", "enforce"]), "", "even use of the window: show it, warn above the line, or hold new calls back; absent: none"),
    key("accounts.*.pacing.reset_confidence", Takes::Choice(&["user", "provider", "estimated", "unknown"]), "user", "who says when it resets; unknown: no pacing"),
    key("tasks.deadline", Takes::Duration, "120s", "of a task that names none"),
    key("tasks.agent_timeout", Takes::Duration, "60s", "of one call"),
    key("tasks.retries", Takes::Whole(0, 16), "1", "new lanes for a failed call"),
    key("policy", Takes::Policy, "", "a policy file (see `docs/policy.md`), or the policy itself"),
    key("prices", Takes::Path, "", "LiteLLM's price map or models.dev's JSON, over the built-in snapshot"),
    key("registry", Takes::Path, "", "what agents' runs cost, by agent and model: see `docs/choice.md`"),
    key("tools.fs_read.root", Takes::Path, "", "the directory below which `fs.read` reads; empty: no such tool"),
    key("tools.fs_read.usd", Takes::Usd, "", "price of one request; absent: nothing"),
    key("tools.http_get.allow", Takes::Texts, "", "places that `http.get` may ask: `https://host:port/path/`, or a host alone for all of it over https"),
    key("tools.http_get.usd", Takes::Usd, "", "price of one request; absent: nothing"),
    key("agents[].kind", Takes::Choice(&["openai", "anthropic", "gemini", "ollama", "command", "scripted"]), "", "which adapter"),
    key("agents[].name", Takes::Text, "", "the handle, 1 to 64 of `A-Za-z0-9._-`"),
    key("agents[].model", Takes::Text, "", "the provider's model id"),
    key("agents[].base_url", Takes::Text, "", "of the provider; empty: its own"),
    key("agents[].api_key", Takes::Text, "", "better as `${ENV}`"),
    key("agents[].max_parallel", Takes::Whole(1, 4096), "", "calls at once"),
    key("agents[].task_types", Takes::Texts, "", "what it is chosen for; empty: anything"),
    key("agents[].prices.in_usd_per_mtok", Takes::Usd, "", "of a million prompt tokens, where no price book knows the model"),
    key("agents[].prices.out_usd_per_mtok", Takes::Usd, "", "of a million output tokens"),
    key("agents[].output_tokens_max", Takes::Whole(1, MAX), "", "never asks for more output than this"),
    key("agents[].output_bytes_max", Takes::Whole(1, MAX), "", "of a command's output"),
    key("agents[].cwd", Takes::Path, "", "working directory of a command"),
    key("agents[].argv", Takes::Texts, "", "program and arguments of a command"),
    key("agents[].script", Takes::Path, "", "of a scripted agent"),
    key("agents[].timeout", Takes::Duration, "", "of one call"),
    key("limits.inbox_bytes", Takes::Whole(1_048_576, 1_073_741_824), "67108864", "frames that wait for the shards, and 1 MiB for each at least"),
    key("limits.connections", Takes::Whole(1, 1_000_000), "10000", "native connections at once"),
    key("limits.http_connections", Takes::Whole(1, 100_000), "1024", "HTTP connections at once"),
    key("limits.streams_per_connection", Takes::Whole(1, 65_536), "1024", "open streams of one connection"),
    key("limits.streams_open", Takes::Whole(1, 10_000_000), "100000", "open streams of the router"),
    key("limits.agents", Takes::Whole(1, 65_536), "1024", "agent handles"),
    key("limits.preempt_after", Takes::Duration, "2s", "a gold task that waited this long presses on the tiers below it"),
    key("limits.aimd_base", Takes::Whole(1, 4096), "4", "calls at once of an agent whose results are not known yet"),
    key("limits.aimd_cap", Takes::Whole(1, 4096), "64", "the most calls at once that an agent's results can earn"),
    key("limits.burst", Takes::Whole(1, 100_000), "64", "new dispatches per agent and second"),
    key("limits.latency_target", Takes::Duration, "30s", "a result within this time lets an agent's window grow by one"),
    key("limits.cool_off_percent", Takes::Whole(1, 1_000_000), "25", "a call so far above its guarded estimate cools its agent off"),
    key("limits.gold_passes_pause", Takes::Bool, "false", "true: gold may pass an agent's PAUSE after its retry time, one call at once"),
    key("limits.heartbeat", Takes::Duration, "5s", "offered in the hello; 3 silent ones lose the connection"),
    key("limits.segment_bytes", Takes::Whole(1_048_576, 1_073_741_824), "67108864", "of a file of the log, a multiple of 4096; in Kafka: entries between two checkpoints"),
    later("telemetry.otlp", Takes::Text, "", "where traces go", "leave it out; `/metrics` has the figures"),
    key("telemetry.log", Takes::Choice(&["text", "json"]), "text", "the process's own log lines, on stderr"),
];

/// Splits a path into its parts: `agents[].kind` is `agents`, `[]`, `kind`.
pub(super) fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('.').flat_map(|part| match part.strip_suffix("[]") {
        Some(list) => [Some(list), Some("[]")].into_iter().flatten(),
        None => [Some(part), None].into_iter().flatten(),
    })
}

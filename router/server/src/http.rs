//! The HTTP surface: reads for the commands, `verify`, cancel, metrics and health. Asks the shard, never changes state itself.

use crate::agent_task::Agents;
use crate::awake::Awake;
use crate::config::Config;
use crate::identity;
use crate::listen::Peer;
use crate::log::Source;
use crate::log::offline;
use crate::metric;
use crate::ownership::{self, Handle};
use crate::peer::ask::{self, Ask, Missing, What};
use crate::router::Router as AtpRouter;
use crate::shard_task::Health;
use crate::shards::{Here, Shards};
use crate::store::StoreHealth;
use crate::verify::{self, Live};
use crate::views;
use atp_core::clock::rfc3339;
use atp_core::message::{Answer, LogRoom, Query, StreamAnswer};
use atp_core::view::{AgentView, StreamView};
use atp_proto::id::is_id;
use atp_proto::limits::MESSAGE_BYTES_MAX;
use atp_proto::{AgentName, Amount, Code, StreamId, TenantId, Tokens, UsdMicros, WireError};
use axum::extract::{DefaultBodyLimit, Path, Query as Params, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// Rows of one answer of `GET /v1/streams`.
const PAGE: usize = 500;

/// What the handlers need.
#[derive(Clone)]
pub(crate) struct Site(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) shards: Shards,
    agents: Agents,
    store: watch::Receiver<StoreHealth>,
    pub(crate) config: watch::Receiver<Arc<Config>>,
    prometheus: PrometheusHandle,
    pub(crate) atp: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) incarnation: String,
    /// Where several routers share the log.
    pub(crate) ownership: Option<Handle>,
    awake: Awake,
}

impl Site {
    pub(crate) fn new(router: &AtpRouter, prometheus: PrometheusHandle) -> Self {
        Self(Arc::new(Inner {
            shards: router.shards(),
            agents: router.agents(),
            store: router.store(),
            config: router.config(),
            prometheus,
            atp: router.atp_addr(),
            http: router.http_addr(),
            incarnation: router.incarnation(),
            ownership: router.ownership(),
            awake: router.awake(),
        }))
    }

    pub(crate) fn facts(&self) -> &Inner {
        &self.0
    }

    /// Asks the shard of a stream, wherever it is.
    async fn ask(&self, tenant: &TenantId, stream: &StreamId, what: What) -> Result<Answer, Problem> {
        self.ask_one(self.0.shards.of_stream(tenant, stream), what).await
    }

    async fn ask_one(&self, shard: u32, what: What) -> Result<Answer, Problem> {
        let (mut answers, _) = self.ask_all(Some(shard), what).await?;
        answers.pop().map(|(_, answer)| answer).ok_or_else(mismatch)
    }

    /// Asks one shard or all, wherever they are; and who didn't answer. Somebody did.
    async fn ask_all(&self, shard: Option<u32>, what: What) -> Result<(views::Answers, Missing), Problem> {
        let (answers, missing) = ask::everywhere(&self.0.shards, self.0.agents.peers(), &Ask { shard, what }).await;
        if answers.is_empty() { Err(unanswered(&missing)) } else { Ok((answers, missing)) }
    }

    async fn query_all(&self, query: Query) -> Result<(views::Answers, Missing), Problem> {
        self.ask_all(None, What::Query(query)).await
    }

    async fn stream(&self, tenant: &TenantId, id: &str) -> Result<(StreamId, Box<StreamAnswer>), Problem> {
        let stream = stream_id(id)?;
        let query = Query::Stream { tenant: tenant.clone(), stream: stream.clone() };
        match self.ask(tenant, &stream, What::Query(query)).await? {
            Answer::Stream(Some(answer)) => Ok((stream, answer)),
            _ => Err(not_found(id)),
        }
    }

    /// The shards that this router serves and owns, as far as the log has told it since it last stood still.
    pub(crate) fn owned(&self) -> BTreeSet<u32> {
        let woke = self.0.awake.since();
        let is_owned = |here: &Here| here.health.borrow().is_owned(woke);
        self.0.shards.all_here().into_iter().filter(|(_, here)| is_owned(here)).map(|(shard, _)| shard).collect()
    }

    fn healths(&self) -> Vec<Health> {
        self.0.shards.all_here().iter().map(|(_, here)| here.health.borrow().clone()).collect()
    }

    /// The log of a shard, to read, whoever owns it.
    fn source(&self, shard: u32) -> Result<Source, Problem> {
        match self.0.shards.here(shard) {
            Some(here) => Ok(here.source),
            None => self.0.config.borrow().source().map(|source| source.shard(shard)).map_err(|_| mismatch()),
        }
    }
}

/// All routes.
pub(crate) fn routes(site: Site) -> Router {
    Router::new()
        .route("/v1/streams", get(streams))
        .route("/v1/streams/{id}", get(stream).delete(cancel))
        .route("/v1/streams/{id}/bill", get(bill))
        .route("/v1/fleet", get(fleet))
        .route("/v1/accounts", get(accounts))
        .route("/v1/accounts/{id}", get(account))
        .route("/v1/agents", get(agents))
        .route("/v1/agents/{name}", get(agent))
        .route("/v1/agents/{name}/drain", post(drain_agent).delete(undrain_agent))
        .route("/v1/accounts/{name}/faster", post(go_faster))
        .route("/v1/verify", post(verify_now))
        .merge(ownership::routes())
        .layer(middleware::from_fn_with_state(site.clone(), authorise))
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .fallback(|| async {
            Problem::new(
                WireError::new(Code::Proto, "no such path; see GET /v1/fleet, /v1/streams, /v1/accounts"),
                Some(StatusCode::NOT_FOUND),
            )
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                WireError::new(Code::Proto, "this path doesn't take that method"),
                Some(StatusCode::METHOD_NOT_ALLOWED),
            )
        })
        .layer(DefaultBodyLimit::max(MESSAGE_BYTES_MAX))
        .with_state(site)
}

/// Credential before anything else; a page of another origin may not speak for the person who looks at it.
async fn authorise(
    State(site): State<Site>,
    Extension(peer): Extension<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let headers = request.headers();
    if let Some(origin) = headers.get(header::ORIGIN) {
        let own = headers.get(header::HOST).and_then(|h| h.to_str().ok()).map(|h| format!("http://{h}"));
        if origin.to_str().ok() != own.as_deref() {
            let error = WireError::new(Code::Sec, "origin: pages of other origins can't use this router");
            return Problem::new(error, None).into_response();
        }
    }
    let anonymous = site.0.config.borrow().anonymous;
    match identity::identify(anonymous, peer.0.ip().is_loopback(), token(headers)) {
        Ok(tenant) => {
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        Err(error) => Problem::new(error, None).into_response(),
    }
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
    let bearer = bearer.map(|v| v.strip_prefix("Bearer ").or_else(|| v.strip_prefix("bearer ")).unwrap_or(v));
    bearer.or_else(|| headers.get("x-api-key").and_then(|v| v.to_str().ok()))
}

#[derive(Deserialize)]
struct ListParams {
    state: Option<String>,
    cursor: Option<String>,
}

async fn streams(
    State(site): State<Site>,
    Extension(tenant): Extension<TenantId>,
    Params(params): Params<ListParams>,
) -> Result<Json<Value>, Problem> {
    const STATES: [&str; 8] =
        ["queued", "running", "settling", "done", "provisional", "failed", "cancelled", "refused"];
    if let Some(state) = params.state.as_deref().filter(|s| !STATES.contains(s)) {
        let message = format!("state: `{state}` is none of {}", STATES.join(", "));
        return Err(Problem::new(WireError::proto(message), None));
    }
    let (mut rows, missing) = list(&site, tenant).await?;
    rows.retain(|row| params.state.as_deref().is_none_or(|state| row.state.as_str() == state));
    rows.sort_by(|a, b| (&b.started_at, &b.stream_id).cmp(&(&a.started_at, &a.stream_id)));
    if let Some(cursor) = &params.cursor {
        let Some((started, id)) = cursor.split_once('~') else {
            return Err(Problem::new(
                WireError::proto("cursor: not one that this router gave; leave it out to begin anew"),
                None,
            ));
        };
        rows.retain(|row| (row.started_at.as_str(), row.stream_id.as_str()) < (started, id));
    }
    let more = rows.len() > PAGE;
    rows.truncate(PAGE);
    let cursor = rows.last().filter(|_| more).map(|row| format!("{}~{}", row.started_at, row.stream_id));
    let mut answer = json!({ "streams": rows });
    if let Some(cursor) = cursor {
        answer["cursor"] = cursor.into();
    }
    Ok(Json(with_missing(answer, &missing)))
}

async fn list(site: &Site, tenant: TenantId) -> Result<(Vec<StreamView>, Missing), Problem> {
    let (answers, missing) = site.query_all(Query::Streams { tenant }).await?;
    Ok((views::streams(answers), missing))
}

/// An answer that isn't of all shards says whose are missing.
fn with_missing(mut answer: Value, missing: &Missing) -> Value {
    if !missing.is_empty() {
        let row = |(router, shards): (&String, &Vec<u32>)| json!({ "router": router, "shards": shards });
        answer["missing"] = missing.iter().map(row).collect();
    }
    answer
}

fn unanswered(missing: &Missing) -> Problem {
    let of = |(router, shards): (&String, &Vec<u32>)| match router.as_str() {
        "" => format!("nobody owns shards {shards:?} just now"),
        router => format!("router {router} doesn't answer for shards {shards:?}"),
    };
    let what = missing.iter().map(of).collect::<Vec<_>>().join("; ");
    Problem::new(WireError::new(Code::Draining, format!("{what}; ask again")).retry_after_ms(1_000), None)
}

async fn stream(
    State(site): State<Site>,
    Extension(tenant): Extension<TenantId>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    let (stream, answer) = site.stream(&tenant, &id).await?;
    let mut document = json!({ "stream_id": stream.as_str(), "state": answer.view.state, "bill": answer.bill });
    let result = match answer.result {
        Some(result) => Some(result),
        None if answer.view.state.is_closed() => {
            let source = site.source(site.0.shards.of_stream(&tenant, &stream))?;
            let read =
                tokio::task::spawn_blocking(move || verify::read_final(&source, &tenant, &stream, answer.from)).await;
            read.map_err(|_| mismatch())?.map_err(|e| Problem::new(WireError::new(Code::Log, e), None))?
        }
        None => None,
    };
    if let Some(result) = result {
        document["state"] = json!(result.state);
        document["result"] = json!(result.result);
        document["consensus"] = json!(result.consensus);
        if let Some(error) = result.error {
            document["error"] = json!(error);
        }
    }
    Ok(Json(document))
}

async fn bill(
    State(site): State<Site>,
    Extension(tenant): Extension<TenantId>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let stream = stream_id(&id)?;
    let query = Query::Bill { tenant: tenant.clone(), stream: stream.clone() };
    match site.ask(&tenant, &stream, What::Query(query)).await? {
        Answer::Bill(Some(bill)) => Ok(Json(bill).into_response()),
        _ => Err(not_found(&id)),
    }
}

/// Asks a stream to stop; it ends with final and bill as always.
async fn cancel(
    State(site): State<Site>,
    Extension(tenant): Extension<TenantId>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let (stream, answer) = site.stream(&tenant, &id).await?;
    if !answer.view.state.is_closed() {
        let cancel = What::Cancel { tenant: tenant.clone(), stream: stream.clone() };
        site.ask(&tenant, &stream, cancel).await?;
    }
    Ok(StatusCode::ACCEPTED)
}

async fn agent_rows(site: &Site, what: What) -> Result<(Vec<AgentView>, Missing), Problem> {
    let (answers, missing) = site.ask_all(None, what).await?;
    let mut rows = views::agents(answers, site.0.shards.placement());
    rows.iter_mut().for_each(|row| heartbeat(site, row));
    Ok((rows, missing))
}

fn heartbeat(site: &Site, row: &mut AgentView) {
    row.last_heartbeat_at = site.0.agents.last_heartbeat_ms(&row.name).map(rfc3339);
}

/// Nothing new for this agent, also after a restart, until the DELETE; what it runs goes on.
async fn drain_agent(State(site): State<Site>, Path(name): Path<String>) -> Result<Json<Value>, Problem> {
    drain(&site, &name, true).await
}

async fn undrain_agent(State(site): State<Site>, Path(name): Path<String>) -> Result<Json<Value>, Problem> {
    drain(&site, &name, false).await
}

async fn drain(site: &Site, name: &str, drained: bool) -> Result<Json<Value>, Problem> {
    if !is_id(name) {
        return Err(Problem::new(WireError::proto("agent name: 1 to 64 of A-Za-z0-9._-"), None));
    }
    let agent = AgentName::new(name);
    let (rows, missing) = agent_rows(site, What::DrainAgent { agent, drained }).await?;
    match rows.is_empty() {
        true if missing.is_empty() => Err(not_found(name)),
        // Said to some: those who haven't heard it hear it when it is said again.
        _ if !missing.is_empty() => Err(unanswered(&missing)),
        _ => Ok(Json(json!({ "agents": rows }))),
    }
}

async fn agents(State(site): State<Site>) -> Result<Json<Value>, Problem> {
    let (rows, missing) = agent_rows(&site, What::Query(Query::Agents)).await?;
    Ok(Json(with_missing(json!({ "agents": rows }), &missing)))
}

async fn agent(State(site): State<Site>, Path(name): Path<String>) -> Result<Json<Value>, Problem> {
    let (rows, missing) = agent_rows(&site, What::Query(Query::Agents)).await?;
    match rows.into_iter().find(|row| row.name.as_str() == name) {
        Some(row) => Ok(Json(with_missing(json!({ "agents": [row] }), &missing))),
        None if missing.is_empty() => Err(not_found(&name)),
        None => Err(unanswered(&missing)),
    }
}

/// Leave for a paced account to go faster: how much, for how long, and who answers for it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GoFaster {
    #[serde(default)]
    tokens: Tokens,
    #[serde(default)]
    usd_micros: UsdMicros,
    for_ms: u64,
    by: String,
}

async fn go_faster(
    State(site): State<Site>,
    Path(name): Path<String>,
    Json(word): Json<GoFaster>,
) -> Result<Json<Value>, Problem> {
    let bad = |what: &str| Err(Problem::new(WireError::proto(what), None));
    if !is_id(&name) {
        return bad("account: 1 to 64 of A-Za-z0-9._-");
    }
    if word.by.trim().is_empty() || word.by.len() > 256 {
        return bad("by: who answers for it, 1 to 256 bytes");
    }
    let more = Amount { tokens: word.tokens, usd_micros: word.usd_micros };
    if more.is_zero() || word.for_ms == 0 {
        return bad("tokens, usd_micros, for_ms: how much more, and for how long");
    }
    let home = site.0.shards.placement().home_of(&name);
    let faster = What::Faster { account: TenantId::new(&name), more, for_ms: word.for_ms, by: word.by };
    let Answer::Accounts { position, accounts } = site.ask_one(home, faster).await? else { return Err(mismatch()) };
    if accounts.is_empty() {
        return bad("account: has no pace to go faster than; accounts.*.pacing sets one");
    }
    Ok(Json(json!({ "position": position, "accounts": accounts })))
}

async fn account_rows(site: &Site) -> Result<Value, Problem> {
    let (answers, missing) = site.query_all(Query::Accounts).await?;
    let (position, accounts) = views::accounts(answers, site.0.shards.placement());
    Ok(with_missing(json!({ "position": position, "accounts": accounts }), &missing))
}

async fn accounts(State(site): State<Site>) -> Result<Json<Value>, Problem> {
    account_rows(&site).await.map(Json)
}

async fn account(State(site): State<Site>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let mut all = account_rows(&site).await?;
    let rows = all["accounts"].as_array_mut().ok_or_else(mismatch)?;
    rows.retain(|row| row["account"] == id.as_str());
    if rows.is_empty() { Err(not_found(&id)) } else { Ok(Json(all)) }
}

async fn fleet(State(site): State<Site>, Extension(tenant): Extension<TenantId>) -> Result<Json<Value>, Problem> {
    let (live, missing) = live(&site).await?;
    let hashes: Vec<String> = live.iter().map(|live| live.view.state_hash.clone()).collect();
    let config = site.0.config.borrow().clone();
    let accounts = account_rows(&site).await?["accounts"].take();
    let fleet = json!({
        "router": {
            "id": &*config.settings.router_id,
            "version": env!("CARGO_PKG_VERSION"),
            "atp": config.advertise.clone().unwrap_or_else(|| site.0.atp.to_string()),
            "http": site.0.http.to_string(),
            "position": live.iter().map(|live| live.view.position).sum::<u64>(),
            "state_hash": offline::hash_of_all(&hashes),
        },
        "streams": list(&site, tenant).await?.0,
        "agents": agent_rows(&site, What::Query(Query::Agents)).await?.0,
        "accounts": accounts,
    });
    Ok(Json(with_missing(fleet, &missing)))
}

/// Each shard as it stands, and its log.
async fn live(site: &Site) -> Result<(Vec<Live>, Missing), Problem> {
    let (answers, missing) = site.query_all(Query::Verify).await?;
    let mut live = Vec::new();
    for (shard, answer) in answers {
        let Answer::Verify(view) = answer else { return Err(mismatch()) };
        live.push(Live { shard, source: site.source(shard)?, view });
    }
    Ok((live, missing))
}

/// Folds each shard's log up to the position of its live state, and compares; whoever owns it.
async fn verify_now(State(site): State<Site>) -> Result<Json<verify::Report>, Problem> {
    let (live, missing) = live(&site).await?;
    if !missing.is_empty() {
        return Err(unanswered(&missing));
    }
    let report = tokio::task::spawn_blocking(move || verify::against_live(&live)).await;
    report.map_err(|_| mismatch())?.map(Json).map_err(|e| Problem::new(WireError::new(Code::Log, e), None))
}

async fn metrics(State(site): State<Site>) -> impl IntoResponse {
    let all = site.healths();
    let room = all.iter().map(|h| h.room).max().unwrap_or_default();
    let serving = all.iter().filter(|h| h.serving && h.failed.is_none()).count();
    metric::health(serving, site.0.shards.placement().shards(), room);
    site.0.prometheus.run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], site.0.prometheus.render())
}

async fn readyz(State(site): State<Site>) -> impl IntoResponse {
    let all = site.healths();
    let count = site.0.shards.placement().shards();
    let room = all.iter().map(|h| h.room).max().unwrap_or_default();
    let failed = all.iter().find_map(|h| h.failed.as_ref());
    let fleet = ownership::fleet(&site);
    let owned = site.owned();
    let serving = owned.len();
    // One that others share the log with may own nothing, and serves by them.
    let enough = serving > 0 || site.0.ownership.is_some();
    let ready = fleet.complete && serving == all.len() && enough && failed.is_none() && room == LogRoom::Enough;
    let log = match (failed, room) {
        (Some(why), _) => format!("failed: {why}"),
        (None, LogRoom::Enough) => "ok".into(),
        (None, LogRoom::Low | LogRoom::Last) => "nearly full: free space on the disk of data_dir".into(),
    };
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = json!({
        "ready": ready,
        "router": { "id": &*site.0.config.borrow().settings.router_id, "incarnation": site.0.incarnation },
        "log": log,
        "store": site.0.store.borrow().to_string(),
        "shards": { "count": count, "serving": serving, "owned": owned, "nowhere": fleet.nowhere() },
        "durability": all.first().map(|h| h.guarantee.as_str()),
        "durable": all.iter().map(|h| h.durable).sum::<u64>(),
        "wall_clock_minus_logged_ms": all.iter().max_by_key(|h| h.clock_at).map(|h| h.clock_ms),
    });
    (status, Json(body))
}

fn stream_id(id: &str) -> Result<StreamId, Problem> {
    if is_id(id) {
        Ok(StreamId::new(id))
    } else {
        Err(Problem::new(WireError::proto("stream id: 1 to 64 of A-Za-z0-9._-"), None))
    }
}

pub(crate) fn not_found(what: &str) -> Problem {
    let what: String = what.chars().take(64).collect();
    Problem::new(
        WireError::new(Code::Proto, format!("nothing here is called `{what}`, or it isn't yours")),
        Some(StatusCode::NOT_FOUND),
    )
}

fn mismatch() -> Problem {
    Problem::new(WireError::new(Code::Draining, "this router is stopping"), None)
}

/// A refusal as `application/problem+json`.
pub(crate) struct Problem(Box<WireError>, Option<StatusCode>);

impl Problem {
    pub(crate) fn new(error: WireError, status: Option<StatusCode>) -> Self {
        Self(Box::new(error), status)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Self(error, status) = self;
        let status = status
            .or_else(|| StatusCode::from_u16(error.code.http_status()).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let not_found = status == StatusCode::NOT_FOUND || status == StatusCode::METHOD_NOT_ALLOWED;
        let mut body = json!({
            "type": format!("urn:atp:error:{}", if not_found { "NOT_FOUND" } else { error.code.as_str() }),
            "title": status.canonical_reason().unwrap_or("error"),
            "status": status.as_u16(),
            "code": if not_found { "NOT_FOUND" } else { error.code.as_str() },
            "judged": error.judged,
            "detail": error.message,
        });
        let facts = [
            ("scope", json!(error.scope)),
            ("limit", json!(error.limit)),
            ("used", json!(error.used)),
            ("retry_after_ms", json!(error.retry_after_ms)),
            ("reset_at", json!(error.reset_at)),
        ];
        for (name, fact) in facts {
            if !fact.is_null() {
                body[name] = fact;
            }
        }
        let mut response = (status, Json(body)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(ms) = error.retry_after_ms {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000)));
        }
        response
    }
}

//! Who tries to own the shard, where several routers share one log: the one with the lease, which it keeps while it lives. The
//! others send who comes to it, and take over when its lease is gone and it doesn't answer. A lease spares contention and proves
//! nothing: the log alone decides, so an owner that can't renew goes on.

use crate::config::{Config, LogPlace};
use crate::connection;
use crate::http::{self, Problem};
use crate::listen;
use crate::log::offline::Follower;
use crate::log::{LogError, Source};
use crate::metric;
use crate::outbox::connection_error;
use crate::router::{StartError, address, bind};
use crate::store::{RedisConfig, RedisStore, StateStore, StoreConfig};
use atp_core::message::LogRoom;
use atp_proto::content::Redirect;
use atp_proto::frame::kind;
use atp_proto::{Code, Flags, Frame, WireError};
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A lease is renewed, or asked for, so often within its time.
const TIMES: u32 = 3;
/// How long giving it back may take; it lapses anyway.
const RELEASE: Duration = Duration::from_secs(1);
/// How long a router that serves may take to say so.
const ANSWER: Duration = Duration::from_secs(1);
/// Between two looks at the log of another owner.
const FOLLOW: Duration = Duration::from_millis(500);
const RETRY_AFTER_MS: u64 = 1_000;
const SHARD: u32 = 0;

/// A router as others find it. As text it is the lease's holder.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    router: String,
    incarnation: String,
    atp: String,
    http: String,
}

impl Place {
    fn text(&self) -> String {
        [&*self.router, &*self.incarnation, &*self.atp, &*self.http].join(" ")
    }

    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split(' ').map(str::to_owned);
        let place = Self { router: parts.next()?, incarnation: parts.next()?, atp: parts.next()?, http: parts.next()? };
        parts.next().is_none().then_some(place)
    }
}

/// What a router that waits knows of the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owner {
    Unknown,
    /// The store can't be asked, and why.
    Away(String),
    At(Arc<Place>),
}

/// The lease, as long as it is renewed.
pub(crate) struct Lease {
    store: RedisStore,
    holder: String,
    ttl: Duration,
}

/// Waits for the lease where the configuration asks for one; `None`: nobody else can own this log. Listens meanwhile, gives the
/// addresses that it listened on to the configuration, and follows the log of the owner.
///
/// # Errors
/// An address that is in use; a store that can't be.
pub(crate) async fn wait(config: &mut Config, incarnation: &str) -> Result<Option<(Lease, Vec<Follower>)>, StartError> {
    let (LogPlace::Kafka(kafka), StoreConfig::Redis(redis)) = (&config.log, &config.store) else { return Ok(None) };
    let (redis, source) = (redis.clone(), Source::kafka(kafka.address.clone(), SHARD));
    let source = source.map_err(StartError::Store)?;
    // Held only here: who serves binds them anew.
    let atp = bind("atp", config.listen.atp).await?;
    let http = bind("http", config.listen.http).await?;
    (config.listen.atp, config.listen.http) = (address(&atp, config.listen.atp), address(&http, config.listen.http));
    // HTTP is dialled at the same host.
    let host = config.advertise.as_ref().and_then(|place| Some(place.rsplit_once(':')?.0.to_owned()));
    let place = Place {
        router: config.settings.router_id.to_string(),
        incarnation: incarnation.into(),
        atp: config.advertise.clone().unwrap_or_else(|| config.listen.atp.to_string()),
        http: host
            .map_or_else(|| config.listen.http.to_string(), |host| format!("{host}:{}", config.listen.http.port())),
    };
    let mut lease = Lease::new(&redis, &place, Duration::from_millis(config.limits.lease_ms))?;
    let (told, owner) = watch::channel(Owner::Unknown);
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let mut following: Option<JoinHandle<Vec<Follower>>> = None;
    tasks.spawn(send_on(atp, owner.clone(), stop.clone()));
    tasks.spawn(listen::http(http, routes(owner), stop.clone(), config.limits.http_connections));
    let guard = stop.clone().drop_guard();
    let mut tick = interval(lease.ttl / TIMES);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (begun, mut last) = (Instant::now(), None::<Arc<Place>>);
    loop {
        tick.tick().await;
        let found = match lease.ask().await {
            Ok(None) => match &last {
                // The lease was lost, its holder wasn't.
                Some(place) if answers(place).await => {
                    lease.give_back().await;
                    Owner::At(place.clone())
                }
                // So may be one that isn't known here yet: it has the time of a lease to take it again.
                None if begun.elapsed() < lease.ttl => {
                    lease.give_back().await;
                    Owner::Unknown
                }
                _ => break,
            },
            Ok(Some(holder)) => {
                last = Place::read(&holder).map(Arc::new);
                last.clone().map_or(Owner::Unknown, Owner::At)
            }
            Err(why) => Owner::Away(why),
        };
        if last.is_some() && following.is_none() {
            following = Some(tokio::spawn(follow(source.clone(), stop.clone())));
        }
        told.send_if_modified(|owner| {
            let news = *owner != found;
            match &found {
                Owner::At(place) if news => {
                    tracing::info!(owner = place.router, at = place.atp, "standby: waits for the lease")
                }
                Owner::Away(why) if news => {
                    tracing::warn!(why, "standby: nobody begins to own a shard while the store is away");
                }
                _ => {}
            }
            *owner = found;
            news
        });
    }
    tracing::info!("the lease is this router's; taking the shard");
    drop(guard);
    tasks.close();
    let ends = async {
        tasks.wait().await;
        match following {
            Some(following) => following.await.unwrap_or_default(),
            None => Vec::new(),
        }
    };
    tokio::pin!(ends);
    let followers = loop {
        tokio::select! {
            followers = &mut ends => break followers,
            // Kept meanwhile: who still reads may need longer than it lives.
            _ = tick.tick() => drop(lease.ask().await),
        }
    };
    Ok(Some((lease, followers)))
}

/// Keeps the states of all shards up with the log until `stop`; one without is read whole at a takeover.
async fn follow(source: Source, stop: CancellationToken) -> Vec<Follower> {
    let (mut followers, mut failed) = (Vec::new(), false);
    loop {
        let (source, stopped, mut all) = (source.clone(), stop.clone(), std::mem::take(&mut followers));
        let read = move || -> Result<Vec<Follower>, LogError> {
            let shards = if all.is_empty() { source.shards()? } else { 0 };
            for shard in (0..shards).take_while(|_| !stopped.is_cancelled()) {
                all.push(Follower::read(source.shard(shard))?);
            }
            for follower in all.iter_mut().take_while(|_| !stopped.is_cancelled()) {
                follower.catch_up()?;
            }
            Ok(all)
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(Ok(read)) => {
                let position: u64 = read.iter().map(Follower::position).sum();
                metrics::gauge!("atp_standby_position").set(position as f64);
                (followers, failed) = (read, false);
            }
            Ok(Err(error)) if !failed => {
                tracing::warn!(%error, "standby: can't follow the log; trying again");
                failed = true;
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW) => {}
            () = stop.cancelled() => return followers,
        }
    }
}

impl Lease {
    fn new(redis: &RedisConfig, place: &Place, ttl: Duration) -> Result<Self, StartError> {
        let store = RedisStore::new(redis).map_err(|e| StartError::Store(format!("store.redis.url: {e}")))?;
        Ok(Self { store, holder: place.text(), ttl })
    }

    /// Takes or keeps it; another holder, or why the store doesn't answer.
    async fn ask(&mut self) -> Result<Option<String>, String> {
        match timeout(self.ttl / TIMES, self.store.lease(SHARD, &self.holder, self.ttl)).await {
            Ok(answer) => answer.map_err(|e| e.to_string()),
            Err(_) => Err("no answer".into()),
        }
    }

    /// Renews it until `stop`, then gives it back.
    pub(crate) async fn keep(mut self, stop: CancellationToken) {
        let mut tick = interval(self.ttl / TIMES);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut held = true;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = stop.cancelled() => break,
            }
            let answer = self.ask().await;
            let holds = answer == Ok(None);
            if holds != held {
                match answer {
                    Ok(None) => tracing::info!("the lease is renewed again"),
                    Ok(Some(holder)) => {
                        tracing::warn!(holder, "another router has the lease; the log decides who owns the shard")
                    }
                    Err(why) => tracing::warn!(why, "the lease can't be renewed; the router goes on, the log decides"),
                }
            }
            held = holds;
        }
        self.give_back().await;
    }

    async fn give_back(&mut self) {
        let _ = timeout(RELEASE, self.store.release(SHARD, &self.holder)).await;
    }
}

/// Whether this router serves.
async fn answers(place: &Place) -> bool {
    let ask = async {
        let mut io = TcpStream::connect(&place.http).await?;
        io.write_all(format!("GET /readyz HTTP/1.0\r\nhost: {}\r\n\r\n", place.http).as_bytes()).await?;
        let mut status = [0; 12];
        io.read_exact(&mut status).await?;
        std::io::Result::Ok(status.ends_with(b" 200"))
    };
    matches!(timeout(ANSWER, ask).await, Ok(Ok(true)))
}

/// Answers native connections with where the owner is.
async fn send_on(listener: TcpListener, owner: watch::Receiver<Owner>, stop: CancellationToken) {
    while let Some((stream, _)) = listen::accept(&listener, &stop).await {
        let frame = match &*owner.borrow() {
            Owner::At(place) => {
                let redirect = Redirect { url: format!("atp://{}", place.atp), shard: SHARD };
                Frame::json("", 0, Flags::NONE, kind::REDIRECT, &redirect)
            }
            Owner::Unknown | Owner::Away(_) => connection_error(
                WireError::new(Code::Draining, "this router waits for a shard, and knows no owner of it")
                    .retry_after_ms(RETRY_AFTER_MS),
            ),
        };
        tokio::spawn(connection::say_last(stream, frame));
    }
}

fn routes(owner: watch::Receiver<Owner>) -> axum::Router {
    axum::Router::new()
        .route("/livez", get(|| async { Json(json!({ "live": true })) }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(elsewhere)
        .with_state(owner)
}

async fn readyz(State(owner): State<watch::Receiver<Owner>>) -> Response {
    let body = match &*owner.borrow() {
        Owner::At(place) => {
            json!({ "ready": false, "standby_of": { "router": place.router, "atp": place.atp, "http": place.http } })
        }
        Owner::Unknown => json!({ "ready": false, "standby_of": null }),
        Owner::Away(why) => json!({ "ready": false, "standby_of": null, "store": format!("away: {why}") }),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// Its own: those of the owner stand at the owner.
async fn metrics() -> impl IntoResponse {
    metric::health(0, 0, LogRoom::Enough);
    http::page(&metric::install())
}

async fn elsewhere(State(owner): State<watch::Receiver<Owner>>, uri: Uri) -> Response {
    let Owner::At(place) = &*owner.borrow() else {
        let error = WireError::new(Code::Draining, "this router waits for a shard, and knows no owner of it");
        return Problem::new(error.retry_after_ms(RETRY_AFTER_MS), None).into_response();
    };
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, format!("http://{}{path}", place.http))]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn a_holder_reads_back() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port)).to_string();
        let place = Place { router: "r1".into(), incarnation: "i".into(), atp: at(1), http: at(2) };
        assert_eq!(Place::read(&place.text()), Some(place));
        assert_eq!(Place::read("r1 i 127.0.0.1:1"), None);
        assert_eq!(Place::read("r1 i 127.0.0.1:1 127.0.0.1:2 more"), None);
    }
}

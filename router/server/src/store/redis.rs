//! Redis 6.2 or newer as a state store. One connection, made anew after any error; a batch is one script, so it is written
//! whole or not at all and a late or repeated one changes nothing that is newer.

use super::keys::{Keys, member};
use super::lease::GIVEN_BACK;
use super::row::{self, Row};
use super::{
    Batch, Beat, Fields, Found, Lease, READ_MAX, Seen, Snapshot, StateStore, StoreError, Turn, Watermark, admit,
};
use ::redis::aio::MultiplexedConnection;
use ::redis::{AsyncConnectionConfig, Client, ErrorKind, IntoConnectionInfo, RedisError, Script, ServerErrorKind};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// A connection or an answer that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// KEYS: the shard, its lists of streams and of agents, then each row. ARGV: log, position, time (ms), the longest time to live
/// (ms), then each row (the shard's own first) as: its list (0: none), its name there, its time to live, how many values follow,
/// fields and values. Gives the log, position and owner that stood there; unless they forbid it everything is written.
const WRITE: &str = r"
local before = redis.call('HMGET', KEYS[1], 'log', 'position', 'owner')
local was = {before[1] or '', before[2] or '', before[3] or ''}
if before[1] and (before[1] ~= ARGV[1] or tonumber(before[2]) > tonumber(ARGV[2])) then
    return was
end
local at, keys = 5, {KEYS[1]}
for i = 4, #KEYS do keys[#keys + 1] = KEYS[i] end
for _, key in ipairs(keys) do
    local list, values = tonumber(ARGV[at]), tonumber(ARGV[at + 3])
    redis.call('HSET', key, unpack(ARGV, at + 4, at + 3 + values))
    if list > 0 then
        redis.call('PEXPIRE', key, ARGV[at + 2])
        redis.call('ZADD', KEYS[1 + list], ARGV[3], ARGV[at + 1])
    end
    at = at + 4 + values
end
local gone = '(' .. string.format('%.0f', tonumber(ARGV[3]) - tonumber(ARGV[4]))
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', gone)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', gone)
return was
";
/// KEYS: a lease, or a router's word that it lives. ARGV: holder, time to live (ms). Takes or keeps it unless it is another's;
/// gives the holder.
const LEASE: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= '' and holder ~= ARGV[1] then return holder end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
";
/// KEYS: the same. ARGV: holder, heir, time to live (ms). No time: it is nobody's.
const RELEASE: &str = r"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
if ARGV[3] == '0' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return false
";
const STREAMS: u32 = 1;
const AGENTS: u32 = 2;

/// Where Redis is.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisConfig {
    url: String,
    /// Of every key.
    pub prefix: String,
}

/// The URL may hold a password: it is never shown.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl RedisConfig {
    /// `redis://[user:password@]host:port[/db]`, or `rediss://` for TLS.
    ///
    /// # Errors
    /// What is wrong with the URL, without its text.
    pub fn new(url: &str, prefix: &str) -> Result<Self, String> {
        url.into_connection_info().map_err(|e| shown(&e))?;
        Ok(Self { url: url.into(), prefix: prefix.into() })
    }
}

/// See the module.
pub struct RedisStore {
    client: Client,
    connection: Option<MultiplexedConnection>,
    keys: Keys,
    write: Script,
    lease: Script,
    release: Script,
}

/// What a person may read of an error: the library's own words name hosts and reasons, never credentials.
fn shown(error: &RedisError) -> String {
    let text = match error.kind() {
        ErrorKind::AuthenticationFailed => "it refuses the user or password of store.redis.url".into(),
        ErrorKind::Server(ServerErrorKind::NoPerm) => {
            format!("its user may not do this: {}", error.detail().unwrap_or_default())
        }
        _ if error.is_timeout() => format!("no answer within {} s", PATIENCE.as_secs()),
        _ => error.to_string(),
    };
    text.chars().take(200).collect()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn away(error: &RedisError) -> StoreError {
    StoreError::Away(shown(error))
}

fn unread(error: &::redis::ParsingError) -> StoreError {
    StoreError::Away(format!("an answer that can't be read: {error}"))
}

fn watermark(log: Option<String>, position: Option<String>, router: Option<String>) -> Option<Watermark> {
    let log = log.filter(|l| !l.is_empty())?;
    let position = position.and_then(|p| p.parse().ok()).unwrap_or(0);
    Some(Watermark { log, position, router: router.unwrap_or_default() })
}

impl RedisStore {
    /// Connects at the first use.
    ///
    /// # Errors
    /// The URL can't be used.
    pub fn new(config: &RedisConfig) -> Result<Self, StoreError> {
        let client = Client::open(config.url.as_str()).map_err(|e| away(&e))?;
        let [write, lease, release] = [WRITE, LEASE, RELEASE].map(Script::new);
        Ok(Self { client, connection: None, keys: Keys::new(&config.prefix), write, lease, release })
    }

    /// Takes the connection: one that isn't put back after success is dropped.
    async fn connect(&mut self) -> Result<MultiplexedConnection, StoreError> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(PATIENCE)).set_response_timeout(Some(PATIENCE));
        self.client.get_multiplexed_async_connection_with_config(&config).await.map_err(|e| away(&e))
    }

    async fn rows(
        &mut self,
        connection: &mut MultiplexedConnection,
        keys: impl IntoIterator<Item = String>,
    ) -> Result<Vec<Fields>, StoreError> {
        let mut pipe = ::redis::pipe();
        keys.into_iter().for_each(|key| {
            pipe.hgetall(key);
        });
        if pipe.is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<BTreeMap<String, String>> = pipe.query_async(connection).await.map_err(|e| away(&e))?;
        Ok(rows.into_iter().filter(|row| !row.is_empty()).collect())
    }

    async fn let_go(&mut self, keys: Vec<String>, holder: &str, to: &str, ttl: Duration) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        let mut pipe = ::redis::pipe();
        pipe.load_script(&self.release).ignore();
        for key in keys {
            let mut call = self.release.key(key);
            pipe.invoke_script(call.arg(holder).arg(to).arg(millis(ttl))).ignore();
        }
        let () = pipe.query_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        Ok(())
    }

    async fn members(connection: &mut MultiplexedConnection, list: String) -> Result<Vec<String>, StoreError> {
        // The newest first, sorted by name.
        let last = isize::try_from(READ_MAX).expect("a small number") - 1;
        let names: BTreeSet<String> =
            ::redis::cmd("ZREVRANGE").arg(list).arg(0).arg(last).query_async(connection).await.map_err(|e| away(&e))?;
        Ok(names.into_iter().collect())
    }
}

impl StateStore for RedisStore {
    async fn write(&mut self, batch: &Batch) -> Result<Option<u64>, StoreError> {
        let mut connection = self.connect().await?;
        let (keys, shard) = (&self.keys, batch.shard);
        let mut call = self.write.prepare_invoke();
        call.key(keys.shard(shard)).key(keys.streams(shard)).key(keys.agents(shard));
        call.arg(&batch.log).arg(batch.position).arg(batch.at_ms).arg(millis(batch.ttl));
        let mut put = |list: u32, name: &str, ttl: Duration, row: Row| {
            call.arg(list).arg(name).arg(millis(ttl)).arg(2 * row.len());
            for (field, value) in row {
                call.arg(field).arg(value);
            }
        };
        put(0, "", batch.ttl, row::shard(batch));
        for one in &batch.streams {
            put(STREAMS, &member(one), batch.ttl_of(one), row::stream(batch, one));
        }
        for one in &batch.agents {
            put(AGENTS, one.name.as_str(), batch.ttl, row::agent(batch, one));
        }
        for one in &batch.streams {
            call.key(keys.stream(shard, &member(one)));
        }
        for one in &batch.agents {
            call.key(keys.agent(shard, one.name.as_str()));
        }
        let (log, position, router) = call.invoke_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        admit(batch, watermark(Some(log), Some(position), Some(router)).as_ref())
    }

    async fn beat(&mut self, beat: &Beat) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        let (keys, id) = (&self.keys, &*beat.router);
        let key = keys.router(id);
        let ttl = millis(beat.ttl);
        let gone = format!("({}", beat.at_ms.saturating_sub(ttl));
        let mut pipe = ::redis::pipe();
        pipe.atomic();
        pipe.cmd("HSET").arg(&key).arg(row::router(beat)).ignore();
        pipe.cmd("PEXPIRE").arg(&key).arg(ttl).ignore();
        pipe.cmd("ZADD").arg(keys.routers()).arg(beat.at_ms).arg(id).ignore();
        pipe.cmd("ZREMRANGEBYSCORE").arg(keys.routers()).arg("-inf").arg(gone).ignore();
        for shard in &beat.shards {
            pipe.cmd("ZADD").arg(keys.shards()).arg(beat.at_ms).arg(*shard).ignore();
        }
        let () = pipe.query_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        Ok(())
    }

    async fn watermark(&mut self, shard: u32) -> Result<Option<Watermark>, StoreError> {
        let mut connection = self.connect().await?;
        let mut read = ::redis::cmd("HMGET");
        read.arg(self.keys.shard(shard)).arg("log").arg("position").arg("owner");
        let (log, position, router) = read.query_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        Ok(watermark(log, position, router))
    }

    async fn turn(&mut self, turn: &Turn<'_>) -> Result<Found, StoreError> {
        let mut connection = self.connect().await?;
        let (keys, ttl) = (&self.keys, millis(turn.ttl));
        // Who lives must be known before anything is taken: another run of this router may.
        let mut alive = self.lease.key(keys.alive(turn.router));
        alive.arg(turn.holder).arg(ttl);
        let mut pipe = ::redis::pipe();
        pipe.load_script(&self.lease).ignore().invoke_script(&alive);
        pipe.cmd("ZADD").arg(keys.routers()).arg(turn.at_ms).arg(turn.router).ignore();
        pipe.cmd("ZRANGE").arg(keys.routers()).arg(0).arg(-1).hgetall(keys.drained());
        let (holder, names, drained): (String, Vec<String>, BTreeMap<String, String>) =
            pipe.query_async(&mut connection).await.map_err(|e| away(&e))?;
        let is_mine = holder == turn.holder;

        let mut pipe = ::redis::pipe();
        pipe.cmd("MGET").arg(names.iter().map(|name| keys.alive(name)).collect::<Vec<_>>());
        for shard in 0..turn.shards {
            if is_mine && turn.wanted.contains(&shard) {
                let mut lease = self.lease.key(keys.lease(shard));
                pipe.invoke_script(lease.arg(turn.holder).arg(ttl));
            } else {
                pipe.get(keys.lease(shard));
            }
            pipe.cmd("HMGET").arg(keys.shard(shard)).arg(&["log", "position", "owner", "epoch", "since"]);
            if let Some(position) = turn.followed.get(&shard).filter(|_| is_mine) {
                let key = keys.standby(shard);
                pipe.cmd("HSET").arg(&key).arg("router").arg(turn.router).arg("position").arg(*position).ignore();
                pipe.cmd("PEXPIRE").arg(&key).arg(ttl).ignore();
            }
            pipe.cmd("HMGET").arg(keys.standby(shard)).arg(&["router", "position"]);
        }
        let mut answers: Vec<Vec<Option<String>>> = Vec::new();
        let values: Vec<::redis::Value> = pipe.query_async(&mut connection).await.map_err(|e| away(&e))?;
        for value in values {
            // A single value is a list of one.
            answers.push(match value {
                list @ ::redis::Value::Array(_) => ::redis::from_redis_value(list).map_err(|e| unread(&e))?,
                one => vec![::redis::from_redis_value(one).map_err(|e| unread(&e))?],
            });
        }
        self.connection = Some(connection);
        let mut answers = answers.into_iter();
        let alive = names.into_iter().zip(answers.next().unwrap_or_default());
        let alive = alive.filter_map(|(name, holder)| Some((name, holder?))).collect();
        let shards = (0..turn.shards).map(|_| {
            let mut next = || answers.next().unwrap_or_default().into_iter();
            let (lease, mut row, mut standby) = (next().next().flatten(), next(), next());
            let mut field = || row.next().flatten();
            Seen {
                lease: match lease {
                    None => Lease::Lapsed,
                    Some(holder) if holder.is_empty() => Lease::Free,
                    Some(holder) => Lease::Of(holder),
                },
                watermark: watermark(field(), field(), field()),
                epoch: field().and_then(|epoch| epoch.parse().ok()).unwrap_or(0),
                since: field().unwrap_or_default(),
                standby: standby.next().flatten().zip(standby.next().flatten().and_then(|p| p.parse().ok())),
            }
        });
        Ok(Found { alive, drained, shards: shards.collect() })
    }

    async fn release(
        &mut self,
        shards: &[u32],
        holder: &str,
        heir: Option<(&str, Duration)>,
    ) -> Result<(), StoreError> {
        let (heir, ttl) = heir.unwrap_or(("", GIVEN_BACK));
        let keys: Vec<String> = shards.iter().map(|shard| self.keys.lease(*shard)).collect();
        self.let_go(keys, holder, heir, ttl).await
    }

    async fn leave(&mut self, router: &str, holder: &str) -> Result<(), StoreError> {
        let key = self.keys.alive(router);
        self.let_go(vec![key], holder, "", Duration::ZERO).await
    }

    async fn drain(&mut self, router: &str, run: Option<&str>) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        let mut command = ::redis::cmd(if run.is_some() { "HSET" } else { "HDEL" });
        command.arg(self.keys.drained()).arg(router).arg(run);
        let _: u32 = command.query_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        Ok(())
    }

    async fn read(&mut self) -> Result<Snapshot, StoreError> {
        let mut connection = self.connect().await?;
        let link = &mut connection;
        let routers = Self::members(link, self.keys.routers()).await?;
        let keys: Vec<String> = routers.iter().map(|id| self.keys.router(id)).collect();
        let mut snapshot = Snapshot { routers: self.rows(link, keys).await?, ..Snapshot::default() };
        let mut shards: Vec<u32> =
            Self::members(link, self.keys.shards()).await?.iter().filter_map(|s| s.parse().ok()).collect();
        shards.sort_unstable();
        for shard in shards {
            let keys = vec![self.keys.shard(shard)];
            snapshot.shards.extend(self.rows(link, keys).await?);
            let names = Self::members(link, self.keys.streams(shard)).await?;
            let keys: Vec<String> = names.iter().map(|name| self.keys.stream(shard, name)).collect();
            snapshot.streams.extend(self.rows(link, keys).await?);
            let names = Self::members(link, self.keys.agents(shard)).await?;
            let keys: Vec<String> = names.iter().map(|name| self.keys.agent(shard, name)).collect();
            snapshot.agents.extend(self.rows(link, keys).await?);
        }
        self.connection = Some(connection);
        Ok(snapshot)
    }
}

//! Redis 6.2 or newer as a state store. One connection, made anew after any error; a batch is one script, so it is written
//! whole or not at all and a late or repeated one changes nothing that is newer.

use super::keys::{Keys, member};
use super::row::{self, Row};
use super::{Batch, Beat, Fields, READ_MAX, Snapshot, StateStore, StoreError, Watermark, admit};
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
/// KEYS: the lease. ARGV: holder, time to live (ms). Gives another holder, or nothing when it is taken or kept.
const LEASE: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return holder end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return false
";
/// KEYS: the lease. ARGV: holder.
const RELEASE: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
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

    async fn lease(&mut self, shard: u32, holder: &str, ttl: Duration) -> Result<Option<String>, StoreError> {
        let mut connection = self.connect().await?;
        let mut call = self.lease.key(self.keys.lease(shard));
        call.arg(holder).arg(millis(ttl));
        let other = call.invoke_async(&mut connection).await.map_err(|e| away(&e))?;
        self.connection = Some(connection);
        Ok(other)
    }

    async fn release(&mut self, shard: u32, holder: &str) -> Result<(), StoreError> {
        let mut connection = self.connect().await?;
        let mut call = self.release.key(self.keys.lease(shard));
        let _: Option<String> = call.arg(holder).invoke_async(&mut connection).await.map_err(|e| away(&e))?;
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

//! Every key of the Redis store. All keys of one shard share a hash tag, so that one script may touch them in a cluster too.

use atp_core::projection::StreamRow;

/// ```text
/// {PREFIX}:routers                  sorted set   router id -> last seen (Unix ms)
/// {PREFIX}:router:ID                hash         a router's entry; expires 15 s after its last sign of life
/// {PREFIX}:alive:ID                 string       the router's word that it lives, how it is reached; expires with a lease
/// {PREFIX}:drained                  hash         router id -> the run of it that is to own nothing
/// {PREFIX}:shards                   sorted set   shard -> last seen
/// {PREFIX:SHARD}:shard              hash         log, watermark, owner of a shard; never expires
/// {PREFIX:SHARD}:lease              string       who tries to own the shard, empty if it was given back; expires
/// {PREFIX:SHARD}:standby            hash         who follows the shard's log, and up to where; expires
/// {PREFIX:SHARD}:streams            sorted set   TENANT:STREAM -> last written
/// {PREFIX:SHARD}:stream:TENANT:ID   hash         a stream; expires 5 min after it was last written, 1 min after its end
/// {PREFIX:SHARD}:agents             sorted set   agent handle -> last written
/// {PREFIX:SHARD}:agent:NAME         hash         an agent as the shard knows it; expires likewise
/// ```
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub(super) fn routers(&self) -> String {
        format!("{{{}}}:routers", self.prefix)
    }
    pub(super) fn router(&self, id: &str) -> String {
        format!("{{{}}}:router:{id}", self.prefix)
    }
    pub(super) fn alive(&self, id: &str) -> String {
        format!("{{{}}}:alive:{id}", self.prefix)
    }
    pub(super) fn drained(&self) -> String {
        format!("{{{}}}:drained", self.prefix)
    }
    pub(super) fn shards(&self) -> String {
        format!("{{{}}}:shards", self.prefix)
    }
    pub(super) fn shard(&self, shard: u32) -> String {
        format!("{{{}:{shard}}}:shard", self.prefix)
    }
    pub(super) fn lease(&self, shard: u32) -> String {
        format!("{{{}:{shard}}}:lease", self.prefix)
    }
    pub(super) fn standby(&self, shard: u32) -> String {
        format!("{{{}:{shard}}}:standby", self.prefix)
    }
    pub(super) fn streams(&self, shard: u32) -> String {
        format!("{{{}:{shard}}}:streams", self.prefix)
    }
    pub(super) fn stream(&self, shard: u32, member: &str) -> String {
        format!("{{{}:{shard}}}:stream:{member}", self.prefix)
    }
    pub(super) fn agents(&self, shard: u32) -> String {
        format!("{{{}:{shard}}}:agents", self.prefix)
    }
    pub(super) fn agent(&self, shard: u32, name: &str) -> String {
        format!("{{{}:{shard}}}:agent:{name}", self.prefix)
    }
}

/// A stream's name in its shard's list. Neither part has a colon.
pub(super) fn member(row: &StreamRow) -> String {
    format!("{}:{}", row.tenant, row.stream)
}

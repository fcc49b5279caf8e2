//! What the scripted provider charges: the true bill, a flushed line per charge, and what it billed per upstream key. It
//! stands for the provider, so it survives the agent: a new process reads the file again.

use crate::config::ConfigError;
use atp_proto::Cost;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One line of the bill.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// Unix time.
    pub at_ms: u64,
    pub call_id: String,
    pub upstream_key: String,
    pub in_tokens: u64,
    pub out_tokens: u64,
    pub usd_micros: u64,
}

#[derive(Debug)]
pub(crate) struct Charges {
    file: Option<File>,
    /// Keys that are remembered, if the provider dedupes at all.
    remember: Option<Duration>,
    keys: Mutex<HashMap<String, Billed>>,
}

#[derive(Clone, Copy, Debug)]
struct Billed {
    total: Cost,
    first_ms: u64,
}

impl Charges {
    /// Opens the bill for appending; with `remember` what stands there already counts as billed.
    pub(crate) fn open(path: Option<&Path>, remember: Duration) -> Result<Self, ConfigError> {
        let remember = (!remember.is_zero()).then_some(remember);
        let mut keys = HashMap::new();
        let Some(path) = path else { return Ok(Self { file: None, remember, keys: Mutex::new(keys) }) };
        let bad = |message: String| ConfigError::new("meter", message, "name a file that can be written");
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(|e| bad(format!("`{}` can't be opened: {e}", path.display())))?;
        if remember.is_some() {
            let read = File::open(path).map_err(|e| bad(format!("`{}` can't be read: {e}", path.display())))?;
            for (n, line) in BufReader::new(read).lines().enumerate() {
                let line = line.map_err(|e| bad(format!("line {}: {e}", n + 1)))?;
                let charge: Charge =
                    serde_json::from_str(&line).map_err(|e| bad(format!("line {} is no charge: {e}", n + 1)))?;
                let key = keys.entry(charge.upstream_key.clone());
                let billed = key.or_insert(Billed { total: Cost::default(), first_ms: charge.at_ms });
                billed.total = sum(billed.total, &charge);
            }
        }
        Ok(Self { file: Some(file), remember, keys: Mutex::new(keys) })
    }

    /// What was billed for this key already, if the provider still knows it; from now on it does.
    pub(crate) fn begin(&self, upstream_key: &str) -> Option<Cost> {
        let remember = self.remember?;
        let now_ms = now_ms();
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = Billed { total: Cost::default(), first_ms: now_ms };
        let billed = keys.entry(upstream_key.to_owned()).or_insert(fresh);
        if u128::from(now_ms.saturating_sub(billed.first_ms)) > remember.as_millis() {
            *billed = fresh;
        }
        Some(billed.total)
    }

    /// Bills what the call's running total grew by, beyond what was billed for the key before.
    pub(crate) fn charge(&self, call_id: &str, upstream_key: &str, before: Cost, after: Cost) {
        let mut charge = Charge {
            at_ms: now_ms(),
            call_id: call_id.to_owned(),
            upstream_key: upstream_key.to_owned(),
            in_tokens: after.in_tokens.less(before.in_tokens).0,
            out_tokens: after.out_tokens.less(before.out_tokens).0,
            usd_micros: after.usd_micros.less(before.usd_micros).0,
        };
        if self.remember.is_some() {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = Billed { total: Cost::default(), first_ms: charge.at_ms };
            let billed = keys.entry(upstream_key.to_owned()).or_insert(fresh);
            charge.in_tokens = after.in_tokens.less(billed.total.in_tokens).0;
            charge.out_tokens = after.out_tokens.less(billed.total.out_tokens).0;
            charge.usd_micros = after.usd_micros.less(billed.total.usd_micros).0;
            billed.total = billed.total.max(after);
        }
        if charge.in_tokens == 0 && charge.out_tokens == 0 && charge.usd_micros == 0 {
            return;
        }
        if let Some(mut file) = self.file.as_ref() {
            let mut line = serde_json::to_vec(&charge).expect("a charge has only numbers and texts");
            line.push(b'\n');
            // One write to a file opened for appending: lines of several processes don't mix.
            if let Err(error) = file.write_all(&line) {
                tracing::error!(%error, "the meter can't be written: the true bill is incomplete");
            }
        }
    }
}

fn sum(total: Cost, charge: &Charge) -> Cost {
    use atp_proto::{Tokens, UsdMicros};
    Cost {
        in_tokens: Tokens(total.in_tokens.0.saturating_add(charge.in_tokens)),
        out_tokens: Tokens(total.out_tokens.0.saturating_add(charge.out_tokens)),
        usd_micros: UsdMicros(total.usd_micros.0.saturating_add(charge.usd_micros)),
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

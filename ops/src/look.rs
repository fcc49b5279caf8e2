//! Commands that look, over HTTP: ps, agents, agent-status, shards, accounts, bill; and `drain`, which answers with the row of the
//! agent or router. Nothing else here changes anything.

use crate::api::{Accounts, Agents, Api, Routers, Shards, Streams};
use crate::cli::{self, Global};
use crate::failure::{Exit, Failure, Outcome};
use crate::rows;
use crate::screen::Screen;
use atp_core::clock::rfc3339;
use atp_proto::content::Bill;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often the live table is drawn anew.
const REFRESH: Duration = Duration::from_secs(1);

/// On a terminal a table that is drawn anew until Ctrl-C; else once.
async fn live(screen: Screen, mut table: impl AsyncFnMut() -> Result<(String, String), Failure>) -> Outcome {
    let mut home = "\x1b[2J\x1b[H";
    loop {
        let (head, text) = table().await?;
        if !screen.terminal {
            return Ok(screen.line(text.trim_end())?);
        }
        let shown: Vec<&str> = text.lines().take(40).collect();
        screen.line(&format!("{home}{head}. Ctrl-C ends.\n{}", shown.join("\n")))?;
        home = "\x1b[H\x1b[J";
        tokio::select! {
            () = tokio::time::sleep(REFRESH) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

pub(crate) async fn ps(global: &Global, screen: Screen) -> Outcome {
    let api = Api::new(global)?;
    if screen.json {
        return Ok(screen.document(&json!({"streams": api.streams("limit=1000").await?.streams}))?);
    }
    live(screen, async || {
        let Streams { mut streams } = api.streams("limit=1000").await?;
        // What runs stands on top, the latest first.
        streams.sort_by(|a, b| {
            let key = |s: &atp_core::view::StreamView| (s.state.is_closed(), std::cmp::Reverse(s.started_at.clone()));
            key(a).cmp(&key(b))
        });
        let open = streams.iter().filter(|s| !s.state.is_closed()).count();
        Ok((format!("{open} open of {} streams", streams.len()), rows::streams(screen, &streams)))
    })
    .await
}

pub(crate) async fn agents(global: &Global, screen: Screen) -> Outcome {
    let api = Api::new(global)?;
    if screen.json {
        return Ok(screen.document(&fetch_agents(&api).await?)?);
    }
    live(screen, async || {
        let Agents { agents } = fetch_agents(&api).await?;
        let here = agents.iter().filter(|a| a.status != "GONE").count();
        Ok((format!("{here} connected of {} agents", agents.len()), rows::agents(screen, &agents)))
    })
    .await
}

pub(crate) async fn agent_status(global: &Global, screen: Screen, args: &cli::AgentName) -> Outcome {
    let agents = fetch_agents(&Api::new(global)?).await?;
    let found = agents.agents.into_iter().find(|a| a.name.as_str() == args.name);
    let agent = found.ok_or_else(|| {
        Failure::new(Exit::Task, format!("NAME: no agent `{}` was ever connected; `atp agents` lists them", args.name))
    })?;
    if screen.json {
        return Ok(screen.document(&agent)?);
    }
    screen.line(rows::agents(screen, std::slice::from_ref(&agent)).trim_end())?;
    if !agent.statistics.is_empty() {
        screen.line(&format!("\n{}", rows::statistics(screen, &agent.statistics).trim_end()))?;
    }
    Ok(())
}

pub(crate) async fn drain_agent(global: &Global, screen: Screen, args: &cli::DrainAgent) -> Outcome {
    let (api, path) = (Api::new(global)?, format!("/v1/agents/{}/drain", args.name));
    let agents: Agents = if args.undo { api.delete(&path).await? } else { api.post(&path).await? };
    if screen.json {
        let one = agents.agents.first().map(serde_json::to_value).transpose()?;
        return Ok(screen.document(&one.unwrap_or_default())?);
    }
    Ok(screen.line(rows::agents(screen, &agents.agents).trim_end())?)
}

pub(crate) async fn drain_router(global: &Global, screen: Screen, args: &cli::DrainRouter) -> Outcome {
    let (api, path) = (Api::new(global)?, format!("/v1/routers/{}/drain", args.id));
    let answer: Routers = if args.undo { api.delete(&path).await? } else { api.post(&path).await? };
    if screen.json {
        let one = answer.routers.first().map(serde_json::to_value).transpose()?;
        return Ok(screen.document(&one.unwrap_or_default())?);
    }
    Ok(screen.line(rows::routers(screen, &answer.routers).trim_end())?)
}

pub(crate) async fn shards(global: &Global, screen: Screen) -> Outcome {
    let api = Api::new(global)?;
    if screen.json {
        let fleet: Shards = api.fetch("/v1/shards").await?;
        return Ok(screen.document(&fleet)?);
    }
    live(screen, async || {
        let fleet: Shards = api.fetch("/v1/shards").await?;
        let nowhere = fleet.shards.iter().filter(|row| row.owner.is_none()).count();
        let head =
            format!("{} routers, {} shards, {nowhere} without an owner", fleet.routers.len(), fleet.shards.len());
        let tables = [rows::routers(screen, &fleet.routers), rows::shards(screen, &fleet.shards)];
        Ok((head, tables.join("\n")))
    })
    .await
}

pub(crate) async fn fetch_agents(api: &Api) -> Result<Agents, Failure> {
    api.fetch("/v1/agents").await
}

pub(crate) async fn accounts(global: &Global, screen: Screen, args: &cli::Accounts) -> Outcome {
    let api = Api::new(global)?;
    let accounts: Accounts = match &args.word {
        None => api.fetch("/v1/accounts").await?,
        Some(cli::AccountsWord::Faster(word)) => {
            let (tokens, usd_micros) = (word.tokens.unwrap_or(0), word.usd.unwrap_or_default());
            let body = json!({"tokens": tokens, "usd_micros": usd_micros, "for_ms": word.for_ms, "by": word.by});
            api.post_json(&format!("/v1/accounts/{}/faster", word.account), &body).await?
        }
    };
    if screen.json {
        return Ok(screen.document(&accounts)?);
    }
    Ok(screen.line(rows::accounts(screen, &accounts.accounts).trim_end())?)
}

pub(crate) async fn bill(global: &Global, screen: Screen, args: &cli::Bill) -> Outcome {
    let api = Api::new(global)?;
    if let Some(stream) = &args.stream {
        let bill = api.bill(stream).await?;
        if screen.json {
            return Ok(screen.document(&bill)?);
        }
        return Ok(screen.line(rows::bill(screen, &bill).trim_end())?);
    }
    let account = args.account.as_deref().unwrap_or_default();
    let since = args.since.as_deref().map(since).transpose()?;
    let mut streams = api.streams("limit=1000").await?.streams;
    // RFC 3339 in UTC with milliseconds orders as text.
    streams.retain(|s| s.account == account && since.as_deref().is_none_or(|t| s.started_at.as_str() >= t));
    let mut bills: Vec<Bill> = Vec::new();
    for stream in &streams {
        bills.push(api.bill(&stream.stream_id).await?);
    }
    let settled: u64 = bills.iter().fold(0, |sum, b| sum.saturating_add(b.settled.usd_micros.0));
    if screen.json {
        let document = json!({"account": account, "since": since, "settled_usd_micros": settled, "bills": bills});
        return Ok(screen.document(&document)?);
    }
    for bill in &bills {
        screen.line(&format!("{}\n{}", bill.stream_id, rows::bill(screen, bill)))?;
    }
    let usd = atp_proto::money::show_usd(atp_proto::UsdMicros(settled));
    Ok(screen.line(&format!("{} streams of {account}: {usd} USD settled", bills.len()))?)
}

/// A time as RFC 3339 in UTC with milliseconds, out of that or a duration back from now.
fn since(text: &str) -> Result<String, Failure> {
    if let Ok(ms) = cli::duration(text) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        return Ok(rfc3339(u64::try_from(now).unwrap_or(u64::MAX).saturating_sub(ms)));
    }
    let bytes = text.as_bytes();
    let shape = "dddd-dd-ddTdd:dd:dd";
    let fits = bytes.len() >= shape.len()
        && shape.bytes().zip(bytes).all(|(s, b)| if s == b'd' { b.is_ascii_digit() } else { s == *b });
    let rest = text.get(shape.len()..).unwrap_or_default();
    let fraction = rest.strip_suffix('Z').map(|f| f.strip_prefix('.').unwrap_or(f));
    match fraction {
        Some(f) if fits && f.len() <= 3 && f.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(format!("{}.{f:0<3}Z", &text[..shape.len()]))
        }
        _ => Err(Failure::usage(format!(
            "--since: `{text}` is neither RFC 3339 in UTC like 2026-11-01T00:00:00Z nor a duration like 2h"
        ))),
    }
}

/// The live state compared with the router's own log.
pub(crate) async fn verify(global: &Global, screen: Screen) -> Outcome {
    let view: Value = Api::new(global)?.post("/v1/verify").await?;
    show_verify(screen, &view)
}

/// A log checked against itself, without a router.
pub(crate) fn verify_log(screen: Screen, source: &atp_router::log::Source) -> Outcome {
    let report = atp_router::verify::offline_verify(source);
    let report = report.map_err(|e| Failure::new(Exit::Difference, format!("--log: {e}")))?;
    show_verify(screen, &serde_json::to_value(report)?)
}

/// Prints the object of `verify`; exit 5 unless it is clean.
pub(crate) fn show_verify(screen: Screen, view: &Value) -> Outcome {
    let ok = view["ok"].as_bool().unwrap_or(false);
    if screen.json {
        screen.document(view)?;
    } else {
        screen.line(&verify_text(screen, view))?;
    }
    if ok { Ok(()) } else { Err(Failure::silent(Exit::Difference)) }
}

/// What `verify` found, for people.
pub(crate) fn verify_text(screen: Screen, view: &Value) -> String {
    use crate::screen::{Paint, escape};
    let count = |key: &str| match &view[key] {
        Value::Array(items) => items.len().to_string(),
        Value::Number(n) => n.to_string(),
        _ => "?".into(),
    };
    let ok = view["ok"].as_bool().unwrap_or(false);
    let verdict = if ok { screen.paint(Paint::Green, "clean") } else { screen.paint(Paint::Red, "DIFFERENT") };
    let mut text = format!(
        "{verdict}: log {} at position {}, {} records, {} streams, {} open reservations\nstate {}",
        escape(view["log"].as_str().unwrap_or("?")),
        count("position"),
        count("records"),
        count("streams"),
        count("open_reservations"),
        escape(view["state_hash"].as_str().unwrap_or("?")),
    );
    text.push_str(&pruned_text(&view["pruned"]));
    for d in view["differences"].as_array().map(Vec::as_slice).unwrap_or_default() {
        let part = |key: &str| match &d[key] {
            Value::String(t) => escape(t).into_owned(),
            other => other.to_string(),
        };
        text.push_str(&format!(
            "\n  {} {}: log {}, live {}",
            part("account"),
            part("field"),
            part("log"),
            part("live")
        ));
    }
    text
}

/// Where the fold of a pruned log begins: a line for one shard, and one for all of many.
fn pruned_text(pruned: &Value) -> String {
    use crate::screen::escape;
    let pruned = pruned.as_array().map(Vec::as_slice).unwrap_or_default();
    let at = |row: &Value| escape(row["pruned_at"].as_str().unwrap_or("?")).into_owned();
    let positions = || pruned.iter().filter_map(|row| row["checkpoint"].as_u64());
    match (pruned, positions().min(), positions().max()) {
        ([one], Some(position), _) => {
            format!("\nfrom checkpoint at {position}; what is before was pruned by `atp log prune` at {}", at(one))
        }
        ([newest, ..], Some(min), Some(max)) => format!(
            "\nfrom checkpoints of {} shards at {min} to {max}; what is before was pruned by `atp log prune` at {}",
            pruned.len(),
            at(newest)
        ),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_a_duration() {
        let fixed = |t: &str| since(t).ok();
        assert_eq!(fixed("2026-11-01T00:00:00Z").as_deref(), Some("2026-11-01T00:00:00.000Z"));
        assert_eq!(fixed("2026-11-01T00:00:00.5Z").as_deref(), Some("2026-11-01T00:00:00.500Z"));
        assert!(fixed("2h").is_some_and(|t| t.ends_with('Z')));
        for bad in ["yesterday", "2026-11-01", "2026-11-01T00:00:00+01:00", "2026-11-01T00:00:00.1234Z", ""] {
            assert!(since(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_difference_is_exit_5() {
        let screen = Screen::default();
        let view = json!({"log": "local", "ok": false, "differences": [{"account": "a", "field": "settled", "log": 1, "live": 2}]});
        assert!(verify_text(screen, &view).contains("a settled: log 1, live 2"));
        assert_eq!(show_verify(screen, &view).expect_err("differs").exit, Exit::Difference);
    }
}

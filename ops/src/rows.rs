//! The objects of the JSON contract as tables for people. Fetches nothing.

use crate::screen::{Paint, Screen, Table};
use atp_core::view::{AccountView, AgentView, PaceView, StatisticsView, StreamView};
use atp_proto::content::{Bill, CallState, Source, TaskState, WindowUpdate, WindowView};
use atp_proto::money::show_usd;
use atp_proto::{Amount, Limit, Tokens, UsdMicros};
use atp_router::{RouterRow, ShardRow};

/// Dollars; `-` for no limit.
fn usd(v: Option<UsdMicros>) -> String {
    v.map_or_else(|| "-".into(), show_usd)
}

fn tokens(v: Option<Tokens>) -> String {
    v.map_or_else(|| "-".into(), |t| t.0.to_string())
}

/// `0.0123 / 4100`: dollars and tokens.
fn both(a: Amount) -> String {
    format!("{} / {}", show_usd(a.usd_micros), a.tokens.0)
}

fn both_of(l: Limit) -> String {
    format!("{} / {}", usd(l.usd_micros), tokens(l.tokens))
}

/// `2026-11-21T10:00:00.123Z` as `10:00:00`.
fn clock(at: &str) -> String {
    at.split_once('T').and_then(|(_, t)| t.get(..8)).unwrap_or(at).into()
}

pub(crate) const fn state_paint(state: TaskState) -> Paint {
    match state {
        TaskState::Done => Paint::Green,
        TaskState::Failed | TaskState::Refused => Paint::Red,
        TaskState::Provisional | TaskState::Cancelled => Paint::Yellow,
        TaskState::Queued | TaskState::Running | TaskState::Settling => Paint::Cyan,
    }
}

pub(crate) fn streams(screen: Screen, rows: &[StreamView]) -> String {
    let mut table =
        Table::new(&["STREAM", "ACCOUNT", "STATE", "QOS", "TYPE", "AGENTS", ">SPENT", ">BUDGET", "STARTED", "LAST"]);
    for row in rows {
        let agents: Vec<&str> = row.agents.iter().map(|a| a.as_str()).collect();
        table.row([
            row.stream_id.clone(),
            row.account.clone(),
            row.state.as_str().into(),
            row.qos.as_str().into(),
            row.task_type.clone(),
            agents.join(","),
            show_usd(row.spent_usd_micros),
            usd(row.budget_usd_micros),
            clock(&row.started_at),
            clock(&row.last_event_at),
        ]);
        table.paint(2, state_paint(row.state));
    }
    table.render(screen)
}

/// `4 / 80000 / 0.50`: calls, tokens, dollars.
fn window(w: &WindowView) -> String {
    let parallel = w.max_parallel.map_or_else(|| "-".into(), |n| n.to_string());
    format!("{parallel} / {} / {}", tokens(w.max_tokens), usd(w.max_usd_micros))
}

/// ppm as percent with one digit behind the point.
fn percent(ppm: u64) -> String {
    format!("{}.{} %", ppm / 10_000, ppm / 1_000 % 10)
}

pub(crate) fn agents(screen: Screen, rows: &[AgentView]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "ADAPTER",
        "STATUS",
        "MODELS",
        ">RUNNING",
        ">WINDOW calls / tokens / USD",
        "BREAKER",
        ">SPENT",
        ">SCORE",
        "TIER",
        ">ERROR 7d",
        "HEARTBEAT",
        "REASON",
    ]);
    for row in rows {
        table.row([
            row.name.to_string(),
            row.adapter.clone(),
            row.status.clone(),
            row.models.join(","),
            row.in_flight.to_string(),
            window(&row.window.effective),
            row.breaker.clone(),
            show_usd(row.spent_usd_micros),
            row.score_ppm.map(percent).unwrap_or_default(),
            row.qos_tier.as_str().into(),
            row.mape_7d_ppm.map(percent).unwrap_or_default(),
            row.last_heartbeat_at.as_deref().map(clock).unwrap_or_default(),
            reason(row),
        ]);
        table.paint(
            2,
            match row.status.as_str() {
                "READY" => Paint::Green,
                "GONE" => Paint::Red,
                _ => Paint::Yellow,
            },
        );
    }
    table.render(screen)
}

pub(crate) fn routers(screen: Screen, rows: &[RouterRow]) -> String {
    let mut table = Table::new(&["ROUTER", "ATP", "HTTP", ">SHARDS", "DRAINED"]);
    for row in rows {
        let drained = if row.drained { "yes" } else { "" };
        table.row([row.id.clone(), row.atp.clone(), row.http.clone(), row.shards.to_string(), drained.into()]);
    }
    table.render(screen)
}

pub(crate) fn shards(screen: Screen, rows: &[ShardRow]) -> String {
    let mut table = Table::new(&[">SHARD", "OWNER", "STANDBY", ">EPOCH", ">POSITION", ">LAG", "SINCE"]);
    for row in rows {
        table.row([
            row.shard.to_string(),
            row.owner.clone().unwrap_or_else(|| "nobody".into()),
            row.standby.clone().unwrap_or_default(),
            row.epoch.to_string(),
            row.position.to_string(),
            row.lag.map(|lag| lag.to_string()).unwrap_or_default(),
            row.since.clone().unwrap_or_default(),
        ]);
        table.paint(1, if row.owner.is_some() { Paint::Green } else { Paint::Red });
    }
    table.render(screen)
}

/// What calls of one agent have cost, by model and task type.
pub(crate) fn statistics(screen: Screen, rows: &[StatisticsView]) -> String {
    let mut table =
        Table::new(&["MODEL", "TASK TYPE", ">RUNS", ">MEAN USD / tokens", ">SD", ">P50", ">P90", ">P50 ms", ">P90 ms"]);
    for row in rows {
        table.row([
            row.model.clone(),
            row.task_type.clone(),
            row.runs.to_string(),
            both(row.mean),
            both(row.sd),
            both(row.p50),
            both(row.p90),
            row.p50_ms.to_string(),
            row.p90_ms.to_string(),
        ]);
    }
    table.render(screen)
}

/// How an agent stands, in a line; what only counts calls isn't in it.
pub(crate) fn standing(row: &AgentView) -> String {
    let parts = [
        format!("agent {} {}", row.name, row.status),
        format!("window {}", window(&row.window.effective)),
        format!("breaker {}", row.breaker),
        format!("tier {}", row.qos_tier.as_str()),
        reason(row),
    ];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

/// What of a window is left, in a line.
pub(crate) fn left(update: &WindowUpdate) -> String {
    format!("left of {}: {} (calls / tokens / USD)", update.scope, window(&update.window))
}

/// Why it is as it is: its own or the operator's reason, and what the router sees of it.
fn reason(row: &AgentView) -> String {
    let silent = (!row.healthy && row.status != "GONE").then(|| "answers no heartbeat".to_owned());
    let cools = (row.surcharge_ppm > 0).then(|| format!("cools off, cost +{} %", row.surcharge_ppm / 10_000));
    let until = row.retry_at.as_deref().map(|at| format!("until {} at least", clock(at)));
    let parts = [row.reason.clone(), until, silent, cools];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

pub(crate) fn accounts(screen: Screen, rows: &[AccountView]) -> String {
    let mut table =
        Table::new(&["ACCOUNT", "PER", "WINDOW", ">LIMIT USD / tokens", ">USED", ">HELD", ">LEFT", "PACE", "RESETS"]);
    for row in rows {
        table.row([
            row.account.clone(),
            row.per.clone(),
            row.window_id.clone(),
            both_of(row.limit),
            both(row.settled),
            both(row.held),
            both_of(row.remaining),
            row.pace.as_ref().map_or_else(|| "-".into(), pace),
            row.reset_at.clone().unwrap_or_else(|| "never".into()),
        ]);
    }
    table.render(screen)
}

/// `enforce: ahead until 12:30:00; 1.00 / - per hour`.
fn pace(pace: &PaceView) -> String {
    let ahead = match &pace.resumes_at {
        Some(at) if pace.mode == "enforce" => format!("held back until {at}"),
        Some(at) => format!("AHEAD until {at}"),
        None => "on line".into(),
    };
    let faster = pace
        .faster
        .as_ref()
        .map_or_else(String::new, |f| format!("; {} more until {} by {}", both(f.more), clock(&f.until), f.by));
    format!("{}: {ahead}; {} per hour{faster}", pace.mode, both_of(pace.per_hour))
}

const fn call_state(state: CallState) -> &'static str {
    match state {
        CallState::Reserved => "reserved",
        CallState::Running => "running",
        CallState::Open => "open",
        CallState::Settled => "settled",
        CallState::Void => "void",
    }
}

const fn source(source: Option<Source>) -> &'static str {
    match source {
        None => "",
        Some(Source::Reported) => "reported",
        Some(Source::Counted) => "counted",
        Some(Source::UnknownAtHold) => "unknown_at_hold",
        Some(Source::Expired) => "expired",
    }
}

/// The calls of a bill, then its sum. Amounts are USD / tokens.
pub(crate) fn bill(screen: Screen, bill: &Bill) -> String {
    let mut table = Table::new(&[
        "AGENT",
        "MODEL",
        "CALL",
        ">ESTIMATE",
        ">GUARD",
        ">GRANT",
        ">ACTUAL",
        "SOURCE",
        "STATE",
        "PRICE",
        "RULE",
    ]);
    for call in &bill.calls {
        let actual = call.actual.amount().map_or_else(|_| "out of range".into(), both);
        table.row([
            call.agent.to_string(),
            call.model.clone(),
            call.retry_of.map_or_else(|| format!("{}", call.lane), |_| format!("{} (retry)", call.lane)),
            both(Amount { tokens: call.estimate.tokens, usd_micros: call.estimate.usd_micros }),
            both(call.guarded),
            if call.extends == 0 { both(call.grant) } else { format!("{} (+{})", both(call.grant), call.extends) },
            actual,
            source(call.source).into(),
            call_state(call.state).into(),
            call.price_version.clone(),
            call.rule.clone(),
        ]);
        table.paint(6, Paint::Bold);
        if matches!(call.state, CallState::Open) {
            table.paint(8, Paint::Yellow);
        }
    }
    let mut text = table.render(screen);
    for (call, tool) in bill.calls.iter().flat_map(|c| c.tool_cost_breakdown.iter().map(move |t| (c, t))) {
        let spent = both(Amount { tokens: tool.tokens, usd_micros: tool.usd_micros });
        let refused = if tool.refused == 0 { String::new() } else { format!(", {} refused", tool.refused) };
        let name = crate::screen::escape(&tool.tool);
        text.push_str(&format!("tool {name} of lane {}: {} allowed{refused}, {spent}\n", call.lane, tool.allowed));
    }
    text.push_str(&format!(
        "settled {}   held {}   limit {}   remaining {}   (USD / tokens; account {})\n",
        both(bill.settled),
        both(bill.held),
        both_of(bill.limit),
        both_of(bill.remaining),
        crate::screen::escape(&bill.account)
    ));
    text
}

//! The scripted agent: plays a YAML script of chunks, costs, delays, refusals and faults, and keeps the true bill beside
//! it. The meter of tests and benches. It never invents: what isn't in the script doesn't happen.

mod charges;
mod jitter;
mod script;

pub use charges::Charge;
pub use script::Script;

use crate::config::{AgentConfig, ConfigError};
use atp_proto::content::{
    AgentError, AgentFinal, AgentPartial, AgentStatus, Capabilities, Dispatch, EstimateMode, EstimateRequest, Finish,
    Proof, Stop,
};
use atp_proto::{AgentName, Code, Cost, UsdMicros};
use atp_sdk::{AgentHandle, BoxFuture, Call, Estimated, Handler, Outcome, StopReason, ToolAnswer, ToolError, Verdict};
use bytes::Bytes;
use charges::Charges;
use jitter::Dice;
use script::{Adds, Fault, Play, Price, Refuse, grown};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// What `fault: crash` does. It may return: the call then never says anything again.
pub type OnCrash = Arc<dyn Fn() + Send + Sync>;

/// The agent of the script that the configuration names. A crash ends the process.
///
/// # Errors
/// Names what is wrong with the configuration, the script or its meter.
pub fn build(config: &AgentConfig) -> Result<(Capabilities, Arc<dyn Handler>), ConfigError> {
    let fix = "give --script FILE, or `script: FILE` in YAML";
    let path = config.script.as_ref().ok_or_else(|| ConfigError::new("script", "is missing", fix))?;
    let yaml = std::fs::read_to_string(path)
        .map_err(|e| ConfigError::new("script", format!("`{}` can't be read: {e}", path.display()), fix))?;
    let script = Script::parse(&yaml)?;
    let (mut capabilities, handler) = handler(script, Arc::new(|| std::process::exit(137)))?;
    if !config.name.is_empty() {
        capabilities.agent = config.handle()?;
    }
    if let Some(n) = config.max_parallel {
        capabilities.max_parallel = n;
    }
    Ok((capabilities, handler))
}

/// The agent of a script, inside any process.
///
/// # Errors
/// When the script's meter can't be opened.
pub fn handler(script: Script, on_crash: OnCrash) -> Result<(Capabilities, Arc<dyn Handler>), ConfigError> {
    let idempotent_for = script.idempotent_for.0;
    let charges = Charges::open(script.meter.as_deref(), idempotent_for)?;
    let bounded = matches!(script.stop, Stop::Limit | Stop::None);
    let capabilities = Capabilities {
        agent: AgentName::new(&script.name.value),
        adapter: "scripted".to_owned(),
        models: script.model_infos(),
        skills: script.task_types.clone(),
        tools: script.tools.clone(),
        tool_permissions: script.tools_asked(),
        security_groups: script.security_groups.clone(),
        max_parallel: script.max_parallel.value,
        estimate: script.declared_estimate(),
        stop: script.stop,
        reach: script.reach(),
        effects: script.effects,
        worst_case: bounded.then(|| script.worst_case()),
        idempotent_for_ms: u64::try_from(idempotent_for.as_millis()).unwrap_or(u64::MAX),
        ..Capabilities::default()
    };
    let scripted = Scripted {
        script,
        charges,
        on_crash,
        played: AtomicUsize::new(0),
        handle: OnceLock::new(),
        answers: Mutex::new(HashMap::new()),
    };
    Ok((capabilities, Arc::new(scripted)))
}

struct Scripted {
    script: Script,
    charges: Charges,
    on_crash: OnCrash,
    /// Calls that began: the number of the next one.
    played: AtomicUsize,
    handle: OnceLock<AgentHandle>,
    /// Finals by upstream key, for `idempotent_for`.
    answers: Mutex<HashMap<String, AgentFinal>>,
}

impl Handler for Scripted {
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
        Box::pin(self.play(call))
    }

    fn started(&self, agent: AgentHandle) {
        if !self.script.status.is_empty() {
            let moments = self.script.status.clone();
            let agent = agent.clone();
            tokio::spawn(async move {
                let begun = tokio::time::Instant::now();
                for moment in moments {
                    tokio::select! {
                        () = tokio::time::sleep_until(begun + moment.at.0) => {}
                        () = agent.ended() => return,
                    }
                    agent.status(AgentStatus {
                        status: moment.status,
                        reason: moment.reason,
                        suggested_window: None,
                        retry_after_ms: moment.retry_after.map(|span| millis(span.0)),
                    });
                }
            });
        }
        // Only the first agent of this handler is the one that its faults are about.
        let _ = self.handle.set(agent);
    }

    /// The script's figures; under `bad_estimate` no number at all.
    fn estimate(&self, _request: EstimateRequest) -> BoxFuture<'_, Estimated> {
        let bad = self.script.calls.value[0].value.fault == Some(Fault::BadEstimate);
        let estimated = if bad {
            Estimated::Raw(br#"{"in_tokens":NaN,"out_tokens":NaN,"usd_micros":NaN}"#.to_vec())
        } else {
            Estimated::Declared
        };
        Box::pin(std::future::ready(estimated))
    }

    /// Under `bad_estimate` the declared figures are NaN, which no typed estimate can say.
    fn capabilities_json(&self, capabilities: &Capabilities) -> Option<Vec<u8>> {
        let asked = capabilities.estimate.as_ref().is_some_and(|e| e.mode == EstimateMode::Preflight);
        if asked || self.script.calls.value[0].value.fault != Some(Fault::BadEstimate) {
            return None;
        }
        let mut plain = capabilities.clone();
        plain.estimate = None;
        let mut json = serde_json::to_vec(&plain).ok()?;
        json.pop();
        json.extend_from_slice(
            br#","estimate":{"mode":"declared","in_tokens":NaN,"out_tokens":NaN,"usd_micros":NaN}}"#,
        );
        Some(json)
    }
}

/// One call while it is played.
struct Playing<'a> {
    script: &'a Script,
    charges: &'a Charges,
    call: &'a Call,
    call_id: String,
    price: Price,
    dice: Dice,
    fault: Option<Fault>,
    /// What the provider has billed so far.
    billed: Cost,
    /// What of it is shown in partials.
    shown: Cost,
    reports: u64,
}

/// Why a play is over before its script is.
enum Cut {
    Asked(StopReason),
    /// The provider's `max_tokens`.
    Limit,
}

impl Scripted {
    async fn play(&self, call: Call) -> Outcome {
        let dispatch = &call.dispatch;
        if let Some(answer) = self.stored(dispatch) {
            return Outcome::Final(answer);
        }
        let n = self.played.fetch_add(1, Ordering::Relaxed);
        let plays = &self.script.calls.value;
        let play = &plays[n.min(plays.len() - 1)].value;
        if let Some(refuse) = &play.refuse {
            return refused(refuse);
        }
        let mut playing = Playing {
            script: &self.script,
            charges: &self.charges,
            call: &call,
            call_id: dispatch.call_id.to_string(),
            price: self.script.price(dispatch.model.as_deref()),
            dice: Dice::of_call(self.script.seed, n as u64),
            fault: play.fault,
            billed: Cost::default(),
            shown: Cost::default(),
            reports: 0,
        };
        let cut = match playing.chunks(play).await {
            Ok(()) => {
                match play.fault {
                    Some(Fault::Crash) => {
                        (self.on_crash)();
                        return std::future::pending().await;
                    }
                    Some(Fault::Hang) => {
                        call.meter.stopped().await;
                        return Outcome::Vanish;
                    }
                    Some(Fault::Drop) => {
                        if let Some(agent) = self.handle.get() {
                            agent.drop_connection();
                        }
                    }
                    Some(Fault::Garbage) => {
                        call.meter.emit_unchecked(Bytes::from_static(b"{\"text\": \"half a"));
                    }
                    Some(Fault::BadEstimate | Fault::LateUsage | Fault::HiddenTokens | Fault::FallingTotal) | None => {}
                }
                playing.end(play).await
            }
            Err(cut) => Err(cut),
        };
        let outcome = playing.outcome(play, cut);
        if let Outcome::Final(end) = &outcome {
            self.store(dispatch, end, &play.chunks);
        }
        outcome
    }

    /// The answer to a known upstream key: all of its text, at the cost that it had, billed no second time.
    fn stored(&self, dispatch: &Dispatch) -> Option<AgentFinal> {
        self.charges.begin(&dispatch.upstream_key).filter(|billed| *billed != Cost::default())?;
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).get(&dispatch.upstream_key).cloned()
    }

    fn store(&self, dispatch: &Dispatch, end: &AgentFinal, chunks: &[script::Chunk]) {
        if self.script.idempotent_for.0.is_zero() || end.finish != Finish::Complete {
            return;
        }
        let mut text = String::new();
        for chunk in chunks {
            for _ in 0..chunk.repeat {
                text.push_str(chunk.text.as_deref().unwrap_or_default());
            }
        }
        text.push_str(end.text.as_deref().unwrap_or_default());
        let whole = AgentFinal { text: (!text.is_empty()).then_some(text), ..end.clone() };
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.insert(dispatch.upstream_key.clone(), whole);
    }
}

impl Playing<'_> {
    async fn chunks(&mut self, play: &Play) -> Result<(), Cut> {
        for chunk in &play.chunks {
            for _ in 0..chunk.repeat {
                let after = chunk.after.draw(&mut self.dice).0;
                self.wait(after).await?;
                let mut text = chunk.text.clone();
                let mut adds = chunk.adds();
                if let Some(tool) = &chunk.tool {
                    let result = self.ask(tool, &mut adds).await?;
                    text = text.map(|text| text.replace("{result}", &result));
                }
                let before = self.billed;
                let at_limit = self.bill(adds);
                if let Some(tool) = chunk.tool.as_ref().filter(|tool| self.script.tools.contains(&tool.name)) {
                    let spent = |total: Cost| total.amount().unwrap_or_default();
                    self.call.meter.own_tool_spent(&tool.name, spent(self.billed).less(spent(before)));
                }
                match self.show(text.as_deref()) {
                    Verdict::Go if at_limit => return Err(Cut::Limit),
                    Verdict::Go => {}
                    Verdict::Stop(reason) => return Err(Cut::Asked(reason)),
                }
            }
        }
        Ok(())
    }

    /// What came of a tool, as text: what it brought, or the code of its refusal. A tool that isn't run costs nothing.
    async fn ask(&self, tool: &script::Tool, adds: &mut Adds) -> Result<String, Cut> {
        let asked = self.call.meter.own_tool(&tool.name, tool.args.clone(), tool.budget).await;
        match asked {
            Ok(ToolAnswer::Data { data, .. }) => {
                Ok(data.get("text").and_then(serde_json::Value::as_str).map_or_else(|| data.to_string(), str::to_owned))
            }
            Ok(ToolAnswer::Own) => Ok("own".to_owned()),
            Err(ToolError::Refused(error)) => {
                *adds = Adds::default();
                Ok(error.code.to_string())
            }
            Err(ToolError::Stopped(reason)) => Err(Cut::Asked(reason)),
        }
    }

    async fn end(&mut self, play: &Play) -> Result<(), Cut> {
        if let Some(end) = &play.end {
            let after = end.after.draw(&mut self.dice).0;
            self.wait(after).await?;
            self.bill(end.adds());
        }
        Ok(())
    }

    /// Waits for the provider. A script without delays is a producer that can wait, so it waits for room instead.
    async fn wait(&mut self, after: Duration) -> Result<(), Cut> {
        let meter = &self.call.meter;
        if after.is_zero() {
            tokio::task::coop::consume_budget().await;
            meter.room().await;
            return Ok(());
        }
        tokio::select! {
            biased;
            reason = meter.stopped() => Err(Cut::Asked(reason)),
            () = tokio::time::sleep(after) => Ok(()),
        }
    }

    /// The provider bills an increment; true when it stops at `max_tokens`, which only `stop: limit` honours.
    fn bill(&mut self, adds: Adds) -> bool {
        let (ins, mut outs, mut usd) = adds.draw(&mut self.dice);
        if self.fault == Some(Fault::HiddenTokens) {
            (outs, usd) = (outs.saturating_mul(2), usd.map(|usd| usd.saturating_mul(2)));
        }
        let mut at_limit = false;
        if let (Stop::Limit, Some(limit)) = (self.script.stop, self.call.dispatch.max_output_tokens) {
            let left = limit.saturating_sub(self.billed.out_tokens.0);
            if outs > left {
                // The amount of a chunk that is cut short shrinks with its tokens.
                let share = |usd: u64| (u128::from(usd) * u128::from(left)).div_ceil(u128::from(outs));
                usd = usd.map(|usd| u64::try_from(share(usd)).unwrap_or(usd));
                (outs, at_limit) = (left, true);
            }
        }
        let before = self.billed;
        self.billed = grown(before, self.price, (ins, outs, usd));
        self.charges.charge(&self.call_id, &self.call.dispatch.upstream_key, before, self.billed);
        at_limit
    }

    /// Emits a chunk with the total that the agent knows of.
    fn show(&mut self, text: Option<&str>) -> Verdict {
        let meter = &self.call.meter;
        self.reports += 1;
        self.shown = match self.fault {
            Some(Fault::LateUsage) => Cost::default(),
            Some(Fault::HiddenTokens) => Cost {
                out_tokens: atp_proto::Tokens(self.billed.out_tokens.0 / 2),
                usd_micros: UsdMicros(self.billed.usd_micros.0 / 2),
                ..self.billed
            },
            _ => self.billed,
        };
        if self.fault == Some(Fault::FallingTotal) && self.reports.is_multiple_of(2) {
            let cost = Cost {
                in_tokens: atp_proto::Tokens(self.shown.in_tokens.0 / 2),
                out_tokens: atp_proto::Tokens(self.shown.out_tokens.0 / 2),
                usd_micros: UsdMicros(self.shown.usd_micros.0 / 2),
            };
            let partial = AgentPartial { text: text.map(str::to_owned), cost, ..AgentPartial::default() };
            let json = serde_json::to_vec(&partial).expect("a partial has only numbers and texts");
            return meter.emit_unchecked(json.into());
        }
        meter.emit(text, None, self.shown)
    }

    /// How the call ends. What a provider can't be stopped from is billed to its end, at once.
    fn outcome(mut self, play: &Play, cut: Result<(), Cut>) -> Outcome {
        let end = play.end.clone().unwrap_or_default();
        let reason = match cut {
            Ok(()) => {
                return Outcome::Final(AgentFinal {
                    text: end.text,
                    findings: (!end.findings.is_empty()).then_some(end.findings),
                    confidence_ppm: end.confidence.map(|ratio| ratio.0),
                    cost: self.billed,
                    ..AgentFinal::default()
                });
            }
            Err(Cut::Limit) => {
                self.bill(Adds { out_tokens: jitter::Jitter::default(), ..end.adds() });
                StopReason::Grant
            }
            Err(Cut::Asked(reason)) => {
                if matches!(self.script.stop, Stop::Limit | Stop::None) {
                    self.run_on(play);
                }
                reason
            }
        };
        let cost = self.billed;
        let failed = |code, message: &str| AgentError {
            code,
            message: message.to_owned(),
            retry_after_ms: None,
            cost: Some(cost),
            proof: None,
        };
        match reason {
            StopReason::Grant => Outcome::Final(AgentFinal { cost, finish: Finish::Grant, ..AgentFinal::default() }),
            StopReason::Cancelled => {
                Outcome::Final(AgentFinal { cost, finish: Finish::Cancelled, ..AgentFinal::default() })
            }
            StopReason::Deadline => Outcome::Error(failed(Code::Timeout, "the call's deadline passed")),
            StopReason::Backlog => Outcome::Error(failed(Code::Limit, "too much of the answer is unacknowledged")),
        }
    }

    /// Bills the rest of the script: the provider makes it whether anybody listens or not.
    fn run_on(&mut self, play: &Play) {
        let mut skip = self.reports;
        for chunk in &play.chunks {
            let played = skip.min(chunk.repeat);
            skip -= played;
            for _ in played..chunk.repeat {
                if self.bill(chunk.adds()) {
                    return;
                }
            }
        }
        if let Some(end) = &play.end {
            self.bill(end.adds());
        }
    }
}

fn refused(refuse: &Refuse) -> Outcome {
    Outcome::Error(AgentError {
        code: refuse.code,
        message: "the script refuses this call".to_owned(),
        retry_after_ms: refuse.retry_after.map(|span| millis(span.0)),
        cost: None,
        proof: Some(Proof::NotCalled),
    })
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;

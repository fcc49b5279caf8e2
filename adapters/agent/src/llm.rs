//! One call of a language model, the same for every provider: prompt, stream, running cost, the stop at the grant, and
//! what a failure proves. A provider's own file says only how its requests and events look.

use crate::http;
use crate::meter::Running;
use crate::sse::{Event, Events, Framing};
use atp_proto::content::{
    AgentError, AgentFinal, Capabilities, Dispatch, Effects, Finish, ModelInfo, Proof, Stop, UsageSource,
};
use atp_proto::{Amount, Code, Cost};
use atp_sdk::{BoxFuture, Call, Handler, Meter, Outcome, StopReason, Verdict};
use reqwest::{Client, Response, Url};
use serde_json::Value;
use std::time::Duration;

/// Bytes of one answer's stream; more ends the call.
const STREAM_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of the answer that are searched for findings at its end.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// An own count is booked this much up.
const COUNTED_UP_PPM: u32 = 100_000;
/// `max_tokens` where neither the router nor the configuration names one.
pub const OUTPUT_TOKENS_MAX: u64 = 4096;

const INSTRUCTION: &str = "You are one of several agents that work on a task. Answer it briefly and concretely, from the \
input only. Where you are sure of a defect, end with one fenced json block that holds a list of findings, each \
{\"type\", \"file\", \"span\", \"claim\", \"severity\"}; span is a line or a range like \"12-14\", severity one of critical, \
high, medium, low, info.";

/// A setting that can't be used: its name as in flags and YAML, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigProblem {
    pub field: &'static str,
    pub problem: String,
}

/// micro-USD per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prices {
    pub in_usd_micros_per_mtok: u64,
    pub out_usd_micros_per_mtok: u64,
}

/// What every LLM adapter is made of. `Debug` doesn't show the key.
#[derive(Clone)]
pub struct LlmConfig {
    /// Absent: the provider's public one.
    pub base_url: Option<String>,
    pub api_key: Option<String>,
    /// Used where the dispatch names none.
    pub model: String,
    /// Absent: the agent guards the tokens of its grant only, and the router prices what it reports.
    pub prices: Option<Prices>,
    /// Never asks for more output than this; absent `OUTPUT_TOKENS_MAX`.
    pub output_tokens_max: Option<u64>,
    pub connect_timeout: Duration,
}

impl LlmConfig {
    #[must_use]
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            base_url: None,
            api_key: None,
            model: model.into(),
            prices: None,
            output_tokens_max: None,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

impl std::fmt::Debug for LlmConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LlmConfig")
            .field("base_url", &self.base_url)
            .field("api_key", &self.api_key.as_ref().map(|_| "..."))
            .field("model", &self.model)
            .field("prices", &self.prices)
            .field("output_tokens_max", &self.output_tokens_max)
            .finish_non_exhaustive()
    }
}

/// A request as a provider wants it.
#[derive(Debug, PartialEq)]
pub(crate) struct Request {
    /// Below the base URL, without a leading slash.
    pub(crate) path: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Value,
}

/// What is asked, in the two parts that every provider knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompt {
    pub(crate) system: String,
    pub(crate) user: String,
}

/// What one event of the stream says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delta {
    Text(String),
    /// Billed as output and not part of the answer: reasoning.
    Hidden(String),
    /// Totals so far; an absent one is as before.
    Usage {
        in_tokens: Option<u64>,
        out_tokens: Option<u64>,
    },
    /// A usage that can't be true: its field and what it holds.
    BadUsage(String),
    /// The model has stopped; true when it was for `max_tokens`.
    Finished {
        at_limit: bool,
    },
    /// Nothing more will come.
    End,
    /// The provider gave up in the middle of its answer.
    Failed(String),
}

/// An event that isn't what this provider sends: the field and what is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Garbage(pub(crate) String);

/// How one provider's API looks. Written as one file each.
pub(crate) trait Provider: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn framing(&self) -> Framing;
    fn request(&self, prompt: &Prompt, model: &str, output_tokens_max: u64) -> Request;
    fn event(&self, event: &Event, out: &mut Vec<Delta>) -> Result<(), Garbage>;
    fn error_body(&self, body: &[u8]) -> http::ErrorBody;
    /// Tokens that one chunk and one round trip may bring after the decision to stop.
    fn reach_tokens(&self) -> u64;
}

/// A handler for one provider and one configuration.
pub struct Llm {
    provider: Box<dyn Provider>,
    client: Client,
    base: Url,
    config: LlmConfig,
}

impl Llm {
    pub(crate) fn new(provider: Box<dyn Provider>, base: &str, config: LlmConfig) -> Result<Self, ConfigProblem> {
        if config.model.trim().is_empty() {
            return Err(ConfigProblem {
                field: "model",
                problem: "is missing; name a model of the provider".to_owned(),
            });
        }
        if config.output_tokens_max == Some(0) {
            return Err(ConfigProblem {
                field: "output_tokens_max",
                problem: "is 0; allow at least 1 token".to_owned(),
            });
        }
        if config.api_key.as_ref().is_some_and(|key| key.is_empty() || key.bytes().any(|b| !b.is_ascii_graphic())) {
            let problem =
                "is empty or has characters that no header can carry; give the key as the provider shows it".to_owned();
            return Err(ConfigProblem { field: "api_key", problem });
        }
        let base = http::base_url(config.base_url.as_deref().unwrap_or(base))?;
        let client = http::client(&base, config.connect_timeout)?;
        Ok(Self { provider, client, base, config })
    }

    /// States what the money path needs to know of this adapter; name, host, skills and parallelism are the caller's.
    pub fn describe(&self, capabilities: &mut Capabilities) {
        let prices = self.config.prices;
        capabilities.adapter = self.provider.name().to_owned();
        capabilities.models = vec![ModelInfo {
            id: self.config.model.clone(),
            in_usd_micros_per_mtok: prices.map(|p| p.in_usd_micros_per_mtok),
            out_usd_micros_per_mtok: prices.map(|p| p.out_usd_micros_per_mtok),
            context_tokens: None,
        }];
        capabilities.stop = Stop::Close;
        capabilities.effects = Effects::None;
        // Until the provider's report at the end, what is stated is this adapter's count.
        capabilities.counted_up_ppm = Some(COUNTED_UP_PPM);
        let reach = self.provider.reach_tokens();
        capabilities.reach = Amount::new(reach, Running::price(prices, 0, reach));
    }

    fn output_tokens_max(&self, dispatch: &Dispatch, prompt_tokens: u64) -> u64 {
        let asked = dispatch.max_output_tokens.unwrap_or_else(|| dispatch.grant.tokens.0.saturating_sub(prompt_tokens));
        asked.min(self.config.output_tokens_max.unwrap_or(OUTPUT_TOKENS_MAX)).max(1)
    }

    async fn run(&self, call: Call) -> Outcome {
        let Call { dispatch, meter } = call;
        let prompt = prompt(&dispatch);
        let mut running = Running::new(self.config.prices, &[&prompt.system, &prompt.user]);
        if !meter.fits(running.total()) {
            let (need, grant) = (running.total(), meter.grant());
            let message = format!(
                "grant: {} tokens and {} micro-USD don't cover the prompt (about {} tokens, {} micro-USD); raise the budget",
                grant.tokens, grant.usd_micros, need.in_tokens, need.usd_micros
            );
            return not_called(Code::Budget, message);
        }
        let limit = self.output_tokens_max(&dispatch, running.total().in_tokens.0);
        let model = dispatch.model.as_deref().unwrap_or(&self.config.model);
        let request = self.provider.request(&prompt, model, limit);
        let mut builder = self.client.post(http::join(&self.base, &request.path)).json(&request.body);
        for (name, value) in request.headers {
            builder = builder.header(name, value);
        }
        // Dropping what is sent or read here closes the connection: that is how this adapter stops a provider.
        let response = tokio::select! {
            biased;
            reason = meter.stopped() => return stopped(reason, running.total()),
            response = builder.send() => match response {
                Ok(response) => response,
                Err(error) => return Outcome::Error(http::unsent(&error)),
            },
        };
        if !response.status().is_success() {
            let (status, headers) = (response.status(), response.headers().clone());
            let body = tokio::select! {
                biased;
                _ = meter.stopped() => Vec::new(),
                body = http::error_body(response) => body,
            };
            return Outcome::Error(http::refusal(status, &headers, &body, |body| self.provider.error_body(body)));
        }
        // A limit below the configuration's own came from the budget: an answer that ends at it was cut by the budget.
        let by_budget = limit < self.config.output_tokens_max.unwrap_or(OUTPUT_TOKENS_MAX);
        self.read(response, &meter, &mut running, by_budget).await
    }

    async fn read(&self, mut response: Response, meter: &Meter, running: &mut Running, by_budget: bool) -> Outcome {
        let mut events = Events::new(self.provider.framing());
        let mut answer = Answer::default();
        let mut bytes = 0;
        loop {
            let chunk = tokio::select! {
                biased;
                reason = meter.stopped() => return stopped(reason, running.total()),
                chunk = response.chunk() => match chunk {
                    Ok(chunk) => chunk,
                    Err(error) => return lost(http::describe(&error)),
                },
            };
            let mut deltas = Vec::new();
            let mut garbage = None;
            let mut take = |event: Event| {
                if garbage.is_none() {
                    garbage = self.provider.event(&event, &mut deltas).err();
                }
            };
            match &chunk {
                Some(chunk) => {
                    bytes += chunk.len();
                    if bytes > STREAM_BYTES_MAX || events.feed(chunk, &mut take).is_err() {
                        return lost(format!(
                            "the provider's answer has more than {STREAM_BYTES_MAX} bytes or an event too long"
                        ));
                    }
                }
                None => events.end(&mut take),
            }
            let text = answer.take(deltas, running);
            if !text.is_empty()
                && let Verdict::Stop(reason) = emit(meter, &text, running)
                && !answer.finished
            {
                return stopped(reason, running.total());
            }
            if let Some(Garbage(what)) = garbage {
                if answer.finished {
                    // The answer is whole; only what stands behind it, its usage, can't be read.
                    answer.take(vec![Delta::BadUsage(what)], running);
                    break;
                }
                return lost(format!("the provider sent what is no event of the {} API: {what}", self.provider.name()));
            }
            if let Some(why) = answer.failed {
                return lost(format!("the provider failed in the middle of its answer: {why}"));
            }
            // What was finished costs nothing more; its usage is still to come.
            if !answer.finished && !meter.fits(running.total()) {
                return stopped(StopReason::Grant, running.total());
            }
            if answer.ended || chunk.is_none() {
                break;
            }
        }
        if !answer.finished {
            return lost(format!(
                "the provider's answer ended before it was whole; check that base_url is an endpoint of the {} API",
                self.provider.name()
            ));
        }
        answer.conclude(running, by_budget)
    }
}

impl Handler for Llm {
    fn call(&self, call: Call) -> BoxFuture<'_, Outcome> {
        Box::pin(self.run(call))
    }
}

/// What has come so far.
#[derive(Default)]
struct Answer {
    text: String,
    at_limit: bool,
    finished: bool,
    ended: bool,
    failed: Option<String>,
}

impl Answer {
    /// Counts what came and returns its text.
    fn take(&mut self, deltas: Vec<Delta>, running: &mut Running) -> String {
        let mut text = String::new();
        for delta in deltas {
            match delta {
                Delta::Text(piece) => {
                    running.output(&piece);
                    text.push_str(&piece);
                }
                Delta::Hidden(piece) => running.output(&piece),
                Delta::Usage { in_tokens, out_tokens } => running.report(in_tokens, out_tokens),
                Delta::BadUsage(what) => {
                    tracing::warn!(%what, "the provider's usage can't be true; the call is billed by our own count");
                    running.distrust();
                }
                Delta::Finished { at_limit } => (self.finished, self.at_limit) = (true, self.at_limit || at_limit),
                Delta::End => self.ended = true,
                Delta::Failed(why) => self.failed = Some(why),
            }
        }
        if self.text.len() + text.len() <= ANSWER_BYTES_MAX {
            self.text.push_str(&text);
        }
        text
    }

    fn conclude(self, running: &Running, by_budget: bool) -> Outcome {
        let findings = atp_canonicalizer::fenced(&self.text).map(|found| {
            for refused in &found.refused {
                tracing::debug!(%refused, "a finding of the answer was not taken; its text stays");
            }
            found.values()
        });
        let usage_source = if running.is_reported() { UsageSource::Reported } else { UsageSource::Counted };
        let finish = if self.at_limit && by_budget { Finish::Grant } else { Finish::Complete };
        Outcome::Final(AgentFinal {
            text: None,
            findings: findings.filter(|found| !found.is_empty()),
            confidence_ppm: None,
            cost: running.total(),
            usage_source,
            finish,
        })
    }
}

/// What we counted ourselves is marked as counted: the provider's report at the end may undercut it.
fn emit(meter: &Meter, text: &str, running: &Running) -> Verdict {
    if running.is_reported() {
        meter.emit(Some(text), None, running.total())
    } else {
        meter.emit_counted(Some(text), None, running.total())
    }
}

/// The task and its inputs as plain text; a fence longer than any in an input keeps the parts apart.
pub(crate) fn prompt(dispatch: &Dispatch) -> Prompt {
    let mut user = dispatch.task.clone();
    for input in &dispatch.inputs {
        let longest = input.text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
        let fence = "`".repeat(longest.max(2) + 1);
        let newline = if input.text.ends_with('\n') { "" } else { "\n" };
        user.push_str(&format!("\n\nFile: {}\n{fence}\n{}{newline}{fence}", input.name, input.text));
    }
    Prompt { system: INSTRUCTION.to_owned(), user }
}

/// A call that was ended by closing the connection: billed by our own count, rounded up.
fn stopped(reason: StopReason, cost: Cost) -> Outcome {
    let finish = match reason {
        StopReason::Grant => Finish::Grant,
        StopReason::Cancelled => Finish::Cancelled,
        StopReason::Deadline => return ended(Code::Timeout, "the call's deadline has passed", cost),
        StopReason::Backlog => return ended(Code::Limit, "the router takes the answer too slowly", cost),
    };
    Outcome::Final(AgentFinal { cost, usage_source: UsageSource::Counted, finish, ..AgentFinal::default() })
}

fn ended(code: Code, message: &str, cost: Cost) -> Outcome {
    Outcome::Error(AgentError {
        code,
        message: message.to_owned(),
        retry_after_ms: None,
        cost: Some(cost),
        proof: None,
    })
}

/// The connection or the stream broke: what the provider bills is unknown, so neither a cost nor a proof is stated.
fn lost(message: String) -> Outcome {
    Outcome::Error(AgentError { code: Code::AgentDown, message, retry_after_ms: None, cost: None, proof: None })
}

fn not_called(code: Code, message: String) -> Outcome {
    Outcome::Error(AgentError { code, message, retry_after_ms: None, cost: None, proof: Some(Proof::NotCalled) })
}

/// A token count of a provider's JSON: absent and null are none, anything but a whole number is a bad usage.
pub(crate) fn count(usage: &Value, field: &str, out: &mut Vec<Delta>) -> Option<u64> {
    match &usage[field] {
        Value::Null => None,
        Value::Number(n) if n.as_u64().is_some_and(|n| n <= u64::from(u32::MAX)) => n.as_u64(),
        other => {
            out.push(Delta::BadUsage(format!("{field} is {other}, not a whole number of tokens")));
            None
        }
    }
}

/// An event's data as a JSON object.
pub(crate) fn object(data: &str) -> Result<Value, Garbage> {
    match serde_json::from_str::<Value>(data) {
        Ok(value) if value.is_object() => Ok(value),
        Ok(_) => Err(Garbage("an event is no JSON object".to_owned())),
        Err(error) => Err(Garbage(format!("an event is no JSON: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::CallId;
    use atp_proto::content::InputText;

    fn dispatch() -> Dispatch {
        Dispatch {
            call_id: CallId([1; 10]),
            shard: 0,
            epoch: 1,
            upstream_key: "u".into(),
            task: "Review".into(),
            inputs: vec![
                InputText { name: "a.md".into(), content_type: String::new(), text: "x\n````\ny".into() },
                InputText { name: "b.rs".into(), content_type: String::new(), text: "fn b() {}\n".into() },
            ],
            model: None,
            task_type: String::new(),
            tools: Vec::new(),
            grant: Amount::new(1000, 1000),
            max_output_tokens: None,
            deadline_ms: 1000,
            go_on: false,
        }
    }

    #[test]
    fn each_input_stands_in_a_fence_that_it_cannot_close() {
        let user = prompt(&dispatch()).user;
        assert_eq!(user, "Review\n\nFile: a.md\n`````\nx\n````\ny\n`````\n\nFile: b.rs\n```\nfn b() {}\n```");
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        let field = |change: fn(&mut LlmConfig)| {
            let mut config = LlmConfig::new("m");
            change(&mut config);
            crate::openai::handler(config).map(|_| ()).map_err(|e| e.field)
        };
        assert_eq!(field(|_| {}), Ok(()));
        assert_eq!(field(|c| c.model = " ".into()), Err("model"));
        assert_eq!(field(|c| c.base_url = Some("nowhere".into())), Err("base_url"));
        assert_eq!(field(|c| c.output_tokens_max = Some(0)), Err("output_tokens_max"));
        assert_eq!(field(|c| c.api_key = Some("a\nb".into())), Err("api_key"));
        assert!(
            !format!("{:?}", LlmConfig { api_key: Some("secret".into()), ..LlmConfig::new("m") }).contains("secret")
        );
    }

    #[test]
    fn max_tokens_comes_from_the_router_then_the_grant_and_never_exceeds_the_setting() {
        let llm = crate::openai::handler(LlmConfig { output_tokens_max: Some(500), ..LlmConfig::new("m") }).unwrap();
        let of = |asked: Option<u64>, prompt: u64| {
            llm.output_tokens_max(&Dispatch { max_output_tokens: asked, ..dispatch() }, prompt)
        };
        assert_eq!(of(Some(20), 0), 20);
        assert_eq!(of(Some(501), 0), 500);
        assert_eq!(of(None, 900), 100);
        assert_eq!(of(None, 1000), 1);
    }

    #[test]
    fn counts_are_whole_numbers_or_named() {
        let usage = serde_json::json!({"a": 3, "b": -1, "c": 1.5, "d": "7", "e": 4_294_967_296_u64});
        let mut out = Vec::new();
        assert_eq!(count(&usage, "a", &mut out), Some(3));
        assert_eq!(count(&usage, "missing", &mut out), None);
        assert!(out.is_empty());
        for field in ["b", "c", "d", "e"] {
            assert_eq!(count(&usage, field, &mut out), None);
        }
        assert_eq!(out.len(), 4);
        assert_eq!(out[0], Delta::BadUsage("b is -1, not a whole number of tokens".into()));
    }
}

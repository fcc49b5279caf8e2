//! The script of a scripted agent: what the YAML says, checked, with line, field and fix in every error. Plays nothing.

use super::jitter::{Dice, Jitter};
use crate::config::{ConfigError, Span, Usd};
use atp_proto::content::{
    Effects, EstimateDeclaration, EstimateFigures, EstimateMode, ModelInfo, Status, Stop, Variance,
};
use atp_proto::id::is_id;
use atp_proto::money::parse_usd;
use atp_proto::{Amount, Code, Cost, Tokens, UsdMicros};
use serde::Deserialize;
use serde::de::Error as _;
use serde_saphyr::Spanned;
use std::path::PathBuf;

/// A script, as `atp agent scripted --script FILE` takes it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    pub(crate) name: Spanned<String>,
    #[serde(default)]
    pub(crate) task_types: Vec<String>,
    #[serde(default)]
    pub(crate) models: Vec<Model>,
    #[serde(default = "eight")]
    pub(crate) max_parallel: Spanned<u32>,
    #[serde(default)]
    pub(crate) stop: Stop,
    #[serde(default)]
    pub(crate) reach: Option<Amount>,
    #[serde(default)]
    pub(crate) effects: Effects,
    #[serde(default)]
    pub(crate) idempotent_for: Span,
    #[serde(default)]
    pub(crate) estimate: Option<Estimate>,
    /// Tools of its own; tools that its chunks name and that aren't here are asked of the router.
    #[serde(default)]
    pub(crate) tools: Vec<String>,
    #[serde(default)]
    pub(crate) security_groups: Vec<String>,
    pub(crate) calls: Spanned<Vec<Spanned<Play>>>,
    #[serde(default)]
    pub(crate) status: Vec<Moment>,
    #[serde(default)]
    pub(crate) meter: Option<PathBuf>,
    #[serde(default)]
    pub(crate) seed: u64,
}

fn eight() -> Spanned<u32> {
    Spanned::new(8, serde_saphyr::Location::UNKNOWN, serde_saphyr::Location::UNKNOWN)
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub(crate) id: String,
    #[serde(default)]
    pub(crate) in_usd_per_mtok: Usd,
    #[serde(default)]
    pub(crate) out_usd_per_mtok: Usd,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Estimate {
    #[serde(default)]
    mode: EstimateMode,
    #[serde(default, alias = "tokens_in")]
    in_tokens: u64,
    #[serde(default, alias = "tokens_out")]
    out_tokens: u64,
    #[serde(default)]
    usd: Option<Usd>,
    #[serde(default)]
    p95_tokens: Option<u64>,
    #[serde(default)]
    p95_usd: Option<Usd>,
    #[serde(default)]
    variance: Variance,
    #[serde(default)]
    confidence: Option<Ratio>,
}

/// One call: its chunks, then its fault if it has one, then its final.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Play {
    #[serde(default)]
    pub(crate) chunks: Vec<Chunk>,
    #[serde(default, rename = "final")]
    pub(crate) end: Option<End>,
    #[serde(default)]
    pub(crate) refuse: Option<Refuse>,
    #[serde(default)]
    pub(crate) fault: Option<Fault>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Chunk {
    #[serde(default)]
    pub(crate) after: Jitter<Span>,
    #[serde(default)]
    pub(crate) text: Option<String>,
    #[serde(default = "once")]
    pub(crate) repeat: u64,
    #[serde(default, alias = "tokens_in")]
    pub(crate) in_tokens: Jitter<u64>,
    #[serde(default, alias = "tokens_out")]
    pub(crate) out_tokens: Jitter<u64>,
    #[serde(default)]
    pub(crate) usd_micros: Option<Jitter<u64>>,
    /// Asked for before the chunk is made; `{result}` in its text becomes what came of it.
    #[serde(default)]
    pub(crate) tool: Option<Tool>,
}

/// A request for a tool. The chunk's own cost is that of the run, where it is the agent's own tool.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tool {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) args: serde_json::Value,
    #[serde(default)]
    pub(crate) budget: Amount,
}

fn once() -> u64 {
    1
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct End {
    #[serde(default)]
    pub(crate) after: Jitter<Span>,
    #[serde(default)]
    pub(crate) text: Option<String>,
    #[serde(default)]
    pub(crate) findings: Vec<serde_json::Value>,
    #[serde(default)]
    pub(crate) confidence: Option<Ratio>,
    #[serde(default, alias = "tokens_in")]
    pub(crate) in_tokens: Jitter<u64>,
    #[serde(default, alias = "tokens_out")]
    pub(crate) out_tokens: Jitter<u64>,
    #[serde(default)]
    pub(crate) usd_micros: Option<Jitter<u64>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Refuse {
    pub(crate) code: Code,
    #[serde(default)]
    pub(crate) retry_after: Option<Span>,
}

/// What goes wrong in a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Fault {
    /// The process ends at once.
    Crash,
    /// Nothing is heard of the call any more.
    Hang,
    /// The connection is closed; the call goes on.
    Drop,
    /// A partial that isn't JSON.
    Garbage,
    /// The declared estimate is NaN.
    BadEstimate,
    /// No cost is reported before the final.
    LateUsage,
    /// The provider bills as many output tokens again as it shows, and says so only in the final.
    HiddenTokens,
    /// Each second report is half of the one before.
    FallingTotal,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Moment {
    pub(crate) at: Span,
    pub(crate) status: Status,
    #[serde(default)]
    pub(crate) retry_after: Option<Span>,
    #[serde(default)]
    pub(crate) reason: Option<String>,
}

/// A decimal from 0 to 1, in ppm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ratio(pub(crate) u32);

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        // Millionths of one, like micro-USD of a dollar.
        let ppm = parse_usd(&text).ok().and_then(|ppm| u32::try_from(ppm.0).ok()).filter(|ppm| *ppm <= 1_000_000);
        ppm.map(Self).ok_or_else(|| D::Error::custom(format!("`{text}` is not a decimal from 0 to 1, like 0.9")))
    }
}

/// What tokens cost: micro-USD per million.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Price {
    in_per_mtok: u64,
    out_per_mtok: u64,
}

impl Price {
    /// The price of a running total, rounded up once.
    pub(crate) fn of(self, in_tokens: u64, out_tokens: u64) -> u64 {
        let part = |tokens: u64, price: u64| u128::from(tokens) * u128::from(price);
        let micros = part(in_tokens, self.in_per_mtok).saturating_add(part(out_tokens, self.out_per_mtok));
        u64::try_from(micros.div_ceil(1_000_000)).unwrap_or(u64::MAX)
    }
}

/// What one chunk or final adds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Adds {
    pub(crate) in_tokens: Jitter<u64>,
    pub(crate) out_tokens: Jitter<u64>,
    pub(crate) usd_micros: Option<Jitter<u64>>,
}

impl Adds {
    pub(crate) fn draw(self, dice: &mut Dice) -> (u64, u64, Option<u64>) {
        (self.in_tokens.draw(dice), self.out_tokens.draw(dice), self.usd_micros.map(|usd| usd.draw(dice)))
    }

    fn most(self) -> (u64, u64, Option<u64>) {
        (self.in_tokens.most(), self.out_tokens.most(), self.usd_micros.map(Jitter::most))
    }
}

/// The running total after an increment: a missing amount is what the price of the total's tokens grew by.
pub(crate) fn grown(total: Cost, price: Price, (ins, outs, usd): (u64, u64, Option<u64>)) -> Cost {
    let in_tokens = total.in_tokens.0.saturating_add(ins);
    let out_tokens = total.out_tokens.0.saturating_add(outs);
    let priced = || price.of(in_tokens, out_tokens) - price.of(total.in_tokens.0, total.out_tokens.0);
    let usd_micros = total.usd_micros.0.saturating_add(usd.unwrap_or_else(priced));
    Cost { in_tokens: Tokens(in_tokens), out_tokens: Tokens(out_tokens), usd_micros: UsdMicros(usd_micros) }
}

impl Chunk {
    pub(crate) fn adds(&self) -> Adds {
        Adds { in_tokens: self.in_tokens, out_tokens: self.out_tokens, usd_micros: self.usd_micros }
    }
}

impl End {
    pub(crate) fn adds(&self) -> Adds {
        Adds { in_tokens: self.in_tokens, out_tokens: self.out_tokens, usd_micros: self.usd_micros }
    }
}

impl Script {
    /// Reads and checks a script. A relative `meter` stays relative to the process.
    ///
    /// # Errors
    /// Names line, column, field and fix.
    pub fn parse(yaml: &str) -> Result<Self, ConfigError> {
        let script: Self = serde_saphyr::from_str(yaml).map_err(|error| {
            let place = error.location().map(|at| (at.line(), at.column()));
            let message = error.without_snippet().to_string();
            let fix = "see the example of a script in the documentation of the scripted agent";
            ConfigError { place, ..ConfigError::new("script", message, fix) }
        })?;
        script.check()?;
        Ok(script)
    }

    fn check(&self) -> Result<(), ConfigError> {
        if !is_id(&self.name.value) {
            let message = format!("`{}` is not an agent's handle", self.name.value);
            return Err(wrong(&self.name, "name", message, "use 1 to 64 of A-Z a-z 0-9 . _ -"));
        }
        if self.max_parallel.value == 0 {
            return Err(wrong(&self.max_parallel, "max_parallel", "is 0", "allow at least one call at a time"));
        }
        if self.calls.value.is_empty() {
            let fix = "give at least one call, like `- final: {text: \"done\"}`";
            return Err(wrong(&self.calls, "calls", "is empty", fix));
        }
        for (n, play) in self.calls.value.iter().enumerate() {
            let at = |field: &str| format!("calls[{n}]{field}");
            let has_play = !play.value.chunks.is_empty() || play.value.end.is_some();
            if play.value.refuse.is_some() && (has_play || play.value.fault.is_some()) {
                let message = "stands beside chunks, a final or a fault";
                return Err(wrong(
                    play,
                    &at(".refuse"),
                    message,
                    "a refused call does nothing else; make it its own call",
                ));
            }
            if play.value.refuse.is_none() && !has_play && play.value.fault.is_none() {
                return Err(wrong(play, &at(""), "says nothing", "give it chunks, final, refuse or fault"));
            }
            if let Some(tool) = play.value.chunks.iter().filter_map(|c| c.tool.as_ref()).find(|t| !is_id(&t.name)) {
                let message = format!("`{}` is not a tool's name", tool.name);
                return Err(wrong(play, &at(".chunks[].tool.name"), message, "use 1 to 64 of A-Z a-z 0-9 . _ -"));
            }
            if let Some(i) = play.value.chunks.iter().position(|chunk| chunk.repeat == 0) {
                return Err(wrong(play, &at(&format!(".chunks[{i}].repeat")), "is 0", "repeat at least once"));
            }
        }
        for (n, moment) in self.status.iter().enumerate().skip(1) {
            if moment.at < self.status[n - 1].at {
                let message = "is earlier than the one before";
                return Err(ConfigError::new(format!("status[{n}].at"), message, "write the timeline in order"));
            }
        }
        Ok(())
    }

    /// The tools that its chunks ask the router for.
    pub(crate) fn tools_asked(&self) -> Vec<String> {
        let chunks = self.calls.value.iter().flat_map(|play| &play.value.chunks);
        let names: std::collections::BTreeSet<&String> = chunks.filter_map(|c| Some(&c.tool.as_ref()?.name)).collect();
        names.into_iter().filter(|name| !self.tools.contains(name)).cloned().collect()
    }

    /// The price of a model; of the first one where none is named or the name is unknown.
    pub(crate) fn price(&self, model: Option<&str>) -> Price {
        let named = self.models.iter().find(|m| Some(m.id.as_str()) == model);
        named.or(self.models.first()).map_or_else(Price::default, |m| Price {
            in_per_mtok: m.in_usd_per_mtok.0.0,
            out_per_mtok: m.out_usd_per_mtok.0.0,
        })
    }

    pub(crate) fn model_infos(&self) -> Vec<ModelInfo> {
        let info = |m: &Model| ModelInfo {
            id: m.id.clone(),
            in_usd_micros_per_mtok: Some(m.in_usd_per_mtok.0.0),
            out_usd_micros_per_mtok: Some(m.out_usd_per_mtok.0.0),
            context_tokens: None,
        };
        self.models.iter().map(info).collect()
    }

    pub(crate) fn declared_estimate(&self) -> Option<EstimateDeclaration> {
        self.estimate.as_ref().map(|e| EstimateDeclaration {
            mode: e.mode,
            figures: EstimateFigures {
                in_tokens: Tokens(e.in_tokens),
                out_tokens: Tokens(e.out_tokens),
                usd_micros: e.usd.map(|usd| usd.0),
                p95_tokens: e.p95_tokens.map(Tokens),
                p95_usd_micros: e.p95_usd.map(|usd| usd.0),
                variance: e.variance,
                confidence_ppm: e.confidence.map(|ratio| ratio.0),
            },
        })
    }

    /// The declared reach, or the largest chunk or final of the script.
    pub(crate) fn reach(&self) -> Amount {
        self.reach.unwrap_or_else(|| {
            let largest = |model: Option<&str>| {
                let price = self.price(model);
                let plays = self.calls.value.iter().map(|play| &play.value);
                plays.fold(Amount::ZERO, |most, play| {
                    let chunks = play.chunks.iter().map(Chunk::adds);
                    let doubled = if play.fault == Some(Fault::HiddenTokens) { 2 } else { 1 };
                    chunks.chain(play.end.iter().map(End::adds)).fold(most, |most, adds| {
                        let one = grown(Cost::default(), price, adds.most());
                        let amount = one.amount().unwrap_or(Amount::new(u64::MAX, u64::MAX));
                        most.max(Amount::new(
                            amount.tokens.0.saturating_mul(doubled),
                            amount.usd_micros.0.saturating_mul(doubled),
                        ))
                    })
                })
            };
            let models = self.models.iter().map(|m| largest(Some(&m.id)));
            models.fold(largest(None), Amount::max)
        })
    }

    /// The most that one call can cost, under any model.
    pub(crate) fn worst_case(&self) -> Amount {
        let names = self.models.iter().map(|m| Some(m.id.as_str())).chain([None]);
        let costs = names.flat_map(|name| {
            let price = self.price(name);
            self.calls.value.iter().map(move |play| {
                let mut total = Cost::default();
                let doubled = u64::from(play.value.fault == Some(Fault::HiddenTokens)) + 1;
                for chunk in &play.value.chunks {
                    let (ins, outs, usd) = chunk.adds().most();
                    let n = chunk.repeat.saturating_mul(doubled);
                    let times = |x: u64| x.saturating_mul(n);
                    total = grown(total, price, (times(ins), times(outs), usd.map(times)));
                }
                if let Some(end) = &play.value.end {
                    total = grown(total, price, end.adds().most());
                }
                total.amount().unwrap_or(Amount::new(u64::MAX, u64::MAX))
            })
        });
        costs.fold(Amount::ZERO, Amount::max)
    }
}

fn wrong<T>(at: &Spanned<T>, field: &str, message: impl Into<String>, fix: &str) -> ConfigError {
    let place = (at.referenced.line(), at.referenced.column());
    ConfigError { place: (place.0 > 0).then_some(place), ..ConfigError::new(field, message, fix) }
}

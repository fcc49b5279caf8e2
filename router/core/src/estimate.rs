//! What a call may cost before it runs: mean, deviation, guard band, in integers (ATP-7). Rounds up, never reads a float.

use crate::price::{Price, PriceBook};
use crate::registry::RunCost;
use crate::settings::WindowSettings;
use crate::statistics::Figures;
use atp_proto::content::{Capabilities, EstimateFigures, EstimateMode, Stop};
use atp_proto::money::OutOfRange;
use atp_proto::{Amount, Qos, Tokens, UsdMicros};
use std::sync::Arc;

/// Output tokens of an agent that declares nothing.
pub const CLASS_DEFAULT_OUT_TOKENS: u64 = 1_000;
/// The largest amount that one call may state in a dimension: a million USD, 10^12 tokens.
pub const CALL_AMOUNT_MAX: u64 = 1_000_000_000_000;
/// Tokens beside the text of task and inputs: roles, separators, names.
const FRAMING_TOKENS: u64 = 200;

/// Where an estimate comes from, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Source {
    /// The agent was asked about this very task.
    Preflight = 1,
    /// What such calls really cost.
    Statistics = 2,
    /// What the operator's registry says of them.
    Registry = 3,
    /// What the agent's capabilities say.
    Declared = 4,
    ClassDefault = 5,
}

impl Source {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Statistics => "statistics",
            Self::Registry => "registry",
            Self::Declared => "declared",
            Self::ClassDefault => "class_default",
        }
    }

    /// Of a Reserve; what another version wrote counts as a class default.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let known = [Self::Preflight, Self::Statistics, Self::Registry, Self::Declared];
        known.into_iter().find(|s| s.as_str() == text).unwrap_or(Self::ClassDefault)
    }
}

/// What is known of a call beside its agent's capabilities.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask<'a> {
    /// The prompt, as `prompt_tokens` counts it.
    pub prompt_tokens: u64,
    pub qos: Qos,
    pub category: &'a str,
    /// The agent's answer to `agent.estimate`.
    pub preflight: Option<&'a EstimateFigures>,
    /// The statistics of (agent, model, task type).
    pub learned: Option<Figures>,
    /// The registry's figures of (agent, model).
    pub registered: Option<&'a RunCost>,
}

/// An estimate of one call on one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    pub mean: Amount,
    pub sd: Amount,
    pub guarded: Amount,
    /// What the prompt alone costs.
    pub input: Amount,
    pub source: Source,
    /// Runs that the mean is of; 0 where it isn't of runs.
    pub samples: u64,
    pub model: String,
    pub price: Price,
    pub price_version: Arc<str>,
}

/// Tokens of a prompt, counted from its bytes and rounded up: three bytes a token, which is dear for English prose and
/// about right for code.
#[must_use]
pub fn prompt_tokens(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(3) + FRAMING_TOKENS
}

/// `ceil(sqrt(k^2 * variance))` for k^2 in ppm.
#[must_use]
pub fn guard(k_squared_ppm: u64, variance: u128) -> u64 {
    let product = u128::from(k_squared_ppm).saturating_mul(variance);
    ceil_sqrt(product.div_ceil(1_000_000))
}

fn ceil_sqrt(n: u128) -> u64 {
    let root = n.isqrt();
    u64::try_from(if root * root < n { root + 1 } else { root }).unwrap_or(u64::MAX)
}

/// A mean at an overage factor, rounded up; never below the mean.
#[must_use]
pub fn overage(mean: u64, factor_ppm: u64) -> u64 {
    let product = u128::from(mean) * u128::from(factor_ppm.max(1_000_000));
    u64::try_from(product.div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

/// Tokens of a call of this class, where nothing else is known of it; `None`: only the prompt and
/// `CLASS_DEFAULT_OUT_TOKENS`.
fn class_tokens(category: &str) -> Option<u64> {
    match category {
        "review" | "generated" => Some(40_000),
        "cognitive" => Some(35_000),
        "research" => Some(15_000),
        "oracle" => Some(80_000),
        _ => None,
    }
}

/// Means and deviations before they are guarded.
struct Basis {
    mean: Amount,
    /// What the first grant must cover.
    input: Amount,
    /// Tokens squared, micro-USD squared.
    variance: (u128, u128),
    p95: (Option<u64>, Option<u64>),
    source: Source,
    samples: u64,
}

/// Figures that an agent stated: of this very task, or in its capabilities.
fn stated(f: &EstimateFigures, source: Source, prompt: u64, price: Price) -> Result<Basis, OutOfRange> {
    // An agent that was asked has seen the prompt.
    let known = source == Source::Preflight && f.in_tokens.0 > 0;
    let counted = f.in_tokens.0.max(prompt);
    let in_tokens = if known { f.in_tokens.0 } else { counted };
    let input_usd = price.cost(Tokens(in_tokens), Tokens::ZERO)?;
    let usd = match f.usd_micros {
        // The stated figure is for the stated prompt; what this one has more is paid on top.
        Some(usd) => usd.add(price.cost(Tokens(in_tokens - f.in_tokens.0), Tokens::ZERO)?)?.max(input_usd),
        None => price.cost(Tokens(in_tokens), f.out_tokens)?,
    };
    Ok(Basis {
        mean: Amount { tokens: Tokens(in_tokens).add(f.out_tokens)?, usd_micros: usd },
        // Whatever the agent says: the grant covers the prompt as it is counted here.
        input: Amount { tokens: Tokens(counted), usd_micros: price.cost(Tokens(counted), Tokens::ZERO)? },
        variance: (f.variance.tokens.into(), f.variance.usd_micros.into()),
        p95: (f.p95_tokens.map(|t| t.0), f.p95_usd_micros.map(|u| u.0)),
        source,
        samples: 0,
    })
}

/// What such calls cost so far; what this prompt has more than theirs is paid on top.
fn learned(f: &Figures, prompt: u64, price: Price) -> Result<Basis, OutOfRange> {
    let more = Tokens(prompt.saturating_sub(f.prompt_tokens));
    let input = Amount { tokens: Tokens(prompt), usd_micros: price.cost(Tokens(prompt), Tokens::ZERO)? };
    Ok(Basis {
        mean: f.mean.add(Amount { tokens: more, usd_micros: price.cost(more, Tokens::ZERO)? })?,
        input,
        variance: (f.variance_tokens, f.variance_usd_micros),
        p95: (None, None),
        source: Source::Statistics,
        samples: f.samples,
    })
}

/// What the registry says, never less than the prompt. All tokens count at the dearer rate unless it says how many are the
/// prompt's.
fn registered(cost: &RunCost, prompt: u64, price: Price) -> Result<Basis, OutOfRange> {
    let priced = |tokens: u64| match cost.in_ppm {
        Some(ppm) => {
            let of_prompt = u128::from(tokens) * u128::from(ppm.min(1_000_000)) / 1_000_000;
            let of_prompt = u64::try_from(of_prompt).map_err(|_| OutOfRange)?;
            price.cost(Tokens(of_prompt), Tokens(tokens - of_prompt))
        }
        None if price.in_usd_micros_per_mtok > price.out_usd_micros_per_mtok => {
            price.cost(Tokens(tokens), Tokens::ZERO)
        }
        None => price.cost(Tokens::ZERO, Tokens(tokens)),
    };
    let (mean, sigma) = (cost.mean.max(prompt), cost.deviation());
    let sigma_usd = priced(sigma)?;
    let input = Amount { tokens: Tokens(prompt), usd_micros: price.cost(Tokens(prompt), Tokens::ZERO)? };
    Ok(Basis {
        mean: Amount { tokens: Tokens(mean), usd_micros: priced(mean)? },
        input,
        variance: (u128::from(sigma).pow(2), u128::from(sigma_usd.0).pow(2)),
        p95: (None, None),
        source: Source::Registry,
        samples: cost.runs,
    })
}

/// A guess; half of what it says beyond the prompt is its deviation.
fn guessed(category: &str, prompt: u64, price: Price) -> Result<Basis, OutOfRange> {
    let out = class_tokens(category).map_or(CLASS_DEFAULT_OUT_TOKENS, |all| all.saturating_sub(prompt).max(1));
    let half = |n: u64| u128::from(n / 2) * u128::from(n / 2);
    let usd = price.cost(Tokens(prompt), Tokens(out))?;
    Ok(Basis {
        mean: Amount { tokens: Tokens(prompt).add(Tokens(out))?, usd_micros: usd },
        input: Amount { tokens: Tokens(prompt), usd_micros: price.cost(Tokens(prompt), Tokens::ZERO)? },
        variance: (half(out), half(usd.0)),
        p95: (None, None),
        source: Source::ClassDefault,
        samples: 0,
    })
}

/// The estimate of a call; `None` where the agent can't be called under a budget.
///
/// # Errors
/// When an amount leaves its range: the estimate fails, and a failed estimate is never zero.
pub fn estimate(
    c: &Capabilities,
    ask: &Ask<'_>,
    prices: &PriceBook,
    stream: &WindowSettings,
) -> Result<Option<Estimate>, OutOfRange> {
    let model = c.models.first();
    let (price, price_version) = match model {
        // No model runs: what it costs is what it says.
        None => (Price { in_usd_micros_per_mtok: 0, out_usd_micros_per_mtok: 0 }, "none".into()),
        Some(m) => {
            let own = m.in_usd_micros_per_mtok.zip(m.out_usd_micros_per_mtok);
            let own = own.map(|(i, o)| Price { in_usd_micros_per_mtok: i, out_usd_micros_per_mtok: o });
            let priced = prices.price_for(&m.id, own);
            (priced.price, priced.version)
        }
    };
    let prompt = if model.is_some() { ask.prompt_tokens } else { 0 };
    // Whoever answers preflight needn't declare figures: none of them is no estimate.
    let declared = c
        .estimate
        .as_ref()
        .filter(|e| e.mode == EstimateMode::Declared || e.figures.out_tokens.0 > 0 || e.figures.usd_micros.is_some());
    let nothing = EstimateFigures::default();
    let basis = match (ask.preflight, &ask.learned, ask.registered, declared) {
        (Some(figures), ..) => stated(figures, Source::Preflight, prompt, price)?,
        (None, Some(figures), ..) => learned(figures, prompt, price)?,
        (None, None, Some(cost), _) => registered(cost, prompt, price)?,
        (None, None, None, Some(d)) => stated(&d.figures, Source::Declared, prompt, price)?,
        (None, None, None, None) if model.is_some() => guessed(ask.category, prompt, price)?,
        (None, None, None, None) => stated(&nothing, Source::Declared, prompt, price)?,
    };
    let k2 = ask.qos.k_squared_ppm();
    let band = |mean: u64, variance: u128, p95: Option<u64>| -> Option<u64> {
        let guarded = mean.checked_add(guard(k2, variance))?;
        Some(p95.filter(|p| *p > mean).map_or(guarded, |p| guarded.min(p)))
    };
    let mean = basis.mean;
    // An agent that counts is told less than its hold; the prompt has to fit in that too.
    let margin = c.counted_up_ppm.map_or(0, u64::from).min(1_000_000);
    let mut guarded = Amount::new(
        band(mean.tokens.0, basis.variance.0, basis.p95.0).ok_or(OutOfRange)?,
        band(mean.usd_micros.0, basis.variance.1, basis.p95.1).ok_or(OutOfRange)?,
    )
    // The prompt is counted dearer than it mostly is; its grant covers the count all the same.
    .max(Amount {
        tokens: basis.input.tokens.scale_ppm_up(1_000_000 + margin)?,
        usd_micros: basis.input.usd_micros.scale_ppm_up(1_000_000 + margin)?,
    });
    if c.stop == Stop::None {
        match c.worst_case {
            // What it counts is booked up, and it can't be told to stop before.
            Some(worst) => {
                let up = 1_000_000 + c.counted_up_ppm.map_or(0, u64::from).min(1_000_000);
                let tokens = worst.tokens.scale_ppm_up(up)?;
                guarded = Amount { tokens, usd_micros: worst.usd_micros.scale_ppm_up(up)? }.max(mean);
            }
            None if stream.limit == atp_proto::Limit::NONE => {}
            None => return Ok(None),
        }
    }
    let bound = Amount::new(CALL_AMOUNT_MAX, CALL_AMOUNT_MAX);
    if !guarded.fits(bound) || !mean.fits(bound) {
        return Err(OutOfRange);
    }
    Ok(Some(Estimate {
        mean,
        sd: Amount::new(guard(1_000_000, basis.variance.0), guard(1_000_000, basis.variance.1)),
        guarded,
        input: basis.input,
        source: basis.source,
        samples: basis.samples,
        model: model.map_or_else(String::new, |m| m.id.clone()),
        price,
        price_version,
    }))
}

/// Output tokens that an amount still buys behind a prompt; `None` where nothing limits them.
#[must_use]
pub fn output_tokens(amount: Amount, input: Amount, price: Price) -> Option<u64> {
    let by_tokens = (amount.tokens != Tokens::MAX).then(|| amount.tokens.less(input.tokens).0);
    let by_usd = (amount.usd_micros != UsdMicros::MAX && price.out_usd_micros_per_mtok > 0).then(|| {
        let money = u128::from(amount.usd_micros.less(input.usd_micros).0) * 1_000_000;
        u64::try_from(money / u128::from(price.out_usd_micros_per_mtok)).unwrap_or(u64::MAX)
    });
    match (by_tokens, by_usd) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use atp_proto::content::{EstimateDeclaration, ModelInfo, Variance};

    fn ask(prompt_tokens: u64, qos: Qos) -> Ask<'static> {
        Ask { prompt_tokens, qos, ..Ask::default() }
    }

    fn agent(figures: EstimateFigures) -> Capabilities {
        Capabilities {
            models: vec![ModelInfo {
                id: "m1".into(),
                in_usd_micros_per_mtok: Some(1_000_000),
                out_usd_micros_per_mtok: Some(4_000_000),
                context_tokens: None,
            }],
            estimate: Some(EstimateDeclaration { figures, ..EstimateDeclaration::default() }),
            ..Capabilities::default()
        }
    }

    #[test]
    fn guard_bands_are_exact() {
        // sigma = 500: k = 2, 1, 1/2.
        assert_eq!(guard(Qos::Gold.k_squared_ppm(), 250_000), 1_000);
        assert_eq!(guard(Qos::Silver.k_squared_ppm(), 250_000), 500);
        assert_eq!(guard(Qos::Bronze.k_squared_ppm(), 250_000), 250);
        assert_eq!(guard(1_000_000, 2), 2);
        assert_eq!(guard(0, u64::MAX.into()), 0);
        assert_eq!(guard(4_000_000, u64::MAX.into()), 8_589_934_592);
    }

    #[test]
    fn p95_caps_the_guard_only_above_the_mean() {
        let figures = |p95| EstimateFigures {
            in_tokens: Tokens(100),
            out_tokens: Tokens(500),
            usd_micros: Some(UsdMicros(100_000)),
            variance: Variance { tokens: 250_000, usd_micros: 400_000_000 },
            p95_tokens: p95,
            ..EstimateFigures::default()
        };
        let window = WindowSettings::default();
        let run =
            |p95| estimate(&agent(figures(p95)), &ask(64, Qos::Gold), &PriceBook::empty(), &window).unwrap().unwrap();
        assert_eq!(run(None).guarded, Amount::new(1_600, 140_000));
        assert_eq!(run(Some(Tokens(900))).guarded.tokens, Tokens(900));
        assert_eq!(run(Some(Tokens(600))).guarded.tokens, Tokens(1_600));
    }

    #[test]
    fn the_prompt_is_never_free() {
        let e = estimate(
            &agent(EstimateFigures::default()),
            &ask(300, Qos::Silver),
            &PriceBook::empty(),
            &WindowSettings::default(),
        );
        let e = e.unwrap().unwrap();
        assert_eq!((e.mean, e.input), (Amount::new(300, 300), Amount::new(300, 300)));
        assert_eq!(prompt_tokens(4), 202);
    }

    #[test]
    fn output_is_what_the_tighter_dimension_buys() {
        let price = Price { in_usd_micros_per_mtok: 1_000_000, out_usd_micros_per_mtok: 4_000_000 };
        assert_eq!(output_tokens(Amount::new(1_000, 500), Amount::new(100, 100), price), Some(100));
        assert_eq!(output_tokens(Amount::new(150, 500), Amount::new(100, 100), price), Some(50));
        assert_eq!(output_tokens(Amount::new(u64::MAX, u64::MAX), Amount::ZERO, price), None);
    }

    #[test]
    fn an_agent_that_cannot_be_stopped_needs_a_worst_case() {
        let mut c = agent(EstimateFigures::default());
        c.stop = Stop::None;
        let window = crate::settings::Settings::default().stream_window;
        assert_eq!(estimate(&c, &ask(64, Qos::Silver), &PriceBook::empty(), &window), Ok(None));
        c.worst_case = Some(Amount::new(9_000, 9_000));
        assert_eq!(
            estimate(&c, &ask(64, Qos::Silver), &PriceBook::empty(), &window).unwrap().unwrap().guarded,
            Amount::new(9_000, 9_000)
        );
        c.counted_up_ppm = Some(100_000);
        assert_eq!(
            estimate(&c, &ask(64, Qos::Silver), &PriceBook::empty(), &window).unwrap().unwrap().guarded,
            Amount::new(9_900, 9_900)
        );
    }

    #[test]
    fn the_best_source_that_there_is_counts() {
        let window = WindowSettings::default();
        let prices = PriceBook::empty();
        let run = |c: &Capabilities, ask: &Ask<'_>| {
            let e = estimate(c, ask, &prices, &window).unwrap().unwrap();
            (e.source, e.samples, e.mean, e.guarded)
        };
        let declared = agent(EstimateFigures { out_tokens: Tokens(500), ..EstimateFigures::default() });
        let plain = ask(100, Qos::Silver);
        assert_eq!(run(&declared, &plain), (Source::Declared, 0, Amount::new(600, 2_100), Amount::new(600, 2_100)));
        let figures = Figures {
            samples: 3,
            mean: Amount::new(1_100, 4_000),
            variance_tokens: 70_000,
            variance_usd_micros: 1_000_000,
            prompt_tokens: 100,
            latency_ms: 10,
        };
        // 1,100 tokens at the dearer rate; sigma = ceil(300,000 / 1,282) = 235 tokens.
        let cost = RunCost { mean: 1_100, p90: 1_400, runs: 7, preliminary: false, in_ppm: None };
        let registered = Ask { registered: Some(&cost), ..plain };
        let as_registered = (Source::Registry, 7, Amount::new(1_100, 4_400), Amount::new(1_335, 5_340));
        assert_eq!(run(&declared, &registered), as_registered);
        // 1,100 at 600,000 ppm: 660 of the prompt, 440 of the answer; 235: 141 and 94.
        let split = RunCost { in_ppm: Some(600_000), ..cost };
        let split = Ask { registered: Some(&split), ..plain };
        assert_eq!(
            run(&declared, &split),
            (Source::Registry, 7, Amount::new(1_100, 660 + 4 * 440), Amount::new(1_335, 2_420 + 141 + 4 * 94))
        );
        // Never less than the prompt.
        assert_eq!(run(&declared, &Ask { prompt_tokens: 2_000, ..registered }).2, Amount::new(2_000, 8_000));
        let learned = Ask { learned: Some(figures), ..registered };
        // sqrt(70,000) = 264.58
        let as_learned = (Source::Statistics, 3, Amount::new(1_100, 4_000), Amount::new(1_365, 5_000));
        assert_eq!(run(&declared, &learned), as_learned);
        // A prompt that is longer by 50 tokens is paid on top, a shorter one gives nothing back.
        let longer = Ask { prompt_tokens: 150, ..learned };
        assert_eq!(run(&declared, &longer).2, Amount::new(1_150, 4_050));
        assert_eq!(run(&declared, &Ask { prompt_tokens: 10, ..learned }).2, Amount::new(1_100, 4_000));
        let asked = EstimateFigures { in_tokens: Tokens(80), out_tokens: Tokens(20), ..EstimateFigures::default() };
        let preflight = Ask { preflight: Some(&asked), ..learned };
        // The agent counts 80 tokens in the prompt, the router 100: its grant covers those.
        assert_eq!(run(&declared, &preflight), (Source::Preflight, 0, Amount::new(100, 160), Amount::new(100, 160)));
        let less = EstimateFigures { out_tokens: Tokens(5), ..asked.clone() };
        let less = Ask { preflight: Some(&less), ..learned };
        assert_eq!(run(&declared, &less), (Source::Preflight, 0, Amount::new(85, 100), Amount::new(100, 100)));
        let silent = Capabilities { estimate: None, ..declared };
        assert_eq!(run(&silent, &plain).0, Source::ClassDefault);
        assert_eq!(run(&silent, &plain).2, Amount::new(1_100, 4_100));
        let review = Ask { category: "review", ..plain };
        assert_eq!(run(&silent, &review).2, Amount::new(40_000, 100 + 39_900 * 4));
    }

    #[test]
    fn an_agent_that_answers_preflight_and_declares_nothing_is_not_free() {
        let mut c = agent(EstimateFigures::default());
        c.estimate.as_mut().unwrap().mode = EstimateMode::Preflight;
        let e = estimate(&c, &ask(100, Qos::Silver), &PriceBook::empty(), &WindowSettings::default());
        assert_eq!(e.unwrap().unwrap().source, Source::ClassDefault);
    }

    #[test]
    fn a_grant_covers_the_prompt_as_it_is_counted() {
        let c = agent(EstimateFigures::default());
        let figures = Figures {
            samples: 5,
            mean: Amount::new(120, 120),
            variance_tokens: 0,
            variance_usd_micros: 0,
            prompt_tokens: 300,
            latency_ms: 1,
        };
        let learned = Ask { learned: Some(figures), ..ask(300, Qos::Gold) };
        let e = estimate(&c, &learned, &PriceBook::empty(), &WindowSettings::default()).unwrap().unwrap();
        assert_eq!((e.mean, e.guarded), (Amount::new(120, 120), Amount::new(300, 300)));
    }
}

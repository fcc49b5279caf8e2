//! What a call may cost before it runs: mean, deviation, guard band, in integers (ATP-7). Rounds up, never reads a float.

use crate::price::{Price, PriceBook};
use crate::settings::WindowSettings;
use atp_proto::content::{Capabilities, Stop};
use atp_proto::money::OutOfRange;
use atp_proto::{Amount, Qos, Tokens, UsdMicros};
use std::sync::Arc;

/// Output tokens of an agent that declares nothing.
pub const CLASS_DEFAULT_OUT_TOKENS: u64 = 1_000;
/// The largest amount that one call may state in a dimension: a million USD, 10^12 tokens.
pub const CALL_AMOUNT_MAX: u64 = 1_000_000_000_000;
/// Tokens beside the text of task and inputs: roles, separators, names.
const FRAMING_TOKENS: u64 = 200;

/// An estimate of one call on one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Estimate {
    pub mean: Amount,
    pub sd: Amount,
    pub guarded: Amount,
    /// What the prompt alone costs.
    pub input: Amount,
    pub source: &'static str,
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
pub fn guard(k_squared_ppm: u64, variance: u64) -> u64 {
    let product = u128::from(k_squared_ppm) * u128::from(variance);
    ceil_sqrt(product.div_ceil(1_000_000))
}

fn ceil_sqrt(n: u128) -> u64 {
    let root = n.isqrt();
    u64::try_from(if root * root < n { root + 1 } else { root }).unwrap_or(u64::MAX)
}

/// The estimate of a call whose prompt has `prompt` tokens; `None` where the agent can't be called under a budget.
///
/// # Errors
/// When an amount leaves its range: the estimate fails, and a failed estimate is never zero.
pub fn estimate(
    c: &Capabilities,
    prompt: u64,
    qos: Qos,
    prices: &PriceBook,
    stream: &WindowSettings,
) -> Result<Option<Estimate>, OutOfRange> {
    let declared = c.estimate.as_ref().map(|e| &e.figures);
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
    let stated_in = declared.map_or(0, |d| d.in_tokens.0);
    let in_tokens = if model.is_some() { stated_in.max(prompt) } else { stated_in };
    let (out_tokens, source) = match declared {
        Some(d) => (d.out_tokens.0, "declared"),
        None if model.is_some() => (CLASS_DEFAULT_OUT_TOKENS, "class_default"),
        None => (0, "declared"),
    };
    let tokens = Tokens(in_tokens).add(Tokens(out_tokens))?;
    let input_usd = price.cost(Tokens(in_tokens), Tokens::ZERO)?;
    let usd = match declared.and_then(|d| d.usd_micros) {
        // The declared figure is for the declared prompt; what this one has more is paid on top.
        Some(usd) => usd.add(price.cost(Tokens(in_tokens - stated_in), Tokens::ZERO)?)?.max(input_usd),
        None => price.cost(Tokens(in_tokens), Tokens(out_tokens))?,
    };
    let variance = match declared {
        Some(d) => d.variance,
        // A class default is a guess: half of it is its deviation.
        None => {
            let half = |n: u64| (n / 2).saturating_mul(n / 2);
            atp_proto::content::Variance { tokens: half(out_tokens), usd_micros: half(usd.0) }
        }
    };
    let k2 = qos.k_squared_ppm();
    let band = |mean: u64, variance: u64, p95: Option<u64>| -> Option<u64> {
        let guarded = mean.checked_add(guard(k2, variance))?;
        Some(p95.filter(|p| *p > mean).map_or(guarded, |p| guarded.min(p)))
    };
    let p95_tokens = declared.and_then(|d| d.p95_tokens).map(|t| t.0);
    let p95_usd = declared.and_then(|d| d.p95_usd_micros).map(|u| u.0);
    let mut guarded = Amount::new(
        band(tokens.0, variance.tokens, p95_tokens).ok_or(OutOfRange)?,
        band(usd.0, variance.usd_micros, p95_usd).ok_or(OutOfRange)?,
    );
    let mean = Amount { tokens, usd_micros: usd };
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
        sd: Amount::new(guard(1_000_000, variance.tokens), guard(1_000_000, variance.usd_micros)),
        guarded,
        input: Amount { tokens: Tokens(in_tokens), usd_micros: input_usd },
        source,
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
    use atp_proto::content::{EstimateDeclaration, EstimateFigures, ModelInfo, Variance};

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
        assert_eq!(guard(0, u64::MAX), 0);
        assert_eq!(guard(4_000_000, u64::MAX), 8_589_934_592);
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
        let run = |p95| estimate(&agent(figures(p95)), 64, Qos::Gold, &PriceBook::empty(), &window).unwrap().unwrap();
        assert_eq!(run(None).guarded, Amount::new(1_600, 140_000));
        assert_eq!(run(Some(Tokens(900))).guarded.tokens, Tokens(900));
        assert_eq!(run(Some(Tokens(600))).guarded.tokens, Tokens(1_600));
    }

    #[test]
    fn the_prompt_is_never_free() {
        let e = estimate(
            &agent(EstimateFigures::default()),
            300,
            Qos::Silver,
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
        assert_eq!(estimate(&c, 64, Qos::Silver, &PriceBook::empty(), &window), Ok(None));
        c.worst_case = Some(Amount::new(9_000, 9_000));
        assert_eq!(
            estimate(&c, 64, Qos::Silver, &PriceBook::empty(), &window).unwrap().unwrap().guarded,
            Amount::new(9_000, 9_000)
        );
        c.counted_up_ppm = Some(100_000);
        assert_eq!(
            estimate(&c, 64, Qos::Silver, &PriceBook::empty(), &window).unwrap().unwrap().guarded,
            Amount::new(9_900, 9_900)
        );
    }
}

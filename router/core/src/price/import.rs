//! Reads price files: LiteLLM's price map and models.dev's JSON. Decimals are read as text, exactly, and rounded up;
//! a binary floating point number never stands between a price and a bill.

use super::{Price, PriceBook};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Why a price file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    #[error("the price file isn't JSON: {0}; give LiteLLM's price map or models.dev's JSON")]
    Json(String),
    #[error("price of model `{model}`: {problem}; {fix}")]
    Model { model: String, problem: String, fix: &'static str },
    #[error("price of model `{model}`, field `{field}`: {problem}; give a number of 0 or more")]
    Field { model: String, field: &'static str, problem: String },
}

/// One model of LiteLLM's map: USD per token.
#[derive(Deserialize)]
struct LiteLlm<'a> {
    #[serde(borrow)]
    input_cost_per_token: Option<&'a RawValue>,
    #[serde(borrow)]
    output_cost_per_token: Option<&'a RawValue>,
    #[serde(borrow)]
    output_cost_per_reasoning_token: Option<&'a RawValue>,
}

/// One provider of models.dev.
#[derive(Deserialize)]
struct Provider<'a> {
    #[serde(borrow)]
    models: BTreeMap<String, &'a RawValue>,
}

#[derive(Deserialize)]
struct Listed<'a> {
    #[serde(borrow)]
    cost: Option<Listing<'a>>,
}

/// The prices of one model of models.dev: USD per million tokens.
#[derive(Deserialize)]
struct Listing<'a> {
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    output: Option<&'a RawValue>,
    #[serde(borrow)]
    reasoning: Option<&'a RawValue>,
}

/// True for an entry that is a provider with models, not a model.
#[derive(Deserialize)]
struct Shape<'a> {
    #[serde(borrow)]
    models: Option<&'a RawValue>,
}

/// Names of the three fields and the power of ten that makes micro-USD per million tokens of them.
struct Format {
    input: &'static str,
    output: &'static str,
    reasoning: &'static str,
    power: i64,
}

const LITELLM: Format = Format {
    input: "input_cost_per_token",
    output: "output_cost_per_token",
    reasoning: "output_cost_per_reasoning_token",
    power: 12,
};
const MODELS_DEV: Format = Format { input: "cost.input", output: "cost.output", reasoning: "cost.reasoning", power: 6 };

pub(super) fn parse(text: &str) -> Result<PriceBook, PriceError> {
    let entries: BTreeMap<String, &RawValue> =
        serde_json::from_str(text).map_err(|e| PriceError::Json(e.to_string()))?;
    let mut book = PriceBook::empty();
    let mut qualified = Vec::new();
    for (name, raw) in &entries {
        let shape: Shape<'_> = object(name, raw)?;
        if shape.models.is_some_and(|m| m.get().starts_with('{')) {
            provider(&mut book, &mut qualified, name, object(name, raw)?)?;
        } else if name != "sample_spec" {
            let m: LiteLlm<'_> = object(name, raw)?;
            let fields = [m.input_cost_per_token, m.output_cost_per_token, m.output_cost_per_reasoning_token];
            if let Some(price) = price(&mut book, name, &LITELLM, fields)? {
                book.insert(name, price);
            }
        }
    }
    // Last: `a/m` is a's own price also where a reseller lists a model of that name.
    for (id, price) in qualified {
        book.insert(&id, price);
    }
    book.version = format!("local-{}", crate::record::hex(&Sha256::digest(text.as_bytes())[..4])).into();
    Ok(book)
}

fn provider(
    book: &mut PriceBook,
    qualified: &mut Vec<(String, Price)>,
    provider: &str,
    listed: Provider<'_>,
) -> Result<(), PriceError> {
    for (model, raw) in &listed.models {
        let id = format!("{provider}/{model}");
        let entry: Listed<'_> = object(&id, raw)?;
        let fields = entry.cost.map_or([None; 3], |c| [c.input, c.output, c.reasoning]);
        let Some(price) = price(book, &id, &MODELS_DEV, fields)? else { continue };
        let dearest = book.models.get(model.as_str()).map_or(price, |known| known.max(price));
        book.insert(model, dearest);
        qualified.push((id, price));
    }
    Ok(())
}

fn object<'a, T: Deserialize<'a>>(model: &str, raw: &'a RawValue) -> Result<T, PriceError> {
    serde_json::from_str(raw.get()).map_err(|e| PriceError::Model {
        model: model.to_owned(),
        problem: e.to_string(),
        fix: "give an object with its prices",
    })
}

/// `None` where a price is missing: the model is noted as skipped.
fn price(
    book: &mut PriceBook,
    model: &str,
    format: &Format,
    [input, output, reasoning]: [Option<&RawValue>; 3],
) -> Result<Option<Price>, PriceError> {
    let read = |field: &'static str, raw: Option<&RawValue>| {
        let scaled = raw.map(|raw| scale_up(raw.get(), format.power)).transpose();
        scaled.map_err(|problem| PriceError::Field { model: model.to_owned(), field, problem })
    };
    let (input, output) = (read(format.input, input)?, read(format.output, output)?);
    let reasoning = read(format.reasoning, reasoning)?.unwrap_or(0);
    let missing = match (input, output) {
        // Thinking tokens are counted as output: where they cost more, all output does.
        (Some(input), Some(output)) => return Ok(Some(Price::new(input, output.max(reasoning)))),
        (None, _) => format.input,
        (_, None) => format.output,
    };
    book.skipped.push(format!("model `{model}` has no `{missing}`: not in the book"));
    Ok(None)
}

/// A JSON number's text times 10^`power` as an integer, rounded up.
fn scale_up(text: &str, power: i64) -> Result<u64, String> {
    let shown = || text.chars().take(40).collect::<String>();
    if text.starts_with('-') && text.bytes().any(|b| matches!(b, b'1'..=b'9')) {
        return Err(format!("`{}` is negative", shown()));
    }
    let number = text.strip_prefix('-').unwrap_or(text);
    // JSON was parsed already: what begins with a digit is a number of its grammar.
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("`{}` isn't a number", shown()));
    }
    let large = || format!("`{}` is larger than a price can be", shown());
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = whole.bytes().chain(fraction.bytes()).map(|b| u128::from(b - b'0')).skip_while(|d| *d == 0);
    let (mut value, mut kept, mut cut, mut lost) = (0_u128, 0, 0_i64, false);
    for digit in digits {
        if kept < 30 {
            (value, kept) = (value * 10 + digit, kept + 1);
        } else {
            (cut, lost) = (cut + 1, lost || digit != 0);
        }
    }
    if value == 0 {
        return Ok(0);
    }
    // An exponent beyond i64 can only be far too large or far too small.
    let exponent =
        exponent.parse::<i64>().unwrap_or(if exponent.starts_with('-') { i64::MIN / 2 } else { i64::MAX / 2 });
    let fraction = i64::try_from(fraction.len()).unwrap_or(i64::MAX / 4);
    let shift = exponent.saturating_add(power).saturating_sub(fraction).saturating_add(cut);
    let power_of_ten = |n: u64| u32::try_from(n).ok().and_then(|n| 10_u128.checked_pow(n));
    let scaled = if shift >= 0 {
        let factor = power_of_ten(shift.unsigned_abs()).ok_or_else(large)?;
        value.checked_mul(factor).ok_or_else(large)?
    } else {
        power_of_ten(shift.unsigned_abs()).map_or(1, |divisor| value.div_ceil(divisor))
    };
    // `value` was cut: what was lost counts as one more where the quotient is exact.
    let exact = shift >= 0 || power_of_ten(shift.unsigned_abs()).is_some_and(|d| value % d == 0);
    u64::try_from(scaled + u128::from(lost && exact)).map_err(|_| large())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn decimals_are_exact_and_rounded_up() {
        for (text, power, value) in [
            ("1.5e-07", 12, 150_000),
            ("2.5e-06", 12, 2_500_000),
            ("0.0000025", 12, 2_500_000),
            ("3E-6", 12, 3_000_000),
            ("4.6875e-09", 12, 4_688),
            ("1e-12", 12, 1),
            ("1e-13", 12, 1),
            ("1e-400", 12, 1),
            ("1e-99999999999999999999", 12, 1),
            ("1.0000000000000000000000000000000000001e-6", 12, 1_000_001),
            ("1.0000000000000000000000000000000000000e-6", 12, 1_000_000),
            ("0", 12, 0),
            ("0.0e5", 12, 0),
            ("-0.0", 12, 0),
            ("0e99999999999999999999", 12, 0),
            ("3", 6, 3_000_000),
            ("0.075", 6, 75_000),
            ("1e2", 6, 100_000_000),
            ("18446744.073709551615", 12, u64::MAX),
        ] {
            assert_eq!(scale_up(text, power), Ok(value), "{text}");
        }
    }

    #[test]
    fn what_is_no_price_is_refused() {
        for bad in
            ["-1", "-1e-9", "\"1\"", "true", "[1]", "{}", "18446744.073709551616", "1e9", "1e99999999999999999999"]
        {
            assert!(scale_up(bad, 12).is_err(), "{bad}");
        }
    }

    #[test]
    fn errors_name_model_and_field() {
        assert_eq!(
            error(r#"{"m": {"input_cost_per_token": -1e-6, "output_cost_per_token": 1e-6}}"#),
            "price of model `m`, field `input_cost_per_token`: `-1e-6` is negative; give a number of 0 or more"
        );
        assert_eq!(
            error(r#"{"m": {"input_cost_per_token": 1e-6, "output_cost_per_token": "NaN"}}"#),
            "price of model `m`, field `output_cost_per_token`: `\"NaN\"` isn't a number; give a number of 0 or more"
        );
        assert_eq!(
            error(r#"{"p": {"models": {"m": {"cost": {"input": 1, "output": -2}}}}}"#),
            "price of model `p/m`, field `cost.output`: `-2` is negative; give a number of 0 or more"
        );
        assert!(error(r#"{"m": {"input_cost_per_token": NaN}}"#).contains("isn't JSON: expected value at line 1"));
        assert!(error(r#"{"m": 3}"#).starts_with("price of model `m`: "));
        assert!(error("[]").contains("give LiteLLM's price map"));
    }

    #[test]
    fn litellm_models_without_both_prices_are_listed() {
        let book = parse(
            r#"{"sample_spec": {"input_cost_per_token": "x"},
                "half": {"input_cost_per_token": 1e-6, "output_cost_per_token": null, "mode": "embedding"},
                "free": {"input_cost_per_token": 0, "output_cost_per_token": 0.0},
                "thinks": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6, "output_cost_per_reasoning_token": 3e-6}}"#,
        )
        .expect("valid");
        assert_eq!(book.skipped(), ["model `half` has no `output_cost_per_token`: not in the book"]);
        assert_eq!(book.lookup("free"), Some(&Price::new(0, 0)), "the operator may say so");
        assert_eq!(book.lookup("thinks"), Some(&Price::new(1_000_000, 3_000_000)));
        assert_eq!(book.len(), 2);
    }

    #[test]
    fn models_dev_is_read() {
        let book = parse(
            r#"{"anthropic": {"id": "anthropic", "name": "Anthropic", "models": {
                  "claude-x": {"id": "claude-x", "cost": {"input": 3, "output": 15, "cache_read": 0.3}, "limit": {"context": 200000}},
                  "claude-open": {"id": "claude-open"}}},
                "reseller": {"id": "reseller", "models": {
                  "anthropic/claude-x": {"cost": {"input": 9, "output": 9}},
                  "claude-x": {"cost": {"input": 3.5, "output": 14}}}}}"#,
        )
        .expect("valid");
        assert_eq!(book.lookup("anthropic/claude-x"), Some(&Price::new(3_000_000, 15_000_000)));
        assert_eq!(book.lookup("reseller/claude-x"), Some(&Price::new(3_500_000, 14_000_000)));
        assert_eq!(book.lookup("claude-x"), Some(&Price::new(3_500_000, 15_000_000)), "the dearest of its providers");
        assert_eq!(book.skipped(), ["model `anthropic/claude-open` has no `cost.input`: not in the book"]);
    }
}

//! The price book: what a model's tokens cost. A dated snapshot is built in; a local file overrides it.
//! It never guesses low: a model that nobody prices costs as much as the dearest one known, and is flagged.

mod import;

use atp_proto::money::OutOfRange;
use atp_proto::{Tokens, UsdMicros};
use std::collections::BTreeMap;
use std::sync::Arc;

pub use import::PriceError;

macro_rules! snapshot {
    () => {
        "litellm-1.80.0-2025-11"
    };
}

/// Above this a price is taken for a slip of units in its source: it prices its own model, never an unknown one.
const PLAUSIBLE_MAX: u64 = 1_000_000_000;

/// What an unknown model costs by an empty book: the dearest of the built-in snapshot.
const DEAREST_BUILTIN: Price = Price::new(218_750_000, 600_000_000);

/// Price of a model in micro-USD per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Price {
    pub in_usd_micros_per_mtok: u64,
    pub out_usd_micros_per_mtok: u64,
}

impl Price {
    /// Micro-USD per million tokens: 2.50 USD is 2,500,000.
    #[must_use]
    pub const fn new(in_usd_micros_per_mtok: u64, out_usd_micros_per_mtok: u64) -> Self {
        Self { in_usd_micros_per_mtok, out_usd_micros_per_mtok }
    }

    /// Cost of a running total, rounded up once.
    ///
    /// # Errors
    /// When it leaves `u64`.
    pub fn cost(self, in_tokens: Tokens, out_tokens: Tokens) -> Result<UsdMicros, OutOfRange> {
        let part = |tokens: Tokens, price: u64| u128::from(tokens.0) * u128::from(price);
        // Each product is below 2^128 - 2^65, but their sum may not be.
        let total = part(in_tokens, self.in_usd_micros_per_mtok)
            .checked_add(part(out_tokens, self.out_usd_micros_per_mtok))
            .ok_or(OutOfRange)?;
        u64::try_from(total.div_ceil(1_000_000)).map(UsdMicros).map_err(|_| OutOfRange)
    }

    /// Component-wise maximum.
    #[must_use]
    pub fn max(self, o: Self) -> Self {
        Self::new(
            self.in_usd_micros_per_mtok.max(o.in_usd_micros_per_mtok),
            self.out_usd_micros_per_mtok.max(o.out_usd_micros_per_mtok),
        )
    }
}

/// Whose price it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PriceSource {
    Book,
    /// The book lacks the model; its agent's declared price.
    Declared,
    /// Nobody prices the model: the dearest known.
    Dearest,
}

/// The price of one call and where it comes from, as its Reserve records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Priced {
    pub price: Price,
    /// The book's version; `declared`; or the book's version and `:dearest`.
    pub version: Arc<str>,
    /// True: nobody prices this model, the operator should.
    pub flagged: bool,
    pub source: PriceSource,
}

/// Prices by model id. Empty by default.
#[derive(Clone, Debug)]
pub struct PriceBook {
    models: BTreeMap<Box<str>, Price>,
    version: Arc<str>,
    dearest: Option<Price>,
    skipped: Vec<String>,
}

impl Default for PriceBook {
    fn default() -> Self {
        Self::empty()
    }
}

impl PriceBook {
    /// No model; version `none`.
    #[must_use]
    pub fn empty() -> Self {
        Self { models: BTreeMap::new(), version: "none".into(), dearest: None, skipped: Vec::new() }
    }

    /// The dated snapshot that ships with the router (`ops/prices.py` makes it).
    #[must_use]
    pub fn builtin() -> Self {
        let text = include_str!(concat!("price/", snapshot!(), ".json"));
        let mut book = Self::parse(text).expect("the shipped snapshot was parsed by a test");
        book.version = snapshot!().into();
        book
    }

    /// Reads LiteLLM's price map or models.dev's JSON; version `local-` and 8 hex digits of the text's SHA-256.
    /// Models without both prices are left out and listed in `skipped`. Of models.dev each model is known as
    /// `provider/model`, and as `model` at the dearest of its providers.
    ///
    /// # Errors
    /// Not JSON, neither of the two formats, or a price that isn't a number of 0 or more: names model and field.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        import::parse(text)
    }

    fn insert(&mut self, model: &str, price: Price) {
        self.models.insert(model.into(), price);
        if price.in_usd_micros_per_mtok.max(price.out_usd_micros_per_mtok) <= PLAUSIBLE_MAX {
            self.dearest = Some(self.dearest.map_or(price, |d| d.max(price)));
        }
    }

    /// Every price of `other` replaces the one here; the version names both.
    pub fn overlay(&mut self, other: Self) {
        for (model, price) in other.models {
            self.insert(&model, price);
        }
        self.version =
            if &*self.version == "none" { other.version } else { format!("{}+{}", self.version, other.version).into() };
        self.skipped.extend(other.skipped);
    }

    /// The price of `model`: by its id; else without what stands before a `/` (`openai/gpt-4o` is `gpt-4o`; one prefix
    /// after the other); else the same without a date at the end (`-20250929`, `-2025-08-07`, `@20250929`).
    #[must_use]
    pub fn lookup(&self, model: &str) -> Option<&Price> {
        let prefixes = || {
            let rests = model.match_indices('/').map(|(at, _)| &model[at + 1..]);
            std::iter::once(model).chain(rests)
        };
        prefixes().chain(prefixes().filter_map(without_date)).find_map(|id| self.models.get(id))
    }

    /// Component-wise the dearest of all plausible prices (up to 1,000 USD per million tokens).
    #[must_use]
    pub fn dearest(&self) -> Price {
        self.dearest.unwrap_or(DEAREST_BUILTIN)
    }

    /// `litellm-1.80.0-2025-11`; with an override `litellm-1.80.0-2025-11+local-<8 hex>`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Models that were left out of the book, each with the reason.
    #[must_use]
    pub fn skipped(&self) -> &[String] {
        &self.skipped
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.models.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// The book's price, else what the agent declares, else the dearest known, flagged.
    #[must_use]
    pub fn price_for(&self, model: &str, declared: Option<Price>) -> Priced {
        if let Some(price) = self.lookup(model) {
            let version = Arc::clone(&self.version);
            return Priced { price: *price, version, flagged: false, source: PriceSource::Book };
        }
        match declared {
            Some(price) => Priced { price, version: "declared".into(), flagged: false, source: PriceSource::Declared },
            None => Priced {
                price: self.dearest(),
                version: format!("{}:dearest", self.version).into(),
                flagged: true,
                source: PriceSource::Dearest,
            },
        }
    }
}

/// The id without a date at its end.
fn without_date(id: &str) -> Option<&str> {
    let dated = |shape: &str| {
        let at = id.len().checked_sub(shape.len())?;
        let tail = id.as_bytes().get(at..)?;
        let fits = tail.iter().zip(shape.bytes()).all(|(b, s)| match s {
            b'9' => b.is_ascii_digit(),
            b'-' if shape.len() == 9 => matches!(b, b'-' | b'@'),
            _ => *b == s,
        });
        // All of the tail is ASCII, so `at` is a boundary of characters.
        (fits && at > 0).then(|| &id[..at])
    };
    dated("-99999999").or_else(|| dated("-9999-99-99"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(models: &[(&str, u64, u64)]) -> PriceBook {
        let mut book = PriceBook::empty();
        for (model, input, output) in models {
            book.insert(model, Price::new(*input, *output));
        }
        book
    }

    #[test]
    fn the_running_total_is_rounded_up_once() {
        let price = Price::new(2_500_000, 10_000_000);
        assert_eq!(price.cost(Tokens(1_000), Tokens(500)), Ok(UsdMicros(7_500)));
        assert_eq!(price.cost(Tokens(1), Tokens(0)), Ok(UsdMicros(3)));
        assert_eq!(Price::new(1, 1).cost(Tokens(1), Tokens(1)), Ok(UsdMicros(1)));
        assert_eq!(Price::new(1, 1).cost(Tokens(500_000), Tokens(500_001)), Ok(UsdMicros(2)));
        assert_eq!(Price::new(1, 1).cost(Tokens(500_000), Tokens(500_000)), Ok(UsdMicros(1)));
        assert_eq!(price.cost(Tokens(0), Tokens(0)), Ok(UsdMicros(0)));
    }

    #[test]
    fn a_cost_out_of_range_is_an_error() {
        let dear = Price::new(u64::MAX, u64::MAX);
        assert_eq!(dear.cost(Tokens(1_000_000), Tokens(0)), Ok(UsdMicros(u64::MAX)));
        assert_eq!(dear.cost(Tokens(1_000_000), Tokens(1)), Err(OutOfRange));
        assert_eq!(dear.cost(Tokens::MAX, Tokens::MAX), Err(OutOfRange));
    }

    #[test]
    fn the_snapshot_has_known_prices() {
        let book = PriceBook::builtin();
        assert_eq!(book.version(), "litellm-1.80.0-2025-11");
        assert_eq!(book.len(), 1252);
        assert!(book.skipped().is_empty());
        let price = |model| book.lookup(model).copied();
        assert_eq!(price("gpt-4o"), Some(Price::new(2_500_000, 10_000_000)));
        assert_eq!(price("gpt-4o-mini"), Some(Price::new(150_000, 600_000)));
        assert_eq!(price("claude-sonnet-4-5"), Some(Price::new(3_000_000, 15_000_000)));
        assert_eq!(price("gemini-2.5-flash"), Some(Price::new(300_000, 2_500_000)));
        assert_eq!(price("gemini-1.5-flash-exp-0827"), Some(Price::new(4_688, 4_688)), "4.6875e-09 is rounded up");
        assert_eq!(book.dearest(), DEAREST_BUILTIN);
    }

    #[test]
    fn a_thinking_token_that_costs_more_sets_the_output_price() {
        let book = PriceBook::builtin();
        assert_eq!(book.lookup("dashscope/qwen-turbo-latest"), Some(&Price::new(50_000, 500_000)));
    }

    #[test]
    fn ids_are_found_exactly_then_without_prefix_then_without_date() {
        let book = book(&[("m", 1, 1), ("eu/m", 2, 2), ("m-2025-08-07", 3, 3), ("n", 4, 4)]);
        let input = |model| book.lookup(model).map(|p| p.in_usd_micros_per_mtok);
        assert_eq!(input("m"), Some(1));
        assert_eq!(input("eu/m"), Some(2));
        assert_eq!(input("azure/eu/m"), Some(2));
        assert_eq!(input("azure/us/m"), Some(1));
        assert_eq!(input("x/m-2025-08-07"), Some(3), "a prefix goes before a date");
        assert_eq!(input("eu/m-20250807"), Some(2));
        assert_eq!(input("n-20250929"), Some(4));
        assert_eq!(input("vertex/n@20250929"), Some(4));
        assert_eq!(input("x/n-2025-09-29"), Some(4));
        for unknown in ["", "n-2025", "n-2025-9-29", "n20250929", "-20250929", "x/", "n@2025-09-29", "é-2025092x"] {
            assert_eq!(input(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn who_sets_the_price() {
        let book = book(&[("m", 1, 9), ("o", 5, 2), ("slip", 2 * PLAUSIBLE_MAX, 1)]);
        let declared = Some(Price::new(7, 7));
        assert_eq!(book.price_for("m", declared).price, Price::new(1, 9));
        let priced = book.price_for("other", declared);
        assert_eq!((priced.price, &*priced.version, priced.flagged), (Price::new(7, 7), "declared", false));
        let priced = book.price_for("other", None);
        assert_eq!((priced.price, priced.flagged), (Price::new(5, 9), true), "each dimension at its dearest");
        assert_eq!((&*priced.version, priced.source), ("none:dearest", PriceSource::Dearest));
        assert_eq!(PriceBook::empty().price_for("m", None).price, DEAREST_BUILTIN, "never free");
    }

    #[test]
    fn a_local_price_wins() {
        let mut prices = PriceBook::builtin();
        let local = r#"{"gpt-4o": {"input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06}}"#;
        prices.overlay(PriceBook::parse(local).expect("valid"));
        assert_eq!(prices.lookup("gpt-4o"), Some(&Price::new(1_000_000, 2_000_000)));
        assert_eq!(prices.lookup("gpt-4o-mini"), Some(&Price::new(150_000, 600_000)));
        assert_eq!(prices.version(), "litellm-1.80.0-2025-11+local-5d3f0c4f");
    }
}

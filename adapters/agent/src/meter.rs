//! The running cost of one answer: counted by us until the provider reports, priced on the total and rounded up once.
//! It only counts; stopping is `llm`'s.

use crate::llm::Prices;
use crate::tokens;
use atp_proto::{Cost, Tokens, UsdMicros};

/// Tokens that a provider's template puts around each part of a prompt.
const TEMPLATE_TOKENS: u64 = 16;

/// Counts are rounded up: what is counted guards the grant, and a report may only undercut it.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    prices: Option<Prices>,
    prompt: u64,
    /// Output since the last report.
    output: u64,
    in_reported: Option<u64>,
    out_reported: Option<u64>,
    distrusted: bool,
}

impl Running {
    pub(crate) fn new(prices: Option<Prices>, prompt: &[&str]) -> Self {
        let prompt = prompt.iter().map(|part| tokens::upper(part) + TEMPLATE_TOKENS).sum();
        Self { prices, prompt, output: 0, in_reported: None, out_reported: None, distrusted: false }
    }

    /// One piece of output: at least one token, as providers stream no half ones.
    pub(crate) fn output(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.output += tokens::upper(piece).max(1);
        }
    }

    /// Totals as the provider states them; what came before them is no longer counted by us.
    pub(crate) fn report(&mut self, in_tokens: Option<u64>, out_tokens: Option<u64>) {
        self.in_reported = in_tokens.max(self.in_reported);
        if let Some(out) = out_tokens {
            self.out_reported = Some(out).max(self.out_reported);
            self.output = 0;
        }
    }

    /// A report was nonsense: from now on our own counts stand beside whatever is reported.
    pub(crate) fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// True when the whole cost is the provider's own word.
    pub(crate) fn is_reported(&self) -> bool {
        !self.distrusted && self.in_reported.is_some() && self.out_reported.is_some() && self.output == 0
    }

    /// What this answer has cost at most.
    pub(crate) fn total(&self) -> Cost {
        self.cost(self.in_reported.unwrap_or(self.prompt), self.out_reported.unwrap_or(0) + self.output)
    }

    fn cost(&self, in_tokens: u64, out_tokens: u64) -> Cost {
        Cost {
            in_tokens: Tokens(in_tokens),
            out_tokens: Tokens(out_tokens),
            usd_micros: UsdMicros(Self::price(self.prices, in_tokens, out_tokens)),
        }
    }

    /// micro-USD of a total, rounded up once; 0 without prices, where the router's own price book decides.
    pub(crate) fn price(prices: Option<Prices>, in_tokens: u64, out_tokens: u64) -> u64 {
        let Some(prices) = prices else { return 0 };
        let total = u128::from(in_tokens) * u128::from(prices.in_usd_micros_per_mtok)
            + u128::from(out_tokens) * u128::from(prices.out_usd_micros_per_mtok);
        u64::try_from(total.div_ceil(1_000_000)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRICES: Option<Prices> =
        Some(Prices { in_usd_micros_per_mtok: 1_000_000, out_usd_micros_per_mtok: 4_000_000 });

    #[test]
    fn reports_replace_counts_and_later_output_is_counted_on_top() {
        let mut running = Running::new(PRICES, &["a prompt of some words"]);
        running.output("one");
        running.output(" two");
        assert!(!running.is_reported());
        running.report(Some(7), None);
        assert!(!running.is_reported());
        running.report(None, Some(5));
        assert!(running.is_reported());
        let total = Cost { in_tokens: Tokens(7), out_tokens: Tokens(5), usd_micros: UsdMicros(27) };
        assert_eq!(running.total(), total);
        running.output("more");
        assert_eq!(running.total().out_tokens, Tokens(6));
        assert!(!running.is_reported());
    }

    #[test]
    fn totals_never_fall_and_nonsense_is_not_trusted() {
        let mut running = Running::new(PRICES, &["p"]);
        running.report(Some(10), Some(10));
        running.report(Some(9), Some(3));
        assert_eq!(running.total().out_tokens, Tokens(10));
        assert_eq!(running.total().in_tokens, Tokens(10));
        running.distrust();
        assert!(!running.is_reported());
    }

    #[test]
    fn prices_are_rounded_up_once_on_the_total() {
        let prices = Some(Prices { in_usd_micros_per_mtok: 1, out_usd_micros_per_mtok: 1 });
        assert_eq!(Running::price(prices, 1, 1), 1);
        assert_eq!(Running::price(prices, 0, 0), 0);
        assert_eq!(Running::price(prices, 500_000, 500_001), 2);
        assert_eq!(
            Running::price(Some(Prices { in_usd_micros_per_mtok: u64::MAX, out_usd_micros_per_mtok: 0 }), u64::MAX, 0),
            u64::MAX
        );
        assert_eq!(Running::price(None, 9, 9), 0);
    }
}

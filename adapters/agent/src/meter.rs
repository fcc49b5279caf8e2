//! The running cost of one answer: counted by us until the provider reports, priced on the total and rounded up once.
//! It only counts; stopping is `llm`'s.

use crate::llm::Prices;
use crate::tokens;
use atp_proto::{Amount, Cost, Tokens, UsdMicros};

/// Tokens that a provider's template puts around each part of a prompt.
const TEMPLATE_TOKENS: u64 = 16;

/// Two counts are kept where the provider hasn't reported: an upper one that guards the grant, and a lower one that a
/// running total may state without having to fall later.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    prices: Option<Prices>,
    prompt: Count,
    /// Output since the last report.
    output: Count,
    in_reported: Option<u64>,
    out_reported: Option<u64>,
    distrusted: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Count {
    upper: u64,
    lower: u64,
}

impl Running {
    pub(crate) fn new(prices: Option<Prices>, prompt: &[&str]) -> Self {
        let mut count = Count::default();
        for part in prompt {
            count.upper += tokens::upper(part) + TEMPLATE_TOKENS;
            count.lower += tokens::lower(part);
        }
        Self {
            prices,
            prompt: count,
            output: Count::default(),
            in_reported: None,
            out_reported: None,
            distrusted: false,
        }
    }

    /// One piece of output: at least one token, as providers stream no half ones.
    pub(crate) fn output(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.output.upper += tokens::upper(piece).max(1);
            self.output.lower += tokens::lower(piece).max(1);
        }
    }

    /// Totals as the provider states them; what came before them is no longer counted by us.
    pub(crate) fn report(&mut self, in_tokens: Option<u64>, out_tokens: Option<u64>) {
        self.in_reported = in_tokens.max(self.in_reported);
        if let Some(out) = out_tokens {
            self.out_reported = Some(out).max(self.out_reported);
            self.output = Count::default();
        }
    }

    /// A report was nonsense: from now on our own counts stand beside whatever is reported.
    pub(crate) fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// True when the whole cost is the provider's own word.
    pub(crate) fn is_reported(&self) -> bool {
        !self.distrusted && self.in_reported.is_some() && self.out_reported.is_some() && self.output.upper == 0
    }

    /// The most that this answer has cost.
    pub(crate) fn upper(&self) -> Cost {
        self.cost(self.in_reported.unwrap_or(self.prompt.upper), self.out_reported.unwrap_or(0) + self.output.upper)
    }

    /// What a partial states. Close to the grant that is the upper count: the router must see what the guard sees, or it
    /// would extend too late. Elsewhere it is the lower one, which the provider's report can only raise.
    pub(crate) fn said(&self, grant: Amount) -> Cost {
        let upper = self.upper();
        let near = Amount::new(grant.tokens.0 - grant.tokens.0 / 8, grant.usd_micros.0 - grant.usd_micros.0 / 8);
        if !upper.amount().is_ok_and(|spent| spent.fits(near)) {
            return upper;
        }
        self.cost(self.in_reported.unwrap_or(self.prompt.lower), self.out_reported.unwrap_or(0) + self.output.lower)
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
    const WIDE: Amount = Amount { tokens: Tokens(u64::MAX), usd_micros: UsdMicros(u64::MAX) };

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
        assert_eq!((running.upper(), running.said(WIDE)), (total, total));
        running.output("more");
        assert_eq!(running.upper().out_tokens, Tokens(6));
        assert!(!running.is_reported());
    }

    #[test]
    fn totals_never_fall_and_nonsense_is_not_trusted() {
        let mut running = Running::new(PRICES, &["p"]);
        running.report(Some(10), Some(10));
        running.report(Some(9), Some(3));
        assert_eq!(running.upper().out_tokens, Tokens(10));
        assert_eq!(running.upper().in_tokens, Tokens(10));
        running.distrust();
        assert!(!running.is_reported());
    }

    #[test]
    fn near_the_grant_the_upper_count_is_stated() {
        let mut running = Running::new(None, &["word ".repeat(100).as_str()]);
        running.output("internationalization");
        let upper = running.upper().amount().unwrap().tokens.0;
        assert!(running.said(WIDE).in_tokens < running.upper().in_tokens);
        assert_eq!(running.said(Amount::new(upper, u64::MAX)), running.upper());
        assert!(running.said(Amount::new(upper * 2, u64::MAX)).in_tokens < running.upper().in_tokens);
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

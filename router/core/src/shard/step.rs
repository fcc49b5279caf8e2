//! An account's ladder and pace as they bear on a task's offers: which step its money allows, and who is held back.
//! The arithmetic is in `ladder` and `pacing`; reserves nothing.

use super::Shard;
use super::offer::{Offer, stream_qos};
use crate::account::{Level, window_begin};
use crate::clock::rfc3339;
use crate::estimate::{CALL_AMOUNT_MAX, Estimate};
use crate::ladder::{OnLimit, Purse, Rung, Step, place, walk};
use crate::pacing::{Mode, Pace};
use crate::price::{Price, PriceBook};
use crate::record::Faster;
use crate::view::{FasterView, PaceView};
use atp_proto::content::{ModelInfo, Stop};
use atp_proto::{Amount, Tokens};

impl Shard {
    /// What the levels leave to this stream: limit - settled, and what of that is neither held nor claimed by who came before.
    pub(super) fn money(&self, tenant: &str, no: u64, stream: &Level) -> (Amount, Amount) {
        let (window, at, _) = self.window_now(tenant);
        let account = window.level();
        let mut free = account.free();
        let left = if self.is_home(tenant) {
            let of = self.state.stream(no).map_or((u32::MAX, u64::MAX), |s| (stream_qos(s) as u32, s.accepted_at));
            free = free.less(self.wishes_before(tenant, of.0, of.1));
            account.left()
        } else {
            self.left_elsewhere(tenant)
        };
        if let Some(book) = self.books.get(tenant) {
            free = free.less(self.claims(book, no, &at.window));
        }
        (left.min(stream.left()), free.min(stream.free()))
    }

    pub(super) fn on_limit(&self, tenant: &str) -> OnLimit {
        self.account_settings(tenant).on_limit.unwrap_or_default()
    }

    /// The offers at the best step of the account's ladder that can be paid now, else at the cheapest one it may wait at. Each
    /// keeps its agent or, where the task names none, may go to another agent that has the step's model.
    pub(super) fn stepped(
        &self,
        tenant: &str,
        no: u64,
        stream: &Level,
        named: bool,
        floor: &str,
        offers: Vec<Offer>,
    ) -> Vec<Offer> {
        let account = self.account_settings(tenant);
        let on_limit = self.on_limit(tenant);
        if !on_limit.downgrade || offers.is_empty() {
            return offers;
        }
        let (left, free) = self.money(tenant, no, stream);
        let free = if self.runs_short(tenant) { Amount::ZERO } else { free };
        let rung = |offer: &Offer, allowed| Rung {
            mean: offer.estimate.mean,
            guarded: offer.estimate.guarded,
            least: super::offer::first_grant(offer),
            whole: offer.capabilities.stop == Stop::None,
            allowed,
        };
        let first = rung(&offers[0], true);
        if first.purse(left, free) == Purse::Now {
            return offers;
        }
        let floors = account.floor.as_deref().into_iter().chain(Some(floor).filter(|f| !f.is_empty()));
        // A floor that the ladder doesn't know forbids every step down: too dear rather than too low.
        let lowest = floors.map(|f| place(&account.ladder, f)).min().unwrap_or(Some(usize::MAX));
        let top = place(&account.ladder, &offers[0].estimate.model);
        let (mut rungs, mut steps) = (vec![first], vec![offers.clone()]);
        for at in top.map_or(0, |top| top + 1)..account.ladder.len() {
            let step = self.at_place(&account.ladder, at, named, &offers);
            if let Some(best) = step.first() {
                rungs.push(rung(best, lowest.is_some_and(|lowest| at <= lowest)));
                steps.push(step);
            }
        }
        match walk(&rungs, on_limit, left, free) {
            Step::Run(i) | Step::Queue(i) => steps.swap_remove(i),
            Step::Refuse => offers,
        }
    }

    /// The offers with the model at one place of the ladder. Who lacks it stays as it is when named, else falls out.
    fn at_place(&self, ladder: &[String], at: usize, named: bool, offers: &[Offer]) -> Vec<Offer> {
        let moved = |offer: &Offer| -> Option<Offer> {
            let model = offer.capabilities.models.iter().find(|m| place(ladder, &m.id) == Some(at));
            let Some(model) = model.filter(|m| m.id != offer.estimate.model) else {
                return (named || model.is_some()).then(|| offer.clone());
            };
            // What can't be stopped is held at its declared worst case, whatever its model costs: no step for it.
            if offer.capabilities.stop == Stop::None {
                return named.then(|| offer.clone());
            }
            let estimate = at_model(&offer.estimate, model, &self.settings.prices)?;
            let why = format!("{}; downgrade: {} for {}", offer.why, model.id, offer.estimate.model);
            Some(Offer { estimate, why, ..offer.clone() })
        };
        let step: Vec<Offer> = offers.iter().filter_map(moved).collect();
        // Named agents come all or none, and the step has to change the one that pays first.
        let same = step
            .first()
            .zip(offers.first())
            .is_some_and(|(a, b)| a.estimate.model == b.estimate.model && a.agent == b.agent);
        if same || (named && step.len() != offers.len()) { Vec::new() } else { step }
    }

    // ---- pace -------------------------------------------------------------------------------------------------------

    /// The account's pace in its current window; `None` where it isn't paced.
    pub(super) fn pace(&self, tenant: &str) -> Option<(Mode, Pace)> {
        let settings = self.account_settings(tenant);
        // The home lends no more than the pace allows.
        let mode = settings.pacing.filter(|_| self.is_home(tenant))?;
        let (window, ..) = self.window_now(tenant);
        let ends_ms = window.ends_ms?;
        let level = window.level();
        let pace = Pace {
            begins_ms: window_begin(settings.per, ends_ms)?,
            ends_ms,
            limit: level.limit,
            used: level.settled.add(level.held).unwrap_or(level.settled),
            faster: self.faster(tenant).map(|f| f.more.into()).unwrap_or_default(),
        };
        Some((mode, pace))
    }

    /// The authorisation that counts now.
    fn faster(&self, tenant: &str) -> Option<&Faster> {
        let newest = self.state.accounts.get(tenant)?.faster.as_ref();
        newest.filter(|f| self.clock.logged_ms() < f.until_ms)
    }

    /// True while an enforced pace lets no new call of this account begin.
    pub(super) fn is_held_back(&self, tenant: &str) -> bool {
        self.pace(tenant).is_some_and(|(mode, pace)| mode == Mode::Enforce && pace.is_ahead(self.clock.logged_ms()))
    }

    pub(super) fn pace_view(&self, tenant: &str) -> Option<PaceView> {
        let (mode, pace) = self.pace(tenant)?;
        let at = self.clock.logged_ms();
        let line = pace.line(at);
        let ahead = pace.is_ahead(at);
        Some(PaceView {
            mode: mode.as_str().into(),
            ahead,
            line: atp_proto::Limit {
                tokens: pace.limit.tokens.map(|_| line.tokens),
                usd_micros: pace.limit.usd_micros.map(|_| line.usd_micros),
            },
            per_hour: pace.rate_per_hour(at),
            resumes_at: ahead.then(|| rfc3339(pace.resumes_ms(at))),
            faster: self.faster(tenant).map(|f| {
                let (more, until, by) = (f.more.into(), rfc3339(f.until_ms), f.by.clone());
                FasterView { more, until, by }
            }),
        })
    }
}

/// The estimate of the same work on another model: the same tokens at that model's price.
fn at_model(e: &Estimate, model: &ModelInfo, prices: &PriceBook) -> Option<Estimate> {
    let own = model.in_usd_micros_per_mtok.zip(model.out_usd_micros_per_mtok).map(|(i, o)| Price::new(i, o));
    let priced = prices.price_for(&model.id, own);
    let usd = |tokens: Tokens| {
        let input = e.input.tokens.min(tokens);
        priced.price.cost(input, tokens.less(input)).ok()
    };
    let amount = |tokens: Tokens| Some(Amount { tokens, usd_micros: usd(tokens)? });
    let guarded = amount(e.guarded.tokens)?;
    let deviation = priced.price.cost(Tokens::ZERO, e.sd.tokens).ok()?;
    guarded.fits(Amount::new(CALL_AMOUNT_MAX, CALL_AMOUNT_MAX)).then_some(())?;
    Some(Estimate {
        mean: amount(e.mean.tokens)?,
        sd: Amount { tokens: e.sd.tokens, usd_micros: deviation },
        guarded,
        input: amount(e.input.tokens)?,
        model: model.id.clone(),
        price: priced.price,
        price_version: priced.version,
        ..e.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_model_costs_its_own_price() {
        let e = Estimate {
            mean: Amount::new(600, 9_000),
            sd: Amount::new(100, 1_500),
            guarded: Amount::new(700, 10_500),
            input: Amount::new(100, 500),
            source: crate::estimate::Source::Declared,
            samples: 0,
            model: "big".into(),
            price: Price::new(5_000_000, 15_000_000),
            price_version: "x".into(),
        };
        let model = ModelInfo {
            id: "small".into(),
            in_usd_micros_per_mtok: Some(1_000_000),
            out_usd_micros_per_mtok: Some(4_000_000),
            context_tokens: None,
        };
        let cheap = at_model(&e, &model, &PriceBook::empty()).expect("priced");
        assert_eq!((cheap.mean, cheap.guarded), (Amount::new(600, 2_100), Amount::new(700, 2_500)));
        assert_eq!((cheap.input, cheap.sd.usd_micros.0), (Amount::new(100, 100), 400));
        assert_eq!((cheap.model.as_str(), &*cheap.price_version), ("small", "declared"));
    }
}

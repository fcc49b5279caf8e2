//! What the provider bills for a simulated agent's call, told to the checker; it never goes over the wire.

use super::Process;
use crate::simulation::check::Check;
use crate::simulation::sched::Sched;
use atp_proto::{Amount, CallId, Tokens};

impl Process {
    pub(super) fn bill(&mut self, _s: &mut Sched, check: &mut Check, id: CallId) {
        let Some(call) = self.calls.get(&id) else { return };
        let total = self.plan.price(call.in_tokens, call.out_tokens);
        let amount = total.amount().expect("small numbers");
        let reach = self.plan.capabilities.reach;
        let allowed = Amount {
            tokens: Tokens(call.grant.tokens.0.saturating_add(reach.tokens.0)),
            usd_micros: atp_proto::UsdMicros(call.grant.usd_micros.0.saturating_add(reach.usd_micros.0)),
        };
        let breach = call.breach;
        check.bill(self.index, id, total, amount.less(allowed), breach);
    }

    /// What a provider still makes after the decision to stop: anything up to grant and reach.
    pub(super) fn bill_tail(&mut self, s: &mut Sched, check: &mut Check, id: CallId) {
        let reach = self.plan.capabilities.reach;
        let (in_price, out_price) = (self.plan.in_price, self.plan.out_price);
        let Some(call) = self.calls.get_mut(&id) else { return };
        if call.out_tokens == 0 {
            return;
        }
        let room_tokens =
            (call.grant.tokens.0.saturating_add(reach.tokens.0)).saturating_sub(call.in_tokens + call.out_tokens);
        let micros = u128::from(call.grant.usd_micros.0.saturating_add(reach.usd_micros.0)) * 1_000_000;
        let spent = u128::from(call.in_tokens * in_price + call.out_tokens * out_price);
        let room_micros = micros.saturating_sub(spent) / u128::from(out_price);
        let room = room_tokens.min(u64::try_from(room_micros).unwrap_or(u64::MAX)).min(reach.tokens.0);
        call.out_tokens += s.rng.range(0, room);
        self.bill(s, check, id);
    }
}

//! What a Tool record does to a call: its hold grows by what a mediated tool costs, and the request is remembered.

use super::fold::range;
use super::{Done, State};
use crate::account::replace;
use crate::record::{Tool, ToolVerdict};
use crate::stream::Phase;
use crate::tool::{Asked, OTHER};
use atp_proto::Amount;

impl State {
    pub(super) fn tool(&mut self, r: &Tool) -> Done {
        let (_, stream) = self.open_stream(&r.key)?;
        let named = stream.tool_permissions.contains(&r.tool);
        let call = stream.call_mut(r.lane).ok_or("no such lane")?;
        if call.phase() != Phase::Running {
            return Err(format!("lane {} isn't running", r.lane));
        }
        let (from, windows) = (call.hold(), call.reserve.windows.clone());
        let tools = call.tools.get_or_insert_with(Box::default);
        // A tool that the task doesn't name has no line of its own: their number isn't bounded.
        let totals = tools.totals.entry(if named { r.tool.clone() } else { OTHER.into() }).or_default();
        match r.verdict() {
            ToolVerdict::Done => {
                let asked = tools.asked.iter_mut().find(|a| a.msg_seq == r.msg_seq);
                let asked = asked.filter(|a| a.verdict() == ToolVerdict::Allowed);
                asked.ok_or_else(|| format!("no tool runs for message {}", r.msg_seq))?.set_verdict(ToolVerdict::Done);
                return Ok(());
            }
            ToolVerdict::Reported => {
                totals.own = Amount::from(totals.own).max(r.cost.into()).into();
                return Ok(());
            }
            ToolVerdict::Allowed | ToolVerdict::Own => totals.allowed = totals.allowed.saturating_add(1),
            ToolVerdict::Refused => totals.refused = totals.refused.saturating_add(1),
        }
        if tools.asked.iter().any(|a| a.msg_seq == r.msg_seq) {
            return Err(format!("message {} asked already", r.msg_seq));
        }
        let cost = if r.verdict() == ToolVerdict::Allowed { Amount::from(r.cost) } else { Amount::ZERO };
        if let Some(totals) = tools.totals.get_mut(&r.tool) {
            totals.mediated = Amount::from(totals.mediated).add(cost).map_err(range)?.into();
        }
        tools.cost = Amount::from(tools.cost).add(cost).map_err(range)?.into();
        tools.remember(Asked {
            msg_seq: r.msg_seq,
            tool: r.tool.clone(),
            verdict: r.verdict,
            cost: cost.into(),
            error: r.error.clone(),
        });
        if cost.is_zero() {
            return Ok(());
        }
        let to = from.add(cost).map_err(range)?;
        call.hold = to.into();
        replace(&mut stream.held, from, to).map_err(range)?;
        self.move_held(&windows, from, to)
    }
}

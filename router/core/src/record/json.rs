//! Records as `replay` prints them.

use super::{AmountPb, CostPb, LimitPb, Record, Shared, ToolVerdict, hex};
use atp_proto::Limit;
use bytes::Bytes;
use serde_json::{Value, json};

impl Record {
    /// The record's own fields as JSON, for `replay`. Frames are shown by the caller, who has the JSON view.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let amount = |a: &AmountPb| json!({"tokens": a.tokens, "usd_micros": a.usd_micros});
        let cost =
            |c: &CostPb| json!({"in_tokens": c.in_tokens, "out_tokens": c.out_tokens, "usd_micros": c.usd_micros});
        let limit = |l: &LimitPb| serde_json::to_value(Limit::from(*l)).unwrap_or_default();
        let document = |b: &Bytes| serde_json::from_slice::<Value>(b).unwrap_or_default();
        let shared = |s: &Shared| {
            json!({"account": s.account, "window": s.window, "per": s.per, "current": s.current, "calls": s.calls,
                "ends_at": s.ends_ms.map(crate::clock::rfc3339), "amount": amount(&s.amount)})
        };
        match self {
            Self::Genesis(r) => {
                json!({"log_id": hex(&r.log_id), "format": r.format, "shards": r.shards, "hash_seed": r.hash_seed})
            }
            Self::Epoch(r) => {
                json!({"log_id": hex(&r.log_id), "shard": r.shard, "owner": r.owner, "incarnation": r.incarnation})
            }
            Self::Window(r) => json!({"account": r.account, "window": r.window, "limit": limit(&r.limit), "per": r.per,
                "ends_at": r.ends_ms.map(crate::clock::rfc3339)}),
            Self::Accept(r) => {
                json!({"payload_hash": hex(&r.payload_hash), "idempotency_key": r.idempotency_key, "account": r.account,
                "limit": limit(&r.limit), "max_parallel": r.max_parallel, "deadline_ms": r.deadline_ms, "qos": r.qos, "task_type": r.task_type, "host": r.host,
                "security_groups_any": r.security_groups_any, "languages": r.languages, "category": r.category,
                "rule": r.rule, "floor": r.floor, "escalate_on": r.escalate_on, "escalate_to": r.escalate_to})
            }
            Self::Faster(r) => json!({"account": r.account, "more": amount(&r.more), "by": r.by,
                "until": crate::clock::rfc3339(r.until_ms)}),
            Self::Deny(r) => {
                json!({"payload_hash": hex(&r.payload_hash), "idempotency_key": r.idempotency_key, "error": document(&r.error)})
            }
            Self::Reserve(r) => {
                json!({"calls": r.calls.iter().map(|c| json!({"call_id": r.key.call(c.lane), "lane": c.lane, "retry_of": c.retry_of,
                "agent": c.agent, "model": c.model, "mean": amount(&c.mean), "sd": amount(&c.sd), "source": c.source, "samples": c.samples,
                "k_ppm": c.k_ppm, "guarded": amount(&c.guarded), "hold": amount(&c.hold), "deadline_ms": c.deadline_ms,
                "windows": c.windows.iter().map(|w| json!({"account": w.account, "window": w.window})).collect::<Vec<_>>(),
                "price_version": c.price_version, "in_price": c.in_price, "out_price": c.out_price,
                "prompt_tokens": c.prompt_tokens, "overage_ppm": c.overage_ppm, "rule": c.rule})).collect::<Vec<_>>()})
            }
            Self::Intent(r) => {
                json!({"call_id": r.key.call(r.lane), "lane": r.lane, "agent": r.agent, "incarnation": r.incarnation,
                "upstream_key": r.upstream_key, "reach": amount(&r.reach), "external": r.external, "idempotent_for_ms": r.idempotent_for_ms,
                "slices": r.slices, "counted_up_ppm": r.counted_up_ppm, "margin_ppm": r.margin_ppm, "host": r.host})
            }
            Self::Extend(r) => json!({"call_id": r.key.call(r.lane), "lane": r.lane, "hold": amount(&r.hold)}),
            Self::Settle(r) => {
                json!({"call_id": r.key.call(r.lane), "lane": r.lane, "actual": cost(&r.actual), "stated_usd_micros": r.stated_usd_micros,
                "source": r.source().name(), "ended": r.ended.how, "out_seq": r.ended.out_seq,
                "confidence_ppm": r.confidence_ppm_plus_1.checked_sub(1)})
            }
            Self::Void(r) => {
                json!({"call_id": r.key.call(r.lane), "lane": r.lane, "proof": r.proof().name(), "ended": r.ended.how, "out_seq": r.ended.out_seq})
            }
            Self::Adjust(r) => {
                json!({"call_id": r.key.call(r.lane), "lane": r.lane, "evidence": r.evidence, "actual": cost(&r.actual), "complete": r.complete})
            }
            Self::Close(r) => {
                json!({"state": r.state, "code": r.code, "result_hash": hex(&r.result_hash), "result": document(&r.result),
                "bill": document(&r.bill), "out_seq": r.out_seq})
            }
            Self::Frame(r) => {
                json!({"lane": r.lane, "msg_seq": r.msg_seq, "booked": r.booked.as_ref().map(cost), "out_seq": r.out_seq, "fragments": r.bodies.len()})
            }
            Self::Tool(r) => {
                let mut shown = json!({"call_id": r.key.call(r.lane), "lane": r.lane, "msg_seq": r.msg_seq, "tool": r.tool,
                    "verdict": r.verdict().name(), "cost": amount(&r.cost)});
                let mut add = |name: &str, value: Value| shown[name] = value;
                if !r.args.is_empty() {
                    add("args", r.args.as_str().into());
                }
                if !r.error.is_empty() {
                    add("error", document(&r.error));
                }
                if r.verdict() == ToolVerdict::Done {
                    add("ok", r.ok.into());
                    add("bytes", r.bytes.into());
                    add("hash", hex(&r.hash).into());
                }
                shown
            }
            Self::Tier(r) => {
                json!({"agent": r.agent, "tier": r.tier, "runs": r.runs, "under_ppm": r.under_ppm})
            }
            Self::Share(r) => json!({"holder": r.holder, "no": r.no, "of": shared(&r.of)}),
            Self::ShareIn(r) => json!({"home": r.home, "no": r.no, "of": shared(&r.of)}),
            Self::ShareOut(r) => {
                json!({"home": r.home, "no": r.no, "settled": amount(&r.settled), "unused": amount(&r.unused)})
            }
            Self::ShareBack(r) => json!({"home": r.home, "holder": r.holder, "no": r.no,
                "settled": amount(&r.settled), "unused": amount(&r.unused)}),
            Self::ShareLate(r) => json!({"home": r.home, "holder": r.holder, "evidence": r.late.evidence,
                "account": r.late.account, "window": r.late.window, "from": amount(&r.late.from), "to": amount(&r.late.to)}),
            Self::Agent(r) => {
                json!({"agent": r.agent, "incarnation": r.incarnation, "status": r.status(), "reason": r.reason,
                "suggested_window": r.suggested(), "retry_at": r.until_ms.map(crate::clock::rfc3339), "drained": r.drained})
            }
            Self::Checkpoint(r) => {
                json!({"position": r.position, "epoch": r.epoch, "fold_version": r.fold_version, "hash": hex(&r.hash),
                "piece": r.piece, "pieces": r.pieces, "bytes": r.data.len()})
            }
        }
    }
}

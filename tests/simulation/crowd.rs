//! Plans in which many meet: at one account, with answers far above their estimates and money for some of them only; or at
//! one agent that takes them one by one. Chance alone brings that about too rarely to see who is served first.

use super::plan::{AgentPlan, Mood, Plan};
use super::rng::Rng;
use atp_core::policy::Policy;
use atp_core::settings::{AccountSettings, FlowSettings, Per, WindowSettings};
use atp_proto::content::{EstimateDeclaration, EstimateFigures, EstimateMode, Stop};
use atp_proto::{Amount, Limit, Qos, TenantId, Tokens, UsdMicros};
use std::sync::Arc;

/// Many short calls, most of them gold, and one agent with one slot: how often is a tier passed over?
pub fn queue_up(rng: &mut Rng, plan: &mut Plan) {
    gather(rng, plan);
    plan.agents.truncate(1);
    for agent in &mut plan.agents {
        (agent.slow, agent.chunk_max, agent.chunks_max, agent.capabilities.max_parallel) = (false, 20, 1, 1);
    }
    let kind = plan.tasks[0].clone();
    let others = rng.range(1, 4);
    plan.tasks = (0..60)
        .map(|n| {
            let mut task = kind.clone();
            task.qos = if n >= others { Qos::Gold } else { rng.pick(&[Qos::Silver, Qos::Bronze]) };
            (task.stream, task.key) = (format!("queued-{n}"), None);
            // Those of the lower tiers are there before the crowd of gold is.
            task.start_at = 1_000 + n * 5;
            task
        })
        .collect();
    plan.settings.accounts.clear();
    plan.settings.default_account.limit = Limit::NONE;
    plan.faults.crashes_max = 0;
    for faults in [&mut plan.crash_at, &mut plan.break_agent_at, &mut plan.agent_crash_at, &mut plan.status_at] {
        faults.clear();
    }
}

/// Answers far above their estimates, money for some of them only.
pub fn gather(rng: &mut Rng, plan: &mut Plan) {
    plan.agents.iter_mut().for_each(|agent| talk(rng, agent));
    let tasks = plan.tasks.len() as u64;
    for task in &mut plan.tasks {
        task.start_at = rng.range(1_000, 1_500);
        (task.client, task.cancel_at) = (0, None);
        (task.submit.budget, task.submit.fanout, task.submit.wait) = (Limit::NONE, None, true);
        (task.submit.agents, task.submit.deadline_ms) = (Vec::new(), None);
    }
    // Prompts are counted at some 204 tokens; what is beyond that is what they contend for.
    let limit = Limit {
        tokens: Some(Tokens(tasks * 210 + rng.range(0, 900))),
        usd_micros: Some(UsdMicros(rng.range(tasks * 500, tasks * 2_500))),
    };
    let per = rng.pick(&[Per::Minute, Per::Total, Per::Total]);
    let account = AccountSettings { limit, per, ..AccountSettings::default() };
    let settings = &mut plan.settings;
    settings.accounts = [(TenantId::new("default"), account.clone())].into();
    settings.default_account = account;
    settings.policy = Arc::new(Policy::default());
    settings.stream_window = WindowSettings { max_parallel: None, limit: Limit::NONE };
    settings.agent_window = settings.stream_window;
    settings.flow = FlowSettings::default();
    settings.limits.streams_open_max = 100;
    plan.reload_at.clear();
}

fn talk(rng: &mut Rng, agent: &mut AgentPlan) {
    (agent.chunk_max, agent.chunks_max) = (rng.pick(&[20, 60]), 25);
    (agent.mood, agent.asks_percent) = (Mood::default(), 0);
    let c = &mut agent.capabilities;
    let figures = EstimateFigures { in_tokens: Tokens(10), out_tokens: Tokens(20), ..EstimateFigures::default() };
    c.estimate = Some(EstimateDeclaration { mode: EstimateMode::Declared, figures });
    let reach = agent.chunk_max + 20;
    (c.stop, c.worst_case) = (Stop::Close, None);
    c.reach = Amount::new(reach, (reach * agent.out_price).div_ceil(1_000_000) + 1);
    c.max_parallel = 4;
    c.models.truncate(1);
}

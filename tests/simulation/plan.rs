//! What a seed decides before the first event: settings, agents, tasks and faults. Small on purpose: a few tasks,
//! tiny limits, so that rare meetings are frequent.

use crate::simulation::rng::Rng;
use atp_core::ladder::OnLimit;
use atp_core::pacing::Mode;
use atp_core::placement::Placement;
use atp_core::policy::{Escalation, Policy, Rule, Trigger};
use atp_core::settings::{AccountSettings, FlowSettings, Limits, Per, Settings, WindowSettings};
use atp_proto::content::{
    Capabilities, Effects, EstimateDeclaration, EstimateFigures, EstimateMode, ModelInfo, Stop, Submit, Variance,
};
use atp_proto::{AgentName, Amount, Cost, Limit, Qos, TenantId, Tokens, UsdMicros};
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

/// What was lost on its way to the brokers may be found so much later.
pub const LONG_LOST_MS: u64 = 3_000;

/// How much goes wrong, and how.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// After an effect was carried out, the process dies.
    pub crash_ppm: u64,
    pub crashes_max: u32,
    /// After an effect was carried out, the process stands still for a while.
    pub pause_ppm: u64,
    /// Of messages between a shard and an agent that are repeated until answered.
    pub loss_percent: u64,
    pub duplicate_percent: u64,
    pub long_delay_percent: u64,
    pub delay_max_ms: u64,
    pub commit_split_percent: u64,
    pub commit_max_ms: u64,
    /// Of a message to the brokers of a partition: it isn't just written.
    pub broker_ppm: u64,
    /// `Agent` machines live on when the shard's process dies (they stand for another router).
    pub machines_live_percent: u64,
    /// Chance that a recovery ignores checkpoints.
    pub full_replay_percent: u64,
    pub resume_percent: u64,
    /// Who loses a connection notices it so much later now and then.
    pub half_open_ms: u64,
}

#[derive(Clone, Debug)]
pub struct TaskPlan {
    pub client: usize,
    pub start_at: u64,
    pub key: Option<String>,
    pub stream: String,
    pub submit: Submit,
    pub qos: Qos,
    pub task_type: &'static str,
    pub cancel_at: Option<u64>,
    pub fragments: u64,
    /// Sent from a second connection too, at the same time.
    pub watch: bool,
    /// `meta.tool_permissions`.
    pub tools: &'static [&'static str],
}

/// Chances of a call's outcomes, in percent; the rest completes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mood {
    pub refuse: u64,
    pub rejected: u64,
    pub upstream_error: u64,
    pub error_with_cost: u64,
    pub crash: u64,
    pub hang: u64,
    pub late: u64,
    pub breach: u64,
    pub falling: u64,
    pub counted: u64,
}

#[derive(Clone, Debug)]
pub struct AgentPlan {
    pub name: AgentName,
    pub capabilities: Capabilities,
    pub in_price: u64,
    pub out_price: u64,
    pub chunk_max: u64,
    pub chunks_max: u64,
    pub mood: Mood,
    /// Resends what is unacknowledged right after it says hello, not only when told to go on.
    pub eager: bool,
    pub slow: bool,
    /// How often it asks for a tool instead of making a chunk.
    pub asks_percent: u64,
    /// After a reconnect it doesn't repeat its status.
    pub taciturn: bool,
}

impl AgentPlan {
    /// What tokens cost at this agent, rounded up once.
    #[must_use]
    pub fn price(&self, in_tokens: u64, out_tokens: u64) -> Cost {
        let micros = (in_tokens * self.in_price + out_tokens * self.out_price).div_ceil(1_000_000);
        Cost { in_tokens: Tokens(in_tokens), out_tokens: Tokens(out_tokens), usd_micros: UsdMicros(micros) }
    }
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub settings: Settings,
    pub faults: Faults,
    pub agents: Vec<AgentPlan>,
    pub tasks: Vec<TaskPlan>,
    pub tenants: Vec<TenantId>,
    /// Client -> tenant; the last client of each tenant only watches.
    pub clients: Vec<usize>,
    pub wall0_ms: u64,
    pub heal_at: u64,
    pub crash_at: Vec<u64>,
    pub break_client_at: Vec<u64>,
    pub break_agent_at: Vec<u64>,
    pub agent_crash_at: Vec<u64>,
    pub status_at: Vec<u64>,
    pub checkpoint_at: Vec<u64>,
    pub query_at: Vec<u64>,
    pub room_at: Vec<u64>,
    pub wall_jump_at: Vec<u64>,
    pub reload_at: Vec<u64>,
    pub take_over_at: Vec<u64>,
    /// Two shards don't hear each other from then on, for so long.
    pub cut_at: Vec<u64>,
    pub placement: Placement,
    /// The log is in Kafka, and so often its brokers do what isn't expected.
    pub brokers: bool,
    pub mishaps: u32,
    pub routers: usize,
    pub move_agent_at: Vec<u64>,
    pub cut_link_at: Vec<u64>,
    pub drain_at: Option<u64>,
}

pub fn times(rng: &mut Rng, heal_at: u64, most: u64) -> Vec<u64> {
    (0..rng.range(0, most)).map(|_| rng.range(1_000, heal_at)).collect()
}

fn limit(rng: &mut Rng, none_percent: u64, tokens: (u64, u64), micros: (u64, u64)) -> Limit {
    Limit {
        tokens: (!rng.percent(none_percent)).then(|| Tokens(rng.range(tokens.0, tokens.1))),
        usd_micros: (!rng.percent(none_percent)).then(|| UsdMicros(rng.range(micros.0, micros.1))),
    }
}

impl Plan {
    /// Nothing goes wrong.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.faults.delay_max_ms == 0
    }

    #[must_use]
    pub fn of(rng: &mut Rng) -> Self {
        let calm = rng.percent(8);
        let heal_at = rng.range(5_000, 16_000);
        let n_agents = rng.range(1, 3) as usize;
        let agents: Vec<_> = (0..n_agents).map(|i| agent(rng, i, calm)).collect();
        let tenants = vec![TenantId::new("default"), TenantId::new("t2")];
        let clients = if rng.percent(30) { vec![0, 1, 0] } else { vec![0, 0] };
        let n_tasks = rng.pick(&[1, 2, 2, 3, 3, 4, 5, 8]);
        let settings = settings(rng);
        let mut tasks: Vec<TaskPlan> =
            (0..n_tasks).map(|i| task(rng, i, &agents, clients.len() as u64 - 1, heal_at)).collect();
        if tasks.len() > 1 && rng.percent(25) {
            same_key_twice(rng, &mut tasks);
        }
        let faults = if calm { Faults { commit_max_ms: 3, ..Faults::default() } } else { faults(rng) };
        let most = |n: u64| if calm { 0 } else { n };
        // The last minute before a window rolls, often: a call must outlive its window now and then.
        let minute = 1_790_000_040_000_u64 / 60_000 * 60_000;
        let before_roll_ms = if rng.percent(60) { 14_000 } else { 59_000 };
        let wall0_ms = minute + 60_000 - rng.range(0, before_roll_ms);
        Self {
            crash_at: {
                let n = most(rng.pick(&[0, 1, 2]));
                times(rng, heal_at, n)
            },
            break_client_at: {
                let n = most(2);
                times(rng, heal_at, n)
            },
            break_agent_at: {
                let n = most(rng.pick(&[0, 1, 3]));
                times(rng, heal_at, n)
            },
            agent_crash_at: {
                let n = most(rng.pick(&[0, 0, 1]));
                times(rng, heal_at, n)
            },
            status_at: {
                let n = most(rng.pick(&[0, 0, 2, 8]));
                times(rng, heal_at, n)
            },
            checkpoint_at: times(rng, heal_at, 2),
            query_at: times(rng, heal_at, 3),
            room_at: {
                let n = most(rng.pick(&[0, 0, 0, 2]));
                times(rng, heal_at, n)
            },
            reload_at: {
                let n = most(rng.pick(&[0, 0, 2]));
                times(rng, heal_at, n)
            },
            wall_jump_at: {
                let n = most(rng.pick(&[0, 0, 1]));
                times(rng, heal_at, n)
            },
            drain_at: (!calm && rng.percent(3)).then(|| rng.range(1_000, heal_at)),
            take_over_at: Vec::new(),
            cut_at: Vec::new(),
            placement: Placement::default(),
            brokers: false,
            mishaps: 0,
            routers: 1,
            move_agent_at: Vec::new(),
            cut_link_at: Vec::new(),
            settings,
            faults,
            agents,
            tasks,
            tenants,
            clients,
            wall0_ms,
            heal_at,
        }
    }
}

/// Placements are costly to make: these few are shared by all schedules.
static PLACEMENTS: LazyLock<Vec<Placement>> =
    LazyLock::new(|| (0..32).map(|n| Placement::new(n / 8 + 1, u64::from(n % 8))).collect());

/// Half of the schedules have several shards, and then more tasks of few accounts, so that money has to travel.
pub fn spread(rng: &mut Rng, plan: &mut Plan) {
    let shards = rng.pick(&[1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4]) as usize;
    if shards == 1 {
        return;
    }
    plan.placement = PLACEMENTS[(shards - 1) * 8 + rng.index(8)].clone();
    plan.settings.placement = plan.placement.clone();
    let (clients, heal_at) = (plan.clients.len() as u64 - 1, plan.heal_at);
    let most = rng.range(3, 6);
    for index in plan.tasks.len() as u64..most {
        let mut more = task(rng, index, &plan.agents, clients, heal_at);
        more.client = 0;
        plan.tasks.push(more);
    }
    let calm = plan.is_calm();
    if rng.percent(30) {
        // Few calls at once, of one account at several shards.
        let account = plan.settings.accounts.entry(TenantId::new("default")).or_default();
        account.max_parallel = Some(rng.range(1, 4) as u32);
    }
    if !calm && rng.percent(20) {
        // Ends that come when their share is back already.
        plan.agents.iter_mut().for_each(|agent| agent.mood.late = 40);
    }
    let most = if calm { 0 } else { rng.pick(&[0, 0, 1, 2]) };
    plan.take_over_at = times(rng, heal_at, most);
    let most = if calm { 0 } else { rng.pick(&[0, 0, 2, 4]) };
    plan.cut_at = times(rng, heal_at, most);
}

/// Of a third of the schedules each shard's log is a partition of Kafka, which several may write to at once.
pub fn share_the_log(rng: &mut Rng, plan: &mut Plan) {
    plan.brokers = rng.percent(33);
    if !plan.brokers || plan.is_calm() {
        return;
    }
    plan.faults.broker_ppm = rng.pick(&[0, 5_000, 20_000, 60_000]);
    plan.mishaps = rng.range(1, 4) as u32;
    // Messages of several owners between each other take batches that are long on their way.
    plan.faults.commit_split_percent = rng.pick(&[30, 80]);
    plan.faults.commit_max_ms = rng.pick(&[3, 30, 100, 400]);
    let most = rng.range(0, 3);
    plan.take_over_at.extend(times(rng, plan.heal_at, most));
}

/// What an operator changes at a reload.
pub struct Reload {
    pub accounts: (BTreeMap<TenantId, AccountSettings>, AccountSettings),
    pub retries: u32,
}

impl Reload {
    pub fn of(rng: &mut Rng) -> Self {
        Self { accounts: accounts(rng), retries: rng.pick(&[0, 1, 2]) as u32 }
    }
}

fn faults(rng: &mut Rng) -> Faults {
    let far = rng.percent(50);
    Faults {
        crash_ppm: rng.pick(&[0, 0, 2_000, 8_000]),
        crashes_max: 3,
        pause_ppm: rng.pick(&[0, 5_000, 20_000]),
        loss_percent: if far { rng.pick(&[0, 5, 20]) } else { 0 },
        duplicate_percent: if far { rng.pick(&[10, 30]) } else { 0 },
        long_delay_percent: if far { rng.pick(&[5, 20, 40]) } else { rng.pick(&[0, 5, 20]) },
        delay_max_ms: if far { rng.pick(&[300, 1_500, 4_000]) } else { rng.pick(&[50, 300, 1_500]) },
        commit_split_percent: rng.pick(&[0, 30, 80]),
        commit_max_ms: rng.pick(&[0, 3, 30, 400]),
        broker_ppm: 0,
        // Keepers on another router outlive the shard's process, those in the same process never do.
        machines_live_percent: if far { rng.pick(&[50, 100]) } else { 0 },
        full_replay_percent: 20,
        resume_percent: rng.pick(&[0, 50]),
        half_open_ms: 0,
    }
}

/// Accounts of an operator: `default`, sometimes `t2`, and what every other tenant gets.
pub fn accounts(rng: &mut Rng) -> (BTreeMap<TenantId, AccountSettings>, AccountSettings) {
    let mut accounts = BTreeMap::new();
    let per = rng.pick(&[Per::Minute, Per::Minute, Per::Total, Per::Day]);
    let tight = rng.percent(60);
    let most = if tight { 1_500 } else { 20_000 };
    let first = limit(rng, 15, (100, most), (200, most * 8));
    accounts.insert(TenantId::new("default"), account(rng, first, per));
    if rng.percent(20) {
        let second = limit(rng, 20, (200, 4_000), (400, 20_000));
        accounts.insert(TenantId::new("t2"), account(rng, second, Per::Minute));
    }
    let others = limit(rng, 30, (200, 4_000), (400, 20_000));
    let per = rng.pick(&[Per::Minute, Per::Total]);
    (accounts, account(rng, others, per))
}

fn account(rng: &mut Rng, limit: Limit, per: Per) -> AccountSettings {
    let steps = OnLimit { downgrade: rng.percent(70), queue: rng.percent(70) };
    let mode = rng.pick(&[Mode::Observe, Mode::Warn, Mode::Enforce]);
    AccountSettings {
        limit,
        per,
        max_parallel: rng.pick(&[None, None, Some(1), Some(3)]),
        on_limit: rng.percent(40).then_some(steps),
        ladder: ["dear", "middle", "cheap"].map(String::from).into(),
        floor: rng.percent(30).then(|| "middle".into()),
        pacing: rng.percent(25).then_some(mode),
        weight: rng.pick(&[0, 1, 3]) as u32,
    }
}

/// Now and then a rule that escalates, on anything or on one trigger.
fn policy(rng: &mut Rng) -> Arc<Policy> {
    let one = rng.pick(&Trigger::ALL);
    let on = if rng.percent(50) { Trigger::ALL.into() } else { [one].into() };
    let to = ["a1", "a0", "a2"].into_iter().take(rng.range(1, 3) as usize).map(AgentName::new).collect();
    let floor = rng.percent(40).then(|| "middle".into());
    let rule = Rule { escalation: Some(Escalation { on, to }), floor, ..Rule::default() };
    let rules = if rng.percent(35) { vec![rule] } else { Vec::new() };
    Arc::new(Policy { rules, ..Policy::default() })
}

fn settings(rng: &mut Rng) -> Settings {
    let defaults = Settings::default();
    let (accounts, default_account) = accounts(rng);
    Settings {
        shard: 0,
        stream_window: WindowSettings {
            max_parallel: rng.pick(&[None, Some(1), Some(2), Some(4)]),
            limit: limit(rng, 50, (300, 5_000), (500, 20_000)),
        },
        agent_window: WindowSettings { max_parallel: rng.pick(&[None, Some(1), Some(2), Some(4)]), limit: Limit::NONE },
        accounts,
        default_account,
        policy: policy(rng),
        deadline_ms: rng.range(2_000, 15_000),
        agent_timeout_ms: rng.range(1_000, 8_000),
        retries: rng.pick(&[0, 1, 2]) as u32,
        limits: Limits {
            streams_open_max: rng.pick(&[2, 100, 100]),
            lanes_max: rng.pick(&[2, 4, 64]),
            recent_frames: rng.pick(&[0, 1, 4, 16]),
            denials_per_second: rng.pick(&[1, 50]),
            denials_burst: rng.pick(&[1, 2, 500]),
            preempt_after_ms: rng.pick(&[100, 1_000, 5_000]),
        },
        flow: FlowSettings {
            aimd_base: rng.pick(&[1, 2, 4, 4]) as u32,
            aimd_cap: rng.pick(&[4, 64]) as u32,
            burst: rng.pick(&[1, 2, 64, 64]) as u32,
            latency_target_ms: rng.pick(&[100, 30_000]),
            cool_off_ppm: rng.pick(&[0, 250_000]),
            ..FlowSettings::default()
        },
        ..defaults
    }
}

fn agent(rng: &mut Rng, index: usize, calm: bool) -> AgentPlan {
    let name = AgentName::new(["a0", "a1", "a2"][index]);
    // micro-USD per million tokens.
    let (in_price, out_price) = (rng.range(1, 40) * 100_000, rng.range(5, 120) * 100_000);
    let chunk_max = rng.pick(&[3, 20, 60]);
    let chunks_max = rng.pick(&[1, 4, 9]);
    let stop = rng.pick(&[Stop::Close, Stop::Close, Stop::Close, Stop::Kill, Stop::Limit, Stop::None]);
    let reach_tokens = chunk_max + rng.range(1, 20);
    let reach = match stop {
        // The largest chunk and what is made in one round trip; one more for rounding.
        Stop::Close | Stop::Kill => Amount::new(reach_tokens, (reach_tokens * out_price).div_ceil(1_000_000) + 1),
        Stop::Limit | Stop::None => Amount::ZERO,
    };
    // How wrong the estimate is: 0.1 to 10 times.
    let out_typical = chunk_max * chunks_max / 2 + 1;
    let wrong = rng.pick(&[1, 5, 10, 10, 10, 20, 100]);
    let out_estimate = (out_typical * wrong / 10).max(1);
    let figures = EstimateFigures {
        in_tokens: Tokens(rng.range(1, 20)),
        out_tokens: Tokens(out_estimate),
        variance: Variance { tokens: rng.pick(&[0, 100, 2_500]), usd_micros: rng.pick(&[0, 10_000]) },
        ..EstimateFigures::default()
    };
    let mode = if reach_tokens.is_multiple_of(4) { EstimateMode::Preflight } else { EstimateMode::Declared };
    // The worst of a call: its longest answer and any input of these tasks.
    let worst_tokens = 200 + chunk_max * chunks_max;
    let worst_micros = (200 * in_price + chunk_max * chunks_max * out_price).div_ceil(1_000_000);
    // Cheaper by what the router thinks of them; the provider bills the first one's price, as a wrong price book would have it.
    let models = [("dear", 1), ("middle", 2), ("cheap", 4)].map(|(name, part)| ModelInfo {
        id: format!("sim-{name}-{index}"),
        in_usd_micros_per_mtok: Some(in_price / part),
        out_usd_micros_per_mtok: Some(out_price / part),
        context_tokens: None,
    });
    // Where only `max_tokens` stops a call its bound rests on the right price.
    let n_models = if matches!(stop, Stop::Close | Stop::Kill) { rng.pick(&[1, 1, 2, 3]) } else { 1 };
    let p = |rng: &mut Rng, most: u64| if calm { 0 } else { rng.pick(&[0, 0, most]) };
    AgentPlan {
        capabilities: Capabilities {
            agent: name.clone(),
            host: format!("h{index}"),
            adapter: "scripted".into(),
            models: models.into_iter().take(n_models).collect(),
            max_parallel: rng.pick(&[1, 2, 4]),
            estimate: rng.percent(90).then_some(EstimateDeclaration { mode, figures }),
            stop,
            reach,
            effects: if rng.percent(25) { Effects::External } else { Effects::None },
            worst_case: matches!(stop, Stop::Limit | Stop::None).then_some(Amount::new(worst_tokens, worst_micros)),
            idempotent_for_ms: rng.pick(&[0, 0, 60_000]),
            counted_up_ppm: rng.percent(25).then_some(100_000),
            ..Capabilities::default()
        },
        name,
        in_price,
        out_price,
        chunk_max,
        chunks_max,
        mood: Mood {
            refuse: p(rng, 20),
            rejected: p(rng, 20),
            upstream_error: p(rng, 20),
            error_with_cost: p(rng, 15),
            crash: p(rng, 8),
            hang: p(rng, 8),
            late: p(rng, 15),
            breach: p(rng, 5),
            falling: p(rng, 15),
            counted: p(rng, 30),
        },
        eager: rng.percent(50),
        slow: rng.percent(40),
        asks_percent: 0,
        taciturn: rng.percent(50),
    }
}

fn task(rng: &mut Rng, index: u64, agents: &[AgentPlan], clients: u64, heal_at: u64) -> TaskPlan {
    let start_at = rng.range(1_000, heal_at.min(6_000));
    let key = rng.percent(50).then(|| format!("key-{index}"));
    let stream =
        key.as_ref().map_or_else(|| format!("s{index}"), |k| atp_proto::id::stream_of_key(k, 1).as_str().into());
    let named = if rng.percent(45) {
        let mut names: Vec<_> = agents.iter().map(|a| a.name.clone()).collect();
        let keep = rng.index(names.len()) + 1;
        let first = rng.index(names.len());
        names.rotate_left(first);
        names.truncate(keep);
        if rng.percent(4) {
            names.push(AgentName::new("nobody"));
        }
        names
    } else {
        Vec::new()
    };
    let fanout = (named.is_empty() && rng.percent(60)).then(|| rng.range(1, 3) as u32);
    TaskPlan {
        client: rng.below(clients) as usize,
        start_at,
        stream,
        submit: Submit {
            task: format!("task {}", key.as_deref().unwrap_or("of no key")),
            budget: limit(rng, 50, (20, 1_500), (50, 12_000)),
            agents: named,
            fanout,
            deadline_ms: rng.percent(40).then(|| rng.range(800, 12_000)),
            wait: !rng.percent(20),
            ..Submit::default()
        },
        key,
        qos: rng.pick(&[Qos::Gold, Qos::Silver, Qos::Silver, Qos::Bronze]),
        task_type: "review",
        cancel_at: rng.percent(15).then(|| start_at + rng.range(0, 3_000)),
        fragments: if rng.percent(15) { rng.range(2, 4) } else { 1 },
        watch: rng.percent(20),
        tools: &[],
    }
}

/// Another task is the first one again, under its key and a stream id of its own: it attaches, or is a fresh try.
fn same_key_twice(rng: &mut Rng, tasks: &mut [TaskPlan]) {
    let Some(key) = tasks[0].key.clone() else { return };
    tasks[0].fragments = 1;
    let start_at = tasks[0].start_at + rng.range(0, 4_000);
    let stream = atp_proto::id::stream_of_key(&key, 2).as_str().into();
    tasks[1] = TaskPlan { start_at, stream, watch: false, ..tasks[0].clone() };
}

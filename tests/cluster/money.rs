//! Money from outside: 200 clients, one account, agents that cost ten times what they say. The providers' true bill decides.

use atp_proto::content::{CallState, Source, Submit, TaskState};
use atp_proto::{Code, Limit, UsdMicros};
use atp_tests::blackbox::history::{billed, true_bill, true_sum};
use atp_tests::blackbox::load;
use atp_tests::blackbox::process::{Router, Scripted};
use std::collections::BTreeMap;

const AGENTS: u64 = 4;
const PARALLEL: u64 = 8;
const CLIENTS: u64 = 200;
/// What a chunk costs at the provider: 25 tokens at 40 USD per million.
const CHUNK_USD_MICROS: u64 = 1_000;
const BUDGET_USD_MICROS: u64 = 800_000;

/// 50 chunks of 1,000 micro-USD; the estimate says 5,000 for all of them.
fn script() -> String {
    format!(
        "models: [{{id: dear, in_usd_per_mtok: 10.00, out_usd_per_mtok: 40.00}}]
max_parallel: {PARALLEL}
reach: {{tokens: 25, usd_micros: {CHUNK_USD_MICROS}}}
estimate: {{mode: declared, in_tokens: 0, out_tokens: 125, usd: 0.005}}
calls:
  - chunks: [{{after: 2ms, repeat: 50, text: \"word \", out_tokens: 25}}]
    final: {{text: \"end\"}}
"
    )
}

#[test]
fn a_budget_is_exceeded_by_no_more_than_the_reach_of_each_running_call() {
    let router = Router::start(
        "log: {durability: async}
accounts: {default: {usd: 0.80, per: total}}
tasks: {retries: 0}",
    );
    let names: Vec<String> = (0..AGENTS).map(|n| format!("dear-{n}")).collect();
    let agents: Vec<Scripted> =
        names.iter().map(|name| Scripted::start(router.dir(), name, router.atp(), &script())).collect();
    names.iter().for_each(|name| router.has_agent(name));

    let task = |n: u64| Submit {
        task: format!("task {n}"),
        // Two out of three wait for money that may come back; a few spread over two agents.
        wait: !n.is_multiple_of(3),
        fanout: n.is_multiple_of(10).then_some(2),
        deadline_ms: Some(20_000),
        budget: Limit { usd_micros: Some(UsdMicros(100_000)), tokens: None },
        ..Submit::default()
    };
    let told = load::run(router.atp(), CLIENTS, CLIENTS, task);
    router.settled();

    let truth = true_bill(agents.iter().map(Scripted::meter));
    let spent = true_sum(&truth);
    let reach = AGENTS * PARALLEL * CHUNK_USD_MICROS;
    println!("true bill {spent} of {BUDGET_USD_MICROS} micro-USD, {} calls", truth.len());
    assert!(spent <= BUDGET_USD_MICROS + reach, "{spent} micro-USD of {BUDGET_USD_MICROS} and {reach} of reach");
    assert!(spent >= BUDGET_USD_MICROS / 2, "{spent}: the budget was there to be used");

    // Each call on each bill: reported, to the micro-dollar; nothing was called that no bill shows.
    let bills: Vec<_> = told.iter().filter(|t| t.refused.is_none()).map(load::Told::bill).collect();
    let calls = billed(&bills);
    for (id, call) in &calls {
        let truth = truth.get(id).copied().unwrap_or_default();
        if call.state == CallState::Void {
            assert_eq!(truth.lines, 0, "{id}: void, and it was called");
            continue;
        }
        assert_eq!((call.state, call.source), (CallState::Settled, Some(Source::Reported)), "{call:?}");
        assert_eq!(call.actual.usd_micros.0, truth.usd_micros, "{id}: {call:?}");
        assert_eq!(call.actual.in_tokens.0 + call.actual.out_tokens.0, truth.tokens, "{id}");
        let beyond = truth.usd_micros.saturating_sub(call.grant.usd_micros.0);
        assert!(beyond <= CHUNK_USD_MICROS, "{id} went {beyond} micro-USD beyond its grant");
    }
    assert!(truth.keys().all(|id| calls.contains_key(id)), "a call that stands in no bill");
    let sum: u64 = bills.iter().map(|bill| bill.settled.usd_micros.0).sum();
    assert_eq!(sum, spent, "the bills are the true bill");
    let (_, accounts) = router.http("GET", "/v1/accounts/default");
    let row = &accounts["accounts"][0];
    assert_eq!((&row["settled"]["usd_micros"], &row["held"]["usd_micros"]), (&spent.into(), &0.into()), "{accounts}");

    // Everybody was told how it ended, and why where it wasn't whole.
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    for told in &told {
        let end = match &told.refused {
            Some(error) => {
                assert!(matches!(error.code, Code::Budget | Code::Window), "{error}");
                format!("refused {}", error.code)
            }
            None => {
                let answer = told.answer();
                let code = answer.error.as_ref().map(|e| e.code);
                let fits = match answer.state {
                    TaskState::Done => code.is_none(),
                    TaskState::Provisional | TaskState::Failed => code.is_some(),
                    _ => false,
                };
                assert!(fits, "{}: {answer:?}", told.stream);
                format!("{:?} {}", answer.state, code.map_or("", Code::as_str))
            }
        };
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?}");
    assert!(ends.keys().any(|end| end.contains("EBUDGET")), "the budget binds: {ends:?}");
}

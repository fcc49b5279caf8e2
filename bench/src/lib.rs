//! `atp bench SCENARIO`: load on a router and what it did with it. Each scenario starts its own router (a child process of
//! the same binary) on loopback, beside a bare relay in the same run; figures are given as ratios of such pairs. `budget`
//! alone replays a trace in virtual time. It never asserts a time.

mod agent;
mod args;
mod bare;
mod budget;
mod chunk;
mod client;
#[cfg(test)]
mod fake;
mod fleet;
mod idle;
mod link;
mod peek;
mod plot;
mod process;
mod recover;
mod relay;
mod report;
mod router;
mod tasks;

pub use args::{BenchArgs, Line, Scenario};

/// Runs a scenario and prints its report.
///
/// # Errors
/// When a router can't be started or reached, or breaks the protocol under load.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    args.check()?;
    // A thread of its own: the caller may be inside of a runtime already.
    std::thread::scope(|scope| {
        let bench = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(scenario(&args))
        });
        bench.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the bench panicked")))
    })
}

async fn scenario(args: &BenchArgs) -> anyhow::Result<()> {
    let report = match args.scenario {
        Scenario::Relay => relay::run(args).await?,
        Scenario::Tasks => tasks::run(args).await?,
        Scenario::Idle => idle::run(args).await?,
        Scenario::Fleet => fleet::run(args).await?,
        Scenario::Recover => return recover::run(args).await,
        Scenario::Budget => return budget::run(args),
        Scenario::BareRelay => return bare::child().await,
    };
    report.print(args.json)?;
    if let Some(path) = &args.plot {
        std::fs::write(path, plot::svg(&report))?;
    }
    Ok(())
}

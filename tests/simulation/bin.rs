//! `sim`: runs schedules of the simulation. `--seed N` replays one with its trace; a failure prints seed and commit.

use atp_tests::simulation::world::Counts;
use atp_tests::simulation::{Outcome, corpus, run_caught};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "sim [--seed N] [--schedules N] [--from N] [--threads N] [--trace] [--keep-going]
  --seed N       run the one schedule of this seed and print its trace
  --schedules N  run this many (20000), seeds from --from (1) on, the corpus first
  --threads N    on this many threads (2)
  --trace        print the trace of the failing schedule in full, not only its end
  --keep-going   count failures by invariant instead of stopping at the first";

struct Args {
    seed: Option<u64>,
    schedules: u64,
    from: u64,
    threads: u64,
    trace: bool,
    keep_going: bool,
}

fn args() -> Result<Args, String> {
    let mut args = Args { seed: None, schedules: 20_000, from: 1, threads: 2, trace: false, keep_going: false };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let mut number = || -> Result<u64, String> {
            let text = given.next().ok_or_else(|| format!("{flag}: a number must follow"))?;
            text.parse().map_err(|_| format!("{flag}: `{text}` is not a whole number"))
        };
        match flag.as_str() {
            "--seed" => args.seed = Some(number()?),
            "--schedules" => args.schedules = number()?,
            "--from" => args.from = number()?,
            "--threads" => args.threads = number()?.max(1),
            "--trace" => args.trace = true,
            "--keep-going" => args.keep_going = true,
            _ => return Err(format!("{flag}: unknown\n{USAGE}")),
        }
    }
    Ok(args)
}

fn commit() -> String {
    let output = Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    output
        .ok()
        .filter(|o| o.status.success())
        .map_or_else(|| "unknown".into(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

/// The last lines of a trace, or all of it.
fn show(outcome: &Outcome, all: bool) {
    let skip = if all { 0 } else { outcome.trace.len().saturating_sub(60) };
    for line in &outcome.trace[skip..] {
        println!("{line}");
    }
}

fn report(seed: u64, all: bool) {
    let outcome = run_caught(seed, true);
    show(&outcome, all);
    if let Some(v) = &outcome.violation {
        println!("\nFAILED seed {seed} at commit {}\n  invariant: {}\n  {}", commit(), v.invariant, v.detail);
        println!(
            "  replay: just sim --seed {seed}   (cargo run --profile sim -p atp-tests --no-default-features --bin sim -- --seed {seed})"
        );
    }
}

fn main() -> ExitCode {
    let args = match args() {
        Ok(args) => args,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = args.seed {
        let first = run_caught(seed, true);
        show(&first, true);
        let second = run_caught(seed, false);
        println!("\nseed {seed}: {} events, trace {:016x}, {:?}", first.events, first.trace_hash, first.counts);
        if first.trace_hash != second.trace_hash {
            println!("the same seed gave another trace: {:016x}", second.trace_hash);
            return ExitCode::FAILURE;
        }
        if let Some(v) = first.violation {
            println!("FAILED seed {seed} at commit {}\n  invariant: {}\n  {}", commit(), v.invariant, v.detail);
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    // A caught panic is reported once, with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    let seeds: Vec<u64> = corpus().into_iter().chain(args.from..args.from + args.schedules).collect();
    let (next, events) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed: Mutex<Vec<(u64, &'static str, String)>> = Mutex::new(Vec::new());
    let counts = Mutex::new(Counts::default());
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                let mut mine = Counts::default();
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let outcome = run_caught(*seed, false);
                    events.fetch_add(outcome.events, Ordering::Relaxed);
                    mine.add(&outcome.counts);
                    if let Some(v) = outcome.violation {
                        failed.lock().expect("no thread panics with it").push((*seed, v.invariant, v.detail));
                        if !args.keep_going {
                            next.store(u64::MAX / 2, Ordering::Relaxed);
                        }
                    }
                }
                counts.lock().expect("no thread panics with it").add(&mine);
            });
        }
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut failed = failed.into_inner().expect("all threads ended");
    failed.sort_unstable();
    let ran = (next.into_inner().min(seeds.len() as u64)).max(failed.len() as u64);
    let per_minute = ran as f64 / seconds * 60.0;
    println!("{ran} schedules, {} events in {seconds:.1} s: {per_minute:.0} schedules a minute", events.into_inner());
    println!("{:?}", counts.into_inner().expect("all threads ended"));
    let mut kinds: Vec<(&str, usize, u64)> = Vec::new();
    for (seed, invariant, _) in &failed {
        match kinds.iter_mut().find(|(k, _, _)| k == invariant) {
            Some(kind) => kind.1 += 1,
            None => kinds.push((invariant, 1, *seed)),
        }
    }
    for (invariant, n, seed) in &kinds {
        println!("FAILED {n} times, first with seed {seed}: {invariant}");
    }
    let Some((seed, _, _)) = failed.first() else {
        println!("all invariants held");
        return ExitCode::SUCCESS;
    };
    report(*seed, args.trace);
    ExitCode::FAILURE
}

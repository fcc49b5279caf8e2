//! `sweep`: a router is killed before each system call that others can see, one run for each, and must come back with nothing
//! lost, nothing called twice and bills that are the providers'. Without `--all` a sample of these runs, spread by a seed.

mod play;
mod strace;

use atp_tests::blackbox::atp;
use clap::Parser;
use play::{Aim, Phase, Point, run};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Kill a router before each of its writes, syncs, renames and sends
#[derive(Parser)]
#[command(
    after_help = "Examples:\n  sweep                            a sample\n  sweep --all                      every call\n  sweep --at serving:pwrite64:17   one run again"
)]
struct Args {
    /// Every point instead of a sample
    #[arg(long)]
    all: bool,
    /// Points of the sample
    #[arg(long, value_name = "N", default_value_t = 80)]
    points: usize,
    /// Which sample
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: usize,
    /// Only this point, e.g. serving:pwrite64:17
    #[arg(long, value_name = "POINT")]
    at: Vec<Point>,
    /// Runs at once
    #[arg(long, value_name = "N", default_value_t = 4)]
    jobs: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(what) = strace::is_there() {
        eprintln!("sweep: {what}");
        return ExitCode::from(2);
    }
    atp::path();
    let begun = Instant::now();
    let points = if args.at.is_empty() { chosen(&args) } else { args.at.clone() };
    let (mut killed, mut failed) = play_all(&points, args.jobs);
    if args.all {
        // Runs differ by a few calls: on behind the last one of each, until nobody is killed any more.
        let mut ends = ends(&points);
        while !ends.is_empty() && failed.is_empty() {
            ends.iter_mut().for_each(|point| point.n += 1);
            let (more, bad) = play_all(&ends, args.jobs);
            ends.retain(|point| more.contains(point));
            killed.extend(more);
            failed.extend(bad);
        }
    }
    println!("{} kills, {} runs failed, {:.0} s", killed.len(), failed.len(), begun.elapsed().as_secs_f64());
    for point in &failed {
        println!("FAILED {point}: run it again by `just sweep --at {point}`");
    }
    // A sample in which hardly anybody died has shown nothing.
    let enough = 2 * killed.len() >= points.len();
    if !enough {
        println!("FAILED: only {} of {} routers were killed", killed.len(), points.len());
    }
    ExitCode::from(u8::from(!failed.is_empty() || !enough))
}

/// All points of a run, or a sample of them that is spread over it.
fn chosen(args: &Args) -> Vec<Point> {
    let mut all = Vec::new();
    for phase in [Phase::Serving, Phase::Starting] {
        let (_, counts) = run(&Aim::Count(phase));
        println!("{phase:?}: {counts:?}");
        // Behind its first calls a start is a run like any other.
        let most = if phase == Phase::Starting { 12 } else { u64::MAX };
        for (call, n) in counts {
            all.extend((1..=n.min(most)).map(|n| Point { phase, call: call.clone(), n }));
        }
    }
    println!("{} points", all.len());
    if args.all {
        return all;
    }
    let step = all.len().div_ceil(args.points.max(1)).max(1);
    println!("one in {step} of them (--seed {} --points {})", args.seed, args.points);
    all.into_iter().skip(args.seed % step).step_by(step).collect()
}

/// The last point of each call.
fn ends(points: &[Point]) -> Vec<Point> {
    let serving = points.iter().filter(|point| point.phase == Phase::Serving);
    let mut ends: Vec<Point> = Vec::new();
    for point in serving {
        match ends.last_mut().filter(|last| last.call == point.call) {
            Some(last) => last.n = point.n,
            None => ends.push(point.clone()),
        }
    }
    ends
}

/// Plays every point; those at which a router was killed, and those that failed.
fn play_all(points: &[Point], jobs: usize) -> (Vec<Point>, Vec<Point>) {
    let next = AtomicUsize::new(0);
    let (killed, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let push = |list: &Mutex<Vec<Point>>, point: &Point| {
        list.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(point.clone());
    };
    let work = || {
        while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
            match catch_unwind(AssertUnwindSafe(|| run(&Aim::Kill(point)))) {
                Ok((was_killed, _)) => {
                    println!("{point}: {}", if was_killed { "killed, and all is well" } else { "not reached" });
                    if was_killed {
                        push(&killed, point);
                    }
                }
                Err(_) => {
                    println!("{point}: FAILED");
                    push(&failed, point);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, 16) {
            scope.spawn(work);
        }
    });
    let into = |list: Mutex<Vec<Point>>| list.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    (into(killed), into(failed))
}

//! Times spleen-hpc and libtorch in one process, run by run in turn, and prints a JSON object a row and line.
//!
//! Both use the same number of threads; while one works the other's threads sleep. Rows that spleen-hpc does not have
//! are timed for libtorch alone.

mod rows;
mod shim;
mod unet;

use clap::Parser;
use serde_json::json;
use spleen_hpc::bench::inputs::Inputs;
use spleen_hpc::bench::{Samples, Work, benches};
use spleen_hpc::{Error, Result};
use std::time::{Duration, Instant};

/// Two float32 networks of this depth, summed in different orders, differ by a few 1e-6 of their largest logit.
const SAME: f64 = 1e-4;
/// Longer than libtorch's idle threads spin before they sleep.
const PAUSE: Duration = Duration::from_millis(20);
/// Fewest and most runs of a side.
const RUNS: std::ops::RangeInclusive<usize> = 5..=50;

#[derive(Parser)]
struct Args {
    /// Threads of both sides
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Seconds after which a row that has its fewest runs ends
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Only rows whose name begins with one of these
    #[arg(long, num_args = 1..)]
    only: Vec<String>,
}

fn main() {
    if let Err(err) = run(&Args::parse()) {
        eprintln!("error: {err}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<()> {
    tch::set_num_threads(args.threads as i32);
    rayon::ThreadPoolBuilder::new()
        .num_threads(args.threads)
        .build_global()
        .map_err(|err| Error::Internal(err.to_string()))?;
    let apart = rows::disagreement()?;
    if apart > SAME {
        return Err(Error::Internal(format!(
            "the two networks differ by {apart:.1e} of their largest logit"
        )));
    }
    let ours = benches();
    // No row of the network reads a file.
    let inputs = Inputs::new("");
    for (name, prepare) in rows::rows() {
        if !args.only.is_empty() && !args.only.iter().any(|only| name.starts_with(only)) {
            continue;
        }
        let mut our_work = ours.iter().find(|b| b.name == name).map(|b| b.prepare(&inputs)).transpose()?;
        let mut their_work = prepare()?;
        let (mut our_seconds, mut their_seconds) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while their_seconds.len() <= *RUNS.start()
            || (their_seconds.len() <= *RUNS.end() && start.elapsed().as_secs_f64() < args.seconds)
        {
            if let Some(work) = &mut our_work {
                our_seconds.push(timed(work)?);
            }
            std::thread::sleep(PAUSE);
            their_seconds.push(timed(&mut their_work)?);
            std::thread::sleep(PAUSE);
        }
        let costs: Vec<[f64; 2]> =
            our_work.iter().flat_map(|work| &work.costs).map(|cost| [cost.flop, cost.bytes]).collect();
        // The first run of each warms up.
        let kept = |runs: &[[f64; 2]], which: usize| {
            let kept: Vec<f64> = runs.iter().skip(1).map(|run| run[which]).collect();
            (!kept.is_empty()).then(|| Samples::new(kept).into_seconds())
        };
        println!(
            "{}",
            json!({
                "name": name,
                "threads": args.threads,
                "costs": costs,
                "ours": kept(&our_seconds, 0),
                "theirs": kept(&their_seconds, 0),
                "ours_cpu": kept(&our_seconds, 1),
                "theirs_cpu": kept(&their_seconds, 1),
            })
        );
    }
    Ok(())
}

/// Does it once; its wall time, and the CPU time of all threads of the process meanwhile. With one thread the latter is
/// what the former would be if nothing else ran on the machine.
fn timed(work: &mut Work) -> Result<[f64; 2]> {
    let before = cpu_seconds()?;
    let wall = work.once()?;
    Ok([wall, cpu_seconds()? - before])
}

fn cpu_seconds() -> Result<f64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec to write to.
    match unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) } {
        0 => Ok(time.tv_sec as f64 + 1e-9 * time.tv_nsec as f64),
        _ => Err(Error::Internal("the system does not tell the CPU time of a process".into())),
    }
}

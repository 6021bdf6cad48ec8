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
use spleen_hpc::bench::{Samples, benches};
use spleen_hpc::{Error, Result};
use std::time::{Duration, Instant};

/// Two float32 networks of this depth, summed in different orders, differ by a few 1e-6 of their largest logit.
const SAME: f64 = 1e-4;
/// Longer than libtorch's idle threads spin before they sleep.
const PAUSE: Duration = Duration::from_millis(20);
/// Fewest and most runs of a side, and the seconds after which a row has enough.
const RUNS: std::ops::RangeInclusive<usize> = 5..=50;
const SECONDS: f64 = 4.0;

#[derive(Parser)]
struct Args {
    /// Threads of both sides
    #[arg(long, default_value_t = 1)]
    threads: usize,
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
            || (their_seconds.len() <= *RUNS.end() && start.elapsed().as_secs_f64() < SECONDS)
        {
            if let Some(work) = &mut our_work {
                our_seconds.push(work.once()?);
            }
            std::thread::sleep(PAUSE);
            their_seconds.push(their_work.once()?);
            std::thread::sleep(PAUSE);
        }
        // The first run of each warms up.
        let kept = |seconds: Vec<f64>| seconds.get(1..).filter(|s| !s.is_empty()).map(<[f64]>::to_vec);
        let flop = our_work.and_then(|work| work.flop);
        println!(
            "{}",
            json!({
                "name": name,
                "threads": args.threads,
                "flop": flop,
                "ours": kept(our_seconds).map(Samples::new).map(Samples::into_seconds),
                "theirs": kept(their_seconds).map(Samples::new).map(Samples::into_seconds),
            })
        );
    }
    Ok(())
}

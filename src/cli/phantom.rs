//! `spleen-hpc phantom`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::progress::Progress;
use super::{Outcome, say};
use crate::Result;
use crate::data::phantom::{PhantomConfig, generate};

/// Make a synthetic CT data set with labels, laid out like the Medical Segmentation Decathlon's
///
/// Body, fat, muscle, spine, ribs, lungs, liver, stomach, kidneys and a spleen with its neighbours' HU; every case
/// has its own anatomy, noise, spacing and orientation. The same flags make the same files, byte for byte.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc phantom --out phantoms
  spleen-hpc phantom --out adults --cases 4 --full       512 x 512 x 90 voxels a case")]
pub struct Args {
    /// Folder to make; one that holds something else is refused
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Labelled cases
    #[arg(long, value_name = "N", default_value_t = PhantomConfig::default().cases)]
    cases: usize,
    /// Further cases, as the Decathlon's imagesTs
    #[arg(long, value_name = "N", default_value_t = PhantomConfig::default().test_cases)]
    test_cases: usize,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = PhantomConfig::default().seed)]
    seed: u64,
    /// Adults at 512 x 512 x 90 voxels instead of miniatures
    #[arg(long)]
    full: bool,
}

/// Makes the set and says what to do with it.
pub fn run(args: &Args) -> Outcome {
    let config =
        PhantomConfig { cases: args.cases, test_cases: args.test_cases, seed: args.seed, full: args.full };
    let progress = Progress::new(args.cases.saturating_add(args.test_cases), "phantoms made");
    generate(&args.out, &config, &|done, total| progress.set(done, total))?;
    progress.finish();
    let out = args.out.display();
    say(format_args!("{} labelled and {} further cases lie in {out}", args.cases, args.test_cases));
    say(format_args!("next: spleen-hpc train --data {out}"));
    Ok(ExitCode::SUCCESS)
}

/// The phantoms of a training without data: the default set, made once, in the run's folder.
pub fn for_run(run: &Path) -> Result<PathBuf> {
    let config = PhantomConfig::default();
    let out = run.join("phantoms");
    let progress = Progress::new(config.cases + config.test_cases, "phantoms made");
    generate(&out, &config, &|done, total| progress.set(done, total))?;
    progress.finish();
    Ok(out)
}

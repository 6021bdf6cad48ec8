//! `spleen-hpc cache`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::progress::Progress;
use super::settings::{Settings, data, resolve};
use super::{Outcome, say, tell};
use crate::Result;
use crate::config::{Config, Overrides};
use crate::data::cache::{self, CacheParams, CachedCase};
use crate::data::dataset::{Case, training_cases};

/// Preprocess a data set once, for every training that follows
///
/// `train` does the same by itself; use this to do it beforehand, on another machine or as a job of its own. Files
/// that are still good are kept, stale or damaged ones are made again.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc cache --data Task09_Spleen
  spleen-hpc cache --data Task09_Spleen --cache-dir /scratch/spleen --spacing 1.5,1.5,2")]
pub struct Args {
    /// Folder of the cache files [default: DATA/.spleen-hpc-cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Prepares every labelled case.
pub fn run(args: &Args) -> Outcome {
    let config = resolve(&Overrides::default(), &args.settings.given()?, &Overrides::default())?;
    let data = data(&config)?;
    let cases = training_cases(data)?;
    let dir = args.cache_dir.clone().map_or_else(|| cache::default_dir(data), Ok)?;
    let cached = build(&cases, &config, &dir)?;
    say(format_args!("{} cases lie in {}", cached.len(), dir.display()));
    Ok(ExitCode::SUCCESS)
}

/// Opens or prepares `cases` under a progress bar.
pub fn build(cases: &[Case], config: &Config, dir: &Path) -> Result<Vec<CachedCase>> {
    let params = CacheParams {
        preprocess: config.preprocess.clone(),
        label_value: config.run.label_value,
        dtype: config.run.cache_dtype,
    };
    let progress = Progress::new(cases.len(), "cases prepared");
    let cached = cache::build_all(cases, &params, dir, &|step| {
        progress
            .suspend(|| step.warnings.iter().for_each(|warning| tell(format_args!("warning: {warning}"))));
        let why = step.prepared.map_or("cached".to_owned(), |why| format!("prepared: {why}"));
        progress.note(format!("{} {why}", step.name));
        progress.set(step.done, step.total);
    });
    progress.finish();
    cached
}

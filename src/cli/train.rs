//! `spleen-hpc train`

use std::io::Write;
use std::path::PathBuf;

use super::Outcome;
use super::cache::build;
use super::phantom;
use super::settings::{Settings, announce_device, read_toml, resolve};
use crate::Error;
use crate::config::{Overrides, Run};
use crate::data::cache;
use crate::data::dataset::{Case, Split, training_cases};
use crate::data::publish::publish;

/// Train the network; without --data on phantoms it makes itself
///
/// Leaves in the run folder: best.safetensors (best validation Dice), last.safetensors (to resume from) and
/// config.toml (every number of the run, a --config for the next one). Ctrl-C and SIGTERM save and end the run.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc train                                      a small run on synthetic scans: nothing is needed
  spleen-hpc train --data Task09_Spleen --run run       the README's recipe of bundle 0.3.6
  spleen-hpc train --data Task09_Spleen --recipe 0.5.9 --lr 1e-3 --folds 5 --fold 0
  spleen-hpc train --run run --resume --epochs 2000     go on where a run stopped")]
pub struct Args {
    /// Folder of the run's results
    #[arg(long, value_name = "DIR", default_value = "run")]
    run: PathBuf,
    /// Go on from the run folder's last checkpoint, with its numbers
    #[arg(long)]
    resume: bool,
    /// Folder of the preprocessed cases [default: DATA/.spleen-hpc-cache]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// The resolved numbers, in the run's folder.
const CONFIG: &str = "config.toml";
/// The checkpoint a run resumes from.
const LAST: &str = "last.safetensors";

/// Trains from the first epoch or from the last checkpoint.
pub fn run(args: &Args) -> Outcome {
    let last = args.run.join(LAST);
    if !args.resume && last.exists() {
        let what = "is the checkpoint of an earlier run: go on with --resume, or choose another --run";
        return Err(Error::file(&last, what));
    }
    let given = args.settings.given()?;
    let base = match (args.resume, &given.data) {
        (true, _) => read_toml(&args.run.join(CONFIG))?,
        (false, None) => small_run(),
        (false, Some(_)) => Overrides::default(),
    };
    let mut config = resolve(&base, &given, &Overrides::default())?;
    announce_device(config.device)?;
    std::fs::create_dir_all(&args.run).map_err(Error::io(&args.run, "create"))?;
    let data = config.run.data.take().map_or_else(|| phantom::for_run(&args.run), Ok)?;
    // Absolute, so that a run can be resumed from anywhere.
    let data = std::path::absolute(&data).map_err(Error::io(&data, "find"))?;
    config.run.data = Some(data.clone());

    let cases = training_cases(&data)?;
    let (train, val) = split(&config.run).apply(cases.len())?;
    let dir = args.cache_dir.clone().map_or_else(|| cache::default_dir(&data), Ok)?;
    let pick = |indices: &[usize]| -> Vec<Case> { indices.iter().map(|&i| cases[i].clone()).collect() };
    let train = build(&pick(&train), &config, &dir)?;
    let val = build(&pick(&val), &config, &dir)?;
    let text = config.to_toml();
    publish(&args.run.join(CONFIG), |file| file.write_all(text.as_bytes()))?;
    Err(Error::Internal(format!(
        "this build cannot train on {} and validate on {} cases",
        train.len(),
        val.len()
    )))
}

/// Numbers for the small phantoms on a few cores: the whole run takes minutes.
fn small_run() -> Overrides {
    Overrides::default()
}

/// The split that the numbers of a run ask for.
pub fn split(run: &Run) -> Split {
    match run.folds {
        Some(folds) => Split::Fold { folds, fold: run.fold },
        None => Split::Last(run.val_cases),
    }
}

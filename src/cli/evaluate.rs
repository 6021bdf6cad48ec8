//! `spleen-hpc evaluate`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use serde_json::json;

use super::network::Trained;
use super::progress::Progress;
use super::settings::{Settings, choose_device, data, resolve};
use super::train::split;
use super::{INTERRUPTED, Outcome, interrupt, memory, say, tell};
use crate::config::{Config, Overrides};
use crate::data::dataset::{Case, training_cases};
use crate::data::publish::{self, publish};
use crate::device::Device;
use crate::infer::evaluate::{CaseScores, evaluate};
use crate::metrics::overlap::mean_ignoring_nan;
use crate::report::csv;
use crate::{Error, Result};

/// Score weights on labelled scans: Dice bundle-style and native, surface distances, volumes
///
/// Native scores compare with the label of the file. The bundle's own evaluation compares with a label that went to
/// the network's grid and back, which is about 0.5 % kinder; both Dice are reported.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc evaluate --weights run/best.safetensors --data Task09_Spleen --out scores
  spleen-hpc evaluate --weights model.pt --data Task09_Spleen --recipe 0.5.9 --cases all")]
pub struct Args {
    /// MONAI's model.pt, a checkpoint of `train`, or safetensors
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Folder for cases.csv, the bundle's metrics.csv and val_mean_dice_*.csv, and evaluation.json
    #[arg(long, value_name = "DIR", default_value = "eval")]
    out: PathBuf,
    /// Which labelled cases
    #[arg(long, value_enum, default_value_t = Which::Val)]
    cases: Which,
    /// Folder for the masks, u8 in each scan's geometry; without it none are written
    #[arg(long, value_name = "DIR")]
    masks: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Which {
    /// Those that validate
    Val,
    /// Those that train
    Train,
    /// Both
    All,
}

/// Scores the cases and writes them down.
pub fn run(args: &Args) -> Outcome {
    let trained = Trained::open(&args.weights)?;
    let config = resolve(&trained.config()?, &args.settings.given()?, &trained.fixed())?;
    let all = training_cases(data(&config)?)?;
    let cases = match args.cases {
        Which::All => all,
        which => {
            let (train, val) = split(&config.run).apply(all.len())?;
            let chosen = if matches!(which, Which::Val) { val } else { train };
            chosen.into_iter().map(|i| all[i].clone()).collect::<Vec<Case>>()
        }
    };
    if cases.is_empty() {
        return Err(Error::Usage(
            "no case is left to evaluate: use --cases all, or change --val-cases".into(),
        ));
    }
    memory::check_window(&config)?;
    let device = choose_device(&config)?;
    let learned = trained.learned_from();
    if let (Which::Val, Some(case)) = (args.cases, cases.iter().find(|case| learned.contains(&case.name))) {
        let name = &case.name;
        tell(format_args!(
            "warning: {name} is among the cases these weights were trained on: was it another split?"
        ));
    }
    let stop = interrupt::watch("the cases under way are finished first")?;
    score(&cases, (&args.weights, &device), &config, &args.out, args.masks.as_deref(), stop)
}

/// Scores `weights` on `cases` by `device`, on the screen and in tables in `out`; masks go to `masks`.
pub fn score(
    cases: &[Case],
    (weights, device): (&Path, &Device),
    config: &Config,
    out: &Path,
    masks: Option<&Path>,
    stop: &AtomicBool,
) -> Outcome {
    let network = Trained::open(weights)?.network(device)?;
    for folder in std::iter::once(out).chain(masks) {
        publish::folder(folder)?;
    }
    if let Some(folder) = masks {
        refuse_overwriting(cases, folder)?;
    }
    let progress = Progress::bar_only(cases.len(), "cases");
    let mut ended = 0;
    let results = network.predict(&progress, |predictor| {
        evaluate(cases, predictor, config, masks, stop, |case, result| {
            progress.suspend(|| match result {
                Ok(scores) => {
                    scores.warnings.iter().for_each(|warning| tell(format_args!("warning: {warning}")));
                    say(line(scores));
                }
                Err(err) => tell(format_args!("error: {}: {err}", case.name)),
            });
            ended += 1;
            progress.set(ended, cases.len());
        })
    });
    progress.finish();

    let scored: Vec<&CaseScores> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    write_tables(out, weights, config, &scored)?;
    let mean = |dice: fn(&CaseScores) -> f32| {
        mean_ignoring_nan(&scored.iter().map(|scores| dice(scores)).collect::<Vec<_>>()).0
    };
    say(format_args!(
        "mean Dice of {} cases: {:.4} bundle-style, {:.4} native; tables in {}",
        scored.len(),
        mean(|scores| scores.dice_bundle),
        mean(|scores| scores.native.dice),
        out.display()
    ));
    if !scored.is_empty() && scored.iter().all(|scores| scores.native.overlap.truth == 0) {
        tell(format_args!(
            "warning: no label holds a voxel of the organ, so there is no Dice: look at --label-value"
        ));
    }
    if results.len() < cases.len() {
        say(format_args!("stopped after {} of {} cases", results.len(), cases.len()));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    match cases.len() - scored.len() {
        0 => Ok(ExitCode::SUCCESS),
        failed => Err(Error::Usage(format!("{failed} of {} cases have no scores, see above", cases.len()))),
    }
}

/// A mask must not take the place of a scan or a label.
fn refuse_overwriting(cases: &[Case], masks: &Path) -> Result<()> {
    for case in cases {
        let Ok(mask) = masks.join(format!("{}.nii.gz", case.name)).canonicalize() else { continue };
        if [&case.image, &case.label].iter().any(|file| file.canonicalize().is_ok_and(|file| file == mask)) {
            let what = format!("--masks would overwrite {}: choose another folder", mask.display());
            return Err(Error::Usage(what));
        }
    }
    Ok(())
}

/// One case on the screen.
fn line(scores: &CaseScores) -> String {
    let native = &scores.native;
    format!(
        "{}: Dice {:.4} (bundle-style {:.4}, grid {:.4}), HD95 {:.2} mm, ASSD {:.2} mm, NSD {:.4}, {:.1} ml of {:.1} ml",
        scores.name,
        native.dice,
        scores.dice_bundle,
        scores.dice_grid,
        native.hd95_mm,
        native.assd_mm,
        native.nsd,
        native.pred_ml,
        native.truth_ml
    )
}

/// Our table, the bundle's, and all that decided them.
fn write_tables(out: &Path, weights: &Path, config: &Config, scored: &[&CaseScores]) -> Result<()> {
    let bundle: Vec<(String, f32)> =
        scored.iter().map(|scores| (scores.image.display().to_string(), scores.dice_bundle)).collect();
    csv::write_bundle(out, &bundle)?;
    csv::write_cases(out, scored, config.run.nsd_tolerance_mm)?;
    let origin = json!({
        "commit": crate::COMMIT,
        "weights": weights,
        "config": Overrides::of(config).to_json(),
    });
    let text = serde_json::to_string_pretty(&origin).map_err(|err| Error::Internal(err.to_string()))?;
    publish(&out.join("evaluation.json"), |file| file.write_all(text.as_bytes()))
}

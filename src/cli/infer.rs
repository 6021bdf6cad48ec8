//! `spleen-hpc infer`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::network::Trained;
use super::progress::Progress;
use super::settings::{Settings, announce_device, resolve};
use super::{INTERRUPTED, Outcome, interrupt};
use crate::config::{Config, Overrides};
use crate::data::dataset::expand_inputs;
use crate::data::publish::publish;
use crate::infer::jobs::{Style, jobs};
use crate::infer::pipeline::{self, Statistics};
use crate::{Error, Result};

/// Segment scans: one mask a scan, in the scan's own geometry, and statistics.json with volumes in ml
///
/// The model is loaded once; the next scan is read and the last mask written while the network works. A scan that
/// cannot be used is reported and does not keep the others.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc infer --weights run/best.safetensors ct.nii.gz --out masks
  spleen-hpc infer --weights model.pt --out masks data/imagesTs 'more/*.nii.gz'
  spleen-hpc infer --weights model.pt --bundle-output --out eval data/imagesTs    as the MONAI bundle writes them")]
pub struct Args {
    /// Scans (.nii, .nii.gz, .hdr with .img), folders of them, or globs
    #[arg(value_name = "INPUT", required = true)]
    inputs: Vec<String>,
    /// MONAI's model.pt, a checkpoint of `train`, or safetensors
    #[arg(long, value_name = "FILE")]
    weights: PathBuf,
    /// Folder for the masks; a scan is never overwritten
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Write float32 STEM/STEM_trans.nii.gz like the bundle instead of u8 STEM.nii.gz
    #[arg(long)]
    bundle_output: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Segments every input.
pub fn run(args: &Args) -> Outcome {
    let style = if args.bundle_output { Style::Bundle } else { Style::Mask };
    let jobs = jobs(&expand_inputs(&args.inputs)?, &args.out, style)?;
    let trained = Trained::open(&args.weights)?;
    let config = resolve(&trained.config()?, &args.settings.given()?, &trained.fixed())?;
    announce_device(config.device)?;
    let network = trained.network()?;
    std::fs::create_dir_all(&args.out).map_err(Error::io(&args.out, "create"))?;
    let stop = interrupt::watch("the scans under way are finished first")?;

    let progress = Progress::new(jobs.len(), "scans");
    let windows = AtomicUsize::new(0);
    let counted = |x: &[f32], shape: [usize; 4]| {
        let logits = network(x, shape)?;
        let seen = windows.fetch_add(shape[0], Ordering::Relaxed) + shape[0];
        progress.note(format!("{seen} windows"));
        Ok(logits)
    };
    let mut ended = 0;
    let outcomes =
        pipeline::run(&jobs, &counted, (&config.preprocess, &config.window), style, stop, |outcome| {
            progress.suspend(|| match &outcome.result {
                Ok(found) => println!("{}: {:.1} ml", found.output.display(), found.volume_ml),
                Err(err) => eprintln!("error: {err}"),
            });
            ended += 1;
            progress.set(ended, jobs.len());
        });
    progress.finish();

    let failed = outcomes.iter().filter(|outcome| outcome.result.is_err()).count();
    write_statistics(&args.out, &args.weights, &config, &outcomes)?;
    if outcomes.len() < jobs.len() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    if failed > 0 {
        return Err(Error::Usage(format!("{failed} of {} scans have no mask: see above", jobs.len())));
    }
    Ok(ExitCode::SUCCESS)
}

/// `OUT/statistics.json`: every case of this call, and all that decided its masks.
fn write_statistics(
    out: &Path,
    weights: &Path,
    config: &Config,
    outcomes: &[pipeline::Outcome],
) -> Result<()> {
    let cases: Vec<&Statistics> =
        outcomes.iter().filter_map(|outcome| outcome.result.as_ref().ok()).collect();
    let failed = outcomes.iter().filter_map(|outcome| {
        let err = outcome.result.as_ref().err()?;
        Some(json!({ "input": outcome.input, "error": err.to_string() }))
    });
    let report = json!({
        "commit": crate::COMMIT,
        "weights": weights,
        "config": Overrides::of(config).to_json(),
        "cases": cases,
        "failed": failed.collect::<Vec<_>>(),
    });
    let text = serde_json::to_string_pretty(&report).map_err(|err| Error::Internal(err.to_string()))?;
    publish(&out.join("statistics.json"), |file| file.write_all(text.as_bytes()))
}

//! `spleen-hpc infer`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::network::Trained;
use super::progress::Progress;
use super::settings::{Settings, choose_device, resolve};
use super::{INTERRUPTED, Outcome, interrupt, memory, say, tell};
use crate::config::{Config, Overrides};
use crate::data::dataset::expand_inputs;
use crate::data::publish::{self, publish};
use crate::infer::jobs::{Job, Style, jobs};
use crate::infer::pipeline::Statistics;
use crate::infer::segment;
use crate::{Error, Result};

/// Segment scans: one mask a scan, in the scan's own geometry, and statistics.json with volumes in ml
///
/// The model is loaded once; the next scan is read and the last mask written while the network works. A scan that
/// cannot be used is reported and does not keep the others.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  spleen-hpc infer --weights run/best.safetensors ct.nii.gz --out masks
  spleen-hpc infer --weights model.pt --out masks data/imagesTs 'more/*.nii.gz'
  spleen-hpc infer --weights model.pt --out eval --bundle-output data/imagesTs")]
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
    memory::check_window(&config)?;
    let network = trained.network(&choose_device(&config)?)?;
    publish::folder(&args.out)?;
    let stop = interrupt::watch("the scans under way are finished first")?;

    let progress = Progress::bar_only(jobs.len(), "scans");
    let mut ended = 0;
    let results = network.predict(&progress, |predictor| {
        segment(&jobs, predictor, (&config.preprocess, &config.window), style, stop, |_, result| {
            progress.suspend(|| match result {
                Ok(found) => {
                    found.warnings.iter().for_each(|warning| tell(format_args!("warning: {warning}")));
                    say(format_args!("{}: {:.1} ml", found.output.display(), found.volume_ml));
                }
                Err(err) => tell(format_args!("error: {err}")),
            });
            ended += 1;
            progress.set(ended, jobs.len());
        })
    });
    progress.finish();

    write_statistics(&args.out, &args.weights, &config, &jobs, &results)?;
    if results.len() < jobs.len() {
        say(format_args!("stopped after {} of {} scans", results.len(), jobs.len()));
        return Ok(ExitCode::from(INTERRUPTED));
    }
    match results.iter().filter(|result| result.is_err()).count() {
        0 => Ok(ExitCode::SUCCESS),
        failed => Err(Error::Usage(format!("{failed} of {} scans have no mask, see above", jobs.len()))),
    }
}

/// `OUT/statistics.json`: every case of this call, and all that decided its masks.
fn write_statistics(
    out: &Path,
    weights: &Path,
    config: &Config,
    jobs: &[Job],
    results: &[Result<Statistics>],
) -> Result<()> {
    let cases: Vec<&Statistics> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    let failed: Vec<_> = jobs
        .iter()
        .zip(results)
        .filter_map(|(job, result)| {
            Some(json!({ "input": job.input, "error": result.as_ref().err()?.to_string() }))
        })
        .collect();
    let report = json!({
        "commit": crate::COMMIT,
        "weights": weights,
        "config": Overrides::of(config).to_json(),
        "cases": cases,
        "failed": failed,
    });
    let text = serde_json::to_string_pretty(&report).map_err(|err| Error::Internal(err.to_string()))?;
    publish(&out.join("statistics.json"), |file| file.write_all(text.as_bytes()))
}

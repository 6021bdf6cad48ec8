//! How well a network does on labelled scans, on every grid that matters.
//!
//! * on the network's grid, as the bundle validates during training;
//! * bundle-style: prediction and label on the scan's grid, where the label, too, went to the network's grid and back
//!   (`evaluate.json` inverts both), which forgives what resampling lost;
//! * native: against the label of the file, which is what a reader of the mask cares for.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::predict::{Network, argmax, probabilities};
use super::stages::{self, Stages};
use crate::Result;
use crate::config::{Config, Window};
use crate::data::dataset::Case;
use crate::data::nifti_write;
use crate::data::scan::{Scan, read_labelled};
use crate::data::volume::Volume;
use crate::metrics::overlap::Overlap;
use crate::metrics::{Scores, score};

/// The scores of one case.
#[derive(Clone, Debug)]
pub struct CaseScores {
    /// The case's name.
    pub name: String,
    /// Its image.
    pub image: PathBuf,
    /// Dice on the network's grid; NaN where the label is empty.
    pub dice_grid: f32,
    /// Dice as the bundle's evaluation has it; NaN where the label is empty.
    pub dice_bundle: f32,
    /// Everything against the label of the file.
    pub native: Scores,
    /// Seconds in the network.
    pub network_s: f64,
    /// What was mended in the image, a sentence each.
    pub warnings: Vec<String>,
}

/// Dice of a preprocessed case on its own grid: what training validates with. `image` and `label` are (D,H,W) =
/// `shape`; NaN where the label is empty (MONAI leaves such a case out of the mean).
///
/// # Errors
/// Those of the network.
pub fn grid_dice(
    network: &Network,
    (image, label): (&[f32], &[u8]),
    shape: [usize; 3],
    window: &Window,
) -> Result<f32> {
    let mask = argmax(&probabilities(network, image, shape, window)?);
    Ok(Overlap::count(&mask, label)?.dice())
}

/// A case that was read.
struct Ready {
    scan: Scan,
    truth: Volume<u8>,
    grid_label: Volume<u8>,
}

/// A case that was predicted.
struct Predicted {
    ready: Ready,
    probabilities: Vec<f32>,
    network_s: f64,
}

/// Scores every case, and writes its mask to `masks`/NAME.nii.gz if that is given; `done` is told of each as it ends, in order. An error of one case does not keep the others.
///
/// When `stop` becomes true no further case is begun, those under way are finished, and the answer is shorter.
pub fn evaluate(
    cases: &[Case],
    network: &Network,
    config: &Config,
    masks: Option<&Path>,
    stop: &AtomicBool,
    done: impl FnMut(&Case, &Result<CaseScores>) + Send,
) -> Vec<Result<CaseScores>> {
    let stages = Stages {
        read: |case: &Case| read(case, config),
        predict: |ready: Ready| predict(ready, network, &config.window),
        finish: |case: &Case, predicted: Predicted| {
            finish(case, predicted, config.run.nsd_tolerance_mm, masks)
        },
    };
    stages::run(cases, stop, stages, done)
}

fn read(case: &Case, config: &Config) -> Result<Ready> {
    let (mut scan, truth) = read_labelled(case, config.run.label_value, &config.preprocess)?;
    let grid_label = scan.prepared.label.take().expect("a label that goes in comes out");
    Ok(Ready { scan, truth, grid_label })
}

fn predict(ready: Ready, network: &Network, window: &Window) -> Result<Predicted> {
    let start = Instant::now();
    let image = &ready.scan.prepared.image;
    let probabilities = probabilities(network, &image.data, image.shape, window)?;
    Ok(Predicted { ready, probabilities, network_s: start.elapsed().as_secs_f64() })
}

fn finish(
    case: &Case,
    predicted: Predicted,
    nsd_tolerance_mm: f64,
    masks: Option<&Path>,
) -> Result<CaseScores> {
    let Predicted { ready: Ready { scan, truth, grid_label }, probabilities, network_s } = predicted;
    let Scan { header, prepared, warnings } = scan;
    let dice_grid = Overlap::count(&argmax(&probabilities), &grid_label.data)?.dice();
    let mask = prepared.geometry.invert_argmax(bytemuck::cast_slice(&probabilities))?;
    if let Some(folder) = masks {
        nifti_write::write_mask(folder.join(format!("{}.nii.gz", case.name)), &header, &mask)?;
    }
    let round_trip = prepared.geometry.invert_label(&grid_label.data)?;
    let dice_bundle = Overlap::count(&mask, &round_trip)?.dice();
    let mask = Volume { shape: truth.shape, data: mask, affine: truth.affine };
    let native = score(&mask, &truth, nsd_tolerance_mm)?;
    Ok(CaseScores {
        name: case.name.clone(),
        image: case.image.clone(),
        dice_grid,
        dice_bundle,
        native,
        network_s,
        warnings,
    })
}

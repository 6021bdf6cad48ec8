//! How well a network does on labelled scans, on every grid that matters.
//!
//! * on the network's grid, as the bundle validates during training;
//! * bundle-style: prediction and label on the scan's grid, where the label, too, went to the network's grid and back
//!   (`evaluate.json` inverts both), which forgives what resampling lost;
//! * native: against the label of the file, which is what a reader of the mask cares for.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::cuda::{both_masks, grid_mask};
use super::predict::{Predictor, argmax, probabilities};
use super::stages::{self, Stages};
use crate::Result;
use crate::config::{Config, Window};
use crate::data::cache::CachedCase;
use crate::data::cache_file::Image;
use crate::data::dataset::Case;
use crate::data::nifti_write;
use crate::data::scan::{Scan, read_labelled};
use crate::data::volume::Volume;
use crate::device::arena::Buffer;
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

/// Dice of a preprocessed case on its own grid: what training validates with. NaN where the label is empty (MONAI
/// leaves such a case out of the mean).
///
/// # Errors
/// Those of the network.
pub fn grid_dice(predictor: &Predictor, case: &CachedCase, window: &Window) -> Result<f32> {
    let mask = match predictor {
        Predictor::Host(network) => argmax(&probabilities(network, &case.image_f32(), case.shape(), window)?),
        Predictor::Device(cuda, network) => {
            let image = cuda.act(case.label().len())?;
            match case.image() {
                Image::F16(stored) => image.upload_f16(stored)?,
                Image::F32(stored) => image.upload(stored)?,
            }
            grid_mask(cuda, network, &image, case.shape(), window)?
        }
    };
    Ok(Overlap::count(&mask, case.label())?.dice())
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
    found: Found,
    network_s: f64,
}

/// What the network said.
enum Found {
    /// (D, H, W, 2) on its own grid: masks are made of them while the next case is predicted.
    Probabilities(Buffer),
    /// Masks that a device made, on the network's grid and on the scan's.
    Masks(Vec<u8>, Vec<u8>),
}

/// Scores every case, and writes its mask to `masks`/NAME.nii.gz if that is given; `done` is told of each as it ends, in order. An error of one case does not keep the others.
///
/// When `stop` becomes true no further case is begun, those under way are finished, and the answer is shorter.
pub fn evaluate(
    cases: &[Case],
    predictor: &Predictor,
    config: &Config,
    masks: Option<&Path>,
    stop: &AtomicBool,
    done: impl FnMut(&Case, &Result<CaseScores>) + Send,
) -> Vec<Result<CaseScores>> {
    let stages = Stages {
        read: |case: &Case| read(case, config),
        predict: |ready: Ready| predict(ready, predictor, &config.window),
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

fn predict(ready: Ready, predictor: &Predictor, window: &Window) -> Result<Predicted> {
    let start = Instant::now();
    let prepared = &ready.scan.prepared;
    let found = match predictor {
        Predictor::Host(network) => {
            let image = &prepared.image;
            Found::Probabilities(probabilities(network, &image.data, image.shape, window)?)
        }
        Predictor::Device(cuda, network) => {
            let (grid, native) = both_masks(cuda, network, (&prepared.image, &prepared.geometry), window)?;
            Found::Masks(grid, native)
        }
    };
    Ok(Predicted { ready, found, network_s: start.elapsed().as_secs_f64() })
}

fn finish(
    case: &Case,
    predicted: Predicted,
    nsd_tolerance_mm: f64,
    masks: Option<&Path>,
) -> Result<CaseScores> {
    let Predicted { ready: Ready { scan, truth, grid_label }, found, network_s } = predicted;
    let Scan { header, prepared, warnings } = scan;
    let (grid, mask) = match found {
        Found::Masks(grid, native) => (grid, native),
        Found::Probabilities(p) => (argmax(&p), prepared.geometry.invert_argmax(bytemuck::cast_slice(&p))?),
    };
    let dice_grid = Overlap::count(&grid, &grid_label.data)?.dice();
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

//! Many scans to masks: read + preprocess | windows + softmax | inverse resample + argmax + write.
//!
//! The probabilities never exist on the native grid.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::jobs::{Job, Style};
use super::predict::{Network, probabilities};
use super::stages::{self, Stages};
use crate::Result;
use crate::config::{Preprocess, Window};
use crate::data::affine::column_norms;
use crate::data::nifti_header::Header;
use crate::data::preprocess::{Geometry, Prepared};
use crate::data::scan::{self, Scan};
use crate::data::{nifti_write, publish};
use crate::device::arena::Buffer;
use crate::metrics::overlap::voxel_ml;

/// Voxels that a task counts.
const PART: usize = 1 << 16;

/// What was found in one scan.
#[derive(Clone, Debug, Serialize)]
pub struct Statistics {
    /// The scan.
    pub input: PathBuf,
    /// Its mask.
    pub output: PathBuf,
    /// Voxels of the scan along i, j, k.
    pub shape: [usize; 3],
    /// Voxel size in mm.
    pub spacing_mm: [f64; 3],
    /// Voxels that belong to the organ.
    pub voxels: usize,
    /// Their volume.
    pub volume_ml: f64,
    /// What was mended in the scan, a sentence each.
    pub warnings: Vec<String>,
    /// Seconds of each stage.
    pub seconds: Seconds,
}

/// Wall time of the three stages of one case, which overlap with those of other cases.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Seconds {
    /// Reading and preprocessing.
    pub read: f64,
    /// The network, window by window.
    pub network: f64,
    /// Inversion to the native grid and writing.
    pub write: f64,
}

/// After the first stage.
struct Ready {
    scan: Scan,
    read_s: f64,
}

/// After the second stage.
struct Predicted {
    header: Header,
    geometry: Geometry,
    warnings: Vec<String>,
    probabilities: Buffer,
    read_s: f64,
    network_s: f64,
}

/// Segments every job; `done` is told of each as it ends, in order. An error of one scan does not keep the others.
///
/// When `stop` becomes true no further scan is begun, those under way are finished, and the answer is shorter.
pub fn segment(
    jobs: &[Job],
    network: &Network,
    (transform, window): (&Preprocess, &Window),
    style: Style,
    stop: &AtomicBool,
    done: impl FnMut(&Job, &Result<Statistics>) + Send,
) -> Vec<Result<Statistics>> {
    let stages = Stages {
        read: |job: &Job| read(job, transform),
        predict: |ready: Ready| predict(ready, network, window),
        finish: |job: &Job, predicted: Predicted| write(job, predicted, style),
    };
    stages::run(jobs, stop, stages, done)
}

fn read(job: &Job, transform: &Preprocess) -> Result<Ready> {
    let start = Instant::now();
    let scan = scan::read(&job.input, transform)?;
    Ok(Ready { scan, read_s: start.elapsed().as_secs_f64() })
}

fn predict(ready: Ready, network: &Network, window: &Window) -> Result<Predicted> {
    let Ready { scan: Scan { header, prepared, warnings }, read_s } = ready;
    let Prepared { image, geometry, .. } = prepared;
    let start = Instant::now();
    let probabilities = probabilities(network, &image.data, image.shape, window)?;
    let network_s = start.elapsed().as_secs_f64();
    Ok(Predicted { header, geometry, warnings, probabilities, read_s, network_s })
}

fn write(job: &Job, case: Predicted, style: Style) -> Result<Statistics> {
    let start = Instant::now();
    let mask = case.geometry.invert_argmax(bytemuck::cast_slice(&case.probabilities))?;
    let Predicted { header, warnings, read_s, network_s, .. } = case;
    publish_mask(job, style, Segmented { header, mask, warnings, read_s, network_s }, start)
}

/// A mask on its scan's grid, k fastest.
pub(super) struct Segmented {
    pub header: Header,
    pub mask: Vec<u8>,
    pub warnings: Vec<String>,
    pub read_s: f64,
    pub network_s: f64,
}

/// Writes a mask and counts it; the last stage began at `start`.
pub(super) fn publish_mask(job: &Job, style: Style, case: Segmented, start: Instant) -> Result<Statistics> {
    let Segmented { header, mask, warnings, read_s, network_s } = case;
    let folder = job.output.parent().expect("an output is a file in a folder");
    publish::folder(folder)?;
    match style {
        Style::Mask => nifti_write::write_mask(&job.output, &header, &mask)?,
        Style::Bundle => nifti_write::write_bundle(&job.output, &header, &mask)?,
    }
    let voxels = mask.par_chunks(PART).map(|part| part.iter().filter(|&&v| v != 0).count()).sum();
    Ok(Statistics {
        input: job.input.clone(),
        output: job.output.clone(),
        shape: header.shape,
        spacing_mm: column_norms(&header.affine),
        voxels,
        volume_ml: voxels as f64 * voxel_ml(&header.affine),
        warnings,
        seconds: Seconds { read: read_s, network: network_s, write: start.elapsed().as_secs_f64() },
    })
}

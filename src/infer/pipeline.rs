//! Many scans through one network, with the next one read and the last one written meanwhile.
//!
//! Three threads, each holding at most one case and handing on at most one: read + preprocess | windows + softmax |
//! inverse resample + argmax + write. The probabilities never exist on the native grid.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use serde::Serialize;

use super::jobs::{Job, Style};
use super::predict::{Network, probabilities};
use crate::config::{Preprocess, Window};
use crate::data::nifti_header::Header;
use crate::data::preprocess::{Geometry, Prepared, preprocess};
use crate::data::volume::Affine;
use crate::data::{nifti, nifti_write};
use crate::{Error, Result};

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

/// A case that ended, well or not.
#[derive(Debug)]
pub struct Outcome {
    /// The scan.
    pub input: PathBuf,
    /// What was found, or why it could not be.
    pub result: Result<Statistics>,
}

/// A case between two stages; `Err` passes through those that are left.
struct Case<T> {
    job: Job,
    result: Result<T>,
}

/// After the first stage.
struct Ready {
    header: Header,
    prepared: Prepared,
    read_s: f64,
}

/// After the second stage.
struct Predicted {
    header: Header,
    geometry: Geometry,
    probabilities: Vec<f32>,
    read_s: f64,
    network_s: f64,
}

/// Segments every job; `done` is told of each as it ends, in order. An error of one case does not keep the others.
///
/// When `stop` becomes true no further case is begun, and those under way are finished.
pub fn run(
    jobs: &[Job],
    network: &Network,
    numbers: (&Preprocess, &Window),
    style: Style,
    stop: &AtomicBool,
    mut done: impl FnMut(&Outcome) + Send,
) -> Vec<Outcome> {
    let (transform, window) = numbers;
    // A rendezvous: a finished case waits in its own stage, so that no more than three are in memory.
    let (to_network, ready) = sync_channel(0);
    let (to_writer, predicted) = sync_channel(0);
    std::thread::scope(|scope| {
        scope.spawn(move || read_all(jobs, transform, stop, &to_network));
        let writer = scope.spawn(move || {
            let mut outcomes = Vec::new();
            for case in predicted {
                let outcome = finish(case, style);
                done(&outcome);
                outcomes.push(outcome);
            }
            outcomes
        });
        predict_all(ready, network, window, &to_writer);
        drop(to_writer);
        writer.join().expect("a stage returns its errors")
    })
}

fn read_all(jobs: &[Job], transform: &Preprocess, stop: &AtomicBool, next: &SyncSender<Case<Ready>>) {
    for job in jobs {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let case = Case { job: job.clone(), result: read(job, transform) };
        // The receiver is gone only when its thread panicked, which the scope reports.
        if next.send(case).is_err() {
            return;
        }
    }
}

fn read(job: &Job, transform: &Preprocess) -> Result<Ready> {
    let start = Instant::now();
    let file = nifti::read(&job.input)?;
    let prepared = preprocess(&file.volume, None, transform)?;
    Ok(Ready { header: file.header, prepared, read_s: start.elapsed().as_secs_f64() })
}

fn predict_all(
    ready: Receiver<Case<Ready>>,
    network: &Network,
    window: &Window,
    next: &SyncSender<Case<Predicted>>,
) {
    for Case { job, result } in ready {
        let result = result.and_then(|Ready { header, prepared, read_s }| {
            let start = Instant::now();
            let probabilities = probabilities(network, &prepared.image, window)?;
            let network_s = start.elapsed().as_secs_f64();
            Ok(Predicted { header, geometry: prepared.geometry, probabilities, read_s, network_s })
        });
        if next.send(Case { job, result }).is_err() {
            return;
        }
    }
}

fn finish(case: Case<Predicted>, style: Style) -> Outcome {
    let Case { job, result } = case;
    let result = result.and_then(|predicted| write(&job, predicted, style));
    Outcome { input: job.input, result }
}

fn write(job: &Job, case: Predicted, style: Style) -> Result<Statistics> {
    let start = Instant::now();
    let mask = case.geometry.invert_argmax(bytemuck::cast_slice(&case.probabilities))?;
    let folder = job.output.parent().expect("an output is a file in a folder");
    std::fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    match style {
        Style::Mask => nifti_write::write_mask(&job.output, &case.header, &mask)?,
        Style::Bundle => nifti_write::write_bundle(&job.output, &case.header, &mask)?,
    }
    let voxels = mask.iter().filter(|&&v| v != 0).count();
    Ok(Statistics {
        input: job.input.clone(),
        output: job.output.clone(),
        shape: case.header.shape,
        spacing_mm: spacing_mm(&case.header.affine),
        voxels,
        volume_ml: voxels as f64 * voxel_ml(&case.header.affine),
        seconds: Seconds { read: case.read_s, network: case.network_s, write: start.elapsed().as_secs_f64() },
    })
}

/// Column norms of the affine.
fn spacing_mm(affine: &Affine) -> [f64; 3] {
    std::array::from_fn(|c| (0..3).map(|r| affine[r][c].powi(2)).sum::<f64>().sqrt())
}

/// Volume of a voxel: the determinant, which also holds for sheared grids.
pub(super) fn voxel_ml(affine: &Affine) -> f64 {
    let [[a, b, c, _], [d, e, f, _], [g, h, i, _], _] = *affine;
    (a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)).abs() / 1000.0
}

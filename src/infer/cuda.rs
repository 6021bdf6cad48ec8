//! Inference on a CUDA device: only the file's voxels and the mask cross the bus.
//!
//! read + inflate | orient + resample + scale -> windows -> network -> blend -> softmax -> inverse + argmax | write
//!
//! The stages at either side of the bars run on the host while the device works on another scan. Everything but the
//! network is the CPU's arithmetic (`pipeline`, `predict`), rounding included; of the softmax, its exponential.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::importance::importance_map;
use super::jobs::{Job, Style};
use super::pipeline::{Segmented, Statistics, publish_mask};
use super::predict::CLASSES;
use super::sliding_window::axis_starts;
use super::stages::{self, Stages};
use crate::config::{Blend, Preprocess, Window};
use crate::data::preprocess::Geometry;
use crate::data::scan::{self, StoredScan};
use crate::data::volume::{FileVoxels, Volume};
use crate::device::cuda::{Act, Buf, Cuda, Info, Precision};
use crate::device::nvtx::range;
use crate::ops::resample::cuda::{invert_argmax, prepare};
use crate::ops::window::cuda::{Image, Tiling};
use crate::tensor::{Shape, View};
use crate::{Error, Result};

/// A network in inference mode on a device: windows (n, roi, 1) in, logits (n, roi, 2) out.
pub type DeviceNetwork<'a> = dyn Fn(&View) -> Result<View> + 'a;

/// Does `work` in a range of the profiler's timeline.
fn stage<R>(name: &'static str, work: impl FnOnce() -> R) -> R {
    let _range = range(name);
    work()
}

/// Weighted sums of the logits of all windows over `image`, (D, H, W, 2) and room beyond, with the windows that they
/// are of.
///
/// # Errors
/// Those of the network and of the device, and [`Error::Shape`] for logits of the wrong size.
pub fn weighted_sums(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    image: &Image,
    window: &Window,
) -> Result<(Tiling, Buf<f32>)> {
    let starts = axis_starts(image.shape, window).map(|axis| axis.into_iter().map(|s| s as i32).collect());
    // Where all weights are 1, their products are not worth a map.
    let weights = match window.blend {
        Blend::Constant => None,
        Blend::Gaussian => Some(importance_map(window.roi, window.blend)),
    };
    let tiling = Tiling::new(cuda, image.shape, window.roi, starts, weights.as_deref())?;
    let sums = tiling.zero_sums()?;
    for first in (0..tiling.len()).step_by(window.batch) {
        let n = window.batch.min(tiling.len() - first);
        let windows = stage("windows", || tiling.gather(image, first..first + n))?;
        let logits = stage("network", move || network(&windows))?;
        let want = Shape::new(n, window.roi, CLASSES);
        if logits.shape != want {
            let (want, got) = (want.to_string(), logits.shape.to_string());
            return Err(Error::Shape { op: "sliding_window", want, got });
        }
        stage("blend", || tiling.blend(&logits, first, &sums))?;
    }
    Ok((tiling, sums))
}

/// Probabilities of background and organ, (D, H, W, 2), of an image on the device: [`super::predict::probabilities`].
/// There may be room beyond them.
///
/// # Errors
/// As [`weighted_sums`].
pub fn probabilities(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    image: &Image,
    window: &Window,
) -> Result<Buf<f32>> {
    let (tiling, sums) = weighted_sums(cuda, network, image, window)?;
    stage("softmax", || tiling.softmax(&sums))?;
    Ok(sums)
}

/// The mask of a preprocessed `image` of `shape` = (D, H, W) on its own grid, k fastest: what training validates with.
///
/// # Errors
/// As [`weighted_sums`].
pub fn grid_mask(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    image: &Act,
    shape: [usize; 3],
    window: &Window,
) -> Result<Vec<u8>> {
    let image = Image { data: image.clone(), whole: shape, start: [0; 3], shape };
    let (tiling, sums) = weighted_sums(cuda, network, &image, window)?;
    tiling.argmax(&sums)?.download()
}

/// Masks of a case that the host preprocessed, on its own grid and on the scan's, k fastest: what evaluation compares.
///
/// # Errors
/// As [`weighted_sums`].
pub fn both_masks(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    (image, geometry): (&Volume<f32>, &Geometry),
    window: &Window,
) -> Result<(Vec<u8>, Vec<u8>)> {
    let shape = image.shape;
    let data = cuda.act(image.len())?;
    data.upload(&image.data)?;
    let (tiling, sums) =
        weighted_sums(cuda, network, &Image { data, whole: shape, start: [0; 3], shape }, window)?;
    let grid = tiling.argmax(&sums)?;
    stage("softmax", || tiling.softmax(&sums))?;
    let native = stage("inverse", || invert_argmax(&sums, geometry))?;
    Ok((grid.download()?, native.download()?))
}

/// From a scan's voxels to its mask, native grid, k fastest, and the geometry with what was cropped.
///
/// # Errors
/// [`Error::Usage`] when the scan does not fit the device, and those of [`prepare`], the network and the device.
pub fn segment_on_device(
    cuda: &Arc<Cuda>,
    network: &DeviceNetwork,
    scan: &StoredScan,
    p: &Preprocess,
    window: &Window,
) -> Result<(Vec<u8>, Geometry)> {
    fits(scan, p, window, cuda.info(), cuda.precision())?;
    let prepared = stage("preprocess", || prepare(cuda, &scan.voxels, scan.geometry.clone(), p))?;
    let geometry = prepared.geometry;
    let image = Image {
        data: prepared.image,
        whole: geometry.resampling.out_shape,
        start: geometry.crop.map_or([0; 3], |c| c.start.map(|v| v as usize)),
        shape: geometry.prepared_shape(),
    };
    let probabilities = probabilities(cuda, network, &image, window)?;
    let mask = stage("inverse", || invert_argmax(&probabilities, &geometry)?.download())?;
    Ok((mask, geometry))
}

/// Refuses a scan whose own buffers are more than the device has, before any of them is made.
fn fits(scan: &StoredScan, p: &Preprocess, window: &Window, info: &Info, precision: Precision) -> Result<()> {
    let count = |shape: [usize; 3]| shape.iter().map(|&n| n as f64).product::<f64>();
    let stored = match scan.voxels {
        FileVoxels::I16 { .. } => 2.0,
        FileVoxels::F32(_) => 4.0,
    };
    let elem = precision.bytes() as f64;
    let exact = if p.crop_foreground { 4.0 } else { 0.0 };
    let sums = 4.0 * CLASSES as f64;
    let bytes = count(scan.header.shape) * (stored + 1.0)
        + count(scan.geometry.resampling.out_shape) * (elem + exact + sums)
        + count(window.roi) * window.batch as f64 * elem * (1 + CLASSES) as f64;
    if bytes <= info.memory as f64 {
        return Ok(());
    }
    let gib = |bytes: f64| bytes / f64::from(1u32 << 30);
    Err(Error::Usage(format!(
        "{:?} voxels on a grid of {:?} take {:.1} GiB beside the network, and the {} has {:.1}: give a coarser \
         --spacing or a smaller --sw-batch, or use --device cpu",
        scan.header.shape,
        scan.geometry.resampling.out_shape,
        gib(bytes),
        info.name,
        gib(info.memory as f64)
    )))
}

/// After the first stage.
struct Ready {
    scan: StoredScan,
    input: PathBuf,
    read_s: f64,
}

/// Segments every job: [`super::pipeline::segment`] on a device, which is driven by the calling thread. The seconds of
/// the network are those of all that the device does, and of the copies.
pub fn segment(
    jobs: &[Job],
    (cuda, network): (&Arc<Cuda>, &DeviceNetwork),
    (transform, window): (&Preprocess, &Window),
    style: Style,
    stop: &AtomicBool,
    done: impl FnMut(&Job, &Result<Statistics>) + Send,
) -> Vec<Result<Statistics>> {
    let stages = Stages {
        read: |job: &Job| {
            let start = Instant::now();
            let scan = stage("read", || scan::read_stored(&job.input, transform))?;
            Ok(Ready { scan, input: job.input.clone(), read_s: start.elapsed().as_secs_f64() })
        },
        predict: |Ready { scan, input, read_s }: Ready| {
            let start = Instant::now();
            let (mask, _) = segment_on_device(cuda, network, &scan, transform, window)
                .map_err(|err| err.in_file(&input))?;
            let StoredScan { header, warnings, .. } = scan;
            Ok(Segmented { header, mask, warnings, read_s, network_s: start.elapsed().as_secs_f64() })
        },
        finish: |job: &Job, segmented: Segmented| {
            stage("write", || publish_mask(job, style, segmented, Instant::now()))
        },
    };
    stages::run(jobs, stop, stages, done)
}

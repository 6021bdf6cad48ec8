//! Predicts a volume window by window and blends the overlaps (MONAI `sliding_window_inference`).
//!
//!   blended(v) = sum_k w(v - s_k) * logits_k(v - s_k) / sum_k w(v - s_k)      over the windows k that cover v
//!
//! Windows run in C order, the last axis fastest, and every voxel adds them in that order in float32, whatever the
//! number of threads. A volume smaller than the window is read as if padded with 0, `diff / 2` voxels in front;
//! what is predicted for the padding is never stored.

use std::ops::Range;

use rayon::prelude::*;

use super::importance::importance_map;
use crate::config::Window;
use crate::device::arena::Buffer;
use crate::device::cpu::vectorised;
use crate::{Error, Result};

/// Floats that a task clears.
const PAGES: usize = 1 << 18;

/// Logits of a batch of windows: takes `n` windows as (N,D,H,W), `n`, and the number of the first window since the
/// beginning of the call; returns (N,D,H,W,C) in anything that floats can be read from.
pub type Predict<'a, L> = dyn FnMut(&[f32], usize, usize) -> Result<L> + 'a;

/// Step from one window to the next along an axis of `len` voxels, `len >= roi`.
///
/// One window that fits exactly needs no step and gets `roi`, as MONAI does; else it is the integer part of
/// `roi * (1 - overlap)`, at least 1.
pub fn scan_interval(len: usize, roi: usize, overlap: f64) -> usize {
    if len == roi { roi } else { ((roi as f64 * (1.0 - overlap)) as usize).max(1) }
}

/// First voxels of the windows along an axis of `len` voxels: multiples of the interval, the last one shifted back
/// to end with the volume. An axis shorter than `roi` is padded to it and has one window.
pub fn window_starts(len: usize, roi: usize, overlap: f64) -> Vec<usize> {
    let len = len.max(roi);
    let step = scan_interval(len, roi, overlap);
    let last = len - roi;
    (0..last.div_ceil(step) + 1).map(|i| (i * step).min(last)).collect()
}

/// First voxels of the windows along the three axes of a volume of `shape` = (D, H, W), negative where a window hangs
/// over its edge.
pub fn axis_starts(shape: [usize; 3], config: &Window) -> [Vec<isize>; 3] {
    std::array::from_fn(|i| {
        let front = config.roi[i].saturating_sub(shape[i]) / 2;
        let starts = window_starts(shape[i], config.roi[i], config.overlap);
        starts.into_iter().map(|start| start as isize - front as isize).collect()
    })
}

/// Where windows lie in one volume: corners relative to the volume, negative where they hang over its edge.
pub struct Windows {
    shape: [usize; 3],
    roi: [usize; 3],
    corners: Vec<[isize; 3]>,
}

impl Windows {
    /// Covers a volume of `shape` = (D, H, W).
    pub fn new(shape: [usize; 3], config: &Window) -> Self {
        let [along_d, along_h, along_w] = &axis_starts(shape, config);
        let corners = along_d
            .iter()
            .flat_map(|&d| along_h.iter().flat_map(move |&h| along_w.iter().map(move |&w| [d, h, w])))
            .collect();
        Windows { shape, roi: config.roi, corners }
    }

    /// Corners in the order in which the windows are predicted and added.
    pub fn corners(&self) -> &[[isize; 3]] {
        &self.corners
    }

    /// Volume and corner of window number `k` of several volumes.
    fn place(&self, k: usize) -> (usize, [isize; 3]) {
        (k / self.corners.len(), self.corners[k % self.corners.len()])
    }

    /// Copies the window at `corner` out of `volume` (D,H,W) into `window` (roi), 0 outside the volume.
    fn read(&self, volume: &[f32], corner: [isize; 3], window: &mut [f32]) {
        let covered = [0, 1, 2].map(|axis| self.overlap_along(axis, corner));
        if covered.iter().map(Range::len).ne(self.roi) {
            window.fill(0.0);
        }
        let plane = self.shape[1] * self.shape[2];
        for d in covered[0].clone() {
            let slab = &volume[d * plane..][..plane];
            self.rows(d, corner, |from, to, len| {
                window[to..to + len].copy_from_slice(&slab[from..from + len])
            });
        }
    }

    /// Voxels of the volume that the window at `corner` covers along an axis.
    fn overlap_along(&self, axis: usize, corner: [isize; 3]) -> Range<usize> {
        let end = (corner[axis] + self.roi[axis] as isize).min(self.shape[axis] as isize);
        corner[axis].max(0) as usize..end.max(0) as usize
    }

    /// Index in the window at `corner` of a voxel of the volume that it covers.
    fn index(&self, corner: [isize; 3], voxel: [usize; 3]) -> usize {
        let [d, h, w]: [usize; 3] = std::array::from_fn(|i| (voxel[i] as isize - corner[i]) as usize);
        (d * self.roi[1] + h) * self.roi[2] + w
    }

    /// Calls `row(first voxel in the slab, first voxel in the window, voxels)` for every row of slab `d` that the
    /// window at `corner` covers.
    fn rows(&self, d: usize, corner: [isize; 3], mut row: impl FnMut(usize, usize, usize)) {
        if !self.overlap_along(0, corner).contains(&d) {
            return;
        }
        let inside = self.overlap_along(2, corner);
        for y in self.overlap_along(1, corner) {
            row(y * self.shape[2] + inside.start, self.index(corner, [d, y, inside.start]), inside.len());
        }
    }
}

/// Blended logits of one volume (D,H,W) as (D,H,W,C). `config` is a validated one: no side and no batch is 0.
///
/// # Errors
/// Those of `predict`, and [`Error::Shape`] when the volume or a prediction does not have the size it should.
pub fn sliding_window<L: AsRef<[f32]>>(
    volume: &[f32],
    shape: [usize; 3],
    config: &Window,
    out_channels: usize,
    predict: &mut Predict<L>,
) -> Result<Buffer> {
    let mut blended = sliding_window_batch(&[volume], shape, config, out_channels, predict)?;
    Ok(blended.pop().expect("one volume in, one out"))
}

/// [`sliding_window`] of several volumes of one shape; windows keep counting, and a batch of windows may span two
/// volumes.
pub fn sliding_window_batch<L: AsRef<[f32]>>(
    volumes: &[&[f32]],
    shape: [usize; 3],
    config: &Window,
    out_channels: usize,
    predict: &mut Predict<L>,
) -> Result<Vec<Buffer>> {
    let windows = Windows::new(shape, config);
    let mut blend = Blend::new(&windows, volumes, config, out_channels)?;
    let each: usize = config.roi.iter().product();
    let total = windows.corners.len() * volumes.len();
    let mut batch = vec![0f32; each * config.batch.min(total)];
    for first in (0..total).step_by(config.batch) {
        let numbers = first..total.min(first + config.batch);
        let n = numbers.len();
        batch[..n * each].par_chunks_mut(each).zip(numbers.clone()).for_each(|(window, k)| {
            let (image, corner) = windows.place(k);
            windows.read(volumes[image], corner, window);
        });
        let logits = predict(&batch[..n * each], n, first)?;
        blend.add(numbers, logits.as_ref())?;
    }
    Ok(blend.finish())
}

/// Logits of several volumes of one shape, window by window.
pub(super) struct Blend<'a> {
    windows: &'a Windows,
    /// Of every voxel of a window.
    weights: Vec<f32>,
    channels: usize,
    /// Weighted sums, one (D,H,W,C) a volume.
    sums: Vec<Buffer>,
}

impl<'a> Blend<'a> {
    /// Of nothing yet.
    ///
    /// # Errors
    /// [`Error::Shape`] when a volume does not have the windows' shape, or no voxel.
    pub fn new(windows: &'a Windows, volumes: &[&[f32]], config: &Window, channels: usize) -> Result<Self> {
        let shape = windows.shape;
        let voxels: usize = shape.iter().product();
        if let Some(volume) = volumes.iter().find(|v| v.len() != voxels || v.is_empty()) {
            return Err(Error::Shape {
                op: "sliding_window",
                want: format!("at least one voxel and {shape:?}"),
                got: format!("{} voxels", volume.len()),
            });
        }
        let mut sums: Vec<_> = volumes.iter().map(|_| Buffer::once(voxels * channels)).collect();
        // Its content is the last scan's, or pages that are written before they are read, and faulted in once.
        sums.iter_mut().for_each(|sum| sum.par_chunks_mut(PAGES).for_each(|pages| pages.fill(0.0)));
        Ok(Blend { windows, weights: importance_map(config.roi, config.blend), channels, sums })
    }

    /// Adds the logits of the windows with these numbers; those of lower numbers have been added before.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not as many logits as there should be.
    pub fn add(&mut self, numbers: Range<usize>, logits: &[f32]) -> Result<()> {
        let Blend { windows, weights, channels, sums } = self;
        let (n, channels) = (numbers.len(), *channels);
        let each = weights.len() * channels;
        if logits.len() != n * each {
            return Err(Error::Shape {
                op: "sliding_window",
                want: format!("{n} windows of {:?} with {channels} channels", windows.roi),
                got: format!("{} logits", logits.len()),
            });
        }
        let plane = windows.shape[1] * windows.shape[2] * channels;
        for (image, sum) in sums.iter_mut().enumerate() {
            let placed = numbers.clone().map(|k| windows.place(k)).zip(logits.chunks_exact(each));
            let here: Vec<_> = placed.filter(|((i, _), _)| *i == image).collect();
            sum.par_chunks_mut(plane).enumerate().for_each(|(d, slab)| {
                for &((_, corner), logits) in &here {
                    windows.rows(d, corner, |to, from, len| {
                        add_row(
                            &mut slab[to * channels..(to + len) * channels],
                            &logits[from * channels..(from + len) * channels],
                            &weights[from..from + len],
                        );
                    });
                }
            });
        }
        Ok(())
    }

    /// Weighted means, when all windows have been added.
    pub fn finish(mut self) -> Vec<Buffer> {
        self.sums.iter_mut().for_each(|sum| divide(sum, self.windows, &self.weights, self.channels));
        self.sums
    }
}

vectorised! {
    /// sum += weight * logits over a row of voxels: product rounded, then sum, as MONAI's two tensor ops do.
    fn add_row(sum: &mut [f32], logits: &[f32], weights: &[f32]) {
        let channels = sum.len() / weights.len();
        if channels == 2 {
            // Of known length, so that the compiler fills vectors with voxels.
            let pairs = sum.as_chunks_mut::<2>().0.iter_mut().zip(logits.as_chunks::<2>().0);
            for ((sum, logits), weight) in pairs.zip(weights) {
                sum[0] += logits[0] * weight;
                sum[1] += logits[1] * weight;
            }
            return;
        }
        for ((sum, logits), weight) in
            sum.chunks_exact_mut(channels).zip(logits.chunks_exact(channels)).zip(weights)
        {
            sum.iter_mut().zip(logits).for_each(|(s, l)| *s += l * weight);
        }
    }
}

vectorised! {
    /// Divides every channel of voxel v by `count[v]`.
    fn divide_voxels(sums: &mut [f32], count: &[f32], channels: usize) {
        if channels == 2 {
            // As above.
            for (sum, count) in sums.as_chunks_mut::<2>().0.iter_mut().zip(count) {
                sum[0] /= count;
                sum[1] /= count;
            }
            return;
        }
        for (sum, count) in sums.chunks_exact_mut(channels).zip(count) {
            sum.iter_mut().for_each(|s| *s /= count);
        }
    }
}

/// Divides by the sum of weights, which is made again slab by slab instead of being kept for the whole grid.
fn divide(sums: &mut [f32], windows: &Windows, weights: &[f32], channels: usize) {
    let plane = windows.shape[1] * windows.shape[2];
    sums.par_chunks_mut(plane * channels).enumerate().for_each_init(Vec::new, |count, (d, slab)| {
        count.clear();
        count.resize(plane, 0f32);
        for &corner in &windows.corners {
            windows.rows(d, corner, |to, from, len| {
                count[to..to + len].iter_mut().zip(&weights[from..]).for_each(|(c, w)| *c += w);
            });
        }
        divide_voxels(slab, count, channels);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Blend;

    /// The examples of numerics.md 14.
    #[test]
    fn starts_follow_monai() {
        assert_eq!(window_starts(250, 96, 0.5), [0, 48, 96, 144, 154]);
        assert_eq!(window_starts(97, 96, 0.5), [0, 1]);
        assert_eq!(window_starts(144, 96, 0.5), [0, 48]);
        assert_eq!(window_starts(20, 96, 0.5), [0]);
        let windows = |shape| {
            let config = Window { roi: [96; 3], overlap: 0.5, batch: 4, blend: Blend::Constant };
            Windows::new(shape, &config).corners().len()
        };
        assert_eq!(windows([270, 270, 224]), 100);
        assert_eq!(windows([335, 335, 126]), 72);
        assert_eq!(windows([274, 274, 150]), 75);
        assert_eq!(windows([209, 209, 76]), 16);
    }

    /// Weighted means of equal numbers are that number: every voxel is covered, none twice in a window.
    #[test]
    fn a_pointwise_network_is_reproduced() {
        let shape = [19, 40, 33];
        let volume: Vec<f32> = (0..shape.iter().product()).map(|i| (i % 1013) as f32).collect();
        for blend in [Blend::Constant, Blend::Gaussian] {
            let config = Window { roi: [32, 16, 16], overlap: 0.4, batch: 3, blend };
            let mut double =
                |x: &[f32], _: usize, _: usize| Ok(x.iter().flat_map(|v| [*v, -2.0 * v]).collect::<Vec<_>>());
            let out = sliding_window(&volume, shape, &config, 2, &mut double).unwrap();
            for (voxel, x) in out.chunks_exact(2).zip(&volume) {
                // Up to 12 windows a voxel: a dozen float32 roundings.
                assert!((voxel[0] - x).abs() <= 1e-6 * x.abs() * 3.0, "{} {x}", voxel[0]);
                assert!((voxel[1] + 2.0 * x).abs() <= 1e-6 * x.abs() * 6.0, "{} {x}", voxel[1]);
            }
        }
    }

    #[test]
    fn a_prediction_of_the_wrong_size_is_refused() {
        let config = Window { roi: [16; 3], overlap: 0.5, batch: 4, blend: Blend::Constant };
        let mut short = |_: &[f32], _: usize, _: usize| Ok(vec![0.0; 7]);
        let err = sliding_window(&[0.0; 4096], [16; 3], &config, 2, &mut short).unwrap_err();
        assert_eq!(
            err.to_string(),
            "sliding_window: expected 1 windows of [16, 16, 16] with 2 channels, got 7 logits"
        );
    }
}

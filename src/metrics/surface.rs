//! Distances between the surfaces of two masks (MONAI `get_edge_surface_distance` and the metrics built on it).
//!
//! The surface of a mask is the mask XOR its erosion by the 6-neighbour cross; outside the volume is background, so a
//! mask that touches the border has a surface there. Distances run between voxel centres, are computed in f64 and
//! rounded to f32 as MONAI's.

use super::distance_transform;
use crate::error::{Error, Result};

/// Surface distances of both directions, each in C order of the voxels it starts from.
#[derive(Clone, Debug)]
pub struct SurfaceDistances {
    /// From every surface voxel of the prediction to the nearest of the truth, mm. If one mask is empty: one infinity
    /// for each surface voxel of the other.
    pub pred_to_truth: Vec<f32>,
    /// The same from the truth to the prediction.
    pub truth_to_pred: Vec<f32>,
}

impl SurfaceDistances {
    /// Measures two masks (foreground: not 0) of `shape` voxels in C order.
    ///
    /// # Errors
    /// A mask whose length is not that of `shape`.
    pub fn new(pred: &[u8], truth: &[u8], shape: [usize; 3], spacing_mm: [f64; 3]) -> Result<Self> {
        for mask in [pred, truth] {
            if mask.len() != shape.iter().product::<usize>() {
                let (want, got) = (format!("masks of {shape:?} voxels"), format!("{} voxels", mask.len()));
                return Err(Error::Shape { op: "surface distance", want, got });
            }
        }
        // Everything outside the box around both masks is background and cannot change a surface or a distance.
        let Some((start, size)) = bounding_box(pred, truth, shape) else {
            return Ok(SurfaceDistances { pred_to_truth: vec![], truth_to_pred: vec![] });
        };
        let [pred, truth] = [pred, truth].map(|mask| edges(&crop(mask, shape, start, size), size));
        Ok(SurfaceDistances {
            pred_to_truth: directed(&pred, &truth, size, spacing_mm),
            truth_to_pred: directed(&truth, &pred, size, spacing_mm),
        })
    }

    /// Largest distance of both directions (MONAI `compute_hausdorff_distance`); infinite if one mask is empty, NaN
    /// if both are.
    pub fn hausdorff(&self) -> f32 {
        nan_max(maximum(&self.pred_to_truth), maximum(&self.truth_to_pred))
    }

    /// Larger of the two directed percentiles (MONAI `compute_hausdorff_distance(percentile=..)`); NaN if a mask is
    /// empty, because interpolating between infinities is.
    pub fn hausdorff_percentile(&self, percent: f64) -> f32 {
        nan_max(self.directed_percentile(percent), quantile(&self.truth_to_pred, percent / 100.0))
    }

    /// The percentile from prediction to truth only (MONAI `directed=True`).
    pub fn directed_percentile(&self, percent: f64) -> f32 {
        quantile(&self.pred_to_truth, percent / 100.0)
    }

    /// Mean distance from prediction to truth (MONAI `compute_average_surface_distance`).
    pub fn asd(&self) -> f32 {
        mean(self.pred_to_truth.iter())
    }

    /// Mean of the distances of both directions together (MONAI `symmetric=True`).
    pub fn assd(&self) -> f32 {
        mean(self.pred_to_truth.iter().chain(&self.truth_to_pred))
    }

    /// Share of all surface voxels within `tolerance_mm` of the other surface (MONAI `compute_surface_dice` without
    /// subvoxels); 0 if one mask is empty, NaN if both are.
    pub fn nsd(&self, tolerance_mm: f64) -> f32 {
        let all = || self.pred_to_truth.iter().chain(&self.truth_to_pred);
        // torch compares an f32 tensor with a Python float as f32.
        let close = all().filter(|&&d| d <= tolerance_mm as f32).count();
        close as f32 / all().count() as f32
    }
}

/// Mask XOR erosion: foreground voxels with a 6-neighbour that is background or outside the volume.
pub fn edges(mask: &[u8], [n0, n1, n2]: [usize; 3]) -> Vec<bool> {
    let step = [n1 * n2, n2, 1];
    let mut edge = vec![false; mask.len()];
    for i in 0..n0 {
        for j in 0..n1 {
            for k in 0..n2 {
                let at = (i * n1 + j) * n2 + k;
                let inner = |x: usize, n: usize, s: usize| {
                    x > 0 && x + 1 < n && mask[at - s] != 0 && mask[at + s] != 0
                };
                edge[at] = mask[at] != 0
                    && !(inner(i, n0, step[0]) && inner(j, n1, step[1]) && inner(k, n2, step[2]));
            }
        }
    }
    edge
}

/// `torch.quantile(values, q)` with linear interpolation, in f32 arithmetic as torch's; NaN without values.
pub fn quantile(values: &[f32], q: f64) -> f32 {
    if values.is_empty() || values.iter().any(|v| v.is_nan()) {
        return f32::NAN;
    }
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let last = sorted.len() - 1;
    let rank = q as f32 * last as f32;
    let below = (rank.floor() as usize).min(last);
    let (a, b) = (sorted[below], sorted[(rank.ceil() as usize).min(last)]);
    let weight = rank - rank.floor();
    // torch's lerp: from the nearer end.
    if weight < 0.5 { a + weight * (b - a) } else { b - (b - a) * (1.0 - weight) }
}

/// Distances from the set voxels of `from` to the nearest of `to`, MONAI's conventions for empty masks included.
fn directed(from: &[bool], to: &[bool], shape: [usize; 3], spacing_mm: [f64; 3]) -> Vec<f32> {
    let count = |mask: &[bool]| mask.iter().filter(|&&m| m).count();
    match (count(from), count(to)) {
        (n, 0) | (0, n) => vec![f32::INFINITY; n],
        _ => {
            let squared = distance_transform::squared(to, shape, spacing_mm);
            squared.iter().zip(from).filter(|(_, on)| **on).map(|(d, _)| d.sqrt() as f32).collect()
        }
    }
}

/// First voxel and size of the smallest box that holds the foreground of both masks; None if there is none.
fn bounding_box(a: &[u8], b: &[u8], [n0, n1, n2]: [usize; 3]) -> Option<([usize; 3], [usize; 3])> {
    let (mut low, mut high) = ([usize::MAX; 3], [0; 3]);
    for i in 0..n0 {
        for j in 0..n1 {
            let row = (i * n1 + j) * n2..(i * n1 + j + 1) * n2;
            let set = |&k: &usize| a[row.start + k] != 0 || b[row.start + k] != 0;
            let (Some(first), Some(last)) = ((0..n2).find(set), (0..n2).rev().find(set)) else { continue };
            for (axis, (from, to)) in [(i, i), (j, j), (first, last)].into_iter().enumerate() {
                low[axis] = low[axis].min(from);
                high[axis] = high[axis].max(to + 1);
            }
        }
    }
    (low[0] != usize::MAX).then(|| (low, std::array::from_fn(|axis| high[axis] - low[axis])))
}

fn crop(mask: &[u8], [_, n1, n2]: [usize; 3], start: [usize; 3], size: [usize; 3]) -> Vec<u8> {
    let rows = (0..size[0]).flat_map(|i| (0..size[1]).map(move |j| (start[0] + i, start[1] + j)));
    rows.flat_map(|(i, j)| &mask[(i * n1 + j) * n2 + start[2]..][..size[2]]).copied().collect()
}

fn maximum(values: &[f32]) -> f32 {
    values.iter().copied().reduce(f32::max).unwrap_or(f32::NAN)
}

/// torch.max: NaN wins.
fn nan_max(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

fn mean<'a>(values: impl Iterator<Item = &'a f32> + Clone) -> f32 {
    let n = values.clone().count();
    (values.map(|&v| f64::from(v)).sum::<f64>() / n as f64) as f32
}

//! What the voxels of a resampled grid hold: trilinear or nearest values, with the border repeated outward.
//!
//! [`resample`](super::resample) says where they lie.

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::orientation::strides;
use super::resample::{Positions, Resampling};
use super::separable::{Cell, Separable, Source};
use super::transpose::Strides;
use super::volume::Volume;

/// The source voxels around a coordinate on one axis, as offsets into the data.
#[derive(Clone, Copy, Debug)]
struct Taps {
    /// The two neighbours.
    at: [usize; 2],
    /// Their weights.
    weight: [f64; 2],
    /// The nearer one, half to even.
    nearest: usize,
}

/// The part of the source grid that is stored: all of it, or a crop. Voxels outside read as background.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stored {
    /// First stored voxel on the source grid.
    pub start: [i64; 3],
    /// Stored voxels.
    pub shape: [usize; 3],
}

/// Voxels along the side of a brick of [`Sampler::reached`]: the fewer, the less is interpolated around a stray one.
const BRICK: usize = 4;

/// Offset of a voxel that is not stored; a sum of three stays beyond every slice.
const OUTSIDE: usize = usize::MAX / 4;

/// Reads the source of a resampling at output voxels.
pub(super) struct Sampler<'a> {
    to: &'a Resampling,
    stored: Stored,
    /// Stored voxels from one source index to the next, per axis.
    stride: [usize; 3],
    along: Along,
}

/// What a [`Sampler`] knows of each output axis.
enum Along {
    /// Taps, where each source axis depends on one output axis only: the same numbers, computed once.
    Taps([Vec<Taps>; 3]),
    /// Normalised coordinates.
    Normalised([Vec<f64>; 3]),
}

impl<'a> Sampler<'a> {
    pub fn new(to: &'a Resampling, stored: Stored) -> Sampler<'a> {
        let [_, n1, n2] = stored.shape;
        let stride = [n1 * n2, n2, 1];
        let mut sampler = Sampler { to, stored, stride, along: Along::Normalised(Default::default()) };
        sampler.along = match to.positions() {
            Positions::Normalised(base) => Along::Normalised(base),
            Positions::Source(x) => Along::Taps(std::array::from_fn(|axis| {
                x[axis].iter().map(|&x| sampler.taps_at(axis, x)).collect()
            })),
        };
        sampler
    }

    /// Source of all stored voxels of the whole grid.
    pub fn whole(to: &'a Resampling) -> Sampler<'a> {
        Sampler::new(to, Stored { start: [0; 3], shape: to.in_shape })
    }

    #[inline]
    fn taps_at(&self, axis: usize, x: f64) -> Taps {
        let Cell { at: [low, high], weight } = Cell::new(x, self.to.in_shape[axis]);
        let up = weight[1] > 0.5 || (weight[1] == 0.5 && low % 2 == 1);
        let at = [low, high].map(|v| self.offset(axis, v));
        Taps { at, weight, nearest: at[usize::from(up)] }
    }

    /// Offset into the stored data of a source index on one axis.
    #[inline]
    fn offset(&self, axis: usize, index: usize) -> usize {
        let at = (index as i64 - self.stored.start[axis]) as usize;
        if at < self.stored.shape[axis] { at * self.stride[axis] } else { OUTSIDE }
    }

    #[inline]
    fn taps(&self, [i, j, k]: [usize; 3]) -> [Taps; 3] {
        match &self.along {
            Along::Taps(taps) => [taps[0][i], taps[1][j], taps[2][k]],
            Along::Normalised(base) => {
                let x = self.to.source([base[0][i], base[1][j], base[2][k]]);
                std::array::from_fn(|axis| self.taps_at(axis, x[axis]))
            }
        }
    }

    /// Which output voxels' cells may have a corner among the stored voxels of `data` that are `wanted`: all that have,
    /// and some near them. Corners are looked for brick by brick.
    pub fn reached<T: Copy + Sync>(&self, data: &[T], wanted: impl Fn(T) -> bool + Sync) -> Reached<'_> {
        let [_, nj, nk] = self.stored.shape;
        let [bi, bj, bk] = self.stored.shape.map(|n| n / BRICK + 1);
        let bricks: Vec<AtomicBool> = (0..bi * bj * bk).map(|_| AtomicBool::new(false)).collect();
        data.par_chunks((nj * nk).max(1)).enumerate().for_each(|(i, slab)| {
            for (at, _) in slab.iter().enumerate().filter(|(_, v)| wanted(**v)) {
                let voxel = [i, at / nk, at % nk];
                // A cell of this corner begins here or one voxel before, on each axis.
                for corner in 0..8 {
                    let [i, j, k] = [0, 1, 2].map(|a| (voxel[a] + (corner >> a & 1)) / BRICK);
                    bricks[(i * bj + j) * bk + k].store(true, Ordering::Relaxed);
                }
            }
        });
        let bricks = bricks.into_iter().map(AtomicBool::into_inner).collect();
        Reached { sampler: self, bricks, step: [bj * bk, bk, 1] }
    }

    /// Trilinear value of every channel at an output voxel, summed in float64 in grid_sample's order.
    #[inline]
    pub fn linear<const C: usize>(
        &self,
        data: &[[f32; C]],
        outside: [f32; C],
        voxel: [usize; 3],
    ) -> [f32; C] {
        let [i, j, k] = voxel;
        match &self.along {
            // What the axes hold is read in place: copies of it would take as long as the sum.
            Along::Taps([ti, tj, tk]) => interpolate(data, outside, &edges(&ti[i], &tj[j]), &tk[k]),
            Along::Normalised(_) => {
                let [ti, tj, tk] = self.taps(voxel);
                interpolate(data, outside, &edges(&ti, &tj), &tk)
            }
        }
    }

    /// Nearest value at an output voxel, half to even.
    #[inline]
    pub fn nearest<T: Copy>(&self, data: &[T], outside: T, voxel: [usize; 3]) -> T {
        let [i, j, k] = self.taps(voxel).map(|t| t.nearest);
        data.get(i + j + k).copied().unwrap_or(outside)
    }
}

/// What [`Sampler::reached`] found.
pub(super) struct Reached<'a> {
    sampler: &'a Sampler<'a>,
    /// Of each brick of cells whether one may have a wanted corner.
    bricks: Vec<bool>,
    /// Bricks from one to the next along each axis.
    step: [usize; 3],
}

impl Reached<'_> {
    /// Whether an output voxel is among them.
    pub fn voxel(&self, voxel: [usize; 3]) -> bool {
        let taps = self.sampler.taps(voxel);
        let [i, j, k] = [0, 1, 2].map(|axis| self.brick(axis, &taps[axis]));
        i.zip(j).zip(k).is_some_and(|((i, j), k)| self.brick_is(i + j + k))
    }

    /// Whether the brick with this number is.
    pub fn brick_is(&self, number: usize) -> bool {
        self.bricks[number]
    }

    /// The bricks of output voxels along an axis, as summands of their number; `None` beyond the stored voxels.
    /// Altogether `None` where source axes depend on several output axes.
    pub fn along(&self, axis: usize) -> Option<Vec<Option<usize>>> {
        match &self.sampler.along {
            Along::Taps(taps) => Some(taps[axis].iter().map(|taps| self.brick(axis, taps)).collect()),
            Along::Normalised(_) => None,
        }
    }

    /// A cell's brick, counted from one voxel before the first stored one.
    fn brick(&self, axis: usize, taps: &Taps) -> Option<usize> {
        let [low, high] = taps.at.map(|at| (at != OUTSIDE).then(|| at / self.sampler.stride[axis]));
        low.map(|low| low + 1).or(high).map(|begin| begin / BRICK * self.step[axis])
    }
}

/// The four edges along k of the cell around a voxel: offset, weight along j, weight along i.
type Edges = [(usize, f64, f64); 4];

#[inline]
fn edges(ti: &Taps, tj: &Taps) -> Edges {
    std::array::from_fn(|e| {
        let (a, b) = (e / 2, e % 2);
        (ti.at[a] + tj.at[b], tj.weight[b], ti.weight[a])
    })
}

#[inline]
fn interpolate<const C: usize>(data: &[[f32; C]], outside: [f32; C], edges: &Edges, tk: &Taps) -> [f32; C] {
    let mut sum = [0.0f64; C];
    for &(edge, wj, wi) in edges {
        for (ok, wk) in tk.at.into_iter().zip(tk.weight) {
            let value = data.get(edge + ok).unwrap_or(&outside);
            let weight = wk * wj * wi;
            for (sum, &v) in sum.iter_mut().zip(value) {
                *sum += f64::from(v) * weight;
            }
        }
    }
    sum.map(|v| v as f32)
}

/// Trilinear interpolation with border padding: float64 coordinates and sums, float32 result.
///
/// `volume` must have the source shape.
pub fn resample_linear(volume: &Volume<f32>, to: &Resampling) -> Volume<f32> {
    check_grid(volume, to);
    let strides = Strides { first: 0, step: strides(volume.shape) };
    let data = match Separable::new(to) {
        Some(axes) => axes.resample(&Source { voxels: &volume.data, strides, skipped: 0 }, |v| v),
        None => {
            let sampler = Sampler::whole(to);
            let source: &[[f32; 1]] = bytemuck::cast_slice(&volume.data);
            tabulate(to.out_shape, |voxel| sampler.linear(source, [0.0], voxel)[0])
        }
    };
    Volume { shape: to.out_shape, data, affine: to.out_affine }
}

/// Nearest neighbour, half to even, with border padding. `volume` must have the source shape.
pub fn resample_nearest(volume: &Volume<u8>, to: &Resampling) -> Volume<u8> {
    check_grid(volume, to);
    let sampler = Sampler::whole(to);
    let data = tabulate(to.out_shape, |voxel| sampler.nearest(&volume.data, 0, voxel));
    Volume { shape: to.out_shape, data, affine: to.out_affine }
}

fn check_grid<T>(source: &Volume<T>, to: &Resampling) {
    assert_eq!(source.shape, to.in_shape, "the resampling was planned for another grid");
}

/// A volume of `value(i, j, k)`, slabs in parallel.
pub(super) fn tabulate<T: Copy + Default + Send>(
    shape: [usize; 3],
    value: impl Fn([usize; 3]) -> T + Sync,
) -> Vec<T> {
    tabulate_rows(shape, |[i, j], row| {
        row.iter_mut().enumerate().for_each(|(k, voxel)| *voxel = value([i, j, k]));
    })
}

/// A volume whose row (i, j, ..), zeros at first, is written by `fill([i, j], row)`, slabs in parallel.
pub(super) fn tabulate_rows<T: Copy + Default + Send>(
    shape: [usize; 3],
    fill: impl Fn([usize; 2], &mut [T]) + Sync,
) -> Vec<T> {
    let [n0, n1, n2] = shape;
    let mut data = vec![T::default(); n0 * n1 * n2];
    data.par_chunks_mut((n1 * n2).max(1)).enumerate().for_each(|(i, slab)| {
        slab.chunks_mut(n2.max(1)).enumerate().for_each(|(j, row)| fill([i, j], row));
    });
    data
}

//! Trilinear resampling where each source axis depends on one output axis only, sixteen voxels at a time.
//!
//! A voxel is the sum that [`interpolate`](super::interpolate) defines, in float64 and in this order:
//!
//! ```text
//! Σ a, b, c in 0, 1:   source[i_a, j_b, k_c] · ((wk_c · wj_b) · wi_a)                  c fastest
//! ```
//!
//! The sixteen are neighbours along i. Of a source row (.., j, k) the pairs of voxels around them are picked once and
//! serve every output k that the row touches; what remains are sums over whole arrays, which any vector unit does alike.
//! The axes of the source may lie in memory in any order and sense, so that a file need not be turned first.

use std::ops::Range;

use rayon::prelude::*;

use super::resample::{Positions, Resampling};
use super::transpose::Strides;

/// Output voxels along i that are summed together.
const LANES: usize = 16;

/// Output voxels along i that a task does: long enough pieces of the source's rows that the CPU sees them coming.
const BLOCK: usize = 4 * LANES;

/// A number for each lane.
type Lanes<T> = [T; LANES];

/// The two source voxels around a coordinate on one axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    /// Their indices.
    pub at: [usize; 2],
    /// Their weights.
    pub weight: [f64; 2],
}

impl Cell {
    /// Around `x` on an axis of `n` voxels, whose border reaches outward.
    #[inline]
    pub fn new(x: f64, n: usize) -> Cell {
        let last = n - 1;
        let x = x.max(0.0).min(last as f64);
        // Not negative, so that truncation is the floor, without a call where the CPU's baseline has no such
        // instruction.
        let low = x as usize;
        // A neighbour beyond the edge has weight 0; reading the edge in its place adds that 0.
        Cell { at: [low, last.min(low + 1)], weight: [(low + 1) as f64 - x, x - low as f64] }
    }
}

/// Voxels of the longest axis of source or result: tables and scratch, which grow with them, stay at some MB a thread, and
/// windows of planes few. A file of a few KB may have an axis of 2^26.
const LONGEST: usize = 4096;

/// Voxels of the source, some planes of it or all.
pub(super) struct Source<'a> {
    /// Them.
    pub voxels: &'a [f32],
    /// Where each lies in the whole source.
    pub strides: Strides,
    /// Voxels of the whole source before the first of these.
    pub skipped: usize,
}

/// A resampling, axis by axis.
pub(super) struct Separable {
    /// Of the result.
    shape: [usize; 3],
    cells: [Vec<Cell>; 3],
}

impl Separable {
    /// `None` where a source axis depends on several output axes, or where one is longer than [`LONGEST`].
    pub fn new(to: &Resampling) -> Option<Separable> {
        if to.in_shape.iter().chain(&to.out_shape).any(|&n| n > LONGEST) {
            return None;
        }
        let Positions::Source(x) = to.positions() else { return None };
        let cells = |axis: usize| x[axis].iter().map(|&x| Cell::new(x, to.in_shape[axis])).collect();
        Some(Separable { shape: to.out_shape, cells: [0, 1, 2].map(cells) })
    }

    /// Voxels of the result along each axis.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// The whole result, every voxel through `finish`.
    pub fn resample(&self, source: &Source, finish: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        self.fill(&mut out, &self.shape.map(|n| 0..n), source, finish);
        out
    }

    /// Output voxels along `axis` whose source voxels are `wanted`; neighbours, as coordinates ascend.
    pub fn along(&self, axis: usize, wanted: impl Fn([usize; 2]) -> bool) -> Range<usize> {
        let wanted = |cell: &Cell| wanted(cell.at);
        let first = self.cells[axis].iter().position(wanted);
        let last = self.cells[axis].iter().rposition(wanted);
        first.zip(last).map_or(0..0, |(first, last)| first..last + 1)
    }

    /// Writes the box `of` of the result `out`, every voxel through `finish`; `source` holds all that it needs.
    pub fn fill(
        &self,
        out: &mut [f32],
        of: &[Range<usize>; 3],
        source: &Source,
        finish: impl Fn(f32) -> f32 + Sync,
    ) {
        if of.iter().any(Range::is_empty) {
            return;
        }
        let [_, nj, nk] = self.shape;
        let [of_i, of_j, of_k] = of;
        let ks = &self.cells[2][of_k.clone()];
        let low = ks.iter().flat_map(|k| k.at).min().unwrap_or(0);
        let high = ks.iter().flat_map(|k| k.at).max().unwrap_or(0);
        let blocks = out.par_chunks_mut(BLOCK * nj * nk).enumerate();
        blocks.for_each_init(Vec::new, |rows, (block, slabs)| {
            let begin = block * BLOCK;
            let of_i = of_i.start.max(begin)..of_i.end.min(begin + BLOCK);
            if of_i.is_empty() {
                return;
            }
            let groups: Vec<Picks> = of_i
                .clone()
                .step_by(LANES)
                .map(|i| Picks::new(&self.cells[0][i..of_i.end.min(i + LANES)], source))
                .collect();
            // [k][group][b]
            rows.resize((high + 1 - low) * groups.len(), [Pairs::default(); 2]);
            for j in of_j.clone() {
                let cell = self.cells[1][j];
                for (k, rows) in (low..high + 1).zip(rows.chunks_exact_mut(groups.len())) {
                    for (b, j) in cell.at.into_iter().enumerate() {
                        for (picks, row) in groups.iter().zip(&mut *rows) {
                            picks.row(source, j, k, &mut row[b]);
                        }
                    }
                }
                for (g, picks) in groups.iter().enumerate() {
                    let i = of_i.start - begin + g * LANES;
                    for (k, of) in of_k.clone().zip(ks) {
                        let rows = of.at.map(|k| &rows[(k - low) * groups.len() + g]);
                        let sums = picks.sums(rows, cell.weight, of.weight).map(&finish);
                        for lane in 0..picks.lanes {
                            slabs[((i + lane) * nj + j) * nk + k] = sums[lane];
                        }
                    }
                }
            }
        });
    }
}

/// Of a source row, the voxels on either side of each lane.
type Pairs = [Lanes<f64>; 2];

/// Which voxels of a source row the lanes need.
struct Picks {
    /// How many of the lanes are voxels; the others repeat the last one.
    lanes: usize,
    /// Where they lie in the row.
    at: [Lanes<isize>; 2],
    /// Their weights.
    weight: Pairs,
}

impl Picks {
    /// Those of up to sixteen cells.
    fn new(cells: &[Cell], source: &Source) -> Picks {
        let cell = |lane: usize| cells[lane.min(cells.len() - 1)];
        Picks {
            lanes: cells.len(),
            at: [0, 1].map(|a| std::array::from_fn(|l| cell(l).at[a] as isize * source.strides.step[0])),
            weight: [0, 1].map(|a| std::array::from_fn(|l| cell(l).weight[a])),
        }
    }

    /// Picks them from the source row (.., j, k).
    #[inline]
    fn row(&self, source: &Source, j: usize, k: usize, pairs: &mut Pairs) {
        let Strides { first, step } = source.strides;
        let start = (first as isize - source.skipped as isize) + j as isize * step[1] + k as isize * step[2];
        for (pairs, at) in pairs.iter_mut().zip(&self.at) {
            for (voxel, at) in pairs.iter_mut().zip(at) {
                *voxel = f64::from(source.voxels[(start + at) as usize]);
            }
        }
    }

    /// The sums of `rows[c][b]`.
    #[inline]
    fn sums(&self, rows: [&[Pairs; 2]; 2], wj: [f64; 2], wk: [f64; 2]) -> Lanes<f32> {
        let weight: [[f64; 2]; 2] = wj.map(|wj| wk.map(|wk| wk * wj));
        std::array::from_fn(|lane| {
            let mut sum = 0.0;
            for a in 0..2 {
                for b in 0..2 {
                    for c in 0..2 {
                        sum += rows[c][b][a][lane] * (weight[b][c] * self.weight[a][lane]);
                    }
                }
            }
            sum as f32
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::interpolate::{Sampler, tabulate};
    use crate::data::transpose::gather;
    use crate::rng::Philox;

    /// A grid of `shape` onto one of other spacings, shifted, so that cells lie inside, across and beyond the border.
    fn resampling(shape: [usize; 3]) -> Resampling {
        let grid = |mm: [f64; 3], at: f64| {
            [[mm[0], 0.0, 0.0, at], [0.0, mm[1], 0.0, at], [0.0, 0.0, mm[2], at], [0.0, 0.0, 0.0, 1.0]]
        };
        Resampling::new(shape, &grid([0.8, 1.5, 3.1], 0.0), [67, 9, 11], &grid([1.5, 1.5, 2.0], -2.3))
            .unwrap()
    }

    /// The same sums as voxel by voxel, from a source whose axes lie in memory in any of the 48 ways, box by box.
    #[test]
    fn every_order_of_axes_gives_the_bits_of_the_definition() {
        let shape = [140, 12, 7];
        let to = resampling(shape);
        let axes = Separable::new(&to).unwrap();
        let mut rng = Philox::new(3, 0);
        let ras: Vec<f32> = (0..shape.iter().product()).map(|_| rng.range(-1000.0, 1000.0) as f32).collect();
        let sampler = Sampler::whole(&to);
        let source: &[[f32; 1]] = bytemuck::cast_slice(&ras);
        let want = tabulate(to.out_shape, |voxel| 2.0 * sampler.linear(source, [0.0], voxel)[0]);

        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            for flips in 0..8 {
                // Memory's axes are `order` of RAS, some of them backward.
                let stored = order.map(|a: usize| shape[a]);
                let (mut there, mut back) =
                    (Strides { first: 0, step: [0; 3] }, Strides { first: 0, step: [0; 3] });
                let ras_step = [(shape[1] * shape[2]) as isize, shape[2] as isize, 1];
                let memory_step = [(stored[1] * stored[2]) as isize, stored[2] as isize, 1];
                for (m, &a) in order.iter().enumerate() {
                    let (sign, last) = if flips >> m & 1 == 1 { (-1, stored[m] - 1) } else { (1, 0) };
                    there.step[m] = sign * ras_step[a];
                    there.first += last * ras_step[a] as usize;
                    back.step[a] = sign * memory_step[m];
                    back.first += last * memory_step[m] as usize;
                }
                let voxels = gather(stored, there, |at| ras[at]);
                let source = Source { voxels: &voxels, strides: back, skipped: 0 };
                assert!(axes.resample(&source, |v| 2.0 * v) == want, "{order:?} {flips:b}");
                let mut out = vec![0.0; want.len()];
                for axis in 0..3 {
                    let cut = to.out_shape[axis] / 3;
                    out.fill(0.0);
                    for part in [0..cut, cut..cut, cut..to.out_shape[axis]] {
                        let mut of = to.out_shape.map(|n| 0..n);
                        of[axis] = part;
                        axes.fill(&mut out, &of, &source, |v| 2.0 * v);
                    }
                    assert!(out == want, "{order:?} {flips:b} cut along {axis}");
                }
            }
        }
    }

    #[test]
    fn voxels_along_an_axis_are_found_by_their_neighbours() {
        let axes = Separable::new(&resampling([140, 12, 7])).unwrap();
        let parts: Vec<_> = (0..7).map(|k| axes.along(2, |[_, high]| high == k)).collect();
        // Every voxel in one part, and the parts in order.
        let joined: Vec<usize> = parts.iter().cloned().flatten().collect();
        assert_eq!(joined, (0..11).collect::<Vec<_>>());
        assert_eq!(axes.along(0, |_| false), 0..0);
    }
}

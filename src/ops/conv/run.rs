//! One row of output voxels: cut into the micro-kernels' runs, and what becomes of their accumulators.

use super::correlate::Pass;
use super::micro::{Reduction, broadcast_voxels, lanes_of_anchors, lanes_of_voxels};
use super::plan::LANES;
use crate::device::cpu::Lanes;
use std::mem::MaybeUninit;

/// Channels of the widest output whose voxels, not channels, fill the lanes.
pub const THIN_CHANNELS: usize = 4;

/// Voxels of the widest run of a thin output.
const THIN_VOXELS: usize = 96;

/// Floats of a tile after its last row: a thin run may start at a row's last voxel and read all of its lanes.
pub const SLACK: usize = THIN_VOXELS + 2;

/// One row of output voxels of a class, for some lane blocks.
pub struct OutRow<'a> {
    /// The tile.
    pub x: *const f32,
    /// Packed weights of the first lane block.
    pub w: *const f32,
    /// Those of the class of odd outputs along w, where a thin scatter makes both.
    pub odd: *const f32,
    /// Floats of a lane block's weights.
    pub q_stride: usize,
    /// Where in the tile the first voxel's input is.
    pub reduction: Reduction<'a>,
    /// Voxels.
    pub width: usize,
    /// First lane block.
    pub lane: usize,
    /// Number of the first voxel in the head, samples outermost.
    pub first_voxel: usize,
    /// Whether this is the first group of input channels: it writes, the others add.
    pub first: bool,
}

/// Where the run of a lane block is written.
#[derive(Clone, Copy)]
struct Target<'a> {
    /// First voxel's first lane.
    y: *mut f32,
    /// Floats between voxels.
    step: usize,
    /// Lanes.
    len: usize,
    /// Bias of these lanes, where it is to be added.
    bias: Option<&'a [f32]>,
}

impl Pass<'_> {
    /// Computes the row for `q` lane blocks.
    ///
    /// # Safety
    /// The tile holds all that the row's anchors read and [`SLACK`] floats more; the weights of `q` lane blocks lie at
    /// `row.w`; no other thread uses these lanes of these voxels; V's vector unit exists.
    #[inline(always)]
    pub unsafe fn row<V: Lanes, const STEP: usize, const ACCUMULATORS: usize>(&self, row: &OutRow, q: usize) {
        let mut a = 0;
        while a < row.width {
            // SAFETY: handed on from the caller.
            a += unsafe {
                match q {
                    _ if STEP == 0 => self.thin_run::<V, ACCUMULATORS>(row, a),
                    4 if STEP >= 8 && ACCUMULATORS >= 24 => self.wide_run::<V, 6, 4, STEP>(row, a),
                    2 if ACCUMULATORS >= 24 => self.wide_run::<V, 12, 2, STEP>(row, a),
                    _ if ACCUMULATORS >= 24 => self.wide_run::<V, 24, 1, STEP>(row, a),
                    _ if ACCUMULATORS >= 6 => self.wide_run::<V, 6, 1, STEP>(row, a),
                    _ => self.wide_run::<V, 2, 1, STEP>(row, a),
                }
            };
        }
    }

    /// The largest run of at most `MAX` voxels from voxel `a` on, for Q lane blocks; returns its length.
    #[inline(always)]
    unsafe fn wide_run<V: Lanes, const MAX: usize, const Q: usize, const STEP: usize>(
        &self,
        row: &OutRow,
        a: usize,
    ) -> usize {
        macro_rules! run {
            ($p:literal) => {{
                // SAFETY: handed on from the caller.
                let acc = unsafe {
                    broadcast_voxels::<V, $p, Q, STEP>(
                        row.x.add(a * row.reduction.step),
                        row.w,
                        row.q_stride,
                        &row.reduction,
                    )
                };
                // Through memory: these stores are the only use of the accumulators.
                let mut values = MaybeUninit::<[[[f32; LANES]; $p]; Q]>::uninit();
                for q in 0..Q {
                    for p in 0..$p {
                        let to = values.as_mut_ptr().cast::<f32>();
                        // SAFETY: inside `values`.
                        unsafe { acc[p][q].store(to.add((q * $p + p) * LANES)) };
                    }
                }
                // SAFETY: every float was just written.
                let values = unsafe { values.assume_init_ref() };
                for (q, values) in values.iter().enumerate() {
                    // SAFETY: V's unit exists, and the voxels are the caller's.
                    unsafe { self.target(row, a, q, $p).write::<V>(values, row.first) };
                }
                return $p;
            }};
        }
        match (row.width - a).min(MAX) {
            24.. if MAX >= 24 => run!(24),
            16.. if MAX >= 24 && STEP >= 8 => run!(16),
            12.. if MAX >= 12 => run!(12),
            8.. if MAX >= 8 && STEP >= 8 => run!(8),
            6.. if MAX >= 6 && STEP >= 8 => run!(6),
            4.. if MAX >= 4 => run!(4),
            2.. if STEP >= 8 => run!(2),
            _ => run!(1),
        }
    }

    /// Where the voxels from `a` on, `voxels` of them, of the q-th lane block go.
    #[inline(always)]
    fn target(&self, row: &OutRow, a: usize, q: usize, voxels: usize) -> Target<'_> {
        let block = self.lanes[row.lane + q];
        let out = &self.outs[block.tensor];
        let step = self.map.outputs() * out.channels;
        let start = row.first_voxel * out.channels + a * step + block.first;
        Target {
            y: out.data.at(start, (voxels - 1) * step + block.len),
            step,
            len: block.len,
            bias: out.bias.map(|b| &b[block.first..][..block.len]),
        }
    }

    /// Up to [`THIN_VOXELS`] anchors of at most [`THIN_CHANNELS`] channels from anchor `a` on; returns their number.
    #[inline(always)]
    unsafe fn thin_run<V: Lanes, const ACCUMULATORS: usize>(&self, row: &OutRow, a: usize) -> usize {
        macro_rules! run {
            ($p:literal, $columns:literal, $acc:expr) => {{
                let acc: [[V; $columns]; $p] = $acc;
                let mut values = MaybeUninit::<[[[f32; LANES]; $columns]; $p]>::uninit();
                for p in 0..$p {
                    for c in 0..$columns {
                        let to = values.as_mut_ptr().cast::<f32>();
                        // SAFETY: inside `values`.
                        unsafe { acc[p][c].store(to.add((p * $columns + c) * LANES)) };
                    }
                }
                // SAFETY: every float was just written.
                let values = unsafe { values.assume_init_ref() };
                let anchors = (row.width - a).min(LANES * $p);
                // SAFETY: the voxels are the caller's.
                unsafe { self.columns(row, a, anchors).write_columns(values, anchors, row.first) };
                anchors
            }};
        }
        macro_rules! gather {
            ($p:literal, $c:literal) => {
                // SAFETY: handed on from the caller; the tile's slack covers the last load.
                run!($p, $c, unsafe { lanes_of_voxels::<V, $p, $c>(row.x.add(a), row.w, &row.reduction) })
            };
        }
        macro_rules! scatter {
            ($p:literal, $c:literal, $columns:literal) => {
                // SAFETY: as above.
                run!($p, $columns, unsafe {
                    let weights = [row.w, row.odd];
                    lanes_of_anchors::<V, $p, $c, $columns>(row.x.add(a), weights, &row.reduction)
                })
            };
        }
        let left = row.width - a;
        match (self.map.outputs(), self.lanes[row.lane].len) {
            (1, 1) if left > 32 && ACCUMULATORS >= 24 => gather!(6, 1),
            (1, 1) => gather!(1, 1),
            (1, 2) if left > 48 && ACCUMULATORS >= 24 => gather!(6, 2),
            (1, 2) if left > 16 && ACCUMULATORS >= 6 => gather!(3, 2),
            (1, 2) => gather!(1, 2),
            (1, 3) => gather!(1, 3),
            (1, _) => gather!(1, 4),
            (_, 1) => scatter!(1, 1, 2),
            (_, 2) if left > 16 && ACCUMULATORS >= 24 => scatter!(3, 2, 4),
            (_, 2) => scatter!(1, 2, 4),
            (_, 3) => scatter!(1, 3, 6),
            _ => scatter!(1, 4, 8),
        }
    }

    /// Where both outputs of `anchors` anchors from `a` on go, as one run of channels an anchor.
    #[inline(always)]
    fn columns(&self, row: &OutRow, a: usize, anchors: usize) -> Target<'_> {
        let (block, outputs) = (self.lanes[row.lane], self.map.outputs());
        let out = &self.outs[block.tensor];
        let step = outputs * out.channels;
        let start = row.first_voxel * out.channels + a * step;
        Target { y: out.data.at(start, anchors * step), step, len: step, bias: out.bias }
    }
}

impl Target<'_> {
    /// Writes or adds the lanes of each voxel.
    ///
    /// # Safety
    /// Nobody else uses these floats; V's vector unit exists.
    #[inline(always)]
    unsafe fn write<V: Lanes>(&self, values: &[[f32; LANES]], first: bool) {
        for (p, values) in values.iter().enumerate() {
            // SAFETY: `target` has checked the bounds; the floats are the caller's.
            unsafe {
                let y = self.y.add(p * self.step);
                if self.len == LANES {
                    let sum = V::load(values.as_ptr());
                    match (first, self.bias) {
                        (true, None) => sum,
                        (true, Some(bias)) => sum.add(V::load(bias.as_ptr())),
                        (false, _) => sum.add(V::load(y)),
                    }
                    .store(y);
                } else {
                    for (i, y) in std::slice::from_raw_parts_mut(y, self.len).iter_mut().enumerate() {
                        *y = values[i] + if first { self.bias.map_or(0.0, |b| b[i]) } else { *y };
                    }
                }
            }
        }
    }

    /// Writes or adds J floats of each of `anchors` anchors, sixteen of which are the lanes of an accumulator. J is a
    /// multiple of the channels.
    ///
    /// # Safety
    /// Nobody else uses these floats.
    #[inline(always)]
    unsafe fn write_columns<const J: usize>(
        &self,
        values: &[[[f32; LANES]; J]],
        anchors: usize,
        first: bool,
    ) {
        let bias: [f32; J] = std::array::from_fn(|j| self.bias.map_or(0.0, |b| b[j % b.len()]));
        for (i, values) in values.iter().enumerate().take(anchors.div_ceil(LANES)) {
            // SAFETY: `columns` has checked the bounds; the floats are the caller's.
            let y = unsafe {
                let len = (anchors - i * LANES).min(LANES) * J;
                std::slice::from_raw_parts_mut(self.y.add(i * LANES * J), len)
            };
            for (v, y) in y.chunks_exact_mut(J).enumerate() {
                for j in 0..J {
                    y[j] = values[j][v % LANES] + if first { bias[j] } else { y[j] };
                }
            }
        }
    }
}

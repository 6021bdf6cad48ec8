//! One row of output voxels: cut into the micro-kernels' runs, and what becomes of their accumulators.

use super::correlate::Pass;
use super::epilogue::{LaneMap, Out, Stage};
use super::micro::{Reduction, broadcast_voxels, lanes_of_anchors, lanes_of_voxels};
use super::plan::{Block, LANES};
use super::target::Target;
use crate::device::lanes::{Lanes, interleaved};
use crate::device::list::List;
use std::mem::MaybeUninit;

/// Channels of the widest output whose voxels, not channels, fill the lanes.
pub const THIN_CHANNELS: usize = 4;

/// Maps of a thin lane block: lane l of vector j is of channel (16 j + l) % channels, which for three channels comes again
/// after three vectors, for 1, 2 and 4 after one.
const THIN_MAPS: usize = 3;

/// Voxels of the widest run of a thin output.
const THIN_VOXELS: usize = 96;

/// Floats of a tile after its last row: a thin run may start at a row's last voxel and read all of its lanes.
pub const SLACK: usize = THIN_VOXELS + 2;

/// Vectors on lines of the cache. One that lies on two lines is not forwarded from the store buffer: a load waits until what was
/// stored has left it.
#[repr(align(64))]
struct Lines<T>(T);

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
    /// Which group of input channels this is.
    pub stage: Stage,
}

/// The maps of lane blocks, one each, or [`THIN_MAPS`] if their voxels fill the lanes.
pub fn lane_maps(outs: &[Out], lanes: &[Block], thin: bool) -> List<LaneMap> {
    let map = |&lane: &Block, i: usize| {
        let out = &outs[lane.tensor];
        out.lane_map(|l| if thin { Some((i * LANES + l) % out.channels) } else { lane.channel(l) })
    };
    let each = if thin { THIN_MAPS } else { 1 };
    lanes.iter().flat_map(|lane| (0..each).map(move |i| map(lane, i))).collect()
}

impl Pass<'_> {
    /// Computes the row for `q` lane blocks.
    ///
    /// # Safety
    /// The tile holds all that the row's anchors read and [`SLACK`] floats more; the weights of `q` lane blocks lie at
    /// `row.w`; no other thread uses these lanes of these voxels; V's vector unit exists.
    #[inline(always)]
    pub unsafe fn row<V: Lanes, const STEP: usize, const ACCUMULATORS: usize>(&self, row: &OutRow, q: usize) {
        for lane in row.lane..row.lane + q {
            let block = self.lanes[lane];
            let out = &self.outs[block.tensor];
            let step = self.map.outputs() * out.channels;
            let start = row.first_voxel * out.channels + block.first;
            out.whole(&self.maps[lane], row.stage).prefetch((start, step), row.width, block.len);
        }
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
                let mut values = MaybeUninit::<Lines<[[[f32; LANES]; $p]; Q]>>::uninit();
                for q in 0..Q {
                    for p in 0..$p {
                        let to = values.as_mut_ptr().cast::<f32>();
                        // SAFETY: inside `values`.
                        unsafe { acc[p][q].store(to.add((q * $p + p) * LANES)) };
                    }
                }
                // SAFETY: every float was just written.
                let Lines(values) = unsafe { values.assume_init_ref() };
                for (q, values) in values.iter().enumerate() {
                    // SAFETY: V's unit exists, and the voxels are the caller's.
                    unsafe { self.write_voxels::<V>(row, a, row.lane + q, values) };
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

    /// Writes the voxels from `a` on of a lane block.
    ///
    /// # Safety
    /// V's vector unit must exist; nobody else may use these voxels' lanes.
    #[inline(always)]
    unsafe fn write_voxels<V: Lanes>(&self, row: &OutRow, a: usize, lane: usize, values: &[[f32; LANES]]) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let step = self.map.outputs() * out.channels;
        let start = row.first_voxel * out.channels + a * step + block.first;
        // SAFETY: handed on from the caller.
        unsafe {
            out.whole(&self.maps[lane], row.stage).put_rows::<V>((start, step), values, block.len, ());
        }
    }

    /// Up to [`THIN_VOXELS`] anchors of at most [`THIN_CHANNELS`] channels from anchor `a` on; returns their number.
    #[inline(always)]
    unsafe fn thin_run<V: Lanes, const ACCUMULATORS: usize>(&self, row: &OutRow, a: usize) -> usize {
        macro_rules! run {
            ($p:literal, $columns:literal, $acc:expr) => {{
                let acc: [[V; $columns]; $p] = $acc;
                let mut values = MaybeUninit::<Lines<[[[f32; LANES]; $columns]; $p]>>::uninit();
                for p in 0..$p {
                    for c in 0..$columns {
                        let to = values.as_mut_ptr().cast::<f32>();
                        // SAFETY: inside `values`.
                        unsafe { acc[p][c].store(to.add((p * $columns + c) * LANES)) };
                    }
                }
                // SAFETY: every float was just written.
                let Lines(values) = unsafe { values.assume_init_ref() };
                let anchors = (row.width - a).min(LANES * $p);
                // SAFETY: the voxels are the caller's.
                unsafe { self.write_columns::<V, $columns>(row, a, anchors, values) };
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
            ($p:literal, $c:literal, $columns:literal, $apart:literal) => {
                // SAFETY: as above.
                run!($p, $columns, unsafe {
                    let weights = [row.w, row.odd];
                    lanes_of_anchors::<V, $p, $c, $columns, $apart>(row.x.add(a), weights, &row.reduction)
                })
            };
        }
        let left = row.width - a;
        // AVX2: a gather's voxels, operands of every channel, stay in registers beside four accumulators, not six; a scatter's
        // products of an output of odd place wait for each other, so that there are two vectors of anchors, one parity at a time.
        match (self.map.outputs(), self.lanes[row.lane].len) {
            (1, 1) if left > 32 && ACCUMULATORS >= 24 => gather!(6, 1),
            (1, 1) => gather!(1, 1),
            (1, 2) if left > 48 && ACCUMULATORS >= 24 => gather!(6, 2),
            (1, 2) if left > 16 && ACCUMULATORS >= 6 => gather!(2, 2),
            (1, 2) => gather!(1, 2),
            (1, 3) => gather!(1, 3),
            (1, _) => gather!(1, 4),
            (_, 1) => scatter!(1, 1, 2, false),
            (_, 2) if left > 16 && ACCUMULATORS >= 24 => scatter!(3, 2, 4, false),
            (_, 2) if left > 16 && ACCUMULATORS >= 6 => scatter!(2, 2, 4, true),
            (_, 2) => scatter!(1, 2, 4, false),
            (_, 3) => scatter!(1, 3, 6, false),
            _ => scatter!(1, 4, 8, false),
        }
    }

    /// Writes J values, all outputs' channels, of each of `anchors` anchors from `a` on, sixteen of which are the lanes of
    /// an accumulator.
    ///
    /// # Safety
    /// As [`Self::write_voxels`].
    #[inline(always)]
    unsafe fn write_columns<V: Lanes, const J: usize>(
        &self,
        row: &OutRow,
        a: usize,
        anchors: usize,
        values: &[[[f32; LANES]; J]],
    ) {
        let out = &self.outs[self.lanes[row.lane].tensor];
        let maps = &self.maps[row.lane * THIN_MAPS..][..THIN_MAPS];
        let start = row.first_voxel * out.channels + a * J;
        let whole = if J.is_power_of_two() { anchors / LANES } else { 0 };
        // SAFETY: handed on from the caller.
        unsafe {
            if out.finishes(row.stage) {
                let target = out.target::<true>(start, whole * J * LANES, &maps[0], row.stage);
                put_anchors::<V, J, true>(&target, &values[..whole]);
            } else {
                let target = out.target::<false>(start, whole * J * LANES, &maps[0], row.stage);
                put_anchors::<V, J, false>(&target, &values[..whole]);
            }
        }
        for (values, first) in values.iter().zip((0..anchors).step_by(LANES)).skip(whole) {
            let (start, count) = (start + first * J, LANES.min(anchors - first) * J);
            let mut rows = [[0.0; LANES]; J];
            let floats = rows.as_flattened_mut().iter_mut().enumerate();
            floats.for_each(|(i, float)| *float = values[i % J][i / J]);
            for (j, map) in maps.iter().cycle().take(count.div_ceil(LANES)).enumerate() {
                let len = LANES.min(count - j * LANES);
                // SAFETY: handed on from the caller.
                unsafe {
                    let target = out.whole(map, row.stage);
                    target.put_rows::<V>((start + j * LANES, 0), &rows[j..j + 1], len, ());
                }
            }
        }
    }
}

/// Puts sixteen anchors' values after the other sixteen's, each of them J columns.
///
/// # Safety
/// As [`Target::put`].
#[inline(always)]
unsafe fn put_anchors<V: Lanes, const J: usize, const FINISHES: bool>(
    target: &Target<FINISHES>,
    values: &[[[f32; LANES]; J]],
) {
    for (i, columns) in values.iter().enumerate() {
        // SAFETY: handed on from the caller.
        unsafe {
            let lanes = by_anchors::<V, J>(columns);
            for j in 0..J {
                target.put((i * J + j) * LANES, lanes[j]);
            }
        }
    }
}

/// Lane a of `columns[j]` to lane a * J + j of all the vectors; J is a power of two.
///
/// # Safety
/// V's vector unit exists.
#[inline(always)]
unsafe fn by_anchors<V: Lanes, const J: usize>(columns: &[[f32; LANES]; J]) -> [V; J] {
    let mut lanes = [V::zero(); J];
    for j in 0..J {
        // SAFETY: sixteen floats.
        lanes[j] = unsafe { V::load(columns[j].as_ptr()) };
    }
    interleaved::<V, 1, J>(lanes)
}

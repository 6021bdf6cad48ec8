//! The gather core: every output voxel is a sum over taps and channels of an input tile.

use super::micro::{Reduction, broadcast_voxels, lanes_of_voxels};
use super::pack::{Packed, lane_block_floats, pack};
use super::plan::{Block, Class, LANES, Map, Tile, lane_blocks, source_blocks};
use super::tile::{Order, Place, load};
use super::{Head, Source, Weights};
use crate::device::cpu::{Disjoint, Lanes, Plain, Simd, simd};
use rayon::prelude::*;

/// Tasks a pass is cut into at least, where its shape allows: lane blocks are split over tasks until then.
const MIN_TASKS: usize = 32;

/// Voxels of the widest `thin_run`: it may start at a row's last voxel, so a tile has that many floats of slack.
const THIN_VOXELS: usize = 48;

/// heads = sum over sources of (source mapped by its pending map) correlated with `weights(source, head)`, plus bias.
///
/// `n` samples; `space` is the sources' (D, H, W), `out_space` the heads'.
pub fn correlate<'a>(
    map: Map,
    n: usize,
    space: [usize; 3],
    out_space: [usize; 3],
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    let anchors = out_space.map(|o| o.div_ceil(map.outputs()));
    let classes = map.classes();
    let channels = source_blocks(sources);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let packed = pack(map, &classes, &channels, &lanes, weights);
    let widest = channels.iter().map(|b| b.len).max().unwrap_or(1);
    let tiles = Tile::choose(map, anchors, widest).origins(n, anchors);
    // A multiple of 4 lane blocks a task keeps the widest micro-kernels usable.
    let groups = MIN_TASKS.div_ceil(tiles.len()).min(lanes.len().div_ceil(4));
    let group = lanes.len().div_ceil(groups).next_multiple_of(4);
    let outs: Vec<_> = heads
        .iter_mut()
        .map(|h| Out { data: Disjoint::new(h.out), channels: h.channels, bias: h.bias })
        .collect();
    let pass = Pass { map, out_space, anchors, classes: &classes, lanes: &lanes, outs: &outs };
    let tasks: Vec<_> =
        tiles.iter().flat_map(|t| (0..lanes.len()).step_by(group).map(move |first| (t, first))).collect();
    tasks.into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(buffer, row), (origin, first)| {
            let pitch = map.extent(anchors[2]);
            let group = first..lanes.len().min(first + group);
            for (index, &block) in channels.iter().enumerate() {
                let size = origin.3;
                let floats = map.extent(size.d) * map.extent(size.h) * pitch * block.len;
                buffer.resize(floats + THIN_VOXELS, 0.0);
                let place = Place { map, space, anchors_w: anchors[2], origin };
                load(&sources[block.tensor], block, &place, Order::ChannelRows, pitch, buffer, row);
                let step =
                    Step { tile: buffer, pitch, block, index, packed: &packed, origin, lanes: group.clone() };
                pass.run(&step);
            }
        },
    );
}

/// A head, shared by tasks that write different voxels or channels of it.
struct Out<'a> {
    data: Disjoint<'a>,
    channels: usize,
    bias: Option<&'a [f32]>,
}

/// What all tasks of a pass share.
struct Pass<'a> {
    map: Map,
    out_space: [usize; 3],
    anchors: [usize; 3],
    classes: &'a [Class],
    lanes: &'a [Block],
    outs: &'a [Out<'a>],
}

/// One tile, one block of input channels, some lane blocks.
struct Step<'a> {
    tile: &'a [f32],
    pitch: usize,
    block: Block,
    index: usize,
    packed: &'a Packed,
    origin: &'a (usize, usize, usize, Tile),
    lanes: std::ops::Range<usize>,
}

impl Pass<'_> {
    fn run(&self, step: &Step) {
        match simd() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512(step) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            Simd::Avx2 => unsafe { self.run_avx2(step) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Plain, 4>(step) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, step: &Step) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<crate::device::cpu::x86::Avx512, 24>(step) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, step: &Step) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<crate::device::cpu::x86::Avx2, 6>(step) }
    }

    /// Adds one block of input channels to every output of the tile; the first block writes instead.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const ACCUMULATORS: usize>(&self, step: &Step) {
        let (n, d0, h0, size) = *step.origin;
        let stride = self.map.stride();
        let row_floats = step.block.len * step.pitch;
        let extent_h = self.map.extent(size.h);
        for (class_index, class) in self.classes.iter().enumerate() {
            let offsets: Vec<usize> =
                class.rows.iter().map(|r| (r.0 * extent_h + r.1) * row_floats).collect();
            let reduction = Reduction {
                rows: &offsets,
                channels: step.block.len,
                pitch: step.pitch,
                taps: class.taps_w.len(),
            };
            let weights = step.packed.of(step.index, class_index);
            let q_stride = lane_block_floats(class, step.block.len);
            // Outputs of this parity along w.
            let width =
                (self.out_space[2] - class.parity[2]).div_ceil(self.map.outputs()).min(self.anchors[2]);
            let mut lane = step.lanes.start;
            while lane < step.lanes.end {
                let left = step.lanes.end - lane;
                let thin = self.lanes[lane].len <= 4 && stride == 1 && width >= LANES;
                let q = match left {
                    _ if thin => 1,
                    4.. if width <= 6 && ACCUMULATORS >= 24 => 4,
                    2.. if ACCUMULATORS >= 24 => 2,
                    _ => 1,
                };
                let w = weights[lane * q_stride..].as_ptr();
                for d in 0..size.d {
                    let od = (d0 + d) * self.map.outputs() + class.parity[0];
                    for h in 0..size.h {
                        let oh = (h0 + h) * self.map.outputs() + class.parity[1];
                        if od >= self.out_space[0] || oh >= self.out_space[1] {
                            continue;
                        }
                        let x = step.tile[((d * extent_h + h) * stride) * row_floats..].as_ptr();
                        let row = OutRow { n, od, oh, parity_w: class.parity[2], first: step.index == 0 };
                        let mut a = 0;
                        while a < width {
                            let run = Run {
                                // SAFETY: the tile holds extent(width) floats of every row, channel and tap.
                                x: unsafe { x.add(a * stride) },
                                w,
                                q_stride,
                                left: width - a,
                                reduction: &reduction,
                                lane,
                                row: &row,
                                a,
                            };
                            // SAFETY: the tile's slack covers the widest thin run, its rows all others.
                            a += unsafe {
                                match q {
                                    _ if thin => self.thin_run::<V>(&run),
                                    4 => self.wide_run::<V, 6, 4>(&run),
                                    2 => self.wide_run::<V, 12, 2>(&run),
                                    _ if ACCUMULATORS >= 24 => self.wide_run::<V, 12, 1>(&run),
                                    _ => self.wide_run::<V, 6, 1>(&run),
                                }
                            };
                        }
                    }
                }
                lane += q;
            }
        }
    }

    /// The largest run of at most `MAX` voxels that fits `left`, for Q lane blocks; returns its length.
    #[inline(always)]
    unsafe fn wide_run<V: Lanes, const MAX: usize, const Q: usize>(&self, run: &Run) -> usize {
        let &Run { x, w, q_stride, left, reduction, lane, row, a } = run;
        macro_rules! run {
            ($p:literal) => {{
                // SAFETY: handed on from the caller.
                let acc = unsafe {
                    if self.map.stride() == 1 {
                        broadcast_voxels::<V, $p, Q, 1>(x, w, q_stride, reduction)
                    } else {
                        broadcast_voxels::<V, $p, Q, 2>(x, w, q_stride, reduction)
                    }
                };
                for q in 0..Q {
                    for p in 0..$p {
                        // SAFETY: V's unit exists.
                        unsafe { self.write_lanes(row, a + p, lane + q, acc[p][q]) };
                    }
                }
                return $p;
            }};
        }
        match left.min(MAX) {
            12.. if MAX >= 12 => run!(12),
            8.. if MAX >= 8 => run!(8),
            6.. => run!(6),
            4.. => run!(4),
            3 => run!(3),
            2 => run!(2),
            _ => run!(1),
        }
    }

    /// Up to [`THIN_VOXELS`] voxels of at most 4 channels; returns their number.
    #[inline(always)]
    unsafe fn thin_run<V: Lanes>(&self, run: &Run) -> usize {
        let &Run { x, w, left, reduction, lane, row, a, .. } = run;
        macro_rules! run {
            ($p:literal, $c:literal) => {{
                // SAFETY: handed on from the caller; the tile's slack covers the last load.
                let acc = unsafe { lanes_of_voxels::<V, $p, $c>(x, w, reduction) };
                for (p, acc) in acc.iter().enumerate() {
                    // SAFETY: V's unit exists.
                    unsafe {
                        self.write_voxels(row, a + 16 * p, left.saturating_sub(16 * p).min(16), lane, acc)
                    };
                }
                left.min(16 * $p)
            }};
        }
        match (self.lanes[lane].len, left > 16) {
            (1, _) => run!(2, 1),
            (2, true) => run!(3, 2),
            (2, false) => run!(1, 2),
            (3, _) => run!(2, 3),
            _ => run!(2, 4),
        }
    }

    /// Where the voxel of anchor `a` begins in the head of a lane block.
    #[inline(always)]
    fn voxel(&self, row: &OutRow, a: usize, block: Block) -> usize {
        let [od, oh, ow] = self.out_space;
        let w = a * self.map.outputs() + row.parity_w;
        ((((row.n * od + row.od) * oh + row.oh) * ow) + w) * self.outs[block.tensor].channels + block.first
    }

    /// Writes or adds 16 lanes of one voxel.
    #[inline(always)]
    unsafe fn write_lanes<V: Lanes>(&self, row: &OutRow, a: usize, lane: usize, acc: V) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        // SAFETY: a task owns its tile's voxels of its lane blocks, and no borrow outlives this call.
        let y = unsafe { out.data.get(self.voxel(row, a, block), block.len) };
        if block.len == LANES && (out.bias.is_none() || !row.first) {
            // SAFETY: `y` has 16 floats.
            unsafe { if row.first { acc } else { acc.add(V::load(y.as_ptr())) }.store(y.as_mut_ptr()) };
            return;
        }
        let mut values = [0.0; LANES];
        // SAFETY: 16 floats.
        unsafe { acc.store(values.as_mut_ptr()) };
        for (i, (y, v)) in y.iter_mut().zip(values).enumerate() {
            *y = v + if row.first { out.bias.map_or(0.0, |b| b[block.first + i]) } else { *y };
        }
    }

    /// Writes or adds C channels of up to 16 voxels.
    #[inline(always)]
    unsafe fn write_voxels<V: Lanes, const C: usize>(
        &self,
        row: &OutRow,
        a: usize,
        voxels: usize,
        lane: usize,
        acc: &[V; C],
    ) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let mut values = [[0.0; LANES]; C];
        for c in 0..C {
            // SAFETY: 16 floats.
            unsafe { acc[c].store(values[c].as_mut_ptr()) };
        }
        for v in 0..voxels {
            // SAFETY: a task owns its tile's voxels of its lane blocks, and no borrow outlives this iteration.
            let y = unsafe { out.data.get(self.voxel(row, a + v, block), C) };
            for c in 0..C {
                y[c] = values[c][v]
                    + if row.first { out.bias.map_or(0.0, |b| b[block.first + c]) } else { y[c] };
            }
        }
    }
}

/// Neighbouring voxels of a row, from anchor `a` on.
struct Run<'a> {
    /// The first anchor's input voxel in the tile.
    x: *const f32,
    /// Packed weights of the first lane block.
    w: *const f32,
    q_stride: usize,
    /// Anchors left in the row.
    left: usize,
    reduction: &'a Reduction<'a>,
    lane: usize,
    row: &'a OutRow,
    a: usize,
}

/// One row of output voxels of a class.
struct OutRow {
    n: usize,
    od: usize,
    oh: usize,
    parity_w: usize,
    /// Whether this is the first block of input channels: it writes, the others add.
    first: bool,
}

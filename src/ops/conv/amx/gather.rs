//! The gather core: register tiles of 16 output voxels by 16 output channels.

use super::LANE_BLOCKS;
use super::cover::{Cover, Run};
use super::fold::{Fold, parity};
use super::halo::{Halo, SLACK};
use super::micro::{Step, multiply_parts, parts_of_a};
use super::pack::{TILE_FLOATS, lane_block_floats, pack};
use super::scheme::{BAND, Scheme};
use crate::device::amx::{ROW_BYTES, ROWS, Tiles};
use crate::device::cpu::x86::{Avx2, Avx512};
use crate::device::cpu::{Disjoint, Lanes, Plain, Simd, simd};
use crate::ops::conv::correlate::Out;
use crate::ops::conv::kept::{self, Layout};
use crate::ops::conv::pack::Packed;
use crate::ops::conv::plan::{Block, Class, LANES, Map, Origin, Tile, blocks};
use crate::ops::conv::tile::Place;
use crate::ops::conv::{Head, Problem, Source, Weights};
use rayon::prelude::*;

/// Blocks that a halo tile holds: sums over them stay in registers. 128 channels x 27 taps x 32 lanes of weights are 221
/// KB; every CPU with AMX has 2 MB of L2 a core.
const GROUP: usize = 4;

/// For the same reason halo tiles may be this much larger than the vector units'.
const LARGER: usize = 2;

/// The accumulators of a kernel, before they are added to the output.
#[repr(align(64))]
struct Scratch([[[f32; LANES]; ROWS]; 4]);

/// See [`crate::ops::conv::correlate()`]; `scheme` is that of the pass.
pub fn correlate<'a>(
    scheme: &Scheme,
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    let Problem { map, phase, n, space, out_space, .. } = problem;
    let anchors = out_space.map(|o| o.div_ceil(map.outputs()));
    let channels: Vec<usize> = sources.iter().map(|s| s.channels).collect();
    let head_channels: Vec<usize> = heads.iter().map(|h| h.channels).collect();
    let depth = scheme.depth;
    let blocks = blocks(channels, depth.channels());
    let groups: Vec<&[Block]> = blocks.chunks(GROUP).collect();
    let lanes = scheme.lanes(&head_channels);
    let pack = || pack(map, scheme, &groups, &lanes, weights);
    let layout = Layout::Tiles(depth, scheme.fold);
    let packed = kept::packed(phase, (map, layout), [&blocks, &lanes], weights, pack);
    let widest = depth.pitch() * blocks.len().min(GROUP);
    let tiles = Tile::choose(map, anchors, widest.div_ceil(LARGER)).origins(n, anchors);
    // Where tiles are few, threads share them by lanes: no sum depends on how.
    let parts = (2 * rayon::current_num_threads()).div_ceil(tiles.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(LANE_BLOCKS);
    let outs: Vec<_> = heads
        .iter_mut()
        .map(|h| Out { data: Disjoint::new(h.out), channels: h.channels, bias: h.bias })
        .collect();
    let pass = Pass { map, scheme, out_space, lanes: &lanes, outs: &outs };
    let tasks: Vec<_> =
        tiles.iter().flat_map(|t| (0..lanes.len()).step_by(part).map(move |first| (t, first))).collect();
    tasks.into_par_iter().for_each_init(
        || (Vec::new(), Vec::new(), Cover::default(), Vec::new()),
        |(tile, row, cover, steps), (origin, first)| {
            let halo = Halo::new(depth, map, origin.size, anchors[2]);
            for (index, group) in groups.iter().enumerate() {
                tile.resize(halo.len() * group.len() + SLACK, 0.0);
                // What the last rows of A read past the tile is multiplied by 0, and must be a number.
                tile[halo.len() * group.len()..].fill(0.0);
                let place = Place { map, space, anchors_w: anchors[2], origin, before: None };
                for (&block, tile) in group.iter().zip(tile.chunks_exact_mut(halo.len())) {
                    halo.load(&sources[block.tensor], block, &place, tile, row);
                }
                let lanes = first..lanes.len().min(first + part);
                let group = Group { halo, tile, blocks: group, index, packed: &packed, origin, lanes };
                pass.run(&group, cover, steps);
            }
        },
    );
}

/// What all tasks of a pass share.
struct Pass<'a> {
    map: Map,
    scheme: &'a Scheme,
    out_space: [usize; 3],
    lanes: &'a [Block],
    outs: &'a [Out<'a>],
}

/// One halo tile, one group of source blocks, some lane blocks.
struct Group<'a> {
    halo: Halo,
    tile: &'a [f32],
    blocks: &'a [Block],
    index: usize,
    packed: &'a Packed,
    origin: &'a Origin,
    lanes: std::ops::Range<usize>,
}

impl Pass<'_> {
    fn run(&self, group: &Group, cover: &mut Cover, steps: &mut Vec<Step>) {
        match simd() {
            // SAFETY: `simd()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512(group, cover, steps) },
            // SAFETY: as above.
            Simd::Avx2 => unsafe { self.run_avx2(group, cover, steps) },
            // SAFETY: plain Rust needs no feature.
            Simd::Portable => unsafe { self.run_lanes::<Plain>(group, cover, steps) },
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn run_avx512(&self, group: &Group, cover: &mut Cover, steps: &mut Vec<Step>) {
        // SAFETY: the feature is enabled here.
        unsafe { self.run_lanes::<Avx512>(group, cover, steps) }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, group: &Group, cover: &mut Cover, steps: &mut Vec<Step>) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx2>(group, cover, steps) }
    }

    /// Adds one group of input channels to every output of the halo tile; the first group writes instead.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes>(&self, group: &Group, cover: &mut Cover, steps: &mut Vec<Step>) {
        let Origin { d: d0, h: h0, size, .. } = *group.origin;
        let (depth, between) = (self.scheme.depth, group.halo.between());
        let mut scratch = Scratch([[[0.0; LANES]; ROWS]; 4]);
        // SAFETY: AMX is in use, or this would not run; no task starts another while it holds tiles.
        let _tiles = unsafe { Tiles::configure(depth.elements()) };
        for (class_index, class) in self.scheme.classes.iter().enumerate() {
            let [out_d, out_h, width] = self.map.class_space(class, self.out_space);
            let (d, h) = (size.d.min(out_d.saturating_sub(d0)), size.h.min(out_h.saturating_sub(h0)));
            cover.fill((d, h, group.halo.positions(width)), group.halo.pitches());
            group.halo.steps(class, group.blocks.len(), steps);
            let weights = group.packed.of(group.index, class_index);
            let lane_floats = lane_block_floats(class, group.blocks, depth);
            assert_eq!(steps.len() * TILE_FLOATS, lane_floats, "a B tile a step");
            let last = cover.len().checked_sub(1).map_or(0, |last| cover.start(last));
            let furthest = steps.iter().map(|step| step.a / 4).max().unwrap_or(0);
            let end = (last + ROWS - 1) * between + furthest + depth.elements();
            assert!(end <= group.tile.len(), "the last row of A ends in the slack");
            for lane in group.lanes.clone().step_by(LANE_BLOCKS) {
                let n = LANE_BLOCKS.min(group.lanes.end - lane);
                let b: [*const u8; LANE_BLOCKS] = std::array::from_fn(|q| {
                    super::bytes(weights[(lane + q.min(n - 1)) * lane_floats..].as_ptr())
                });
                let m = parts_of_a(n);
                for first in (0..cover.len()).step_by(m) {
                    let m = m.min(cover.len() - first);
                    let a: [*const u8; 4] = std::array::from_fn(|i| {
                        let position = cover.start(first + i.min(m - 1));
                        super::bytes(group.tile[position * between..].as_ptr())
                    });
                    let sums = scratch.0.as_mut_ptr();
                    // SAFETY: this thread holds the tiles. Every step's A lies in the halo tile or, for rows that are no
                    // anchors, in the slack behind it, as was asserted; its B lies in the packed weights of its lane
                    // block. The scratch has as many sums as a kernel.
                    unsafe {
                        let sum = |m: usize, q: usize| sums.add(m * n + q).cast::<f32>();
                        multiply_parts(
                            (&a[..m], 4 * between),
                            (&b[..n], ROW_BYTES),
                            steps,
                            sum,
                            (ROW_BYTES, false),
                        );
                    }
                    for (i, q) in (0..m).flat_map(|i| (0..n).map(move |q| (i, q))) {
                        let values = &scratch.0[i * n + q];
                        // SAFETY: V's unit exists; this task alone writes these voxels' lanes.
                        unsafe { self.write::<V>(group, class, (cover, first + i), lane + q, values) };
                    }
                }
            }
        }
    }

    /// Writes, or adds to the output, the anchors of a register tile.
    ///
    /// # Safety
    /// V's vector unit must exist; nobody else may use these voxels' lanes.
    #[inline(always)]
    unsafe fn write<V: Lanes>(
        &self,
        group: &Group,
        class: &Class,
        (cover, register): (&Cover, usize),
        lane: usize,
        values: &[[f32; LANES]; ROWS],
    ) {
        for run in cover.runs(register) {
            let values = &values[run.row..][..run.len];
            // SAFETY: handed on from the caller.
            unsafe {
                match self.scheme.fold {
                    None => self.write_run::<V>(group, class, run, lane, values),
                    Some(Fold::Outputs { channels }) => {
                        self.write_outputs(group, channels, run, lane, values);
                    }
                    Some(Fold::Band { channels }) => self.write_band(group, channels, run, values),
                }
            }
        }
    }

    /// Number of an anchor's output voxel of this parity in the head, samples outermost.
    fn voxel(&self, group: &Group, run: &Run, parity: [usize; 3]) -> usize {
        let Origin { n, d: d0, h: h0, .. } = *group.origin;
        let outputs = self.map.outputs();
        let [d, h, w] = [d0 + run.place.0, h0 + run.place.1, run.w];
        let [d, h, w] = [d * outputs + parity[0], h * outputs + parity[1], w * outputs + parity[2]];
        ((n * self.out_space[0] + d) * self.out_space[1] + h) * self.out_space[2] + w
    }

    /// Writes or adds a lane block of neighbouring voxels.
    ///
    /// # Safety
    /// As [`Self::write`].
    #[inline(always)]
    unsafe fn write_run<V: Lanes>(
        &self,
        group: &Group,
        class: &Class,
        run: &Run,
        lane: usize,
        values: &[[f32; LANES]],
    ) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let bias = out.bias.map(|b| &b[block.first..][..block.len]);
        let between = self.map.outputs() * out.channels;
        let start = self.voxel(group, run, class.parity) * out.channels + block.first;
        let y = out.data.at(start, (run.len - 1) * between + block.len);
        for (i, values) in values.iter().enumerate() {
            // SAFETY: `at` has checked the bounds; the floats are the caller's.
            unsafe {
                let y = y.add(i * between);
                if block.len == LANES {
                    let sum = V::load(values.as_ptr());
                    match (group.index, bias) {
                        (0, None) => sum,
                        (0, Some(bias)) => sum.add(V::load(bias.as_ptr())),
                        _ => sum.add(V::load(y)),
                    }
                    .store(y);
                } else {
                    for (i, y) in std::slice::from_raw_parts_mut(y, block.len).iter_mut().enumerate() {
                        *y = values[i] + if group.index == 0 { bias.map_or(0.0, |b| b[i]) } else { *y };
                    }
                }
            }
        }
    }

    /// Writes or adds all outputs of neighbouring anchors that a lane block holds.
    ///
    /// # Safety
    /// Nobody else may use these voxels' lanes.
    #[inline(always)]
    unsafe fn write_outputs(
        &self,
        group: &Group,
        channels: usize,
        run: &Run,
        lane: usize,
        values: &[[f32; LANES]],
    ) {
        let block = self.lanes[lane];
        // Both outputs along w of every channel: neighbours in memory, of one anchor after the other.
        let pair = 2 * channels;
        for first in (0..block.len).step_by(pair) {
            let voxel = self.voxel(group, run, parity((block.first + first) / channels));
            let y = self.outs[0].data.at(voxel * channels, run.len * pair);
            for (i, values) in values.iter().enumerate() {
                // SAFETY: `at` has checked the bounds; the floats are the caller's.
                unsafe { self.write_floats(group, y.add(i * pair), &values[first..first + pair]) };
            }
        }
    }

    /// Writes or adds neighbouring bands.
    ///
    /// # Safety
    /// Nobody else may use these voxels.
    #[inline(always)]
    unsafe fn write_band(&self, group: &Group, channels: usize, run: &Run, values: &[[f32; LANES]]) {
        let voxel = self.voxel(group, &Run { w: run.w * BAND, ..*run }, [0; 3]);
        // The last band of a row may go beyond its end.
        let voxels = (run.len * BAND).min(self.out_space[2] - run.w * BAND);
        let y = self.outs[0].data.at(voxel * channels, voxels * channels);
        for (i, values) in values.iter().enumerate() {
            let voxels = BAND.min(voxels - i * BAND);
            // SAFETY: `at` has checked the bounds; the floats are the caller's.
            unsafe { self.write_floats(group, y.add(i * BAND * channels), &values[..voxels * channels]) };
        }
    }

    /// Writes or adds whole voxels of the only head.
    ///
    /// # Safety
    /// `values.len()` floats from `y` on must be the caller's.
    #[inline(always)]
    unsafe fn write_floats(&self, group: &Group, y: *mut f32, values: &[f32]) {
        let out = &self.outs[0];
        // SAFETY: by the caller's promise.
        let y = unsafe { std::slice::from_raw_parts_mut(y, values.len()) };
        for (i, (y, v)) in y.iter_mut().zip(values).enumerate() {
            *y = v + if group.index == 0 { out.bias.map_or(0.0, |b| b[i % out.channels]) } else { *y };
        }
    }
}

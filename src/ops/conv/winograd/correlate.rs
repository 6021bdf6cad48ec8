//! Fprop and dgrad.

use super::super::epilogue::{Head, LaneMap, Out, Stage};
use super::super::kept::{self, Layout};
use super::super::micro::{Reduction, broadcast_voxels};
use super::super::pack::{self, Packed, lane_block_floats};
use super::super::plan::{Block, CHANNEL_BLOCK, LANES, Map, Origin, lane_blocks, source_blocks};
use super::super::tile::Element;
use super::super::{Problem, Source, Weights};
use super::slab::{Products, Scratch, Side, Slab};
use super::transform::{self, PRODUCTS};
use super::{ACCUMULATORS, SLAB_FLOATS, choose, tiles};
use crate::device::arena::Buffer;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::x86::{Avx2, Avx512};
use crate::device::cpu::{Lanes, Plain, Simd, simd};
use rayon::prelude::*;
use std::ops::Range;

/// Lane blocks of the widest register tile.
const WIDEST: usize = 4;

/// Register tiles between two output transforms.
const CHUNK: usize = 8;

/// Tasks a thread, where lane blocks can be shared out.
const TASKS_A_THREAD: usize = 4;

/// All source channels are summed at once.
const STAGE: Stage = Stage { first: true, last: true };

/// See [`super::super::correlate()`].
pub fn correlate<'a>(
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    let Problem { map, phase, n, out_space, .. } = problem;
    let blocks = source_blocks(sources, CHANNEL_BLOCK);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let pack = || pack(map, &blocks, &lanes, weights);
    let packed = kept::packed(phase, (map, Layout::Products), [&blocks, &lanes], weights, pack);
    let tiles = tiles(out_space);
    let largest = choose(tiles, blocks.len());
    let origins = largest.origins(n, tiles);
    // Where slabs are few, threads share them by lanes, and each transforms the whole input.
    let parts = (TASKS_A_THREAD * rayon::current_num_threads()).div_ceil(origins.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(WIDEST);
    let outs: Vec<_> = heads.iter_mut().map(|head| Out::new(head, &mut [])).collect();
    let lane_map = |lane: &Block| outs[lane.tensor].lane_map(|l| lane.channel(l));
    let maps: Vec<_> = lanes.iter().map(lane_map).collect();
    let packed = packed.of(0, 0);
    let pass = Pass { sources, blocks: &blocks, lanes: &lanes, outs: &outs, maps: &maps, packed };
    let floats = PRODUCTS * blocks.len() * (largest.d + 2) * largest.h * tiles[2] * CHANNEL_BLOCK;
    let tasks: Vec<_> =
        origins.iter().flat_map(|o| (0..lanes.len()).step_by(part).map(move |first| (o, first))).collect();
    tasks.into_par_iter().for_each_init(Default::default, |scratch, (origin, first)| {
        // One length for nearly all layers: the arena keeps every length that it was ever asked for.
        let v = Buffer::dirty(floats.max(SLAB_FLOATS) + ACCUMULATORS * LANES);
        let m = Buffer::dirty(PRODUCTS * CHUNK * ACCUMULATORS * LANES);
        let slab = Slab { problem: &problem, origin, tiles_w: tiles[2] };
        pass.run(&slab, first..lanes.len().min(first + part), &mut Room { v, m, scratch });
    });
}

/// Packs to lane blocks of `[product][source block][plane][channel][16 lanes]`.
fn pack<'a>(
    map: Map,
    blocks: &[Block],
    lanes: &[Block],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    let class = &map.classes()[0];
    let floats = |blocks: &[Block]| lane_block_floats(class, blocks, Element::Single);
    // Three planes of a product instead of 27 taps.
    let pitch = floats(blocks) / 9;
    let mut data = Buffer::dirty(lanes.len() * PRODUCTS * pitch);
    let of_lanes = data.par_chunks_exact_mut(PRODUCTS * pitch).zip(lanes);
    of_lanes.for_each_init(Vec::new, |taps, (mut out, lane)| {
        for block in blocks {
            taps.resize(floats(&[*block]), 0.0);
            pack::gather(map, class, weights(block.tensor, lane.tensor), [block, lane], taps);
            transform::filters(taps, block.len, out, pitch);
            out = &mut out[taps.len() / 9..];
        }
    });
    Packed::from_buffer(data)
}

/// What a task computes in.
struct Room<'a> {
    /// The slab's transformed inputs.
    v: Buffer,
    /// Products of a chunk of register tiles.
    m: Buffer,
    scratch: &'a mut Scratch,
}

/// What all tasks of a pass share.
struct Pass<'a> {
    sources: &'a [Source<'a>],
    blocks: &'a [Block],
    lanes: &'a [Block],
    outs: &'a [Out<'a>],
    /// Of every lane block.
    maps: &'a [LaneMap],
    packed: &'a [f32],
}

impl Pass<'_> {
    /// Computes some lane blocks of a slab.
    fn run(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        match simd() {
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { self.run_avx512(slab, lanes, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { self.run_avx2(slab, lanes, room) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Plain, 2>(slab, lanes, room) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, ACCUMULATORS>(slab, lanes, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx2, 6>(slab, lanes, room) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const N: usize>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        let Room { v, m, scratch } = room;
        let (plane, block_floats) = (slab.plane_tiles() * LANES, slab.input_tiles() * LANES);
        let pitch = self.blocks.len() * block_floats;
        let mut rows = Vec::with_capacity(3 * self.blocks.len());
        for (index, &block) in self.blocks.iter().enumerate() {
            let start = index * block_floats;
            let to = Products { floats: &mut v[start..], pitch, step: LANES };
            // SAFETY: V's unit exists.
            unsafe { slab.transform::<V>(Side::Inputs, &self.sources[block.tensor], block, to, scratch) };
            rows.extend((0..3).map(|kd| (start + kd * plane, block.len)));
        }
        let mut lane = lanes.start;
        while lane < lanes.end {
            // SAFETY: V's unit exists, and the slab's input is transformed.
            lane += unsafe {
                match lanes.end - lane {
                    4.. if N >= 24 => self.lane_blocks::<V, 6, 4>(slab, lane, (v, pitch), m, &rows),
                    2.. if N >= 24 => self.lane_blocks::<V, 12, 2>(slab, lane, (v, pitch), m, &rows),
                    _ if N >= 24 => self.lane_blocks::<V, 24, 1>(slab, lane, (v, pitch), m, &rows),
                    _ if N >= 6 => self.lane_blocks::<V, 6, 1>(slab, lane, (v, pitch), m, &rows),
                    _ => self.lane_blocks::<V, 2, 1>(slab, lane, (v, pitch), m, &rows),
                }
            };
        }
    }

    /// Computes Q lane blocks from `lane` on, P tiles at a time; returns Q.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn lane_blocks<V: Lanes, const P: usize, const Q: usize>(
        &self,
        slab: &Slab,
        lane: usize,
        (v, v_pitch): (&[f32], usize),
        m: &mut [f32],
        rows: &[(usize, usize)],
    ) -> usize {
        let tiles = slab.tiles();
        let lane_floats = self.packed.len() / self.lanes.len();
        let weights = &self.packed[lane * lane_floats..(lane + Q) * lane_floats];
        let reduction =
            Reduction { rows, taps: 1, tap_pitch: CHANNEL_BLOCK, channel_pitch: 0, step: CHANNEL_BLOCK };
        let chunk = CHUNK * P;
        let pitch = Q * chunk * LANES;
        // All that is read and written below: the last register tile may reach beyond the slab's last tile.
        let v = &v[..PRODUCTS * v_pitch + (P - 1) * LANES];
        let m = &mut m[..PRODUCTS * pitch];
        for first in (0..tiles).step_by(chunk) {
            let count = chunk.min(tiles - first);
            for q in 0..Q {
                (first..first + count).for_each(|tile| self.prefetch_outputs(slab, lane + q, tile));
            }
            for product in 0..PRODUCTS {
                let w = weights[product * lane_floats / PRODUCTS..].as_ptr();
                for tile in (0..count).step_by(P) {
                    let x = v[product * v_pitch + (first + tile) * CHANNEL_BLOCK..].as_ptr();
                    let m = m[product * pitch + tile * LANES..].as_mut_ptr();
                    // SAFETY: the tiles' planes are in `v`, P - 1 tiles behind the last one in its slack, and the
                    // weights of Q lane blocks in `weights`; `m` has room for P tiles of Q lane blocks.
                    unsafe {
                        let acc = broadcast_voxels::<V, P, Q, CHANNEL_BLOCK>(x, w, lane_floats, &reduction);
                        for q in 0..Q {
                            for p in 0..P {
                                acc[p][q].store(m.add((q * chunk + p) * LANES));
                            }
                        }
                    }
                }
            }
            for q in 0..Q {
                let m = m[q * chunk * LANES..].as_ptr();
                // SAFETY: the products of `count` tiles were just written; the lanes are this task's.
                unsafe {
                    if self.outs[self.lanes[lane + q].tensor].finishes(STAGE) {
                        self.transform_outputs::<V, true>(slab, lane + q, (first, count), m, pitch);
                    } else {
                        self.transform_outputs::<V, false>(slab, lane + q, (first, count), m, pitch);
                    }
                }
            }
        }
        Q
    }

    /// Asks the cache for the outputs of a tile: there is time until they are written.
    #[inline(always)]
    fn prefetch_outputs(&self, slab: &Slab, lane: usize, tile: usize) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let (start, [height, width]) = place(slab, tile);
        for a in 0..height {
            let start = (start + a * slab.problem.out_space[2]) * out.channels + block.first;
            out.prefetch((start, out.channels), width, block.len, STAGE);
        }
    }

    /// Writes the outputs of `count` tiles of a lane block from tile `first` of the slab on.
    ///
    /// # Safety
    /// `m` must hold the products of all these tiles, `pitch` floats apart; no other thread uses these lanes of these
    /// voxels; V's vector unit exists.
    #[inline(always)]
    unsafe fn transform_outputs<V: Lanes, const FINISHES: bool>(
        &self,
        slab: &Slab,
        lane: usize,
        (first, count): (usize, usize),
        m: *const f32,
        pitch: usize,
    ) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let row = slab.problem.out_space[2] * out.channels;
        for i in 0..count {
            let (start, [height, width]) = place(slab, first + i);
            let start = start * out.channels + block.first;
            let span = (height - 1) * row + (width - 1) * out.channels + block.len;
            let target = out.target::<FINISHES>(start, span, &self.maps[lane], STAGE);
            // SAFETY: the products are in `m`; the lanes of these voxels are the caller's, as is V's unit.
            unsafe {
                let y = transform::outputs::<V>(m.add(i * LANES), pitch);
                if (height, width, block.len) == (2, 2, LANES) {
                    target.put(0, y[0][0]);
                    target.put(out.channels, y[0][1]);
                    target.put(row, y[1][0]);
                    target.put(row + out.channels, y[1][1]);
                    continue;
                }
                for (a, b) in (0..height).flat_map(|a| (0..width).map(move |b| (a, b))) {
                    let mut values = [0.0; LANES];
                    y[a][b].store(values.as_mut_ptr());
                    target.put_few(a * row + b * out.channels, &values[..block.len]);
                }
            }
        }
    }
}

/// A tile's first output voxel, samples outermost, and how many of its rows and columns are in the volume.
#[inline(always)]
fn place(slab: &Slab, tile: usize) -> (usize, [usize; 2]) {
    let [space_d, space_h, space_w] = slab.problem.out_space;
    let Origin { n, d: d0, h: h0, size } = *slab.origin;
    let (line, w) = (tile / slab.tiles_w, 2 * (tile % slab.tiles_w));
    let (d, h) = (d0 + line / size.h, 2 * (h0 + line % size.h));
    (((n * space_d + d) * space_h + h) * space_w + w, [(space_h - h).min(2), (space_w - w).min(2)])
}

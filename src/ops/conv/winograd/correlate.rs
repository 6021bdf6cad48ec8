//! Fprop and dgrad.

use super::super::correlate::{few_lengths, tasks};
use super::super::epilogue::{Head, LaneMap, Out, Stage};
use super::super::kept::{self, Layout};
use super::super::micro::{Reduction, broadcast_voxels};
use super::super::pack::{self, Packed, lane_block_floats};
use super::super::plan::{Block, CHANNEL_BLOCK, LANES, Map, lane_blocks, source_blocks};
use super::super::tile::Element;
use super::super::{Problem, Source, Weights};
use super::slab::{Lines, Products, Run, Side, Slab};
use super::transform::{self, PRODUCTS};
use super::{ACCUMULATORS, SLAB_FLOATS, choose, spread, tiles};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::x86::{Avx2, Avx512};
use crate::device::cpu::{Lanes, Plain, Simd, simd, simd_of_pairs};
use crate::device::scratch::Scratch;
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
    let Problem { map, operands, phase, n, out_space, .. } = problem;
    let element = Element::of_voxels(operands);
    let blocks = source_blocks(sources, CHANNEL_BLOCK);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let pack = || pack((map, element), &blocks, &lanes, weights);
    let packed = kept::packed(phase, (map, Layout::Products(element)), [&blocks, &lanes], weights, pack);
    let tiles = tiles(out_space);
    let tile_floats = blocks.len() * element.of(CHANNEL_BLOCK);
    let largest = choose(tiles, tile_floats);
    let origins = largest.origins(n, tiles);
    // Where slabs are few, threads share them by lanes, and each transforms the whole input.
    let parts = (TASKS_A_THREAD * rayon::current_num_threads()).div_ceil(origins.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(WIDEST);
    let outs: Vec<_> = heads.iter_mut().map(|head| Out::new(head, &mut [])).collect();
    let lane_map = |lane: &Block| outs[lane.tensor].lane_map(|l| lane.channel(l));
    let maps: Vec<_> = lanes.iter().map(lane_map).collect();
    let packed = packed.of(0, 0);
    let pass = Pass { sources, blocks: &blocks, lanes: &lanes, outs: &outs, maps: &maps, packed };
    let floats = PRODUCTS * spread((largest.d + 2) * largest.h * tiles[2] * tile_floats);
    let tasks = tasks(origins.iter(), lanes.len(), part);
    tasks.into_par_iter().for_each_init(
        Scratch::take,
        |scratch: &mut Scratch<(Lines, Vec<_>)>, (origin, first)| {
            let v = Buffer::dirty(few_lengths(floats, SLAB_FLOATS) + ACCUMULATORS * LANES);
            let m = Buffer::dirty(PRODUCTS * spread(CHUNK * ACCUMULATORS * LANES));
            let slab = Slab { problem: &problem, origin, tiles_w: tiles[2] };
            let (lines, rows) = &mut **scratch;
            pass.run(&slab, first..lanes.len().min(first + part), &mut Room { v, m, lines, rows });
        },
    );
}

/// Packs to lane blocks of `[product][source block][plane][channel or pair of them][16 lanes]`.
fn pack<'a>(
    (map, element): (Map, Element),
    blocks: &[Block],
    lanes: &[Block],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    let class = &map.classes()[0];
    // Three planes of a product instead of 27 taps.
    let floats = |blocks: &[Block], element| lane_block_floats(class, blocks, element) / 9;
    let pitch = floats(blocks, element);
    let mut data = Buffer::dirty(lanes.len() * PRODUCTS * pitch);
    let of_lanes = data.par_chunks_exact_mut(PRODUCTS * pitch).zip(lanes);
    of_lanes.for_each_init(Scratch::take, |scratch: &mut Scratch<(Vec<_>, Vec<_>)>, (mut out, lane)| {
        let (taps, products) = &mut **scratch;
        for block in blocks {
            let single = floats(&[*block], Element::Single);
            taps.resize(9 * single, 0.0);
            pack::gather(map, class, weights(block.tensor, lane.tensor), [block, lane], taps);
            match element {
                Element::Single => transform::filters(taps, block.len, out, pitch),
                _ => {
                    products.resize(PRODUCTS * single, 0.0);
                    transform::filters(taps, block.len, products, single);
                    for (product, out) in products.chunks_exact(single).zip(out.chunks_mut(pitch)) {
                        let out = &mut out[..floats(&[*block], element)];
                        pack::pair_rows(product, block.len * LANES, out);
                    }
                }
            }
            out = &mut out[floats(&[*block], element)..];
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
    lines: &'a mut Lines,
    /// (first float, operands) of every source block and plane.
    rows: &'a mut Vec<(usize, usize)>,
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
        match (slab.problem.operands, simd(), simd_of_pairs()) {
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx512, _) => unsafe { self.run_avx512(slab, lanes, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx2, _) => unsafe { self.run_avx2::<Avx2>(slab, lanes, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Single, ..) => unsafe { self.run_lanes::<Plain, 2>(slab, lanes, room) },
            // SAFETY: `simd_of_pairs()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx512) => unsafe { self.run_avx512_bf16(slab, lanes, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx2) => unsafe { self.run_avx2::<Pairs<Avx2>>(slab, lanes, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Bf16, ..) => unsafe { self.run_lanes::<Pairs<Plain>, 2>(slab, lanes, room) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, ACCUMULATORS>(slab, lanes, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>, ACCUMULATORS>(slab, lanes, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<V: Lanes>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<V, 6>(slab, lanes, room) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const N: usize>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        let Room { v, m, lines, rows } = room;
        let (plane, block_floats) = (slab.plane_tiles() * V::OPERANDS, slab.input_tiles() * V::OPERANDS);
        let pitch = spread(self.blocks.len() * block_floats);
        let element = Element::of_voxels(slab.problem.operands);
        debug_assert_eq!(V::OPERANDS, element.of(LANES));
        rows.clear();
        for (index, &block) in self.blocks.iter().enumerate() {
            let start = index * block_floats;
            let to = Products { floats: &mut v[start..], pitch, step: V::OPERANDS };
            // SAFETY: V's unit exists.
            unsafe { slab.transform::<V>(Side::Inputs, &self.sources[block.tensor], block, to, lines) };
            rows.extend((0..3).map(|kd| (start + kd * plane, element.of(block.len))));
        }
        let mut lane = lanes.start;
        while lane < lanes.end {
            // SAFETY: V's unit exists, and the slab's input is transformed.
            lane += unsafe {
                match lanes.end - lane {
                    4.. if N >= 24 => self.lane_blocks::<V, 6, 4>(slab, lane, (v, pitch), m, rows),
                    2.. if N >= 24 => self.lane_blocks::<V, 12, 2>(slab, lane, (v, pitch), m, rows),
                    _ if N >= 24 => self.lane_blocks::<V, 24, 1>(slab, lane, (v, pitch), m, rows),
                    _ if N >= 6 => self.lane_blocks::<V, 6, 1>(slab, lane, (v, pitch), m, rows),
                    _ => self.lane_blocks::<V, 2, 1>(slab, lane, (v, pitch), m, rows),
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
            Reduction { rows, taps: 1, tap_pitch: V::OPERANDS, channel_pitch: 0, step: V::OPERANDS };
        let chunk = CHUNK * P;
        let pitch = spread(Q * chunk * LANES);
        // All that is read and written below: the last register tile may reach beyond the slab's last tile.
        let v = &v[..PRODUCTS * v_pitch + (P - 1) * V::OPERANDS];
        let m = &mut m[..PRODUCTS * pitch];
        for first in (0..tiles).step_by(chunk) {
            let count = chunk.min(tiles - first);
            for product in 0..PRODUCTS {
                // A part of them at a time: the cache takes so many requests at once.
                let [from, to] = [product, product + 1].map(|p| first + p * count / PRODUCTS);
                for run in slab.runs(from, to - from) {
                    (0..Q).for_each(|q| self.prefetch_outputs(slab, lane + q, &run));
                }
                let w = weights[product * lane_floats / PRODUCTS..].as_ptr();
                for tile in (0..count).step_by(P) {
                    let x = v[product * v_pitch + (first + tile) * V::OPERANDS..].as_ptr();
                    let m = m[product * pitch + tile * LANES..].as_mut_ptr();
                    // SAFETY: the tiles' planes are in `v`, P - 1 tiles behind the last one in its slack, and the
                    // weights of Q lane blocks in `weights`; `m` has room for P tiles of Q lane blocks.
                    unsafe {
                        let acc = if V::OPERANDS == 8 {
                            broadcast_voxels::<V, P, Q, 8>(x, w, lane_floats, &reduction)
                        } else {
                            broadcast_voxels::<V, P, Q, 16>(x, w, lane_floats, &reduction)
                        };
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

    /// Asks the cache for the outputs of a run of tiles: there is time until they are written.
    fn prefetch_outputs(&self, slab: &Slab, lane: usize, run: &Run) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        for row in 0..run.height {
            let voxel = run.voxel + row * slab.problem.out_space[2];
            out.prefetch((voxel * out.channels + block.first, out.channels), run.width, block.len, STAGE);
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
        for run in slab.runs(first, count) {
            let Run { height, width, .. } = run;
            let start = run.voxel * out.channels + block.first;
            let span = (height - 1) * row + (width - 1) * out.channels + block.len;
            let target = out.target::<FINISHES>(start, span, &self.maps[lane], STAGE);
            for i in 0..run.tiles {
                let at = 2 * i * out.channels;
                // SAFETY: the products are in `m`; the lanes of these voxels are the caller's, as is V's unit.
                unsafe {
                    let y = transform::outputs::<V>(m.add((run.first - first + i) * LANES), pitch);
                    if height == 2 && 2 * i + 2 <= width && block.len == LANES {
                        target.put(at, y[0][0]);
                        target.put(at + out.channels, y[0][1]);
                        target.put(at + row, y[1][0]);
                        target.put(at + row + out.channels, y[1][1]);
                        continue;
                    }
                    for (a, b) in (0..height).flat_map(|a| (0..(width - 2 * i).min(2)).map(move |b| (a, b))) {
                        let at = at + a * row + b * out.channels;
                        match block.len {
                            LANES => target.put(at, y[a][b]),
                            len => target.put_few(at, y[a][b], len),
                        }
                    }
                }
            }
        }
    }
}

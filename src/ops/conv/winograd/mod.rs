//! Convolutions of kernel 3 and stride 1 with fewer products: Winograd's minimal filtering F(2 x 2, 3 x 3) in every plane
//! (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016), direct along D.
//!
//! A task takes some output planes and some rows of output tiles of 2 x 2 voxels, all of W. It transforms its input once,
//! with the pending norm and PReLU applied; then each of a tile's 16 products is a sum over three planes and all input
//! channels, which stays in registers, and the outputs are sums of products. An output voxel costs 12 multiply-adds a
//! channel pair instead of 27. As each sum is a ninth as long, its rounding error is smaller than the direct sum's. A
//! value that is infinite or no number makes no number of all outputs of the tiles that read it.

mod transform;

use super::correlate::Out;
use super::kept::{self, Layout};
use super::micro::{Reduction, broadcast_voxels};
use super::pack::{self, Packed, lane_block_floats};
use super::plan::{Block, CHANNEL_BLOCK, LANES, Map, Origin, Tile, lane_blocks, source_blocks};
use super::tile::{Element, Order, Place, load_rows};
use super::{Head, Problem, Source, Weights};
use crate::device::arena::Buffer;
use crate::device::bf16::Operands;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::x86::{Avx2, Avx512};
use crate::device::cpu::{Disjoint, Lanes, Plain, Simd, simd};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;
use transform::PRODUCTS;

/// Input and output channels from which the products that are saved outweigh the transforms.
const MIN_CHANNELS: usize = 8;

/// Lane blocks of the widest register tile, and its accumulators at most.
const WIDEST: usize = 4;
const ACCUMULATORS: usize = 24;

/// Register tiles between two output transforms, at most.
const CHUNK: usize = 8;

/// Floats of a task's transformed input, where the volume allows: 768 KB, which every core with AVX-512 has in L2.
const V_FLOATS: usize = 192 << 10;

/// Tiles below which a task rather exceeds [`V_FLOATS`]: each reads all weights of its lanes.
const MIN_TILES: usize = 48;

/// Output planes of a slab at most.
const PLANES: usize = 12;

/// Tasks a thread, where lane blocks can be shared out.
const TASKS_A_THREAD: usize = 4;

/// Whether [`correlate`] computes this pass.
pub fn pays(problem: &Problem, sources: &[Source], heads: &[Head]) -> bool {
    let [_, h, w] = problem.out_space;
    let inputs: usize = sources.iter().map(|s| s.channels).sum();
    let outputs: usize = heads.iter().map(|h| h.channels).sum();
    problem.map == Map::Gather { kernel: 3, stride: 1 }
        && problem.operands == Operands::Single
        && inputs.min(outputs) >= MIN_CHANNELS
        // Tiles reach beyond volumes of odd size: a third of the direct products at least is to be saved.
        && 3 * PRODUCTS * h.div_ceil(2) * w.div_ceil(2) <= 2 * 9 * h * w
}

/// See [`super::correlate()`].
pub fn correlate<'a>(
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    let Problem { map, keep, n, space, out_space, .. } = problem;
    let blocks = source_blocks(sources, CHANNEL_BLOCK);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let pack = || pack(map, &blocks, &lanes, weights);
    let packed = if keep {
        kept::packed((map, Layout::Products), [&blocks, &lanes], weights, pack)
    } else {
        Arc::new(pack())
    };
    let tiles = [out_space[0], out_space[1].div_ceil(2), out_space[2].div_ceil(2)];
    let largest = choose(tiles, blocks.len());
    let slabs = largest.origins(n, tiles);
    // Where slabs are few, threads share them by lanes, and each transforms the whole input.
    let parts = (TASKS_A_THREAD * rayon::current_num_threads()).div_ceil(slabs.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(WIDEST);
    let outs: Vec<_> = heads
        .iter_mut()
        .map(|h| Out { data: Disjoint::new(h.out), channels: h.channels, bias: h.bias })
        .collect();
    let pass = Pass {
        map,
        space,
        out_space,
        tiles_w: tiles[2],
        sources,
        blocks: &blocks,
        lanes: &lanes,
        outs: &outs,
        packed: packed.of(0, 0),
    };
    let floats = PRODUCTS * pass.product_floats(largest);
    let tasks: Vec<_> =
        slabs.iter().flat_map(|s| (0..lanes.len()).step_by(part).map(move |first| (s, first))).collect();
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (slab, first)| {
        // One length for nearly all layers: the arena keeps every length that it was ever asked for.
        let mut v = Buffer::dirty(floats.max(V_FLOATS) + ACCUMULATORS * LANES);
        let mut m = Buffer::dirty(PRODUCTS * CHUNK * ACCUMULATORS * LANES);
        pass.run(slab, first..lanes.len().min(first + part), &mut v, &mut m, scratch);
    });
}

/// Planes and tile rows of a slab, out of this many (D, tiles along H, tiles along W).
fn choose([d, h, w]: [usize; 3], blocks: usize) -> Tile {
    let even = |of: usize, at_most: usize| of.div_ceil(of.div_ceil(at_most));
    let planes = even(d, PLANES);
    let floats = PRODUCTS * (planes + 2) * w * blocks * CHANNEL_BLOCK;
    let rows = (V_FLOATS / floats).max(MIN_TILES.div_ceil(planes * w)).clamp(1, h);
    Tile { d: planes, h: even(h, rows) }
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
    Packed::whole(data)
}

/// What tasks of a thread use one after the other.
#[derive(Default)]
struct Scratch {
    /// A mapped row.
    row: Vec<f32>,
    /// Mapped rows of one plane of the slab, halo included.
    plane: Vec<f32>,
    /// Where the rows of a product's sum begin.
    rows: Vec<(usize, usize)>,
}

/// What all tasks of a pass share.
struct Pass<'a> {
    map: Map,
    space: [usize; 3],
    out_space: [usize; 3],
    tiles_w: usize,
    sources: &'a [Source<'a>],
    blocks: &'a [Block],
    lanes: &'a [Block],
    outs: &'a [Out<'a>],
    packed: &'a [f32],
}

impl Pass<'_> {
    /// Floats of one transformed plane of one channel block: `[tile row][tile][16 channels]`.
    fn plane_floats(&self, slab: Tile) -> usize {
        slab.h * self.tiles_w * CHANNEL_BLOCK
    }

    /// Floats of one channel block of a product, and of all: `[block][plane]`.
    fn block_floats(&self, slab: Tile) -> usize {
        (slab.d + 2) * self.plane_floats(slab)
    }

    fn product_floats(&self, slab: Tile) -> usize {
        self.blocks.len() * self.block_floats(slab)
    }

    /// Computes the lane blocks `lanes` of a slab; `v` and `m` hold transformed inputs and products.
    fn run(&self, slab: &Origin, lanes: Range<usize>, v: &mut [f32], m: &mut [f32], scratch: &mut Scratch) {
        match simd() {
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe { self.run_avx512(slab, lanes, v, m, scratch) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { self.run_avx2(slab, lanes, v, m, scratch) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Plain, 2>(slab, lanes, v, m, scratch) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(
        &self,
        slab: &Origin,
        lanes: Range<usize>,
        v: &mut [f32],
        m: &mut [f32],
        scratch: &mut Scratch,
    ) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, ACCUMULATORS>(slab, lanes, v, m, scratch) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(
        &self,
        slab: &Origin,
        lanes: Range<usize>,
        v: &mut [f32],
        m: &mut [f32],
        scratch: &mut Scratch,
    ) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx2, 6>(slab, lanes, v, m, scratch) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const N: usize>(
        &self,
        slab: &Origin,
        lanes: Range<usize>,
        v: &mut [f32],
        m: &mut [f32],
        scratch: &mut Scratch,
    ) {
        // SAFETY: V's unit exists.
        unsafe { self.transform_inputs::<V>(slab, v, scratch) };
        let size = slab.size;
        let plane = self.plane_floats(size);
        scratch.rows.clear();
        for (index, block) in self.blocks.iter().enumerate() {
            let start = index * self.block_floats(size);
            scratch.rows.extend((0..3).map(|kd| (start + kd * plane, block.len)));
        }
        let mut lane = lanes.start;
        while lane < lanes.end {
            // SAFETY: V's unit exists.
            lane += unsafe {
                match lanes.end - lane {
                    4.. if N >= 24 => self.lane_blocks::<V, 6, 4>(slab, lane, v, m, &scratch.rows),
                    2.. if N >= 24 => self.lane_blocks::<V, 12, 2>(slab, lane, v, m, &scratch.rows),
                    _ if N >= 24 => self.lane_blocks::<V, 24, 1>(slab, lane, v, m, &scratch.rows),
                    _ if N >= 6 => self.lane_blocks::<V, 6, 1>(slab, lane, v, m, &scratch.rows),
                    _ => self.lane_blocks::<V, 2, 1>(slab, lane, v, m, &scratch.rows),
                }
            };
        }
    }

    /// Fills `v`, `[product][block][plane][tile row][tile][16 channels]`; lanes beyond a block's channels are unspecified.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn transform_inputs<V: Lanes>(&self, slab: &Origin, v: &mut [f32], scratch: &mut Scratch) {
        let size = slab.size;
        let voxels = Origin { h: 2 * slab.h, size: Tile { d: size.d, h: 2 * size.h }, ..*slab };
        let place = Place {
            map: self.map,
            space: self.space,
            anchors_w: 2 * self.tiles_w,
            origin: &voxels,
            before: None,
        };
        let (rows, row_floats) = (2 * size.h + 2, (2 * self.tiles_w + 2) * CHANNEL_BLOCK);
        let (plane_floats, product_floats) = (self.plane_floats(size), self.product_floats(size));
        assert!(v.len() >= PRODUCTS * product_floats, "transformed inputs fit");
        scratch.plane.resize(rows * row_floats, 0.0);
        for (index, &block) in self.blocks.iter().enumerate() {
            for d in 0..size.d + 2 {
                let (source, order) = (&self.sources[block.tensor], Order::Voxels { pitch: CHANNEL_BLOCK });
                let (plane, row) = (&mut scratch.plane, &mut scratch.row);
                load_rows(
                    source,
                    block,
                    &place,
                    (order, Element::Single),
                    d * rows..(d + 1) * rows,
                    plane,
                    row,
                );
                let start = index * self.block_floats(size) + d * plane_floats;
                for h in 0..size.h {
                    let x = scratch.plane[2 * h * row_floats..].as_ptr();
                    let v = v[start + h * self.tiles_w * CHANNEL_BLOCK..].as_mut_ptr();
                    // SAFETY: four rows from `x` on are in the plane, and every product of a row of tiles is in `v`.
                    unsafe { transform::inputs::<V>(x, row_floats, self.tiles_w, v, product_floats) };
                }
            }
        }
    }

    /// Computes Q lane blocks from `lane` on, P tiles at a time; returns Q.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn lane_blocks<V: Lanes, const P: usize, const Q: usize>(
        &self,
        slab: &Origin,
        lane: usize,
        v: &[f32],
        m: &mut [f32],
        rows: &[(usize, usize)],
    ) -> usize {
        let tiles = slab.size.d * slab.size.h * self.tiles_w;
        let product_floats = self.product_floats(slab.size);
        let lane_floats = self.packed.len() / self.lanes.len();
        let weights = &self.packed[lane * lane_floats..(lane + Q) * lane_floats];
        let reduction =
            Reduction { rows, taps: 1, tap_pitch: CHANNEL_BLOCK, channel_pitch: 0, step: CHANNEL_BLOCK };
        let chunk = CHUNK * P;
        let pitch = Q * chunk * LANES;
        for first in (0..tiles).step_by(chunk) {
            let count = chunk.min(tiles - first);
            for product in 0..PRODUCTS {
                let w = weights[product * lane_floats / PRODUCTS..].as_ptr();
                for tile in (0..count).step_by(P) {
                    let x = v[product * product_floats + (first + tile) * CHANNEL_BLOCK..].as_ptr();
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
                unsafe { self.transform_outputs::<V>(slab, lane + q, (first, count), m, pitch) };
            }
        }
        Q
    }

    /// Writes the outputs of `count` tiles of a lane block from tile `first` of the slab on.
    ///
    /// # Safety
    /// `m` must hold the products of all these tiles, `pitch` floats apart; no other thread uses these lanes of these
    /// voxels; V's vector unit exists.
    #[inline(always)]
    unsafe fn transform_outputs<V: Lanes>(
        &self,
        slab: &Origin,
        lane: usize,
        (first, count): (usize, usize),
        m: *const f32,
        pitch: usize,
    ) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let mut bias = [0.0; LANES];
        if let Some(all) = out.bias {
            bias[..block.len].copy_from_slice(&all[block.first..][..block.len]);
        }
        let [space_d, space_h, space_w] = self.out_space;
        let row = space_w * out.channels;
        for i in 0..count {
            let (line, w) = ((first + i) / self.tiles_w, 2 * ((first + i) % self.tiles_w));
            let (d, h) = (slab.d + line / slab.size.h, 2 * (slab.h + line % slab.size.h));
            let start = (((slab.n * space_d + d) * space_h + h) * space_w + w) * out.channels + block.first;
            // SAFETY: the products are in `m`, the bias is 16 floats.
            let [[y00, y01], [y10, y11]] = unsafe {
                let bias = V::load(bias.as_ptr());
                transform::outputs::<V>(m.add(i * LANES), pitch).map(|y| y.map(|y| y.add(bias)))
            };
            let (height, width) = ((space_h - h).min(2), (space_w - w).min(2));
            let y = out.data.at(start, (height - 1) * row + (width - 1) * out.channels + block.len);
            if (height, width, block.len) == (2, 2, LANES) {
                // SAFETY: `at` has checked the bounds; the floats are the caller's.
                unsafe {
                    y00.store(y);
                    y01.store(y.add(out.channels));
                    y10.store(y.add(row));
                    y11.store(y.add(row + out.channels));
                }
            } else {
                let mut values = [0.0; 4 * LANES];
                for (values, y) in values.chunks_exact_mut(LANES).zip([y00, y01, y10, y11]) {
                    // SAFETY: 16 floats.
                    unsafe { y.store(values.as_mut_ptr()) };
                }
                for (a, b) in (0..height).flat_map(|a| (0..width).map(move |b| (a, b))) {
                    let values = &values[(2 * a + b) * LANES..][..block.len];
                    // SAFETY: as above.
                    unsafe {
                        let y = y.add(a * row + b * out.channels);
                        std::slice::from_raw_parts_mut(y, block.len).copy_from_slice(values);
                    }
                }
            }
        }
    }
}

//! Gradients of weights.
//!
//! The sums run over tiles: of bfloat16, pairs are of neighbouring tiles along w, and a row that has an odd number of them gets
//! another one, whose gradients are 0.

use super::super::micro::{outer_product, store_rows};
use super::super::partials::{Partials, Task};
use super::super::plan::{Block, CHANNEL_BLOCK, LANES, Map, Origin, Tile};
use super::super::tile::Element;
use super::super::{Problem, Source};
use super::filtering::{Dense, Differentiable, Elements, Strided};
use super::slab::{Destination, Lines, Slab};
use super::transform::filter_gradients;
use super::{ACCUMULATORS, SLAB_FLOATS, choose};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs};
use crate::device::cpu::{Simd, simd, simd_of_pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::device::scratch::Scratch;
use rayon::prelude::*;

/// Channels of a sum are a multiple of this, so that no register tile has fewer.
const CHANNELS: usize = 8;

/// (D, H, W) in tiles: of bfloat16, whole pairs of them along W.
pub fn tiles(problem: &Problem) -> [usize; 3] {
    let [d, h, w] = super::tiles::<Dense>(problem.out_space);
    match problem.operands {
        Operands::Single => [d, h, w],
        Operands::Bf16 => [d, h, w.next_multiple_of(2)],
    }
}

/// See [`super::super::wgrad()`].
pub fn wgrad(problem: Problem, sources: &[Source], lane_sources: &[Source]) -> List<Buffer> {
    match problem.map {
        Dense::MAP => sum_products::<Dense>(problem, sources, lane_sources),
        Strided::MAP => sum_products::<Strided>(problem, sources, lane_sources),
        Map::Gather { .. } | Map::Scatter => unreachable!("`multiplies` takes no others"),
    }
}

/// [`wgrad()`] by this filtering.
fn sum_products<F: Differentiable>(
    problem: Problem,
    sources: &[Source],
    lane_sources: &[Source],
) -> List<Buffer> {
    let tiles = tiles(&problem);
    // A product has three planes.
    let taps = 3 * F::PRODUCTS.len().pow(2);
    let (mut largest, mut origins) = (Tile { d: 1, h: 1 }, List::default());
    let partials = Partials::new(taps, sources, lane_sources, CHANNELS, |channels| {
        // As many blocks of lanes as of channels, so that neither is transformed too often for the other's sake.
        let blocks = 2 * channels.div_ceil(CHANNEL_BLOCK);
        largest = choose::<F>(tiles, blocks * Element::of_voxels(problem.operands).of(CHANNEL_BLOCK));
        origins = largest.origins(problem.n, tiles);
        origins.len()
    });
    let sums = partials.sums(Scratch::take, |task, sum, lines| {
        let pass = Pass { problem: &problem, tiles_w: tiles[2], sources, lane_sources, task };
        pass.sum::<F>(largest, &origins[task.tiles.clone()], sum, lines);
    });
    let mut sums = partials.reduce(sums);
    sums.par_iter_mut().for_each(|sum| {
        let mut gradients = Buffer::dirty(sum.len() / taps * 27);
        filter_gradients::<F>(sum, &mut gradients);
        *sum = gradients;
    });
    partials.arrange(27, &sums, sources, lane_sources)
}

/// What a task computes in.
struct Room<'a> {
    /// Transformed inputs of a slab.
    v: Buffer,
    /// Transformed gradients of its outputs.
    dm: Buffer,
    /// `[product][plane][channel][lane]`
    sum: &'a mut [f32],
    /// Whether no slab was added yet: it writes, the others add.
    first: bool,
    lines: &'a mut Lines,
}

/// A task of a pass.
struct Pass<'a> {
    problem: &'a Problem,
    tiles_w: usize,
    sources: &'a [Source<'a>],
    lane_sources: &'a [Source<'a>],
    task: &'a Task<'a>,
}

impl Pass<'_> {
    /// Writes the sum of these slabs, `[product][plane][channel][lane]`; channels beyond the block's are unspecified.
    fn sum<F: Differentiable>(&self, largest: Tile, origins: &[Origin], sum: &mut [f32], lines: &mut Lines) {
        let plane = largest.h * self.tiles_w;
        let blocks = self.task.block.len.div_ceil(CHANNEL_BLOCK);
        // One length for nearly all layers: the arena keeps every length that it was ever asked for.
        let floats = Element::of_voxels(self.problem.operands).of(LANES);
        let buffer = |values: usize, planes: usize, blocks: usize| {
            let floats = values.pow(2) * planes * plane * blocks * floats;
            Buffer::dirty(floats.next_multiple_of(SLAB_FLOATS / 2))
        };
        let v = buffer(F::ELEMENTS, F::MAP.extent(largest.d), blocks);
        let dm = buffer(F::SUMS, largest.d, self.task.lanes.len());
        let mut room = Room { v, dm, sum, first: true, lines };
        for origin in origins {
            self.run::<F>(&Slab { problem: self.problem, origin, tiles_w: self.tiles_w }, &mut room);
            room.first = false;
        }
    }

    /// Writes a slab's products to the sum, or adds them.
    fn run<F: Differentiable>(&self, slab: &Slab, room: &mut Room) {
        match (self.problem.operands, simd(), simd_of_pairs()) {
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx512, _) => unsafe { self.run_avx512::<F>(slab, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx2, _) => unsafe { self.run_avx2::<F, Avx2, 1>(slab, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Single, ..) => unsafe { self.run_lanes::<F, Plain, 2, 1>(slab, room) },
            // SAFETY: `simd_of_pairs()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx512) => unsafe { self.run_avx512_bf16::<F>(slab, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx2) => unsafe { self.run_avx2::<F, Pairs<Avx2>, 2>(slab, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Bf16, ..) => unsafe { self.run_lanes::<F, Pairs<Plain>, 2, 2>(slab, room) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512<F: Differentiable>(&self, slab: &Slab, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, Avx512, ACCUMULATORS, 1>(slab, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16<F: Differentiable>(&self, slab: &Slab, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, Pairs<Avx512>, ACCUMULATORS, 2>(slab, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<F: Differentiable, V: Lanes, const TILES: usize>(&self, slab: &Slab, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, V, 6, TILES>(slab, room) }
    }

    /// With register tiles of at most N accumulators; an operand has values of so many TILES.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<F: Differentiable, V: Lanes, const N: usize, const TILES: usize>(
        &self,
        slab: &Slab,
        room: &mut Room,
    ) {
        const { assert!(TILES * V::OPERANDS == LANES, "sixteen values a tile fill sixteen lanes") };
        let Room { v, dm, sum, first, lines } = room;
        let first = *first;
        let Task { block, lanes, .. } = self.task;
        let width = lanes.len() * LANES;
        let block_floats = slab.input_tiles::<F>() * V::OPERANDS;
        // Not `spread`: it gains nothing here.
        let v_pitch = block.len.div_ceil(CHANNEL_BLOCK) * block_floats;
        for (index, first) in (0..block.len).step_by(CHANNEL_BLOCK).enumerate() {
            let to =
                Destination { floats: &mut v[index * block_floats..], pitch: v_pitch, step: V::OPERANDS };
            let len = CHANNEL_BLOCK.min(block.len - first);
            let part = Block { first: block.first + first, len, ..*block };
            // SAFETY: V's unit exists.
            unsafe { slab.transform::<F, V, TILES>(&self.sources[block.tensor], part, to, lines) };
        }
        let dm_pitch = slab.tiles() / TILES * width;
        for (index, &lane) in lanes.iter().enumerate() {
            let to = Destination { floats: &mut dm[index * LANES..], pitch: dm_pitch, step: width / TILES };
            let source = &self.lane_sources[lane.tensor];
            // SAFETY: V's unit exists.
            unsafe { slab.transform::<F::Gradients, V, TILES>(source, lane, to, lines) };
        }
        let channels = block.len.next_multiple_of(CHANNELS);
        let planes = [0, 1, 2].map(|tap| slab.plane(F::MAP, tap) * slab.plane_tiles() * V::OPERANDS);
        let n = F::PRODUCTS.len();
        for product in 0..n * n {
            let [(of_h, sum_h), (of_w, sum_w)] = [product / n, product % n].map(|p| F::PRODUCTS[p]);
            let job = Job {
                v: &v[(F::ELEMENTS * of_h + of_w) * v_pitch..],
                planes,
                dm: &dm[(F::SUMS * sum_h + sum_w) * dm_pitch..],
                width,
                steps: slab.tiles() / TILES,
                channels,
                first,
            };
            let sum = &mut sum[product * 3 * channels * width..][..3 * channels * width];
            let mut lane = 0;
            while lane < width {
                let two = N >= 24 && lane + 2 * LANES <= width;
                let mut channel = 0;
                while channel < channels {
                    let at = channel / CHANNEL_BLOCK * block_floats + channel % CHANNEL_BLOCK;
                    // SAFETY: V's unit exists; channels come in multiples of every register tile's.
                    channel += unsafe {
                        match two {
                            true => job.add::<V, 4, 12, 2>((at, channel), lane, sum),
                            _ if N >= 24 => job.add::<V, 8, 24, 1>((at, channel), lane, sum),
                            _ if N >= 6 => job.add::<V, 2, 6, 1>((at, channel), lane, sum),
                            _ => job.add::<V, 1, 3, 1>((at, channel), lane, sum),
                        }
                    };
                }
                lane += if two { 2 * LANES } else { LANES };
            }
        }
    }
}

/// One product of a slab: three planes of channels by lanes.
struct Job<'a> {
    /// `[block][plane][tile, or pair of them][16 channels]`
    v: &'a [f32],
    /// Where the planes begin that are multiplied by the taps along d.
    planes: [usize; 3],
    /// `[tile, or pair of them][lane]`
    dm: &'a [f32],
    width: usize,
    /// Tiles, or pairs of them.
    steps: usize,
    /// Channels of the sum.
    channels: usize,
    /// Whether this is the first slab of a sum: it writes, the others add.
    first: bool,
}

impl Job<'_> {
    /// Sums P channels from `channel` on, which begin at `at` in `v`, of all three planes, RP in all, by Q lane blocks;
    /// returns P.
    ///
    /// # Safety
    /// V's vector unit must exist; P channels and Q lane blocks must be there.
    #[inline(always)]
    unsafe fn add<V: Lanes, const P: usize, const RP: usize, const Q: usize>(
        &self,
        (at, channel): (usize, usize),
        lane: usize,
        sum: &mut [f32],
    ) -> usize {
        let (v, dm) = (self.v[at..].as_ptr(), self.dm[lane..].as_ptr());
        // SAFETY: every tile has P channels from `at` on in three planes, and 16 Q lanes from `lane` on.
        unsafe {
            let acc = outer_product::<V, P, RP, Q>(
                (v, CHANNEL_BLOCK, self.planes),
                (dm, self.width),
                &[(0, 0)],
                self.steps,
            );
            store_rows::<V, P, RP, Q>(acc, sum, (channel, self.channels), (lane, self.width), !self.first);
        }
        P
    }
}

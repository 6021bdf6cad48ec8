//! Passes from a tile's inputs to its outputs.

use super::super::correlate::{few_lengths, tasks};
use super::super::epilogue::{Head, LaneMap, Out, Stage};
use super::super::kept::{self, Layout};
use super::super::micro::{Reduction, broadcast_voxels};
use super::super::plan::{Block, CHANNEL_BLOCK, LANES, lane_blocks, source_blocks};
use super::super::tile::Element;
use super::super::{Problem, Source, Weights};
use super::columns::{COLUMN, column, column_by_halves};
use super::filtering::{Filtering, MOST, of_sums};
use super::pack::pack;
use super::slab::{Destination, Lines, Run, Slab};
use super::transform::outputs;
use super::{ACCUMULATORS, SLAB_FLOATS, choose, spread, tiles};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs};
use crate::device::cpu::{Simd, simd, simd_of_pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::device::scratch::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Lane blocks of the widest register tile.
const WIDEST: usize = 4;

/// Register tiles between two output transforms: what was asked of the first-level cache meanwhile, lines of outputs and of their
/// summands, must still be there.
const fn chunk<F: Filtering>(operands: Operands) -> usize {
    let [most, sums] = match operands {
        Operands::Single => [4, 64],
        Operands::Bf16 => [8, 128],
    };
    let chunk = sums / (F::SUMS * F::SUMS);
    if chunk < most { chunk } else { most }
}

/// Tiles between two output transforms of [`columns`](super::columns): sums and outputs stay in the first-level cache.
const COLUMN_TILES: usize = 18;

/// The same of cubes, times lane blocks. Weights, 64 for 27 taps, are read once for all of them: 24, whose sums lay in the first-level
/// cache, take 1 to 2 % longer.
const CUBE_TILES: usize = 48;

/// Tasks a thread, where lane blocks can be shared out.
const TASKS_A_THREAD: usize = 4;

/// All source channels are summed at once.
const STAGE: Stage = Stage { first: true, last: true };

/// See [`super::correlate()`].
pub fn run<'a, F: Filtering>(
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    let Problem { map, operands, phase, n, out_space, .. } = problem;
    let element = Element::of_voxels(operands);
    let blocks = source_blocks(sources, CHANNEL_BLOCK);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let pack = || pack::<F>(element, &blocks, &lanes, weights);
    let layout = Layout::Products { element, deep: F::DEEP };
    let packed = kept::packed(phase, (map, layout), [&blocks, &lanes], weights, pack);
    let tiles = tiles::<F>(out_space);
    let tile_floats = blocks.len() * element.of(CHANNEL_BLOCK);
    let largest = choose::<F>(tiles, tile_floats);
    let origins = largest.origins(n, tiles);
    // Where slabs are few, threads share them by lanes, and each transforms the whole input.
    let parts = (TASKS_A_THREAD * rayon::current_num_threads()).div_ceil(origins.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(WIDEST);
    let outs: List<_> = heads.iter_mut().map(|head| Out::new(head, &mut [])).collect();
    let lane_map = |lane: &Block| outs[lane.tensor].lane_map(|l| lane.channel(l));
    let maps: List<_> = lanes.iter().map(lane_map).collect();
    let packed = packed.of(0, 0);
    let pass = Pass { sources, blocks: &blocks, lanes: &lanes, outs: &outs, maps: &maps, packed };
    let block_floats = F::planes(largest.d) * largest.h * tiles[2] * element.of(CHANNEL_BLOCK);
    let floats = F::ELEMENTS.pow(2) * spread(blocks.len() * block_floats);
    let tasks = tasks(origins.iter(), lanes.len(), part);
    tasks.par_iter().for_each_init(
        Scratch::take,
        |scratch: &mut Scratch<(Lines, Vec<_>)>, &(origin, first)| {
            let v = Buffer::dirty(few_lengths(floats, SLAB_FLOATS) + ACCUMULATORS * LANES);
            let in_turn = F::SUMS.pow(2) * spread(chunk::<F>(operands) * ACCUMULATORS * LANES);
            let of_cubes = F::OUTPUTS * F::SUMS.pow(2) * spread(CUBE_TILES * LANES);
            let m = Buffer::dirty(if F::DEEP { of_cubes } else { in_turn });
            let slab = Slab { problem: &problem, origin, tiles_w: tiles[2] };
            let (lines, rows) = &mut **scratch;
            pass.run::<F>(&slab, first..lanes.len().min(first + part), &mut Room { v, m, lines, rows });
        },
    );
}

/// What a task computes in.
struct Room<'a> {
    /// The slab's transformed inputs.
    v: Buffer,
    /// Sums of a chunk of register tiles, or what [`column`] stores.
    m: Buffer,
    lines: &'a mut Lines,
    /// (first float, operands) of every product, source block and tap along d, of cubes first element along it, in the order of
    /// packed weights.
    rows: &'a mut Vec<(usize, usize)>,
}

/// A slab whose inputs are transformed.
struct Job<'a> {
    slab: &'a Slab<'a>,
    v: &'a [f32],
    /// Floats between elements in `v`.
    pitch: usize,
    /// Of cubes, floats between elements along d in `v`, and between their weights.
    along_d: (usize, usize),
    /// See [`Room`].
    rows: &'a [(usize, usize)],
    sums: &'a Sums,
}

/// Where each sum's rows and weights begin, those of both parities along d, and end.
struct Sums {
    starts: [[(usize, usize); MOST * MOST + 1]; 2],
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
    fn run<F: Filtering>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        match (slab.problem.operands, simd(), simd_of_pairs()) {
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx512, _) => unsafe { self.run_avx512::<F>(slab, lanes, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Single, Simd::Avx2, _) => unsafe { self.run_avx2::<F, Avx2>(slab, lanes, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Single, ..) => unsafe { self.run_lanes::<F, Plain, 2>(slab, lanes, room) },
            // SAFETY: `simd_of_pairs()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx512) => unsafe { self.run_avx512_bf16::<F>(slab, lanes, room) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Operands::Bf16, _, Simd::Avx2) => unsafe { self.run_avx2::<F, Pairs<Avx2>>(slab, lanes, room) },
            // SAFETY: plain Rust needs no feature.
            (Operands::Bf16, ..) => unsafe { self.run_lanes::<F, Pairs<Plain>, 2>(slab, lanes, room) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512<F: Filtering>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, Avx512, ACCUMULATORS>(slab, lanes, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16<F: Filtering>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, Pairs<Avx512>, ACCUMULATORS>(slab, lanes, room) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<F: Filtering, V: Lanes>(&self, slab: &Slab, lanes: Range<usize>, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<F, V, 6>(slab, lanes, room) }
    }

    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<F: Filtering, V: Lanes, const N: usize>(
        &self,
        slab: &Slab,
        lanes: Range<usize>,
        room: &mut Room,
    ) {
        let Room { v, m, lines, rows } = room;
        let (plane, block_floats) = (slab.plane_tiles() * V::OPERANDS, slab.input_tiles::<F>() * V::OPERANDS);
        let pitch = spread(self.blocks.len() * block_floats);
        let operands_of = |channels| Element::of_voxels(slab.problem.operands).of(channels);
        debug_assert_eq!(V::OPERANDS, operands_of(LANES));
        for (index, &block) in self.blocks.iter().enumerate() {
            let to = Destination { floats: &mut v[index * block_floats..], pitch, step: V::OPERANDS };
            // SAFETY: V's unit exists.
            unsafe { slab.transform::<F, V, 1>(&self.sources[block.tensor], block, to, lines) };
        }
        rows.clear();
        let mut sums = Sums { starts: [[(0, 0); MOST * MOST + 1]; 2] };
        let mut operands = 0;
        for (parity, starts) in sums.starts.iter_mut().enumerate().take(F::MAP.outputs()) {
            // Of cubes, those of the first element along d: the others' lie as far apart as planes of tiles do.
            let taps = if F::DEEP { &[(0, 0)] } else { F::MAP.taps(parity) };
            for (products, start) in of_sums::<F>().zip(&mut *starts) {
                *start = (rows.len(), operands * LANES);
                for p in products {
                    let element = F::ELEMENTS * F::PRODUCTS[p.h].0 + F::PRODUCTS[p.w].0;
                    for (index, block) in self.blocks.iter().enumerate() {
                        let (at, len) = (element * pitch + index * block_floats, operands_of(block.len));
                        rows.extend(
                            taps.iter().map(|&(offset, _)| (at + slab.plane(F::MAP, offset) * plane, len)),
                        );
                        operands += taps.len() * len;
                    }
                }
            }
            starts[F::SUMS.pow(2)] = (rows.len(), operands * LANES);
        }
        let along_d = (slab.tiles() * V::OPERANDS, operands * LANES);
        let job = Job { slab, v, pitch, along_d, rows, sums: &sums };
        let mut lane = lanes.start;
        while lane < lanes.end {
            // SAFETY: V's unit exists, and the slab's input is transformed.
            lane += unsafe {
                match lanes.end - lane {
                    2.. if N >= 24 && F::DEEP => self.lane_blocks::<F, V, 3, 2, 4>(&job, lane, m),
                    4.. if N >= 24 => self.lane_blocks::<F, V, 6, 4, 1>(&job, lane, m),
                    2.. if N >= 24 => self.lane_blocks::<F, V, 12, 2, 1>(&job, lane, m),
                    _ if N >= 24 && F::FOUR => self.lane_blocks::<F, V, 6, 1, 4>(&job, lane, m),
                    _ if N >= 24 => self.lane_blocks::<F, V, 24, 1, 1>(&job, lane, m),
                    _ if N >= 6 && F::DEEP => self.lane_blocks::<F, V, 3, 1, 2>(&job, lane, m),
                    _ if N >= 6 => self.lane_blocks::<F, V, 6, 1, 1>(&job, lane, m),
                    _ if F::DEEP => self.lane_blocks::<F, V, 1, 1, 2>(&job, lane, m),
                    _ => self.lane_blocks::<F, V, 2, 1, 1>(&job, lane, m),
                }
            };
        }
    }

    /// Computes Q lane blocks from `lane` on, P tiles and S sums of theirs at a time: one, or a [`COLUMN`], or half of one; returns Q.
    ///
    /// # Safety
    /// V's vector unit must exist; cubes have columns, whole or by halves, another [`Filtering::FOUR`] may have whole ones of one lane
    /// block.
    #[inline(always)]
    unsafe fn lane_blocks<F: Filtering, V: Lanes, const P: usize, const Q: usize, const S: usize>(
        &self,
        job: &Job,
        lane: usize,
        m: &mut [f32],
    ) -> usize {
        const { assert!(S == 1 || COLUMN_TILES.is_multiple_of(P) && CUBE_TILES.is_multiple_of(P * Q)) };
        let columns = S > 1;
        debug_assert!(if F::DEEP { columns } else { !columns || F::FOUR && S == COLUMN && Q == 1 });
        let slab = job.slab;
        let tiles = slab.tiles();
        let lane_floats = self.packed.len() / self.lanes.len();
        let weights = &self.packed[lane * lane_floats..(lane + Q) * lane_floats];
        let chunk = match columns {
            _ if F::DEEP => CUBE_TILES / Q,
            true => COLUMN_TILES,
            false => chunk::<F>(slab.problem.operands) * P,
        };
        let pitch = spread(Q * chunk * LANES);
        let plane_sums = F::SUMS.pow(2);
        // Of columns, their first sums, which stand for them, and what lies between the others.
        let (sums, stored, (x_pitch, w_pitch)) = match columns {
            _ if F::DEEP => (plane_sums, F::OUTPUTS * plane_sums, job.along_d),
            true => (F::SUMS, F::OUTPUTS * F::SUMS, (F::ELEMENTS * job.pitch, job.sums.starts[0][F::SUMS].1)),
            false => (plane_sums, plane_sums, (0, 0)),
        };
        // All that is read and written below: the last register tile may reach beyond the slab's last tile.
        let v = &job.v[..F::ELEMENTS.pow(2) * job.pitch + (P - 1) * V::OPERANDS];
        let m = &mut m[..stored * pitch];
        for (parity, starts) in job.sums.starts.iter().enumerate().take(F::MAP.outputs()) {
            for first in (0..tiles).step_by(chunk) {
                let count = chunk.min(tiles - first);
                for sum in 0..sums {
                    // A part of them at a time: the cache takes so many requests at once.
                    let [from, to] = [sum, sum + 1].map(|p| first + p * count / sums);
                    for along in 0..F::OUTPUTS_ALONG_D {
                        for run in slab.runs::<F>(parity + along, from, to - from) {
                            (0..Q).for_each(|q| self.prefetch_outputs(slab, lane + q, &run));
                        }
                    }
                    let ((row, start), (end, _)) = (starts[sum], starts[sum + 1]);
                    let rows = &job.rows[row..end];
                    let w = weights[start..].as_ptr();
                    for tile in (0..count).step_by(P) {
                        let x = v[(first + tile) * V::OPERANDS..].as_ptr();
                        let m = m[sum * pitch + tile * LANES..].as_mut_ptr();
                        // SAFETY: the tiles' planes are in `v`, P - 1 tiles behind the last one in its slack, and the
                        // weights of Q lane blocks in `weights`; `m` has room for P tiles of Q lane blocks. Sums of a column
                        // have as many operands each.
                        unsafe {
                            if columns {
                                let (x, w, m) =
                                    ((x, x_pitch), (w, w_pitch, lane_floats), (m, chunk, sums * pitch));
                                if S == COLUMN {
                                    column::<F, V, P, Q>(x, w, rows, m);
                                } else {
                                    column_by_halves::<V, P, Q>(x, w, rows, m);
                                }
                                continue;
                            }
                            let reduction = Reduction {
                                rows,
                                taps: 1,
                                tap_pitch: V::OPERANDS,
                                channel_pitch: 0,
                                step: V::OPERANDS,
                            };
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
                    for along in 0..F::OUTPUTS_ALONG_D {
                        let m = m[along * plane_sums * pitch + q * chunk * LANES..].as_ptr();
                        let runs = (slab.runs::<F>(parity + along, first, count), first);
                        let lane = lane + q;
                        let finishes = self.outs[self.lanes[lane].tensor].finishes(STAGE);
                        // SAFETY: the sums of `count` tiles were just written; the lanes are this task's. Columns of cubes are
                        // their outputs along d.
                        unsafe {
                            match (finishes, columns && !F::DEEP) {
                                (true, true) => {
                                    self.transform_outputs::<F, V, true, true>(slab, lane, runs, m, pitch)
                                }
                                (true, false) => {
                                    self.transform_outputs::<F, V, true, false>(slab, lane, runs, m, pitch)
                                }
                                (false, true) => {
                                    self.transform_outputs::<F, V, false, true>(slab, lane, runs, m, pitch)
                                }
                                (false, false) => {
                                    self.transform_outputs::<F, V, false, false>(slab, lane, runs, m, pitch)
                                }
                            }
                        }
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
        let target = out.whole(&self.maps[lane], STAGE);
        for row in 0..run.height {
            let voxel = run.voxel + row * slab.problem.out_space[2];
            target.prefetch((voxel * out.channels + block.first, out.channels), run.width, block.len);
        }
    }

    /// Writes the outputs of runs of tiles of a lane block.
    ///
    /// # Safety
    /// `m` must hold the sums of all these tiles from tile `first` of the slab on, `pitch` floats apart, or what [`column`] stores;
    /// no other thread uses these lanes of these voxels; V's vector unit exists.
    #[inline(always)]
    unsafe fn transform_outputs<F: Filtering, V: Lanes, const FINISHES: bool, const COLUMNS: bool>(
        &self,
        slab: &Slab,
        lane: usize,
        (runs, first): (impl Iterator<Item = Run>, usize),
        m: *const f32,
        pitch: usize,
    ) {
        let block = self.lanes[lane];
        let out = &self.outs[block.tensor];
        let row = slab.problem.out_space[2] * out.channels;
        for Run { first: tile, tiles, voxel, height, width } in runs {
            let start = voxel * out.channels + block.first;
            let span = (height - 1) * row + (width - 1) * out.channels + block.len;
            let target = out.target::<FINISHES>(start, span, &self.maps[lane], STAGE);
            for i in 0..tiles {
                let at = F::OUTPUTS * i * out.channels;
                let columns = width - F::OUTPUTS * i;
                // SAFETY: the sums are in `m`; the lanes of these voxels are the caller's, as is V's unit.
                unsafe {
                    let y = outputs::<F, V, COLUMNS>(m.add((tile - first + i) * LANES), pitch);
                    if height == F::OUTPUTS && columns >= F::OUTPUTS && block.len == LANES {
                        for a in 0..F::OUTPUTS {
                            for b in 0..F::OUTPUTS {
                                target.put(at + a * row + b * out.channels, y[a][b]);
                            }
                        }
                        continue;
                    }
                    // Through memory only here, where indices are not constants.
                    let mut tile = [[[0.0; LANES]; MOST]; MOST];
                    for a in 0..F::OUTPUTS {
                        for b in 0..F::OUTPUTS {
                            y[a][b].store(tile[a][b].as_mut_ptr());
                        }
                    }
                    for (a, row_of_tile) in tile.iter().enumerate().take(height) {
                        for (b, values) in row_of_tile.iter().enumerate().take(columns.min(F::OUTPUTS)) {
                            let (at, y) = (at + a * row + b * out.channels, V::load(values.as_ptr()));
                            match block.len {
                                LANES => target.put(at, y),
                                len => target.put_few(at, y, len),
                            }
                        }
                    }
                }
            }
        }
    }
}

//! The gather core: every output voxel is a sum over taps and channels of an input tile.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::epilogue::{Head, LaneMap, Out, Stage};
use super::kept::{self, Layout};
use super::micro::{ANY, Reduction};
use super::pack::{Packed, lane_block_floats, pack};
use super::plan::{
    Block, CHANNEL_BLOCK, Class, GROUP, GROUP_ELEMENTS, LANES, Map, Origin, TILE_FLOATS, Tile, lane_blocks,
    source_blocks,
};
use super::tile::{Element, Order, Place, load};
use super::{Problem, Source, Weights, run, winograd};
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs};
use crate::device::cpu::{Simd, simd, simd_of_pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::device::scratch::Scratch;
use rayon::prelude::*;

/// Tasks a pass is cut into at least, where its shape allows: lane blocks are split over tasks until then.
const MIN_TASKS: usize = 32;

/// Tasks a thread, so that none waits long for the last.
const TASKS_A_THREAD: usize = 8;

/// Rows of taps of a class at most.
const MAX_ROWS: usize = 9;

/// Length of runs of tiles, long enough to share planes and short enough to keep all threads busy.
pub fn tiles_a_task(tiles: usize) -> usize {
    tiles.div_ceil(MIN_TASKS.max(TASKS_A_THREAD * rayon::current_num_threads()))
}

/// `usual`, or a power of two where that is too short: the arena keeps every length that it was ever asked for.
pub fn few_lengths(floats: usize, usual: usize) -> usize {
    if floats <= usual { usual } else { floats.next_power_of_two() }
}

/// Every task's tiles and first lane block of `lanes`, `part` of which are one task's.
pub fn tasks<T: Copy>(tiles: impl Iterator<Item = T>, lanes: usize, part: usize) -> List<(T, usize)> {
    tiles.flat_map(|tiles| (0..lanes).step_by(part).map(move |first| (tiles, first))).collect()
}

/// heads = sum over sources of (source mapped by its pending map) correlated with `weights(source, head)`, plus bias, and
/// finished by the head's epilogue.
pub fn correlate<'a>(
    problem: Problem,
    sources: &[Source],
    heads: &mut [Head],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(scheme) = amx::scheme(&problem, sources, heads) {
        return amx::correlate(&scheme, problem, sources, heads, weights);
    }
    if winograd::correlate(problem, sources, heads, weights) {
        return;
    }
    let Problem { map, operands, phase, n, space, out_space } = problem;
    let anchors = out_space.map(|o| o.div_ceil(map.outputs()));
    let classes = map.classes();
    let blocks = source_blocks(sources, CHANNEL_BLOCK);
    let lanes = lane_blocks(heads.iter().map(|h| h.channels));
    let thin = map.stride() == 1
        && out_space[2].is_multiple_of(map.outputs())
        && anchors[2] >= LANES
        && lanes.iter().all(|l| l.len <= run::THIN_CHANNELS);
    let element = match (operands, map, sources) {
        (Operands::Bf16, Map::Gather { kernel: 3, stride: 2 }, [Source { channels: 1, .. }]) => Element::Taps,
        _ => Element::of_voxels(operands),
    };
    let groups: List<&[Block]> = blocks.chunks(GROUP_ELEMENTS / element.of(CHANNEL_BLOCK)).collect();
    let order = if thin {
        Order::ChannelRows
    } else {
        Order::Voxels { pitch: pitch(&blocks, element, map.stride()) }
    };
    let pack = || pack(map, classes, &groups, &lanes, element, weights);
    let packed = kept::packed(phase, (map, Layout::Vectors(element)), [&blocks, &lanes], weights, pack);
    let voxel_floats =
        |group: &&[Block]| group.iter().map(|b| order.row_floats(1, element.of(b.len))).sum::<usize>();
    let widest = groups.iter().map(voxel_floats).max().unwrap_or(1);
    let largest = Tile::choose(map, anchors, widest);
    let tiles = largest.origins(n, anchors);
    // Blocks begin where they would in the largest tile, whatever was clipped.
    let voxels = map.extent(largest.d) * map.extent(largest.h) * map.extent(anchors[2]);
    // A multiple of 4 lane blocks a task keeps the widest micro-kernels usable.
    let parts = MIN_TASKS.div_ceil(tiles.len()).min(lanes.len().div_ceil(4));
    let part = lanes.len().div_ceil(parts).next_multiple_of(4);
    let run = tiles_a_task(tiles.len());
    let mut sums: List<_> = heads.iter().map(|head| head.partial_sums(groups.len())).collect();
    let outs: List<_> =
        heads.iter_mut().zip(sums.iter_mut()).map(|(head, sums)| Out::new(head, sums)).collect();
    let maps = run::lane_maps(&outs, &lanes, thin);
    let pass = Pass {
        map,
        out_space,
        anchors,
        classes,
        lanes: &lanes,
        sources,
        outs: &outs,
        maps: &maps,
        order,
        element,
    };
    let tasks = tasks(tiles.chunks(run), lanes.len(), part);
    tasks.par_iter().for_each_init(Scratch::take, |row, &(origins, first)| {
        let part = first..lanes.len().min(first + part);
        // It holds the tile before only where no other group of blocks came after it.
        let mut tile = Buffer::dirty(few_lengths(voxels * widest, TILE_FLOATS) + run::SLACK);
        let keeps = groups.len() == 1;
        let place = |i: usize| Place {
            map,
            space,
            row: map.extent(anchors[2]),
            origin: &origins[i],
            before: (keeps && i > 0).then(|| &origins[i - 1]),
        };
        for (i, origin) in origins.iter().enumerate() {
            for (index, group) in groups.iter().enumerate() {
                let mut starts = [0; GROUP];
                let mut start = 0;
                for (&block, at) in group.iter().zip(&mut starts) {
                    *at = start;
                    let tile = &mut tile[start..];
                    load(&sources[block.tensor], block, &place(i), (order, element), tile, row);
                    start += voxels * order.row_floats(1, element.of(block.len));
                }
                let next = match index + 1 < groups.len() {
                    true => Some(Next { place: place(i), group: groups[index + 1] }),
                    false if i + 1 < origins.len() => Some(Next { place: place(i + 1), group: groups[0] }),
                    false => None,
                };
                let tile = &tile[..];
                let (packed, lanes) = (&packed, part.clone());
                let stage = Stage::of(index, groups.len());
                pass.run(&Step { tile, starts, group, index, stage, packed, origin, lanes, next });
            }
        }
    });
}

/// Elements between voxels of a tile. Times the stride it is a constant of the micro-kernels: 2, 4, 8, 16 or 32, and 1 where two voxels are one element.
fn pitch(blocks: &[Block], element: Element, stride: usize) -> usize {
    match blocks.iter().map(|b| element.of(b.len)).max() {
        Some(1) if stride == 2 => 1,
        Some(1 | 2) if element == Element::Single => 2,
        Some(1) => 2,
        _ => element.of(CHANNEL_BLOCK),
    }
}

/// What all tasks of a pass share.
pub struct Pass<'a> {
    pub map: Map,
    pub out_space: [usize; 3],
    pub anchors: [usize; 3],
    pub classes: &'a [Class],
    pub lanes: &'a [Block],
    pub sources: &'a [Source<'a>],
    pub outs: &'a [Out<'a>],
    /// See [`run::lane_maps`].
    pub maps: &'a [LaneMap],
    pub order: Order,
    pub element: Element,
}

/// One tile, one group of input channel blocks, some lane blocks.
pub struct Step<'a> {
    tile: &'a [f32],
    /// Where each block of the group begins in the tile.
    starts: [usize; GROUP],
    group: &'a [Block],
    index: usize,
    stage: Stage,
    packed: &'a Packed,
    origin: &'a Origin,
    lanes: std::ops::Range<usize>,
    next: Option<Next<'a>>,
}

/// What will be loaded after a step.
struct Next<'a> {
    /// Of which tile.
    place: Place<'a>,
    /// Its blocks of source channels.
    group: &'a [Block],
}

impl Next<'_> {
    /// Asks the cache for a part of it.
    fn prefetch(&self, sources: &[Source], (part, parts): (usize, usize)) {
        for &block in self.group {
            self.place.prefetch(&sources[block.tensor], block, (part, parts));
        }
    }
}

impl Pass<'_> {
    fn run(&self, step: &Step) {
        let between = self.between();
        match (simd(), self.element) {
            (_, Element::Channels | Element::Taps) => self.run_pairs(step),
            // SAFETY: `simd()` found the features.
            #[cfg(target_arch = "x86_64")]
            (Simd::Avx512, _) => unsafe {
                match between {
                    0 => self.run_avx512::<0>(step),
                    2 => self.run_avx512::<2>(step),
                    4 => self.run_avx512::<4>(step),
                    16 => self.run_avx512::<16>(step),
                    _ => self.run_avx512::<32>(step),
                }
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Simd::Avx2, _) if between == 0 => unsafe { self.run_avx2::<Avx2, 0>(step) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Simd::Avx2, _) => unsafe { self.run_avx2::<Avx2, ANY>(step) },
            // SAFETY: plain Rust needs no feature.
            _ if between == 0 => unsafe { self.run_lanes::<Plain, 0, 2>(step) },
            // SAFETY: as above.
            _ => unsafe { self.run_lanes::<Plain, ANY, 2>(step) },
        }
    }

    /// The same for elements that are pairs.
    fn run_pairs(&self, step: &Step) {
        let between = self.between();
        match simd_of_pairs() {
            // SAFETY: `simd_of_pairs()` found the features.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 => unsafe {
                match between {
                    0 => self.run_avx512_bf16::<0>(step),
                    1 => self.run_avx512_bf16::<1>(step),
                    2 => self.run_avx512_bf16::<2>(step),
                    8 => self.run_avx512_bf16::<8>(step),
                    _ => self.run_avx512_bf16::<16>(step),
                }
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 if between == 0 => unsafe { self.run_avx2::<Pairs<Avx2>, 0>(step) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => unsafe { self.run_avx2::<Pairs<Avx2>, ANY>(step) },
            // SAFETY: plain Rust needs no feature.
            _ if between == 0 => unsafe { self.run_lanes::<Pairs<Plain>, 0, 2>(step) },
            // SAFETY: as above.
            _ => unsafe { self.run_lanes::<Pairs<Plain>, ANY, 2>(step) },
        }
    }

    /// Elements between the inputs of neighbouring anchors; 0 stands for channel rows.
    fn between(&self) -> usize {
        match self.order {
            // Both voxels from one anchor to the next.
            Order::Voxels { .. } if self.element == Element::Taps => 1,
            Order::Voxels { pitch } => pitch * self.map.stride(),
            Order::ChannelRows => 0,
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512<const STEP: usize>(&self, step: &Step) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, STEP, 24>(step) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16<const STEP: usize>(&self, step: &Step) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>, STEP, 24>(step) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<V: Lanes, const STEP: usize>(&self, step: &Step) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<V, STEP, 6>(step) }
    }

    /// Adds one group of input channels to every output of the tile, as [`Stage`] says.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, const STEP: usize, const ACCUMULATORS: usize>(&self, step: &Step) {
        let Origin { n, d: d0, h: h0, size } = *step.origin;
        let (map, outputs) = (self.map, self.map.outputs());
        let (extent_h, extent_w) = (map.extent(size.h), map.extent(self.anchors[2]));
        // A thin scatter makes both outputs of an anchor along w at once, from the weights of two classes.
        let merged = if STEP == 0 { outputs } else { 1 };
        for (class_index, class) in self.classes.iter().enumerate().step_by(merged) {
            // Offsets of all blocks' input rows of anchor row (0, 0), and what an anchor row further adds to them.
            let mut rows = [(0, 0); GROUP * MAX_ROWS];
            let mut row_floats = [0; GROUP];
            let mut of_blocks = rows.chunks_exact_mut(class.rows.len());
            for ((block, floats), start) in step.group.iter().zip(&mut row_floats).zip(step.starts) {
                let len = self.element.of(block.len);
                *floats = self.order.row_floats(extent_w, len);
                let offset = |r: &(usize, usize, usize, usize)| start + (r.0 * extent_h + r.1) * *floats;
                let rows = of_blocks.next().expect("room for all blocks");
                rows.iter_mut().zip(&class.rows).for_each(|(row, r)| *row = (offset(r), len));
            }
            let weights = step.packed.of(step.index, class_index);
            let q_stride = lane_block_floats(class, step.group, self.element);
            let (odd, odd_floats) = match merged {
                2 => {
                    let odd = &self.classes[class_index + 1];
                    (
                        step.packed.of(step.index, class_index + 1),
                        lane_block_floats(odd, step.group, self.element),
                    )
                }
                _ => (weights, q_stride),
            };
            let [_, _, width] = self.map.class_space(class, self.out_space);
            let mut lane = step.lanes.start;
            let mut moved = rows;
            let number = step.group.len() * class.rows.len();
            while lane < step.lanes.end {
                let left = step.lanes.end - lane;
                let q = match left {
                    _ if STEP == 0 => 1,
                    4.. if width <= 6 && STEP >= 8 && ACCUMULATORS >= 24 => 4,
                    2.. if ACCUMULATORS >= 24 => 2,
                    _ => 1,
                };
                for (d, h) in (0..size.d).flat_map(|d| (0..size.h).map(move |h| (d, h))) {
                    if let Some(next) = &step.next
                        && class_index == 0
                        && lane == step.lanes.start
                    {
                        next.prefetch(self.sources, (d * size.h + h, size.d * size.h));
                    }
                    let od = (d0 + d) * outputs + class.parity[0];
                    let oh = (h0 + h) * outputs + class.parity[1];
                    if od >= self.out_space[0] || oh >= self.out_space[1] {
                        continue;
                    }
                    let of_blocks = moved[..number].chunks_exact_mut(class.rows.len());
                    for ((moved, rows), floats) in
                        of_blocks.zip(rows.chunks_exact(class.rows.len())).zip(row_floats)
                    {
                        let down = (d * extent_h + h) * map.stride() * floats;
                        moved.iter_mut().zip(rows).for_each(|(moved, row)| moved.0 = row.0 + down);
                    }
                    let out_row = run::OutRow {
                        x: step.tile.as_ptr(),
                        w: weights[lane * q_stride..].as_ptr(),
                        odd: odd[lane * odd_floats..].as_ptr(),
                        q_stride,
                        reduction: Reduction {
                            rows: &moved[..number],
                            taps: self.element.of_taps(class.taps_w.len()),
                            tap_pitch: self.order.row_floats(1, 1),
                            channel_pitch: extent_w,
                            step: self.between(),
                        },
                        width,
                        lane,
                        first_voxel: ((n * self.out_space[0] + od) * self.out_space[1] + oh)
                            * self.out_space[2]
                            + class.parity[2],
                        stage: step.stage,
                    };
                    // SAFETY: the tile holds every input row of the anchors' extent and the slack after them; the
                    // weights of q lane blocks follow each other; this task alone writes these voxels' lanes.
                    unsafe { self.row::<V, STEP, ACCUMULATORS>(&out_row, q) };
                }
                lane += q;
            }
        }
    }
}

//! The gather core: register tiles of 16 output voxels by 16 output channels.

use super::ahead::Ahead;
use super::calls::{self, Call};
use super::cover::{Anchors, Cover};
use super::halo::{Halo, SLACK};
use super::micro::{COLUMNS_FROM, Reads, SUMS, Step, TAPS, clear_sums, store_sums};
use super::pack::{TILE_FLOATS, lane_block_floats, pack};
use super::scheme::{BAND, Depth, Scheme};
use super::write::{Lane, Sum};
use super::{LANE_BLOCKS, Lines};
use crate::device::amx::{ROW_BYTES, ROWS, Tiles};
use crate::device::arena::Buffer;
use crate::device::bf16::Pairs;
use crate::device::cpu::{Simd, simd_of_pairs};
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::list::List;
use crate::device::scratch::Scratch;
use crate::ops::conv::correlate::{tasks, tiles_a_task};
use crate::ops::conv::epilogue::{Head, Out, Stage};
use crate::ops::conv::kept::{self, Layout};
use crate::ops::conv::pack::Packed;
use crate::ops::conv::plan::{Block, LANES, Map, Origin, Tile, source_blocks};
use crate::ops::conv::target::Target;
use crate::ops::conv::tile::Place;
use crate::ops::conv::{Problem, Source, Weights};
use rayon::prelude::*;

/// Blocks that a halo tile holds: sums over them stay in registers. 128 channels x 27 taps x 32 lanes of weights, which a 2 x 2
/// kernel reads, are 221 KB; every CPU with AMX has 2 MB of L2 a core.
const GROUP: usize = 4;

/// For the same reason halo tiles may be this much larger than the vector units'.
const LARGER: usize = 2;

/// The accumulators of a call of a kernel, before they are stored, added to the output or finished.
#[repr(align(64))]
struct Accumulators([[[f32; LANES]; ROWS]; SUMS]);

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
    let head_channels: List<usize> = heads.iter().map(|h| h.channels).collect();
    let depth = scheme.depth;
    let blocks = source_blocks(sources, depth.channels());
    let groups: List<&[Block]> = blocks.chunks(GROUP).collect();
    let lanes = scheme.lanes(&head_channels);
    let pack = || pack(map, scheme, &groups, &lanes, weights);
    let layout = Layout::Tiles(depth, scheme.fold);
    let packed = kept::packed(phase, (map, layout), [&blocks, &lanes], weights, pack);
    let widest = depth.pitch() * blocks.len().min(GROUP);
    let tiles = Tile::choose(map, anchors, widest.div_ceil(LARGER)).origins(n, anchors);
    // Where tiles are few, threads share them by lanes: no sum depends on how.
    let parts = (2 * rayon::current_num_threads()).div_ceil(tiles.len());
    let part = lanes.len().div_ceil(parts).next_multiple_of(LANE_BLOCKS);
    let mut sums: List<_> = heads.iter().map(|head| head.partial_sums(groups.len())).collect();
    let outs: List<_> =
        heads.iter_mut().zip(sums.iter_mut()).map(|(head, sums)| Out::new(head, sums)).collect();
    let lane_list: List<_> =
        lanes.iter().map(|&block| Lane::new(block, (map, scheme), &outs, out_space)).collect();
    let pass = Pass { map, scheme, out_space, lanes: &lane_list };
    let run = tiles_a_task(tiles.len());
    let tasks = tasks(tiles.chunks(run), lanes.len(), part);
    tasks.par_iter().for_each_init(Scratch::take, |task: &mut Scratch<Task>, &(origins, first)| {
        let task = &mut **task;
        let lanes = first..lanes.len().min(first + part);
        // Planes of the tile before are there where it has the same layout and no other group of blocks came after it.
        let place = |i: usize| {
            let before = i.checked_sub(1).map(|i| &origins[i]);
            let keeps = groups.len() == 1 && !matches!(depth, Depth::Records { .. });
            let before = before.filter(|before| keeps && before.size == origins[i].size);
            Place { map, space, row: map.extent(anchors[2]), origin: &origins[i], before }
        };
        for (i, origin) in origins.iter().enumerate() {
            let halo = Halo::new(depth, map, origin.size, anchors[2]);
            for (index, &blocks) in groups.iter().enumerate() {
                let tile = task.tile.first(halo.len() * blocks.len() + SLACK);
                // What the last rows of A read past the tile is multiplied by 0, and must be a number.
                tile[halo.len() * blocks.len()..].fill(0.0);
                for (&block, tile) in blocks.iter().zip(tile.chunks_exact_mut(halo.len())) {
                    halo.load(&sources[block.tensor], block, &place(i), tile, &mut task.lines);
                }
                let next = match index + 1 < groups.len() {
                    true => Some(Ahead::new(place(i), sources, groups[index + 1])),
                    false if i + 1 < origins.len() => Some(Ahead::new(place(i + 1), sources, groups[0])),
                    false => None,
                };
                let (packed, lanes) = (&packed, lanes.clone());
                let stage = Stage::of(index, groups.len());
                let group = Group { halo, tile, blocks, index, stage, packed, origin, lanes, next };
                pass.run(&group, &mut task.room);
            }
        }
    });
}

/// What tasks use one after the other.
#[derive(Default)]
struct Task {
    tile: Buffer,
    lines: Lines,
    room: Room,
}

/// What a group's reductions use one after the other.
#[derive(Default)]
struct Room {
    cover: Cover,
    steps: Vec<Step>,
    calls: Vec<Call>,
}

/// What all tasks of a pass share.
struct Pass<'a> {
    map: Map,
    scheme: &'a Scheme,
    out_space: [usize; 3],
    lanes: &'a [Lane<'a>],
}

/// One halo tile, one group of source blocks, some lane blocks.
struct Group<'a> {
    halo: Halo,
    tile: &'a [f32],
    blocks: &'a [Block],
    index: usize,
    stage: Stage,
    packed: &'a Packed,
    origin: &'a Origin,
    lanes: std::ops::Range<usize>,
    next: Option<Ahead<'a>>,
}

/// The sums of a group over one class.
struct Reduction<'a> {
    /// Register tiles: of every plane alike where calls take columns, of all planes if not.
    cover: &'a Cover,
    columns: bool,
    /// Voxel of the first anchor's output in the head, samples outermost, and voxels from a plane of anchors to the next.
    voxel: (usize, usize),
    steps: &'a [Step],
    /// The B of all steps, one lane block after the other.
    weights: &'a [f32],
    /// What to ask for meanwhile, and lines for a sum.
    next: Option<(&'a Ahead<'a>, usize)>,
}

/// A call from its first product until its sums are written.
#[derive(Clone, Copy)]
struct Issued<'a> {
    sums: [Sum<'a>; SUMS],
    /// Number of them.
    count: usize,
    /// First lane block.
    lane: usize,
    /// Where those of its lane blocks go: one, or two.
    targets: [Target<'a, true>; LANE_BLOCKS],
}

impl<'a> Reduction<'a> {
    /// What a call reads.
    #[inline(always)]
    fn reads(&self, group: &Group, call: &Call) -> Reads {
        let (between, plane) = (group.halo.between(), group.halo.plane());
        let (stride, &Call { parts: parts_of_a, lanes: parts_of_b, .. }) = (4 * between, call);
        let a = |tile: usize| {
            super::bytes(group.tile[self.cover.start(tile) * between + call.plane * plane..].as_ptr())
        };
        let b = |part: usize| {
            super::bytes(self.weights[(call.lane + part) * self.steps.len() * TILE_FLOATS..].as_ptr())
        };
        if self.columns {
            return Reads::Column { a: a(call.tile), stride, plane: 4 * plane, planes: parts_of_a, b: b(0) };
        }
        let a = std::array::from_fn(|part| a(call.tile + part.min(parts_of_a - 1)));
        Reads::Parts { a, parts_of_a, stride, b: [b(0), b(parts_of_b - 1)], parts_of_b }
    }

    /// Where the sums of a call belong; those after its last one are of no use.
    #[inline(always)]
    fn sums(&self, call: &Call) -> [Sum<'a>; SUMS] {
        let (first, plane_voxels) = self.voxel;
        let first = first + call.plane * plane_voxels;
        let mut sums = [Sum { runs: self.cover.runs(call.tile), voxel: first, lane: call.lane }; SUMS];
        if self.columns {
            for plane in 0..SUMS {
                sums[plane].voxel = first + plane * plane_voxels;
            }
            return sums;
        }
        for i in 1..call.sums() {
            let (part, lane) = call.sum(i);
            sums[i] = Sum { runs: self.cover.runs(call.tile + part), voxel: first, lane };
        }
        sums
    }
}

impl Pass<'_> {
    fn run(&self, group: &Group, room: &mut Room) {
        match simd_of_pairs() {
            // SAFETY: `simd_of_pairs()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512(group, room) },
            // SAFETY: as above.
            Simd::Avx2 => unsafe { self.run_avx2(group, room) },
            // SAFETY: plain Rust needs no feature.
            Simd::Portable => unsafe { self.run_lanes::<Plain>(group, room) },
        }
    }

    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512(&self, group: &Group, room: &mut Room) {
        // Of pairs, which have an instruction that rounds. SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>>(group, room) }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2(&self, group: &Group, room: &mut Room) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx2>(group, room) }
    }

    /// Adds one group of input channels to every output of the halo tile, as [`Stage`] says.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes>(&self, group: &Group, room: &mut Room) {
        let Room { cover, steps, calls } = room;
        let Origin { n, d: d0, h: h0, size } = *group.origin;
        let (depth, between) = (self.scheme.depth, group.halo.between());
        let along_d = self.scheme.has_columns(self.map);
        let columns = along_d && size.d >= COLUMNS_FROM;
        let (outputs, [_, out_h, out_w]) = (self.map.outputs(), self.out_space);
        let along_w = if depth == Depth::Band { BAND } else { outputs };
        let voxels = [outputs * out_h * out_w, outputs * out_w, along_w];
        let (rows, row) = group.halo.pitches();
        let mut sums = Accumulators([[[0.0; LANES]; ROWS]; SUMS]);
        // SAFETY: AMX is in use, or this would not run; no task starts another while it holds tiles.
        let _tiles = unsafe { Tiles::configure(depth.elements()) };
        for (class_index, class) in self.scheme.classes.iter().enumerate() {
            let [class_d, class_h, width] = self.map.class_space(class, self.out_space);
            let (d, h) = (size.d.min(class_d.saturating_sub(d0)), size.h.min(class_h.saturating_sub(h0)));
            let covered = if columns { 1 } else { d };
            let anchors = [covered, h, group.halo.positions(width)];
            cover.fill(Anchors { size: anchors, pitches: (rows * row, row), voxels });
            group.halo.steps(class, group.blocks.len(), along_d, steps);
            let lane_floats = lane_block_floats(class, group.blocks, depth);
            assert_eq!(steps.len() * TILE_FLOATS, lane_floats, "a B tile a step");
            let last = cover.len().checked_sub(1).map_or(0, |last| cover.start(last) * between);
            let last = last + (d - covered) * group.halo.plane();
            let furthest = steps.iter().map(|step| step.a / 4).max().unwrap_or(0);
            let end = last + (ROWS - 1) * between + furthest + depth.elements();
            assert!(end <= group.tile.len(), "the last row of A ends in the slack");
            match columns {
                true => calls::columns(d, cover.len(), group.lanes.clone(), calls),
                false => calls::tiles(cover.len(), group.lanes.clone(), calls),
            }
            if calls.is_empty() {
                continue; // The tile has no output of this class.
            }
            let weights = group.packed.of(group.index, class_index);
            let [first_d, first_h] = [(d0, 0), (h0, 1)].map(|(first, a)| first * outputs + class.parity[a]);
            let first = ((n * self.out_space[0] + first_d) * out_h + first_h) * out_w + class.parity[2];
            let of_class = cover.len() * if columns { d } else { 1 } * group.lanes.len();
            let next = group
                .next
                .as_ref()
                .map(|next| (next, next.share((self.scheme.classes.len() - class_index) * of_class)));
            let reduction = Reduction { cover, columns, voxel: (first, voxels[0]), steps, weights, next };
            let mut before = None;
            for call in calls.iter() {
                let reads = reduction.reads(group, call);
                let issued = self.issued(group.stage, &reduction, call, before.as_ref());
                // SAFETY: V's unit exists; this thread holds the tiles, and its task alone writes these voxels' lanes. What
                // every register tile and plane reads in every step ends where was asserted.
                unsafe {
                    let call = Some((&reads, &issued));
                    self.turn::<V>(&reduction, (call, before.as_ref()), &mut sums);
                }
                before = Some(issued);
            }
            // SAFETY: as above.
            unsafe { self.turn::<V>(&reduction, (None, before.as_ref()), &mut sums) };
        }
    }

    /// What will have to be known of a call that comes after `before`.
    #[inline(always)]
    fn issued<'s>(
        &'s self,
        stage: Stage,
        reduction: &Reduction<'s>,
        call: &Call,
        before: Option<&Issued<'s>>,
    ) -> Issued<'s> {
        let target = |lane: usize| self.lanes[lane].target(stage);
        let targets = match before {
            Some(before) if before.lane == call.lane => before.targets,
            _ => [target(call.lane), target(call.lane + call.lanes - 1)],
        };
        Issued { sums: reduction.sums(call), count: call.sums(), lane: call.lane, targets }
    }

    /// Computes the sums of a call and writes those of the one before, a part of each in turn: vector units write while tiles
    /// are multiplied. `sums` holds those of the call before, and then the call's own, which are read when the first products
    /// of the next call have been issued: what was stored has time to reach the cache.
    ///
    /// # Safety
    /// V's vector unit must exist; the thread must hold the tiles; nobody else may use the voxels' lanes of the call before.
    /// What the call reads in every step must lie in the group's tile or the slack behind it.
    #[inline(always)]
    unsafe fn turn<V: Lanes>(
        &self,
        reduction: &Reduction,
        (call, before): (Option<(&Reads, &Issued)>, Option<&Issued>),
        sums: &mut Accumulators,
    ) {
        let computed = call.map_or(0, |(_, issued)| issued.count);
        let written = before.map_or(0, |before| before.count);
        let turns = computed.max(written);
        // An even number of steps each, so that the next one's first finds a kernel's registers where it began.
        let together = if reduction.columns { TAPS } else { 1 };
        let steps = (reduction.steps.len() / together).div_ceil(turns).next_multiple_of(2);
        let mut steps = reduction.steps.chunks(steps * together);
        if call.is_some() {
            // SAFETY: handed on from the caller.
            unsafe { clear_sums() };
        }
        for i in 0..turns {
            if let Some((reads, issued)) = call {
                if let Some(steps) = steps.next() {
                    // SAFETY: handed on from the caller; B lies in the packed weights of its lane block.
                    unsafe { reads.multiply(steps) };
                }
                if i < issued.count {
                    if let Some((next, lines)) = reduction.next {
                        next.ask(lines);
                    }
                    let sum = &issued.sums[i];
                    self.lanes[sum.lane].prefetch(sum, &issued.targets[sum.lane - issued.lane]);
                }
            }
            if let Some(before) = before
                && i < written
            {
                let sum = &before.sums[i];
                let target = &before.targets[sum.lane - before.lane];
                // SAFETY: handed on from the caller.
                unsafe { self.lanes[sum.lane].write::<V>(sum, target, &sums.0[i]) };
            }
        }
        let places = sums.0.each_mut().map(|sum| sum.as_mut_ptr().cast());
        // SAFETY: this thread holds the tiles; accumulators have a register tile's rows.
        unsafe { store_sums(&places[..computed], ROW_BYTES) };
    }
}

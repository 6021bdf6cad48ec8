//! The gather core: register tiles of 16 output voxels by 16 output channels.

use super::calls::{self, Call};
use super::cover::{Cover, Run};
use super::fold::{Fold, OUTPUTS, parity};
use super::halo::{Halo, SLACK};
use super::micro::{COLUMNS_FROM, Reads, SUMS, Step, TAPS, clear_sums, keep_awake, store_sums};
use super::pack::{TILE_FLOATS, lane_block_floats, pack};
use super::scheme::{BAND, Depth, Scheme};
use super::{LANE_BLOCKS, Lines};
use crate::device::amx::{ROW_BYTES, ROWS, Tiles};
use crate::device::arena::Buffer;
use crate::device::bf16::Pairs;
use crate::device::cpu::{Simd, simd_of_pairs};
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::scratch::Scratch;
use crate::ops::conv::correlate::{Next, tasks, tiles_a_task};
use crate::ops::conv::epilogue::{Head, LaneMap, Out, Stage};
use crate::ops::conv::kept::{self, Layout};
use crate::ops::conv::pack::Packed;
use crate::ops::conv::plan::{Block, Class, LANES, Map, Origin, Tile, blocks};
use crate::ops::conv::target::Pause;
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

/// Keeps the multiplier awake; the thread must hold [`Tiles`].
#[derive(Clone, Copy)]
struct KeepAwake;

impl Pause for KeepAwake {
    #[inline(always)]
    unsafe fn pause(self) {
        // SAFETY: handed on from the caller.
        unsafe { keep_awake() };
    }
}

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
    let mut sums: Vec<_> = heads.iter().map(|head| head.partial_sums(groups.len())).collect();
    let outs: Vec<_> = heads.iter_mut().zip(&mut sums).map(|(head, sums)| Out::new(head, sums)).collect();
    let lane_map = |&lane: &Block| outs[lane.tensor].lane_map(|l| scheme.channel(lane, l));
    let maps: Vec<_> = lanes.iter().map(lane_map).collect();
    let pass = Pass { map, scheme, out_space, sources, lanes: &lanes, outs: &outs, maps: &maps };
    let run = tiles_a_task(tiles.len());
    let tasks = tasks(tiles.chunks(run), lanes.len(), part);
    tasks.into_par_iter().for_each_init(Scratch::take, |task: &mut Scratch<Task>, (origins, first)| {
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
                    true => Some(Next { place: place(i), group: groups[index + 1] }),
                    false if i + 1 < origins.len() => Some(Next { place: place(i + 1), group: groups[0] }),
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
    sources: &'a [Source<'a>],
    lanes: &'a [Block],
    outs: &'a [Out<'a>],
    /// Of every lane block.
    maps: &'a [LaneMap],
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
    next: Option<Next<'a>>,
}

/// The sums of a group over one class.
struct Reduction<'a> {
    class: &'a Class,
    /// Register tiles: of every plane alike where calls take columns, of all planes if not.
    cover: &'a Cover,
    columns: bool,
    steps: &'a [Step],
    /// The B of all steps, one lane block after the other.
    weights: &'a [f32],
}

impl Reduction<'_> {
    /// What a call reads.
    #[inline(always)]
    fn reads(&self, group: &Group, call: &Call) -> Reads {
        let (between, plane) = (group.halo.between(), group.halo.plane());
        let (stride, parts_of_a, parts_of_b) = (4 * between, call.parts_of_a(), call.lanes.len());
        let a = |part: usize| {
            let (d, tile) = call.part_of_a(part.min(parts_of_a - 1));
            super::bytes(group.tile[self.cover.start(tile) * between + d * plane..].as_ptr())
        };
        let b = |part: usize| {
            let lane = call.lanes.start + part.min(parts_of_b - 1);
            super::bytes(self.weights[lane * self.steps.len() * TILE_FLOATS..].as_ptr())
        };
        match self.columns {
            true => Reads::Column { a: a(0), stride, plane: 4 * plane, planes: parts_of_a, b: b(0) },
            false => {
                let (a, b) = (std::array::from_fn(a), std::array::from_fn(b));
                Reads::Parts { a, parts_of_a, stride, b, parts_of_b }
            }
        }
    }

    /// Anchors and lane block of sum `i` of a call.
    #[inline(always)]
    fn sum(&self, call: &Call, i: usize) -> (impl Iterator<Item = Run>, usize) {
        let ((plane, tile), lane) = call.sum(i);
        let further = move |run: &Run| Run { place: (run.place.0 + plane, run.place.1), ..*run };
        (self.cover.runs(tile).iter().map(further), lane)
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
        let Origin { d: d0, h: h0, size, .. } = *group.origin;
        let (depth, between) = (self.scheme.depth, group.halo.between());
        let along_d = self.scheme.has_columns(self.map);
        let columns = along_d && size.d >= COLUMNS_FROM;
        let plane_elements = group.halo.plane();
        let mut sums = Accumulators([[[0.0; LANES]; ROWS]; SUMS]);
        // SAFETY: AMX is in use, or this would not run; no task starts another while it holds tiles.
        let _tiles = unsafe { Tiles::configure(depth.elements()) };
        for (class_index, class) in self.scheme.classes.iter().enumerate() {
            let [out_d, out_h, width] = self.map.class_space(class, self.out_space);
            let (d, h) = (size.d.min(out_d.saturating_sub(d0)), size.h.min(out_h.saturating_sub(h0)));
            let covered = if columns { 1 } else { d };
            cover.fill((covered, h, group.halo.positions(width)), group.halo.pitches());
            group.halo.steps(class, group.blocks.len(), along_d, steps);
            let lane_floats = lane_block_floats(class, group.blocks, depth);
            assert_eq!(steps.len() * TILE_FLOATS, lane_floats, "a B tile a step");
            let last = cover.len().checked_sub(1).map_or(0, |last| cover.start(last) * between);
            let last = last + (d - covered) * plane_elements;
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
            let reduction = Reduction { class, cover, columns, steps, weights };
            let next = group.next.as_ref().filter(|_| class_index == 0);
            // One turn more: to write what the last call leaves.
            for number in 0..=calls.len() {
                let (call, before) = (calls.get(number), number.checked_sub(1).map(|before| &calls[before]));
                if let Some(next) = next
                    && call.is_some()
                {
                    next.prefetch(self.sources, (number, calls.len()));
                }
                // SAFETY: V's unit exists; this thread holds the tiles, and its task alone writes these voxels' lanes. What
                // every register tile and plane reads in every step ends where was asserted.
                unsafe { self.turn::<V>(group, &reduction, [call, before], &mut sums) };
            }
        }
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
        group: &Group,
        reduction: &Reduction,
        [call, before]: [Option<&Call>; 2],
        sums: &mut Accumulators,
    ) {
        let reads = call.map(|call| reduction.reads(group, call));
        let [computed, written] = [call, before].map(|call| call.map_or(0, Call::sums));
        let turns = computed.max(written);
        // An even number of steps each, so that the next one's first finds a kernel's registers where it began.
        let together = if reduction.columns { TAPS } else { 1 };
        let steps = (reduction.steps.len() / together).div_ceil(turns).next_multiple_of(2);
        let mut steps = reduction.steps.chunks(steps * together);
        if reads.is_some() {
            // SAFETY: handed on from the caller.
            unsafe { clear_sums() };
        }
        for i in 0..turns {
            if let Some(reads) = &reads
                && let Some(steps) = steps.next()
            {
                // SAFETY: handed on from the caller; B lies in the packed weights of its lane block.
                unsafe { reads.multiply(steps) };
            }
            if let Some(call) = call
                && i < computed
            {
                self.prefetch_outputs(group, reduction.class, reduction.sum(call, i));
            }
            if let Some(before) = before
                && i < written
            {
                // SAFETY: handed on from the caller.
                unsafe { self.write::<V>(group, reduction.class, reduction.sum(before, i), &sums.0[i]) };
            }
        }
        let places = sums.0.each_mut().map(|sum| sum.as_mut_ptr().cast());
        // SAFETY: this thread holds the tiles; accumulators have a register tile's rows.
        unsafe { store_sums(&places[..computed], ROW_BYTES) };
    }

    /// Stores, adds or finishes the anchors of a register tile.
    ///
    /// # Safety
    /// V's vector unit must exist; the thread must hold the tiles; nobody else may use these voxels' lanes.
    #[inline(always)]
    unsafe fn write<V: Lanes>(
        &self,
        group: &Group,
        class: &Class,
        (runs, lane): (impl Iterator<Item = Run>, usize),
        values: &[[f32; LANES]; ROWS],
    ) {
        for run in runs {
            let values = &values[run.row..][..run.len];
            // SAFETY: handed on from the caller.
            unsafe {
                match self.scheme.fold {
                    None => self.write_run::<V>(group, class, &run, lane, values),
                    Some(Fold::Outputs { channels }) => {
                        self.write_outputs::<V>(group, channels, &run, lane, values);
                    }
                    Some(Fold::Band { channels }) => self.write_band::<V>(group, channels, &run, values),
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

    /// Asks the cache for the lines that [`Self::write`] will write when the next call's tiles are multiplied.
    #[inline(always)]
    fn prefetch_outputs(
        &self,
        group: &Group,
        class: &Class,
        (runs, lane): (impl Iterator<Item = Run>, usize),
    ) {
        let (block, stage) = (self.lanes[lane], group.stage);
        let out = &self.outs[block.tensor];
        for run in runs {
            match self.scheme.fold {
                None => {
                    let (start, step) = self.voxels(group, class, &run, block);
                    out.prefetch((start, step), run.len, block.len, stage);
                }
                Some(Fold::Outputs { channels }) => {
                    for first in (0..block.len).step_by(2 * channels) {
                        let voxel = self.voxel(group, &run, parity((block.first + first) / channels));
                        out.prefetch((voxel * channels, 0), 1, run.len * 2 * channels, stage);
                    }
                }
                Some(Fold::Band { channels }) => {
                    let (voxel, voxels) = self.band(group, &run);
                    out.prefetch((voxel * channels, 0), 1, voxels * channels, stage);
                }
            }
        }
    }

    /// First value of a lane block of neighbouring voxels of a class, and values from one voxel to the next.
    #[inline(always)]
    fn voxels(&self, group: &Group, class: &Class, run: &Run, block: Block) -> (usize, usize) {
        let channels = self.outs[block.tensor].channels;
        (self.voxel(group, run, class.parity) * channels + block.first, self.map.outputs() * channels)
    }

    /// First output voxel of neighbouring bands and their number: the last band of a row may go beyond its end.
    fn band(&self, group: &Group, run: &Run) -> (usize, usize) {
        let voxel = self.voxel(group, &Run { w: run.w * BAND, ..*run }, [0; 3]);
        (voxel, (run.len * BAND).min(self.out_space[2] - run.w * BAND))
    }

    /// Stores, adds or finishes a lane block of neighbouring voxels.
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
        let place = self.voxels(group, class, run, block);
        // SAFETY: handed on from the caller.
        unsafe {
            let out = &self.outs[block.tensor];
            out.put_rows::<V>(place, values, block.len, (&self.maps[lane], group.stage), KeepAwake);
        }
    }

    /// Stores, adds or finishes all outputs of neighbouring anchors that a lane block holds.
    ///
    /// # Safety
    /// As [`Self::write`].
    #[inline(always)]
    unsafe fn write_outputs<V: Lanes>(
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
        let mut starts = [0; OUTPUTS / 2];
        for (start, first) in starts.iter_mut().zip((0..block.len).step_by(pair)) {
            *start = self.voxel(group, run, parity((block.first + first) / channels)) * channels;
        }
        // SAFETY: handed on from the caller.
        unsafe {
            let starts = &starts[..block.len / pair];
            self.outs[0].put_pieces::<V>(starts, values, pair, (&self.maps[lane], group.stage), KeepAwake);
        }
    }

    /// Stores, adds or finishes neighbouring bands.
    ///
    /// # Safety
    /// As [`Self::write`].
    #[inline(always)]
    unsafe fn write_band<V: Lanes>(
        &self,
        group: &Group,
        channels: usize,
        run: &Run,
        values: &[[f32; LANES]],
    ) {
        let (voxel, voxels) = self.band(group, run);
        let (out, finish) = (&self.outs[0], (&self.maps[0], group.stage));
        let (start, each) = (voxel * channels, BAND * channels);
        let (whole, rest) = (voxels / BAND, voxels % BAND * channels);
        // SAFETY: handed on from the caller.
        unsafe {
            out.put_rows::<V>((start, each), &values[..whole], each, finish, KeepAwake);
            let last = &values[whole..voxels.div_ceil(BAND)];
            out.put_rows::<V>((start + whole * each, each), last, rest, finish, KeepAwake);
        }
    }
}

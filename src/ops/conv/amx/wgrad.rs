//! The outer-product core: register tiles of 16 source channels of a tap by 16 lane channels.

use super::micro::{Reads, SUMS, Step, load_sums, most_parts_of_a, store_sums};
use super::planes::Planes;
use super::{LANE_BLOCKS, Lines};
use crate::device::amx::{ROW_BYTES, Tiles};
use crate::device::arena::Buffer;
use crate::device::list::List;
use crate::device::scratch::Scratch;
use crate::ops::conv::partials::{Partials, Task};
use crate::ops::conv::plan::{Block, LANES, Map, Origin, Tile};
use crate::ops::conv::{Problem, Source};

/// See [`crate::ops::conv::wgrad()`].
pub fn wgrad(problem: Problem, sources: &[Source], lane_sources: &[Source]) -> List<Buffer> {
    let Problem { map, n, space, out_space: anchors, .. } = problem;
    let thin = super::is_thin(map, sources);
    let mut tiles = List::default();
    let partials =
        Partials::new(map.kernel().pow(3), sources, lane_sources, if thin { 1 } else { LANES }, |channels| {
            tiles = Tile::choose(map, anchors, channels.div_ceil(2)).origins(n, anchors);
            tiles.len()
        });
    let sums = partials.sums(Room::take, |&Task { block, lanes, tiles: ref of_split, .. }, sum, room| {
        let tiles = &tiles[of_split.clone()];
        let pass = Pass { map, thin, space, anchors, sources, lane_sources, lanes };
        if thin {
            return pass.thin_sum(block, tiles, sum, room);
        }
        sum.fill(0.0);
        tiles.iter().for_each(|tile| pass.add(block, tile, sum, room));
    });
    partials.finish(sums, sources, lane_sources)
}

/// What tasks use one after the other.
#[derive(Default)]
struct Room {
    /// Layout of the tiles and channels in them, of this pass. What it leaves out is 0.
    layout: Option<(Planes, usize)>,
    tile: Buffer,
    lane_tile: Buffer,
    lines: Lines,
    steps: Vec<Step>,
    /// Where the parts of A begin in a tile, in the sums' order.
    parts: Vec<usize>,
    starts: Starts,
}

impl Room {
    /// For a thread's tasks of a pass.
    fn take() -> Scratch<Self> {
        let mut room = Scratch::<Self>::take();
        room.layout = None;
        room
    }
}

/// Pointers to the parts of A.
#[derive(Default)]
struct Starts(Vec<*const u8>);

// SAFETY: what is left of one tile is cleared before the next one and never read.
unsafe impl Send for Starts {}

/// What all tiles of a task share.
struct Pass<'a> {
    map: Map,
    /// Whether taps along h and w are channels.
    thin: bool,
    space: [usize; 3],
    anchors: [usize; 3],
    sources: &'a [Source<'a>],
    lane_sources: &'a [Source<'a>],
    lanes: &'a [Block],
}

impl Pass<'_> {
    /// Adds a tile's products to `sum`, `[tap][channel][lane]`, channels in whole blocks of 16.
    fn add(
        &self,
        block: Block,
        &Origin { n, d: d0, h: h0, size }: &Origin,
        sum: &mut [f32],
        room: &mut Room,
    ) {
        let layout = if self.thin { Planes::of_copies } else { Planes::new };
        let planes = layout(self.map, size, self.anchors[2], block.len, self.lanes.len());
        let Room { layout, tile, lane_tile, lines, steps, parts, starts: Starts(starts) } = room;
        let tile: &mut [u16] = bytemuck::cast_slice_mut(tile.first(planes.source_len().div_ceil(2)));
        let lane_tile = lane_tile.first(planes.lane_len());
        if layout.replace((planes, block.len)) != Some((planes, block.len)) {
            tile.fill(0);
            lane_tile.fill(0.0);
        }
        let origin = (n, d0, h0);
        planes.load_source(&self.sources[block.tensor], block, self.space, origin, tile, lines);
        planes.load_lanes(self.lane_sources, self.lanes, self.anchors, origin, lane_tile, &mut lines.row);
        steps.clear();
        for (d, i) in (0..size.d).flat_map(|d| (0..planes.steps()).map(move |i| (d, i))) {
            let (a, b) = planes.step(d, i);
            steps.push(Step { a: 2 * a, b: 4 * b });
        }
        let of_tap = |tap| (0..planes.channels()).step_by(LANES).map(move |c| planes.tap(tap, c));
        parts.clear();
        parts.extend(self.taps().flat_map(of_tap));
        let width = self.lanes.len() * LANES;
        // K = 32 of the last of 16 channels of every part and step.
        let furthest = steps.iter().map(|s| s.a / 2).max().unwrap_or(0) + parts.iter().max().unwrap_or(&0);
        let end = furthest + (LANES - 1) * planes.channel_pitch() + ROW_BYTES / 2;
        assert!(end <= tile.len(), "the last K ends in the slack");
        assert!(parts.len() * LANES * width <= sum.len(), "a sum a part");
        starts.clear();
        starts.extend(parts.iter().map(|&at| tile[at..].as_ptr().cast::<u8>()));
        let to = sum.as_mut_ptr();
        // SAFETY: AMX is in use, or this would not run; nothing here starts another task.
        let _tiles = unsafe { Tiles::configure(ROW_BYTES / 4) };
        for lane in (0..self.lanes.len()).step_by(LANE_BLOCKS) {
            let q = LANE_BLOCKS.min(self.lanes.len() - lane);
            let b: [*const u8; LANE_BLOCKS] = std::array::from_fn(|i| {
                super::bytes(lane_tile[(lane + i.min(q - 1)) * planes.lane_block_len()..].as_ptr())
            });
            let (mut part, most) = (0, most_parts_of_a(q));
            while part < starts.len() {
                let m = most.min(starts.len() - part);
                let reads = Reads::Parts {
                    a: std::array::from_fn(|i| starts[part + i.min(m - 1)]),
                    parts_of_a: m,
                    stride: 2 * planes.channel_pitch(),
                    b,
                    parts_of_b: q,
                };
                // SAFETY: this thread holds the tiles. 16 channels of every part and step lie in the tile, and 16 rows of
                // `width` floats of every part in `sum`, as was asserted; B lies in the lane tile, which has room for all
                // steps of every lane block.
                unsafe {
                    let place = |i: usize| to.add((part + i / q) * LANES * width + (lane + i % q) * LANES);
                    let sums: [*mut f32; SUMS] = std::array::from_fn(|i| place(i.min(m * q - 1)));
                    load_sums(&sums[..m * q], 4 * width);
                    reads.multiply(steps);
                    store_sums(&sums[..m * q], 4 * width);
                }
                part += m;
            }
        }
    }

    /// Offsets (D, H, W) of the taps that parts of A stand for.
    fn taps(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let kernel = self.map.kernel();
        let plane = if self.thin { 1 } else { kernel };
        (0..kernel * plane * plane).map(move |i| (i / (plane * plane), i / plane % plane, i % plane))
    }

    /// Writes the sum of a thin source's tiles: there are no channels between a tap's and the next one's.
    fn thin_sum(&self, block: Block, tiles: &[Origin], dense: &mut [f32], room: &mut Room) {
        let kernel = self.map.kernel();
        let (width, copies) = (self.lanes.len() * LANES, kernel * kernel * block.len);
        let padded = copies.next_multiple_of(LANES) * width;
        let mut sum = Buffer::zeroed(kernel * padded);
        tiles.iter().for_each(|tile| self.add(block, tile, &mut sum, room));
        for (to, from) in dense.chunks_exact_mut(copies * width).zip(sum.chunks_exact(padded)) {
            to.copy_from_slice(&from[..copies * width]);
        }
    }
}

//! The outer-product core: register tiles of 16 source channels of a tap by 16 lane channels.

use super::LANE_BLOCKS;
use super::micro::{Step, multiply_parts};
use super::planes::Planes;
use crate::device::amx::{ROW_BYTES, Tiles};
use crate::device::arena::Buffer;
use crate::ops::conv::partials::{Partials, Task};
use crate::ops::conv::plan::{Block, LANES, Map, Origin, Tile};
use crate::ops::conv::{Problem, Source};
use rayon::prelude::*;

/// See [`crate::ops::conv::wgrad()`].
pub fn wgrad(problem: Problem, sources: &[Source], lane_sources: &[Source]) -> Vec<Buffer> {
    let Problem { map, n, space, out_space: anchors, .. } = problem;
    let thin = super::is_thin(map, sources);
    let mut tiles = Vec::new();
    let partials =
        Partials::new(map.kernel().pow(3), sources, lane_sources, if thin { 1 } else { LANES }, |channels| {
            tiles = Tile::choose(map, anchors, channels.div_ceil(2)).origins(n, anchors);
            tiles.len()
        });
    let mut sums = Vec::new();
    (0..partials.tasks())
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let Task { block, lanes, tiles: of_split, floats } = partials.task(task);
            let (tiles, pass) =
                (&tiles[of_split], Pass { map, thin, space, anchors, sources, lane_sources, lanes });
            match thin {
                true => pass.thin_sum(block, tiles, floats, scratch),
                false => {
                    let mut sum = Buffer::zeroed(floats);
                    tiles.iter().for_each(|tile| pass.add(block, tile, &mut sum, scratch));
                    sum
                }
            }
        })
        .collect_into_vec(&mut sums);
    partials.finish(sums, sources, lane_sources)
}

/// What a thread keeps from one task to the next.
#[derive(Default)]
struct Scratch {
    /// Layout of the tiles and channels in them. What it leaves out is 0.
    layout: Option<(Planes, usize)>,
    tile: Buffer,
    lane_tile: Buffer,
    row: Vec<f32>,
    steps: Vec<Step>,
}

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
        scratch: &mut Scratch,
    ) {
        let layout = if self.thin { Planes::of_copies } else { Planes::new };
        let planes = layout(self.map, size, self.anchors[2], block.len, self.lanes.len());
        let Scratch { layout, tile, lane_tile, row, steps } = scratch;
        let tile: &mut [u16] = bytemuck::cast_slice_mut(tile.first(planes.source_len().div_ceil(2)));
        let lane_tile = lane_tile.first(planes.lane_len());
        if layout.replace((planes, block.len)) != Some((planes, block.len)) {
            tile.fill(0);
            lane_tile.fill(0.0);
        }
        let origin = (n, d0, h0);
        planes.load_source(&self.sources[block.tensor], block, self.space, origin, tile, row);
        planes.load_lanes(self.lane_sources, self.lanes, self.anchors, origin, lane_tile, row);
        steps.clear();
        for (d, i) in (0..size.d).flat_map(|d| (0..planes.steps()).map(move |i| (d, i))) {
            let (a, b) = planes.step(d, i);
            steps.push(Step { a: 2 * a, b: 4 * b });
        }
        // Where the parts of A begin, in the sums' order.
        let parts: Vec<usize> = self
            .taps()
            .flat_map(|tap| (0..planes.channels()).step_by(LANES).map(move |c| planes.tap(tap, c)))
            .collect();
        let width = self.lanes.len() * LANES;
        // K = 32 of the last of 16 channels of every part and step.
        let furthest = steps.iter().map(|s| s.a / 2).max().unwrap_or(0) + parts.iter().max().unwrap_or(&0);
        let end = furthest + (LANES - 1) * planes.channel_pitch() + ROW_BYTES / 2;
        assert!(end <= tile.len(), "the last K ends in the slack");
        assert!(parts.len() * LANES * width <= sum.len(), "a sum a part");
        let a: Vec<*const u8> = parts.iter().map(|&at| tile[at..].as_ptr().cast()).collect();
        let to = sum.as_mut_ptr();
        // SAFETY: AMX is in use, or this would not run; nothing here starts another task.
        let _tiles = unsafe { Tiles::configure(ROW_BYTES / 4) };
        for lane in (0..self.lanes.len()).step_by(LANE_BLOCKS) {
            let q = LANE_BLOCKS.min(self.lanes.len() - lane);
            let b: [*const u8; LANE_BLOCKS] = std::array::from_fn(|i| {
                super::bytes(lane_tile[(lane + i.min(q - 1)) * planes.lane_block_len()..].as_ptr())
            });
            // SAFETY: this thread holds the tiles. 16 channels of every part and step lie in the tile, and 16 rows of
            // `width` floats of every part in `sum`, as was asserted; B lies in the lane tile, which has room for all
            // steps of every lane block.
            unsafe {
                let part = |m: usize, q: usize| to.add(m * LANES * width + (lane + q) * LANES);
                let a = (&a[..], 2 * planes.channel_pitch());
                multiply_parts(a, (&b[..q], ROW_BYTES), steps, part, (4 * width, true));
            }
        }
    }

    /// Offsets (D, H, W) of the taps that parts of A stand for.
    fn taps(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let kernel = self.map.kernel();
        let plane = if self.thin { 1 } else { kernel };
        (0..kernel * plane * plane).map(move |i| (i / (plane * plane), i / plane % plane, i % plane))
    }

    /// The sum of a thin source's tiles, `floats` floats: there are no channels between a tap's and the next one's.
    fn thin_sum(&self, block: Block, tiles: &[Origin], floats: usize, scratch: &mut Scratch) -> Buffer {
        let kernel = self.map.kernel();
        let (width, copies) = (self.lanes.len() * LANES, kernel * kernel * block.len);
        let padded = copies.next_multiple_of(LANES) * width;
        let mut sum = Buffer::zeroed(kernel * padded);
        tiles.iter().for_each(|tile| self.add(block, tile, &mut sum, scratch));
        let mut dense = Buffer::dirty(floats);
        for (to, from) in dense.chunks_exact_mut(copies * width).zip(sum.chunks_exact(padded)) {
            to.copy_from_slice(&from[..copies * width]);
        }
        dense
    }
}

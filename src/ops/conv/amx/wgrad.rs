//! The outer-product core: register tiles of 16 source channels of a tap by 16 lane channels.

use super::LANE_BLOCKS;
use super::micro::{Step, multiply_parts};
use super::planes::Planes;
use crate::device::amx::{ROW_BYTES, Tiles};
use crate::device::arena::Buffer;
use crate::ops::conv::plan::{LANES, Tile};
use crate::ops::conv::wgrad::Partials;
use crate::ops::conv::{Problem, Source};
use rayon::prelude::*;

/// What a thread keeps from one task to the next.
#[derive(Default)]
struct Scratch {
    /// Layout of the tiles and channels in them. What it leaves out is 0.
    layout: Option<(Planes, usize)>,
    tile: Vec<u16>,
    lane_tile: Vec<f32>,
    row: Vec<f32>,
    steps: Vec<Step>,
}

/// See [`crate::ops::conv::wgrad()`].
pub fn wgrad(problem: Problem, sources: &[Source], lane_sources: &[Source]) -> Vec<Buffer> {
    let Problem { map, n, space, out_space: anchors, .. } = problem;
    let class = &map.classes()[0];
    let mut partials = Partials::new(map, sources, lane_sources, LANES);
    let widest = partials.channels.iter().map(|b| b.len).max().unwrap_or(1);
    let tiles = Tile::choose(map, anchors, widest.div_ceil(2)).origins(n, anchors);
    let per_split = partials.split(tiles.len());
    let (width, splits) = (partials.width(), partials.splits);
    let mut sums = Vec::new();
    (0..partials.channels.len() * splits)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let (block, split) = (partials.channels[task / splits], task % splits);
            let mut sum = Buffer::zeroed(partials.sum_floats(block.len));
            let tiles = tiles.iter().skip(split * per_split).take(per_split);
            for &(n, d0, h0, size) in tiles {
                let planes = Planes::new(map, size, anchors[2], block.len, partials.lanes.len());
                scratch.prepare(planes, block.len);
                let Scratch { tile, lane_tile, row, steps, .. } = scratch;
                planes.load_source(&sources[block.tensor], block, space, (n, d0, h0), tile, row);
                planes.load_lanes(lane_sources, &partials.lanes, anchors, (n, d0, h0), lane_tile, row);
                steps.clear();
                for (d, i) in (0..size.d).flat_map(|d| (0..planes.steps()).map(move |i| (d, i))) {
                    let (a, b) = planes.step(d, i);
                    steps.push(Step { a: 2 * a, b: 4 * b });
                }
                // The register tiles of a lane block: (tap, 16 channels), in the sums' order.
                let mut parts = Vec::new();
                for &(dd, hh, _, _) in &class.rows {
                    for ww in 0..class.taps_w.len() {
                        let blocks = (0..block.len).step_by(LANES);
                        parts.extend(
                            blocks.map(|c| tile[planes.tap((dd, hh, ww), c)..].as_ptr().cast::<u8>()),
                        );
                    }
                }
                let to = sum.as_mut_ptr();
                // SAFETY: AMX is in use, or this would not run; nothing here starts another task.
                let _tiles = unsafe { Tiles::configure(ROW_BYTES / 4) };
                for lane in (0..partials.lanes.len()).step_by(LANE_BLOCKS) {
                    let q = LANE_BLOCKS.min(partials.lanes.len() - lane);
                    let b: [*const u8; LANE_BLOCKS] = std::array::from_fn(|i| {
                        super::bytes(lane_tile[(lane + i.min(q - 1)) * planes.lane_block_len()..].as_ptr())
                    });
                    // SAFETY: this thread holds the tiles. 16 channels of every tap and step lie in the tile, or their
                    // K of 32 ends at most 32 values behind it; B lies in the lane tile; 16 rows of `width` floats of
                    // every part lie in `sum`.
                    unsafe {
                        let part = |m: usize, q: usize| to.add(m * LANES * width + (lane + q) * LANES);
                        let a = (&parts[..], 2 * planes.channel_pitch());
                        multiply_parts(a, (&b[..q], ROW_BYTES), steps, part, (4 * width, true));
                    }
                }
            }
            sum
        })
        .collect_into_vec(&mut sums);
    partials.finish(map, sums, sources, lane_sources)
}

impl Scratch {
    /// Makes the tiles long enough, and 0 where their layout is not the last one's.
    fn prepare(&mut self, planes: Planes, channels: usize) {
        let layout = Some((planes, channels));
        if self.layout != layout {
            self.layout = layout;
            self.tile.clear();
            self.tile.resize(planes.source_len(), 0);
            self.lane_tile.clear();
            self.lane_tile.resize(planes.lane_len(), 0.0);
        }
    }
}

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
    let thin = super::is_thin(map, sources);
    let mut partials = Partials::new(map, sources, lane_sources, if thin { 1 } else { LANES });
    let widest = partials.channels.iter().map(|b| b.len).max().unwrap_or(1);
    let tiles = Tile::choose(map, anchors, widest.div_ceil(2)).origins(n, anchors);
    let per_split = partials.split(tiles.len());
    let (width, splits) = (partials.width(), partials.splits);
    let mut sums = Vec::new();
    (0..partials.channels.len() * splits)
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let (block, split) = (partials.channels[task / splits], task % splits);
            // Sums of a thin source: [tap along d][tap along h, along w, channel][lane], the middle in whole blocks of 16.
            let copies = class.rows.len() / map.kernel() * class.taps_w.len() * block.len;
            let mut sum = Buffer::zeroed(match thin {
                true => map.kernel() * copies.next_multiple_of(LANES) * width,
                false => partials.sum_floats(block.len),
            });
            let tiles = tiles.iter().skip(split * per_split).take(per_split);
            for &(n, d0, h0, size) in tiles {
                let layout = if thin { Planes::of_copies } else { Planes::new };
                let planes = layout(map, size, anchors[2], block.len, partials.lanes.len());
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
                let mut part = |tap, channel| parts.push(tile[planes.tap(tap, channel)..].as_ptr().cast());
                if thin {
                    for dd in 0..map.kernel() {
                        (0..planes.channels()).step_by(LANES).for_each(|c| part((dd, 0, 0), c));
                    }
                } else {
                    for &(dd, hh, _, _) in &class.rows {
                        for ww in 0..class.taps_w.len() {
                            (0..planes.channels()).step_by(LANES).for_each(|c| part((dd, hh, ww), c));
                        }
                    }
                }
                // K = 32 of the last of 16 channels of every part and step.
                let furthest = |values: &mut dyn Iterator<Item = usize>| values.max().unwrap_or(0);
                let part = furthest(&mut parts.iter().map(|p: &*const u8| p.addr() - tile.as_ptr().addr()));
                let end = part
                    + furthest(&mut steps.iter().map(|s| s.a))
                    + 2 * (LANES - 1) * planes.channel_pitch()
                    + ROW_BYTES;
                assert!(end <= 2 * tile.len(), "the last K ends in the slack");
                assert!(parts.len() * LANES * width <= sum.len(), "a sum a part");
                let to = sum.as_mut_ptr();
                // SAFETY: AMX is in use, or this would not run; nothing here starts another task.
                let _tiles = unsafe { Tiles::configure(ROW_BYTES / 4) };
                for lane in (0..partials.lanes.len()).step_by(LANE_BLOCKS) {
                    let q = LANE_BLOCKS.min(partials.lanes.len() - lane);
                    let b: [*const u8; LANE_BLOCKS] = std::array::from_fn(|i| {
                        super::bytes(lane_tile[(lane + i.min(q - 1)) * planes.lane_block_len()..].as_ptr())
                    });
                    // SAFETY: this thread holds the tiles. 16 channels of every part and step lie in the tile, and 16
                    // rows of `width` floats of every part in `sum`, as was asserted; B lies in the lane tile, which has
                    // room for all steps of every lane block.
                    unsafe {
                        let part = |m: usize, q: usize| to.add(m * LANES * width + (lane + q) * LANES);
                        let a = (&parts[..], 2 * planes.channel_pitch());
                        multiply_parts(a, (&b[..q], ROW_BYTES), steps, part, (4 * width, true));
                    }
                }
            }
            if !thin {
                return sum;
            }
            let mut dense = Buffer::dirty(partials.sum_floats(block.len));
            let of_tap = sum.chunks_exact(copies.next_multiple_of(LANES) * width);
            for (to, from) in dense.chunks_exact_mut(copies * width).zip(of_tap) {
                to.copy_from_slice(&from[..copies * width]);
            }
            dense
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

//! How the sums of a weight gradient are cut into tasks, and put together again.

use super::Source;
use super::plan::{Block, LANES, MAX_TAPS, lane_blocks, source_blocks};
use super::transpose::transpose;
use crate::device::arena::Buffer;
use crate::device::list::List;
use crate::device::scratch::Scratch;
use rayon::prelude::*;
use std::ops::Range;

/// Source channels that a task takes at once.
const CHANNELS: usize = 32;

/// Floats that all partial sums of a layer together may have: 8 MB, so that they stay in L3.
const PARTIAL_FLOATS: usize = 2 << 20;

/// Tasks that a layer is split into, where its shape allows. More would cost time: tasks that share out lanes each load, or
/// transform, all tiles. Chosen with one and two threads.
const MIN_TASKS: usize = 24;

/// Floats of a partial sum that a task adds up.
const REDUCE_CHUNK: usize = 1 << 12;

/// Tasks are channel blocks by parts of the lanes by splits of the tiles, splits fastest. Each has a sum of its own,
/// `[tap][channel][lane of the part]`.
pub struct Partials {
    channels: List<Block>,
    lanes: List<Block>,
    /// Lane blocks of a part.
    part: usize,
    splits: usize,
    /// Tiles of a split, and of all.
    tiles: (usize, usize),
    taps: usize,
    /// Channels of a sum are a multiple of this.
    multiple: usize,
}

/// What one task adds up.
pub struct Task<'a> {
    /// Source channels.
    pub block: Block,
    /// Lane blocks.
    pub lanes: &'a [Block],
    /// Numbers of the tiles.
    pub tiles: Range<usize>,
    /// Floats of the sum.
    pub floats: usize,
}

impl Partials {
    /// Sums have `taps` taps; `tiles` says how many tiles the anchors make for a source block of so many channels.
    ///
    /// Tiles are dealt to splits for the sake of tasks. Layers whose sums are too large for that split their lanes
    /// instead: tiles are loaded once a part, which costs little where there are many lanes.
    pub fn new(
        taps: usize,
        sources: &[Source],
        lane_sources: &[Source],
        multiple: usize,
        tiles: impl FnOnce(usize) -> usize,
    ) -> Self {
        let channels = source_blocks(sources, CHANNELS);
        let lanes = lane_blocks(lane_sources.iter().map(|s| s.channels));
        let tiles = tiles(channels.iter().map(|b| b.len).max().unwrap_or(1));
        let padded: usize = channels.iter().map(|b| b.len.next_multiple_of(multiple)).sum();
        let floats = taps * padded * lanes.len() * LANES;
        let each = tiles.div_ceil((PARTIAL_FLOATS / floats).clamp(1, 64));
        // Not a split without tiles: its sum would never be written.
        let splits = tiles.div_ceil(each);
        let parts = MIN_TASKS.div_ceil(channels.len() * splits).min(lanes.len().div_ceil(2));
        let part = lanes.len().div_ceil(parts);
        Partials { channels, lanes, part, splits, tiles: (each, tiles), taps, multiple }
    }

    fn parts(&self) -> usize {
        self.lanes.len().div_ceil(self.part)
    }

    /// Number of tasks.
    fn tasks(&self) -> usize {
        self.channels.len() * self.parts() * self.splits
    }

    /// The task of this number.
    fn task(&self, number: usize) -> Task<'_> {
        let block = self.channels[number / (self.parts() * self.splits)];
        let lanes = self.lanes_of(number / self.splits % self.parts());
        let (each, all) = self.tiles;
        let first = (number % self.splits * each).min(all);
        Task { block, lanes, tiles: first..all.min(first + each), floats: self.floats(block, lanes) }
    }

    fn lanes_of(&self, part: usize) -> &[Block] {
        &self.lanes[part * self.part..self.lanes.len().min((part + 1) * self.part)]
    }

    fn floats(&self, block: Block, lanes: &[Block]) -> usize {
        self.taps * block.len.next_multiple_of(self.multiple) * lanes.len() * LANES
    }

    /// The sums of all tasks: `sum` writes a task's.
    pub fn sums<S: Default + Send + 'static>(
        &self,
        scratch: impl Fn() -> Scratch<S> + Sync + Send,
        sum: impl Fn(&Task, &mut [f32], &mut S) + Sync + Send,
    ) -> List<Buffer> {
        let mut sums: List<_> =
            (0..self.tasks()).map(|number| Buffer::dirty(self.task(number).floats)).collect();
        sums.par_iter_mut().enumerate().for_each_init(scratch, |scratch, (number, out)| {
            sum(&self.task(number), out, scratch);
        });
        sums
    }

    /// One tensor a lane source, `[lane channel][source channel][tap]`, from the sums of all tasks.
    pub fn finish(&self, sums: List<Buffer>, sources: &[Source], lane_sources: &[Source]) -> List<Buffer> {
        self.arrange(self.taps, &self.reduce(sums), sources, lane_sources)
    }

    /// The sums of the channel blocks by parts of the lanes: splits are added in their order.
    pub fn reduce(&self, mut sums: List<Buffer>) -> List<Buffer> {
        for splits in sums.chunks_exact_mut(self.splits) {
            let (sum, others) = splits.split_first_mut().expect("at least one");
            sum.par_chunks_mut(REDUCE_CHUNK).enumerate().for_each(|(i, sum)| {
                for other in &*others {
                    let other = &other[i * REDUCE_CHUNK..];
                    sum.iter_mut().zip(other).for_each(|(s, o)| *s += o);
                }
            });
        }
        sums.into_iter().step_by(self.splits).collect()
    }

    /// One tensor a lane source, from reduced sums of so many taps.
    pub fn arrange(
        &self,
        taps: usize,
        sums: &[Buffer],
        sources: &[Source],
        lane_sources: &[Source],
    ) -> List<Buffer> {
        let source_channels: usize = sources.iter().map(|s| s.channels).sum();
        let first_channel = |tensor: usize| sources[..tensor].iter().map(|s| s.channels).sum::<usize>();
        let mut dw: List<Buffer> =
            lane_sources.iter().map(|s| Buffer::dirty(s.channels * source_channels * taps)).collect();
        let mut targets: List<_> = dw
            .iter_mut()
            .flat_map(|dw| dw.chunks_mut(LANES * source_channels * taps))
            .zip(&self.lanes)
            .collect();
        targets.par_iter_mut().enumerate().for_each(|(lane_index, (dw, lane))| {
            let (part, lane_index) = (lane_index / self.part, lane_index % self.part);
            let lanes = self.lanes_of(part);
            let width = lanes.len() * LANES;
            // The taps of one channel, by tap and by lane, in whole squares.
            let tap_pitch = taps.next_multiple_of(LANES);
            let mut squares = [[0.0; MAX_TAPS.next_multiple_of(LANES) * LANES]; 2];
            let [by_tap, by_lane] = squares.each_mut().map(|square| &mut square[..tap_pitch * LANES]);
            for (block_index, &block) in self.channels.iter().enumerate() {
                let sum = &sums[block_index * self.parts() + part];
                let tap_floats = self.floats(block, lanes) / self.taps;
                let start = (first_channel(block.tensor) + block.first) * taps;
                for channel in 0..block.len {
                    let at = channel * width + lane_index * LANES;
                    for (tap, by_tap) in by_tap.chunks_exact_mut(LANES).take(taps).enumerate() {
                        by_tap.copy_from_slice(&sum[tap * tap_floats + at..][..LANES]);
                    }
                    transpose(by_tap, LANES, by_lane, tap_pitch);
                    for l in 0..lane.len {
                        let to = &mut dw[l * source_channels * taps + start + channel * taps..][..taps];
                        to.copy_from_slice(&by_lane[l * tap_pitch..][..taps]);
                    }
                }
            }
        });
        drop(targets);
        dw
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Values;

    /// Cases of tests/ops and the bottom of the bundle's network: their tasks add to what they have written.
    #[test]
    fn large_sums_are_each_of_all_tiles() {
        for (taps, channels, lanes, tiles) in [(48, 160, 144, 2), (48, 256, 256, 8), (75, 120, 128, 2)] {
            let of = |channels| [Source { data: Values::Single(&[]), channels, pending: None }];
            let partials = Partials::new(taps, &of(channels), &of(lanes), 8, |_| tiles);
            assert!((0..partials.tasks()).all(|number| partials.task(number).tiles == (0..tiles)));
        }
    }

    #[test]
    fn every_tile_of_every_block_and_lane_is_in_one_task_and_no_task_is_empty() {
        for (tiles, channels, lanes) in [(1, 1, 1), (65, 16, 16), (288, 32, 48), (7, 256, 250), (4, 64, 512)]
        {
            let of = |channels| [Source { data: Values::Single(&[]), channels, pending: None }];
            let partials = Partials::new(27, &of(channels), &of(lanes), 1, |widest| {
                assert_eq!(widest, channels.min(CHANNELS));
                tiles
            });
            let mut seen = vec![0; tiles * channels * lanes];
            for number in 0..partials.tasks() {
                let task = partials.task(number);
                assert!(!task.tiles.is_empty() && !task.lanes.is_empty(), "{tiles} {channels} {lanes}");
                assert_eq!(task.floats, 27 * task.block.len * task.lanes.len() * LANES);
                for tile in task.tiles {
                    for c in task.block.first..task.block.first + task.block.len {
                        for l in task.lanes.iter().flat_map(|b| b.first..b.first + b.len) {
                            seen[(tile * channels + c) * lanes + l] += 1;
                        }
                    }
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{tiles} {channels} {lanes}");
        }
    }
}

//! Weights as the B tiles of the gather core, and where in a halo tile the A of each begins.

use super::fold::Fold;
use crate::device::amx::TILE_BYTES;
use crate::device::arena::Buffer;
use crate::ops::conv::Weights;
use crate::ops::conv::pack::pair_rows;
use crate::ops::conv::plan::{Block, Class, LANES, Map};
use rayon::prelude::*;

/// Floats of a B tile.
pub const TILE_FLOATS: usize = TILE_BYTES / 4;

/// How K = 32 is made up, by the elements (pairs of channels) between voxels of a halo tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// 32 channels of one tap.
    Channels,
    /// 16 channels of a tap and of the next one along w.
    Taps,
}

impl Depth {
    /// The depth that needs fewer products a register tile and lane block, for blocks of these sources' channels.
    pub fn choose(channels: impl IntoIterator<Item = usize> + Clone, classes: &[Class]) -> Self {
        // Every class must have two taps along w: a second half that is no tap of its own reads what no output may see.
        if classes.iter().any(|c| c.taps_w.len() < 2) {
            return Depth::Channels;
        }
        let products = |depth: Depth| -> usize {
            let blocks = channels.clone().into_iter().map(|c| c.div_ceil(depth.channels())).sum::<usize>();
            classes.iter().map(|c| c.rows.len() * depth.steps(c.taps_w.len()).count() * blocks).sum()
        };
        if products(Depth::Taps) < products(Depth::Channels) { Depth::Taps } else { Depth::Channels }
    }

    /// Channels of a block.
    pub fn channels(self) -> usize {
        match self {
            Depth::Channels => 32,
            Depth::Taps => 16,
        }
    }

    /// Elements between voxels.
    pub fn pitch(self) -> usize {
        self.channels() / 2
    }

    /// The products of a row of taps: (tap at which A begins, first tap of it that no other product has). Of three taps
    /// the second product holds the last two, and zeros for the weights of the middle one: it reads nothing that is not
    /// the output's own.
    pub fn steps(self, taps: usize) -> impl Iterator<Item = (usize, usize)> {
        let width = if self == Depth::Taps { 2 } else { 1 };
        (0..taps).step_by(width).map(move |tap| (tap.min(taps - width), tap))
    }

    /// Taps of a product.
    fn width(self) -> usize {
        if self == Depth::Taps { 2 } else { 1 }
    }
}

/// B tiles: [group][class][lane block][block of the group][row][step].
pub struct Packed {
    data: Buffer,
    /// Start of (group, class), classes fastest.
    starts: Vec<usize>,
    classes: usize,
}

impl Packed {
    /// Those of one group of source blocks and one class: lane blocks follow each other.
    pub fn of(&self, group: usize, class: usize) -> &[f32] {
        let i = group * self.classes + class;
        &self.data[self.starts[i]..self.starts[i + 1]]
    }
}

/// Floats of one lane block of one class and group.
pub fn lane_block_floats(class: &Class, group: &[Block], depth: Depth) -> usize {
    class.rows.len() * depth.steps(class.taps_w.len()).count() * group.len() * TILE_FLOATS
}

/// Packs; `weights(source, head)` says where the weights of a pair lie. Channels beyond a block's are 0 on both sides.
pub fn pack<'a>(
    (map, fold): (Map, Option<Fold>),
    classes: &[Class],
    groups: &[&[Block]],
    lanes: &[Block],
    depth: Depth,
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    let mut starts = vec![0];
    for group in groups {
        for class in classes {
            starts.push(starts[starts.len() - 1] + lanes.len() * lane_block_floats(class, group, depth));
        }
    }
    let mut data = Buffer::dirty(starts[starts.len() - 1]);
    let mut rest = &mut data[..];
    let mut jobs = Vec::new();
    for group in groups {
        for class in classes {
            for lane in lanes {
                for source in *group {
                    let (head, tail) = rest.split_at_mut(lane_block_floats(class, &[*source], depth));
                    jobs.push((head, source, class, lane));
                    rest = tail;
                }
            }
        }
    }
    let slot_floats = depth.channels() * LANES;
    jobs.into_par_iter().for_each_init(Vec::new, |floats: &mut Vec<f32>, (out, source, class, lane)| {
        let w = weights(source.tensor, lane.tensor);
        floats.clear();
        floats.resize(2 * out.len(), 0.0);
        let mut taps = match fold {
            None => taps(map, class, depth, w.mirrored),
            Some(_) => Vec::new(),
        };
        for l in 0..lane.len {
            let mut head = lane.first + l;
            if let Some(fold) = fold {
                let parity;
                (parity, head) = fold.output(head);
                taps = fold.taps(parity);
            }
            let start = w.offset + source.first * w.source_stride + head * w.head_stride;
            // Taps innermost: they are neighbours in the tensor.
            for channel in 0..source.len {
                let from = &w.data[start + channel * w.source_stride..];
                let to = &mut floats[channel * LANES + l..];
                taps.iter().for_each(|&(tap, slot)| to[slot * slot_floats] = from[tap]);
            }
        }
        pair_rows(floats, slot_floats, out);
    });
    Packed { data, starts, classes: classes.len() }
}

/// (tap in the tensor, its number among the taps that B tiles have room for) of a class.
fn taps(map: Map, class: &Class, depth: Depth, mirrored: bool) -> Vec<(usize, usize)> {
    let kernel = map.kernel();
    let mut taps = Vec::with_capacity(class.rows.len() * class.taps_w.len());
    let mut slot = 0;
    for &(_, _, kd, kh) in &class.rows {
        for (first, own) in depth.steps(class.taps_w.len()) {
            for tap in first..first + depth.width() {
                if tap >= own {
                    let tap = (kd * kernel + kh) * kernel + class.taps_w[tap];
                    taps.push((if mirrored { kernel.pow(3) - 1 - tap } else { tap }, slot));
                }
                slot += 1;
            }
        }
    }
    taps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tap_is_one_products_own() {
        for (depth, taps) in [(Depth::Channels, 1), (Depth::Channels, 3), (Depth::Taps, 2), (Depth::Taps, 3)]
        {
            let own: Vec<usize> =
                depth.steps(taps).flat_map(|(first, own)| own..first + depth.width()).collect();
            assert_eq!(own, (0..taps).collect::<Vec<_>>(), "{depth:?} of {taps}");
        }
    }

    #[test]
    fn few_channels_are_taken_two_taps_at_a_time() {
        let gather = Map::Gather { kernel: 3, stride: 1 }.classes();
        assert_eq!(Depth::choose([16], &gather), Depth::Taps);
        assert_eq!(Depth::choose([32], &gather), Depth::Channels);
        assert_eq!(Depth::choose([18], &gather), Depth::Channels);
        assert_eq!(Depth::choose([16, 16], &gather), Depth::Taps);
        assert_eq!(Depth::choose([16], &Map::Scatter.classes()), Depth::Channels);
        assert_eq!(Depth::choose([16], &Map::Gather { kernel: 1, stride: 1 }.classes()), Depth::Channels);
    }
}

//! Weights as the B tiles of the gather core.

use super::fold::{Fold, output_taps, parity};
use super::scheme::{Depth, Scheme};
use crate::device::amx::TILE_BYTES;
use crate::device::bf16::pair;
use crate::device::cpu::vectorised;
use crate::device::list::List;
use crate::ops::conv::Weights;
use crate::ops::conv::pack::{Packed, pair_rows};
use crate::ops::conv::plan::{Block, Class, LANES, Map};

/// Floats of a B tile.
pub const TILE_FLOATS: usize = TILE_BYTES / 4;

/// Floats of one lane block of one class and group.
pub fn lane_block_floats(class: &Class, group: &[Block], depth: Depth) -> usize {
    depth.steps(class) * group.len() * TILE_FLOATS
}

/// Packs to B tiles, `[group][class][lane block][block of the group][product]`;
/// `weights(source, head)` says where the weights of a pair lie. Rows of B that no weight has are 0.
pub fn pack<'a>(
    map: Map,
    scheme: &Scheme,
    groups: &[&[Block]],
    lanes: &[Block],
    weights: &(dyn Fn(usize, usize) -> Weights<'a> + Sync),
) -> Packed {
    let Scheme { depth, classes, .. } = scheme;
    let floats = |class: &Class, group: &[Block]| lane_block_floats(class, group, *depth);
    Packed::fill(groups, lanes, classes, floats, |out, [source, lane], class, floats| {
        let w = weights(source.tensor, lane.tensor);
        let start = w.offset + source.first * w.source_stride;
        let whole = lane.len == LANES && source.len.is_multiple_of(2);
        if whole && scheme.fold.is_none() && matches!(depth, Depth::Channels | Depth::Taps { .. }) {
            // Half a tile may be no tap's, and some of its channels nobody's.
            out.fill(0.0);
            let w_lanes = &w.data[start + lane.first * w.head_stride..];
            let taps = of_class(map, class, *depth, w.mirrored);
            pack_pairs(w_lanes, w.source_stride, w.head_stride, source.len / 2, &taps, out);
            return;
        }
        floats.clear();
        floats.resize(2 * out.len(), 0.0);
        for l in 0..lane.len {
            let (head, taps) = of_lane(map, scheme, class, w.mirrored, lane.first + l);
            for channel in 0..source.len {
                let from = &w.data[start + channel * w.source_stride + head * w.head_stride..];
                let to = &mut floats[channel * LANES + l..];
                taps.iter().for_each(|&(tap, row)| to[row * LANES] = from[tap]);
            }
        }
        pair_rows(floats, 2 * TILE_FLOATS, out);
    })
}

vectorised! {
    /// Pairs of channels, `source_stride` floats apart, of 16 lanes, `head_stride` apart, of every (tap, row of B).
    fn pack_pairs(
        w: &[f32],
        source_stride: usize,
        head_stride: usize,
        pairs: usize,
        taps: &[(usize, usize)],
        out: &mut [f32],
    ) {
        for p in 0..pairs {
            let channel = |c: usize| &w[(2 * p + c) * source_stride..];
            let (even, odd) = (channel(0), channel(1));
            // All lanes of a tap: the line is written once, and the lanes' next taps are in the lines that were read.
            for &(tap, row) in taps {
                let lanes = |from: &[f32]| -> [f32; LANES] { std::array::from_fn(|l| from[tap + l * head_stride]) };
                let (even, odd) = (lanes(even), lanes(odd));
                let to: &mut [f32; LANES] =
                    (&mut out[(row / 2 + p) * LANES..][..LANES]).try_into().expect("a row of B");
                (0..LANES).for_each(|l| to[l] = pair(even[l], odd[l]));
            }
        }
    }
}

/// The head's channel that is lane `lane`, and its taps: (tap in the tensor, row of B of channel 0).
fn of_lane(
    map: Map,
    scheme: &Scheme,
    class: &Class,
    mirrored: bool,
    lane: usize,
) -> (usize, List<(usize, usize)>) {
    let Some(fold) = scheme.fold else { return (lane, of_class(map, class, scheme.depth, mirrored)) };
    let output = lane / fold.channels();
    let channels = scheme.depth.channels();
    let taps = match fold {
        Fold::Outputs { .. } => {
            let taps = output_taps(parity(output)).into_iter();
            taps.map(|(tap, voxel)| (tap, voxel * channels)).collect()
        }
        Fold::Band { .. } => {
            let taps = of_class(map, class, scheme.depth, mirrored).into_iter();
            taps.map(|(tap, row)| (tap, row + output * channels)).collect()
        }
    };
    (lane % fold.channels(), taps)
}

/// (tap in the tensor, row of B of channel 0) of a class.
fn of_class(map: Map, class: &Class, depth: Depth, mirrored: bool) -> List<(usize, usize)> {
    let (kernel, along_w) = (map.kernel(), class.taps_w.len());
    let tap = |number: usize| {
        let (_, _, kd, kh) = class.rows[number / along_w];
        let tap = (kd * kernel + kh) * kernel + class.taps_w[number % along_w];
        if mirrored { kernel.pow(3) - 1 - tap } else { tap }
    };
    depth.places(class).into_iter().map(|(number, row)| (tap(number), row)).collect()
}

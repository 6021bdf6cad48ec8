//! Thin outputs of a scatter: all eight outputs of an anchor fill the lanes together.
//!
//! A transposed convolution to two channels would leave seven eighths of every product empty. Folded, the lanes are
//! (parity of d, of h, of w, channel), and K runs over the channels of the eight voxels that any of them reads: 27 of 64
//! weights are not 0, and two channels make 16 lanes. A voxel that is infinite or no number so reaches all outputs of the
//! anchors that read it.

use crate::ops::conv::plan::{Block, Class, LANES, Map};
use crate::ops::conv::run::THIN_CHANNELS;

/// A folded pass to so many channels.
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    /// Channels of the only head.
    pub channels: usize,
}

/// Outputs of an anchor.
const OUTPUTS: usize = 8;

impl Fold {
    /// The fold of a pass to heads of these channels, where it has one: every anchor must have all its outputs, and lane
    /// blocks must not cut through a pair of outputs along w.
    pub fn of(map: Map, mut heads: impl Iterator<Item = usize>, out_space: [usize; 3]) -> Option<Self> {
        let (channels, None) = (heads.next()?, heads.next()) else { return None };
        let whole = out_space.iter().all(|o| o.is_multiple_of(map.outputs()));
        let pairs = LANES.is_multiple_of(2 * channels);
        (map == Map::Scatter && channels <= THIN_CHANNELS && pairs && whole).then_some(Fold { channels })
    }

    /// The only class: every anchor reads two voxels along each axis. It has no taps of its own.
    pub fn class() -> Class {
        Class {
            parity: [0; 3],
            rows: vec![(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)],
            taps_w: vec![0; 2],
        }
    }

    /// Lane blocks of an anchor's outputs.
    pub fn lanes(self) -> Vec<Block> {
        let lanes = OUTPUTS * self.channels;
        let block = |first| Block { tensor: 0, first, len: LANES.min(lanes - first) };
        (0..lanes).step_by(LANES).map(block).collect()
    }

    /// Parity (D, H, W) of a lane, and its channel.
    pub fn output(self, lane: usize) -> ([usize; 3], usize) {
        let output = lane / self.channels;
        ([output / 4, output / 2 % 2, output % 2], lane % self.channels)
    }

    /// (tap in the tensor, its number among the taps that B tiles have room for) of the outputs of this parity: an even one has tap 1 of the
    /// first voxel along an axis, an odd one tap 2 of the first and tap 0 of the second.
    pub fn taps(self, parity: [usize; 3]) -> Vec<(usize, usize)> {
        let tap = |parity: usize, voxel: usize| match (parity, voxel) {
            (0, 0) => Some(1),
            (0, _) => None,
            (_, 0) => Some(2),
            _ => Some(0),
        };
        let mut taps = Vec::with_capacity(OUTPUTS);
        for slot in 0..OUTPUTS {
            let voxel = [slot / 4, slot / 2 % 2, slot % 2];
            let axes: [Option<usize>; 3] = std::array::from_fn(|a| tap(parity[a], voxel[a]));
            if let [Some(d), Some(h), Some(w)] = axes {
                taps.push(((d * 3 + h) * 3 + w, slot));
            }
        }
        taps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folded_taps_are_those_of_the_classes() {
        for class in Map::Scatter.classes() {
            let mut want = Vec::new();
            for &(dd, hh, kd, kh) in &class.rows {
                let taps = class.taps_w.iter().enumerate();
                want.extend(taps.map(|(ww, kw)| ((kd * 3 + kh) * 3 + kw, (dd * 2 + hh) * 2 + ww)));
            }
            let mut got = Fold { channels: 2 }.taps(class.parity);
            want.sort();
            got.sort();
            assert_eq!(got, want, "{class:?}");
        }
    }
}

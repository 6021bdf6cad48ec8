//! Thin outputs: several voxels of few channels fill the lanes together.
//!
//! Two channels would leave seven eighths of every product empty. A voxel that is infinite or no number reaches all
//! outputs that share a row of A with one that reads it.

use super::scheme::BAND;
use crate::device::list::List;
use crate::ops::conv::plan::{Block, Class, LANES, Map};
use crate::ops::conv::run::THIN_CHANNELS;
use std::sync::LazyLock;

/// What the lanes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold {
    /// All eight outputs of a scatter's anchor: (parity of d, of h, of w, channel). K runs over the channels of the eight
    /// voxels that any of them reads: 27 of 64 weights are not 0.
    Outputs {
        /// Channels of the only head.
        channels: usize,
    },
    /// Eight neighbours along w: (voxel, channel). Of the ten voxels that K runs over each reads three.
    Band {
        /// Channels of the only head.
        channels: usize,
    },
}

/// Outputs of an anchor.
pub const OUTPUTS: usize = 8;

impl Fold {
    /// The fold of a scatter to heads of these channels, where it has one: every anchor must have all its outputs, and
    /// lane blocks must not cut through a pair of outputs along w.
    pub fn outputs(map: Map, heads: &[usize], out_space: [usize; 3]) -> Option<Self> {
        let &[channels] = heads else { return None };
        let whole = out_space.iter().all(|o| o.is_multiple_of(map.outputs()));
        let pairs = LANES.is_multiple_of(2 * channels);
        (map == Map::Scatter && channels <= THIN_CHANNELS && pairs && whole)
            .then_some(Fold::Outputs { channels })
    }

    /// Its classes, a single one: every anchor reads two voxels along each axis. It has no taps of its own.
    pub fn outputs_classes() -> &'static [Class] {
        static CLASSES: LazyLock<[Class; 1]> = LazyLock::new(|| {
            let rows = vec![(0, 0, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0)];
            [Class { parity: [0; 3], rows, taps_w: vec![0; 2] }]
        });
        &*CLASSES
    }

    /// Channels of the only head.
    pub fn channels(self) -> usize {
        match self {
            Fold::Outputs { channels } | Fold::Band { channels } => channels,
        }
    }

    /// Lane blocks.
    pub fn lanes(self) -> List<Block> {
        let lanes = self.channels()
            * match self {
                Fold::Outputs { .. } => OUTPUTS,
                Fold::Band { .. } => BAND,
            };
        let block = |first| Block { tensor: 0, first, len: LANES.min(lanes - first) };
        (0..lanes).step_by(LANES).map(block).collect()
    }
}

/// Parity (D, H, W) of an output of an anchor.
pub fn parity(output: usize) -> [usize; 3] {
    [output / 4, output / 2 % 2, output % 2]
}

/// The taps of an output of this parity: (tap in the tensor, which of the eight voxels that the anchor reads). An even
/// output has tap 1 of the first voxel along an axis, an odd one tap 2 of the first and tap 0 of the second.
pub fn output_taps(output: [usize; 3]) -> List<(usize, usize)> {
    let tap = |parity: usize, voxel: usize| match (parity, voxel) {
        (0, 0) => Some(1),
        (0, _) => None,
        (_, 0) => Some(2),
        _ => Some(0),
    };
    let mut taps = List::with_room(OUTPUTS);
    for voxel in 0..OUTPUTS {
        let at = parity(voxel);
        let axes: [Option<usize>; 3] = std::array::from_fn(|a| tap(output[a], at[a]));
        if let [Some(d), Some(h), Some(w)] = axes {
            taps.push(((d * 3 + h) * 3 + w, voxel));
        }
    }
    taps
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
            let mut got = output_taps(class.parity);
            want.sort();
            got.sort();
            assert_eq!(got[..], want[..], "{class:?}");
        }
    }
}

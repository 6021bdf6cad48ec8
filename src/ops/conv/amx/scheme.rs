//! How a pass of the gather core becomes products of tiles: what K is made of, and what the lanes are.

use super::fold::Fold;
use crate::device::list::List;
use crate::ops::conv::plan::{Block, Class, LANES, Map, lane_blocks};
use crate::ops::conv::run::THIN_CHANNELS;

/// Fewer source channels than this leave seven eighths of K, or three quarters of the rows of A, to zeros, if taps do not
/// fill them: the vector units are as fast then.
pub const MIN_CHANNELS: usize = 4;

/// Anchors along w that share a row of A in a band.
pub const BAND: usize = 8;

/// Voxels along h of a record, padded to a power of two.
const RECORD: usize = 4;

/// What K is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// 32 channels of one tap.
    Channels,
    /// 16 channels of a tap and of the next one along w. Of three taps the second product holds the last one and a neighbour
    /// with zeros for weights.
    Taps {
        /// Whether that is the tap before, so that nothing is read that is not the output's own. At a stride of 2 it is the
        /// voxel after, which may be infinite or no number and make the output so. Rows of A are whole lines then; those of half of
        /// the products would be two halves, which load 5 times as slowly from L1 and 2.6 times from L2.
        overlap: bool,
    },
    /// One or two channels of all taps along h of all taps along w. A halo tile holds a record of three voxels along h, and
    /// zeros for a fourth, for every voxel that an anchor may read first.
    Records {
        /// Of the only source.
        channels: usize,
    },
    /// Two channels of the 10 voxels along w that 8 neighbouring anchors read; see [`Fold::Band`].
    Band,
}

/// See above.
pub struct Scheme {
    pub depth: Depth,
    pub fold: Option<Fold>,
    pub classes: &'static [Class],
}

impl Scheme {
    /// The scheme of a pass from sources to heads of these channels, `None` where the vector units are to be preferred.
    pub fn of(map: Map, sources: &[usize], heads: &[usize], out_space: [usize; 3]) -> Option<Self> {
        let wide = heads.iter().any(|&c| c > THIN_CHANNELS);
        let classes = map.classes();
        match (map, sources, heads) {
            (Map::Gather { kernel: 3, .. }, &[channels @ (1 | 2)], _) if wide => {
                Some(Scheme { depth: Depth::Records { channels }, fold: None, classes })
            }
            (Map::Gather { kernel: 3, stride: 1 }, [2], &[channels @ (1 | 2)]) => {
                Some(Scheme { depth: Depth::Band, fold: Some(Fold::Band { channels }), classes })
            }
            _ if sources.iter().all(|&c| c < MIN_CHANNELS) => None,
            _ if wide => {
                Some(Scheme { depth: Depth::of_channels(map, sources, classes), fold: None, classes })
            }
            _ => {
                let fold = Some(Fold::outputs(map, heads, out_space)?);
                let classes = Fold::outputs_classes();
                Some(Scheme { depth: Depth::of_channels(map, sources, classes), fold, classes })
            }
        }
    }

    /// Lane blocks of heads of these channels.
    pub fn lanes(&self, heads: &[usize]) -> List<Block> {
        self.fold.map_or_else(|| lane_blocks(heads.iter().copied()), Fold::lanes)
    }

    /// Whether register tiles may be columns of neighbouring planes of outputs: of those, taps along d read planes that are
    /// neighbours, too. Strides skip planes, and a scatter's outputs have one or two taps; no network here has records
    /// without a stride.
    pub fn has_columns(&self, map: Map) -> bool {
        map == (Map::Gather { kernel: 3, stride: 1 }) && !matches!(self.depth, Depth::Records { .. })
    }

    /// The head's channel in lane `l` of a row of 16 values that belong to a lane block.
    pub fn channel(&self, lane: Block, l: usize) -> Option<usize> {
        match self.fold {
            Some(fold) => Some(l % fold.channels()),
            None => lane.channel(l),
        }
    }
}

impl Depth {
    /// Channels or taps: what needs fewer products a register tile and lane block.
    fn of_channels(map: Map, sources: &[usize], classes: &[Class]) -> Self {
        // Every class must have two taps along w: of one, half of every K would be a neighbour's.
        if classes.iter().any(|c| c.taps_w.len() < 2) {
            return Depth::Channels;
        }
        let products = |depth: Depth| -> usize {
            let blocks = sources.iter().map(|c| c.div_ceil(depth.channels())).sum::<usize>();
            classes.iter().map(|c| depth.steps(c) * blocks).sum()
        };
        let taps = Depth::Taps { overlap: map.stride() == 1 };
        if products(taps) < products(Depth::Channels) { taps } else { Depth::Channels }
    }

    /// Channels of a block.
    pub fn channels(self) -> usize {
        match self {
            Depth::Channels => 32,
            Depth::Taps { .. } => 16,
            Depth::Records { channels } => channels,
            Depth::Band => 2,
        }
    }

    /// Elements (pairs of bfloat16) between voxels of a halo tile.
    pub fn pitch(self) -> usize {
        match self {
            Depth::Channels | Depth::Taps { .. } | Depth::Band => self.channels() / 2,
            Depth::Records { channels } => channels * RECORD / 2,
        }
    }

    /// Elements of a row of A.
    pub fn elements(self) -> usize {
        match self {
            Depth::Channels | Depth::Taps { .. } => 16,
            Depth::Records { channels } => channels * 3 * RECORD / 2,
            Depth::Band => BAND + 2,
        }
    }

    /// Products of a class and source block.
    pub fn steps(self, class: &Class) -> usize {
        match self {
            Depth::Channels | Depth::Taps { .. } => {
                class.rows.len() * self.along_w(class.taps_w.len()).count()
            }
            Depth::Records { .. } => class.rows.len() / 3,
            Depth::Band => class.rows.len(),
        }
    }

    /// The products of a row of taps: (tap at which A begins, first tap of it that no other product has).
    pub fn along_w(self, taps: usize) -> impl Iterator<Item = (usize, usize)> {
        let width = self.taps();
        let last = if self == (Depth::Taps { overlap: false }) { taps } else { taps - width };
        (0..taps).step_by(width).map(move |tap| (tap.min(last), tap))
    }

    /// Taps along w of a product, of channels or taps.
    fn taps(self) -> usize {
        if matches!(self, Depth::Taps { .. }) { 2 } else { 1 }
    }

    /// Where the weights of a class go: (number in row-major order of (row of taps, tap along w), row of B of channel 0),
    /// the rows of all products one after the other, 32 each.
    pub fn places(self, class: &Class) -> List<(usize, usize)> {
        let taps = class.taps_w.len();
        let mut places = List::with_room(class.rows.len() * taps);
        let mut slot = 0;
        for row in 0..class.rows.len() {
            match self {
                Depth::Channels | Depth::Taps { .. } => {
                    for (first, own) in self.along_w(taps) {
                        for tap in first..first + self.taps() {
                            if (own..taps).contains(&tap) {
                                places.push((row * taps + tap, slot * self.channels()));
                            }
                            slot += 1;
                        }
                    }
                }
                Depth::Records { channels } => places.extend((0..taps).map(|tap| {
                    (row * taps + tap, row / 3 * 2 * LANES + channels * (tap * RECORD + row % 3))
                })),
                Depth::Band => {
                    places.extend((0..taps).map(|tap| (row * taps + tap, row * 2 * LANES + 2 * tap)))
                }
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAPS: Depth = Depth::Taps { overlap: true };
    const GATHER: Map = Map::Gather { kernel: 3, stride: 1 };

    fn depth(map: Map, sources: &[usize], heads: &[usize]) -> Option<Depth> {
        Scheme::of(map, sources, heads, [8; 3]).map(|s| s.depth)
    }

    #[test]
    fn every_tap_has_a_place_of_its_own() {
        let maps = [(GATHER, 27), (Map::Gather { kernel: 1, stride: 1 }, 1), (Map::Scatter, 27)];
        for (map, taps) in maps {
            let records = [1, 2].map(|channels| Depth::Records { channels });
            for depth in records.into_iter().chain([
                Depth::Channels,
                TAPS,
                Depth::Taps { overlap: false },
                Depth::Band,
            ]) {
                if depth != Depth::Channels && map != GATHER {
                    continue;
                }
                let classes = map.classes();
                assert_eq!(classes.iter().map(|c| depth.places(c).len()).sum::<usize>(), taps);
                for class in classes {
                    let mut rows: Vec<usize> = depth.places(class).iter().map(|p| p.1).collect();
                    assert!(rows.iter().all(|&r| r < 32 * depth.steps(class)), "{depth:?} {map:?}");
                    rows.sort();
                    rows.dedup();
                    assert_eq!(rows.len(), depth.places(class).len(), "{depth:?} {map:?}");
                }
            }
        }
    }

    #[test]
    fn the_scheme_follows_the_channels() {
        assert_eq!(depth(GATHER, &[16], &[16]), Some(TAPS));
        let strided = Map::Gather { kernel: 3, stride: 2 };
        assert_eq!(depth(strided, &[16], &[32, 32]), Some(Depth::Taps { overlap: false }));
        assert_eq!(depth(strided, &[32], &[64]), Some(Depth::Channels));
        assert_eq!(depth(GATHER, &[32], &[16]), Some(Depth::Channels));
        assert_eq!(depth(GATHER, &[18], &[16]), Some(Depth::Channels));
        assert_eq!(depth(GATHER, &[16, 16], &[16]), Some(TAPS));
        assert_eq!(depth(Map::Scatter, &[16], &[16]), Some(Depth::Channels));
        assert_eq!(depth(Map::Scatter, &[16, 16], &[2]), Some(TAPS), "folded");
        assert_eq!(depth(Map::Scatter, &[16, 16], &[3]), None);
        assert_eq!(depth(Map::Gather { kernel: 1, stride: 1 }, &[16], &[16]), Some(Depth::Channels));
        assert_eq!(depth(GATHER, &[1], &[16, 16]), Some(Depth::Records { channels: 1 }));
        assert_eq!(depth(strided, &[2], &[16]), Some(Depth::Records { channels: 2 }));
        assert_eq!(depth(GATHER, &[2], &[2]), Some(Depth::Band));
        assert_eq!(depth(GATHER, &[16], &[2]), None);
    }
}

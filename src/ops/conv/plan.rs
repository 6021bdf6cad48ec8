//! How a pass is cut into tiles, tap classes and channel blocks: pure arithmetic on shapes.

use super::Source;
use crate::device::list::List;
use std::sync::LazyLock;

/// Output lanes of a block: one [`crate::device::lanes::Lanes`].
pub const LANES: usize = 16;

/// Input channels of a block of the gather core: the voxels of a tile are this many floats apart, a constant of the
/// micro-kernels' addresses.
pub const CHANNEL_BLOCK: usize = 16;

/// Elements of a voxel in a tile of the gather core: sums over them stay in registers. 32 elements x 27 taps x 32 lanes of
/// weights are 110 KB: they stay in L2 beside a tile.
pub const GROUP_ELEMENTS: usize = 32;

/// Blocks that such a tile holds at most, where elements are pairs of channels.
pub const GROUP: usize = GROUP_ELEMENTS / (CHANNEL_BLOCK / 2);

/// Taps of a pass, or of a class, at most.
pub const MAX_TAPS: usize = 27;

/// Floats of a tile buffer: 192 KB, a fifth of a 1 MB L2, a third of a 512 KB one.
pub const TILE_FLOATS: usize = 48 << 10;

/// Which input voxels feed an output voxel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// `out[o]` = sum over t < kernel of `in[o * stride + t - kernel / 2] * w[t]`; kernel 1 or 3.
    Gather {
        /// Taps an axis.
        kernel: usize,
        /// Input voxels an output voxel.
        stride: usize,
    },
    /// Kernel 3, stride 2, padding 1, the other way round: `out[2 i + t - 1] += in[i] * w[t]`.
    Scatter,
}

impl Map {
    /// Taps an axis.
    pub fn kernel(self) -> usize {
        match self {
            Map::Gather { kernel, .. } => kernel,
            Map::Scatter => 3,
        }
    }

    /// Input voxels between neighbouring anchors. An anchor is an output voxel (gather) or a pair of them
    /// (scatter: 2a and 2a + 1).
    pub fn stride(self) -> usize {
        match self {
            Map::Gather { stride, .. } => stride,
            Map::Scatter => 1,
        }
    }

    /// Output voxels of an anchor along an axis.
    pub const fn outputs(self) -> usize {
        match self {
            Map::Gather { .. } => 1,
            Map::Scatter => 2,
        }
    }

    /// Input voxels before the anchor's own that it reads.
    pub fn pad(self) -> usize {
        match self {
            Map::Gather { kernel, .. } => kernel / 2,
            Map::Scatter => 0,
        }
    }

    /// Input voxels that `anchors` neighbouring anchors read along an axis.
    pub fn extent(self, anchors: usize) -> usize {
        let reach = match self {
            Map::Gather { kernel, .. } => kernel,
            Map::Scatter => 2,
        };
        (anchors - 1) * self.stride() + reach
    }

    /// (Input voxels from an anchor's first one, tap) of what feeds its output of this parity along an axis. Scatter: output 2a
    /// takes tap 1 of input a; output 2a + 1 takes tap 2 of input a and tap 0 of input a + 1.
    pub fn taps(self, parity: usize) -> &'static [(usize, usize)] {
        match (self, parity) {
            (Map::Gather { kernel, .. }, _) => &[(0, 0), (1, 1), (2, 2)][..kernel],
            (Map::Scatter, 0) => &[(0, 1)],
            (Map::Scatter, _) => &[(0, 2), (1, 0)],
        }
    }

    /// (D, H, W) of a class's outputs among `out_space`.
    pub fn class_space(self, class: &Class, out_space: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|a| (out_space[a] - class.parity[a]).div_ceil(self.outputs()))
    }

    /// The tap classes: one for a gather, one per output parity for a scatter.
    pub fn classes(self) -> &'static [Class] {
        static OF: LazyLock<[Vec<Class>; 3]> = LazyLock::new(|| {
            let gather = |kernel| Map::Gather { kernel, stride: 1 };
            [gather(1), gather(3), Map::Scatter].map(Map::make_classes)
        });
        match self {
            Map::Gather { kernel: 1, .. } => &OF[0],
            Map::Gather { .. } => &OF[1],
            Map::Scatter => &OF[2],
        }
    }

    fn make_classes(self) -> Vec<Class> {
        let p = self.outputs();
        let mut classes = Vec::with_capacity(p * p * p);
        for parity in (0..p * p * p).map(|i| [i / (p * p), i / p % p, i % p]) {
            let [of_d, of_h, of_w] = parity.map(|parity| self.taps(parity));
            let rows = of_d.iter().flat_map(|&(dd, kd)| of_h.iter().map(move |&(hh, kh)| (dd, hh, kd, kh)));
            classes.push(Class { parity, rows: rows.collect(), taps_w: of_w.iter().map(|t| t.1).collect() });
        }
        classes
    }
}

/// Output voxels whose taps are the same.
#[derive(Clone, Debug)]
pub struct Class {
    /// Offset of the class's output voxel in its anchor, (D, H, W).
    pub parity: [usize; 3],
    /// Input rows an output row reads: offsets (dd, hh) in the tile and taps (kd, kh).
    pub rows: Vec<(usize, usize, usize, usize)>,
    /// Taps along w; the input voxels are neighbours from the anchor's own on.
    pub taps_w: Vec<usize>,
}

/// A run of channels of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Index of the source or head.
    pub tensor: usize,
    /// First channel.
    pub first: usize,
    /// Number of channels.
    pub len: usize,
}

impl Block {
    /// The channel that is lane `l`.
    pub fn channel(self, l: usize) -> Option<usize> {
        (l < self.len).then_some(self.first + l)
    }
}

/// Cuts the channels of each tensor into runs of at most `size`, never across tensors.
pub fn blocks(channels: impl IntoIterator<Item = usize>, size: usize) -> List<Block> {
    let cut = |(tensor, c): (usize, usize)| {
        (0..c).step_by(size).map(move |first| Block { tensor, first, len: size.min(c - first) })
    };
    channels.into_iter().enumerate().flat_map(cut).collect()
}

/// Blocks of at most `size` channels of `sources`.
pub fn source_blocks(sources: &[Source], size: usize) -> List<Block> {
    blocks(sources.iter().map(|s| s.channels), size)
}

/// Lane blocks of tensors with these channels.
pub fn lane_blocks(channels: impl IntoIterator<Item = usize>) -> List<Block> {
    blocks(channels, LANES)
}

/// Anchors (D, H) of a tile; a tile always spans all of W.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Anchors along D.
    pub d: usize,
    /// Anchors along H.
    pub h: usize,
}

impl Tile {
    /// The largest tile of at most 8 rows whose buffer holds `voxel` floats an input voxel in [`TILE_FLOATS`]. Up to
    /// eight rows cost less halo than eight planes of one row, and W is never cut.
    pub fn choose(map: Map, anchors: [usize; 3], voxel: usize) -> Self {
        let floats = |d, h| map.extent(d) * map.extent(h) * map.extent(anchors[2]) * voxel;
        let h = (1..=anchors[1].min(8)).rev().find(|&h| floats(1, h) <= TILE_FLOATS).unwrap_or(1);
        let d = (1..=anchors[0].min(8)).rev().find(|&d| floats(d, h) <= TILE_FLOATS).unwrap_or(1);
        Tile { d, h }
    }

    /// All tiles of a pass, clipped to the volume. D runs fastest: neighbours in the list share input planes.
    pub fn origins(self, n: usize, anchors: [usize; 3]) -> List<Origin> {
        let mut list = List::with_room(n * anchors[0].div_ceil(self.d) * anchors[1].div_ceil(self.h));
        for n in 0..n {
            for h in (0..anchors[1]).step_by(self.h) {
                for d in (0..anchors[0]).step_by(self.d) {
                    let size = Tile { d: self.d.min(anchors[0] - d), h: self.h.min(anchors[1] - h) };
                    list.push(Origin { n, d, h, size });
                }
            }
        }
        list
    }
}

/// Where a tile lies.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Sample.
    pub n: usize,
    /// First anchor along D.
    pub d: usize,
    /// First anchor along H.
    pub h: usize,
    /// Anchors.
    pub size: Tile,
}

impl Origin {
    /// Input planes of this tile that the tile `before` reads too: its last ones, this one's first.
    pub fn shared_planes(&self, map: Map, before: &Origin) -> usize {
        let follows = (before.n, before.h, before.d + before.size.d) == (self.n, self.h, self.d);
        if follows { map.extent(1).saturating_sub(map.stride()) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_anchor_lies_in_one_tile_and_every_tile_in_l2() {
        for map in [Map::Gather { kernel: 3, stride: 1 }, Map::Gather { kernel: 3, stride: 2 }, Map::Scatter]
        {
            for anchors in [[96, 96, 96], [6, 6, 6], [7, 9, 5], [1, 1, 1], [48, 24, 160]] {
                let tile = Tile::choose(map, anchors, 32);
                let mut seen = vec![0u8; 2 * anchors[0] * anchors[1]];
                for Origin { n, d: d0, h: h0, size } in tile.origins(2, anchors) {
                    for d in d0..d0 + size.d {
                        (h0..h0 + size.h).for_each(|h| seen[(n * anchors[0] + d) * anchors[1] + h] += 1);
                    }
                }
                assert!(seen.iter().all(|&s| s == 1), "{map:?} {anchors:?} {tile:?}");
                let floats = map.extent(tile.d) * map.extent(tile.h) * map.extent(anchors[2]) * 32;
                assert!(
                    floats <= TILE_FLOATS || tile == (Tile { d: 1, h: 1 }),
                    "{map:?} {anchors:?} {tile:?}"
                );
            }
        }
    }

    #[test]
    fn scatter_classes_hold_each_tap_once() {
        let mut taps: Vec<_> = Map::Scatter
            .classes()
            .iter()
            .flat_map(|c| {
                c.rows.iter().flat_map(|r| c.taps_w.iter().map(|&kw| (r.2, r.3, kw))).collect::<Vec<_>>()
            })
            .collect();
        taps.sort();
        let all: Vec<_> = (0..27).map(|t| (t / 9, t / 3 % 3, t % 3)).collect();
        assert_eq!(taps, all);
    }
}

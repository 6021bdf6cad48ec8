//! Halo tiles of the outer-product core, laid out by channels: K runs along w.
//!
//! The source: `[plane d][channel][parity of h][parity of w][row][column]` in bfloat16, where rows and columns of a stride
//! of 2 are apart by parity, so that a tap's voxels are neighbours at either stride. The lane sources:
//! `[plane d][lane block][pair of positions][16]`, pairs of voxels along w. In both, position h * pitch + w is an anchor's own: one K of
//! 32 runs over rows' ends, where the lane sources hold zeros.
//!
//! A thin source would leave most of 16 channels empty. Its taps along h and w become channels instead, each a copy of the
//! plane with its voxels where the anchors' own are.

use super::Lines;
use crate::device::amx::ROWS;
use crate::device::bf16::{narrow, narrowed};
use crate::device::cpu::vectorised;
use crate::ops::conv::narrow::transform_neighbours;
use crate::ops::conv::plan::{Block, LANES, Map, Tile};
use crate::ops::conv::row::mapped_row;
use crate::ops::conv::transpose::transpose;
use crate::ops::conv::{Affine, Source};

/// Voxels of a product.
const K: usize = 32;

/// The layout of both sides for tiles of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    map: Map,
    /// Channels of a thin source.
    copied: Option<usize>,
    /// Input voxels that the tile reads, (D, H, W).
    extent: [usize; 3],
    /// Anchors, (D, H, W).
    anchors: [usize; 3],
    /// Positions of a row.
    pitch: usize,
    /// Rows of a parity.
    rows: usize,
    /// Parities along h and along w.
    parities: usize,
    /// Source channels or copies, whole blocks of 16.
    channels: usize,
    /// Lane blocks.
    lanes: usize,
}

impl Planes {
    /// The layout for a tile of `size` whose rows have `width` anchors.
    pub fn new(map: Map, size: Tile, width: usize, channels: usize, lanes: usize) -> Self {
        let extent = [size.d, size.h, width].map(|anchors| map.extent(anchors));
        let stride = map.stride();
        Planes {
            map,
            copied: None,
            extent,
            anchors: [size.d, size.h, width],
            // Pairs do not cross rows.
            pitch: extent[2].div_ceil(stride).next_multiple_of(2),
            rows: extent[1].div_ceil(stride),
            parities: stride,
            channels: channels.next_multiple_of(LANES),
            lanes,
        }
    }

    /// The same for a thin source of so many channels: [plane d][tap along h, along w, channel][row][column].
    pub fn of_copies(map: Map, size: Tile, width: usize, channels: usize, lanes: usize) -> Self {
        Planes {
            copied: Some(channels),
            pitch: width.next_multiple_of(2),
            rows: size.h,
            parities: 1,
            channels: (map.kernel().pow(2) * channels).next_multiple_of(LANES),
            ..Planes::new(map, size, width, channels, lanes)
        }
    }

    /// Source channels or copies, whole blocks of 16.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of products along the anchors of a plane.
    pub fn steps(&self) -> usize {
        ((self.anchors[1] - 1) * self.pitch + self.anchors[2]).div_ceil(K)
    }

    /// bfloat16 between channels.
    pub fn channel_pitch(&self) -> usize {
        self.parities * self.parities * self.rows * self.pitch
    }

    /// bfloat16 of the source, with the rest of a K behind the last position.
    pub fn source_len(&self) -> usize {
        self.extent[0] * self.channels * self.channel_pitch() + K
    }

    /// Pairs of the lane sources, 16 lanes each counted as one float.
    pub fn lane_len(&self) -> usize {
        self.anchors[0] * self.lanes * self.lane_block_len()
    }

    /// The same of one plane and lane block.
    pub fn lane_block_len(&self) -> usize {
        self.steps() * K / 2 * LANES
    }

    /// Where K = 32 of product `step` of anchor plane `d` begins: bfloat16 in the source, floats in the lane sources.
    pub fn step(&self, d: usize, step: usize) -> (usize, usize) {
        let plane = d * self.map.stride() * self.channels * self.channel_pitch();
        (plane + step * K, d * self.lanes * self.lane_block_len() + step * ROWS * LANES)
    }

    /// What a tap and a block of 16 channels add to a step's place in the source.
    pub fn tap(&self, (dd, hh, ww): (usize, usize, usize), channel: usize) -> usize {
        let parity = hh % self.parities * self.parities + ww % self.parities;
        (dd * self.channels + channel) * self.channel_pitch()
            + parity * self.rows * self.pitch
            + hh / self.parities * self.pitch
            + ww / self.parities
    }

    /// Copies a block's part of the source that begins at anchors (d0, h0) of sample n. `out` has [`Self::source_len`]
    /// values, 0 or written by this before; voxels outside the volume become 0.
    pub fn load_source(
        &self,
        source: &Source,
        block: Block,
        space: [usize; 3],
        (n, d0, h0): (usize, usize, usize),
        out: &mut [u16],
        lines: &mut Lines,
    ) {
        if let Some(channels) = self.copied {
            return self.load_copies(source, channels, space, (n, d0, h0), out, lines);
        }
        let [_, extent_h, extent_w] = self.extent;
        let (stride, pad) = (self.map.stride(), self.map.pad());
        let inside_w = space[2].min(extent_w - pad);
        let affine = source.affine(n, block);
        let Lines { row, widened, .. } = lines;
        // Voxels of 16 channels; their channel rows with the halo around them, which stays 0.
        row.clear();
        row.resize(LANES * (inside_w + extent_w), 0.0);
        let (voxels, rows) = row.split_at_mut(LANES * inside_w);
        for index in 0..self.extent[0] * extent_h {
            let (plane, line) = (index / extent_h, index % extent_h);
            // Wrapping below 0 makes a coordinate huge, which the comparison rejects.
            let d = (d0 * stride + plane).wrapping_sub(pad);
            let h = (h0 * stride + line).wrapping_sub(pad);
            for first in (0..block.len).step_by(LANES) {
                let len = LANES.min(block.len - first);
                let at = self.tap((plane, line, 0), first);
                if d >= space[0] || h >= space[1] {
                    for c in 0..len {
                        for parity in 0..stride {
                            let at = at + c * self.channel_pitch() + parity * self.rows * self.pitch;
                            out[at..][..self.pitch].fill(0);
                        }
                    }
                    continue;
                }
                let start = ((n * space[0] + d) * space[1] + h) * space[2] * source.channels;
                let span = (inside_w - 1) * source.channels + len;
                let x = source.row(start + block.first + first, span, widened);
                let affine: Affine = affine.map(|(scale, shift, slope)| {
                    (&scale[first..first + len], &shift[first..first + len], slope)
                });
                let voxels = mapped_row(&mut voxels[..inside_w * len], x, source.channels, len, affine);
                transpose(voxels, len, &mut rows[pad..], extent_w);
                for (c, row) in rows.chunks_exact(extent_w).take(len).enumerate() {
                    let out = &mut out[at + c * self.channel_pitch()..];
                    if stride == 1 {
                        narrow(row, &mut out[..extent_w]);
                    } else {
                        let (even, odd) = out.split_at_mut(self.rows * self.pitch);
                        narrow_parities(row, even, odd);
                    }
                }
            }
        }
    }

    /// [`Self::load_source`] of a thin source.
    fn load_copies(
        &self,
        source: &Source,
        channels: usize,
        space: [usize; 3],
        (n, d0, h0): (usize, usize, usize),
        out: &mut [u16],
        lines: &mut Lines,
    ) {
        let ([planes, extent_h, extent_w], [_, anchors_h, width]) = (self.extent, self.anchors);
        let (stride, pad, kernel) = (self.map.stride(), self.map.pad(), self.map.kernel());
        let inside_w = space[2].min(extent_w - pad);
        let affine = source.affine(n, Block { tensor: 0, first: 0, len: channels });
        let Lines { row, widened, narrowed } = lines;
        row.clear();
        row.resize(channels * (inside_w + extent_w), 0.0);
        let (voxels, rows) = row.split_at_mut(channels * inside_w);
        // A channel's row: voxels of even places, of odd ones; all of them at stride 1.
        let half = extent_w.div_ceil(stride);
        narrowed.clear();
        narrowed.resize(stride * half, 0);
        for (plane, line) in (0..planes).flat_map(|d| (0..extent_h).map(move |h| (d, h))) {
            // Wrapping below 0 makes a coordinate huge, which the comparison rejects.
            let d = (d0 * stride + plane).wrapping_sub(pad);
            let h = (h0 * stride + line).wrapping_sub(pad);
            if d < space[0] && h < space[1] {
                let start = ((n * space[0] + d) * space[1] + h) * space[2] * channels;
                let x = source.row(start, inside_w * channels, widened);
                let voxels = mapped_row(voxels, x, channels, channels, affine);
                transpose(voxels, channels, &mut rows[pad..], extent_w);
            } else {
                rows.fill(0.0);
            }
            for (c, row) in rows.chunks_exact(extent_w).enumerate() {
                if stride == 1 {
                    narrow(row, narrowed);
                } else {
                    let (even, odd) = narrowed.split_at_mut(half);
                    narrow_parities(row, even, odd);
                }
                // The anchors that read this row, by their tap along h.
                for kh in (0..kernel).filter(|&kh| line >= kh && (line - kh).is_multiple_of(stride)) {
                    let anchor = (line - kh) / stride;
                    for kw in (0..kernel).filter(|_| anchor < anchors_h) {
                        let from = &narrowed[kw % stride * half + kw / stride..][..width];
                        let to = self.tap((plane, anchor, 0), (kh * kernel + kw) * channels + c);
                        out[to..][..width].copy_from_slice(from);
                    }
                }
            }
        }
    }

    /// Copies the lane sources of the anchors from (d0, h0) of sample n on. `out` has [`Self::lane_len`] floats, 0 or
    /// written by this before. `row` is scratch.
    pub fn load_lanes(
        &self,
        sources: &[Source],
        lanes: &[Block],
        space: [usize; 3],
        (n, d0, h0): (usize, usize, usize),
        out: &mut [f32],
        row: &mut Vec<f32>,
    ) {
        let [_, anchors_h, width] = self.anchors;
        for (index, &block) in lanes.iter().enumerate() {
            let source = &sources[block.tensor];
            let affine = source.affine(n, block);
            for (d, h) in (0..self.anchors[0]).flat_map(|d| (0..anchors_h).map(move |h| (d, h))) {
                let voxel = ((n * space[0] + d0 + d) * space[1] + h0 + h) * space[2];
                let start = voxel * source.channels + block.first;
                let span = (width - 1) * source.channels + block.len;
                let at = (d * self.lanes + index) * self.lane_block_len() + h * self.pitch / 2 * LANES;
                let out = &mut out[at..][..width.div_ceil(2) * LANES];
                let x = (source.data.part(start, span), source.channels);
                transform_neighbours((out, LANES), x, block.len, affine, row);
            }
        }
    }
}

vectorised! {
    /// Rounds values of even and of odd places to bfloat16.
    fn narrow_parities(x: &[f32], even: &mut [u16], odd: &mut [u16]) {
        let pairs = x.chunks_exact(2);
        if let [last] = pairs.remainder() {
            even[x.len() / 2] = narrowed(*last);
        }
        for ((even, odd), x) in even.iter_mut().zip(odd).zip(pairs) {
            (*even, *odd) = (narrowed(x[0]), narrowed(x[1]));
        }
    }
}

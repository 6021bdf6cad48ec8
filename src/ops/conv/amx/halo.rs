//! A halo tile of the gather core in memory.

use super::Lines;
use super::micro::{Step, TAPS};
use super::scheme::{BAND, Depth};
use crate::device::amx::{ROWS, TILE_BYTES};
use crate::device::bf16::pair;
use crate::device::cpu::vectorised;
use crate::ops::conv::Source;
use crate::ops::conv::plan::{Block, Class, Map, Origin, Tile};
use crate::ops::conv::row::transform_row;
use crate::ops::conv::tile::{Element, Order, Place, load};

/// Elements after the last block: a register tile's last 15 rows may lie behind it, 32 elements apart, and read 16 each.
pub const SLACK: usize = (ROWS - 1) * 2 * 16 + 16;

/// Where things lie in tiles of one size.
#[derive(Clone, Copy, Debug)]
pub struct Halo {
    depth: Depth,
    map: Map,
    /// Input voxels that the tile reads, (D, H, W).
    extent: [usize; 3],
    /// Voxels of a row in memory.
    row: usize,
    /// Rows of a plane in memory.
    rows: usize,
}

impl Halo {
    /// Tiles of `size` whose rows have `anchors_w` anchors.
    pub fn new(depth: Depth, map: Map, size: Tile, anchors_w: usize) -> Self {
        let extent = [size.d, size.h, anchors_w].map(|anchors| map.extent(anchors));
        // Anchors of different rows must lie a whole number of positions apart.
        let (row, rows) = match depth {
            // Rows begin where lines do: a voxel is half a line.
            Depth::Taps { overlap: false } => (extent[2].next_multiple_of(2), extent[1]),
            Depth::Channels | Depth::Taps { .. } => (extent[2], extent[1]),
            Depth::Records { .. } => (extent[2].next_multiple_of(map.stride()), size.h),
            Depth::Band => (extent[2].next_multiple_of(BAND), extent[1]),
        };
        Halo { depth, map, extent, row, rows }
    }

    /// Elements of a block.
    pub fn len(&self) -> usize {
        self.extent[0] * self.rows * self.row * self.depth.pitch()
    }

    /// Elements between positions: an anchor along w, or as many as share a row of A.
    pub fn between(&self) -> usize {
        self.depth.pitch() * if self.depth == Depth::Band { BAND } else { self.map.stride() }
    }

    /// Positions of a row of `anchors` anchors.
    pub fn positions(&self, anchors: usize) -> usize {
        if self.depth == Depth::Band { anchors.div_ceil(BAND) } else { anchors }
    }

    /// Rows of positions between planes of anchors, positions between rows of anchors.
    pub fn pitches(&self) -> (usize, usize) {
        match self.depth {
            Depth::Channels | Depth::Taps { .. } => (self.rows, self.row),
            Depth::Records { .. } => (self.map.stride() * self.rows, self.row / self.map.stride()),
            Depth::Band => (self.rows, self.row / BAND),
        }
    }

    /// Elements between planes of positions.
    pub fn plane(&self) -> usize {
        let (rows, row) = self.pitches();
        rows * row * self.between()
    }

    /// Where the A of every product of a class begins, of each of `blocks` blocks. `along_d`: those that differ in their tap
    /// along d only come one after the other, for columns, and are added in that order wherever there is none, too.
    pub fn steps(&self, class: &Class, blocks: usize, along_d: bool, steps: &mut Vec<Step>) {
        // Products differ in their tap along d only where they are a third of a block's apart.
        let products = self.depth.steps(class);
        let third = products / TAPS;
        let place = |number: usize| match along_d {
            true => number % third * TAPS + number / third,
            false => number,
        };
        steps.clear();
        steps.resize(blocks * products, Step { a: 0, b: 0 });
        for (block, of_block) in steps.chunks_exact_mut(products).enumerate() {
            let mut number = 0;
            let mut push = |element: usize| {
                let b = (block * products + number) * TILE_BYTES;
                of_block[place(number)] = Step { a: 4 * element, b };
                number += 1;
            };
            for &(dd, hh, _, _) in &class.rows {
                let row = block * self.len() + (dd * self.rows + hh) * self.row * self.depth.pitch();
                match self.depth {
                    Depth::Channels | Depth::Taps { .. } => self
                        .depth
                        .along_w(class.taps_w.len())
                        .for_each(|(tap, _)| push(row + tap * self.depth.pitch())),
                    Depth::Records { .. } if hh > 0 => {}
                    Depth::Records { .. } | Depth::Band => push(row),
                }
            }
        }
    }

    /// Copies a block of a source, mapped, at this place; voxels outside the volume and channels beyond the block are 0.
    /// Planes of the tile before, if `tile` holds one, are moved, not loaded; records never are.
    pub fn load(&self, source: &Source, block: Block, place: &Place, tile: &mut [f32], lines: &mut Lines) {
        if block.len < self.depth.channels() && place.before.is_none() {
            tile.fill(0.0);
        }
        if let Depth::Records { channels } = self.depth {
            return self.load_records(source, channels, place, tile, lines);
        }
        let layout = (Order::Voxels { pitch: self.depth.pitch() }, Element::Channels);
        load(source, block, &Place { row: self.row, ..*place }, layout, tile, &mut lines.row);
    }

    /// Records: `[plane][anchor along h][w][kh][channel]`.
    fn load_records(
        &self,
        source: &Source,
        channels: usize,
        place: &Place,
        tile: &mut [f32],
        lines: &mut Lines,
    ) {
        let Place { space: [sd, sh, sw], origin: &Origin { n, d: d0, h: h0, .. }, .. } = *place;
        let ([ed, eh, ew], stride, pad) = (self.extent, self.map.stride(), self.map.pad());
        let inside_w = sw.min(ew - pad);
        let affine = source.affine(n, Block { tensor: 0, first: 0, len: channels });
        // Rows of a plane with zeros around, and one that was widened.
        let Lines { row: plane, widened, .. } = lines;
        let row_floats = self.row * channels;
        plane.clear();
        plane.resize(eh * row_floats, 0.0);
        let record_row = self.row * self.depth.pitch();
        for (d, out) in tile.chunks_exact_mut(self.rows * record_row).take(ed).enumerate() {
            // Wrapping below 0 makes a coordinate huge, which the comparison rejects.
            let d = (d0 * stride + d).wrapping_sub(pad);
            for (h, row) in plane.chunks_exact_mut(row_floats).enumerate() {
                let h = (h0 * stride + h).wrapping_sub(pad);
                let row = &mut row[pad * channels..][..inside_w * channels];
                if d < sd && h < sh {
                    let start = ((n * sd + d) * sh + h) * sw * channels;
                    let x = source.row(start, inside_w * channels, widened);
                    transform_row(row, channels, x, channels, channels, affine);
                } else {
                    row.fill(0.0);
                }
            }
            for (h, out) in out.chunks_exact_mut(record_row).enumerate() {
                let rows = &plane[h * stride * row_floats..];
                let (first, second, third) = (rows, &rows[row_floats..], &rows[2 * row_floats..]);
                if channels == 1 {
                    records(first, second, third, out);
                } else {
                    paired_records(first, second, third, out);
                }
            }
        }
    }
}

vectorised! {
    /// `out[2 w]`, `out[2 w + 1]` = the three rows' values and a 0, in bfloat16.
    fn records(first: &[f32], second: &[f32], third: &[f32], out: &mut [f32]) {
        for (((out, &a), &b), &c) in out.as_chunks_mut::<2>().0.iter_mut().zip(first).zip(second).zip(third) {
            *out = [pair(a, b), pair(c, 0.0)];
        }
    }

    /// `out[4 w + i]` = the two channels of row i, or zeros.
    fn paired_records(first: &[f32], second: &[f32], third: &[f32], out: &mut [f32]) {
        let rows = [first, second, third].map(|row| row.as_chunks::<2>().0);
        for (((out, a), b), c) in out.as_chunks_mut::<4>().0.iter_mut().zip(rows[0]).zip(rows[1]).zip(rows[2]) {
            *out = [pair(a[0], a[1]), pair(b[0], b[1]), pair(c[0], c[1]), 0.0];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::amx::ROW_BYTES;

    #[test]
    fn rows_of_a_stride_of_two_are_lines() {
        let map = Map::Gather { kernel: 3, stride: 2 };
        let depth = Depth::Taps { overlap: false };
        for width in [1, 2, 5, 24] {
            let halo = Halo::new(depth, map, Tile { d: 3, h: 4 }, width);
            let mut steps = Vec::new();
            halo.steps(&map.classes()[0], 2, false, &mut steps);
            assert_eq!(steps.len(), 2 * 9 * 2, "blocks, rows of taps, products");
            for step in &steps {
                assert!(step.a.is_multiple_of(ROW_BYTES), "{step:?} of {width} anchors");
            }
            let (rows, row) = halo.pitches();
            for apart in [1, row, rows * row].map(|positions| 4 * positions * halo.between()) {
                assert!(apart.is_multiple_of(ROW_BYTES), "{width} anchors");
            }
        }
    }
}

//! Some planes and rows of tiles, all of W: what a task transforms at once.

use super::super::plan::{Block, LANES, Map, Origin, Tile};
use super::super::tile::{Element, Order, Place, load_rows};
use super::super::{Problem, Source};
use super::transform::{Halves, PRODUCTS, Plane, gradients, inputs};
use crate::device::cpu::Lanes;
use crate::tensor::Values;

/// One slab of a pass.
#[derive(Clone, Copy)]
pub struct Slab<'a> {
    /// The pass.
    pub problem: &'a Problem,
    /// Where it begins and what it holds, in tiles.
    pub origin: &'a Origin,
    /// Tiles along W.
    pub tiles_w: usize,
}

/// Tiles of a slab side by side.
pub struct Run {
    /// Number of the first one.
    pub first: usize,
    /// How many.
    pub tiles: usize,
    /// Their first output voxel, samples outermost.
    pub voxel: usize,
    /// Rows of them in the volume.
    pub height: usize,
    /// Voxels of a row in the volume.
    pub width: usize,
}

/// What is transformed: voxels with a halo to the products' inputs, or gradients of outputs to the products' gradients.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the layer reads.
    Inputs,
    /// Gradients of what it writes.
    Gradients,
}

/// Where one channel block of it goes: `[product][plane][tile row][tile][operands of 16 channels]`.
pub struct Products<'a> {
    /// All products', from the block's first float on.
    pub floats: &'a mut [f32],
    /// Floats between products.
    pub pitch: usize,
    /// Floats between tiles.
    pub step: usize,
}

/// What tasks use one after the other.
#[derive(Default)]
pub struct Lines {
    /// A mapped row.
    row: Vec<f32>,
    /// The mapped rows of one plane of the slab, halo included.
    plane: Vec<f32>,
}

impl Slab<'_> {
    /// Tiles of all planes.
    pub fn tiles(&self) -> usize {
        self.origin.size.d * self.plane_tiles()
    }

    /// Tiles of one plane.
    pub fn plane_tiles(&self) -> usize {
        self.origin.size.h * self.tiles_w
    }

    /// Tiles of all planes and of the halo's.
    pub fn input_tiles(&self) -> usize {
        (self.origin.size.d + 2) * self.plane_tiles()
    }

    /// `count` tiles from tile `first` on, row by row.
    pub fn runs(&self, first: usize, count: usize) -> impl Iterator<Item = Run> {
        let Slab { problem, origin, tiles_w } = *self;
        let [space_d, space_h, space_w] = problem.out_space;
        let mut tile = first;
        std::iter::from_fn(move || {
            let left = first + count - tile;
            if left == 0 {
                return None;
            }
            let (line, tile_w) = (tile / tiles_w, tile % tiles_w);
            let tiles = left.min(tiles_w - tile_w);
            let (d, h) = (origin.d + line / origin.size.h, 2 * (origin.h + line % origin.size.h));
            let run = Run {
                first: tile,
                tiles,
                voxel: ((origin.n * space_d + d) * space_h + h) * space_w + 2 * tile_w,
                height: (space_h - h).min(2),
                width: (space_w - 2 * tile_w).min(2 * tiles),
            };
            tile += tiles;
            Some(run)
        })
    }

    /// Transforms one channel block; lanes beyond its channels are unspecified.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    pub unsafe fn transform<V: Lanes>(
        &self,
        side: Side,
        source: &Source,
        block: Block,
        to: Products,
        lines: &mut Lines,
    ) {
        let Products { floats, pitch, step } = to;
        let (size, kernel) = (self.origin.size, if side == Side::Inputs { 3 } else { 1 });
        let size = Tile { d: size.d, h: 2 * size.h };
        let origin = Origin { h: 2 * self.origin.h, size, ..*self.origin };
        let place = Place {
            map: Map::Gather { kernel, stride: 1 },
            // Stride 1: both sides lie on one space.
            space: self.problem.space,
            anchors_w: 2 * self.tiles_w,
            origin: &origin,
            before: None,
        };
        let (planes, rows) = (size.d + kernel - 1, size.h + kernel - 1);
        let row_floats = (2 * self.tiles_w + kernel - 1) * V::OPERANDS;
        let last = (planes * self.plane_tiles() - 1) * step + V::OPERANDS;
        assert!((PRODUCTS - 1) * pitch + last <= floats.len(), "all products of all tiles fit");
        assert!(side == Side::Inputs || V::OPERANDS == LANES, "gradients are transformed to f32");
        // A plane before it is read.
        let prefetch = |d: usize, h: usize| {
            if d + 1 < planes {
                let part = (d + 1) * self.origin.size.h + h;
                place.prefetch(source, block, (part, planes * self.origin.size.h));
            }
        };
        // What is stored is what is multiplied: no copy of it is needed.
        let as_stored = V::OPERANDS < LANES && side == Side::Inputs && block.len == LANES;
        if let (Values::Bf16(x), true) = (source.data, as_stored) {
            debug_assert!(source.pending.is_none(), "values of bfloat16 have no map");
            let (zeros, width) = ([0; LANES], self.problem.space[2]);
            let row = |index: usize| match place.source_row(index, source.channels) {
                Some(start) => {
                    let span = (width - 1) * source.channels + LANES;
                    (x[start + block.first..][..span].as_ptr(), source.channels)
                }
                None => (zeros.as_ptr(), 0),
            };
            for (d, h) in (0..planes).flat_map(|d| (0..self.origin.size.h).map(move |h| (d, h))) {
                prefetch(d, h);
                let first = d * rows + 2 * h;
                let halves =
                    Halves { rows: [row(first), row(first + 1), row(first + 2), row(first + 3)], width };
                let to = floats[(d * self.origin.size.h + h) * self.tiles_w * step..].as_mut_ptr();
                // SAFETY: rows are as long as was checked, or of zeros; products as was asserted.
                unsafe { inputs::<V>(&halves, self.tiles_w, to, (pitch, step)) };
            }
            return;
        }
        let Lines { row, plane } = lines;
        plane.resize(rows * row_floats, 0.0);
        let layout = (Order::Voxels { pitch: V::OPERANDS }, Element::of_voxels(self.problem.operands));
        for d in 0..planes {
            load_rows(source, block, &place, layout, d * rows..(d + 1) * rows, plane, row);
            for h in 0..self.origin.size.h {
                prefetch(d, h);
                let x = plane[2 * h * row_floats..].as_ptr();
                let to = floats[(d * self.origin.size.h + h) * self.tiles_w * step..].as_mut_ptr();
                // SAFETY: the rows of a tile are in the plane, `2 tiles_w` voxels and the kernel's halo long, and every
                // product of a row of tiles is in `floats`, as was asserted.
                unsafe {
                    match side {
                        Side::Inputs => {
                            inputs::<V>(&Plane { x, row: row_floats }, self.tiles_w, to, (pitch, step));
                        }
                        Side::Gradients => gradients::<V>(x, row_floats, self.tiles_w, to, (pitch, step)),
                    }
                }
            }
        }
    }
}

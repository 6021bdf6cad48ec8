//! Some planes and rows of tiles, all of W: what a task transforms at once.

use super::super::plan::{Block, CHANNEL_BLOCK, Map, Origin, Tile};
use super::super::tile::{Element, Order, Place, load_rows};
use super::super::{Problem, Source};
use super::transform::{PRODUCTS, gradients, inputs};
use crate::device::cpu::Lanes;

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

/// What is transformed: voxels with a halo to the products' inputs, or gradients of outputs to the products' gradients.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the layer reads.
    Inputs,
    /// Gradients of what it writes.
    Gradients,
}

/// Where one channel block of it goes: `[product][plane][tile row][tile][16 channels]`.
pub struct Products<'a> {
    /// All products', from the block's first float on.
    pub floats: &'a mut [f32],
    /// Floats between products.
    pub pitch: usize,
    /// Floats between tiles.
    pub step: usize,
}

/// What tasks of a thread use one after the other.
#[derive(Default)]
pub struct Scratch {
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
        scratch: &mut Scratch,
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
        let row_floats = (2 * self.tiles_w + kernel - 1) * CHANNEL_BLOCK;
        let last = (planes * self.plane_tiles() - 1) * step + CHANNEL_BLOCK;
        assert!((PRODUCTS - 1) * pitch + last <= floats.len(), "all products of all tiles fit");
        let Scratch { row, plane } = scratch;
        plane.resize(rows * row_floats, 0.0);
        let layout = (Order::Voxels { pitch: CHANNEL_BLOCK }, Element::Single);
        for d in 0..planes {
            load_rows(source, block, &place, layout, d * rows..(d + 1) * rows, plane, row);
            for h in 0..self.origin.size.h {
                let x = plane[2 * h * row_floats..].as_ptr();
                let to = floats[(d * self.origin.size.h + h) * self.tiles_w * step..].as_mut_ptr();
                // SAFETY: the rows of a tile are in the plane, `2 tiles_w` voxels and the kernel's halo long, and every
                // product of a row of tiles is in `floats`, as was asserted.
                unsafe {
                    match side {
                        Side::Inputs => inputs::<V>(x, row_floats, self.tiles_w, to, (pitch, step)),
                        Side::Gradients => gradients::<V>(x, row_floats, self.tiles_w, to, (pitch, step)),
                    }
                }
            }
        }
    }
}

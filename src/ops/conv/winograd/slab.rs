//! Some planes and rows of tiles, all of W: what a task transforms at once.

use super::super::plan::{Block, LANES, Map, Origin, Tile};
use super::super::tile::{Element, Order, Place, load_rows};
use super::super::{Problem, Source};
use super::filtering::{Elements, Filtering, MOST};
use super::transform::{Halves, Plane, inputs};
use crate::device::lanes::Lanes;
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

/// Where the transforms of one channel block go: `[element][plane][tile row][tile][operands of 16 channels]`, or `[pair of
/// tiles][16 pairs]`.
pub struct Destination<'a> {
    /// All elements', from the block's first float on.
    pub floats: &'a mut [f32],
    /// Floats between elements.
    pub pitch: usize,
    /// Floats between tiles: half of those between pairs.
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

    /// Tiles of all planes that `map` reads.
    pub fn input_tiles(&self, map: Map) -> usize {
        map.extent(self.origin.size.d) * self.plane_tiles()
    }

    /// Where among the transformed planes those begin that are `offset` planes behind each anchor's first one. Of stride 2 the
    /// even ones come first, then the odd ones: planes of neighbouring anchors are neighbours.
    pub fn plane(&self, map: Map, offset: usize) -> usize {
        match map.stride() {
            2 if offset % 2 == 1 => self.origin.size.d + 1 + offset / 2,
            stride => offset / stride,
        }
    }

    /// `count` tiles from tile `first` on, row by row, as outputs of this parity along d.
    pub fn runs<F: Filtering>(&self, parity: usize, first: usize, count: usize) -> impl Iterator<Item = Run> {
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
            let d = (origin.d + line / origin.size.h) * F::MAP.outputs() + parity;
            let h = (origin.h + line % origin.size.h) * F::OUTPUTS;
            let w = tile_w * F::OUTPUTS;
            let run = Run {
                first: tile,
                tiles,
                voxel: ((origin.n * space_d + d) * space_h + h) * space_w + w,
                height: (space_h - h).min(F::OUTPUTS),
                width: (space_w - w).min(F::OUTPUTS * tiles),
            };
            tile += tiles;
            Some(run)
        })
    }

    /// Transforms one channel block; lanes beyond its channels are unspecified. TILES are those of [`inputs()`].
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    pub unsafe fn transform<E: Elements, V: Lanes, const TILES: usize>(
        &self,
        source: &Source,
        block: Block,
        to: Destination,
        lines: &mut Lines,
    ) {
        let Destination { floats, pitch, step } = to;
        let (size, map) = (self.origin.size, E::MAP);
        let size = Tile { d: size.d, h: 2 * size.h };
        let origin = Origin { h: 2 * self.origin.h, size, ..*self.origin };
        // Gradients of outputs, which a map of one tap reads, lie on the anchors.
        let space = if map.kernel() == 1 { self.problem.out_space } else { self.problem.space };
        let place = Place { map, space, row: map.extent(2 * self.tiles_w), origin: &origin, before: None };
        let (planes, rows) = (map.extent(size.d), map.extent(size.h));
        let row_floats = place.row * V::OPERANDS;
        let rows_of_tile = 2 * map.stride();
        let last = (planes * self.plane_tiles() - TILES) * step + TILES * V::OPERANDS;
        let elements = E::ELEMENTS * E::ELEMENTS;
        assert!(self.tiles_w.is_multiple_of(TILES), "rows are of whole pairs");
        assert!((elements - 1) * pitch + last <= floats.len(), "all elements of all tiles fit");
        let tile_row =
            |d: usize, h: usize| (self.plane(map, d) * self.origin.size.h + h) * self.tiles_w * step;
        // A plane before it is read.
        let prefetch = |d: usize, h: usize| {
            if d + 1 < planes {
                let part = (d + 1) * self.origin.size.h + h;
                place.prefetch(source, block, (part, planes * self.origin.size.h));
            }
        };
        // What is stored is what is multiplied: no copy of it is needed.
        let as_stored = V::OPERANDS < LANES && block.len == LANES;
        if let (Values::Bf16(x), true) = (source.data, as_stored) {
            debug_assert!(source.pending.is_none(), "values of bfloat16 have no map");
            let (zeros, width) = ([0; LANES], space[2]);
            let row = |index: usize| match place.source_row(index, source.channels) {
                Some(start) => {
                    let span = (width - 1) * source.channels + LANES;
                    (x[start + block.first..][..span].as_ptr(), source.channels)
                }
                None => (zeros.as_ptr(), 0),
            };
            for (d, h) in (0..planes).flat_map(|d| (0..self.origin.size.h).map(move |h| (d, h))) {
                prefetch(d, h);
                let mut halves = Halves { rows: [(zeros.as_ptr(), 0); MOST], pad: map.pad(), width };
                for i in 0..E::READS {
                    halves.rows[i] = row(d * rows + rows_of_tile * h + i);
                }
                let to = floats[tile_row(d, h)..].as_mut_ptr();
                // SAFETY: rows are as long as was checked, or of zeros; elements as was asserted.
                unsafe { inputs::<E, V, TILES>(&halves, self.tiles_w, to, (pitch, step)) };
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
                let x = plane[rows_of_tile * h * row_floats..].as_ptr();
                let to = floats[tile_row(d, h)..].as_mut_ptr();
                // SAFETY: the rows of a tile are in the plane, as long as the map reads, and every element of a row of tiles is in
                // `floats`, as was asserted.
                unsafe {
                    inputs::<E, V, TILES>(&Plane { x, row: row_floats }, self.tiles_w, to, (pitch, step));
                }
            }
        }
    }
}

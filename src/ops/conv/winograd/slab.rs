//! Some planes and rows of tiles, all of W: what a task transforms at once.

use super::super::plan::{Block, LANES, Map, Origin, Tile};
use super::super::rows::Value;
use super::super::tile::{Element, Order, Place, load_rows};
use super::super::{Problem, Source};
use super::filtering::{Elements, Filtering, MOST};
use super::transform::{Along, Plane, Rows, Stored, inputs};
use crate::device::lanes::Lanes;
use crate::tensor::Values;
use std::ops::Range;

/// Cubes of a row in f32 that are transformed one element along d after the other: what they read, 27 KB, stays in the first-level
/// cache meanwhile where voxels are neighbours, of 16 channels. Of more channels there is more to multiply for each.
const TILES_AT_ONCE: usize = 12;

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
    /// The mapped rows of the planes of a step, halo included.
    planes: Vec<f32>,
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

    /// Tiles of all planes of elements.
    pub fn input_tiles<E: Elements>(&self) -> usize {
        E::planes(self.origin.size.d) * self.plane_tiles()
    }

    /// Where among the transformed planes those begin that are `offset` planes behind each anchor's first one. Of stride 2 the
    /// even ones come first, then the odd ones: planes of neighbouring anchors are neighbours.
    pub fn plane(&self, map: Map, offset: usize) -> usize {
        match map.stride() {
            2 if offset % 2 == 1 => self.origin.size.d + 1 + offset / 2,
            stride => offset / stride,
        }
    }

    /// `count` tiles from tile `first` on, row by row, as their outputs of this plane of theirs; those that the volume has not are
    /// left out.
    pub fn runs<F: Filtering>(&self, plane: usize, first: usize, count: usize) -> impl Iterator<Item = Run> {
        let Slab { problem, origin, tiles_w } = *self;
        let [space_d, space_h, space_w] = problem.out_space;
        let mut tile = first;
        std::iter::from_fn(move || {
            let left = first + count - tile;
            let (line, tile_w) = (tile / tiles_w, tile % tiles_w);
            let d = (origin.d + line / origin.size.h) * F::OUTPUT_PLANES + plane;
            // Planes only follow that it has not either.
            if left == 0 || d >= space_d {
                return None;
            }
            let tiles = left.min(tiles_w - tile_w);
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

    /// Transforms one channel block; lanes beyond its channels are unspecified. TILES are those of [`inputs()`], 1 of cubes.
    ///
    /// # Safety
    /// V's vector unit must exist.
    #[inline(always)]
    pub unsafe fn transform<E: Elements, V: Lanes, const TILES: usize>(
        &self,
        source: &Source,
        block: Block,
        mut to: Destination,
        lines: &mut Lines,
    ) {
        let (tiles, map) = (self.origin.size, E::MAP);
        let size = Tile { d: E::PLANES * tiles.d, h: 2 * tiles.h };
        let origin = Origin { d: E::PLANES * self.origin.d, h: 2 * self.origin.h, size, ..*self.origin };
        // Gradients of outputs, which a map of one tap reads, lie on the anchors.
        let space = if map.kernel() == 1 { self.problem.out_space } else { self.problem.space };
        let place = Place { map, space, row: map.extent(2 * self.tiles_w), origin: &origin, before: None };
        let last = (self.input_tiles::<E>() - TILES) * to.step + TILES * V::OPERANDS;
        let elements = E::ELEMENTS * E::ELEMENTS;
        assert!(self.tiles_w.is_multiple_of(TILES), "rows are of whole pairs");
        assert!((elements - 1) * to.pitch + last <= to.floats.len(), "all elements of all tiles fit");
        // What is stored is what is multiplied: no copy of it is needed.
        let as_stored = block.len == LANES && source.pending.is_none();
        // SAFETY: V's unit exists; elements as was asserted.
        unsafe {
            match source.data {
                Values::Bf16(x) if as_stored && V::OPERANDS < LANES => {
                    self.transform_stored::<E, V, TILES, _>(x, (source, block), &place, &mut to);
                }
                Values::Single(x) if as_stored && V::OPERANDS == LANES => {
                    self.transform_stored::<E, V, TILES, _>(x, (source, block), &place, &mut to);
                }
                _ => self.transform_copied::<E, V, TILES>((source, block), &place, &mut to, lines),
            }
        }
    }

    /// [`Self::transform`] from where the tensor's values `x` are.
    ///
    /// # Safety
    /// V's vector unit must exist, and `to` have all elements.
    #[inline(always)]
    unsafe fn transform_stored<E: Elements, V: Lanes, const TILES: usize, T: Value + Default>(
        &self,
        x: &[T],
        (source, block): (&Source, Block),
        place: &Place,
        to: &mut Destination,
    ) {
        let (zeros, rows, width) =
            ([T::default(); LANES], E::MAP.extent(place.origin.size.h), place.space[2]);
        let steps = Steps::of::<E>(place);
        for (step, h) in (0..steps.number).flat_map(|step| (0..self.origin.size.h).map(move |h| (step, h))) {
            steps.prefetch(step, h, place, source, block);
            let plane = |plane: usize| {
                let mut stored = Stored { rows: [(zeros.as_ptr(), 0); MOST], pad: E::MAP.pad(), width };
                let first = (step * steps.apart + plane) * rows + 2 * E::MAP.stride() * h;
                for i in 0..E::READS {
                    if let Some(start) = place.source_row(first + i, source.channels) {
                        let span = (width - 1) * source.channels + LANES;
                        stored.rows[i] = (x[start + block.first..][..span].as_ptr(), source.channels);
                    }
                }
                stored
            };
            // SAFETY: rows are as long as was checked, or of zeros; the rest by the caller's promise.
            unsafe { self.transform_row::<E, V, TILES, _>(step, h, plane, to) };
        }
    }

    /// [`Self::transform`] from a copy in the operands' form, mapped by what is pending.
    ///
    /// # Safety
    /// V's vector unit must exist, and `to` have all elements.
    #[inline(always)]
    unsafe fn transform_copied<E: Elements, V: Lanes, const TILES: usize>(
        &self,
        (source, block): (&Source, Block),
        place: &Place,
        to: &mut Destination,
        lines: &mut Lines,
    ) {
        let (rows, row_floats) = (E::MAP.extent(place.origin.size.h), place.row * V::OPERANDS);
        let Lines { row, planes } = lines;
        let steps = Steps::of::<E>(place);
        let plane_floats = rows * row_floats;
        planes.resize(steps.reads * plane_floats, 0.0);
        let layout = (Order::Voxels { pitch: V::OPERANDS }, Element::of_voxels(self.problem.operands));
        // A plane takes the place of one that is not read any more.
        let start = |plane: usize| plane % steps.reads * plane_floats;
        for step in 0..steps.number {
            for d in steps.new_planes(step) {
                let plane = &mut planes[start(d)..][..plane_floats];
                load_rows(source, block, place, layout, d * rows..(d + 1) * rows, plane, row);
            }
            for h in 0..self.origin.size.h {
                steps.prefetch(step, h, place, source, block);
                let plane = |plane: usize| {
                    let first = start(step * steps.apart + plane) + 2 * E::MAP.stride() * h * row_floats;
                    Plane { x: planes[first..].as_ptr(), row: row_floats }
                };
                // SAFETY: the rows of a tile are in their planes, as long as the map reads; the rest by the caller's promise.
                unsafe { self.transform_row::<E, V, TILES, _>(step, h, plane, to) };
            }
        }
    }

    /// Transforms a row of tiles from those of the planes that a step reads.
    ///
    /// # Safety
    /// The planes' rows must have all voxels that the tiles read; V's vector unit must exist, and `to` have all elements.
    #[inline(always)]
    unsafe fn transform_row<E: Elements, V: Lanes, const TILES: usize, R: Rows>(
        &self,
        step: usize,
        h: usize,
        plane: impl Fn(usize) -> R,
        to: &mut Destination,
    ) {
        const { assert!(!E::DEEP || TILES == 1 && E::ELEMENTS == 4, "cubes' elements are written out here") };
        let (size, steps) = (self.origin.size, (to.pitch, to.step));
        let mut to = |plane: usize| to.floats[(plane * size.h + h) * self.tiles_w * to.step..].as_mut_ptr();
        // SAFETY: by the caller's promise.
        unsafe {
            if !E::DEEP {
                let to = to(self.plane(E::MAP, step));
                return inputs::<E, V, TILES>(&plane(0), 0..self.tiles_w, to, steps);
            }
            let planes = std::array::from_fn(|d| plane(d.min(E::READS - 1)));
            let at_once = TILES_AT_ONCE * LANES / V::OPERANDS;
            for first in (0..self.tiles_w).step_by(at_once) {
                let tiles = first..self.tiles_w.min(first + at_once);
                let mut to = |element: usize| to(element * size.d + step);
                inputs::<E, V, 1>(&Along::<R, 0>(&planes), tiles.clone(), to(0), steps);
                inputs::<E, V, 1>(&Along::<R, 1>(&planes), tiles.clone(), to(1), steps);
                inputs::<E, V, 1>(&Along::<R, 2>(&planes), tiles.clone(), to(2), steps);
                inputs::<E, V, 1>(&Along::<R, 3>(&planes), tiles, to(3), steps);
            }
        }
    }
}

/// In which order planes are read: one after the other, or of cubes as many at a time as a tile reads.
struct Steps {
    number: usize,
    /// Planes of a step.
    reads: usize,
    /// Planes between the first ones of two steps.
    apart: usize,
    /// Planes of all steps.
    planes: usize,
}

impl Steps {
    fn of<E: Elements>(place: &Place) -> Self {
        let planes = E::MAP.extent(place.origin.size.d);
        if E::DEEP {
            Steps { number: place.origin.size.d / E::PLANES, reads: E::READS, apart: E::PLANES, planes }
        } else {
            Steps { number: planes, reads: 1, apart: 1, planes }
        }
    }

    /// What a step reads that none before it does.
    fn new_planes(&self, step: usize) -> Range<usize> {
        let end = step * self.apart + self.reads;
        if step == 0 { 0..end } else { end - self.apart..end }
    }

    /// Asks the cache for a row of tiles, number `h`, of what the next step reads.
    fn prefetch(&self, step: usize, h: usize, place: &Place, source: &Source, block: Block) {
        if step + 1 < self.number {
            let tile_rows = place.origin.size.h / 2;
            for d in self.new_planes(step + 1) {
                place.prefetch(source, block, (d * tile_rows + h, self.planes * tile_rows));
            }
        }
    }
}

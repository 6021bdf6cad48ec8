//! Filtering along one axis with fewer products than taps: Winograd's F(2, 3), and F(2, 2) of every other voxel where a
//! map has stride 2, one way or the other. An axis is cut into tiles of two anchors.
//!
//! [`Dense`]: `y0 = d0 g0 + d1 g1 + d2 g2` and `y1 = d1 g0 + d2 g1 + d3 g2` are four products instead of six:
//!
//! ```text
//! s0 = (d0 - d2) g0        s1 = (d1 + d2) (g0 + g1 + g2) / 2
//! s3 = (d3 - d1) g2        s2 = (d2 - d1) (g0 - g1 + g2) / 2
//! y0 = s0 + s1 + s2        y1 = s1 - s2 + s3
//! ```
//!
//! [`Strided`]: `y0 = d0 g0 + d1 g1 + d2 g2` and `y1 = d2 g0 + d3 g1 + d4 g2` are five instead of six, in three sums:
//!
//! ```text
//! s0 = d1 g1 + (d0 - d2) g0        s1 = d2 (g0 + g2)        s2 = d3 g1 + (d4 - d2) g2
//! y0 = s0 + s1                     y1 = s1 + s2
//! ```
//!
//! [`Scattered`], its transpose: `y0 = d0 g1`, `y1 = d0 g2 + d1 g0`, `y2 = d1 g1` and `y3 = d1 g2 + d2 g0` are five:
//!
//! ```text
//! s0 = d0 g1        s1 = (d0 - d1) g2        s2 = d1 (g0 + g2)        s3 = d1 g1        s4 = (d2 - d1) g0
//! y0 = s0           y1 = s1 + s2             y2 = s3                  y3 = s2 + s4
//! ```
//!
//! In a plane it is done along h, then along w. [`Cubes`] are filtered along d, too, before both.

use super::super::plan::{LANES, Map};
use crate::device::lanes::Lanes;

/// Values of a tile along an axis at most: inputs, elements, products, sums or outputs.
pub const MOST: usize = 5;

/// What becomes of a tile's inputs along an axis before they are multiplied. Of arrays only the first values count.
pub trait Elements {
    /// Which voxels the anchors read.
    const MAP: Map;
    /// Inputs of a tile.
    const READS: usize;
    /// What is made of them.
    const ELEMENTS: usize;
    /// Whether it is done along d, too: a tile is a cube then.
    const DEEP: bool = false;
    /// Planes of anchors of a tile.
    const PLANES: usize = if Self::DEEP { 2 } else { 1 };
    /// Makes it.
    fn elements<V: Lanes>(inputs: [V; MOST]) -> [V; MOST];
    /// Planes of elements of so many tiles along d: as they are read, or of cubes as many of each element along d as there are tiles.
    fn planes(tiles: usize) -> usize {
        if Self::DEEP { Self::ELEMENTS * tiles } else { Self::MAP.extent(tiles) }
    }
}

/// A convolution of three taps along an axis.
pub trait Filtering: Elements {
    /// The element that each product multiplies by its filter, and the sum that it belongs to; sums never decrease.
    const PRODUCTS: &'static [(usize, usize)];
    /// Sums of products.
    const SUMS: usize;
    /// Whether there are four sums, each of one product, number i of element i.
    const FOUR: bool = false;
    /// Outputs of a tile.
    const OUTPUTS: usize;
    /// Planes of them: those of each of its planes of anchors.
    const OUTPUT_PLANES: usize = Self::PLANES * Self::MAP.outputs();
    /// How many of these are made of the same sums: of a cube both, of a scatter each of its own.
    const OUTPUTS_ALONG_D: usize = if Self::DEEP { Self::OUTPUTS } else { 1 };
    /// The largest share, as a quotient, of a direct sum's products that may be left: tiles reach beyond volumes of odd size.
    const LEFT: [usize; 2];
    /// What the elements of the products are multiplied by, lane by lane.
    fn filters(taps: [[f32; LANES]; 3]) -> [[f32; LANES]; MOST];
    /// Outputs.
    fn outputs<V: Lanes>(sums: [V; MOST]) -> [V; MOST];
}

/// A filtering whose gradients of weights have as few products: each sums, over all tiles, an element times the gradient of a sum.
pub trait Differentiable: Filtering {
    /// From the gradients of outputs to those of sums, by the transpose of [`Filtering::outputs`].
    type Gradients: Elements;
    /// From the gradients of what [`Filtering::filters`] makes to those of the taps, by its transpose.
    fn tap_gradients(of_filters: [[f32; LANES]; MOST]) -> [[f32; LANES]; 3];
}

/// Stride 1, in cubes if DEEP.
pub struct Unstrided<const DEEP: bool>;

/// Stride 1, in every plane.
pub type Dense = Unstrided<false>;

/// Stride 1, in cubes.
pub type Cubes = Unstrided<true>;

/// Stride 2.
pub struct Strided;

/// [`Map::Scatter`].
pub struct Scattered;

/// Gradients of the outputs of [`Dense`].
pub struct DenseGradients;

/// Gradients of the outputs of [`Strided`].
pub struct StridedGradients;

/// Gradients of outputs are read where they are.
const ON_ANCHORS: Map = Map::Gather { kernel: 1, stride: 1 };

#[inline(always)]
fn sum([a, b]: [[f32; LANES]; 2]) -> [f32; LANES] {
    std::array::from_fn(|l| a[l] + b[l])
}

impl<const DEEP: bool> Elements for Unstrided<DEEP> {
    const MAP: Map = Map::Gather { kernel: 3, stride: 1 };
    const READS: usize = 4;
    const ELEMENTS: usize = 4;
    const DEEP: bool = DEEP;
    #[inline(always)]
    fn elements<V: Lanes>([d0, d1, d2, d3, _]: [V; MOST]) -> [V; MOST] {
        [d0.sub(d2), d1.add(d2), d2.sub(d1), d3.sub(d1), V::zero()]
    }
}

impl<const DEEP: bool> Filtering for Unstrided<DEEP> {
    const PRODUCTS: &'static [(usize, usize)] = &[(0, 0), (1, 1), (2, 2), (3, 3)];
    const SUMS: usize = 4;
    const FOUR: bool = true;
    const OUTPUTS: usize = 2;
    const LEFT: [usize; 2] = [2, 3];
    #[inline(always)]
    fn filters([g0, g1, g2]: [[f32; LANES]; 3]) -> [[f32; LANES]; MOST] {
        let half = |sign: f32| std::array::from_fn(|l| 0.5 * ((g0[l] + g2[l]) + sign * g1[l]));
        [g0, half(1.0), half(-1.0), g2, [0.0; LANES]]
    }
    #[inline(always)]
    fn outputs<V: Lanes>([s0, s1, s2, s3, _]: [V; MOST]) -> [V; MOST] {
        // Of cubes, as sums are added that come in halves: those in the middle first.
        let y0 = if DEEP { s0.add(s1.add(s2)) } else { s0.add(s1).add(s2) };
        [y0, s1.sub(s2).add(s3), V::zero(), V::zero(), V::zero()]
    }
}

impl Differentiable for Dense {
    type Gradients = DenseGradients;
    #[inline(always)]
    fn tap_gradients([u0, u1, u2, u3, _]: [[f32; LANES]; MOST]) -> [[f32; LANES]; 3] {
        [
            std::array::from_fn(|l| u0[l] + 0.5 * (u1[l] + u2[l])),
            std::array::from_fn(|l| 0.5 * (u1[l] - u2[l])),
            std::array::from_fn(|l| 0.5 * (u1[l] + u2[l]) + u3[l]),
        ]
    }
}

impl Elements for DenseGradients {
    const MAP: Map = ON_ANCHORS;
    const READS: usize = 2;
    const ELEMENTS: usize = 4;
    #[inline(always)]
    fn elements<V: Lanes>([y0, y1, ..]: [V; MOST]) -> [V; MOST] {
        [y0, y0.add(y1), y0.sub(y1), y1, V::zero()]
    }
}

impl Elements for Strided {
    const MAP: Map = Map::Gather { kernel: 3, stride: 2 };
    const READS: usize = 5;
    const ELEMENTS: usize = 5;
    #[inline(always)]
    fn elements<V: Lanes>([d0, d1, d2, d3, d4]: [V; MOST]) -> [V; MOST] {
        [d1, d0.sub(d2), d2, d3, d4.sub(d2)]
    }
}

impl Filtering for Strided {
    const PRODUCTS: &'static [(usize, usize)] = &[(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)];
    const SUMS: usize = 3;
    const OUTPUTS: usize = 2;
    const LEFT: [usize; 2] = [3, 4];
    #[inline(always)]
    fn filters([g0, g1, g2]: [[f32; LANES]; 3]) -> [[f32; LANES]; MOST] {
        [g1, g0, sum([g0, g2]), g1, g2]
    }
    #[inline(always)]
    fn outputs<V: Lanes>([s0, s1, s2, ..]: [V; MOST]) -> [V; MOST] {
        [s0.add(s1), s1.add(s2), V::zero(), V::zero(), V::zero()]
    }
}

impl Differentiable for Strided {
    type Gradients = StridedGradients;
    #[inline(always)]
    fn tap_gradients([u0, u1, u2, u3, u4]: [[f32; LANES]; MOST]) -> [[f32; LANES]; 3] {
        [sum([u1, u2]), sum([u0, u3]), sum([u2, u4])]
    }
}

impl Elements for StridedGradients {
    const MAP: Map = ON_ANCHORS;
    const READS: usize = 2;
    const ELEMENTS: usize = 3;
    #[inline(always)]
    fn elements<V: Lanes>([y0, y1, ..]: [V; MOST]) -> [V; MOST] {
        [y0, y0.add(y1), y1, V::zero(), V::zero()]
    }
}

impl Elements for Scattered {
    const MAP: Map = Map::Scatter;
    const READS: usize = 3;
    const ELEMENTS: usize = 4;
    #[inline(always)]
    fn elements<V: Lanes>([d0, d1, d2, ..]: [V; MOST]) -> [V; MOST] {
        [d0, d0.sub(d1), d1, d2.sub(d1), V::zero()]
    }
}

impl Filtering for Scattered {
    const PRODUCTS: &'static [(usize, usize)] = &[(0, 0), (1, 1), (2, 2), (2, 3), (3, 4)];
    const SUMS: usize = 5;
    const OUTPUTS: usize = 4;
    const LEFT: [usize; 2] = [3, 4];
    #[inline(always)]
    fn filters([g0, g1, g2]: [[f32; LANES]; 3]) -> [[f32; LANES]; MOST] {
        [g1, g2, sum([g0, g2]), g1, g0]
    }
    #[inline(always)]
    fn outputs<V: Lanes>([s0, s1, s2, s3, s4]: [V; MOST]) -> [V; MOST] {
        [s0, s1.add(s2), s3, s2.add(s4), V::zero()]
    }
}

/// Products of a plane of which each sum of a plane is made, first and last; sum number `SUMS i + j` is sum i along h and j
/// along w.
pub fn of_sums<F: Filtering>() -> impl Iterator<Item = impl Iterator<Item = Product> + Clone> {
    let of = |sum: usize| (0..F::PRODUCTS.len()).filter(move |&p| F::PRODUCTS[p].1 == sum);
    (0..F::SUMS * F::SUMS)
        .map(move |sum| of(sum / F::SUMS).flat_map(move |h| of(sum % F::SUMS).map(move |w| Product { h, w })))
}

/// A product of a plane: number `h` along h, `w` along w.
#[derive(Clone, Copy)]
pub struct Product {
    /// Along h.
    pub h: usize,
    /// Along w.
    pub w: usize,
}

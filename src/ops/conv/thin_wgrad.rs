//! Gradients of weights between tensors of two channels each: sixteen neighbouring voxels, or pairs of them in bfloat16, fill
//! the lanes.
//!
//! The network's last convolution is such a layer: two channels would leave seven eighths of the lanes empty. Lane by
//! lane sums of a tile are added up per split, splits in order, and at last the sixteen lanes in order.

use super::Source;
use super::micro::lanes_of_products;
use super::plan::{Block, LANES, Map, Origin, Tile};
use super::row::transform_row;
use super::tile::{Element, Order, Place, load};
use super::transpose::transpose;
use crate::device::arena::Buffer;
use crate::device::bf16::{Operands, Pairs, narrow};
use crate::device::cpu::{Simd, simd, simd_of_pairs};
#[cfg(target_arch = "x86_64")]
use crate::device::lanes::x86::{Avx2, Avx512};
use crate::device::lanes::{Lanes, Plain};
use crate::device::scratch::Scratch;
use rayon::prelude::*;

/// Channels of both tensors.
const C: usize = 2;

/// Floats of the sums of one (kd, kh): (source channel, kw, lane channel, lane).
const ROW_SUMS: usize = C * 3 * C * LANES;

/// The only map that the network has such a layer for.
const MAP: Map = Map::Gather { kernel: 3, stride: 1 };

/// A floor for the number of tasks.
const SPLITS: usize = 32;

/// Whether [`wgrad`] computes this layer.
pub fn fits(map: Map, sources: &[Source], lane_sources: &[Source]) -> bool {
    let two = |s: &[Source]| s.len() == 1 && s[0].channels == C;
    map == MAP && two(sources) && two(lane_sources)
}

/// dw (lane channel, source channel, 3, 3, 3) of `n` samples of (D, H, W) `space`; see [`super::wgrad()`].
pub fn wgrad(
    operands: Operands,
    n: usize,
    space: [usize; 3],
    source: &Source,
    lane_source: &Source,
) -> Buffer {
    let largest = Tile::choose(MAP, space, C);
    let tiles = largest.origins(n, space);
    // Voxels of a vector.
    let vector = match operands {
        Operands::Single => LANES,
        Operands::Bf16 => 2 * LANES,
    };
    let per_split = tiles.len().div_ceil(SPLITS);
    let block = Block { tensor: 0, first: 0, len: C };
    let (width, extent) = (space[2].next_multiple_of(vector), MAP.extent(space[2]));
    let mut partials = Buffer::zeroed(tiles.len().div_ceil(per_split) * 9 * ROW_SUMS);
    partials.par_chunks_exact_mut(9 * ROW_SUMS).zip(tiles.par_chunks(per_split)).for_each(|(sum, tiles)| {
        let [mut x, mut dy, mut x_halves, mut dy_halves] = [(); 4].map(|()| Buffer::default());
        let mut scratch = Scratch::<(Vec<f32>, Vec<(usize, usize)>)>::take();
        let (row, rows) = &mut *scratch;
        let place = |i: usize| Place {
            map: MAP,
            space,
            row: MAP.extent(space[2]),
            origin: &tiles[i],
            before: i.checked_sub(1).map(|before| &tiles[before]),
        };
        for (i, origin) in tiles.iter().enumerate() {
            let size = origin.size;
            let rows_of = |planes: usize| planes * MAP.extent(size.h) * C * extent;
            // Room for the tile before, whose last planes may be this one's first.
            let x = x.first(rows_of(MAP.extent(largest.d)) + vector + 2);
            load(source, block, &place(i), (Order::ChannelRows, Element::Single), x, row);
            // Vectors past a row's end meet zeros of dy: what they read must be numbers.
            let end = rows_of(MAP.extent(size.d));
            let x = &mut x[..end + vector + 2];
            x[end..].fill(0.0);
            let dy = dy.first(size.d * size.h * C * width);
            load_lanes(lane_source, (space, width), origin, dy, row);
            let pairs = (operands == Operands::Bf16)
                .then(|| (narrowed(x, &mut x_halves), narrowed(dy, &mut dy_halves)));
            for (index, sum) in sum.chunks_exact_mut(ROW_SUMS).enumerate() {
                if i + 1 < tiles.len() {
                    place(i + 1).prefetch(source, block, (index, 9));
                    place(i + 1).of_anchors(space).prefetch(lane_source, block, (index, 9));
                }
                rows.clear();
                rows.extend((0..size.d * size.h).map(|i| {
                    let (d, h) = (i / size.h + index / 3, i % size.h + index % 3);
                    ((d * MAP.extent(size.h) + h) * C * extent, i * C * width)
                }));
                let job = Job { extent, width, rows };
                match pairs {
                    None => job.run(x, dy, sum),
                    Some((x, dy)) => job.run_pairs(x, dy, sum),
                }
            }
        }
    });
    let mut dw = Buffer::dirty(C * C * 27);
    for (i, j) in (0..C).flat_map(|i| (0..C).map(move |j| (i, j))) {
        for tap in 0..27 {
            let at = tap / 3 * ROW_SUMS + ((i * 3 + tap % 3) * C + j) * LANES;
            let mut lanes = [0.0; LANES];
            for sum in partials.chunks_exact(9 * ROW_SUMS) {
                lanes.iter_mut().zip(&sum[at..]).for_each(|(l, s)| *l += s);
            }
            dw[(j * C + i) * 27 + tap] = lanes.iter().sum();
        }
    }
    dw
}

/// Copies the rows of a tile, mapped, to `[row][channel][w]`, zero from `space[2]` to `width`.
fn load_lanes(
    source: &Source,
    (space, width): ([usize; 3], usize),
    &Origin { n, d: d0, h: h0, size }: &Origin,
    out: &mut [f32],
    row: &mut Vec<f32>,
) {
    let pending = source.pending.map(|p| {
        let (scale, shift) = p.of_sample(n, C);
        (scale, shift, p.slope)
    });
    row.resize(space[2] * C, 0.0);
    let mut widened = Scratch::<Vec<_>>::take();
    for (i, out) in out.chunks_exact_mut(C * width).enumerate() {
        let voxel = ((n * space[0] + d0 + i / size.h) * space[1] + h0 + i % size.h) * space[2];
        let x = source.row(voxel * C, space[2] * C, &mut widened);
        transform_row(row, C, x, C, C, pending);
        transpose(row, C, out, width);
        out.chunks_exact_mut(width).for_each(|out| out[space[2]..].fill(0.0));
    }
}

/// `x` rounded to bfloat16, in a scratch buffer.
fn narrowed<'b>(x: &[f32], buffer: &'b mut Buffer) -> &'b [u16] {
    let halves = &mut bytemuck::cast_slice_mut(buffer.first(x.len().div_ceil(2)))[..x.len()];
    narrow(x, halves);
    halves
}

/// One (kd, kh) of one tile.
struct Job<'a> {
    /// Elements of a channel's row of x.
    extent: usize,
    /// The same of dy.
    width: usize,
    rows: &'a [(usize, usize)],
}

impl Job<'_> {
    /// Adds the tile's products to `sum`.
    fn run(&self, x: &[f32], dy: &[f32], sum: &mut [f32]) {
        match simd() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512(x, dy, sum) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd()` found the features.
            Simd::Avx2 => unsafe { self.run_avx2::<Avx2, _, 4>(x, dy, sum) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Plain, _, 4, 1>(x, dy, sum) },
        }
    }

    /// The same of bfloat16.
    fn run_pairs(&self, x: &[u16], dy: &[u16], sum: &mut [f32]) {
        match simd_of_pairs() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd_of_pairs()` found the features.
            Simd::Avx512 => unsafe { self.run_avx512_bf16(x, dy, sum) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `simd_of_pairs()` found the features.
            Simd::Avx2 => unsafe { self.run_avx2::<Pairs<Avx2>, _, 2>(x, dy, sum) },
            // SAFETY: plain Rust needs no feature.
            _ => unsafe { self.run_lanes::<Pairs<Plain>, _, 2, 1>(x, dy, sum) },
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,fma")]
    unsafe fn run_avx512(&self, x: &[f32], dy: &[f32], sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Avx512, _, 4, C>(x, dy, sum) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bf16,fma")]
    unsafe fn run_avx512_bf16(&self, x: &[u16], dy: &[u16], sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<Pairs<Avx512>, _, 2, C>(x, dy, sum) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn run_avx2<V: Lanes, T, const BYTES: usize>(&self, x: &[T], dy: &[T], sum: &mut [f32]) {
        // SAFETY: the features are enabled here.
        unsafe { self.run_lanes::<V, T, BYTES, 1>(x, dy, sum) }
    }

    /// TOGETHER channels of x at once, which have 6 TOGETHER accumulators.
    ///
    /// # Safety
    /// V's vector unit must exist, and elements have BYTES bytes.
    #[inline(always)]
    unsafe fn run_lanes<V: Lanes, T, const BYTES: usize, const TOGETHER: usize>(
        &self,
        x: &[T],
        dy: &[T],
        sum: &mut [f32],
    ) {
        let dy = (dy.as_ptr().cast(), self.width);
        let vectors = self.width * BYTES / 64;
        for first in (0..C).step_by(TOGETHER) {
            let x = (x[first * self.extent..].as_ptr().cast(), self.extent);
            // SAFETY: rows lie in their tiles, which `wgrad` made long enough for the last vector.
            let acc = unsafe { lanes_of_products::<V, TOGETHER, C, BYTES>(x, dy, self.rows, vectors) };
            for i in 0..TOGETHER {
                for tap in 0..3 {
                    for j in 0..C {
                        let to = &mut sum[(((first + i) * 3 + tap) * C + j) * LANES..][..LANES];
                        // SAFETY: `to` has 16 floats.
                        unsafe { acc[i][tap][j].add(V::load(to.as_ptr())).store(to.as_mut_ptr()) };
                    }
                }
            }
        }
    }
}

//! Transforms of tiles of a plane, along h, then along w, of cubes along d before: of inputs, filters and outputs, and their
//! transposes for gradients.

use super::super::plan::LANES;
use super::super::rows::Value;
use super::filtering::{Differentiable, Elements, Filtering, MOST};
use crate::device::cpu::vectorised;
use crate::device::lanes::Lanes;
use std::ops::Range;

/// Rows of voxels, one below the other, of which tiles are transformed: sixteen values each of a voxel.
pub trait Rows {
    /// Voxel `w` of each.
    ///
    /// # Safety
    /// The rows must be as many as E reads and have voxel `w`, and V's vector unit must exist.
    unsafe fn voxels<E: Elements, V: Lanes>(&self, w: usize) -> [V; MOST];
}

/// Rows of operands in one buffer, voxels side by side.
pub struct Plane {
    /// The first row.
    pub x: *const f32,
    /// Floats between rows.
    pub row: usize,
}

impl Rows for Plane {
    #[inline(always)]
    unsafe fn voxels<E: Elements, V: Lanes>(&self, w: usize) -> [V; MOST] {
        let mut inputs = [V::zero(); MOST];
        for h in 0..E::READS {
            // SAFETY: by the caller's promise.
            inputs[h] = unsafe { V::load_operands(self.x.add(h * self.row + w * V::OPERANDS)) };
        }
        inputs
    }
}

/// Rows where a tensor has them. Voxels before and behind are 0.
pub struct Stored<T> {
    /// The first voxel of each row, and values between voxels: 0 where a row of zeros is a single voxel.
    pub rows: [(*const T, usize); MOST],
    /// Voxels before the first one.
    pub pad: usize,
    /// Voxels of a row.
    pub width: usize,
}

impl<T: Value> Rows for Stored<T> {
    #[inline(always)]
    unsafe fn voxels<E: Elements, V: Lanes>(&self, w: usize) -> [V; MOST] {
        let w = w.wrapping_sub(self.pad);
        let mut inputs = [V::zero(); MOST];
        if w >= self.width {
            return inputs;
        }
        for h in 0..E::READS {
            let (x, pitch) = self.rows[h];
            // SAFETY: by the caller's promise.
            inputs[h] = unsafe { T::load(x.add(w * pitch)) };
        }
        inputs
    }
}

/// One of the elements along d of planes of such rows.
pub struct Along<'a, R, const ELEMENT: usize>(pub &'a [R; MOST]);

impl<R: Rows, const ELEMENT: usize> Rows for Along<'_, R, ELEMENT> {
    #[inline(always)]
    unsafe fn voxels<E: Elements, V: Lanes>(&self, w: usize) -> [V; MOST] {
        let mut planes = [[V::zero(); MOST]; MOST];
        for d in 0..E::READS {
            // SAFETY: by the caller's promise. Of planes that this element is not made of nothing remains.
            planes[d] = unsafe { self.0[d].voxels::<E, V>(w) };
        }
        let mut inputs = [V::zero(); MOST];
        for h in 0..E::READS {
            let mut line = [V::zero(); MOST];
            for d in 0..E::READS {
                line[d] = planes[d][h];
            }
            inputs[h] = E::elements(line)[ELEMENT];
        }
        inputs
    }
}

/// Transforms these tiles of a row along w of one channel block to sixteen operands of each element in
/// `v[element * pitch + tile * step..]`; element `ELEMENTS i + j` of a tile is number i along h and j along w.
///
/// Where TILES is 2, and both the first one's number and their count are multiples of it, sixteen pairs of values of both stand for
/// two neighbouring tiles.
///
/// # Safety
/// All voxels of the tiles must be readable and all of these writable, and V's vector unit must exist.
#[inline(always)]
pub unsafe fn inputs<E: Elements, V: Lanes, const TILES: usize>(
    x: &impl Rows,
    tiles: Range<usize>,
    v: *mut f32,
    (pitch, step): (usize, usize),
) {
    const { assert!(TILES == 1 || TILES == 2) };
    let stride = 2 * E::MAP.stride();
    let halo = E::READS - stride;
    let last = (TILES - 1) * stride;
    // As many columns more as a second tile of stride 2 has.
    let mut columns = [[V::zero(); MOST]; MOST + 4];
    // SAFETY: inside both by the caller's promise.
    unsafe {
        for w in 0..halo {
            columns[w] = E::elements(x.voxels::<E, V>(stride * tiles.start + w));
        }
        for tile in tiles.step_by(TILES) {
            for w in halo..last + E::READS {
                columns[w] = E::elements(x.voxels::<E, V>(stride * tile + w));
            }
            let v = v.add(tile * step);
            for i in 0..E::ELEMENTS {
                let mut elements = [[V::zero(); MOST]; TILES];
                for t in 0..TILES {
                    let mut line = [V::zero(); MOST];
                    for w in 0..E::READS {
                        line[w] = columns[t * stride + w][i];
                    }
                    elements[t] = E::elements(line);
                }
                for j in 0..E::ELEMENTS {
                    let v = v.add((E::ELEMENTS * i + j) * pitch);
                    match TILES {
                        1 => elements[0][j].store_operands(v),
                        _ => elements[0][j].store_pairs(elements[1][j], v),
                    }
                }
            }
            for w in 0..halo {
                columns[w] = columns[last + stride + w];
            }
        }
    }
}

/// The outputs, `[h][w]`, of one tile's sums, which lie every `pitch` floats from `m` on; of COLUMNS, of those of their columns:
/// what [`Filtering::outputs`] made of them along h.
///
/// # Safety
/// The sums must be readable, and V's vector unit must exist.
#[inline(always)]
pub unsafe fn outputs<F: Filtering, V: Lanes, const COLUMNS: bool>(
    m: *const f32,
    pitch: usize,
) -> [[V; MOST]; MOST] {
    let mut columns = [[V::zero(); MOST]; MOST];
    for j in 0..F::SUMS {
        let mut values = [V::zero(); MOST];
        for i in 0..if COLUMNS { F::OUTPUTS } else { F::SUMS } {
            // SAFETY: readable by the caller's promise.
            values[i] = unsafe { V::load(m.add((F::SUMS * i + j) * pitch)) };
        }
        let outputs = if COLUMNS { values } else { F::outputs(values) };
        for h in 0..F::OUTPUTS {
            columns[h][j] = outputs[h];
        }
    }
    let mut tile = [[V::zero(); MOST]; MOST];
    for h in 0..F::OUTPUTS {
        tile[h] = F::outputs(columns[h]);
    }
    tile
}

vectorised! {
    /// Transforms three planes of taps in `x` along d: `out` has a plane of each product.
    pub fn filters_along_d<F: Filtering>(x: &[f32], out: &mut [f32]) {
        let ((x, _), (out, _)) = (x.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
        let plane = x.len() / 3;
        for i in 0..plane {
            let filters = F::filters([x[i], x[plane + i], x[2 * plane + i]]);
            for (out, filter) in out.chunks_exact_mut(plane).zip(filters) {
                out[i] = filter;
            }
        }
    }

    /// Transforms planes of taps in `x`, `[kd][kh][kw][channel][lane]`: channel c of plane kd of product `n i + j`, number i of n
    /// along h and j along w, goes to `out[places[product][kd] + c * 16..]`.
    pub fn filters<F: Filtering>(x: &[f32], channels: usize, out: &mut [f32], places: &[[usize; MOST]]) {
        let n = F::PRODUCTS.len();
        let (x, _) = x.as_chunks::<LANES>();
        for (plane, x) in x.chunks_exact(9 * channels).enumerate() {
            for channel in 0..channels {
                let tap = |kh: usize, kw: usize| x[(3 * kh + kw) * channels + channel];
                let columns: [[[f32; LANES]; MOST]; 3] =
                    std::array::from_fn(|kw| F::filters([tap(0, kw), tap(1, kw), tap(2, kw)]));
                let [first, second, third] = columns;
                for i in 0..n {
                    let filters = F::filters([first[i], second[i], third[i]]);
                    for (filter, places) in filters[..n].iter().zip(&places[n * i..]) {
                        out[places[plane] + channel * LANES..][..LANES].copy_from_slice(filter);
                    }
                }
            }
        }
    }

    /// Gradients of taps, `[kd][kh][kw][row]`, from those of products, `[product][kd][row]`; rows are whole lanes.
    pub fn filter_gradients<F: Differentiable>(m: &[f32], out: &mut [f32]) {
        let n = F::PRODUCTS.len();
        let ((m, _), (out, _)) = (m.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
        let pitch = m.len() / (n * n);
        let rows = pitch / 3;
        for (plane, row) in (0..3).flat_map(|plane| (0..rows).map(move |row| (plane, row))) {
            let mut lines = [[[0.0; LANES]; MOST]; 3];
            for j in 0..n {
                let mut column = [[0.0; LANES]; MOST];
                for i in 0..n {
                    column[i] = m[(n * i + j) * pitch + plane * rows + row];
                }
                for (line, tap) in lines.iter_mut().zip(F::tap_gradients(column)) {
                    line[j] = tap;
                }
            }
            for (kh, line) in lines.into_iter().enumerate() {
                for (kw, tap) in F::tap_gradients(line).into_iter().enumerate() {
                    out[((plane * 3 + kh) * 3 + kw) * rows + row] = tap;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::filtering::{Cubes, Dense, Scattered, Strided, of_sums};
    use super::*;
    use crate::device::lanes::Plain;
    use crate::ops::conv::plan::Map;
    use crate::rng::Philox;

    fn uniform(rng: &mut Philox, voxels: usize) -> Vec<f32> {
        (0..voxels * LANES).map(|_| rng.range(-1.0, 1.0) as f32).collect()
    }

    /// All elements of one tile.
    fn elements<E: Elements>(x: &[f32]) -> Vec<f32> {
        let mut v = vec![0.0; E::ELEMENTS * E::ELEMENTS * LANES];
        let plane = Plane { x: x.as_ptr(), row: E::READS * LANES };
        // SAFETY: as many rows and voxels as are read, and room for all elements; plain Rust needs no feature.
        unsafe { inputs::<E, Plain, 1>(&plane, 0..1, v.as_mut_ptr(), (LANES, LANES)) };
        v
    }

    /// All products' filters.
    fn transformed_taps<F: Filtering>(g: &[f32]) -> Vec<f32> {
        // `filters` takes three planes.
        let products = F::PRODUCTS.len() * F::PRODUCTS.len();
        let mut u = vec![0.0; 3 * products * LANES];
        let places: Vec<[usize; MOST]> =
            (0..products).map(|p| std::array::from_fn(|kd| (kd * products + p) * LANES)).collect();
        filters::<F>(&[g, g, g].concat(), 1, &mut u, &places);
        u.truncate(products * LANES);
        u
    }

    /// Sums of a few dozen terms of at most 4: some roundings of 6e-8 each.
    const TOLERANCE: f64 = 1e-6;

    /// One tile, from one axis's (output, input, tap) of all its products by definition.
    fn check<F: Filtering>(axis: &[(usize, usize, usize)]) {
        let mut rng = Philox::new(7, 0);
        let (x, g) = (uniform(&mut rng, F::READS * F::READS), uniform(&mut rng, 9));
        let (v, u) = (elements::<F>(&x), transformed_taps::<F>(&g));
        let lanes = |of: &[f32], i: usize| -> [f32; LANES] { of[i * LANES..][..LANES].try_into().unwrap() };
        let m: Vec<f32> = of_sums::<F>()
            .flat_map(|products| {
                let mut sum = [0.0; LANES];
                for p in products {
                    let [h, w] = [p.h, p.w].map(|p| F::PRODUCTS[p].0);
                    let element = lanes(&v, F::ELEMENTS * h + w);
                    let filter = lanes(&u, F::PRODUCTS.len() * p.h + p.w);
                    (0..LANES).for_each(|l| sum[l] += element[l] * filter[l]);
                }
                sum
            })
            .collect();
        // SAFETY: all sums; plain Rust needs no feature.
        let y = unsafe { outputs::<F, Plain, false>(m.as_ptr(), LANES) };
        // Columns first, as a register tile of several sums stores them.
        let mut columns = vec![0.0; F::OUTPUTS * F::SUMS * LANES];
        for j in 0..F::SUMS {
            let mut sums = [Plain::zero(); MOST];
            for i in 0..F::SUMS {
                // SAFETY: sum number SUMS i + j.
                sums[i] = unsafe { Plain::load(m[(F::SUMS * i + j) * LANES..].as_ptr()) };
            }
            let outputs = F::outputs(sums);
            for h in 0..F::OUTPUTS {
                // SAFETY: there is room for it.
                unsafe { outputs[h].store(columns[(F::SUMS * h + j) * LANES..].as_mut_ptr()) };
            }
        }
        // SAFETY: the outputs along h of all columns; plain Rust needs no feature.
        let of_columns = unsafe { outputs::<F, Plain, true>(columns.as_ptr(), LANES) };
        for (h, w) in (0..F::OUTPUTS).flat_map(|h| (0..F::OUTPUTS).map(move |w| (h, w))) {
            let (mut got, mut of_column) = ([0.0; LANES], [0.0; LANES]);
            // SAFETY: 16 floats.
            unsafe { of_columns[h][w].store(of_column.as_mut_ptr()) };
            // SAFETY: 16 floats.
            unsafe { y[h][w].store(got.as_mut_ptr()) };
            let mut want = [0.0; LANES];
            let along = |o: usize| axis.iter().filter(move |p| p.0 == o);
            for (&(_, ih, kh), &(_, iw, kw)) in along(h).flat_map(|h| along(w).map(move |w| (h, w))) {
                let (x, g) = (lanes(&x, F::READS * ih + iw), lanes(&g, 3 * kh + kw));
                (0..LANES).for_each(|l| want[l] += f64::from(x[l]) * f64::from(g[l]));
            }
            assert_eq!(got, of_column, "{:?} {h} {w}", F::MAP);
            for (got, want) in got.iter().zip(want) {
                assert!((f64::from(*got) - want).abs() < TOLERANCE, "{:?} {h} {w}", F::MAP);
            }
        }
    }

    #[test]
    fn sums_of_products_make_the_outputs_of_a_tile() {
        let stride_1 = [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 1, 0), (1, 2, 1), (1, 3, 2)];
        check::<Dense>(&stride_1);
        check::<Cubes>(&stride_1);
        check::<Strided>(&[(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 2, 0), (1, 3, 1), (1, 4, 2)]);
        check::<Scattered>(&[(0, 0, 1), (1, 0, 2), (1, 1, 0), (2, 1, 1), (3, 1, 2), (3, 2, 0)]);
    }

    #[test]
    fn a_tile_is_two_anchors() {
        fn check<F: Filtering>() {
            assert_eq!((F::READS, F::OUTPUTS), (F::MAP.extent(2), 2 * F::MAP.outputs()));
            assert!(F::PRODUCTS.is_sorted_by_key(|p| p.1) && F::PRODUCTS.iter().all(|p| p.0 < F::ELEMENTS));
            let four = [0, 1, 2, 3].map(|i| (i, i));
            assert_eq!(F::FOUR, F::PRODUCTS == four && F::SUMS == four.len());
        }
        check::<Dense>();
        check::<Cubes>();
        check::<Strided>();
        check::<Scattered>();
        fn check_shapes<F: Differentiable>() {
            let one_tap = Map::Gather { kernel: 1, stride: 1 };
            assert_eq!((F::Gradients::MAP, F::Gradients::READS), (one_tap, one_tap.extent(2)));
            assert_eq!(F::Gradients::ELEMENTS, F::SUMS);
        }
        check_shapes::<Dense>();
        check_shapes::<Strided>();
    }

    #[test]
    fn gradients_of_products_make_the_gradients_of_the_taps() {
        check_gradients::<Dense>();
        check_gradients::<Strided>();
    }

    fn check_gradients<F: Differentiable>() {
        let mut rng = Philox::new(8, 0);
        let (x, dy) = (uniform(&mut rng, F::READS * F::READS), uniform(&mut rng, 4));
        let (v, dm) = (elements::<F>(&x), elements::<F::Gradients>(&dy));
        // Three equal planes.
        let mut du = Vec::new();
        for (&(of_h, sum_h), &(of_w, sum_w)) in
            F::PRODUCTS.iter().flat_map(|h| F::PRODUCTS.iter().map(move |w| (h, w)))
        {
            let (v, dm) =
                (&v[(F::ELEMENTS * of_h + of_w) * LANES..], &dm[(F::SUMS * sum_h + sum_w) * LANES..]);
            (0..3).for_each(|_| du.extend(v.iter().zip(dm).take(LANES).map(|(v, dm)| v * dm)));
        }
        let mut dg = vec![0.0; 27 * LANES];
        filter_gradients::<F>(&du, &mut dg);
        for (i, &value) in dg.iter().enumerate() {
            let (tap, lane) = (i / LANES % 9, i % LANES);
            let direct: f64 = (0..4)
                .map(|o| {
                    let stride = F::MAP.stride();
                    let voxel = (o / 2 * stride + tap / 3) * F::READS + o % 2 * stride + tap % 3;
                    f64::from(x[voxel * LANES + lane]) * f64::from(dy[o * LANES + lane])
                })
                .sum();
            assert!((f64::from(value) - direct).abs() < TOLERANCE, "{i}: {value} {direct}");
        }
    }
}

//! The transforms of F(2 x 2, 3 x 3): of inputs, filters and outputs, and their transposes for gradients.
//!
//! Along one axis two neighbouring outputs of a correlation with three taps, `y0 = d0 g0 + d1 g1 + d2 g2` and
//! `y1 = d1 g0 + d2 g1 + d3 g2`, are
//!
//! ```text
//! m0 = (d0 - d2) g0        m1 = (d1 + d2) (g0 + g1 + g2) / 2
//! m3 = (d3 - d1) g2        m2 = (d2 - d1) (g0 - g1 + g2) / 2
//! y0 = m0 + m1 + m2        y1 = m1 - m2 + m3
//! ```
//!
//! four products instead of six. In a plane it is done along h, then along w: 16 products instead of 36. Product number
//! `4 i + j` is number i along h and j along w. The gradient of a product is what the transposed transform makes of the
//! outputs' gradients; those of the filters follow from it by the chain rule.

use super::super::plan::LANES;
use crate::device::cpu::{Lanes, vectorised};

/// Products of an output tile.
pub const PRODUCTS: usize = 16;

/// Four inputs of one axis, ready to be multiplied.
#[inline(always)]
fn input<V: Lanes>([d0, d1, d2, d3]: [V; 4]) -> [V; 4] {
    [d0.sub(d2), d1.add(d2), d2.sub(d1), d3.sub(d1)]
}

/// Three taps of one axis, ready to be multiplied, lane by lane.
#[inline(always)]
fn filter([g0, g1, g2]: [[f32; LANES]; 3]) -> [[f32; LANES]; 4] {
    let half = |sign: f32| std::array::from_fn(|l| 0.5 * ((g0[l] + g2[l]) + sign * g1[l]));
    [g0, half(1.0), half(-1.0), g2]
}

/// The gradients of the four products of one axis, from those of its two outputs.
#[inline(always)]
fn gradient<V: Lanes>([y0, y1]: [V; 2]) -> [V; 4] {
    [y0, y0.add(y1), y0.sub(y1), y1]
}

/// The gradients of the three taps of one axis, from those of the transformed ones, lane by lane.
#[inline(always)]
fn filter_gradient([u0, u1, u2, u3]: [[f32; LANES]; 4]) -> [[f32; LANES]; 3] {
    [
        std::array::from_fn(|l| u0[l] + 0.5 * (u1[l] + u2[l])),
        std::array::from_fn(|l| 0.5 * (u1[l] - u2[l])),
        std::array::from_fn(|l| 0.5 * (u1[l] + u2[l]) + u3[l]),
    ]
}

/// The two outputs of one axis.
#[inline(always)]
fn output<V: Lanes>([m0, m1, m2, m3]: [V; 4]) -> [V; 2] {
    [m0.add(m1).add(m2), m1.sub(m2).add(m3)]
}

/// Four rows of voxels, one below the other, of which tiles are transformed: sixteen values each of a voxel.
pub trait Rows {
    /// Voxel `w`, transformed along h.
    ///
    /// # Safety
    /// The rows must have voxel `w`, and V's vector unit must exist.
    unsafe fn column<V: Lanes>(&self, w: usize) -> [V; 4];
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
    unsafe fn column<V: Lanes>(&self, w: usize) -> [V; 4] {
        // SAFETY: by the caller's promise.
        unsafe {
            let x = self.x.add(w * V::OPERANDS);
            let row = self.row;
            input([
                V::load_operands(x),
                V::load_operands(x.add(row)),
                V::load_operands(x.add(2 * row)),
                V::load_operands(x.add(3 * row)),
            ])
        }
    }
}

/// Rows of bfloat16 where a tensor has them, from the voxel before the first one on, which is 0.
pub struct Halves {
    /// The first voxel of each row, and values between voxels: 0 where a row of zeros is a single voxel.
    pub rows: [(*const u16, usize); 4],
    /// Voxels of a row. Those behind are 0.
    pub width: usize,
}

impl Rows for Halves {
    #[inline(always)]
    unsafe fn column<V: Lanes>(&self, w: usize) -> [V; 4] {
        let w = w.wrapping_sub(1);
        if w >= self.width {
            return [V::zero(); 4];
        }
        let [a, b, c, d] = self.rows;
        // SAFETY: by the caller's promise.
        unsafe {
            input([
                V::load_bf16(a.0.add(w * a.1)),
                V::load_bf16(b.0.add(w * b.1)),
                V::load_bf16(c.0.add(w * c.1)),
                V::load_bf16(d.0.add(w * d.1)),
            ])
        }
    }
}

/// Transforms a row of `tiles` tiles along w of one channel block, `2 tiles + 2` voxels of four rows, to 16 operands each in
/// `v[product * pitch + tile * step..]`.
///
/// # Safety
/// All of these must be readable and writable, and V's vector unit must exist.
#[inline(always)]
pub unsafe fn inputs<V: Lanes>(x: &impl Rows, tiles: usize, v: *mut f32, (pitch, step): (usize, usize)) {
    // SAFETY: inside both by the caller's promise.
    unsafe {
        let (mut first, mut second) = (x.column::<V>(0), x.column::<V>(1));
        for tile in 0..tiles {
            let (third, fourth) = (x.column::<V>(2 * tile + 2), x.column::<V>(2 * tile + 3));
            let v = v.add(tile * step);
            for i in 0..4 {
                let products = input([first[i], second[i], third[i], fourth[i]]);
                for j in 0..4 {
                    products[j].store_operands(v.add((4 * i + j) * pitch));
                }
            }
            (first, second) = (third, fourth);
        }
    }
}

/// The same for gradients of outputs: two rows of `2 tiles` voxels.
///
/// # Safety
/// As [`inputs`].
#[inline(always)]
pub unsafe fn gradients<V: Lanes>(
    dy: *const f32,
    row: usize,
    tiles: usize,
    to: *mut f32,
    (pitch, step): (usize, usize),
) {
    for tile in 0..tiles {
        // SAFETY: inside both by the caller's promise.
        unsafe {
            let column = |w: usize| {
                let dy = dy.add(w * LANES);
                gradient([V::load(dy), V::load(dy.add(row))])
            };
            let (first, second) = (column(2 * tile), column(2 * tile + 1));
            let to = to.add(tile * step);
            for i in 0..4 {
                let products = gradient([first[i], second[i]]);
                for j in 0..4 {
                    products[j].store(to.add((4 * i + j) * pitch));
                }
            }
        }
    }
}

/// The 2 x 2 outputs, `[h][w]`, of one tile's products, which lie every `pitch` floats from `m` on.
///
/// # Safety
/// The products must be readable, and V's vector unit must exist.
#[inline(always)]
pub unsafe fn outputs<V: Lanes>(m: *const f32, pitch: usize) -> [[V; 2]; 2] {
    let mut columns = [[V::zero(); 4]; 2];
    for j in 0..4 {
        // SAFETY: readable by the caller's promise.
        let product = |i: usize| unsafe { V::load(m.add((4 * i + j) * pitch)) };
        [columns[0][j], columns[1][j]] = output([product(0), product(1), product(2), product(3)]);
    }
    [output(columns[0]), output(columns[1])]
}

vectorised! {
    /// Transforms the taps in `x`, `[kd][kh][kw][channel][lane]`, to `out[product * pitch..]`, `[kd][channel][lane]` each.
    pub fn filters(x: &[f32], channels: usize, out: &mut [f32], pitch: usize) {
        let (x, _) = x.as_chunks::<LANES>();
        for (plane, x) in x.chunks_exact(9 * channels).enumerate() {
            for channel in 0..channels {
                let tap = |kh: usize, kw: usize| x[(3 * kh + kw) * channels + channel];
                let columns: [[[f32; LANES]; 4]; 3] =
                    std::array::from_fn(|kw| filter([tap(0, kw), tap(1, kw), tap(2, kw)]));
                let [first, second, third] = columns;
                let out = &mut out[(plane * channels + channel) * LANES..];
                for i in 0..4 {
                    for (j, product) in filter([first[i], second[i], third[i]]).into_iter().enumerate() {
                        out[(4 * i + j) * pitch..][..LANES].copy_from_slice(&product);
                    }
                }
            }
        }
    }

    /// Gradients of taps, `[kd][kh][kw][row]`, from those of products, `[product][kd][row]`; rows are whole lanes.
    pub fn filter_gradients(m: &[f32], out: &mut [f32]) {
        let ((m, _), (out, _)) = (m.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
        let pitch = m.len() / PRODUCTS;
        let rows = pitch / 3;
        for (plane, row) in (0..3).flat_map(|plane| (0..rows).map(move |row| (plane, row))) {
            let product = |i: usize, j: usize| m[(4 * i + j) * pitch + plane * rows + row];
            let columns: [[[f32; LANES]; 3]; 4] = std::array::from_fn(|j| {
                filter_gradient([product(0, j), product(1, j), product(2, j), product(3, j)])
            });
            let [first, second, third, fourth] = columns;
            for kh in 0..3 {
                let taps = filter_gradient([first[kh], second[kh], third[kh], fourth[kh]]);
                for (kw, tap) in taps.into_iter().enumerate() {
                    out[((plane * 3 + kh) * 3 + kw) * rows + row] = tap;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::Plain;
    use crate::rng::Philox;

    fn uniform<const N: usize>(rng: &mut Philox) -> [f32; N] {
        std::array::from_fn(|_| rng.range(-1.0, 1.0) as f32)
    }

    /// Lanes of voxels or taps.
    const VOXELS: usize = 16 * LANES;
    const TAPS: usize = 9 * LANES;

    fn transformed(x: &[f32; VOXELS]) -> [f32; VOXELS] {
        let mut v = [0.0; VOXELS];
        // SAFETY: four rows of four voxels make one tile of 16 products; plain Rust needs no feature.
        unsafe {
            inputs::<Plain>(&Plane { x: x.as_ptr(), row: 4 * LANES }, 1, v.as_mut_ptr(), (LANES, LANES))
        };
        v
    }

    fn transformed_taps(g: &[f32; TAPS]) -> [f32; VOXELS] {
        // `filters` takes three planes.
        let (planes, mut u) = ([*g; 3], [0.0; 3 * VOXELS]);
        filters(planes.as_flattened(), 1, &mut u, 3 * LANES);
        std::array::from_fn(|i| u[i / LANES * 3 * LANES + i % LANES])
    }

    /// Sums of a few dozen terms of at most 4: some roundings of 6e-8 each.
    const TOLERANCE: f64 = 1e-6;

    #[test]
    fn sixteen_products_make_the_outputs_of_a_tile() {
        let mut rng = Philox::new(7, 0);
        let (x, g): ([f32; VOXELS], [f32; TAPS]) = (uniform(&mut rng), uniform(&mut rng));
        let (v, u) = (transformed(&x), transformed_taps(&g));
        let m: [f32; VOXELS] = std::array::from_fn(|i| v[i] * u[i]);
        // SAFETY: 16 products; plain Rust needs no feature.
        let y = unsafe { outputs::<Plain>(m.as_ptr(), LANES) };
        for (h, w, lane) in (0..4).flat_map(|i| (0..LANES).map(move |lane| (i / 2, i % 2, lane))) {
            let mut lanes = [0.0; LANES];
            // SAFETY: 16 floats.
            unsafe { y[h][w].store(lanes.as_mut_ptr()) };
            let direct: f64 = (0..9)
                .map(|tap| {
                    let voxel = (h + tap / 3) * 4 + w + tap % 3;
                    f64::from(x[voxel * LANES + lane]) * f64::from(g[tap * LANES + lane])
                })
                .sum();
            assert!((f64::from(lanes[lane]) - direct).abs() < TOLERANCE, "{h} {w} {lane}");
        }
    }

    #[test]
    fn sixteen_gradients_make_the_gradients_of_the_taps() {
        let mut rng = Philox::new(8, 0);
        let (x, dy): ([f32; VOXELS], [f32; 4 * LANES]) = (uniform(&mut rng), uniform(&mut rng));
        let v = transformed(&x);
        let mut dm = [0.0; VOXELS];
        // SAFETY: two rows of two voxels make one tile of 16 products; plain Rust needs no feature.
        unsafe { gradients::<Plain>(dy.as_ptr(), 2 * LANES, 1, dm.as_mut_ptr(), (LANES, LANES)) };
        let products: [f32; VOXELS] = std::array::from_fn(|i| v[i] * dm[i]);
        // Three equal planes.
        let du: Vec<f32> = products.chunks_exact(LANES).flat_map(|p| [p, p, p]).flatten().copied().collect();
        let mut dg = [0.0; 3 * TAPS];
        filter_gradients(&du, &mut dg);
        for (i, &value) in dg.iter().enumerate() {
            let (tap, lane) = (i / LANES % 9, i % LANES);
            let direct: f64 = (0..4)
                .map(|o| {
                    let voxel = (o / 2 + tap / 3) * 4 + o % 2 + tap % 3;
                    f64::from(x[voxel * LANES + lane]) * f64::from(dy[o * LANES + lane])
                })
                .sum();
            assert!((f64::from(value) - direct).abs() < TOLERANCE, "{i}: {value} {direct}");
        }
    }
}

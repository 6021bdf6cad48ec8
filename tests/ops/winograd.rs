//! A convolution of kernel 3 and stride 1 by F(2 x 2, 3 x 3) in its planes, whose transformed operands are rounded to
//! bfloat16, from the formulas of Lavin and Gray (CVPR 2016): sums in f64.

use half::bf16;

/// Four inputs of one axis, to be multiplied: B^T d, in f32 as the library rounds it.
fn input([d0, d1, d2, d3]: [f32; 4]) -> [f32; 4] {
    [d0 - d2, d1 + d2, d2 - d1, d3 - d1]
}

/// Three taps of one axis, to be multiplied: G g, in f32 likewise.
fn filter([g0, g1, g2]: [f32; 3]) -> [f32; 4] {
    [g0, 0.5 * ((g0 + g2) + g1), 0.5 * ((g0 + g2) - g1), g2]
}

/// Two outputs of one axis: A^T m.
fn output([m0, m1, m2, m3]: [f64; 4]) -> [f64; 2] {
    [m0 + m1 + m2, m1 - m2 + m3]
}

/// Both axes of a square, columns first.
fn both<T: Copy + Default, const A: usize, const B: usize>(
    x: [[T; A]; A],
    axis: impl Fn([T; A]) -> [T; B],
) -> [[T; B]; B] {
    let columns: [[T; B]; A] = std::array::from_fn(|w| axis(std::array::from_fn(|h| x[h][w])));
    std::array::from_fn(|i| axis(std::array::from_fn(|w| columns[w][i])))
}

/// `y[o] = sum over c and taps of x[c] * weight(o, c, tap)`, NDHWC, 27 taps with w the fastest. The x are values of bfloat16.
pub fn correlate(
    n: usize,
    [d, h, w]: [usize; 3],
    (x, channels): (&[f64], usize),
    outputs: usize,
    weight: impl Fn(usize, usize, usize) -> f32,
) -> Vec<f64> {
    let value = |n: usize, [z, y, x_]: [usize; 3], c: usize| {
        // Coordinates are one too large, so that those before the volume are 0.
        let inside = (1..=d).contains(&z) && (1..=h).contains(&y) && (1..=w).contains(&x_);
        if inside { x[(((n * d + z - 1) * h + y - 1) * w + x_ - 1) * channels + c] as f32 } else { 0.0 }
    };
    let mut filters = Vec::with_capacity(outputs * channels * 3);
    for (o, c, kd) in triples([outputs, channels, 3]) {
        let taps = std::array::from_fn(|kh| std::array::from_fn(|kw| weight(o, c, 9 * kd + 3 * kh + kw)));
        filters.push(both(taps, filter).map(|row| row.map(|v| bf16::from_f32(v).to_f64())));
    }
    let mut y = vec![0.0; n * d * h * w * outputs];
    for (n, (z, th, tw)) in
        (0..n).flat_map(|n| triples([d, h.div_ceil(2), w.div_ceil(2)]).map(move |t| (n, t)))
    {
        let (h0, w0) = (2 * th, 2 * tw);
        let tile = |c: usize, kd: usize| {
            let voxel = |i: usize, j: usize| value(n, [z + kd, h0 + i, w0 + j], c);
            let x = std::array::from_fn(|i| std::array::from_fn(|j| voxel(i, j)));
            both(x, input).map(|row| row.map(|v| bf16::from_f32(v).to_f64()))
        };
        let tiles: Vec<[[f64; 4]; 4]> =
            (0..channels).flat_map(|c| (0..3).map(move |kd| (c, kd))).map(|(c, kd)| tile(c, kd)).collect();
        for (o, filters) in filters.chunks(3 * channels).enumerate() {
            let product = |i: usize, j: usize| {
                tiles.iter().zip(filters).map(|(v, u): (_, &[[f64; 4]; 4])| v[i][j] * u[i][j]).sum::<f64>()
            };
            let m = std::array::from_fn(|i| std::array::from_fn(|j| product(i, j)));
            let tile = both(m, output);
            for (a, b) in (0..2.min(h - h0)).flat_map(|a| (0..2.min(w - w0)).map(move |b| (a, b))) {
                y[(((n * d + z) * h + h0 + a) * w + w0 + b) * outputs + o] = tile[a][b];
            }
        }
    }
    y
}

fn triples([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

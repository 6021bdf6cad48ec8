//! Convolutions of kernel 3 by minimal filtering in their planes or along all axes, whose transformed operands are rounded to
//! bfloat16: sums in f64. F(2, 3) is that of Lavin and Gray (CVPR 2016); of stride 2, one way or the other, every other tap is
//! filtered by F(2, 2): three products (d0 - d1) g0, d1 (g0 + g1), (d2 - d1) g1 for d0 g0 + d1 g1 and d1 g0 + d2 g1.

use half::bf16;

/// How two neighbouring anchors of an axis are made of products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    /// Stride 1: two outputs of four inputs.
    Dense,
    /// Stride 2: two outputs of five inputs.
    Strided,
    /// Its transpose: four outputs of three inputs.
    Scattered,
    /// Stride 1, along D, too.
    Cubes,
}

impl Filtering {
    /// That of a convolution.
    pub fn of(stride: usize, transposed: bool) -> Self {
        match (stride, transposed) {
            (1, _) => Filtering::Dense,
            (_, false) => Filtering::Strided,
            (_, true) => Filtering::Scattered,
        }
    }

    /// Whether it is of stride 1.
    fn is_dense(self) -> bool {
        matches!(self, Filtering::Dense | Filtering::Cubes)
    }

    /// Products of two anchors.
    fn products(self) -> usize {
        if self.is_dense() { 4 } else { 5 }
    }

    /// Outputs of two anchors.
    fn outputs(self) -> usize {
        if self == Filtering::Scattered { 4 } else { 2 }
    }

    /// What is multiplied of the inputs, in f32 as the library rounds it.
    fn input(self, d: &[f32]) -> Vec<f32> {
        match self {
            Filtering::Dense | Filtering::Cubes => vec![d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]],
            Filtering::Strided => vec![d[0] - d[2], d[2], d[4] - d[2], d[1], d[3]],
            Filtering::Scattered => vec![d[0] - d[1], d[1], d[2] - d[1], d[0], d[1]],
        }
    }

    /// What it is multiplied by, in f32 likewise.
    fn filter(self, g: &[f32]) -> Vec<f32> {
        match self {
            Filtering::Dense | Filtering::Cubes => {
                vec![g[0], 0.5 * ((g[0] + g[2]) + g[1]), 0.5 * ((g[0] + g[2]) - g[1]), g[2]]
            }
            Filtering::Strided => vec![g[0], g[0] + g[2], g[2], g[1], g[1]],
            Filtering::Scattered => vec![g[2], g[0] + g[2], g[0], g[1], g[1]],
        }
    }

    /// The outputs of the products.
    fn output(self, m: &[f64]) -> Vec<f64> {
        match self {
            Filtering::Dense | Filtering::Cubes => vec![m[0] + m[1] + m[2], m[1] - m[2] + m[3]],
            Filtering::Strided => vec![m[0] + m[1] + m[3], m[1] + m[2] + m[4]],
            Filtering::Scattered => vec![m[3], m[0] + m[1], m[4], m[1] + m[2]],
        }
    }

    /// What inputs' transforms are multiplied by for the gradients of products: the transpose of [`Self::output`], in f32 likewise.
    fn output_gradient(self, y: &[f32]) -> Vec<f32> {
        match self {
            Filtering::Dense | Filtering::Cubes => vec![y[0], y[0] + y[1], y[0] - y[1], y[1]],
            Filtering::Strided => vec![y[0], y[0] + y[1], y[1], y[0], y[1]],
            Filtering::Scattered => unreachable!("gradients of weights gather"),
        }
    }

    /// The gradients of taps from those of products: the transpose of [`Self::filter`].
    fn filter_gradient(self, m: &[f64]) -> Vec<f64> {
        match self {
            Filtering::Dense | Filtering::Cubes => {
                vec![m[0] + 0.5 * (m[1] + m[2]), 0.5 * (m[1] - m[2]), 0.5 * (m[1] + m[2]) + m[3]]
            }
            Filtering::Strided => vec![m[0] + m[1], m[3] + m[4], m[1] + m[2]],
            Filtering::Scattered => unreachable!("gradients of weights gather"),
        }
    }

    /// The first input of tile `t` and how many it reads.
    fn inputs(self, t: usize) -> (isize, usize) {
        let t = t as isize;
        match self {
            Filtering::Dense | Filtering::Cubes => (2 * t - 1, 4),
            Filtering::Strided => (4 * t - 1, 5),
            Filtering::Scattered => (2 * t, 3),
        }
    }

    /// (Input, tap) of the products of output `o` along an axis that is not filtered.
    fn direct(self, o: usize) -> Vec<(isize, usize)> {
        let i = o as isize;
        match self {
            Filtering::Dense | Filtering::Cubes => (0..3).map(|k| (i - 1 + k as isize, k)).collect(),
            Filtering::Strided => (0..3).map(|k| (2 * i - 1 + k as isize, k)).collect(),
            Filtering::Scattered if o.is_multiple_of(2) => vec![(i / 2, 1)],
            Filtering::Scattered => vec![(i / 2, 2), (i / 2 + 1, 0)],
        }
    }

    /// Whether the library multiplies transforms of bfloat16: from 16 channels on both sides, where a third at least (stride 1, or a
    /// quarter) of 9 products an anchor of a plane is saved.
    pub fn pays(self, out_space: [usize; 3], inputs: usize, outputs: usize) -> bool {
        inputs.min(outputs) >= 16 && self.saves(out_space, out_space)
    }

    /// Whether it multiplies transforms along D, too, in inference: from 32 channels on both sides, and two planes.
    pub fn is_of_cubes(self, [d, ..]: [usize; 3], inputs: usize, outputs: usize) -> bool {
        self == Filtering::Dense && inputs.min(outputs) >= 32 && d >= 2
    }

    /// Whether the tiles of `tiled` have as few products as that beside the anchors of `out_space`.
    pub fn saves(self, tiled: [usize; 3], out_space: [usize; 3]) -> bool {
        let anchors = |space: [usize; 3]| space.map(|s| s.div_ceil(self.outputs() / 2));
        let ([_, h, w], [_, tiled_h, tiled_w]) = (anchors(out_space), anchors(tiled));
        let products = self.products().pow(2) * tiled_h.div_ceil(2) * tiled_w.div_ceil(2);
        let [left, of] = if self == Filtering::Dense { [2, 3] } else { [3, 4] };
        of * products <= left * 9 * h * w
    }
}

/// Both axes of a square of `rows` by `rows`, columns first.
fn both<T: Copy>(x: &[T], rows: usize, axis: impl Fn(&[T]) -> Vec<T>) -> Vec<T> {
    let columns: Vec<Vec<T>> =
        (0..rows).map(|w| axis(&(0..rows).map(|h| x[h * rows + w]).collect::<Vec<_>>())).collect();
    (0..columns[0].len()).flat_map(|i| axis(&columns.iter().map(|c| c[i]).collect::<Vec<_>>())).collect()
}

/// `y[o] = sum over c and taps of x[c] * weight(o, c, tap)`, NDHWC, 27 taps with w the fastest. The x are values of bfloat16.
pub fn correlate(
    filtering: Filtering,
    n: usize,
    [space, out_space]: [[usize; 3]; 2],
    (x, channels): (&[f64], usize),
    outputs: usize,
    weight: impl Fn(usize, usize, usize) -> f32,
) -> Vec<f64> {
    let x = Volume { values: x, space, channels };
    let cubes = filtering == Filtering::Cubes;
    // [o][c][plane][product], planes of taps along D or of products.
    let mut filters = Vec::with_capacity(outputs * channels * 4);
    for (o, c, _) in triples([outputs, channels, 1]) {
        let of_plane = |kd: usize| (0..9).map(|tap| weight(o, c, 9 * kd + tap)).collect();
        let planes = along_d((0..3).map(of_plane).collect(), cubes, |g| filtering.filter(g));
        filters.extend(planes.iter().map(|taps| rounded(both(taps, 3, |g| filtering.filter(g)))));
    }
    let planes = filters.len() / (outputs * channels);
    let [out_d, out_h, out_w] = out_space;
    let size = filtering.outputs();
    let deep = if cubes { size } else { 1 };
    let mut y = vec![0.0; n * out_d * out_h * out_w * outputs];
    let tiles = [out_d.div_ceil(deep), out_h.div_ceil(size), out_w.div_ceil(size)];
    for (n, (td, th, tw)) in (0..n).flat_map(|n| triples(tiles).map(move |t| (n, t))) {
        let ((h0, reads), (w0, _)) = (filtering.inputs(th), filtering.inputs(tw));
        // (input plane, plane of filters)
        let depth: Vec<(isize, usize)> = match filtering.inputs(td) {
            (d0, reads) if cubes => (0..reads).map(|i| (d0 + i as isize, i)).collect(),
            _ => filtering.direct(td),
        };
        let tile = |c: usize| {
            let squares = depth.iter().map(|&(z, _)| x.square(n, [z, h0, w0], reads, c)).collect();
            let planes = along_d(squares, cubes, |d| filtering.input(d));
            planes.into_iter().map(|plane| rounded(both(&plane, reads, |d| filtering.input(d))))
        };
        let tiles: Vec<(usize, Vec<f64>)> = (0..channels)
            .flat_map(|c| depth.iter().zip(tile(c)).map(move |(&(_, kd), tile)| (planes * c + kd, tile)))
            .collect();
        for (o, filters) in filters.chunks(planes * channels).enumerate() {
            let sums = |of: &dyn Fn(usize) -> bool| -> Vec<f64> {
                let terms: Vec<_> = tiles.iter().filter(|(filter, _)| of(filter % planes)).collect();
                let product = |i: usize| terms.iter().map(|(filter, v)| v[i] * filters[*filter][i]).sum();
                (0..filtering.products().pow(2)).map(product).collect()
            };
            let m = match cubes {
                true => (0..planes).map(|plane| sums(&|of| of == plane)).collect(),
                false => vec![sums(&|_| true)],
            };
            for (i, m) in along_d(m, cubes, |m| filtering.output(m)).iter().enumerate() {
                let tile = both(m, filtering.products(), |m| filtering.output(m));
                let (z, h0, w0) = (deep * td + i, size * th, size * tw);
                if z >= out_d {
                    continue;
                }
                for (a, b) in
                    (0..size.min(out_h - h0)).flat_map(|a| (0..size.min(out_w - w0)).map(move |b| (a, b)))
                {
                    let voxel = ((n * out_d + z) * out_h + h0 + a) * out_w + w0 + b;
                    y[voxel * outputs + o] = tile[size * a + b];
                }
            }
        }
    }
    y
}

/// Planes of equal size, transformed along D if `filtered`.
fn along_d<T: Copy>(planes: Vec<Vec<T>>, filtered: bool, axis: impl Fn(&[T]) -> Vec<T>) -> Vec<Vec<T>> {
    if !filtered {
        return planes;
    }
    let lines: Vec<Vec<T>> =
        (0..planes[0].len()).map(|i| axis(&planes.iter().map(|p| p[i]).collect::<Vec<_>>())).collect();
    (0..lines[0].len()).map(|d| lines.iter().map(|line| line[d]).collect()).collect()
}

/// `dw(o, c, tap) = sum over anchors of dy[o] * x[c]`, `[o][c][tap]`: x lies on the first space, dy on the anchors' own. They are
/// values of bfloat16.
pub fn wgrad(
    filtering: Filtering,
    n: usize,
    [space, anchors]: [[usize; 3]; 2],
    (x, channels): (&[f64], usize),
    (dy, outputs): (&[f64], usize),
) -> Vec<f64> {
    let x = Volume { values: x, space, channels };
    let dy = Volume { values: dy, space: anchors, channels: outputs };
    let products = filtering.products().pow(2);
    // [o][c][kd][product]
    let mut m = vec![0.0; outputs * channels * 3 * products];
    let [d, h, w] = anchors;
    for (n, (z, th, tw)) in
        (0..n).flat_map(|n| triples([d, h.div_ceil(2), w.div_ceil(2)]).map(move |t| (n, t)))
    {
        let ((h0, reads), (w0, _)) = (filtering.inputs(th), filtering.inputs(tw));
        let depth = filtering.direct(z);
        let inputs = |c: usize, kd: usize| {
            let x = x.square(n, [depth[kd].0, h0, w0], reads, c);
            rounded(both(&x, reads, |d| filtering.input(d)))
        };
        let inputs: Vec<Vec<f64>> = triples([1, channels, 3]).map(|(_, c, kd)| inputs(c, kd)).collect();
        for o in 0..outputs {
            let dy = dy.square(n, [z as isize, 2 * th as isize, 2 * tw as isize], 2, o);
            let dy = rounded(both(&dy, 2, |y| filtering.output_gradient(y)));
            let of_output = m.chunks_mut(channels * 3 * products).nth(o).expect("one an output");
            for (m, x) in of_output.chunks_mut(products).zip(&inputs) {
                m.iter_mut().zip(x.iter().zip(&dy)).for_each(|(m, (x, dy))| *m += x * dy);
            }
        }
    }
    let taps = |m: &[f64]| both(m, filtering.products(), |m| filtering.filter_gradient(m));
    m.chunks(products).flat_map(taps).collect()
}

/// Values of bfloat16, NDHWC.
struct Volume<'a> {
    values: &'a [f64],
    space: [usize; 3],
    channels: usize,
}

impl Volume<'_> {
    /// `side` rows of as many voxels from one on, which may lie outside, where values are 0.
    fn square(&self, n: usize, [z, h0, w0]: [isize; 3], side: usize, c: usize) -> Vec<f32> {
        let [d, h, w] = self.space.map(|s| s as isize);
        let value = |i: usize| {
            let (y, x) = (h0 + (i / side) as isize, w0 + (i % side) as isize);
            let inside = (0..d).contains(&z) && (0..h).contains(&y) && (0..w).contains(&x);
            let voxel = ((n as isize * d + z) * h + y) * w + x;
            if inside { self.values[voxel as usize * self.channels + c] as f32 } else { 0.0 }
        };
        (0..side * side).map(value).collect()
    }
}

fn rounded(v: Vec<f32>) -> Vec<f64> {
    v.iter().map(|&v| bf16::from_f32(v).to_f64()).collect()
}

fn triples([a, b, c]: [usize; 3]) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |i| (i / (b * c), i / c % b, i % c))
}

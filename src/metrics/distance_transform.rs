//! Exact Euclidean distance transform on an anisotropic grid.
//!
//! D²(x) = min over set voxels y of Σ_axis (spacing·(x − y))². The minimum separates: axis after axis, every line
//! becomes the lower envelope of one parabola a voxel (Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled
//! Functions", 2012). Linear in the number of voxels; lines are independent, so the result does not depend on threads.

use rayon::prelude::*;

/// Squared distance in mm² from every voxel's centre to the nearest set voxel's; infinite if nothing is set.
/// `set` holds `shape` voxels in C order, `spacing_mm` is along the same axes. Computed in f64.
pub fn squared(set: &[bool], shape: [usize; 3], spacing_mm: [f64; 3]) -> Vec<f64> {
    let [w0, w1, w2] = spacing_mm.map(|s| s * s);
    let start = set.iter().map(|&s| if s { 0.0 } else { f64::INFINITY }).collect::<Vec<_>>();
    // Each pass turns the axes by one, so that lines are written contiguously; three passes restore their order.
    let [n0, n1, n2] = shape;
    let along_1 = pass(&start, [n0, n1, n2], w1);
    let along_0 = pass(&along_1, [n2, n0, n1], w0);
    pass(&along_0, [n1, n2, n0], w2)
}

/// Transforms the lines along the middle axis of `src`, which has axes (a, b, c); the result has axes (c, a, b).
fn pass(src: &[f64], [na, nb, nc]: [usize; 3], weight: f64) -> Vec<f64> {
    let mut out = vec![0.0; src.len()];
    if src.is_empty() {
        return out;
    }
    out.par_chunks_mut(na * nb).enumerate().for_each(|(c, plane)| {
        let mut envelope = Envelope::default();
        for (a, line) in plane.chunks_exact_mut(nb).enumerate() {
            let values = (0..nb).map(|b| src[(a * nb + b) * nc + c]);
            envelope.build(values, weight);
            envelope.write(line, weight);
        }
    });
    out
}

/// The lower envelope of parabolas weight·(x − at)² + floor.
#[derive(Default)]
struct Envelope {
    /// Parabolas that touch the envelope, left to right: (at, floor, where it begins).
    parts: Vec<(f64, f64, f64)>,
}

impl Envelope {
    /// One parabola for every finite value, at its index.
    fn build(&mut self, floors: impl Iterator<Item = f64>, weight: f64) {
        self.parts.clear();
        for (at, floor) in floors.enumerate().filter(|(_, f)| f.is_finite()) {
            let at = at as f64;
            let mut begin = f64::NEG_INFINITY;
            while let Some(&(v, f, start)) = self.parts.last() {
                // The abscissa where the new parabola goes below the last one.
                begin = (at + v) / 2.0 + (floor - f) / (2.0 * weight * (at - v));
                if begin > start {
                    break;
                }
                self.parts.pop();
                begin = f64::NEG_INFINITY;
            }
            self.parts.push((at, floor, begin));
        }
    }

    /// The envelope's value at every index of `line`.
    fn write(&self, line: &mut [f64], weight: f64) {
        let mut parts = self.parts.iter().peekable();
        let Some(&(mut at, mut floor, _)) = parts.next() else { return line.fill(f64::INFINITY) };
        for (x, out) in line.iter_mut().enumerate() {
            let x = x as f64;
            while let Some(&(v, f, _)) = parts.next_if(|p| p.2 <= x) {
                (at, floor) = (v, f);
            }
            *out = weight * (x - at) * (x - at) + floor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    /// All pairs: the definition.
    fn brute(set: &[bool], [_, n1, n2]: [usize; 3], s: [f64; 3]) -> Vec<f64> {
        let at = |i: usize| [i / (n1 * n2), i / n2 % n1, i % n2].map(|v| v as f64);
        let on: Vec<[f64; 3]> = (0..set.len()).filter(|&i| set[i]).map(at).collect();
        let distance =
            |x: [f64; 3], y: &[f64; 3]| (0..3).map(|a| (s[a] * (x[a] - y[a])).powi(2)).sum::<f64>();
        (0..set.len()).map(|i| on.iter().map(|y| distance(at(i), y)).fold(f64::INFINITY, f64::min)).collect()
    }

    #[test]
    fn equals_all_pairs() {
        let mut rng = Philox::keyed(11, &[1]);
        for trial in 0..60 {
            let shape: [usize; 3] = std::array::from_fn(|_| 1 + rng.below(11) as usize);
            let spacing: [f64; 3] = std::array::from_fn(|_| rng.range(0.3, 6.0));
            let density = [0.01, 0.1, 0.6][trial % 3];
            let set: Vec<bool> = (0..shape.iter().product()).map(|_| rng.uniform() < density).collect();
            let (got, want) = (squared(&set, shape, spacing), brute(&set, shape, spacing));
            for (g, w) in got.iter().zip(&want) {
                // Both round a handful of f64 operations on numbers below 1e4.
                assert!(g == w || (g - w).abs() <= 1e-11 * w, "{shape:?} {spacing:?}: {g} for {w}");
            }
        }
    }

    #[test]
    fn nothing_set_is_infinitely_far() {
        assert!(squared(&[false; 24], [2, 3, 4], [1.0; 3]).iter().all(|d| d.is_infinite()));
        assert!(squared(&[], [0, 3, 4], [1.0; 3]).is_empty());
    }
}

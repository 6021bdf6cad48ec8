//! The goldens' hash numbers and digests (head of their MANIFEST.md).

use crate::tensor::{Dtype, Tensor};

const GOLDEN_RATIO: u64 = 0x9E37_79B9_7F4A_7C15;

/// 64-bit FNV-1a.
pub fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// `n` numbers in [-1, 1): splitmix64 started from the name's hash and the seed.
pub fn hash_uniform(name: &str, n: usize, seed: u64) -> impl Iterator<Item = f64> {
    let s = fnv1a64(name) ^ seed.wrapping_mul(GOLDEN_RATIO);
    (1..=n as u64).map(move |i| {
        let mut z = s.wrapping_add(i.wrapping_mul(GOLDEN_RATIO));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 11) as f64 * (1.0 / (1u64 << 53) as f64) * 2.0 - 1.0
    })
}

/// The MANIFEST's `ht(name, shape) * scale + offset`: f64 arithmetic, rounded once to f32.
pub fn hash_tensor(name: &str, shape: &[usize], seed: u64, scale: f64, offset: f64) -> Tensor {
    let n = shape.iter().product();
    let data = hash_uniform(name, n, seed).map(|u| f64::from((u * scale + offset) as f32)).collect();
    Tensor { dtype: Dtype::F32, shape: shape.to_vec(), data }
}

/// [numel, sum, sum|x|, sum x^2, min, max, <x, probe1>, <x, probe2>].
pub fn digest(x: &[f64]) -> [f64; 8] {
    let sum = |f: fn(f64) -> f64| x.iter().map(|&v| f(v)).sum::<f64>();
    let dot = |probe| x.iter().zip(hash_uniform(probe, x.len(), 0)).map(|(a, b)| a * b).sum::<f64>();
    // NaN must not hide: f64::min and f64::max would skip it.
    let fold = |f: fn(f64, f64) -> f64, start| {
        x.iter().fold(start, |m: f64, &v| if m.is_nan() || v.is_nan() { f64::NAN } else { f(m, v) })
    };
    [
        x.len() as f64,
        sum(|v| v),
        sum(f64::abs),
        sum(|v| v * v),
        fold(f64::min, f64::INFINITY),
        fold(f64::max, f64::NEG_INFINITY),
        dot("probe1"),
        dot("probe2"),
    ]
}

/// The values at flat indices floor(i * numel / k), i < k, and those indices.
pub fn samples(x: &[f64], k: usize) -> impl Iterator<Item = (usize, f64)> {
    (0..k).map(move |i| i * x.len() / k.max(1)).map(|at| (at, x[at]))
}

//! How much each voxel of a window counts in the blend (MONAI `compute_importance_map`).
//!
//! Constant: 1. Gaussian: the product over the axes of exp(-x^2 / (2 sigma^2)), x = -(L-1)/2 .. (L-1)/2 and
//! sigma = L/8, clamped from below to max(min, 1e-3). It is not normalised: the blend divides by the sum.

use crate::config::Blend;

/// Sigma as a share of the window's side (MONAI `sigma_scale`).
const SIGMA_SCALE: f64 = 0.125;
/// No voxel counts less than this: corners of the Gaussian are about 1e-10 and would amplify rounding.
const FLOOR: f32 = 1e-3;

/// The weights of a window of `roi` = (D, H, W) voxels, in C order, in MONAI's float32 arithmetic.
pub fn importance_map(roi: [usize; 3], blend: Blend) -> Vec<f32> {
    if blend == Blend::Constant {
        return vec![1.0; roi.iter().product()];
    }
    let [d, h, w] = roi.map(gaussian);
    let mut map = Vec::with_capacity(roi.iter().product());
    for &a in &d {
        for &b in &h {
            // The plane is rounded to float32 before the third axis multiplies it, as in MONAI.
            let plane = a * b;
            map.extend(w.iter().map(|&c| plane * c));
        }
    }
    let floor = map.iter().copied().fold(f32::INFINITY, f32::min).max(FLOOR);
    map.iter_mut().for_each(|v| *v = v.max(floor));
    map
}

/// One axis of `len` voxels. The exponent is rounded to float32 like torch's; exp itself is taken in float64 and
/// rounded once, so that it does not hang on the platform's `expf`.
fn gaussian(len: usize) -> Vec<f32> {
    let sigma = len as f64 * SIGMA_SCALE;
    let scale = (-2.0 * sigma * sigma) as f32;
    let half = (len as f64 - 1.0) / 2.0;
    (0..len)
        .map(|i| {
            let x = (i as f64 - half) as f32;
            f64::from(x * x / scale).exp() as f32
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// numerics.md 14: of 96^3 voxels 58 % lie on the floor and the largest weight is 0.9974.
    #[test]
    fn the_bundle_window_matches_the_published_shares() {
        let map = importance_map([96; 3], Blend::Gaussian);
        let floor = map.iter().filter(|&&v| v == FLOOR).count() as f64 / map.len() as f64;
        let max = map.iter().copied().fold(0.0, f32::max);
        assert!((floor - 0.58).abs() < 0.005, "{floor}");
        assert!((max - 0.9974).abs() < 5e-5, "{max}");
    }

    #[test]
    fn the_map_is_symmetric() {
        let (d, h, w) = (6, 5, 4);
        let map = importance_map([d, h, w], Blend::Gaussian);
        let mirrored: Vec<f32> = map.iter().rev().copied().collect();
        assert_eq!(map, mirrored);
    }
}

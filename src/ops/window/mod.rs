//! Sliding windows over a volume on a device: gather, blend, softmax.
//!
//! The sliding window of the `infer` module is the definition, and does the same on the CPU.

pub mod cuda;

use crate::device::cuda::{Compared, Cuda, SelfTest, agree};
use crate::error::Result;
use crate::ops::self_test::{SUMS, uniform, upload};
use crate::tensor::{Shape, View};
use std::sync::Arc;

/// Voxels that some windows cover between them: first voxel and size of their bounding box within a volume of `shape`.
/// Every corner's window covers part of it.
fn hull(corners: &[[i32; 3]], roi: [usize; 3], shape: [usize; 3]) -> ([usize; 3], [usize; 3]) {
    let start = [0, 1, 2].map(|a| corners.iter().map(|c| c[a].max(0) as usize).min().unwrap_or(0));
    let end = |a: usize| {
        let reach = |c: &[i32; 3]| (i64::from(c[a]) + roi[a] as i64).clamp(0, shape[a] as i64) as usize;
        corners.iter().map(reach).max().unwrap_or(0)
    };
    (start, std::array::from_fn(|a| end(a).saturating_sub(start[a])))
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest { name: "window", run: self_test }];

/// Eight windows that overlap, gathered and blended.
fn self_test(cuda: &Arc<Cuda>) -> Result<String> {
    let (shape @ [d, h, w], roi @ [rd, rh, rw]) = ([5, 6, 12], [4, 4, 8]);
    let starts = [vec![0, 1], vec![0, 2], vec![0, 4]];
    let (image, weights) = (uniform(1, d * h * w), uniform(2, rd * rh * rw));
    let logits = uniform(3, 8 * weights.len() * 2);
    let (mut windows, mut sums) = (Vec::new(), vec![0.0; image.len() * 2]);
    for number in 0..8 {
        let corner = [number / 4, number / 2 % 2 * 2, number % 2 * 4];
        for (voxel, weight) in weights.iter().enumerate() {
            let at = [voxel / (rh * rw), voxel / rw % rh, voxel % rw];
            let at = ((corner[0] + at[0]) * h + corner[1] + at[1]) * w + corner[2] + at[2];
            windows.push(image[at]);
            for c in 0..2 {
                sums[2 * at + c] += weight * logits[2 * (number * weights.len() + voxel) + c];
            }
        }
    }

    let tiling = cuda::Tiling::new(cuda, shape, roi, starts, Some(&weights))?;
    let image = cuda::Image { data: upload(cuda, &image)?, whole: shape, start: [0; 3], shape };
    let gathered = tiling.gather(&image, 0..8)?;
    let blended = tiling.zero_sums()?;
    tiling.blend(&View::plain(upload(cuda, &logits)?, Shape::new(8, roi, 2)), 0, &blended)?;
    let got = blended.slice(0, sums.len()).download()?;
    agree(&[
        Compared { name: "windows", got: gathered.data.download()?, want: windows, allowed: 0.0 },
        Compared { name: "sums", got, want: sums, allowed: SUMS },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hulls_stay_within_the_volume() {
        assert_eq!(hull(&[[0, 8, 16]], [16; 3], [40; 3]), ([0, 8, 16], [16; 3]));
        assert_eq!(hull(&[[0, 8, 24], [0, 24, 0]], [16; 3], [40; 3]), ([0, 8, 0], [16, 32, 40]));
        assert_eq!(hull(&[[-3, -1, 4]], [16; 3], [10, 15, 20]), ([0, 0, 4], [10, 15, 16]));
        assert_eq!(hull(&[], [16; 3], [40; 3]), ([0; 3], [0; 3]));
    }
}

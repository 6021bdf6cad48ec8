//! Sliding windows over a volume on a device: gather, blend, softmax.
//!
//! The sliding window of the `infer` module is the definition, and does the same on the CPU.

pub mod cuda;

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

//! One blocked, parallel transposition for every change of axis order.

use rayon::prelude::*;

/// Edge of a tile in voxels: 16 floats are a cache line, so each line is used up whichever axis is contiguous.
const TILE: usize = 16;

/// Where a voxel of the result comes from: `first` + Σ index · stride, in elements of the source.
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    /// Source element of voxel (0, 0, 0).
    pub first: usize,
    /// Step along each axis of the result; negative where the axis is flipped.
    pub step: [isize; 3],
}

/// Volume of `shape` (last axis fastest) whose voxels are `get(source element)`.
pub fn gather<T: Copy + Default + Send>(
    shape: [usize; 3],
    from: Strides,
    get: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let [n0, n1, n2] = shape;
    let mut result = vec![T::default(); n0 * n1 * n2];
    if result.is_empty() {
        return result;
    }
    let source = |index: [usize; 3]| {
        (0..3).fold(from.first as isize, |at, a| at + index[a] as isize * from.step[a]) as usize
    };
    result.par_chunks_mut(TILE * n1 * n2).enumerate().for_each(|(block, slabs)| {
        for b0 in (0..n1).step_by(TILE) {
            for c0 in (0..n2).step_by(TILE) {
                let c1 = n2.min(c0 + TILE);
                for (a, slab) in slabs.chunks_exact_mut(n1 * n2).enumerate() {
                    for b in b0..n1.min(b0 + TILE) {
                        let start = source([block * TILE + a, b, c0]) as isize;
                        for (c, voxel) in slab[b * n2 + c0..b * n2 + c1].iter_mut().enumerate() {
                            *voxel = get((start + c as isize * from.step[2]) as usize);
                        }
                    }
                }
            }
        }
    });
    result
}

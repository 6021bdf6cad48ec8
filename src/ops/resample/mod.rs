//! From a scan's voxels to the network's grid and from probabilities to a mask of the scan, on a device.
//!
//! [`crate::data::preprocess`] is the definition, and does the same on the CPU.

pub mod cuda;

use crate::config::Preprocess;
use crate::data::preprocess::{Geometry, preprocess};
use crate::data::transpose::{Strides, gather};
use crate::data::volume::{FileVoxels, Volume};
use crate::device::cuda::{Compared, Cuda, SelfTest, agree};
use crate::error::{Error, Result};
use crate::ops::self_test::{stored, uniform};
use std::sync::Arc;

/// Edge of a tile, in voxels of the output.
const TILE: usize = 32;

/// A device counts voxels in 32 bits and blocks in 31.
const MAX_VOXELS: usize = (1 << 31) - 1;

/// How a launch cuts an output grid into tiles of 32 x 32 voxels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Along which the source is contiguous, or nearest to it: a warp's lanes while it reads.
    lane_axis: usize,
    /// The tile's other axis.
    row_axis: usize,
    /// Whether the result is contiguous along the rows: lanes and rows change places before it is written.
    turn: bool,
    /// Tiles.
    blocks: u32,
}

/// Plans a grid of `out` voxels that is read through `from` and written through `to`.
fn plan(out: [usize; 3], from: &Strides, to: &Strides) -> Plan {
    // An axis of one voxel is contiguous for nobody.
    let nearness = |strides: &Strides, axis: usize| (out[axis] == 1, strides.step[axis].unsigned_abs());
    let mut by_read = [0, 1, 2];
    by_read.sort_by_key(|&axis| nearness(from, axis));
    let mut by_write = [0, 1, 2];
    by_write.sort_by_key(|&axis| nearness(to, axis));
    let lane_axis = by_read[0];
    let turn = by_write[0] != lane_axis;
    let row_axis = if turn { by_write[0] } else { by_write[1] };
    let slabs = out[3 - lane_axis - row_axis];
    let blocks = out[lane_axis].div_ceil(TILE) * out[row_axis].div_ceil(TILE) * slabs;
    Plan { lane_axis, row_axis, turn, blocks: blocks as u32 }
}

/// Refuses grids that a device cannot count.
fn countable(shape: [usize; 3]) -> Result<()> {
    match shape.iter().try_fold(1usize, |voxels, &n| voxels.checked_mul(n)) {
        Some(voxels) if voxels <= MAX_VOXELS => Ok(()),
        _ => Err(Error::Usage(format!(
            "{shape:?} voxels are more than the CUDA engine can count; use --device cpu for this scan"
        ))),
    }
}

/// See [`SelfTest`].
pub const SELF_TESTS: &[SelfTest] = &[SelfTest { name: "resample", run: self_test }];

/// An oblique scan to the network's grid, and a mask back.
fn self_test(cuda: &Arc<Cuda>) -> Result<String> {
    let shape @ [ni, nj, _] = [14, 15, 11];
    let affine =
        [[-0.77, 0.11, -0.35, 7.25], [0.13, 0.79, 0.9, -31.5], [0.02, -0.24, 2.6, 9.0], [0.0, 0.0, 0.0, 1.0]];
    let p = Preprocess { spacing_mm: [1.5, 1.5, 2.0], hu_window: [-57.0, 164.0], crop_foreground: false };
    let voxels: Vec<f32> = uniform(1, shape.iter().product()).iter().map(|v| 200.0 * v).collect();
    let file_order = Strides { first: 0, step: [1, ni as isize, (ni * nj) as isize] };
    let want =
        preprocess(&Volume { shape, data: gather(shape, file_order, |at| voxels[at]), affine }, None, &p)?;
    let organ = uniform(2, want.image.len());
    let probabilities: Vec<_> = organ.iter().map(|p| [0.5 - p / 2.0, 0.5 + p / 2.0]).collect();
    let want_mask = want.geometry.invert_argmax(&probabilities)?;

    let planned = Geometry::plan(shape, &affine, p.spacing_mm)?;
    let got = cuda::prepare(cuda, &FileVoxels::F32(voxels), planned, &p)?;
    let mask = cuda::invert_argmax(&cuda.upload(probabilities.as_flattened())?, &got.geometry)?;
    let mut image = got.image.download()?;
    image.truncate(want.image.len());
    let floats = |mask: &[u8]| mask.iter().map(|&m| f32::from(m)).collect();
    let (got, want_mask) = (floats(&mask.download()?), floats(&want_mask));
    agree(&[
        Compared { name: "image", got: image, want: want.image.data, allowed: stored(cuda) },
        Compared { name: "mask", got, want: want_mask, allowed: 0.0 },
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strides(step: [isize; 3]) -> Strides {
        Strides { first: 0, step }
    }

    #[test]
    fn lanes_follow_the_source_and_turn_to_the_result() {
        // A RAS file (i fastest) onto our order (k fastest).
        let out = [270, 271, 224];
        let found = plan(out, &strides([1, 512, -262144]), &strides([271 * 224, 224, 1]));
        assert_eq!(found, Plan { lane_axis: 0, row_axis: 2, turn: true, blocks: 9 * 7 * 271 });
        // Sagittal slices: the file runs along k already.
        let found = plan(out, &strides([262144, 512, -1]), &strides([271 * 224, 224, 1]));
        assert_eq!(found, Plan { lane_axis: 2, row_axis: 1, turn: false, blocks: 7 * 9 * 270 });
        // Two axes of one step: that of one voxel leads nowhere.
        let found = plan([1, 40, 40], &strides([1, 1, 40]), &strides([1600, 40, 1]));
        assert_eq!(found, Plan { lane_axis: 1, row_axis: 2, turn: true, blocks: 4 });
    }

    #[test]
    fn what_cannot_be_counted_is_refused() {
        assert!(countable([1 << 10, 1 << 10, (1 << 11) - 1]).is_ok());
        let err = countable([1 << 11, 1 << 10, 1 << 10]).unwrap_err().to_string();
        assert!(err.contains("--device cpu"), "{err}");
        assert!(countable([usize::MAX, 2, 2]).is_err());
    }
}
